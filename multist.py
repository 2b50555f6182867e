r"""MultiST: spatial domains from expression, position and histology, without labels.

Source: Wang, Ly, Yu, Bai, "MultiST", arXiv 2601.13331. The page beside this file is
docs/multist.md.

    counts (N, G) --PCA--> X (N, P) --mask--> X' --Encoder: MLP, GCN--> Z (N, 32)        Stage I
                           a masked graph auto-encoder with a GAN beside it
    Z --DEC--> Z           compact clusters                                              Stage II
    image --crops, frozen encoder--> f (N, D) --linear, kNN smoothing--> V (N, 512)
    Z, V --CrossAttention, both directions, the m nearest spots--> H (N, H)              Stage III
    H --PCA, tied-covariance mixture--> labels --label diffusion--> domains

| symbol | meaning | shape |
|---|---|---|
| $X$ | principal components of the genes, not rescaled | (N, P) |
| $X'$ | the same, masked spots changed | (N, P) |
| $\hat{A}$ | $D^{-1/2} (A + I) D^{-1/2}$, A joins each spot to its k nearest | (N, N) sparse |
| $Z$ | gene embedding: own expression beside the graph's | (N, 32) |
| $\mu_j$ | centre of cluster j | (32,) |
| $f, V$ | frozen image features, image embedding | (N, D), (N, 512) |
| $H$ | fused embedding | (N, H) |
| $\mathcal{S}$ | the masked spots of a step | (n,) |

Labels are read for scores, figures and, with `--n_domains oracle`, for the number of domains; no
loss sees them. The output that counts is fixed beforehand: fused + diffusion, gene + diffusion
where there is no image. Numbers of equations are the paper's where docs/multist.md knows them.

    python multist.py --data datasets/dlpfc --slice 151673 --seed 0
    python multist.py --data my_visium_folder --n_domains 8
    python multist.py --data my_section.h5ad --preset tuned --n_domains bic
    python multist.py --data datasets/dlpfc --slice 151673,151674 --preset tuned
"""

import time
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from sklearn.cluster import KMeans
from torch import nn
from torch.nn import functional as F

from evaluation import domains, figures
from evaluation.domains import check, variant
from plainst import export, run
from plainst.graphs import SpotBatches, graph_product, in_blocks
from plainst.losses import LossLog, frozen_statistics, parameter_groups

# named sets of flags; what is typed goes before them; docs/multist.md tells why each is so
PRESETS = {
    "paper": {},
    "released": {
        "norm": "cpm",
        "hvg": "seurat_v3",
        "n_top_genes": 2000,
        "k": 12,
        "mask_mode": "none",
        "mask_rate": 1.0,
        "branches": "serial",
        "weight_decay": 0.01,
        "gan": "mean",
        # .502 times the mean over edges and non-edges together, a quarter of the sum of two means
        "lambda_g": 0.0251,
        "lambda_gan": 0.3,
        "dec_clusters": 10,
        "dec_epochs": 500,
        "direction": "gene_reads_image",
        "m": 1,
        "readout": "latent",
        "self_weight": 0.0,
    },
    "tuned": {
        "n_pcs": 50,
        "k": 0,
        "mask_mode": "none",
        "branches": "serial",
        "gan": "off",
        "epochs": 100,
        "dec": False,
        "image": "off",
        "n_models": 6,
        "n_starts": 6,
        "diffusion_steps": 3,
    },
}


