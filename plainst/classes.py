"""The order of class names: by which they are numbered, and whether it means anything."""

import re
from collections.abc import Iterable, Sequence

import numpy as np

_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")
_LAYER = re.compile(r"(layer|l)[ _]?(\d+)", re.IGNORECASE)
_WHITE_MATTER = ("wm", "white matter")


def sorted_classes(names: Iterable[str]) -> list[str]:
    """The names, each once, in the order in which classes are numbered: whole numbers by value (2
    before 10), then names by the alphabet (Layer1 .. Layer6, WM for the cortex)."""

    def key(name: str) -> tuple[float, str]:
        is_whole = name.isascii() and name.isdigit()
        return (int(name) if is_whole else np.inf, name)

    return sorted(set(names), key=key)


def class_ranks(names: Sequence[str]) -> np.ndarray | None:
    """Rank (C,) int of every class name where the names have an order, else None.

    They have one if all are numbers (1, 2, 10: by value), or layers of the cortex from pia to
    white matter (Layer1 .. Layer6 or L1 .. L6, then WM). Names of equal value have none.
    """
    names = [str(name).strip() for name in names]
    layers = [_LAYER.fullmatch(name) for name in names]
    is_white_matter = [name.lower() in _WHITE_MATTER for name in names]
    if all(_NUMBER.fullmatch(name) for name in names):
        values = [float(name) for name in names]
    elif all(layer or white for layer, white in zip(layers, is_white_matter)):
        values = [float(layer[2]) if layer else np.inf for layer in layers]
    else:
        return None
    distinct, rank = np.unique(values, return_inverse=True)
    return rank if len(distinct) == len(names) else None
