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

from plainst.classes import sorted_classes
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
    subset), else None; tables the text files read beside the counts (positions, scale factors,
    labels, metadata); image_file the file of the image or ''.
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


def read_metadata(path, label_key=None) -> tuple[dict[str, dict[str, str]], str | None]:
    """spatialLIBD metadata.tsv, or any table with a header and a barcode column (else the first)
    -> {barcode: row} and its label column, `label_key` where given. R writes row names that have no
    header: rows may be one field longer."""
    header, rows = read_table(path)
    if label_key is not None and label_key not in header:
        raise DataError(
            f"{path} has no column {label_key}: choose one of {', '.join(header)} with --label_key"
        )
    known = (name for name in ("layer_guess", "layer_guess_reordered") if name in header)
    label = label_key or next(known, None)
    barcode_key = next((name for name in header if name.lower() == "barcode"), None)
    table = {}
    for row in rows:
        if len(row) != len(rows[0]) or not 0 <= len(row) - len(header) <= 1:
            raise DataError(
                f"{path} has a row of {len(row)} fields ({row[0]} ...) under {len(header)} "
                "column names: it is damaged, copy it again"
            )
        record = dict(zip(header, row[len(row) - len(header) :]))
        barcode = record.get(barcode_key, row[0])
        if barcode in table:
            raise DataError(f"{path} holds barcode {barcode} twice: give one row per barcode")
        table[barcode] = record
    return table, label


def library_of(totals, path) -> np.ndarray | None:
    """Total counts (N,) float64; None, with a warning, where some are missing (NaN). Raises
    DataError where one is negative or infinite."""
    totals = np.asarray(totals, dtype=np.float64)
    if (totals < 0).any() or np.isinf(totals).any():
        raise DataError(
            f"{path} has a sum_umi that is negative or infinite: correct it or take the column out"
        )
    missing = int(np.isnan(totals).sum())
    if missing:
        # totals of one kind for all spots: a row sum over a gene subset is no neighbour of sum_umi
        warnings.warn(
            f"{path} gives no sum_umi for {missing} of the {len(totals)} spots: every spot of the "
            "slide takes the row sum of its counts instead; complete the column to use it",
            stacklevel=3,
        )
        return None
    return totals


def beside(folder: Path, name: str) -> Path | None:
    """The file `name` in the folder or in the one above, where one serves all slices."""
    paths = (base / name for base in (folder, folder.parent))
    return next((path for path in paths if path.is_file()), None)


def donor_of(folder: Path, sample: str) -> tuple[str, list[str]]:
    """Donor of a sample from slice_donors.csv (slice, donor; the DLPFC download writes it) in the
    folder or the one above, and the files read; '' without one."""
    path = beside(folder, "slice_donors.csv")
    if path is None:
        return "", []
    header, rows = read_table(path)
    is_table = header == ["slice", "donor"] and all(len(row) == 2 for row in rows)
    if not is_table or len(dict(rows)) < len(rows):
        raise DataError(
            f"{path} is no table of the columns slice,donor with a row per slice: correct or "
            "delete it"
        )
    return dict(rows).get(sample, ""), [str(path)]


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


# columns that hold labels in public files, in the order in which they are believed
LABEL_KEYS = (
    "sce.layer_guess",
    "layer_guess",
    "label",
    "labels",
    "Layer",
    "layer",
    "ground_truth",
    "Ground Truth",
    "Region",
    "region",
)
NO_LABEL = frozenset({"", "na", "nan", "none", "<na>", "undetermined"})
_CORTEX = {**{f"L{i}": f"Layer{i}" for i in range(1, 7)}, "WM": "WM"}


def label_names(values: np.ndarray) -> list[str]:
    """Label values (N,) of any kind -> names, '' where missing. A whole number in a float column
    (pandas makes floats of integers with gaps) is named without '.0'."""
    if values.dtype.kind != "f":
        return [str(value) for value in values.tolist()]
    finite = values[np.isfinite(values)]
    if (finite == np.rint(finite)).all():
        return [str(int(v)) if np.isfinite(v) else "" for v in values.tolist()]
    return ["" if np.isnan(v) else str(v) for v in values.tolist()]


def has_label(name) -> bool:
    return str(name).strip().lower() not in NO_LABEL


