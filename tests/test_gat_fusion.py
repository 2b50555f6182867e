"""gat_fusion: every equation against a naive form, fast against plain, the published parameter
counts, training, the program."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import data
import gat_fusion as gf
import metrics
from conftest import exit_status, printed_record
from evaluation import layers
from plainst import run, simulate
from plainst.neighbour_sums import (
    Neighbours,
    neighbour_scores,
    neighbour_sum,
    products_over_table,
)

CPU = torch.device("cpu")
NETWORKS = [name for name in gf.MODES if name != "none"]
ANY_FUSION = [name for name, mode in gf.MODES.items() if mode.fusion == "any"]


@pytest.fixture
def graph():
    return Neighbours(data.knn_table(np.random.default_rng(0).random((60, 2)), 5))


def with_holes(n=40, k=6, seed=1):
    """A table with empty places and one isolated spot (row 0)."""
    table = data.knn_table(np.random.default_rng(seed).random((n, 2)), k)
    table[np.random.default_rng(seed).random(table.shape) < 0.3] = -1
    table[0] = -1
    return Neighbours(table)


def small(**flags):
    """Configuration of a small network."""
    return gf.Config(**{"dim": 16, **flags})


def network(mode="full", fusion="cross", **flags):
    """GatFusion on 20 genes, 9 image features, 3 classes."""
    return gf.GatFusion(small(mode=mode, fusion=fusion, **flags), 20, 9, 3)


def gat(command):
    """Exit status of gat_fusion.py; the command as it is typed."""
    return exit_status(gf.main, command)


# ------------------------------------------------------------------------------------------- layers


def dense_mask(table):
    """(N, N) bool: j is a place in use of row i."""
    n = len(table.index)
    is_used = torch.ones_like(table.index, dtype=torch.bool)
    if table.is_empty is not None:
        is_used = ~table.is_empty
    mask = torch.zeros(n, n, dtype=torch.bool)
    rows = torch.arange(n)[:, None].expand_as(table.index)
    mask[rows[is_used], table.index[is_used]] = True
    return mask


def by_hand(linear, x):
    """W x + b, spot by spot."""
    return torch.stack([linear.weight @ row + linear.bias for row in x])


def norm_by_hand(norm, x):
    """LayerNorm with its scale and shift."""
    mean, var = x.mean(1, keepdim=True), x.var(1, correction=0, keepdim=True)
    return (x - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias


def gelu_by_hand(x):
    """x times the share of a normal distribution below x."""
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def random_norms(module):
    """The module with norms whose scale and shift are not 1 and 0."""
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, torch.nn.LayerNorm):
                layer.weight.normal_()
                layer.bias.normal_()
    return module


def gradients(out, inputs, seed=0):
    """[Gradient of every input] of a weighted sum of the outputs."""
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=out.dtype)
    return torch.autograd.grad((out * weights).sum(), inputs)


def test_neighbour_sum_equals_the_gather_with_gradients():
    table = with_holes().with_self
    n, k = table.index.shape
    weights = torch.rand(n, 3, k, dtype=torch.float64, requires_grad=True)
    values = torch.randn(n, 3, 4, dtype=torch.float64, requires_grad=True)
    fast = neighbour_sum(weights, values, table)
    plain = torch.einsum("nhk,nkhd->nhd", weights, values[table.index])
    torch.testing.assert_close(fast, plain, atol=1e-12, rtol=0)
    inputs = (weights, values)
    for a, b in zip(gradients(fast, inputs), gradients(plain, inputs)):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_neighbour_scores_equal_the_gather_with_gradients():
    table = with_holes().with_self
    n = len(table.index)
    query, key = torch.randn(2, n, 3, 4, dtype=torch.float64, requires_grad=True).unbind()
    fast = neighbour_scores(query, key, table)
    plain = torch.einsum("nhd,nkhd->nhk", query, key[table.index])
    torch.testing.assert_close(fast, plain, atol=1e-12, rtol=0)
    for a, b in zip(gradients(fast, (query, key)), gradients(plain, (query, key))):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_products_are_sampled_on_a_cpu_and_gathered_elsewhere(monkeypatch):
    """A type that the sampled product does not know is gathered on a CPU, too; what is no CPU
    never gets to the sampled product."""
    table = with_holes().with_self
    a, b = torch.randn(2, len(table.index), 3, 4)
    calls, sampled = [], torch.sparse.sampled_addmm

    def noted(*args, **flags):
        calls.append(args)
        return sampled(*args, **flags)

    monkeypatch.setattr(torch.sparse, "sampled_addmm", noted)
    products = products_over_table(a, b, table)
    assert len(calls) == 1
    gathered = products_over_table(a.bfloat16(), b.bfloat16(), table)
    torch.testing.assert_close(gathered.float(), products, atol=0.05, rtol=0.05)
    elsewhere = SimpleNamespace(index=table.index.to("meta"))
    assert products_over_table(a.to("meta"), b.to("meta"), elsewhere).shape == products.shape
    assert len(calls) == 1


def test_gradient_of_the_weights_of_more_spots_than_a_piece():
    table = Neighbours(data.knn_table(np.random.default_rng(0).random((1300, 2)), 4)).without_self
    values = torch.randn(1300, 2, 64, requires_grad=True)
    weights = torch.rand(1300, 2, 4, requires_grad=True)
    neighbour_sum(weights, values, table).square().sum().backward()
    near = values.detach()[table.index]
    out = torch.einsum("nhk,nkhd->nhd", weights.detach(), near)
    expected = 2 * torch.einsum("nhd,nkhd->nhk", out, near)
    torch.testing.assert_close(weights.grad, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("has_holes", [True, False])
def test_graph_attention_equals_the_dense_equation(has_holes, fast, graph):
    graph = with_holes() if has_holes else graph
    layer = gf.GraphAttention(7, 12, heads=3, fast=fast).eval()
    h = torch.randn(len(graph.with_self.index), 7)
    w = layer.project(h).view(len(h), 3, 4)
    e = (w * layer.u).sum(-1)[None] + (w * layer.v).sum(-1)[:, None]  # (N, N, heads): i, j
    e = F.leaky_relu(e, 0.2).masked_fill(~dense_mask(graph.with_self)[..., None], -torch.inf)
    alpha = e.softmax(1)
    expected = torch.einsum("ijh,jhd->ihd", alpha, w).flatten(1) + layer.bias
    out, attention = layer(h, graph)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(attention.sum(-1), torch.ones(len(h), 3))


def test_graph_attention_equals_torch_geometric(graph):
    geometric = pytest.importorskip("torch_geometric.nn")
    ours, peer = gf.GraphAttention(7, 12, 3, 0.0), geometric.GATConv(7, 4, heads=3)
    with torch.no_grad():
        peer.lin.weight.copy_(ours.project.weight)
        peer.att_src.copy_(ours.u[None])
        peer.att_dst.copy_(ours.v[None])
        peer.bias.zero_()
    table = graph.without_self.index
    rows = torch.arange(len(table)).repeat_interleave(table.shape[1])
    h = torch.randn(len(table), 7)
    expected = peer(h, torch.stack([table.flatten(), rows]))
    torch.testing.assert_close(ours(h, graph)[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("fast", [True, False])
def test_graph_convolution_equals_the_normalised_adjacency(fast):
    # a square lattice with its border
    table = data.lattice_table(np.stack(np.divmod(np.arange(36), 6), 1))
    layer, h = gf.GraphConvolution(5, 8, fast), torch.randn(36, 5)
    dense = torch.tensor(data.normalised_adjacency(data.table_to_csr(table)).toarray())
    expected = dense @ layer.project(h) + layer.bias
    out, attention = layer(h, Neighbours(table))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    assert attention is None


@pytest.mark.parametrize("kind", ["gat", "gcn"])
def test_graph_encoder_equals_its_blocks_one_by_one(kind):
    """The first block changes the width and has no residual, the others have one."""
    graph, c = with_holes(), small(layers=3, dropout=0.0)
    encoder, h = random_norms(gf.GraphEncoder(c, kind, 7)), torch.randn(40, 7)
    expected = h
    for i, (convolution, norm) in enumerate(zip(encoder.convolutions, encoder.norms)):
        x, alpha = convolution(expected, graph)
        x = norm_by_hand(norm, x)
        x = torch.where(x > 0, x, x.exp() - 1)
        expected = x if i == 0 else x + expected
    out, attention = encoder(h, graph)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    if kind == "gat":
        torch.testing.assert_close(attention, alpha)
    else:
        assert attention is None


@pytest.mark.parametrize("ffn", [True, False])
def test_gated_fusion_equals_its_equation(ffn):
    fusion = random_norms(gf.GatedFusion(6, 0.1, ffn)).eval()
    a, b = torch.randn(2, 30, 6)
    g = 1 / (1 + (-by_hand(fusion.gate, torch.cat([a, b], 1))).exp())
    f = g * a + (1 - g) * b
    if ffn:
        first, _, _, second = fusion.ffn
        f = f + by_hand(second, gelu_by_hand(by_hand(first, f)))
    torch.testing.assert_close(fusion(a, b), norm_by_hand(fusion.norm, f), atol=1e-5, rtol=1e-5)


def test_mlp_equals_its_equation():
    encoder, x = random_norms(gf.mlp(9, 6, 5, 0.1)).eval(), torch.randn(40, 9)
    norm, first, _, _, second = encoder
    expected = by_hand(second, gelu_by_hand(by_hand(first, norm_by_hand(norm, x))))
    torch.testing.assert_close(encoder(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fast", [True, False])
def test_cross_attention_equals_torch_multihead_attention(fast):
    graph = with_holes()
    layer = random_norms(gf.CrossAttentionLayer(16, 4, 0.0, fast))
    reference = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    z, s = torch.randn(2, 40, 16)
    parts = (layer.query, layer.key, layer.value)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([linear.weight for linear in parts]))
        reference.in_proj_bias.copy_(torch.cat([linear.bias for linear in parts]))
        reference.out_proj.weight.copy_(layer.out.weight)
        reference.out_proj.bias.copy_(layer.out.bias)
        keys = s[graph.without_self.index]  # (N, k, d)
        masked = {"key_padding_mask": graph.without_self.is_empty, "average_attn_weights": False}
        a, alpha = reference(z[:, None], keys, keys, **masked)
        first, _, _, second = layer.ffn
        zz = norm_by_hand(layer.norm1, z + a[:, 0])
        ffn = by_hand(second, gelu_by_hand(by_hand(first, zz)))
        expected = norm_by_hand(layer.norm2, zz + ffn)
        out, ours = layer(z, s, graph)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours, alpha[:, :, 0], atol=1e-5, rtol=0)


def out_and_gradients(layer, inputs, graph):
    """[Output, gradient of every parameter and of every input] in training: the same seed drops
    the same weights."""
    torch.manual_seed(1)
    leaves = [x.clone().requires_grad_() for x in inputs]
    out, _ = layer(*leaves, graph)
    return [out, *gradients(out, [*layer.parameters(), *leaves])]


@pytest.mark.parametrize("name", ["GraphAttention", "GraphConvolution", "CrossAttentionLayer"])
def test_fast_layers_equal_the_plain_ones_with_all_gradients(name):
    widths = {"GraphAttention": (12, 16, 4, 0.1), "GraphConvolution": (12, 16)}
    widths["CrossAttentionLayer"] = (12, 4, 0.1)
    plain, fast = (getattr(gf, name)(*widths[name], fast=fast) for fast in (False, True))
    fast.load_state_dict(plain.state_dict())
    inputs = torch.randn(1 + (name == "CrossAttentionLayer"), 40, 12)
    ours, theirs = (out_and_gradients(layer, inputs, with_holes()) for layer in (fast, plain))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mode", ["full", "gcn_full", "img_expr"])
def test_fast_model_equals_the_plain_one_with_all_gradients(mode):
    plain, fast = network(mode, fast=False), network(mode, fast=True)
    assert isinstance(fast.cross[0], gf.CrossAttentionLayer) and fast.cross[0].fast
    assert not plain.cross[0].fast
    fast.load_state_dict(plain.state_dict())
    x, image, graph = torch.randn(40, 20), torch.randn(40, 9), with_holes()
    found = []
    for model in (fast, plain):
        torch.manual_seed(1)
        logits, _ = model.double()(x.double(), graph, image.double())
        found.append([logits, *gradients(logits, list(model.parameters()))])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_isolated_spot_attends_to_itself():
    graph = with_holes()
    z, s = torch.randn(2, 40, 16)
    alpha = gf.CrossAttentionLayer(16, 4, 0.0)(z, s, graph)[1]
    assert torch.equal(alpha[0, :, 0], torch.ones(4)) and graph.without_self.index[0, 0] == 0
    assert gf.GraphAttention(16, 16)(z, graph)[1][0, :, 0].eq(1).all()


def test_padding_and_permutation_change_nothing():
    torch.manual_seed(0)
    table = data.knn_table(np.random.default_rng(2).random((50, 2)), 6)
    model, x = network().eval(), torch.randn(50, 20)
    logits = model(x, Neighbours(table))[0]
    padded = np.concatenate([table, np.full((50, 5), -1)], 1)
    torch.testing.assert_close(model(x, Neighbours(padded))[0], logits, atol=1e-5, rtol=0)
    order = np.random.default_rng(3).permutation(50)
    moved = Neighbours(np.argsort(order)[table[order]])
    torch.testing.assert_close(model(x[order], moved)[0], logits[order], atol=1e-5, rtol=0)


def reach_on_a_chain(mode, fusion):
    """Spots of a chain, each with its two nearest neighbours, whose genes and whose image change
    what is said about the middle one, 7."""
    chain = np.stack([np.arange(15) * 1.0, np.arange(15) ** 2 * 1e-6], 1)
    x = torch.randn(15, 20, requires_grad=True)
    image = torch.randn(15, 9, requires_grad=True)
    model = network(mode, fusion).eval()
    model(x, Neighbours(data.knn_table(chain, 2)), image)[0][7].sum().backward()
    grads = [x.grad, torch.zeros(15, 9) if image.grad is None else image.grad]
    return [np.flatnonzero(grad.abs().sum(1)).tolist() for grad in grads]


def test_receptive_field_is_what_is_claimed():
    """Two graph layers see two hops, cross-attention one more; where it attends to images, one hop
    of images and no other spot's genes."""
    assert reach_on_a_chain("full", "cross")[0] == [4, 5, 6, 7, 8, 9, 10]
    assert reach_on_a_chain("full", "gated")[0] == [5, 6, 7, 8, 9]
    assert reach_on_a_chain("full", "concat")[0] == [5, 6, 7, 8, 9]
    assert reach_on_a_chain("img_expr", "cross") == [[7], [6, 8]]
    assert reach_on_a_chain("img_expr", "gated") == [[7], [7]]
    assert reach_on_a_chain("multimodal", "cross") == [[4, 5, 6, 7, 8, 9, 10], [7]]
    for mode in NETWORKS:
        for fusion in fusions(mode):
            genes, images = reach_on_a_chain(mode, fusion)
            seen = genes + images
            hops = layers.hops(small(mode=mode, fusion=fusion), gf.MODES[mode])
            assert max(seen) - min(seen) == 2 * hops, (mode, fusion)


