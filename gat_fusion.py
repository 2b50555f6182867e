"""Cortical layers from expression and spatial context: MLP + graph attention + cross-attention
(supervised).

The system of the public repository "spatial-omics-fusion" (seed of this file), written from its
description:

    X (N, G) --MLP--> E (N, 128) --GAT x 2--> S (N, 128)
    E ------------- query -------------+
    S of the k neighbours - key, value +-> cross-attention x 2 -> Z (N, 128) -> classes

Training is full-graph: one optimiser step per epoch. Every run prints the predictors that see no
gene (coordinates only) first, because on randomly held-out spots they are as good as the published
networks; see docs/gat_fusion.md.

    python gat_fusion.py --data datasets/dlpfc --slice 151673 --mode full --fusion cross
    python gat_fusion.py --data datasets/dlpfc --slice 151674 --split slice --train 151673
    python gat_fusion.py --data my_visium_folder --predict runs/.../model.pt
"""

import copy
import time
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import scipy.sparse as sp
import torch
from torch import nn
from torch.nn import functional as F

import data
import metrics
from data import DataError
from evaluation import baselines, figures
from plainst import export, run
from plainst.features import input_files
from plainst.layers import Dropout, NormFirst
from plainst.neighbour_sums import (
    neighbour_products,
    softmax_over_table,
    weighted_neighbour_sum,
)
from plainst.scaled import ScaledRows, agreed_library, library_sizes
from plainst.tiles import make_tiles, prediction_size

GAT_MODES = {"gat_only", "concat", "full", "embedding", "multimodal"}
GCN_MODES = {"gcn_only", "gcn_full"}
# the graph layers see the genes, there is no MLP
GRAPH_ONLY = {"gat_only", "gcn_only"}
IMAGE_MODES = {"img_expr", "multimodal"}
EMBEDDING_MODES = {"embedding_only", "embedding"}
# two embeddings meet as --fusion says
FUSED_MODES = {"full", "gcn_full", "embedding", "multimodal"}
# name of a baseline: what makes its class probabilities (N, C) from the task
BASELINES = {
    "majority": baselines.majority,
    "coords_knn": lambda task: baselines.coords_knn(task, task.place),
    "coords_rbf": lambda task: baselines.coords_rbf(task, task.place, task.pitch),
    "expr_lr": lambda task: baselines.logistic(task, task.pcs),
    "smoothed_lr": lambda task: baselines.smoothed_lr(
        task, task.pcs, task.table(baselines.SMOOTHED)
    ),
}
GENE_FREE = {"majority", "coords_knn", "coords_rbf"}


# named sets of flags; what is typed goes before them
PRESETS = {"tuned": {}}


@dataclass
class Config(run.SlideConfig):
    """Flags of gat_fusion.py; defaults are the published ones unless the help says otherwise."""

    presets: ClassVar = PRESETS

    mode: Literal[
        "expr_only",
        "gat_only",
        "gcn_only",
        "concat",
        "full",
        "gcn_full",
        "embedding_only",
        "embedding",
        "img_expr",
        "multimodal",
        "coords_knn",
        "coords_rbf",
        "majority",
        "expr_lr",
        "smoothed_lr",
    ] = "full"
    "which parts are on; the last five are baselines without a network"
    fusion: Literal["cross", "gated"] = "cross"
    "how expression and graph embeddings meet in full, gcn_full, embedding and multimodal"
    split: Literal["random", "blocks", "slice", "donor"] = "random"
    """random 60/20/20 spots (leaks position), blocks with a buffer, or train on other slices /
    other donors"""
    split_seed: int = 42
    "seed of the split, separate from --seed"
    fold: int = 0
    "fold of --split blocks (0-4)"
    n_blocks: int = 5
    "tiles per side for --split blocks"
    buffer: float = 0.0
    """lattice pitches kept free of training spots around test blocks; 0 means the receptive field
    of the widest mode, so that all modes share a split"""
    train: str = ""
    """training slices for --split slice, comma-separated; empty: for slice all others of the donor,
    for donor all of the other donors"""
    labels: str = ""
    "two-column CSV barcode,label instead of the labels beside the data"
    k: int = 6
    "neighbours of a spot"
    library: Literal["given", "own"] = "given"
    """library size: the one that came with the data (the file may hold a subset of the genes) if
    every slide of the run has it, or the files' row sums"""
    scale: Literal["auto", "train", "slice"] = "auto"
    """z-score by the training rows, or each slice by its own spots (no label is used); auto: slice
    where whole slices are held out"""
    n_top_genes: int = 3000
    "highly variable genes, chosen on training rows"
    hvg: Literal["seurat", "seurat_v3", "none"] = "seurat"
    "how they are chosen"
    embedding: str = ""
    """frozen per-spot vectors for the embedding modes: .npy (rows as in the matrix) or .npz with
    `embedding` and `barcodes`; {slice} = the slice's name"""
    encoder: str = "handmade"
    """image features: handmade, a Hugging Face vision model such as microsoft/resnet-50, or a
    .npy/.npz file"""
    crop_um: float = 310.0
    "side of the image crop in micrometres (the published 64 hires pixels are 3.1 spot pitches)"
    cache: str = ""
    "folder for image features; empty: <data>/.features where that can be written"
    dim: int = 128
    "width of all embeddings"
    hidden: int = 256
    "hidden width of the expression MLP"
    heads: int = 4
    "attention heads"
    layers: int = 2
    "graph layers and cross-attention layers"
    dropout: float = 0.1
    "dropout everywhere, attention weights included"
    lr: float = 1e-3
    "AdamW learning rate"
    weight_decay: float = 1e-4
    "AdamW weight decay, on all parameters"
    epochs: int = 200
    "most epochs (one optimiser step each)"
    patience: int = 20
    "stop after so many epochs without a better validation ARI"
    tile: int = 0
    """train and predict on compact tiles of at most so many spots, with all spots that these see
    through the graph; 0: the whole slide at once"""
    min_shared: float = 0.5
    "with --predict: the least share of the checkpoint's genes that the new slide must have"
    predict: str = ""
    """checkpoint (model.pt of a run): predict --data with it, train nothing; its own flags are
    used, but for --embedding, --encoder and the names of columns where given"""