def encode_labels(names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Label names -> labels (N,) int64 with -1 for none, classes in the order of
    `sorted_classes`."""
    names = [str(name).strip() if has_label(name) else "" for name in names]
    if set(names) - {""} <= set(_CORTEX):
        names = [_CORTEX.get(name, "") for name in names]
    classes = sorted_classes(set(names) - {""})
    code = {name: i for i, name in enumerate(classes)}
    return np.array([code.get(name, -1) for name in names], dtype=np.int64), classes


@dataclass
class LabelTable:
    """{barcode: label} of one file, and the name of the sample that the file says it is of ('' =
    it does not say)."""

    labels: dict[str, str]
    sample: str
    path: str


def sample_named(table: dict[str, dict[str, str]]) -> str:
    """The one sample_name of the rows of `read_metadata`, '' where there is none or several."""
    names = {record.get("sample_name", "") for record in table.values()}
    return names.pop() if len(names) == 1 else ""


def read_label_table(path, sample: str, label_key: str | None = None) -> LabelTable:
    """Labels from metadata.tsv, barcode_level_layer_map.tsv (barcode, slice, label), a two-column
    file, header or not, or the column `label_key` of any table with a header."""
    header, rows = read_table(path)
    if label_key or {"layer_guess", "layer_guess_reordered"} & set(header):
        table, label = read_metadata(path, label_key)
        names = {barcode: record.get(label, "") for barcode, record in table.items()}
        return LabelTable(names, sample_named(table), str(path))
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
            "and label, or name the label column with --label_key"
        )
    if len(dict(rows)) < len(rows):
        name, n = Counter(row[0] for row in rows).most_common(1)[0]
        raise DataError(f"{path} holds barcode {name} {n} times: give one row per barcode")
    return LabelTable(dict(rows), "", str(path))


# Barcodes repeat on every Visium slide: tables of two slides share 72 to 100 % of them. Labels of
# one of the twelve DLPFC slices on another (132 pairs): 123 times more than 1 % of them lie on bare
# glass, 7 times fewer do, twice none, with 23 % of the spots left without a row. A slide's own
# labels: never one on glass, at most 3.2 % of the spots without a row.
STRAY, GAP, COVER = 0.01, 0.05, 0.5


def check_partners(table: LabelTable, barcodes: np.ndarray, samples=(), tissue=None) -> None:
    """Whether a table is of the slide of barcodes (N,).

    samples: the names the slide goes by; tissue: barcodes of all its in-tissue spots where the
    slide tells (its counts may hold fewer), else None. Raises DataError, naming the file, where it
    covers fewer than half of the spots, labels spots off the tissue or says it is of another
    sample; warns where less speaks for another slide.
    """
    codes = barcodes.tolist()
    path, n = table.path, len(codes)
    gaps = sum(code not in table.labels for code in codes)
    if gaps == n:
        raise DataError(
            f"{path} shares no barcode with the slide (it has {next(iter(table.labels), 'none')}, "
            f"the slide {codes[0]}): give the label file of this slide"
        )
    if gaps > COVER * n:
        raise DataError(
            f"{path} names {n - gaps} of the {n} spots: give the label file of this slide, with a "
            "row for every spot, NA where a spot has no label"
        )
    known = set(codes) if tissue is None else set(tissue)
    header = next(iter(table.labels))  # of a two-column file, where it is no barcode
    labelled = [
        code
        for code, name in table.labels.items()
        if has_label(name) and (code != header or code in known)
    ]
    stray = sum(code not in known for code in labelled)
    is_far = stray > STRAY * max(len(labelled), 1)
    if table.sample and samples and table.sample not in samples and (is_far or gaps > STRAY * n):
        raise DataError(
            f"{path} is of sample {table.sample}, the slide is {samples[0]}, and {gaps} spots and "
            f"{stray} labels find no partner: give the label file of this slide"
        )
    if is_far and tissue is not None:
        raise DataError(
            f"{path} labels {stray} spots that lie off the tissue of this slide: give the label "
            "file of this slide, or take these rows out"
        )
    if stray or gaps > GAP * n:
        warnings.warn(
            f"{path} has no row for {gaps} of the {n} spots and labels {stray} spots that the "
            "slide lacks: check that it is of this slide",
            stacklevel=4,
        )


def join_labels(table: LabelTable, barcodes: np.ndarray, samples=(), tissue=None):
    """Labels of the slide's barcodes (N,) from a table that `check_partners` lets pass: labels
    (N,) int64, classes."""
    check_partners(table, barcodes, samples, tissue)
    return encode_labels([table.labels.get(barcode, "") for barcode in barcodes.tolist()])


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
