"""Gene expression from H&E by retrieval: contrastive learning of patch and expression, with
cross-modal mask reconstruction.

    patch --ViT--> tokens (B, 50, 768) --mean, head--> z (B, 256)
    expression (B, G) ------------------------head--> h (B, 256)     contrastive loss of z and h
    tokens --Linear, mask half--> query of cross-attention; key and value are 8 gene tokens
           --two residual cross-attention blocks--> r (B, 256)       r = z
    prediction: mean expression of the k training spots whose h has the largest cosine with z of
                the new patch

Every run scores the model beside the predictors it has to beat (train mean, ridge, kNN, image-only
retrieval, contrastive loss alone) on the same slides; see docs/cmrcnet.md.

    # frozen features on CPU, the ViT on a GPU
    python cmrcnet.py --data datasets/her2st --fold 0
    # the other sections of its patient train: leaks the patient
    python cmrcnet.py --data datasets/her2st --split section --slice C2
    torchrun --nproc_per_node=2 cmrcnet.py --data datasets/her2st --backbone released
    # reads the atlas.h5 beside it, trains nothing
    python cmrcnet.py --data new_slides --predict runs/.../model.pt
"""

import copy
import re
import time
from dataclasses import dataclass, replace
from functools import partial
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
from evaluation import baselines, figures, hest
from plainst import export, jobs, retrieval, run
from plainst.features import input_files, read_tensors

SIZES = {
    "vit": {"dim": 256, "snn": 2048, "n_hvg": 1000, "lr": 1e-4, "epochs": 60},
    "features": {"dim": 128, "snn": 512, "n_hvg": 200, "lr": 1e-3, "epochs": 30},
}
# pixels, patch, width, layers, heads
VITS = {
    "released": (224, 32, 768, 8, 8),
    "base": (224, 32, 768, 12, 12),
    "tiny": (112, 16, 192, 4, 6),
}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# columns of the printed table
COLUMNS = (
    *("pcc_mean", "pcc_pooled", "pcc_heg", "pcc_hvg", "pcc_marker", "variance_ratio_median"),
    *("rmse", "gene_gene_pearson", "rate_pcc"),
)


# named sets of flags; what is typed goes before them
PRESETS = {"tuned": {}}


@dataclass
class Config(run.Config):
    """Flags of cmrcnet.py."""

    presets: ClassVar = PRESETS

    data: str = "datasets/her2st"
    "HEST-benchmark task folder (or HEST-1k folder); with --predict also a folder of patches (*.h5)"
    split: Literal["folds", "patient", "section", "sample"] = "folds"
    """folds: splits/{train,test}_<fold>.csv; patient: --patient is held out; section: --slice is,
    its patient's others train; sample: --slice is, all others train (published). The last two may
    leak the patient, which the record says"""
    fold: int = 0
    "which of the folder's splits"
    patient: str = ""
    "patient held out by --split patient"
    genes: str = "task"
    """genes scored as pcc_mean. task: the folder's var_50genes.json; a number: so many most
    variable genes of the training slides; or a JSON list of names. With --predict, genes to read
    out: task (those of the run), all, or a JSON list"""
    target: Literal["cp10k", "log1p"] = "cp10k"
    """log1p of counts per 10,000, or of raw counts as the HEST benchmark has it (then a spot's
    depth is part of the answer)"""
    min_counts: int = 100
    "spots with fewer counts are tissue but are neither trained on nor scored"
    n_hvg: int = 0
    """genes that the gene branch sees: union of so many highly variable genes of each training
    slide; 0: 1,000 as released, 200 with frozen features"""
    oracle_genes: bool = False
    """the published rule: highly variable genes of all slides, test included, and HEG / HVG lists
    from each test slide's truth"""
    markers: str = "breast"
    "marker list: breast, colorectal, or names joined by commas; those not measured are left out"
    backbone: Literal["features", "released", "base", "tiny"] = "features"
    """frozen features, or a ViT: 8 layers x 8 heads as released, ViT-B/32 (12 x 12), 4 x 6 on 112
    pixels"""
    weights: str = ""
    """ViT-B/32 checkpoint (timm or transformers keys; .safetensors, .pt, .bin) to start --backbone
    base from"""
    encoder: str = "handmade"
    """frozen features: handmade, a Hugging Face vision model, or features files: a .npy/.npz path,
    {sample} stands for the slide's name"""
    cache: str = ""
    "folder for image features; empty: <data>/.features where that can be written"
    scale: Literal["train", "slide", "both"] = "both"
    """features are z-scored by the training spots, by the slide's own spots (no label is used), or
    both, side by side"""
    gene_scale: Literal["none", "train", "slide"] = "none"
    """expression vector of the gene branch: log1p as it is (released), z-scored over the training
    spots, or within each slide"""
    dim: int = 0
    "width of the embeddings; 0: 256 as released, 128 with frozen features"
    snn: int = 0
    """width of the self-normalising gene block, snn / dim gene tokens; 0: 2,048 as released, 512
    with frozen features"""
    tau: float = 0.0
    "temperature; 0: 1 in the released loss, 0.1 with --norm_sim"
    norm_sim: bool = False
    """similarities are cosines: the smoothed targets are then smooth; in the released form they are
    one-hot"""
    reconstruction: Literal["mse", "cosine", "none"] = "mse"
    "distance between the reconstructed and the image embedding; none: contrastive loss alone"
    mask_rate: float = 0.5
    "fraction of the elements of the image tokens set to 0"
    share: bool = True
    "the two residual cross-attention blocks share weights, as released"
    dropout: float = 0.1
    "dropout of heads and fusion blocks"
    augment: bool = True
    "flips and quarter turns of training patches (ViT only)"
    shuffle_pairs: bool = False
    """control: image and expression of the training spots are paired at random, over all training
    slides"""
    k: int = 50
    "neighbours averaged"
    weighting: Literal["mean", "softmax"] = "mean"
    "plain mean, or softmax of cosine / 0.05"
    index: Literal["exact", "ivf"] = "exact"
    "exact search, or an inverted file: k-means lists of which --probe are read"
    lists: int = 0
    "k-means lists of the inverted file; 0: 2 sqrt(keys)"
    probe: int = 8
    "lists read for a query"
    lr: float = 0.0
    """peak AdamW learning rate, a cosine falls to a tenth of it; 0: 0.0001 as released, 0.001 with
    frozen features"""
    weight_decay: float = 1e-3
    "AdamW weight decay"
    batch: int = 64
    "spots of a step over all processes: the contrastive loss is over all of them"
    epochs: int = 0
    """most passes over the training spots, how many there are is chosen by --val; 0: 60 as
    released, 30 with frozen features"""
    val: Literal["groups", "random", "none"] = "groups"
    """chooses the number of epochs inside the training slides: cross-validation over patients
    (slides where there is one patient, tiles where there is one slide), a random fifth of the spots
    (released), or no choice"""
    folds: int = 5
    "folds of --val groups, at most"
    save_every: int = 0
    "epochs between checkpoints (latest.pt in the run's folder); 0: none"
    resume: bool = False
    "go on from latest.pt"
    predict: str = ""
    "checkpoint (model.pt of a run): predict --data with it and its atlas, train nothing"
    atlas: str = ""
    "atlas for --predict; empty: atlas.h5 beside the checkpoint"


