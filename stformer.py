"""Gene expression from H&E patches by a transformer whose patches and pathway tokens meet in four
switchable quadrants.

    features (S, F) --Linear--> h (S, D)        learned tokens T (P, D), one a pathway
    L layers over [T; h], query first:
        p2p  T reads T        p2h  T reads h
        h2p  h reads T        h2h  h reads its neighbours in the tissue
    score_ip = tau cos(h_i, T_p)  (S, P)
    genes = W score + b  (S, G), W begun as the gene sets

With h2h off or local a layer costs O(S (P + k) D): nothing is S x S. Every run scores the model
beside the predictors it has to beat (train mean, ridge, kNN, one linear layer, attention pooling)
on the same slides; see docs/stformer.md.

    # a HEST-benchmark task, one of its splits
    python stformer.py --data datasets/her2st --fold 0
    # the other sections of its patient train: leaks the patient
    python stformer.py --data datasets/her2st --split section --slice C2
    python stformer.py --data my_patches --predict runs/.../model.pt
    # folds and members shared out, the same numbers
    torchrun --standalone --nproc_per_node=2 stformer.py --data datasets/her2st
"""

import copy
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import data
import metrics
from data import DataError
from evaluation import bags, baselines, figures, hest
from plainst import export, jobs, run
from plainst.features import input_files

QUADRANTS = ("p2p", "p2h", "h2p", "h2h")
# layers, width, heads
SIZES = {
    "mini": (2, 128, 4),
    "tiny": (2, 256, 4),
    "small": (4, 384, 8),
    "medium": (6, 512, 8),
    "large": (12, 768, 12),
}
# most spots of an attention block; rows from which work is done in pieces
BLOCK, MANY = 64, 16384
# columns of the printed table
COLUMNS = (
    *("pcc_mean", "pcc_pooled", "variance_ratio_median", "rmse", "slide_mean_rmse", "rate_pcc"),
)


# named sets of flags; what is typed goes before them
PRESETS = {"tuned": {}}


@dataclass
class Config(run.Config):
    """Flags of stformer.py."""

    presets: ClassVar = PRESETS

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
    scale: Literal["train", "slide", "both"] = "both"
    """features are z-scored by the training spots, by the slide's own spots (no label is used), or
    both, side by side"""
    target_scale: Literal["train", "slide"] = "train"
    """the MSE sees genes z-scored over the training spots, or within each slide: differences
    between slides are then no part of the task"""
    size: Literal["mini", "tiny", "small", "medium", "large"] = "mini"
    "layers, width and heads: 2 x 128 x 4, 2 x 256 x 4, 4 x 384 x 8, 6 x 512 x 8, 12 x 768 x 12"
    mode: Literal["dense", "global"] = "dense"
    "genes of every spot, or of the slide's mean"
    interactions: str = "p2p,p2h,h2p,h2h"
    """quadrants that are on, query first: p2h lets pathways read patches; without h2h all context
    flows through the pathways"""
    h2h: Literal["local", "whole"] = "local"
    "whom patches read: the lattice sites within --rings, or all patches of the slide"
    rings: int = 2
    "reach of local h2h in lattice steps"
    distance_bias: bool = True
    "local h2h scores get a learned bias per head and distance"
    position: Literal["none", "sincos", "mlp"] = "none"
    "code of the place in the slide added to a patch"
    tau: Literal["fixed", "learned"] = "learned"
    "temperature of the cosine scores: 1, or learned from 14.3 on"
    gene_sets: str = ""
    """GMT file: one token a set, gene weights begin as its members; empty: --pathways tokens,
    random weights"""
    shuffle_sets: bool = False
    "control: the genes of the sets are permuted"
    permute_pairs: bool = False
    "control: in the training slides image and expression of the spots are paired at random"
    pathways: int = 50
    "number of tokens without --gene_sets"
    loss: Literal["mse", "pcc", "mse_pcc", "zinb"] = "mse_pcc"
    "zinb is on raw counts with the spot's library size, which only training reads"
    pcc_weight: float = 1.0
    "weight of 1 - PCC in mse_pcc"
    lambda_pathway: float = 0.0
    "weight of the auxiliary loss on pathway scores (needs --gene_sets)"
    dropout: float = 0.1
    "dropout of features, attention output and feed-forward"
    lr: float = 3e-3
    "peak AdamW learning rate after a linear warm-up; a cosine follows"
    weight_decay: float = 0.01
    "AdamW weight decay"
    epochs: int = 30
    """most passes over the training slides; how many there are is chosen by cross-validation inside
    the training slides"""
    folds: int = 5
    """folds of that cross-validation, at most: over patients, over slides where there is one
    patient; 0: none, all --epochs are run"""
    members: int = 3
    "models trained on all training slides, each from its own start, and averaged"
    linear_weight: float = 0.5
    """share of one linear layer, trained in the same way, in the average of the predictions (dense
    mode); 0: the transformers alone"""
    batch: int = 1
    "slides a step"
    checkpointing: bool = False
    "recompute layers in the backward pass: less memory, more time"
    save_every: int = 0
    "epochs between checkpoints (latest.pt in the run's folder); 0: none"
    resume: bool = False
    "go on from latest.pt"
    predict: str = ""
    "checkpoint (model.pt of a run): predict --data with it, train nothing"


# --------------------------------------------------------------------------------------------------
# Slides -> tensors
# --------------------------------------------------------------------------------------------------


@dataclass
class Sample:
    """One slide, ready for the model. S spots, K places of the neighbour table, G genes."""

    name: str
    patient: str
    x: torch.Tensor  # (S, F) frozen features
    # (S, 2) position in lattice pitches
    place: torch.Tensor
    # (S, K) rows read by local h2h, the spot itself first
    table: torch.Tensor
    # (S, K) rounded distance in pitches, 0 = itself, -1 = empty place
    ring: torch.Tensor
    # the same table in blocks, see `in_blocks`
    blocks: tuple
    y: torch.Tensor = None  # (S, G) target
    counts: torch.Tensor = None  # (S, G) raw counts
    library: torch.Tensor = None  # (S,) counts of all genes
    # (S,) bool, spots with enough counts
    scored: torch.Tensor = None
    # (G,) bool, genes on this slide's panel
    measured: torch.Tensor = None
    slide: data.Slide = None
    # `collate` of it alone, on the device: made once for all epochs
    batch: dict = None


