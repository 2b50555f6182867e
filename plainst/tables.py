"""Tables of spots or cells as CSV: one row a spot, its barcode first."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# rows that are formatted at a time, so that a million of them need little memory
ROWS = 65_536


@dataclass
class Table:
    """What a method decided about N spots or cells.

    ids (N,) barcodes, or names of cells; columns {name: (N,)} numbers (NaN = missing), booleans, or
    strings ('' = missing), which are categories; kind `spots` or `cells`. A `/` in the name of a
    column becomes `_`, because HDF5 would read it as a folder. Raises ValueError where a column is
    of another length or kind.
    """

    ids: np.ndarray
    columns: dict[str, np.ndarray]
    kind: str = "spots"

    def __post_init__(self):
        self.ids = np.asarray(self.ids).astype(str)
        renamed = {}
        for name, values in self.columns.items():
            name = plain = str(name).replace("/", "_").replace("\0", "")
            repeats = 0
            while name in renamed or name in ("", ".", "_index", self.id_name):
                repeats += 1
                name = f"{plain}-{repeats}"
            values = np.asarray(values)
            if values.shape != self.ids.shape or values.dtype.kind not in "biufU":
                raise ValueError(
                    f"column {name} is {values.dtype} of shape {values.shape} for "
                    f"{len(self.ids)} {self.kind}"
                )
            renamed[name] = values
        self.columns = renamed

    @property
    def id_name(self) -> str:
        """Name of the first column in a CSV."""
        return "barcode" if self.kind == "spots" else "id"


def names_of(codes: np.ndarray, classes: Sequence[str] | None = None) -> np.ndarray:
    """Class numbers (N,) -> class names (N,), '' for -1; without `classes` the numbers as text.
    Raises ValueError for a number that has no name."""
    codes = np.asarray(codes)
    if classes is None:
        classes = [str(code) for code in range(int(codes.max(initial=-1)) + 1)]
    if codes.size and not -1 <= codes.min() <= codes.max() < len(classes):
        raise ValueError(f"class numbers {codes.min()} to {codes.max()} of {len(classes)} classes")
    return np.array([*classes, ""], dtype=str)[codes]


def write_csv(file, tables: Sequence[Table], genes: Sequence[str] = (), x: Sequence = ()) -> None:
    """The tables, which have the same columns, one below the other to an open binary file: id
    first, missing values empty, every float with the digits that give it back.

    genes (G,), x: for each table a dense (N, G) matrix that stands behind its columns.
    """
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow([tables[0].id_name, *tables[0].columns, *genes])
    for i, table in enumerate(tables):
        columns = [*table.columns.values(), *(x[i].T if len(genes) else ())]
        for start in range(0, len(table.ids), ROWS):
            part = slice(start, start + ROWS)
            fields = [_text(values[part]) for values in columns]
            rows.writerows(zip(table.ids[part].tolist(), *fields))
    # or the file would be closed with it
    text.detach()


def _text(values: np.ndarray) -> list:
    """Values as they stand in a CSV; a float32 as its own shortest form (0.1), not that of the
    float64 nearest to it."""
    if values.dtype.kind != "f":
        return values.tolist()
    text = values.astype(str)
    text[np.isnan(values)] = ""
    return text.tolist()


def write_loupe(file, table: Table, name: str) -> None:
    """`Barcode,<name>` with one row per spot that has a value, for Loupe's import of categories, to
    an open binary file."""
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["Barcode", name])
    pairs = zip(table.ids.tolist(), table.columns[name].tolist())
    rows.writerows((barcode, value) for barcode, value in pairs if value)
    text.detach()
