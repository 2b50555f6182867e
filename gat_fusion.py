r"""Cortical layers from genes and spatial context: MLP + graph attention + cross-attention.

Source: the public repository "spatial-omics-fusion", which has no paper; graph attention:
Velickovic et al. 2018; graph convolution: Kipf & Welling 2017. The page beside this file is
docs/gat_fusion.md.

    genes X (N, G) --mlp--> E (N, 128) --GraphEncoder--> S (N, 128)
                            |                            |
                     query  +----> CrossAttention x 2 <--+  key, value: S of the k neighbours
                                         |
                                     Z (N, 128) --linear--> layers (N, C)

| symbol | meaning | shape |
|---|---|---|
| $X$ | z-scores of the most variable genes | (N, G) |
| $E$ | embedding of a spot's own genes | (N, 128) |
| $S$ | context: embedding of a spot and its surroundings | (N, 128) |
| $Z$ | fused embedding | (N, 128) |
| $\mathcal{N}_i$ | the k nearest spots of spot i: row i of a table | (N, k) |
| $\alpha_{ij}$ | attention of spot i to spot j, in each head | (N, heads, k or k+1) |

Equations leave out dropout and the biases of linear maps. A `graph` is a `Neighbours`: the table
with the spot itself in front, and without it; empty places are masked.

    python gat_fusion.py --data datasets/dlpfc --slice 151673 --mode full --fusion cross
    python gat_fusion.py --data datasets/dlpfc --slice 151674 --split slice --train 151673
    python gat_fusion.py --data my_visium_folder --predict runs/.../model.pt
"""

import copy
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau

import metrics
from evaluation import figures, layers, new_slides
from plainst import export, run
from plainst.neighbour_sums import neighbour_scores, neighbour_sum


class Mode(NamedTuple):
    """Which encoders a mode has, and how their embeddings meet.

    expression: `mlp` of the genes, `frozen` for vectors made elsewhere, "" where the graph layers
    read the genes; graph: `gat` attention, `gcn` a fixed mean; fusion: `any` as --fusion says,
    `concat`, or "" for a single embedding.
    """

    expression: str = ""
    graph: str = ""
    image: bool = False
    fusion: str = ""


MODES = {
    "expr_only": Mode("mlp"),
    "gat_only": Mode(graph="gat"),
    "gcn_only": Mode(graph="gcn"),
    "concat": Mode("mlp", "gat", fusion="concat"),
    "full": Mode("mlp", "gat", fusion="any"),
    "gcn_full": Mode("mlp", "gcn", fusion="any"),
    "embedding_only": Mode("frozen"),
    "embedding": Mode("frozen", "gat", fusion="any"),
    "img_expr": Mode("mlp", image=True, fusion="any"),
    "multimodal": Mode("mlp", "gat", image=True, fusion="any"),
    "none": Mode(),  # trains nothing: the baselines alone
}

# named sets of flags, which what is typed overrides; the defaults of Config are the source's own.
# tuned: the best validation ARI on blocks of 151673, see CANDIDATES of experiments/layers.py
PRESETS = {"paper": {}, "tuned": {"k": 18}}