def neighbourhood(slide, rings):
    """place (S, 2) in pitches, table (S, K), ring (S, K) of local h2h: lattice sites within
    `rings`, else as many nearest spots."""
    if slide.n_spots < 2:
        raise DataError(
            f"slide {slide.sample} has {slide.n_spots} spot: a correlation across spots needs "
            "at least two, leave the slide out"
        )
    place = slide.xy / data.lattice_pitch(slide.xy)  # (S, 2)
    if rings == 0:
        table = np.zeros((slide.n_spots, 0), np.int64)
    elif slide.grid is not None:
        table = data.lattice_table(slide.grid, rings)
    else:
        table = data.knn_table(slide.xy, min(3 * rings * (rings + 1), slide.n_spots - 1))
    myself = np.arange(slide.n_spots)[:, None]
    # (S, K)
    distance = np.rint(np.linalg.norm(place[table] - place[:, None], axis=-1)).clip(1, rings + 1)
    ring = np.concatenate([np.zeros_like(myself), np.where(table < 0, -1, distance)], 1).astype(
        np.int64
    )
    # (S, K+1)
    table = np.concatenate([myself, np.where(table < 0, myself, table)], 1)
    place = place - place.mean(0)
    return (
        torch.tensor(place, dtype=torch.float32),
        torch.tensor(table),
        torch.tensor(ring),
        in_blocks(place, table, ring),
    )