@dataclass
class Config(run.SlideConfig):
    """Flags of multist.py."""

    presets: ClassVar = PRESETS

    preset: str = "paper"
    "a named set of flags; what is typed beside it goes before it"
    n_domains: str = "oracle"
    "number of domains: oracle (as many as the labels have), bic, stability, or a number"
    norm: Literal["log1p", "cpm"] = "log1p"
    "log1p of counts per 10,000, or counts per million without log"
    library: Literal["given", "own"] = "given"
    "library size: the one that came with the data where there is one, or the file's row sums"
    hvg: Literal["variance", "seurat_v3", "none"] = "variance"
    "gene selection: most variable after normalisation, seurat_v3 on counts, or all"
    n_top_genes: int = 3000
    "number of genes"
    n_pcs: int = 200
    "principal components that are the input X"
    k: int = 6
    "spatial neighbours, symmetrised by union; 0: 6 on a lattice, 30 among cells"
    embedding: str = ""
    "frozen vectors instead of genes: .npy, .npz, or a key of obsm in the h5ad"
    mask_mode: Literal["additive", "replace", "zero", "none"] = "additive"
    "Eq. 1: add the learned vector m to masked spots; or put m, or 0, in their place; or nothing"
    mask_rate: float = 0.8
    "share of spots masked, drawn anew every epoch"
    branches: Literal["serial", "parallel"] = "parallel"
    "GCN on X beside the MLP (paper), or on the MLP's output (released code)"
    epochs: int = 400
    "epochs of Stage I (one step each, or with --tile one a tile)"
    tile: int = 0
    "Stages I and II on tiles of at most so many spots and what these see; 0: all at once"
    lr: float = 1e-2
    "Adam learning rate of Stages I and II"
    weight_decay: float = 0.0
    "Adam weight decay, on weight matrices only"
    gan: Literal["off", "fisher", "mean"] = "fisher"
    "adversarial branch: none, Fisher-MMD of Eq. 8, or the difference of mean latents"
    lambda_g: float = 0.1
    "weight of the graph reconstruction"
    lambda_gan: float = 0.01
    "weight of the adversarial alignment; the MMD is in units of its own metric"
    dec: bool = True
    "Stage II, deep embedded clustering"
    dec_clusters: int = 0
    "clusters of Stage II; 0: as many as domains"
    dec_epochs: int = 200
    "most epochs of Stage II"
    image: Literal["auto", "real", "permuted", "noise", "zero", "off"] = "auto"
    "auto: use the image where there is one; permuted, noise and zero are controls"
    encoder: str = "handmade"
    "handmade, a vision model (the paper's: openai/clip-vit-base-patch32), or a .npy/.npz file"
    cache: str = ""
    "folder for image features, which are computed once; empty: <runs>/.features"
    direction: Literal["both", "gene_reads_image"] = "both"
    "both, mixed by alpha (the source: for tumours), or the genes' alone (for layered tissue)"
    alpha: float = 0.7
    "Eq. 17: share of the gene stream that attended to the image"
    m: int = 16
    "spots, itself included, that a spot attends to; with 1 the softmax is always 1 (released)"
    fused_dim: int = 256
    "width of Stage III"
    fusion_epochs: int = 50
    "epochs of Stage III"
    batch: int = 128
    "spots in a step of Stage III"
    readout: Literal["fused", "latent"] = "fused"
    "what is clustered: H, or .7 Z + .3 P H with an untrained P (released)"
    n_models: int = 1
    "latents that are trained; of several the coherent half of all starts votes on the domains"
    n_starts: int = 10
    "starts of the mixture; of one latent the likeliest is taken"
    diffusion_steps: int = 10
    "T of the label diffusion"
    self_weight: float = 1.0
    "weight of the spot itself in the label diffusion (released code: 0)"
    order: str = ""
    "classes from the root outwards, comma-separated; empty: WM,Layer6,...,Layer1"
    root_gene: str = "MBP"
    "pseudotime starts in the domain that expresses this gene most"
    lr_pairs: str = ""
    "table of pairs: ligand,receptor, connectomeDB2020 or CellPhoneDB v5; empty: a short list"
    permutations: int = 10000
    "pairs of other genes in the ligand-receptor null; 0 leaves the scores out"
    fast: bool = True
    "products with the graph as one kernel; the plain form gives the same numbers"
    figures: bool = True
    "draw the figures"


# --------------------------------------------------------------------------------------------------
# Stage I: masked graph auto-encoder
# --------------------------------------------------------------------------------------------------


def mask_rows(x, m, rate, mode):
    r"""The additive mask, Eq. 1, on floor(rate N) spots that are drawn uniformly.

    $$x'_i = x_i + m \cdot [i \in \mathcal{S}] \tag{1}$$

    A learned constant shift hides nothing: what was $x_i$ is still there, moved. `replace`
    ($x'_i = m$) and `zero` do hide the spot. x (N, P), m (P,) -> X' (N, P), S (n,).

    Test: test_mask_changes_exactly_the_masked_rows
    """
    rows = torch.randperm(len(x), device=x.device)[: int(rate * len(x))]  # (n,)
    if mode == "none":
        return x, rows
    is_masked = torch.zeros(len(x), 1, dtype=x.dtype, device=x.device)
    is_masked = is_masked.index_fill(0, rows, 1.0)  # (N, 1)
    if mode == "additive":
        return x + is_masked * m, rows
    instead = m if mode == "replace" else torch.zeros_like(m)  # (P,)
    return x * (1 - is_masked) + is_masked * instead, rows


DROPOUT = 0.2  # of encoder and decoder
# products with the graph between X and X_hat: two of the encoder, one of the decoder
HOPS = 3


