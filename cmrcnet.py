r"""Gene expression from H&E by retrieval: contrastive learning of patch and expression, with
cross-modal mask reconstruction.

Paper: Liu et al. 2025 (arXiv 2506.08854; Medical Image Analysis 108). Heads, contrastive loss and
retrieval are BLEEP's: Xie et al. 2023. The page beside this file is docs/cmrcnet.md.

    patch --ViT--> F (B, T, D) --mean, head--> z (B, d)  <-- contrastive loss --> h (B, d)
                   |                            ^                                    ^
                   linear, mask half            | reconstruction loss        head ---+
                   v                            |                                    |
                   X (B, T, d) --query--> two residual cross-attentions --mean--> r  |
                                            ^ key, value                             |
                                            Y (B, n, d) <--SNN block-- expression s (B, G)

    prediction: mean expression of the k training spots whose h is nearest to z by cosine

| symbol | meaning | shape |
|---|---|---|
| $F$ | image tokens: class token and patches of the ViT; one token of frozen features | (B, T, D) |
| $s$ | log expression of the highly variable genes | (B, G) |
| $z$, $h$ | embeddings of image and expression | (B, d) |
| $X$, $Y$ | image tokens and gene tokens of the reconstruction | (B, T, d), (B, n, d) |
| $r$ | reconstructed embedding | (B, d) |
| $S$, $P$ | similarities of the pairs of a batch, and their targets | (B, B) |
| $W$ | a linear map; every layer has its own | |

Every run scores the model beside the predictors it has to beat on the same slides: train mean,
ridges, kNN, image-only retrieval, the contrastive loss alone.

    python cmrcnet.py --data datasets/her2st --fold 0 --encoder "features/{sample}.npz"
    python cmrcnet.py --data datasets/her2st --split section --slice C2 --preset tuned
    python cmrcnet.py --data new_slides --predict runs/.../model.pt
"""

import time
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from evaluation import atlas, retrieval_record, retrieval_task
from plainst import retrieval, run
from plainst.features import read_tensors
from plainst.vit_weights import vit_state


class Size(NamedTuple):
    """Pixels of a patch and of a token, width, layers and heads of a ViT."""

    pixels: int
    token: int
    dim: int
    layers: int
    heads: int


VITS = {
    "released": Size(224, 32, 768, 8, 8),
    "base": Size(224, 32, 768, 12, 12),
    "tiny": Size(112, 16, 192, 4, 6),
}

# named sets of flags; what is typed goes before them. The defaults of Config are the paper's, but
# for the backbone
TUNED = {"dim": 128, "snn": 512, "n_hvg": 200, "lr": 1e-3, "epochs": 14, "val": "groups"}
TUNED |= {"norm_sim": True, "tau": 0.1, "dropout": 0.3, "scale": "both"}
TUNED |= {"gene_scale": "slide", "batches": "slide", "values": "slide"}
SMALL = {"backbone": "tiny", "dim": 128, "snn": 1024, "epochs": 30}
PRESETS = {"paper": {}, "paper-small": SMALL, "tuned": TUNED}


