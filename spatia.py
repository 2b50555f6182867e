"""Single cells: picture x expression x surroundings, and pictures that are generated from genes.

    A   picture x (C, S, S) --ViT--------> X_img (1+P, d) --.   cross-attention
                                                            |-- both ways ------> z_cell (d)
        counts g (G) --M latents read----> X_gene (M, d) ---'

    B   niche: z_cell of the k nearest others -----> z_niche (d) ---.   z = LN(z_cell
                                                                    |--   + gate_n W z_niche
        tissue: the T nearest squares of cells ----> z_tissue (d) --'     + gate_t W z_tissue)

    C   noise x_0 --> x_t = (1 - t) x_0 + t x --> DiT on patches, self-attention ----> picture x
                                                  on merged tokens (token-merged flow decoder)
        own and neighbours' EXPRESSION ---cross-attention---^

Three stages: A cells (masked genes + MAE + InfoNCE), B context on cached embeddings, C decoder.
Every run scores the model beside the predictors it has to beat (ridge, kNN, neighbours, PCA,
nearest-cell retrieval) on the same cells, see evaluation/cells.py and docs/spatia.md.

    python spatia.py --data datasets/ca1/cells.h5 --seed 0
    # choices are made on the validation part, never on the test cells
    python spatia.py --data cells.h5 --score val --guidance 0
    torchrun --standalone --nproc_per_node=2 spatia.py --data cells.h5 --size base
"""

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import nn
from torch.nn import functional as F

import data
from data import DataError
from evaluation import cells as tasks
from evaluation import figures
from plainst import export, run
from plainst.cell_data import CellDataset, Normaliser, random_orientation
from plainst.stages import Stages, ema_update, rank_slice, sample_batch, sum_over_processes

MODALITIES = ("img", "gene", "fused")
# channels of the decoder's convolutions at pixel resolution
PIXEL = 8
# guidance up to this t: later steps only sharpen, the same with and without
GUIDED = 0.6
# optimiser steps of warm-up, a tenth of the steps where that is less
WARM_UP = 100


@dataclass(frozen=True)
class Size:
    """A size: widths, depths and steps."""

    dim: int
    heads: int
    ratio: int
    patch: int
    image_layers: int
    latents: int
    gene_layers: int
    fusion_layers: int
    niche: int
    niche_layers: int
    tissue: int
    tissue_layers: int
    decoder_patch: int
    decoder_dim: int
    decoder_heads: int
    decoder_layers: int
    rho: float
    ema: float
    steps: tuple
    batch: tuple
    lr: tuple


SIZES = {
    "tiny": Size(
        dim=64,
        heads=2,
        ratio=2,
        patch=8,
        image_layers=2,
        latents=8,
        gene_layers=1,
        fusion_layers=1,
        niche=16,
        niche_layers=1,
        tissue=24,
        tissue_layers=1,
        decoder_patch=4,
        decoder_dim=64,
        decoder_heads=2,
        decoder_layers=3,
        rho=0.0,
        ema=0.995,
        steps=(300, 300, 2000),
        batch=(128, 128, 32),
        lr=(1e-3, 1e-3, 2e-3),
    ),
    "base": Size(
        dim=256,
        heads=8,
        ratio=4,
        patch=8,
        image_layers=6,
        latents=32,
        gene_layers=4,
        fusion_layers=2,
        niche=32,
        niche_layers=3,
        tissue=256,
        tissue_layers=4,
        decoder_patch=4,
        decoder_dim=384,
        decoder_heads=6,
        decoder_layers=10,
        rho=0.5,
        ema=0.9999,
        steps=(25000, 10000, 100000),
        batch=(512, 128, 256),
        lr=(3e-4, 3e-4, 2e-4),
    ),
}


# named sets of flags; what is typed goes before them
PRESETS = {"tuned": {}}


@dataclass
class Config(run.Config):
    """Flags of spatia.py."""

    presets: ClassVar = PRESETS

    data: str = "datasets/ca1/cells.h5"
    "cell file (python -m plainst convert ca1|xenium, python -m plainst simulate cells)"
    score: Literal["test", "val"] = "test"
    """test: train on all training cells, score the test cells; val: train without the validation
    part and score that (for choices)"""
    test_every: int = 4
    "every how manieth block is held out (files of three sections or more hold out whole sections)"
    width: float = 600.0
    "width of the blocks in full-resolution px"
    buffer: float = -1.0
    """training cells within so many um (px where the cell file has no um_per_px) of a held-out cell
    are dropped; -1: the diagonal of a crop, beyond which no two crops overlap"""
    fold: int = 0
    "which of the blocks or sections are held out"
    size: Literal["tiny", "base"] = "tiny"
    "tiny: about 1 M parameters, minutes on a CPU; base: for GPUs"
    path: Literal["flow", "ddpm"] = "flow"
    """flow matching on the straight path, Heun steps; or diffusion (cosine schedule, v-prediction),
    DDIM steps"""
    rho: float = -1.0
    """share of the decoder's tokens that are merged before self-attention, 0 to 0.75; -1: the
    size's"""
    condition: Literal["none", "expression", "context"] = "context"
    """what the decoder sees: nothing, the cell's own expression, or that and its neighbours'
    expression"""
    guidance: float = 0.5
    "w of classifier-free guidance, velocity (1 + w) v(condition) - w v(nothing), for t up to 0.6"
    draws: int = 8
    "images generated for each scored cell"
    ode_steps: int = 8
    "steps of the sampler (Heun: two evaluations a step)"
    mae: bool = True
    "hide half of the image patches in stage A and reconstruct them"
    fusion: bool = True
    """cross-attention between image and gene tokens; without it their pooled tokens are only
    concatenated"""
    niche: bool = True
    "niche transformer: the nearest other cells"
    tissue: bool = True
    "tissue transformer: the nearest squares of cells"
    steps_a: int = 0
    "optimiser steps of stage A (cells); 0: the size's"
    steps_b: int = 0
    "optimiser steps of stage B (context); 0: the size's"
    steps_c: int = 0
    "optimiser steps of stage C (decoder); 0: the size's"
    generate: bool = True
    """stage C and the scores of generated images; --no-generate leaves them out (ablations of the
    representation)"""
    weight_decay: float = 0.05
    "AdamW weight decay"
    save_every: int = 0
    "steps between checkpoints (latest.pt in the run's folder); 0: none"
    resume: bool = False
    "go on from latest.pt"


