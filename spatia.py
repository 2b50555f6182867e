"""Single cells: morphology x expression fused by cross-attention, niche and tissue context, and a
token-merged flow decoder (genes -> image).

    x (C, S, S) --ViT--> X_img (1+P, d)      g (G) --latents--> X_gene (M, d)      cross-attention
    both ways -> z_cell (d)
    niche: the k nearest other cells      tissue: the T nearest squares of cells      z = LN(z_cell
    + gate W z_niche + gate W z_tissue)
    decoder: DiT on pixels' patches, x_t = (1 - t) noise + t image, condition = own and neighbours'
    EXPRESSION, self-attention on merged tokens

Three stages: A cells (masked genes + MAE + InfoNCE), B context on cached embeddings, C decoder.
Every run scores the model beside the predictors it has to beat (ridge, kNN, neighbours, PCA,
nearest-cell retrieval) on the same cells; see docs/spatia.md.

    python spatia.py --data datasets/ca1/cells.h5 --seed 0
    # choices are made on the validation part, never on the test cells
    python spatia.py --data cells.h5 --score val --guidance 0
    torchrun --standalone --nproc_per_node=2 spatia.py --data cells.h5 --preset base
"""

import copy
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import torch
from scipy.spatial import cKDTree
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import distributed, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

import data
import metrics
from data import DataError
from evaluation import pictures
from plainst import run

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

PARTS = ("train", "val", "test")
MODALITIES = ("img", "gene", "fused")
# imputation hides 1/5 of the genes of a cell, each gene once
ROUNDS = 5
# channels of the decoder's convolutions at pixel resolution
PIXEL = 8
# guidance up to this t: later steps only sharpen, the same with and without
GUIDED = 0.6
# ridge penalties, chosen by leave-one-out inside the training cells
ALPHAS = np.logspace(-1, 5, 13)


@dataclass(frozen=True)
class Size:
    """A preset: widths, depths and steps."""

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


PRESETS = {
    "tiny": Size(
        64,
        2,
        2,
        8,
        2,
        8,
        1,
        1,
        16,
        1,
        24,
        1,
        4,
        64,
        2,
        3,
        0.0,
        0.995,
        (300, 300, 2000),
        (128, 128, 32),
        (1e-3, 1e-3, 2e-3),
    ),
    "base": Size(
        256,
        8,
        4,
        8,
        6,
        32,
        4,
        2,
        32,
        3,
        256,
        4,
        4,
        384,
        6,
        10,
        0.5,
        0.9999,
        (25000, 10000, 100000),
        (512, 128, 256),
        (3e-4, 3e-4, 2e-4),
    ),
}


@dataclass
class Config(run.Config):
    """Flags of spatia.py."""

    data: str = "datasets/ca1/cells.h5"
    "cell file (python -m plainst convert ca1|xenium, python -m plainst simulate cells)"
    score: Literal["test", "val"] = "test"
    """test: train on all training cells, score the test cells; val: train without the validation
    part and score that (for choices)"""
    test_every: int = 4
    "every how manieth block is held out (files of three sections or more hold out whole sections)"
    width: float = 600.0
    "width of the blocks in full-resolution px"
    buffer: float = 96.0
    "training cells within so many px of a held-out cell are dropped"
    fold: int = 0
    "which of the blocks or sections are held out"
    preset: Literal["tiny", "base"] = "tiny"
    "tiny: about 1 M parameters, minutes on a CPU; base: for GPUs"
    path: Literal["flow", "ddpm"] = "flow"
    """flow matching on the straight path, Heun steps; or diffusion (cosine schedule, v-prediction),
    DDIM steps"""
    rho: float = -1.0
    """share of the decoder's tokens that are merged before self-attention, 0 to 0.75; -1: the
    preset's"""
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
    "optimiser steps of stage A (cells); 0: the preset's"
    steps_b: int = 0
    "optimiser steps of stage B (context); 0: the preset's"
    steps_c: int = 0
    "optimiser steps of stage C (decoder); 0: the preset's"
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
# Cells -> numbers: expression, neighbour tables, images
# --------------------------------------------------------------------------------------------------


class Normaliser:
    """Counts -> standardised expression, fitted on training cells; genes that are hidden leave no
    trace in the others.

    x_g = log1p(c_g / total * M), z = clip((x - mean) / std, +-5), M the median total. With hidden
    genes the total is that of the visible ones, and M is multiplied with the share p of the counts
    that these genes have in the training cells: hidden counts enter nothing.
    """

    def fit(self, counts):
        """counts (n, G) CSR of the training cells."""
        total = np.asarray(counts.sum(1), np.float64).ravel()
        self.median = float(np.median(total))
        # (G,) p
        self.share = torch.tensor(
            np.asarray(counts.sum(0), np.float64).ravel() / total.sum(), dtype=torch.float32
        )
        x = data.normalise_log1p(counts, target_sum=self.median)
        mean, var = data.mean_var(x)
        self.mean, self.std = (
            torch.tensor(a, dtype=torch.float32)
            for a in (mean, np.where(var > 1e-8, np.sqrt(var), 1.0))
        )
        self.depth = (float(np.log(total).mean()), float(np.log(total).std() + 1e-6))
        return self

    def __call__(self, counts, hidden=None):
        """counts (B, G) float, hidden (B, G) bool -> z (B, G), 0 where hidden; depth (B, 1)
        standardised log total."""
        visible = torch.ones_like(counts) if hidden is None else (~hidden).to(counts.dtype)
        # (B, 1)
        share = (visible * self.share).sum(1, keepdim=True).clamp(min=1e-3)
        total = (counts * visible).sum(1, keepdim=True).clamp(min=1)
        z = ((torch.log1p(counts / total * self.median * share) - self.mean) / self.std).clamp(
            -5, 5
        ) * visible
        return z, ((total / share).log() - self.depth[0]) / self.depth[1]

    def state(self):
        return {
            "median": self.median,
            "share": self.share,
            "mean": self.mean,
            "std": self.std,
            "depth": list(self.depth),
        }


def neighbour_tables(xy, group, k, t, path=""):
    """Who is near whom, only among cells of the same group (a section within one part of the split;
    -1: belongs to none).

    niche (N, k) rows of the k nearest other cells; square (N,) the square of a cell, sides chosen
    so that squares hold about ten; tissue (N, t) the nearest squares but the cell's own, -1 where
    there are fewer; the relative places (N, k, 2), (N, t, 2) in square sides. Raises DataError for
    a section with fewer than k + 1 cells in a part.
    """
    n = len(xy)
    niche, square, tissue = np.zeros((n, k), np.int64), np.full(n, -1), np.full((n, t), -1)
    near, far, first = np.zeros((n, k, 2), np.float32), np.zeros((n, t, 2), np.float32), 0
    for g in np.unique(group[group >= 0]):
        rows = np.flatnonzero(group == g)
        if len(rows) < k + 1:
            raise DataError(
                f"{path}: a section has {len(rows)} cells in one part of the split, fewer "
                f"than a niche of {k + 1}: "
                "leave the section out or make the blocks wider"
            )
        here = xy[rows]
        table = data.knn_table(here, k)
        side = (
            np.sqrt(np.pi) * np.median(np.linalg.norm(here[table[:, min(9, k - 1)]] - here, axis=1))
            or 1.0
        )
        cell, of = np.unique(np.floor(here / side).astype(np.int64), axis=0, return_inverse=True)
        of = of.reshape(-1)
        centre = (
            np.stack([np.bincount(of, here[:, i]) for i in (0, 1)], 1) / np.bincount(of)[:, None]
        )
        # (n, <= t+1)
        found = cKDTree(centre).query(here, k=np.arange(1, min(t + 1, len(cell)) + 1))[1]
        for i, row in enumerate(found):
            others = row[row != of[i]][:t]
            tissue[rows[i], : len(others)] = others + first
            far[rows[i], : len(others)] = (centre[others] - here[i]) / side
        niche[rows], square[rows] = rows[table], of + first
        near[rows] = (here[table] - here[:, None]) / side
        first += len(cell)
    return [torch.tensor(a) for a in (niche, near, square, tissue, far)]


