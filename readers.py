"""Files -> Slide: readers for Space Ranger (Visium, Visium HD) folders, AnnData h5ad files and HEST
folders.

They need h5py, numpy, scipy and pillow only. Everything is joined by barcode, never by row order;
whatever is wrong with a file is reported as a `DataError` of one sentence with its path and a
remedy. `data` passes all public names on: `data.load_slide(...)` is how the project calls them.
"""

from __future__ import annotations

import copy
import csv
import functools
import hashlib
import io
import json
import os
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import scipy.sparse as sp
from PIL import Image


class DataError(ValueError):
    """Input that cannot be used; the message is one sentence that names the file and the remedy.

    It may quote a damaged file: what cannot be printed, line breaks and terminal codes too, is
    written as an escape, and the middle of a long message is left out.
    """

    def __init__(self, message: str = ""):
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(message))
        super().__init__(text if len(text) <= 1200 else f"{text[:800]} ... {text[-300:]}")


# -------------------------------------------------------------------------------------------- slide
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
        value = _as_uint8(value)
    slide._image = value


# After the decorator, so that the dataclass keeps None as the field's default while reading goes
# through the property.
Slide.image = property(_get_image, _set_image, doc="(H, W, 3) uint8 or None, read on first use")


def _as_uint8(image: np.ndarray) -> np.ndarray:
    """(H, W), (H, W, 3) or (H, W, 4), uint8 or float in [0, 1] -> (H, W, 3) uint8."""
    if image.ndim not in (2, 3) or image.ndim == 3 and image.shape[2] not in (3, 4):
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


def file_checksum(*paths) -> str:
    """SHA-256 (hex) of the bytes of the files, one after the other; of one file it is what
    `sha256sum` prints."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            with open(path, "rb") as handle:
                for block in iter(lambda: handle.read(1 << 20), b""):
                    digest.update(block)
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}): check the path") from error
    return digest.hexdigest()


# ---------------------------------------------------------------------------------- checks and HDF5
# What reading a broken file can raise, beside OSError: h5py and libhdf5; numpy, its header parser,
# zipfile and zlib; the json module.
H5_ERRORS = (
    OSError,
    KeyError,
    ValueError,
    TypeError,
    IndexError,
    RuntimeError,
    AttributeError,
    OverflowError,
    MemoryError,
)
NPZ_ERRORS = (
    *H5_ERRORS,
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    SyntaxError,
    tokenize.TokenError,
    struct.error,
)
JSON_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
)


class _CheckedFile(io.FileIO):
    """What h5py reads from. libhdf5 walks the objects of a string heap by their declared sizes and
    never ends at a size of 0, inside C where no time limit reaches it; such a heap is blanked, so
    that libhdf5 refuses it, and `broken` says so."""

    broken = False

    def readinto(self, buffer) -> int:
        view, start, n = memoryview(buffer).cast("B"), self.tell(), 0
        # one read of the system ends at 2 GB
        while n < len(view) and (more := super().readinto(view[n:])):
            n += more
        # h5py does not look at the number: beyond the end are zeros
        view[n:] = bytes(len(view) - n)
        if view[:5] == b"GCOL\1" and not self._heap_ends(
            start, int.from_bytes(view[8:16], "little")
        ):
            self.broken, view[:4] = True, bytes(4)
        return len(view)

    def _heap_ends(self, start: int, size: int) -> bool:
        """Whether the objects of the heap (HDF5 File Format Specification, III.E: 16 bytes of head,
        then 16 of head and the content of each) fill it."""
        self.seek(start)
        heap = self.read(min(size, os.fstat(self.fileno()).st_size))
        at = 16
        while at + 16 <= len(heap):
            index, length = struct.unpack_from("<H6xQ", heap, at)
            # object 0 is the free space, its head included
            step = 16 + (length + 7) // 8 * 8 if index else length
            if step < 16:
                return False
            at += step
        return at <= size


@contextmanager
def open_h5(path, what: str):
    """h5py.File for reading; whatever goes wrong while the file is in use becomes a DataError about
    `path`, which is no whole `what`."""
    if not Path(path).is_file():
        raise DataError(f"{path} does not exist: check the path or download it")
    try:
        with _CheckedFile(path) as checked, h5py.File(checked, "r") as handle:
            if handle.id.get_create_plist().get_sizes() != (8, 8):
                raise ValueError("its sizes are not of 8 bytes")
            yield handle
            if checked.broken:
                raise ValueError("a string heap is broken")
    except DataError:
        raise
    except H5_ERRORS as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{path} cannot be read as {what} ({reason}): it is truncated or of another kind, "
            "download or export it again"
        ) from error


def _check_size(node) -> None:
    """Raise ValueError unless `node` is a dataset that lies in this file and whose size its bytes
    on disk can explain (zlib packs 1 : 1030)."""
    if not isinstance(node, h5py.Dataset):
        raise ValueError(f"{node.name} is no array")
    if node.is_virtual or node.external:
        raise ValueError(f"{node.name} lies in another file")
    n_bytes, stored = (node.size or 0) * node.dtype.itemsize, node.id.get_storage_size()
    if n_bytes > 1 << 26 and n_bytes > 2000 * stored:
        raise ValueError(f"{node.name} declares {n_bytes} bytes and stores {stored}")


def read_array(node, kinds: str, shape: tuple | None = None) -> np.ndarray:
    """Dataset -> array of one of the numpy kinds, and of `shape` where that is given. Raises
    ValueError."""
    _check_size(node)
    if node.dtype.kind not in kinds or shape is not None and node.shape != shape:
        raise ValueError(
            f"{node.name} is {node.dtype} of shape {node.shape}"
            + (f" instead of {shape}" if shape is not None else "")
        )
    return node[()]


def _decode(values) -> np.ndarray:
    """HDF5 dataset, or a field read from a compound one, -> numpy array, with str for any kind of
    string. Raises ValueError for other objects."""
    if isinstance(values, (h5py.Dataset, h5py.Group)):
        _check_size(values)
        values = values[()]
    values = np.asarray(values)
    if values.dtype.kind == "O":
        if not all(isinstance(v, (bytes, str)) for v in values.flat):
            raise ValueError("objects where strings should be")
        values = np.array(
            [v.decode("utf-8") if isinstance(v, bytes) else v for v in values.ravel().tolist()],
            dtype=str,
        ).reshape(values.shape)
    if values.dtype.kind not in "SUbiuf":
        raise ValueError(f"{values.dtype} where strings or numbers should be")
    return np.char.decode(values, "utf-8") if values.dtype.kind == "S" else values


def _names(node, n: int | None = None) -> np.ndarray:
    """HDF5 dataset -> (n,) str. Raises ValueError."""
    values = _decode(node)
    if values.dtype.kind != "U" or values.ndim != 1 or n not in (None, len(values)):
        raise ValueError(
            f"{node.name} is {values.dtype} of shape {values.shape} instead of "
            f"{'a list of' if n is None else n} names"
        )
    return values


def read_npz(path, *names: str) -> list[np.ndarray]:
    """The arrays `names` of an .npz file. Raises DataError: unreadable, damaged, pickled or lacking
    one."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = [arrays[name] for name in names]
    except NPZ_ERRORS as error:
        raise DataError(
            f"{path} is not a whole .npz file with {', '.join(names)} "
            f"({error or type(error).__name__}): make it again"
        ) from error
    return found