@pytest.mark.parametrize(
    ("mode", "fusion", "dim_in", "count"),
    [
        ("full", "cross", 3000, 1_107_063),
        ("full", "gated", 3000, 908_279),
        ("concat", "cross", 3000, 842_999),
        ("full", "concat", 3000, 842_999),
        ("expr_only", "cross", 3000, 808_055),
        ("gat_only", "cross", 3000, 402_567),
        ("gcn_only", "cross", 3000, 402_055),
        ("multimodal", "cross", 3000, 1_423_095),
        ("gcn_full", "cross", 3000, 1_106_551),
        ("img_expr", "gated", 3000, 1_157_111),
        ("img_expr", "cross", 3000, 1_355_895),
        ("embedding", "cross", 512, 366_599),
        ("embedding", "cross", 768, 399_879),
    ],
)
def test_parameter_counts(mode, fusion, dim_in, count):
    model = gf.GatFusion(gf.Config(mode=mode, fusion=fusion), dim_in, 2048, 7)
    assert sum(w.numel() for w in model.parameters()) == count


def fusions(mode):
    """Those that a mode takes: the gate of a third embedding leaves no place to concatenate."""
    return ("cross", "gated") if mode == "multimodal" else ("cross", "gated", "concat")


@pytest.mark.parametrize("mode, fusion", [(m, f) for m in NETWORKS for f in fusions(m)])
def test_every_parameter_gets_a_gradient(mode, fusion, graph):
    model = network(mode, fusion)
    logits, extra = model(torch.randn(60, 20), graph, torch.randn(60, 9))
    F.cross_entropy(logits, torch.arange(60) % 3).backward()
    assert logits.shape == (60, 3) and len(extra["embedding"]) == 60
    silent = []
    for name, weight in model.named_parameters():
        if weight.grad is None or not weight.grad.abs().any():
            silent.append(name)
    # softmax does not change when all scores of a row move together: a key's bias cannot matter
    assert [name for name in silent if not name.endswith("key.bias")] == []


