"""Loom files (loompy: one HDF5 matrix of genes x cells) -> Slide, by h5py alone."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import scipy.sparse as sp

from plainst.readers.checked import (
    DataError,
    check_stored_size,
    check_unique,
    check_xy,
    count_problem,
    decode_strings,
    open_h5,
    read_names,
)
from plainst.readers.slides import LABEL_KEYS, Slide, encode_labels, label_names, unique_genes

# names of the attributes of cells that hold their positions
XY_KEYS = (("X", "Y"), ("x", "y"))
BLOCK = 4096  # cells read at a time


def _key(group: h5py.Group, wanted: str | None, usual, what: str, flag: str, path) -> str:
    """The attribute `wanted`, else the first usual one."""
    if wanted is not None and wanted not in group:
        raise DataError(
            f"{path} has no {what} attribute {wanted}: choose one of {', '.join(group)} with {flag}"
        )
    return wanted or next((key for key in usual if key in group), "")


def _read_counts(node, path) -> sp.csr_matrix:
    """Dense (G, N) dataset -> (N, G) int32 CSR, in blocks of cells."""
    check_stored_size(node)
    blocks = []
    for start in range(0, node.shape[1], BLOCK):
        block = node[:, start : start + BLOCK].T
        problem = count_problem(block)
        if problem:
            raise DataError(
                f"{path} holds {problem} in {node.name[1:]}: give raw counts, with --layer NAME if "
                "they are in a layer"
            )
        blocks.append(sp.csr_matrix(block.astype(np.int32)))
    return sp.vstack(blocks, format="csr")


def load_loom(
    path,
    label_key: str | None = None,
    layer: str | None = None,
    counts: bool = True,
    gene_key: str | None = None,
) -> Slide:
    """Loom file -> Slide of its cells, without those that a column attribute Valid leaves out.

    Names: col_attrs/CellID and row_attrs `gene_key`, else Gene; positions: col_attrs X and Y, as
    px; labels: col_attrs `label_key`, else the first known one (Region, ...); counts: `layer` of
    layers/, else the matrix. Raises DataError.
    """
    path = Path(path).resolve()
    with open_h5(path, "a loom file") as handle:
        cells, rows = handle["col_attrs"], handle["row_attrs"]
        barcodes = label_names(decode_strings(cells["CellID"]))
        barcodes = np.array(barcodes, dtype=str)
        check_unique(barcodes, path)
        n_cells = len(barcodes)
        if not n_cells:
            raise DataError(f"{path} holds no cell: give a file with cells")
        pair = next((pair for pair in XY_KEYS if set(pair) <= set(cells)), None)
        if pair is None:
            raise DataError(f"{path} has no positions: it needs the column attributes X and Y")
        xy = np.stack([decode_strings(cells[key]) for key in pair], axis=1)
        xy = check_xy(xy, n_cells, path)
        matrix, genes = None, np.array([], dtype=str)
        if counts:
            node = handle["matrix"]
            if layer is not None:
                layers = handle.get("layers", {})
                _key(layers, layer, (), "layer", "--layer", path)
                node = layers[layer]
            matrix = _read_counts(node, path)
            key = _key(rows, gene_key, ("Gene", "gene"), "row", "--gene_key", path)
            genes = unique_genes(read_names(rows[key]), path)
            if matrix.shape != (n_cells, len(genes)):
                raise ValueError(
                    f"{node.name} is {node.shape} for {len(genes)} genes x {n_cells} cells"
                )
        label_key = _key(cells, label_key, LABEL_KEYS, "column", "--label_key", path)
        labels, classes = None, []
        if label_key:
            names = label_names(decode_strings(cells[label_key]))
            if len(names) != n_cells:
                raise ValueError(f"{label_key} has {len(names)} values for {n_cells} cells")
            labels, classes = encode_labels(names)
        is_valid = np.ones(n_cells, dtype=bool)
        if "Valid" in cells:
            is_valid = decode_strings(cells["Valid"]).astype(np.float64) > 0
    slide = Slide(
        matrix,
        genes,
        barcodes,
        xy,
        labels=labels,
        classes=classes,
        sample=path.stem,
        source=str(path),
    )
    return slide if is_valid.all() or not is_valid.any() else slide.subset(is_valid)
