r"""Single cells: picture x expression x surroundings, and pictures that are generated from genes.

Source: Kong et al., "SPATIA: Multimodal Model for Prediction and Generation of Spatial Cell
Phenotypes", arXiv 2507.04704 v1 (2025). The page beside this file is docs/spatia.md.

    A   picture x --patches, ViT------------> X_img (1+P, d) --.  cross-attention
                                                               |-- both ways ---> z_cell (d)
        counts g --M latents read G tokens--> X_gene (M, d) ---'

    B   niche: z_cell of the k nearest others ---> z_niche (d) --.  z = LN(z_cell
                                                                 |--  + g_n W_n z_niche
        tissue: means of the t nearest squares --> z_tissue (d) -'    + g_t W_t z_tissue)

    C   noise x_0 --> x_t --> DiT, self-attention on merged tokens ---------------> picture x
        own and neighbours' EXPRESSION --> Y --cross-attention--^

| symbol | meaning | shape |
|---|---|---|
| $x$ | picture of the cell, in [-1, 1] | (C, S, S) |
| $v$ | standardised expression of its counts | (G,) |
| $X^{img}, X^{gene}$ | tokens of the picture, of the expression | (1+P, d), (M, d) |
| $E_g$ | learned name of gene g | (d,) |
| $z^{cell}$ | the cell alone; from one modality or both | (d,) |
| $z^{niche}, z^{tissue}$ | its surroundings, the cell itself excluded | (d,) |
| $z$ | the cell in its surroundings | (d,) |
| $x_t$ | point of the path from noise (t = 0) to the picture (t = 1) | (C, S, S) |
| $Y$ | condition of the generator, counts only | (M+4, e) |
| $\rho$ | share of the N decoder tokens that are merged | |

Every run scores the network beside the predictors it has to beat (evaluation/cells.py).

    python spatia.py --data datasets/ca1/cells.h5 --seed 0
    python spatia.py --data cells.h5 --score val --guidance 0
    torchrun --standalone --nproc_per_node=2 spatia.py --data cells.h5 --size base
"""

import copy
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import nn
from torch.nn import functional as F

from evaluation import cell_runs, new_cells
from evaluation.cell_runs import check, variant  # noqa: F401
from plainst import run
from plainst.cell_batches import cell_batch, context_batch, picture_batch
from plainst.patch_tokens import cut_patches, grid_places, join_patches, sincos
from plainst.stages import ScheduledAdamW, Stages, ema_update, step_generator
from plainst.transformer import Attention, Block, CrossBlock


@dataclass(frozen=True)
class Size:
    """Widths, depths and steps; the defaults are `tiny`, for two CPU cores."""

    dim: int = 64
    heads: int = 2
    ratio: int = 2  # of the widths inside and outside a feed-forward layer
    patch: int = 8
    image_layers: int = 2
    latents: int = 8
    gene_layers: int = 1
    fusion_layers: int = 1
    niche: int = 16  # cells
    niche_layers: int = 1
    tissue: int = 24  # squares
    tissue_layers: int = 1
    decoder_patch: int = 4
    decoder_dim: int = 64
    decoder_heads: int = 2
    decoder_layers: int = 3
    pixel_channels: int = 8  # of the convolutions at pixel resolution
    rho: float = 0.0
    ema: float = 0.995
    steps: tuple = (300, 300, 2000)  # of the stages A, B, C
    batch: tuple = (128, 128, 32)
    lr: tuple = (1e-3, 1e-3, 2e-3)

    @property
    def block(self):
        """Arguments of a transformer block."""
        return self.dim, self.heads, self.ratio


