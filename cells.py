"""Single cells with pictures: one HDF5 format, its reader and writer, and converters from in-situ
sequencing (CA1) and 10x Xenium output.

    # spots.csv + label_image.coo.npz, the pciSeq demo of mouse hippocampus CA1
    python data.py ca1 <folder> <cells.h5>
    # needs the extra [xenium]: tifffile, imagecodecs, pyarrow
    python data.py xenium <bundle> <cells.h5>

Every crop shows the same field of view around its cell's centre: a crop rescaled to the cell would
lose the cell's size. Crops stay on disk and are read by row. `data` passes the public names on and
adds `cell_split`. The layout of the file is in the docstring of `write_cells`.
"""

from __future__ import annotations

import csv
import errno
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import h5py
import numpy as np
import scipy.sparse as sp
from PIL import Image, ImageDraw
from scipy.spatial import cKDTree

from readers import (
    NPZ_ERRORS,
    DataError,
    _check_size,
    _check_unique,
    _count_matrix,
    _count_problem,
    _decode,
    _names,
    check_xy,
    open_h5,
    read_10x_h5,
    read_array,
    read_json,
)

FORMAT, VERSION, KIND = "plainst-cells", 1, "a cell file"
# crops a chunk of the file, and a step of the converters
BLOCK = 64
# bytes of chunks that HDF5 keeps in memory when a file is written
HELD_BACK = 2**20