def read_json(path):
    """What a JSON file holds. Raises DataError."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except JSON_ERRORS as error:
        raise DataError(
            f"{path} cannot be read as JSON ({error}): write or copy it again"
        ) from error


def read_gene_list(path) -> list[str]:
    """JSON list of distinct names, or an object that holds it as `genes`, -> names. Raises
    DataError."""
    genes = read_json(path)
    genes = genes.get("genes") if isinstance(genes, dict) else genes
    if (
        not isinstance(genes, list)
        or not all(isinstance(gene, str) for gene in genes)
        or len(set(genes)) < len(genes)
    ):
        raise DataError(
            f"{path} is not a JSON list of distinct gene names: correct it or download it again"
        )
    return genes


def _count_problem(values: np.ndarray) -> str | None:
    """What keeps `values` from being raw counts: 'NaN', 'negative values', 'non-integer values', or
    None."""
    if values.dtype.kind not in "iuf":
        return f"{values.dtype}"
    if values.size and values.dtype.kind == "f" and not np.isfinite(values).all():
        return "NaN or infinite values"
    if values.size and values.min() < 0:
        return "negative values"
    if values.size and values.dtype.kind == "f" and (values != np.rint(values)).any():
        return "non-integer values"
    return "values above 2^31" if values.size and values.max() > np.iinfo(np.int32).max else None


def _count_matrix(data, indices, indptr, shape) -> sp.csr_matrix:
    """CSR int32 in canonical form: sorted, no duplicates, no stored zeros (a gene filter may count
    stored entries). Raises ValueError."""
    if (
        {indices.dtype.kind, indptr.dtype.kind} - set("iu")
        or indptr.shape != (int(shape[0]) + 1,)
        or indptr[-1] != len(data)
    ):
        raise ValueError(
            f"{len(indptr)} row pointers and {len(indices)} columns do not make a {shape[0]} "
            f"x {shape[1]} matrix of {len(data)} values"
        )
    matrix = sp.csr_matrix(
        (data.astype(np.int32), indices, indptr), shape=tuple(int(n) for n in shape)
    )
    matrix.check_format(full_check=True)
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    return matrix


def check_xy(xy: np.ndarray, n: int, path) -> np.ndarray:
    """Positions as (n, 2) float64. Raises DataError unless they are finite numbers that can be
    pixels."""
    if (
        xy.dtype.kind not in "iuf"
        or xy.shape != (n, 2)
        or not (np.abs(np.asarray(xy, dtype=np.float64)) < 1e9).all()
    ):
        raise DataError(
            f"{path} has coordinates of {xy.dtype}, shape {xy.shape}, for {n} spots, or not "
            "finite: it needs one finite x, y in px per spot"
        )
    return xy.astype(np.float64)


def _check_unique(barcodes: np.ndarray, path) -> None:
    if len(np.unique(barcodes)) != len(barcodes):
        name, n = Counter(barcodes.tolist()).most_common(1)[0]
        raise DataError(
            f"{path} holds barcode {name} {n} times: make barcodes unique (one file per slide)"
        )


def _unique_genes(genes: np.ndarray, path) -> np.ndarray:
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


def read_10x_h5(path, counts: bool = True) -> tuple[sp.csr_matrix | None, np.ndarray, np.ndarray]:
    """10x HDF5 (v3 `matrix/features`, or v2 `<genome>/gene_names`) -> counts (N, G) int32 CSR,
    genes (G,), barcodes (N,).

    The file stores features x barcodes as CSC, which is barcodes x features as CSR. Only 'Gene
    Expression' features are kept. With counts=False
    the matrix is not read: None, no genes, barcodes. Raises DataError (unreadable, NaN, negative or
    non-integer counts, repeated barcodes).
    """
    with open_h5(path, "a 10x HDF5 matrix") as handle:
        groups = (
            [handle["matrix"]]
            if "matrix" in handle
            else [g for g in handle.values() if isinstance(g, h5py.Group) and "gene_names" in g]
        )
        if len(groups) != 1:
            raise DataError(
                f"{path} holds {len(groups)} 10x matrices: give a "
                "filtered_feature_bc_matrix.h5 of one genome"
            )
        group = groups[0]
        barcodes = _names(group["barcodes"])
        _check_unique(barcodes, path)
        if not counts:
            return None, np.array([], dtype=str), barcodes
        genes = _names(group["features/name" if "features" in group else "gene_names"])
        n_genes, n_spots = read_array(group["shape"], "iu", (2,)).tolist()
        if len(barcodes) != n_spots or len(genes) != n_genes:
            raise DataError(
                f"{path} has a {n_genes} x {n_spots} matrix but {len(genes)} genes and "
                f"{len(barcodes)} barcodes: download it again"
            )
        data = read_array(group["data"], "iuf")
        problem = _count_problem(data)
        if problem:
            raise DataError(
                f"{path} holds {problem} in its counts: give the raw matrix that Space Ranger wrote"
            )
        # (N, G)
        matrix = _count_matrix(
            data,
            read_array(group["indices"], "iu"),
            read_array(group["indptr"], "iu"),
            (n_spots, n_genes),
        )
        kinds = (
            _names(group["features/feature_type"], n_genes)
            if "features" in group
            else np.full(n_genes, "Gene Expression")
        )
        keep = np.flatnonzero(kinds == "Gene Expression")
    if not len(keep):
        raise DataError(
            f"{path} holds no feature of type Gene Expression: give a gene expression matrix"
        )
    if len(keep) < len(genes):
        matrix, genes = matrix[:, keep], genes[keep]
    return matrix, _unique_genes(genes, path), barcodes


# ------------------------------------------------------------------------------------------- labels
_NO_LABEL = frozenset({"", "na", "nan", "none", "<na>", "undetermined"})
_CORTEX = {**{f"L{i}": f"Layer{i}" for i in range(1, 7)}, "WM": "WM"}


def _encode_labels(names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Label names -> labels (N,) int64 with -1 for none, classes in alphabetical order (Layer1 ..
    Layer6, WM for the cortex)."""
    names = ["" if str(name).strip().lower() in _NO_LABEL else str(name).strip() for name in names]
    if set(names) - {""} <= set(_CORTEX):
        names = [_CORTEX.get(name, "") for name in names]
    classes = sorted(set(names) - {""})
    code = {name: i for i, name in enumerate(classes)}
    return np.array([code.get(name, -1) for name in names], dtype=np.int64), classes