# --------------------------------------------------------------------------------------------------
# Blocks: attention, positions
# --------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017) of x on y, or on x itself; `bias` is added to the
    scores."""

    def __init__(self, dim, heads, dim_kv=None):
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.out = (
            nn.Linear(dim, dim),
            nn.Linear(dim_kv or dim, 2 * dim),
            nn.Linear(dim, dim),
        )

    def forward(self, x, y=None, bias=None):
        """x (B, n, d), y (B, m, d_kv), bias (B, 1, 1, m) or None -> (B, n, d)."""
        # (B, H, n, d/H)
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        # one set of queries for the whole batch
        q = q if y is None else q.expand(len(y), -1, -1, -1)
        # (B, H, m, d/H) each
        k, v = (
            self.kv(x if y is None else y).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )
        return self.out(F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2))


def feed_forward(dim, ratio):
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, ratio * dim), nn.GELU(), nn.Linear(ratio * dim, dim)
    )


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim, heads, ratio):
        super().__init__()
        self.norm, self.attention, self.ffn = (
            nn.LayerNorm(dim),
            Attention(dim, heads),
            feed_forward(dim, ratio),
        )

    def forward(self, x, bias=None):
        x = x + self.attention(self.norm(x), bias=bias)
        return x + self.ffn(x)


class CrossBlock(nn.Module):
    """x + a * (attention of x on y), then the feed-forward; a per channel, learned, .1 at first
    (`start`)."""

    def __init__(self, dim, heads, ratio, start=1.0):
        super().__init__()
        self.norm, self.norm_y, self.attention, self.ffn = (
            nn.LayerNorm(dim),
            nn.LayerNorm(dim),
            Attention(dim, heads),
            feed_forward(dim, ratio),
        )
        self.scale = nn.Parameter(torch.full((dim,), start))

    def forward(self, x, y, bias=None):
        x = x + self.scale * self.attention(self.norm(x), self.norm_y(y), bias)
        return x + self.ffn(x)


def sincos(place, dim, longest=100.0):
    """Sin-cos code of 2-D places (..., 2) -> (..., dim), dim / 4 wavelengths an axis from 2 pi on,
    geometric up to 2 pi longest."""
    # (dim/4,)
    w = longest ** -(torch.arange(dim // 4, device=place.device) / max(dim // 4 - 1, 1))
    angle = place[..., None] * w  # (..., 2, dim/4)
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(-2)


def grid_places(side, device=None):
    """Row and column of the side x side patches, (side^2, 2)."""
    at = torch.arange(side, device=device, dtype=torch.float32)
    return torch.stack(torch.meshgrid(at, at, indexing="ij"), -1).reshape(-1, 2)


def patches(x, p):
    """(B, C, S, S) -> (B, (S/p)^2, C p p)."""
    b, c, s, _ = x.shape
    return (
        x.reshape(b, c, s // p, p, s // p, p)
        .permute(0, 2, 4, 1, 3, 5)
        .reshape(b, (s // p) ** 2, c * p * p)
    )


def unpatches(x, p, c):
    """Inverse of `patches`."""
    b, n, _ = x.shape
    h = round(n**0.5)
    return x.reshape(b, h, h, c, p, p).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h * p, h * p)


# --------------------------------------------------------------------------------------------------
# The cell: image tokens, gene tokens, fusion, heads of stage A
# --------------------------------------------------------------------------------------------------


class ImageTok(nn.Module):
    """ViT on patches (Dosovitskiy et al. 2021). With `keep`, only those patches enter (MAE, He et
    al. 2022); without it, all: evaluation is exact."""

    def __init__(self, shape, size):
        super().__init__()
        channels, side = shape
        self.p, d = size.patch, size.dim
        self.embed, self.cls = (
            nn.Linear(channels * self.p**2, d),
            nn.Parameter(torch.randn(d) * 0.02),
        )
        # (P, d)
        self.register_buffer("place", sincos(grid_places(side // self.p), d), persistent=False)
        self.blocks, self.norm = (
            nn.ModuleList(Block(d, size.heads, size.ratio) for _ in range(size.image_layers)),
            nn.LayerNorm(d),
        )

    def forward(self, x, keep=None):
        """x (B, C, S, S), keep (B, K) patch numbers -> (B, 1 + P, d), or (B, 1 + K, d)."""
        h = self.embed(patches(x, self.p)) + self.place  # (B, P, d)
        if keep is not None:
            # (B, K, d)
            h = h.gather(1, keep[..., None].expand(-1, -1, h.shape[-1]))
        h = torch.cat([self.cls.expand(len(h), 1, -1), h], 1)
        for block in self.blocks:
            h = block(h)
        return self.norm(h)


class GeneTok(nn.Module):
    """M learned latents read the G gene tokens E_g + MLP(z_g) (Perceiver, Jaegle et al. 2021): O(M
    G), no gene x gene attention.

    A hidden gene has a learned vector instead of its value; one more token carries the depth. The
    latents start at a linear map of the expression, which itself starts at the principal components
    of the training cells (`init_from_pca`): a few hundred steps of attention alone do not find
    them.
    """

    def __init__(self, n_genes, size):
        super().__init__()
        d = size.dim
        self.name = nn.Parameter(torch.randn(n_genes, d) * d**-0.5)  # E
        self.value = nn.Sequential(nn.Linear(1, d), nn.GELU(), nn.Linear(d, d))
        self.linear = nn.Linear(n_genes, d, bias=False)
        self.masked, self.depth = nn.Parameter(torch.zeros(d)), nn.Linear(1, d)
        self.latents = nn.Parameter(torch.randn(size.latents, d) * 0.02)
        self.read = CrossBlock(d, size.heads, size.ratio)
        self.blocks, self.norm = (
            nn.ModuleList(Block(d, size.heads, size.ratio) for _ in range(size.gene_layers)),
            nn.LayerNorm(d),
        )

    @torch.no_grad()
    def init_from_pca(self, x):
        """The linear map becomes the principal axes of x (n, G), as many as fit, over the first
        one's standard deviation."""
        pca = PCA(min(len(self.linear.weight), *x.shape), random_state=0).fit(x)
        # (<= d, G)
        axes = pca.components_ / np.sqrt(pca.explained_variance_[0] + 1e-9)
        self.linear.weight.zero_()[: len(axes)] = torch.tensor(axes, dtype=torch.float32)
        return self

    def forward(self, z, depth, hidden=None):
        """z (B, G), depth (B, 1), hidden (B, G) bool or None -> X_gene (B, M, d)."""
        value = self.value(z[..., None])  # (B, G, d)
        if hidden is not None:
            value, z = torch.where(hidden[..., None], self.masked, value), z.masked_fill(hidden, 0)
        # (B, G + 1, d)
        tokens = torch.cat([self.name + value, self.depth(depth)[:, None]], 1)
        h = self.read(self.latents + self.linear(z)[:, None], tokens)  # (B, M, d)
        for block in self.blocks:
            h = block(h)
        return self.norm(h)