class Field:
    """The cells of one run as the model reads them: counts, images, neighbours, all by row of the
    cell file."""

    def __init__(self, cells, split, size, device):
        self.cells, self.split, self.device, self.path = (
            cells,
            split,
            device,
            Path(cells.source).name,
        )
        self.rows = {p: np.flatnonzero(getattr(split, p)) for p in PARTS}
        part = np.full(cells.n_cells, -1)
        for i, p in enumerate(PARTS):
            part[self.rows[p]] = i * len(cells.sections)
        self.niche, self.near, self.square, self.tissue, self.far = neighbour_tables(
            cells.xy,
            np.where(part >= 0, part + cells.section, -1),
            size.niche,
            size.tissue,
            cells.source,
        )
        self.normalise = Normaliser().fit(cells.counts[self.rows["train"]])
        self.counts = cells.counts.tocsr().astype(np.float32)
        n, c, s, _ = cells.crops.shape
        self.shape = (c, s)
        self.stored = torch.tensor(cells.crops[np.arange(n)]) if n * c * s * s < 2**31 else None
        sample = self.images(self.rows["train"][:: -(-len(self.rows["train"]) // 4096)])
        # (C,) a sparse channel counts as much as a full one
        weight = 1 / sample.var((0, 2, 3)).clamp(min=1e-4)
        self.weight = (weight / weight.mean())[:, None, None]

    def images(self, rows):
        """(B, C, S, S) float in [-1, 1]; from memory where all crops fit into 2 GB, else from the
        file."""
        x = (
            self.stored[rows]
            if self.stored is not None
            else torch.tensor(self.cells.crops[np.asarray(rows)])
        )
        return x.to(self.device).float() / 127.5 - 1

    def expression(self, rows, hidden=None):
        """Standardised expression (B, G) and depth (B, 1) of `rows`, with the genes `hidden` (B, G)
        hidden."""
        z, depth = self.normalise(
            torch.tensor(self.counts[np.asarray(rows)].toarray()),
            None if hidden is None else hidden.cpu(),
        )
        return z.to(self.device), depth.to(self.device)


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
    of the training cells (`start`): a few hundred steps of attention alone do not find them.
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
    def start(self, x):
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

    def repaint(self, x_img, keep):
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


class Reader(nn.Module):
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
        self.niche = Reader(d, size.heads, size.ratio, size.niche_layers) if niche else None
        self.tissue = (
            Reader(d, size.heads, size.ratio, size.tissue_layers, longest=100.0) if tissue else None
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


def square_means(z, field):
    """z (N, d) of all cells -> (squares, d), mean over the members."""
    used = field.square >= 0
    of = field.square[used].to(z.device)
    total = z.new_zeros(int(field.square.max()) + 1, z.shape[1]).index_add(
        0, of, z[used.to(z.device)]
    )
    return total / torch.bincount(of, minlength=len(total))[:, None]


def surroundings(field, z, squares, rows):
    """What the cells `rows` can read: near (B, k, d), where, far (B, t, d), where, there (B, t). z
    (N, d) cached, squares of `square_means`."""
    rows = torch.as_tensor(rows)
    tissue = field.tissue[rows]
    device = z.device
    return (
        z[field.niche[rows].to(device)],
        field.near[rows].to(device),
        squares[tissue.clamp(min=0).to(device)],
        field.far[rows].to(device),
        (tissue >= 0).to(device),
    )


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
            Reader(d, size.heads, size.ratio, size.niche_layers, place=False)
            if niche and condition == "context"
            else None
        )
        self.tissue = (
            Reader(d, size.heads, size.ratio, size.tissue_layers, place=False)
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


class Session:
    """What the stages share: flags, processes, checkpoint. checksum: of the data, which must not
    change between a checkpoint and --resume."""

    def __init__(self, config, record, size, checksum=""):
        self.config, self.size, self.device, self.rank, self.world = (
            config,
            size,
            record.device,
            record.rank,
            record.world,
        )
        self.latest = record.folder / "latest.pt"
        self.state = {"config": resumable(config), "data": checksum, "done": {}, "going": None}
        if config.resume:
            self.state = load_checkpoint(self.latest)
            if self.state["config"] != resumable(config):
                raise DataError(
                    f"{self.latest} was written with other flags: use the same flags, or "
                    "leave --resume away"
                )
            if self.state.get("data") != checksum:
                raise DataError(
                    f"{self.latest} was written from another cell file: use the same, or "
                    "leave --resume away"
                )

    def save(self):
        if self.rank == 0:
            run.write_atomically(self.latest, lambda f: torch.save(self.state, f))

    def mine(self, batch):
        """Rows of a batch that this process computes."""
        if batch % self.world:
            raise DataError(
                f"a batch of {batch} cannot be shared by {self.world} processes: start a "
                "number of processes that divides it"
            )
        return slice(self.rank * batch // self.world, (self.rank + 1) * batch // self.world)

    def gather(self, x):
        """(b, d) of every process -> (B, d), with a gradient through this process's own rows."""
        if self.world == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.world)]
        distributed.all_gather(parts, x.detach().contiguous())
        parts[self.rank] = x
        return torch.cat(parts)


def resumable(config):
    """The flags that must not change between a checkpoint and --resume."""
    return {
        k: v
        for k, v in vars(config).items()
        if k not in ("resume", "save_every", "runs", "device", "threads")
    }


def load_checkpoint(path):
    """latest.pt of an interrupted run. Raises DataError for anything else."""
    return run.read_checkpoint(
        path,
        "spatia checkpoint",
        ["config", "done", "going"],
        "leave --resume away, or run with --save_every first",
    )


def learning_rate(step, steps):
    """Factor: linear over 100 steps (a tenth, if that is less), then a cosine to 0."""
    warm = max(1, min(100, steps // 10))
    return (
        (step + 1) / warm
        if step < warm
        else float(1 + np.cos(np.pi * (step - warm) / max(1, steps - warm))) / 2
    )


def optimise(session, number, model, groups, loss_of, ema=0.0):
    """Stage `number` (0 A, 1 B, 2 C): AdamW with warm-up, cosine and clipping at 1; returns the
    model, averaged where `ema`, and the losses.

    groups: AdamW parameter groups with their peak `lr`. loss_of(generator, batch) -> sum of losses
    over this process's rows / batch, drawn from a generator that knows seed, stage and step only:
    an interrupted or shared run sees the same numbers.
    """
    config, name = session.config, "ABC"[number]
    steps, batch = (
        (getattr(config, f"steps_{name.lower()}") or session.size.steps[number]),
        session.size.batch[number],
    )
    optimiser = torch.optim.AdamW(groups, weight_decay=config.weight_decay, foreach=True)
    peaks, history, average = (
        [g["lr"] for g in optimiser.param_groups],
        [],
        copy.deepcopy(model) if ema else None,
    )
    if name in session.state["done"]:
        done = session.state["done"][name]
        model.load_state_dict(done["model"])
        return model.eval(), done["history"]
    going = session.state["going"]
    if going is not None and going["stage"] == name:
        model.load_state_dict(going["model"])
        optimiser.load_state_dict(going["optimiser"])
        history = list(going["history"])
        if ema:
            average.load_state_dict(going["average"])
    parameters, recent = [p for g in optimiser.param_groups for p in g["params"]], []
    model.train()
    for step in run.progress(range(len(history), steps), f"stage {name}"):
        for group, peak in zip(optimiser.param_groups, peaks):
            group["lr"] = peak * learning_rate(step, steps)
        generator = torch.Generator().manual_seed((config.seed * 3 + number) * 10_000_019 + step)
        with run.autocast(config, session.device):
            loss = loss_of(generator, batch)
        optimiser.zero_grad(set_to_none=False)
        loss.backward()
        recent.append(sum_gradients(session, parameters, loss))
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        if ema:
            follow(average, model, min(ema, (1 + step) / (10 + step)))
        save = config.save_every and (step + 1) % config.save_every == 0
        # to read a loss is to wait for the device
        if save or len(recent) == 50 or step + 1 == steps:
            history, recent = history + torch.stack(recent).tolist(), []
            if not np.isfinite(history).all():
                raise DataError(
                    f"the loss of stage {name} is not finite at step "
                    f"{np.isfinite(history).argmin()}: check the counts for extreme values"
                )
        if save:
            session.state["going"] = {
                "stage": name,
                "model": model.state_dict(),
                "optimiser": optimiser.state_dict(),
                "history": history,
                "average": average.state_dict() if ema else None,
            }
            session.save()
    model = average if ema else model
    session.state["done"][name], session.state["going"] = (
        {"model": model.state_dict(), "history": history},
        None,
    )
    if config.save_every:
        session.save()
    return model.eval(), history


def sum_gradients(session, parameters, loss):
    """Sum loss and gradients over the processes, in one message; returns the loss of the whole
    batch, a tensor."""
    if session.world == 1:
        return loss.detach()
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    flat = torch.cat([p.grad.flatten() for p in parameters] + [loss.detach().view(1)])
    distributed.all_reduce(flat)
    for p, total in zip(parameters, flat[:-1].split([p.numel() for p in parameters])):
        p.grad.copy_(total.view_as(p))
    return flat[-1]


@torch.no_grad()
def follow(average, model, keep):
    """average <- keep average + (1 - keep) model."""
    # all in one call
    get_ema_multi_avg_fn(keep)(list(average.parameters()), list(model.parameters()), None)


def pick(rows, batch, generator):
    """A batch of rows: without repeats where that is cheap. -> (B,) int64."""
    n = len(rows)
    if batch <= n <= 100_000:
        return torch.as_tensor(rows)[torch.randperm(n, generator=generator)[:batch]]
    return torch.as_tensor(rows)[torch.randint(n, (batch,), generator=generator)]


def turned(x, which):
    """Each image of x (B, C, S, S) in one of its eight orientations, which (B,) in 0..7:
    orientation carries no information."""
    at = torch.arange(x[0, 0].numel()).view(x.shape[2:])
    turns = [torch.rot90(at, k) for k in range(4)]
    # (B, S, S) pixel that comes here
    place = torch.stack([*turns, *(t.flip(1) for t in turns)])[which.cpu()].to(x.device)
    return (
        x.flatten(2).gather(2, place.flatten(1)[:, None].expand(-1, x.shape[1], -1)).view(x.shape)
    )


def stage_a(session, field, model):
    """Cells: masked-gene MSE (30 % hidden) + MAE (half of the patches) + .1 InfoNCE(z_img,
    z_gene)."""
    config, size = session.config, session.size
    rows_of, n_genes, n_patches = field.rows["train"], field.cells.n_genes, model.tokens

    def loss_of(g, batch):
        rows, mine = pick(rows_of, batch, g), session.mine(batch)
        hidden, u = torch.rand(batch, n_genes, generator=g) < 0.3, torch.rand(batch, generator=g)
        keep = torch.rand(batch, n_patches, generator=g).argsort(1)[:, : n_patches // 2]
        rows, hidden, u, keep, which = (
            a[mine] for a in (rows, hidden, u, keep, torch.randint(8, (batch,), generator=g))
        )
        image, (z, depth), (target, _) = (
            turned(field.images(rows), which),
            field.expression(rows, hidden),
            field.expression(rows),
        )
        hidden, u, keep = (a.to(session.device) for a in (hidden, u, keep))
        # one of the two is left out 15 % of the time each
        has_img, has_gene = u >= 0.15, u < 0.85
        x_img, x_gene = (
            model.image(image, keep if config.mae else None),
            model.gene(z, depth, hidden),
        )
        fused, img, gene = (
            model.fuse(x_img, x_gene, has_img, has_gene),
            model.fuse(x_img),
            model.fuse(None, x_gene),
        )
        wanted = (hidden | ~has_gene[:, None]).float()
        loss = (
            ((model.genes(*fused) - target).square() * wanted).sum(1) / wanted.sum(1).clamp(min=1)
        ).sum()
        if config.mae:
            lost = (
                torch.ones(len(rows), n_patches, device=session.device).scatter(1, keep, 0.0)
                * has_img[:, None]
            )
            # (b, P)
            error = (
                (model.repaint(fused[1], keep) - patches(image, model.image.p)).square().mean(-1)
            )
            loss = loss + (error * lost).sum() / (n_patches - keep.shape[1])
        return (
            loss
            + 0.1 * info_nce(session.gather(img[0]), session.gather(gene[0]), model.log_tau, mine)
        ) / batch

    return optimise(
        session, 0, model, [{"params": list(model.parameters()), "lr": size.lr[0]}], loss_of
    )


@torch.no_grad()
def embed(model, field, rows, hidden=None, modality=None, chunk=512):
    """Embeddings of `rows` from the full view: {modality: (n, d)} for img, gene, fused. hidden (n,
    G) bool: genes that are hidden."""
    out = {m: [] for m in (MODALITIES if modality is None else (modality,))}
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        mask = None if hidden is None else hidden[start : start + chunk]
        x_img = model.image(field.images(part)) if set(out) & {"img", "fused"} else None
        x_gene = None
        if set(out) & {"gene", "fused"}:
            x_gene = model.gene(
                *field.expression(part, mask), None if mask is None else mask.to(field.device)
            )
        for m in out:
            out[m].append(
                model.fuse(x_img if m != "gene" else None, x_gene if m != "img" else None)[
                    0
                ].float()
            )
    return {m: torch.cat(v) for m, v in out.items()}


def embed_all(model, field, hidden=None, modality=None):
    """The same for all cells of the file that are in a part, (N, d) with zeros elsewhere."""
    rows = np.concatenate([field.rows[p] for p in PARTS])
    found = embed(
        model, field, rows, None if hidden is None else hidden[torch.as_tensor(rows)], modality
    )
    return {
        m: v.new_zeros(field.cells.n_cells, v.shape[1]).index_copy(
            0, torch.as_tensor(rows, device=v.device), v
        )
        for m, v in found.items()
    }


def stage_b(session, field, cell, model):
    """Context on cached embeddings: a cell's expression from what it shows of itself and from its
    surroundings, itself excluded.

    Of four rows one shows nothing of itself, one its image, one 80 % of its genes, one both.
    Surroundings are of the same modality: an image never reads neighbours' expression. A fifth of
    the rows has none. Loss: MSE of the genes not shown, + .5 (1 - cos) to z_cell where nothing is.
    """
    size, rows_of, n_genes = session.size, field.rows["train"], field.cells.n_genes
    cached = torch.stack(list(embed_all(cell, field).values()))  # (3, N, d)
    squares = torch.stack([square_means(z, field) for z in cached])  # (3, squares, d)
    flat, flat_squares, n, m = (
        cached.flatten(0, 1),
        squares.flatten(0, 1),
        cached.shape[1],
        squares.shape[1],
    )

    def loss_of(g, batch):
        rows = pick(rows_of, batch, g)
        hidden, kind = (
            torch.rand(batch, n_genes, generator=g) < 0.2,
            torch.randint(4, (batch,), generator=g),
        )
        context = (torch.rand(batch, generator=g) >= 0.2) | (kind == 0)
        modality = torch.where(kind == 0, torch.randint(3, (batch,), generator=g), kind - 1)
        # (B, d)
        z = torch.where(
            (kind == 0)[:, None].to(session.device),
            model.absent,
            cached[0][rows.to(session.device)],
        )
        for k, name in ((2, "gene"), (3, "fused")):
            # still on the CPU: nobody waits for a size
            at = (kind == k).nonzero()[:, 0]
            if len(at):
                z = z.index_copy(
                    0, at.to(session.device), embed(cell, field, rows[at], hidden[at], name)[name]
                )
        hidden, kind, context, modality = (
            a.to(session.device) for a in (hidden, kind, context, modality)
        )
        near = flat[modality[:, None] * n + field.niche[rows].to(session.device)]
        tissue = field.tissue[rows].to(session.device)
        far = flat_squares[modality[:, None] * m + tissue.clamp(min=0)]
        u = model(
            z,
            near,
            field.near[rows].to(session.device),
            far,
            field.far[rows].to(session.device),
            tissue >= 0,
            context,
        )
        genes, guess = model.heads(u)
        wanted = (hidden | (kind < 2)[:, None]).float()
        mse = ((genes - field.expression(rows)[0]).square() * wanted).sum(1) / wanted.sum(1).clamp(
            min=1
        )
        cos = F.cosine_similarity(guess, cached[2][rows.to(session.device)], dim=-1)
        # every process computes the whole of this small stage
        return (mse + 0.5 * (1 - cos) * (kind == 0)).mean() / session.world

    return optimise(
        session, 1, model, [{"params": list(model.parameters()), "lr": size.lr[1]}], loss_of
    )


class Conditions:
    """The generator's condition of any cell, from counts alone: cached gene-only embeddings and
    expression of all cells of the parts."""

    def __init__(self, field, cell):
        self.field = field
        self.z = embed_all(cell, field, modality="gene")["gene"]  # (N, d)
        self.squares = square_means(self.z, field)
        rows = np.concatenate([field.rows[p] for p in PARTS])
        self.expression = torch.zeros(
            field.cells.n_cells, field.cells.n_genes + 1, device=field.device
        )
        for part in np.array_split(rows, -(-len(rows) // 4096)):
            self.expression[part] = torch.cat(field.expression(part), 1)

    def __call__(self, model, rows):
        """rows (B,) -> condition tokens (B, M + 4, e)."""
        rows = torch.as_tensor(rows)
        if model.kind == "none":
            return model.null.expand(len(rows), -1, -1)
        own = self.expression[rows]
        beside = self.expression[self.field.niche[rows]].mean(1)  # (B, G + 1)
        near, _, far, _, there = surroundings(self.field, self.z, self.squares, rows)
        return model.condition(
            own[:, :-1], own[:, -1:], beside[:, :-1], beside[:, -1:], near, far, there
        )


def stage_c(session, field, conditions, model):
    """Decoder: MSE to the path's target, channels by inverse variance, at t = sigmoid(N(-.5, 1));
    one row in ten without its condition; the gene encoder learns at .1 lr."""
    config, size, rows_of = session.config, session.size, field.rows["train"]
    rho, side = merge_ratio(config, size), field.shape[1]

    def loss_of(g, batch):
        rows, mine = pick(rows_of, batch, g), session.mine(batch)
        which, t = (
            torch.randint(8, (batch,), generator=g),
            (torch.randn(batch, generator=g) - 0.5).sigmoid(),
        )
        drop, x0 = (
            torch.rand(batch, generator=g) < 0.1,
            torch.randn(batch, field.shape[0], side, side, generator=g),
        )
        # merging's destinations
        choice = torch.randint(
            4, (batch, size.decoder_layers, (side // size.decoder_patch) ** 2 // 4), generator=g
        )
        rows, which, t, drop, x0, choice = (a[mine] for a in (rows, which, t, drop, x0, choice))
        t, drop, x0, choice = (a.to(session.device) for a in (t, drop, x0, choice))
        x, target = on_path(config.path, t, x0, turned(field.images(rows), which))
        y = torch.where(drop[:, None, None], model.null, conditions(model, rows))
        return ((model(x, t, y, rho, choice) - target).square() * field.weight).mean(
            (1, 2, 3)
        ).sum() / batch

    slow = list(model.gene.parameters())
    fast = [p for name, p in model.named_parameters() if not name.startswith("gene.")]
    return optimise(
        session,
        2,
        model,
        [{"params": fast, "lr": size.lr[2]}, {"params": slow, "lr": 0.1 * size.lr[2]}],
        loss_of,
        size.ema,
    )


def merge_ratio(config, size):
    return size.rho if config.rho < 0 else config.rho


@torch.no_grad()
def generate(session, field, conditions, model, rows, draws, chunk=256):
    """`draws` images of each cell of `rows`, (draws, n, C, S, S) uint8. Noise is drawn per draw and
    chunk; processes share the chunks."""
    config, rho = session.config, merge_ratio(session.config, session.size)
    w = config.guidance
    out = torch.zeros(
        draws, len(rows), *field.shape[:1], field.shape[1], field.shape[1], dtype=torch.uint8
    )
    jobs = [(d, s) for d in range(draws) for s in range(0, len(rows), chunk)]
    for d, s in jobs[session.rank :: session.world]:
        y = conditions(model, rows[s : s + chunk])
        g = torch.Generator().manual_seed((session.config.seed * 1000 + d) * 10_000_019 + s + 5)
        x = torch.randn(len(y), field.shape[0], field.shape[1], field.shape[1], generator=g).to(
            session.device
        )
        null = model.null.expand_as(y)

        def velocity(x, t, y=y, null=null):
            v = model(x, t, y, rho)
            return (
                v
                if w == 0 or model.kind == "none" or t[0] > GUIDED
                else (1 + w) * v - w * model(x, t, null, rho)
            )

        with run.autocast(config, session.device):
            x = sample(config.path, velocity, x, config.ode_steps)
        out[d, s : s + chunk] = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    if session.world > 1:
        shared = out.to(session.device)
        distributed.all_reduce(shared)
        out = shared.cpu()
    return out.numpy()


# --------------------------------------------------------------------------------------------------
# Tasks, each beside its baselines. Everything is fitted on training cells
# --------------------------------------------------------------------------------------------------


def ridge(x, y, at):
    """Ridge with z-scored inputs, the penalty by leave-one-out on the training rows: fit on (x, y),
    predict `at`."""
    return make_pipeline(StandardScaler(), RidgeCV(ALPHAS)).fit(x, y).predict(at)


def knn(x, y, at, k=20):
    return KNeighborsRegressor(min(k, len(x))).fit(x, y).predict(at)


def table(field, part):
    """Expression of a part: z and depth (n, G + 1) numpy."""
    return np.concatenate(
        [
            np.concatenate([a.cpu().numpy() for a in field.expression(rows)], 1)
            for rows in np.array_split(field.rows[part], -(-len(field.rows[part]) // 4096))
        ]
    )


def probes(images, channels):
    """Three numbers of pictures (n, C, S, S) uint8 that a generator should get right: covered area
    of the own cell, of the others, of the others in the central half. Channels `own` and `other` by
    name, else the first and the last."""
    own, other = (
        channels.index(name) if name in channels else i for name, i in (("own", 0), ("other", -1))
    )
    s = images.shape[-1]
    x = images.astype(np.float32) / 255
    return np.stack(
        [
            x[:, own].mean((1, 2)),
            x[:, other].mean((1, 2)),
            x[:, other, s // 4 : -(s // 4), s // 4 : -(s // 4)].mean((1, 2)),
        ],
        1,
    )


PROBES = ("own_area", "other_area", "near_density")


def gene_scores(true, pred, detected, prefix):
    """PCC per gene over cells (mean over detected genes; 0 where the prediction is constant), RMSE.
    -> flat dict."""
    r = np.nan_to_num(metrics.pcc(true, pred))[detected]
    return {
        f"{prefix}_pcc_mean": float(r.mean()),
        f"{prefix}_pcc_median": float(np.median(r)),
        f"{prefix}_rmse": float(np.sqrt(np.mean((true - pred)[:, detected] ** 2))),
    }


def detected(field):
    """(G,) genes seen in more than 3 % of the training cells."""
    counts = field.counts[field.rows["train"]]
    return counts.getnnz(0) > 0.03 * counts.shape[0]


def task_generation(session, field, conditions, model, keep):
    """genes -> image: conditional PCC of the probes (mean of the draws, one draw, shuffled),
    distances of distributions, round trip."""
    fit, rows, names = field.rows["train"], field.rows["test"], field.cells.channels
    x_fit, x = table(field, "train"), table(field, "test")
    real_fit, real = field.cells.crops[fit], field.cells.crops[rows]
    made = generate(session, field, conditions, model, rows, session.config.draws)
    p_fit, p_real, p_made = (
        probes(real_fit, names),
        probes(real, names),
        np.stack([probes(m, names) for m in made]),
    )
    features = pictures.ImageFeatures().fit(real_fit)
    f_fit, f_real, f_made = features(real_fit), features(real), features(made[0])
    nearest = cKDTree(x_fit).query(x, k=min(8, len(fit)))[1]
    beside_fit, beside = (
        conditions.expression[field.niche[r]].mean(1).cpu().numpy() for r in (fit, rows)
    )
    f_ridge = ridge(np.concatenate([x_fit, beside_fit], 1), p_fit, np.concatenate([x, beside], 1))
    guesses = {
        "ridge": ridge(x_fit, p_fit, x),
        "ridge_context": f_ridge,
        "retrieval": p_fit[nearest].mean(1),
        "knn": knn(x_fit, p_fit, x),
    }
    shuffle = np.random.default_rng(session.config.seed).permutation(len(rows))
    guesses |= {"generated": p_made.mean(0), "shuffled": p_made.mean(0)[shuffle]}
    found = {
        name: {f"cond_pcc_{p}": r for p, r in zip(PROBES, np.nan_to_num(metrics.pcc(p_real, g)))}
        for name, g in guesses.items()
    }
    one = np.nan_to_num([metrics.pcc(p_real, g) for g in p_made]).mean(0)
    own = found.pop("generated") | {f"cond_pcc_{p}_one_draw": r for p, r in zip(PROBES, one)}
    seed = session.config.seed
    for name, other in (("generated", f_made), ("retrieval", f_fit[nearest[:, 0]])):
        s = pictures.generated_images(f_real, other, f_fit, seed)
        (own if name == "generated" else found[name]).update(
            {f"{k}_{name}" if k in ("fd", "kid", "w1", "ks") else k: v for k, v in s.items()}
        )
    own["fd_retrieval"] = found["retrieval"]["fd_retrieval"]
    mean = np.tile(np.rint(real_fit.mean(0)).astype(np.uint8), (len(rows), 1, 1, 1))
    found["mean_image"] = {
        "fd_mean_image": pictures.generated_images(f_real, features(mean), f_fit, seed)["fd"]
    }
    pca = PCA(min(32, len(fit) - 1), random_state=0).fit(real_fit.reshape(len(fit), -1) / 255)
    low = [pca.transform(a.reshape(len(a), -1) / 255) for a in (real, made[0], real_fit)]
    own |= {
        f"{k}_pca": v
        for k, v in pictures.generated_images(*low, seed).items()
        if k in ("fd", "fd_floor")
    }
    back = ridge(f_fit, x_fit[:, :-1], np.concatenate([f_made, f_real]))
    genes = detected(field)
    for name, guess in (("", back[: len(rows)]), ("_ceiling", back[len(rows) :])):
        own[f"round_trip_pcc{name}"] = float(
            np.nan_to_num(metrics.pcc(x[:, :-1], guess))[genes].mean()
        )
    own |= truth_scores(field, rows, p_made.mean(0)[:, 0], p_real[:, 0])
    keep |= {"generated": made[0], "probes_generated": p_made, "probes_real": p_real}
    return own, found


def truth_scores(field, rows, made, real):
    """Where a simulation gives its size program: PCC of the own area with it, over all cells and
    within types; of the real pictures beside it."""
    truth = field.cells.truth
    if "program" not in truth or "type" not in truth:
        return {}
    program, kind = truth["program"][rows], truth["type"][rows]

    def within(v):
        return (
            v - np.array([v[kind == k].mean() for k in range(kind.max() + 1)])[kind]
            if len(kind)
            else v
        )

    out = {}
    for name, area in (("", made), ("_real", real)):
        out |= {
            f"program_pcc{name}": np.corrcoef(area, program)[0, 1],
            f"program_pcc_within_type{name}": np.corrcoef(within(area), within(program))[0, 1],
        }
    return {k: float(v) for k, v in out.items()}


def hiding(field, seed):
    """Which round hides which genes of a cell: (N, G) in 0 .. ROUNDS - 1; a fifth of a cell's genes
    at a time, other fifths in its neighbours."""
    rng = np.random.default_rng([seed, 11])
    gene, cell = (rng.permutation(n) % ROUNDS for n in (field.cells.n_genes, field.cells.n_cells))
    return torch.tensor((gene[None] + cell[:, None]) % ROUNDS), gene, cell


@torch.no_grad()
def context_genes(field, model, z_own, z_all, rows, context=True, chunk=512):
    """What the context model says of `rows` from z_own (n, d) or None (shows nothing of itself) and
    the surroundings' embeddings z_all (N, d): expression (n, G) of its head, and the head's hidden
    layer (n, 2d), numpy."""
    squares, out = square_means(z_all, field), []
    for s in range(0, len(rows), chunk):
        part = rows[s : s + chunk]
        on = torch.full((len(part),), context, device=z_all.device)
        u = model(
            None if z_own is None else z_own[s : s + chunk],
            *surroundings(field, z_all, squares, part),
            on,
        )
        out.append((model.heads(u)[0], model.trunk(u)))
    return [torch.cat(a).cpu().numpy() for a in zip(*out)]


def readout(linear, inner, y, head, fit, rows):
    """Mean of the network's head and of a ridge on [linear terms, the head's hidden layer], fitted
    on training cells. Few cells make a network that is alone in finding the linear part lose to
    ridge; the record has both parts. linear (N, p), inner (N, q), y (n_fit, m), head (n, m) -> (n,
    m)."""
    x = np.concatenate([linear, inner], 1)
    return (ridge(x[fit], y, x[rows]) + head) / 2


def task_imputation(session, field, cell, context, keep):
    """A fifth of a cell's genes is hidden, its neighbours hide other fifths; five rounds, so that
    every value is predicted once."""
    when, gene_fold, cell_fold = hiding(field, session.config.seed)
    fit, rows, (n, n_genes) = field.rows["train"], field.rows["test"], field.counts.shape
    everyone, at, niche = np.concatenate([fit, rows]), np.arange(n), field.niche.numpy()
    full = {part: table(field, part)[:, :-1] for part in ("train", "test")}
    visible = np.zeros((ROUNDS, n, n_genes + 1), np.float32)
    said = {
        on: [np.zeros((ROUNDS, n, m), np.float32) for m in (n_genes, context.genes.in_features)]
        for on in (True, False)
    }
    for r in range(ROUNDS):
        visible[r, everyone] = np.concatenate(
            [a.cpu().numpy() for a in field.expression(everyone, when[everyone] == r)], 1
        )
        z = embed_all(cell, field, when == r, "fused")["fused"]
        for on, (head, inner) in said.items():
            head[r, everyone], inner[r, everyone] = context_genes(
                field, context, z[everyone], z, everyone, on
            )
    names = (
        "model",
        "model_own",
        "network",
        "gene_mean",
        "knn",
        "neighbours",
        "ridge",
        "ridge_context",
        "pca",
    )
    guess = {name: np.zeros((len(rows), n_genes)) for name in names}
    # the genes of one fold; every cell in the round that hides them
    for f in range(ROUNDS):
        genes, round_of = gene_fold == f, (f + cell_fold) % ROUNDS
        # (N, G + 1); hidden values count as the mean, 0
        own, beside = visible[round_of, at], visible[round_of[:, None], niche].mean(1)
        both, y = np.concatenate([own, beside], 1), full["train"][:, genes]
        seen = (
            (when.numpy()[niche] != round_of[:, None, None])[..., genes]
            .mean(1)
            .clip(1 / niche.shape[1])
        )
        for name, on, linear in (("model", True, both), ("model_own", False, own)):
            head, inner = (a[round_of, at] for a in said[on])
            guess[name][:, genes] = readout(linear, inner, y, head[rows][:, genes], fit, rows)
            if on:
                guess["network"][:, genes] = head[rows][:, genes]
        guess["neighbours"][:, genes] = beside[rows][:, :-1][:, genes] / seen[rows]
        guess["ridge"][:, genes], guess["ridge_context"][:, genes] = (
            ridge(x[fit], y, x[rows]) for x in (own, both)
        )
        guess["knn"][:, genes] = knn(own[fit][:, :-1], y, own[rows][:, :-1])
        guess["pca"][:, genes] = low_rank(full["train"], own[rows][:, :-1], genes)
    keep |= {"imputed": guess["model"].astype(np.float32), "expression": full["test"]}
    return split_scores(
        {
            name: gene_scores(full["test"], g, detected(field), "impute")
            for name, g in guess.items()
        },
        "impute",
    )


def split_scores(scores, prefix):
    """Scores by predictor -> those of the model (with `model_own` without surroundings, and its
    network part alone), and the baselines."""
    own = scores.pop("model")
    for name, key in (("model_own", "own"), ("network", "network")):
        own[f"{prefix}_{key}_pcc_mean"] = scores.pop(name)[f"{prefix}_pcc_mean"]
    return own, scores


def low_rank(x, at, genes, rank=15):
    """Probabilistic reading of PCA: scores of `at` from the visible genes by ridge on the loadings,
    hidden genes from the scores."""
    pca = PCA(min(rank, *x.shape), random_state=0).fit(x)
    seen = pca.components_[:, ~genes]  # (r, visible)
    noise = max(float(np.mean(np.var(x - pca.inverse_transform(pca.transform(x)), axis=0))), 1e-6)
    inner = seen @ seen.T + np.diag(noise / pca.explained_variance_)
    return (at - pca.mean_)[:, ~genes] @ seen.T @ np.linalg.inv(inner) @ pca.components_[
        :, genes
    ] + pca.mean_[genes]


def density(field, part):
    """-log distance to the 5th and the farthest neighbour of the niche, in px: (n, 2)."""
    rows, xy = field.rows[part], field.cells.xy
    # (n, k), ascending
    apart = np.linalg.norm(xy[field.niche[rows].numpy()] - xy[rows][:, None], axis=-1)
    return -np.log(apart[:, [min(4, apart.shape[1] - 1), -1]] + 1)


def task_image_to_genes(session, field, cell, context, keep):
    """image -> genes: from the cell's own picture, and with the pictures of its surroundings; never
    from anyone's expression."""
    fit, rows = field.rows["train"], field.rows["test"]
    everyone, n_fit = np.concatenate([fit, rows]), len(fit)
    y, true = table(field, "train")[:, :-1], table(field, "test")[:, :-1]
    crops = [field.cells.crops[r] for r in (fit, rows)]
    shape = pictures.ImageFeatures().fit(crops[0])
    features, near = [shape(c) for c in crops], [density(field, p) for p in ("train", "test")]
    linear = [np.hstack(a) for a in zip(features, near)]
    beside = np.zeros((field.cells.n_cells, linear[0].shape[1]))
    beside[everyone] = np.concatenate(linear)
    both = [
        np.hstack([a, beside[field.niche[r].numpy()].mean(1)]) for a, r in zip(linear, (fit, rows))
    ]
    z, at = embed_all(cell, field, modality="img")["img"], np.arange(len(everyone))
    guess = {}
    for name, on, terms in (("model", True, both), ("model_own", False, linear)):
        head, inner = context_genes(field, context, z[everyone], z, everyone, on)
        guess[name] = readout(np.concatenate(terms), inner, y, head[n_fit:], at[:n_fit], at[n_fit:])
        guess.setdefault("network", head[n_fit:])
    plain = [
        np.concatenate([pictures.morphology(c[:, 0] / 255.0, shape.thresholds[0]), d], 1)
        for c, d in zip(crops, near)
    ]
    pca = PCA(min(50, n_fit - 1), random_state=0).fit(crops[0].reshape(n_fit, -1) / 255)
    low = [pca.transform(c.reshape(len(c), -1) / 255) for c in crops]
    guess |= {
        "ridge_morphology_density": ridge(plain[0], y, plain[1]),
        "ridge_image_pca": ridge(low[0], y, low[1]),
        "knn": knn(low[0], y, low[1]),
        "ridge_features_density": ridge(linear[0], y, linear[1]),
        "ridge_features_context": ridge(both[0], y, both[1]),
        "gene_mean": np.zeros_like(true),
    }
    keep |= {"image_to_genes": guess["model"].astype(np.float32)}
    return split_scores(
        {
            name: gene_scores(true, g, detected(field), "image_to_genes")
            for name, g in guess.items()
        },
        "image_to_genes",
    )


@torch.no_grad()
def representations(field, cell, context):
    """Frozen embeddings of all cells: z (with surroundings), z_cell, z_img, z_gene, each (N, d)
    numpy."""
    found = embed_all(cell, field)
    rows, fused = np.concatenate([field.rows[p] for p in PARTS]), found["fused"]
    squares, z = square_means(fused, field), torch.zeros_like(fused)
    for part in np.array_split(rows, -(-len(rows) // 512)):
        z[part] = context(fused[part], *surroundings(field, fused, squares, part))
    return {
        "z": z.cpu().numpy(),
        "z_cell": fused.cpu().numpy(),
        "z_img": found["img"].cpu().numpy(),
        "z_gene": found["gene"].cpu().numpy(),
    }


def coherence(field, rows, cluster):
    """`metrics.spatial_coherence`, mean over the sections, by their cells."""
    section = field.cells.section[rows]
    names, n = np.unique(section, return_counts=True)
    return float(
        np.average(
            [
                metrics.spatial_coherence(cluster[section == s], field.cells.xy[rows][section == s])
                for s in names
            ],
            weights=n,
        )
    )


def task_labels(session, field, z):
    """Annotation (logistic regression on frozen embeddings) and clustering (k-means, K = number of
    classes: oracle) where the file has labels."""
    labels, fit, rows, n_classes = (
        field.cells.labels,
        field.rows["train"],
        field.rows["test"],
        len(field.cells.classes),
    )
    fit, score = fit[labels[fit] >= 0], rows[labels[rows] >= 0]
    if not len(score) or len(np.unique(labels[fit])) < 2:
        return {}, {}
    x_fit, x = table(field, "train"), table(field, "test")
    at = np.flatnonzero(labels[field.rows["train"]] >= 0), np.flatnonzero(labels[rows] >= 0)
    inputs = {name: (v[fit], v[score]) for name, v in z.items()}
    pca = PCA(min(30, x_fit.shape[1] - 1), random_state=0).fit(x_fit)
    crops = [field.cells.crops[r].reshape(len(r), -1) / 255 for r in (fit, score)]
    image = PCA(min(50, len(fit) - 1), random_state=0).fit(crops[0])
    inputs |= {
        "pca_expression": (pca.transform(x_fit[at[0]]), pca.transform(x[at[1]])),
        "pca_image": tuple(image.transform(c) for c in crops),
    }
    inputs["pca_both"] = tuple(
        np.hstack([a, b]) for a, b in zip(inputs["pca_expression"], inputs["pca_image"])
    )
    own, others = {}, {}
    for name, (a, b) in inputs.items():
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(
            a, labels[fit]
        )
        prob = np.zeros((len(b), n_classes))
        prob[:, model.classes_] = model.predict_proba(b)
        s = metrics.classification(labels[score], prob)
        scaler = StandardScaler().fit(a)
        cluster = (
            KMeans(n_classes, n_init=10, random_state=session.config.seed)
            .fit(scaler.transform(a))
            .predict(scaler.transform(b))
        )
        c = metrics.clustering(labels[score], cluster)
        s = {
            "annotation_macro_f1": s["macro_f1"],
            "annotation_accuracy": s["accuracy"],
            "annotation_balanced_accuracy": s["balanced_accuracy"],
            "clustering_ari": c["ari"],
            "clustering_nmi": c["nmi"],
            "clustering_coherence": coherence(field, score, cluster),
        }
        if name.startswith("pca"):
            others[name] = s
        else:
            own |= {k if name == "z" else f"{k}_{name}": v for k, v in s.items()}
    return own, others


# --------------------------------------------------------------------------------------------------
# The program
# --------------------------------------------------------------------------------------------------


def variant(config):
    """Name of the run's folder: preset and path, then every flag of the method that is not at its
    default."""
    plain = (
        "data",
        "slice",
        "seed",
        "device",
        "threads",
        "deterministic",
        "runs",
        "preset",
        "path",
        "save_every",
        "resume",
        "fold",
        "score",
    )
    more = [
        f"{f.name}-{getattr(config, f.name)}"
        for f in fields(config)
        if f.name not in plain and getattr(config, f.name) != f.default
    ]
    return "-".join([config.preset, config.path, *more]).replace(" ", "")


def check(config):
    """Raises DataError naming the flag that has an impossible value."""
    one, zero = run.AT_LEAST_ONE, run.AT_LEAST_ZERO
    run.check_flags(
        config,
        {
            "test_every": (lambda v: v >= 2, "at least 2"),
            "width": run.POSITIVE,
            "buffer": zero,
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


def load(config, size, device):
    """Field of the cells with the split that is scored: as test cells the test part, or with
    --score val the validation part."""
    cells = data.load_cells(config.data)
    channels, side = cells.crops.shape[1:3]
    for p in (size.patch, size.decoder_patch):
        if side % p or side // p % 2:
            raise DataError(
                f"{config.data}: crops of {side} px cannot be cut into an even number of "
                f"patches of {p} px: "
                "convert with another crop size"
            )
    split = data.cell_split(
        cells,
        config.test_every,
        config.width,
        None,
        config.buffer,
        0 if config.score == "test" else 4,
        config.fold,
    )
    if config.score == "val":
        split.test, split.val, split.name = split.val, np.zeros_like(split.val), f"{split.name}-val"
    return Field(cells, split, size, device)


class Clock:
    """Seconds of each step of a run."""

    def __init__(self):
        self.seconds, self.tick = {}, time.perf_counter()

    def lap(self, name):
        self.seconds[name], self.tick = (
            round(time.perf_counter() - self.tick, 1),
            time.perf_counter(),
        )


def train(session, field, clock):
    """The three stages -> models {cell, context, generator}, losses {A, B, C}, the generator's
    conditions (None without it)."""
    config, size, n_genes, device = (
        session.config,
        session.size,
        field.cells.n_genes,
        session.device,
    )
    models, losses, conditions = {}, {}, None
    cell = CellModel(field.shape, n_genes, size, config.fusion)
    cell.gene.start(table(field, "train")[:, :-1])
    for part in (cell.to(device).image, cell.gene):
        run.compiled(part, config)
    models["cell"], losses["A"] = stage_a(session, field, cell)
    clock.lap("stage_a")
    # an ablation of one stage leaves the start of the next alone
    torch.manual_seed(config.seed + 1)
    context = run.compiled(
        ContextModel(n_genes, size, config.niche, config.tissue).to(device), config
    )
    models["context"], losses["B"] = stage_b(session, field, models["cell"], context)
    clock.lap("stage_b")
    if config.generate:
        torch.manual_seed(config.seed + 2)
        generator = Generator(
            field.shape,
            n_genes,
            size,
            models["cell"].gene,
            config.condition,
            config.niche,
            config.tissue,
            config.path,
        )
        conditions = Conditions(field, models["cell"])
        models["generator"], losses["C"] = stage_c(
            session, field, conditions, run.compiled(generator.to(device), config)
        )
        clock.lap("stage_c")
    return models, losses, conditions


def main(argv=None):
    """Train the three stages, score every task."""
    start = time.perf_counter()
    config = run.parse(Config, argv, __doc__.split("\n")[0])
    check(config)
    size, path, clock = PRESETS[config.preset], Path(config.data), Clock()
    part = ("val" if config.score == "val" else "test") + f"-fold{config.fold}"
    record = run.Run(
        "spatia",
        config,
        part,
        variant(config),
        start,
        path.resolve().parent.name if path.name == "cells.h5" else path.stem,
    )
    field = load(config, size, record.device)
    say = print if record.rank == 0 else (lambda *a, **k: None)
    say(
        f"{path.name}: {len(field.rows['train'])} cells train, {len(field.rows['test'])} are "
        f"scored ({field.split.detail}); "
        f"{field.cells.n_genes} genes, crops {field.shape[0]} x {field.shape[1]} x "
        f"{field.shape[1]}",
        flush=True,
    )
    checksum = data.file_checksum(config.data)
    session, keep, tasks = Session(config, record, size, checksum), {}, []
    models, losses, conditions = train(session, field, clock)
    cell, context = models["cell"], models["context"]
    if config.generate:
        tasks.append(task_generation(session, field, conditions, models["generator"], keep))
        clock.lap("generation")
    z = representations(field, cell, context)
    tasks += [
        task_imputation(session, field, cell, context, keep),
        task_image_to_genes(session, field, cell, context, keep),
        task_labels(session, field, z),
    ]
    clock.lap("tasks")
    found, others = {k: v for own, _ in tasks for k, v in own.items()}, {}
    for _, baselines in tasks:
        for name, s in baselines.items():
            others.setdefault(name, {}).update(s)
    found |= {f"loss_{k}": float(np.mean(v[-50:])) for k, v in losses.items()}
    report_lines(say, found, others)
    rows = field.rows["test"]
    arrays = (
        keep
        | {
            "ids": field.cells.ids[rows],
            "xy": field.cells.xy[rows],
            "labels": field.cells.labels[rows],
            "genes": field.cells.genes,
            "crops": field.cells.crops[rows],
        }
        | {k: v[rows] for k, v in z.items()}
    )
    if record.rank == 0:
        draw(record, field, keep, z, losses)
    state = {
        "config": resumable(config),
        "genes": [str(g) for g in field.cells.genes],
        "normaliser": field.normalise.state(),
        **{k: m.state_dict() for k, m in models.items()},
    }
    record.finish(
        found,
        others,
        arrays,
        sum(p.numel() for m in models.values() for p in m.parameters()),
        field.split,
        checksum,
        {"model.pt": lambda f: torch.save(state, f)},
        stage_seconds=clock.seconds,
        n_train=len(field.rows["train"]),
        n_scored=len(rows),
    )
    return 0


def report_lines(say, found, others):
    """The printed table: a line for the model and for each baseline, with the scores that it
    has."""
    for name, s in [("spatia", found), *others.items()]:
        shown = {k: v for k, v in s.items() if not k.startswith("loss") and "median" not in k}
        say(f"{name:<26}" + "  ".join(f"{k} {v:.3f}" for k, v in shown.items()), flush=True)


def picture(x):
    """(C, S, S) uint8 -> (S, S, 3): the channels as red, green, blue; one channel is grey."""
    x = x[:3] if len(x) > 1 else x.repeat(3, 0)
    return np.concatenate([x, np.zeros((3 - len(x), *x.shape[1:]), x.dtype)]).transpose(1, 2, 0)


def draw(record, field, keep, z, losses):
    """Generated beside real cells by quantile of an expression score, map of the embedding in the
    tissue, loss curves."""
    rows = field.rows["test"]
    if "generated" in keep:
        x = keep["expression"]
        r = np.nan_to_num(metrics.pcc(x, np.repeat(keep["probes_real"][:, 1:2], x.shape[1], 1)))
        gene = int(np.argmax(np.where(detected(field), np.abs(r), -1)))
        groups = np.array_split(np.argsort(x[:, gene], kind="stable"), 5)
        figure, axes = plt.subplots(10, 8, figsize=(8, 10.5))
        for axis in axes.flat:
            axis.set_axis_off()
        for i, group in enumerate(groups):
            for j, cell in enumerate(
                group[np.linspace(0, len(group) - 1, min(8, len(group))).astype(int)]
            ):
                axes[2 * i, j].imshow(picture(field.cells.crops[rows[cell]]))
                axes[2 * i + 1, j].imshow(picture(keep["generated"][cell]))
            axes[2 * i, 0].set_title(
                f"{field.cells.genes[gene]}, fifth {i + 1}: real above, generated below",
                fontsize=7,
                loc="left",
            )
        record.figure("generated", figure)
    figure, axes = plt.subplots(1, 3, figsize=(12, 4))
    colour = PCA(3).fit_transform(z["z"][rows])
    colour = np.clip(
        (colour - np.percentile(colour, 2, 0))
        / (np.percentile(colour, 98, 0) - np.percentile(colour, 2, 0) + 1e-9),
        0,
        1,
    )
    section = field.cells.section[rows] == field.cells.section[rows][0]
    axes[0].scatter(*field.cells.xy[rows][section].T, c=colour[section], s=8, linewidths=0)
    axes[0].set(title="first three components of z as colours", aspect="equal")
    axes[0].invert_yaxis()
    flat = PCA(2).fit_transform(z["z"][rows])
    labels = field.cells.labels[rows]
    axes[1].scatter(
        *flat.T,
        s=6,
        linewidths=0,
        **({"c": labels, "cmap": "tab10"} if (labels >= 0).any() else {"c": colour}),
    )
    axes[1].set_title("z, two components" + (", coloured by class" if (labels >= 0).any() else ""))
    for name, values in losses.items():
        smooth = np.convolve(values, np.ones(20) / 20, "valid") if len(values) > 60 else values
        axes[2].plot(np.linspace(0, 1, len(smooth)), smooth, label=name)
    axes[2].set(title="loss of the stages", xlabel="share of the steps")
    axes[2].legend()
    record.figure("embedding", figure)
    plt.close("all")


if __name__ == "__main__":
    run.cli(main)