# --------------------------------------------------------------------------------------------------
# Randomness by row of the global batch: one process or several, the same masks
# --------------------------------------------------------------------------------------------------


class GlobalRows:
    """Random numbers for the rows [start, start + n) of a global batch of `total`: every process
    draws for all rows and keeps its own."""

    def __init__(self):
        self.start, self.n, self.total, self.generator = 0, 0, 0, None

    def set(self, rank, world, total, generator):
        self.n, self.total, self.generator = total // world, total, generator
        self.start = rank * self.n

    def rand(self, *tail):
        """(n, *tail) uniform."""
        return torch.rand(
            self.total, *tail, generator=self.generator, device=self.generator.device
        )[self.start : self.start + self.n]


class Drop(nn.Module):
    """Dropout with rate p, row by row of the global batch; `alpha`: keeps mean 0 and variance 1
    (Klambauer et al. 2017, Sec. 3)."""

    def __init__(self, p, rows, alpha=False):
        super().__init__()
        self.p, self.rows, self.alpha = p, rows, alpha

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        keep = self.rows.rand(*x.shape[1:]) >= self.p
        if not self.alpha:
            return x * keep / (1 - self.p)
        low = -1.7580993408473766  # -lambda alpha of SELU
        scale = ((1 - self.p) * (1 + self.p * low**2)) ** -0.5
        return scale * (torch.where(keep, x, low) - low * self.p)