def check(config):
    """Raise DataError, naming the flag, for a value that no run can use."""
    rules = dict.fromkeys(
        ("n_blocks", "k", "n_top_genes", "dim", "hidden", "heads", "layers", "epochs", "patience"),
        run.AT_LEAST_ONE,
    )
    rules |= dict.fromkeys(("tile", "buffer", "weight_decay"), run.AT_LEAST_ZERO) | dict.fromkeys(
        ("crop_um", "lr"), run.POSITIVE
    )
    rules |= {
        "split_seed": run.SEED,
        "dropout": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
        "min_shared": (lambda v: 0 <= v <= 1, "from 0 to 1"),
    }
    run.check_flags(config, rules)
    if config.dim % config.heads and has_heads(config):
        raise DataError(f"--heads is {config.heads}: it must divide --dim {config.dim}")
    if config.predict:
        used = ("labels", "min_shared", "tile", "bf16", "compile", "embedding")
        rules = [run.idle_with_predict(config, (*used, *config.columns()))]
    else:
        rules = idle_flags(config)
    run.refuse_idle_flags(config, rules)


def has_heads(config):
    """Whether a part of the mode has attention heads."""
    is_cross = config.mode in FUSED_MODES and config.fusion == "cross"
    return is_cross or config.mode in GAT_MODES


def idle_flags(config):
    """Rules for the flags that do nothing in the chosen mode and split, as `run.refuse_idle_flags`
    takes them. The linear baselines, which every mode but three prints, read the genes, too."""
    mode, is_blocks = f"in --mode {config.mode}", config.split == "blocks"
    has_graph = config.mode in GAT_MODES | GCN_MODES
    has_mlp = config.mode not in GRAPH_ONLY | EMBEDDING_MODES
    # --k and --layers also make the default buffer of the blocks
    is_graph_idle = not has_graph and not (is_blocks and not config.buffer)
    network = ("dim", "dropout", "lr", "weight_decay", "epochs", "patience", "bf16", "compile")
    genes = ("n_top_genes", "hvg", "library", "scale", "tile")
    return [
        (config.mode in BASELINES, mode, (*network, "hidden", "heads")),
        (config.mode in GENE_FREE, mode, genes),
        (config.mode not in FUSED_MODES, mode, ("fusion",)),
        (not has_heads(config), mode, ("heads",)),
        (not has_mlp, mode, ("hidden",)),
        (is_graph_idle, mode, ("k", "layers")),
        *input_rules(config.mode),
        (config.hvg == "none", "with --hvg none", ("n_top_genes",)),
        (not is_blocks, f"with --split {config.split}", ("fold", "n_blocks", "buffer")),
        (config.split not in ("slice", "donor"), f"with --split {config.split}", ("train",)),
        (True, "without --predict", ("min_shared",)),
    ]


def input_rules(mode):
    """Rules for the flags of inputs that a mode does not read."""
    case = f"in --mode {mode}"
    return [
        (mode not in EMBEDDING_MODES, case, ("embedding",)),
        (mode not in IMAGE_MODES, case, ("encoder", "crop_um")),
    ]


# --------------------------------------------------------------------------------------------------
# Layers
# --------------------------------------------------------------------------------------------------