def _warn_if_cut(path) -> None:
    with open(path, "rb") as handle:
        handle.seek(-min(1, os.path.getsize(path)), os.SEEK_END)
        if handle.read() not in b"\r\n":
            warnings.warn(
                f"{path} does not end with a line break: if it was cut there, its last row is "
                "wrong",
                stacklevel=4,
            )


def _read_table(path) -> tuple[list[str], list[list[str]]]:
    """First row and all rows after it, of a tab- or comma-separated file."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:
            delimiter = "\t" if "\t" in handle.readline() else ","
            handle.seek(0)
            # strict: an open quote would swallow the rest
            rows = [row for row in csv.reader(handle, delimiter=delimiter, strict=True) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{path} cannot be read as a text table ({error}): give a CSV or TSV file"
        ) from error
    if not rows:
        raise DataError(f"{path} is empty: give a table with a row per barcode")
    _warn_if_cut(path)
    return rows[0], rows[1:]


def _metadata(path) -> tuple[dict[str, dict[str, str]], str | None]:
    """spatialLIBD metadata.tsv -> {barcode: row} and its label column. R writes row names that have
    no header: rows may be one field longer."""
    header, rows = _read_table(path)
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


def _label_table(path, sample: str) -> dict[str, str]:
    """{barcode: label} from metadata.tsv, barcode_level_layer_map.tsv (barcode, slice, label) or a
    two-column file, header or not."""
    header, rows = _read_table(path)
    if "layer_guess" in header or "layer_guess_reordered" in header:
        table, label = _metadata(path)
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


def _join_labels(table: dict[str, str], barcodes: np.ndarray, path) -> tuple[np.ndarray, list[str]]:
    if not any(barcode in table for barcode in barcodes.tolist()):
        raise DataError(
            f"{path} shares no barcode with the slide (it has {next(iter(table), 'none')}, "
            f"the slide {barcodes[0]}): "
            "give the label file of this slide"
        )
    return _encode_labels([table.get(barcode, "") for barcode in barcodes.tolist()])


def _library(totals, path) -> np.ndarray | None:
    """Total counts (N,) float64, None where one is missing (NaN). Raises DataError where one is
    negative or infinite."""
    totals = np.asarray(totals, dtype=np.float64)
    if (totals < 0).any() or np.isinf(totals).any():
        raise DataError(
            f"{path} has a sum_umi that is negative or infinite: correct it or take the column out"
        )
    return None if np.isnan(totals).any() else totals


def _folder_labels(folder: Path, sample: str, labels, barcodes: np.ndarray):
    """labels (N,), classes, patient, library size (N,) or None, files read: from `labels`, else
    metadata.tsv, else barcode_level_layer_map.tsv."""
    codes, classes, patient, library_size = np.full(len(barcodes), -1, dtype=np.int64), [], "", None
    metadata = folder / "metadata.tsv"
    table, column = _metadata(metadata) if metadata.is_file() else ({}, None)
    files = [str(metadata)] if metadata.is_file() else []
    records = [table.get(barcode, {}) for barcode in barcodes.tolist()]
    patient = next((record["subject"] for record in records if record.get("subject")), "")
    try:
        library_size = _library([float(record["sum_umi"]) for record in records], metadata)
    except (KeyError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        library_size = None  # no such column, or a spot without a row
    layer_map = next(
        (
            path
            for path in (base / "barcode_level_layer_map.tsv" for base in (folder, folder.parent))
            if path.is_file()
        ),
        None,
    )
    if labels is not None:
        codes, classes = _join_labels(_label_table(labels, sample), barcodes, labels)
        files.append(str(labels))
    elif column is not None:
        codes, classes = _join_labels(
            {barcode: record.get(column, "") for barcode, record in table.items()},
            barcodes,
            metadata,
        )
    elif layer_map is not None:
        found = _label_table(layer_map, sample)
        codes, classes = _join_labels(found, barcodes, layer_map)
        files.append(str(layer_map))
    return codes, classes, patient, library_size, files


# ------------------------------------------------------------------------------------------- Visium
_POSITIONS = (
    "barcode",
    "in_tissue",
    "array_row",
    "array_col",
    "pxl_row_in_fullres",
    "pxl_col_in_fullres",
)


def _find(folder: Path, *names: str) -> Path | None:
    """The first of `names` in the folder or its spatial/, also with a sample prefix
    (151673_tissue_hires_image.png)."""
    for name in names:
        for base in (folder / "spatial", folder):
            if (base / name).is_file():
                return base / name
            prefixed = sorted(base.glob(f"*_{name}"))
            if prefixed:
                return prefixed[0]
    return None


def _read_positions(path: Path) -> dict[str, np.ndarray]:
    """Columns of a positions file: CSV without (Space Ranger 1) or with (2, 3) a header, or parquet
    (Visium HD)."""
    try:
        if path.suffix == ".parquet":
            try:
                from pyarrow import parquet
            except ImportError as error:
                raise DataError(f"{path} needs pyarrow to be read: pip install pyarrow") from error
            table = parquet.read_table(path, columns=list(_POSITIONS))
            columns = {name: table[name].to_numpy() for name in _POSITIONS}
        else:
            with open(path, encoding="utf-8-sig") as handle:
                header = handle.readline().strip().split(",")
            if header == [""]:
                raise ValueError("it is empty")
            _warn_if_cut(path)
            named = "in_tissue" in header
            kinds = [("barcode", "O")] + [(name, "f8") for name in _POSITIONS[1:]]
            columns = np.loadtxt(
                path,
                delimiter=",",
                dtype=kinds,
                skiprows=int(named),
                ndmin=1,
                encoding="utf-8",
                comments=None,
                usecols=[header.index(name) for name in _POSITIONS] if named else range(6),
            )
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} is not a positions table ({error}): it needs the columns "
            f"{', '.join(_POSITIONS)}"
        ) from error
    columns = {name: np.asarray(columns[name]) for name in _POSITIONS}
    columns["barcode"] = columns["barcode"].astype(str)
    _check_unique(columns["barcode"], path)
    # (R, 5)
    numbers = np.stack(
        [np.asarray(columns[name], dtype=np.float64) for name in _POSITIONS[1:]], axis=1
    )
    if not (np.abs(numbers) < 1e9).all() or (numbers[:, :3] != np.rint(numbers[:, :3])).any():
        raise DataError(
            f"{path} holds a position that is no finite number or an array row or column that "
            "is not whole: copy it again"
        )
    return columns


_IMAGE_ERRORS = (
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


def _read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8."""
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            return np.asarray(image.convert("RGB"))
    except _IMAGE_ERRORS as error:
        raise DataError(
            f"{path} cannot be read as an image ({error}): it is truncated, copy it again or "
            "delete it"
        ) from error


