"""MultiST: spatial domains from expression, position and histology, without labels.

Wang, Ly, Yu, Bai, "MultiST", arXiv 2601.13331:

    counts (N, G) --PCA--> X (N, 200) --mask--> X' --MLP, GCN--> Z (N, 32)             Stage I
                           a masked graph auto-encoder with a GAN side-branch
    Z --DEC--> Z           compact clusters                                            Stage II
    image --crops, frozen encoder, kNN smoothing--> V (N, 512)
    Z, V --cross-attention in both directions over the m nearest spots--> H (N, 128)   Stage III
    H --PCA, tied-covariance GMM--> labels --label diffusion--> domains
    domains --> pseudotime and ligand-receptor scores

Eq. numbers are the paper's where docs/multist.md knows them. Labels are read for scores, figures
and, with `--n_domains oracle`, for the number of domains; no loss sees them. The output that counts
is fixed beforehand: fused + diffusion (gene-only + diffusion without an image).

    python multist.py --data datasets/dlpfc --slice 151673 --seed 0
    python multist.py --data my_visium_folder --n_domains 8
    python multist.py --data my_section.h5ad --n_domains bic --image off
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import scipy.sparse as sp
import torch
from sklearn.cluster import KMeans
from torch import nn
from torch.nn import functional as F

import data
from data import DataError
from evaluation import baselines, clustering, downstream, figures
from plainst import export, run, stain
from plainst.features import input_files
from plainst.graphs import Graph, SpotBatches, graph_product, neighbours_in_batch

# named sets of flags; what is typed goes before them
PRESETS = {"tuned": {}}


@dataclass
class Config(run.SlideConfig):
    """Flags of multist.py; defaults are the paper's or the released code's unless the help says
    otherwise."""

    presets: ClassVar = PRESETS

    n_domains: str = "oracle"
    """number of domains: oracle (as many as the labels have; recorded as such), bic (2 to 20), or a
    number"""
    norm: Literal["log1p", "cpm"] = "log1p"
    "log1p of counts per 10,000, or the released code's counts per million without log"
    library: Literal["given", "own"] = "given"
    """library size: the one that came with the data where there is one (the file may hold a subset
    of the genes), or the file's row sums"""
    hvg: Literal["variance", "seurat_v3", "none"] = "variance"
    "gene selection: most variable after normalisation, seurat_v3 on counts (released code), or all"
    n_top_genes: int = 3000
    "number of genes (released code: 2000)"
    n_pcs: int = 200
    "principal components that are the input X"
    k: int = 6
    "spatial neighbours, symmetrised by union (released code: 12)"
    mask_mode: Literal["additive", "replace", "zero", "none"] = "additive"
    "Eq. 1: add the learned vector m to masked spots; or put m, or 0, in their place; or no masking"
    mask_rate: float = 0.8
    "share of spots masked, drawn anew every epoch"
    branches: Literal["serial", "parallel"] = "serial"
    "GCN on the MLP's output (released code), or on X beside the MLP (paper)"
    epochs: int = 400
    "epochs of Stage I (one step each, or with --tile one a tile)"
    tile: int = 0
    """Stages I and II on compact tiles of at most so many spots, with all spots that these see
    through the graph; 0: the whole slide at once"""
    lr: float = 1e-2
    "Adam learning rate of Stages I and II"
    weight_decay: float = 0.0
    "Adam weight decay on weight matrices only (released code: 0.01 on everything)"
    dropout: float = 0.2
    "dropout of the encoder and decoder"
    gan: Literal["off", "fisher", "mean"] = "off"
    """adversarial branch: none, Fisher-MMD of Eq. 8 in closed form (the paper), or difference of
    mean latents (what the released code falls back to)"""
    lambda_x: float = 10.0
    "weight of the reconstruction"
    lambda_g: float = 0.1
    "weight of the graph reconstruction"
    lambda_mask: float = 1.0
    "weight of the masked consistency (Eq. 23)"
    lambda_gan: float = 0.01
    """weight of the adversarial alignment (Eq. 24); the closed-form MMD is in units of its own
    metric, so the released 0.3 does not carry over"""
    dec: bool = True
    "Stage II, deep embedded clustering"
    dec_epochs: int = 200
    "most epochs of Stage II (released code: 500)"
    dec_update: int = 20
    "epochs between refreshes of the DEC target"
    dec_tol: float = 1e-3
    "Stage II stops when a refresh changes fewer than this share of the labels"
    lambda_dec: float = 0.1
    """weight of KL(P || Q), summed over clusters, mean over spots (released code: 1 on the mean
    over 10 clusters and spots, which is the same)"""
    image: Literal["auto", "real", "permuted", "zero", "off"] = "auto"
    "auto: use the image where there is one; permuted and zero are controls"
    encoder: str = "handmade"
    """image features: handmade, a Hugging Face vision model such as openai/clip-vit-base-patch32
    (the paper's), or a .npy/.npz file"""
    crop_um: float = 310.0
    "side of the crop in micrometres (the released 64 hires pixels on 151673)"
    colour: Literal["reference", "none"] = "reference"
    """colour normalisation of a slide's image (not of ready-made patches) to a reference shared by
    all slides (released code: to the same slide, and skipped)"""
    cache: str = ""
    "folder for image features, which are computed once; empty: <runs>/.features"
    smooth: float = 0.3
    "share of the neighbours in the smoothed image features (Eq. 10)"
    attention: Literal["local", "global"] = "local"
    "Stage III attends over the m nearest spots, or over the whole slide"
    m: int = 16
    """spots (itself included) that a spot attends to; 1 is the released code, whose softmax over
    one key is always 1"""
    alpha: float = 0.7
    """Eq. 17: share of the gene stream that attended to the image; also the share of Z in the
    latent read-out, which is gene-only at 1"""
    fused_dim: int = 128
    "width of Stage III (paper: 256)"
    heads: int = 8
    "attention heads of Stage III"
    fusion_epochs: int = 30
    "epochs of Stage III (released code: 50 of random batches of 128)"
    fusion_lr: float = 1e-3
    "AdamW learning rate of Stage III, cosine to 0 (released code: 1e-4)"
    batch: int = 512
    "spots in a step of Stage III: compact tiles of 64 from anywhere on the slide"
    tau: float = 0.1
    "temperature of the SDM and contrastive losses"
    fusion_mask: float = 0.5
    """Stage III: share of spots whose Z is hidden in training, so that H must recover it from the
    image and the neighbours (not in the paper)"""
    lambda_keep: float = 5.0
    """Stage III: weight of reading Z and its DEC target back from H, so that the domains of Z
    survive (not in the paper)"""
    readout: Literal["latent", "fused"] = "latent"
    """what is clustered: alpha Z + (1 - alpha) P H with the trained read-out P (the released
    formula for layered tissue, whose P is random), or H itself"""
    n_init: int = 10
    "initialisations of the GMM; the likeliest is taken"
    diffusion_steps: int = 3
    "T of the label diffusion (released code: 10)"
    diffusion_k: int = 7
    "neighbours of the label diffusion"
    order: str = ""
    """classes from the root outwards, comma-separated, to score the pseudotime; empty:
    WM,Layer6,...,Layer1 where these are the classes"""
    root_gene: str = "MBP"
    """pseudotime starts in the domain that expresses this gene most; where the panel lacks it, at
    an end of the first diffusion component, either end"""
    lr_pairs: str = ""
    "two-column CSV ligand,receptor; empty: a short built-in list"
    permutations: int = 1000
    "label permutations of the ligand-receptor null; 0 leaves the scores out"
    figures: bool = True
    "draw the figures"