@dataclass
class Config(run.SlideConfig):
    presets: ClassVar = PRESETS

    mode: Literal[tuple(MODES)] = "full"
    "which parts are on; none trains nothing"
    fusion: Literal["cross", "gated", "concat"] = "cross"
    "how two embeddings meet where the mode leaves it open; multimodal takes no concat"
    split: Literal["random", "blocks", "slice", "donor"] = "random"
    "random 60/20/20 spots (leaks position), blocks with a buffer, other slices, other donors"
    split_seed: int = 42
    "seed of the split, separate from --seed"
    fold: int = 0
    "fold of --split blocks (0-4)"
    n_blocks: int = 5
    "tiles per side for --split blocks"
    buffer: float = 0.0
    "pitches without training spots around test blocks; 0: the receptive field of the widest mode"
    train: str = ""
    "training slices, comma-separated; empty: all others of the donor, or all of other donors"
    labels: str = ""
    "two-column CSV barcode,label instead of the labels beside the data"
    library: Literal["given", "own"] = "given"
    "library size: the total that came with the data if every slide has one, or the row sum"
    scale: Literal["auto", "train", "slice"] = "auto"
    "z-score by the training rows, or each slice by its own; auto: slice where slices are held out"
    n_top_genes: int = 3000
    "highly variable genes, chosen on training rows"
    embedding: str = ""
    "frozen vectors of spots: .npz with `embedding`, `barcodes`, or .npy; {slice} = its name"
    encoder: str = "handmade"
    "image features: handmade, a Hugging Face model such as microsoft/resnet-50, or a file"
    cache: str = ""
    "folder for image features; empty: <data>/.features where that can be written"
    k: int = 6
    "neighbours of a spot"
    dim: int = 128
    "width of all embeddings"
    heads: int = 4
    "attention heads"
    layers: int = 2
    "graph layers and cross-attention layers"
    dropout: float = 0.1
    "dropout everywhere, attention weights included"
    lr: float = 1e-3
    "AdamW learning rate"
    epochs: int = 200
    "most epochs (one optimiser step each)"
    fast: bool = True
    "sums over neighbours without a copy of each; the plain form gives the same numbers"
    tile: int = 0
    "train and predict on tiles of at most so many spots and all that these see; 0: the whole"
    predict: str = ""
    "checkpoint (model.pt of a run): predict --data with it and its flags, train nothing"
    min_shared: float = 0.4
    "with --predict: the least share of the checkpoint's genes that the new slide must have"


def check(config):
    """Raise DataError, naming the flag, for a value or a combination that no run can use."""
    layers.check(config, MODES)


def variant(config):
    """Folder name of the run."""
    return layers.variant(config, MODES[config.mode])


# --------------------------------------------------------------------------------------------------
# Layers
# --------------------------------------------------------------------------------------------------


def mlp(dim_in, hidden, dim, dropout):
    r"""Encoder of the genes, and of image features: (N, dim_in) -> (N, dim).

    $$E = W_2\, \mathrm{GELU}(W_1 \mathrm{LN}(x) + b_1) + b_2 \tag{1}$$

    Test: test_mlp_equals_its_equation
    """
    return nn.Sequential(
        nn.LayerNorm(dim_in),
        nn.Linear(dim_in, hidden),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, dim),
    )


def softmax_over_neighbours(scores, is_empty):
    """scores (N, heads, k) -> weights that sum to 1 over the places that are not empty (N, k)."""
    if is_empty is not None:
        scores = scores.masked_fill(is_empty[:, None], -torch.inf)
    return scores.softmax(-1)


