"""One tissue section: the container `Slide`, and what all its readers need (labels, images, scale).

Everything is joined by barcode, never by row order.
"""

from __future__ import annotations

import copy
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from PIL import Image

from plainst.readers.checked import (
    DataError,
    check_stored_size,
    open_h5,
    read_table,
)


@dataclass(eq=False)
class Slide:
    """N spots (or cells) x G genes of one tissue section. Unlabelled spots stay in: they are
    tissue.

    counts (N, G) CSR raw integer counts, or None when loaded with counts=False; genes (G,) symbols;
    barcodes (N,); xy (N, 2) full-resolution pixels, x right, y down; grid (N, 2) integer lattice
    row, column or None; labels (N,) index into classes, -1 = none; image (H, W, 3) uint8 or None
    (given as an array, or as a function without arguments that is called on first use); image_scale
    image px per full-resolution px; patches lazily read (N, h, w, 3) uint8 or None; um_per_px
    micrometres per full-resolution px; source the file that holds the counts; library_size (N,)
    total counts of a spot over ALL measured genes when the file tells (its matrix may hold a gene
    subset), else None; tables the text files read beside the counts (positions, labels, library
    sizes); image_file the file of the image or ''.
    """

    counts: sp.csr_matrix | None
    genes: np.ndarray
    barcodes: np.ndarray
    xy: np.ndarray
    grid: np.ndarray | None = None
    labels: np.ndarray | None = None
    classes: list[str] = field(default_factory=list)
    image: np.ndarray | Callable[[], np.ndarray] | None = None
    image_scale: float | None = None
    patches: Patches | None = None
    um_per_px: float | None = None
    sample: str = ""
    patient: str = ""
    source: str = ""
    library_size: np.ndarray | None = None
    tables: list[str] = field(default_factory=list)
    image_file: str = ""

    def __post_init__(self):
        if self.labels is None:
            self.labels = np.full(self.n_spots, -1, dtype=np.int64)

    @property
    def n_spots(self) -> int:
        return len(self.barcodes)

    @property
    def n_genes(self) -> int:
        return len(self.genes)

    def __repr__(self) -> str:
        return (
            f"Slide({self.sample!r}, {self.n_spots} spots x {self.n_genes} genes, "
            f"{len(self.classes)} classes, source={self.source!r})"
        )

    def subset(self, rows) -> Slide:
        """The slide of the spots in `rows` (boolean mask (N,) or index array, in that order); image
        and patches stay unread."""
        rows = np.asarray(rows)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
        out = copy.copy(self)
        for name in ("counts", "barcodes", "xy", "grid", "labels", "library_size"):
            value = getattr(self, name)
            setattr(out, name, None if value is None else value[rows])
        out.patches = None if self.patches is None else self.patches.subset(rows)
        return out

    def select_genes(self, names: Sequence[str]) -> Slide:
        """The slide with the genes `names`, in that order. Raises DataError when one of them is
        absent: an absent gene is missing, not zero."""
        column = {gene: j for j, gene in enumerate(self.genes)}
        absent = [name for name in names if name not in column]
        if absent:
            raise DataError(
                f"{self.source or self.sample} lacks {len(absent)} of the {len(names)} genes "
                f"asked for ({', '.join(absent[:5])} ...): "
                "ask for genes common to all slides"
            )
        columns = np.array([column[name] for name in names], dtype=np.int64)
        out = copy.copy(self)
        out.genes = self.genes[columns]
        out.counts = None if self.counts is None else self.counts[:, columns]
        return out


def _get_image(slide: Slide) -> np.ndarray | None:
    if callable(slide._image):
        slide._image = slide._image()
    return slide._image


def _set_image(slide: Slide, value) -> None:
    if isinstance(value, np.ndarray):
        value = as_uint8(value)
    slide._image = value


# After the decorator, so that the dataclass keeps None as the field's default while reading goes
# through the property.
Slide.image = property(_get_image, _set_image, doc="(H, W, 3) uint8 or None, read on first use")


def as_uint8(image: np.ndarray) -> np.ndarray:
    """(H, W), (H, W, 3) or (H, W, 4), uint8 or float in [0, 1] -> (H, W, 3) uint8."""
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)):
        raise DataError(
            f"an image of shape {image.shape} cannot be used: give (H, W), (H, W, 3) or (H, W, 4)"
        )
    if image.dtype != np.uint8:
        if image.dtype.kind != "f" or not (image.size and 0 <= image.min() and image.max() <= 1):
            raise DataError(
                f"an image of {image.dtype} with values outside 0 .. 1 cannot be used: give "
                "uint8, or floats from 0 to 1"
            )
        image = np.rint(np.asarray(image, dtype=np.float32) * 255).astype(np.uint8)
    return np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image[..., :3]


