"""AnnData h5ad files -> Slide, by h5py alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
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
)
from plainst.readers.slides import (
    LABEL_KEYS,
    Slide,
    as_uint8,
    check_fit,
    donor_of,
    encode_labels,
    has_label,
    label_names,
    lattice_um_per_px,
    library_of,
    unique_genes,
)

# obs columns that tell libraries apart, in the order in which they are believed
_LIBRARY_KEYS = (
    "library_id",
    "library",
    "sample_id",
    "sample_name",
    "sample",
    "slide_id",
    "slide",
    "slice_id",
    "slice",
    "section_id",
    "section",
    "orig.ident",
    "batch",
)
# obsm['spatial'] as a data frame, or columns of obs: names of x and y
_XY_NAMES = (
    ("x", "y"),
    ("pxl_col_in_fullres", "pxl_row_in_fullres"),
    ("imagecol", "imagerow"),
    ("x_centroid", "y_centroid"),
    ("center_x", "center_y"),
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
    every AnnData encoding of categorical and nullable arrays."""
    node = frame[name]
    if isinstance(node, h5py.Group) and "mask" in node:  # nullable-integer, -boolean, -string-array
        values = decode_strings(node["values"])
        missing = read_array(node["mask"], "b", values.shape)
        return np.where(missing, "" if values.dtype.kind == "U" else np.nan, values)
    if isinstance(node, h5py.Group):
        codes, categories = read_array(node["codes"], "iu"), _column(handle, node, "categories")
    elif isinstance(node, h5py.Dataset) and "categories" in node.attrs:
        # AnnData 0.7: reference to obs/__categories/<name>
        codes, categories = read_array(node, "iu"), decode_strings(handle[node.attrs["categories"]])
    elif f"uns/{name}_categories" in handle:  # AnnData < 0.7
        codes, categories = (
            np.asarray(node[()] if isinstance(node, h5py.Dataset) else node),
            decode_strings(handle[f"uns/{name}_categories"]),
        )
    else:
        return decode_strings(node)
    if codes.size and codes.min() < -1:
        raise ValueError(f"{name} has a category below -1")
    if (codes < 0).any():  # -1 = missing: the appended last category
        categories = np.append(categories, np.nan if categories.dtype.kind == "f" else "")
    return categories[codes]


def _name_column(handle: h5py.File, frame, name: str) -> np.ndarray:
    """A column as names (N,) str, '' where missing: of labels, genes, libraries."""
    node, values = frame[name], _column(handle, frame, name)
    is_nullable = isinstance(node, h5py.Group) and "mask" in node
    if is_nullable and node["values"].dtype == bool:
        names = np.array(["False", "True", ""])
        return names[np.nan_to_num(values, nan=2).astype(np.int64)]
    return np.array(label_names(values), dtype=str)


