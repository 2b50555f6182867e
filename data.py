"""Slide -> normalised matrices, graphs, splits and frozen features; the readers come from `readers`
(files -> Slide) and `cells` (files -> Cells).

    # single cells of in-situ sequencing reads and a nuclear label image
    python data.py ca1 <folder> <cells.h5>
    # single cells of a Xenium output folder; needs the extra [xenium]
    python data.py xenium <bundle> <cells.h5>

Whatever is fitted (genes, scaler, principal components) is fitted on the rows it is given, which
are training rows everywhere in this project. Graphs are (N, k) tables of neighbour rows or sparse
matrices; nothing is N x N.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pickle
import re
import typing
import warnings
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from scipy.linalg import eigh
from scipy.spatial import cKDTree
from sklearn.decomposition import PCA
from sklearn.model_selection import train_test_split

from cells import Cells, CropStack, from_ca1, from_xenium, load_cells, write_cells  # noqa: F401 - as the readers below
from readers import (  # noqa: F401 - the readers are part of this module's interface
    JSON_ERRORS,
    NPZ_ERRORS,
    DataError,
    Patches,
    Slide,
    file_checksum,
    hest_genes,
    hest_samples,
    hest_split,
    is_one_slide,
    list_slices,
    load_h5ad,
    load_hest,
    load_patch_folder,
    load_slide,
    load_visium,
    open_h5,
    read_10x_h5,
    read_array,
    read_gene_list,
    read_json,
    read_npz,
)

# --------------------------------------------------------------------------------------------------
# Preprocessing: fitted on the training rows only, applied to all rows
# --------------------------------------------------------------------------------------------------


def normalise_log1p(counts, library_size=None, target_sum=1e4):
    """Library-size normalisation to `target_sum` and log1p; stays sparse, spots without counts stay
    zero.

    counts (N, G) CSR raw; library_size (N,) total UMIs per spot, own row sums where None (give it
    where the file holds a subset of the genes). Returns (N, G) CSR float32.
    """
    out = sp.csr_matrix(counts, dtype=np.float32, copy=True)
    # (N,)
    total = (
        np.asarray(out.sum(1), np.float64).ravel()
        if library_size is None
        else np.asarray(library_size, np.float64)
    )
    scale = np.divide(target_sum, total, out=np.zeros_like(total), where=total > 0)
    out.data = np.log1p(out.data * np.repeat(scale, np.diff(out.indptr)).astype(np.float32))
    return out


def mean_var(x):
    """Column means and unbiased variances of a sparse (N, G) matrix in float64, without densifying:
    (G,), (G,)."""
    n = x.shape[0]
    # squares of 32-bit counts overflow from 46,341 on
    x = x.astype(np.float64) if x.dtype.kind in "iu" else x
    mean = np.asarray(x.mean(0, dtype=np.float64)).ravel()
    square = np.asarray(x.multiply(x).sum(0, dtype=np.float64)).ravel() / n
    return mean, np.maximum(square - mean**2, 0) * n / max(n - 1, 1)


def _top(score, n_top):
    """The columns of the `n_top` largest scores, in file order; ties go to the earlier gene."""
    return np.sort(np.argsort(-np.nan_to_num(score, nan=-np.inf), kind="stable")[:n_top])


def hvg_seurat(log_counts, n_top=3000):
    """Highly variable genes by binned normalised dispersion (Satija et al. 2015), on log1p data.
    Returns sorted columns (n_top,)."""
    x = log_counts.copy()
    x.data = np.expm1(x.data.astype(np.float64))
    mean, var = mean_var(x)
    mean[mean == 0] = 1e-12
    dispersion = np.where(var > 0, var, np.nan) / mean
    dispersion, mean = np.log(dispersion), np.log1p(mean)
    edges = np.linspace(mean.min(), mean.max(), 21)
    # right-closed bins: the smallest mean belongs to the first
    edges[0] -= (edges[-1] - edges[0]) * 1e-3
    bins = np.searchsorted(edges, mean, side="left")
    score = np.full(len(mean), np.nan)
    for b in np.unique(bins):
        rows = (bins == b) & np.isfinite(dispersion)
        if rows.sum() == 1:
            # a bin of one gene: its deviation is taken as one
            score[rows] = 1.0
        elif rows.any():
            spread = dispersion[rows].std(ddof=1)
            score[rows] = (dispersion[rows] - dispersion[rows].mean()) / (
                spread if spread > 0 else 1.0
            )
    return _top(score, n_top)


def _loess(x, y, span=0.3, knots=500):
    """Local quadratic regression with tricube weights (Cleveland 1979), evaluated at quantile knots
    and interpolated: (G,) -> (G,)."""
    order = np.argsort(x, kind="stable")
    xs, ys = x[order], y[order]
    q = max(int(span * len(xs)), 4)
    at = np.unique(np.quantile(xs, np.linspace(0, 1, min(knots, len(xs)))))
    fit = np.empty(len(at))
    for i, centre in enumerate(at):
        lo = np.clip(np.searchsorted(xs, centre) - q, 0, len(xs) - q)
        hi = min(lo + 2 * q, len(xs))
        near = lo + np.argpartition(np.abs(xs[lo:hi] - centre), q - 1)[:q]
        d = xs[near] - centre
        reach = np.abs(d).max() or 1.0
        w = np.sqrt(np.clip(1 - (np.abs(d) / reach) ** 3, 0, None) ** 3)
        basis = np.stack([np.ones(q), d / reach, (d / reach) ** 2], 1)  # (q, 3)
        fit[i] = np.linalg.lstsq(basis * w[:, None], ys[near] * w, rcond=None)[0][0]
    return np.interp(x, at, fit)


def hvg_seurat_v3(counts, n_top=3000):
    """Highly variable genes by variance of clipped standardised counts (Stuart et al. 2019), on raw
    counts. Sorted columns (n_top,)."""
    n = counts.shape[0]
    mean, var = mean_var(counts)
    seen = var > 0
    score = np.full(len(mean), -1.0)
    expected = np.sqrt(10 ** _loess(np.log10(mean[seen]), np.log10(var[seen])))
    x = counts[:, np.flatnonzero(seen)].tocsc().astype(np.float64)
    x.data = np.minimum(x.data, np.repeat(expected * np.sqrt(n) + mean[seen], np.diff(x.indptr)))
    total, square = np.asarray(x.sum(0)).ravel(), np.asarray(x.multiply(x).sum(0)).ravel()
    score[seen] = (n * mean[seen] ** 2 + square - 2 * total * mean[seen]) / ((n - 1) * expected**2)
    return _top(score, n_top)


class Standardise:
    """z-score with clip, fitted on training rows.

    A count matrix has its zeros at z = -mean/std, so clipping from above can be done on the stored
    values alone: the matrix stays sparse up to the last step, and PCA never sees a dense one.
    """

    def __init__(self, clip=10.0):
        self.clip = clip

    def fit(self, x):
        """x (n, G) CSR of training rows."""
        self.mean, var = mean_var(x)  # (G,), (G,)
        self.std = np.where(var > 0, np.sqrt(var), 1.0)
        return self

    def scaled(self, x):
        """(N, G) CSR of min(x, mean + clip * std) / std, that is z + mean / std, still sparse."""
        out = sp.csr_matrix(x, dtype=np.float32, copy=True)
        cap = (self.mean + self.clip * self.std).astype(np.float32)[out.indices]
        out.data = np.minimum(out.data, cap) / self.std.astype(np.float32)[out.indices]
        return out

    def transform(self, x):
        """(N, G) dense float32 z-scores within +-clip."""
        z = self.scaled(x).toarray()  # (N, G)
        z -= (self.mean / self.std).astype(np.float32)
        return np.maximum(z, -self.clip, out=z)


class Expression:
    """Gene filter -> library size -> log1p -> HVG -> z-score with clip, as one fit/transform pair.

    `fit` sees training rows only; `transform` aligns any other slide by gene *name* (a missing gene
    is at the training mean, z = 0).
    flavor: `seurat` (on log data), `seurat_v3` (on counts) or `none` (all genes that pass the
    filter).
    """

    def __init__(self, n_top_genes=3000, flavor="seurat", min_spots=3, target_sum=1e4, clip=10.0):
        self.n_top_genes, self.flavor, self.min_spots, self.target_sum, self.clip = (
            n_top_genes,
            flavor,
            min_spots,
            target_sum,
            clip,
        )

    def fit(self, counts, genes, library_size=None):
        """counts (n, G) CSR raw counts of the training rows, genes (G,), library_size (n,) or None.
        Raises DataError on an empty panel."""
        seen = np.flatnonzero(counts.getnnz(axis=0) >= min(self.min_spots, counts.shape[0]))
        if len(seen) == 0:
            raise DataError(
                f"no gene is seen in {self.min_spots} training spots: give a slide with "
                "counts or more training spots"
            )
        counts = counts[:, seen]
        x = normalise_log1p(counts, library_size, self.target_sum)
        pick = {
            "seurat": lambda: hvg_seurat(x, self.n_top_genes),
            "seurat_v3": lambda: hvg_seurat_v3(counts, self.n_top_genes),
            "none": lambda: np.arange(len(seen)),
        }[self.flavor]()
        self.genes = np.asarray(genes)[seen][pick]  # (n_top,)
        self.scaler = Standardise(self.clip).fit(x[:, pick])
        return self

    def log1p(self, counts, genes, library_size=None):
        """(N, n_top) CSR of log1p values in the fitted gene order, and the mask (n_top,) of genes
        this panel has."""
        x = normalise_log1p(counts, library_size, self.target_sum).tocsc()
        column = {g: j for j, g in reversed(list(enumerate(genes)))}
        at = np.array([column.get(g, -1) for g in self.genes])
        present = at >= 0
        if not present.any():
            raise DataError(
                f"this slide shares none of the {len(self.genes)} genes of the training "
                "slides: check species and gene naming"
            )
        x = x[:, np.where(present, at, 0)].tocsr()
        return (x if present.all() else (x @ sp.diags(present.astype(np.float32))).tocsr()), present

    def transform(self, counts, genes, library_size=None, own_scale=False):
        """(N, n_top) dense float32 z-scores; genes that this panel lacks are 0, the training mean.
        Raises DataError if none is shared.

        `own_scale` z-scores by these rows themselves instead of the training rows: the usual answer
        to batch effects between slides."""
        x, present = self.log1p(counts, genes, library_size)
        z = (Standardise(self.clip).fit(x) if own_scale else self.scaler).transform(x)
        z[:, ~present] = 0
        return z

    def pca(self, counts, genes, n_components=50, fit_rows=None, library_size=None, seed=0):
        """(N, n_components) float32 principal components of the z-scores, fitted on `fit_rows`,
        without densifying (N, n_top)."""
        x = self.scaler.scaled(self.log1p(counts, genes, library_size)[0])
        rows = (
            np.arange(x.shape[0])
            if fit_rows is None
            else np.flatnonzero(fit_rows)
            if fit_rows.dtype == bool
            else fit_rows
        )
        return truncated_pca(x, n_components, rows, seed)

    def state(self):
        """Plain tensors-and-strings state for a checkpoint; `from_state` rebuilds it."""
        return {
            "n_top_genes": self.n_top_genes,
            "flavor": self.flavor,
            "min_spots": self.min_spots,
            "target_sum": self.target_sum,
            "clip": self.clip,
            "genes": self.genes.tolist(),
            "mean": self.scaler.mean.tolist(),
            "std": self.scaler.std.tolist(),
        }

    @classmethod
    def from_state(cls, state):
        """Inverse of `state`. Raises KeyError, TypeError or ValueError where the parts do not fit
        each other."""
        out = cls(*(state[k] for k in ("n_top_genes", "flavor", "min_spots", "target_sum", "clip")))
        out.genes, out.scaler = np.array(state["genes"]), Standardise(state["clip"])
        out.scaler.mean, out.scaler.std = (
            np.array(state["mean"], float),
            np.array(state["std"], float),
        )
        if not all(isinstance(gene, str) for gene in state["genes"]):
            raise ValueError("a gene is no name")
        if not out.genes.shape == out.scaler.mean.shape == out.scaler.std.shape or not (
            np.isfinite(out.scaler.mean).all() and (out.scaler.std > 0).all()
        ):
            raise ValueError("its genes, means and deviations do not fit each other")
        return out


def truncated_pca(x, n_components, fit_rows=None, seed=0):
    """(N, n_components) float32 scores of a sparse or dense (N, G) matrix; centring is implicit, a
    sparse matrix is never densified as a whole.

    By Lanczos iterations (ARPACK), or of a tall sparse matrix by its (G, G) covariance where that
    is less work: same components up to sign.
    """
    fit = x if fit_rows is None else x[fit_rows]
    n_components = min(n_components, min(fit.shape) - 1)
    if (
        sp.issparse(fit)
        and len(fit.indptr) > 10 * fit.shape[1]
        and fit.shape[1] ** 2 < 1e5 * fit.nnz / fit.shape[0]
    ):
        mean, axes = covariance_axes(fit.tocsr(), n_components)
        return np.concatenate(
            [(part @ axes - mean @ axes).astype(np.float32) for part in dense_parts(x.tocsr())]
        )
    return (
        PCA(n_components, svd_solver="arpack", random_state=seed)
        .fit(fit)
        .transform(x)
        .astype(np.float32)
    )


def covariance_axes(x, n_components):
    """Mean (G,) and the leading eigenvectors (G, n_components), largest first, of the covariance of
    x (N, G) CSR."""
    mean, square = np.asarray(x.mean(0), np.float64).ravel(), np.zeros((x.shape[1],) * 2)
    for part in dense_parts(x):
        part -= mean
        square += part.T @ part
    # (G, n_components)
    axes = eigh(square, subset_by_index=[len(mean) - n_components, len(mean) - 1])[1][:, ::-1]
    return mean, axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(n_components)])


def dense_parts(x, rows=10_000):
    """x (N, G) CSR as float64 arrays of at most `rows` rows, one after the other."""
    for i in range(0, x.shape[0], rows):
        yield x[i : i + rows].toarray().astype(np.float64)


# --------------------------------------------------------------------------------------------------
# Graphs: every graph is an (N, k) table of neighbour rows; -1 is "no neighbour"
# --------------------------------------------------------------------------------------------------


def knn_table(xy, k, query=None, name=""):
    """Rows of the k nearest spots by KD-tree, nearest first, self excluded: (N, k) int64.

    With `query` (M, 2): the nearest rows of `xy` to each query point, (M, k). Raises DataError,
    naming slide `name`, with fewer than k + 1 (k) spots.
    """
    _check_size(xy, k + 1 if query is None else k, k, name)
    if query is not None:
        return cKDTree(xy).query(query, k=np.arange(1, k + 1))[1].astype(np.int64)
    order, near = _nearest_in_tree_order(xy, k)
    table = np.empty((len(xy), k), np.int64)
    table[order] = near
    return table  # (N, k)


def _check_size(xy, need, k, name):
    if len(xy) < need:
        raise DataError(
            f"a graph with k = {k} needs at least {need} spots, {_called(name)} has "
            f"{len(xy)}: choose a smaller k"
        )


def _nearest_in_tree_order(xy, k):
    """Rows in the order of a KD-tree's leaves (N,), and their k nearest rows (N, k), self excluded.
    Leaves lie together: asked in their order the tree stays in cache, four times as fast at a
    million spots."""
    tree = cKDTree(xy)
    order = tree.indices  # (N,)
    near = tree.query(xy[order], k=k + 1)[1]  # (N, k+1)
    is_self = near == order[:, None]
    # spots at one place: self may be missing, drop the farthest
    is_self[~is_self.any(1), -1] = True
    return order, near[~is_self].reshape(len(xy), k)


def median_tiles(xy, size):
    """Rows of xy (N, 2) in compact tiles of at most `size` spots: halve at the median of the longer
    side until small enough, O(N log^2 N)."""
    todo, tiles = [np.arange(len(xy))], []
    while todo:
        rows = todo.pop()
        if len(rows) <= size:
            tiles.append(rows)
            continue
        axis = int(np.argmax(np.ptp(xy[rows], axis=0)))
        rows = rows[np.argsort(xy[rows, axis], kind="stable")]
        todo += [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    return tiles


def with_halo(table, rows, hops, place):
    """The spots that `hops` steps of a graph reach from a tile, and their neighbour table, so that
    the tile's own spots see what they see in the whole.

    table (N, k); rows (m,) of the tile; place (N,) int64, all -1, lent as a scratch pad and given
    back so. Returns rows (n,), the tile's own first, and the table (n, k) of places among them. A
    spot of the outermost ring points at itself where its neighbour is not at hand: it keeps its
    number of neighbours, and what is computed there reaches no spot of the tile.
    """
    found, edge = [rows], rows
    place[rows] = 0
    for _ in range(hops):
        near = np.unique(table[edge])
        edge = near[(near >= 0) & (place[near] < 0)]
        place[edge] = 0
        found.append(edge)
    found = np.concatenate(found)  # (n,)
    place[found] = np.arange(len(found))
    near = table[found]  # (n, k)
    here = np.where(place[near] < 0, np.arange(len(found))[:, None], place[near])
    place[found] = -1
    return found, np.where(near < 0, -1, here)


def lattice_table(grid, radius=1):
    """Lattice neighbours within `radius` rings from (N, 2) array row/column: (N, K) int64, -1 where
    the lattice site is empty.

    On Visium's hexagonal lattice (row + column even) ring r has 6 r sites, so K = 3 radius (radius
    + 1); on a square lattice ring r has 8 r (Chebyshev distance). Sites are ordered by ring.
    """
    grid = np.asarray(grid, np.int64)
    hexagonal = len(np.unique(grid.sum(1) % 2)) == 1
    reach = np.arange(-2 * radius, 2 * radius + 1)
    dr, dc = (a.ravel() for a in np.meshgrid(reach, reach, indexing="ij"))
    ring = (
        np.maximum(abs(dr), (abs(dr) + abs(dc)) // 2) if hexagonal else np.maximum(abs(dr), abs(dc))
    )
    keep = (ring > 0) & (ring <= radius) & ((dr + dc) % 2 == 0 if hexagonal else True)
    order = np.argsort(ring[keep], kind="stable")
    dr, dc = dr[keep][order], dc[keep][order]  # (K,)
    low = grid.min(0) - 2 * radius
    width = grid[:, 1].max() - low[1] + 2 * radius + 1
    # (N,) one integer per lattice site
    site = (grid[:, 0] - low[0]) * width + grid[:, 1] - low[1]
    by_site = np.argsort(site)
    want = site[:, None] + dr * width + dc  # (N, K)
    at = np.minimum(np.searchsorted(site, want, sorter=by_site), len(site) - 1)
    found = by_site[at]
    return np.where(site[found] == want, found, -1)


def table_to_csr(table):
    """(N, k) neighbour table -> (N, N) CSR of ones, row i holding the neighbours of i."""
    n, k = table.shape
    rows, cols = np.repeat(np.arange(n), k), table.ravel()
    keep = cols >= 0
    return sp.csr_matrix((np.ones(keep.sum(), np.float32), (rows[keep], cols[keep])), shape=(n, n))


def symmetric_union(table):
    """Undirected graph that has an edge where either end chose the other: (N, N) CSR of ones."""
    a = table_to_csr(table)
    return a.maximum(a.T).tocsr()


def normalised_knn_graph(xy, k, name=""):
    """normalised_adjacency(symmetric_union(knn_table(xy, k))) (N, N) CSR and its number of
    connected parts, worked out with the spots in the order of a KD-tree: neighbours lie together in
    memory, which spots in a file need not. Raises DataError, naming slide `name`, with fewer than k
    + 1 spots."""
    _check_size(xy, k + 1, k, name)
    order, near = _nearest_in_tree_order(xy, k)
    place = np.empty(len(xy), np.int64)  # of a row in that order
    place[order] = np.arange(len(xy))
    adjacency = symmetric_union(place[near])
    # symmetric, so strong is weak, and needs no transpose
    parts = sp.csgraph.connected_components(adjacency, connection="strong")[0]
    a = normalised_adjacency(adjacency)[place][:, place]  # (N, N) in the order of xy
    a.sort_indices()
    return a, parts


def normalised_adjacency(adjacency):
    """D^-1/2 (A + I) D^-1/2 (Kipf & Welling 2017, Eq. 2) of an (N, N) CSR adjacency, as CSR."""
    a = (adjacency + sp.identity(adjacency.shape[0], dtype=np.float32, format="csr")).tocsr()
    d = 1 / np.sqrt(np.asarray(a.sum(1)).ravel())  # (N,)
    # as D^-1/2 A D^-1/2, without two sparse products
    a.data = (np.repeat(d, np.diff(a.indptr)) * a.data * d[a.indices]).astype(np.float32)
    return a


def neighbour_mean(x, table):
    """Mean over a spot and its neighbours: (N, D) sparse or dense -> the same kind. One sparse
    product, linear in N k."""
    a = table_to_csr(table) + sp.identity(len(table), dtype=np.float32, format="csr")
    return sp.diags(1 / np.asarray(a.sum(1)).ravel()).astype(np.float32) @ a @ x


# --------------------------------------------------------------------------------------------------
# Splits: masks over the spots of one or several slides; a split knows its name and whether it leaks
# position
# --------------------------------------------------------------------------------------------------


@dataclass
class Split:
    """Boolean masks (N,) train / val / test; spots in none of them are unlabelled, or buffer."""

    name: str
    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    leaks_position: bool
    detail: str = ""


def random_split(labels, seed=42):
    """The published split: labelled spots 60/20/20, stratified, spots drawn at random inside one
    slice. It leaks position: about 60 % of a test spot's neighbours are training spots. Raises
    DataError with fewer than two classes, or too few spots of one."""
    rows = np.flatnonzero(labels >= 0)
    check_labels(labels)
    try:
        train, rest = train_test_split(
            rows, train_size=0.6, stratify=labels[rows], random_state=seed
        )
        val, test = train_test_split(rest, train_size=0.5, stratify=labels[rest], random_state=seed)
    except ValueError as error:
        raise DataError(
            f"the labels cannot be split 60/20/20 within each class ({error}): drop or merge "
            "classes of fewer than five spots"
        ) from error
    return Split(
        "random",
        *(_mask(r, len(labels)) for r in (train, val, test)),
        True,
        f"60/20/20 stratified, seed {seed}",
    )


def block_split(
    labels, xy, fold=0, n_blocks=5, n_folds=5, buffer=3.0, pitch=None, seed=0, val=True, reach=0.0
):
    """Whole n_blocks x n_blocks tiles of the tissue's bounding box are held out; training spots
    within `buffer` lattice pitches of a test spot are dropped. Tiles are dealt to folds at random;
    the next fold's tiles are for validation (`val`), also kept `buffer` from the test.

    labels (N,) int, xy (N, 2) px, pitch px (median nearest-neighbour distance where None). `reach`
    is the model's receptive field in pitches: the split leaks position where the buffer is 0 or
    smaller than that. No buffer lies between training and validation spots. Raises DataError where
    the test, the validation (if asked for) or all but one training class would be empty.
    """
    check_labels(labels)
    if not 0 <= fold < n_folds:
        raise DataError(f"fold {fold} does not exist: folds go from 0 to {n_folds - 1}")
    low, high = xy.min(0), xy.max(0)
    # (N, 2)
    tile = np.minimum(
        ((xy - low) / np.maximum(high - low, 1e-9) * n_blocks).astype(int), n_blocks - 1
    )
    deal = np.random.default_rng(seed).permutation(np.arange(n_blocks**2) % n_folds)
    fold_of = deal[tile[:, 0] * n_blocks + tile[:, 1]]  # (N,)
    labelled = labels >= 0
    test, validate = (
        labelled & (fold_of == fold),
        labelled & (fold_of == (fold + 1) % n_folds) & val,
    )
    train = labelled & ~test & ~validate
    if not test.any():
        raise DataError(
            f"fold {fold} of the {n_blocks} x {n_blocks} blocks holds no labelled spot: "
            "choose another fold or fewer blocks"
        )
    pitch = pitch or lattice_pitch(xy)
    near = (
        cKDTree(xy[test]).query(xy)[0] <= buffer * pitch + 1e-6
        if buffer > 0
        else np.zeros(len(xy), bool)
    )
    detail = (
        f"fold {fold} of {n_folds}, {n_blocks} x {n_blocks} blocks, buffer {buffer:g} pitches, "
        f"seed {seed}"
    )
    split = Split(
        "blocks", train & ~near, validate & ~near, test, buffer <= 0 or buffer < reach, detail
    )
    if len(np.unique(labels[split.train])) < 2:
        raise DataError(
            f"the buffer of {buffer:g} pitches leaves fewer than two classes to train on: "
            "choose a smaller buffer or more blocks"
        )
    if val and not split.val.any():
        raise DataError(
            f"fold {fold} of the {n_blocks} x {n_blocks} blocks with a buffer of {buffer:g} "
            "pitches leaves no labelled spot for validation: "
            "choose a smaller buffer, more blocks or another fold"
        )
    return split


def holdout_split(slides, labels, name="slice", seed=0, n_blocks=5):
    """Slide 0 is scored, the others train; a fifth of their n_blocks x n_blocks tiles is for
    validation. labels (N,) stacked over slides.

    `slice` leaks position where a slide is, or may be (patient unknown), of the scored slide's
    donor: neighbouring sections are near copies. `donor` does not; it raises DataError unless every
    slide's patient is known.
    """
    if name == "donor":
        check_donors(slides)
    start = np.cumsum([0] + [s.n_spots for s in slides])
    for s, a, b in zip(slides, start, start[1:]):
        check_labels(labels[a:b], s.sample)
    train, val = np.zeros(len(labels), bool), np.zeros(len(labels), bool)
    for i in range(1, len(slides)):
        rows = slice(start[i], start[i + 1])
        part = block_split(
            labels[rows], slides[i].xy, 0, n_blocks, buffer=0.0, seed=seed, val=False
        )
        train[rows], val[rows] = part.train, part.test
    test = (labels >= 0) & (np.arange(len(labels)) < start[1])
    same = (
        any(s.patient == slides[0].patient or not s.patient for s in slides[1:])
        or not slides[0].patient
    )
    detail = (
        f"{slides[0].sample} held out, trained on {', '.join(s.sample for s in slides[1:])}, a "
        "fifth of their blocks for validation"
    )
    return Split(name, train, val, test, same, detail)


def cell_split(cells, test_every=4, width=600.0, offset=None, buffer=96.0, val=4, fold=0):
    """Split of cells by section where there are three or more, else by blocks of `width` px along x
    within each section.

    Every `test_every`-th unit (section or block) is the test, the one numbered `offset` first
    (default test_every // 2), moved on by `fold`; every `val`-th of the others is for validation
    (0: none). Among blocks, training and validation cells within `buffer` px of a test cell of
    their section, then training cells within it of a validation cell, are in no part. With three
    sections and test_every 4 it is every third. Raises DataError where a part would be empty.
    Returns a Split over cells, masks (N,).
    """
    by_section = len(cells.sections) >= 3
    every = min(test_every, len(cells.sections)) if by_section else test_every
    if test_every < 2 or not 0 <= fold < every or not width > 0 or val < 0 or val == 1:
        raise DataError(
            f"test_every {test_every}, fold {fold}, width {width:g} and val {val} make no split: "
            f"give test_every >= 2, a fold from 0 to {every - 1}, width > 0, val 0 or >= 2"
        )
    # (N,)
    unit = cells.section if by_section else np.floor(cells.xy[:, 0] / width).astype(np.int64)
    first = every // 2 if offset is None else offset
    tested = unit % every == (first + fold) % every
    others = np.unique(unit[~tested])
    validated = (
        np.isin(unit, others[min(val // 2, len(others) - 1) :: val])
        if val and len(others)
        else np.zeros(len(unit), bool)
    )
    near_test = np.zeros(len(unit), bool) if by_section else _near(cells, tested, buffer)
    validated &= ~tested & ~near_test
    train = ~tested & ~validated & ~near_test
    if not by_section:
        train &= ~_near(cells, validated, buffer)
    what = "sections" if by_section else "blocks"
    for name, part in (
        ("test", tested),
        ("train on", train),
        *((("validate", validated),) if val else ()),
    ):
        if not part.any():
            raise DataError(
                f"{cells.source} has no cell to {name} among its {len(np.unique(unit))} "
                f"{what}: choose another fold, smaller blocks or buffer"
            )
    rule = f"every {every}th of {len(np.unique(unit))} {what}" + (
        "" if by_section else f" of {width:g} px along x"
    )
    detail = f"{rule} is the test, fold {fold}; " + (
        f"every {val}th of the others for validation" if val else "no validation"
    )
    detail += (
        ""
        if by_section
        else (
            f"; {int((~tested & near_test).sum())} cells within {buffer:g} px of a test cell "
            "dropped"
        )
    )
    return Split(what, train, validated, tested, not by_section and buffer <= 0, detail)


def _near(cells, part, buffer):
    """(N,) cells within `buffer` px of a cell of `part` (N,) in the same section."""
    out = np.zeros(len(part), bool)
    for s in np.unique(cells.section[part]):
        rows = cells.section == s
        out[rows] = cKDTree(cells.xy[rows & part]).query(cells.xy[rows])[0] <= buffer
    return out


def check_labels(labels, name=""):
    """Raise DataError, naming slide `name`, unless at least two classes have labelled spots."""
    present = np.unique(labels[labels >= 0])
    if len(present) == 0:
        raise DataError(
            f"{_called(name)} has no labels: give metadata.tsv, barcode_level_layer_map.tsv "
            "or a two-column CSV with --labels"
        )
    if len(present) == 1:
        raise DataError(
            f"{_called(name)} has one class only: a classifier needs at least two, add labels "
            "or choose another slide"
        )


def check_donors(slides):
    """Raise DataError, naming the slide, unless every slide's patient is known."""
    for slide in slides:
        if not slide.patient:
            raise DataError(
                f"slide {slide.sample} names no patient, so donors cannot be told apart: add "
                "`subject` to its metadata.tsv "
                "(h5ad: obs column `patient`), or use --split slice with --train"
            )


def _called(name):
    return f"slide {name}" if name else "this slide"


def lattice_pitch(xy):
    """Median distance to the nearest other spot, in the units of xy."""
    return float(np.median(cKDTree(xy).query(xy, k=2)[0][:, 1]))


def _mask(rows, n):
    out = np.zeros(n, bool)
    out[rows] = True
    return out


def common_genes(slides):
    """Genes that all slides have, in the order of the first. Raises DataError if there is none."""
    shared = set(slides[0].genes).intersection(*(s.genes for s in slides[1:]))
    if not shared:
        raise DataError(
            f"slides {', '.join(s.sample for s in slides)} share no gene: check species and "
            "gene naming"
        )
    return np.array([g for g in slides[0].genes if g in shared])


def global_labels(slides):
    """One label map over several slides: (list of classes, sorted; list of (N_i,) label arrays in
    that numbering)."""
    classes = sorted({c for s in slides for c in s.classes})
    code = {c: i for i, c in enumerate(classes)}
    return classes, [np.array([code[c] for c in s.classes] + [-1])[s.labels] for s in slides]


# --------------------------------------------------------------------------------------------------
# H&E -> expression: which slides train, which genes are predicted, their values
# --------------------------------------------------------------------------------------------------


def hest_partition(root, by="folds", fold=0, patient="", sample=""):
    """Which slides of a HEST folder train and which are scored: by `folds` (splits/*_<fold>.csv),
    `patient`, `section` (one slide held out, the others of its patient train) or `sample` (one
    slide held out, all others train).

    Returns Split over the folder's slides, train names, test names, the run's folder name, whether
    it leaks the patient.

    Raises DataError where a side would be empty or a slide has no file.
    """
    if by == "folds":
        train_names, test_names = hest_split(root, fold)
        part, detail = f"fold{fold}", f"splits/{{train,test}}_{fold}.csv"
    names = hest_samples(root)
    of = {n: load_hest(root, n, patches=False, counts=False).patient or n for n in names}
    if by == "patient":
        test_names = [n for n in names if of[n] == patient]
        train_names = [n for n in names if n not in test_names]
        # names a folder; the patient's name may hold a /
        part, detail = re.sub(r"[^\w.+-]|^\.+", "_", patient), f"patient {patient} held out"
    elif by == "section":
        test_names = [n for n in names if n == sample]
        train_names = [n for n in names if n not in test_names and of[n] == of.get(sample)]
        part, detail = (
            sample,
            f"section {sample} held out, the others of patient {of.get(sample)} train",
        )
    elif by == "sample":
        test_names, train_names = (
            [n for n in names if n == sample],
            [n for n in names if n != sample],
        )
        part, detail = sample, f"section {sample} held out, all others train"
    missing = [n for n in [*train_names, *test_names] if n not in of]
    if missing or not train_names or not test_names:
        wanted = {
            "folds": f"--fold {fold}",
            "patient": f"--patient {patient!r}",
            "section": f"--slice {sample!r}",
            "sample": f"--slice {sample!r}",
        }[by]
        there = ", ".join(
            f"{p}: {' '.join(n for n in names if of[n] == p)}" for p in sorted(set(of.values()))
        )
        raise DataError(
            f"{root}: {wanted} leaves {len(train_names)} slides to train on and "
            f"{len(test_names)} to score, "
            f"{len(missing)} of them without a file: choose from {there}"
        )
    leaks = bool({of[n] for n in train_names} & {of[n] for n in test_names})
    detail += (
        ", other slides of the same patient train: leaks the patient"
        if leaks
        else ", no patient on both sides"
    )
    sides = np.isin(names, train_names), np.isin(names, test_names)
    return (
        Split(by, sides[0], np.zeros(len(names), bool), sides[1], leaks, detail),
        train_names,
        test_names,
        part,
        leaks,
    )


def target_genes(spec, slides, root, min_counts=100):
    """Names of the genes to predict: `task` (the folder's var_50genes.json), a number (so many most
    variable genes of the training `slides`), or the path of a JSON list. Raises DataError for a
    gene without a count in any training slide."""
    if spec == "task":
        genes = hest_genes(root)
    elif spec.isdigit():
        total = {}
        for s in slides:
            rows = np.asarray(s.counts.sum(1)).ravel() >= min_counts
            for g, v in zip(s.genes, mean_var(normalise_log1p(s.counts[np.flatnonzero(rows)]))[1]):
                total[g] = total.get(g, 0.0) + v
        genes = [str(g) for g in sorted(total, key=lambda g: -total[g])[: int(spec)]]
    else:
        genes = read_gene_list(spec)
    seen = set()
    for s in slides:
        seen.update(s.genes[np.asarray(s.counts.sum(0)).ravel() > 0])
    silent = [g for g in genes if g not in seen]
    if silent or not genes:
        raise DataError(
            f"{root}: {len(silent)} of the {len(genes)} target genes ({', '.join(silent[:3])} "
            "...) have no count in any training "
            "slide: take them off the list or add slides"
        )
    return genes


def target_expression(slide, genes, target="cp10k"):
    """y (N, G) float32: log1p of counts per 10,000 (`cp10k`) or of raw counts (`log1p`), counts (N,
    G), library (N,), measured (G,) bool. A gene that the panel lacks is 0 and unmeasured; where a
    symbol stands twice the first is taken."""
    column = {g: j for j, g in reversed(list(enumerate(slide.genes)))}
    at = np.array([column.get(g, -1) for g in genes])
    library = (
        np.asarray(slide.counts.sum(1), np.float64).ravel()
        if slide.library_size is None
        else slide.library_size
    )
    counts = slide.counts.tocsc()[:, np.maximum(at, 0)].tocsr()
    y = (
        normalise_log1p(counts, library).toarray()
        if target == "cp10k"
        else np.log1p(counts.toarray())
    )
    counts = counts.toarray()
    y[:, at < 0], counts[:, at < 0] = 0, 0
    return *(np.asarray(a, np.float32) for a in (y, counts, library)), at >= 0


# --------------------------------------------------------------------------------------------------
# Frozen vectors per spot: embeddings from a file, image features from a descriptor or a pretrained
# encoder
# --------------------------------------------------------------------------------------------------


def read_embedding(path, slide):
    """(N, D) float32 frozen vectors of a slide's spots: .npz with `embedding` and `barcodes`
    (joined by barcode), or .npy in row order.

    `{slice}` in the path stands for the slide's sample name. Raises DataError for a file that is
    damaged or does not fit the slide.
    """
    path, names = slice_path(path, slide), None
    try:
        with open(path, "rb") as file:
            values = np.load(file, allow_pickle=False)
            # an .npz by content, whatever its name
            if not isinstance(values, np.ndarray):
                values, names = values["embedding"], values["barcodes"].astype(str)
            if values.dtype.kind not in "iuf":
                raise ValueError(f"it is {values.dtype}")
            # beyond float32 is infinite, and refused below
            with np.errstate(over="ignore"):
                values = values.astype(np.float32)
            finite = bool(np.isfinite(values).all())
    except NPZ_ERRORS as error:
        raise DataError(
            f"{path} holds no embedding ({error}): give .npy (N, D), or .npz with `embedding` "
            "(N, D) and `barcodes` (N,)"
        ) from error
    if values.ndim != 2 or not finite:
        raise DataError(
            f"{path} has shape {values.shape} or NaN values: an embedding is a finite (N, D) array"
        )
    if names is None:
        if len(values) != slide.n_spots:
            raise DataError(
                f"{path} has {len(values)} rows, slide {slide.sample} {slide.n_spots} spots: "
                "save an .npz with `barcodes` to join by name"
            )
        return values
    if names.shape != (len(values),):
        raise DataError(
            f"{path} has {len(values)} vectors but barcodes of shape {names.shape}: save one "
            "barcode per row"
        )
    row = {b: i for i, b in enumerate(names)}
    if len(row) < len(names):
        twice = next(b for i, b in enumerate(names) if row[b] != i)
        raise DataError(
            f"{path} has {len(names) - len(row)} duplicate barcodes ({twice} ...): save one "
            "row per barcode"
        )
    missing = [b for b in slide.barcodes if b not in row]
    if missing:
        raise DataError(
            f"{path} lacks {len(missing)} of the {slide.n_spots} barcodes of slide "
            f"{slide.sample} ({missing[0]} ...): embed all spots"
        )
    return values[[row[b] for b in slide.barcodes]]


# What torch.load can raise on a broken file: its zip reader, its unpickler and whatever rebuilds a
# tensor.
TORCH_ERRORS = (*NPZ_ERRORS, pickle.UnpicklingError, AssertionError, ImportError)


def read_checkpoint(path, what, needs=(), remedy="give the file of a finished run, or train again"):
    """{name: value} that torch.save wrote, on the CPU; tensors and plain values only. Raises
    DataError: damaged, no `what`, or without the keys `needs`.

    torch does not compare the checksums of the file, so that a flipped bit would be a wrong weight:
    they are compared here.
    """
    import torch

    try:
        # what other programs wrote may be of the old form without checksums
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():
                    raise ValueError("a checksum differs")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        lacking = [name for name in needs if name not in saved]
        if not isinstance(saved, dict) or lacking:
            raise ValueError(f"it lacks {', '.join(lacking) or 'names'}")
    except TORCH_ERRORS as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path} is not a {what} ({reason}): {remedy}") from error
    return saved


