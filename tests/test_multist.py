"""multist: every equation against a naive form, gradients, leaks, bad input, and the program end to
end."""

import copy
import json
import shutil
import subprocess

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from sklearn.metrics import adjusted_rand_score
from torch.nn import functional as F

import data
import metrics
import multist as M
from conftest import without_idle_flags
from data import DataError
from evaluation import clustering, domains
from plainst import features, graphs, losses, run, simulate, stain

QUICK = [
    "--epochs",
    "12",
    "--dec_epochs",
    "4",
    "--fusion_epochs",
    "1",
    "--n_starts",
    "1",
    "--permutations",
    "20",
    "--device",
    "cpu",
    "--gan",
    "fisher",
    "--no-figures",
]


def hexagons(rows=12, columns=14):
    """(rows * columns, 2) positions of a hexagonal lattice, pitch 100."""
    r, c = np.divmod(np.arange(rows * columns), columns)
    return np.stack([100.0 * c + 50 * (r % 2), 86.6 * r], 1)


@pytest.fixture
def toy():
    """Positions, input x (168, 20), graph, flags and a Stage I model."""
    torch.manual_seed(0)
    # no ties between distances: they would be broken by row order
    xy = hexagons() + np.random.default_rng(0).normal(0, 0.1, (168, 2))
    config = M.Config(epochs=3, fused_dim=16, m=7, fusion_epochs=1, batch=64)
    x = torch.randn(len(xy), 20)
    return xy, x, graphs.Graph(xy, 6), config, M.AutoEncoder(20, config)


@pytest.fixture(scope="module")
def cortex(tmp_path_factory):
    """Folder of one simulated slide of 300 spots, sim1."""
    folder = tmp_path_factory.mktemp("multist") / "sim"
    simulate.main(
        ["cortex", str(folder), "--n_spots", "300", "--n_genes", "120", "--n_slices", "1"]
    )
    return folder


def record_of(folder, runs, *flags):
    """run.json and arrays of one short run."""
    words = ["--data", str(folder), "--slice", "sim1", "--runs", str(runs), *QUICK, *flags]
    M.main(without_idle_flags(M, words))
    path = max(runs.rglob("run.json"), key=lambda p: p.stat().st_mtime_ns)
    return json.loads(path.read_text()), dict(np.load(path.parent / "arrays.npz"))


# -------------------------------------------------------------------------------- graph and Stage I


def dense(graph):
    """A_hat as (N, N)."""
    out = torch.zeros(graph.n_own, graph.n_own)
    ends = torch.cat([graph.starts[1:], torch.tensor([len(graph.columns)])])
    for i, (a, b) in enumerate(zip(graph.starts, ends)):
        out[i, graph.columns[a:b]] = graph.weights[a:b]
    return out


def test_graph_product_is_the_dense_product_in_both_directions(toy):
    _, x, graph, _, _ = toy
    a_hat = dense(graph)
    assert (
        torch.equal(a_hat, a_hat.T)
        and a_hat.count_nonzero() == 2 * graph.edges.shape[1] + graph.n_own
    )
    values = torch.linalg.eigvalsh(a_hat)
    assert values.max() <= 1 + 1e-5 and values.min() >= -1 - 1e-5
    h = x.clone().requires_grad_()
    weights = torch.randn_like(x)
    (graphs.graph_product(h, graph) * weights).sum().backward()
    torch.testing.assert_close(graphs.graph_product(x, graph), a_hat @ x)
    torch.testing.assert_close(h.grad, a_hat.T @ weights)
    plain = x.clone().requires_grad_()
    (M.propagate(plain, graph, fast=False) * weights).sum().backward()
    torch.testing.assert_close(M.propagate(x, graph, fast=False), M.propagate(x, graph))
    torch.testing.assert_close(plain.grad, h.grad)


def test_expression_decoder_is_its_equation(toy):
    _, _, graph, _, model = toy
    z = torch.randn(168, 32)
    want = dense(graph) @ z @ model.decoder.weight.T
    torch.testing.assert_close(model.eval().decode(z, graph), want, atol=1e-5, rtol=1e-4)


def test_plain_training_equals_fast_training(toy, monkeypatch):
    """Three epochs without dropout, by the sum of messages and by the kernel."""
    _, x, graph, _, _ = toy
    latents = []
    monkeypatch.setattr(M, "DROPOUT", 0.0)
    for fast in (True, False):
        torch.manual_seed(0)
        config = M.Config(epochs=3, fast=fast)
        latents.append(M.train_stage1(x, graph, config, [])[0].embed(x, graph))
    torch.testing.assert_close(*latents, atol=1e-3, rtol=1e-3)


def test_mask_changes_exactly_the_masked_rows(toy):
    _, x, _, _, _ = toy
    before, m = x.clone(), torch.arange(20.0) + 1
    for mode, want in (
        ("additive", x + m),
        ("replace", m.expand_as(x)),
        ("zero", torch.zeros_like(x)),
    ):
        masked, rows = M.mask_rows(x, m, 0.8, mode)
        chosen = torch.zeros(len(x), dtype=torch.bool).index_fill(0, rows, True)
        assert len(rows) == int(0.8 * len(x)) == chosen.sum()
        torch.testing.assert_close(masked[chosen], want[chosen])
        torch.testing.assert_close(masked[~chosen], x[~chosen])
    assert M.mask_rows(x, m, 0.8, "none")[0] is x and torch.equal(x, before)