def propagate(h, graph, fast=True):
    r"""Product with the normalised adjacency, the sum of Eq. 4 over neighbours: (N, d) -> (N, d).

    $$(\hat{A} H)_i = \sum_{j \in \mathcal{N}_i \cup \{i\}}
    \frac{h_j}{\sqrt{d_i d_j}} \tag{4a}$$

    Test: test_graph_product_is_the_dense_product_in_both_directions
    """
    if fast:
        return graph_product(h, graph)
    messages = graph.weights[:, None].to(h.dtype) * h[graph.columns]  # (nnz, d)
    return torch.zeros_like(h).index_add(0, graph.rows, messages)  # (N, d)


def mlp_block(dim_in, dim_out):
    """Linear map, BatchNorm, ELU and dropout: (N, dim_in) -> (N, dim_out)."""
    return nn.Sequential(
        # BatchNorm takes a bias out again; Adam would blow its gradient, mere rounding, up
        nn.Linear(dim_in, dim_out, bias=False),
        nn.BatchNorm1d(dim_out, eps=1e-3, momentum=0.01),
        nn.ELU(),
        nn.Dropout(DROPOUT),
    )


class Encoder(nn.Module):
    r"""The gene encoder, Eq. 2-5: an MLP, and two graph convolutions on the MLP's output (serial,
    $H = F$) or beside it (parallel, $H = X'$).

    $$F = \mathrm{MLP}(X') \tag{3}$$

    $$U = \hat{A}\, \mathrm{ReLU}(\hat{A} H W_1)\, W_2 \tag{4}$$

    $$Z = [F; U] \tag{5}$$

    Test: test_encoder_follows_the_equations_and_the_order_of_spots
    """

    def __init__(self, dim_in, branches, fast=True):
        super().__init__()
        self.branches, self.fast, self.dropout = branches, fast, nn.Dropout(DROPOUT)
        self.mlp = nn.Sequential(mlp_block(dim_in, 64), mlp_block(64, 16))
        self.w1 = nn.Linear(16 if branches == "serial" else dim_in, 64, bias=False)
        self.w2 = nn.Linear(64, 16, bias=False)
        for linear in (self.w1, self.w2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, x, graph):
        """x (N, P) -> Z (N, 32)."""
        f = in_blocks(self.mlp, x)  # (N, 16)
        if self.branches == "serial":
            h = self.w1(propagate(self.dropout(f), graph, self.fast))  # (N, 64)
        else:
            # the product with the graph is cheaper behind the linear map, and the same
            h = propagate(in_blocks(self.w1, self.dropout(x)), graph, self.fast)  # (N, 64)
        u = propagate(self.w2(self.dropout(F.relu(h))), graph, self.fast)  # (N, 16)
        return torch.cat([f, u], 1)  # (N, 32)