def in_blocks(place, table, ring, size=BLOCK):
    """The neighbour table as small dense pieces, which is what a matrix product wants: spots are
    halved at the median of the wider axis until a block holds at most `size`, and the keys of a
    block are all spots that one of its spots reads, itself and a rim. Memory O(S size).

    -> rows (N, n) spots, keys (N, U) spots, ring (N, n, U) int8 as in the table, -1 = not read,
    slot (S,) place of a spot in the flattened rows.
    """
    pieces = [np.arange(len(place))]
    # all pieces have the same length, give or take one
    while len(pieces[0]) > size:
        halves = []
        for p in pieces:
            p = p[np.argsort(place[p, np.ptp(place[p], axis=0).argmax()], kind="stable")]
            halves += [p[: (len(p) + 1) // 2], p[(len(p) + 1) // 2 :]]
        pieces = halves
    keys = [np.unique(table[p][ring[p] >= 0]) for p in pieces]
    n, u = max(map(len, pieces)), max(map(len, keys))
    rows_of, keys_of, ring_of = (
        np.zeros((len(pieces), n), int),
        np.zeros((len(pieces), u), int),
        np.full((len(pieces), n, u), -1, np.int8),
    )
    slot = np.empty(len(place), int)
    for b, (p, k) in enumerate(zip(pieces, keys)):
        rows_of[b, : len(p)], keys_of[b, : len(k)], slot[p] = p, k, b * n + np.arange(len(p))
        row, used = np.arange(len(p))[:, None], ring[p] >= 0
        ring_of[b][np.broadcast_to(row, used.shape)[used], np.searchsorted(k, table[p][used])] = (
            ring[p][used]
        )
        # a row of padding reads something: no softmax over nothing
        ring_of[b, len(p) :, 0] = 0
    return tuple(map(torch.tensor, (rows_of, keys_of, ring_of, slot)))


def to_sample(config, slide, genes=None):
    """Slide -> Sample; without `genes` there is no target (prediction)."""
    out = Sample(
        slide.sample,
        slide.patient,
        hest.slide_features(config, slide),
        *neighbourhood(slide, config.rings),
        slide=slide,
    )
    if genes is not None:
        out.y, out.counts, out.library, out.measured = map(
            torch.from_numpy, hest.target_expression(slide, genes, config.target)
        )
        out.scored = torch.from_numpy(hest.enough_counts(slide, config.min_counts))
    return out


def read_gmt(path, genes, rng=None):
    """GMT file -> set names, membership (P, G) float32 of the sets with a gene on the list; with
    `rng` the genes are permuted (control)."""
    try:
        rows = [
            line.rstrip("\n").split("\t")
            for line in Path(path).read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read as a GMT file ({error}): give name, description and "
            "genes, tab-separated"
        ) from error
    member = np.array([np.isin(genes, row[2:]) for row in rows], np.float32).reshape(
        len(rows), len(genes)
    )
    keep = member.any(1)
    if not keep.any():
        raise DataError(
            f"{path} has no set with one of the {len(genes)} target genes: check species, "
            "gene naming and the tab-separated format"
        )
    member = member[keep] if rng is None else member[keep][:, rng.permutation(len(genes))]
    return [row[0] for row, k in zip(rows, keep) if k], torch.tensor(member)


def collate(samples, device="cpu"):
    """Samples -> dict of tensors padded to the longest slide: x (B, S, F), valid (B, S), ...
    `scored` (B, S, G) is where a target counts."""
    longest = max(len(s.x) for s in samples)

    def stack(name):
        parts = [
            F.pad(v, (0, 0) * (v.ndim - 1) + (0, longest - len(v))) if len(v) < longest else v
            for v in (getattr(s, name) for s in samples)
        ]
        return (torch.stack(parts) if len(parts) > 1 else parts[0][None]).to(device)

    out = {
        "x": stack("x"),
        "place": stack("place"),
        "blocks": stack_blocks([s.blocks for s in samples], longest, device),
    }
    # (B, S)
    out["valid"] = torch.stack([torch.arange(longest) < len(s.x) for s in samples]).to(device)
    # nothing is padded: known here, so that nobody waits for the device to ask
    out["whole"] = all(len(s.x) == longest for s in samples)
    if samples[0].y is not None:
        out |= {name: stack(name) for name in ("y", "counts", "library")}
        measured = torch.stack([s.measured for s in samples]).to(device)
        # (B, S, G)
        out["scored"] = stack("scored")[..., None] & measured[:, None]
    return out


def stack_blocks(blocks, longest, device):
    """Blocks of several slides in one list: rows (N, n), keys (N, U) and slot (B S,) count through
    the flattened (B S) spots; owner (N,) slide."""
    n, u = max(b[0].shape[1] for b in blocks), max(b[1].shape[1] for b in blocks)
    parts, first = [], 0
    for i, (rows, keys, ring, slot) in enumerate(blocks):
        width = rows.shape[1]
        ring = F.pad(ring, (0, u - keys.shape[1], 0, n - width), value=-1)
        ring[:, width:, 0] = 0
        slot = torch.div(slot, width, rounding_mode="floor") * n + slot % width + first
        parts.append(
            (
                F.pad(rows, (0, n - width)) + i * longest,
                F.pad(keys, (0, u - keys.shape[1])) + i * longest,
                ring,
                F.pad(slot, (0, longest - len(slot))),
                torch.full((len(rows),), i),
            )
        )
        first += len(rows) * n
    # rows, keys, ring, slot, owner
    return tuple(torch.cat(p).to(device) for p in zip(*parts))


# --------------------------------------------------------------------------------------------------
# Attention in four quadrants
# --------------------------------------------------------------------------------------------------


def in_pieces(function, pieces, dim=0):
    """function(*piece) of every piece, joined along `dim`. More than one: recomputed in the
    backward pass, so that the intermediate tensors of 100,000 spots never exist at once."""
    pieces = list(pieces)
    if len(pieces) == 1:
        return function(*pieces[0])
    return torch.cat(
        [
            checkpoint(function, *p, use_reentrant=False)
            if torch.is_grad_enabled()
            else function(*p)
            for p in pieces
        ],
        dim,
    )


class Layer(nn.Module):
    """Pre-norm transformer layer over [tokens; patches], Vaswani et al. 2017, with only the wanted
    quadrants of the attention computed.

    Masking a full (P + S)^2 matrix gives the same numbers (a test compares them): a query always
    reads itself, and its softmax runs over all keys of its row's quadrants together.
    """

    def __init__(self, dim, heads, quadrants, h2h="local", rings=0, dropout=0.1):
        super().__init__()
        self.heads, self.on, self.h2h = heads, frozenset(quadrants), h2h
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.ffn = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * dim, dim)
        )
        self.drop = nn.Dropout(dropout)
        # by rounded distance 0 .. rings + 1
        self.bias = nn.Parameter(torch.zeros(rings + 2, heads)) if rings else None

    def forward(self, t, h, valid, blocks, whole=False):
        """t (B, P, D) tokens, h (B, S, D) patches, valid (B, S), all True where `whole`, blocks of
        `stack_blocks` -> t, h."""
        # (B, ., H, d)
        (qt, kt, vt), (qh, kh, vh) = (
            self.qkv(self.norm1(a)).unflatten(-1, (3, self.heads, -1)).unbind(2) for a in (t, h)
        )
        t = t + self.drop(self.out(self.tokens_read(qt, kt, vt, kh, vh, valid, whole).flatten(2)))
        h = h + self.drop(
            self.out(self.patches_read(qh, kh, vh, kt, vt, valid, blocks, whole).flatten(2))
        )
        return tuple(a + in_pieces(self.feed_forward, zip(a.split(MANY, 1)), 1) for a in (t, h))

    def feed_forward(self, x):
        return self.drop(self.ffn(self.norm2(x)))

    def tokens_read(self, q, k, v, kh, vh, valid, whole):
        """p2p and p2h: q, k, v (B, P, H, d), kh, vh (B, S, H, d) -> (B, P, H, d). O(P (P + S)
        D)."""
        mask = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device)
        # itself only: the diagonal
        mask = (mask if "p2p" in self.on else mask.tril().triu())[None, None].expand(
            len(q), 1, -1, -1
        )
        if "p2h" in self.on:
            k, v = torch.cat([k, kh], 1), torch.cat([v, vh], 1)  # (B, P + S, H, d)
            # (B, 1, P, P + S)
            mask = torch.cat([mask, valid[:, None, None].expand(-1, 1, q.shape[1], -1)], -1)
        return sdpa(q, k, v, None if whole and "p2p" in self.on else mask)

    def patches_read(self, q, k, v, kt, vt, valid, blocks, whole):
        """h2p and h2h: q, k, v (B, S, H, d), kt, vt (B, P, H, d) -> (B, S, H, d). O(S (P + K) D),
        or O(S (P + S) D) with h2h whole."""
        if "h2p" not in self.on:
            kt, vt = kt[:, :0], vt[:, :0]
        if "h2h" not in self.on:
            return itself_and_tokens(q, k, v, kt, vt)
        if self.h2h == "whole":
            # (B, 1, 1, P + S)
            mask = torch.cat([valid.new_ones(kt.shape[:2]), valid], 1)[:, None, None]
            return sdpa(q, torch.cat([kt, k], 1), torch.cat([vt, v], 1), None if whole else mask)
        rows, keys, ring, slot, owner = blocks
        flat = [a.flatten(0, 1) for a in (q, k, v)]  # (B S, H, d)
        parts = zip(*(a.split(MANY // BLOCK) for a in (rows, keys, ring, owner)))
        return (
            in_pieces(self.block_reads, [(*flat, kt, vt, *part) for part in parts])
            .flatten(0, 1)[slot]
            .view(q.shape)
        )

    def block_reads(self, q, k, v, kt, vt, rows, keys, ring, owner):
        """Attention of N blocks: q, k, v (B S, H, d), kt, vt (B, P, H, d) -> (N, n, H, d)."""
        # (N, P + U, H, d)
        k, v = (torch.cat([a[owner], b[keys]], 1) for a, b in ((kt, k), (vt, v)))
        read = (ring >= 0)[:, None]  # (N, 1, n, U)
        if self.bias is None:
            mask = F.pad(read, (kt.shape[1], 0), value=True)
        else:
            at = torch.arange(len(self.bias), dtype=ring.dtype, device=ring.device)[:, None]
            # (N, rings, n U) one-hot, 0 where not read
            which = (ring.flatten(1)[:, None] == at).to(self.bias.dtype)
            # (N, H, n, U): an embedding's gradient, summed one by one, takes longer
            bias = (self.bias.T @ which).unflatten(2, ring.shape[1:])
            mask = F.pad(bias.masked_fill(~read, float("-inf")), (kt.shape[1], 0))
        return sdpa(q[rows], k, v, mask)


def itself_and_tokens(q, k, v, kt, vt):
    """A patch's softmax over itself and the tokens: the bottleneck, O(S P D). q, k, v (B, S, H, d),
    kt, vt (B, P, H, d) -> (B, S, H, d)."""
    q = q * q.shape[-1] ** -0.5
    # (B, S, H, 1 + P)
    weight = torch.cat(
        [(q * k).sum(-1, keepdim=True), torch.einsum("bshd,bphd->bshp", q, kt)], -1
    ).softmax(-1)
    return weight[..., :1] * v + torch.einsum("bshp,bphd->bshd", weight[..., 1:], vt)


def sdpa(q, k, v, mask):
    """Scaled dot-product attention, q (B, n, H, d), k, v (B, m, H, d), mask (B, 1 or H, n or 1, m)
    True = read, or added to the scores; None, which
    opens the fused kernels: all are read."""
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)


class Position(nn.Module):
    """Code of the place in the slide, (B, S, 2) -> (B, S, D), from positions centred over the valid
    spots: padding changes nothing.

    sincos: D/2 channels an axis, sin and cos of x w_i, w_i = 10000^(-2i/(D/2)), x in lattice
    pitches (Vaswani et al. 2017, in 2-D).
    mlp: Linear - GELU - Linear of x / max |x|.
    """

    def __init__(self, kind, dim):
        super().__init__()
        self.kind, self.dim = kind, dim
        self.mlp = (
            nn.Sequential(nn.Linear(2, dim), nn.GELU(), nn.Linear(dim, dim))
            if kind == "mlp"
            else None
        )

    def forward(self, place, valid):
        used = valid[..., None].to(place.dtype)  # (B, S, 1)
        place = (place - (place * used).sum(1, keepdim=True) / used.sum(1, keepdim=True)) * used
        if self.kind == "mlp":
            return self.mlp(place / place.abs().amax((1, 2), keepdim=True).clamp(min=1))
        # (D/4,)
        w = 10000 ** (-torch.arange(0, self.dim // 2, 2, device=place.device) / (self.dim // 2))
        angle = place[..., None] * w  # (B, S, 2, D/4)
        return torch.stack([angle.sin(), angle.cos()], -1).flatten(2)  # (B, S, D)


class PathwayTransformer(nn.Module):
    """features (B, S, F) -> genes (B, S, G), or (B, G) in global mode, by way of pathway scores (B,
    S, P)."""

    def __init__(
        self,
        dim_in,
        n_genes,
        n_pathways=50,
        layers=2,
        dim=256,
        heads=4,
        quadrants=QUADRANTS,
        h2h="local",
        rings=2,
        distance_bias=False,
        position="none",
        tau="fixed",
        zinb=False,
        dropout=0.1,
        checkpointing=False,
        mode="dense",
    ):
        super().__init__()
        self.checkpointing, self.mode = checkpointing, mode
        self.embed = nn.Linear(dim_in, dim)
        self.position = None if position == "none" else Position(position, dim)
        self.tokens = nn.Parameter(torch.randn(n_pathways, dim))
        bias = rings if distance_bias and h2h == "local" and "h2h" in quadrants else 0
        self.layers = nn.ModuleList(
            Layer(dim, heads, quadrants, h2h, bias, dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.log_tau = nn.Parameter(torch.tensor(1 / 0.07).log()) if tau == "learned" else None
        self.genes = nn.Linear(n_pathways, n_genes)
        self.dropped, self.thickness = (
            (nn.Linear(n_pathways, n_genes), nn.Linear(n_pathways, n_genes))
            if zinb
            else (None, None)
        )
        self.drop = nn.Dropout(dropout)
        nn.init.zeros_(self.genes.bias)

    def forward(self, x, place, valid, blocks, whole=False, **_):
        """x (B, S, F), place (B, S, 2), valid (B, S), all True where `whole`, blocks of
        `stack_blocks` -> dict: genes, scores (B, S, P) and, with zinb, pi and theta."""
        h = self.embed(self.drop(x))  # (B, S, D)
        if self.position is not None:
            h = h + self.position(place, valid)
        t = self.tokens.expand(len(x), -1, -1)  # (B, P, D)
        for layer in self.layers:
            given = t, h, valid, blocks, whole
            t, h = (
                checkpoint(layer, *given, use_reentrant=False)
                if self.checkpointing
                else layer(*given)
            )
        t, h = self.norm(t), self.norm(h)
        if self.mode == "global":
            # (B, 1, D)
            h = (h * valid[..., None]).sum(1, keepdim=True) / valid.sum(1)[:, None, None]
        # (B, S, P) cosines
        s = F.normalize(h, dim=-1) @ F.normalize(t, dim=-1).transpose(1, 2)
        if self.log_tau is not None:
            s = s * self.log_tau.exp()
        out = {"genes": self.genes(s), "scores": s}
        if self.dropped is not None:
            out |= {"pi": self.dropped(s) - 3, "theta": F.softplus(self.thickness(s) + 0.5) + 1e-6}
        return {k: v.squeeze(1) for k, v in out.items()} if self.mode == "global" else out

    @torch.no_grad()
    def start_from_sets(self, member):
        """Gene weights W[:, p] = members of set p / their number; member (P, G)."""
        self.genes.weight.copy_((member / member.sum(1, keepdim=True).clamp(min=1)).T)
        nn.init.zeros_(self.genes.bias)


def quadrants(text):
    """`p2p,h2p` -> ("p2p", "h2p"), `all` -> all four. Raises DataError for an unknown name."""
    names = QUADRANTS if text == "all" else tuple(text.split(","))
    if not set(names) <= set(QUADRANTS):
        raise DataError(
            f"--interactions {text} is not a comma-separated choice of "
            f"{', '.join(QUADRANTS)}: correct it"
        )
    return names


# --------------------------------------------------------------------------------------------------
# Losses. mask (B, S, G) is True where a gene was measured and the spot has counts enough; nothing
# else is read
# --------------------------------------------------------------------------------------------------


def masked_mse(pred, true, mask):
    """Mean squared error over the places of the mask."""
    return ((pred - true).square() * mask).sum() / mask.sum().clamp(min=1)


def masked_pcc(pred, true, mask):
    """Pearson r (B, G) of every slide and gene over its valid spots, defined (B, G): where there
    are two spots and the truth varies."""
    n = mask.sum(1, keepdim=True).clamp(min=1)  # (B, 1, G)
    p, t = ((a - (a * mask).sum(1, keepdim=True) / n) * mask for a in (pred, true))
    defined = (n[:, 0] >= 2) & (t.square().sum(1) > 1e-6)
    return (p * t).sum(1) / (
        (p.square().sum(1) + 1e-8).sqrt() * (t.square().sum(1) + 1e-8).sqrt()
    ), defined


def pcc_loss(pred, true, mask):
    """1 - mean r over the slides and genes where it is defined (0 where it is nowhere)."""
    r, defined = masked_pcc(pred, true, mask)
    return ((1 - r) * defined).sum() / defined.sum().clamp(min=1)


def zinb_nll(y, mu, theta, pi, mask):
    """Mean negative log-likelihood of zero-inflated negative binomial counts; mu mean, theta
    inverse dispersion, pi logit of the inflation.

    log NB = lgamma(y + th) - lgamma(th) - lgamma(y + 1) + th log(th / (th + mu)) + y log(mu / (th +
    mu)); P(0) = pi + (1 - pi) NB(0), P(y > 0) = (1 - pi) NB(y).
    """
    # lgamma of a million counts is off by one in float32
    kind, (y, mu, theta, pi) = mu.dtype, (a.double() for a in (y, mu, theta, pi))
    mu, theta = mu.clamp(1e-8, 1e6), theta.clamp(1e-8, 1e6)
    log_rest = theta.log() - (theta + mu).log()  # log th / (th + mu)
    nb = (
        torch.lgamma(y + theta)
        - torch.lgamma(theta)
        - torch.lgamma(y + 1)
        + theta * log_rest
        + y * (mu.log() - (theta + mu).log())
    )
    log_in, log_out = F.logsigmoid(pi), F.logsigmoid(-pi)
    log_p = torch.where(y == 0, torch.logaddexp(log_in, log_out + theta * log_rest), log_out + nb)
    return (-(log_p * mask).sum() / mask.sum().clamp(min=1)).to(kind)


def pathway_targets(y, mask, member):
    """z-scored genes averaged over the measured members of each set: y (B, S, G), mask (B, S, G),
    member (P, G) -> (B, S, P), present (B, P)."""
    n = mask.sum(1, keepdim=True)  # (B, 1, G)
    d = (y - (y * mask).sum(1, keepdim=True) / n.clamp(min=1)) * mask
    # unbiased, per slide
    z = d / (d.square().sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt().clamp(min=1e-6)
    # (B, P) members on the panel
    found = (n[:, 0] > 0).to(y.dtype) @ member.T
    return z @ member.T / found.clamp(min=1)[:, None], found > 0


def pathway_loss(scores, y, mask, member):
    """1 - PCC between pathway scores (B, S, P) and their targets. Circular by construction: the
    target is a linear function of the genes."""
    target, present = pathway_targets(y, mask, member)
    return pcc_loss(scores, target.detach(), mask.any(-1, keepdim=True) & present[:, None])


# --------------------------------------------------------------------------------------------------
# Training: scaler, loss of a batch, one member, the average of members
# --------------------------------------------------------------------------------------------------


class Scaler:
    """Mean and spread of features and targets, counts per 10,000 of each gene and the median
    library size, over the scored training spots; genes where measured."""

    def __init__(self, tensors):
        self.tensors = tensors

    @classmethod
    def fit(cls, samples, by="train"):
        mean, std = hest.mean_and_std([s.x[s.scored] for s in samples])
        depth = torch.cat([s.library[s.scored] for s in samples]).median()
        scale = {"x_mean": mean, "x_std": std, "median_library": depth}
        return cls(scale | hest.target_statistics(samples, by))

    def features(self, sample, scale):
        """The sample with z-scored features: by the training spots, or by all its own spots."""
        mean, std = self.tensors["x_mean"], self.tensors["x_std"]
        return replace(sample, x=hest.scaled_features(sample.x, mean, std, scale))

    def to(self, device):
        return Scaler({k: v.to(device) for k, v in self.tensors.items()})

    def standardise_targets(self, y, mask, by):
        """Targets (B, S, G) in units of their spread over the training spots, or z-scored within
        each slide over the mask."""
        mean, std = self.tensors["y_mean"], self.tensors["y_std"]
        return hest.standardise_targets(y, mask, mean, std, by)

    def mean_counts(self, out, library):
        """mu (B, S, G) of the negative binomial: library / 10,000 x training rate x softplus, which
        is the training rate at the start."""
        return library[..., None] / 1e4 * self.tensors["rate"] * F.softplus(out["genes"] + 0.5413)

    def predicted(self, out, config):
        """Network output -> target units.

        Expected counts of zinb are those of a spot of 10,000 counts (target cp10k) or of the median
        training library (log1p): a spot's own library is the sum of what is to be predicted."""
        if config.loss != "zinb":
            return out["genes"] * self.tensors["y_std"] + self.tensors["y_mean"]
        is_composition = config.target == "cp10k"
        depth = torch.tensor(1e4) if is_composition else self.tensors["median_library"]
        library = depth.to(out["genes"]).expand(out["genes"].shape[:-1])  # (B, S)
        return torch.log1p(self.mean_counts(out, library) * torch.sigmoid(-out["pi"]))


def bag_mean(y, mask):
    """(B, S, G) -> (B, G) mean over the valid spots, and where there is one."""
    n = mask.sum(1)
    return (y * mask).sum(1) / n.clamp(min=1), n > 0


def loss_of(out, batch, scaler, config, member=None, bag=False):
    """The training loss of a batch; targets and predictions are in units of the genes' spread, so
    all genes count alike."""
    mask = batch["scored"]
    by = "train" if bag else config.target_scale
    true = scaler.standardise_targets(batch["y"], mask, by)
    if bag:
        mean, there = bag_mean(true, mask)
        return masked_mse(out["genes"], mean, there)
    if config.loss == "zinb":
        loss = zinb_nll(
            batch["counts"],
            scaler.mean_counts(out, batch["library"]),
            out["theta"],
            out["pi"],
            mask,
        )
    else:
        loss = masked_mse(out["genes"], true, mask) * (config.loss != "pcc")
        if config.loss != "mse":
            loss = loss + config.pcc_weight * pcc_loss(out["genes"], true, mask)
    if config.lambda_pathway and member is not None and "scores" in out:
        loss = loss + config.lambda_pathway * pathway_loss(out["scores"], true, mask, member)
    return loss


@torch.no_grad()
def predict(models, sample, scaler, config):
    """Mean over models of genes (S, G) or (G,) in target units, and of pathway scores (S, P),
    numpy; eval mode, one slide."""
    device = next(models[0].parameters()).device
    batch, scaler = sample.batch or collate([sample], device), scaler.to(device)
    with run.autocast(config, device):
        outs = [{k: v.float() for k, v in model.eval()(**batch).items()} for model in models]
    genes = torch.stack([scaler.predicted(out, config)[0] for out in outs]).mean(0)
    scores = (
        torch.stack([out["scores"][0] for out in outs]).mean(0).cpu().numpy()
        if "scores" in outs[0]
        else None
    )
    return genes.cpu().numpy(), scores


def validation_score(model, samples, scaler, config, bag):
    """Mean per-slide PCC on held-out training slides; for bags minus the error of the slide
    mean."""
    found = []
    for s in samples:
        genes, rows, measured = (
            predict([model], s, scaler, config)[0],
            s.scored.numpy(),
            s.measured.numpy(),
        )
        true = s.y.numpy()[rows][:, measured]
        if bag:
            found.append(
                -float(
                    np.sqrt(
                        np.mean(
                            (
                                (genes[measured] - true.mean(0))
                                / scaler.tensors["y_std"].numpy()[measured]
                            )
                            ** 2
                        )
                    )
                )
            )
        else:
            found.append(metrics.pcc_summary(true, genes[rows][:, measured])["pcc_mean"])
    return float(np.nanmean(found)) if np.isfinite(found).any() else -np.inf


def learning_rate(epoch, config):
    """Linear over the first tenth of the epochs, then a cosine to a hundredth."""
    warm = max(1, config.epochs // 10)
    rest = (epoch - warm) / max(1, config.epochs - warm)
    return float(
        config.lr
        * ((epoch + 1) / warm if epoch < warm else 0.01 + 0.99 * (1 + np.cos(np.pi * rest)) / 2)
    )


def train_one(
    make,
    fit,
    val,
    scaler,
    config,
    device,
    epochs,
    number=0,
    member=None,
    bag=False,
    saved=None,
    save=None,
):
    """One model, `epochs` passes over the slides `fit`. Returns it and its history [(loss, score on
    the slides `val` or nan)].

    Every epoch seeds itself, so going on from `saved` gives what an uninterrupted run gives.
    """
    torch.manual_seed(1_000_003 * config.seed + number)
    model = run.compiled(make().to(device), config)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay, foreach=True
    )
    history = []
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        history = [tuple(h) for h in saved["history"]]
    there, member = scaler.to(device), None if member is None else member.to(device)
    val = [replace(s, batch=collate([s], device)) for s in val]
    fit = [replace(s, batch=collate([s], device)) for s in fit] if config.batch == 1 else fit
    for epoch in run.progress(range(len(history), epochs), "epochs"):
        torch.manual_seed(1_000_003 * config.seed + 1009 * (number + 1) + epoch)
        model.train()
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(epoch, config)
        losses, steps = [], torch.randperm(len(fit)).split(config.batch)
        for rows in steps:
            batch = (
                dict(fit[rows[0]].batch)
                if config.batch == 1
                else collate([fit[i] for i in rows], device)
            )
            # another half of the spots each time: few slides make few bags
            if bag:
                half = torch.rand(batch["valid"].shape, device=device) < 0.5
                batch |= {
                    "valid": batch["valid"] & half,
                    "scored": batch["scored"] & half[..., None],
                    "whole": False,
                }
            with run.autocast(config, device):
                loss = loss_of(
                    {k: v.float() for k, v in model(**batch).items()},
                    batch,
                    there,
                    config,
                    member,
                    bag,
                )
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            losses.append(loss.detach())
        # the host waits for the device here only
        total = sum(
            v * len(rows) / len(fit) for v, rows in zip(torch.stack(losses).tolist(), steps)
        )
        if not np.isfinite(total):
            raise DataError(
                f"the loss is {total} at epoch {epoch}: lower --lr, or check the inputs for "
                "extreme values"
            )
        history.append(
            (total, validation_score(model, val, scaler, config, bag) if val else float("nan"))
        )
        if save is not None and config.save_every and (epoch + 1) % config.save_every == 0:
            save(
                {
                    "model": model.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "history": history,
                }
            )
    return model, history


def train(make, samples, scaler, config, device, member=None, bag=False, latest=None, origin=None):
    """Cross-validation inside the training slides chooses the number of epochs; then `members`
    models are trained on all of them. Under torchrun the folds, and then the members, are shared
    out to the processes.

    Returns models, histories of the folds and the members, the best mean validation score (nan
    without folds). latest: path of latest.pt or None; origin: see `jobs.Jobs`.
    """
    queue = jobs.Jobs(config, latest, origin, "stformer checkpoint", is_shared=True)
    folds = hest.inner_folds(samples, config.folds, lambda s: s.place)
    if config.folds and not folds:
        raise DataError(
            f"slide {samples[0].name} is too small to train on alone: give more training slides"
        )

    def train_on(fit, val, epochs):
        given = (make, fit, val, scaler, config, device, epochs)
        return partial(train_one, *given, member=member, bag=bag)

    for fit, val in folds:
        queue.do(train_on(fit, val, config.epochs))
    epochs, best = config.epochs, float("nan")
    if folds:
        queue.exchange(0, epochs, device)
        epochs, best = hest.best_epochs(queue.histories()[: len(folds)])
    for _ in range(config.members):
        queue.do(train_on(samples, [], epochs), keep_weights=True)
    queue.exchange(len(folds), epochs, device, make)
    models = [make().to(device) for _ in range(config.members)]
    for model, job in zip(models, queue.done[len(folds) :]):
        model.load_state_dict(job["weights"])
    return models, queue.histories(), best


# --------------------------------------------------------------------------------------------------
# Baselines: the same features, targets, training spots and scores
# --------------------------------------------------------------------------------------------------


def classical_baselines(raw, fit, test):
    """{name: [prediction (S, G) per test sample]} of the predictors without a network. raw:
    unscaled samples by name; fit, test: names."""
    features = {n: raw[n].x.double().numpy() for n in [*fit, *test]}
    near = {
        n: baselines.neighbour_mean(raw[n].x, raw[n].table, raw[n].ring >= 0).double().numpy()
        for n in [*fit, *test]
    }
    samples = [raw[n] for n in fit]
    x, x_near = (hest.scored_rows(samples, [a[n] for n in fit]) for a in (features, near))
    y = hest.scored_rows(samples, [s.y.double() for s in samples])
    measured = np.concatenate(
        [np.tile(s.measured.numpy(), (int(s.scored.sum()), 1)) for s in samples]
    )
    y, mean = hest.fill_unmeasured(y, measured)
    tests, tests_near = ([a[n] for n in test] for a in (features, near))
    return {
        "train_mean": [np.tile(mean, (len(t), 1)) for t in tests],
        **baselines.feature_baselines(x, y, tests),
        **baselines.neighbour_baselines(x, x_near, y, tests, tests_near),
    }


def baseline_flags(config):
    """The flags for a predictor without pathways: a linear layer predicts values, not a
    likelihood's parameters."""
    out = copy.copy(config)
    out.loss, out.lambda_pathway = "mse" if config.loss == "zinb" else config.loss, 0.0
    out.bf16 = out.compile = False
    return out


def trained_baselines(samples, test, scaler, config, device):
    """{name: [prediction per test sample]} of the networks of `bags`, trained as the model is; and
    the linear layers."""

    def train_network(name, make):
        is_bag, flags = name in bags.BAGS, baseline_flags(config)
        if is_bag:
            flags.folds, flags.members, flags.batch = 0, 1, 1
        else:
            flags.lr = max(flags.lr, 1e-2)  # one layer from zero needs larger steps
        models, *_ = train(make, samples, scaler, flags, device, bag=is_bag)
        return models, [predict(models, s, scaler, flags)[0] for s in test]

    predictions, models = bags.trained_baselines(samples, test, train_network)
    return predictions, models["linear"]


def with_linear(pairs, linear, config):
    """[(genes (S, G), scores)] of the transformers -> genes averaged with those of the linear
    layers. A bag's answer (global mode) stays as it is."""
    w = 0.0 if config.mode == "global" else config.linear_weight
    if not w:
        return pairs
    return [((1 - w) * genes + w * layer, s) for (genes, s), layer in zip(pairs, linear)]


# --------------------------------------------------------------------------------------------------
# The program
# --------------------------------------------------------------------------------------------------


def variant(config):
    """Folder name of the run: split where it is not the folder's own, preset, and every other flag
    that is not at its default."""
    words = [config.split] * (config.split != "folds") + [config.size]
    return run.variant(config, words, ("split", "fold", "patient", "size"))


def build(config, dim_in, n_genes, n_pathways):
    """PathwayTransformer from the flags. Raises DataError for quadrants that cannot work."""
    layers, dim, heads = SIZES[config.size]
    on = quadrants(config.interactions)
    if "h2p" in on and "p2h" in on and "h2h" not in on and layers < 2:
        raise DataError(
            "without h2h a patch hears of others only through the pathways: two layers at "
            "least, choose another --size"
        )
    return PathwayTransformer(
        dim_in,
        n_genes,
        n_pathways,
        layers,
        dim,
        heads,
        on,
        config.h2h,
        config.rings,
        config.distance_bias,
        config.position,
        config.tau,
        config.loss == "zinb",
        config.dropout,
        config.checkpointing,
        config.mode,
    )


def shuffled_pairs(sample, seed):
    """The sample with another spot's image at every spot (control)."""
    out = copy.copy(sample)
    out.x = sample.x[
        torch.from_numpy(np.random.default_rng([seed, len(sample.x)]).permutation(len(sample.x)))
    ]
    return out


def score(samples, predictions, rates=None):
    """Scores across the scored spots of the samples, and of the slide's mean."""
    scores = hest.score(samples, predictions, rates)
    return scores | hest.slide_mean_scores(samples, predictions)


def load(config, train_names, test_names):
    """Samples by name (features unscaled), genes; prints what was filtered."""
    need = not hest.has_feature_files(config.encoder)
    slides = hest.load_slides(config.data, [*train_names, *test_names], need)
    fit = [slides[n] for n in train_names]
    genes = hest.target_genes(config.genes, fit, config.data, config.min_counts)
    samples = {n: to_sample(config, slides[n], genes) for n in slides}
    for sample in samples.values():
        hest.say_what_is_left_out(sample, config.min_counts)
    return samples, genes


def main(argv=None):
    """Train and score one model, or predict with one (--predict)."""
    start = time.perf_counter()
    config = run.parse(Config, argv, __doc__.split("\n")[0])
    check(config)
    if config.predict:
        return predict_folder(config, start)
    split, train_names, test_names, part, leaks = hest.hest_partition(
        config.data, config.split, config.fold, config.patient, config.slice
    )
    record = run.Run("stformer", config, part, variant(config), start)
    raw, genes = load(config, train_names, test_names)
    slides = [raw[n].slide for n in [*train_names, *test_names]]
    more = [*hest.task_files(config), config.gene_sets]
    checksum = record.note_inputs(input_files(slides, config.encoder, more))
    sets, member = [], None
    if config.gene_sets:
        sets, member = read_gmt(
            config.gene_sets,
            genes,
            np.random.default_rng(config.seed) if config.shuffle_sets else None,
        )
    if record.world > 1 and (config.save_every or config.resume):
        raise DataError(
            "several processes write no checkpoints: leave --save_every and --resume away, "
            "or start one process"
        )
    run.say(
        f"{part}: {split.detail}; train {' '.join(train_names)}, test {' '.join(test_names)}; "
        f"{len(genes)} genes, "
        f"{raw[test_names[0]].x.shape[1]} features, "
        + (
            f"{len(sets)} gene sets with a target gene"
            if sets
            else f"{config.pathways} tokens without gene sets"
        )
    )
    if config.permute_pairs:
        raw |= {n: shuffled_pairs(raw[n], config.seed) for n in train_names}
    scaler = Scaler.fit([raw[n] for n in train_names], config.target_scale)
    fit, test = (
        [scaler.features(raw[n], config.scale) for n in names]
        for names in (train_names, test_names)
    )
    trained, linear = trained_baselines(fit, test, scaler, config, record.device)
    predictions = classical_baselines(raw, train_names, test_names) | trained
    rates = hest.simulated_rates(config.data, test, genes, normalised=False)
    others = {name: score(test, p, rates) for name, p in predictions.items()}
    for name, s in others.items():
        run.say(hest.table_row(name, s, COLUMNS))

    def make():
        model = build(config, fit[0].x.shape[1], len(genes), len(sets) or config.pathways)
        if member is not None:
            model.start_from_sets(member)
        return model

    bag = config.mode == "global"
    models, histories, val = train(
        make,
        fit,
        scaler,
        config,
        record.device,
        member,
        bag,
        record.folder / "latest.pt",
        [checksum, train_names, test_names, [str(g) for g in genes]],
    )
    alone = [predict(models, s, scaler, config) for s in test]
    pairs = with_linear(alone, trained["linear"], config)
    genes_found = [np.tile(p, (len(s.x), 1)) if bag else p for (p, _), s in zip(pairs, test)]
    found = score(test, genes_found, rates)
    if not bag:
        found["pcc_mean_transformer"] = score(test, [p for p, _ in alone])["pcc_mean"]
    # of the transformer, for choices between flags: never the test score
    found["val_pcc"] = val
    found |= {f"gain_over_{name}": found["pcc_mean"] - others[name]["pcc_mean"] for name in others}
    if member is not None and not bag:
        found["pathway_pcc"] = pathway_agreement(test, pairs, member)
    run.say(
        hest.table_row("stformer", found, COLUMNS)
        + f"  gain over ridge {found['gain_over_ridge_raw']:+.3f} (raw), "
        f"{found['gain_over_ridge_pca256']:+.3f} (PCA 256)"
    )
    arrays = arrays_of(test, genes_found, pairs, genes, sets)
    draw(record, test, genes_found, pairs, genes, sets, histories, bag)
    record.finish(
        found,
        others,
        arrays,
        sum(w.numel() for w in models[0].parameters()),
        split,
        {"model.pt": lambda f: torch.save(state_of(config, models, linear, scaler, genes, sets), f)}
        | export.files_of("stformer", arrays, [s.slide for s in test], config),
        target=config.target,
        leaks_patient=leaks,
        train_slides=train_names,
        test_slides=test_names,
        epochs=len(histories[-1]),
        low_count_spots={n: int((~s.scored).sum()) for n, s in raw.items()},
        genes="the folder's list, chosen by its makers on all slides"
        if config.genes == "task"
        else "training slides",
    )
    return 0


def check(config):
    """Raises DataError naming the flag that has an impossible value."""
    one, zero = run.AT_LEAST_ONE, run.AT_LEAST_ZERO
    run.check_flags(
        config,
        {
            "fold": zero,
            "min_counts": zero,
            "rings": zero,
            "pathways": one,
            "pcc_weight": zero,
            "lambda_pathway": zero,
            "lr": run.POSITIVE,
            "dropout": (lambda v: 0 <= v < 1, "from 0 to below 1"),
            "weight_decay": zero,
            "epochs": one,
            "folds": (lambda v: v == 0 or v >= 2, "0, or 2 or more"),
            "members": one,
            "linear_weight": (lambda v: 0 <= v <= 1, "from 0 to 1"),
            "batch": one,
            "save_every": zero,
        },
    )
    run.refuse_idle_flags(config, idle_flags(config))


def idle_flags(config):
    """Rules for the flags that do nothing beside the others, as `run.refuse_idle_flags` takes
    them. --rings, and in global mode the loss, still rule the baselines."""
    if config.predict:
        return [run.idle_with_predict(config, ())]
    split, has_h2h = f"with --split {config.split}", "h2h" in quadrants(config.interactions)
    is_local = has_h2h and config.h2h == "local" and config.rings > 0
    has_pcc = config.loss in ("pcc", "mse_pcc")
    return [
        (config.split != "folds", split, ("fold",)),
        (config.split != "patient", split, ("patient",)),
        (config.split != "section", split, ("slice",)),
        (not has_h2h, f"with --interactions {config.interactions}", ("h2h",)),
        (not is_local, "without local h2h of a ring or more", ("distance_bias",)),
        (not config.gene_sets, "without --gene_sets", ("shuffle_sets", "lambda_pathway")),
        (bool(config.gene_sets), "with --gene_sets", ("pathways",)),
        (not has_pcc, f"with --loss {config.loss}", ("pcc_weight",)),
        (config.mode == "global", "in --mode global", ("linear_weight", "lambda_pathway")),
    ]


def pathway_agreement(samples, pairs, member):
    """Mean PCC of the pathway scores with z-scored, member-averaged measured genes, over sets and
    test slides."""
    found = []
    for s, (_, scores) in zip(samples, pairs):
        mask = (s.scored[:, None] & s.measured)[None]
        target, present = pathway_targets(s.y[None], mask, member)
        r, defined = masked_pcc(
            torch.tensor(scores)[None], target, mask.any(-1, keepdim=True) & present[:, None]
        )
        found += r[defined].tolist()
    return float(np.mean(found)) if found else float("nan")


def arrays_of(samples, predictions, pairs, genes, sets):
    """What arrays.npz holds: spots of all test slides one below the other."""
    arrays = hest.spot_arrays(samples, predictions, genes)
    arrays["gene_sets"] = np.array(sets, dtype=str)
    if pairs[0][1] is not None and pairs[0][1].ndim == 2:
        arrays["pathway_scores"] = np.concatenate([scores for _, scores in pairs])
    return arrays


def state_of(config, models, linear, scaler, genes, sets):
    """Everything that --predict needs, as tensors, numbers and strings: loads with
    weights_only=True."""
    return {
        "config": vars(config).copy(),
        "genes": list(genes),
        "gene_sets": list(sets),
        "scaler": scaler.tensors,
        "weights": [model.state_dict() for model in models],
        "linear": [layer.state_dict() for layer in linear],
    }


def predict_folder(config, start):
    """Predict the genes of slides that have no counts with a saved model; one folder of results for
    all of them."""
    saved = run.read_checkpoint(config.predict, "stformer checkpoint", ["config"])
    known = run.saved_flags(config.predict, Config, saved["config"], check)
    with run.checkpoint_fits(config.predict):
        scaler, genes, sets, weights, linear = (
            saved[k] for k in ("scaler", "genes", "gene_sets", "weights", "linear")
        )
        dim_in = len(scaler["x_mean"])
    slides = hest.new_slides(config, known)
    record = run.Run(
        "stformer",
        config,
        config.slice or "all",
        f"predict-{variant(known)}-{data.file_checksum(config.predict)[:8]}",
        start,
    )
    record.note_inputs(input_files(slides, known.encoder, [config.predict]))
    samples = [to_sample(known, s) for s in slides]
    for s in samples:
        hest.check_width(s.x, dim_in, s.name, known.encoder, config.predict)
    with run.checkpoint_fits(config.predict):
        if {scaler[name].shape for name in ("y_mean", "y_std", "rate")} != {(len(genes),)}:
            raise ValueError("its scaler is of other genes")
        if known.loss == "zinb" and "median_library" not in scaler:
            raise ValueError("it lacks the median library")
        scaler = Scaler(scaler)
        samples = [scaler.features(s, known.scale) for s in samples]
    with run.checkpoint_fits(config.predict):
        models = [
            build(known, samples[0].x.shape[1], len(genes), len(sets) or known.pathways).to(
                record.device
            )
            for _ in weights
        ]
        layers = [
            bags.OneLinear(samples[0].x.shape[1], len(genes)).to(record.device) for _ in linear
        ]
        for model, w in zip(models + layers, weights + linear):
            model.load_state_dict(w)
    pairs = with_linear(
        [predict(models, s, scaler, known) for s in samples],
        [predict(layers, s, scaler, baseline_flags(known))[0] for s in samples],
        known,
    )
    found = [
        np.tile(p, (len(s.x), 1)) if known.mode == "global" else p
        for (p, _), s in zip(pairs, samples)
    ]
    draw(record, samples, found, pairs, genes, sets, [], known.mode == "global")
    arrays, known.h5ad = arrays_of(samples, found, pairs, genes, sets), config.h5ad
    record.finish(
        {},
        {},
        arrays,
        sum(w.numel() for w in models[0].parameters()),
        files=export.files_of("stformer", arrays, slides, known),
        checkpoint=config.predict,
    )
    return 0


def draw(record, samples, predictions, pairs, genes, sets, histories, bag):
    """Figures of the first slide: true and predicted maps of the five best and the five worst
    genes, pathway maps; training curves."""
    scores = pairs[0][1]
    record.figure("genes", figures.gene_maps(samples[0], predictions[0], genes))
    if scores is not None and not bag:
        names = [n.removeprefix("HALLMARK_").lower()[:24] for n in sets]
        names = names or [f"token {j}" for j in range(scores.shape[1])]
        maps = figures.most_varied_maps(scores, names, samples[0].slide.xy)
        record.figure("pathways", maps)
    if histories:
        losses = {f"job {i}": [row[0] for row in h] for i, h in enumerate(histories)}
        curves = {f"fold {i}": [row[1] for row in h] for i, h in enumerate(histories)}
        curves = {name: v for name, v in curves.items() if np.isfinite(v[-1])}
        record.figure("training", figures.training_curves(losses, curves, "validation score"))
    figures.close()


if __name__ == "__main__":
    run.cli(main)
