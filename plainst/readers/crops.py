"""Single cells with pictures: one HDF5 format, its reader and its writer.

Every crop shows the same field of view around its cell's centre: a crop rescaled to the cell would
lose the cell's size. Crops stay on disk and are read by row. The layout of the file is in the
docstring of `write_cells`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import scipy.sparse as sp

from plainst.readers.checked import (
    DataError,
    check_stored_size,
    check_unique,
    check_xy,
    count_matrix,
    count_problem,
    decode_strings,
    open_h5,
    read_array,
    read_names,
)

FORMAT, VERSION, KIND = "plainst-cells", 1, "a cell file"
# crops a chunk of the file, and a step of the converters
BLOCK = 64
# bytes of chunks that HDF5 keeps in memory when a file is written
HELD_BACK = 2**20


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
    sections; crops lazily read (N, C, S, S) uint8, None where there are no pictures; channels (C,)
    names; labels (N,) index into classes, -1 = none; masks lazily read (N, S, S) bool of the cell
    itself, or None; um_per_px micrometres per full-resolution px, NaN where unknown; px_per_crop_px
    full-resolution px per crop px; truth {name: array}, what a simulation knows; source the file.
    """

    counts: sp.csr_matrix
    genes: np.ndarray
    ids: np.ndarray
    xy: np.ndarray
    section: np.ndarray
    sections: list[str]
    crops: CropStack | None
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
    def crop_diagonal(self) -> float:
        """Diagonal of a crop in full-resolution px: no two crops overlap beyond it; 0 without."""
        side = 0 if self.crops is None else self.crops.shape[-1]
        return 2**0.5 * side * self.px_per_crop_px

    @property
    def section_sizes(self) -> np.ndarray:
        """(n_sections,) cells of each section."""
        return np.bincount(self.section, minlength=len(self.sections))

    def __repr__(self) -> str:
        return (
            f"Cells({self.n_cells} cells x {self.n_genes} genes, {len(self.sections)} "
            f"sections, crops {None if self.crops is None else self.crops.shape[1:]}, "
            f"{len(self.classes)} classes, source={self.source!r})"
        )


def require(good: bool, path, problem: str, remedy: str = "convert the data again") -> None:
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
        require(
            values.shape == shape,
            path,
            f"has counts of {n} cells x {g} genes but {name} of shape {values.shape}",
            f"{name} must be {shape}",
        )
    require(n > 0 and g > 0, path, f"holds {n} cells and {g} genes")
    check_unique(ids, path)
    require(len(np.unique(genes)) == g, path, "holds a gene twice", "make gene names unique")
    check_xy(xy, n, path)
    require(
        section.dtype.kind in "iu" and 0 <= section.min() and section.max() < len(sections),
        path,
        f"has section numbers outside 0 .. {len(sections) - 1}",
        "give every cell one of the named sections",
    )
    require(
        labels.dtype.kind in "iu" and -1 <= labels.min() and labels.max() < len(classes),
        path,
        f"has label ids outside -1 .. {len(classes) - 1}, more than its {len(classes)} classes",
        "name every class, and give -1 to cells without one",
    )
    empty = int((np.diff(counts.indptr) == 0).sum())
    require(
        not empty,
        path,
        f"holds {empty} cells without a single count",
        "drop them before writing the file",
    )