def test_fusion_acts_in_the_modes_that_leave_it_open_and_in_no_other():
    assert ANY_FUSION == ["full", "gcn_full", "embedding", "img_expr", "multimodal"]
    for mode in NETWORKS:
        counts = set()
        for fusion in fusions(mode):
            counts.add(sum(w.numel() for w in network(mode, fusion).parameters()))
        assert len(counts) == (len(fusions(mode)) if mode in ANY_FUSION else 1), mode


def test_concatenation_puts_both_embeddings_side_by_side(graph):
    for mode in ("concat", "full", "gcn_full", "img_expr"):
        model = network(mode, "concat").eval()
        x, image = torch.randn(60, 20), torch.randn(60, 9)
        z = model(x, graph, image)[1]["embedding"]
        assert z.shape == (60, 32)
        torch.testing.assert_close(z[:, :16], model.expression(x))
        if mode == "img_expr":
            torch.testing.assert_close(z[:, 16:], model.image(image))


@pytest.mark.parametrize("mode", NETWORKS)
def test_attention_is_what_has_attention(mode, graph):
    """A graph convolution has fixed weights, which are no attention."""
    places = {"gat_only": 6, "concat": 6, "full": 5, "gcn_full": 5, "embedding": 5, "img_expr": 5}
    places["multimodal"] = 5
    _, extra = network(mode)(torch.randn(60, 20), graph, torch.randn(60, 9))
    if mode in places:
        assert extra["attention"].shape == (60, 4, places[mode])
    else:
        assert extra["attention"] is None
    _, extra = network("gcn_full", "gated")(torch.randn(60, 20), graph)
    assert extra["attention"] is None


