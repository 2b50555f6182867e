"""What a training step on cells draws: which cells, what of them is hidden, noise.

Every step seeds itself (`stages.step_generator`) and draws for the whole batch of B cells, so that
an interrupted or shared run sees the same numbers; a process takes its slice of b.
"""

from typing import NamedTuple

import torch

from plainst.cell_data import random_orientation
from plainst.stages import rank_slice, sample_batch


class CellBatch(NamedTuple):
    """Cells with hidden genes and patches: picture (b, C, S, S); expression (b, G) and depth (b, 1)
    of the visible genes; target (b, G) of all; hidden (b, G) bool; keep (b, K) visible patches;
    has_img, has_gene (b,) bool, no picture at all where the file has none; rows: the slice of this
    process."""

    picture: torch.Tensor
    expression: torch.Tensor
    depth: torch.Tensor
    target: torch.Tensor
    hidden: torch.Tensor
    keep: torch.Tensor
    has_img: torch.Tensor
    has_gene: torch.Tensor
    rows: slice


def cell_batch(dataset, draw, batch, n_patches, hide_genes, hide_patches, drop):
    """A `CellBatch` of training cells: shares of genes and patches that are hidden, and the share
    of rows that lack the picture, and as many others the expression. draw: torch.Generator."""
    rows, mine = sample_batch(dataset.rows["train"], batch, draw), rank_slice(batch)
    hidden = torch.rand(batch, dataset.cells.n_genes, generator=draw) < hide_genes
    u = torch.rand(batch, generator=draw)
    order = torch.rand(batch, n_patches, generator=draw).argsort(1)
    keep = order[:, : n_patches - int(n_patches * hide_patches)]
    orientation = torch.randint(8, (batch,), generator=draw)
    rows, hidden, u, keep, orientation = (a[mine] for a in (rows, hidden, u, keep, orientation))
    picture = random_orientation(dataset.images(rows), orientation)
    expression, depth = dataset.expression(rows, hidden)
    target, _ = dataset.expression(rows)
    hidden, u, keep = (a.to(dataset.device) for a in (hidden, u, keep))
    shown = expression, depth, target, hidden, keep
    if not dataset.has_pictures:
        return CellBatch(picture, *shown, torch.zeros_like(u, dtype=bool), u >= 0, mine)
    return CellBatch(picture, *shown, u >= drop, u < 1 - drop, mine)


class ContextBatch(NamedTuple):
    """Cells of which a part is shown: rows (B,) and hidden (B, G) on the CPU; shown (B,): 0
    nothing, 1 picture, 2 genes, 3 both; modality (B,) of the surroundings: 0 picture, 1 genes, 2
    both; has_context (B, 2) bool: a niche, a tissue, both or neither."""

    rows: torch.Tensor
    hidden: torch.Tensor
    shown: torch.Tensor
    modality: torch.Tensor
    has_context: torch.Tensor


def context_batch(dataset, draw, batch, hide_genes, drop):
    """A `ContextBatch` of training cells; hide_genes: share of genes that are hidden; drop: share
    of rows without surroundings. A row that shows nothing has surroundings, of any modality."""
    rows = sample_batch(dataset.rows["train"], batch, draw)
    hidden = torch.rand(batch, dataset.cells.n_genes, generator=draw) < hide_genes
    shown = torch.randint(4, (batch,), generator=draw)
    has_context = (torch.rand(batch, generator=draw) >= drop) | (shown == 0)
    any_modality = torch.randint(3, (batch,), generator=draw)
    modality = torch.where(shown == 0, any_modality, shown - 1)
    both = has_context[:, None].expand(-1, 2)
    return ContextBatch(rows, hidden, shown, modality, both)


class PictureBatch(NamedTuple):
    """Cells for a generator: rows (b,) on the CPU; picture and noise (b, C, S, S); t (b,) in 0..1;
    is_dropped (b,): without their condition; choice (b, layers, N/4) in 0..3: destinations of
    merging."""

    rows: torch.Tensor
    picture: torch.Tensor
    noise: torch.Tensor
    t: torch.Tensor
    is_dropped: torch.Tensor
    choice: torch.Tensor


def picture_batch(dataset, draw, batch, n_layers, n_tokens, drop):
    """A `PictureBatch` of training cells; n_tokens: of the decoder; drop: share of rows without
    condition."""
    channels, side = dataset.shape
    rows, mine = sample_batch(dataset.rows["train"], batch, draw), rank_slice(batch)
    orientation = torch.randint(8, (batch,), generator=draw)
    # more often near the noise, where the condition decides
    t = (torch.randn(batch, generator=draw) - 0.5).sigmoid()
    is_dropped = torch.rand(batch, generator=draw) < drop
    noise = torch.randn(batch, channels, side, side, generator=draw)
    choice = torch.randint(4, (batch, n_layers, n_tokens // 4), generator=draw)
    picture = random_orientation(dataset.images(rows[mine]), orientation[mine])
    drawn = (a[mine].to(dataset.device) for a in (noise, t, is_dropped, choice))
    return PictureBatch(rows[mine], picture, *drawn)