class GraphAttention(nn.Module):
    """Graph attention (Velickovic et al. 2018, Eq. 1-5), heads concatenated.

    e_ij = LeakyReLU(u . W h_j + v . W h_i);  alpha_ij = softmax_j e_ij over the neighbours and i
    itself;  h'_i = sum_j alpha_ij W h_j + b
    """

    def __init__(self, dim_in, dim_out, heads=4, dropout=0.1):
        super().__init__()
        self.heads, self.dropout = heads, Dropout(dropout)
        self.project = nn.Linear(dim_in, dim_out, bias=False)
        self.u = nn.Parameter(torch.empty(heads, dim_out // heads))  # scores the neighbour
        self.v = nn.Parameter(torch.empty(heads, dim_out // heads))  # scores the spot itself
        self.bias = nn.Parameter(torch.zeros(dim_out))
        for w in (self.project.weight, self.u, self.v):
            nn.init.xavier_uniform_(w)

    def forward(self, h, graph):
        """h (N, dim_in) -> (N, dim_out), alpha (N, heads, k+1)."""
        h = self.project(h)  # (N, heads d)
        # (N, heads) each: head by head the products u . W h and v . W h
        to, of = (h @ torch.block_diag(*w[:, :, None]) for w in (self.u, self.v))
        # (N, heads, d); (N heads, k+1)
        h, rows = h.view(len(h), self.heads, -1), graph.with_self.bag_index(self.heads).neighbours
        # (N, heads, k+1)
        e = to.flatten().index_select(0, rows.flatten()).view(len(h), self.heads, -1)
        alpha = softmax_over_table(F.leaky_relu(e + of[:, :, None], 0.2), graph.with_self.empty)
        out = weighted_neighbour_sum(h, self.dropout(alpha), graph.with_self)
        return out.flatten(1) + self.bias, alpha  # (N, dim_out)


class GraphConvolution(nn.Module):
    """H' = D^-1/2 (A + I) D^-1/2 H W + b (Kipf & Welling 2017, Eq. 2), D counting the places in use
    of each row of the table."""

    def __init__(self, dim_in, dim_out):
        super().__init__()
        self.project = nn.Linear(dim_in, dim_out, bias=False)
        self.bias = nn.Parameter(torch.zeros(dim_out))
        nn.init.xavier_uniform_(self.project.weight)

    def forward(self, h, graph):
        """h (N, dim_in) -> (N, dim_out), weights (N, 1, k+1)."""
        index, empty = graph.with_self.index, graph.with_self.empty
        used = torch.ones_like(index, dtype=h.dtype) if empty is None else (~empty).to(h.dtype)
        d = used.sum(1).rsqrt()  # (N,)
        w = (used * d[:, None] * d[index])[:, None]  # (N, 1, k+1)
        # (N, dim_out)
        return weighted_neighbour_sum(self.project(h)[:, None], w, graph.with_self).squeeze(
            1
        ) + self.bias, w


class GraphEncoder(nn.Module):
    """`layers` blocks of conv -> LayerNorm -> ELU -> dropout, with a residual where the widths
    agree."""

    def __init__(self, kind, dim_in, dim, heads, layers, dropout):
        super().__init__()
        widths = [dim_in] + [dim] * layers
        self.convs = nn.ModuleList(
            GraphAttention(a, b, heads, dropout) if kind == "gat" else GraphConvolution(a, b)
            for a, b in zip(widths, widths[1:])
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers))
        self.dropout = Dropout(dropout)

    def forward(self, h, graph):
        """h (N, dim_in) -> (N, dim), the last layer's attention."""
        for conv, norm in zip(self.convs, self.norms):
            out, alpha = conv(h, graph)  # (N, dim)
            out = self.dropout(F.elu(norm(out)))
            h = out + h if out.shape == h.shape else out
        return h, alpha


class Gated(nn.Module):
    """g = sigmoid(W [a; b] + c);  f = g a + (1 - g) b;  LN(f + FFN(f)). Without `ffn` it is the
    image gate: LN(f)."""

    def __init__(self, dim, dropout, ffn=True):
        super().__init__()
        self.gate = nn.Linear(2 * dim, dim)
        self.ffn = (
            nn.Sequential(nn.Linear(dim, dim), nn.GELU(), Dropout(dropout), nn.Linear(dim, dim))
            if ffn
            else None
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, a, b):
        """a, b (N, dim) -> (N, dim)."""
        g = torch.sigmoid(self.gate(torch.cat([a, b], 1)))  # (N, dim)
        f = g * a + (1 - g) * b
        return self.norm(f if self.ffn is None else f + self.ffn(f))


class CrossAttentionLayer(nn.Module):
    """Multi-head attention of a spot's expression (query) over its neighbours' spatial embeddings
    (key, value), post-norm.

    Keys and values are projected once per spot and gathered afterwards: O(N d^2 + N k d), where
    projecting the gathered (N, k, d) tensor costs O(N k d^2).
    """

    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, Dropout(dropout)
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.ffn = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.GELU(), Dropout(dropout), nn.Linear(2 * dim, dim)
        )
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        for linear in (self.query, self.key, self.value, self.out):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, z, s, graph):
        """z (N, dim) queries, s (N, dim) spatial embeddings -> (N, dim), alpha (N, heads, k)."""
        n, dim = z.shape
        # (N, heads, d)
        q, key, value = (
            f(x).view(n, self.heads, -1)
            for f, x in ((self.query, z), (self.key, s), (self.value, s))
        )
        scores = neighbour_products(q, key, graph.without_self) / q.shape[-1] ** 0.5
        alpha = softmax_over_table(scores, graph.without_self.empty)  # (N, heads, k)
        # (N, dim)
        a = weighted_neighbour_sum(value, self.dropout(alpha), graph.without_self).flatten(1)
        z = self.norm1(z + self.dropout(self.out(a)))
        return self.norm2(z + self.dropout(self.ffn(z))), alpha


class GatFusion(nn.Module):
    """The mode matrix of the paper in one module: which of expression / graph / image encoders
    exist and how they are fused.

    dim_in: width of the expression input (genes, or the frozen embedding); dim_image: width of the
    image features.
    """

    def __init__(
        self,
        mode,
        dim_in,
        n_classes,
        fusion="cross",
        dim_image=0,
        dim=128,
        hidden=256,
        heads=4,
        layers=2,
        dropout=0.1,
    ):
        super().__init__()
        self.mode, self.fusion = mode, fusion
        self.expression = None
        if mode in EMBEDDING_MODES:
            self.expression = NormFirst(
                nn.LayerNorm(dim_in), nn.Linear(dim_in, dim), nn.GELU(), Dropout(dropout)
            )
        elif mode not in GRAPH_ONLY:
            self.expression = mlp(dim_in, hidden, dim, dropout)
        self.spatial = None
        if mode in GAT_MODES | GCN_MODES:
            kind = "gcn" if mode in GCN_MODES else "gat"
            self.spatial = GraphEncoder(
                kind, dim_in if mode in GRAPH_ONLY else dim, dim, heads, layers, dropout
            )
        self.image = mlp(dim_image, dim, dim, dropout) if mode in IMAGE_MODES else None
        fused = mode in FUSED_MODES
        self.cross = (
            nn.ModuleList(CrossAttentionLayer(dim, heads, dropout) for _ in range(layers))
            if fused and fusion == "cross"
            else None
        )
        self.gate = (
            Gated(dim, dropout) if (fused and fusion == "gated") or mode == "img_expr" else None
        )
        self.image_gate = Gated(dim, dropout, ffn=False) if mode == "multimodal" else None
        self.head = nn.Linear(2 * dim if mode == "concat" else dim, n_classes)

    def forward(self, x, graph=None, image=None):
        """x (N, dim_in), graph Neighbours, image (N, dim_image) -> logits (N, C), {"embedding": (N,
        dim), "attention": (N, heads, k)}."""
        z = e = x if self.expression is None else self.expression(x)  # (N, dim)
        attention = None
        if self.spatial is not None:
            s, attention = self.spatial(e, graph)  # (N, dim)
            z = torch.cat([e, s], 1) if self.mode == "concat" else s  # concat: (N, 2 dim)
        if self.cross is not None:
            z = e
            # the same s in every layer, as published
            for layer in self.cross:
                z, attention = layer(z, s, graph)
        elif self.gate is not None:
            z = self.gate(e, self.image(image) if self.mode == "img_expr" else s)
        if self.image_gate is not None:
            z = self.image_gate(z, self.image(image))
        return self.head(z), {"embedding": z, "attention": attention}


def mlp(dim_in, hidden, dim, dropout):
    """LayerNorm -> Linear -> GELU -> Dropout -> Linear: (N, dim_in) -> (N, dim)."""
    return NormFirst(
        nn.LayerNorm(dim_in),
        nn.Linear(dim_in, hidden),
        nn.GELU(),
        Dropout(dropout),
        nn.Linear(hidden, dim),
    )


# --------------------------------------------------------------------------------------------------
# Task: slides -> inputs, labels, split
# --------------------------------------------------------------------------------------------------


class Task:
    """All spots of the slides of one run, stacked (the scored slide first), with one label map, one
    split and block-diagonal graphs.

    labels (N,) int, -1 = none; place (N, 2) what a coordinates-only predictor may see: pixels
    inside one slide, coordinates standardised per slide across slides; slide_of (N,) which slide a
    spot belongs to; x (N, G) float32 inputs, made on first use; library `given` or `own`, one for
    all slides; reach the receptive field in lattice pitches.
    """

    def __init__(self, config, slides):
        self.config, self.slides = config, slides
        self.classes, labels = data.global_labels(slides)
        self.labels, self.n_classes = np.concatenate(labels), len(self.classes)
        self.slide_of = np.repeat(np.arange(len(slides)), [s.n_spots for s in slides])
        # (N, 2)
        self.place = (
            slides[0].xy
            if len(slides) == 1
            else np.concatenate([(s.xy - s.xy.mean(0)) / s.xy.std(0) for s in slides])
        )
        self.library = agreed_library(config.library, slides)
        # Visium's where the slide does not tell
        pitch_um = data.lattice_pitch(slides[0].xy) * (slides[0].um_per_px or 0) or 100.0
        self.reach = receptive_field(config, pitch_um)
        data.check_labels(labels[0], slides[0].sample)
        if config.split == "random":
            self.split = data.random_split(self.labels, config.split_seed)
        elif config.split == "blocks":
            buffer = config.buffer or default_buffer(config, pitch_um)
            self.split = data.block_split(
                self.labels,
                slides[0].xy,
                config.fold,
                config.n_blocks,
                buffer=buffer,
                seed=config.split_seed,
                reach=self.reach,
            )
        else:
            self.split = data.holdout_split(slides, self.labels, config.split, config.split_seed)

    @cached_property
    def pitch(self):
        """Lattice pitch of the scored slide, in the units of place."""
        return data.lattice_pitch(self.place[self.slide_of == 0])

    def table(self, k):
        """(N, k) rows of the k nearest spots, never across slides."""
        start = np.cumsum([0] + [s.n_spots for s in self.slides])
        return np.concatenate(
            [data.knn_table(s.xy, k, name=s.sample) + at for s, at in zip(self.slides, start)]
        )

    @cached_property
    def expression(self):
        """data.Expression: gene choice and scaler, fitted on training rows."""
        c, genes = self.config, data.common_genes(self.slides)
        parts = [(s, self.split.train[self.slide_of == i]) for i, s in enumerate(self.slides)]
        # of all genes of a slide, as in `scaled_slide`, not of those that all slides share
        sizes = np.concatenate([library_sizes(s, self.library)[rows] for s, rows in parts])
        counts = [s.select_genes(genes).counts[rows] for s, rows in parts if rows.any()]
        return data.Expression(c.n_top_genes, c.hvg).fit(sp.vstack(counts).tocsr(), genes, sizes)

    @cached_property
    def x(self):
        """(N, G) z-scores, or the frozen vectors (N, D) of the embedding modes."""
        if self.config.mode in EMBEDDING_MODES:
            return np.concatenate(
                [data.read_embedding(self.config.embedding, s) for s in self.slides]
            )
        return self.z

    @cached_property
    def z(self):
        """z-scores of all spots: (N, G) float32, or with --tile the same behind `ScaledRows`."""
        parts = [scaled_slide(self.config, self.expression, s, self.library) for s in self.slides]
        if self.config.tile:
            return ScaledRows(parts)
        return np.concatenate([ScaledRows([part])[:] for part in parts])

    @cached_property
    def pcs(self):
        """(N, 50) principal components of the z-scores, for the linear baselines."""
        return baselines.principal_components(self.z, self.split.train, self.config.tile)

    @cached_property
    def image(self):
        """(N, D) frozen image features, standardised by training rows, or None where the mode has
        no image branch."""
        if self.config.mode not in IMAGE_MODES:
            return None
        f = np.concatenate([image_features(self.config, s) for s in self.slides])
        rows = self.split.train
        self.image_scale = (f[rows].mean(0), f[rows].std(0) + 1e-6)
        return ((f - self.image_scale[0]) / self.image_scale[1]).astype(np.float32)


def scaled_slide(config, expression, slide, library):
    """A slide as a part of `ScaledRows`, in the gene order of `expression`; library `given` or
    `own`, as agreed for the run."""
    own_scale = config.scale == "slice" or (
        config.scale == "auto" and config.split in ("slice", "donor")
    )
    sizes = library_sizes(slide, library)
    x, present = expression.log1p(slide.counts, slide.genes, sizes)  # (N, G) CSR, (G,)
    scaler = data.Standardise(expression.clip).fit(x) if own_scale else expression.scaler
    return x, scaler, ~present


def image_features(config, slide):
    """(N, D) frozen features of the crop around each spot, cached by image, encoder and crop."""
    return data.image_features(
        slide,
        config.encoder,
        config.crop_um,
        config.cache or Path(config.data) / ".features",
        run.pick_device(config.device),
    )


def rings(k):
    """Rings of a hexagonal lattice that k neighbours fill, 3 r (r + 1) = k: k = 6: 1, 18: 2, 36: 3,
    96: 6."""
    return int(np.ceil((np.sqrt(12 * k + 9) - 3) / 6 - 1e-9))


def hops(config):
    """Steps of the graph that a prediction looks at: one a graph layer, and one more for the
    cross-attention, whose layers all read the same S."""
    steps = {
        "expr_only": 0,
        "embedding_only": 0,
        "img_expr": 0,
        "gat_only": config.layers,
        "gcn_only": config.layers,
        "concat": config.layers,
    }
    return (steps | dict.fromkeys(BASELINES, 0)).get(
        config.mode, config.layers + (config.fusion == "cross")
    )


def receptive_field(config, pitch_um=100.0):
    """Lattice pitches that a prediction can look across, at least 1: hops x rings of the
    k-neighbourhood, or half the image crop if that is more."""
    graph = rings(config.k) * hops(config)
    if config.mode == "smoothed_lr":
        graph = rings(baselines.SMOOTHED)
    crop = int(np.ceil(config.crop_um / pitch_um / 2 - 1e-3)) if config.mode in IMAGE_MODES else 0
    return float(max(1, graph, crop))


def default_buffer(config, pitch_um=100.0):
    """Buffer of --split blocks in pitches: the field of the widest fusion whatever the mode, so
    that all modes are trained on the same spots."""
    return max(float(rings(config.k) * (config.layers + 1)), receptive_field(config, pitch_um))


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def class_weights(labels, n_classes):
    """w_c proportional to 1 / n_c over training spots, rescaled to sum to C: (C,). A class without
    a spot gets no weight."""
    counts = np.bincount(labels, minlength=n_classes)
    w = np.where(counts > 0, 1 / (counts + 1e-6), 0)
    return torch.tensor(w / w.sum() * n_classes, dtype=torch.float32)


def build(config, dim_in, n_classes, dim_image):
    """GatFusion from the flags."""
    return GatFusion(
        config.mode,
        dim_in,
        n_classes,
        config.fusion,
        dim_image,
        config.dim,
        config.hidden,
        config.heads,
        config.layers,
        config.dropout,
    )


def train(task, device):
    """Training with early stopping on validation ARI, a step a tile. Returns the best model (eval
    mode), prob (N, C), extras, history."""
    c = task.config
    image, table = task.image, task.table(c.k)
    tiles_of = partial(
        make_tiles,
        (task.x, image),
        table,
        [s.xy for s in task.slides],
        hops=hops(c),
        device=device,
    )
    train_tiles, size = list(tiles_of(size=c.tile)), prediction_size(c.tile, device)
    is_one_size = size == c.tile or len(table) <= size
    predict_tiles = train_tiles if is_one_size else list(tiles_of(size=size))
    labels, fit = (torch.as_tensor(v, device=device) for v in (task.labels, task.split.train))
    loss_rows = [
        fit[t.rows] & (torch.arange(len(t.rows), device=device) < t.n_own) for t in train_tiles
    ]
    batches = [(t, r, labels[t.rows][r]) for t, r in zip(train_tiles, loss_rows) if r.any()]
    val = task.split.val
    model = build(c, task.x.shape[1], task.n_classes, 0 if image is None else image.shape[1]).to(
        device
    )
    run.compiled(model, c)
    loss_of = nn.CrossEntropyLoss(
        class_weights(task.labels[task.split.train], task.n_classes).to(device)
    )
    optimiser = torch.optim.AdamW(model.parameters(), lr=c.lr, weight_decay=c.weight_decay)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimiser, mode="max", factor=0.5, patience=10
    )
    best, state, since, history = -np.inf, None, 0, []
    for epoch in run.progress(range(c.epochs), "epochs"):
        model.train()
        losses = []
        for tile, rows, true in run.shuffled(batches):
            with run.autocast(c, device):
                tile_x, tile_image = tile.inputs()
                logits = model(tile_x, tile.graph, tile_image)[0]
                loss = loss_of(logits[rows], true)
            losses.append(loss.item())
            if not np.isfinite(losses[-1]):
                raise DataError(
                    f"the cross-entropy is {losses[-1]} at epoch {epoch}: lower --lr, or "
                    "check the inputs for extreme values"
                )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        prob = predict(model, predict_tiles, len(labels), c)[0]
        score = metrics.clustering(task.labels[val], prob[val].argmax(1))["ari"]
        schedule.step(score)
        history.append((np.mean(losses), score))
        since += 1
        if score > best:
            best, state, since = score, copy.deepcopy(model.state_dict()), 0
        if since >= c.patience:
            break
    model.load_state_dict(state)
    return model, *predict(model, predict_tiles, len(labels), c), np.array(history)


