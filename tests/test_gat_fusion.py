"""gat_fusion: every equation against a naive version, the published parameter counts, leaks,
end-to-end runs, bad input."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import data
import gat_fusion as gf
import metrics
from data import DataError
from plainst import run, simulate, tiles
from plainst.features import input_files
from plainst.layers import Dropout
from plainst.neighbour_sums import Neighbours, neighbour_products, weighted_neighbour_sum
from plainst.scaled import ScaledRows

FULL = {"mode": "full", "fusion": "cross"}


@pytest.fixture(scope="module")
def cortex(tmp_path_factory):
    """Two simulated slices of a donor and one of another, as Space Ranger folders."""
    root = tmp_path_factory.mktemp("cortex") / "sim"
    for i, donor in ((1, "A"), (2, "A"), (3, "B")):
        slide = simulate.simulate_cortex(
            400, 300, 5, seed=i, sample=f"s{i}", donor=donor, donor_seed=ord(donor)
        )
        simulate.write_visium(slide, root / f"s{i}")
    return root


@pytest.fixture
def graph():
    return Neighbours(data.knn_table(np.random.default_rng(0).random((60, 2)), 5))


def config(root, **flags):
    return gf.Config(
        data=str(root), **({"slice": "s1", "epochs": 3, "dim": 16, "hidden": 16} | flags)
    )


# ------------------------------------------------------------------------------------------- layers


def dense_mask(table):
    """(N, N) bool: j is a place in use of row i."""
    n = len(table.index)
    mask = torch.zeros(n, n, dtype=torch.bool)
    used = torch.ones_like(table.index, dtype=torch.bool) if table.empty is None else ~table.empty
    mask[torch.arange(n)[:, None].expand_as(table.index)[used], table.index[used]] = True
    return mask


def with_holes(n=40, k=6, seed=1):
    """A table with empty places and one isolated spot (row 0)."""
    table = data.knn_table(np.random.default_rng(seed).random((n, 2)), k)
    table[np.random.default_rng(seed).random(table.shape) < 0.3] = -1
    table[0] = -1
    return Neighbours(table)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.999999])
def test_dropout_drops_the_share_keeps_the_mean_and_passes_the_gradient_of_what_it_kept(p):
    torch.manual_seed(0)
    drop, rounded = Dropout(p), min(round(p * 65536), 65535) / 65536
    # 399,797 numbers, not a multiple of the four of a draw
    x = torch.ones(401, 997, requires_grad=True)
    out = drop(x)
    lost = out == 0
    assert abs(lost.double().mean() - rounded) < 4 * (rounded * (1 - rounded) / x.numel()) ** 0.5
    assert torch.equal(out[~lost], torch.full_like(out[~lost], 1 / (1 - rounded)))
    g = torch.randn_like(x)
    torch.testing.assert_close(torch.autograd.grad(out, x, g)[0], g * out.detach())
    # the next mask is another one
    assert not torch.equal(lost, drop(x) == 0)
    # a row further, neighbours in the same draw and in the next know nothing of it
    if p < 0.9:
        lost = lost.double() - p
        assert all(
            abs((lost * other).mean()) < 5 * p * (1 - p) / x.numel() ** 0.5
            for other in (lost.roll(1, 0), lost.roll(1, 1), lost.roll(4, 1))
        )
    assert Dropout(0.0)(x) is x and drop.eval()(x) is x


@pytest.mark.parametrize(
    "fast, slow, last",
    [
        (
            weighted_neighbour_sum,
            lambda v, w, index: torch.einsum("nhk,nkhd->nhd", w, v[index]),
            6,
        ),
        (neighbour_products, lambda b, a, index: torch.einsum("nhd,nkhd->nhk", a, b[index]), 4),
    ],
)
def test_sum_and_products_over_neighbours_equal_the_gather_with_gradients(fast, slow, last):
    table = with_holes().with_self
    n, k = table.index.shape
    values = torch.randn(n, 3, 4, dtype=torch.float64, requires_grad=True)
    # weights, or queries
    other = torch.rand(n, 3, k if last == 6 else 4, dtype=torch.float64, requires_grad=True)
    got = fast(values, other, table) if last == 6 else fast(other, values, table)
    expected = slow(values, other, table.index)
    assert torch.allclose(got, expected, atol=1e-12)
    seed = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad((got * seed).sum(), (values, other)),
        torch.autograd.grad((expected * seed).sum(), (values, other)),
    ):
        assert torch.allclose(a, b, atol=1e-12)


def test_norm_first_equals_its_layers_one_by_one():
    """With a scale and a shift that are not 1 and 0, gradients included."""
    torch.manual_seed(0)
    model, x = gf.mlp(9, 6, 5, 0.0), torch.randn(40, 9)
    with torch.no_grad():
        model[0].weight.normal_()
        model[0].bias.normal_()
    grads = []
    for out in (model(x), torch.nn.Sequential(*model)(x)):
        grads.append([out.detach(), *torch.autograd.grad(out.square().sum(), model.parameters())])
    assert len(grads[0]) == 7 and all(
        torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(*grads)
    )


def test_weighted_sum_gradient_in_pieces():
    """More spots than one piece of the backward pass."""
    table = Neighbours(data.knn_table(np.random.default_rng(0).random((1300, 2)), 4)).without_self
    values, weights = (
        torch.randn(1300, 2, 64, requires_grad=True),
        torch.rand(1300, 2, 4, requires_grad=True),
    )
    weighted_neighbour_sum(values, weights, table).square().sum().backward()
    near = values.detach()[table.index]
    out = torch.einsum("nhk,nkhd->nhd", weights.detach(), near)
    assert torch.allclose(weights.grad, 2 * torch.einsum("nhd,nkhd->nhk", out, near), atol=1e-4)


@pytest.mark.parametrize("make", [with_holes, None])
def test_graph_attention_equals_the_dense_equation(make, graph):
    graph = make() if make else graph
    layer = gf.GraphAttention(7, 12, heads=3).eval()
    h = torch.randn(len(graph.with_self.index), 7)
    w = layer.project(h).view(len(h), 3, 4)
    # (N, N, heads): row i, neighbour j
    e = F.leaky_relu((w * layer.u).sum(-1)[None] + (w * layer.v).sum(-1)[:, None], 0.2)
    alpha = e.masked_fill(~dense_mask(graph.with_self)[..., None], float("-inf")).softmax(1)
    expected = torch.einsum("ijh,jhd->ihd", alpha, w).flatten(1) + layer.bias
    out, attention = layer(h, graph)
    assert torch.allclose(out, expected, atol=1e-5)
    assert torch.allclose(attention.sum(-1), torch.ones(len(h), 3))


def test_graph_attention_equals_torch_geometric(graph):
    geometric = pytest.importorskip("torch_geometric.nn")
    ours, peer = gf.GraphAttention(7, 12, 3, 0.0), geometric.GATConv(7, 4, heads=3)
    with torch.no_grad():
        peer.lin.weight.copy_(ours.project.weight)
        peer.att_src.copy_(ours.u[None])
        peer.att_dst.copy_(ours.v[None])
        peer.bias.zero_()
    table = graph.without_self.index
    edges = torch.stack(
        [table.flatten(), torch.arange(len(table)).repeat_interleave(table.shape[1])]
    )
    h = torch.randn(len(table), 7)
    assert torch.allclose(ours(h, graph)[0], peer(h, edges), atol=1e-5)


def test_graph_convolution_equals_the_normalised_adjacency():
    # a square lattice with its border
    table = data.lattice_table(np.stack(np.divmod(np.arange(36), 6), 1))
    layer, h = gf.GraphConvolution(5, 8), torch.randn(36, 5)
    dense = torch.tensor(data.normalised_adjacency(data.table_to_csr(table)).toarray())
    assert torch.allclose(
        layer(h, Neighbours(table))[0], dense @ layer.project(h) + layer.bias, atol=1e-5
    )


def test_cross_attention_equals_torch_multihead_attention():
    graph = with_holes()
    layer, reference = (
        gf.CrossAttentionLayer(16, 4, 0.0).eval(),
        torch.nn.MultiheadAttention(16, 4, batch_first=True),
    )
    n = len(graph.with_self.index)
    z, s = torch.randn(n, 16), torch.randn(n, 16)
    with torch.no_grad():
        reference.in_proj_weight.copy_(
            torch.cat([layer.query.weight, layer.key.weight, layer.value.weight])
        )
        reference.in_proj_bias.copy_(
            torch.cat([layer.query.bias, layer.key.bias, layer.value.bias])
        )
        reference.out_proj.weight.copy_(layer.out.weight)
        reference.out_proj.bias.copy_(layer.out.bias)
        # (N, k, d)
        keys = s[graph.without_self.index]
        a, alpha = reference(
            z[:, None],
            keys,
            keys,
            key_padding_mask=graph.without_self.empty,
            average_attn_weights=False,
        )
        zz = layer.norm1(z + a[:, 0])
        expected = layer.norm2(zz + layer.ffn(zz))
    out, ours = layer(z, s, graph)
    assert torch.allclose(out, expected, atol=1e-5)
    assert torch.allclose(ours, alpha[:, :, 0], atol=1e-5)


def test_isolated_spot_attends_to_itself():
    graph = with_holes()
    z, s = torch.randn(40, 16), torch.randn(40, 16)
    alpha = gf.CrossAttentionLayer(16, 4, 0.0)(z, s, graph)[1]
    assert torch.equal(alpha[0, :, 0], torch.ones(4)) and graph.without_self.index[0, 0] == 0
    assert gf.GraphAttention(16, 16)(z, graph)[1][0, :, 0].eq(1).all()


def test_padding_and_permutation_change_nothing():
    torch.manual_seed(0)
    table = data.knn_table(np.random.default_rng(2).random((50, 2)), 6)
    model, x = gf.GatFusion("full", 20, 4, dim=16, hidden=16).eval(), torch.randn(50, 20)
    logits = model(x, Neighbours(table))[0]
    padded = np.concatenate([table, np.full((50, 5), -1)], 1)
    assert torch.allclose(model(x, Neighbours(padded))[0], logits, atol=1e-5)
    order = np.random.default_rng(3).permutation(50)
    moved = np.argsort(order)[table[order]]
    assert torch.allclose(model(x[order], Neighbours(moved))[0], logits[order], atol=1e-5)


def test_receptive_field_is_what_is_claimed():
    """On a chain with its two nearest neighbours, `full --fusion cross` sees three hops and no
    more."""
    chain = np.stack([np.arange(15) * 1.0, np.arange(15) ** 2 * 1e-6], 1)
    graph, x = Neighbours(data.knn_table(chain, 2)), torch.randn(15, 20, requires_grad=True)
    model = gf.GatFusion("full", 20, 3, dim=16, hidden=16).eval()
    model(x, graph)[0][7].sum().backward()
    assert np.flatnonzero(x.grad.abs().sum(1)).tolist() == [4, 5, 6, 7, 8, 9, 10]
    assert (
        gf.receptive_field(gf.Config(k=6)) == 3
        and gf.receptive_field(gf.Config(k=6, fusion="gated")) == 2
    )
    assert (
        gf.receptive_field(gf.Config(k=18)) == 6
        and gf.receptive_field(gf.Config(mode="expr_only")) == 1
    )


def test_receptive_field_counts_the_crop_and_the_smoothing():
    """A crop of 310 um reaches two pitches of 100 um, and twenty of a finer lattice."""
    assert (
        gf.receptive_field(gf.Config(mode="img_expr")) == 2
        and gf.receptive_field(gf.Config(mode="img_expr", crop_um=199.9)) == 1
    )
    assert (
        gf.receptive_field(gf.Config(mode="multimodal", crop_um=900)) == 5
        and gf.receptive_field(gf.Config(mode="img_expr"), 8.0) == 20
    )
    assert (
        gf.receptive_field(gf.Config(mode="smoothed_lr")) == 3
        and gf.receptive_field(gf.Config(mode="coords_knn", k=96)) == 1
    )


def test_default_buffer_is_one_for_all_modes_and_never_below_the_field():
    assert {
        gf.default_buffer(gf.Config(mode=m, fusion=f))
        for m in gf.Config.__annotations__["mode"].__args__
        for f in ("cross", "gated")
    } == {3.0}
    assert (
        gf.default_buffer(gf.Config(k=18)) == 6
        and gf.default_buffer(gf.Config(mode="img_expr", crop_um=900)) == 5
    )
    assert gf.default_buffer(gf.Config(mode="smoothed_lr", layers=1)) == 3


def test_block_split_of_the_task_knows_its_reach(cortex):
    """The same tiles and training spots for every mode; a buffer below the mode's own field is
    called a leak."""
    modes = (("full", "cross"), ("full", "gated"), ("expr_only", "cross"), ("img_expr", "cross"))
    tasks = [
        gf.Task(c, gf.load(c))
        for c in (
            config(cortex, split="blocks", n_blocks=3, mode=mode, fusion=fusion)
            for mode, fusion in modes
        )
    ]
    assert all(
        np.array_equal(t.split.train, tasks[0].split.train) and not t.split.leaks_position
        for t in tasks
    )
    for fusion, leaks in (("cross", True), ("gated", False)):
        c = config(cortex, split="blocks", n_blocks=3, buffer=2.0, fusion=fusion)
        assert gf.Task(c, gf.load(c)).split.leaks_position == leaks


@pytest.mark.parametrize(
    ("mode", "fusion", "dim_in", "count"),
    [
        ("full", "cross", 3000, 1_107_063),
        ("full", "gated", 3000, 908_279),
        ("concat", "cross", 3000, 842_999),
        ("expr_only", "cross", 3000, 808_055),
        ("gat_only", "cross", 3000, 402_567),
        ("gcn_only", "cross", 3000, 402_055),
        ("multimodal", "cross", 3000, 1_423_095),
        ("gcn_full", "cross", 3000, 1_106_551),
        ("img_expr", "cross", 3000, 1_157_111),
        ("embedding", "cross", 512, 366_599),
        ("embedding", "cross", 768, 399_879),
    ],
)
def test_parameter_counts(mode, fusion, dim_in, count):
    model = gf.GatFusion(mode, dim_in, 7, fusion, dim_image=2048)
    assert sum(w.numel() for w in model.parameters()) == count


@pytest.mark.parametrize(
    "mode",
    [
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
    ],
)
@pytest.mark.parametrize("fusion", ["cross", "gated"])
def test_every_parameter_gets_a_gradient(mode, fusion, graph):
    model = gf.GatFusion(mode, 20, 3, fusion, dim_image=9, dim=16, hidden=16)
    logits, extra = model(torch.randn(60, 20), graph, torch.randn(60, 9))
    F.cross_entropy(logits, torch.arange(60) % 3).backward()
    assert logits.shape == (60, 3) and extra["embedding"].shape[0] == 60
    silent = [
        name for name, w in model.named_parameters() if w.grad is None or not w.grad.abs().any()
    ]
    # softmax does not change when all scores of a row move together: a key's bias cannot matter
    assert [name for name in silent if not name.endswith("key.bias")] == []


def test_class_weights():
    w = gf.class_weights(np.array([0, 0, 0, 1]), 3)
    assert w.sum() == pytest.approx(3) and w[1] / w[0] == pytest.approx(3, rel=1e-4) and w[2] == 0


# --------------------------------------------------------------------------------- baselines, leaks


def test_rbf_equals_dense_kernel_ridge(cortex):
    from sklearn.kernel_ridge import KernelRidge

    task = gf.Task(config(cortex), gf.load(config(cortex)))
    pitch, train = data.lattice_pitch(task.place), task.split.train
    best = None
    for b in (2.0, 3.0):
        for ridge in (0.1, 0.3):
            model = KernelRidge(kernel="rbf", alpha=ridge, gamma=0.5 / (b * pitch) ** 2).fit(
                task.place[train], np.eye(task.n_classes)[task.labels[train]]
            )
            p = model.predict(task.place)
            ari = metrics.clustering(task.labels[task.split.val], p[task.split.val].argmax(1))[
                "ari"
            ]
            best = (ari, p) if best is None or ari > best[0] else best
    assert (gf.BASELINES["coords_rbf"](task).argmax(1) == best[1].argmax(1)).mean() > 0.99


def trained(root, labels=None, poison=None, **flags):
    """prob, task of a short training run; labels replaced or held-out counts poisoned first."""
    run.seed_everything(0)
    c = config(root, **flags)
    slides = gf.load(c)
    if labels is not None:
        slides[0].labels = labels(slides[0].labels)
    task = gf.Task(c, slides)
    if poison is not None:
        poison(task, slides[0])
    model, prob, _, _ = gf.train(task, torch.device("cpu"))
    return prob, task, model


def test_poisoned_test_rows_change_nothing_where_no_graph_joins_them(cortex):
    def poison(task, slide):
        rows = np.flatnonzero(task.split.test)
        slide.counts = slide.counts.tolil()
        slide.counts[rows] = slide.counts[np.random.default_rng(0).permutation(rows)] * 1000
        slide.counts = slide.counts.tocsr()

    clean, task, _ = trained(cortex, mode="expr_only", library="own")
    dirty, other, _ = trained(cortex, mode="expr_only", library="own", poison=poison)
    assert np.array_equal(task.expression.genes, other.expression.genes)
    seen = task.split.train | task.split.val
    assert np.array_equal(clean[seen], dirty[seen]) and not np.array_equal(
        clean[task.split.test], dirty[task.split.test]
    )


def test_test_labels_are_never_used(cortex):
    def scramble(labels):
        out, test = labels.copy(), data.random_split(labels).test
        out[test] = np.random.default_rng(0).permutation(out[test])
        return out

    def same_split(task, slide):
        task.split = data.random_split(gf.load(config(cortex))[0].labels)

    clean, task, _ = trained(cortex)
    dirty, _, _ = trained(cortex, labels=scramble, poison=same_split)
    assert np.array_equal(clean, dirty)


def test_permuted_labels_give_no_score(cortex):
    prob, task, _ = trained(
        cortex,
        labels=lambda y: np.where(y >= 0, np.random.default_rng(0).permutation(y), -1),
        epochs=15,
    )
    test = task.split.test
    assert abs(metrics.clustering(task.labels[test], prob[test].argmax(1))["ari"]) < 0.08


def test_noise_genes_do_not_beat_coordinates(tmp_path):
    """Pure-noise genes on the leaking split still score, by position alone; coordinates-only must
    be at least as good."""
    simulate.write_visium(
        simulate.simulate_cortex(600, 200, 5, seed=0, noise_genes=True, sample="n"),
        tmp_path / "noise" / "n",
    )
    prob, task, _ = trained(tmp_path / "noise", slice="n", mode="gcn_only", epochs=40, dim=32)
    test = task.split.test
    floor = max(
        metrics.clustering(task.labels[test], f(task)[test].argmax(1))["ari"]
        for f in (gf.BASELINES["coords_knn"], gf.BASELINES["coords_rbf"])
    )
    ari = metrics.clustering(task.labels[test], prob[test].argmax(1))["ari"]
    assert ari < floor + 0.02, (ari, floor)


def test_it_learns_the_simulated_layers(cortex):
    """Held-out slice of the same donor: far above chance, and above a spot's own expression
    alone."""
    prob, task, _ = trained(cortex, split="slice", train="s2", epochs=60, dim=64, hidden=64)
    test = task.split.test
    ours = metrics.clustering(task.labels[test], prob[test].argmax(1))["ari"]
    alone = metrics.clustering(task.labels[test], gf.BASELINES["expr_lr"](task)[test].argmax(1))[
        "ari"
    ]
    assert ours > 0.4 and ours > alone


# -------------------------------------------------------------------------------------- the program


def program(*argv):
    """Exit status of the script."""
    with pytest.raises(SystemExit) as stop:
        run.cli(gf.main, [str(a) for a in argv])
    return stop.value.code


SMALL = ("--epochs", 2, "--dim", 16, "--hidden", 16)
# of a mode without an MLP on the genes
NO_MLP = SMALL[:4]


@pytest.mark.parametrize(
    "flags",
    [
        ("--mode", "full"),
        ("--mode", "full", "--fusion", "gated"),
        ("--mode", "multimodal"),
        ("--mode", "img_expr"),
        ("--mode", "coords_knn"),
        ("--mode", "smoothed_lr"),
        ("--split", "blocks", "--buffer", 3, "--n_blocks", 3),
        ("--split", "slice"),
        ("--split", "donor"),
        ("--mode", "gcn_only", "--split", "slice", "--train", "s2"),
    ],
)
def test_end_to_end(cortex, tmp_path, capsys, flags):
    small = SMALL
    if flags[1] in gf.GRAPH_ONLY:
        small = NO_MLP
    if flags[1] in gf.BASELINES:
        small = ()
    assert (
        program(
            "--data",
            cortex,
            "--slice",
            "s1",
            "--runs",
            tmp_path,
            "--cache",
            tmp_path / "cache",
            *small,
            *flags,
        )
        == 0
    )
    path = capsys.readouterr().out.strip().splitlines()[-1]
    record = json.loads(open(path).read())
    arrays = np.load(path.replace("run.json", "arrays.npz"), allow_pickle=False)
    test = arrays["test"]
    assert record["metrics"]["ari"] == pytest.approx(
        metrics.clustering(arrays["labels"][test], arrays["pred"][test])["ari"]
    )
    assert (
        {"majority", "coords_knn", "coords_rbf"} <= set(record["baselines"])
        and record["data_checksum"]
        and record["peak_rss_mb"] > 0
    )
    assert record["metrics"]["gain_over_coords_knn"] == pytest.approx(
        record["metrics"]["ari"] - record["baselines"]["coords_knn"]["ari"]
    )
    split = flags[flags.index("--split") + 1] if "--split" in flags else "random"
    assert record["split"]["name"] == split and record["split"]["leaks_position"] == (
        split in ("random", "slice")
    )
    assert (arrays["prob"].sum(1) - 1).__abs__().max() < 1e-6


@pytest.fixture(scope="module")
def checkpoint(cortex, tmp_path_factory):
    """model.pt of a short run on s1, beside its record and arrays."""
    runs = tmp_path_factory.mktemp("runs")
    assert program("--data", cortex, "--slice", "s1", "--runs", runs, *SMALL) == 0
    return next(runs.rglob("model.pt"))


def test_same_seed_same_arrays(cortex, checkpoint, tmp_path):
    assert program("--data", cortex, "--slice", "s1", "--runs", tmp_path, *SMALL) == 0
    a, b = np.load(checkpoint.with_name("arrays.npz")), np.load(next(tmp_path.rglob("arrays.npz")))
    assert all(np.array_equal(a[k], b[k]) for k in a.files)


def test_embedding_from_a_file(cortex, tmp_path):
    slide = data.load_visium(cortex / "s1", counts=False)
    order = np.random.default_rng(0).permutation(slide.n_spots)
    np.savez(
        tmp_path / "e.npz",
        embedding=np.random.default_rng(1).normal(size=(slide.n_spots, 8))[order],
        barcodes=slide.barcodes[order],
    )
    assert (
        program(
            "--data",
            cortex,
            "--slice",
            "s1",
            "--mode",
            "embedding",
            "--embedding",
            tmp_path / "e.npz",
            "--runs",
            tmp_path / "r",
            *NO_MLP,
        )
        == 0
    )


def test_predict_from_a_checkpoint(cortex, checkpoint, tmp_path, capsys):
    model = checkpoint
    trained_on = np.load(model.with_name("arrays.npz"))
    assert (
        program("--data", cortex, "--slice", "s1", "--predict", model, "--runs", tmp_path / "p")
        == 0
    )
    again = np.load(next((tmp_path / "p").rglob("arrays.npz")))
    assert np.allclose(again["prob"], trained_on["prob"], atol=1e-6)
    slide = data.load_visium(cortex / "s2")
    few = slide.select_genes(slide.genes[:40])
    simulate.write_visium(few, tmp_path / "few" / "s2")
    assert (
        program("--data", tmp_path / "few" / "s2", "--predict", model, "--runs", tmp_path / "q")
        == 2
    )
    assert "fewer than --min_shared" in capsys.readouterr().err and not list(
        (tmp_path / "q").rglob("*.json")
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--slice", "nowhere"), "nowhere"),
        (("--slice", "s1", "--k", 500), "smaller k"),
        (("--slice", "s1", "--split", "blocks", "--fold", 9), "fold 9"),
        (("--slice", "s1", "--split", "blocks", "--buffer", 60), "smaller buffer"),
        (("--slice", "s1", "--split", "slice", "--train", "s1"), "--train"),
        (("--slice", "s1", "--split", "donor", "--train", "s2"), "donor"),
        (("--slice", "s1", "--mode", "embedding"), "--embedding"),
        (("--slice", "s1", "--device", "cuda:77"), "--device"),
        (("--slice", "s1", "--predict", "missing.pt"), "missing.pt"),
        (("--slice", "s1", "--lr", 1e30, "--epochs", 9), "cross-entropy"),
        (("--slice", "s1", "--split", "slice", "--labels", "l.csv"), "beside each slide"),
        (("--slice", "s1", "--split", "donor", "--labels", "l.csv"), "--labels"),
        (("--slice", "s1", "--heads", 3), "--heads is 3"),
        (("--slice", "s1", "--dropout", 1), "--dropout"),
        (("--slice", "s1", "--dropout", "nan"), "--dropout"),
        (("--slice", "s1", "--epochs", 0), "--epochs"),
        (("--slice", "s1", "--layers", 0), "--layers"),
        (("--slice", "s1", "--k", 0), "--k is 0"),
        (("--slice", "s1", "--n_top_genes", 0), "--n_top_genes"),
        (("--slice", "s1", "--heads", 0), "--heads"),
        (("--slice", "s1", "--dim", 0), "--dim"),
        (("--slice", "s1", "--seed", -1), "--seed"),
        (("--slice", "s1", "--split_seed", -1), "--split_seed"),
        (("--slice", "s1", "--buffer", -1), "--buffer"),
        (("--slice", "s1", "--crop_um", 0), "--crop_um"),
        (("--slice", "s1", "--n_blocks", 0), "--n_blocks"),
        (("--slice", "s1", "--lr", 0), "--lr"),
    ],
)
def test_bad_flags_are_one_sentence_and_status_2(cortex, tmp_path, capsys, flags, message):
    assert program("--data", cortex, "--runs", tmp_path / "r", *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize(
    ("edit", "message"),
    [(lambda y: np.full_like(y, -1), "no labels"), (lambda y: np.zeros_like(y), "one class")],
)
def test_slides_that_cannot_be_learned(cortex, edit, message):
    slides = gf.load(config(cortex))
    slides[0].labels = edit(slides[0].labels)
    with pytest.raises(DataError, match=message):
        gf.Task(config(cortex), slides)


def test_no_image(cortex, tmp_path, capsys):
    import shutil

    shutil.copytree(cortex / "s1", tmp_path / "d" / "s1")
    for picture in (tmp_path / "d" / "s1" / "spatial").glob("*.png"):
        picture.unlink()
    assert (
        program(
            "--data",
            tmp_path / "d",
            "--slice",
            "s1",
            "--mode",
            "multimodal",
            "--runs",
            tmp_path / "r",
            *SMALL,
        )
        == 2
    )
    assert "has no image" in capsys.readouterr().err


def test_one_slide_where_several_are_needed(cortex, tmp_path, capsys):
    for split in ("slice", "donor"):
        assert (
            program(
                "--data", cortex / "s1", "--split", split, "--train", "s2", "--runs", tmp_path / "r"
            )
            == 2
        )
        assert (
            f"parent folder that holds them, --data {cortex} --slice s1" in capsys.readouterr().err
        )


def test_donor_split_needs_every_patient(cortex):
    """A slide of an unknown patient may be of the scored slide's donor."""
    slides = [data.load_slide(cortex, n) for n in ("s1", "s3")]
    labels = np.concatenate(data.global_labels(slides)[1])
    assert (
        not data.holdout_split(slides, labels, "donor").leaks_position
        and not data.holdout_split(slides, labels, "slice").leaks_position
    )
    for unknown in slides:
        known, unknown.patient = unknown.patient, ""
        assert data.holdout_split(slides, labels, "slice").leaks_position
        with pytest.raises(DataError, match=f"slide {unknown.sample} names no patient"):
            data.holdout_split(slides, labels, "donor")
        unknown.patient = known