def test_class_weights():
    w = gf.class_weights(np.array([0, 0, 0, 1]), 3)
    assert w.sum() == pytest.approx(3) and w[1] / w[0] == pytest.approx(3, rel=1e-4) and w[2] == 0


@pytest.mark.parametrize("mode", ["full", "gcn_full"])
def test_bfloat16_stays_near_float32(graph, mode):
    """Logits with --bf16 within .03 of those without, and not the same; every gradient is
    float32."""
    torch.manual_seed(0)
    model, x, out = network(mode).eval(), torch.randn(60, 20), []
    for bf16 in (False, True):
        with run.autocast(gf.Config(bf16=bf16), "cpu"):
            out.append(model(x, graph)[0])
        out[-1].float().square().sum().backward()
    assert 0 < (out[0] - out[1].float()).abs().max() < 0.03
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads and all(grad.dtype == torch.float32 for grad in grads)


# ----------------------------------------------------------------------------------------- training


def short(root, **flags):
    """Configuration of a short run on s1."""
    return small(data=str(root), **{"slice": "s1", "epochs": 3, **flags})


def task_of(c, slides=None):
    """Task of a configuration, its slides read or given."""
    mode = gf.MODES[c.mode]
    return layers.Task(c, mode, layers.load(c, mode) if slides is None else slides)


