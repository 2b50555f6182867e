"""Flags: a dataclass a script, presets over its defaults, typed flags over presets.

A method declares its flags as a dataclass that extends `Config`; the string under each field is its
help text. A preset is a dictionary of flags.
"""

import argparse
import ast
import dataclasses
import functools
import hashlib
import inspect
import itertools
import os
import textwrap
import typing
from dataclasses import dataclass
from pathlib import Path

from plainst.readers.checked import DataError
from plainst.readers.hd import sample_of


@dataclass
class Config:
    """Flags that mean the same in every script."""

    data: str = "datasets/dlpfc"
    "folder with the data (a Visium folder, a folder of slices, an h5ad file, a HEST task folder)"
    slice: str = ""
    "sample to run on, e.g. 151673; may stay empty where the folder holds one sample"
    # {name: {flag: value}}; the first is the default
    presets: typing.ClassVar = {"tuned": {}}

    preset: str = "tuned"
    "a named set of flags; what is typed beside it goes before it"
    seed: int = 0
    "seed of initialisation and training"
    device: str = "auto"
    "auto (cuda where there is one), cpu, cuda, cuda:1"
    threads: int = 0
    "CPU threads; 0 leaves torch's default"
    deterministic: bool = True
    "same seed, same machine, same numbers (costs a little speed on a GPU)"
    bf16: bool = False
    "matrix products of the network in bfloat16 (autocast): for a GPU; most CPUs are slower with it"
    compile: bool = False
    "torch.compile the network: minutes before the first step; on a CPU it needs a C++ compiler"
    runs: str = "runs"
    "folder of the run records"
    h5ad: bool = False
    "write the results as result.h5ad and loupe.csv, too"
    typed: str = ""
    "the flags that stood on the command line (no flag itself)"


@dataclass
class SlideConfig(Config):
    """Flags of a script that reads slides with spots; they name columns where a file has its own
    names."""

    label_key: str = ""
    "column of the labels in an h5ad's obs or in metadata.tsv; empty: the usual names"
    layer: str = ""
    "layer of an h5ad that holds the raw counts; empty: X, or raw.X"
    gene_key: str = ""
    "column with the gene symbols; empty: the names of the matrix"
    library_key: str = ""
    "column of an h5ad's obs that tells its slides apart; none: the file is one tissue"

    def columns(self):
        """The four flags, as arguments of `data.load_slide`."""
        names = ("label_key", "layer", "gene_key", "library_key")
        return {name: getattr(self, name) for name in names}


@functools.cache  # reading the source takes a tenth of a second
def field_help(cls):
    """Field name -> the string literal that stands under it in the class body, base classes
    included."""
    text = field_help(cls.__base__) if dataclasses.is_dataclass(cls.__base__) else {}
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    for field, doc in itertools.pairwise(body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(doc, ast.Expr)
            and isinstance(doc.value, ast.Constant)
        ):
            text[field.target.id] = " ".join(str(doc.value.value).split())
    return text


def parse(cls, argv=None, description=None):
    """Flags -> an instance of the dataclass `cls`: what is typed goes before the preset, and the
    preset before the default of the field.

    Types: bool (--x / --no-x), Literal (choices), int, float and str. The names of the typed flags
    stand in `typed`: a flag typed at its default is not one that was left out.
    """
    presets = cls.presets
    parser = argparse.ArgumentParser(
        description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    text, types = field_help(cls), typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if f.name == "typed":
            continue
        flag, kind = f"--{f.name}", types[f.name]
        note = text.get(f.name, "").replace("%", "%%")
        by_preset = [f"{flags[f.name]} in {p}" for p, flags in presets.items() if f.name in flags]
        note += f" (default: {', '.join([str(f.default), *by_preset])})".replace("%", "%%")
        if f.name == "preset":
            note = f"{text['preset']}: {', '.join(presets)} (default: {next(iter(presets))})"
            parser.add_argument(flag, choices=list(presets), help=note)
        elif kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=note)
        elif typing.get_origin(kind) is typing.Literal:
            parser.add_argument(flag, choices=typing.get_args(kind), help=note)
        else:
            parser.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=note)
    typed = vars(parser.parse_args(argv))
    preset = typed.get("preset", next(iter(presets)))
    values = {"preset": preset, **presets[preset], **typed}
    return cls(**values, typed=" ".join(name for name in typed if name != "preset"))