# --------------------------------------------------------------------------------------------------
# Input X
# --------------------------------------------------------------------------------------------------


def preprocess(slide, config):
    """X (N, P) float32: principal components of the z-scored selected genes. They are not rescaled,
    so a mean square error over them is a variance-weighted one: the first components dominate.
    Raises DataError where nothing varies."""
    # genes seen in too few spots are noise
    keep = slide.counts.getnnz(axis=0) >= min(10, max(2, slide.n_spots // 50))
    counts, total = (
        slide.counts[:, np.flatnonzero(keep)],
        slide.library_size if config.library == "given" else None,
    )
    if config.norm == "log1p":
        # (N, G)
        x = data.normalise_log1p(counts, total)
    else:
        x = sp.csr_matrix(counts, dtype=np.float32, copy=True)
        own = np.asarray(x.sum(1)).ravel() if total is None else total
        x = (sp.diags((1e6 / np.maximum(own, 1)).astype(np.float32)) @ x).tocsr()
    variance = data.mean_var(x)[1]
    if config.hvg == "seurat_v3":
        pick = data.hvg_seurat_v3(counts, config.n_top_genes)
    else:
        pick = np.sort(
            np.argsort(-variance, kind="stable")[
                : config.n_top_genes if config.hvg == "variance" else None
            ]
        )
    pick = pick[variance[pick] > 0]
    if len(pick) < 2 or slide.n_spots < 3:
        raise DataError(
            f"slide {slide.sample} has {len(pick)} genes that vary over {slide.n_spots} "
            "spots: domains need more"
        )
    z = (
        data.Standardise(np.inf if config.norm == "cpm" else 10.0)
        .fit(x[:, pick])
        .scaled(x[:, pick])
    )
    # (N, P)
    x = data.truncated_pca(z, config.n_pcs, seed=0)
    # a component without variance is round-off
    return x[:, x.std(0) > 1e-4 * x.std(0).max()]


def log_matrix(slide, config):
    """(N, G) CSR of log1p of counts per 10,000, for the marker gene and the ligand-receptor
    scores."""
    return data.normalise_log1p(
        slide.counts, slide.library_size if config.library == "given" else None
    )


# --------------------------------------------------------------------------------------------------
# Stage I: masked graph auto-encoder
# --------------------------------------------------------------------------------------------------


def mask_rows(x, m, rate, mode):
    """Eq. 1: x'_i = x_i + m for i in S_mask, floor(rate N) spots drawn uniformly. x (N, P), m (P,)
    -> x' (N, P), S_mask (n,).

    A learned constant shift hides nothing: what was x_i is still there, moved. `replace` (x'_i = m)
    and `zero` do hide the spot.
    """
    # (n,)
    rows = torch.randperm(len(x), device=x.device)[: int(rate * len(x))]
    if mode == "none":
        return x, rows
    # (N, 1)
    chosen = torch.zeros(len(x), 1, dtype=x.dtype, device=x.device).index_fill(0, rows, 1.0)
    return (x if mode == "additive" else x * (1 - chosen)) + (
        chosen * m if mode != "zero" else 0
    ), rows


# spots at a time in evaluation mode
ROWS = 20_000
# products with the graph between X and X_hat: two of the encoder, one of the decoder
HOPS = 3


class Encoder(nn.Module):
    """Eq. 2-5: F = MLP(X'), U = A ReLU(A H W1) W2 with H = F (serial) or X' (parallel), Z = [F;
    U]."""

    def __init__(self, dim_in, branches, dropout):
        super().__init__()

        def block(a, b):
            # Without a bias: BatchNorm takes it out again, and Adam would blow the rounding that is
            # its gradient up to steps of --lr.
            return nn.Sequential(
                nn.Linear(a, b, bias=False),
                nn.BatchNorm1d(b, eps=1e-3, momentum=0.01),
                nn.ELU(),
                nn.Dropout(dropout),
            )

        self.mlp = nn.Sequential(block(dim_in, 64), block(64, 16))
        self.branches, self.drop = branches, nn.Dropout(dropout)
        self.w1 = nn.Linear(16 if branches == "serial" else dim_in, 64, bias=False)
        self.w2 = nn.Linear(64, 16, bias=False)
        for w in (self.w1, self.w2):
            nn.init.xavier_uniform_(w.weight)

    def forward(self, x, graph):
        """x (N, P) -> Z (N, 32). In evaluation mode the layers that see one spot at a time take
        ROWS of them: a million spots need no tiles. Compiled code
        takes all: it would have a copy of the layers for every block."""
        parts = [x] if self.training or torch.compiler.is_compiling() else x.split(ROWS)
        # (N, 16)
        f = torch.cat([self.mlp(rows) for rows in parts])
        if self.branches == "serial":
            h = self.w1(graph_product(self.drop(f), graph))
        else:
            # (N, 64)
            h = graph_product(torch.cat([self.w1(self.drop(rows)) for rows in parts]), graph)
        # (N, 64) -> (N, 16)
        u = graph_product(self.w2(self.drop(F.relu(h))), graph)
        # (N, 32)
        return torch.cat([f, u], 1)


class AutoEncoder(nn.Module):
    """Encoder, mask vector m, and the expression decoder of Eq. 6: X_hat = A Z W, linear, without
    bias."""

    def __init__(self, dim_in, config):
        super().__init__()
        self.encoder = Encoder(dim_in, config.branches, config.dropout)
        self.m, self.config = nn.Parameter(torch.zeros(dim_in)), config
        self.drop = nn.Dropout(config.dropout)
        self.decoder = nn.Linear(32, dim_in, bias=False)
        nn.init.xavier_uniform_(self.decoder.weight)

    def encode(self, x, graph):
        """x (N, P) -> Z (N, 32)."""
        with run.autocast(self.config, x.device):
            return self.encoder(x, graph).to(x.dtype)

    def decode(self, z, graph):
        """z (N, 32) -> X_hat (N, P)."""
        with run.autocast(self.config, z.device):
            # (N, P)
            return self.decoder(graph_product(self.drop(z), graph)).to(z.dtype)

    @torch.no_grad()
    def embed(self, x, graph):
        """Z (N, 32) in evaluation mode, nothing masked."""
        self.eval()
        return self.encode(x, graph)


def edge_logits(z, pairs):
    """Eq. 7: s_ij = z_i . z_j for the pairs (2, E) only, never N x N."""
    # (E,)
    return (z[pairs[0]] * z[pairs[1]]).sum(1)


def negative_pairs(graph):
    """As many random pairs (2, <= E) as there are edges, without self-pairs and edges; drawn anew
    at every call."""
    i, j = torch.randint(graph.n_own, (2, graph.edges.shape[1]), device=graph.edges.device)
    low, high = torch.minimum(i, j), torch.maximum(i, j)
    key = low * graph.n_own + high
    at = torch.searchsorted(graph.edge_keys, key).clamp(max=len(graph.edge_keys) - 1)
    free = (low != high) & (graph.edge_keys[at] != key)
    return torch.stack([low[free], high[free]])


def edge_loss(z, graph):
    """Cross-entropy of edges against as many non-edges: mean softplus(-s) over edges + mean
    softplus(s) over non-edges."""
    negative = negative_pairs(graph)
    loss = F.softplus(-edge_logits(z, graph.edges)).mean()
    # in a complete graph there is none
    return loss + F.softplus(edge_logits(z, negative)).mean() if negative.shape[1] else loss


def masked_consistency(x_hat, x, rows):
    """Eq. 23 on S_mask against the ORIGINAL input: mean (1 - cos(x_hat_i, x_i))^3, the scaled
    cosine error (Hou et al. 2022, GraphMAE)."""
    # (N,)
    cosine = (F.normalize(x_hat, dim=1) * F.normalize(x, dim=1)).sum(1)
    return (1 - cosine[rows]).pow(3).mean()


class Generator(nn.Module):
    """Noise (N, 32) -> fake expression (N, P). (The released code draws P numbers a spot, which
    takes longer than the rest of an epoch.)"""

    def __init__(self, dim):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, dim))

    def forward(self, n):
        """n fakes (n, P)."""
        weight = self.layers[0].weight
        return self.layers(torch.randn(n, 32, dtype=weight.dtype, device=weight.device))