class Patches:
    """(N, h, w, 3) uint8 patches in an HDF5 file, read when indexed; `rows` are the rows of the
    file that belong to this slide, in its order.

    The file is opened for every read and closed after it, so the object can be copied to worker
    processes.
    """

    def __init__(self, path, rows: np.ndarray | None = None):
        self.path = str(path)
        with open_h5(path, "HEST patches") as handle:
            shape = handle["img"].shape
            check_stored_size(handle["img"])
            if len(shape) != 4 or shape[3] != 3 or handle["img"].dtype != np.uint8:
                raise DataError(
                    f"{path} holds img of shape {shape}, {handle['img'].dtype}: it must be "
                    "(N, h, w, 3) uint8"
                )
        self.rows = np.arange(shape[0]) if rows is None else np.asarray(rows, dtype=np.int64)
        self.shape = (len(self.rows), *shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, rows) -> Patches:
        return Patches(self.path, self.rows[rows])

    def __getitem__(self, item) -> np.ndarray:
        """int -> (h, w, 3); slice, index array or boolean mask -> (n, h, w, 3), in the order asked
        for."""
        wanted = self.rows[item]
        rows, inverse = np.unique(wanted, return_inverse=True)
        # h5py reads a run of rows much faster than a list of them
        starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
        out = np.empty((len(rows), *self.shape[1:]), dtype=np.uint8)
        with open_h5(self.path, "HEST patches") as handle:
            for start, stop in zip(starts, [*starts[1:], len(rows)]):
                handle["img"].read_direct(
                    out, np.s_[rows[start] : rows[stop - 1] + 1], np.s_[start:stop]
                )
        return out[0] if np.ndim(wanted) == 0 else out[inverse.reshape(-1)]  # (n, h, w, 3)


def read_metadata(path) -> tuple[dict[str, dict[str, str]], str | None]:
    """spatialLIBD metadata.tsv -> {barcode: row} and its label column. R writes row names that have
    no header: rows may be one field longer."""
    header, rows = read_table(path)
    label = next(
        (name for name in ("layer_guess", "layer_guess_reordered") if name in header), None
    )
    table = {}
    for row in rows:
        if len(row) != len(rows[0]) or not 0 <= len(row) - len(header) <= 1:
            raise DataError(
                f"{path} has a row of {len(row)} fields ({row[0]} ...) under {len(header)} "
                "column names: it is damaged, copy it again"
            )
        record = dict(zip(header, row[len(row) - len(header) :]))
        barcode = record.get("barcode", row[0])
        if barcode in table:
            raise DataError(f"{path} holds barcode {barcode} twice: give one row per barcode")
        table[barcode] = record
    return table, label


def library_of(totals, path) -> np.ndarray | None:
    """Total counts (N,) float64, None where one is missing (NaN). Raises DataError where one is
    negative or infinite."""
    totals = np.asarray(totals, dtype=np.float64)
    if (totals < 0).any() or np.isinf(totals).any():
        raise DataError(
            f"{path} has a sum_umi that is negative or infinite: correct it or take the column out"
        )
    return None if np.isnan(totals).any() else totals


def unique_genes(genes: np.ndarray, path) -> np.ndarray:
    """Repeated symbols become SYMBOL, SYMBOL-1, ... as anndata's var_names_make_unique does:
    distinct Ensembl ids are distinct columns."""
    taken, used, seen, out = set(genes.tolist()), Counter(), set(), []
    for gene in genes.tolist():
        name = gene
        while name in seen or (name != gene and name in taken):
            used[gene] += 1
            name = f"{gene}-{used[gene]}"
        seen.add(name)
        out.append(name)
    renamed = [gene for gene, name in zip(genes.tolist(), out) if gene != name]
    if renamed:
        warnings.warn(
            f"{path}: {len(renamed)} repeated gene symbols ({', '.join(renamed[:3])}) were "
            "made unique by -1, -2, ...",
            stacklevel=3,
        )
    return np.array(out, dtype=str)


