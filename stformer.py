r"""Genes from H&E patches by a transformer whose patches and pathway tokens meet in four quadrants.

Source: the public documentation of the system "SpatialTranscriptFormer" (2026), which has no paper;
transformer: Vaswani et al. 2017; tokens that read a set: Lee et al. 2019. The page beside this file
is docs/stformer.md.

    features (S, F) --linear--> h (S, D)          tokens T (P, D), learned, one a pathway
                                 |                     |
                          [T; h] (P + S, D), L layers of attention
                                 |        p2p  T reads T        p2h  T reads h
                                 |        h2p  h reads T        h2h  h reads h
                                 |                     |
                      scores = tau cos(h, T) (S, P) --linear, begun as gene sets--> genes (S, G)

| symbol | meaning | shape |
|---|---|---|
| $F$ | frozen image features of the patches of a slide | (S, F) |
| $h$ | embedding of the patches | (B, S, D) |
| $T$ | pathway tokens | (P, D) |
| $x$ | the sequence $[T; h]$ | (B, P + S, D) |
| $M$ | True where a query (row) reads a key (column) | (B, P + S, P + S) |
| $s$ | pathway scores of the patches | (B, S, P) |
| $m$ | mask: the gene is on the panel and the spot has counts enough | (B, S, G) |
| $A$ | members of the gene sets, 0 or 1 | (P, G) |

A batch is B slides, padded to the longest. Every run scores the predictors that the network has to
beat on the same slides.

    python stformer.py --data datasets/her2st --fold 0 --encoder "features/{sample}.npz"
    python stformer.py --data datasets/her2st --split section --slice C2
    python stformer.py --data my_patches --predict runs/.../model.pt
"""

import time
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from evaluation import genes, new_patches, patch_baselines, samples
from plainst import export, run
from plainst.quadrants import by_rows, quadrant_attention

# query first: p2h, a pathway token reads patches
QUADRANTS = ("p2p", "p2h", "h2p", "h2h")
# layers, width, heads
SIZES = {
    "mini": (2, 128, 4),
    "tiny": (2, 256, 4),
    "small": (4, 384, 8),
    "medium": (6, 512, 8),
    "large": (12, 768, 12),
}

# named sets of flags; what is typed goes before them. The defaults of Config are the source's
PRESETS = {
    "paper": {},
    "tuned": {
        "size": "mini",
        "scale": "both",
        "target_scale": "train",
        "head": "linear",
        "h2h": "local",
        "loss": "mse_pcc",
        "optimiser": "adamw",
        "dropout": 0.3,
        "lr": 1e-3,
        "epochs": 40,
        "members": 3,
    },
}