@torch.no_grad()
def predict(model, parts, n, config):
    """prob (N, C) float64 numpy, {"embedding", "attention"} numpy of the n spots of all `Tile`s, in
    eval mode."""
    model.eval()
    out = {}
    for tile in parts:
        with run.autocast(config, tile.device):
            x, image = tile.inputs()
            logits, extra = model(x, tile.graph, image)
        for name, value in {"prob": logits, **extra}.items():
            if value is not None:
                # first to the CPU: some devices have no float64
                value = value[: tile.n_own].float().cpu()
                value = (value.double().softmax(1) if name == "prob" else value).numpy()
                out.setdefault(name, np.empty((n, *value.shape[1:]), value.dtype))[
                    tile.rows[: tile.n_own]
                ] = value
    return out.pop("prob"), out


# --------------------------------------------------------------------------------------------------
# The program
# --------------------------------------------------------------------------------------------------


def load(config):
    """Slides of the run: the scored one first, then the training slices of --split slice /
    donor."""
    genes = config.mode not in GENE_FREE
    if config.split in ("slice", "donor"):
        if config.labels:
            raise DataError(
                f"--labels {config.labels} is for one slide, --split {config.split} reads "
                "several: put labels beside each slide"
            )
        if data.is_one_slide(config.data, config.library_key):
            raise DataError(
                f"{config.data} is one slide, --split {config.split} needs several: give the "
                "parent folder that holds them, "
                f"--data {Path(config.data).absolute().parent} --slice "
                f"{config.slice or Path(config.data).absolute().stem}"
            )
    columns = config.columns()
    first = data.load_slide(
        config.data, config.slice or None, counts=genes, labels=config.labels or None, **columns
    )
    if config.split not in ("slice", "donor"):
        return [first]
    names = [n.strip() for n in config.train.split(",") if n.strip()]
    if not names:
        others = [
            data.load_slide(config.data, n, counts=False, **config.columns())
            for n in data.list_slices(config.data, config.library_key)
            if n != first.sample
        ]
        if config.split == "donor":
            data.check_donors([first, *others])
        names = [
            s.sample for s in others if (s.patient == first.patient) == (config.split == "slice")
        ]
    if not names or first.sample in names:
        raise DataError(
            f"--split {config.split} finds no other slice to train on beside {first.sample} "
            f"in {config.data}: name them with --train"
        )
    others = (data.load_slide(config.data, n, counts=genes, **columns) for n in names)
    slides = [first, *others]
    if config.split == "donor":
        data.check_donors(slides)
    if config.split == "donor" and any(s.patient == first.patient for s in slides[1:]):
        raise DataError(
            f"--split donor was given a training slice of the donor of {first.sample} "
            f"({first.patient}): choose other slices with --train"
        )
    return slides