class AutoEncoder(nn.Module):
    r"""Encoder, mask vector m, and the expression decoder of Eq. 6: linear, without bias.

    $$\hat{X} = \hat{A} Z W_d \tag{6}$$

    Test: test_expression_decoder_is_its_equation
    """

    def __init__(self, dim_in, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(dim_in, config.branches, config.fast)
        self.m = nn.Parameter(torch.zeros(dim_in))
        self.dropout = nn.Dropout(DROPOUT)
        self.decoder = nn.Linear(32, dim_in, bias=False)
        nn.init.xavier_uniform_(self.decoder.weight)

    def encode(self, x, graph):
        """x (N, P) -> Z (N, 32)."""
        with run.autocast(self.config, x.device):
            return self.encoder(x, graph).to(x.dtype)

    def decode(self, z, graph):
        """z (N, 32) -> X_hat (N, P)."""
        with run.autocast(self.config, z.device):
            x_hat = self.decoder(propagate(self.dropout(z), graph, self.config.fast))
            return x_hat.to(z.dtype)

    @torch.no_grad()
    def embed(self, x, graph):
        """Z (N, 32) in evaluation mode, nothing masked."""
        self.eval()
        return self.encode(x, graph)


def edge_logits(z, pairs):
    r"""The graph decoder, Eq. 7, for the pairs (2, E) only, never for N x N. -> (E,)

    $$s_{ij} = z_i \cdot z_j \tag{7}$$

    Test: test_edge_loss_and_masked_consistency_are_the_formulas
    """
    return (z[pairs[0]] * z[pairs[1]]).sum(1)  # (E,)


def edge_loss(z, graph):
    r"""Reconstruction of the graph, Eq. 22: cross-entropy of the edges $E$ against as many random
    non-edges $\bar{E}$.

    $$L_g = \frac{1}{|E|} \sum_{E} \log(1 + e^{-s_{ij}})
    + \frac{1}{|\bar{E}|} \sum_{\bar{E}} \log(1 + e^{s_{ij}}) \tag{22}$$

    Test: test_edge_loss_and_masked_consistency_are_the_formulas
    """
    negative = graph.random_non_edges()
    loss = F.softplus(-edge_logits(z, graph.edges)).mean()
    # in a complete graph there is none
    if negative.shape[1]:
        loss = loss + F.softplus(edge_logits(z, negative)).mean()
    return loss


def masked_consistency(x_hat, x, rows):
    r"""Masked consistency, Eq. 23, of the spots `rows` (n,) with the ORIGINAL input: the scaled
    cosine error (GraphMAE, Hou et al. 2022).

    $$L_m = \frac{1}{|\mathcal{S}|} \sum_{i \in \mathcal{S}}
    \left(1 - \cos(\hat{x}_i, x_i)\right)^3 \tag{23}$$

    Test: test_edge_loss_and_masked_consistency_are_the_formulas
    """
    cosine = (F.normalize(x_hat, dim=1) * F.normalize(x, dim=1)).sum(1)  # (N,)
    return (1 - cosine[rows]).pow(3).mean()


def fisher_mmd(phi, phi_fake, eps=1e-3):
    r"""Fisher-MMD, Eq. 8, of two sets of scores (N, d), with the kernel
    $k(z, z') = \phi(z)^\top I^{-1} \phi(z')$.

    $$\mathrm{MMD}^2 = \mathbb{E}\, k(z, z') + \mathbb{E}\, k(\tilde{z}, \tilde{z}')
    - 2\, \mathbb{E}\, k(z, \tilde{z}) \tag{8}$$

    The kernel is linear in $\phi$, so the three terms are the distance of the two means in the
    metric $I^{-1}$: $O(N d^2)$, no N x N matrix. $I$ is the mean of both covariances and eps times
    its mean eigenvalue, taken as a constant: no gradient runs through it.

    Test: test_fisher_mmd_is_the_three_term_formula_and_zero_for_equal_sets
    """
    with torch.no_grad():
        information = (torch.cov(phi.T) + torch.cov(phi_fake.T)) / 2  # (d, d)
        scale = information.diagonal().mean().clamp_min(1e-12)
        identity = torch.eye(len(information), dtype=phi.dtype, device=phi.device)
        information = information + eps * scale * identity
    gap = phi.mean(0) - phi_fake.mean(0)  # (d,)
    return gap @ torch.linalg.solve(information, gap)


# epochs between two steps of the adversary, and the first one in which the encoder meets it
ADVERSARY_EVERY, ADVERSARY_FROM = 5, 10


class Adversary:
    r"""Generator $G$ and critic $\phi$ beside the auto-encoder, Eq. 24: the critic makes the
    Fisher-MMD of real and generated latents large; generator and encoder make it small.

    $$L_{gan} = \mathrm{MMD}^2\!\left(Z, \mathrm{Enc}(G(\epsilon))\right), \qquad
    \epsilon \sim \mathcal{N}(0, I) \tag{24}$$

    The MMD is normalised by its own metric, so the critic needs no clipping of its weights. `mean`
    compares mean latents, without a critic, which is what the released code comes to.

    Test: test_adversary_moves_everyone_and_leaves_batchnorm_alone
    """

    def __init__(self, kind, dim, device):
        self.kind = kind
        # noise (N, 32) -> fake expression (N, P)
        self.generator = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, dim))
        # z (N, 32) -> phi (N, 64), the score grad_w f of f(z) = w . phi(z)
        self.critic = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.generator, self.critic = self.generator.to(device), self.critic.to(device)
        self.generator_optimiser = torch.optim.RMSprop(self.generator.parameters(), lr=1e-4)
        self.critic_optimiser = torch.optim.RMSprop(self.critic.parameters(), lr=1e-4)

    def distance(self, z, z_fake):
        """Scalar discrepancy of latents (N, 32), with gradient to both."""
        if self.kind == "fisher":
            return fisher_mmd(self.critic(z), self.critic(z_fake))
        return (z.mean(0) - z_fake.mean(0)).square().mean()

    def encode(self, model, x, graph):
        """Latents of fresh fakes, (own, 32), which leave the statistics of BatchNorm alone."""
        noise = torch.randn(len(x), 32, dtype=x.dtype, device=x.device)
        with frozen_statistics(model):
            return graph.without_halo(model.encoder(self.generator(noise), graph))

    def train_step(self, model, x, graph):
        """One step of the critic and one of the generator; the encoder stands still."""
        with torch.no_grad(), frozen_statistics(model):
            z = graph.without_halo(model.encoder(x, graph))  # (own, 32)
            z_fake = self.encode(model, x, graph)
        if self.kind == "fisher":
            self.critic_optimiser.zero_grad()
            (-self.distance(z, z_fake)).backward()
            self.critic_optimiser.step()
        self.generator_optimiser.zero_grad()
        self.distance(z, self.encode(model, x, graph)).backward()
        self.generator_optimiser.step()