def trained(root, labels=None, poison=None, **flags):
    """prob, task of a short training run; labels replaced or held-out counts poisoned first."""
    run.seed_everything(0)
    c = short(root, **flags)
    slides = layers.load(c, gf.MODES[c.mode])
    if labels is not None:
        slides[0].labels = labels(slides[0].labels)
    task = task_of(c, slides)
    if poison is not None:
        poison(task, slides[0])
    return gf.train(task, CPU)[1], task


def ari(task, prob):
    """ARI of prob (N, C) on the test spots."""
    test = task.split.test
    return metrics.clustering(task.labels[test], prob[test].argmax(1))["ari"]


def test_poisoned_test_rows_change_nothing_where_no_graph_joins_them(cortex):
    def poison(task, slide):
        rows = np.flatnonzero(task.split.test)
        slide.counts = slide.counts.tolil()
        slide.counts[rows] = slide.counts[np.random.default_rng(0).permutation(rows)] * 1000
        slide.counts = slide.counts.tocsr()

    flags = {"mode": "expr_only", "library": "own"}
    clean, task = trained(cortex, **flags)
    dirty, other = trained(cortex, poison=poison, **flags)
    assert np.array_equal(task.expression.genes, other.expression.genes)
    seen, test = task.split.train | task.split.val, task.split.test
    assert np.array_equal(clean[seen], dirty[seen])
    assert not np.array_equal(clean[test], dirty[test])