def variant(config):
    """Folder name of the run: split, mode, fusion, and every other flag that is not at its
    default."""
    split = {"random": "random", "blocks": f"blocks{config.fold}"}.get(
        config.split, f"{config.split}-{config.train or 'all'}".replace(",", "+")
    )
    words = [split, config.mode] + [config.fusion] * (config.mode in FUSED_MODES)
    told = ("split", "fold", "train", "mode", "fusion", "min_shared")
    return run.variant(config, words, told, files=("embedding", "encoder", "labels"))


def score(task, prob, lattice):
    """Flat dict of the scores of prob (N, C) on the test spots; boundary scores by the lattice
    distance of the scored slide."""
    test = task.split.test
    out = metrics.classification(task.labels[test], prob[test], task.classes)
    here = task.slide_of == 0
    return out | metrics.boundary_accuracy(
        task.labels[here], prob[here].argmax(1), lattice, mask=test[here]
    )


def boundary_distance(slide, labels):
    """(N,) lattice steps to the nearest other label, on the full labelled lattice, whatever graph
    the model uses."""
    return metrics.boundary_distance(
        labels,
        data.lattice_table(slide.grid) if slide.grid is not None else data.knn_table(slide.xy, 6),
    )


def score_baselines(task, distance):
    """{name: prob (N, C)}, {name: scores} of the baselines that the task has inputs for, the
    trivial ones first; prints each."""
    prob, scores = {}, {}
    for name in BASELINES:
        if name in GENE_FREE or task.config.mode not in GENE_FREE:
            prob[name] = BASELINES[name](task)
            scores[name] = score(task, prob[name], distance)
            print(score_row(name, scores[name]), flush=True)
    return prob, scores