LAMBDA_X, LAMBDA_MASK = 10.0, 1.0  # weights of the reconstruction and the masked consistency


def reconstruction_terms(model, adversary, x_seen, x, graph, config):
    r"""The terms that Stages I and II share, {name: weighted scalar}, of one forward pass on x_seen
    (N, P); and Z (own, 32), X_hat (own, P).

    $$L_r = \lambda_x \,\mathrm{MSE}(\hat{X}, X) + \lambda_g L_g + \lambda_{gan} L_{gan} \tag{21}$$

    Test: test_terms_of_the_stages_are_their_equations
    """
    z = model.encode(x_seen, graph)  # (N, 32)
    x_hat = graph.without_halo(model.decode(z, graph))  # (own, P)
    z = graph.without_halo(z)
    terms = {
        "expression": LAMBDA_X * F.mse_loss(x_hat, graph.without_halo(x)),
        "graph": config.lambda_g * edge_loss(z, graph),
    }
    if adversary:
        z_fake = adversary.encode(model, x_seen, graph)  # (own, 32)
        terms["gan"] = config.lambda_gan * adversary.distance(z, z_fake)
    return terms, z, x_hat


def stage1_terms(model, adversary, x, graph, config):
    r"""The weighted terms of Stage I, Eq. 25, {name: scalar}.

    $$L_I = L_r + \lambda_m L_m \tag{25}$$

    Test: test_terms_of_the_stages_are_their_equations
    """
    masked, rows = mask_rows(x, model.m, config.mask_rate, config.mask_mode)
    terms, _, x_hat = reconstruction_terms(model, adversary, masked, x, graph, config)
    rows = rows[rows < graph.n_own]
    if len(rows):
        terms["mask"] = LAMBDA_MASK * masked_consistency(x_hat, graph.without_halo(x), rows)
    return terms


def train_stage1(x, graph, config, rows):
    """Stage I on X (N, P) -> AutoEncoder, its optimiser, Adversary or None. rows: of the log."""
    model = AutoEncoder(x.shape[1], config).to(x.device)
    run.compiled(model.encoder, config)
    optimiser = torch.optim.Adam(parameter_groups(model, config.weight_decay), lr=config.lr)
    adversary = None
    if config.gan != "off":
        adversary = Adversary(config.gan, x.shape[1], x.device)
    tiles, log = graph.tiles(config.tile, HOPS), LossLog("Stage I", rows)
    for epoch in run.progress(range(config.epochs), "Stage I"):
        model.train()
        is_logged = epoch % 50 == 10 or epoch == config.epochs - 1
        opponent = adversary if epoch >= ADVERSARY_FROM else None
        for spots, part in run.shuffled(tiles):
            if adversary and epoch % ADVERSARY_EVERY == 0:
                adversary.train_step(model, x[spots], part)
            terms = stage1_terms(model, opponent, x[spots], part, config)
            loss = log.total(terms, epoch, model.parameters(), is_logged)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return model, optimiser, adversary


# --------------------------------------------------------------------------------------------------
# Stage II: deep embedded clustering
# --------------------------------------------------------------------------------------------------


def dec_q(z, centres):
    r"""Soft assignment, Eq. 11, by a Student t with one degree of freedom. z (N, d), centres (K, d)
    -> (N, K).

    $$q_{ij} = \frac{(1 + |z_i - \mu_j|^2)^{-1}}{\sum_{j'} (1 + |z_i - \mu_{j'}|^2)^{-1}} \tag{11}$$

    Test: test_dec_formulas
    """
    distance = torch.cdist(z, centres, compute_mode="donot_use_mm_for_euclid_dist")  # (N, K)
    q = 1 / (1 + distance.square())
    return q / q.sum(1, keepdim=True)


@torch.no_grad()
def dec_p(q):
    r"""The sharpened target, Eq. 12, without gradient: (N, K) -> (N, K).

    $$p_{ij} = \frac{q_{ij}^2 / f_j}{\sum_{j'} q_{ij'}^2 / f_{j'}}, \qquad
    f_j = \sum_i q_{ij} \tag{12}$$

    Test: test_dec_formulas
    """
    p = q.square() / q.sum(0).clamp_min(1e-12)
    return p / p.sum(1, keepdim=True)


def dec_kl(p, q):
    r"""Clustering loss, Eq. 13 and 27: summed over clusters, mean over spots.

    $$L_{dec} = \mathrm{KL}(P \,\|\, Q) = \frac{1}{N} \sum_i \sum_j p_{ij}
    \log \frac{p_{ij}}{q_{ij}} \tag{13}$$

    Test: test_dec_formulas
    """
    return (p * (p.clamp_min(1e-12).log() - q.clamp_min(1e-12).log())).sum(1).mean()