def test_test_labels_are_never_used(cortex):
    def scramble(labels):
        out, test = labels.copy(), data.random_split(labels).test
        out[test] = np.random.default_rng(0).permutation(out[test])
        return out

    def same_split(task, slide):
        task.split = data.random_split(data.load_slide(cortex, "s1").labels)

    clean, _ = trained(cortex)
    dirty, _ = trained(cortex, labels=scramble, poison=same_split)
    assert np.array_equal(clean, dirty)


def test_permuted_labels_give_no_score(cortex):
    def permute(labels):
        return np.where(labels >= 0, np.random.default_rng(0).permutation(labels), -1)

    prob, task = trained(cortex, labels=permute, epochs=15)
    assert abs(ari(task, prob)) < 0.08


def test_noise_genes_do_not_beat_coordinates(tmp_path):
    """Pure-noise genes on the leaking split still score, by position alone; coordinates-only must
    be at least as good."""
    slide = simulate.simulate_cortex(600, 200, 5, seed=0, noise_genes=True, sample="n")
    simulate.write_visium(slide, tmp_path / "noise" / "n")
    flags = {"slice": "n", "mode": "gcn_only", "epochs": 40, "dim": 32}
    prob, task = trained(tmp_path / "noise", **flags)
    floors = layers.baselines_of(task)
    floor = max(ari(task, floors[name]()) for name in ("coords_knn", "coords_rbf"))
    assert ari(task, prob) < floor + 0.02


def test_it_learns_the_simulated_layers(cortex):
    """Held-out slice of the same donor: far above chance, and above a spot's own expression
    alone."""
    prob, task = trained(cortex, split="slice", train="s2", epochs=60, dim=64)
    alone = layers.baselines_of(task)["expr_lr"]()
    assert ari(task, prob) > max(0.4, ari(task, alone))


def test_first_loss_is_the_weighted_cross_entropy_of_the_training_spots(cortex):
    c = short(cortex, dropout=0.0, epochs=1)
    task = task_of(c)
    run.seed_everything(0)
    history = gf.train(task, CPU)[3]
    run.seed_everything(0)
    model, train = gf.GatFusion(c, *task.widths), task.split.train
    logits, _ = model(torch.as_tensor(task.x), Neighbours(task.table(c.k)))
    prob = logits[train].softmax(1)[torch.arange(train.sum()), task.labels[train]]
    weights = gf.class_weights(task.labels[train], task.n_classes)[task.labels[train]]
    expected = -(weights * prob.log()).sum() / weights.sum()
    assert history[0, 0] == pytest.approx(expected.item(), rel=1e-5)


def scripted(monkeypatch, aris):
    """Make the validation ARI of an epoch what `aris` says; -> the weights of every epoch, and the
    optimisers that are made, as lists that training fills."""
    weights, optimisers, predict = [], [], layers.predict
    make = torch.optim.AdamW

    def noted(model, *args):
        weights.append({name: w.clone() for name, w in model.state_dict().items()})
        return predict(model, *args)

    def noted_optimiser(*args, **flags):
        optimisers.append(make(*args, **flags))
        return optimisers[-1]

    monkeypatch.setattr(layers, "predict", noted)
    monkeypatch.setattr(torch.optim, "AdamW", noted_optimiser)
    monkeypatch.setattr(metrics, "clustering", lambda *_: {"ari": aris[len(weights) - 1]})
    return weights, optimisers


def test_training_stops_after_patience_and_returns_the_best_epoch(cortex, monkeypatch):
    """The second epoch is the best, the fourth is as good and no better."""
    aris = [0.1, 0.5, 0.4, 0.5, 0.3, 0.9, 0.9]
    weights, _ = scripted(monkeypatch, aris)
    model, prob, _, history = gf.train(task_of(short(cortex, epochs=50, patience=3)), CPU)
    assert history[:, 1].tolist() == aris[:5] and len(weights) == 6
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[1][name])
    assert not torch.equal(weights[1]["head.weight"], weights[4]["head.weight"])
    assert not model.training and abs(prob.sum(1) - 1).max() < 1e-6