def _check_fit(xy: np.ndarray, scale: float, height: int, width: int, path) -> None:
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


def _folder_image(
    folder: Path, xy: np.ndarray
) -> tuple[Callable[[], np.ndarray] | None, float | None, dict, str]:
    """Function that reads the hires (else lowres) image, its scale, the scale factors, and the
    image's path."""
    path, scales = _find(folder, "scalefactors_json.json"), {}
    if path is not None:
        try:
            scales = {
                key: float(value)
                for key, value in read_json(path).items()
                if not isinstance(value, (str, list))
            }
        except JSON_ERRORS as error:
            raise DataError(
                f"{path} is not a JSON object of scale factors ({error}): copy it again from "
                "the Space Ranger output"
            ) from error
        if not all(
            0 < scales.get(key, 1) < float("inf")
            for key in ("tissue_hires_scalef", "tissue_lowres_scalef", "microns_per_pixel")
        ):
            raise DataError(
                f"{path} holds a scale factor that is not positive: copy it again from the "
                "Space Ranger output"
            )
    for size in ("hires", "lowres"):
        picture = _find(folder, f"tissue_{size}_image.png", f"tissue_{size}_image.jpg")
        if picture is None:
            continue
        key = f"tissue_{size}_scalef"
        if key not in scales:
            path = path or folder / "spatial" / "scalefactors_json.json"
            raise DataError(
                f"{path} has no {key} for {picture.name}: copy scalefactors_json.json from "
                "the Space Ranger output"
            )
        try:
            with Image.open(picture, formats=("PNG", "JPEG")) as image:
                width, height = image.size
                # reads the chunks, not the pixels: a truncated file is found now and not after
                # training
                image.verify()
        except _IMAGE_ERRORS as error:
            raise DataError(
                f"{picture} cannot be read as an image ({error}): it is truncated, copy it "
                "again or delete it"
            ) from error
        _check_fit(xy, scales[key], height, width, picture)
        return functools.partial(_read_image, picture), scales[key], scales, str(picture)
    return None, None, scales, ""


def _lattice_um_per_px(grid: np.ndarray | None, xy: np.ndarray) -> float | None:
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


def _row_of(barcodes: np.ndarray, positions: dict, matrix_path, positions_path) -> np.ndarray:
    """Row of each barcode in the positions file. Raises DataError when barcodes have no
    position."""
    row = {barcode: i for i, barcode in enumerate(positions["barcode"].tolist())}
    rows = np.array([row.get(barcode, -1) for barcode in barcodes.tolist()], dtype=np.int64)
    missing = int((rows < 0).sum())
    if missing:
        some = "none" if missing == len(rows) else f"only {len(rows) - missing}"
        raise DataError(
            f"{positions_path} holds {some} of the {len(rows)} barcodes of {matrix_path} "
            f"({missing} missing, such as "
            f"{barcodes[rows < 0][0]}): take both files from the same Space Ranger run"
        )
    return rows