@contextmanager
def checkpoint_fits(path):
    """What the parts of a checkpoint that do not fit each other raise becomes a DataError about
    `path`."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{path} is not the model.pt of a finished run ({reason}): give that file, of "
            "this version of the program"
        ) from error


def saved_flags(path, cls, values, check):
    """The flags that a checkpoint holds, as the dataclass `cls`: of the types and among the choices
    of its fields, and passed by `check`. Raises DataError."""
    with checkpoint_fits(path):
        known = cls(**values)
        for name, kind in typing.get_type_hints(cls).items():
            value, choices = getattr(known, name), typing.get_args(kind)
            if (
                value not in choices
                if choices
                else not isinstance(value, (int, float) if kind is float else kind)
            ):
                raise ValueError(f"its flag {name} is {value}")
        check(known)
    return known


def slice_path(path, slide):
    """Path with `{slice}` replaced by the slide's sample name."""
    return Path(str(path).replace("{slice}", slide.sample))


def crops(slide, rows, side_um):
    """(n, s, s, 3) uint8 crops of constant physical side centred on the spots `rows`; beyond the
    border the edge pixels repeat.

    Raises DataError without an image or without a physical scale.
    """
    if slide.image is None or slide.image_scale is None:
        raise DataError(
            f"slide {slide.sample} has no image: put tissue_hires_image.png and "
            "scalefactors_json.json into spatial/, or choose another mode"
        )
    if not slide.um_per_px:
        raise DataError(
            f"slide {slide.sample} has no physical scale (no lattice, no microns_per_pixel): "
            "give image features as a file with --encoder"
        )
    half = max(1, int(round(side_um / slide.um_per_px * slide.image_scale / 2)))
    centre = np.rint(slide.xy[rows] * slide.image_scale).astype(int)  # (n, 2)
    height, width = slide.image.shape[:2]
    step = np.arange(-half, half + 1)
    # (n, s) each
    x, y = (
        np.clip(centre[:, i, None] + step, 0, size - 1) for i, size in ((0, width), (1, height))
    )
    return slide.image[y[:, :, None], x[:, None, :]]  # (n, s, s, 3)