@dataclass
class Config(run.Config):
    """Flags of stformer.py."""

    presets: ClassVar = PRESETS
    preset: str = "paper"

    data: str = "datasets/her2st"
    """HEST-benchmark task folder (or HEST-1k folder); with --predict also a folder of patches
    (*.h5) or of features (*.npz)"""
    split: Literal["folds", "patient", "section"] = "folds"
    """folds: splits/{train,test}_<fold>.csv; patient: --patient is held out; section: --slice is,
    its patient's others train (leaks the patient)"""
    fold: int = 0
    "which of the folder's splits"
    patient: str = ""
    "patient held out by --split patient"
    genes: str = "task"
    """task: the folder's var_50genes.json; a number: so many most variable genes of the training
    slides; or a JSON list of names"""
    target: Literal["cp10k", "log1p"] = "cp10k"
    """log1p of counts per 10,000, or log1p of raw counts as the HEST benchmark has it (then a
    spot's depth is part of the answer)"""
    min_counts: int = 100
    "spots with fewer counts are tissue but are neither trained on nor scored"
    encoder: str = "handmade"
    """image features: handmade, a Hugging Face vision model, or features files: a .npy/.npz path,
    {sample} stands for the slide's name"""
    cache: str = ""
    "folder for image features; empty: <data>/.features where that can be written"
    scale: Literal["none", "train", "slide", "both"] = "none"
    """features are left as they are, z-scored by the training spots, by the slide's own spots (no
    label is used), or both, side by side"""
    target_scale: Literal["none", "train", "slide"] = "none"
    """the losses see the genes as they are, z-scored over the training spots, or within each slide:
    differences between slides are then no part of the task"""
    size: Literal[tuple(SIZES)] = "tiny"
    "layers, width and heads: 2 x 128 x 4, 2 x 256 x 4, 4 x 384 x 8, 6 x 512 x 8, 12 x 768 x 12"
    mode: Literal["dense", "global"] = "dense"
    "genes of every spot, or of the slide's mean"
    interactions: str = "p2p,p2h,h2p,h2h"
    """quadrants that are on, query first: p2h lets pathways read patches; without h2h all context
    flows through the pathways"""
    h2h: Literal["local", "whole"] = "whole"
    "whom patches read: the lattice sites within --rings, or all patches of the slide"
    rings: int = 2
    "reach of local h2h in lattice steps"
    distance_bias: bool = True
    "local h2h scores get a learned bias per head and distance"
    position: Literal["none", "sincos", "mlp"] = "sincos"
    "code of the place in the slide added to a patch"
    tau: Literal["fixed", "learned"] = "learned"
    "temperature of the cosine scores: 1, or learned from 14.3 on"
    head: Literal["softplus", "linear"] = "softplus"
    "genes are softplus(W s + b), of values as they are, or W s + b"
    gene_sets: str = ""
    """GMT file: one token a set, gene weights begin as its members; empty: --pathways tokens,
    random weights"""
    shuffle_sets: bool = False
    "control: the genes of the sets are permuted"
    permute_pairs: bool = False
    "control: in the training slides image and expression of the spots are paired at random"
    pathways: int = 50
    "number of tokens without --gene_sets"
    loss: Literal["mse", "pcc", "mse_pcc", "zinb"] = "mse"
    "zinb is on raw counts with the spot's library size, which only training reads"
    pcc_weight: float = 1.0
    "weight of 1 - PCC in mse_pcc"
    lambda_pathway: float = 0.0
    "weight of the auxiliary loss on pathway scores (needs --gene_sets)"
    dropout: float = 0.1
    "dropout of features, attention output and feed-forward"
    optimiser: Literal["adam", "adamw"] = "adam"
    "adamw decays the weights"
    lr: float = 1e-4
    "peak learning rate after a linear warm-up; a cosine follows"
    epochs: int = 100
    """most passes over the training slides; how many there are is chosen by cross-validation inside
    the training slides"""
    folds: int = 5
    """folds of that cross-validation, at most: over patients, over slides where there is one
    patient; 0: none, all --epochs are run"""
    members: int = 1
    "models trained on all training slides, each from its own start, and averaged"
    batch: int = 1
    "slides a step"
    fast: bool = True
    "attention without the dense mask; the plain form gives the same numbers"
    checkpointing: bool = False
    "recompute layers in the backward pass: less memory, more time"
    save_every: int = 0
    "epochs between checkpoints (latest.pt in the run's folder); 0: none"
    resume: bool = False
    "go on from latest.pt"
    predict: str = ""
    "checkpoint (model.pt of a run): predict --data with it, train nothing"


def check(config):
    """Raise DataError, naming the flag, for a value or a combination that no run can use."""
    genes.check(config, QUADRANTS)


def variant(config):
    """Folder name of the run."""
    return genes.variant(config)


# --------------------------------------------------------------------------------------------------
# Layers
# --------------------------------------------------------------------------------------------------