def _index(handle: h5py.File, frame) -> np.ndarray:
    names = _fields(frame)
    name = (
        decode_strings(frame.attrs["_index"]).item()
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
        check_stored_size(node)
        blocks = []
        for start in range(0, shape[0], 4096):
            block = node[start : start + 4096]
            problem = count_problem(block)
            if problem:
                return None, problem
            blocks.append(sp.csr_matrix(block.astype(np.int32)))
        return sp.vstack(blocks, format="csr"), None
    data = read_array(node["data"], "biufc")
    problem = count_problem(data)
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
        return count_matrix(data, indices, indptr, shape[::-1]).T.tocsr(), None
    return count_matrix(data, indices, indptr, shape), None


def _gene_names(handle: h5py.File, var, gene_key: str | None, path) -> np.ndarray:
    """(G,) index of a var frame, or its column `gene_key`, the index where that names nothing."""
    genes = _index(handle, var)
    if gene_key is None:
        return genes
    if gene_key not in _fields(var):
        raise DataError(
            f"{path} has no var column {gene_key}: choose one of {', '.join(_fields(var))} with "
            "--gene_key, or leave it out"
        )
    names = _name_column(handle, var, gene_key)
    if names.shape != genes.shape:
        raise ValueError(f"var column {gene_key} has shape {names.shape} for {len(genes)} genes")
    return np.where(names == "", genes, names)


def _h5ad_counts(
    handle: h5py.File, layer: str | None, gene_key: str | None, n_spots: int, path
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
            return matrix, unique_genes(_gene_names(handle, handle[var], gene_key, path), path)
        problem = problem or f"{found} in {where}"
    layers = ", ".join(handle["layers"]) if "layers" in handle else ""
    problem = problem or f"no {layer or 'X'}"
    raise DataError(
        f"{path} holds {problem}: give raw counts, with --layer NAME if they are in a layer "
        f"(layers here: {layers or 'none'})"
    )


def _h5ad_image(path, key: str) -> np.ndarray:
    with open_h5(path, "an h5ad file") as handle:
        return as_uint8(handle[key][()])


def _h5ad_picture(
    handle: h5py.File, path: Path, sample: str, xy: np.ndarray
) -> tuple[Callable[[], np.ndarray] | None, float | None]:
    """uns/spatial/<library>/images/{hires, lowres, ...} of the library `sample`, else of the only
    one: function that reads it, and its scale factor."""
    libraries = handle.get("uns/spatial", {})
    library = sample if sample in libraries else None
    if library is None and len(libraries) == 1:
        library = next(iter(libraries))
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
        check_stored_size(picture)
        check_fit(xy, scale, *picture.shape[:2], path)
        return functools.partial(_h5ad_image, path, picture.name), scale
    return None, None


def _frame_xy(handle: h5py.File, frame) -> np.ndarray:
    """x and y (N, 2) of obsm['spatial'] that was written as a data frame: by their names, else its
    first two columns."""
    order = frame.attrs.get("column-order")
    names = [name for name in _fields(frame) if name != frame.attrs.get("_index")]
    if order is not None:
        names = decode_strings(order).tolist()
    pair = next((pair for pair in _XY_NAMES if set(pair) <= set(names)), names[:2])
    return np.stack([_column(handle, frame, name).astype(np.float64) for name in pair], axis=1)


def _h5ad_xy(handle: h5py.File, obs, path) -> np.ndarray:
    names = _fields(obs)
    obsm = handle.get("obsm")
    if obsm is not None and "spatial" in _fields(obsm):
        if not isinstance(obsm, h5py.Group):  # AnnData < 0.7
            xy = np.asarray(obsm["spatial"])
        elif isinstance(obsm["spatial"], h5py.Group):
            xy = _frame_xy(handle, obsm["spatial"])
        else:
            xy = read_array(obsm["spatial"], "iuf")
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


@dataclass
class _Libraries:
    """The obs column that tells the libraries of a file apart, its values (N,), and their names in
    file order; no column and one name or none where the file is one tissue."""

    key: str | None
    values: np.ndarray | None
    names: list[str]


def _find_libraries(handle: h5py.File, library_key: str | None, path) -> _Libraries:
    """The libraries by `library_key`, by SpatialData's region, else by the first usual obs column
    that has several values; 'none' takes the file as one tissue."""
    obs = handle["obs"]
    names = _fields(obs)
    if library_key == "none":
        return _Libraries(None, None, [])
    if library_key is not None and library_key not in names:
        raise DataError(
            f"{path} has no obs column {library_key}: choose one of {', '.join(names)} with "
            "--library_key"
        )
    keys = [library_key] if library_key else [key for key in _LIBRARY_KEYS if key in names]
    region = "uns/spatialdata_attrs/region_key"
    if library_key is None and isinstance(handle.get(region), h5py.Dataset):
        keys = [key for key in [decode_strings(handle[region]).item()] if key in names] + keys
    for key in keys:
        # a slash would make folders of a name that stands in paths of records
        raw = _name_column(handle, obs, key)
        values = np.array([name.replace("/", "_") for name in raw.tolist()], dtype=str)
        if len(np.unique(values)) < len(np.unique(raw)):
            raise DataError(
                f"{path} has libraries in obs column {key} that differ in / and _ only: rename one"
            )
        found = list(dict.fromkeys(name for name in values.tolist() if has_label(name)))
        # a column of names of spots is none of libraries
        is_library = 1 < len(found) <= len(values) / 10
        if is_library or library_key:
            return _Libraries(key, values, found)
    images = list(handle.get("uns/spatial", {}))
    if len(images) > 1 and path.stem not in images:
        raise DataError(
            f"{path} holds {len(images)} libraries ({', '.join(images[:5])}) and no obs column "
            "that is known to tell them apart: name it with --library_key, or give --library_key "
            "none if all is one tissue"
        )
    return _Libraries(None, None, [])


def h5ad_libraries(path, library_key: str | None = None) -> list[str]:
    """The names of the libraries in an h5ad that holds several or is split by `library_key`; []
    where it is one tissue."""
    path = Path(path).resolve()
    with open_h5(path, "an h5ad file") as handle:
        return _find_libraries(handle, library_key, path).names


def _choose_library(found: _Libraries, library: str | None, path) -> np.ndarray | None:
    """Mask (N,) of the spots of one library, None for all."""
    if library is not None and library not in found.names:
        raise DataError(
            f"{path} has no library {library}: choose one of {', '.join(found.names) or '(none)'}"
        )
    if library is None and len(found.names) > 1:
        raise DataError(
            f"{path} holds {len(found.names)} libraries in obs column {found.key} "
            f"({', '.join(found.names[:5])}): name one with --slice, another column with "
            "--library_key, or give --library_key none if all is one tissue"
        )
    if found.values is None:
        return None
    return found.values == (library or found.names[0])


def load_h5ad(
    path,
    label_key: str | None = None,
    layer: str | None = None,
    counts: bool = True,
    gene_key: str | None = None,
    library_key: str | None = None,
    library: str | None = None,
) -> Slide:
    """AnnData file (any AnnData version; CSR, CSC or dense X) -> Slide of its in-tissue spots, rows
    in file order.

    Counts: `layer` ('X', 'raw' or a name in layers/), else the first of X, layers/counts, raw/X
    that holds integers. Labels: obs column `label_key`, else the first known one (sce.layer_guess,
    layer_guess, label, ...); NaN and 'undetermined' are -1. Genes: the var index, or the var column
    `gene_key`. A file of several libraries (obs column `library_key`, else library_id, sample, ...)
    is read one `library` at a time: their coordinates lie on top of each other. Raises DataError.
    """
    path = Path(path).resolve()
    with open_h5(path, "an h5ad file") as handle:
        obs = handle["obs"]
        names, barcodes = _fields(obs), _index(handle, obs)
        libraries = _find_libraries(handle, library_key, path)
        rows = _choose_library(libraries, library, path)
        matrix, genes = None, np.array([], dtype=str)
        if counts:
            matrix, genes = _h5ad_counts(handle, layer, gene_key, len(barcodes), path)
        if not len(barcodes):
            raise DataError(f"{path} holds no spot: give a file with spots")

        # a shorter one would be repeated silently
        def check(values, name):
            if values.shape != (n_rows,):
                raise ValueError(f"obs column {name} has shape {values.shape} for {n_rows} spots")
            return values if rows is None else values[rows]

        def column(name):
            return check(_column(handle, obs, name), name)

        n_rows = len(barcodes)
        xy = check_xy(_h5ad_xy(handle, obs, path), n_rows, path)
        if rows is not None:
            check(libraries.values, libraries.key)
            barcodes, xy = barcodes[rows], xy[rows]
            matrix = None if matrix is None else matrix[rows]
        check_unique(barcodes, path)
        grid = None
        if {"array_row", "array_col"} <= set(names):
            grid = np.stack(
                [column(name).astype(np.float64) for name in ("array_row", "array_col")], axis=1
            )
            is_lattice = (np.abs(grid) < 1e9).all() and (grid == np.rint(grid)).all()
            grid = grid.astype(np.int64) if is_lattice else None
        if label_key is not None and label_key not in names:
            raise DataError(
                f"{path} has no obs column {label_key}: choose one of {', '.join(names)} with "
                "--label_key"
            )
        known = (key for key in LABEL_KEYS if key in names and key != libraries.key)
        label_key = label_key or next(known, None)
        labels, classes = None, []
        if label_key:
            found = check(_name_column(handle, obs, label_key), label_key)
            labels, classes = encode_labels(found.tolist())
        tissue = np.ones(len(barcodes), dtype=bool)
        if "in_tissue" in names:
            tissue = column("in_tissue").astype(np.float64) > 0
        umi = next((key for key in ("sum_umi", "sce.sum_umi") if key in names), None)
        library_size = library_of(column(umi), path) if umi else None
        sample = library or path.stem
        patient = _h5ad_patient(handle, names, column)
        um_per_px = (
            float(handle["uns/um_per_px"][()])
            if "uns/um_per_px" in handle
            else lattice_um_per_px(grid, xy)
        )
        if um_per_px is not None and not 0 < um_per_px < float("inf"):
            raise DataError(f"{path} has a uns/um_per_px of {um_per_px}: it must be positive")
        image, scale = _h5ad_picture(handle, path, sample, xy)
    tables = []
    if not patient:
        patient, tables = donor_of(path.parent, sample)
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
        sample,
        patient,
        str(path),
        library_size,
        tables,
        image_file="" if image is None else str(path),
    )
    return slide if tissue.all() or not tissue.any() else slide.subset(tissue)


def _h5ad_patient(handle: h5py.File, names: list[str], column) -> str:
    patient = ""
    if isinstance(handle.get("uns/patient"), h5py.Dataset):
        patient = str(decode_strings(handle["uns/patient"]).item())
    keys = ("patient", "subject", "donor", "sce.subject")
    key = next((key for key in keys if key in names), None)
    return patient or (label_names(column(key))[0] if key else "")


def read_obsm(path, key, barcodes):
    """(N, D) float32 vectors of an h5ad's obsm for the spots `barcodes` (N,), joined by name.
    Raises DataError, naming the keys there are, where it has no such key."""
    with open_h5(path, "an h5ad file") as handle:
        keys = sorted(handle["obsm"]) if "obsm" in handle else []
        if key not in keys:
            raise DataError(
                f"{path} has no obsm[{key!r}] for --embedding: give one of {', '.join(keys)}, or a "
                ".npy or .npz file"
            )
        row = {name: i for i, name in enumerate(_index(handle, handle["obs"]).astype(str))}
        if not isinstance(handle["obsm"][key], h5py.Dataset):
            raise ValueError(f"obsm {key} is no array")
        values = read_array(handle["obsm"][key], "iuf").astype(np.float32)
    if values.ndim != 2 or len(values) != len(row) or not np.isfinite(values).all():
        raise DataError(
            f"{path} has obsm[{key!r}] of shape {values.shape} or with NaN values for {len(row)} "
            "spots: an embedding is a finite (N, D) array"
        )
    return values[[row[str(barcode)] for barcode in barcodes]]