@dataclass
class Config(run.Config):
    """Flags of cmrcnet.py."""

    presets: ClassVar = PRESETS

    preset: str = "paper"
    """a named set of flags; what is typed beside it goes before it. paper: the released settings on
    frozen features; paper-small: a ViT of 50 tokens from patches"""
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
    n_hvg: int = 1000
    "genes of the gene branch: union of so many highly variable genes of each training slide"
    oracle_genes: bool = False
    """the published rule: highly variable genes of all slides, test included, and HEG / HVG lists
    from each test slide's truth"""
    markers: str = "breast"
    "marker list: breast, colorectal, or names joined by commas; those not measured are left out"
    backbone: Literal["features", "released", "base", "tiny"] = "features"
    """frozen features of one token, or a ViT: 8 layers x 8 heads as released, ViT-B/32 (12 x 12),
    4 x 6 on 112 pixels"""
    weights: str = ""
    """ViT-B/32 checkpoint (timm or transformers keys; .safetensors, .pt, .bin) to start --backbone
    base from"""
    encoder: str = "handmade"
    """frozen features: handmade, a Hugging Face vision model, or features files: a .npy/.npz path,
    {sample} stands for the slide's name"""
    cache: str = ""
    "folder for image features; empty: <data>/.features where that can be written"
    scale: Literal["train", "slide", "both"] = "train"
    """features are z-scored by the training spots, by the slide's own spots (no label is used), or
    both, side by side"""
    gene_scale: Literal["none", "train", "slide"] = "none"
    """expression vector of the gene branch: log1p as it is (released), z-scored over the training
    spots, or within each slide"""
    dim: int = 256
    "width d of the embeddings"
    snn: int = 2048
    "width of the self-normalising gene block: snn / dim gene tokens"
    tau: float = 1.0
    "temperature; with --norm_sim .1 is usual"
    norm_sim: bool = False
    """similarities are cosines: the smoothed targets are then smooth; in the released form they are
    one-hot"""
    reconstruction: Literal["mse", "cosine", "none"] = "mse"
    "distance between the reconstructed embedding and its target; none: contrastive loss alone"
    reconstruct: Literal["image", "genes"] = "image"
    "what is masked and reconstructed; the other modality is the key and value"
    schedule: Literal["joint", "two-stage"] = "joint"
    "both losses from the start (released), or contrastive alone for the first half of --epochs"
    mask_rate: float = 0.5
    "fraction of the elements of the masked tokens set to 0"
    share: bool = True
    "the two residual cross-attention blocks share weights, as released"
    dropout: float = 0.1
    "dropout of heads and fusion blocks"
    batches: Literal["mixed", "slide"] = "mixed"
    "spots of a batch: of all slides (released), or of one, so that no slide can be told (ours)"
    values: Literal["raw", "slide"] = "raw"
    """expression that is averaged: as it is, or z-scored within its slide and brought back to the
    mean and spread of all training spots (ours)"""
    shuffle_pairs: bool = False
    """control: image and expression of the training spots are paired at random, over all training
    slides"""
    k: int = 50
    "neighbours averaged"
    weighting: Literal["mean", "softmax"] = "mean"
    "plain mean, or softmax of cosine / 0.05"
    index: Literal["exact", "ivf"] = "exact"
    "exact search, or an inverted file: k-means lists of which the nearest are read"
    recall: float = 0.95
    "share of the k nearest that the inverted file has to find: it chooses how many lists it reads"
    lr: float = 1e-4
    "peak AdamW learning rate; a cosine falls to a tenth of it"
    batch: int = 64
    "spots of a step over all processes: the contrastive loss is over all of them"
    epochs: int = 60
    "most passes over the training spots; --val chooses how many"
    val: Literal["groups", "random", "none"] = "random"
    """chooses the number of epochs inside the training slides: cross-validation over patients
    (slides where there is one patient, tiles where there is one slide), a random fifth of the spots
    (released), or no choice"""
    folds: int = 5
    "folds of --val groups, at most"
    fast: bool = True
    "fused attention, search in tiles; the plain forms give the same numbers"
    save_every: int = 0
    "epochs between checkpoints (latest.pt in the run's folder); 0: none"
    resume: bool = False
    "go on from latest.pt"
    predict: str = ""
    "checkpoint (model.pt of a run): predict --data with it and the atlas.h5 beside it"


def check(config):
    """Raise DataError, naming the flag, for a value or a combination that no run can use."""
    retrieval_task.check(config, HEADS)


def variant(config):
    """Folder name of the run."""
    return retrieval_task.variant(config)


# --------------------------------------------------------------------------------------------------
# Layers
# --------------------------------------------------------------------------------------------------

HEADS = 8  # of the residual cross-attention
CROSS_HEADS = 4  # of the cross-attention before it
GENE_DROPOUT = 0.25  # of the gene tokens, and of q and k in the residual cross-attention


def attention(q, k, v, fast=True):
    r"""Attention of heads side by side (Vaswani et al. 2017, Eq. 1): q (B, heads, T, c), k and v
    (B, heads, n, c) -> (B, T, heads c).

    $$\mathrm{att}(q, k, v) = \mathrm{softmax}(q k^\top / \sqrt{c})\, v \tag{1}$$

    Test: test_plain_attention_equals_the_fused_one
    """
    if fast:
        out = F.scaled_dot_product_attention(q, k, v)
    else:
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # (B, heads, T, n)
        out = scores.softmax(-1) @ v
    return out.transpose(1, 2).flatten(2)  # (B, T, heads c)