class Position(nn.Module):
    r"""Code of the place of a patch in its slide, centred over the real patches.

    `sincos` (Vaswani et al. 2017, Sec. 3.5, in two dimensions), D/2 channels an axis, places in
    lattice pitches:

    $$p_{2i} = \sin(x\, \omega_i), \quad p_{2i+1} = \cos(x\, \omega_i), \quad
    \omega_i = 10000^{-2i / (D/2)} \tag{1}$$

    `mlp`: two linear maps of $x / \max|x|$ with a GELU between them.

    Test: test_sincos_position_is_shift_invariant_and_as_defined
    """

    def __init__(self, kind, dim):
        super().__init__()
        self.dim, self.mlp = dim, None
        if kind == "mlp":
            self.mlp = nn.Sequential(nn.Linear(2, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, place, is_real):
        """place (B, S, 2), is_real (B, S), False = padding -> (B, S, D)."""
        is_real = is_real[..., None].to(place.dtype)  # (B, S, 1)
        centre = (place * is_real).sum(1, keepdim=True) / is_real.sum(1, keepdim=True)
        place = (place - centre) * is_real
        if self.mlp is not None:
            return self.mlp(place / place.abs().amax((1, 2), keepdim=True).clamp(min=1))
        half = self.dim // 2
        omega = 10000 ** (-torch.arange(0, half, 2, device=place.device) / half)  # (D/4,)
        angle = place[..., None] * omega  # (B, S, 2, D/4)
        return torch.stack([angle.sin(), angle.cos()], -1).flatten(2)  # (B, S, D)


def ring_matrix(patches):
    """(B, S, S): distance in whole pitches of the patches that a patch reads with local h2h, -1
    where it does not read."""
    n_slides, n_patches = patches.is_real.shape
    ring = patches.ring.new_full((n_slides, n_patches, n_patches), -1)
    # an empty place of the table names the patch itself, with -1
    return ring.scatter_reduce(2, patches.table, patches.ring, "amax")


def quadrant_mask(quadrants, n_tokens, h2h_reads, is_real):
    r"""The mask of the four quadrants: True where the query of a row reads the key of a column.

    $$M = I \;\lor \begin{pmatrix} \mathrm{p2p} & \mathrm{p2h} \\
    \mathrm{h2p} & \mathrm{h2h} \end{pmatrix} \tag{2}$$

    A query always reads itself, and nobody reads padding. h2h_reads (B, S, S), is_real (B, S) ->
    (B, P + S, P + S).

    Test: test_mask_of_the_quadrants
    """
    size = n_tokens + is_real.shape[1]
    tokens, patches = slice(n_tokens), slice(n_tokens, size)
    mask = is_real.new_zeros(len(is_real), size, size)
    mask[:, tokens, tokens] = "p2p" in quadrants
    mask[:, tokens, patches] = "p2h" in quadrants
    mask[:, patches, tokens] = "h2p" in quadrants
    if "h2h" in quadrants:
        mask[:, patches, patches] = h2h_reads
    mask &= F.pad(is_real, (n_tokens, 0), value=True)[:, None]
    return mask | torch.eye(size, dtype=torch.bool, device=mask.device)


class QuadrantAttention(nn.Module):
    r"""Multi-head attention over the sequence of tokens and patches (Vaswani et al. 2017, Eq. 1),
    masked by quadrants, with a bias $b$ by the distance of two patches where h2h is local.

    $$\alpha_{ij} = \mathrm{softmax}_{j: M_{ij}} \Big( \frac{\langle W_q x_i, W_k x_j \rangle}
    {\sqrt{d}} + b_{r(i, j)} \Big), \qquad a_i = W_o \sum_{j} \alpha_{ij} W_v x_j \tag{3}$$

    The plain form costs $O((P + S)^2 D)$ whatever is on; the fast one $O(S (P + k) D)$ with h2h off
    or local to k neighbours.

    Test: test_every_combination_of_quadrants_equals_the_dense_mask
    """

    def __init__(self, dim, heads, quadrants, h2h="local", rings=0, fast=True):
        """rings: reach of the bias by distance, 0 = none."""
        super().__init__()
        self.heads, self.quadrants, self.fast = heads, quadrants, fast
        self.is_local = h2h == "local"
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        # by distance 0 .. rings + 1
        self.bias = nn.Parameter(torch.zeros(rings + 2, heads)) if rings else None

    def forward(self, x, n_tokens, patches):
        """x (B, P + S, D), patches `Patches` -> (B, P + S, D)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, P + S, 3, H, d)
        q, k, v = qkv.unbind(2)  # (B, P + S, H, d)
        if self.fast:
            a = quadrant_attention(
                q, k, v, n_tokens, self.quadrants, patches, self.is_local, self.bias
            )
        else:
            scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
            ring = ring_matrix(patches)  # (B, S, S)
            if self.bias is not None:
                bias = self.bias[ring.clamp(min=0)].permute(0, 3, 1, 2)  # (B, H, S, S)
                scores = scores + F.pad(bias, (n_tokens, 0, n_tokens, 0))
            reads = ring >= 0 if self.is_local else torch.ones_like(ring, dtype=torch.bool)
            mask = quadrant_mask(self.quadrants, n_tokens, reads, patches.is_real)
            scores = scores.masked_fill(~mask[:, None], -torch.inf)
            alpha = scores.softmax(-1)  # (B, H, P + S, P + S)
            a = torch.einsum("bhij,bjhd->bihd", alpha, v)  # (B, P + S, H, d)
        return self.out(a.flatten(2))


class Layer(nn.Module):
    r"""Pre-norm transformer layer (Vaswani et al. 2017, Sec. 3.1 and 3.3, norms first).

    $$x \leftarrow x + \mathrm{QA}(\mathrm{LN}(x)), \qquad
    x \leftarrow x + W_2\, \mathrm{GELU}(W_1 \mathrm{LN}(x)) \tag{4}$$

    Test: test_layer_equals_its_equation
    """

    def __init__(self, dim, heads, quadrants, h2h="local", rings=0, dropout=0.1, fast=True):
        super().__init__()
        self.attention = QuadrantAttention(dim, heads, quadrants, h2h, rings, fast)
        self.ffn = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, 4 * dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(4 * dim, dim),
            nn.Dropout(dropout),
        )
        self.norm, self.dropout = nn.LayerNorm(dim), nn.Dropout(dropout)

    def forward(self, x, n_tokens, patches):
        """x (B, P + S, D) -> (B, P + S, D)."""
        x = x + self.dropout(self.attention(self.norm(x), n_tokens, patches))
        return x + by_rows(self.ffn, x)


class PathwayTransformer(nn.Module):
    r"""Genes of patches by way of pathway scores.

    $$s_{ip} = \tau \frac{\langle h_i, T_p \rangle}{\|h_i\| \|T_p\|}, \qquad
    y_{ig} = \mathrm{softplus} \Big( \sum_p W_{gp} s_{ip} + b_g \Big) \tag{5}$$

    With gene sets $W_{gp}$ begins as $A_{pg} / \sum_{g'} A_{pg'}$. In global mode $h$ is first
    averaged over the slide. The linear head, and zinb, leave the softplus out.

    Test: test_genes_are_a_linear_map_of_scaled_cosines
    """

    def __init__(self, config, dim_in, n_genes, n_pathways):
        super().__init__()
        c = config
        n_layers, dim, heads = SIZES[c.size]
        quadrants = genes.quadrants_of(c, QUADRANTS)
        has_bias = c.distance_bias and c.h2h == "local" and "h2h" in quadrants
        rings = c.rings if has_bias else 0
        self.mode, self.checkpointing = c.mode, c.checkpointing
        self.has_softplus = c.head == "softplus" and c.loss != "zinb"
        self.embed, self.dropout = nn.Linear(dim_in, dim), nn.Dropout(c.dropout)
        self.position = None if c.position == "none" else Position(c.position, dim)
        self.tokens = nn.Parameter(torch.randn(n_pathways, dim))
        self.layers = nn.ModuleList(
            Layer(dim, heads, quadrants, c.h2h, rings, c.dropout, c.fast) for _ in range(n_layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.log_tau = nn.Parameter(torch.tensor(1 / 0.07).log()) if c.tau == "learned" else None
        self.genes = nn.Linear(n_pathways, n_genes)
        nn.init.zeros_(self.genes.bias)
        self.pi_head = self.theta_head = None
        if c.loss == "zinb":
            self.pi_head = nn.Linear(n_pathways, n_genes)
            self.theta_head = nn.Linear(n_pathways, n_genes)

    @torch.no_grad()
    def start_from_sets(self, member):
        """Begin the gene weights as the members of the sets, (P, G), over their number."""
        self.genes.weight.copy_((member / member.sum(1, keepdim=True).clamp(min=1)).T)

    def forward(self, x, place, patches, **_):
        """x (B, S, F), place (B, S, 2), patches `Patches` -> dict: genes (B, S, G), scores (B, S,
        P) and, with zinb, pi and theta (B, S, G); without the S in global mode."""
        h = self.embed(self.dropout(x))  # (B, S, D)
        if self.position is not None:
            h = h + self.position(place, patches.is_real)
        n_tokens = len(self.tokens)
        x = torch.cat([self.tokens.expand(len(h), -1, -1), h], 1)  # (B, P + S, D)
        for layer in self.layers:
            if self.checkpointing:
                x = checkpoint(layer, x, n_tokens, patches, use_reentrant=False)
            else:
                x = layer(x, n_tokens, patches)
        x = self.norm(x)
        tokens, h = x[:, :n_tokens], x[:, n_tokens:]  # (B, P, D), (B, S, D)
        if self.mode == "global":
            is_real = patches.is_real[..., None]
            h = (h * is_real).sum(1, keepdim=True) / is_real.sum(1, keepdim=True)  # (B, 1, D)
        scores = F.normalize(h, dim=-1) @ F.normalize(tokens, dim=-1).transpose(1, 2)  # (B, S, P)
        if self.log_tau is not None:
            scores = scores * self.log_tau.exp()
        y = self.genes(scores)  # (B, S, G)
        out = {"genes": F.softplus(y) if self.has_softplus else y, "scores": scores}
        if self.pi_head is not None:
            out["pi"] = self.pi_head(scores) - 3
            out["theta"] = F.softplus(self.theta_head(scores) + 0.5) + 1e-6
        if self.mode == "global":
            out = {name: value.squeeze(1) for name, value in out.items()}
        return out


# --------------------------------------------------------------------------------------------------
# Losses. Nothing is read outside the mask
# --------------------------------------------------------------------------------------------------


def masked_mse(pred, true, mask):
    r"""Mean squared error over the mask; all (B, S, G) -> scalar.

    $$L_\mathrm{mse} = \frac{1}{\sum m} \sum_{big} m_{big} (\hat y_{big} - y_{big})^2 \tag{6}$$

    Test: test_mse_and_pcc_equal_their_definitions_on_the_cropped_slides
    """
    return ((pred - true).square() * mask).sum() / mask.sum().clamp(min=1)


def masked_pcc(pred, true, mask):
    r"""Pearson correlation over the spots of a slide, for every gene.

    $$r_{bg} = \frac{\sum_i \tilde{\hat y}_{big} \tilde y_{big}}
    {\sqrt{\sum_i \tilde{\hat y}_{big}^2} \sqrt{\sum_i \tilde y_{big}^2}} \tag{7}$$

    The tilde is the distance to the mean over the mask. -> r (B, G), is_defined (B, G): where there
    are two spots and the truth varies.

    Test: test_mse_and_pcc_equal_their_definitions_on_the_cropped_slides
    """
    n = mask.sum(1, keepdim=True).clamp(min=1)  # (B, 1, G)
    p = (pred - (pred * mask).sum(1, keepdim=True) / n) * mask  # (B, S, G)
    t = (true - (true * mask).sum(1, keepdim=True) / n) * mask  # (B, S, G)
    is_defined = (n[:, 0] >= 2) & (t.square().sum(1) > 1e-6)  # (B, G)
    norm = (p.square().sum(1) + 1e-8).sqrt() * (t.square().sum(1) + 1e-8).sqrt()
    return (p * t).sum(1) / norm, is_defined


def pcc_loss(pred, true, mask):
    r"""One minus the mean correlation where it is defined (0 where it is nowhere).

    $$L_\mathrm{pcc} = 1 - \mathrm{mean}_{bg}\, r_{bg} \tag{8}$$

    Test: test_mse_and_pcc_equal_their_definitions_on_the_cropped_slides
    """
    r, is_defined = masked_pcc(pred, true, mask)
    return ((1 - r) * is_defined).sum() / is_defined.sum().clamp(min=1)


def zinb_nll(y, mu, theta, pi, mask):
    r"""Mean negative log-likelihood of counts $y$ under a zero-inflated negative binomial with mean
    $\mu$, inverse dispersion $\theta$ and inflation $\sigma(\pi)$.

    $$\mathrm{NB}(y) = \frac{\Gamma(y + \theta)}{\Gamma(\theta)\, y!}
    \Big(\frac{\theta}{\theta + \mu}\Big)^\theta \Big(\frac{\mu}{\theta + \mu}\Big)^y \tag{9}$$

    $$P(y) = \sigma(\pi) [y = 0] + (1 - \sigma(\pi))\, \mathrm{NB}(y) \tag{10}$$

    Test: test_zinb_equals_scipy
    """
    # lgamma of a million counts is off by one in float32
    dtype = mu.dtype
    y, mu, theta, pi = (a.double() for a in (y, mu, theta, pi))
    mu, theta = mu.clamp(1e-8, 1e6), theta.clamp(1e-8, 1e6)
    log_zero = theta * (theta.log() - (theta + mu).log())  # log NB(0)
    log_nb = torch.lgamma(y + theta) - torch.lgamma(theta) - torch.lgamma(y + 1)
    log_nb = log_nb + log_zero + y * (mu.log() - (theta + mu).log())
    log_inflated, log_rest = F.logsigmoid(pi), F.logsigmoid(-pi)
    log_p = torch.where(
        y == 0, torch.logaddexp(log_inflated, log_rest + log_zero), log_rest + log_nb
    )
    return (-(log_p * mask).sum() / mask.sum().clamp(min=1)).to(dtype)


def pathway_targets(y, mask, member):
    r"""What pathway scores should follow: z-scores over the slide (with $n - 1$), averaged over the
    measured members of a set.

    $$t_{ip} = \sum_g A_{pg} z_{ig} \Big/ \sum_g A_{pg} \tag{11}$$

    y (B, S, G), mask (B, S, G), member (P, G) -> (B, S, P), is_present (B, P).

    Test: test_pathway_targets_are_mean_z_scores_of_members
    """
    n = mask.sum(1, keepdim=True)  # (B, 1, G)
    centred = (y - (y * mask).sum(1, keepdim=True) / n.clamp(min=1)) * mask
    variance = centred.square().sum(1, keepdim=True) / (n - 1).clamp(min=1)  # (B, 1, G)
    z = centred / variance.sqrt().clamp(min=1e-6)
    n_members = (n[:, 0] > 0).to(y.dtype) @ member.T  # (B, P)
    return z @ member.T / n_members.clamp(min=1)[:, None], n_members > 0


def pathway_loss(scores, y, mask, member):
    r"""Auxiliary loss: one minus the correlation of pathway scores (B, S, P) with their targets.
    Circular by construction: the target is a linear function of the genes.

    $$L_\mathrm{aux} = 1 - \mathrm{mean}_{bp}\, r(s_{b \cdot p}, t_{b \cdot p}) \tag{12}$$

    Test: test_pathway_targets_are_mean_z_scores_of_members
    """
    target, is_present = pathway_targets(y, mask, member)
    mask = mask.any(-1, keepdim=True) & is_present[:, None]  # (B, S, P)
    return pcc_loss(scores, target.detach(), mask)


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def loss_of(out, batch, scaler, config, member=None, is_bag=False):
    r"""The loss of a batch; in units of the genes' spread (--target_scale) all genes count alike.

    $$L = L_\mathrm{mse} + \alpha L_\mathrm{pcc} + \lambda L_\mathrm{aux} \tag{13}$$

    is_bag: a slide's mean is predicted; the losses are then over the slides of the batch as they
    else are over the spots of a slide.

    Test: test_loss_is_the_sum_of_its_parts
    """
    if is_bag:
        out, batch = samples.slides_as_rows(out, batch)
    mask = batch["scored"]
    by = "train" if is_bag and config.target_scale == "slide" else config.target_scale
    true = scaler.standardise_targets(batch["y"], mask, by)
    loss = 0.0
    if config.loss == "zinb":
        mu = scaler.mean_counts(out, batch["library"])
        loss = zinb_nll(batch["counts"], mu, out["theta"], out["pi"], mask)
    if config.loss in ("mse", "mse_pcc"):
        loss = masked_mse(out["genes"], true, mask)
    if config.loss in ("pcc", "mse_pcc"):
        loss = loss + config.pcc_weight * pcc_loss(out["genes"], true, mask)
    if config.lambda_pathway and member is not None and "scores" in out:
        loss = loss + config.lambda_pathway * pathway_loss(out["scores"], true, mask, member)
    return loss


WEIGHT_DECAY = 0.01  # of AdamW
MAX_NORM = 1.0  # of the gradient


def learning_rate(epoch, config):
    """Linear over the first tenth of the epochs, then a cosine to a hundredth."""
    warm = max(1, config.epochs // 10)
    return config.lr * run.warmup_cosine(epoch, config.epochs, warm, floor=0.01)


def train(make, part, config, device, epochs, job, is_bag=False):
    """One model of make(), `epochs` passes over the slides to fit of a `genes.Part`. Returns it and
    its history [(loss, score on the validation slides or nan)]. job: `jobs.Job`, which seeds,
    resumes and saves; is_bag: the model predicts a slide's mean."""
    job.seed_start()
    model = run.compiled(make().to(device), config)
    decay = WEIGHT_DECAY if config.optimiser == "adamw" else 0.0
    # without decay AdamW is Adam
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=config.lr, weight_decay=decay, foreach=True
    )
    scaler, val = part.scaler.to(device), samples.with_batch(part.val, device)
    fit, member = part.fit, part.member
    if member is not None:
        member = member.to(device)
    if config.batch == 1:
        fit = samples.with_batch(fit, device)
    for epoch in job.epochs(model, optimiser, epochs):
        model.train()
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(epoch, config)
        losses = []
        for batch in samples.shuffled_batches(fit, config.batch, device, is_bag):
            out = samples.outputs(model, batch, config)
            loss = loss_of(out, batch, scaler, config, member, is_bag)
            losses.append(run.finite(loss, "loss", epoch))
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimiser.step()
        score = samples.validation_score(model, val, scaler, config, is_bag)
        job.history.append((float(np.mean(losses)), score))
    return model, job.history


