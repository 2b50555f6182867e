"""Weighted sums and scalar products over a table of neighbours, fast, with gradients.

The readable forms are a gather and an einsum, and stand in the docstrings; the tests compare with
them. What is here gives the same numbers without an (N, k, heads, d) tensor: forward and backward
are embedding bags, the backward one over the reversed table, in which every spot collects from
those who chose it. Nothing is scattered, so the order of additions is fixed.
"""

import warnings
from typing import NamedTuple

import torch
from torch.nn import functional as F


class BagIndex(NamedTuple):
    """Row numbers for embedding bags over (N heads) rows, forward and reversed.

    neighbours (N heads, k): row of (neighbour, head) in the bag of (spot, head). Reversed, bag
    (head, spot) holds the rows of those who chose the spot: choosers (heads N k,), the start of
    each bag in them, starts (heads N,), and where their weight stands in (N, heads, k), places
    (heads N k,).
    """

    neighbours: torch.Tensor
    choosers: torch.Tensor
    starts: torch.Tensor
    places: torch.Tensor


class Table:
    """Who attends to whom: index (N, k), all places filled, and is_empty (N, k) bool, the places
    that do not count, None where all do."""

    def __init__(self, index, is_empty):
        self.index = index
        self.is_empty = is_empty if is_empty.any() else None
        self._bags = {}

    def is_used(self):
        """(N, k) bool: the places that count."""
        return torch.ones_like(self.index, dtype=bool) if self.is_empty is None else ~self.is_empty

    def bag_index(self, heads):
        """The `BagIndex` of this table, made once per number of heads."""
        if heads not in self._bags:
            n, k = self.index.shape
            head = torch.arange(heads, device=self.index.device)[:, None]  # (heads, 1)
            neighbours = (self.index[:, None] * heads + head).flatten(0, 1)  # (N heads, k)
            # edges in the order of the spot that is chosen: (N k,)
            order = self.index.flatten().argsort(stable=True)
            chooser, slot = order // k, order % k
            n_choosers = torch.bincount(self.index.flatten(), minlength=n)  # (N,)
            start = F.pad(n_choosers.cumsum(0), (1, 0))[:-1]  # (N,)
            self._bags[heads] = BagIndex(
                neighbours,
                (chooser * heads + head).flatten(),
                (start + head * n * k).flatten(),
                (chooser * heads * k + slot + head * k).flatten(),
            )
        return self._bags[heads]


class Neighbours:
    """A neighbour table (N, k), -1 = empty, as two `Table`s made ready for layers once.

    `with_self` (N, k+1) starts with the spot itself (graph attention, GCN); `without_self` (N, k)
    does not (cross-attention). Empty places point at the spot itself and are masked; a spot with no
    neighbour at all attends to itself.
    """

    def __init__(self, table, device="cpu"):
        table = torch.as_tensor(table, device=device)  # (N, k)
        myself = torch.arange(len(table), device=device)[:, None]  # (N, 1)
        empty = table < 0
        filled = torch.where(empty, myself, table)  # (N, k)
        self.with_self = Table(
            torch.cat([myself, filled], 1),  # (N, k+1)
            torch.cat([torch.zeros_like(empty[:, :1]), empty], 1),
        )
        is_alone = empty.all(1)
        # the isolated spot keeps one place: itself
        empty[:, 0] &= ~is_alone
        self.without_self = Table(filled, empty)