def load_visium(folder, counts: bool = True, labels=None) -> Slide:
    """Space Ranger 1-3 output folder (or one binned_outputs/square_*um of Visium HD) -> Slide of
    its in-tissue spots.

    Rows follow the barcodes of filtered_feature_bc_matrix.h5. With counts=False the matrix is not
    needed: then rows follow the matrix if it is there, else metadata.tsv, else the positions file.
    `labels`: a two-column CSV/TSV (barcode, label), metadata.tsv or barcode_level_layer_map.tsv;
    without it the latter two are looked for. Raises DataError for any file that is missing, damaged
    or of another slide.
    """
    # a linked slice keeps the name of the link
    folder = Path(os.path.abspath(folder))
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: give a Space Ranger output folder")
    sample = folder.parent.name if folder.name == "outs" else folder.name
    positions_path = _find(
        folder,
        "tissue_positions.csv",
        "tissue_positions_list.csv",
        "tissue_positions_list.txt",
        "tissue_positions.parquet",
    )
    if positions_path is None:
        raise DataError(
            f"{folder / 'spatial'} has no tissue_positions.csv, tissue_positions_list.csv or "
            ".parquet: "
            "copy spatial/ from the Space Ranger output"
        )
    matrix_path = _find(folder, "filtered_feature_bc_matrix.h5")
    if matrix_path is None and counts:
        raise DataError(
            f"{folder} has no filtered_feature_bc_matrix.h5: copy it from the Space Ranger "
            "output (or load with counts=False)"
        )
    positions = _read_positions(positions_path)
    in_tissue = positions["in_tissue"] > 0
    matrix, genes = None, np.array([], dtype=str)
    if matrix_path is not None:
        matrix, genes, barcodes = read_10x_h5(matrix_path, counts=counts)
    else:
        barcodes = positions["barcode"][in_tissue]
        listed = (
            _metadata(folder / "metadata.tsv")[0] if (folder / "metadata.tsv").is_file() else {}
        )
        rank = {barcode: i for i, barcode in enumerate(listed)}
        barcodes = barcodes[
            np.argsort(
                [rank.get(barcode, len(rank)) for barcode in barcodes.tolist()], kind="stable"
            )
        ]
    rows = _row_of(barcodes, positions, matrix_path, positions_path)
    keep = np.flatnonzero(in_tissue[rows])
    if not len(keep):
        raise DataError(
            f"{positions_path} marks no spot of the matrix as in tissue: take both files from "
            "the same Space Ranger run"
        )
    if len(keep) < len(rows):
        rows, barcodes, matrix = (
            rows[keep],
            barcodes[keep],
            None if matrix is None else matrix[keep],
        )
    # x, y
    xy = check_xy(
        np.stack(
            [positions["pxl_col_in_fullres"][rows], positions["pxl_row_in_fullres"][rows]], axis=1
        ),
        len(rows),
        positions_path,
    )
    # (N, 2)
    grid = np.stack([positions["array_row"][rows], positions["array_col"][rows]], axis=1).astype(
        np.int64
    )
    codes, classes, patient, library_size, tables = _folder_labels(folder, sample, labels, barcodes)
    image, scale, scales, image_file = _folder_image(folder, xy)
    um_per_px = scales.get("microns_per_pixel") or _lattice_um_per_px(grid, xy)
    return Slide(
        matrix,
        genes,
        barcodes,
        xy,
        grid,
        codes,
        classes,
        image,
        scale,
        None,
        um_per_px,
        sample,
        patient,
        str(matrix_path or positions_path),
        library_size,
        [str(positions_path), *tables],
        image_file,
    )


