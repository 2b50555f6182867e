"""Graphs on a device: the product with a sparse adjacency, tiles of a graph with a halo, batches of
spots that lie together."""

import copy

import numpy as np
import scipy.sparse as sp
import torch
from torch.nn import functional as F

from plainst.neighbours import knn_table, lattice_pitch, median_tiles, normalised_knn_graph, reach


class Graph:
    """D^-1/2 (A + I) D^-1/2 of the k-nearest-neighbour graph symmetrised by union, as rows of an
    embedding bag, and its edges (2, E), i < j.

    Losses are about its first `n_own` spots: all of them, or in a part of the slide those of the
    tile; edges, too, are those among them. Raises DataError, naming slide `name`, with fewer than
    k + 1 spots.
    """

    def __init__(self, xy, k, device="cpu", name=""):
        # (N, N) sparse
        self.a_hat, self.pieces = normalised_knn_graph(xy, k, name)
        self.xy, self.device, self.cut = xy, device, {}
        self.set_edges(self.a_hat, len(xy))

    def set_edges(self, a_hat, n_own):
        """Set the tensors from A_hat (n, n) CSR, whose first `n_own` spots are the own ones."""
        self.columns, self.starts, self.weights = (
            torch.as_tensor(v, device=self.device)
            for v in (
                a_hat.indices.astype(np.int64),
                a_hat.indptr[:-1].astype(np.int64),
                a_hat.data,
            )
        )
        edges = sp.triu(a_hat[:n_own, :n_own], 1).tocoo()
        # (2, E)
        self.edges = torch.as_tensor(
            np.stack([edges.row, edges.col]).astype(np.int64), device=self.device
        )
        # (E,) to look edges up
        self.edge_keys = (self.edges[0] * n_own + self.edges[1]).sort().values
        self.n_own = n_own

    @property
    def rows(self):
        """(nnz,) row of every entry of A_hat, beside `columns` and `weights`."""
        ends = torch.cat([self.starts[1:], self.starts.new_tensor([len(self.columns)])])
        return torch.repeat_interleave(ends - self.starts)

    def without_halo(self, values):
        """The rows of the own spots; the whole is left as it is, since a slice of it would add up
        gradients in another order."""
        return values if len(values) == self.n_own else values[: self.n_own]

    def tiles(self, size, hops):
        """[(rows, Graph)]: the whole, or for each compact tile of at most `size` spots its rows of
        the slide, own spots first, and their graph.

        The halo is `hops` steps wide: through so many products a tile's own spots see what they
        see in the whole.
        """
        if not size or size >= len(self.xy):
            return [(slice(None), self)]
        if (size, hops) not in self.cut:
            self.cut[size, hops] = list(self.cut_tiles(size, hops))
        return self.cut[size, hops]

    def cut_tiles(self, size, hops):
        """Yield what `tiles` keeps."""
        place = np.full(len(self.xy), -1)
        for own in median_tiles(self.xy, size):
            # (n,)
            rows = reach(lambda edge: self.a_hat[edge].indices, own, hops, place)
            place[rows] = -1
            part = copy.copy(self)
            part.set_edges(self.a_hat[rows][:, rows].tocsr(), len(own))
            yield torch.as_tensor(rows, device=self.device), part


class GraphProduct(torch.autograd.Function):
    """A_hat h: (N, d) -> (N, d) as an embedding bag. A_hat is symmetric, so the gradient is the
    same product."""

    @staticmethod
    def forward(ctx, h, graph):
        ctx.graph = graph
        return F.embedding_bag(
            graph.columns,
            h.contiguous(),
            graph.starts,
            per_sample_weights=graph.weights.to(h.dtype),
            mode="sum",
        )

    @staticmethod
    def backward(ctx, grad):
        return GraphProduct.apply(grad, ctx.graph), None


graph_product = GraphProduct.apply

# spots at a time in evaluation mode
ROWS = 20_000


def in_blocks(module, x):
    """module(x) of what sees one spot at a time; in evaluation mode ROWS spots at a time, so that a
    million of them need no tiles. Compiled code takes all: it would hold a copy of the layers for
    every block. x (N, a) -> (N, b)."""
    if module.training or torch.compiler.is_compiling():
        return module(x)
    return torch.cat([module(rows) for rows in x.split(ROWS)])


class SpotBatches:
    """A slide in tiles of about `size` spots that lie together (a KD-tree's leaves), drawn in
    batches, and the m nearest spots of each spot, itself first.

    near (N, m) rows; offset (N, m, 2) of their places, in lattice pitches; adjacent (N, m) or
    (N, k) rows: at least the k nearest.
    """

    def __init__(self, xy, m, device, size=64, k=6):
        near = (
            np.arange(len(xy))[:, None]
            if m == 1
            else np.concatenate([np.arange(len(xy))[:, None], knn_table(xy, m - 1)], 1)
        )
        # (N, m)
        self.near = torch.as_tensor(near, device=device)
        self.adjacent = self.near if m > k else torch.as_tensor(knn_table(xy, k), device=device)
        offset = (xy[near] - xy[:, None]) / max(lattice_pitch(xy), 1e-9)
        # (N, m, 2)
        self.offset = torch.as_tensor(offset.astype(np.float32), device=device)
        self.tiles = [torch.as_tensor(rows, device=device) for rows in median_tiles(xy, size)]

    def batches(self, n_spots):
        """Lists of rows, each of about `n_spots` spots: tiles from anywhere on the slide, in random
        order."""
        tiles = [self.tiles[i] for i in torch.randperm(len(self.tiles)).tolist()]
        per = max(1, round(n_spots / max(1, np.mean([len(t) for t in tiles]))))
        return [torch.cat(tiles[i : i + per]) for i in range(0, len(tiles), per)]

    def gather(self, rows):
        """For queries `rows` (B,): the visible spots (T,) = queries and their neighbours, the
        places of the queries (B,) and of the neighbours (B, m) among them, offsets (B, m, 2)."""
        # (B, m)
        near = self.near[rows]
        # (T,), (B, 1 + m)
        visible, place = torch.unique(torch.cat([rows[:, None], near], 1), return_inverse=True)
        return visible, place[:, 0], place[:, 1:], self.offset[rows]


def neighbours_in_batch(rows, near):
    """(B, B) bool: True where the spot of the column is one of the m nearest of the spot of the
    row, or the reverse; never the spot itself. rows (B,), near (N, m)."""
    ordered, order = rows.sort()
    # (B, m)
    wanted = near[rows]
    place = torch.searchsorted(ordered, wanted).clamp(max=len(rows) - 1)
    is_near = torch.zeros(len(rows), len(rows), dtype=torch.bool, device=rows.device)
    i, j = torch.nonzero(ordered[place] == wanted, as_tuple=True)
    is_near[i, order[place[i, j]]] = True
    return (is_near | is_near.T).fill_diagonal_(False)