def stage2_terms(model, adversary, x, graph, target, centres, config):
    r"""The weighted terms of Stage II, Eq. 26, {name: scalar}; target (own, K), centres (K, 32).

    $$L_{II} = L_r + \lambda_{dec} L_{dec} \tag{26}$$

    Test: test_terms_of_the_stages_are_their_equations
    """
    terms, z, _ = reconstruction_terms(model, adversary, x, x, graph, config)
    terms["dec"] = LAMBDA_DEC * dec_kl(target, dec_q(z, centres))
    return terms


LAMBDA_DEC = 0.1  # weight of the clustering; the released 1 is on a mean over clusters, too
DEC_UPDATE = 20  # epochs between two refreshes of the target
# Stage II stops when a refresh changes fewer than this share of the labels
DEC_TOLERANCE = 1e-3


def train_stage2(model, optimiser, adversary, x, graph, k, config, rows):
    """Stage II, k clusters, with Stage I's optimiser -> epochs run."""
    z = model.embed(x, graph)  # (N, 32)
    kmeans = KMeans(k, n_init=20, random_state=config.seed).fit(z.cpu().numpy())
    labels, n_epochs = kmeans.labels_, 0
    centres = torch.as_tensor(kmeans.cluster_centers_, dtype=x.dtype, device=x.device)
    centres = nn.Parameter(centres)  # (K, 32)
    optimiser.add_param_group({"params": [centres], "weight_decay": 0.0})
    parameters = [*model.encoder.parameters(), centres]
    tiles, log = graph.tiles(config.tile, HOPS), LossLog("Stage II", rows)
    for epoch in run.progress(range(config.dec_epochs), "Stage II"):
        if epoch % DEC_UPDATE == 0:
            with torch.no_grad():
                q = dec_q(model.embed(x, graph), centres)  # (N, K)
            target, new_labels = dec_p(q), q.argmax(1).cpu().numpy()
            if epoch and (new_labels != labels).mean() < DEC_TOLERANCE:
                break
            labels = new_labels
        model.train()
        is_logged = epoch % 50 == 0 or epoch == config.dec_epochs - 1
        for spots, part in run.shuffled(tiles):
            if adversary and epoch % ADVERSARY_EVERY == 0:
                adversary.train_step(model, x[spots], part)
            p = part.without_halo(target[spots])  # (own, K)
            terms = stage2_terms(model, adversary, x[spots], part, p, centres, config)
            loss = log.total(terms, epoch, parameters, is_logged)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        n_epochs = epoch + 1
    return n_epochs


# --------------------------------------------------------------------------------------------------
# Stage III: fusion by cross-attention
# --------------------------------------------------------------------------------------------------


