"""Graphs on a device: the product with a sparse adjacency, tiles of a graph with a halo, batches of
spots that lie together."""

import copy
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from torch.nn import functional as F

from plainst.neighbours import (
    knn_table,
    lattice_pitch,
    median_tiles,
    normalised_knn_graph,
    reach,
    smoothing_table,
)


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

    def random_non_edges(self):
        """As many random pairs (2, <= E) as there are edges, without self-pairs and edges; drawn
        anew at every call."""
        i, j = torch.randint(self.n_own, (2, self.edges.shape[1]), device=self.edges.device)
        low, high = torch.minimum(i, j), torch.maximum(i, j)
        key = low * self.n_own + high  # (E,)
        place = torch.searchsorted(self.edge_keys, key).clamp(max=len(self.edge_keys) - 1)
        is_free = (low != high) & (self.edge_keys[place] != key)
        return torch.stack([low[is_free], high[is_free]])

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


class View(NamedTuple):
    """What B queries see: T visible spots, their own and those they attend to; and M >= T spots
    whose image embeddings the smoothing of the visible ones reads.

    visible (T,), smoothed (M,) rows of the slide; queries (B,) and neighbours (B, m) places among
    the visible; offset (B, m, 2) from query to neighbour, in
    lattice pitches; own (T,) and near (T, 7) places of the visible among the smoothed, weights
    (T, 7).
    """

    visible: torch.Tensor
    queries: torch.Tensor
    neighbours: torch.Tensor
    offset: torch.Tensor
    smoothed: torch.Tensor
    own: torch.Tensor
    near: torch.Tensor
    weights: torch.Tensor


class SpotBatches:
    """A slide in batches of spots, and what each batch sees.

    table (N, m) rows of the m nearest spots, the spot itself first; offset (N, m, 2) of their
    places, in lattice pitches; near (N, 7) and weights (N, 7) of the smoothing.
    """

    def __init__(self, xy, m, device):
        self.xy, self.m, self.device = xy, m, device
        near, weights = smoothing_table(xy, min(7, len(xy) - 1))
        self.near = torch.as_tensor(near, device=device)
        self.weights = torch.as_tensor(weights, device=device)
        table = np.arange(len(xy))[:, None]
        if m > 1:
            table = np.concatenate([table, knn_table(xy, m - 1)], 1)  # (N, m)
        offset = (xy[table] - xy[:, None]) / max(lattice_pitch(xy), 1e-9)
        self.table = torch.as_tensor(table, device=device)
        self.offset = torch.as_tensor(offset.astype(np.float32), device=device)

    def random(self, size):
        """All spots in random batches of `size`, the last one smaller."""
        return torch.randperm(len(self.xy)).to(self.device).split(size)

    def compact(self, size):
        """All spots in batches of at most `size` that lie together."""
        return [torch.as_tensor(rows, device=self.device) for rows in median_tiles(self.xy, size)]

    def view(self, rows):
        """The `View` of the queries `rows` (B,)."""
        wanted = torch.cat([rows[:, None], self.table[rows]], 1)  # (B, 1 + m)
        visible, place = torch.unique(wanted, return_inverse=True)
        queries, neighbours, offset = place[:, 0], place[:, 1:], self.offset[rows]
        wanted = torch.cat([visible[:, None], self.near[visible]], 1)  # (T, 8)
        smoothed, place = torch.unique(wanted, return_inverse=True)
        own, near = place[:, 0], place[:, 1:]
        weights = self.weights[visible]
        return View(visible, queries, neighbours, offset, smoothed, own, near, weights)