def without(root, folder, *columns):
    """Copy of the slices with the named columns of metadata.tsv taken away, from every slice or
    only from those in a (slice, column) pair."""
    import csv
    import shutil

    shutil.copytree(root, folder)
    for path in folder.rglob("metadata.tsv"):
        rows = list(csv.reader(path.open(), delimiter="\t"))
        gone = [
            i
            for i, name in enumerate(rows[0])
            if name in columns or (path.parent.name, name) in columns
        ]
        # R writes a row name without a header
        shift = len(rows[1]) - len(rows[0])
        keep = [
            [c for i, c in enumerate(row) if i - shift * (n > 0) not in gone]
            for n, row in enumerate(rows)
        ]
        path.write_text("".join("\t".join(row) + "\n" for row in keep))
    return folder


def test_donor_split_of_files_without_a_patient(cortex, tmp_path, capsys):
    root = without(cortex, tmp_path / "d", ("s2", "subject"))
    assert data.load_slide(root, "s2").patient == "" and data.load_slide(root, "s1").patient == "A"
    assert (
        program(
            "--data", root, "--slice", "s1", "--split", "donor", "--runs", tmp_path / "r", *SMALL
        )
        == 2
    )
    assert "slide s2 names no patient" in capsys.readouterr().err
    assert (
        program(
            "--data",
            root,
            "--slice",
            "s1",
            "--split",
            "donor",
            "--train",
            "s3",
            "--runs",
            tmp_path / "r",
            *SMALL,
        )
        == 0
    )
    root = without(cortex, tmp_path / "e", "subject")  # nobody is another donor's
    assert (
        program(
            "--data", root, "--slice", "s1", "--split", "donor", "--runs", tmp_path / "r", *SMALL
        )
        == 2
    )
    assert "slide s1 names no patient" in capsys.readouterr().err