# ---------------------------------------------------------------------------------------- container
class CropStack:
    """(N, ...) array of one picture per cell in an HDF5 file, read when indexed.

    The file is opened for every read and closed after it, so the object can be pickled and shared
    by worker processes.
    """

    def __init__(self, path, name: str = "crops", rows: np.ndarray | None = None):
        self.path, self.name = str(path), name
        with open_h5(path, KIND) as handle:
            shape, self.dtype = handle[name].shape, handle[name].dtype
        self.rows = np.arange(shape[0]) if rows is None else np.asarray(rows, dtype=np.int64)
        self.shape = (len(self.rows), *shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item) -> np.ndarray:
        """int -> one picture; slice, index array or boolean mask -> (n, ...), in the order asked
        for. Raises DataError where the file is damaged."""
        wanted = self.rows[item]
        rows, inverse = np.unique(wanted, return_inverse=True)
        out = np.empty((len(rows), *self.shape[1:]), dtype=self.dtype)
        with open_h5(self.path, KIND) as handle:
            stack = handle[self.name]
            # a chunk is unpacked as a whole: one read for all its rows
            step = stack.chunks[0] if stack.chunks else BLOCK
            for start in np.unique(rows // step) * step:
                part = slice(*np.searchsorted(rows, (start, start + step)))
                first, last = rows[part.start], rows[part.stop - 1]
                out[part] = stack[first : last + 1][rows[part] - first]
        return out[0] if np.ndim(wanted) == 0 else out[inverse.reshape(-1)]  # (n, ...)


@dataclass(eq=False)
class Cells:
    """N cells x G genes of one or several sections, with a crop of fixed field of view around each
    cell.

    counts (N, G) CSR raw integers, no empty row; genes (G,) symbols; ids (N,) unique names; xy (N,
    2) full-resolution px of the cell's own section, x right, y down; section (N,) index into
    sections; crops lazily read (N, C, S, S) uint8; channels (C,) names; labels (N,) index into
    classes,
    -1 = none; masks lazily read (N, S, S) bool of the cell itself, or None; um_per_px micrometres
    per full-resolution px, NaN where unknown; px_per_crop_px full-resolution px per crop px; truth
    {name: array}, what a simulation knows; source the file.
    """

    counts: sp.csr_matrix
    genes: np.ndarray
    ids: np.ndarray
    xy: np.ndarray
    section: np.ndarray
    sections: list[str]
    crops: CropStack
    channels: list[str]
    labels: np.ndarray
    classes: list[str] = field(default_factory=list)
    masks: CropStack | None = None
    um_per_px: float = float("nan")
    px_per_crop_px: float = 1.0
    truth: dict[str, np.ndarray] = field(default_factory=dict)
    source: str = ""

    @property
    def n_cells(self) -> int:
        return len(self.ids)

    @property
    def n_genes(self) -> int:
        return len(self.genes)

    @property
    def section_sizes(self) -> np.ndarray:
        """(n_sections,) cells of each section."""
        return np.bincount(self.section, minlength=len(self.sections))

    def __repr__(self) -> str:
        return (
            f"Cells({self.n_cells} cells x {self.n_genes} genes, {len(self.sections)} "
            f"sections, crops {self.crops.shape[1:]}, "
            f"{len(self.classes)} classes, source={self.source!r})"
        )


# ------------------------------------------------------------------------------------------- checks
def _require(good: bool, path, problem: str, remedy: str = "convert the data again") -> None:
    if not good:
        raise DataError(f"{path} {problem}: {remedy}")


def _check_table(path, counts, genes, ids, xy, section, sections, labels, classes) -> None:
    """Raise DataError unless the arrays describe the same N cells and G genes; counts is a
    canonical CSR matrix."""
    n, g = counts.shape
    for name, values, shape in (
        ("genes", genes, (g,)),
        ("ids", ids, (n,)),
        ("xy", xy, (n, 2)),
        ("section", section, (n,)),
        ("labels", labels, (n,)),
    ):
        _require(
            values.shape == shape,
            path,
            f"has counts of {n} cells x {g} genes but {name} of shape {values.shape}",
            f"{name} must be {shape}",
        )
    _require(n > 0 and g > 0, path, f"holds {n} cells and {g} genes")
    _check_unique(ids, path)
    _require(len(np.unique(genes)) == g, path, "holds a gene twice", "make gene names unique")
    check_xy(xy, n, path)
    _require(
        section.dtype.kind in "iu" and 0 <= section.min() and section.max() < len(sections),
        path,
        f"has section numbers outside 0 .. {len(sections) - 1}",
        "give every cell one of the named sections",
    )
    _require(
        labels.dtype.kind in "iu" and -1 <= labels.min() and labels.max() < len(classes),
        path,
        f"has label ids outside -1 .. {len(classes) - 1}, more than its {len(classes)} classes",
        "name every class, and give -1 to cells without one",
    )
    empty = int((np.diff(counts.indptr) == 0).sum())
    _require(
        not empty,
        path,
        f"holds {empty} cells without a single count",
        "drop them before writing the file",
    )


def _check_pictures(path, handle: h5py.File, n: int, n_channels: int) -> None:
    """Raise DataError unless crops are (N, C, S, S) uint8 and masks, if any, (N, S, S) bool."""
    crops = handle["crops"]
    for stack in ("crops", "masks"):
        if stack in handle:
            _check_size(handle[stack])
    _require(
        isinstance(crops, h5py.Dataset)
        and crops.ndim == 4
        and crops.shape[2] == crops.shape[3]
        and crops.dtype == np.uint8,
        path,
        f"holds crops of unequal size or another kind ({getattr(crops, 'shape', 'a group')}, "
        f"{getattr(crops, 'dtype', 'no dataset')})",
        "crops must be one (N, C, S, S) uint8 array with a fixed field of view",
    )
    _require(
        crops.shape[:2] == (n, n_channels),
        path,
        f"has {n} cells and {n_channels} channels but crops of shape {crops.shape}",
    )
    masks = handle.get("masks")
    if masks is not None:
        _require(
            isinstance(masks, h5py.Dataset)
            and masks.shape == (n, *crops.shape[2:])
            and masks.dtype == bool,
            path,
            f"has crops of shape {crops.shape} but masks of another size or kind "
            f"({getattr(masks, 'shape', 'a group')})",
            "masks must be (N, S, S) bool",
        )


def load_cells(path) -> Cells:
    """Cell file -> Cells; crops and masks are read when indexed.

    Raises DataError (one sentence with the path) for a file that is missing, truncated or of
    another kind, for counts that are not raw integers, cells without counts, crops of unequal size,
    and arrays that do not fit each other (label ids beyond the classes, sections without a name).
    """
    with open_h5(path, KIND) as handle:
        _require(
            str(handle.attrs.get("format")) == FORMAT and handle.attrs.get("version") == VERSION,
            path,
            f"is not a cell file of version {VERSION}",
            "write it with data.py ca1, data.py xenium or simulate.py cells",
        )
        group = handle["counts"]
        values = read_array(group["data"], "iuf")
        problem = _count_problem(values)
        _require(problem is None, path, f"holds {problem} in its counts", "give raw counts")
        shape = tuple(np.asarray(group.attrs["shape"]).tolist())
        _require(
            shape == (len(handle["ids"]), len(handle["genes"])),
            path,
            f"says {shape} for {len(handle['ids'])} cells x {len(handle['genes'])} genes",
        )
        # (N, G)
        counts = _count_matrix(
            values, read_array(group["indices"], "iu"), read_array(group["indptr"], "iu"), shape
        )
        n = counts.shape[0]
        names = {name: _names(handle[name]) for name in ("genes", "ids", "sections", "channels")}
        xy, section = read_array(handle["xy"], "iuf"), read_array(handle["section"], "iu")
        labels = read_array(handle["labels"], "iu") if "labels" in handle else np.full(n, -1)
        classes = _names(handle["classes"]).tolist() if "classes" in handle else []
        _check_table(
            path,
            counts,
            names["genes"],
            names["ids"],
            xy,
            section,
            names["sections"],
            labels,
            classes,
        )
        _check_pictures(path, handle, n, len(names["channels"]))
        um_per_px, px_per_crop_px = (
            float(handle.attrs[name]) for name in ("um_per_px", "px_per_crop_px")
        )
        _require(
            not um_per_px <= 0 and not np.isinf(um_per_px) and 0 < px_per_crop_px < np.inf,
            path,
            f"gives {um_per_px} um per px and {px_per_crop_px} px per crop px",
        )
        truth = (
            {name: _decode(item) for name, item in handle["truth"].items()}
            if "truth" in handle
            else {}
        )
        masks = "masks" in handle
    return Cells(
        counts,
        names["genes"],
        names["ids"],
        xy.astype(np.float64),
        section.astype(np.int64),
        names["sections"].tolist(),
        CropStack(path),
        names["channels"].tolist(),
        labels.astype(np.int64),
        classes,
        CropStack(path, "masks") if masks else None,
        um_per_px,
        px_per_crop_px,
        truth,
        str(path),
    )


# ------------------------------------------------------------------------------------------- writer
def _reserve(path, start: int, size: int) -> None:
    """Claim room in a file for `size` bytes from byte `start` on, or raise OSError while HDF5 can
    still close it: on a full disk it crashes in the closing of a file that it could not write to
    the end. Twice HELD_BACK more are for the chunks that it keeps in memory and for its own tables.
    Where the system or the file system cannot be asked, nothing is claimed."""
    if not hasattr(os, "posix_fallocate"):  # Windows, macOS
        return
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        os.posix_fallocate(file, start, size + 2 * HELD_BACK)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO):
            raise
    finally:
        os.close(file)