NO_LABEL = frozenset({"", "na", "nan", "none", "<na>", "undetermined"})
_CORTEX = {**{f"L{i}": f"Layer{i}" for i in range(1, 7)}, "WM": "WM"}


def encode_labels(names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Label names -> labels (N,) int64 with -1 for none, classes in alphabetical order (Layer1 ..
    Layer6, WM for the cortex)."""
    names = ["" if str(name).strip().lower() in NO_LABEL else str(name).strip() for name in names]
    if set(names) - {""} <= set(_CORTEX):
        names = [_CORTEX.get(name, "") for name in names]
    classes = sorted(set(names) - {""})
    code = {name: i for i, name in enumerate(classes)}
    return np.array([code.get(name, -1) for name in names], dtype=np.int64), classes


def read_label_table(path, sample: str) -> dict[str, str]:
    """{barcode: label} from metadata.tsv, barcode_level_layer_map.tsv (barcode, slice, label) or a
    two-column file, header or not."""
    header, rows = read_table(path)
    if "layer_guess" in header or "layer_guess_reordered" in header:
        table, label = read_metadata(path)
        return {barcode: record[label] for barcode, record in table.items()}
    rows = [header, *rows]
    width = len(header)
    ragged = next((row for row in rows if len(row) != width), None)
    if ragged:
        raise DataError(
            f"{path} has rows of {width} and of {len(ragged)} fields ({ragged[0]} ...): it is "
            "damaged, or a label with a comma needs quotes"
        )
    if width == 3 and any(row[1] == sample for row in rows):
        rows = [(row[0], row[2]) for row in rows if row[1] == sample]
    elif width != 2:
        raise DataError(
            f"{path} has {width} columns and no rows for {sample}: give two columns, barcode "
            "and label"
        )
    if len(dict(rows)) < len(rows):
        name, n = Counter(row[0] for row in rows).most_common(1)[0]
        raise DataError(f"{path} holds barcode {name} {n} times: give one row per barcode")
    return dict(rows)


def join_labels(table: dict[str, str], barcodes: np.ndarray, path) -> tuple[np.ndarray, list[str]]:
    if not any(barcode in table for barcode in barcodes.tolist()):
        raise DataError(
            f"{path} shares no barcode with the slide (it has {next(iter(table), 'none')}, "
            f"the slide {barcodes[0]}): "
            "give the label file of this slide"
        )
    return encode_labels([table.get(barcode, "") for barcode in barcodes.tolist()])


IMAGE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8."""
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            return np.asarray(image.convert("RGB"))
    except IMAGE_ERRORS as error:
        raise DataError(
            f"{path} cannot be read as an image ({error}): it is truncated, copy it again or "
            "delete it"
        ) from error


def check_fit(xy: np.ndarray, scale: float, height: int, width: int, path) -> None:
    """More than 5 % of the spots outside the image means that scale factor and image are not of one
    slide."""
    if not 0 < scale < float("inf"):
        raise DataError(f"{path} has an image with the scale factor {scale:g}: it must be positive")
    at = xy * scale  # (N, 2) image px
    outside = ((at < 0) | (at >= [width, height])).any(axis=1).mean() if len(at) else 0.0
    if outside > 0.05:
        raise DataError(
            f"{path} ({width} x {height} px) does not fit its scale factor {scale:g}: "
            f"{outside:.0%} of the spots fall outside, "
            "put the image and scalefactors_json.json of the same slide in place"
        )


def lattice_um_per_px(grid: np.ndarray | None, xy: np.ndarray) -> float | None:
    """Micrometres per px of a Visium hexagonal lattice (row + column even, 100 um between
    neighbours), else None.

    The least-squares lattice vectors span 50 x 86.6 um a cell; unlike the distance to the nearest
    spot they average the rounding of coordinates away and bear missing spots.
    `spot_diameter_fullres` is not 55 um: on 151673 it would give .571 um/px, where the lattice
    gives .727.
    """
    if grid is None or (grid.sum(axis=1) % 2).any():
        return None
    # (3, 2)
    vectors, _, rank, _ = np.linalg.lstsq(
        np.column_stack([grid, np.ones(len(grid))]).astype(np.float64), xy, rcond=None
    )
    area = abs(np.linalg.det(vectors[:2]))  # px^2 of one step in row x one step in column
    return float(np.sqrt(50.0 * 50.0 * np.sqrt(3.0) / area)) if rank == 3 and area > 0 else None