class Critic(nn.Module):
    """f(z) = w . h(z), h: 32 -> 64 -> 64. Its score with respect to w is grad_w f = h(z), the
    feature of the Fisher kernel."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())

    def forward(self, z):
        """h(z): (N, 32) -> (N, 64)."""
        return self.layers(z)


def fisher_mmd(phi, phi_fake, eps=1e-3):
    """Eq. 8: MMD^2 = E k(z, z') + E k(z~, z~') - 2 E k(z, z~) with the Fisher kernel k(z, z') =
    phi(z)^T I^-1 phi(z').

    phi, phi_fake (N, d) scores. The kernel is linear in phi, so the three terms are |mean phi -
    mean phi~|^2 in the metric I^-1: O(N d^2), no N x N matrix. I = (Cov phi + Cov phi~) / 2 + eps,
    relative to its mean eigenvalue, taken as a constant (no gradient through it).
    """
    with torch.no_grad():
        # (d, d)
        information = (torch.cov(phi.T) + torch.cov(phi_fake.T)) / 2
        scale = information.diagonal().mean().clamp_min(1e-12)
        information = information + eps * scale * torch.eye(
            len(information), dtype=phi.dtype, device=phi.device
        )
    # (d,)
    gap = phi.mean(0) - phi_fake.mean(0)
    return gap @ torch.linalg.solve(information, gap)


class frozen_statistics:
    """Within this context BatchNorm layers use their running statistics and do not update them:
    fakes must not touch them."""

    def __init__(self, module):
        self.layers = [m for m in module.modules() if isinstance(m, nn.BatchNorm1d)]

    def __enter__(self):
        self.before = [m.training for m in self.layers]
        for m in self.layers:
            m.eval()

    def __exit__(self, *error):
        for m, training in zip(self.layers, self.before):
            m.train(training)


class Adversary:
    """Generator and critic of the side-branch. Critic: makes Fisher-MMD between real and generated
    latents large; generator and encoder: small.

    The MMD is normalised by its own metric, so the critic needs no weight clipping. `mean` compares
    mean latents, with no critic.
    """

    def __init__(self, kind, dim, device):
        self.kind = kind
        self.generator, self.critic = Generator(dim).to(device), Critic().to(device)
        self.g_step, self.c_step = (
            torch.optim.RMSprop(p.parameters(), lr=1e-4) for p in (self.generator, self.critic)
        )

    def distance(self, z, z_fake):
        """Scalar discrepancy of latents (N, 32), with gradient to both."""
        return (
            fisher_mmd(self.critic(z), self.critic(z_fake))
            if self.kind == "fisher"
            else (z.mean(0) - z_fake.mean(0)).square().mean()
        )

    def encode(self, model, x, graph):
        """Latents of fresh fakes, (own, 32)."""
        with frozen_statistics(model):
            return graph.without_halo(model.encoder(self.generator(len(x)), graph))

    def step(self, model, x, graph):
        """One step of the critic and one of the generator; the encoder stands still."""
        with torch.no_grad(), frozen_statistics(model):
            z, z_fake = graph.without_halo(model.encoder(x, graph)), self.encode(model, x, graph)
        if self.kind == "fisher":
            self.c_step.zero_grad()
            (-self.distance(z, z_fake)).backward()
            self.c_step.step()
        self.g_step.zero_grad()
        self.distance(z, self.encode(model, x, graph)).backward()
        self.g_step.step()


class Terms:
    """Weighted loss terms of one step, checked and logged with the norm of the gradient that each
    sends to `parameters`."""

    def __init__(self, stage, log):
        self.stage, self.log = stage, log

    def total(self, terms, epoch, parameters, measure):
        """Sum of the dict {name: weighted scalar}. Raises DataError naming a term that is not
        finite. With `measure` a row per term is logged."""
        parameters, total = list(parameters), sum(terms.values())
        # one look a step: on a GPU the host waits for it
        if not torch.isfinite(total):
            name, value = next(
                ((k, v) for k, v in terms.items() if not torch.isfinite(v)), ("sum", total)
            )
            raise DataError(
                f"{self.stage}, epoch {epoch}: the loss term {name!r} is {value.item()}: "
                "choose a smaller learning rate or weight, "
                "or check the input"
            )
        if measure:
            for name, value in terms.items():
                grads = (
                    torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
                    if value.requires_grad
                    else []
                )
                norm = sum(g.square().sum().item() for g in grads if g is not None) ** 0.5
                self.log.append(
                    {
                        "stage": self.stage,
                        "epoch": epoch,
                        "term": name,
                        "value": value.item(),
                        "grad_norm": norm,
                    }
                )
        return total


def decayed(module, weight_decay):
    """Parameter groups: decay on weight matrices only; biases, BatchNorm and the mask vector m are
    left alone (decay would pull m to 0)."""
    matrices = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def train_stage1(x, graph, config, log):
    """Stage I: lambda_x MSE + lambda_g L_graph + lambda_mask L_mask + lambda_gan L_gan. x (N, P) ->
    AutoEncoder, its optimiser, Adversary or None."""
    model, parts = AutoEncoder(x.shape[1], config).to(x.device), graph.tiles(config.tile, HOPS)
    run.compiled(model.encoder, config)
    step = torch.optim.Adam(decayed(model, config.weight_decay), lr=config.lr)
    adversary = None if config.gan == "off" else Adversary(config.gan, x.shape[1], x.device)
    terms = Terms("Stage I", log)
    for epoch in run.progress(range(config.epochs), "Stage I"):
        model.train()
        for i, (rows, near) in enumerate(run.shuffled(parts)):
            if adversary and epoch % 5 == 0:
                adversary.step(model, x[rows], near)
            loss = terms.total(
                stage1_terms(model, adversary if epoch >= 10 else None, x[rows], near, config),
                epoch,
                model.parameters(),
                i == 0 and (epoch % 50 == 10 or epoch == config.epochs - 1),
            )
            step.zero_grad()
            loss.backward()
            step.step()
    return model, step, adversary


def stage1_terms(model, adversary, x, graph, config):
    """{name: weighted scalar} of one masked forward pass."""
    masked, rows = mask_rows(x, model.m, config.mask_rate, config.mask_mode)
    # (N, 32)
    z = model.encode(masked, graph)
    # (own, P)
    x_hat = graph.without_halo(model.decode(z, graph))
    x, z, rows = graph.without_halo(x), graph.without_halo(z), rows[rows < graph.n_own]
    terms = {
        "expression": config.lambda_x * F.mse_loss(x_hat, x),
        "graph": config.lambda_g * edge_loss(z, graph),
        **({"mask": config.lambda_mask * masked_consistency(x_hat, x, rows)} if len(rows) else {}),
    }
    if adversary:
        terms["gan"] = config.lambda_gan * adversary.distance(
            z, adversary.encode(model, masked, graph)
        )
    return terms


# --------------------------------------------------------------------------------------------------
# Stage II: deep embedded clustering
# --------------------------------------------------------------------------------------------------


def dec_q(z, centres):
    """Eq. 11: q_ij = (1 + |z_i - mu_j|^2)^-1, rows normalised (Student t, one degree of freedom). z
    (N, d), centres (K, d) -> (N, K)."""
    q = 1 / (1 + torch.cdist(z, centres, compute_mode="donot_use_mm_for_euclid_dist").square())
    return q / q.sum(1, keepdim=True)


def dec_p(q):
    """Eq. 12: p_ij = (q_ij^2 / f_j) / sum_j (q_ij^2 / f_j), f_j = sum_i q_ij. (N, K) -> (N, K),
    without gradient."""
    with torch.no_grad():
        p = q.square() / q.sum(0).clamp_min(1e-12)
        return p / p.sum(1, keepdim=True)


def dec_kl(p, q):
    """Eq. 13, 27: KL(P || Q), summed over clusters, mean over spots."""
    return (p * (p.clamp_min(1e-12).log() - q.clamp_min(1e-12).log())).sum(1).mean()


def stage2_terms(model, adversary, x, graph, target, centres, config):
    """{name: weighted scalar} of one forward pass; target (own, K), centres (K, 32)."""
    # (N, 32)
    z = model.encode(x, graph)
    own = graph.without_halo(z)
    terms = {
        "dec": config.lambda_dec * dec_kl(target, dec_q(own, centres)),
        "expression": config.lambda_x
        * F.mse_loss(graph.without_halo(model.decode(z, graph)), graph.without_halo(x)),
        "graph": config.lambda_g * edge_loss(own, graph),
    }
    if adversary:
        terms["gan"] = config.lambda_gan * adversary.distance(
            own, adversary.encode(model, x, graph)
        )
    return terms


def train_stage2(model, step, adversary, x, graph, n_domains, config, log):
    """Stage II, with Stage I's optimiser: DEC + expression + graph + GAN terms. Returns centres (K,
    32), the final target (N, K), epochs run."""
    parts = graph.tiles(config.tile, HOPS)
    z = model.embed(x, graph)
    kmeans = KMeans(n_domains, n_init=20, random_state=config.seed).fit(z.cpu().numpy())
    # (K, 32)
    centres = nn.Parameter(torch.as_tensor(kmeans.cluster_centers_, dtype=x.dtype, device=x.device))
    step.add_param_group({"params": [centres], "weight_decay": 0.0})
    terms, labels, done = Terms("Stage II", log), kmeans.labels_, 0
    for epoch in run.progress(range(config.dec_epochs), "Stage II"):
        if epoch % config.dec_update == 0:
            with torch.no_grad():
                q = dec_q(model.embed(x, graph), centres)
                target, new = dec_p(q), q.argmax(1).cpu().numpy()
            if epoch and (new != labels).mean() < config.dec_tol:
                break
            labels = new
        model.train()
        for i, (rows, near) in enumerate(run.shuffled(parts)):
            if adversary and epoch % 5 == 0:
                adversary.step(model, x[rows], near)
            loss = terms.total(
                stage2_terms(
                    model,
                    adversary,
                    x[rows],
                    near,
                    near.without_halo(target[rows]),
                    centres,
                    config,
                ),
                epoch,
                [*model.encoder.parameters(), centres],
                i == 0 and (epoch % 50 == 0 or epoch == config.dec_epochs - 1),
            )
            step.zero_grad()
            loss.backward()
            step.step()
        done = epoch + 1
    with torch.no_grad():
        target = dec_p(dec_q(model.embed(x, graph), centres))
    return centres.detach(), target, done


# --------------------------------------------------------------------------------------------------
# Image branch
# --------------------------------------------------------------------------------------------------


def image_tokens(slide, config, device):
    """(N, D) float32 standardised image features: colour normalisation, crops, frozen encoder, and
    Eq. 10 on the frozen features, once: V~ = (1 - smooth) V + smooth W V. (The linear projection to
    512 commutes with averaging, so smoothing first is the same and is done once.)"""
    if config.colour == "reference":
        slide = stain.normalised_slide(slide)
    v = data.image_features(
        slide,
        config.encoder,
        config.crop_um,
        cache=config.cache or Path(config.runs) / ".features",
        device=device,
    )
    # (N, D)
    v = (v - v.mean(0)) / np.maximum(v.std(0), 1e-6)
    if slide.n_spots > 7 and config.smooth > 0:
        v = (1 - config.smooth) * v + config.smooth * (data.smoothing_matrix(slide.xy) @ v)
    return v.astype(np.float32)


# --------------------------------------------------------------------------------------------------
# Stage III: fusion by cross-attention
# --------------------------------------------------------------------------------------------------


class CrossAttention(nn.Module):
    """Eq. 14-16: `layers` times q <- LN(q + MHA(q, k, v)), one LayerNorm for all layers.

    Local: spot i attends to the tokens of its m nearest spots (itself first), with a learned bias
    from the relative position. Keys and values are projected once per spot and gathered afterwards.
    With m = 1 there is one key: softmax = 1 whatever the query says, and the query and key weights
    get no gradient, which is the released model.
    """

    def __init__(self, dim, heads, layers=2):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (
            nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers)) for _ in range(4)
        )
        self.place = nn.Sequential(nn.Linear(2, 16), nn.GELU(), nn.Linear(16, heads))
        self.norm = nn.LayerNorm(dim)

    def forward(self, query, tokens, near, offset):
        """query (B, H), tokens (T, H), near (B, m) rows of tokens, offset (B, m, 2) in pitches ->
        (B, H), weights (B, m, heads).

        near None: every query attends to every token by fused attention, which keeps no weights:
        (B, H), None.
        """
        b, width = query.shape
        weights = None
        for q, k, v, out in zip(self.q, self.k, self.v, self.out):
            # (B, heads, d)
            a = q(query).view(b, self.heads, -1)
            # (T, H)
            keys, values = k(tokens), v(tokens)
            if near is None:
                # (1, heads, T, d)
                split = [
                    t.view(1, len(t), self.heads, -1).transpose(1, 2)
                    for t in (a.flatten(1), keys, values)
                ]
                mixed = F.scaled_dot_product_attention(*split).transpose(1, 2).reshape(b, width)
            else:
                # (B, m, heads, d)
                near_keys = F.embedding(near, keys).view(*near.shape, self.heads, -1)
                # (B, m, heads); a bmm of small matrices is slower
                score = (a[:, None] * near_keys).sum(-1) * a.shape[-1] ** -0.5
                weights = (score + self.place(offset)).softmax(1)
                # (B, H)
                mixed = (
                    (weights[..., None] * F.embedding(near, values).view_as(near_keys))
                    .sum(1)
                    .flatten(1)
                )
            query = self.norm(query + out(mixed))
        return query, weights


class Fusion(nn.Module):
    """Stage III: gene and image tokens in a shared space, cross-attention in both directions, H =
    alpha H_gene + (1 - alpha) H_image (Eq. 17)."""

    def __init__(self, dim_z, dim_image, config):
        super().__init__()
        wide = config.fused_dim
        self.alpha, self.config = config.alpha, config
        # Eq. 9: V
        self.image = nn.Sequential(nn.Linear(dim_image, 512), nn.LayerNorm(512), nn.Dropout(0.1))
        self.gene_in, self.image_in = nn.Linear(dim_z, wide), nn.Linear(512, wide)
        self.gene_reads_image, self.image_reads_gene = (
            CrossAttention(wide, config.heads) for _ in range(2)
        )
        # stands for Z of a spot that is masked
        self.hidden = nn.Parameter(torch.zeros(dim_z))
        self.keep = nn.Linear(wide, dim_z)

    def forward(self, z, v, own, near, offset):
        """z (T, 32), v (T, D) of the spots at hand; own (B,) rows of the queries; near, offset as
        in CrossAttention.

        Returns H (B, H), h_gene (B, H), h_image (B, H), attention (B, m, heads) of the last
        gene-reads-image layer or None.
        """
        with run.autocast(self.config, z.device):
            # (T, H) each
            g, i = self.gene_in(z), self.image_in(self.image(v))
            h_gene, attention = self.gene_reads_image(g[own], i, near, offset)
            h_image, _ = self.image_reads_gene(i[own], g, near, offset)
        h_gene, h_image = h_gene.to(z.dtype), h_image.to(z.dtype)
        return self.alpha * h_gene + (1 - self.alpha) * h_image, h_gene, h_image, attention


def sdm(h_gene, h_image, tau):
    """Eq. 18: similarity-distribution matching. P = softmax of the rows of the cosine Gram matrix /
    tau; the mean of both KL divergences. (B, H) x 2 -> scalar, 0 where both are equal."""
    # (B, B)
    log_p, log_q = (
        (lambda u: (u @ u.T / tau).log_softmax(1))(F.normalize(h, dim=1)) for h in (h_gene, h_image)
    )
    return (
        F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        + F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    ) / 2


def info_nce(h_gene, h_image, near, tau):
    """Eq. 19: symmetric contrastive loss of a spot's two streams; `near` (B, B) bool, graph
    neighbours, are left out of the negatives."""
    # (B, B)
    logits = F.normalize(h_image, dim=1) @ F.normalize(h_gene, dim=1).T / tau
    logits = logits.masked_fill(near, float("-inf"))
    same = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2


def stage3_terms(model, z, v, tiles, rows, target, centres, variance, config):
    """{name: weighted scalar} of one batch of Stage III: 2 SDM + contrast + 0.005 |H|^2, and two
    terms of ours that keep the domains of Z.
    variance: that of the whole z."""
    local = config.attention == "local"
    hand, own, near, offset = (
        tiles.gather(rows) if local else (torch.arange(len(z), device=z.device), rows, None, None)
    )
    # (T, 1)
    hide = (torch.rand(len(hand), 1, device=z.device) < config.fusion_mask).to(z.dtype)
    h, h_gene, h_image, _ = model(
        z[hand] * (1 - hide) + hide * model.hidden, v[hand], own, near, offset
    )
    # (B, 32)
    z_kept = model.keep(h)
    terms = {
        "sdm": 2 * sdm(h_gene, h_image, config.tau),
        "contrast": info_nce(
            h_gene, h_image, neighbours_in_batch(rows, tiles.adjacent), config.tau
        ),
        "norm": 0.5 * 0.01 * (h_gene.square().mean() + h_image.square().mean()),
        "keep": config.lambda_keep * F.mse_loss(z_kept, z[rows]) / variance,
    }
    if target is not None:
        terms["dec"] = (
            config.lambda_keep * config.lambda_dec * dec_kl(target[rows], dec_q(z_kept, centres))
        )
    return terms


def train_stage3(z, v, xy, target, centres, config, log):
    """Stage III with Z and the image features frozen: AdamW, cosine to 0, gradient norm at most 1.

    z (N, 32), v (N, D) -> H (N, H), alpha Z + (1 - alpha) P H (N, 32), attention entropy (N,) as a
    share of log m (nan where the weights are not kept), number of parameters.
    """
    model = run.compiled(Fusion(z.shape[1], v.shape[1], config).to(z.device), config)
    tiles = SpotBatches(xy, config.m, z.device, k=config.k)
    step = torch.optim.AdamW(model.parameters(), lr=config.fusion_lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(step, max(1, config.fusion_epochs))
    terms, variance = Terms("Stage III", log), z.var()
    for epoch in run.progress(range(config.fusion_epochs), "Stage III"):
        model.train()
        for i, rows in enumerate(tiles.batches(config.batch)):
            parts = stage3_terms(model, z, v, tiles, rows, target, centres, variance, config)
            loss = terms.total(
                parts,
                epoch,
                model.parameters(),
                i == 0 and (epoch % 10 == 0 or epoch == config.fusion_epochs - 1),
            )
            step.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            step.step()
        schedule.step()
    h, entropy = fuse(model, z, v, tiles, config)
    with torch.no_grad():
        # (N, 32)
        latent = config.alpha * z + (1 - config.alpha) * model.keep(h)
    return h, latent, entropy, sum(p.numel() for p in model.parameters())


@torch.no_grad()
def fuse(model, z, v, tiles, config):
    """H (N, H) and entropy (N,) in evaluation mode, in pieces of compact tiles."""
    model.eval()
    if config.attention == "global":
        return model(z, v, slice(None), None, None)[0], np.full(len(z), np.nan)
    h, entropy = (
        torch.empty(len(z), config.fused_dim, device=z.device),
        torch.full((len(z),), float("nan"), device=z.device),
    )
    for start in range(0, len(tiles.tiles), 32):
        rows = torch.cat(tiles.tiles[start : start + 32])
        hand, own, near, offset = tiles.gather(rows)
        h[rows], _, _, attention = model(z[hand], v[hand], own, near, offset)
        if config.m > 1:
            entropy[rows] = -(attention * attention.clamp_min(1e-12).log()).sum(1).mean(1) / np.log(
                config.m
            )
    return h, entropy.cpu().numpy()


# --------------------------------------------------------------------------------------------------
# Program
# --------------------------------------------------------------------------------------------------


def check(config):
    """Raises DataError naming the flag that has an impossible value."""
    one, zero, share, positive = (
        run.AT_LEAST_ONE,
        run.AT_LEAST_ZERO,
        (lambda v: 0 <= v <= 1, "from 0 to 1"),
        run.POSITIVE,
    )
    two = (lambda v: v >= 2, "2 or more")
    run.check_flags(
        config,
        {
            "n_top_genes": two,
            "n_pcs": two,
            "k": one,
            "tile": zero,
            "mask_rate": share,
            "epochs": one,
            "lr": positive,
            "weight_decay": zero,
            "dropout": (lambda v: 0 <= v < 1, "from 0 to below 1"),
            "dec_epochs": zero,
            "dec_update": one,
            "m": one,
            "alpha": share,
            "smooth": share,
            "crop_um": positive,
            "fused_dim": (
                lambda v: v >= 1 and v % max(config.heads, 1) == 0,
                "a positive multiple of --heads",
            ),
            "heads": one,
            "fusion_epochs": one,
            "fusion_lr": positive,
            "fusion_mask": share,
            "batch": two,
            "tau": positive,
            "n_init": one,
            "diffusion_steps": zero,
            "diffusion_k": one,
            "permutations": zero,
            "lambda_x": zero,
            "lambda_g": zero,
            "lambda_mask": zero,
            "lambda_gan": zero,
            "lambda_dec": zero,
            "lambda_keep": run.POSITIVE,
            "dec_tol": zero,
            "n_domains": (
                lambda v: v in ("oracle", "bic") or v.isdigit() and int(v) > 0,
                "oracle, bic or a positive number",
            ),
        },
    )
    run.refuse_idle_flags(config, idle_flags(config))


# flags of Stage III
FUSION = (
    *("encoder", "crop_um", "colour", "smooth", "attention", "m", "alpha", "fused_dim", "heads"),
    *("fusion_epochs", "fusion_lr", "batch", "tau", "fusion_mask", "lambda_keep", "readout"),
)


def idle_flags(config):
    """Rules for the flags that do nothing beside the others, as `run.refuse_idle_flags` takes
    them. With --mask_mode none the masked consistency still reads --mask_rate of the spots."""
    has_files = data.is_features_file(config.encoder)
    pixels = ("crop_um", "colour")
    return [
        (config.image == "off", "with --image off", FUSION),
        (config.image == "zero", "with --image zero", (*pixels, "smooth")),
        (has_files, "with ready-made features of --encoder", pixels),
        (config.hvg == "none", "with --hvg none", ("n_top_genes",)),
        (config.mask_rate == 0, "with --mask_rate 0", ("mask_mode", "lambda_mask")),
        (config.gan == "off", "with --gan off", ("lambda_gan",)),
        (not config.dec, "with --no-dec", ("dec_epochs", "dec_update", "dec_tol", "lambda_dec")),
        (config.diffusion_steps == 0, "with --diffusion_steps 0", ("diffusion_k",)),
        (config.permutations == 0, "with --permutations 0", ("lr_pairs",)),
    ]


def variant(config):
    """Folder name of a run: `default`, and the flags that differ from their defaults."""
    return run.variant(config, [], ["figures"], files=["encoder", "order", "lr_pairs"])


def with_image(slide, config):
    """Whether Stage III runs. Raises DataError where an image was asked for and there is none."""
    if config.image == "off":
        return False
    from_file = data.is_features_file(config.encoder)
    has_image = slide.patches is not None or slide.image is not None or from_file
    if not has_image and config.image != "auto":
        raise DataError(
            f"slide {slide.sample} has no image for --image {config.image}: put "
            "tissue_hires_image.png into spatial/, or use --image off"
        )
    if not has_image:
        print(f"slide {slide.sample} has no image: gene-only, Stage III is left out")
        return False
    # complain before the work starts
    if from_file:
        data.read_embedding(config.encoder, slide)
    elif slide.patches is None:
        if config.image == "auto" and not slide.um_per_px:
            print(
                f"slide {slide.sample} has an image but no physical scale: gene-only, Stage III "
                "is left out"
            )
            return False
        data.crops(slide, np.arange(1), config.crop_um)
    return True


def fused_embedding(slide, z, target, centres, config, device, log):
    """What is clustered (N, 32) or (N, H), H (N, H), image features (N, D), attention entropy (N,),
    number of parameters of Stage III."""
    v = image_tokens(slide, config, device)
    if config.image == "permuted":
        v = v[np.random.default_rng(config.seed).permutation(len(v))]
    if config.image == "zero":
        v = np.zeros_like(v)
    h, latent, entropy, n_params = train_stage3(
        z, torch.as_tensor(v, device=device), slide.xy, target, centres, config, log
    )
    return (
        (latent if config.readout == "latent" else h).cpu().numpy(),
        h.cpu().numpy(),
        v,
        entropy,
        n_params,
    )


def train(slide, config, use_image, record):
    """Stages I to III and the baselines: (arrays with z, h_fusion ..., what is clustered by name,
    baseline scores, facts for the record)."""
    x_np, log = preprocess(slide, config), []
    x, graph = (
        torch.as_tensor(x_np, device=record.device),
        Graph(slide.xy, config.k, record.device, slide.sample),
    )
    if graph.pieces > 1:
        print(
            f"the {config.k}-neighbour graph of slide {slide.sample} is in {graph.pieces} "
            "pieces: Stage I passes nothing between them"
        )
    record.lap("read")
    model, step, adversary = train_stage1(x, graph, config, log)
    record.lap("stage1")
    z_np = model.embed(x, graph).cpu().numpy()
    k, chosen = clustering.number_of_domains(config.n_domains, slide, z_np, config.seed)
    others = {
        name: clustering.domain_scores(slide, domains)
        for name, domains in baselines.unsupervised_domains(
            x_np, slide.xy, k, config.n_init, config.seed
        ).items()
    }
    for name, scores in others.items():
        print(clustering.score_row(name, scores))
    record.lap("baselines")
    facts, centres, target = (
        {"k_chosen_by": chosen, "graph_pieces": graph.pieces, "losses": log},
        None,
        None,
    )
    if config.dec:
        centres, target, facts["dec_epochs"] = train_stage2(
            model, step, adversary, x, graph, k, config, log
        )
    z = model.embed(x, graph)
    arrays, facts["n_params"] = {"z": z.cpu().numpy()}, sum(p.numel() for p in model.parameters())
    embeddings = {"gene": arrays["z"]}
    record.lap("stage2")
    if use_image:
        (
            embeddings["fused"],
            arrays["h_fusion"],
            arrays["image"],
            arrays["attention_entropy"],
            more,
        ) = fused_embedding(slide, z, target, centres, config, record.device, log)
        arrays["fused"], facts["n_params"] = embeddings["fused"], facts["n_params"] + more
        # an image that is the same everywhere has no domains
        if np.ptp(arrays["image"], axis=0).any():
            embeddings["image"] = arrays["image"]
        record.lap("stage3")
    return arrays, embeddings, others, k, facts


def main(argv=None):
    """Run the program; returns 0."""
    start = time.perf_counter()
    config = run.parse(Config, argv, __doc__.split("\n")[0])
    check(config)
    slide = data.load_slide(config.data, config.slice or None, **config.columns())
    use_image = with_image(slide, config)
    if use_image and config.m > slide.n_spots:
        raise DataError(
            f"--m {config.m} exceeds the {slide.n_spots} spots of slide {slide.sample}: "
            "choose a smaller m"
        )
    # complain before the work starts
    ranks = downstream.class_ranks(slide, config.order)
    pairs = downstream.read_pairs(config.lr_pairs) if config.lr_pairs else downstream.PAIRS
    if config.n_domains != "bic":
        clustering.number_of_domains(config.n_domains, slide)
    record = run.Run("multist", config, slide.sample, variant(config), start)
    encoder = config.encoder if use_image else ""
    record.note_inputs(input_files([slide], encoder, [config.lr_pairs]))
    arrays, embeddings, others, k, facts = train(slide, config, use_image, record)
    final = "fused" if use_image else "gene"
    more, scores = clustering.domains_of(
        embeddings,
        slide,
        k,
        final,
        config.n_init,
        config.seed,
        config.diffusion_steps,
        config.diffusion_k,
    )
    arrays |= more
    record.lap("clustering")
    arrays |= {
        "domains": arrays[f"labels_{final}"],
        "labels": slide.labels,
        "classes": np.array(slide.classes, dtype=str),
        "barcodes": slide.barcodes,
        "xy": slide.xy,
    }
    more, more_scores, text = downstream.downstream(
        slide,
        log_matrix(slide, config),
        embeddings[final],
        arrays["domains"],
        ranks,
        pairs,
        config.root_gene,
        config.permutations,
    )
    arrays |= more
    record.lap("downstream")
    if config.figures:
        figures.draw_multist(record, slide, arrays, facts["losses"], final)
    record.finish(
        scores | more_scores | {"k": k},
        others,
        arrays,
        facts.pop("n_params"),
        files=export.files_of("multist", arrays, [slide], config),
        output=f"{final} + diffusion",
        **facts,
        **text,
    )
    return 0


if __name__ == "__main__":
    run.cli(main)