def score_row(name, s):
    """One row of the printed table."""
    return f"{name:<14}" + "  ".join(
        f"{k} {s[k]:.3f}"
        for k in (
            "ari",
            "nmi",
            "accuracy",
            "macro_f1",
            "kappa_quadratic",
            "log_loss",
            "boundary_accuracy",
        )
    )


def main(argv=None):
    """Train and score one model, or predict with one (--predict)."""
    start = time.perf_counter()
    config = run.parse(Config, argv, __doc__.split("\n")[0])
    check(config)
    if config.predict:
        return predict_slide(config, start)
    if config.mode in EMBEDDING_MODES and not config.embedding:
        raise DataError(
            f"--mode {config.mode} needs frozen vectors: name a .npy or .npz file with --embedding"
        )
    slides = load(config)
    record = run.Run("gat_fusion", config, slides[0].sample, variant(config), start)
    record.note_inputs(used_files(config, slides))
    task = Task(config, slides)
    here, test = task.slide_of == 0, task.split.test
    distance = boundary_distance(slides[0], task.labels[here])
    print(
        f"{slides[0].sample}: {here.sum()} spots, split {task.split.name} "
        f"({task.split.detail}): {task.split.train.sum()} train, "
        f"{task.split.val.sum()} validation, {test.sum()} test"
        + ("; this split leaks position" if task.split.leaks_position else "")
    )
    if config.mode not in GENE_FREE:
        lacking = [s.sample for s in slides if s.library_size is None]
        print(
            f"library size: {task.library}"
            + (
                f" for all slides, {', '.join(lacking)} came without"
                if lacking and config.library == "given"
                else ""
            )
        )
    record.lap("read")
    prob, others = score_baselines(task, distance)
    record.lap("baselines")
    arrays = {
        "barcodes": slides[0].barcodes,
        "xy": slides[0].xy,
        "labels": task.labels[here],
        "test": test[here],
        "classes": np.array(task.classes),
    }
    files, n_params, history = {}, 0, None
    if config.mode in BASELINES:
        p = prob[config.mode]
    else:
        model, p, extra, history = train(task, record.device)
        n_params = sum(w.numel() for w in model.parameters())
        arrays |= {name: value[here] for name, value in extra.items()} | {
            "neighbours": task.table(config.k)[here]
        }
        files["model.pt"] = lambda f: torch.save(checkpoint(task, model), f)
        record.lap("training")
    found = score(task, p, distance)
    if history is not None and task.split.val.any():
        # for choices between flags: never the test score
        found["val_ari"] = history[:, 1].max()
    found |= {f"gain_over_{name}": found["ari"] - others[name]["ari"] for name in others}
    print(
        score_row(config.mode, found)
        + f"  gain over coords_knn {found['gain_over_coords_knn']:+.3f}, coords_rbf "
        f"{found['gain_over_coords_rbf']:+.3f}"
    )
    arrays |= {
        "prob": p[here],
        "pred": p[here].argmax(1),
        "coords_knn": prob["coords_knn"][here].argmax(1),
    }
    figures.draw_gat_fusion(record, slides[0], arrays, history)
    files |= export.files_of("gat_fusion", arrays, slides[:1], config)
    record.finish(
        found,
        others,
        arrays,
        n_params,
        task.split,
        files,
        epochs=0 if history is None else len(history),
        receptive_field_pitches=task.reach,
        library=task.library,
    )
    return 0