@contextmanager
def _new_h5(path) -> Iterator[h5py.File]:
    """h5py.File for writing beside `path`, renamed to it when the block ends well and deleted when
    it does not."""
    path = Path(path).absolute()
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # only asks: HDF5 makes the file anew, and must be able to close it
        _reserve(part, 0, 0)
        with h5py.File(part, "w", rdcc_nbytes=HELD_BACK) as handle:
            yield handle
            handle.flush()
            size = handle.id.get_filesize()
        # what _reserve asked for and nobody used
        os.truncate(part, size)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # h5py reports a full disk as either
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"{path} cannot be written ({reason}): check the path, the rights and the free space"
        ) from error
    finally:
        if part.exists():
            part.unlink()


def _write_stack(handle: h5py.File, path, name: str, blocks: Iterable, n: int) -> None:
    """Blocks (b, ...) of pictures in row order, or an array (N, ...), -> dataset (N, ...), chunked
    by rows, compressed, with a checksum per chunk."""
    out, row = None, 0
    for block in (
        np.split(blocks, range(BLOCK, len(blocks), BLOCK))
        if isinstance(blocks, np.ndarray)
        else blocks
    ):
        block = np.asarray(block)
        if out is None:
            rows = max(1, min(BLOCK, n, 2**20 // max(1, block[0].nbytes)))
            out = handle.create_dataset(
                name,
                (n, *block.shape[1:]),
                block.dtype,
                chunks=(rows, *block.shape[1:]),
                compression="lzf",
                shuffle=False,
                fletcher32=True,
            )
        _require(
            block.shape[1:] == out.shape[1:],
            path,
            f"was given {name} of unequal size ({out.shape[1:]} and {block.shape[1:]})",
            "crop every cell with the same field of view",
        )
        _require(
            row + len(block) <= n,
            path,
            f"was given more {name} than its {n} cells",
            "give one per cell",
        )
        _reserve(handle.filename, handle.id.get_filesize(), block.nbytes)
        out[row : row + len(block)] = block
        row += len(block)
    _require(row == n, path, f"was given {row} {name} for {n} cells", "give one per cell")


def write_cells(
    path,
    *,
    counts,
    genes,
    ids,
    xy,
    section,
    sections,
    crops,
    channels,
    labels=None,
    classes=(),
    masks=None,
    um_per_px: float = float("nan"),
    px_per_crop_px: float = 1.0,
    truth: dict | None = None,
) -> Path:
    """Write a cell file; `load_cells` gives the arguments back. crops (N, C, S, S) uint8 and masks
    (N, S, S) bool may be iterables of blocks of rows.

    Layout: attributes format, version, um_per_px (NaN = unknown), px_per_crop_px; counts/{data,
    indices, indptr} with attribute shape, the CSR matrix (N, G); genes (G,), ids (N,), sections,
    channels (C,), classes: UTF-8 strings; xy (N, 2) px; section (N,), labels (N,) int32; crops,
    masks; truth/<name>. Nothing is left at `path` (an older file stays) unless all checks of
    `load_cells` pass. Raises DataError.
    """
    counts = sp.csr_matrix(counts)
    problem = _count_problem(counts.data)
    _require(problem is None, path, f"was given {problem} as counts", "give raw counts")
    counts = _count_matrix(counts.data, counts.indices, counts.indptr, counts.shape)  # (N, G)
    genes, ids, sections, channels, classes = (
        np.asarray(v, dtype=str).reshape(-1)
        for v in (genes, ids, sections, channels, list(classes))
    )
    xy, section = np.asarray(xy), np.asarray(section)
    labels = np.full(len(ids), -1) if labels is None else np.asarray(labels)
    _check_table(path, counts, genes, ids, xy, section, sections, labels, classes)
    zipped = {"compression": "gzip", "compression_opts": 4, "shuffle": True}
    known = {f"truth/{name}": np.asarray(values) for name, values in (truth or {}).items()}
    tables = {
        "genes": genes,
        "ids": ids,
        "sections": sections,
        "channels": channels,
        "classes": classes,
        **known,
    }
    places = {
        "xy": xy.astype(np.float64),
        "section": section.astype(np.int32),
        "labels": labels.astype(np.int32),
    }
    with _new_h5(path) as handle:
        arrays = (counts.data, counts.indices, counts.indptr, *places.values(), *tables.values())
        # a text has a pointer and a length
        _reserve(
            handle.filename, 0, sum(v.nbytes + 32 * v.size * (v.dtype.kind == "U") for v in arrays)
        )
        handle.attrs.update(
            {
                "format": FORMAT,
                "version": VERSION,
                "um_per_px": um_per_px,
                "px_per_crop_px": px_per_crop_px,
            }
        )
        for name in ("data", "indices", "indptr"):
            handle.create_dataset(f"counts/{name}", data=getattr(counts, name), **zipped)
        handle["counts"].attrs["shape"] = np.array(counts.shape)
        for name, values in tables.items():
            text = values.dtype.kind == "U"
            handle.create_dataset(
                name,
                data=values.astype(object) if text else values,
                dtype=h5py.string_dtype() if text else None,
            )
        for name, values in places.items():
            handle[name] = values
        for name, blocks in (("crops", crops), ("masks", masks)):
            if blocks is not None:
                _write_stack(handle, path, name, blocks, len(ids))
        _check_pictures(path, handle, len(ids), len(channels))
    return Path(path)


def _pool(pixels: np.ndarray, factor: int) -> np.ndarray:
    """(..., S f, S f) -> (..., S, S) float32, mean over f x f pixels."""
    *lead, height, width = pixels.shape
    return pixels.reshape(*lead, height // factor, factor, width // factor, factor).mean(
        (-3, -1), dtype=np.float32
    )


def _window(image: np.ndarray, x: int, y: int, side: int) -> np.ndarray:
    """(H, W) -> (side, side) whose pixel [side // 2, side // 2] is the image's [y, x]; zeros beyond
    the border."""
    top, left = y - side // 2, x - side // 2
    out = np.zeros((side, side), image.dtype)
    inside = image[max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)]
    out[
        max(-top, 0) : max(-top, 0) + inside.shape[0],
        max(-left, 0) : max(-left, 0) + inside.shape[1],
    ] = inside
    return out


def _report(out, kept: int, counts, channels, size: int, dropped: str) -> None:
    median = np.median(np.asarray(counts.sum(axis=1)))
    print(
        f"{out}: {kept} cells x {counts.shape[1]} genes, median {median:g} counts, crops "
        f"{len(channels)} x {size} x {size} "
        f"({', '.join(channels)}); dropped {dropped}",
        flush=True,
    )


# ---------------------------------------------------------------------------------------------- CA1
def _read_spots(path) -> tuple[np.ndarray, np.ndarray]:
    """CSV with columns Gene, x, y (any order) -> gene names (R,), positions (R, 2) px."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:
            rows = csv.reader(handle, strict=True)
            header = next(rows, [])
            _require(
                {"Gene", "x", "y"} <= set(header),
                path,
                f"has columns {', '.join(header) or '(none)'}",
                "it needs Gene, x and y",
            )
            gene, x, y = (header.index(name) for name in ("Gene", "x", "y"))
            table = [(row[gene], float(row[x]), float(row[y])) for row in rows if row]
    except (OSError, UnicodeDecodeError, csv.Error, ValueError, IndexError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} cannot be read as a table of reads ({error}): give a CSV file with "
            "columns Gene, x and y"
        ) from error
    _require(bool(table), path, "holds no read", "give a row per read")
    genes, x, y = zip(*table)
    xy = np.stack([x, y], axis=1)  # (R, 2)
    _require(
        bool(np.isfinite(xy).all()),
        path,
        "has a position that is no finite number",
        "correct or delete it",
    )
    return np.array(genes, dtype=str), xy


def _read_label_image(path) -> np.ndarray:
    """scipy.sparse .npz -> (H, W) integers, 0 = background."""
    if not Path(path).is_file():
        raise DataError(f"{path} does not exist: check the path or download it")
    try:
        image = sp.load_npz(path)
        if hasattr(image, "check_format"):
            # toarray would write beyond its memory where a column is out of range
            image.check_format()
        _require(
            image.dtype.kind in "iu" and image.nnz > 0 and image.data.min() >= 0,
            path,
            "holds no label image",
            "give nucleus numbers from 1 on",
        )
        _require(
            np.iinfo(np.int32).max > image.data.max(),
            path,
            "has nucleus numbers above 2^31",
            "number the nuclei from 1 on",
        )
        _require(
            np.prod(image.shape, dtype=float) < 1e8 + 1e3 * image.nnz,
            path,
            f"declares {image.shape} px for {image.nnz} of nuclei",
        )
        return image.astype(np.int32).toarray()
    except NPZ_ERRORS as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} cannot be read as a sparse label image ({error}): it is truncated or of "
            "another kind, download it again"
        ) from error


def _nuclei(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Label image (H, W) -> nucleus numbers (M,), ascending, and centroids x, y (M, 2)."""
    row, col = np.nonzero(image)
    numbers, which, area = np.unique(image[row, col], return_inverse=True, return_counts=True)
    return numbers, np.stack(
        [np.bincount(which, col) / area, np.bincount(which, row) / area], axis=1
    )


def from_ca1(
    folder, out, radius: float = 35.0, min_reads: int = 8, side: int = 96, pool: int = 3
) -> Path:
    """In-situ sequencing reads (spots.csv) and a nuclear label image (label_image.coo.npz, scipy
    sparse) -> cell file.

    A read belongs to the nucleus whose centroid is nearest, within `radius` px; nuclei with fewer
    than `min_reads` reads are dropped (the counts of both are printed). The crop of side x side px
    around the centroid has channels `own` nucleus and `other` nuclei, average-pooled by `pool`. xy
    are nucleus centroids, ids nucleus numbers; the files give no pixel size. Raises DataError, also
    where reads lie outside the image.
    """
    folder = Path(folder)
    read_gene, read_xy = _read_spots(folder / "spots.csv")
    image = _read_label_image(folder / "label_image.coo.npz")
    height, width = image.shape
    # nearer ones may belong to a nucleus at the rim
    outside = ((read_xy < -radius) | (read_xy >= np.array([width, height]) + radius)).any(axis=1)
    _require(
        not outside.any(),
        folder / "spots.csv",
        f"has {outside.sum()} reads outside the {width} x {height} px image",
        "give reads and label image of one section, in the same pixels",
    )
    numbers, centroid = _nuclei(image)
    # (R,), M where none is near
    nucleus = cKDTree(centroid).query(read_xy, distance_upper_bound=radius)[1]
    genes, column = np.unique(read_gene, return_inverse=True)
    used = nucleus < len(numbers)
    # (M, G)
    counts = sp.csr_matrix(
        (np.ones(used.sum(), np.int32), (nucleus[used], column[used])),
        shape=(len(numbers), len(genes)),
    )
    keep = np.flatnonzero(np.asarray(counts.sum(axis=1)).ravel() >= max(1, min_reads))
    _require(
        len(keep) > 0,
        folder / "spots.csv",
        f"gives no nucleus {min_reads} reads",
        "check that x and y are px of the label image",
    )
    middle = np.rint(centroid).astype(int)

    def crop(m):
        window = _window(image, *middle[m], side)
        # (2, S, S)
        return np.rint(
            255
            * _pool(np.stack([window == numbers[m], (window > 0) & (window != numbers[m])]), pool)
        ).astype(np.uint8)

    blocks = (np.stack([crop(m) for m in keep[i : i + BLOCK]]) for i in range(0, len(keep), BLOCK))
    write_cells(
        out,
        counts=counts[keep],
        genes=genes,
        ids=numbers[keep],
        xy=centroid[keep],
        section=np.zeros(len(keep), int),
        sections=[folder.resolve().name],
        crops=blocks,
        channels=["own", "other"],
        px_per_crop_px=float(pool),
    )
    _report(
        out,
        len(keep),
        counts[keep],
        ["own", "other"],
        side // pool,
        f"{len(numbers) - len(keep)} nuclei with fewer than {min_reads} reads and "
        f"{(~used).sum()} reads further than {radius:g} px from any",
    )
    return Path(out)


# ------------------------------------------------------------------------------------------- Xenium
class _Plane:
    """One channel of a TIFF file: the maximum over `pages` (z planes) of the windows that are asked
    for; only tiles under a window are decoded."""

    def __init__(self, path, pages):
        self.path, self.pages, self.tiles = path, pages, OrderedDict()
        self.height, self.width = pages[0].shape
        self.tile_height, self.tile_width = pages[0].chunks

    def _tile(self, row: int, col: int) -> np.ndarray:
        key = (row, col)
        if key not in self.tiles:
            index, planes = row * self.pages[0].chunked[1] + col, []
            for page in self.pages:
                file = page.parent.filehandle
                file.seek(page.dataoffsets[index])
                packed = file.read(page.databytecounts[index])
                if len(packed) < page.databytecounts[index]:
                    raise OSError("the file ends early")
                decoded, _, shape = page.decode(packed, index, jpegtables=page.jpegtables)
                planes.append(
                    np.zeros(page.chunks, page.dtype)
                    if decoded is None
                    else decoded.reshape(decoded.shape[-3:-1])[: shape[1], : shape[2]]
                )
            self.tiles[key] = np.max(planes, axis=0)
            # of 1024 x 1024 px, 2 MB each; cells come in the order of tiles
            if len(self.tiles) > 24:
                self.tiles.popitem(last=False)
        self.tiles.move_to_end(key)
        return self.tiles[key]

    def window(self, x: int, y: int, side: int) -> np.ndarray:
        """(side, side) around pixel [y, x]; zeros beyond the border. Raises DataError where the
        file is damaged."""
        top, left, th, tw = y - side // 2, x - side // 2, self.tile_height, self.tile_width
        out = np.zeros((side, side), self.pages[0].dtype)
        try:
            for row in range(max(top, 0) // th, (min(top + side, self.height) - 1) // th + 1):
                for col in range(max(left, 0) // tw, (min(left + side, self.width) - 1) // tw + 1):
                    tile = self._tile(row, col)
                    y0, x0 = max(top, row * th), max(left, col * tw)
                    part = tile[
                        y0 - row * th : max(top + side - row * th, 0),
                        x0 - col * tw : max(left + side - col * tw, 0),
                    ]
                    out[
                        y0 - top : y0 - top + part.shape[0], x0 - left : x0 - left + part.shape[1]
                    ] = part
        except (OSError, ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
            raise DataError(
                f"{self.path} cannot be decoded ({error}): it is truncated or of another "
                "kind, copy it again"
            ) from error
        return out


def _xenium_images(bundle: Path) -> list[Path]:
    """The morphology images of a bundle, one file per channel: the focus images, else the
    projection, else the z stack."""
    found = sorted((bundle / "morphology_focus").glob("*.ome.tif"))
    found = (
        found
        or [
            p
            for name in ("focus", "mip")
            for p in [bundle / f"morphology_{name}.ome.tif"]
            if p.is_file()
        ][:1]
    )
    found = found or [p for p in [bundle / "morphology.ome.tif"] if p.is_file()]
    _require(
        bool(found),
        bundle,
        "has no morphology image",
        "give a Xenium output folder with morphology_focus/ or morphology.ome.tif",
    )
    return found


def _xenium_planes(bundle: Path, tifffile, files: ExitStack) -> tuple[list[_Plane], list[str]]:
    """One plane per channel, of one size, and the channels' names from the OME-XML (file names
    where it does not tell)."""
    planes, paths, names = [], _xenium_images(bundle), []
    for path in paths:
        try:
            # as OME each file would claim the pages of all
            tiff = files.enter_context(tifffile.TiffFile(path, is_ome=False))
            pages = [
                page for page in tiff.pages if page.ndim == 2 and page.shape == tiff.pages[0].shape
            ]
            # of every file: it stands at the end, so a file that was cut short lacks it
            xml = ElementTree.fromstring(tiff.pages[0].description)
            names = names or [
                item.get("Name") for item in xml.iter() if item.tag.endswith("}Channel")
            ]
        except (
            OSError,
            ValueError,
            TypeError,
            KeyError,
            IndexError,
            RuntimeError,
            ElementTree.ParseError,
        ) as error:
            raise DataError(
                f"{path} cannot be read as an OME-TIFF ({error}): it is truncated or of "
                "another kind, copy it again"
            ) from error
        _require(
            bool(pages), path, "has no grey image", "give the morphology image that Xenium wrote"
        )
        planes.append(_Plane(path, pages))
        _require(
            (planes[-1].height, planes[-1].width) == (planes[0].height, planes[0].width),
            path,
            "differs in size from the other channels",
            "take all morphology images from one bundle",
        )
    if len(names) != len(paths) or None in names or len(set(names)) < len(names):
        names = [path.name.removesuffix(".ome.tif") for path in paths]
    return planes, names


def _read_parquet(path: Path, pyarrow, *columns: str) -> list:
    """Columns of a parquet file: the first as (ids (M,) str, row -> id (R,)), the others as float64
    (R,)."""
    try:
        table = pyarrow.parquet.read_table(path, columns=list(columns))
        first = table[columns[0]].combine_chunks().dictionary_encode()
        names = [
            v.decode("utf-8") if isinstance(v, bytes) else str(v)
            for v in first.dictionary.to_pylist()
        ]
        return [
            (np.array(names, dtype=str), first.indices.to_numpy()),
            *(table[c].to_numpy().astype(np.float64) for c in columns[1:]),
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{path} cannot be read with columns {', '.join(columns)} ({reason}): copy it "
            "from the bundle again"
        ) from error


def _xenium_cells(bundle: Path, pyarrow):
    """counts (N, G), genes, ids, centres (N, 2) px, um per px; joined by cell id, all cells."""
    path = bundle / "experiment.xenium"
    try:
        um_per_px = float(read_json(path)["pixel_size"])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise DataError(
            f"{path} gives no pixel_size ({error}): give a Xenium output folder"
        ) from error
    _require(
        0 < um_per_px < np.inf,
        path,
        f"gives a pixel_size of {um_per_px}",
        "copy it from the bundle again",
    )
    counts, genes, ids = read_10x_h5(bundle / "cell_feature_matrix.h5")
    (names, which), x, y = _read_parquet(
        bundle / "cells.parquet", pyarrow, "cell_id", "x_centroid", "y_centroid"
    )
    row = dict(zip(names[which].tolist(), range(len(which))))
    missing = [name for name in ids.tolist() if name not in row]
    _require(
        not missing,
        bundle / "cells.parquet",
        f"lacks {len(missing)} of the {len(ids)} cells of the matrix "
        f"({', '.join(missing[:1])} ...)",
        "take both from one bundle",
    )
    rows = np.array([row[name] for name in ids.tolist()], dtype=np.int64)
    return counts, genes, ids, np.stack([x[rows], y[rows]], axis=1) / um_per_px, um_per_px


def _outline_masks(
    bundle: Path, pyarrow, ids, xy, um_per_px: float, pool: int, size: int
) -> Iterator[np.ndarray] | None:
    """Blocks (b, S, S) bool of the cells' outlines in their crops, in the order of ids; None where
    the bundle has no outlines."""
    path = bundle / "cell_boundaries.parquet"
    if not path.is_file():
        return None
    (names, which), x, y = _read_parquet(path, pyarrow, "cell_id", "vertex_x", "vertex_y")
    order = np.argsort(which, kind="stable")
    points = np.stack([x, y], axis=1)[order] / um_per_px  # (R, 2) px, grouped by cell
    ends = np.searchsorted(which[order], np.arange(len(names) + 1))
    code = {name: i for i, name in enumerate(names.tolist())}

    def draw(i):
        image, k = Image.new("1", (size, size)), code.get(ids[i], -1)
        polygon = (
            (points[ends[k] : ends[k + 1]] - np.floor(xy[i])) / pool + size / 2 if k >= 0 else ()
        )
        if len(polygon) >= 3:
            # pillow counts from pixel centres
            ImageDraw.Draw(image).polygon([tuple(p) for p in (polygon - 0.5).tolist()], fill=1)
        return np.asarray(image)

    return (
        np.stack([draw(i) for i in range(a, min(a + BLOCK, len(ids)))])
        for a in range(0, len(ids), BLOCK)
    )


def from_xenium(bundle, out, field_um: float = 27.2, size: int = 32) -> Path:
    """10x Xenium output folder -> cell file: cell_feature_matrix.h5, cells.parquet,
    experiment.xenium, morphology OME-TIFF (full resolution).

    The crop of size x size px shows field_um (rounded to a whole number of image px per crop px)
    around the cell's centre, one channel per morphology_focus image (else the maximum over the z
    stack), average-pooled. A channel's 1 % and 99.8 % quantiles over up to 256 cells become 0 and
    255, an exposure setting of the slide. Control probes are left out, cells without a gene count
    dropped and counted in a printed line. Rows are in the order of image tiles. Masks are the cell
    outlines where the bundle has them. Raises DataError, also for cells outside the image.
    """
    try:
        import imagecodecs  # noqa: F401 - decodes JPEG 2000 for tifffile
        import pyarrow.parquet
        import tifffile
    except ImportError as error:
        raise DataError(
            f"{bundle} cannot be read without tifffile, imagecodecs and pyarrow ({error}): "
            "pip install 'plainst[xenium]'"
        ) from error
    bundle = Path(bundle)
    _require(bundle.is_dir(), bundle, "is not a folder", "give a Xenium output folder")
    counts, genes, ids, xy, um_per_px = _xenium_cells(bundle, pyarrow)
    _require(
        size >= 4 and field_um >= size * um_per_px / 2,
        bundle,
        f"has {um_per_px} um per px, too coarse for {size} px in {field_um} um",
        "choose a larger field or a smaller crop",
    )
    pool = max(1, round(field_um / um_per_px / size))
    with ExitStack() as files:
        planes, channels = _xenium_planes(bundle, tifffile, files)
        height, width = planes[0].height, planes[0].width
        outside = ~((xy >= 0) & (xy < [width, height])).all(axis=1)
        _require(
            not outside.any(),
            bundle / "cells.parquet",
            f"has {outside.sum()} cells outside the {width} x {height} px image",
            "take table and image from one bundle",
        )
        keep = np.flatnonzero(np.diff(counts.indptr) > 0)
        _require(
            len(keep) > 0,
            bundle / "cell_feature_matrix.h5",
            "has no cell with a gene count",
            "check the panel",
        )
        tile = np.floor(xy[keep] / [planes[0].tile_width, planes[0].tile_height])
        keep = keep[np.lexsort([tile[:, 0], tile[:, 1]])]

        def crop(i):
            x, y = np.floor(xy[i]).astype(int).tolist()
            # (C, S, S)
            return _pool(np.stack([plane.window(x, y, pool * size) for plane in planes]), pool)

        sample = np.sort(np.random.default_rng(0).permutation(len(keep))[:256])
        # (C, 1, 1) each
        low, high = np.quantile(
            np.stack([crop(i) for i in keep[sample]]), [0.01, 0.998], axis=(0, 2, 3)
        )[..., None, None]
        span = np.maximum(high - low, 1e-6)

        def block(rows):
            return np.stack(
                [
                    np.rint(255 * np.clip((crop(i) - low) / span, 0, 1)).astype(np.uint8)
                    for i in rows
                ]
            )

        write_cells(
            out,
            counts=counts[keep],
            genes=genes,
            ids=ids[keep],
            xy=xy[keep],
            section=np.zeros(len(keep), int),
            sections=[bundle.resolve().name],
            crops=(block(keep[i : i + BLOCK]) for i in range(0, len(keep), BLOCK)),
            channels=channels,
            masks=_outline_masks(bundle, pyarrow, ids[keep], xy[keep], um_per_px, pool, size),
            um_per_px=um_per_px,
            px_per_crop_px=float(pool),
        )
    shown = pool * size * um_per_px
    _report(
        out,
        len(keep),
        counts[keep],
        channels,
        size,
        f"{len(ids) - len(keep)} cells without a gene count; a crop shows {shown:.4g} um",
    )
    return Path(out)