def test_learning_rate_halves_where_validation_stands_still(cortex, monkeypatch):
    """After more than ten epochs without a better ARI."""
    for epochs, factor in ((11, 1), (12, 0.5)):
        with monkeypatch.context() as patch:
            _, optimisers = scripted(patch, [0.5] * 20)
            gf.train(task_of(short(cortex, epochs=epochs, patience=30, lr=0.01)), CPU)
        (group,) = optimisers[0].param_groups
        assert group["lr"] == pytest.approx(0.01 * factor)
        assert group["weight_decay"] == gf.WEIGHT_DECAY == 1e-4


@pytest.mark.parametrize("mode", ["full", "gcn_full"])
def test_plain_training_ends_where_the_fast_one_does(cortex, mode):
    """Three epochs with dropout: the same masks, sums in another order."""
    fast, plain = (trained(cortex, mode=mode, fast=fast)[0] for fast in (True, False))
    assert 0 < abs(fast - plain).max() < 1e-4


# -------------------------------------------------------------------------------------- the program

SMALL = "--epochs 2 --dim 16"


@pytest.mark.parametrize(
    "flags",
    [
        "--mode full",
        "--mode full --fusion gated",
        "--mode full --fusion concat",
        "--mode multimodal",
        "--mode img_expr",
        "--mode img_expr --fusion gated",
        "--split blocks --buffer 3 --n_blocks 3",
        "--split slice",
        "--split donor",
        "--mode gcn_only --split slice --train s2",
    ],
)
def test_end_to_end(cortex, tmp_path, capsys, flags):
    where = f"--data {cortex} --slice s1 --runs {tmp_path} --cache {tmp_path}/cache"
    assert gat(f"{where} {SMALL} {flags}") == 0
    record = printed_record(capsys.readouterr().out)
    (path,) = tmp_path.rglob("arrays.npz")
    arrays = np.load(path, allow_pickle=False)
    test = arrays["test"]
    score = metrics.clustering(arrays["labels"][test], arrays["pred"][test])["ari"]
    assert record["metrics"]["ari"] == pytest.approx(score)
    names = {"majority", "coords_knn", "coords_rbf", "expr_lr", "smoothed_lr"}
    assert set(record["baselines"]) == names
    for name, scores in record["baselines"].items():
        said = arrays[f"pred_{name}"][test]
        assert metrics.clustering(arrays["labels"][test], said)["ari"] == scores["ari"]
        gain = record["metrics"]["ari"] - scores["ari"]
        assert record["metrics"][f"gain_over_{name}"] == pytest.approx(gain)
    assert record["data_checksum"] and record["peak_rss_mb"] > 0 and record["n_params"] > 0
    words = flags.split()
    split = words[words.index("--split") + 1] if "--split" in words else "random"
    assert record["split"]["name"] == split
    assert record["split"]["leaks_position"] == (split in ("random", "slice"))
    assert abs(arrays["prob"].sum(1) - 1).max() < 1e-6
    c = run.parse(gf.Config, words)
    has_attention = layers.has_heads(c, gf.MODES[c.mode])
    assert path.with_name("attention.png").exists() == has_attention
    assert ("attention" in arrays.files) == has_attention


def test_same_seed_same_arrays(cortex, tmp_path):
    found = []
    for name in ("a", "b"):
        assert gat(f"--data {cortex} --slice s1 --runs {tmp_path}/{name} {SMALL}") == 0
        found.append(np.load(next((tmp_path / name).rglob("arrays.npz"))))
    assert all(np.array_equal(found[0][name], found[1][name]) for name in found[0].files)


def test_help_is_readable(capsys):
    assert gat("--help") == 0
    text = capsys.readouterr().out
    for words in ("neighbours of a spot", "(default: 6)", "--no-deterministic", "--no-fast"):
        assert words in text


# -------------------------------------------------------------------------------------- real slices


def test_real_slice_trains(real_data):
    """Twelve epochs on 151673 are already far above the majority and a spot's own expression."""
    run.seed_everything(0)
    c = gf.Config(data=str(real_data / "dlpfc"), slice="151673", epochs=12, n_top_genes=1000)
    task = task_of(c)
    assert ari(task, gf.train(task, CPU)[1]) > 0.6