# --------------------------------------------------------------------------------------------- h5ad
_LABEL_KEYS = (
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


def _fields(node) -> list[str]:
    """Column names of a data frame: an HDF5 group, or the compound dataset of AnnData < 0.7."""
    return [
        name
        for name in (node.dtype.names if isinstance(node, h5py.Dataset) else node.keys())
        if name != "__categories"
    ]


def _column(handle: h5py.File, frame, name: str) -> np.ndarray:
    """One data frame column: strings as str ('' = missing), numbers as numbers (NaN = missing);
    every AnnData encoding of categoricals."""
    node = frame[name]
    if isinstance(node, h5py.Group) and "mask" in node:  # nullable-integer, -boolean, -string-array
        values = _decode(node["values"])
        return np.where(
            read_array(node["mask"], "b", values.shape),
            "" if values.dtype.kind == "U" else np.nan,
            values,
        )
    if isinstance(node, h5py.Group):
        codes, categories = read_array(node["codes"], "iu"), _decode(node["categories"])
    elif isinstance(node, h5py.Dataset) and "categories" in node.attrs:
        # AnnData 0.7: reference to obs/__categories/<name>
        codes, categories = read_array(node, "iu"), _decode(handle[node.attrs["categories"]])
    elif f"uns/{name}_categories" in handle:  # AnnData < 0.7
        codes, categories = (
            np.asarray(node[()] if isinstance(node, h5py.Dataset) else node),
            _decode(handle[f"uns/{name}_categories"]),
        )
    else:
        return _decode(node)
    if codes.size and codes.min() < -1:
        raise ValueError(f"{name} has a category below -1")
    if (codes < 0).any():  # -1 = missing: the appended last category
        categories = np.append(categories, np.nan if categories.dtype.kind == "f" else "")
    return categories[codes]


def _index(handle: h5py.File, frame) -> np.ndarray:
    names = _fields(frame)
    name = (
        _decode(frame.attrs["_index"]).item()
        if "_index" in frame.attrs
        else next((n for n in ("_index", "index") if n in names), names[0])
    )
    values = _column(handle, frame, name)
    if values.ndim != 1 or values.dtype.kind not in "Uiu":
        raise ValueError(f"its index {name} is {values.dtype} of shape {values.shape}")
    return values.astype(str)


def _read_matrix(node, shape: tuple[int, int]) -> tuple[sp.csr_matrix | None, str | None]:
    """CSR, CSC or dense X -> (counts (N, G) int32 CSR, None), or (None, what keeps it from being
    counts). Dense X is read in blocks of rows."""
    if isinstance(node, h5py.Dataset):
        if node.shape != shape or not shape[0]:
            raise ValueError(f"{node.name} is {node.shape} for {shape[0]} spots x {shape[1]} genes")
        _check_size(node)
        blocks = []
        for start in range(0, shape[0], 4096):
            block = node[start : start + 4096]
            problem = _count_problem(block)
            if problem:
                return None, problem
            blocks.append(sp.csr_matrix(block.astype(np.int32)))
        return sp.vstack(blocks, format="csr"), None
    data = read_array(node["data"], "biufc")
    problem = _count_problem(data)
    if problem:
        return None, problem
    kind = node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", "csr"))
    kind = kind.decode() if isinstance(kind, bytes) else str(kind)
    stated = node.attrs.get("shape", node.attrs.get("h5sparse_shape", shape))
    if kind[:3] not in ("csr", "csc") or tuple(stated) != shape:
        raise ValueError(
            f"{node.name} is {kind} of shape {tuple(stated)} for {shape[0]} spots x "
            f"{shape[1]} genes"
        )
    indices, indptr = read_array(node["indices"], "iu"), read_array(node["indptr"], "iu")
    if kind.startswith("csc"):
        return _count_matrix(data, indices, indptr, shape[::-1]).T.tocsr(), None
    return _count_matrix(data, indices, indptr, shape), None


def _h5ad_counts(
    handle: h5py.File, layer: str | None, n_spots: int, path
) -> tuple[sp.csr_matrix, np.ndarray]:
    """Integer counts and their genes: `layer` ('X', 'raw' or a name in layers/), else the first of
    X, layers/counts and raw/X that holds counts."""
    # the second pair: AnnData < 0.7
    raw, raw_var = ("raw/X", "raw/var") if "raw/X" in handle else ("raw.X", "raw.var")
    places = {"X": ("X", "var"), "counts": ("layers/counts", "var"), "raw": (raw, raw_var)}
    if layer is not None:
        places = {layer: places.get(layer, (f"layers/{layer}", "var"))}
    problem = None
    for where, var in places.values():
        if where not in handle:
            continue
        genes = _index(handle, handle[var])
        matrix, found = _read_matrix(handle[where], (n_spots, len(genes)))
        if matrix is not None:
            return matrix, _unique_genes(genes, path)
        problem = problem or f"{found} in {where}"
    layers = ", ".join(handle["layers"]) if "layers" in handle else ""
    problem = problem or f"no {layer or 'X'}"
    raise DataError(
        f"{path} holds {problem}: give raw counts, with layer=<name> if they are in a layer "
        f"(layers here: {layers or 'none'})"
    )


def _h5ad_image(path, key: str) -> np.ndarray:
    with open_h5(path, "an h5ad file") as handle:
        return _as_uint8(handle[key][()])


def _h5ad_picture(
    handle: h5py.File, path: Path, xy: np.ndarray
) -> tuple[Callable[[], np.ndarray] | None, float | None]:
    """uns/spatial/<library>/images/{hires, lowres, ...}: function that reads it, and its scale
    factor."""
    libraries = handle.get("uns/spatial", {})
    library = (
        path.stem
        if path.stem in libraries
        else next(iter(libraries), None)
        if len(libraries) == 1
        else None
    )
    images = {} if library is None else libraries[library].get("images", {})
    for size in sorted(
        images,
        key=lambda name: ("hires", "lowres").index(name) if name in ("hires", "lowres") else 2,
    ):
        key = f"uns/spatial/{library}/scalefactors/tissue_{size}_scalef"
        if key not in handle:
            raise DataError(
                f"{path} has an image {size} but no {key}: export both or remove the image"
            )
        scale, picture = float(handle[key][()]), images[size]
        _check_size(picture)
        _check_fit(xy, scale, *picture.shape[:2], path)
        return functools.partial(_h5ad_image, path, picture.name), scale
    return None, None


def _h5ad_xy(handle: h5py.File, obs, path) -> np.ndarray:
    names = _fields(obs)
    obsm = handle.get("obsm")
    if (
        obsm is not None
        and "spatial" in _fields(obsm)
        and not isinstance(obsm["spatial"], h5py.Group)
    ):
        xy = (
            read_array(obsm["spatial"], "iuf")
            if isinstance(obsm, h5py.Group)
            else np.asarray(obsm["spatial"])
        )
        # a third number is a height
        return xy[:, :2] if xy.ndim == 2 and xy.shape[1] <= 3 else xy
    if {"pxl_col_in_fullres", "pxl_row_in_fullres"} <= set(names):
        return np.stack(
            [
                _column(handle, obs, f"pxl_{axis}_in_fullres").astype(np.float64)
                for axis in ("col", "row")
            ],
            axis=1,
        )
    raise DataError(
        f"{path} has no coordinates: it needs obsm['spatial'] or obs columns "
        "pxl_col_in_fullres and pxl_row_in_fullres"
    )


def load_h5ad(
    path, label_key: str | None = None, layer: str | None = None, counts: bool = True
) -> Slide:
    """AnnData file (any AnnData version; CSR, CSC or dense X) -> Slide of its in-tissue spots, rows
    in file order.

    Counts: `layer` ('X', 'raw' or a name in layers/), else the first of X, layers/counts, raw/X
    that holds integers. Labels: obs column `label_key`, else the first known one (sce.layer_guess,
    layer_guess, label, ...); NaN and 'undetermined' are -1. Raises DataError.
    """
    path = Path(path).resolve()
    with open_h5(path, "an h5ad file") as handle:
        obs = handle["obs"]
        names, barcodes = _fields(obs), _index(handle, obs)
        _check_unique(barcodes, path)
        matrix, genes = (
            _h5ad_counts(handle, layer, len(barcodes), path)
            if counts
            else (None, np.array([], dtype=str))
        )
        if not len(barcodes):
            raise DataError(f"{path} holds no spot: give a file with spots")

        # a shorter one would be repeated silently
        def column(name):
            values = _column(handle, obs, name)
            if values.shape != barcodes.shape:
                raise ValueError(
                    f"obs column {name} has shape {values.shape} for {len(barcodes)} spots"
                )
            return values

        xy = check_xy(_h5ad_xy(handle, obs, path), len(barcodes), path)
        grid = None
        if {"array_row", "array_col"} <= set(names):
            grid = np.stack(
                [column(name).astype(np.float64) for name in ("array_row", "array_col")], axis=1
            )
            grid = (
                grid.astype(np.int64)
                if (np.abs(grid) < 1e9).all() and (grid == np.rint(grid)).all()
                else None
            )
        if label_key is not None and label_key not in names:
            raise DataError(
                f"{path} has no obs column {label_key}: choose one of {', '.join(names)}"
            )
        label_key = label_key or next((key for key in _LABEL_KEYS if key in names), None)
        labels, classes = _encode_labels(column(label_key).tolist()) if label_key else (None, [])
        tissue = (
            column("in_tissue").astype(np.float64) > 0
            if "in_tissue" in names
            else np.ones(len(barcodes), dtype=bool)
        )
        umi = next((key for key in ("sum_umi", "sce.sum_umi") if key in names), None)
        library_size = _library(column(umi), path) if umi else None
        patient = (
            _decode(handle["uns/patient"]).item()
            if isinstance(handle.get("uns/patient"), h5py.Dataset)
            else None
        )
        donor = next(
            (key for key in ("patient", "subject", "donor", "sce.subject") if key in names), None
        )
        patient = patient or (column(donor).astype(str)[0] if donor and len(barcodes) else "")
        um_per_px = (
            float(handle["uns/um_per_px"][()])
            if "uns/um_per_px" in handle
            else _lattice_um_per_px(grid, xy)
        )
        if um_per_px is not None and not 0 < um_per_px < float("inf"):
            raise DataError(f"{path} has a uns/um_per_px of {um_per_px}: it must be positive")
        image, scale = _h5ad_picture(handle, path, xy)
    slide = Slide(
        matrix,
        genes,
        barcodes,
        xy,
        grid,
        labels,
        classes,
        image,
        scale,
        None,
        um_per_px,
        path.stem,
        str(patient),
        str(path),
        library_size,
        image_file="" if image is None else str(path),
    )
    return slide if tissue.all() or not tissue.any() else slide.subset(tissue)


# --------------------------------------------------------------------------------------------- HEST
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
            _check_size(handle["img"])
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


def _hest_folder(root) -> Path:
    for name in ("st", "adata"):
        if (Path(root) / name).is_dir():
            return Path(root).resolve() / name
    raise DataError(
        f"{root} has neither st/ nor adata/: give a HEST folder or a HEST-benchmark task folder"
    )


def hest_samples(root) -> list[str]:
    """Sample ids of a HEST folder (st/*.h5ad) or a HEST-benchmark task (adata/*.h5ad)."""
    return sorted(path.stem for path in _hest_folder(root).glob("*.h5ad"))


def hest_split(root, fold: int) -> tuple[list[str], list[str]]:
    """(train ids, test ids) of splits/{train,test}_<fold>.csv."""
    sides = []
    for side in ("train", "test"):
        path = Path(root) / "splits" / f"{side}_{fold}.csv"
        if not path.is_file():
            folds = sorted(found.stem.split("_")[1] for found in path.parent.glob(f"{side}_*.csv"))
            raise DataError(
                f"{path} does not exist: choose one of the folds "
                f"{', '.join(folds) or '(none here)'}"
            )
        header, rows = _read_table(path)
        if "sample_id" not in header or any(len(row) != len(header) for row in rows):
            raise DataError(
                f"{path} has no column sample_id or a row of another length: download it again"
            )
        sides.append([row[header.index("sample_id")] for row in rows])
    train, test = sides
    if len({*train, *test}) < len(train) + len(test):
        raise DataError(
            f"{path} and its train file name a sample twice: a sample stands once, on one side"
        )
    return train, test


def hest_genes(root) -> list[str]:
    """The target genes of a HEST-benchmark task: var_50genes.json."""
    return read_gene_list(Path(root) / "var_50genes.json")


def _patch_names(handle: h5py.File, path) -> np.ndarray:
    """(N,) barcodes of a patch file. Raises DataError unless there is one per patch and none stands
    twice."""
    # (N, 1) -> (N,)
    found = _decode(handle["barcode" if "barcode" in handle else "barcodes"]).reshape(-1)
    if len(found) != len(handle["img"]) or found.dtype.kind != "U":
        raise DataError(
            f"{path} has {len(handle['img'])} patches but {len(found)} barcodes of "
            f"{found.dtype}: download it again"
        )
    _check_unique(found, path)
    return found


def load_hest(
    root, sample: str, patches: bool = True, label_key: str | None = None, counts: bool = True
) -> Slide:
    """One sample of HEST-1k (st/, patches/, HEST*.csv) or of a HEST-benchmark task (adata/,
    patches/, metadata.csv) -> Slide.

    With patches, only spots that have one are kept (joined by barcode). Raises DataError, also when
    h5ad and patches share no barcode.
    """
    folder = _hest_folder(root)
    if sample not in hest_samples(root):
        raise DataError(
            f"{folder / sample}.h5ad does not exist: choose one of "
            f"{', '.join(hest_samples(root)) or '(none here)'}"
        )
    slide = load_h5ad(folder / f"{sample}.h5ad", label_key, counts=counts)
    for path in sorted(folder.parent.glob("HEST*.csv")) + sorted(
        folder.parent.glob("metadata.csv")
    ):
        header, rows = _read_table(path)
        if "id" not in header or any(len(row) != len(header) for row in rows):
            raise DataError(
                f"{path} has no column id or a row of another length: download it again"
            )
        records = [
            record for record in (dict(zip(header, row)) for row in rows) if record["id"] == sample
        ]
        if len(records) > 1:
            raise DataError(f"{path} holds {sample} {len(records)} times: keep one row")
        record = records[0] if records else {}
        slide.patient = record.get("patient") or slide.patient
        try:
            pixel = float(record.get("pixel_size_um_estimated") or "nan")
        except ValueError as error:
            raise DataError(
                f"{path} has a pixel_size_um_estimated of {sample} that is not a number: correct it"
            ) from error
        if pixel <= 0 or pixel == float("inf"):
            raise DataError(
                f"{path} has a pixel_size_um_estimated of {sample} that is not positive: correct it"
            )
        slide.um_per_px = slide.um_per_px if np.isnan(pixel) else pixel
    if not patches:
        return slide
    path = folder.parent / "patches" / f"{sample}.h5"
    with open_h5(path, "HEST patches") as handle:
        found = _patch_names(handle, path)
    row = {barcode: i for i, barcode in enumerate(found.tolist())}
    rows = np.array([row.get(barcode, -1) for barcode in slide.barcodes.tolist()], dtype=np.int64)
    if not (rows >= 0).any():
        raise DataError(
            f"{path} shares no barcode with {slide.source}: take both from the same HEST release"
        )
    slide = slide.subset(rows >= 0)
    slide.patches = Patches(path, rows[rows >= 0])
    return slide


def load_patch_folder(root, sample: str = "", patches: bool = True) -> list[Slide]:
    """Slides without counts, for prediction: a HEST layout, a folder of HEST patch files (*.h5:
    img, coords, barcode), or of features files (*.npz: embedding, coords, barcodes). `sample`: only
    that one; patches=False leaves a HEST layout's patches unread. Raises DataError with what was
    looked for.
    """
    root = Path(root)
    if (root / "adata").is_dir() or (root / "st").is_dir():
        return [
            load_hest(root, name, patches, counts=False)
            for name in ([sample] if sample else hest_samples(root))
        ]
    paths = sorted([*root.glob("patches/*.h5"), *root.glob("*.h5")]) or sorted(root.glob("*.npz"))
    paths = [path for path in paths if sample in ("", path.stem)]
    if not paths:
        raise DataError(
            f"{root} holds neither adata/, st/, *.h5 patches nor *.npz "
            f"features{' of ' + sample if sample else ''}: check the path"
        )
    out = []
    for path in paths:
        if path.suffix == ".h5":
            with open_h5(path, "HEST patches") as handle:
                barcodes, xy = _patch_names(handle, path), read_array(handle["coords"], "iuf")
        else:
            barcodes, xy = read_npz(path, "barcodes", "coords")
            if barcodes.ndim != 1 or barcodes.dtype.kind != "U":
                raise DataError(
                    f"{path} has barcodes of {barcodes.dtype}, shape {barcodes.shape}: save a "
                    "list of strings"
                )
            _check_unique(barcodes, path)
        xy = check_xy(xy, len(barcodes), path)
        stack = Patches(path) if path.suffix == ".h5" else None
        out.append(
            Slide(
                None, np.array([]), barcodes, xy, patches=stack, sample=path.stem, source=str(path)
            )
        )
    return out


# --------------------------------------------------------------------------------------- any layout
def _is_visium(folder: Path) -> bool:
    return folder.is_dir() and (
        (folder / "spatial").is_dir() or _find(folder, "filtered_feature_bc_matrix.h5") is not None
    )


def is_one_slide(root) -> bool:
    """Whether `root` is itself a slide (a Visium folder or a file), not a folder of slides."""
    return Path(root).is_file() or _is_visium(Path(root))


def list_slices(root) -> list[str]:
    """Names under root that `load_slide(root, name)` reads: Visium folders, h5ad files, or the
    samples of a HEST folder."""
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder: give the folder that holds the slices")
    if (root / "st").is_dir() or (root / "adata").is_dir():
        return hest_samples(root)
    return sorted(
        path.name if path.is_dir() else path.stem
        for path in root.iterdir()
        if path.suffix == ".h5ad" or _is_visium(path)
    )


def load_slide(root, sample: str | None = None, counts: bool = True, labels=None) -> Slide:
    """Visium folder, h5ad file, or one `sample` of a folder of Visium folders, of h5ad files or of
    a HEST layout -> Slide.

    `labels`: a label file as in `load_visium`, or the name of an obs column of an h5ad. Raises
    DataError, with the names to choose from.
    """
    root = Path(root).resolve()
    if sample is not None and Path(sample).name != sample:
        raise DataError(f"{sample!r} is no name of a slice in {root}: give a name without folders")
    if sample is None and root.is_dir() and not _is_visium(root):
        names = list_slices(root)
        if len(names) != 1:
            raise DataError(
                f"{root} holds {len(names)} slices "
                f"({', '.join(names) or 'no Visium folder, h5ad or HEST layout'}): name one "
                "of them"
            )
        sample = names[0]
    path = root if sample is None or (root.name == sample and _is_visium(root)) else root / sample
    if path.is_dir():
        return load_visium(path, counts, labels)
    path = path if path.suffix == ".h5ad" else path.with_name(path.name + ".h5ad")
    is_file = labels is not None and Path(labels).is_file()
    label_key = None if is_file else labels
    if path.is_file():
        slide = load_h5ad(path, label_key, counts=counts)
    elif (root / "st").is_dir() or (root / "adata").is_dir():
        slide = load_hest(root, sample, label_key=label_key, counts=counts)
    else:
        names = ", ".join(list_slices(root)) if root.is_dir() else ""
        if names:
            raise DataError(f"{root} has no slice {sample}: choose one of {names}")
        raise DataError(f"{root} is neither a folder of slices nor an h5ad: check the path")
    if is_file:
        slide.labels, slide.classes = _join_labels(
            _label_table(labels, slide.sample), slide.barcodes, labels
        )
        slide.tables = [str(labels)]
    return slide