# --------------------------------------------------------------------------------------------------
# Network
# --------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Pre-norm transformer block, Vaswani et al. 2017: x + SA(LN x), then x + MLP(LN x), width 4D,
    GELU; (B, T, D) -> (B, T, D)."""

    def __init__(self, dim, heads, rows, dropout=0.0):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.drop = Drop(dropout, rows)

    def forward(self, x):
        # (B, H, T, d) each
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.drop(
            self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        )
        return x + self.drop(self.fc2(self.drop(F.gelu(self.fc1(self.norm2(x))))))


class ViT(nn.Module):
    """Dosovitskiy et al. 2021: uint8 (B, px, px, 3) -> tokens (B, 1 + (px / patch)^2, D) after the
    last LayerNorm, class token first."""

    def __init__(self, px, patch, dim, layers, heads, rows):
        super().__init__()
        self.patch = nn.Conv2d(3, dim, patch, patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos = nn.Parameter(torch.zeros(1, 1 + (px // patch) ** 2, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, rows) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in IMAGENET)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.01)
                nn.init.zeros_(m.bias)
        nn.init.kaiming_normal_(self.patch.weight, mode="fan_out")
        nn.init.trunc_normal_(self.cls, std=0.02)
        nn.init.trunc_normal_(self.pos, std=0.02)

    def forward(self, image):
        # (B, 3, px, px)
        x = (image.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        x = self.patch(x).flatten(2).transpose(1, 2)  # (B, 49, D)
        # (B, 50, D)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Head(nn.Module):
    """Projection head of BLEEP (Xie et al. 2023): p = W1 x, LN(Drop(W2 GELU(p)) + p); (B, in) ->
    (B, d). Not L2-normalised."""

    def __init__(self, dim_in, dim, rows, dropout):
        super().__init__()
        self.w1, self.w2, self.norm, self.drop = (
            nn.Linear(dim_in, dim),
            nn.Linear(dim, dim),
            nn.LayerNorm(dim),
            Drop(dropout, rows),
        )

    def forward(self, x):
        p = self.w1(x)
        return self.norm(self.drop(self.w2(F.gelu(p))) + p)


class ResidualCrossAttention(nn.Module):
    """Block on image tokens x (B, T, d), then x + (v1 + softmax(q k' / sqrt(d_h)) v2): what is not
    masked goes past the attention on the genes.

    q = Drop(ReLU(Wq x)), k = Drop(ReLU(Wk y)), v1 = W1 q, v2 = W2 k: values are of the already
    transformed q and k; no output projection.
    """

    def __init__(self, dim, rows, dropout, heads=8):
        super().__init__()
        self.heads, self.block, self.drop = (
            heads,
            Block(dim, heads, rows, dropout),
            Drop(0.25, rows),
        )
        self.wq, self.wk, self.w1, self.w2 = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x, y):
        """x (B, T, d), gene tokens y (B, n, d) -> (B, T, d)."""
        x = self.block(x)
        q, k = self.drop(F.relu(self.wq(x))), self.drop(F.relu(self.wk(y)))
        # (B, H, ., d_h)
        heads = [a.unflatten(-1, (self.heads, -1)).transpose(1, 2) for a in (q, k, self.w2(k))]
        return x + self.w1(q) + F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


class Reconstruction(nn.Module):
    """Image tokens (B, T, D_in), masked, and expression (B, G) -> reconstructed image embedding r
    (B, d)."""

    def __init__(self, dim_in, n_genes, dim, snn, rows, mask_rate, share, dropout):
        super().__init__()
        self.rows, self.mask_rate, self.n_tokens = rows, mask_rate, snn // dim
        self.genes, self.gene_drop = nn.Linear(n_genes, snn), Drop(0.25, rows, alpha=True)
        self.image = nn.Linear(dim_in, dim)
        self.cross = nn.MultiheadAttention(dim, 4, batch_first=True)
        block = ResidualCrossAttention(dim, rows, dropout)
        self.fuse = nn.ModuleList(
            [block, block if share else ResidualCrossAttention(dim, rows, dropout)]
        )

    def forward(self, tokens, s):
        # (B, 8, d) gene tokens
        y = self.gene_drop(F.elu(self.genes(s))).unflatten(-1, (self.n_tokens, -1))
        x = self.masked(self.image(tokens))  # (B, T, d)
        # replaces the image tokens: no residual here
        x = self.cross(x, y, y, need_weights=False)[0]
        for block in self.fuse:
            x = block(x, y)
        return x.mean(1)

    def masked(self, x):
        """Every element (token x channel) is 0 with probability mask_rate; nothing is rescaled."""
        return x * (self.rows.rand(*x.shape[1:]) >= self.mask_rate) if self.training else x


class CMRC(nn.Module):
    """Both branches. dim_in: width of frozen features, or the name of a ViT; n_genes: length of the
    expression vector."""

    def __init__(self, dim_in, n_genes, config):
        super().__init__()
        self.rows = GlobalRows()
        self.vit = ViT(*VITS[dim_in], self.rows) if isinstance(dim_in, str) else None
        width = VITS[dim_in][2] if isinstance(dim_in, str) else dim_in
        self.image_head = Head(width, config.dim, self.rows, config.dropout)
        self.gene_head = Head(n_genes, config.dim, self.rows, config.dropout)
        self.rebuild = (
            None
            if config.reconstruction == "none"
            else Reconstruction(
                width,
                n_genes,
                config.dim,
                config.snn,
                self.rows,
                config.mask_rate,
                config.share,
                config.dropout,
            )
        )

    def image(self, image):
        """Features (B, F) or uint8 patches (B, px, px, 3) -> tokens (B, T, D), z (B, d) of their
        mean, class token included."""
        tokens = image[:, None] if self.vit is None else self.vit(image)
        return tokens, self.image_head(tokens.mean(1))

    def forward(self, image, s):
        """-> z, h, r (B, d) each; r is None without reconstruction."""
        tokens, z = self.image(image)
        return z, self.gene_head(s), None if self.rebuild is None else self.rebuild(tokens, s)


def parameter_table(model):
    """{block: number of parameters}; shared weights count once."""
    parts = {"vit": model.vit, "image_head": model.image_head, "gene_head": model.gene_head}
    if model.rebuild is not None:
        r = model.rebuild
        parts |= {
            "gene_tokens": r.genes,
            "image_tokens": r.image,
            "cross_attention": r.cross,
            "residual_blocks": r.fuse,
        }
    return {
        name: sum(p.numel() for p in m.parameters()) for name, m in parts.items() if m is not None
    }


RENAME = [
    (r"^(vit|model|module|backbone|visual)\.", ""),
    (r"^encoder\.", ""),
    (r"^embeddings\.", ""),
    (r"^(layers?|blocks)\.", "blocks."),
    (r"^(patch_embeddings\.projection|patch_embed\.proj)\.", "patch."),
    (r"^cls_token$", "cls"),
    (r"^(position_embeddings|pos_embed)$", "pos"),
    (r"^layernorm\.", "norm."),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"attention\.output\.dense|attention\.o_proj|attn\.proj", "proj"),
    (r"attention\.attention\.|attention\.(?=[qkv]_proj)", ""),
    (r"attn\.qkv", "qkv"),
    (r"\b(q_proj|query)\b", "q"),
    (r"\b(k_proj|key)\b", "k"),
    (r"\b(v_proj|value)\b", "v"),
    (r"intermediate\.dense|mlp\.fc1", "fc1"),
    (r"(?<!\w)output\.dense|mlp\.fc2", "fc2"),
]


def vit_state(found, model):
    """Checkpoint tensors by timm or transformers names -> state_dict of `ViT`. Raises DataError
    with the first tensor that does not fit."""
    state = {}
    for name, value in found.items():
        for old, new in RENAME:
            name = re.sub(old, new, name)
        state[name] = value.float()
    for name in [n for n in state if n.endswith(("q.weight", "q.bias"))]:
        parts = [state.get(re.sub(r"q\.(\w+)$", rf"{c}.\1", name)) for c in "qkv"]
        if all(p is not None for p in parts):
            state[re.sub(r"q\.(\w+)$", r"qkv.\1", name)] = torch.cat(parts)
    own = model.state_dict()
    layers = len({n.split(".")[1] for n in state if n.startswith("blocks.")})
    wrong = [n for n in own if n not in state or state[n].shape != own[n].shape]
    if wrong or layers != len(model.blocks):
        raise DataError(
            f"the checkpoint has {layers} layers and {wrong[0] if wrong else 'every tensor'} "
            f"{'is lacking or of another shape' if wrong else 'fits'}, the ViT has "
            f"{len(model.blocks)} layers: "
            "give a ViT-B/32 checkpoint for 224 pixels and --backbone base"
        )
    return {n: state[n] for n in own}


# --------------------------------------------------------------------------------------------------
# Losses
# --------------------------------------------------------------------------------------------------


def contrastive(z, h, tau=1.0, norm_sim=False):
    """l (B,) of the pairs z, h (B, d): smoothed-target cross entropy in both directions (BLEEP, Xie
    et al. 2023, Eq. 2-5).

    S = h z' / tau, T = softmax_rows((z z' + h h') / 2 * tau); l_i = (CE(S_i, T_i) + CE(S'_i, T'_i))
    / 2, gradient also through T.
    norm_sim: cosines, and T is divided by tau as S is. On LayerNorm outputs |z|^2 is about d, so
    that the released T is one-hot.
    """
    if norm_sim:
        z, h = F.normalize(z, dim=-1), F.normalize(h, dim=-1)
    # (B, B) rows genes, columns images
    s = h @ z.T / tau
    t = ((z @ z.T + h @ h.T) / 2 * (1 / tau if norm_sim else tau)).softmax(1)
    return (-(t * s.log_softmax(1)).sum(1) - (t.T * s.T.log_softmax(1)).sum(1)) / 2


def reconstruction_error(r, z, kind):
    """Per pair (B,): mean squared error over the channels, or 1 - cosine. z is not detached: both
    sides learn."""
    return (r - z).square().mean(1) if kind == "mse" else 1 - F.cosine_similarity(r, z, dim=1)


def loss_of(out, config):
    """mean log(1 + l) + log(1 + mean error) over the global batch; the mean l for the log of
    training, and the error."""
    # each process has the loss of all rows: the sum of the processes' gradients is that of one
    packed = run.gather(torch.cat([a.float() for a in out if a is not None], 1))
    z, h, *r = packed.split(config.dim, 1)  # (B, d) each
    pair = contrastive(z, h, config.tau or (0.1 if config.norm_sim else 1.0), config.norm_sim)
    loss, error = pair.log1p().mean(), torch.zeros((), device=z.device)
    if r:
        error = reconstruction_error(r[0], z, config.reconstruction).mean()
        loss = loss + error.log1p()
    return loss, pair.mean().detach(), error.detach()


# --------------------------------------------------------------------------------------------------
# Retrieval
# --------------------------------------------------------------------------------------------------


def search(config, queries, keys):
    """Top-k by --index -> similarity, index (Q, k), recall of the inverted file on at most 1,000 of
    the queries (nan for the exact search)."""
    k = config.k
    if config.index == "exact":
        return *retrieval.exact_topk(queries, keys, k), float("nan")
    index = retrieval.InvertedFile(keys, config.lists, config.seed)
    found = index.topk(queries, k, config.probe)
    rows = torch.linspace(0, len(queries) - 1, min(len(queries), 1000)).long()
    exact = retrieval.exact_topk(queries[rows], keys, k)[1].cpu().numpy()
    recall = metrics.recall_at_k(found[1][rows].cpu().numpy(), exact)
    return *found, recall


# --------------------------------------------------------------------------------------------------
# Slides -> tensors
# --------------------------------------------------------------------------------------------------


@dataclass
class Sample:
    """One slide. S spots, G genes read out (targets first), I genes of the gene branch."""

    name: str
    patient: str
    slide: data.Slide
    # (S, F) frozen features as they are
    frozen: torch.Tensor
    # (S, F') what the image branch sees: scaled features, or uint8 (S, px, px, 3)
    x: torch.Tensor = None
    s: torch.Tensor = None  # (S, I) expression vector
    # (S, G) expression to read out
    y: np.ndarray = None
    measured: np.ndarray = None  # (G,) bool
    # (S,) bool, spots with enough counts
    scored: np.ndarray = None


def pixels(slide, px):
    """(S, px, px, 3) uint8 patches, resized where they have another size; 150 kB a spot at 224
    pixels stay in memory."""
    if slide.patches is None:
        raise DataError(
            f"slide {slide.sample} has no patches: give a HEST folder with patches/, or "
            "--backbone features"
        )
    out = torch.empty(slide.n_spots, px, px, 3, dtype=torch.uint8)
    for rows in torch.arange(slide.n_spots).split(256):
        p = torch.from_numpy(slide.patches[rows.numpy()])  # (n, h, w, 3)
        if p.shape[1:3] != (px, px):
            p = (
                F.interpolate(
                    p.permute(0, 3, 1, 2).float(), size=(px, px), mode="bilinear", antialias=True
                )
                .round()
                .clamp(0, 255)
                .permute(0, 2, 3, 1)
            )
        out[rows] = p.to(torch.uint8)
    return out


class Scaler:
    """Mean and spread of features and of the expression vector over the scored training spots."""

    def __init__(self, tensors):
        self.tensors = tensors

    @classmethod
    def fit(cls, samples):
        tensors = {}
        for name in ("frozen", "s"):
            mean, std = hest.mean_and_std([getattr(s, name)[s.scored] for s in samples])
            tensors |= {f"{name}_mean": mean, f"{name}_std": std}
        return cls(tensors)

    def apply(self, sample, config):
        """The sample with x (frozen features only) and s scaled as --scale and --gene_scale say."""
        out, t = copy.copy(sample), self.tensors
        if config.backbone == "features":
            out.x = hest.scaled_features(
                sample.frozen, t["frozen_mean"], t["frozen_std"], config.scale
            )
        if sample.s is not None and config.gene_scale != "none":
            own = sample.s[sample.scored]
            mean, std = (
                (t["s_mean"], t["s_std"])
                if config.gene_scale == "train"
                else (own.mean(0), own.std(0, correction=0))
            )
            # a gene seen once is not worth 30 sigma
            out.s = ((sample.s - mean) / std.clamp(min=0.1)).clamp(-10, 10)
        return out


class Pairs:
    """Scored spots of several samples: image, expression vector, values; the unit of training and
    the rows of the atlas."""

    def __init__(self, samples):
        rows = [np.flatnonzero(s.scored) for s in samples]
        self.names = [s.name for s in samples]
        # (N,)
        self.slide = np.repeat(np.arange(len(samples)), [len(r) for r in rows])
        self.row, self.x = np.concatenate(rows), [s.x for s in samples]
        self.s = torch.cat([s.s[r] for s, r in zip(samples, rows)])  # (N, I)
        # pictures are not copied
        self.features = (
            torch.cat([s.x[r] for s, r in zip(samples, rows)]) if samples[0].x.ndim == 2 else None
        )
        y = np.concatenate([s.y[r] for s, r in zip(samples, rows)])  # (N, G)
        measured = np.stack([s.measured for s in samples])[self.slide]
        self.y, _ = hest.fill_unmeasured(y, measured)

    def __len__(self):
        return len(self.row)

    def image(self, rows):
        """Rows of the image input, (n, F) or (n, px, px, 3)."""
        if self.features is not None:
            return self.features[rows]
        return torch.stack([self.x[i][j] for i, j in zip(self.slide[rows], self.row[rows])])


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def turned(image, rows):
    """Random flips and quarter turns of square patches (n, px, px, 3), as released."""
    u = rows.rand(3)  # (n, 3)
    for axis in (1, 2):
        image = torch.where((u[:, axis - 1] < 0.5)[:, None, None, None], image.flip(axis), image)
    turns = (u[:, 2] * 4).long()
    for n in (1, 2, 3):
        image = torch.where((turns == n)[:, None, None, None], image.rot90(n, (1, 2)), image)
    return image


@torch.no_grad()
def embed(model, config, x=None, s=None, batch=1024):
    """z (S, d) of images x, or h (S, d) of expression s; float32, on the model's device; eval
    mode."""
    model.eval()
    device = next(model.parameters()).device
    out = []
    for part in (s if x is None else x).split(batch):
        with run.autocast(config, device):
            out.append(
                (
                    model.gene_head(part.to(device))
                    if x is None
                    else model.image(part.to(device))[1]
                ).float()
            )
    return torch.cat(out)


def retrieve(model, config, keys, values, samples):
    """keys (M, d), values (M, G) -> predicted expression (S, G) of every sample, the similarity,
    index and queries of each, recall of the index."""
    queries = [embed(model, config, x=s.x) for s in samples]
    similarity, index, recall = search(config, torch.cat(queries), keys)
    sizes = [len(q) for q in queries]
    found = list(zip(similarity.split(sizes), index.split(sizes), queries))
    predicted = [retrieval.read_out(a, b, values, config.weighting) for a, b, _ in found]
    return predicted, found, recall


def validation_score(model, config, pairs, samples, n_targets):
    """Mean over held-out slides of the mean PCC of the target genes."""
    found = []
    for s, pred in zip(
        samples, retrieve(model, config, embed(model, config, s=pairs.s), pairs.y, samples)[0]
    ):
        cols = np.flatnonzero(s.measured[:n_targets])
        found.append(
            metrics.pcc_summary(s.y[s.scored][:, cols], pred[s.scored][:, cols])["pcc_mean"]
        )
    return float(np.nanmean(found)) if np.isfinite(found).any() else -np.inf


def epoch_of(net, model, optimiser, pairs, config, record, generator):
    """One pass. Returns loss, mean l of the pairs and reconstruction error, averaged over the
    steps; the same with one process or several."""
    batch = min(config.batch, len(pairs) // record.world * record.world)
    order = torch.randperm(
        len(pairs), generator=torch.Generator().manual_seed(generator.initial_seed())
    )
    total = torch.zeros(3, device=record.device)
    # the last, incomplete batch is dropped
    steps = order[: len(order) // batch * batch].split(batch)
    for rows in steps:
        model.rows.set(record.rank, record.world, batch, generator)
        mine = rows[model.rows.start : model.rows.start + model.rows.n].numpy()
        image = pairs.image(mine).to(record.device)
        if model.vit is not None and config.augment:
            image = turned(image, model.rows)
        with run.autocast(config, record.device):
            out = net(image, pairs.s[mine].to(record.device))
        loss, pair, error = loss_of(out, config)
        optimiser.zero_grad()
        # DDP averages the gradients; the sum is wanted, see `loss_of`
        (loss * record.world).backward()
        optimiser.step()
        total += torch.stack([loss.detach(), pair, error])
    # the only place where the host waits for the device
    found = (total / len(steps)).tolist()
    if not np.isfinite(found[0]):
        raise DataError(
            f"the loss is {found[0]}: lower --lr, or check the inputs for extreme values"
        )
    return found


def train_one(make, pairs, val, config, record, epochs, number, n_targets, saved=None, save=None):
    """One model. Every epoch seeds itself, so that going on from `saved` gives what an
    uninterrupted run gives.

    Returns the model and its history [(loss, mean l, reconstruction error, validation score or
    nan)].
    """
    torch.manual_seed(1_000_003 * config.seed + number)
    model = run.compiled(make().to(record.device), config)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay, foreach=True
    )
    history = []
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        history = [tuple(h) for h in saved["history"]]
    net = nn.parallel.DistributedDataParallel(model) if record.world > 1 else model
    for epoch in run.progress(range(len(history), epochs), "epochs"):
        generator = torch.Generator(record.device).manual_seed(
            1_000_003 * config.seed + 1009 * (number + 1) + epoch
        )
        model.train()
        for group in optimiser.param_groups:
            # a cosine from lr to lr / 10, a step an epoch
            group["lr"] = config.lr * run.warmup_cosine(epoch, config.epochs, floor=0.1)
        found = epoch_of(net, model, optimiser, pairs, config, record, generator)
        history.append(
            (
                *found,
                validation_score(model, config, pairs, val, n_targets) if val else float("nan"),
            )
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


def inner_folds(samples, config):
    """[(fit, validation samples)] inside the training slides: other patients, else other slides,
    else tiles of an only slide; or a random fifth."""
    if config.val == "none":
        return []
    if config.val == "random":
        rng = np.random.default_rng(config.seed)
        masks = {s.name: rng.random(len(s.scored)) < 0.2 for s in samples}
        return [hest.divided(samples, masks)]

    def place(sample):
        xy = sample.slide.xy
        return (xy - xy.min(0)) / data.lattice_pitch(xy)

    folds = hest.inner_folds(samples, config.folds, place)
    # enough spots to average k of them
    return [(fit, val) for fit, val in folds if sum(s.scored.sum() for s in fit) >= config.k]


def train(make, samples, config, record, n_targets, latest=None, origin=None):
    """Validation inside the training slides chooses the number of epochs, then one model is trained
    on all of them.

    Returns the model, the histories (folds, then the model), the best validation score (nan
    without). latest: path of latest.pt or None; origin: see `jobs.Jobs`.
    """
    queue = jobs.Jobs(config, latest, origin, "whole cmrcnet checkpoint")
    folds = inner_folds(samples, config)

    def train_on(fit, val, epochs):
        given = (make, Pairs(fit), val, config, record, epochs)
        return partial(train_one, *given, n_targets=n_targets)

    for fit, val in folds:
        queue.do(train_on(fit, val, config.epochs))
    epochs, best = config.epochs, float("nan")
    if folds:
        epochs, best = hest.best_epochs(queue.histories())
    model = queue.do(train_on(samples, [], epochs))
    histories = queue.histories()
    warn_when_guessing(histories[-1], min(config.batch, sum(int(s.scored.sum()) for s in samples)))
    return model, histories, best


def warn_when_guessing(history, batch):
    """Print a warning where the contrastive loss of the last epoch is still that of random
    guessing, log(batch)."""
    last, guess = history[-1][1], np.log(batch)
    if last > 0.95 * guess:
        run.say(
            f"warning: the contrastive loss is {last:.2f}, random guessing has log({batch}) = "
            f"{guess:.2f}: image and expression have not been "
            "matched; train longer, raise --lr, or check the pairing"
        )


def encoder_name(config):
    """What turns a patch into the model's input: the ViT, or the frozen encoder."""
    if config.backbone != "features":
        return f"vit:{config.backbone}"
    return "file" if hest.has_feature_files(config.encoder) else config.encoder


# --------------------------------------------------------------------------------------------------
# Baselines and scores
# --------------------------------------------------------------------------------------------------


def classical_baselines(fit, test, pairs, n_targets):
    """{name: [prediction (S, G) per test sample]} on the frozen features; `_scaled`: on what the
    image branch sees, where that is features."""
    y = pairs.y.astype(np.float64)

    def features(column):
        x = torch.cat([getattr(s, column)[s.scored] for s in fit]).double().numpy()
        return x, y, [getattr(s, column).double().numpy() for s in test], n_targets

    predictions = {"train_mean": [np.tile(pairs.y.mean(0), (len(s.frozen), 1)) for s in test]}
    predictions |= baselines.feature_baselines(*features("frozen"))
    if fit[0].x.ndim == 2:
        predictions |= baselines.scaled_baselines(*features("x"))
    return predictions


# --------------------------------------------------------------------------------------------------
# The program
# --------------------------------------------------------------------------------------------------


@dataclass
class Task:
    """What a run trains on and is scored on; genes are read out, targets first; lists {test slide:
    {heg, hvg, marker: names}}."""

    fit: list
    test: list
    genes: list
    n_targets: int
    inputs: list
    lists: dict
    scaler: Scaler
    pairs: Pairs
    rates: list = None

    def score(self, predictions):
        """Scores of the target genes, and of the HEG, HVG and marker lists."""
        scores = hest.score(self.test, predictions, self.rates, self.n_targets)
        return scores | hest.gene_list_scores(self.test, predictions, self.genes, self.lists)


def check(config):
    """Raises DataError naming the flag that has an impossible value."""
    one, zero = run.AT_LEAST_ONE, run.AT_LEAST_ZERO
    run.check_flags(
        config,
        {
            "fold": zero,
            "min_counts": zero,
            "n_hvg": zero,
            "dim": zero,
            "snn": zero,
            "tau": zero,
            "mask_rate": (lambda v: 0 <= v <= 1, "from 0 to 1"),
            "dropout": (lambda v: 0 <= v < 1, "from 0 to below 1"),
            "k": one,
            "lists": zero,
            "probe": one,
            "lr": zero,
            "weight_decay": zero,
            "batch": (lambda v: v >= 2, "2 or more, a contrastive loss tells a spot from others"),
            "epochs": zero,
            "folds": one,
            "save_every": zero,
        },
    )
    if config.weights and config.backbone != "base":
        raise DataError(
            f"--weights {config.weights} is a ViT-B/32 checkpoint: give --backbone base with it"
        )
    run.refuse_idle_flags(config, idle_flags(config))


def idle_flags(config):
    """Rules for the flags that do nothing beside the others, as `run.refuse_idle_flags` takes
    them. With a ViT, --encoder still rules the baselines."""
    exact = (config.index == "exact", "with --index exact", ("lists", "probe"))
    if config.predict:
        used = ("genes", "k", "weighting", "index", "lists", "probe", "atlas")
        return [run.idle_with_predict(config, used), exact]
    split, has_vit = f"with --split {config.split}", config.backbone != "features"
    has_groups, has_one = config.val == "groups", config.split in ("section", "sample")
    alone = config.reconstruction == "none"
    return [
        exact,
        (config.split != "folds", split, ("fold",)),
        (config.split != "patient", split, ("patient",)),
        (not has_one, split, ("slice",)),
        (not has_vit, "with --backbone features", ("augment",)),
        (has_vit, f"with --backbone {config.backbone}", ("scale",)),
        (alone, "with --reconstruction none", ("mask_rate", "share")),
        (not has_groups, f"with --val {config.val}", ("folds",)),
        (True, "without --predict", ("atlas",)),
    ]


def resolved(config):
    """The flags with 0 replaced by what they stand for. Raises DataError for widths that
    do not fit each other."""
    out = copy.copy(config)
    for name, value in SIZES["features" if out.backbone == "features" else "vit"].items():
        setattr(out, name, getattr(out, name) or value)
    if out.dim % 8 or out.snn % out.dim:
        raise DataError(
            f"--dim is {out.dim} and --snn {out.snn}: 8 heads must divide dim, and dim snn"
        )
    return out


def require_spots(n, k, what):
    """Raise DataError where there are fewer spots than neighbours to average."""
    if n < k:
        raise DataError(
            f"{what} has {n} spots with enough counts, fewer than --k {k}: choose a smaller "
            "--k or more training slides"
        )


def variant(config):
    """Folder name of the run: split where it is not the folder's own, backbone, and every other
    flag that is not at its default."""
    config = resolved(config)
    words = [config.split] * (config.split != "folds") + [config.backbone]
    preset = run.of_preset(Config, config.preset)
    default = resolved(replace(preset, backbone=config.backbone))
    silent = ("split", "fold", "patient", "backbone", "atlas")
    return run.variant(config, words, silent, default)


def load(config, train_names, test_names):
    """Task of the slides by name; prints what was filtered. The values of test slides reach nothing
    that is fitted, but for --oracle_genes."""
    need = config.backbone != "features" or not hest.has_feature_files(config.encoder)
    slides = hest.load_slides(config.data, [*train_names, *test_names], need)
    fit, min_counts = [slides[n] for n in train_names], config.min_counts
    targets = hest.target_genes(config.genes, fit, config.data, min_counts)
    shared = hest.shared_genes(fit)
    seen = list(slides.values()) if config.oracle_genes else fit
    inputs = hest.variable_genes(seen, config.n_hvg, min_counts)
    choice = (min_counts, config.target, config.markers)
    if config.oracle_genes:
        lists = {}
        for n in test_names:
            measured = [g for g in shared if g in set(slides[n].genes)]
            lists[n] = hest.gene_lists([slides[n]], measured, *choice)
    else:
        lists = dict.fromkeys(test_names, hest.gene_lists(fit, shared, *choice))
    listed = [g for of_slide in lists.values() for names in of_slide.values() for g in names]
    genes = list(dict.fromkeys([*targets, *listed]))
    samples = {}
    for n, slide in slides.items():
        frozen = hest.slide_features(config, slide)
        scored = hest.enough_counts(slide, min_counts)
        s = samples[n] = Sample(n, slide.patient, slide, frozen, scored=scored)
        s.y, _, _, s.measured = hest.target_expression(slide, genes, config.target)
        if n in train_names:
            s.s = torch.from_numpy(hest.log_expression(slide, inputs).toarray())
        if config.backbone != "features":
            s.x = pixels(slide, VITS[config.backbone][0])
        hest.say_what_is_left_out(s, min_counts, len(targets))
    n_spots = sum(samples[n].scored.sum() for n in train_names)
    require_spots(n_spots, config.k, f"the training side ({', '.join(train_names)})")
    if config.shuffle_pairs:
        shuffle([samples[n] for n in train_names], config.seed)
    scaler = Scaler.fit([samples[n] for n in train_names])
    fit, test = (
        [scaler.apply(samples[n], config) for n in names] for names in (train_names, test_names)
    )
    return Task(
        fit,
        test,
        genes,
        len(targets),
        inputs,
        lists,
        scaler,
        Pairs(fit),
        hest.simulated_rates(config.data, test, genes, normalised=True),
    )


def shuffle(samples, seed):
    """Give every spot the image of another spot of any of the samples (control). Within slides
    would not do: the slides' means would stay paired."""
    sizes = [len(s.frozen) for s in samples]
    rows = torch.from_numpy(np.random.default_rng([seed, 11]).permutation(sum(sizes)))
    for name in ("frozen", "x") if samples[0].x is not None else ("frozen",):
        for s, part in zip(
            samples, torch.cat([getattr(s, name) for s in samples])[rows].split(sizes)
        ):
            setattr(s, name, part)


def maker(config, dim_in, n_genes):
    """A function that makes a new model, with the checkpoint of --weights where there is one."""
    found = read_tensors(config.weights) if config.weights else None

    def make():
        model = CMRC(dim_in, n_genes, config)
        if found is not None:
            model.vit.load_state_dict(vit_state(found, model.vit))
        return model

    return make


def main(argv=None):
    """Train and score one model, or predict with one (--predict)."""
    start = time.perf_counter()
    config = run.parse(Config, argv, __doc__.split("\n")[0])
    check(config)
    if config.predict:
        return predict_folder(config, start)
    config = resolved(config)
    split, train_names, test_names, part, leaks = hest.hest_partition(
        config.data, config.split, config.fold, config.patient, config.slice
    )
    record = run.Run("cmrcnet", config, part, variant(config), start)
    if config.batch % record.world:
        raise DataError(
            f"--batch is {config.batch}, which {record.world} processes cannot share evenly: "
            f"choose a multiple of {record.world}"
        )
    task = load(config, train_names, test_names)
    slides = [s.slide for s in [*task.fit, *task.test]]
    more = [*hest.task_files(config), config.weights]
    checksum = record.note_inputs(input_files(slides, config.encoder, more))
    run.say(
        f"{part}: {split.detail}; train {' '.join(train_names)}, test {' '.join(test_names)}; "
        f"{len(task.pairs)} training spots, {task.n_targets} "
        f"target genes, {len(task.inputs)} genes in the gene branch, "
        f"{len(task.lists[test_names[0]]['marker'])} markers measured, "
        f"{encoder_name(config)}"
    )
    predictions = classical_baselines(task.fit, task.test, task.pairs, task.n_targets)
    make = maker(
        config,
        task.fit[0].x.shape[1] if config.backbone == "features" else config.backbone,
        len(task.inputs),
    )
    model, histories, val = train(
        make,
        task.fit,
        config,
        record,
        task.n_targets,
        record.folder / "latest.pt",
        [checksum, train_names, test_names, [str(g) for g in [*task.genes, *task.inputs]]],
    )
    keys, values = embed(model, config, s=task.pairs.s), task.pairs.y
    z = torch.cat([embed(model, config, x=s.x[s.scored]) for s in task.fit])
    predicted, neighbours, recall = retrieve(model, config, keys, values, task.test)
    predictions["image_only"] = retrieve(model, config, z, values, task.test)[0]
    if config.reconstruction != "none" and config.backbone == "features":
        alone = copy.copy(config)
        alone.reconstruction, alone.resume = "none", False
        other = train(
            maker(alone, task.fit[0].x.shape[1], len(task.inputs)),
            task.fit,
            alone,
            record,
            task.n_targets,
        )[0]
        predictions["contrastive_only"] = retrieve(
            other, alone, embed(other, alone, s=task.pairs.s), values, task.test
        )[0]
    others = {name: task.score(p) for name, p in predictions.items()}
    found = (
        task.score(predicted)
        | {"val_pcc": val, "recall_at_k": recall}
        | diagnostics(config, task, histories[-1], z, keys)
    )
    found |= {f"gain_over_{name}": found["pcc_mean"] - s["pcc_mean"] for name, s in others.items()}
    report(config, others, found, len(task.fit))
    write(
        record,
        config,
        task,
        model,
        keys,
        predicted,
        neighbours,
        histories,
        found,
        others,
        split,
        target=config.target,
        leaks_patient=leaks,
        train_slides=train_names,
        test_slides=test_names,
    )
    return 0


def diagnostics(config, task, history, z, keys):
    """Scores that say whether to believe the others: losses beside guessing, slides told apart from
    the embeddings, noise ceiling if simulated."""
    found = {
        "contrastive": history[-1][1],
        "contrastive_guess": float(np.log(min(config.batch, len(task.pairs)))),
        "reconstruction_error": history[-1][2],
    }
    found |= {
        f"slide_accuracy_{name}": hest.slide_accuracy(a.cpu().numpy(), task.pairs.slide)
        for name, a in (("image", z), ("gene", keys))
    }
    return found | (
        {} if task.rates is None else {"ceiling_pcc": task.score(task.rates)["pcc_mean"]}
    )


def report(config, others, found, n_slides):
    """Print the table."""
    for name, s in [*others.items(), ("cmrcnet", found)]:
        run.say(hest.table_row(name, s, COLUMNS))
    run.say(
        f"gain over image-only retrieval {found['gain_over_image_only']:+.3f}, ridge "
        f"{found['gain_over_ridge_raw']:+.3f} (raw); "
        f"slides told apart from z {found['slide_accuracy_image']:.2f}, from h "
        f"{found['slide_accuracy_gene']:.2f} (chance {1 / n_slides:.2f}); "
        f"contrastive loss {found['contrastive']:.2f}, guessing {found['contrastive_guess']:.2f}"
        + (
            f"; recall@{config.k} of the inverted file {found['recall_at_k']:.3f}"
            if config.index == "ivf"
            else ""
        )
    )


def write(
    record,
    config,
    task,
    model,
    keys,
    predicted,
    neighbours,
    histories,
    found,
    others,
    split,
    **more,
):
    """Write the record, the figures, the model and the atlas."""
    fit, test, genes, pairs, weights = (
        task.fit,
        task.test,
        task.genes,
        task.pairs,
        {k: v.cpu() for k, v in model.state_dict().items()},
    )
    mark = retrieval.fingerprint(weights, task.inputs)
    saved = {
        "config": vars(config).copy(),
        "genes": genes,
        "inputs": task.inputs,
        "scaler": task.scaler.tensors,
        "weights": weights,
        "fingerprint": mark,
    }
    shared = hest.shared_genes([s.slide for s in fit])
    # target genes that not every training slide measures
    rest = [j for j, g in enumerate(genes) if g not in set(shared)]
    values = sp.hstack(
        [
            sp.csr_matrix(pairs.y[:, rest]),
            sp.vstack([hest.log_expression(s.slide, shared, config.target)[s.scored] for s in fit]),
        ]
    ).tocsr()
    names = {"genes": [*(genes[j] for j in rest), *shared], "inputs": task.inputs}
    names |= {"slides": pairs.names, "slide": pairs.slide}
    attributes = {"encoder": encoder_name(config), "fingerprint": mark, "target": config.target}
    draw(record, config, task, predicted, histories)
    arrays = arrays_of(test, genes, predicted, neighbours)
    arrays |= {
        "key_slide": np.array(pairs.names)[pairs.slide],
        "key_row": pairs.row,
    }
    record.finish(
        found,
        others,
        arrays,
        sum(p.numel() for p in model.parameters()),
        split,
        {
            "model.pt": lambda f: torch.save(saved, f),
            "atlas.h5": lambda f: retrieval.write_atlas(
                f, keys.cpu().numpy(), values, names, attributes
            ),
        }
        | export.files_of("cmrcnet", arrays, [s.slide for s in test], config),
        epochs=len(histories[-1]),
        history=histories[-1],
        parameters=parameter_table(model),
        low_count_spots={s.name: int((~s.scored).sum()) for s in [*fit, *test]},
        genes="the folder's list, chosen by its makers on all slides"
        if config.genes == "task"
        else "training slides",
        gene_lists="oracle" if config.oracle_genes else "training slides",
        n_markers=len(task.lists[test[0].name]["marker"]),
        **more,
    )


def arrays_of(samples, genes, predicted, neighbours):
    """What arrays.npz holds: spots of all test slides one below the other; neighbours are rows of
    the atlas."""
    return hest.spot_arrays(samples, predicted, genes) | {
        "embedding": torch.cat([n[2] for n in neighbours]).cpu().numpy(),
        "neighbours": torch.cat([n[1][:, :10] for n in neighbours]).cpu().numpy(),
    }


def predict_folder(config, start):
    """Read expression for slides without counts out of the atlas; one folder of results for all of
    them."""
    saved = run.read_checkpoint(config.predict, "whole cmrcnet checkpoint", ["config"])
    known = run.saved_flags(config.predict, Config, saved["config"], check)
    with run.checkpoint_fits(config.predict):
        scaler, genes, inputs, weights, mark = (
            saved[k] for k in ("scaler", "genes", "inputs", "weights", "fingerprint")
        )
        dim_in = len(scaler["frozen_mean"])
    for name in ("k", "weighting", "index", "lists", "probe"):
        setattr(known, name, getattr(config, name))
    atlas = config.atlas or Path(config.predict).with_name("atlas.h5")
    keys, values, available = retrieval.read_atlas(atlas, encoder_name(known), inputs, mark)
    require_spots(len(keys), known.k, "the atlas")
    genes = hest.genes_to_read(config.genes, genes, available)
    column = {g: j for j, g in enumerate(available)}
    values = values.tocsc()[:, [column[g] for g in genes]].tocsr()
    slides = hest.new_slides(config, known, pixels=known.backbone != "features")
    record = run.Run(
        "cmrcnet",
        config,
        config.slice or "all",
        f"predict-{variant(known)}-{data.file_checksum(config.predict)[:8]}",
        start,
    )
    record.note_inputs(input_files(slides, known.encoder, [config.predict, atlas]))
    samples = [Sample(s.sample, s.patient, s, hest.slide_features(known, s)) for s in slides]
    for s in samples:
        hest.check_width(s.frozen, dim_in, s.name, known.encoder, config.predict)
        s.x = None if known.backbone == "features" else pixels(s.slide, VITS[known.backbone][0])
    with run.checkpoint_fits(config.predict):
        samples = [Scaler(scaler).apply(s, known) for s in samples]
        model = CMRC(
            samples[0].x.shape[1] if known.backbone == "features" else known.backbone,
            len(inputs),
            known,
        )
        model.load_state_dict(weights)
    model.to(record.device)
    predicted, neighbours, recall = retrieve(model, known, keys.to(record.device), values, samples)
    draw(record, known, Task([], samples, genes, len(genes), inputs, {}, None, None), predicted, [])
    arrays, known.h5ad = arrays_of(samples, genes, predicted, neighbours), config.h5ad
    record.finish(
        {"recall_at_k": recall},
        {},
        arrays,
        sum(p.numel() for p in model.parameters()),
        files=export.files_of("cmrcnet", arrays, slides, known),
        checkpoint=config.predict,
    )
    return 0


def draw(record, config, task, predicted, histories):
    """genes.png: maps of the first slide (five best and five worst genes, truth above prediction);
    gene_gene.png: correlations of the HEG list; training.png: losses beside log(batch), and
    validation."""
    s, genes = task.test[0], task.genes
    record.figure("genes", figures.gene_maps(s, predicted[0], genes, task.n_targets))
    if s.y is not None:
        heg = set(task.lists[s.name]["heg"])
        columns = [j for j, g in enumerate(genes) if g in heg and s.measured[j]]
        pair = [values[s.scored][:, columns] for values in (s.y, predicted[0])]
        record.figure("gene_gene", figures.gene_gene_maps(*pair))
        names = ("loss", "contrastive, mean l", "reconstruction error")
        losses = dict(zip(names, zip(*histories[-1])))
        curves = {f"fold {i}": [row[-1] for row in h] for i, h in enumerate(histories[:-1])}
        title, guess = "PCC on held-out training spots", np.log(config.batch)
        record.figure("training", figures.training_curves(losses, curves, title, guess))
    figures.close()


if __name__ == "__main__":
    run.cli(main)