def used_files(config, slides):
    """Files whose content can change a number of this run."""
    encoder = config.encoder if config.mode in IMAGE_MODES else ""
    more = [config.embedding] if config.mode in EMBEDDING_MODES else []
    return input_files(slides, encoder, more)


def checkpoint(task, model):
    """Everything that --predict needs, as tensors, numbers and strings: loads with
    weights_only=True."""
    return {
        "config": vars(task.config).copy(),
        "classes": task.classes,
        "weights": model.state_dict(),
        "dim_in": task.x.shape[1],
        "library": task.library,
        "expression": None if task.config.mode in EMBEDDING_MODES else task.expression.state(),
        "image_scale": None if task.image is None else [torch.tensor(v) for v in task.image_scale],
    }


def read_checkpoint(config):
    """(what `checkpoint` saved, the flags to predict with: the checkpoint's, but for the place of
    things, --embedding and --encoder of this run)."""
    path = config.predict
    saved = run.read_checkpoint(
        path,
        "gat_fusion checkpoint",
        ["config", "classes", "weights", "dim_in", "expression", "image_scale"],
    )
    known = run.saved_flags(path, Config, saved["config"], check)
    run.refuse_idle_flags(config, input_rules(known.mode))
    with run.checkpoint_fits(path):
        if not all(isinstance(name, str) for name in saved["classes"]):
            raise ValueError("a class has no name")
    if known.mode in IMAGE_MODES and saved["image_scale"] is None:
        raise DataError(f"{path} has mode {known.mode} but no image_scale: train it again")
    here = {
        name: getattr(config, name)
        for name in (
            "data",
            "slice",
            "labels",
            "seed",
            "device",
            "threads",
            "deterministic",
            "runs",
            "cache",
            "min_shared",
            "tile",
            "bf16",
            "compile",
            "h5ad",
        )
    }
    # names of columns are the new file's where they are given
    here |= {n: v for n, v in config.columns().items() if n in config.typed.split()}
    encoder = config.encoder if config.encoder != Config.encoder else known.encoder
    return (
        saved,
        known,
        replace(
            known,
            **here,
            predict=path,
            embedding=config.embedding or known.embedding,
            encoder=encoder,
        ),
    )


