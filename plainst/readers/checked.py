"""Hostile files: HDF5, NPZ, CSV and JSON read so that damage becomes one sentence with the path.

Nothing here knows what a slide is. Whatever is wrong with a file is a `DataError`.
"""

from __future__ import annotations

import csv
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
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import scipy.sparse as sp


class DataError(ValueError):
    """Input that cannot be used; the message is one sentence that names the file and the remedy.

    It may quote a damaged file: what cannot be printed, line breaks and terminal codes too, is
    written as an escape, and the middle of a long message is left out.
    """

    def __init__(self, message: str = ""):
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(message))
        super().__init__(text if len(text) <= 1200 else f"{text[:800]} ... {text[-300:]}")


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


def file_checksum(*paths) -> str:
    """SHA-256 (hex) of the bytes of the files, one after the other; of one file it is what
    `sha256sum` prints. Raises DataError for one that cannot be read."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            with open(path, "rb") as handle:
                hashlib.file_digest(handle, lambda: digest)
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}): check the path") from error
    return digest.hexdigest()


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


def check_stored_size(node) -> None:
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
    check_stored_size(node)
    if node.dtype.kind not in kinds or (shape is not None and node.shape != shape):
        raise ValueError(
            f"{node.name} is {node.dtype} of shape {node.shape}"
            + (f" instead of {shape}" if shape is not None else "")
        )
    return node[()]


def decode_strings(values) -> np.ndarray:
    """HDF5 dataset, or a field read from a compound one, -> numpy array, with str for any kind of
    string. Raises ValueError for other objects."""
    if isinstance(values, (h5py.Dataset, h5py.Group)):
        check_stored_size(values)
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


def read_names(node, n: int | None = None) -> np.ndarray:
    """HDF5 dataset -> (n,) str. Raises ValueError."""
    values = decode_strings(node)
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


def count_problem(values: np.ndarray) -> str | None:
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


def count_matrix(data, indices, indptr, shape) -> sp.csr_matrix:
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


def check_unique(barcodes: np.ndarray, path) -> None:
    if len(np.unique(barcodes)) != len(barcodes):
        name, n = Counter(barcodes.tolist()).most_common(1)[0]
        raise DataError(
            f"{path} holds barcode {name} {n} times: make barcodes unique (one file per slide)"
        )


def warn_if_cut(path) -> None:
    with open(path, "rb") as handle:
        handle.seek(-min(1, os.path.getsize(path)), os.SEEK_END)
        if handle.read() not in b"\r\n":
            warnings.warn(
                f"{path} does not end with a line break: if it was cut there, its last row is "
                "wrong",
                stacklevel=4,
            )


def read_table(path) -> tuple[list[str], list[list[str]]]:
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
    warn_if_cut(path)
    return rows[0], rows[1:]
