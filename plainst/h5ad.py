"""AnnData files written by h5py alone, in the encoding of anndata 0.12
(https://anndata.readthedocs.io/en/stable/fileformat-prose.html); `readers/h5ad.py` reads them."""

from __future__ import annotations

import os

import h5py
import numpy as np
import scipy.sparse as sp

from plainst.readers.crops import _reserve

VERSIONS = {  # encoding-version of each encoding-type
    **dict.fromkeys(("anndata", "dict", "csr_matrix"), "0.1.0"),
    **dict.fromkeys(("dataframe", "categorical", "array", "string-array"), "0.2.0"),
    **dict.fromkeys(("string", "numeric-scalar"), "0.2.0"),
}


def write_anndata(path, obs_names, obs, var_names, x=None, obsm=None, layers=None, uns=None):
    """Make `path` an AnnData file.

    obs_names (N,), var_names (G,) strings; obs {column: (N,)} numbers, booleans, or strings, which
    become categoricals with '' as missing; x (N, G) CSR or dense, or None; obsm {name: (N, d)};
    layers {name: (N, G)}; uns nested dictionaries of arrays, numbers and strings. Raises OSError
    where the disk is full.
    """
    # only asks: HDF5 makes the file anew, and must be able to close it
    _reserve(path, 0, 0)
    with h5py.File(path, "w") as handle:
        _mark(handle, "anndata")
        if x is not None:
            _write(handle, "X", x)
        _write_frame(handle, "obs", obs_names, obs)
        _write_frame(handle, "var", var_names, {})
        groups = {"obsm": obsm, "layers": layers, "uns": uns, "obsp": {}, "varm": {}, "varp": {}}
        for name, values in groups.items():
            _write(handle, name, values or {})
        handle.flush()
        size = handle.id.get_filesize()
    # what _reserve asked for and nobody used
    os.truncate(path, size)


def _mark(node, kind: str) -> None:
    node.attrs.update({"encoding-type": kind, "encoding-version": VERSIONS[kind]})


def _write(parent, name: str, value) -> None:
    """One value: nested dictionaries, CSR matrices, arrays of numbers or strings, numbers and
    strings."""
    if isinstance(value, dict):
        node, kind = parent.create_group(name), "dict"
        for key, item in value.items():
            _write(node, key, item)
    elif sp.issparse(value):
        node, kind = parent.create_group(name), "csr_matrix"
        node.attrs["shape"] = np.array(value.shape, dtype=np.int64)
        for part in ("data", "indices", "indptr"):
            _dataset(node, part, getattr(value, part))
    elif isinstance(value, str):
        node, kind = parent.create_dataset(name, data=value, dtype=h5py.string_dtype()), "string"
    elif np.ndim(value) == 0:
        node, kind = parent.create_dataset(name, data=value), "numeric-scalar"
    elif value.dtype.kind == "U":
        node, kind = _dataset(parent, name, value), "string-array"
    else:
        node, kind = _dataset(parent, name, value), "array"
    _mark(node, kind)


def _dataset(parent, name: str, values: np.ndarray) -> h5py.Dataset:
    """A dataset, in compressed chunks where that pays: integers, counts and pictures; floats of a
    network hardly shrink. Room is asked for first: on a full disk HDF5 crashes."""
    path, size = parent.file.filename, parent.file.id.get_filesize()
    if values.dtype.kind == "U":
        # a text has a pointer and a length
        _reserve(path, size, values.nbytes + 32 * values.size)
        text = values.astype(object)
        return parent.create_dataset(name, values.shape, h5py.string_dtype(), text)
    _reserve(path, size, values.nbytes)
    is_packed = values.dtype.kind in "iu" and values.nbytes > 4096
    zipped = {"compression": "gzip", "compression_opts": 1, "shuffle": True} if is_packed else {}
    return parent.create_dataset(name, data=values, **zipped)


def _write_frame(parent, name: str, index: np.ndarray, columns: dict) -> None:
    """A data frame: numbers as they are, strings as categoricals."""
    node = parent.create_group(name)
    _write(node, "_index", index)
    for column, values in columns.items():
        if values.dtype.kind == "U":
            _write_categories(node, column, values)
        else:
            _write(node, column, values)
    node.attrs["_index"] = "_index"
    node.attrs.create("column-order", [*columns], (len(columns),), h5py.string_dtype())
    _mark(node, "dataframe")


def _write_categories(parent, name: str, values: np.ndarray) -> None:
    """Strings (N,) as codes and categories, numbers in the order of numbers (2 before 10); '' is
    code -1."""
    # HDF5 ends a text at a zero byte
    texts = [value.replace("\0", "") for value in values.tolist()]
    names = sorted(set(texts) - {""})
    if all(text.isascii() and text.isdecimal() for text in names):
        names = sorted(names, key=int)
    code = {text: i for i, text in enumerate(names)} | {"": -1}
    codes = np.fromiter((code[text] for text in texts), np.int32, len(texts))
    node = parent.create_group(name)
    _write(node, "codes", codes.astype(np.min_scalar_type(-len(names) - 1)))
    _write(node, "categories", np.array(names, dtype=str))
    node.attrs["ordered"] = np.bool_(False)
    _mark(node, "categorical")