class GraphAttention(nn.Module):
    r"""Graph attention (Velickovic et al. 2018, Eq. 1-5), heads concatenated.

    $$e_{ij} = \mathrm{LeakyReLU}(u^\top W h_j + v^\top W h_i) \tag{2}$$

    $$\alpha_{ij} = \mathrm{softmax}_{j \in \mathcal{N}_i \cup \{i\}}\, e_{ij} \tag{3}$$

    $$h'_i = \sum_{j \in \mathcal{N}_i \cup \{i\}} \alpha_{ij} W h_j + b \tag{4}$$

    Test: test_graph_attention_equals_the_dense_equation
    """

    def __init__(self, dim_in, dim_out, heads=4, dropout=0.1, fast=True):
        super().__init__()
        self.heads, self.fast, self.dropout = heads, fast, nn.Dropout(dropout)
        self.project = nn.Linear(dim_in, dim_out, bias=False)
        self.u = nn.Parameter(torch.empty(heads, dim_out // heads))  # scores the neighbour
        self.v = nn.Parameter(torch.empty(heads, dim_out // heads))  # scores the spot itself
        self.bias = nn.Parameter(torch.zeros(dim_out))
        for weight in (self.project.weight, self.u, self.v):
            nn.init.xavier_uniform_(weight)

    def forward(self, h, graph):
        """h (N, dim_in) -> (N, dim_out), alpha (N, heads, k+1), the spot itself first."""
        table = graph.with_self
        wh = self.project(h).view(len(h), self.heads, -1)  # (N, heads, d)
        neighbour_score = (wh * self.u).sum(-1)  # (N, heads)
        self_score = (wh * self.v).sum(-1)  # (N, heads)
        e = neighbour_score[table.index].transpose(1, 2)  # (N, heads, k+1)
        e = F.leaky_relu(e + self_score[:, :, None], 0.2)
        alpha = softmax_over_neighbours(e, table.is_empty)  # (N, heads, k+1)
        weights = self.dropout(alpha)
        if self.fast:
            out = neighbour_sum(weights, wh, table)  # (N, heads, d)
        else:
            out = torch.einsum("nhk,nkhd->nhd", weights, wh[table.index])
        return out.flatten(1) + self.bias, alpha  # (N, dim_out)


class GraphConvolution(nn.Module):
    r"""Graph convolution (Kipf & Welling 2017, Eq. 2): a mean with fixed weights.

    $$H' = D^{-1/2} (A + I) D^{-1/2} H W + b \tag{5}$$

    $A$ is the table; $D$ counts the places in use of each of its rows, the spot itself included.

    Test: test_graph_convolution_equals_the_normalised_adjacency
    """

    def __init__(self, dim_in, dim_out, fast=True):
        super().__init__()
        self.fast = fast
        self.project = nn.Linear(dim_in, dim_out, bias=False)
        self.bias = nn.Parameter(torch.zeros(dim_out))
        nn.init.xavier_uniform_(self.project.weight)

    def forward(self, h, graph):
        """h (N, dim_in) -> (N, dim_out), None: no attention."""
        table = graph.with_self
        is_used = table.is_used().to(h.dtype)  # (N, k+1)
        degree = is_used.sum(1)  # (N,)
        weights = is_used / (degree[:, None] * degree[table.index]).sqrt()  # (N, k+1)
        hw = self.project(h)  # (N, dim_out)
        if self.fast:
            out = neighbour_sum(weights[:, None], hw[:, None], table)[:, 0]
        else:
            out = torch.einsum("nk,nkd->nd", weights, hw[table.index])
        return out + self.bias, None


class GraphEncoder(nn.Module):
    r"""A block is convolution, LayerNorm, ELU, dropout, and where the widths agree the input again.

    $$h \leftarrow \mathrm{dropout}(\mathrm{ELU}(\mathrm{LN}(\mathrm{conv}(h)))) + h \tag{6}$$

    Test: test_graph_encoder_equals_its_blocks_one_by_one
    """

    def __init__(self, config, kind, dim_in):
        super().__init__()
        self.convolutions = nn.ModuleList()
        for width, dim in pairwise([dim_in] + [config.dim] * config.layers):
            if kind == "gat":
                layer = GraphAttention(width, dim, config.heads, config.dropout, config.fast)
            else:
                layer = GraphConvolution(width, dim, config.fast)
            self.convolutions.append(layer)
        self.norms = nn.ModuleList(nn.LayerNorm(config.dim) for _ in range(config.layers))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, h, graph):
        """h (N, dim_in) -> S (N, dim), the last layer's attention (N, heads, k+1) or None."""
        for convolution, norm in zip(self.convolutions, self.norms):
            out, attention = convolution(h, graph)  # (N, dim)
            out = self.dropout(F.elu(norm(out)))
            h = out + h if out.shape == h.shape else out
        return h, attention


class GatedFusion(nn.Module):
    r"""A gate for every number of the two embeddings.

    $$g = \sigma(W [a; b] + c), \qquad f = g \odot a + (1 - g) \odot b \tag{7}$$

    $$z = \mathrm{LN}(f + \mathrm{FFN}(f)) \tag{8}$$

    Without `ffn`, as the gate of the image is, $z = \mathrm{LN}(f)$.

    Test: test_gated_fusion_equals_its_equation
    """

    def __init__(self, dim, dropout, ffn=True):
        super().__init__()
        self.gate = nn.Linear(2 * dim, dim)
        self.ffn = None
        if ffn:
            self.ffn = nn.Sequential(
                nn.Linear(dim, dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(dim, dim)
            )
        self.norm = nn.LayerNorm(dim)

    def forward(self, a, b):
        """a, b (N, dim) -> (N, dim)."""
        gate = torch.sigmoid(self.gate(torch.cat([a, b], 1)))  # (N, dim)
        fused = gate * a + (1 - gate) * b
        if self.ffn is not None:
            fused = fused + self.ffn(fused)
        return self.norm(fused)


class CrossAttentionLayer(nn.Module):
    r"""A spot's expression (query) attends to its neighbours' context (key, value), post-norm.

    $$\alpha_{ij} = \mathrm{softmax}_{j \in \mathcal{N}_i}
    \frac{\langle W_q z_i, W_k s_j \rangle}{\sqrt{d}}, \qquad
    a_i = \sum_{j \in \mathcal{N}_i} \alpha_{ij} W_v s_j \tag{9}$$

    $$z \leftarrow \mathrm{LN}(z + W_o a), \qquad z \leftarrow \mathrm{LN}(z + \mathrm{FFN}(z))
    \tag{10}$$

    $d$ is the width of a head. The spot itself is not among its neighbours, unless it has none.
    Keys and values are projected once a spot and gathered afterwards, not the other way round.

    Test: test_cross_attention_equals_torch_multihead_attention
    """

    def __init__(self, dim, heads, dropout, fast=True):
        super().__init__()
        self.heads, self.fast, self.dropout = heads, fast, nn.Dropout(dropout)
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.ffn = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * dim, dim)
        )
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        for linear in (self.query, self.key, self.value, self.out):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, z, s, graph):
        """z (N, dim) queries, s (N, dim) context -> (N, dim), alpha (N, heads, k)."""
        table = graph.without_self
        query = self.query(z).view(len(z), self.heads, -1)  # (N, heads, d)
        key = self.key(s).view(len(z), self.heads, -1)  # (N, heads, d)
        value = self.value(s).view(len(z), self.heads, -1)  # (N, heads, d)
        if self.fast:
            scores = neighbour_scores(query, key, table)  # (N, heads, k)
        else:
            scores = torch.einsum("nhd,nkhd->nhk", query, key[table.index])
        alpha = softmax_over_neighbours(scores / query.shape[-1] ** 0.5, table.is_empty)
        weights = self.dropout(alpha)
        if self.fast:
            a = neighbour_sum(weights, value, table)  # (N, heads, d)
        else:
            a = torch.einsum("nhk,nkhd->nhd", weights, value[table.index])
        z = self.norm1(z + self.dropout(self.out(a.flatten(1))))  # (N, dim)
        return self.norm2(z + self.dropout(self.ffn(z))), alpha


class GatFusion(nn.Module):
    """The encoders of a mode, and how their embeddings meet. dim_in: width of the genes or frozen
    vectors; dim_image: of the image features, 0 without."""

    def __init__(self, config, dim_in, dim_image, n_classes):
        super().__init__()
        c, mode = config, MODES[config.mode]
        self.mode, self.fusion = mode, layers.fusion_of(c, mode)
        self.expression = nn.Identity()
        if mode.expression == "mlp":
            self.expression = mlp(dim_in, 2 * c.dim, c.dim, c.dropout)
        elif mode.expression == "frozen":
            self.expression = nn.Sequential(
                nn.LayerNorm(dim_in), nn.Linear(dim_in, c.dim), nn.GELU(), nn.Dropout(c.dropout)
            )
        if mode.graph:
            self.graph = GraphEncoder(c, mode.graph, c.dim if mode.expression else dim_in)
        if mode.image:
            self.image = mlp(dim_image, c.dim, c.dim, c.dropout)
        if self.fusion == "cross":
            self.cross = nn.ModuleList(
                CrossAttentionLayer(c.dim, c.heads, c.dropout, c.fast) for _ in range(c.layers)
            )
        elif self.fusion == "gated":
            self.gate = GatedFusion(c.dim, c.dropout)
        if mode.image and mode.graph:
            self.image_gate = GatedFusion(c.dim, c.dropout, ffn=False)
        self.head = nn.Linear(2 * c.dim if self.fusion == "concat" else c.dim, n_classes)

    def forward(self, x, graph, image=None):
        """x (N, dim_in), graph `Neighbours`, image (N, dim_image) -> logits (N, C), {"embedding":
        (N, dim), concatenated (N, 2 dim), "attention": that of the last layer, or None}."""
        e = self.expression(x)  # (N, dim); without an encoder x itself
        context, attention = e, None
        if self.mode.image:
            context = picture = self.image(image)  # (N, dim)
        if self.mode.graph:
            context, attention = self.graph(e, graph)  # (N, dim)
        z = context  # (N, dim)
        if self.fusion == "concat":
            z = torch.cat([e, context], 1)  # (N, 2 dim)
        elif self.fusion == "gated":
            z = self.gate(e, context)
        elif self.fusion == "cross":
            z = e
            # every layer reads the same context, as published
            for layer in self.cross:
                z, attention = layer(z, context, graph)
        if self.mode.image and self.mode.graph:
            z = self.image_gate(z, picture)
        return self.head(z), {"embedding": z, "attention": attention}


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def class_weights(labels, n_classes):
    r"""(C,) weights of the cross-entropy, from labels (n,) of training spots; an absent class gets
    none.

    $$w_c = C \, \frac{1 / n_c}{\sum_{c'} 1 / n_{c'}} \tag{11}$$

    Test: test_class_weights
    """
    counts = np.bincount(labels, minlength=n_classes)
    inverse = np.where(counts > 0, 1 / (counts + 1e-6), 0)
    return torch.tensor(inverse / inverse.sum() * n_classes, dtype=torch.float32)


def train(task, device, patience=20):
    """Training until the ARI of the validation spots has not risen for `patience` epochs. Returns
    the best model in eval mode, prob (N, C), its embedding and attention, and the history (epochs,
    2): loss, ARI. One step an epoch: the whole graph is one batch, but with --tile."""
    c, is_val = task.config, task.split.val  # (N,) bool
    # a batch: the inputs of some spots, rows with a loss, their labels; tiles cover all spots
    batches, tiles = task.batches(device)
    model = run.compiled(GatFusion(c, *task.widths).to(device), c)
    weights = class_weights(task.labels[task.split.train], task.n_classes).to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=c.lr, weight_decay=1e-4)
    schedule = ReduceLROnPlateau(optimiser, mode="max", factor=0.5, patience=10)
    best_ari, best_epoch, best_weights, history = -np.inf, 0, None, []
    for epoch in run.progress(range(c.epochs), "epochs"):
        model.train()
        losses = []
        for batch in run.shuffled(batches):
            with run.autocast(c, device):
                logits, _ = model(*batch.inputs())  # (n, C)
                loss = F.cross_entropy(logits[batch.rows], batch.labels, weights)
            losses.append(run.finite(loss, "cross-entropy", epoch))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        prob, _ = layers.predict(model, tiles, len(is_val), c)  # (N, C)
        ari = metrics.clustering(task.labels[is_val], prob[is_val].argmax(1))["ari"]
        history.append((np.mean(losses), ari))
        schedule.step(ari)
        if ari > best_ari:
            best_ari, best_epoch = ari, epoch
            best_weights = copy.deepcopy(model.state_dict())
        if epoch - best_epoch >= patience:
            break
    model.load_state_dict(best_weights)
    prob, extra = layers.predict(model, tiles, len(is_val), c)
    return model, prob, extra, np.array(history)