def test_own_library_of_slides_with_different_panels(cortex, tmp_path):
    """The scaler is fitted on the values that the network sees: a spot's own library is over all
    genes of its file, not over the genes that the slides share."""
    c = config(cortex, slice="s1", split="slice", train="s2", library="own", scale="train")
    slides = gf.load(c)
    slides[0] = slides[0].select_genes(slides[0].genes[: slides[0].n_genes // 2])
    task = gf.Task(c, slides)
    z = task.z[task.split.train]
    is_clipped = (np.abs(z) > 9.9).any(0)
    np.testing.assert_allclose(z[:, ~is_clipped].mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(z[:, ~is_clipped].std(0, ddof=1), 1, atol=1e-3)


def test_one_library_rule_for_all_slides(cortex, tmp_path, capsys):
    """A training slide without given sizes switches the whole run to own row sums; the record and
    the checkpoint say so."""
    root = without(cortex, tmp_path / "d", ("s2", "sum_umi"))
    slides = [data.load_slide(root, n) for n in ("s1", "s2")]
    assert slides[0].library_size is not None and slides[1].library_size is None
    c = config(root, split="slice", train="s2")
    task, own = gf.Task(c, slides), gf.Task(replace(c, library="own"), slides)
    assert task.library == "own" and np.array_equal(task.x, own.x)
    assert gf.Task(config(root), slides[:1]).library == "given"
    flags = ("--data", root, "--runs", tmp_path / "r", *SMALL)
    assert program("--slice", "s1", "--split", "slice", "--train", "s2", *flags) == 0
    out = capsys.readouterr().out
    assert (
        "library size: own for all slides, s2 came without" in out
        and record_of(out)["library"] == "own"
    )
    assert program("--slice", "s1", *flags) == 0
    out = capsys.readouterr().out
    assert "library size: given" in out and record_of(out)["library"] == "given"
    model = Path(out.strip().splitlines()[-1]).with_name("model.pt")
    assert torch.load(model, weights_only=True)["library"] == "given"
    assert program("--slice", "s2", "--predict", model, *flags[:4]) == 0
    out = capsys.readouterr().out
    assert "library size: own, s2 came without one" in out and record_of(out)["library"] == "own"


def record_of(out):
    """The run record whose path is printed last."""
    return json.loads(Path(out.strip().splitlines()[-1]).read_text())


def test_record_holds_neighbours_reading_time_and_all_inputs(cortex, tmp_path, capsys, monkeypatch):
    import time

    times, load, make = {}, gf.load, run.Run
    monkeypatch.setattr(
        gf, "load", lambda c: (times.update(reading=time.perf_counter()), load(c))[1]
    )
    monkeypatch.setattr(run, "Run", lambda *a: (times.update(start=make(*a).start), make(*a))[1])
    labels = data.load_slide(cortex, "s1")
    found = []
    for name in ("a", "b"):
        (tmp_path / "l.csv").write_text(
            "".join(f"{b},{name}{c}\n" for b, c in zip(labels.barcodes, labels.labels) if c >= 0)
        )
        assert (
            program(
                "--data",
                cortex,
                "--slice",
                "s1",
                "--labels",
                tmp_path / "l.csv",
                "--runs",
                tmp_path,
                *SMALL,
                "--k",
                4,
            )
            == 0
        )
        out = capsys.readouterr().out
        found.append(record_of(out))
    assert (
        found[0]["data_checksum"] != found[1]["data_checksum"] and times["start"] < times["reading"]
    )
    arrays = np.load(Path(out.strip().splitlines()[-1]).with_name("arrays.npz"))
    np.testing.assert_array_equal(arrays["neighbours"], data.knn_table(arrays["xy"], 4))
    assert arrays["attention"].shape == (*arrays["neighbours"].shape[:1], 4, 4)


def test_files_a_run_depends_on(cortex, real_data):
    slide = data.load_slide(cortex, "s1")
    names = [Path(f).name for f in gf.used_files(config(cortex, mode="multimodal"), [slide])]
    assert names == [
        "filtered_feature_bc_matrix.h5",
        "tissue_positions_list.csv",
        "scalefactors_json.json",
        "metadata.tsv",
        "tissue_hires_image.png",
    ]
    assert (
        gf.used_files(config(cortex, mode="embedding", embedding="e/{slice}.npz"), [slide])[-1]
        == "e/s1.npz"
    )
    assert gf.used_files(config(cortex, mode="img_expr", encoder="f.npy"), [slide])[-1] == "f.npy"
    hest = data.load_hest(real_data / "her2st", "A2", counts=False)
    names = input_files([hest, hest], "f/{sample}.npz", ["sets.gmt", ""])
    assert [Path(f).name for f in names] == [
        "A2.h5ad",
        "metadata.csv",
        "A2.h5",
        "A2.npz",
        "sets.gmt",
    ]
    assert [Path(f).suffix for f in gf.used_files(config(cortex, mode="img_expr"), [hest])] == [
        ".h5ad",
        ".csv",
        ".h5",
    ]


def test_variants_of_files_with_one_name_differ():
    a, b = (gf.variant(gf.Config(mode="embedding", embedding=f"{d}/e.npz")) for d in "ab")
    assert a != b and a.startswith("tuned-random-embedding-cross-embedding-e.npz_") and "/" not in a
    assert gf.variant(gf.Config(encoder="x/resnet")) != gf.variant(gf.Config(encoder="y/resnet"))
    assert (
        gf.variant(gf.Config()) == "tuned-random-full-cross"
        and gf.variant(gf.Config(k=18)) == "tuned-random-full-cross-k-18"
    )


def test_two_checkpoints_two_predictions(cortex, checkpoint, tmp_path, capsys):
    flags = ("--data", cortex, "--runs", tmp_path / "r")
    assert program(*flags, "--slice", "s1", "--seed", 1, *SMALL) == 0
    for model in (checkpoint, next((tmp_path / "r").rglob("model.pt"))):
        moved = tmp_path / "model.pt"
        moved.write_bytes(model.read_bytes())
        assert program(*flags, "--slice", "s2", "--predict", moved) == 0
    paths = list((tmp_path / "r").rglob("s2/*/seed0/run.json"))
    assert len(paths) == 2 and all(
        p.parent.parent.name.startswith("predict-tuned-random-full-cross-") for p in paths
    )


def test_predict_counts_classes_that_the_checkpoint_lacks(cortex, checkpoint, tmp_path, capsys):
    model = checkpoint
    slide = data.load_slide(cortex, "s2")
    (tmp_path / "l.csv").write_text(
        "".join(
            f"{b},{'tumour' if i < 30 else slide.classes[c]}\n"
            for i, (b, c) in enumerate(zip(slide.barcodes, slide.labels))
        )
    )
    capsys.readouterr()
    assert (
        program(
            "--data",
            cortex,
            "--slice",
            "s2",
            "--labels",
            tmp_path / "l.csv",
            "--predict",
            model,
            "--runs",
            tmp_path / "r",
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "30 spots are not scored, the checkpoint has no class tumour" in out and record_of(out)[
        "spots_of_absent_classes"
    ] == {"tumour": 30}


def features(path, slide, width, seed=0):
    np.savez(
        path,
        embedding=np.random.default_rng(seed).normal(size=(slide.n_spots, width)),
        barcodes=slide.barcodes,
    )
    return path


@pytest.mark.parametrize(
    ("mode", "flag"), [("embedding", "--embedding"), ("multimodal", "--encoder")]
)
def test_predict_with_vectors_of_the_new_slide(cortex, tmp_path, capsys, mode, flag):
    """--embedding and --encoder of the command override the checkpoint's file, and their width is
    checked."""
    one, two = (data.load_slide(cortex, n, counts=False) for n in ("s1", "s2"))
    trained_on, new, wide = (
        features(tmp_path / "1.npz", one, 8),
        features(tmp_path / "2.npz", two, 8),
        features(tmp_path / "w.npz", two, 9),
    )
    assert (
        program(
            "--data",
            cortex,
            "--slice",
            "s1",
            "--mode",
            mode,
            flag,
            trained_on,
            "--runs",
            tmp_path / "r",
            *(NO_MLP if mode == "embedding" else SMALL),
        )
        == 0
    )
    model = next(tmp_path.rglob("model.pt"))
    flags = ("--data", cortex, "--slice", "s2", "--predict", model, "--runs", tmp_path / "p")
    capsys.readouterr()
    assert program(*flags) == 2 and "1.npz lacks" in capsys.readouterr().err
    assert (
        program(*flags, flag, wide) == 2
        and "width 9" in capsys.readouterr().err
        and not list((tmp_path / "p").rglob("*.json"))
    )
    assert program(*flags, flag, new) == 0
    assert record_of(capsys.readouterr().out)["config"][flag[2:]] == str(new)


def test_predict_uses_this_runs_device_and_needs_the_image_scale(
    cortex, tmp_path, capsys, monkeypatch
):
    flags = ("--data", cortex, "--slice", "s1", "--runs", tmp_path)
    assert (
        program(
            *flags, "--mode", "multimodal", "--device", "cpu", "--cache", tmp_path / "c", *SMALL
        )
        == 0
    )
    model = next(tmp_path.rglob("model.pt"))
    saved = torch.load(model, weights_only=True)
    saved["config"]["device"] = "cuda:77"  # trained on another machine
    torch.save(saved, tmp_path / "elsewhere.pt")
    assert program(*flags, "--predict", tmp_path / "elsewhere.pt", "--cache", tmp_path / "c") == 0
    torch.save(saved | {"image_scale": None}, tmp_path / "lost.pt")
    capsys.readouterr()
    assert program(*flags, "--predict", tmp_path / "lost.pt") == 2
    assert "image_scale" in capsys.readouterr().err
    torch.save({"config": saved["config"]}, tmp_path / "half.pt")
    assert program(*flags, "--predict", tmp_path / "half.pt") == 2
    assert "not a gat_fusion checkpoint" in capsys.readouterr().err


def test_embedding_of_several_slices(cortex, tmp_path):
    for name in ("s1", "s2"):
        features(tmp_path / f"{name}.npz", data.load_slide(cortex, name, counts=False), 8)
    assert (
        program(
            "--data",
            cortex,
            "--slice",
            "s1",
            "--split",
            "slice",
            "--train",
            "s2",
            "--mode",
            "embedding",
            "--embedding",
            tmp_path / "{slice}.npz",
            "--runs",
            tmp_path / "r",
            *NO_MLP,
        )
        == 0
    )


def test_probabilities_are_float64_made_on_the_cpu(graph, monkeypatch):
    """Some devices have no float64: the conversion must follow the move."""
    model = gf.GatFusion("full", 20, 3, dim=16, hidden=16)
    calls = []

    def watched(name, method):
        return lambda self: (calls.append(name), method(self))[1]

    for name in ("cpu", "double"):
        monkeypatch.setattr(torch.Tensor, name, watched(name, getattr(torch.Tensor, name)))
    rows = np.arange(60)
    prob, _ = gf.predict(
        model,
        [
            tiles.Tile(
                rows,
                60,
                graph.with_self.index[:, 1:].numpy(),
                (np.ones((60, 20), np.float32), None),
                "cpu",
                whole=True,
            )
        ],
        60,
        gf.Config(),
    )
    assert prob.dtype == np.float64 and calls[:2] == ["cpu", "double"]


@pytest.mark.parametrize(
    "mode, fusion",
    [
        ("full", "cross"),
        ("gcn_full", "cross"),
        ("full", "gated"),
        ("gcn_only", "cross"),
        ("concat", "cross"),
        ("expr_only", "cross"),
    ],
)
def test_tiles_with_a_halo_say_what_the_whole_slide_says(mode, fusion):
    """A halo of one step less does not: the test can fail."""
    rng = np.random.default_rng(0)
    xy, x, c = (
        rng.random((700, 2)),
        rng.normal(size=(700, 20)).astype(np.float32),
        gf.Config(mode=mode, fusion=fusion),
    )
    table = data.knn_table(xy, 6)
    table[rng.random(table.shape) < 0.1] = -1  # empty places
    table[5] = -1  # a spot alone
    model = gf.build(c, 20, 3, 0)
    whole, parts = (
        list(tiles.make_tiles((x, None), table, [xy[:300], xy[300:]], size, gf.hops(c), "cpu"))
        for size in (0, 100)
    )
    assert (
        len(whole) == 1
        and len(parts) == 8
        and sorted(np.concatenate([t.rows[: t.n_own] for t in parts])) == list(range(700))
    )
    (p, e), (q, f) = (gf.predict(model, t, 700, c) for t in (whole, parts))
    assert abs(p - q).max() < 1e-5 and abs(e["embedding"] - f["embedding"]).max() < 1e-5
    if mode != "expr_only":
        halos = [
            (t.n_own, *data.with_halo(table, t.rows[: t.n_own], gf.hops(c) - 1, np.full(700, -1)))
            for t in parts
        ]
        short = [tiles.Tile(rows, n_own, near, (x, None), "cpu") for n_own, rows, near in halos]
        assert abs(gf.predict(model, short, 700, c)[0] - p).max() > 1e-4


def test_training_on_tiles(cortex, tmp_path):
    """One tile of all spots is the whole slide, bit for bit; several learn as well, and predict
    alike with any tile."""

    small = ("--epochs", 15, "--dim", 16, "--hidden", 16)

    def run_of(*words):
        folder = tmp_path / "-".join(map(str, words))
        assert program("--data", cortex, "--runs", folder, *words) == 0
        (path,) = folder.rglob("run.json")
        return (
            json.loads(path.read_text()),
            np.load(path.with_name("arrays.npz")),
            path.with_name("model.pt"),
        )

    whole, large, tiled = (run_of("--slice", "s1", *small, "--tile", n) for n in (0, 10**6, 150))
    assert all(np.array_equal(whole[1][k], large[1][k]) for k in ("prob", "embedding", "attention"))
    assert (
        tiled[0]["metrics"]["ari"] > 0.5
        and tiled[0]["baselines"]["coords_rbf"] == whole[0]["baselines"]["coords_rbf"]
    )
    probs = [
        run_of("--slice", "s2", "--predict", tiled[2], "--tile", n)[1]["prob"] for n in (0, 90)
    ]
    assert abs(probs[0] - probs[1]).max() < 1e-5


def test_a_large_slide_is_predicted_in_tiles_and_trained_whole(cortex, monkeypatch):
    """On a CPU, above AT_ONCE spots: same predictions, same losses."""
    out, sizes, tile = [], [], tiles.Tile.__init__
    monkeypatch.setattr(
        tiles.Tile,
        "__init__",
        lambda self, rows, n_own, *more, **flags: (
            sizes.append(n_own) or tile(self, rows, n_own, *more, **flags)
        ),
    )
    for most in (20_000, 100):
        monkeypatch.setattr(tiles, "AT_ONCE", most)
        run.seed_everything(0)
        c = config(cortex)
        _, prob, extra, history = gf.train(gf.Task(c, gf.load(c)), torch.device("cpu"))
        out.append((prob, extra["embedding"], history[:, 0]))
    assert max(abs(a - b).max() for a, b in zip(*out)) < 1e-5
    assert sizes[:2] == [out[0][0].shape[0]] * 2 and max(sizes[2:]) <= 100


@pytest.mark.parametrize("mode", ["full", "gcn_full"])
def test_bfloat16_stays_near_float32(graph, mode):
    """Logits with --bf16 within .03 of those without, and not the same; every gradient is
    float32."""
    torch.manual_seed(0)
    model, x, out = gf.GatFusion(mode, 20, 3, dim=16, hidden=16).eval(), torch.randn(60, 20), []
    for bf16 in (False, True):
        with run.autocast(gf.Config(bf16=bf16), "cpu"):
            out.append(model(x, graph)[0])
        out[-1].float().square().sum().backward()
    assert 0 < (out[0] - out[1].float()).abs().max() < 0.03 and all(
        p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None
    )


def test_z_scores_of_several_slides_row_by_row(cortex):
    slides = [data.load_slide(cortex, name) for name in ("s1", "s2")]
    slides[1] = slides[1].select_genes(slides[1].genes[5:])
    c = gf.Config(scale="slice")
    e = data.Expression(200).fit(slides[0].counts, slides[0].genes)
    parts = [gf.scaled_slide(c, e, s, "own") for s in slides]
    want = np.concatenate([e.transform(s.counts, s.genes, own_scale=True) for s in slides])
    rows = np.random.default_rng(0).permutation(len(want))[:50]
    assert np.array_equal(ScaledRows(parts)[rows], want[rows]) and np.array_equal(
        ScaledRows(parts[1:])[:], want[slides[0].n_spots :]
    )


def test_help_is_readable(capsys):
    with pytest.raises(SystemExit) as stop:
        gf.main(["--help"])
    text = capsys.readouterr().out
    assert (
        stop.value.code == 0
        and "neighbours of a spot" in text
        and "(default: 6)" in text
        and "--no-deterministic" in text
    )


# -------------------------------------------------------------------------------------- real slices


def test_real_floor(real_data):
    """Coordinates-only scores of three real slices on the published split (12-slice mean: kNN .922,
    RBF .938)."""
    expected = {"151673": (0.916, 0.938), "151674": (0.892, 0.917), "151510": (0.910, 0.924)}
    for name, (knn, rbf) in expected.items():
        c = gf.Config(data=str(real_data / "dlpfc"), slice=name, mode="coords_knn")
        task = gf.Task(c, gf.load(c))
        test = task.split.test
        found = [
            metrics.clustering(task.labels[test], f(task)[test].argmax(1))["ari"]
            for f in (gf.BASELINES["coords_knn"], gf.BASELINES["coords_rbf"])
        ]
        assert found == pytest.approx([knn, rbf], abs=0.01)


def test_real_slice_trains(real_data):
    """Ten epochs on 151673 are already far above the majority and above a spot's own expression."""
    run.seed_everything(0)
    c = gf.Config(data=str(real_data / "dlpfc"), slice="151673", epochs=12, n_top_genes=1000)
    task = gf.Task(c, gf.load(c))
    prob = gf.train(task, torch.device("cpu"))[1]
    assert (
        metrics.clustering(task.labels[task.split.test], prob[task.split.test].argmax(1))["ari"]
        > 0.6
    )