# optical-density directions (Ruifrok & Johnston 2001, Table 1)
HAEMATOXYLIN_EOSIN = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])


def handmade_descriptor(patches):
    """(n, h, w, 3) uint8 -> (n, 42) float32 colour and texture statistics: RGB, haematoxylin and
    eosin density, gradients at two scales."""
    rgb = patches.astype(np.float32) / 255
    density = -np.log(np.maximum(rgb, 1 / 255))  # (n, h, w, 3)
    stains = density @ np.linalg.pinv(HAEMATOXYLIN_EOSIN).astype(np.float32)  # (n, h, w, 2)
    channels = np.concatenate([rgb, stains], -1)  # (n, h, w, 5)
    flat = channels.reshape(len(channels), -1, 5)
    parts = [flat.mean(1), flat.std(1), *np.quantile(flat, (0.1, 0.5, 0.9), axis=1)]  # 5 x (n, 5)
    for step in (1, 2):
        for axis in (1, 2):
            if channels.shape[axis] > step:
                a = np.abs(
                    np.take(channels, range(step, channels.shape[axis]), axis)
                    - np.take(channels, range(channels.shape[axis] - step), axis)
                )
                # blue, haematoxylin, eosin: (n, 3)
                parts.append(a[..., 2:].reshape(len(a), -1, 3).mean(1))
    centre = channels[
        :,
        channels.shape[1] // 4 : -(channels.shape[1] // 4) or None,
        channels.shape[2] // 4 : -(channels.shape[2] // 4) or None,
    ]
    # what the spot has that its surroundings do not: (n, 5)
    parts.append(centre.mean((1, 2)) - flat.mean(1))
    return np.concatenate([p.reshape(len(rgb), -1) for p in parts], 1).astype(np.float32)