class TransformerBlock(nn.Module):
    r"""Pre-norm transformer block (Dosovitskiy et al. 2021, Eq. 2-3).

    $$x \leftarrow x + W \mathrm{att}(\mathrm{LN}(x)), \qquad
    x \leftarrow x + W_2 \mathrm{GELU}(W_1 \mathrm{LN}(x)) \tag{2}$$

    Test: test_vit_of_a_checkpoint_equals_transformers
    """

    def __init__(self, dim, heads, dropout=0.0, fast=True):
        super().__init__()
        self.heads, self.fast, self.dropout = heads, fast, nn.Dropout(dropout)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        """x (B, T, D) -> (B, T, D)."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, T, c) each
        x = x + self.dropout(self.proj(attention(q, k, v, self.fast)))
        hidden = self.dropout(F.gelu(self.fc1(self.norm2(x))))  # (B, T, 4 D)
        return x + self.dropout(self.fc2(hidden))


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean, standard deviation


class ViT(nn.Module):
    r"""Vision transformer (Dosovitskiy et al. 2021, Eq. 1-4): a class token, then the patches.

    $$F = \mathrm{LN}(\mathrm{blocks}([c;\, W p_1;\, \dots;\, W p_{49}] + e)) \tag{3}$$

    Test: test_vit_of_a_checkpoint_equals_transformers
    """

    def __init__(self, size, fast=True):
        super().__init__()
        n_tokens = 1 + (size.pixels // size.token) ** 2
        self.patch = nn.Conv2d(3, size.dim, size.token, size.token)
        self.cls = nn.Parameter(torch.zeros(1, 1, size.dim))
        self.pos = nn.Parameter(torch.zeros(1, n_tokens, size.dim))
        self.blocks = nn.ModuleList(
            TransformerBlock(size.dim, size.heads, fast=fast) for _ in range(size.layers)
        )
        self.norm = nn.LayerNorm(size.dim, eps=1e-6)
        for name, value in zip(("mean", "std"), IMAGENET):
            self.register_buffer(name, torch.tensor(value).view(1, 3, 1, 1), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
        nn.init.kaiming_normal_(self.patch.weight, mode="fan_out")
        nn.init.trunc_normal_(self.cls, std=0.02)
        nn.init.trunc_normal_(self.pos, std=0.02)

    def forward(self, image):
        """image (B, px, px, 3) uint8 -> F (B, T, D), the class token first."""
        x = (image.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std  # (B, 3, px, px)
        x = self.patch(x).flatten(2).transpose(1, 2)  # (B, T - 1, D)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos  # (B, T, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class ProjectionHead(nn.Module):
    r"""Projection of the mean token, or of the expression, not normalised to length 1 (Xie et al.
    2023).

    $$p = W_1 x, \qquad z = \mathrm{LN}(p + \mathrm{dropout}(W_2 \mathrm{GELU}(p))) \tag{4}$$

    Test: test_head_equals_its_equation
    """

    def __init__(self, dim_in, dim, dropout):
        super().__init__()
        self.w1, self.w2 = nn.Linear(dim_in, dim), nn.Linear(dim, dim)
        self.norm, self.dropout = nn.LayerNorm(dim), nn.Dropout(dropout)

    def forward(self, x):
        """x (B, dim_in) -> (B, d)."""
        p = self.w1(x)  # (B, d)
        return self.norm(p + self.dropout(self.w2(F.gelu(p))))


class GeneTokens(nn.Module):
    r"""Self-normalising block (Klambauer et al. 2017), one layer with ELU as released, cut into n
    tokens.

    $$Y = \mathrm{AlphaDropout}(\mathrm{ELU}(W s)) \tag{5}$$

    Test: test_gene_tokens_equal_their_equation
    """

    def __init__(self, n_genes, width, dim):
        super().__init__()
        self.dim, self.linear = dim, nn.Linear(n_genes, width)
        # mean 0 and variance 1 stay what they are
        self.dropout = nn.AlphaDropout(GENE_DROPOUT)

    def forward(self, s):
        """s (B, G) -> Y (B, n, d)."""
        return self.dropout(F.elu(self.linear(s))).unflatten(-1, (-1, self.dim))


def mask(x, rate):
    r"""Every element (token x channel) is 0 with probability `rate`; nothing is rescaled.

    $$\tilde X = X \odot m, \qquad m \sim \mathrm{Bernoulli}(1 - \mathrm{rate}) \tag{6}$$

    Test: test_mask_rate_is_the_dropped_fraction_and_touches_r_only
    """
    return x * (torch.rand(x.shape, device=x.device) >= rate)


class ResidualCrossAttention(nn.Module):
    r"""A transformer block, then attention to the other modality beside a way past it: what is not
    masked goes through $W_1 q$. Values are made from q and k; there is no output projection.

    $$q = \mathrm{dropout}(\mathrm{ReLU}(W_q x)), \qquad
    k = \mathrm{dropout}(\mathrm{ReLU}(W_k y)) \tag{7}$$

    $$x \leftarrow x + W_1 q + \mathrm{att}(q, k, W_2 k) \tag{8}$$

    Test: test_residual_cross_attention_equals_the_naive_form
    """

    def __init__(self, dim, dropout, heads=HEADS, fast=True):
        super().__init__()
        self.heads, self.fast, self.dropout = heads, fast, nn.Dropout(GENE_DROPOUT)
        self.block = TransformerBlock(dim, heads, dropout, fast)
        self.wq, self.wk = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.w1, self.w2 = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x, y):
        """x (B, T, d), y (B, n, d) -> (B, T, d)."""
        x = self.block(x)
        q = self.dropout(F.relu(self.wq(x)))  # (B, T, d)
        k = self.dropout(F.relu(self.wk(y)))  # (B, n, d)
        heads = [a.unflatten(-1, (self.heads, -1)).transpose(1, 2) for a in (q, k, self.w2(k))]
        return x + self.w1(q) + attention(*heads, self.fast)


class MaskReconstruction(nn.Module):
    r"""The embedding of the image from its masked tokens and the gene tokens; in training only.

    $$x = \mathrm{MHA}(\tilde X, Y, Y), \qquad x \leftarrow \mathrm{RCA}(x, Y) \text{ twice}, \qquad
    r = \mathrm{mean}_t\, x_t \tag{9}$$

    The first attention replaces the image tokens: it has no residual. With --reconstruct genes X
    and Y change places, and the target of r is h.

    Test: test_mask_reconstruction_equals_its_parts
    """

    def __init__(self, config, dim_in, n_genes):
        super().__init__()
        c = config
        self.mask_rate, self.masks_genes = c.mask_rate, c.reconstruct == "genes"
        self.genes = GeneTokens(n_genes, c.snn, c.dim)
        self.image = nn.Linear(dim_in, c.dim)
        self.cross = nn.MultiheadAttention(c.dim, CROSS_HEADS, batch_first=True)
        block = ResidualCrossAttention(c.dim, c.dropout, fast=c.fast)
        second = block if c.share else ResidualCrossAttention(c.dim, c.dropout, fast=c.fast)
        self.fusion = nn.ModuleList([block, second])

    def forward(self, tokens, s):
        """tokens F (B, T, D), expression s (B, G) -> r (B, d)."""
        x, y = self.image(tokens), self.genes(s)  # (B, T, d), (B, n, d)
        if self.masks_genes:
            x, y = y, x
        if self.training:
            x = mask(x, self.mask_rate)
        x = self.cross(x, y, y, need_weights=False)[0]  # (B, T, d)
        for block in self.fusion:
            x = block(x, y)
        return x.mean(1)


class CMRC(nn.Module):
    """Both branches and the reconstruction.

    dim_in: width of frozen features, not read with a ViT; n_genes: length of the expression vector.
    """

    def __init__(self, config, dim_in, n_genes):
        super().__init__()
        c, self.vit, self.reconstruction = config, None, None
        if c.backbone != "features":
            self.vit = ViT(VITS[c.backbone], c.fast)
            dim_in = VITS[c.backbone].dim
        self.image_head = ProjectionHead(dim_in, c.dim, c.dropout)
        self.gene_head = ProjectionHead(n_genes, c.dim, c.dropout)
        if c.reconstruction != "none":
            self.reconstruction = MaskReconstruction(c, dim_in, n_genes)

    def image_tokens(self, image):
        """Features (B, D) or uint8 patches (B, px, px, 3) -> F (B, T, D)."""
        return image[:, None] if self.vit is None else self.vit(image)

    def embed_image(self, image):
        """-> z (B, d)."""
        return self.image_head(self.image_tokens(image).mean(1))

    def embed_genes(self, s):
        """s (B, G) -> h (B, d)."""
        return self.gene_head(s)

    def forward(self, image, s):
        """-> [z, h, r], (B, d) each; r only where the model reconstructs."""
        tokens = self.image_tokens(image)  # (B, T, D)
        outputs = [self.image_head(tokens.mean(1)), self.gene_head(s)]
        if self.reconstruction is not None:
            outputs.append(self.reconstruction(tokens, s))
        return outputs


# --------------------------------------------------------------------------------------------------
# Losses
# --------------------------------------------------------------------------------------------------


def contrastive(z, h, tau=1.0, norm_sim=False):
    r"""Contrastive loss with smoothed targets (Xie et al. 2023, Eq. 2-5): z, h (B, d) -> l (B,).

    $$S = h z^\top / \tau, \qquad
    P = \mathrm{softmax}_{\mathrm{rows}}(\tau (z z^\top + h h^\top) / 2) \tag{10}$$

    $$\ell_i = \frac{1}{2} (\mathrm{CE}(S_i, P_i) + \mathrm{CE}(S^\top_i, P^\top_i)) \tag{11}$$

    The gradient goes through P, too. Outputs of a LayerNorm have $|z|^2 \approx d$, so that P is
    one-hot. norm_sim: cosines, and P is divided by $\tau$ as S is.

    Test: test_contrastive_loss_equals_its_definition
    """
    sharpness = tau
    if norm_sim:
        z, h, sharpness = F.normalize(z, dim=-1), F.normalize(h, dim=-1), 1 / tau
    similarity = h @ z.T / tau  # (B, B), rows are genes
    target = ((z @ z.T + h @ h.T) / 2 * sharpness).softmax(1)  # (B, B)
    genes = -(target * similarity.log_softmax(1)).sum(1)  # (B,)
    images = -(target.T * similarity.T.log_softmax(1)).sum(1)  # (B,)
    return (genes + images) / 2


def reconstruction_error(r, target, kind):
    r"""Distance of a pair, (B, d) each -> (B,). The target is not detached: both sides learn.

    $$\epsilon_i = \frac{1}{d} |r_i - z_i|^2 \quad \text{or} \quad
    \epsilon_i = 1 - \cos(r_i, z_i) \tag{12}$$

    Test: test_reconstruction_error_equals_its_definition
    """
    if kind == "mse":
        return (r - target).square().mean(1)
    return 1 - F.cosine_similarity(r, target, dim=1)


def total_loss(config, z, h, r=None):
    r"""The loss of a batch, and a tensor of loss, mean $\ell$ and mean $\epsilon$ for the log.

    $$L = \mathrm{mean}_i \log(1 + \ell_i) + \log(1 + \mathrm{mean}_i\, \epsilon_i) \tag{13}$$

    Test: test_total_loss_is_the_sum_of_the_logs
    """
    pair = contrastive(z, h, config.tau, config.norm_sim)  # (B,)
    loss, error = pair.log1p().mean(), torch.zeros((), device=z.device)
    if r is not None:
        target = z if config.reconstruct == "image" else h
        error = reconstruction_error(r, target, config.reconstruction).mean()
        loss = loss + error.log1p()
    return loss, torch.stack([loss, pair.mean(), error]).detach()


# --------------------------------------------------------------------------------------------------
# Retrieval
# --------------------------------------------------------------------------------------------------


def retrieve(z, keys, values, config):
    r"""Expression of the k training spots nearest by cosine: z (Q, d), keys h (M, d), values (M, G)
    -> (Q, G), rows of the keys (Q, k), recall of an inverted file (nan for the exact search).

    $$\hat y_i = \sum_{j \in N_i} w_{ij} y_j, \qquad
    N_i = \text{the } k \text{ spots of the largest } \cos(z_i, h_j) \tag{14}$$

    $w_{ij} = 1 / k$, or $\mathrm{softmax}_j(\cos(z_i, h_j) / 0.05)$.

    Test: test_plain_retrieval_equals_the_fast_one
    """
    if config.fast:
        cosine, rows, recall = retrieval.search(z, keys, config)
        return retrieval.read_out(cosine, rows, values, config.weighting), rows, recall
    cosine = F.normalize(z, dim=-1) @ F.normalize(keys, dim=-1).T  # (Q, M)
    cosine, rows = cosine.topk(config.k)  # (Q, k)
    weights = torch.full_like(cosine, 1 / config.k)
    if config.weighting == "softmax":
        weights = (cosine / 0.05).softmax(1)
    nearest = torch.as_tensor(values)[rows.cpu()]  # (Q, k, G)
    return torch.einsum("qk,qkg->qg", weights.cpu(), nearest).numpy(), rows, float("nan")


def predict(queries, keys, values, config):
    """`Prediction` for several slides: queries [(S, d)], keys (M, d), values (M, G)."""
    sizes = [len(z) for z in queries]
    expression, rows, recall = retrieve(torch.cat(queries), keys, values, config)
    expression = np.split(expression, np.cumsum(sizes)[:-1])
    return retrieval_task.Prediction(expression, rows.split(sizes), queries, keys, recall)


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------

WEIGHT_DECAY = 1e-3  # of AdamW
LAST_LR = 0.1  # of the peak


def train(fold, config, job, n_epochs):
    """Train one model on the spots of a `Fold` as the `jobs.Job` says. Returns the model and its
    history [(loss, mean l, reconstruction error, PCC of the held-out slides)]."""
    job.seed_start()
    model = build(config, fold).to(fold.device)
    run.compiled(model, config)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=config.lr, weight_decay=WEIGHT_DECAY, foreach=True
    )
    for epoch in job.epochs(model, optimiser, n_epochs):
        model.train()
        for group in optimiser.param_groups:
            group["lr"] = config.lr * run.warmup_cosine(epoch, config.epochs, floor=LAST_LR)
        is_alone = config.schedule == "two-stage" and epoch < config.epochs // 2
        losses = []
        for image, expression in fold.batches():
            with run.autocast(config, fold.device):
                outputs = model(image, expression)
            # every process has all rows of the batch, and the gradient of its own
            outputs = [run.gather(out.float()) for out in outputs]
            loss, parts = total_loss(config, *outputs[: 2 if is_alone else 3])
            optimiser.zero_grad()
            loss.backward()
            run.sum_gradients(list(model.parameters()), loss)
            optimiser.step()
            losses.append(parts)
        losses = retrieval_task.mean_losses(losses)
        job.history.append((*losses, validation_pcc(model, fold, config)))
    return model, job.history


def validation_pcc(model, fold, config):
    """Mean over held-out slides of the mean PCC of the target genes; nan where none is held out."""
    if not fold.held_out:
        return float("nan")
    exact = replace(config, index="exact")
    prediction = predict(fold.queries(model), fold.keys(model), fold.spots.values, exact)
    return fold.score(prediction.expression)


def build(config, fold):
    """A new model, with the weights of --weights where they are given."""
    model = CMRC(config, fold.dim_in, len(fold.inputs.genes))
    if config.weights:
        model.vit.load_state_dict(vit_state(read_tensors(config.weights), model.vit))
    return model


def main(argv=None):
    """Train and score one model beside the baselines, or read an atlas (--predict)."""
    start = time.perf_counter()
    config = run.parse(Config, argv, __doc__.split("\n")[0])
    check(config)
    if config.predict:
        return atlas.predict_folder(config, check, VITS, CMRC, predict, start)
    sides = retrieval_task.sides_of(config)
    record = run.Run("cmrcnet", config, sides.part, variant(config), start)
    task = retrieval_task.Task(config, sides, VITS, record.device)
    record.note_inputs(task.files())
    run.say(task.describe())
    predictions = task.baselines()
    record.lap("baselines")
    whole, values = task.whole, task.whole.spots.values
    model, histories, val = task.train(train, config, record)
    record.lap("training")
    queries, keys = whole.queries(model, task.test), whole.keys(model)
    image_keys = whole.image_keys(model)
    prediction = predict(queries, keys, values, config)
    predictions["image_only"] = predict(queries, image_keys, values, config).expression
    if config.reconstruction != "none" and config.backbone == "features":
        alone = replace(config, reconstruction="none", resume=False)
        other = task.train(train, alone)[0]
        queries, keys_alone = whole.queries(other, task.test), whole.keys(other)
        predictions["contrastive_only"] = predict(queries, keys_alone, values, alone).expression
        record.lap("contrastive alone")
    others = {name: task.score(expression) for name, expression in predictions.items()}
    scores = task.score(prediction.expression)
    scores |= {"val_pcc": val, "recall_at_k": prediction.recall}
    scores |= task.diagnostics(histories[-1], image_keys, keys)
    scores |= retrieval_record.gains(scores, others)
    retrieval_record.report(task, others, scores)
    curve = retrieval_record.pcc_by_k(task, prediction)
    retrieval_record.draw(record, task, prediction.expression, histories, curve)
    arrays, files = retrieval_record.outputs(task, prediction, model)
    n_params = retrieval_record.n_parameters(model)
    facts = retrieval_record.facts(task, histories, model) | {"pcc_by_k": curve}
    record.finish(scores, others, arrays, n_params, sides.split, files, **facts)
    return 0


if __name__ == "__main__":
    run.cli(main)