@pytest.mark.parametrize("branches", ["serial", "parallel"])
def test_encoder_follows_the_equations_and_the_order_of_spots(toy, branches):
    xy, x, graph, _, _ = toy
    torch.manual_seed(1)
    encoder = M.Encoder(20, branches).eval()
    z = encoder(x, graph)
    f, a_hat = encoder.mlp(x), dense(graph)
    h = f if branches == "serial" else x
    u = a_hat @ F.relu(a_hat @ h @ encoder.w1.weight.T) @ encoder.w2.weight.T
    torch.testing.assert_close(z, torch.cat([f, u], 1), atol=1e-5, rtol=1e-4)
    order = np.random.default_rng(0).permutation(len(x))
    torch.testing.assert_close(
        encoder(x[order], graphs.Graph(xy[order], 6)), z[order], atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("branches", ["serial", "parallel"])
def test_no_parameter_of_the_encoder_has_a_gradient_of_mere_rounding(toy, branches, monkeypatch):
    """As a bias before BatchNorm has: Adam would scale its rounding up, and a rerun with other
    threads would end elsewhere."""
    _, x, graph, _, _ = toy
    torch.manual_seed(1)
    monkeypatch.setattr(M, "DROPOUT", 0.0)
    encoder = M.Encoder(20, branches).train()
    z = encoder(x, graph)
    (z * torch.randn_like(z)).sum().backward()
    for name, p in encoder.named_parameters():
        assert p.grad.abs().max() > 1e-3, name


def test_negatives_are_never_edges_and_change(toy):
    _, _, graph, _, _ = toy
    edges = {tuple(e) for e in graph.edges.T.tolist()}
    first, second = graph.random_non_edges(), graph.random_non_edges()
    assert (
        not edges & {tuple(e) for e in first.T.tolist()}
        and (first[0] < first[1]).all()
        and first.max() > 0.9 * graph.n_own
    )
    assert 0.8 * len(edges) < first.shape[1] <= len(edges)
    assert first.shape != second.shape or not torch.equal(first, second)


def test_tiles_with_a_halo_see_what_the_whole_slide_sees():
    """Own spots of every tile: the latent and the decoded expression, to 1e-5; edges only among
    them. Without a halo it fails."""
    rng = np.random.default_rng(0)
    xy, x, config = rng.random((500, 2)), torch.randn(500, 20), M.Config()
    graph, model = graphs.Graph(xy, 6), M.AutoEncoder(20, config).eval()
    z = model.encode(x, graph)
    x_hat, parts = model.decode(z, graph), graph.tiles(70, M.HOPS)
    assert len(parts) == 8 and sorted(
        torch.cat([rows[: near.n_own] for rows, near in parts]).tolist()
    ) == list(range(500))
    for rows, near in parts:
        own, got = rows[: near.n_own], model.encode(x[rows], near)
        assert (got[: near.n_own] - z[own]).abs().max() < 1e-5 and (
            model.decode(got, near)[: near.n_own] - x_hat[own]
        ).abs().max() < 1e-5
        assert (
            near.edges.max() < near.n_own
            and torch.isin(
                rows[near.edges][0] * 500 + rows[near.edges][1],
                torch.cat([graph.edge_keys, graph.edges[1] * 500 + graph.edges[0]]),
            ).all()
        )
        assert (model.encode(x[own], graphs.Graph(xy[own.numpy()], 6)) - z[own]).abs().max() > 1e-3
    assert graph.tiles(0, M.HOPS)[0][1] is graph


@pytest.mark.parametrize("branches", ["serial", "parallel"])
def test_prediction_takes_a_few_spots_at_a_time_through_what_sees_one_spot(branches, monkeypatch):
    """Evaluation in blocks of 70 rows equals that in one, to rounding; training never splits, since
    BatchNorm needs all rows."""
    rng = np.random.default_rng(0)
    xy, x = rng.random((500, 2)), torch.randn(500, 20)
    monkeypatch.setattr(M, "DROPOUT", 0.0)
    graph, model = graphs.Graph(xy, 6), M.AutoEncoder(20, M.Config(branches=branches))
    trained, seen = copy.deepcopy(model).train().encode(x, graph), []
    whole = model.embed(x, graph)
    monkeypatch.setattr(graphs, "ROWS", 70)
    alone = [model.encoder.mlp] + [model.encoder.w1] * (branches == "parallel")
    for part in alone:
        part.register_forward_hook(lambda module, given, out: seen.append(len(out)))
    assert (model.embed(x, graph) - whole).abs().max() < 1e-5 and seen == ([70] * 7 + [10]) * len(
        alone
    )
    seen.clear()
    assert (model.train().encode(x, graph) - trained).abs().max() < 1e-5 and seen == [500] * len(
        alone
    )


@pytest.mark.parametrize("gan", ["off", "fisher"])
def test_training_on_tiles_lowers_the_losses(gan):
    xy, config = (
        np.random.default_rng(0).random((400, 2)),
        M.Config(epochs=12, dec_epochs=4, tile=110, gan=gan),
    )
    x, graph, log = (
        torch.as_tensor(np.sin(9 * xy @ np.random.default_rng(1).normal(size=(2, 20)))).float(),
        graphs.Graph(xy, 6),
        [],
    )
    torch.manual_seed(0)
    model, optimiser, adversary = M.train_stage1(x, graph, config, log)
    assert M.train_stage2(model, optimiser, adversary, x, graph, 3, config, log) == 4
    value = {(r["stage"], r["epoch"], r["term"]): r["value"] for r in log}
    assert value["Stage I", 11, "expression"] < 0.9 * 10 * x.square().mean()
    # one tile of all spots is the whole slide
    whole = M.train_stage1(x, graph, M.Config(epochs=3, tile=400), [])[0].m
    assert whole.shape == (20,)


def test_bfloat16_stays_near_float32(toy, monkeypatch):
    """Loss terms of Stages I and III with --bf16 within 2 % of those without; every parameter keeps
    a float32 gradient."""
    xy, x, graph, _, _ = toy
    monkeypatch.setattr(M, "DROPOUT", 0.0)
    found = []
    for bf16 in (False, True):
        config = M.Config(bf16=bf16)
        torch.manual_seed(0)
        model, fusion, f = M.AutoEncoder(20, config), M.Fusion(32, 9, config), torch.randn(168, 9)
        terms = M.stage1_terms(model, None, x, graph, config)
        view = graphs.SpotBatches(xy, config.m, "cpu").view(torch.arange(168))
        more = M.stage3_terms(fusion.eval(), torch.randn(168, 32), f, view)
        values = [*terms.values(), *more.values()]
        sum(values).backward()
        parameters = [*model.parameters(), *fusion.parameters()]
        assert all(p.grad.dtype == torch.float32 for p in parameters if p.grad is not None)
        found.append(torch.stack(values))
    assert torch.allclose(*found, rtol=0.02, atol=1e-3) and not torch.equal(*found)


def test_edge_loss_and_masked_consistency_are_the_formulas(toy):
    _, x, graph, _, _ = toy
    torch.manual_seed(3)
    got = M.edge_loss(x, graph)
    torch.manual_seed(3)
    negative = graph.random_non_edges()
    logits = torch.cat([(x[p[0]] * x[p[1]]).sum(1) for p in (graph.edges, negative)])
    target = torch.cat([torch.ones(graph.edges.shape[1]), torch.zeros(negative.shape[1])])
    each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    torch.testing.assert_close(got, each[target == 1].mean() + each[target == 0].mean())
    y, rows = torch.randn_like(x), torch.arange(40)
    naive = sum((1 - F.cosine_similarity(y[i], x[i], dim=0)) ** 3 for i in range(40)) / 40
    torch.testing.assert_close(M.masked_consistency(y, x, rows), naive)
    # spots outside S_mask do not matter
    y[40:] = 1e6
    torch.testing.assert_close(M.masked_consistency(y, x, rows), naive)


def test_complete_graphs_and_empty_masks_are_no_nan(toy):
    xy, x, graph, config, model = toy
    assert torch.isfinite(M.edge_loss(x[:7], graphs.Graph(xy[:7], 6)))
    config.mask_rate = 0.0
    assert "mask" not in M.stage1_terms(model, None, x, graph, config)


def test_the_mask_loss_compares_with_the_original_input(toy):
    _, x, graph, config, model = toy
    model.m.data += 1e3
    # a perfect reconstruction of the ORIGINAL
    model.decode = lambda z, graph: x
    assert M.stage1_terms(model, None, x, graph, config)["mask"] < 1e-6


# ------------------------------------------------------------------------------- adversarial branch


def test_fisher_mmd_is_the_three_term_formula_and_zero_for_equal_sets():
    torch.manual_seed(0)
    a, b = (
        torch.randn(40, 5, dtype=torch.float64),
        torch.randn(40, 5, dtype=torch.float64) * 1.5 + 0.3,
    )
    information = (torch.cov(a.T) + torch.cov(b.T)) / 2
    information = information + 1e-3 * information.diagonal().mean() * torch.eye(
        5, dtype=torch.float64
    )
    inverse = torch.linalg.inv(information)
    kernel = lambda s, t: (s @ inverse @ t.T).mean()  # noqa: E731
    torch.testing.assert_close(M.fisher_mmd(a, b), kernel(a, a) + kernel(b, b) - 2 * kernel(a, b))
    assert M.fisher_mmd(a, a) == 0 < M.fisher_mmd(a, b)


@pytest.mark.parametrize("kind", ["fisher", "mean"])
def test_adversary_moves_everyone_and_leaves_batchnorm_alone(toy, kind):
    _, x, graph, _, model = toy
    model.train()
    adversary = M.Adversary(kind, 20, x.device)
    statistics = [b.clone() for b in model.buffers()]
    weights = [p.clone() for p in model.parameters()]
    generator, critic = (
        [p.clone() for p in net.parameters()] for net in (adversary.generator, adversary.critic)
    )
    adversary.train_step(model, x, graph)
    fake = adversary.encode(model, x, graph)
    assert all(torch.equal(a, b) for a, b in zip(statistics, model.buffers())), (
        "fakes touched the BatchNorm statistics"
    )
    assert model.encoder.mlp[0][1].training, "the layers are back in training mode"
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters())), (
        "the encoder stands still in the adversary's step"
    )
    assert any(not torch.equal(a, b) for a, b in zip(generator, adversary.generator.parameters()))
    assert any(not torch.equal(a, b) for a, b in zip(critic, adversary.critic.parameters())) == (
        kind == "fisher"
    )
    adversary.distance(model.encoder(x, graph), fake).backward()
    assert model.encoder.w2.weight.grad.norm() > 1e-8, "the gradient reaches the encoder"