class CrossAttention(nn.Module):
    r"""Cross-attention over the m nearest spots, Eq. 14-16, `layers` times, one LayerNorm for all.

    $$a_{ij} = \mathrm{softmax}_{j \in \mathcal{N}_i}
    \left( \frac{\langle W_q q_i, W_k t_j \rangle}{\sqrt{d}} + b(x_j - x_i) \right) \tag{15}$$

    $$q_i \leftarrow \mathrm{LN}\left(q_i + W_o \sum_{j \in \mathcal{N}_i} a_{ij} W_v t_j\right)
    \tag{16}$$

    $b$ is learned from the relative position. Keys and values are projected once a spot and
    gathered afterwards. With m = 1 there is one key: softmax = 1 whatever the query says, and the
    query and key weights get no gradient, which is the released model.

    Test: test_cross_attention_is_multi_head_attention_over_the_nearest
    """

    def __init__(self, dim, heads, layers=2):
        super().__init__()
        self.heads = heads
        self.q = nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers))
        self.k = nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers))
        self.v = nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers))
        self.position = nn.Sequential(nn.Linear(2, 16), nn.GELU(), nn.Linear(16, heads))
        self.norm = nn.LayerNorm(dim)

    def forward(self, query, tokens, neighbours, offset):
        """query (B, H), tokens (T, H), neighbours (B, m) rows of tokens, offset (B, m, 2) in
        lattice pitches -> (B, H), weights (B, m, heads) of the last layer."""
        shape = (*neighbours.shape, self.heads, query.shape[1] // self.heads)  # (B, m, heads, d)
        bias = self.position(offset)  # (B, m, heads)
        for i in range(len(self.q)):
            q = self.q[i](query).view(len(query), 1, self.heads, -1)  # (B, 1, heads, d)
            k = F.embedding(neighbours, self.k[i](tokens)).view(shape)  # (B, m, heads, d)
            v = F.embedding(neighbours, self.v[i](tokens)).view(shape)
            scores = (q * k).sum(-1) * shape[-1] ** -0.5  # (B, m, heads)
            weights = (scores + bias).softmax(1)
            mixed = (weights[..., None] * v).sum(1).flatten(1)  # (B, H)
            query = self.norm(query + self.out[i](mixed))
        return query, weights


SMOOTH = 0.3  # share of the neighbours in the smoothed image embedding
HEADS = 8


class Fusion(nn.Module):
    r"""Stage III, Eq. 9, 10, 14 and 17: both modalities in a shared space, attention in both
    directions.

    $$V = \mathrm{dropout}(\mathrm{LN}(W f)) \tag{9}$$

    $$\tilde{v}_i = 0.7\, v_i + 0.3 \sum_{j \in \mathcal{N}_i} w_{ij} v_j \tag{10}$$

    $$g = W_g Z, \qquad t = W_t \tilde{V} \tag{14}$$

    $$H = \alpha H_{gene \leftarrow image} + (1 - \alpha) H_{image \leftarrow gene} \tag{17}$$

    With --direction gene_reads_image $H = H_{gene \leftarrow image}$, and the image stream is $t$.

    Test: test_fusion_mixes_the_two_streams_by_alpha
    """

    def __init__(self, dim_z, dim_image, config):
        super().__init__()
        dim = config.fused_dim
        self.config = config
        self.image = nn.Sequential(nn.Linear(dim_image, 512), nn.LayerNorm(512), nn.Dropout(0.1))
        self.gene_in, self.image_in = nn.Linear(dim_z, dim), nn.Linear(512, dim)
        self.gene_reads_image = CrossAttention(dim, HEADS)
        if config.direction == "both":
            self.image_reads_gene = CrossAttention(dim, HEADS)

    def image_tokens(self, f, view):
        """Eq. 9 and 10: frozen features f (N, D) -> V~ (T, 512) of the visible spots."""
        v = self.image(f[view.smoothed])  # (M, 512)
        mean = F.embedding_bag(
            view.near, v, per_sample_weights=view.weights.to(v.dtype), mode="sum"
        )
        return (1 - SMOOTH) * v[view.own] + SMOOTH * mean  # (T, 512)

    def forward(self, z, f, view):
        """z (N, 32) and frozen image features f (N, D) of the slide; view: `plainst.graphs.View`
        of B queries among T visible spots.

        Returns H (B, H), h_gene (B, H), h_image (B, H), attention (B, m, heads) of the last
        gene-reads-image layer.
        """
        alpha, neighbours, offset = self.config.alpha, view.neighbours, view.offset
        with run.autocast(self.config, z.device):
            gene = self.gene_in(z[view.visible])  # (T, H)
            image = self.image_in(self.image_tokens(f, view))  # (T, H)
            query = gene[view.queries]  # (B, H)
            h_gene, attention = self.gene_reads_image(query, image, neighbours, offset)
            h = h_gene
            h_image = image[view.queries]  # (B, H)
            if self.config.direction == "both":
                h_image, _ = self.image_reads_gene(h_image, gene, neighbours, offset)
                h = alpha * h_gene + (1 - alpha) * h_image
        return h.to(z.dtype), h_gene.to(z.dtype), h_image.to(z.dtype), attention


TAU = 0.1  # temperature


def sdm(h_gene, h_image, tau=TAU):
    r"""Similarity-distribution matching, Eq. 18, of two streams (B, H): the mean of both
    divergences.

    $$L_{sdm} = \tfrac{1}{2}\left[\mathrm{KL}(P^g \| P^v) + \mathrm{KL}(P^v \| P^g)\right], \qquad
    P^m = \mathrm{softmax}(\cos(h^m_i, h^m_j) / \tau) \tag{18}$$

    Test: test_sdm_and_contrast
    """
    gene, image = F.normalize(h_gene, dim=1), F.normalize(h_image, dim=1)
    log_p = (gene @ gene.T / tau).log_softmax(1)  # (B, B)
    log_q = (image @ image.T / tau).log_softmax(1)
    p_from_q = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    q_from_p = F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    return (p_from_q + q_from_p) / 2


def info_nce(h_gene, h_image, tau=TAU):
    r"""Contrastive loss, Eq. 19, of a spot's two streams (B, H); and the same of the transpose, the
    mean of both.

    $$L_{cl} = -\frac{1}{B} \sum_i \log
    \frac{e^{\cos(h^v_i, h^g_i) / \tau}}{\sum_j e^{\cos(h^v_i, h^g_j) / \tau}} \tag{19}$$

    Every other spot of the batch is a negative, those of the same domain, too.

    Test: test_sdm_and_contrast
    """
    logits = F.normalize(h_image, dim=1) @ F.normalize(h_gene, dim=1).T / tau  # (B, B)
    same = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2


def stage3_terms(model, z, f, view):
    r"""The weighted terms of Stage III, Eq. 20, {name: scalar}, of the queries of a view.

    $$L_{III} = 2 L_{sdm} + L_{cl} + 0.5\, L_{reg}, \qquad
    L_{reg} = 0.01 \,(\overline{h_g^2} + \overline{h_v^2}) \tag{20}$$

    Test: test_every_term_of_every_stage_has_a_gradient
    """
    _, h_gene, h_image, _ = model(z, f, view)
    return {
        "sdm": 2 * sdm(h_gene, h_image),
        "contrast": info_nce(h_gene, h_image),
        "norm": 0.5 * 0.01 * (h_gene.square().mean() + h_image.square().mean()),
    }


FUSION_LR = 1e-4


def train_stage3(z, f, xy, config, rows):
    """Stage III with Z (N, 32) and the image features f (N, D) frozen: AdamW, cosine to 0, gradient
    norm at most 1. Returns H (N, H), attention entropy (N,) as a share of log m (nan with
    m = 1), number of parameters."""
    model = Fusion(z.shape[1], f.shape[1], config).to(z.device)
    run.compiled(model, config)
    batches = SpotBatches(xy, config.m, z.device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=FUSION_LR, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.fusion_epochs)
    log = LossLog("Stage III", rows)
    for epoch in run.progress(range(config.fusion_epochs), "Stage III"):
        model.train()
        is_logged = epoch % 10 == 0 or epoch == config.fusion_epochs - 1
        for spots in batches.random(config.batch):
            terms = stage3_terms(model, z, f, batches.view(spots))
            loss = log.total(terms, epoch, model.parameters(), is_logged)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
        schedule.step()
    h, entropy = domains.fuse(model, z, f, batches)
    return h, entropy, sum(p.numel() for p in model.parameters())


# --------------------------------------------------------------------------------------------------
# Program
# --------------------------------------------------------------------------------------------------


def train(task, components, record):
    """Stages I to III on the components (N, P), and the baselines: arrays, embeddings
    {name: (N, d)} to cluster, baselines {name: scores}, number of domains."""
    c, rows = task.config, []
    x = torch.as_tensor(components, device=record.device)
    graph = task.graph(record.device)
    latents, k = [], 0
    for _ in range(c.n_models):
        log = [] if latents else rows
        model, optimiser, adversary = train_stage1(x, graph, c, log)
        k = k or task.number_of_domains(model.embed(x, graph).cpu().numpy())
        if c.dec:
            n_clusters = c.dec_clusters or k
            train_stage2(model, optimiser, adversary, x, graph, n_clusters, c, log)
        latents.append(model.embed(x, graph).cpu().numpy())  # (N, 32)
    record.lap("genes")
    scores = task.score_baselines(components, k)
    record.lap("baselines")
    z = latents[task.choose(latents, k)]
    arrays, embeddings = {"z": z}, {"gene": z}
    n_params = sum(p.numel() for p in model.parameters())
    record.lap("choice")
    if task.has_image:
        f = domains.image_features(task.slide, c, record.device)  # (N, D)
        z = torch.as_tensor(z, device=record.device)
        f = torch.as_tensor(f, device=record.device)
        h, entropy, n_fusion = train_stage3(z, f, task.slide.xy, c, rows)
        fused = h if c.readout == "fused" else domains.latent_readout(z, h)
        arrays |= {"image": f.cpu().numpy(), "h_fusion": h.cpu().numpy()}
        arrays |= {"fused": fused.cpu().numpy(), "attention_entropy": entropy}
        embeddings |= {name: arrays[name] for name in ("fused", "image")}
        n_params += n_fusion
        record.lap("stage3")
    task.facts |= {"losses": rows, "n_params": n_params}
    return arrays, embeddings, scores, k


def main(argv=None):
    """Find the domains of a slide and score them beside the baselines."""
    start = time.perf_counter()
    config = run.parse(Config, argv, __doc__.split("\n")[0])
    check(config)
    task = domains.Task(config)
    record = run.Run("multist", config, task.slide.sample, variant(config), start)
    record.note_inputs(task.files())
    components = task.inputs()  # (N, P)
    record.lap("read")
    arrays, embeddings, baselines, k = train(task, components, record)
    facts = task.facts
    more, scores, files = task.evaluate(embeddings, components, k, record)
    arrays |= more
    if config.figures:
        figures.draw_multist(record, task.slide, arrays, facts["losses"], task.output)
    n_params = facts.pop("n_params")
    files |= export.files_of("multist", arrays, [task.slide], config)
    record.finish(scores, baselines, arrays, n_params, files=files, **facts)
    return 0


if __name__ == "__main__":
    run.cli(main)