def pretrained_encoder(name, device="cpu"):
    """A frozen Hugging Face vision model as a function (n, h, w, 3) uint8 -> (n, D) float32. Needs
    the `[pretrained]` extra.

    name: hub name or local folder. Input is resized to the model's image size (224 where it does
    not say) and normalised by its own mean and std (ImageNet's where it has none). Output:
    projected image features (CLIP), else the pooled output, else the mean token.
    """
    try:
        import torch
        from transformers import AutoModel
    except ImportError as error:
        raise DataError(
            f"encoder {name!r} needs transformers: pip install 'plainst[pretrained]', or "
            "--encoder handmade"
        ) from error
    try:
        model = AutoModel.from_pretrained(name).eval().to(device)
    except (OSError, ValueError) as error:
        raise DataError(
            f"encoder {name!r} cannot be loaded ({str(error).splitlines()[0]}): check the "
            "name, or the connection"
        ) from error
    vision = getattr(model.config, "vision_config", model.config)
    size, mean, std = (
        getattr(vision, "image_size", 224) or 224,
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
    )
    size = size[0] if isinstance(size, (list, tuple)) else size
    written = Path(name) / "preprocessor_config.json"
    if not Path(name).is_dir():
        from transformers.utils import cached_file

        found = cached_file(
            name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False
        )
        written = Path(found) if found else written
    if written.is_file():
        told = read_json(written)
        mean, std = told.get("image_mean", mean), told.get("image_std", std)
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (mean, std))

    @torch.no_grad()
    def encode(patches):
        # (n, 3, h, w)
        x = (
            torch.as_tensor(np.ascontiguousarray(patches), device=device)
            .permute(0, 3, 1, 2)
            .float()
            / 255
        )
        x = torch.nn.functional.interpolate(
            x, size=(size, size), mode="bicubic", antialias=True, align_corners=False
        ).clamp(0, 1)
        x = (x - mean) / std  # (n, 3, size, size)
        out = (
            model.get_image_features(pixel_values=x)
            if hasattr(model, "get_image_features")
            else model(pixel_values=x)
        )
        if not torch.is_tensor(out):
            out = (
                out.pooler_output
                if getattr(out, "pooler_output", None) is not None
                else out.last_hidden_state.mean(1)
            )
        return out.flatten(1).float().cpu().numpy()  # (n, D)

    return encode