def test_critic_separates_what_the_generator_has_not_learned(toy):
    _, x, graph, _, model = toy
    model.eval()
    adversary = M.Adversary("fisher", 20, x.device)
    with torch.no_grad():
        before = adversary.distance(model.encoder(x, graph), adversary.encode(model, x, graph))
    assert before > 0 and torch.isfinite(before)


# ----------------------------------------------------------------------------------------- Stage II


def test_dec_formulas():
    torch.manual_seed(0)
    z, centres = torch.randn(30, 4), torch.randn(3, 4)
    q = M.dec_q(z, centres)
    naive = torch.stack([torch.stack([1 / (1 + ((a - b) ** 2).sum()) for b in centres]) for a in z])
    naive = naive / naive.sum(1, keepdim=True)
    torch.testing.assert_close(q, naive)
    p = M.dec_p(q)
    f = naive.sum(0)
    target = naive**2 / f / (naive**2 / f).sum(1, keepdim=True)
    torch.testing.assert_close(p, target)
    torch.testing.assert_close(M.dec_kl(p, q), (target * (target / naive).log()).sum() / 30)
    assert M.dec_kl(q, q).abs() < 1e-7 < M.dec_kl(p, q) and not p.requires_grad


def test_stage2_stops_when_labels_stand_still(toy, monkeypatch):
    _, x, graph, config, _ = toy
    config.dec_epochs = 12
    monkeypatch.setattr(M, "DEC_UPDATE", 5)
    # every refresh changes less than 110 %, none less than 0 %
    for tolerance, want in ((1.1, 5), (0.0, 12)):
        monkeypatch.setattr(M, "DEC_TOLERANCE", tolerance)
        model, optimiser, adversary = M.train_stage1(x, graph, config, [])
        assert M.train_stage2(model, optimiser, adversary, x, graph, 3, config, []) == want