SIZES = {
    "tiny": Size(),
    # the published orders of magnitude
    "base": Size(
        dim=256,
        heads=8,
        ratio=4,
        image_layers=6,
        latents=32,
        gene_layers=4,
        fusion_layers=2,
        niche=32,
        niche_layers=3,
        tissue=256,
        tissue_layers=4,
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

# named sets of flags; what is typed goes before them. The paper states no setting of v1
PRESETS = {"tuned": {}}


@dataclass
class Config(run.Config):
    """Flags of spatia.py."""

    presets: ClassVar = PRESETS

    data: str = "datasets/ca1/cells.h5"
    "cell file (python -m plainst convert ca1|xenium, python -m plainst simulate cells)"
    score: Literal["test", "val"] = "test"
    "which part is scored; val, for choices: train without the validation part, score that"
    test_every: int = 4
    "every how manieth block is held out (files of three sections or more hold out whole sections)"
    width: float = 600.0
    "width of the blocks in full-resolution px"
    buffer: float = -1.0
    "um (px where um_per_px is unknown) around held-out cells without training; -1: crop diagonal"
    fold: int = 0
    "which of the blocks or sections are held out"
    size: Literal["tiny", "base"] = "tiny"
    "tiny: about 1 M parameters, minutes on a CPU; base: for GPUs"
    path: Literal["flow", "ddpm"] = "flow"
    "flow matching on a straight path, Heun steps; or diffusion with v-prediction, DDIM steps"
    rho: float = -1.0
    "share of the decoder's tokens merged before self-attention, 0 to 0.75; -1: the size's"
    condition: Literal["none", "expression", "context"] = "context"
    "what the decoder sees: nothing, the cell's own expression, or its neighbours', too"
    guidance: float = 0.5
    "w of classifier-free guidance, velocity (1 + w) v(condition) - w v(nothing), for t up to 0.6"
    draws: int = 8
    "images generated for each scored cell"
    ode_steps: int = 8
    "steps of the sampler (Heun: two evaluations a step)"
    mae: bool = True
    "hide half of the image patches in stage A and reconstruct them"
    fusion: bool = True
    "cross-attention between image and gene tokens; without it they are only concatenated"
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
    "stage C and the scores of generated images"
    weight_decay: float = 0.05
    "AdamW weight decay"
    save_every: int = 0
    "steps between checkpoints (latest.pt in the run's folder); 0: none"
    resume: bool = False
    "go on from latest.pt"
    predict: str = ""
    "model.pt of a run: embed and cluster the cells of --data with it, train nothing"
    min_shared: float = 0.5
    "with --predict: the least share of the model's genes that the cells must have"


# --------------------------------------------------------------------------------------------------
# The cell: image tokens, gene tokens, fusion, heads of stage A
# --------------------------------------------------------------------------------------------------


class ImageTokenizer(nn.Module):
    r"""ViT on patches (Dosovitskiy et al. 2021); MAE training shows it `keep` of them only (He et
    al. 2022), evaluation all.

    $$X^{img} = \mathrm{LN}\,\mathrm{Blocks}([\mathrm{cls}; W\,\mathrm{patch}_p(x) + \pi_p])
    \tag{1}$$

    Test: test_evaluation_sees_the_whole_image_and_is_deterministic
    """

    def __init__(self, shape, size):
        super().__init__()
        channels, side = shape
        d, self.patch = size.dim, size.patch
        self.embed = nn.Linear(channels * self.patch**2, d)
        self.cls = nn.Parameter(torch.randn(d) * 0.02)
        place = sincos(grid_places(side // self.patch), d)  # (P, d)
        self.register_buffer("place", place, persistent=False)
        self.blocks = nn.ModuleList(Block(*size.block) for _ in range(size.image_layers))
        self.norm = nn.LayerNorm(d)

    def forward(self, x, keep=None):
        """x (B, C, S, S), keep (B, K) patch numbers -> (B, 1 + P, d), or (B, 1 + K, d)."""
        h = self.embed(cut_patches(x, self.patch)) + self.place  # (B, P, d)
        if keep is not None:
            h = h.gather(1, keep[..., None].expand(-1, -1, h.shape[-1]))  # (B, K, d)
        h = torch.cat([self.cls.expand(len(h), 1, -1), h], 1)  # (B, 1 + K, d)
        for block in self.blocks:
            h = block(h)
        return self.norm(h)


class GeneTokenizer(nn.Module):
    r"""M learned latents read the G gene tokens (Perceiver, Jaegle et al. 2021): O(M G), no gene x
    gene attention.

    $$X^{gene} = \mathrm{LN}\,\mathrm{Blocks}\big(\mathrm{Cross}(\ell + W v,\;
    [E_g + \mathrm{MLP}(v_g);\, \mathrm{depth}])\big) \tag{2}$$

    A hidden gene has a learned vector instead of its value. W starts at the principal components
    of the training cells (`init_from_pca`): a few hundred steps of attention do not find them.

    Test: test_gene_tokens_start_at_the_principal_components
    """

    def __init__(self, n_genes, size):
        super().__init__()
        d = size.dim
        self.name = nn.Parameter(torch.randn(n_genes, d) * d**-0.5)  # E
        self.value = nn.Sequential(nn.Linear(1, d), nn.GELU(), nn.Linear(d, d))
        self.linear = nn.Linear(n_genes, d, bias=False)
        self.masked = nn.Parameter(torch.zeros(d))
        self.depth = nn.Linear(1, d)
        self.latents = nn.Parameter(torch.randn(size.latents, d) * 0.02)
        self.read = CrossBlock(*size.block)
        self.blocks = nn.ModuleList(Block(*size.block) for _ in range(size.gene_layers))
        self.norm = nn.LayerNorm(d)

    @torch.no_grad()
    def init_from_pca(self, x):
        """W becomes the principal axes of x (n, G), over the standard deviation of the first."""
        pca = PCA(min(len(self.linear.weight), *x.shape), random_state=0).fit(x)
        axes = pca.components_ / np.sqrt(pca.explained_variance_[0] + 1e-9)  # (<= d, G)
        self.linear.weight.zero_()[: len(axes)] = torch.tensor(axes, dtype=torch.float32)
        return self

    def forward(self, v, depth, hidden=None):
        """v (B, G), depth (B, 1), hidden (B, G) bool or None -> X_gene (B, M, d)."""
        value = self.value(v[..., None])  # (B, G, d)
        if hidden is not None:
            value = torch.where(hidden[..., None], self.masked, value)
            v = v.masked_fill(hidden, 0)
        tokens = torch.cat([self.name + value, self.depth(depth)[:, None]], 1)  # (B, G + 1, d)
        h = self.read(self.latents + self.linear(v)[:, None], tokens)  # (B, M, d)
        for block in self.blocks:
            h = block(h)
        return self.norm(h)


class CellModel(nn.Module):
    r"""z_cell of picture and expression, either or both, and the two reconstructions of stage A.

    $$X^{img\prime} = X^{img} + a_1 \odot \mathrm{Attn}(X^{img}, X^{gene}), \qquad
    X^{gene\prime} = X^{gene} + a_2 \odot \mathrm{Attn}(X^{gene}, X^{img}) \tag{3}$$

    $$z^{cell} = \mathrm{LN}\big(W [X^{img\prime}_{cls};\,
    \mathrm{mean}_m X^{gene\prime}_m]\big) \tag{4}$$

    An absent modality is a learned set of tokens. a_1, a_2: .1 at first.

    Test: test_the_cell_equals_its_equations
    """

    def __init__(self, shape, n_genes, size, fusion=True, has_pictures=True):
        super().__init__()
        d, layers, self.has_pictures = size.dim, size.fusion_layers if fusion else 0, has_pictures
        self.n_patches = (shape[1] // size.patch) ** 2
        self.image, self.gene = ImageTokenizer(shape, size), GeneTokenizer(n_genes, size)
        self.absent_img = nn.Parameter(torch.randn(4, d) * 0.02)
        self.absent_gene = nn.Parameter(torch.randn(size.latents, d) * 0.02)
        self.to_img = nn.ModuleList(CrossBlock(*size.block, 0.1) for _ in range(layers))
        self.to_gene = nn.ModuleList(CrossBlock(*size.block, 0.1) for _ in range(layers))
        self.join, self.norm = nn.Linear(2 * d, d), nn.LayerNorm(d)
        self.hidden = nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.Linear(d, d))
        self.query, self.to_value = Attention(d, size.heads), nn.Linear(d, 1)
        self.bias = nn.Parameter(torch.zeros(n_genes))
        self.mask_token = nn.Parameter(torch.zeros(d))
        self.mae_block = Block(*size.block)
        self.pixels = nn.Linear(d, shape[0] * size.patch**2)
        self.log_tau = nn.Parameter(torch.tensor(0.1).log())

    def fuse(self, x_img=None, x_gene=None, has_img=None, has_gene=None):
        """Tokens of the modalities that are there (None or a False in has_* (B,): not) -> z_cell
        (B, d), X_img' (B, 1+P, d), X_gene' (B, M, d)."""
        if x_img is None:
            x_img = self.absent_img.expand(len(x_gene), -1, -1)
        elif has_img is not None:
            repeats = -(-x_img.shape[1] // len(self.absent_img))
            absent = self.absent_img.repeat(repeats, 1)[: x_img.shape[1]]  # (1 + P, d)
            x_img = torch.where(has_img[:, None, None], x_img, absent)
        if x_gene is None:
            x_gene = self.absent_gene.expand(len(x_img), -1, -1)
        elif has_gene is not None:
            x_gene = torch.where(has_gene[:, None, None], x_gene, self.absent_gene)
        for to_img, to_gene in zip(self.to_img, self.to_gene):
            x_img, x_gene = to_img(x_img, x_gene), to_gene(x_gene, x_img)
        pooled = torch.cat([x_img[:, 0], x_gene.mean(1)], -1)  # (B, 2 d)
        return self.norm(self.join(pooled)), x_img, x_gene

    def genes(self, z, x_img, x_gene):
        r"""Values of all genes, from the cell and from what each gene's name reads in the tokens.

        $$\hat v_g = E_g \cdot h(z^{cell}) + w^\top \mathrm{Attn}(E_g, [X^{img\prime};
        X^{gene\prime}]) + b_g \tag{5}$$

        -> (B, G). Test: test_the_cell_equals_its_equations
        """
        name = self.gene.name
        read = self.query(name[None], torch.cat([x_img, x_gene], 1))  # (B, G, d)
        return self.hidden(z) @ name.T + self.to_value(read)[..., 0] + self.bias

    def mae_decode(self, x_img, keep):
        """X_img' of the kept patches -> all (B, P, C p p): mask tokens and one block (MAE)."""
        h = self.mask_token.expand(len(keep), self.n_patches, -1)
        index = keep[..., None].expand(-1, -1, x_img.shape[-1])
        h = h.scatter(1, index, x_img[:, 1:]) + self.image.place  # (B, P, d)
        h = self.mae_block(torch.cat([x_img[:, :1], h], 1))  # (B, 1 + P, d)
        return self.pixels(h[:, 1:])


def info_nce(a, b, log_tau, rows):
    r"""Symmetric InfoNCE (Oord et al. 2018, Eq. 4) of the whole batch, a, b (B, d).

    $$\mathcal{L}_{NCE} = -\tfrac12 \sum_i \Big[\log \frac{e^{s_{ii}/\tau}}{\sum_j e^{s_{ij}/\tau}}
    + \log \frac{e^{s_{ii}/\tau}}{\sum_j e^{s_{ji}/\tau}}\Big], \qquad
    s_{ij} = \cos(a_i, b_j) \tag{6}$$

    The value is the sum over the `rows` of this process, the gradient that of the whole batch.

    Test: test_info_nce_is_the_symmetric_cross_entropy
    """
    score = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T / log_tau.exp().clamp(min=0.01)
    target = torch.arange(len(a), device=a.device)
    b_of_a = F.cross_entropy(score, target, reduction="none")  # (B,)
    a_of_b = F.cross_entropy(score.T, target, reduction="none")  # (B,)
    loss = (b_of_a + a_of_b) / 2
    # another process cannot send a gradient through its copy of these rows
    return loss.sum() + (loss[rows].sum() - loss.sum()).detach()


# --------------------------------------------------------------------------------------------------
# Context: niche, tissue, gated union
# --------------------------------------------------------------------------------------------------


class SetTransformer(nn.Module):
    r"""A query that reads a set of which the cell itself is no member: niche, tissue.

    $$h = \mathrm{Blocks}([\nu;\, W u_j + W_\pi \pi(p_j)]), \qquad
    z^{set} = \mathrm{LN}\,\mathrm{Cross}(W_q\,\mathrm{mean}_j h_j,\, h) \tag{7}$$

    The learned token nu is always there, so an empty set is no softmax over nothing. Without
    `has_places` only who is near counts, not where.

    Test: test_set_transformer_ignores_absent_members_and_bears_none
    """

    def __init__(self, dim, heads, ratio, layers, has_places=True, longest=10.0):
        super().__init__()
        self.longest = longest
        self.inside = nn.Linear(dim, dim)
        self.place = nn.Linear(dim, dim) if has_places else None
        self.nothing = nn.Parameter(torch.randn(dim) * 0.02)
        self.query = nn.Linear(dim, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, ratio) for _ in range(layers))
        self.read, self.norm = CrossBlock(dim, heads, ratio), nn.LayerNorm(dim)

    def forward(self, members, places, exists=None):
        """members (B, k, d), places (B, k, 2), exists (B, k) bool or None (all) -> (B, d)."""
        h = self.inside(members)  # (B, k, d)
        if self.place is not None:
            h = h + self.place(sincos(3 * places, h.shape[-1], self.longest))
        h = torch.cat([self.nothing.expand(len(h), 1, -1), h], 1)  # (B, 1 + k, d)
        bias, used = None, h.new_ones(h.shape[:2])  # (B, 1 + k)
        if exists is not None:
            used = F.pad(exists, (1, 0), value=True).to(h.dtype)
            bias = torch.zeros_like(used).masked_fill(used == 0, -1e9)[:, None, None]
        for block in self.blocks:
            h = block(h, bias)
        mean = (h * used[..., None]).sum(1, keepdim=True) / used.sum(1)[:, None, None]  # (B, 1, d)
        return self.norm(self.read(self.query(mean), h, bias))[:, 0]


class ContextModel(nn.Module):
    r"""The cell in its surroundings; gates .1 at first. Heads of stage B: expression, z_cell.

    $$z = \mathrm{LN}(z^{cell} + g_n W_n z^{niche} + g_t W_t z^{tissue}) \tag{8}$$

    Test: test_the_union_equals_its_equation
    """

    def __init__(self, n_genes, size, niche=True, tissue=True):
        super().__init__()
        d = size.dim
        self.niche = self.tissue = None
        if niche:
            self.niche = SetTransformer(*size.block, size.niche_layers)
        if tissue:
            self.tissue = SetTransformer(*size.block, size.tissue_layers, longest=100.0)
        self.from_niche, self.from_tissue = nn.Linear(d, d), nn.Linear(d, d)
        self.gates = nn.Parameter(torch.full((2,), 0.1))
        self.absent = nn.Parameter(torch.randn(d) * 0.02)
        self.norm = nn.LayerNorm(d)
        self.trunk = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU())
        self.genes, self.cell = nn.Linear(2 * d, n_genes), nn.Linear(2 * d, d)

    def forward(self, z, near, near_places, far, far_places, far_exists, has_context=None):
        """z (B, d) or None (the cell itself is hidden), the five of `CellDataset.surroundings`,
        has_context (B, 2) bool: rows that have a niche, a tissue; None: all -> (B, d)."""
        if z is None:
            z = self.absent.expand(len(near), -1)
        gates = self.gates.expand(len(z), -1)  # (B, 2)
        if has_context is not None:
            gates = gates * has_context
        if self.niche is not None:
            z = z + gates[:, :1] * self.from_niche(self.niche(near, near_places))
        if self.tissue is not None:
            tissue = self.tissue(far, far_places, far_exists)
            z = z + gates[:, 1:] * self.from_tissue(tissue)
        return self.norm(z)

    def heads(self, z):
        """-> standardised expression (B, G), z_cell (B, d)."""
        h = self.trunk(z)  # (B, 2 d)
        return self.genes(h), self.cell(h)


# --------------------------------------------------------------------------------------------------
# The decoder: spatially limited token merging, DiT blocks, paths
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def merge_groups(f, rho, choice=None):
    r"""Spatially guided bipartite merging (ToMe, Bolya et al. 2023, with a limit on the distance;
    the paper names token merging and tells no algorithm, this form is ours).

    One token of every 2 x 2 cell of the grid is a destination b, the others are sources a; the
    round(rho N) sources of highest score join their best destination.

    $$s_{ab} = \begin{cases} \cos(f_a, f_b) & \lVert p_a - p_b \rVert_\infty \le 2 \\
    -\infty & \text{else} \end{cases} \tag{9}$$

    f (B, N, d) tokens of a square grid, choice (B, N/4) in 0..3: which of the cell is the
    destination, None: the top-left one -> groups (B, N - r, N), one-hot columns: row = a merged
    token, column = a token.

    Test: test_merging_equals_the_naive_matching
    """
    batch, n, width = f.shape
    side = round(n**0.5)
    n_merged = min(round(rho * n), n - n // 4)
    token = torch.arange(n, device=f.device)
    cells = token.view(side // 2, 2, side // 2, 2).permute(0, 2, 1, 3).reshape(-1, 4)  # (N/4, 4)
    if choice is None:
        choice = torch.zeros(batch, n // 4, dtype=torch.long, device=f.device)
    is_destination = F.one_hot(choice, 4).bool()  # (B, N/4, 4)
    cells = cells.expand(batch, -1, -1)
    destination = cells[is_destination].view(batch, -1)  # (B, N/4)
    source = cells[~is_destination].view(batch, -1)  # (B, 3N/4)
    f = F.normalize(f, dim=-1)
    f_source = f.gather(1, source[..., None].expand(-1, -1, width))
    f_destination = f.gather(1, destination[..., None].expand(-1, -1, width))
    score = f_source @ f_destination.transpose(1, 2)  # (B, 3N/4, N/4)
    place = torch.stack([token // side, token % side], -1)  # (N, 2)
    distance = (place[source][:, :, None] - place[destination][:, None]).abs().amax(-1)
    score = score.masked_fill(distance > 2, -torch.inf)
    best_score, best = score.max(-1)  # (B, 3N/4)
    order = best_score.argsort(dim=-1, descending=True, stable=True)
    merged, single = order[:, :n_merged], order[:, n_merged:]
    # new numbers: destinations first, then the sources that stay alone
    group = torch.empty(batch, n, dtype=torch.long, device=f.device)
    group.scatter_(1, destination, token[: n // 4].expand(batch, -1))
    group.scatter_(1, source.gather(1, merged), best.gather(1, merged))
    group.scatter_(1, source.gather(1, single), token[n // 4 : n - n_merged].expand(batch, -1))
    return F.one_hot(group, n - n_merged).transpose(1, 2).to(f.dtype)


def merged_attention(attention, x, rho, choice=None):
    r"""Self-attention on N - r means of groups, copied back to all N tokens; the size of a group
    counts (proportional attention); rho 0: plain attention.

    $$y = A^\top \mathrm{Attn}\big(A x / s,\; b = \log s\big), \qquad s = A \vec{1} \tag{10}$$

    Test: test_proportional_attention_equals_attention_on_copies
    """
    if rho == 0:
        return attention(x)
    groups = merge_groups(x, rho, choice)  # (B, N - r, N)
    size = groups.sum(-1)  # (B, N - r)
    merged = groups @ x / size[..., None]  # (B, N - r, d)
    read = attention(merged, bias=size.log()[:, None, None])
    return groups.transpose(1, 2) @ read  # (B, N, d)


class DiTBlock(nn.Module):
    r"""DiT block with adaLN-zero (Peebles & Xie 2023) and cross-attention on the condition.

    $$h \leftarrow h + \gamma_1 \odot \mathrm{Merged}((1 + \beta_1) \odot \mathrm{LN}\,h +
    \alpha_1), \quad h \leftarrow h + \mathrm{Attn}(\mathrm{LN}\,h, Y), \quad
    h \leftarrow h + \gamma_2 \odot \mathrm{FFN}((1 + \beta_2) \odot \mathrm{LN}\,h + \alpha_2)
    \tag{11}$$

    alpha, beta, gamma: a linear map of c, zero at first.

    Test: test_rho_zero_is_the_plain_block_bit_for_bit
    """

    def __init__(self, dim, heads, ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim, elementwise_affine=False)
        self.attention, self.cross = Attention(dim, heads), Attention(dim, heads)
        self.ffn = nn.Sequential(
            nn.Linear(dim, ratio * dim), nn.GELU(), nn.Linear(ratio * dim, dim)
        )
        self.modulate = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        for layer in (self.modulate[1], self.cross.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, c, y, rho, choice=None):
        """x (B, N, e), c (B, e), y (B, m, e) -> (B, N, e)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulate(c)[:, None].chunk(6, -1)
        h = self.norm1(x) * (1 + scale1) + shift1  # (B, N, e)
        x = x + gate1 * merged_attention(self.attention, h, rho, choice)
        x = x + self.cross(self.norm2(x), y)
        return x + gate2 * self.ffn(self.norm3(x) * (1 + scale2) + shift2)


class Generator(nn.Module):
    r"""Picture from expression. The condition reads counts only: no picture (crops of neighbours
    overlap) and no place (it would give the layout of the surroundings away).

    $$Y = W [X^{gene}(v);\; W_o v;\; W_b \bar v_{niche};\; z^{niche};\; z^{tissue}] + \kappa
    \tag{12}$$

    The network paints a picture and the target of the path follows from it (`forward`): a picture
    has far fewer degrees of freedom than picture minus noise, so a small network learns it sooner.

    Test: test_the_generator_reads_expression_only
    """

    def __init__(self, config, shape, n_genes, size, gene):
        super().__init__()
        d, e, p = size.dim, size.decoder_dim, size.pixel_channels
        self.patch, self.sees, self.path = size.decoder_patch, config.condition, config.path
        self.gene = copy.deepcopy(gene)
        # own and mean neighbour expression, unabridged
        self.linear = nn.ModuleList(nn.Linear(n_genes + 1, d) for _ in range(2))
        self.niche = self.tissue = None
        if config.niche and self.sees == "context":
            self.niche = SetTransformer(*size.block, size.niche_layers, has_places=False)
        if config.tissue and self.sees == "context":
            self.tissue = SetTransformer(*size.block, size.tissue_layers, has_places=False)
        self.to_y = nn.Linear(d, e)
        self.token_type = nn.Parameter(torch.randn(size.latents + 4, e) * 0.02)
        # the condition that is left out
        self.null = nn.Parameter(torch.randn(size.latents + 4, e) * 0.02)
        self.time = nn.Sequential(nn.Linear(e, e), nn.SiLU(), nn.Linear(e, e))
        self.pool = nn.Sequential(nn.LayerNorm(e), nn.Linear(e, e))
        self.embed, self.norm = nn.Linear(shape[0] * self.patch**2, e), nn.LayerNorm(e)
        self.out = nn.Linear(e, 2 * p * self.patch**2)
        self.stem = nn.Conv2d(shape[0], p, 3, padding=1)
        self.smooth = nn.Conv2d(p, p, 3, padding=1)
        self.last = nn.Conv2d(p, shape[0], 3, padding=1)
        block = (e, size.decoder_heads, size.ratio)
        self.blocks = nn.ModuleList(DiTBlock(*block) for _ in range(size.decoder_layers))
        place = sincos(grid_places(shape[1] // self.patch), e)  # (N, e)
        self.register_buffer("place", place, persistent=False)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def condition(self, v, depth, niche_v, niche_depth, near, far, far_exists):
        """v (B, G), depth (B, 1) of the cell; niche_*: means over its niche; near (B, k, d), far
        (B, t, d): gene-only embeddings -> Y (B, M + 4, e)."""
        own = self.linear[0](torch.cat([v, depth], 1))  # (B, d)
        beside = niche = tissue = torch.zeros_like(own)
        if self.niche is not None:
            beside = self.linear[1](torch.cat([niche_v, niche_depth], 1))
            niche = self.niche(near, None)
        if self.tissue is not None:
            tissue = self.tissue(far, None, far_exists)
        surroundings = torch.stack([own, beside, niche, tissue], 1)  # (B, 4, d)
        return self.to_y(torch.cat([self.gene(v, depth), surroundings], 1)) + self.token_type

    def forward(self, x, t, y, rho=0.0, choice=None):
        r"""x (B, C, S, S), t (B,) from 0 noise to 1 picture, y (B, M + 4, e) -> the path's target
        (B, C, S, S), from the picture $\hat x$ that the network paints.

        $$\hat u = \frac{\hat x - x_t}{1 - t} \;\text{(flow)}, \qquad
        \hat u = \frac{\sin(\pi t / 2)\, x_t - \hat x}{\cos(\pi t / 2)} \;\text{(ddpm)} \tag{13}$$

        Test: test_the_target_follows_from_the_painted_picture
        """
        frequency = torch.exp(-6 * torch.arange(0, 1, 2 / self.place.shape[1], device=x.device))
        angle = 1000 * t[:, None] * frequency  # (B, e/2)
        c = self.time(torch.cat([angle.sin(), angle.cos()], -1)) + self.pool(y.mean(1))  # (B, e)
        h = self.embed(cut_patches(x, self.patch)) + self.place  # (B, N, e)
        for i, block in enumerate(self.blocks):
            h = block(h, c, y, rho, None if choice is None else choice[:, i])
        # two 3 x 3 convolutions, which the tokens modulate, smooth the borders of the patches
        h = join_patches(self.out(self.norm(h)), self.patch, 2 * self.stem.out_channels)
        scale, shift = h.chunk(2, 1)  # (B, p, S, S)
        h = F.silu(self.stem(x) * (1 + scale) + shift)
        # 1.05: black and white at finite weights
        picture = 1.05 * torch.tanh(self.last(F.silu(self.smooth(h))))  # (B, C, S, S)
        t = t[:, None, None, None]
        if self.path == "flow":
            return (picture - x) / (1 - t).clamp(min=0.05)
        sine, cosine = torch.sin(torch.pi * t / 2), torch.cos(torch.pi * t / 2)
        return (sine * x - picture) / cosine.clamp(min=0.05)


def on_path(path, t, x0, x1):
    r"""Point of the path at t and what the network predicts there: x0 noise, x1 picture (B, C, S,
    S), t (B,).

    $$x_t = (1 - t)\, x_0 + t\, x_1, \qquad u = x_1 - x_0 \quad \text{(flow)} \tag{14}$$

    $$x_t = \sin(\tfrac{\pi t}{2})\, x_1 + \cos(\tfrac{\pi t}{2})\, x_0, \qquad
    u = \sin(\tfrac{\pi t}{2})\, x_0 - \cos(\tfrac{\pi t}{2})\, x_1 \quad \text{(ddpm)} \tag{15}$$

    Lipman et al. 2023, Liu et al. 2023; cosine schedule with v-prediction, Salimans & Ho 2022.

    Test: test_path_targets_are_the_derivatives
    """
    t = t[:, None, None, None]
    if path == "flow":
        return (1 - t) * x0 + t * x1, x1 - x0
    sine, cosine = torch.sin(torch.pi * t / 2), torch.cos(torch.pi * t / 2)
    return sine * x1 + cosine * x0, sine * x0 - cosine * x1


@torch.no_grad()
def sample(path, velocity, x, steps):
    """From noise x at t = 0 to a picture at t = 1, velocity(x, t) -> (B, C, S, S). flow: Heun's
    method, the last half step left out; ddpm: DDIM, a rotation."""
    times = torch.linspace(0, 1, steps + 1, dtype=torch.float64).tolist()
    for t, t_next in pairwise(times):
        u = velocity(x, x.new_full((len(x),), t))
        if path == "flow":
            euler = x + (t_next - t) * u
            if t_next < 1:
                u = (u + velocity(euler, x.new_full((len(x),), t_next))) / 2
            x = x + (t_next - t) * u
        else:
            sine, cosine = np.sin(np.pi * t / 2), np.cos(np.pi * t / 2)
            picture, noise = sine * x - cosine * u, cosine * x + sine * u
            x = np.sin(np.pi * t_next / 2) * picture + np.cos(np.pi * t_next / 2) * noise
    return x


# --------------------------------------------------------------------------------------------------
# Training. A step draws for the whole batch, a process computes its slice, gradients are summed
# --------------------------------------------------------------------------------------------------


def masked_mse(guess, target, is_wanted):
    """Mean squared error of the wanted values of each row: (B, G) -> (B,)."""
    is_wanted = is_wanted.float()
    error = (guess - target).square() * is_wanted  # (B, G)
    return error.sum(1) / is_wanted.sum(1).clamp(min=1)


def cell_loss(config, model, batch):
    r"""Loss of stage A: 30 % of the genes and half of the patches are hidden, each of the two
    modalities is left out 15 % of the time.

    $$\mathcal{L}_A = \mathrm{MSE}_{hidden}(\hat v, v) + \mathrm{MSE}_{hidden}(\hat x, x)
    + 0.1\, \mathcal{L}_{NCE}(z^{img}, z^{gene}) \tag{16}$$

    batch: a `CellBatch` of b rows -> the sum over the rows.

    Test: test_the_losses_of_the_stages_are_their_parts
    """
    n_patches, keep = model.n_patches, batch.keep
    x_img = model.image(batch.picture, keep if config.mae else None)  # (b, 1 + P/2, d)
    x_gene = model.gene(batch.expression, batch.depth, batch.hidden)  # (b, M, d)
    z, img, gene = model.fuse(x_img, x_gene, batch.has_img, batch.has_gene)
    z_img, z_gene = model.fuse(x_img)[0], model.fuse(None, x_gene)[0]  # (b, d)
    is_wanted = batch.hidden | ~batch.has_gene[:, None]  # (b, G)
    loss = masked_mse(model.genes(z, img, gene), batch.target, is_wanted).sum()
    if config.mae:
        is_lost = keep.new_ones(len(keep), n_patches).scatter(1, keep, 0) * batch.has_img[:, None]
        target = cut_patches(batch.picture, model.image.patch)  # (b, P, C p p)
        error = (model.mae_decode(img, keep) - target).square().mean(-1)  # (b, P)
        loss = loss + (error * is_lost).sum() / (n_patches - keep.shape[1])
    if not model.has_pictures:
        return loss
    contrast = info_nce(run.gather(z_img), run.gather(z_gene), model.log_tau, batch.rows)
    return loss + 0.1 * contrast


def train_cells(config, size, stages, dataset, model):
    """Stage A -> the trained `CellModel`, the loss of every step."""
    n_steps, n_batch, losses = size.steps[0], size.batch[0], []
    optimiser = ScheduledAdamW(model.parameters(), size.lr[0], n_steps, config.weight_decay)
    model.train()
    for step in stages.steps("A", n_steps, {"model": model, "optimiser": optimiser}, losses):
        optimiser.set_rates(step)
        draw = step_generator(config.seed, 0, step)
        with run.autocast(config, dataset.device):
            batch = cell_batch(dataset, draw, n_batch, model.n_patches, 0.3, 0.5, 0.15)
            loss = cell_loss(config, model, batch) / n_batch
        optimiser.zero_grad(set_to_none=False)
        loss.backward()
        losses.append(optimiser.sum_and_clip(loss))
        optimiser.step()
    return stages.finish("A", model, losses), losses


def context_loss(dataset, cell, model, cached, squares, batch):
    r"""Loss of stage B: a cell's expression from what it shows of itself and from its surroundings.

    Of four rows one shows nothing of itself, one its picture, one 80 % of its genes, one both;
    surroundings are of the same modality, so a picture never reads neighbours' expression. A fifth
    of the rows has none.

    $$\mathcal{L}_B = \mathrm{MSE}_{not\,shown}(\hat v, v) + 0.5\, [\text{shows nothing}]\,
    (1 - \cos(\hat z, z^{cell})) \tag{17}$$

    cached (3, N, d), squares (3, n, d): embeddings of img, gene, fused, and their square means;
    batch: a `ContextBatch` -> the mean over the rows.

    Test: test_the_losses_of_the_stages_are_their_parts
    """
    device, rows = dataset.device, batch.rows
    shown, hidden = batch.shown.to(device), batch.hidden.to(device)
    z = torch.where((shown == 0)[:, None], model.absent, cached[0][rows.to(device)])  # (B, d)
    for number, name in ((2, "gene"), (3, "fused")):
        members = (batch.shown == number).nonzero()[:, 0]
        if len(members):
            own = cell_runs.embed(cell, dataset, rows[members], batch.hidden[members], name)[name]
            z = z.index_copy(0, members.to(device), own)
    surroundings = dataset.surroundings(cached, squares, rows, batch.modality)
    u = model(z, *surroundings, batch.has_context.to(device))  # (B, d)
    genes, guess = model.heads(u)
    mse = masked_mse(genes, dataset.expression(rows)[0], hidden | (shown < 2)[:, None])
    cosine = F.cosine_similarity(guess, cached[2][rows.to(device)], dim=-1)  # (B,)
    return (mse + 0.5 * (1 - cosine) * (shown == 0)).mean()


def train_context(config, size, stages, dataset, cell, model):
    """Stage B on cached embeddings -> the trained `ContextModel`, the losses; in every process."""
    n_steps, losses = size.steps[1], []
    cached = torch.stack(list(cell_runs.embed_all(cell, dataset).values()))  # (3, N, d)
    squares = torch.stack([dataset.square_means(z) for z in cached])  # (3, squares, d)
    optimiser = ScheduledAdamW(model.parameters(), size.lr[1], n_steps, config.weight_decay)
    model.train()
    for step in stages.steps("B", n_steps, {"model": model, "optimiser": optimiser}, losses):
        optimiser.set_rates(step)
        draw = step_generator(config.seed, 1, step)
        with run.autocast(config, dataset.device):
            batch = context_batch(dataset, draw, size.batch[1], 0.2, 0.2)
            loss = context_loss(dataset, cell, model, cached, squares, batch) / run.processes()[1]
        optimiser.zero_grad(set_to_none=False)
        loss.backward()
        losses.append(optimiser.sum_and_clip(loss))
        optimiser.step()
    return stages.finish("B", model, losses), losses


def decoder_loss(dataset, conditions, model, rho, batch):
    r"""Loss of stage C, channels weighted by their inverse variance; one row in ten goes without
    its condition.

    $$\mathcal{L}_C = \mathbb{E}\; w \odot (\hat u(x_t, t, Y) - u)^2, \qquad
    t = \sigma(\epsilon - \tfrac12),\; \epsilon \sim \mathcal{N}(0, 1) \tag{18}$$

    batch: a `PictureBatch` of b rows -> the sum over the rows.

    Test: test_decoder_channels_count_by_inverse_variance
    """
    x, target = on_path(model.path, batch.t, batch.noise, batch.picture)
    y = torch.where(batch.is_dropped[:, None, None], model.null, conditions(model, batch.rows))
    guess = model(x, batch.t, y, rho, batch.choice)  # (b, C, S, S)
    error = (guess - target).square() * dataset.channel_weight
    return error.mean((1, 2, 3)).sum()


def train_decoder(config, size, stages, dataset, conditions, model):
    """Stage C -> the averaged `Generator`, the losses. Its gene encoder learns at a tenth of lr."""
    n_steps, n_batch, lr, losses = size.steps[2], size.batch[2], size.lr[2], []
    slow = list(model.gene.parameters())
    fast = [p for name, p in model.named_parameters() if not name.startswith("gene.")]
    groups = [{"params": fast}, {"params": slow, "lr": 0.1 * lr}]
    optimiser = ScheduledAdamW(groups, lr, n_steps, config.weight_decay)
    average = copy.deepcopy(model)
    parts = {"model": model, "optimiser": optimiser, "average": average}
    model.train()
    for step in stages.steps("C", n_steps, parts, losses):
        optimiser.set_rates(step)
        draw = step_generator(config.seed, 2, step)
        with run.autocast(config, dataset.device):
            batch = picture_batch(dataset, draw, n_batch, len(model.blocks), len(model.place), 0.1)
            loss = decoder_loss(dataset, conditions, model, size.rho, batch) / n_batch
        optimiser.zero_grad(set_to_none=False)
        loss.backward()
        losses.append(optimiser.sum_and_clip(loss))
        optimiser.step()
        ema_update(average, model, min(size.ema, (1 + step) / (10 + step)))
    return stages.finish("C", average, losses), losses


def generate(config, size, dataset, conditions, model, rows, draws, chunk=256):
    r"""`draws` pictures of each cell of `rows`, (draws, n, C, S, S) uint8, with classifier-free
    guidance (Ho & Salimans 2022) for t up to .6: later steps only sharpen.

    $$u = (1 + w)\, \hat u(x_t, t, Y) - w\, \hat u(x_t, t, \varnothing) \tag{19}$$

    Test: test_guidance_acts_early_only
    """
    w = config.guidance

    def paint(noise, rows):
        y = conditions(model, rows)

        def velocity(x, t):
            u = model(x, t, y, size.rho)
            if w == 0 or model.sees == "none" or t[0] > 0.6:
                return u
            return (1 + w) * u - w * model(x, t, model.null.expand_as(y), size.rho)

        with run.autocast(config, dataset.device):
            return sample(config.path, velocity, noise, config.ode_steps)

    return cell_runs.painted(dataset, paint, rows, draws, config.seed, chunk)


def train(config, size, stages, dataset, record):
    """The three stages -> models by name, losses {A, B, C}, the generator's conditions or None."""
    n_genes, device, conditions = dataset.cells.n_genes, dataset.device, None
    models, losses = {}, {}
    cell = CellModel(dataset.shape, n_genes, size, config.fusion, dataset.has_pictures)
    cell.gene.init_from_pca(dataset.expression_matrix("train")[:, :-1])
    for part in (cell.to(device).image, cell.gene):
        run.compiled(part, config)
    models["cell"], losses["A"] = train_cells(config, size, stages, dataset, cell)
    record.lap("stage_a")
    # an ablation of one stage leaves the start of the next alone
    torch.manual_seed(config.seed + 1)
    context = ContextModel(n_genes, size, config.niche, config.tissue)
    run.compiled(context.to(device), config)
    models["context"], losses["B"] = train_context(config, size, stages, dataset, cell, context)
    record.lap("stage_b")
    if config.generate:
        torch.manual_seed(config.seed + 2)
        generator = Generator(config, dataset.shape, n_genes, size, cell.gene)
        run.compiled(generator.to(device), config)
        conditions = cell_runs.Conditions(dataset, cell)
        trained = train_decoder(config, size, stages, dataset, conditions, generator)
        models["generator"], losses["C"] = trained
        record.lap("stage_c")
    return models, losses, conditions


def main(argv=None):
    """Train the three stages, score every task."""
    start = time.perf_counter()
    config = run.parse(Config, argv, __doc__.split("\n")[0])
    check(config)
    if config.predict:
        return new_cells.predict_cells(config, check, SIZES, CellModel, ContextModel, start)
    size = cell_runs.size_of(config, SIZES)
    record = run.Run("spatia", config, *cell_runs.place(config), start)
    checksum = record.note_inputs([config.data])
    dataset = cell_runs.load(config, size, record.device)
    stages = Stages(config, record.folder / "latest.pt", "spatia checkpoint", checksum, "cells")
    record.lap("load")
    models, losses, conditions = train(config, size, stages, dataset, record)

    def generate_images(rows, draws):
        return generate(config, size, dataset, conditions, models["generator"], rows, draws)

    result, z = cell_runs.score(config, dataset, models, generate_images, record)
    cell_runs.finish(config, record, dataset, models, losses, result, z)
    return 0


if __name__ == "__main__":
    run.cli(main)
