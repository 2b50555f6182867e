"""Graphs as (N, k) tables of neighbour rows, -1 where there is none, and tiles of a slide.

Here they are numpy. `plainst.neighbour_sums` has the sums over a table in torch, `plainst.tiles`
the tiles as tensors.
"""

import numpy as np
import scipy.sparse as sp
from scipy.spatial import cKDTree

from plainst.readers.checked import DataError


def describe_slide(name):
    return f"slide {name}" if name else "this slide"


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
            f"a graph with k = {k} needs at least {need} spots, {describe_slide(name)} has "
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


def reach(neighbours_of, rows, hops, place):
    """The spots that `hops` steps of a graph reach from those of a tile, the tile's own first.

    neighbours_of: function of rows -> the rows of their neighbours, of any shape, -1 for none; rows
    (m,) of the tile; place (N,) int64, all -1: 0 afterwards for the rows returned, (n,).
    """
    rings, edge = [rows], rows
    place[rows] = 0
    for _ in range(hops):
        near = np.unique(neighbours_of(edge))
        edge = near[(near >= 0) & (place[near] < 0)]
        place[edge] = 0
        rings.append(edge)
    return np.concatenate(rings)


def with_halo(table, rows, hops, place):
    """The spots that `hops` steps of a graph reach from a tile, and their neighbour table, so that
    the tile's own spots see what they see in the whole.

    table (N, k); rows (m,) of the tile; place (N,) int64, all -1, lent as a scratch pad and given
    back so. Returns rows (n,), the tile's own first, and the table (n, k) of places among them. A
    spot of the outermost ring points at itself where its neighbour is not at hand: it keeps its
    number of neighbours, and what is computed there reaches no spot of the tile.
    """
    found = reach(lambda edge: table[edge], rows, hops, place)
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


def table_to_csr(table, weights=None):
    """(N, k) neighbour table -> (N, N) CSR of ones, or of `weights` (N, k), row i holding the
    neighbours of i."""
    n, k = table.shape
    rows, cols = np.repeat(np.arange(n), k), table.ravel()
    keep = cols >= 0
    values = np.ones(keep.sum(), np.float32) if weights is None else weights.ravel()[keep]
    return sp.csr_matrix((values, (rows[keep], cols[keep])), shape=(n, n))


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


def distances(xy, table):
    """(N, k) distances of each spot to its neighbours in the table (without -1), in the units of
    xy."""
    return np.linalg.norm(xy[table] - xy[:, None], axis=2)


def smoothing_table(xy, k=7):
    """Rows (N, k) of the k nearest spots, self excluded, and weights (N, k) float32 that sum to 1:
    w_ij ~ exp(-d_ij^2 / (2 sigma^2)), sigma = 2 x their median distance."""
    near = knn_table(xy, k)
    d = distances(xy, near)  # (N, k)
    w = np.exp(-(d**2) / (2 * (2 * max(np.median(d), 1e-9)) ** 2))
    return near, (w / w.sum(1, keepdims=True)).astype(np.float32)


def smoothing_matrix(xy, k=7):
    """`smoothing_table` as (N, N) CSR, rows sum to 1."""
    return table_to_csr(*smoothing_table(xy, k))


def lattice_pitch(xy):
    """Median distance to the nearest other spot, in the units of xy."""
    return float(np.median(cKDTree(xy).query(xy, k=2)[0][:, 1]))