class CellModel(nn.Module):
    """z_cell of image and expression, either or both, and the two reconstructions of stage A."""

    def __init__(self, shape, n_genes, size, fusion=True):
        super().__init__()
        d, tokens = size.dim, (shape[1] // size.patch) ** 2
        self.image, self.gene = ImageTok(shape, size), GeneTok(n_genes, size)
        self.absent_img, self.absent_gene = (
            nn.Parameter(torch.randn(n, d) * 0.02) for n in (4, size.latents)
        )
        layers = size.fusion_layers if fusion else 0
        self.to_img, self.to_gene = (
            nn.ModuleList(CrossBlock(d, size.heads, size.ratio, 0.1) for _ in range(layers))
            for _ in range(2)
        )
        self.join, self.norm = nn.Linear(2 * d, d), nn.LayerNorm(d)
        self.hidden = nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.Linear(d, d))
        self.query, self.to_value = Attention(d, size.heads), nn.Linear(d, 1)
        self.bias = nn.Parameter(torch.zeros(n_genes))
        self.mask_token, self.paint = nn.Parameter(torch.zeros(d)), Block(d, size.heads, size.ratio)
        self.pixels = nn.Linear(d, shape[0] * size.patch**2)
        self.log_tau = nn.Parameter(torch.tensor(0.1).log())
        self.tokens = tokens

    def fuse(self, x_img=None, x_gene=None, has_img=None, has_gene=None):
        """Tokens of the modalities that are there (None or a False in has_* (B,): not) -> z_cell
        (B, d), X_img' (B, 1+P, d), X_gene' (B, M, d).

        X_img' = X_img + a1 * attention(X_img on X_gene), X_gene' = X_gene + a2 * attention(X_gene
        on X_img).
        """
        b = len(x_gene if x_img is None else x_img)
        if x_img is None:
            x_img = self.absent_img.expand(b, -1, -1)
        elif has_img is not None:
            nothing = self.absent_img.repeat(-(-x_img.shape[1] // 4), 1)[: x_img.shape[1]]
            x_img = torch.where(has_img[:, None, None], x_img, nothing)
        if x_gene is None:
            x_gene = self.absent_gene.expand(b, -1, -1)
        elif has_gene is not None:
            x_gene = torch.where(has_gene[:, None, None], x_gene, self.absent_gene)
        for to_img, to_gene in zip(self.to_img, self.to_gene):
            x_img, x_gene = to_img(x_img, x_gene), to_gene(x_gene, x_img)
        return self.norm(self.join(torch.cat([x_img[:, 0], x_gene.mean(1)], -1))), x_img, x_gene

    def genes(self, z, x_img, x_gene):
        """Values of all genes: E_g . h(z) + what the query E_g reads from the tokens. -> (B, G)."""
        name = self.gene.name
        # (B, G)
        read = self.to_value(self.query(name[None], torch.cat([x_img, x_gene], 1)))[..., 0]
        return self.hidden(z) @ name.T + read + self.bias

    def mae_decode(self, x_img, keep):
        """X_img' of the kept patches -> all patches (B, P, C p p): mask tokens at the others, one
        block (He et al. 2022)."""
        h = self.mask_token.expand(len(keep), self.tokens, -1).scatter(
            1, keep[..., None].expand(-1, -1, x_img.shape[-1]), x_img[:, 1:]
        )
        return self.pixels(self.paint(torch.cat([x_img[:, :1], h + self.image.place], 1))[:, 1:])


def info_nce(a, b, log_tau, rows):
    """Symmetric InfoNCE (Oord et al. 2018) of the whole batch, a, b (B, d): the value is the sum
    over the rows of this process, the gradient that of the sum over all rows, because another
    process cannot send one through its copy of these rows."""
    # (B, B)
    score = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T / log_tau.exp().clamp(min=0.01)
    target = torch.arange(len(a), device=a.device)
    loss = (
        F.cross_entropy(score, target, reduction="none")
        + F.cross_entropy(score.T, target, reduction="none")
    ) / 2
    return loss.sum() + (loss[rows].sum() - loss.sum()).detach()


# --------------------------------------------------------------------------------------------------
# Context: niche, tissue, gated union
# --------------------------------------------------------------------------------------------------


class SetTransformer(nn.Module):
    """A query that reads a set: tokens + place -> self-attention among them -> the query reads
    them. The cell itself is no member.

    One learned token is always there, so an empty set is no softmax over nothing. Without `place`
    only who is near counts, not where.
    """

    def __init__(self, dim, heads, ratio, layers, place=True, longest=10.0):
        super().__init__()
        self.inside, self.place, self.longest = (
            nn.Linear(dim, dim),
            nn.Linear(dim, dim) if place else None,
            longest,
        )
        self.nothing, self.query = nn.Parameter(torch.randn(dim) * 0.02), nn.Linear(dim, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, ratio) for _ in range(layers))
        self.read, self.norm = CrossBlock(dim, heads, ratio), nn.LayerNorm(dim)

    def forward(self, tokens, where, there=None):
        """tokens (B, k, d), where (B, k, 2), there (B, k) bool or None (all) -> (B, d)."""
        h = self.inside(tokens)
        if self.place is not None:
            h = h + self.place(sincos(3 * where, h.shape[-1], self.longest))
        h = torch.cat([self.nothing.expand(len(h), 1, -1), h], 1)  # (B, 1 + k, d)
        bias, used = None, h.new_ones(h.shape[:2])
        if there is not None:
            used = F.pad(there, (1, 0), value=True).to(h.dtype)
            # (B, 1, 1, 1 + k)
            bias = torch.zeros_like(used).masked_fill(used == 0, -1e9)[:, None, None]
        for block in self.blocks:
            h = block(h, bias)
        # (B, 1, d)
        mean = (h * used[..., None]).sum(1, keepdim=True) / used.sum(1)[:, None, None]
        return self.norm(self.read(self.query(mean), h, bias))[:, 0]


class ContextModel(nn.Module):
    """z = LN(z_cell + g_n W z_niche + g_t W z_tissue), gates .1 at first, and the heads of stage B:
    expression and z_cell from z."""

    def __init__(self, n_genes, size, niche=True, tissue=True):
        super().__init__()
        d = size.dim
        self.niche = SetTransformer(d, size.heads, size.ratio, size.niche_layers) if niche else None
        self.tissue = (
            SetTransformer(d, size.heads, size.ratio, size.tissue_layers, longest=100.0)
            if tissue
            else None
        )
        self.from_niche, self.from_tissue = nn.Linear(d, d), nn.Linear(d, d)
        self.gates = nn.Parameter(torch.full((2,), 0.1))
        self.absent, self.norm = nn.Parameter(torch.randn(d) * 0.02), nn.LayerNorm(d)
        self.trunk = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU())
        self.genes, self.cell = nn.Linear(2 * d, n_genes), nn.Linear(2 * d, d)

    def forward(self, z, near, where_near, far, where_far, there, context=None):
        """z (B, d) or None (the cell itself is hidden); near (B, k, d), far (B, t, d), there (B,
        t); context (B,) bool: rows that have one.
        -> (B, d)."""
        z = self.absent.expand(len(near), -1) if z is None else z
        on = 1.0 if context is None else context[:, None].to(z.dtype)
        if self.niche is not None:
            z = z + on * self.gates[0] * self.from_niche(self.niche(near, where_near))
        if self.tissue is not None:
            z = z + on * self.gates[1] * self.from_tissue(self.tissue(far, where_far, there))
        return self.norm(z)

    def heads(self, z):
        """-> standardised expression (B, G), z_cell (B, d)."""
        h = self.trunk(z)
        return self.genes(h), self.cell(h)