def main(argv=None):
    """Train and score one model beside the baselines, or predict with one (--predict)."""
    start = time.perf_counter()
    config = run.parse(Config, argv, __doc__.split("\n")[0])
    check(config)
    if config.predict:
        return new_slides.predict_slide(config, check, MODES, GatFusion, start)
    mode = MODES[config.mode]
    slides = layers.load(config, mode)
    record = run.Run("gat_fusion", config, slides[0].sample, variant(config), start)
    task = layers.Task(config, mode, slides)
    record.note_inputs(task.files())
    print(task.describe())
    record.lap("read")
    baseline_prob, baselines = layers.score_baselines(task)
    record.lap("baselines")
    arrays, scores, files = task.arrays(baseline_prob), {}, {}
    facts = {"library": task.library, "receptive_field_pitches": task.reach, "epochs": 0}
    n_params, history = 0, None
    if config.mode != "none":
        model, prob, extra, history = train(task, record.device)
        record.lap("training")
        scores = layers.score(task, prob) | {"val_ari": history[:, 1].max()}
        scores |= layers.gains(scores, baselines)
        print(layers.score_row(config.mode, scores))
        arrays |= task.outputs(prob, extra)
        files["model.pt"] = lambda f: torch.save(new_slides.checkpoint(task, model), f)
        files |= export.files_of("gat_fusion", arrays, slides[:1], config)
        n_params = sum(weight.numel() for weight in model.parameters())
        facts["epochs"] = len(history)
    figures.draw_gat_fusion(record, slides[0], arrays, history)
    record.finish(scores, baselines, arrays, n_params, task.split, files, **facts)
    return 0


if __name__ == "__main__":
    run.cli(main)
