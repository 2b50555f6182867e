"""AnnData h5ad files -> Slide, by h5py alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
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
    Slide,
    as_uint8,
    check_fit,
    encode_labels,
    lattice_um_per_px,
    library_of,
    unique_genes,
)

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
        values = decode_strings(node["values"])
        return np.where(
            read_array(node["mask"], "b", values.shape),
            "" if values.dtype.kind == "U" else np.nan,
            values,
        )
    if isinstance(node, h5py.Group):
        codes, categories = read_array(node["codes"], "iu"), decode_strings(node["categories"])
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
            return matrix, unique_genes(genes, path)
        problem = problem or f"{found} in {where}"
    layers = ", ".join(handle["layers"]) if "layers" in handle else ""
    problem = problem or f"no {layer or 'X'}"
    raise DataError(
        f"{path} holds {problem}: give raw counts, with layer=<name> if they are in a layer "
        f"(layers here: {layers or 'none'})"
    )


def _h5ad_image(path, key: str) -> np.ndarray:
    with open_h5(path, "an h5ad file") as handle:
        return as_uint8(handle[key][()])


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
        check_stored_size(picture)
        check_fit(xy, scale, *picture.shape[:2], path)
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
        check_unique(barcodes, path)
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
        labels, classes = encode_labels(column(label_key).tolist()) if label_key else (None, [])
        tissue = (
            column("in_tissue").astype(np.float64) > 0
            if "in_tissue" in names
            else np.ones(len(barcodes), dtype=bool)
        )
        umi = next((key for key in ("sum_umi", "sce.sum_umi") if key in names), None)
        library_size = library_of(column(umi), path) if umi else None
        patient = (
            decode_strings(handle["uns/patient"]).item()
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
            else lattice_um_per_px(grid, xy)
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