def predict_inputs(config, saved, slide):
    """x (N, dim_in), an array or `ScaledRows`, and standardised image features (N, D) or None of a
    new slide; genes aligned by name. Raises DataError where they do not fit."""
    if config.mode in EMBEDDING_MODES:
        x = data.read_embedding(config.embedding, slide)
        if x.shape[1] != saved["dim_in"]:
            raise DataError(
                f"{data.slice_path(config.embedding, slide)} has vectors of width "
                f"{x.shape[1]}, {config.predict} was trained on "
                f"{saved['dim_in']}: give vectors of the same model with --embedding"
            )
    else:
        with run.checkpoint_fits(config.predict):
            expression, library = (
                data.Expression.from_state(saved["expression"]),
                saved.get("library", config.library),
            )
        shared = np.isin(expression.genes, slide.genes).mean()
        if shared < config.min_shared:
            raise DataError(
                f"{slide.source} has {shared:.0%} of the checkpoint's {len(expression.genes)} "
                "genes, fewer than --min_shared "
                f"{config.min_shared:.0%}: retrain on the common genes, or lower --min_shared"
            )
        if library == "given" and slide.library_size is None:
            print(
                f"library size: own, {slide.sample} came without one; the checkpoint was "
                "trained on given ones"
            )
        config.library = "own" if slide.library_size is None else library
        x = ScaledRows([scaled_slide(config, expression, slide, config.library)])
    if config.mode not in IMAGE_MODES:
        return x, None
    with run.checkpoint_fits(config.predict):
        mean, std = (v.numpy() for v in saved["image_scale"])
    features = image_features(config, slide)
    if features.shape[1] != len(mean):
        raise DataError(
            f"encoder {config.encoder} gives {slide.sample} features of width "
            f"{features.shape[1]}, {config.predict} was trained on "
            f"{len(mean)}: give the encoder of its training with --encoder"
        )
    return x, ((features - mean) / std).astype(np.float32)


def predict_slide(config, start):
    """Predict the layers of a new slide with a saved model: genes aligned by name, the graph built
    inside the new slide."""
    saved, known, config = read_checkpoint(config)
    slide = data.load_slide(
        config.data, config.slice or None, labels=config.labels or None, **config.columns()
    )
    name = f"predict-{variant(known)}-{data.file_checksum(config.predict)[:8]}"
    record = run.Run("gat_fusion", config, slide.sample, name, start)
    record.note_inputs([*used_files(config, [slide]), config.predict])
    x, image = predict_inputs(config, saved, slide)
    table = data.knn_table(slide.xy, config.k, name=slide.sample)
    record.lap("read")
    with run.checkpoint_fits(config.predict):
        model = build(
            config, saved["dim_in"], len(saved["classes"]), 0 if image is None else image.shape[1]
        ).to(record.device)
        model.load_state_dict(saved["weights"])
    p, extra = predict(
        model,
        make_tiles(
            (x, image),
            table,
            [slide.xy],
            prediction_size(config.tile, record.device),
            hops(config),
            record.device,
        ),
        slide.n_spots,
        config,
    )
    record.lap("prediction")
    code = {c: i for i, c in enumerate(saved["classes"])}
    labels = np.array([code.get(c, -1) for c in slide.classes] + [-1])[slide.labels]
    absent = {
        c: int((slide.labels == i).sum())
        for i, c in enumerate(slide.classes)
        if c not in code and (slide.labels == i).any()
    }
    if absent:
        print(
            f"{slide.sample}: {sum(absent.values())} spots are not scored, the checkpoint has "
            f"no class {', '.join(absent)}"
        )
    arrays = {
        "barcodes": slide.barcodes,
        "xy": slide.xy,
        "labels": labels,
        "test": labels >= 0,
        "classes": np.array(saved["classes"]),
        "prob": p,
        "pred": p.argmax(1),
        "neighbours": table,
        **extra,
    }
    found = {}
    if len(np.unique(labels[labels >= 0])) > 1:
        found = metrics.classification(labels, p, saved["classes"])
        found |= metrics.boundary_accuracy(labels, p.argmax(1), boundary_distance(slide, labels))
        print(score_row("predict", found))
    figures.draw_gat_fusion(record, slide, arrays, None)
    record.finish(
        found,
        {},
        arrays,
        sum(w.numel() for w in model.parameters()),
        files=export.files_of("gat_fusion", arrays, [slide], config),
        checkpoint=config.predict,
        library=config.library,
        spots_of_absent_classes=absent,
    )
    return 0


if __name__ == "__main__":
    run.cli(main)