# ------------------------------------------------------------------------------------- image branch


def test_colour_reaches_the_reference_and_is_the_identity_on_itself():
    rng = np.random.default_rng(0)
    image = np.clip(rng.normal([150, 110, 160], [18, 15, 12], (60, 50, 3)), 1, 254).astype(np.uint8)
    lab = stain.to_lab(image.reshape(-1, 3))
    source = np.stack([lab.mean(0), lab.std(0)])
    assert np.abs(stain.normalise_colour(image, source, source).astype(int) - image).max() <= 1
    out = stain.to_lab(stain.normalise_colour(image, source).reshape(-1, 3))
    np.testing.assert_allclose(out.mean(0), stain.REFERENCE[0], atol=5e-3)
    np.testing.assert_allclose(out.std(0), stain.REFERENCE[1], rtol=0.1)


def picture(xy, scale=0.1):
    """A slide with an image in which the pixels around spot i carry the number i in red and
    green."""
    n, size = len(xy), (np.ptp(xy, axis=0) * scale + 40).astype(int)
    image = np.full((size[1], size[0], 3), 200, np.uint8)
    for i, (x, y) in enumerate(np.rint(xy * scale).astype(int)):
        image[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2] = [i % 256, i // 256, 7]
    return data.Slide(
        None,
        np.array(["a"]),
        np.array([f"b{i}" for i in range(n)]),
        xy,
        image=image,
        image_scale=scale,
        um_per_px=1.0,
        sample="coded",
    )


def test_patch_belongs_to_its_spot(monkeypatch, tmp_path):
    xy = hexagons() + 100
    monkeypatch.setattr(
        features,
        "handmade_descriptor",
        lambda p: p[:, p.shape[1] // 2, p.shape[2] // 2].astype(np.float32),
    )
    found = data.image_features(picture(xy), "handmade", 60.0)
    assert (found[:, 0] + 256 * found[:, 1]).tolist() == list(range(len(xy)))
    order = np.random.default_rng(0).permutation(len(xy))
    flags = M.Config(cache=str(tmp_path))
    tokens = domains.image_features(picture(xy), flags, "cpu")
    shuffled = domains.image_features(picture(xy).subset(order), flags, "cpu")
    np.testing.assert_allclose(shuffled, tokens[order], atol=1e-4)


def test_controls_of_the_image(monkeypatch, tmp_path):
    real = domains.image_features(picture(hexagons() + 100), M.Config(cache=str(tmp_path)), "cpu")
    for image in ("permuted", "noise", "zero"):
        flags = M.Config(image=image, cache=str(tmp_path))
        other = domains.image_features(picture(hexagons() + 100), flags, "cpu")
        assert other.shape == real.shape and other.dtype == np.float32
        is_same = np.array_equal(np.sort(real, 0), np.sort(other, 0))
        assert is_same == (image == "permuted") and not np.array_equal(real, other)
        assert other.any() == (image != "zero")


def test_smoothing_weights():
    xy = hexagons()
    w = data.smoothing_matrix(xy)
    np.testing.assert_allclose(w @ np.ones(len(xy)), 1, rtol=1e-6)
    near = data.knn_table(xy, 7)
    d = np.linalg.norm(xy[near[50]] - xy[50], axis=1)
    sigma = 2 * np.median(np.linalg.norm(xy[near] - xy[:, None], axis=2))
    want = np.exp(-(d**2) / (2 * sigma**2))
    np.testing.assert_allclose(
        np.asarray(w[50, near[50]].todense()).ravel(), want / want.sum(), rtol=1e-5
    )


# ---------------------------------------------------------------------------------------- Stage III


def attention_inputs(m, dim=16, n=30):
    torch.manual_seed(0)
    near = torch.stack(
        [torch.cat([torch.tensor([i]), torch.randperm(n)[: m - 1]]) for i in range(n)]
    )
    return torch.randn(n, dim), torch.randn(n, dim), near, torch.randn(n, m, 2)


def test_cross_attention_is_multi_head_attention_over_the_nearest():
    query, tokens, near, offset = attention_inputs(5)
    layer = M.CrossAttention(16, 4, layers=1)
    out, weights = layer(query, tokens, near, offset)
    bias = layer.position(offset)  # (n, m, heads)
    for i in (0, 17):
        q, k, v = layer.q[0](query[i]), layer.k[0](tokens[near[i]]), layer.v[0](tokens[near[i]])
        mixed = []
        for h in range(4):
            part = slice(4 * h, 4 * h + 4)
            w = (k[:, part] @ q[part] / 2 + bias[i, :, h]).softmax(0)
            torch.testing.assert_close(weights[i, :, h], w)
            mixed.append(w @ v[:, part])
        torch.testing.assert_close(out[i], layer.norm(query[i] + layer.out[0](torch.cat(mixed))))


def test_one_key_gives_query_and_key_weights_no_gradient_at_all():
    for m in (1, 5):
        query, tokens, near, offset = attention_inputs(m)
        layer = M.CrossAttention(16, 4)
        layer(query, tokens, near, offset)[0].square().sum().backward()
        size = sum(
            p.grad.abs().sum().item()
            for part in (layer.q, layer.k)
            for p in part.parameters()
            if p.grad is not None
        )
        assert size == 0 if m == 1 else size > 1e-3
        assert layer.v[0].weight.grad.abs().sum() > 1e-3


def test_fusion_mixes_the_two_streams_by_alpha(toy):
    """Eq. 9 and 10 in the order of the paper: the mean over neighbours is taken of what LayerNorm
    made; before it the same mean is another vector."""
    xy, _, _, config, _ = toy
    z, f = torch.randn(168, 32), torch.randn(168, 9)
    model, batches = M.Fusion(32, 9, config).eval(), graphs.SpotBatches(xy, config.m, "cpu")
    everyone = batches.view(torch.arange(168))
    h, h_gene, h_image, _ = model(z, f, everyone)
    torch.testing.assert_close(h, 0.7 * h_gene + 0.3 * h_image)
    smoothing = torch.tensor(data.smoothing_matrix(xy).toarray())
    v = model.image(f)
    tokens = 0.7 * v + 0.3 * smoothing @ v
    torch.testing.assert_close(model.image_tokens(f, everyone), tokens, atol=1e-5, rtol=1e-4)
    before = model.image(0.7 * f + 0.3 * smoothing @ f)
    assert (before - tokens).norm() > 0.1 * tokens.norm()
    image = model.image_in(tokens)
    want, _ = model.gene_reads_image(model.gene_in(z), image, batches.table, batches.offset)
    torch.testing.assert_close(h_gene, want, atol=1e-5, rtol=1e-4)


def test_gene_reads_image_is_one_direction(toy):
    """H is the gene stream, whatever alpha; the image stream reads no gene."""
    xy, _, _, config, _ = toy
    config.direction = "gene_reads_image"
    view = graphs.SpotBatches(xy, config.m, "cpu").view(torch.arange(100))
    model, z, f = M.Fusion(32, 9, config).eval(), torch.randn(168, 32), torch.randn(168, 9)
    h, h_gene, h_image, _ = model(z, f, view)
    assert torch.equal(h, h_gene) and torch.equal(h_image, model(z + 1, f, view)[2])
    assert not torch.equal(h, model(z + 1, f, view)[0])


def test_sdm_and_contrast():
    torch.manual_seed(0)
    a, b = torch.randn(20, 8), torch.randn(20, 8)
    assert M.sdm(a, a.clone(), 0.1).abs() < 1e-6 < M.sdm(a, b, 0.1)
    cosine = [F.normalize(t, dim=1) @ F.normalize(t, dim=1).T / 0.1 for t in (a, b)]
    p, q = (c.softmax(1) for c in cosine)
    torch.testing.assert_close(
        M.sdm(a, b, 0.1),
        ((p * (p / q).log()).sum() + (q * (q / p).log()).sum()) / 40,
        atol=1e-5,
        rtol=1e-4,
    )
    # equal logits: the loss of guessing
    same = torch.ones(20, 8)
    torch.testing.assert_close(
        M.info_nce(same, same), torch.tensor(np.log(20.0), dtype=torch.float32)
    )
    logits = F.normalize(b, dim=1) @ F.normalize(a, dim=1).T / 0.1
    rows = logits.log_softmax(1).diagonal().mean() + logits.log_softmax(0).diagonal().mean()
    torch.testing.assert_close(M.info_nce(a, b), -rows / 2)


def test_batches_hold_every_spot_once_and_see_their_neighbours(toy):
    xy, _, _, _, _ = toy
    batches = graphs.SpotBatches(xy, 7, "cpu")
    everyone = list(range(168))
    for parts in (batches.random(50), batches.compact(50)):
        assert torch.cat(list(parts)).sort().values.tolist() == everyone
        assert max(len(part) for part in parts) <= 50
    assert torch.equal(batches.table[:, 0], torch.arange(168))
    assert torch.equal(batches.offset[:, 0], torch.zeros(168, 2))
    rows = batches.random(50)[0]
    view = batches.view(rows)
    assert torch.equal(view.visible[view.queries], rows)
    assert torch.equal(view.visible[view.neighbours], batches.table[rows])
    assert torch.equal(view.smoothed[view.own], view.visible)
    assert torch.equal(view.smoothed[view.near], batches.near[view.visible])


def test_every_term_of_every_stage_has_a_gradient(toy):
    xy, x, graph, config, _ = toy
    log = []
    config.epochs, config.dec_epochs = 12, 2
    model, optimiser, adversary = M.train_stage1(x, graph, config, log)
    M.train_stage2(model, optimiser, adversary, x, graph, 3, config, log)
    M.train_stage3(model.embed(x, graph), torch.randn(len(x), 9), xy, config, log)
    got = {(row["stage"], row["term"]) for row in log if row["grad_norm"] > 1e-9}
    assert got == {("Stage I", t) for t in ("expression", "graph", "mask", "gan")} | {
        ("Stage II", t) for t in ("dec", "expression", "graph", "gan")
    } | {("Stage III", t) for t in ("sdm", "contrast", "norm")}
    assert all(np.isfinite(row["value"]) for row in log)


def test_terms_of_the_stages_are_their_equations(toy, monkeypatch):
    """Without dropout, on a perfect reconstruction of half the input, the pairs drawn alike."""
    _, x, graph, config, model = toy
    monkeypatch.setattr(model, "encode", lambda x, graph: x[:, :4])
    monkeypatch.setattr(model, "decode", lambda z, graph: x / 2)
    config.mask_mode = "none"
    torch.manual_seed(0)
    terms = M.stage1_terms(model, None, x, graph, config)
    torch.manual_seed(0)
    torch.randperm(len(x))
    edges = M.edge_loss(x[:, :4], graph)
    want = {"expression": 10 * (x / 2).square().mean(), "graph": 0.1 * edges}
    torch.testing.assert_close(terms, want | {"mask": torch.tensor(0.0)}, atol=1e-5, rtol=1e-5)
    centres, target = torch.randn(3, 4), torch.rand(168, 3)
    terms = M.stage2_terms(model, None, x, graph, target, centres, config)
    kl = M.dec_kl(target, M.dec_q(x[:, :4], centres))
    torch.testing.assert_close(terms["dec"], 0.1 * kl)
    torch.testing.assert_close(terms["expression"], want["expression"])


def test_a_term_without_gradient_is_seen_in_the_log():
    weight, log = torch.nn.Parameter(torch.ones(2)), []
    losses.LossLog("Stage I", log).total(
        {"dead": torch.tensor(1.0), "live": weight.sum()}, 0, [weight], True
    )
    assert [row["grad_norm"] for row in log] == [0.0, pytest.approx(2**0.5)]


def test_a_loss_that_is_not_finite_stops_with_its_name(toy):
    _, x, graph, config, _ = toy
    config.lr = 1e30
    with pytest.raises(
        DataError, match=r"Stage I, epoch \d+: the loss term '(expression|graph|mask|gan)' is"
    ):
        M.train_stage1(x, graph, config, [])


def test_fused_in_pieces_equals_fused_at_once(toy, monkeypatch):
    xy, x, _, config, _ = toy
    torch.manual_seed(0)
    model, f = M.Fusion(20, 9, config).eval(), torch.randn(len(x), 9)
    batches = graphs.SpotBatches(xy, config.m, "cpu")
    whole, _, _, attention = model(x, f, batches.view(torch.arange(len(x))))
    compact = batches.compact
    monkeypatch.setattr(batches, "compact", lambda size: compact(size // 100))
    h, entropy = domains.fuse(model, x, f, batches)
    torch.testing.assert_close(h, whole, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(attention.sum(1), torch.ones(len(x), 8))
    assert ((entropy > 0.5) & (entropy <= 1 + 1e-6)).all()


# ------------------------------------------------------------------------- clustering and diffusion


def blobs(k=4, per=80, d=6, apart=8.0):
    rng = np.random.default_rng(0)
    centres = rng.permutation(np.eye(d)[:k] * apart)
    return np.concatenate([c + rng.standard_normal((per, d)) for c in centres]), np.repeat(
        np.arange(k), per
    )


def test_mixture_finds_blobs_and_their_number():
    x, truth = blobs()
    assert adjusted_rand_score(truth, clustering.gmm_tied(x, 4)[0]) > 0.99
    assert clustering.choose_k(x, high=8)[0] == 4
    noise = np.random.default_rng(0).standard_normal((25, 30))
    assert clustering.choose_k(noise)[0] == 2, "few spots are no reason for many domains"
    with pytest.raises(DataError, match="too few to choose"):
        clustering.choose_k(noise[:12])
    with pytest.raises(DataError, match="5 domains cannot be found among 3 spots"):
        clustering.gmm_tied(x[:3], 5)
    with pytest.raises(DataError, match="same for every spot"):
        clustering.gmm_tied(np.ones((10, 3)), 2)


def test_components_leave_out_round_off():
    x, _ = blobs()
    # rank 6 in 40 columns
    wide = (x @ np.random.default_rng(1).standard_normal((6, 40))).astype(np.float32)
    assert clustering.components(wide).shape == (320, 6) and clustering.components(
        np.random.default_rng(0).standard_normal((99, 50))
    ).shape == (99, 30)


@pytest.mark.skipif(shutil.which("Rscript") is None, reason="R is not installed")
def test_mixture_agrees_with_mclust(tmp_path):
    x, truth = blobs(apart=4.0)
    np.savetxt(tmp_path / "x.csv", clustering.components(x), delimiter=",")
    script = (
        f'library(mclust); x <- as.matrix(read.csv("{tmp_path}/x.csv", header=FALSE)); '
        'cat(Mclust(x, G=4, modelNames="EEE")$classification)'
    )
    done = subprocess.run(["Rscript", "-e", script], capture_output=True, text=True, check=False)
    if "there is no package" in done.stderr:
        pytest.skip("R has no mclust")
    assert (
        adjusted_rand_score(
            clustering.gmm_tied(x, 4)[0], [int(v) for v in done.stdout.split()[-len(x) :]]
        )
        > 0.95
    )


def test_diffusion_removes_noise_and_keeps_anchors():
    xy = hexagons(30, 30)
    truth = (xy[:, 1] > xy[:, 1].mean()).astype(int) * 5  # names need not be 0..K-1
    noisy = truth.copy()
    flip = np.random.default_rng(0).choice(len(xy), len(xy) // 10, replace=False)
    noisy[flip] = 5 - noisy[flip]
    assert np.array_equal(clustering.diffuse_labels(noisy, xy, steps=0), noisy)
    smooth = clustering.diffuse_labels(noisy, xy)
    assert (smooth == truth).mean() > 0.985 > (noisy == truth).mean() and set(smooth) == {0, 5}
    assert (clustering.diffuse_labels(truth, xy) == truth).mean() > 0.995
    lone = np.zeros(len(xy), int)
    # a domain of one spot is its own anchor
    lone[400] = 1
    assert clustering.diffuse_labels(lone, xy, steps=10)[400] == 1


def test_diffusing_the_annotation_hardly_changes_it(real_data):
    slide = data.load_slide(real_data / "dlpfc", "151673", counts=False).subset(np.arange(3639))
    slide = slide.subset(slide.labels >= 0)
    with_self = adjusted_rand_score(slide.labels, clustering.diffuse_labels(slide.labels, slide.xy))
    released = adjusted_rand_score(
        slide.labels, clustering.diffuse_labels(slide.labels, slide.xy, steps=10, self_weight=0.0)
    )
    assert with_self > 0.99 and released < 0.93


def test_the_chosen_candidate_is_coherent_and_agreed_upon():
    """Of nine candidates three are coherent; of these two agree. Which labels a start gives its
    domains does not matter."""
    rng, xy = np.random.default_rng(0), hexagons(20, 20)
    left, top = (xy[:, 0] > 1000).astype(int), (xy[:, 1] > 900).astype(int)
    noisy = [np.where(rng.random(400) < 0.3, 1 - left, left) for _ in range(6)]
    found = [left, top, 1 - left, *noisy]
    candidates = [
        clustering.Candidate(i, 0, raw, raw, metrics.pas(raw, xy)) for i, raw in enumerate(found)
    ]
    half, agreement = clustering.coherent_half(candidates)
    chosen = half[0]
    assert (
        len(half) == 4
        and {0, 1, 2} < set(half)
        and chosen in (0, 2)
        and agreement[0, 2] == 1
        and np.array_equal(agreement, agreement.T)
    )
    spread = clustering.spread_of(candidates, agreement, chosen, left)
    assert spread["ari_candidates_max"] == 1 > spread["ari_candidates_median"]
    unlabelled = clustering.spread_of(candidates, agreement, chosen, np.full(400, -1))
    assert set(unlabelled) == {"agreement_chosen", "agreement_pairs"}


def test_vote_takes_what_most_say_whatever_they_call_it():
    first = np.array([0, 0, 0, 1, 1, 1])
    found, share = clustering.vote([first, 1 - first, np.array([0, 0, 1, 1, 1, 1])])
    assert found.tolist() == first.tolist()
    np.testing.assert_allclose(share, [1, 1, 2 / 3, 1, 1, 1])


def test_neighbourhood_follows_the_density():
    rng = np.random.default_rng(0)
    assert domains.neighbourhood_size(hexagons()) == 6
    assert domains.neighbourhood_size(rng.random((500, 2))) == 30
    assert domains.neighbourhood_size(rng.random((20, 2))) == 19


def test_linear_r2():
    rng = np.random.default_rng(0)
    z, other = rng.standard_normal((2, 400, 5))
    assert clustering.linear_r2(z, z @ rng.standard_normal((5, 9)) + 3) > 1 - 1e-9
    assert clustering.linear_r2(z, other) < 0.05
    assert clustering.linear_r2(z, z + other) == pytest.approx(0.5, abs=0.1)


def test_majority_vote():
    near = np.array([[1, 2], [0, 2], [0, 1], [0, 1]])
    assert clustering.majority_vote(np.array([7, 7, 3, 3]), near).tolist() == [7, 7, 7, 7]


# ------------------------------------------------------------------------------------------ program


def test_program_writes_the_record(cortex, tmp_path, capsys):
    record, arrays = record_of(cortex, tmp_path, "--figures")
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.endswith("multist/sim/sim1/" + last.split("sim1/")[1]) and "seed0/run.json" in last
    assert {
        "ari",
        "ami",
        "completeness",
        "homogeneity",
        "ari_gene",
        "ari_gene_raw",
        "ari_fused",
        "ari_image",
        "pseudotime_spearman",
    } <= set(record["metrics"])
    assert (
        record["metrics"]["ari"] == record["metrics"]["ari_fused"]
        and record["output"] == "fused + diffusion"
        and record["k_chosen_by"] == "oracle"
    )
    assert set(record["baselines"]) == {"pca_gmm", "neighbour_mean_gmm"} and record["split"] is None
    assert (
        arrays["fused"].shape == (300, 256)
        and arrays["h_fusion"].shape == (300, 256)
        and arrays["domains"].shape == (300,)
    )
    folder = next(tmp_path.rglob("run.json")).parent
    assert {"domains.png", "pseudotime.png", "attention_entropy.png", "losses.png"} <= {
        p.name for p in folder.iterdir()
    }
    again, same = record_of(cortex, tmp_path / "b")
    assert again["metrics"] == record["metrics"] and all(
        np.array_equal(arrays[k], same[k], equal_nan=arrays[k].dtype.kind == "f") for k in arrays
    )


def relabelled(monkeypatch, change):
    """Slides come with labels = change(labels) from here on."""
    load = data.load_slide

    def changed(*args, **kwargs):
        slide = load(*args, **kwargs)
        slide.labels = change(slide.labels)
        return slide

    monkeypatch.setattr(data, "load_slide", changed)


def test_labels_reach_nothing_but_scores(cortex, tmp_path, monkeypatch):
    _, arrays = record_of(cortex, tmp_path / "a", "--n_domains", "5")
    relabelled(monkeypatch, np.random.default_rng(0).permutation)
    _, shuffled = record_of(cortex, tmp_path / "b", "--n_domains", "5")
    assert not np.array_equal(arrays["labels"], shuffled["labels"])
    for name in ("z", "fused", "domains", "labels_gene", "pseudotime"):
        np.testing.assert_array_equal(arrays[name], shuffled[name])


@pytest.mark.parametrize(
    "flags",
    [
        ["--image", "off", "--gan", "off", "--no-dec"],
        ["--image", "permuted", "--gan", "mean", "--branches", "parallel"],
        ["--image", "zero", "--m", "1", "--mask_mode", "replace", "--preset", "tuned"],
        [
            "--preset",
            "released",
            "--n_domains",
            "bic",
            "--norm",
            "cpm",
            "--hvg",
            "seurat_v3",
            "--n_top_genes",
            "60",
        ],
    ],
)
def test_every_switch_runs(cortex, tmp_path, flags):
    record, arrays = record_of(cortex, tmp_path, *flags)
    assert np.isfinite(record["metrics"]["ari"]) and ("h_fusion" in arrays) == (
        "off" not in flags[:2]
    )
    if "bic" in flags:
        assert record["k_chosen_by"] == "bic" and 2 <= record["metrics"]["k"] <= 20


def test_two_variants_never_share_a_folder():
    names = {
        domains.variant(M.Config(**kw))
        for kw in (
            {},
            {"k": 12},
            {"mask_rate": 0.3},
            {"encoder": "a/f.npz"},
            {"encoder": "b/f.npz"},
            {"image": "zero"},
        )
    }
    assert (
        len(names) == 6
        and "paper" in names
        and domains.variant(M.Config(seed=3, dec=False, k=12)) == "paper-k-12-dec-False"
    )
    assert not any("/" in n or "=" in n for n in names)


def failing(capsys, *flags):
    """The one sentence that a run with these flags ends in."""
    with pytest.raises(SystemExit) as stop:
        run.cli(M.main, list(flags))
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_bad_flags_and_slides_are_one_sentence(cortex, tmp_path, capsys, monkeypatch):
    base = ["--data", str(cortex), "--slice", "sim1", "--runs", str(tmp_path / "runs"), *QUICK]
    for flags, why in (
        (["--n_domains", "301"], "301 domains cannot be found among the 300 spots"),
        (["--n_domains", "few"], "--n_domains"),
        (["--k", "300"], "k = 300 needs at least 301 spots"),
        (["--mask_rate", "1.5"], "--mask_rate"),
        (["--fused_dim", "30"], "--fused_dim"),
        (["--m", "301"], "--m 301 exceeds"),
        (["--encoder", "none.npy"], "none.npy"),
        (["--fusion_epochs", "0"], "--fusion_epochs"),
        (["--order", "Moon"], "none of --order Moon"),
        (["--lr_pairs", "none.csv"], "none.csv"),
    ):
        assert why in failing(capsys, *base, *flags), flags
    copy = tmp_path / "sim"
    shutil.copytree(cortex, copy)
    bare = ["--data", str(copy), *base[2:]]
    with monkeypatch.context() as patch:
        relabelled(patch, lambda labels: np.zeros_like(labels))
        assert "labels of one class only" in failing(capsys, *bare)
        relabelled(patch, lambda labels: np.full_like(labels, -1))
        assert "has no labels" in failing(capsys, *bare)
    for picture_file in copy.rglob("tissue_*.png"):
        picture_file.unlink()
    assert "has no image for --image real" in failing(capsys, *bare, "--image", "real")
    assert M.main([*bare, "--n_domains", "3"]) == 0
    assert "has no image: gene-only" in capsys.readouterr().out
    assert [
        p.name
        for p in (tmp_path / "runs" / "multist" / "sim" / "sim1").iterdir()
        if p.name.startswith("paper-n_domains-3")
    ] == ["paper-n_domains-3-epochs-12-dec_epochs-4-fusion_epochs-1-n_starts-1-permutations-20"]


def test_a_slide_in_two_pieces_and_genes_that_do_not_vary(capsys):
    rng = np.random.default_rng(0)
    xy = np.concatenate([hexagons(8, 8), hexagons(8, 8) + 1e5])
    assert graphs.Graph(xy, 6).pieces == 2
    counts = rng.poisson(3, (128, 30))
    counts[:, 5:] = 0
    slide = data.Slide(
        sp.csr_matrix(counts),
        np.array([f"g{i}" for i in range(30)]),
        np.array([f"b{i}" for i in range(128)]),
        xy,
        sample="two",
    )
    x = domains.preprocess(slide, M.Config())
    assert x.shape[1] <= 5 and (x.std(0) > 0).all()
    slide.counts = sp.csr_matrix(np.zeros((128, 30), int))
    with pytest.raises(DataError, match="0 genes that vary"):
        domains.preprocess(slide, M.Config())


def test_simulated_domains_are_recovered(tmp_path):
    folder = tmp_path / "sim"
    simulate.main(
        ["cortex", str(folder), "--n_spots", "1200", "--n_genes", "400", "--n_slices", "1"]
    )
    M.main(
        [
            "--data",
            str(folder),
            "--slice",
            "sim1",
            "--runs",
            str(tmp_path / "runs"),
            "--epochs",
            "150",
            "--dec_epochs",
            "20",
            "--fusion_epochs",
            "3",
            "--n_starts",
            "3",
            "--permutations",
            "0",
            "--device",
            "cpu",
            "--no-figures",
        ]
    )
    record = json.loads(next((tmp_path / "runs").rglob("run.json")).read_text())
    # the preset paper; .50-.62 over six seeds
    assert record["metrics"]["ari_gene"] > 0.48
    # .58-.70 over six seeds, 20 components .10-.17
    assert record["metrics"]["ari"] > record["baselines"]["pca_gmm"]["ari"] + 0.3
    # no marker in this panel: either end is the root; .947-.960 over six seeds
    assert abs(record["metrics"]["pseudotime_spearman"]) > 0.93


def test_real_slice_gene_only(real_data, tmp_path):
    M.main(
        [
            "--data",
            str(real_data / "dlpfc"),
            "--slice",
            "151673",
            "--runs",
            str(tmp_path),
            "--image",
            "off",
            "--epochs",
            "60",
            "--no-dec",
            "--n_starts",
            "2",
            "--permutations",
            "0",
            "--device",
            "cpu",
            "--no-figures",
            "--n_pcs",
            "50",
        ]
    )
    record = json.loads(next(tmp_path.rglob("run.json")).read_text())
    assert record["metrics"]["ari"] > 0.45 and record["metrics"]["pseudotime_spearman"] > 0.75