# --------------------------------------------------------------------------------------------------
# The decoder: spatially limited token merging, DiT blocks, paths
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def merge_groups(f, rho, choice=None):
    """Spatially guided bipartite soft merging (ToMe, Bolya et al. 2023, with a limit on the
    distance; this form is ours).

    f (B, N, d) tokens of a square grid. One token of every 2 x 2 cell is a destination (`choice`
    (B, N/4) in 0..3, None: the top-left one), the others are sources; score = cosine, -inf beyond a
    Chebyshev distance of 2. The round(rho N) best sources join their best destination.
    -> groups (B, N - r, N), one-hot columns: row = a merged token, column = a token. Merging is
    groups @ x / size, unmerging groups' @ y.
    """
    b, n, _ = f.shape
    side = round(n**0.5)
    r = min(round(rho * n), n - n // 4)
    # (N/4, 4) tokens of a cell
    at = (
        torch.arange(n, device=f.device)
        .view(side // 2, 2, side // 2, 2)
        .permute(0, 2, 1, 3)
        .reshape(-1, 4)
    )
    choice = torch.zeros(b, n // 4, dtype=torch.long, device=f.device) if choice is None else choice
    is_dst = F.one_hot(choice, 4).bool()  # (B, N/4, 4)
    # (B, N/4), (B, 3N/4)
    dst, src = at.expand(b, -1, -1)[is_dst].view(b, -1), at.expand(b, -1, -1)[~is_dst].view(b, -1)
    f = F.normalize(f, dim=-1)
    score = f.gather(1, src[..., None].expand(-1, -1, f.shape[-1])) @ f.gather(
        1, dst[..., None].expand(-1, -1, f.shape[-1])
    ).transpose(1, 2)
    # (N, 2)
    place = torch.stack([at.new_tensor(range(n)) // side, at.new_tensor(range(n)) % side], -1)
    far = (place[src][:, :, None] - place[dst][:, None]).abs().amax(-1) > 2
    best, to = score.masked_fill(far, float("-inf")).max(-1)  # (B, 3N/4)
    order = best.argsort(dim=-1, descending=True, stable=True)
    # (B, N) new token of every token
    group = torch.empty(b, n, dtype=torch.long, device=f.device)
    group.scatter_(1, dst, torch.arange(n // 4, device=f.device).expand(b, -1))
    group.scatter_(1, src.gather(1, order[:, :r]), to.gather(1, order[:, :r]))
    group.scatter_(
        1, src.gather(1, order[:, r:]), torch.arange(n // 4, n - r, device=f.device).expand(b, -1)
    )
    return F.one_hot(group, n - r).transpose(1, 2).to(f.dtype)


def merged_attention(attention, x, rho, choice=None):
    """Self-attention on N - r merged tokens with proportional attention (log size on the keys),
    copied back to all N; rho 0: plain attention."""
    if rho == 0:
        return attention(x)
    groups = merge_groups(x, rho, choice)  # (B, N - r, N)
    size = groups.sum(-1)  # (B, N - r)
    return groups.transpose(1, 2) @ attention(
        groups @ x / size[..., None], bias=size.log()[:, None, None]
    )


class DiTBlock(nn.Module):
    """DiT block (Peebles & Xie 2023): adaLN-zero from c, merged self-attention, cross-attention on
    the condition's tokens, feed-forward."""

    def __init__(self, dim, heads, ratio):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (
            nn.LayerNorm(dim, elementwise_affine=i == 1) for i in range(3)
        )
        self.attention, self.cross = Attention(dim, heads), Attention(dim, heads)
        self.ffn = nn.Sequential(
            nn.Linear(dim, ratio * dim), nn.GELU(), nn.Linear(ratio * dim, dim)
        )
        self.modulate = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        for layer in (self.modulate[1], self.cross.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, c, y, rho, choice=None):
        """x (B, N, d), c (B, d), y (B, m, d) -> (B, N, d)."""
        # (B, 1, d) each
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulate(c)[:, None].chunk(6, -1)
        x = x + gate1 * merged_attention(
            self.attention, self.norm1(x) * (1 + scale1) + shift1, rho, choice
        )
        x = x + self.cross(self.norm2(x), y)
        return x + gate2 * self.ffn(self.norm3(x) * (1 + scale2) + shift2)


class Generator(nn.Module):
    """Image from expression. The condition reads counts only: the cell's own, and its neighbours'
    by their gene-only embeddings.

    No image and no place enters it: crops of neighbours overlap, and where they lie would give the
    layout of the surroundings away.
    """

    def __init__(
        self, shape, n_genes, size, gene, condition="context", niche=True, tissue=True, path="flow"
    ):
        super().__init__()
        d, e = size.dim, size.decoder_dim
        self.p, self.kind, self.path = size.decoder_patch, condition, path
        self.gene = copy.deepcopy(gene)
        # own and mean neighbour expression, unabridged
        self.linear = nn.ModuleList(nn.Linear(n_genes + 1, d) for _ in range(2))
        self.niche = (
            SetTransformer(d, size.heads, size.ratio, size.niche_layers, place=False)
            if niche and condition == "context"
            else None
        )
        self.tissue = (
            SetTransformer(d, size.heads, size.ratio, size.tissue_layers, place=False)
            if tissue and condition == "context"
            else None
        )
        self.to_y = nn.Linear(d, e)
        self.kind_of = nn.Parameter(torch.randn(size.latents + 4, e) * 0.02)
        self.null = nn.Parameter(torch.randn(size.latents + 4, e) * 0.02)
        self.time = nn.Sequential(nn.Linear(e, e), nn.SiLU(), nn.Linear(e, e))
        self.pool = nn.Sequential(nn.LayerNorm(e), nn.Linear(e, e))
        self.embed, self.norm, self.out = (
            nn.Linear(shape[0] * self.p**2, e),
            nn.LayerNorm(e),
            nn.Linear(e, 2 * PIXEL * self.p**2),
        )
        self.stem, self.smooth, self.last = (
            nn.Conv2d(i, o, 3, padding=1)
            for i, o in ((shape[0], PIXEL), (PIXEL, PIXEL), (PIXEL, shape[0]))
        )
        self.blocks = nn.ModuleList(
            DiTBlock(e, size.decoder_heads, size.ratio) for _ in range(size.decoder_layers)
        )
        self.register_buffer("place", sincos(grid_places(shape[1] // self.p), e), persistent=False)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def condition(self, z, depth, near_z, near_depth, near, far, there):
        """z (B, G), depth (B, 1) own; near_z, near_depth: means over the niche; near (B, k, d), far
        (B, t, d): gene-only embeddings.
        -> tokens (B, M + 4, e)."""
        zero = z.new_zeros(len(z), self.gene.latents.shape[1])
        own = self.linear[0](torch.cat([z, depth], 1))
        beside = (
            self.linear[1](torch.cat([near_z, near_depth], 1)) if self.niche is not None else zero
        )
        niche = self.niche(near, None) if self.niche is not None else zero
        tissue = self.tissue(far, None, there) if self.tissue is not None else zero
        # (B, M + 4, d)
        y = torch.cat([self.gene(z, depth), torch.stack([own, beside, niche, tissue], 1)], 1)
        return self.to_y(y) + self.kind_of

    def forward(self, x, t, y, rho=0.0, choice=None):
        """x (B, C, S, S), t (B,) from 0 noise to 1 image, y (B, M + 4, e) -> the path's target (B,
        C, S, S).

        The network paints the image, tanh keeps it near [-1, 1], and the target follows from it:
        flow (x1 - x) / (1 - t), ddpm (a x - x1) / s. An image has far fewer degrees of freedom than
        image minus noise, so a small network learns it sooner.
        """
        w = torch.exp(-6 * torch.arange(0, 1, 2 / self.place.shape[1], device=x.device))
        angle = 1000 * t[:, None] * w  # (B, e/2)
        # (B, e)
        c = self.time(torch.cat([angle.sin(), angle.cos()], -1)) + self.pool(y.mean(1))
        h = self.embed(patches(x, self.p)) + self.place
        for i, block in enumerate(self.blocks):
            h = block(h, c, y, rho, None if choice is None else choice[:, i])
        # (B, PIXEL, S, S): what the tokens say to pixels
        scale, shift = unpatches(self.out(self.norm(h)), self.p, 2 * PIXEL).chunk(2, 1)
        h = F.silu(self.stem(x) * (1 + scale) + shift)
        # black and white at finite weights
        image, t = 1.05 * torch.tanh(self.last(F.silu(self.smooth(h)))), t.view(-1, 1, 1, 1)
        if self.path == "flow":
            return (image - x) / (1 - t).clamp(min=0.05)
        return (torch.sin(torch.pi * t / 2) * x - image) / torch.cos(torch.pi * t / 2).clamp(
            min=0.05
        )


def on_path(path, t, x0, x1):
    """Point of the path at t, and what the network predicts there. x0 noise, x1 image (B, C, S, S),
    t (B,).

    flow: x_t = (1 - t) x0 + t x1, target x1 - x0 (Lipman et al. 2023; Liu et al. 2023).
    ddpm: x_t = a x1 + s x0, a = sin(pi t / 2), s = cos(pi t / 2), the cosine schedule; target v = a
    x0 - s x1 (Salimans & Ho 2022).
    """
    t = t.view(-1, 1, 1, 1)
    if path == "flow":
        return (1 - t) * x0 + t * x1, x1 - x0
    a, s = torch.sin(torch.pi * t / 2), torch.cos(torch.pi * t / 2)
    return a * x1 + s * x0, a * x0 - s * x1


@torch.no_grad()
def sample(path, velocity, x, steps):
    """From noise x at t = 0 to t = 1. velocity(x, t) -> (B, C, S, S); flow: Heun's method, the last
    half step left out; ddpm: DDIM, a rotation."""
    at = torch.linspace(0, 1, steps + 1, dtype=torch.float64).tolist()
    for t, u in zip(at, at[1:]):
        v = velocity(x, x.new_full((len(x),), t))
        if path == "flow":
            there = x + (u - t) * v
            x = (
                there
                if u == 1
                else x + (u - t) / 2 * (v + velocity(there, x.new_full((len(x),), u)))
            )
            continue
        a, s, b, r = (f(np.pi * w / 2) for w in (t, u) for f in (np.sin, np.cos))
        x1, x0 = a * x - s * v, s * x + a * v
        x = b * x1 + r * x0
    return x


# --------------------------------------------------------------------------------------------------
# Training: every step seeds itself and draws for the whole batch; a process takes its slice,
# gradients are summed
# --------------------------------------------------------------------------------------------------


def optimise(config, size, stages, number, model, groups, loss_of, ema=0.0):
    """Stage `number` (0 A, 1 B, 2 C): AdamW with warm-up, cosine and clipping at 1; returns the
    model, averaged where `ema`, and the losses.

    groups: AdamW parameter groups with their peak `lr`. loss_of(generator, batch) -> sum of losses
    over this process's rows / batch, drawn from a generator that knows seed, stage and step only:
    an interrupted or shared run sees the same numbers.
    """
    name = "ABC"[number]
    n_steps = getattr(config, f"steps_{name.lower()}") or size.steps[number]
    warm_up = max(1, min(WARM_UP, n_steps // 10))
    optimiser = torch.optim.AdamW(groups, weight_decay=config.weight_decay, foreach=True)
    peaks = [group["lr"] for group in optimiser.param_groups]
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    device = parameters[0].device
    average = copy.deepcopy(model) if ema else None
    model.train()
    losses, parts = [], {"model": model, "optimiser": optimiser, "average": average}
    for step in stages.steps(name, n_steps, parts, losses):
        for group, peak in zip(optimiser.param_groups, peaks):
            group["lr"] = peak * run.warmup_cosine(step, n_steps, warm_up)
        generator = torch.Generator().manual_seed((config.seed * 3 + number) * 10_000_019 + step)
        with run.autocast(config, device):
            loss = loss_of(generator, size.batch[number])
        optimiser.zero_grad(set_to_none=False)
        loss.backward()
        losses.append(run.sum_gradients(parameters, loss))
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        if ema:
            ema_update(average, model, min(ema, (1 + step) / (10 + step)))
    return stages.finish(name, average if ema else model, losses), losses


def stage_a(config, size, stages, dataset, model):
    """Cells: masked-gene MSE (30 % hidden) + MAE (half of the patches) + .1 InfoNCE(z_img,
    z_gene)."""
    train, n_genes, n_patches = dataset.rows["train"], dataset.cells.n_genes, model.tokens
    device = dataset.device

    def loss_of(g, batch):
        rows, mine = sample_batch(train, batch, g), rank_slice(batch)
        hidden, u = torch.rand(batch, n_genes, generator=g) < 0.3, torch.rand(batch, generator=g)
        keep = torch.rand(batch, n_patches, generator=g).argsort(1)[:, : n_patches // 2]
        which = torch.randint(8, (batch,), generator=g)
        rows, hidden, u, keep, which = (a[mine] for a in (rows, hidden, u, keep, which))
        image = random_orientation(dataset.images(rows), which)
        z, depth = dataset.expression(rows, hidden)
        target, _ = dataset.expression(rows)
        hidden, u, keep = (a.to(device) for a in (hidden, u, keep))
        # one of the two is left out 15 % of the time each
        has_img, has_gene = u >= 0.15, u < 0.85
        x_img = model.image(image, keep if config.mae else None)
        x_gene = model.gene(z, depth, hidden)
        fused = model.fuse(x_img, x_gene, has_img, has_gene)
        img, gene = model.fuse(x_img), model.fuse(None, x_gene)
        wanted = (hidden | ~has_gene[:, None]).float()
        error = (model.genes(*fused) - target).square() * wanted  # (b, G)
        loss = (error.sum(1) / wanted.sum(1).clamp(min=1)).sum()
        if config.mae:
            lost = torch.ones(len(rows), n_patches, device=device).scatter(1, keep, 0.0)
            lost = lost * has_img[:, None]
            painted = model.mae_decode(fused[1], keep)
            error = (painted - patches(image, model.image.p)).square().mean(-1)  # (b, P)
            loss = loss + (error * lost).sum() / (n_patches - keep.shape[1])
        contrast = info_nce(run.gather(img[0]), run.gather(gene[0]), model.log_tau, mine)
        return (loss + 0.1 * contrast) / batch

    groups = [{"params": list(model.parameters()), "lr": size.lr[0]}]
    return optimise(config, size, stages, 0, model, groups, loss_of)


@torch.no_grad()
def embed(model, dataset, rows, hidden=None, modality=None, chunk=512):
    """Embeddings of `rows` from the full view: {modality: (n, d)} for img, gene, fused. hidden (n,
    G) bool: genes that are hidden."""
    out = {m: [] for m in (MODALITIES if modality is None else (modality,))}
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        mask = None if hidden is None else hidden[start : start + chunk]
        x_img = model.image(dataset.images(part)) if set(out) & {"img", "fused"} else None
        x_gene = None
        if set(out) & {"gene", "fused"}:
            on_device = None if mask is None else mask.to(dataset.device)
            x_gene = model.gene(*dataset.expression(part, mask), on_device)
        for m in out:
            z, *_ = model.fuse(x_img if m != "gene" else None, x_gene if m != "img" else None)
            out[m].append(z.float())
    return {m: torch.cat(v) for m, v in out.items()}


def embed_all(model, dataset, hidden=None, modality=None):
    """The same for all cells of the file that are in a part, (N, d) with zeros elsewhere."""
    rows = torch.as_tensor(dataset.used_rows)
    mask = None if hidden is None else hidden[rows]
    return {
        m: z.new_zeros(dataset.cells.n_cells, z.shape[1]).index_copy(0, rows.to(z.device), z)
        for m, z in embed(model, dataset, dataset.used_rows, mask, modality).items()
    }


def stage_b(config, size, stages, dataset, cell, model):
    """Context on cached embeddings: a cell's expression from what it shows of itself and from its
    surroundings, itself excluded.

    Of four rows one shows nothing of itself, one its image, one 80 % of its genes, one both.
    Surroundings are of the same modality: an image never reads neighbours' expression. A fifth of
    the rows has none. Loss: MSE of the genes not shown, + .5 (1 - cos) to z_cell where nothing is.
    """
    train, n_genes, device = dataset.rows["train"], dataset.cells.n_genes, dataset.device
    cached = torch.stack(list(embed_all(cell, dataset).values()))  # (3, N, d)
    squares = torch.stack([dataset.square_means(z) for z in cached])  # (3, squares, d)
    flat, flat_squares = cached.flatten(0, 1), squares.flatten(0, 1)
    n, n_squares = cached.shape[1], squares.shape[1]

    def loss_of(g, batch):
        rows = sample_batch(train, batch, g)
        hidden = torch.rand(batch, n_genes, generator=g) < 0.2
        kind = torch.randint(4, (batch,), generator=g)
        context = (torch.rand(batch, generator=g) >= 0.2) | (kind == 0)
        modality = torch.where(kind == 0, torch.randint(3, (batch,), generator=g), kind - 1)
        shows_nothing = (kind == 0)[:, None].to(device)
        z = torch.where(shows_nothing, model.absent, cached[0][rows.to(device)])  # (B, d)
        for k, name in ((2, "gene"), (3, "fused")):
            # still on the CPU: nobody waits for a size
            members = (kind == k).nonzero()[:, 0]
            if len(members):
                shown = embed(cell, dataset, rows[members], hidden[members], name)[name]
                z = z.index_copy(0, members.to(device), shown)
        hidden, kind, context, modality = (a.to(device) for a in (hidden, kind, context, modality))
        near = flat[modality[:, None] * n + dataset.niche[rows].to(device)]
        tissue = dataset.tissue[rows].to(device)
        far = flat_squares[modality[:, None] * n_squares + tissue.clamp(min=0)]
        where_near = dataset.niche_places[rows].to(device)
        where_far = dataset.tissue_places[rows].to(device)
        u = model(z, near, where_near, far, where_far, tissue >= 0, context)
        genes, guess = model.heads(u)
        wanted = (hidden | (kind < 2)[:, None]).float()
        error = (genes - dataset.expression(rows)[0]).square() * wanted  # (B, G)
        mse = error.sum(1) / wanted.sum(1).clamp(min=1)
        cos = F.cosine_similarity(guess, cached[2][rows.to(device)], dim=-1)
        # every process computes the whole of this small stage
        return (mse + 0.5 * (1 - cos) * (kind == 0)).mean() / run.processes()[1]

    groups = [{"params": list(model.parameters()), "lr": size.lr[1]}]
    return optimise(config, size, stages, 1, model, groups, loss_of)


class Conditions:
    """The generator's condition of any cell, from counts alone: cached gene-only embeddings and
    expression of all cells of the parts."""

    def __init__(self, dataset, cell):
        self.dataset = dataset
        self.z = embed_all(cell, dataset, modality="gene")["gene"]  # (N, d)
        self.squares = dataset.square_means(self.z)
        self.expression = dataset.all_expression()  # (N, G + 1)

    def __call__(self, model, rows):
        """rows (B,) -> condition tokens (B, M + 4, e)."""
        rows = torch.as_tensor(rows)
        if model.kind == "none":
            return model.null.expand(len(rows), -1, -1)
        own = self.expression[rows]
        beside = self.expression[self.dataset.niche[rows]].mean(1)  # (B, G + 1)
        near, _, far, _, there = self.dataset.surroundings(self.z, self.squares, rows)
        return model.condition(
            own[:, :-1], own[:, -1:], beside[:, :-1], beside[:, -1:], near, far, there
        )


def stage_c(config, size, stages, dataset, conditions, model):
    """Decoder: MSE to the path's target, channels by inverse variance, at t = sigmoid(N(-.5, 1));
    one row in ten without its condition; the gene encoder learns at .1 lr."""
    train, device, rho = dataset.rows["train"], dataset.device, merge_ratio(config, size)
    channels, side = dataset.shape
    n_cells_of_grid = (side // size.decoder_patch) ** 2 // 4

    def loss_of(g, batch):
        rows, mine = sample_batch(train, batch, g), rank_slice(batch)
        which = torch.randint(8, (batch,), generator=g)
        t = (torch.randn(batch, generator=g) - 0.5).sigmoid()
        drop = torch.rand(batch, generator=g) < 0.1
        x0 = torch.randn(batch, channels, side, side, generator=g)
        # merging's destinations
        choice = torch.randint(4, (batch, size.decoder_layers, n_cells_of_grid), generator=g)
        rows, which, t, drop, x0, choice = (a[mine] for a in (rows, which, t, drop, x0, choice))
        t, drop, x0, choice = (a.to(device) for a in (t, drop, x0, choice))
        image = random_orientation(dataset.images(rows), which)
        x, target = on_path(config.path, t, x0, image)
        y = torch.where(drop[:, None, None], model.null, conditions(model, rows))
        error = (model(x, t, y, rho, choice) - target).square() * dataset.channel_weight
        return error.mean((1, 2, 3)).sum() / batch

    slow = list(model.gene.parameters())
    fast = [p for name, p in model.named_parameters() if not name.startswith("gene.")]
    lr = size.lr[2]
    groups = [{"params": fast, "lr": lr}, {"params": slow, "lr": 0.1 * lr}]
    return optimise(config, size, stages, 2, model, groups, loss_of, size.ema)


def merge_ratio(config, size):
    return size.rho if config.rho < 0 else config.rho


@torch.no_grad()
def generate(config, size, dataset, conditions, model, rows, draws, chunk=256):
    """`draws` images of each cell of `rows`, (draws, n, C, S, S) uint8. Noise is drawn per draw and
    chunk; processes share the chunks."""
    rho, w, (rank, world) = merge_ratio(config, size), config.guidance, run.processes()
    channels, side = dataset.shape
    out = torch.zeros(draws, len(rows), channels, side, side, dtype=torch.uint8)
    jobs = [(draw, start) for draw in range(draws) for start in range(0, len(rows), chunk)]
    for draw, start in jobs[rank::world]:
        y = conditions(model, rows[start : start + chunk])
        seed = (config.seed * 1000 + draw) * 10_000_019 + start + 5
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(len(y), channels, side, side, generator=g).to(dataset.device)
        null = model.null.expand_as(y)

        def velocity(x, t, y=y, null=null):
            v = model(x, t, y, rho)
            if w == 0 or model.kind == "none" or t[0] > GUIDED:
                return v
            return (1 + w) * v - w * model(x, t, null, rho)

        with run.autocast(config, dataset.device):
            x = sample(config.path, velocity, x, config.ode_steps)
        pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        out[draw, start : start + chunk] = pixels.cpu()
    return sum_over_processes(out, dataset.device).numpy()


# --------------------------------------------------------------------------------------------------
# What the tasks of evaluation/cells.py read from the trained models
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def context_genes(dataset, model, z_own, z_all, rows, context=True, chunk=512):
    """What the context model says of `rows` from z_own (n, d) or None (shows nothing of itself) and
    the surroundings' embeddings z_all (N, d): expression (n, G) of its head, and the head's hidden
    layer (n, 2d), numpy."""
    squares, genes, hidden = dataset.square_means(z_all), [], []
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        own = None if z_own is None else z_own[start : start + chunk]
        has_context = torch.full((len(part),), context, device=z_all.device)
        u = model(own, *dataset.surroundings(z_all, squares, part), has_context)
        genes.append(model.heads(u)[0])
        hidden.append(model.trunk(u))
    return [torch.cat(a).cpu().numpy() for a in (genes, hidden)]


@torch.no_grad()
def representations(dataset, cell, context):
    """Frozen embeddings of all cells: z (with surroundings), z_cell, z_img, z_gene, each (N, d)
    numpy."""
    embedded, rows = embed_all(cell, dataset), dataset.used_rows
    fused = embedded["fused"]
    squares, z = dataset.square_means(fused), torch.zeros_like(fused)
    for part in np.array_split(rows, -(-len(rows) // 512)):
        z[part] = context(fused[part], *dataset.surroundings(fused, squares, part))
    found = {"z": z, "z_cell": fused, "z_img": embedded["img"], "z_gene": embedded["gene"]}
    return {name: values.cpu().numpy() for name, values in found.items()}


def method_of(config, size, dataset, models, conditions):
    """The trained models as the tasks call them: embeddings, expression, pictures."""
    cell, context = models["cell"], models["context"]

    def embed_modality(modality, hidden=None):
        return embed_all(cell, dataset, hidden, modality)[modality]

    def predict_genes(z, rows, has_context):
        return context_genes(dataset, context, z[rows], z, rows, has_context)

    def generate_images(rows, draws):
        return generate(config, size, dataset, conditions, models["generator"], rows, draws)

    return tasks.Method(embed_modality, predict_genes, generate_images)


# --------------------------------------------------------------------------------------------------
# The program
# --------------------------------------------------------------------------------------------------


def check(config):
    """Raises DataError naming the flag that has an impossible value."""
    one, zero = run.AT_LEAST_ONE, run.AT_LEAST_ZERO
    run.check_flags(
        config,
        {
            "test_every": (lambda v: v >= 2, "at least 2"),
            "width": run.POSITIVE,
            "buffer": (lambda v: v == -1 or v >= 0, "at least 0, or -1"),
            "fold": zero,
            "guidance": zero,
            "draws": one,
            "rho": (
                lambda v: v == -1 or 0 <= v <= 0.75,
                "from 0 to 0.75 (a quarter of the tokens stays), or -1",
            ),
            "ode_steps": one,
            "steps_a": zero,
            "steps_b": zero,
            "steps_c": zero,
            "weight_decay": zero,
            "save_every": zero,
        },
    )
    generator = ("path", "rho", "condition", "guidance", "draws", "ode_steps", "steps_c")
    rules = [
        (not config.generate, "with --no-generate", generator),
        (config.condition == "none", "with --condition none", ("guidance",)),
    ]
    run.refuse_idle_flags(config, rules)


def log_moments(counts, total):
    """Mean and variance (G,) of log1p of counts (n, G) CSR that are scaled to `total` a cell."""
    return data.mean_var(data.normalise_log1p(counts, target_sum=total))


def load(config, size, device):
    """CellDataset with the split that is scored: as test cells the test part, or with --score val
    the validation part."""
    cells = data.load_cells(config.data)
    case = f"on {config.data}: of three sections or more whole ones are held out"
    run.refuse_idle_flags(config, [(len(cells.sections) >= 3, case, ("width", "buffer"))])
    side = cells.crops.shape[2]
    for p in (size.patch, size.decoder_patch):
        if side % p or side // p % 2:
            raise DataError(
                f"{config.data}: crops of {side} px cannot be cut into an even number of patches "
                f"of {p} px: convert with another crop size"
            )
    val = 0 if config.score == "test" else 4
    buffer = None if config.buffer == -1 else config.buffer
    split = data.cell_split(cells, config.test_every, config.width, None, buffer, val, config.fold)
    if config.score == "val":
        split.test, split.val, split.name = split.val, np.zeros_like(split.val), f"{split.name}-val"
    normalise = Normaliser().fit(cells.counts[np.flatnonzero(split.train)], log_moments)
    return CellDataset(cells, split, normalise, size.niche, size.tissue, device)


def train(config, size, stages, dataset, record):
    """The three stages -> models {cell, context, generator}, losses {A, B, C}, the generator's
    conditions (None without it)."""
    n_genes, device = dataset.cells.n_genes, dataset.device
    models, losses, conditions = {}, {}, None
    cell = CellModel(dataset.shape, n_genes, size, config.fusion)
    cell.gene.init_from_pca(dataset.expression_matrix("train")[:, :-1])
    for part in (cell.to(device).image, cell.gene):
        run.compiled(part, config)
    models["cell"], losses["A"] = stage_a(config, size, stages, dataset, cell)
    record.lap("stage_a")
    # an ablation of one stage leaves the start of the next alone
    torch.manual_seed(config.seed + 1)
    context = ContextModel(n_genes, size, config.niche, config.tissue).to(device)
    run.compiled(context, config)
    models["context"], losses["B"] = stage_b(config, size, stages, dataset, cell, context)
    record.lap("stage_b")
    if config.generate:
        torch.manual_seed(config.seed + 2)
        surroundings = config.condition, config.niche, config.tissue
        generator = Generator(
            dataset.shape, n_genes, size, cell.gene, *surroundings, path=config.path
        ).to(device)
        conditions = Conditions(dataset, cell)
        run.compiled(generator, config)
        models["generator"], losses["C"] = stage_c(
            config, size, stages, dataset, conditions, generator
        )
        record.lap("stage_c")
    return models, losses, conditions


def variant(config):
    """Folder name of the run: size, path, and every other flag that is not at its default."""
    return run.variant(config, [config.size, config.path], ("size", "path", "fold", "score"))


def main(argv=None):
    """Train the three stages, score every task."""
    start = time.perf_counter()
    config = run.parse(Config, argv, __doc__.split("\n")[0])
    check(config)
    size, path = SIZES[config.size], Path(config.data)
    part = f"{config.score}-fold{config.fold}"
    record = run.Run("spatia", config, part, variant(config), start)
    checksum = record.note_inputs([config.data])
    dataset = load(config, size, record.device)
    cells, rows = dataset.cells, dataset.rows["test"]
    n_train, (channels, side) = len(dataset.rows["train"]), dataset.shape
    run.say(
        f"{path.name}: {n_train} cells train, {len(rows)} are scored ({dataset.split.detail}); "
        f"{cells.n_genes} genes, crops {channels} x {side} x {side}"
    )
    latest = record.folder / "latest.pt"
    stages = Stages(config, latest, "spatia checkpoint", checksum, "cells")
    record.lap("load")
    models, losses, conditions = train(config, size, stages, dataset, record)
    method, results = method_of(config, size, dataset, models, conditions), []
    if config.generate:
        results.append(tasks.task_generation(dataset, method, config.seed, config.draws))
        record.lap("generation")
    z = representations(dataset, models["cell"], models["context"])
    results += [
        tasks.task_imputation(dataset, method, config.seed),
        tasks.task_image_to_genes(dataset, method),
        tasks.task_labels(dataset, z, config.seed),
    ]
    record.lap("tasks")
    result = tasks.joined(results)
    result.scores |= {f"loss_{k}": float(np.mean(v[-50:])) for k, v in losses.items()}
    tasks.print_scores("spatia", result.scores, result.baselines)
    arrays = result.arrays | {"genes": cells.genes, "crops": cells.crops[rows]}
    arrays |= {"ids": cells.ids[rows], "xy": cells.xy[rows], "labels": cells.labels[rows]}
    arrays |= {k: v[rows] for k, v in z.items()}
    if record.rank == 0:
        figures.draw_cells(record, dataset, result.arrays, z["z"], losses)
    state = {
        "config": run.resumable(config),
        "genes": [str(g) for g in cells.genes],
        "normaliser": dataset.normalise.state(),
        **{k: m.state_dict() for k, m in models.items()},
    }
    record.finish(
        result.scores,
        result.baselines,
        arrays,
        sum(p.numel() for m in models.values() for p in m.parameters()),
        dataset.split,
        {"model.pt": lambda f: torch.save(state, f)}
        | export.files_of("spatia", arrays, [cells], config),
        n_train=n_train,
        n_scored=len(rows),
    )
    return 0


if __name__ == "__main__":
    run.cli(main)