def image_features(slide, encoder="handmade", crop_um=310.0, cache=None, device="cpu", batch=64):
    """(N, D) float32 frozen image features around each spot.

    encoder: `handmade`, a Hugging Face name, or a .npy / .npz file. The slide's own patches are
    used where it has them, else crops of `crop_um` from its image. Cached as an .npz under `cache`,
    keyed by image, its scale, positions, encoder and crop.
    """
    if Path(encoder).suffix in (".npy", ".npz"):
        return read_embedding(encoder, slide)
    if slide.patches is None:
        # complain before the encoder is loaded
        crops(slide, np.arange(1), crop_um)
    path = (
        None
        if cache is None
        else Path(cache) / f"{slide.sample}-{_features_key(slide, encoder, crop_um)}.npz"
    )
    if path is not None and path.is_file():
        return read_embedding(path, slide)
    encode = handmade_descriptor if encoder == "handmade" else pretrained_encoder(encoder, device)
    rows = np.array_split(np.arange(slide.n_spots), max(1, slide.n_spots // batch))
    out = np.concatenate(
        [
            encode(slide.patches[r] if slide.patches is not None else crops(slide, r, crop_um))
            for r in rows
        ]
    )
    if path is not None:
        _save_features(path, out, slide.barcodes)
    return out


def _features_key(slide, encoder, crop_um):
    """16 hex digits that change with anything the features depend on: pixels, positions, crop,
    encoder (a local one by its files)."""
    files = (
        sorted(p for p in Path(encoder).rglob("*") if p.is_file()) if Path(encoder).is_dir() else []
    )
    weights = [(str(p.relative_to(encoder)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    key = hashlib.sha256(
        repr(
            (
                encoder,
                weights,
                crop_um,
                slide.image_scale,
                slide.um_per_px,
                slide.sample,
                slide.n_spots,
            )
        ).encode()
    )
    if slide.patches is not None:
        key.update(file_checksum(slide.patches.path).encode())
        key.update(slide.patches.rows.tobytes())
    else:
        key.update(np.ascontiguousarray(slide.image).tobytes())
    key.update(np.ascontiguousarray(slide.xy).tobytes())
    return key.hexdigest()[:16]


def _save_features(path, embedding, barcodes):
    """Write the cache beside its place and rename; a folder that cannot be written is no error, the
    features are only made again."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            np.savez(file, embedding=embedding, barcodes=barcodes)
        os.replace(temporary, path)
    except OSError as error:
        # on a full disk, half of it
        with suppress(OSError):
            temporary.unlink()
        warnings.warn(
            f"image features are not cached: {path.parent} cannot be written "
            f"({error.strerror}); name a folder with --cache",
            stacklevel=3,
        )


def main(argv=None):
    """Converters to the cell file; exit status 2 and one sentence on bad input."""
    parser = argparse.ArgumentParser(
        prog="data.py",
        description="Convert single-cell data to the cell file that spatia.py reads.",
    )
    commands = parser.add_subparsers(dest="what", required=True)
    for what, source, text in (
        (
            "ca1",
            "folder with spots.csv and label_image.coo.npz",
            "in-situ sequencing reads and a nuclear label image",
        ),
        ("xenium", "Xenium output folder", "10x Xenium: counts, cell centres and morphology image"),
    ):
        command = commands.add_parser(what, help=text, description=text)
        command.add_argument("folder", help=source)
        command.add_argument("out", help="cell file to write, .h5")
    options = parser.parse_args(argv)
    try:
        (from_ca1 if options.what == "ca1" else from_xenium)(options.folder, options.out)
    except DataError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