class NeighbourSum(torch.autograd.Function):
    """out[i, h] = sum_j weights[i, h, j] * values[index[i, j], h].

    The readable form is `torch.einsum("nhk,nkhd->nhd", weights, values[index])`.
    """

    @staticmethod
    def forward(ctx, values, weights, table):
        """values (N, heads, d), weights (N, heads, k), table Table -> (N, heads, d)."""
        n, heads, d = values.shape
        ctx.save_for_backward(values, weights)
        ctx.table = table
        rows = table.bag_index(heads).neighbours
        return F.embedding_bag(
            rows,
            values.reshape(n * heads, d),
            per_sample_weights=weights.reshape(rows.shape),
            mode="sum",
        ).view(n, heads, d)

    @staticmethod
    def backward(ctx, grad):
        values, weights = ctx.saved_tensors
        grad = grad.contiguous()
        return (
            sum_over_choosers(grad, weights, ctx.table) if ctx.needs_input_grad[0] else None,
            products_over_table(grad, values, ctx.table) if ctx.needs_input_grad[1] else None,
            None,
        )


class NeighbourScores(torch.autograd.Function):
    """products[i, h, j] = <a[i, h], b[index[i, j], h]>, the scores of an attention; forward and
    backward are the other way round those of NeighbourSum.

    The readable form is `torch.einsum("nhd,nkhd->nhk", a, b[index])`.
    """

    @staticmethod
    def forward(ctx, a, b, table):
        """a, b (N, heads, d), table Table -> (N, heads, k)."""
        a, b = a.contiguous(), b.contiguous()
        ctx.save_for_backward(a, b)
        ctx.table = table
        return products_over_table(a, b, table)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        grad = grad.contiguous()
        return (
            NeighbourSum.apply(b, grad, ctx.table) if ctx.needs_input_grad[0] else None,
            sum_over_choosers(a, grad, ctx.table) if ctx.needs_input_grad[1] else None,
            None,
        )


def sum_over_choosers(values, weights, table):
    """out[j, h] = sum of weights[i, h, place] values[i, h] over the spots i that chose j: values
    (N, heads, d), weights (N, heads, k) -> (N, heads, d)."""
    n, heads, d = values.shape
    bags = table.bag_index(heads)
    sums = F.embedding_bag(
        bags.choosers,
        values.view(n * heads, d),
        bags.starts,
        mode="sum",
        per_sample_weights=weights.flatten().index_select(0, bags.places),
    )
    return sums.view(heads, n, d).transpose(0, 1)


def products_over_table(a, b, table):
    """<a[i, h], b[index[i, j], h]>: a, b (N, heads, d) contiguous -> (N, heads, k).

    On a CPU these are the entries of a (N heads, N heads) product that the table asks for: nothing
    is gathered, four times as fast.
    """
    n, heads, d = a.shape
    if a.device.type != "cpu" or a.dtype not in (torch.float32, torch.float64):
        # (N, k, heads, d) -> (N, heads, k)
        return (b[table.index] * a[:, None]).sum(-1).transpose(1, 2)
    rows = table.bag_index(heads).neighbours
    with warnings.catch_warnings():
        # torch calls its CSR tensors a beta version, once a process
        warnings.simplefilter("ignore", UserWarning)
        wanted = torch.sparse_csr_tensor(
            torch.arange(len(rows) + 1) * rows.shape[1],
            rows.flatten(),
            a.new_zeros(rows.numel()),
            (n * heads, n * heads),
            check_invariants=False,
        )
    products = torch.sparse.sampled_addmm(
        wanted, a.view(n * heads, d), b.reshape(n * heads, d).T, beta=0.0
    ).values()
    # --compile stumbles over a view of a sparse tensor
    return products.clone().view(n, heads, -1)


def neighbour_sum(weights, values, table):
    """sum_j weights[i, h, j] * values[index[i, j], h]: weights (N, heads, k), values (N, heads, d)
    -> (N, heads, d), in the type of the weights (under autocast they are float32 and the values are
    not)."""
    return NeighbourSum.apply(values.to(weights.dtype), weights, table)


def neighbour_scores(query, key, table):
    """Scores <query[i, h], key[index[i, j], h]>, in float32 under autocast, too: query, key
    (N, heads, d) -> (N, heads, k)."""
    if query.dtype != torch.float64:
        query, key = query.float(), key.float()
    return NeighbourScores.apply(query, key, table)