def main(argv=None):
    """Train and score one model beside the baselines, or predict with one (--predict)."""
    start = time.perf_counter()
    config = run.parse(Config, argv, __doc__.split("\n")[0])
    check(config)
    if config.predict:
        return new_patches.predict_folder(config, check, PathwayTransformer, start)
    task = genes.Task(config)
    record = run.Run("stformer", config, task.part, variant(config), start)
    task.load()
    task.origin = record.note_inputs(task.files())
    run.say(task.describe())
    record.lap("read")
    baselines, ridge = patch_baselines.score_baselines(task, train, record.device)
    record.lap("baselines")
    models, histories, val_pcc, inner = genes.train_members(task, train, PathwayTransformer, record)
    record.lap("training")
    result = genes.Result(task, models)
    scores = result.scores() | {"val_pcc": val_pcc}
    scores |= genes.gains(scores, baselines)
    run.say(genes.score_row("stformer", scores))
    baselines |= patch_baselines.average_row(task, result, inner, ridge)
    arrays = result.arrays()
    genes.draw(record, *result.shown(), histories)
    files = {"model.pt": lambda file: torch.save(result.checkpoint(), file)}
    files |= export.files_of("stformer", arrays, task.test_slides(), config)
    n_params = sum(weight.numel() for weight in models[0].parameters())
    facts = task.facts() | {"epochs": len(histories[-1])}
    record.finish(scores, baselines, arrays, n_params, task.split, files, **facts)
    return 0


if __name__ == "__main__":
    run.cli(main)