# flags that a run with --predict takes from its own command line, whatever the method
WITH_PREDICT = (
    *("data", "slice", "seed", "device", "threads", "deterministic", "runs", "cache", "predict"),
    *("h5ad", "encoder"),
)
AT_LEAST_ONE, AT_LEAST_ZERO = (
    (lambda v: v >= 1, "at least 1"),
    (lambda v: 0 <= v < float("inf"), "0 or more"),
)
POSITIVE = (lambda v: 0 < v < float("inf"), "above 0")
SEED = (lambda v: 0 <= v < 2**32, "from 0 to 4294967295")


def check_flags(config, rules):
    """rules {flag: (test of its value, what it must be)}. Raises DataError naming the first flag
    whose test fails; nan passes no comparison."""
    for name, (good, what) in ({"seed": SEED, "threads": AT_LEAST_ZERO} | rules).items():
        if not good(getattr(config, name)):
            raise DataError(f"--{name} is {getattr(config, name)}: it must be {what}")


def of_preset(cls, name):
    """The configuration of a preset, nothing typed."""
    return cls(preset=name, **cls.presets[name])


def refuse_idle_flags(config, rules):
    """rules [(whether it is so, in which case that is, flags that do nothing then)]. Raises
    DataError for the first typed flag that does nothing: silence would let its user believe in it.

    Flags that say where things lie or how fast they go (--cache, --threads) may stand in every
    command of a script; no rule is about them."""
    typed = config.typed.split()
    for is_so, case, names in rules:
        for name in names:
            if is_so and name in typed:
                raise DataError(f"--{name} has no effect {case}: leave it out")


def idle_with_predict(config, used):
    """The rule for --predict: a checkpoint brings its own flags, but for those that are `used`, and
    for those that say where things are."""
    free = {*WITH_PREDICT, *used}
    case = "with --predict, where the checkpoint has its own"
    return bool(config.predict), case, [name for name in vars(config) if name not in free]


def data_name(path):
    """Name of the data in a record's path: the last part of --data as given, so that a link keeps
    its own name; of a cells.h5 its folder. A folder of which every Space Ranger output has one
    (outs, binned_outputs, square_008um) takes the name of the sample above it."""
    path = os.path.abspath(path)
    if os.path.basename(path) == "cells.h5":
        path = os.path.dirname(os.path.realpath(path))
    if os.path.basename(path) == "binned_outputs":
        path = os.path.dirname(path)
    return sample_of(Path(path)).removesuffix(".h5ad").removesuffix(".h5")


# flags that say where, how fast or how often, and so stand in no folder name
SILENT = (
    *("data", "slice", "seed", "device", "threads", "deterministic", "runs", "cache", "predict"),
    *("save_every", "resume", "preset", "typed", "h5ad"),
)


def variant(config, words=(), silent=(), default=None, files=()):
    """Folder name of a run: its preset, `words`, then every flag that the preset has otherwise, as
    name-value.

    silent: flags that `words` tell already, or that change no number; default: the configuration
    of the preset; files: flags that hold paths. A path is told by its last part and 8 hex digits
    of the whole, because files of one name in two folders differ.
    """
    default = default or of_preset(type(config), config.preset)
    words = [config.preset, *words]
    for name, value in vars(config).items():
        if name in (*SILENT, *silent) or value == getattr(default, name):
            continue
        text = str(value)
        last = Path(text).name.replace(",", "+")
        plain = "".join(c if c.isalnum() or c in "._+" else "_" for c in last)
        is_path = "/" in text or name in files
        mark = f"_{hashlib.sha256(text.encode()).hexdigest()[:8]}" if is_path else ""
        words.append(f"{name}-{plain}{mark}")
    return "-".join(words)


def resumable(config):
    """{flag: value} of the flags that must not change between a checkpoint and --resume."""
    free = (
        "resume",
        "save_every",
        "runs",
        "device",
        "threads",
        "cache",
        "predict",
        "atlas",
        "h5ad",
        "typed",
    )
    return {name: value for name, value in vars(config).items() if name not in free}