def _check_pictures(path, handle: h5py.File, n: int, n_channels: int) -> None:
    """Raise DataError unless crops, if any, are (N, C, S, S) uint8 and masks, if any, (N, S, S)
    bool."""
    if "crops" not in handle:
        require(
            not n_channels and "masks" not in handle,
            path,
            f"names {n_channels} channels or masks but holds no crops",
            "give a crop a cell, or no channel",
        )
        return
    crops = handle["crops"]
    for stack in ("crops", "masks"):
        if stack in handle:
            check_stored_size(handle[stack])
    require(
        isinstance(crops, h5py.Dataset)
        and crops.ndim == 4
        and crops.shape[2] == crops.shape[3]
        and crops.dtype == np.uint8,
        path,
        f"holds crops of unequal size or another kind ({getattr(crops, 'shape', 'a group')}, "
        f"{getattr(crops, 'dtype', 'no dataset')})",
        "crops must be one (N, C, S, S) uint8 array with a fixed field of view",
    )
    require(
        crops.shape[:2] == (n, n_channels),
        path,
        f"has {n} cells and {n_channels} channels but crops of shape {crops.shape}",
    )
    masks = handle.get("masks")
    if masks is not None:
        require(
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
        require(
            str(handle.attrs.get("format")) == FORMAT and handle.attrs.get("version") == VERSION,
            path,
            f"is not a cell file of version {VERSION}",
            "write it with python -m plainst convert or python -m plainst simulate cells",
        )
        group = handle["counts"]
        values = read_array(group["data"], "iuf")
        problem = count_problem(values)
        require(problem is None, path, f"holds {problem} in its counts", "give raw counts")
        shape = tuple(np.asarray(group.attrs["shape"]).tolist())
        require(
            shape == (len(handle["ids"]), len(handle["genes"])),
            path,
            f"says {shape} for {len(handle['ids'])} cells x {len(handle['genes'])} genes",
        )
        # (N, G)
        counts = count_matrix(
            values, read_array(group["indices"], "iu"), read_array(group["indptr"], "iu"), shape
        )
        n = counts.shape[0]
        names = {
            name: read_names(handle[name]) for name in ("genes", "ids", "sections", "channels")
        }
        xy, section = read_array(handle["xy"], "iuf"), read_array(handle["section"], "iu")
        labels = read_array(handle["labels"], "iu") if "labels" in handle else np.full(n, -1)
        classes = read_names(handle["classes"]).tolist() if "classes" in handle else []
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
        require(
            not um_per_px <= 0 and not np.isinf(um_per_px) and 0 < px_per_crop_px < np.inf,
            path,
            f"gives {um_per_px} um per px and {px_per_crop_px} px per crop px",
        )
        truth = (
            {name: decode_strings(item) for name, item in handle["truth"].items()}
            if "truth" in handle
            else {}
        )
        has_crops, has_masks = "crops" in handle, "masks" in handle
    return Cells(
        counts,
        names["genes"],
        names["ids"],
        xy.astype(np.float64),
        section.astype(np.int64),
        names["sections"].tolist(),
        CropStack(path) if has_crops else None,
        names["channels"].tolist(),
        labels.astype(np.int64),
        classes,
        CropStack(path, "masks") if has_masks else None,
        um_per_px,
        px_per_crop_px,
        truth,
        str(path),
    )


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
        require(
            block.shape[1:] == out.shape[1:],
            path,
            f"was given {name} of unequal size ({out.shape[1:]} and {block.shape[1:]})",
            "crop every cell with the same field of view",
        )
        require(
            row + len(block) <= n,
            path,
            f"was given more {name} than its {n} cells",
            "give one per cell",
        )
        _reserve(handle.filename, handle.id.get_filesize(), block.nbytes)
        out[row : row + len(block)] = block
        row += len(block)
    require(row == n, path, f"was given {row} {name} for {n} cells", "give one per cell")


def write_cells(
    path,
    *,
    counts,
    genes,
    ids,
    xy,
    section,
    sections,
    crops=None,
    channels=(),
    labels=None,
    classes=(),
    masks=None,
    um_per_px: float = float("nan"),
    px_per_crop_px: float = 1.0,
    truth: dict | None = None,
) -> Path:
    """Write a cell file; `load_cells` gives the arguments back. crops (N, C, S, S) uint8 and masks
    (N, S, S) bool may be iterables of blocks of rows, or None: cells without pictures.

    Layout: attributes format, version, um_per_px (NaN = unknown), px_per_crop_px; counts/{data,
    indices, indptr} with attribute shape, the CSR matrix (N, G); genes (G,), ids (N,), sections,
    channels (C,), classes: UTF-8 strings; xy (N, 2) px; section (N,), labels (N,) int32; crops,
    masks; truth/<name>. Nothing is left at `path` (an older file stays) unless all checks of
    `load_cells` pass. Raises DataError.
    """
    counts = sp.csr_matrix(counts)
    problem = count_problem(counts.data)
    require(problem is None, path, f"was given {problem} as counts", "give raw counts")
    counts = count_matrix(counts.data, counts.indices, counts.indptr, counts.shape)  # (N, G)
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
