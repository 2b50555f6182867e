"""cmrcnet: layers and losses against naive versions, retrieval against brute force, leaks, controls
on simulated slides, processes, bad input."""

import json
import shutil
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cmrcnet as cm
import data
import metrics
from conftest import in_processes, status_of, without_idle_flags
from data import DataError
from evaluation import baselines, hest, retrieval_record, retrieval_task
from plainst import retrieval, simulate
from plainst.features import read_tensors
from plainst.vit_weights import vit_state

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Four simulated slides of three patients (S3 and S4 are sections of P3), genes a function of
    the patch."""
    root = simulate.simulate_hest(
        tmp_path_factory.mktemp("hest") / "sim", n_slides=4, n_spots=60, patch_size=16, n_genes=60
    )
    (root / "metadata.csv").write_text("id,patient\nS1,P1\nS2,P2\nS3,P3\nS4,P3\n")
    return root


@pytest.fixture(autouse=True)
def no_figures(request, monkeypatch):
    """Figures are half the time of a small run: only the end-to-end test draws them."""
    if request.node.name != "test_end_to_end_record_atlas_and_predict":
        for name in ("draw", "draw_genes"):
            monkeypatch.setattr(retrieval_record, name, lambda *args: None)


SMALL = (
    "--epochs",
    "2",
    "--val",
    "none",
    "--dim",
    "32",
    "--snn",
    "64",
    "--n_hvg",
    "20",
    "--batch",
    "16",
    "--k",
    "10",
    "--backbone",
    "features",
    "--markers",
    "none",
    *("--lr", "1e-3", "--scale", "both"),
)


def flags(root, tmp_path, *more):
    """Words of a small run; those of SMALL that do nothing beside `more` are left out."""
    folders = ["--data", root, "--runs", tmp_path / "runs", "--cache", Path(root).parent / "cache"]
    return without_idle_flags(cm, [*folders, *SMALL, *more])


def run_of(capsys):
    """The record whose path was printed last, and its folder."""
    path = Path(capsys.readouterr().out.strip().splitlines()[-1])
    return json.loads(path.read_text()), path.parent


def model_of(dim_in=6, n_genes=9, seed=0, **more):
    torch.manual_seed(seed)
    config = cm.Config(**{"dim": 16, "snn": 64, "backbone": "features", **more})
    return cm.CMRC(config, dim_in, n_genes), config


# ------------------------------------------------------------------------------------------ network


def test_parameters_of_the_released_configuration():
    """69.7 M with G = 3467: 68.9 M that are used, and the released code's unused 1000-way head of
    0.77 M."""
    config = cm.Config(backbone="released")
    with torch.device("meta"):
        model = cm.CMRC(config, 0, 3467)
    table = retrieval_record.parameter_table(model)
    assert table == {
        "vit": 59_103_744,
        "image_head": 263_168,
        "gene_head": 954_112,
        "gene_tokens": 7_102_464,
        "image_tokens": 196_864,
        "cross_attention": 263_168,
        "residual_blocks": 1_052_928,
    }
    total = sum(p.numel() for p in model.parameters())
    assert (
        total == sum(table.values()) == 68_936_448
        and round((total + 768 * 1000 + 1000) / 1e6, 1) == 69.7
    )
    with torch.device("meta"):
        apart = cm.CMRC(cm.Config(backbone="released", share=False), 0, 3467)
    assert retrieval_record.parameter_table(apart)["residual_blocks"] == 2 * 1_052_928


@pytest.mark.parametrize("kind", ["transformers", "hub names", "timm names", "safetensors"])
def test_vit_of_a_checkpoint_equals_transformers(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=192,
            image_size=64,
            patch_size=32,
            layer_norm_eps=1e-6,
        ),
        add_pooling_layer=False,
    ).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2)
    if kind == "safetensors":
        theirs.save_pretrained(tmp_path)
        found = read_tensors(tmp_path / "model.safetensors")
    else:
        found = {k: v.clone() for k, v in theirs.state_dict().items()}
    # as files on the hub name them
    if kind == "hub names":
        found = {
            "vit."
            + k.replace("layers.", "encoder.layer.")
            .replace("o_proj", "output.dense")
            .replace("mlp.fc1", "intermediate.dense")
            .replace("mlp.fc2", "output.dense")
            .replace("q_proj", "attention.query")
            .replace("k_proj", "attention.key")
            .replace("v_proj", "attention.value"): v
            for k, v in found.items()
        } | {"classifier.weight": torch.zeros(2, 48)}
        assert (
            "vit.encoder.layer.0.attention.attention.query.weight" in found
            and "vit.encoder.layer.0.attention.output.dense.bias" in found
        )
    vit = cm.ViT(cm.Size(64, 32, 48, 3, 4)).eval()
    if kind == "timm names":
        state = vit_state(found, vit)
        found = {}
        for k, v in state.items():
            k = (
                k.replace("patch.", "patch_embed.proj.")
                .replace("cls", "cls_token")
                .replace("pos", "pos_embed")
            )
            k = (
                k.replace(".qkv", ".attn.qkv").replace(".proj", ".attn.proj")
                if k.startswith("blocks")
                else k
            )
            found[k.replace("fc1", "mlp.fc1").replace("fc2", "mlp.fc2")] = v
        found |= {"head.weight": torch.zeros(1000, 48)}
    vit.load_state_dict(vit_state(found, vit))
    image = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in cm.IMAGENET)
    with torch.no_grad():
        want = theirs(
            pixel_values=(image.permute(0, 3, 1, 2).float() / 255 - mean) / std
        ).last_hidden_state
        assert (vit(image) - want).abs().max() < 1e-5 * want.abs().max()


def test_a_checkpoint_of_another_depth_is_refused(tmp_path):
    vit = cm.ViT(cm.Size(64, 32, 48, 3, 4))
    with pytest.raises(DataError, match="3 layers.*2 layers"):
        vit_state(vit.state_dict(), cm.ViT(cm.Size(64, 32, 48, 2, 4)))
    (tmp_path / "broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(DataError, match="broken.safetensors"):
        read_tensors(tmp_path / "broken.safetensors")


def test_residual_cross_attention_equals_the_naive_form():
    torch.manual_seed(0)
    block, x, y = (
        cm.ResidualCrossAttention(16, 0.0, heads=4).eval(),
        torch.randn(2, 5, 16),
        torch.randn(2, 3, 16),
    )
    with torch.no_grad():
        got, x = block(x, y), block.block(x)
        for b in range(2):
            q, k = F.relu(block.wq(x[b])), F.relu(block.wk(y[b]))
            v1, v2 = block.w1(q), block.w2(k)
            for head in range(4):
                c = slice(4 * head, 4 * head + 4)
                a = (q[:, c] @ k[:, c].T / 2).softmax(1)
                assert torch.allclose(got[b, :, c], x[b, :, c] + v1[:, c] + a @ v2[:, c], atol=1e-5)


def test_mask_rate_is_the_dropped_fraction_and_touches_r_only(monkeypatch):
    monkeypatch.setattr(cm, "GENE_DROPOUT", 0.0)
    outs = {}
    image, s = torch.randn(8, 6), torch.rand(8, 9)
    for rate in (0.0, 0.9):
        model, _ = model_of(mask_rate=rate, dropout=0.0)
        outs[rate] = model.train()(image, s)
    assert torch.equal(outs[0.0][0], outs[0.9][0]) and torch.equal(outs[0.0][1], outs[0.9][1])
    assert not torch.allclose(outs[0.0][2], outs[0.9][2])
    # in eval mode nothing is masked
    model, _ = model_of(mask_rate=0.9, dropout=0.0)
    assert torch.allclose(model.eval()(image, s)[2], outs[0.0][2], atol=1e-6)
    masked = cm.mask(torch.ones(4000, 5, 16), 0.3)
    assert abs((masked == 0).float().mean() - 0.3) < 0.01
    assert ((masked == 0) | (masked == 1)).all()
    assert torch.equal(cm.mask(image, 0.0), image) and not cm.mask(image, 1.0).any()


def test_head_equals_its_equation():
    torch.manual_seed(0)
    head, x = cm.ProjectionHead(7, 16, 0.5).eval(), torch.randn(5, 7)
    p = x @ head.w1.weight.T + head.w1.bias
    gelu = p * (1 + torch.erf(p / 2**0.5)) / 2
    y = p + gelu @ head.w2.weight.T + head.w2.bias
    want = (y - y.mean(1, keepdim=True)) / (y.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(head(x), want, atol=1e-5)


def test_gene_tokens_equal_their_equation():
    torch.manual_seed(0)
    block, s = cm.GeneTokens(9, 64, 16).eval(), torch.randn(5, 9)
    linear = s @ block.linear.weight.T + block.linear.bias
    want = torch.where(linear > 0, linear, linear.exp() - 1)
    got = block(s)
    assert got.shape == (5, 4, 16)
    for i in range(4):
        assert torch.allclose(got[:, i], want[:, 16 * i : 16 * i + 16], atol=1e-6)
    # mean and variance of what comes in stay
    dropped = block.train().dropout(torch.randn(20000, 10))
    assert abs(dropped.mean()) < 0.01 and abs(dropped.var() - 1) < 0.02


def test_plain_attention_equals_the_fused_one():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 4, requires_grad=True) for n in (5, 7, 7))
    outs = [cm.attention(q, k, v, fast) for fast in (True, False)]
    assert outs[0].shape == (2, 5, 12) and torch.allclose(*outs, atol=1e-6)
    gradients = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in outs]
    for fused, plain in zip(*gradients):
        assert torch.allclose(fused, plain, atol=1e-4)
    want = (q[1, 2] @ k[1, 2].T / 2).softmax(1) @ v[1, 2]
    assert torch.allclose(outs[0][1, :, 8:], want, atol=1e-6)


def test_mask_reconstruction_equals_its_parts():
    model, _ = model_of(share=False)
    part = model.eval().reconstruction
    tokens, s = torch.randn(3, 5, 6), torch.rand(3, 9)
    y = part.genes(s)
    x = part.image(tokens)
    w, b = part.cross.in_proj_weight.chunk(3), part.cross.in_proj_bias.chunk(3)
    q, k, v = (a @ w[i].T + b[i] for i, a in enumerate((x, y, y)))
    heads = [a.unflatten(-1, (4, -1)).transpose(1, 2) for a in (q, k, v)]
    x = part.cross.out_proj(cm.attention(*heads, fast=False))
    for block in part.fusion:
        x = block(x, y)
    assert torch.allclose(part(tokens, s), x.mean(1), atol=1e-5)


def test_both_losses_reach_every_weight():
    model, config = model_of()
    loss = cm.total_loss(config, *model.train()(torch.randn(8, 6), torch.rand(8, 9)))[0]
    loss.backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0
        for n, p in model.named_parameters()
        if "cross.in_proj" not in n
    )
    model, _ = model_of()
    z, _, r = model.train()(torch.randn(8, 6), torch.rand(8, 9))
    cm.reconstruction_error(r, z, "mse").mean().backward()
    assert (
        model.reconstruction.genes.linear.weight.grad.abs().sum() > 0
        and model.image_head.w1.weight.grad.abs().sum() > 0
    )
    assert model.gene_head.w1.weight.grad is None


def test_turns_and_flips_are_the_eight_of_the_square():
    torch.manual_seed(0)
    image = torch.arange(12, dtype=torch.uint8).view(1, 2, 2, 3).expand(400, -1, -1, -1)
    out = {bytes(p.numpy().tobytes()) for p in retrieval_task.random_flip_rotate(image)}
    want = {
        np.rot90(p, n).copy().tobytes()
        for n in range(4)
        for p in (image[0].numpy(), image[0].flip(0).numpy())
    }
    assert out == want and len(want) == 8


# ------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("tau, norm_sim", [(1.0, False), (0.5, False), (0.1, True)])
def test_contrastive_loss_equals_its_definition(tau, norm_sim):
    rng = np.random.default_rng(0)
    z, h = rng.normal(size=(2, 6, 8))
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) if norm_sim else v for v in (z, h))

    def softmax(x):
        e = np.exp(x - x.max())
        return e / e.sum()

    s, inner = b @ a.T / tau, (a @ a.T + b @ b.T) / 2 * (1 / tau if norm_sim else tau)
    t = np.array([softmax(row) for row in inner])
    want = [
        (-(t[i] * np.log(softmax(s[i]))).sum() - (t[:, i] * np.log(softmax(s[:, i]))).sum()) / 2
        for i in range(6)
    ]
    got = cm.contrastive(torch.tensor(z), torch.tensor(h), tau, norm_sim)
    assert np.allclose(got, want) and np.allclose(t.sum(1), 1)


def test_reconstruction_error_equals_its_definition():
    rng = np.random.default_rng(0)
    r, z = rng.normal(size=(2, 6, 8))
    pair = torch.tensor(r), torch.tensor(z)
    assert np.allclose(cm.reconstruction_error(*pair, "mse"), ((r - z) ** 2).mean(1))
    cosine = (r * z).sum(1) / np.linalg.norm(r, axis=1) / np.linalg.norm(z, axis=1)
    assert np.allclose(cm.reconstruction_error(*pair, "cosine"), 1 - cosine)


def test_total_loss_is_the_sum_of_the_logs():
    torch.manual_seed(0)
    z, h, r = torch.randn(3, 8, 16)
    config = cm.Config(tau=0.5)
    pair, error = cm.contrastive(z, h, 0.5), (r - z).square().mean()
    loss, parts = cm.total_loss(config, z, h, r)
    assert torch.allclose(loss, (1 + pair).log().mean() + (1 + error).log())
    assert torch.allclose(parts, torch.stack([loss, pair.mean(), error]))
    alone = cm.total_loss(config, z, h)[0]
    assert torch.allclose(alone, (1 + pair).log().mean()) and alone < loss


def test_released_targets_are_one_hot_so_that_the_loss_is_plain_cross_entropy():
    torch.manual_seed(0)
    z, h = (F.layer_norm(torch.randn(32, 256), (256,)) for _ in range(2))
    s = h @ z.T
    want = (
        F.cross_entropy(s, torch.arange(32), reduction="none")
        + F.cross_entropy(s.T, torch.arange(32), reduction="none")
    ) / 2
    assert torch.allclose(cm.contrastive(z, h), want, rtol=1e-4) and want.mean() > 20
    # alike, as the spots of one tissue are
    near = F.layer_norm(z[:1] + 0.3 * torch.randn(32, 256), (256,))
    smooth = cm.contrastive(near, near, 0.1, norm_sim=True)
    assert smooth.mean() > 1 and cm.contrastive(near, near).mean() < 0.1
    # no information: log(batch)
    assert abs(cm.contrastive(torch.ones(32, 8), torch.ones(32, 8)).mean() - np.log(32)) < 1e-5


def test_pairs_are_learned_and_retrieved():
    torch.manual_seed(0)
    latent = torch.randn(256, 5)
    image, s = latent @ torch.randn(5, 6), latent @ torch.randn(5, 9)
    model, config = model_of()
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = cm.total_loss(config, *model.train()(image, s))[0]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    z = retrieval_task.embed(model.embed_image, image, config, "cpu")
    h = retrieval_task.embed(model.embed_genes, s, config, "cpu")
    index = retrieval.exact_topk(z, h, 5)[1]
    assert (
        losses[-1] < losses[0] / 2
        and (index == torch.arange(256)[:, None]).any(1).float().mean() > 0.9
    )


def test_warning_when_the_loss_is_that_of_guessing(capsys):
    retrieval_task.warn_when_guessing([(0, 9.0, 0, 0), (0, 4.1, 0, 0)], 64)
    assert "random guessing has log(64) = 4.16" in capsys.readouterr().out
    retrieval_task.warn_when_guessing([(0, 2.0, 0, 0)], 64)
    assert not capsys.readouterr().out


# ---------------------------------------------------------------------------------------- retrieval


def test_exact_search_equals_brute_force_in_any_tiles():
    torch.manual_seed(0)
    q, m = torch.randn(37, 8), torch.randn(210, 8)
    want = (F.normalize(q, dim=1) @ F.normalize(m, dim=1).T).sort(1, descending=True)
    for tile in (1, 210 * 5, 1 << 26):
        value, index = retrieval.exact_topk(q, m, 7, tile)
        assert torch.equal(index, want.indices[:, :7]) and torch.allclose(value, want.values[:, :7])


def test_inverted_file_with_all_lists_is_exact_and_with_few_is_near():
    torch.manual_seed(0)
    keys = torch.randn(12, 16).repeat(150, 1) + 0.3 * torch.randn(1800, 16)
    q = keys[::7] + 0.1 * torch.randn(258, 16)
    value, index = retrieval.exact_topk(q, keys, 10)
    ivf = retrieval.InvertedFile(keys, 40)
    assert sorted(ivf.order.tolist()) == list(range(1800)) and ivf.first[-1] == 1800
    all_values, all_index = ivf.topk(q, 10, 40, step=100)
    assert (
        torch.allclose(all_values, value, atol=1e-5)
        and metrics.recall_at_k(all_index.numpy(), index.numpy()) > 0.999
    )
    assert metrics.recall_at_k(ivf.topk(q, 10, 8)[1].numpy(), index.numpy()) > 0.9
    # what is foretold is what a search finds
    curve = ivf.recall_by_probe(q, 10)
    for probe in (1, 3, 8):
        measured = metrics.recall_at_k(ivf.topk(q, 10, probe)[1].numpy(), index.numpy())
        assert abs(curve[probe - 1] - measured) < 1e-4
    assert curve[-1] == 1
    # a list has fewer than k keys: the rest is marked
    few = retrieval.InvertedFile(keys[:30], 15).topk(q[:4], 10, 1)
    assert (few[1] == -1).any() and (few[0][few[1] == -1] == float("-inf")).all()
    assert np.isfinite(retrieval.read_out(*few, np.ones((30, 2), "f"))).all()


@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_inverted_file_reads_as_many_lists_as_a_recall_takes(spread):
    """Tight clusters and none at all: the stated recall is met on queries that did not choose."""
    torch.manual_seed(0)
    keys = torch.randn(40, 24).repeat(100, 1) + spread * torch.randn(4000, 24)
    queries = keys[torch.randperm(4000)[:1500]] + 0.1 * torch.randn(1500, 24)
    index = retrieval.InvertedFile(keys)
    exact, probes = retrieval.exact_topk(queries, keys, 50)[1].numpy(), []
    for recall in (0.5, 0.95, 1.0):
        probe, promised = index.probe_for(queries, 50, recall)
        measured = metrics.recall_at_k(index.topk(queries, 50, probe)[1].numpy(), exact)
        assert promised >= recall - 1e-6 and measured > recall - 0.015
        assert index.recall_by_probe(queries, 50)[max(probe - 2, 0)] < recall + 0.015 or probe == 1
        probes.append(probe)
    assert probes[0] < probes[1] <= probes[2] <= len(index.centre)
    config = cm.Config(k=50, index="ivf", recall=0.95)
    rows, recall = retrieval.search(queries, keys, config)[1:]
    assert abs(recall - metrics.recall_at_k(rows.numpy(), exact)) < 0.015 and recall > 0.935


def test_read_out_is_the_mean_of_the_neighbours():
    rng = np.random.default_rng(0)
    values, index, sim = (
        rng.random((30, 4)).astype("f"),
        rng.integers(0, 30, (5, 3)),
        rng.random((5, 3)).astype("f"),
    )
    i, s = torch.from_numpy(index), torch.from_numpy(sim)
    assert np.allclose(retrieval.read_out(s, i, values), values[index].mean(1), atol=1e-6)
    assert np.allclose(
        retrieval.read_out(s, i, sp.csr_matrix(values)), values[index].mean(1), atol=1e-6
    )
    w = np.exp(sim / 0.05) / np.exp(sim / 0.05).sum(1, keepdims=True)
    assert np.allclose(
        retrieval.read_out(s, i, values, "softmax"),
        (values[index] * w[..., None]).sum(1),
        atol=1e-5,
    )
    i[0, 1] = -1
    assert np.allclose(
        retrieval.read_out(s, i, values)[0], values[index[0, [0, 2]]].mean(0), atol=1e-6
    )
    key = torch.randn(30, 8)
    assert np.allclose(retrieval.read_out(*retrieval.exact_topk(key, key, 1), values), values)


@pytest.mark.parametrize("weighting", ["mean", "softmax"])
def test_plain_retrieval_equals_the_fast_one(weighting):
    torch.manual_seed(0)
    z, keys, values = torch.randn(11, 8), torch.randn(60, 8), np.random.rand(60, 3).astype("f")
    config = cm.Config(k=7, weighting=weighting)
    fast, rows, _ = cm.retrieve(z, keys, values, config)
    config.fast = False
    plain, plain_rows, _ = cm.retrieve(z, keys, values, config)
    assert torch.equal(rows, plain_rows) and np.allclose(fast, plain, atol=1e-5)
    if weighting == "mean":
        cosine = F.cosine_similarity(z[:, None], keys[None], dim=2)
        nearest = cosine.argsort(1, descending=True)[:, :7]
        assert np.allclose(fast, values[nearest].mean(1), atol=1e-5)


# --------------------------------------------------------------------------------------------- data


def config_of(task, *more, **values):
    flags = {"data": str(task), "cache": str(task.parent / "cache"), "n_hvg": 20, "k": 10}
    flags |= {"dim": 32, "snn": 64, "val": "groups", "scale": "both"}
    return cm.Config(**flags | values)


def load(config, train, test):
    """The task of a run with these slides."""
    sides = retrieval_task.Sides(None, train, test, "part", False)
    return retrieval_task.Task(config, sides, cm.VITS, torch.device("cpu"))


def test_gene_lists_and_inputs_come_from_training_slides_unless_oracle(task, monkeypatch):
    want = load(config_of(task), ["S1", "S2"], ["S3"])
    real = data.load_hest

    def poisoned(root, name, **kw):
        slide = real(root, name, **kw)
        if name == "S3":
            slide.counts = sp.csr_matrix(slide.counts.toarray()[:, ::-1] * 7)
        return slide

    monkeypatch.setattr(hest, "load_hest", poisoned)
    got = load(config_of(task), ["S1", "S2"], ["S3"])
    assert (
        got.whole.inputs.genes == want.whole.inputs.genes
        and got.lists == want.lists
        and got.genes == want.genes
        and np.array_equal(got.whole.spots.y, want.whole.spots.y)
    )
    scaler = want.whole.inputs.scaler
    assert all(torch.equal(v, got.whole.inputs.scaler[k]) for k, v in scaler.items())
    oracle = load(config_of(task, oracle_genes=True), ["S1", "S2"], ["S3"])
    assert oracle.lists["S3"]["heg"] != want.lists["S3"]["heg"]
    mean = data.normalise_log1p(poisoned(task, "S3").counts).toarray().mean(0)
    assert oracle.lists["S3"]["heg"][0] == poisoned(task, "S3").genes[mean.argmax()]


def test_inner_folds_fit_on_their_own_spots(task, monkeypatch):
    """Values of a held-out slide reach neither scales nor genes nor targets of its fold."""
    config = config_of(task, n_hvg=12, genes="15")
    want = load(config, ["S1", "S2", "S3"], ["S4"]).folds()
    real = data.load_hest

    def poisoned(root, name, **kw):
        slide = real(root, name, **kw)
        if name == "S1":
            slide.counts = sp.csr_matrix(slide.counts.toarray()[:, ::-1] * 7)
        return slide

    monkeypatch.setattr(hest, "load_hest", poisoned)
    features = hest.slide_features
    monkeypatch.setattr(
        hest, "slide_features", lambda c, s: features(c, s) * (5 if s.sample == "S1" else 1)
    )
    got = load(config, ["S1", "S2", "S3"], ["S4"]).folds()
    assert [s.name for s in got[0].held_out] == ["S1"]
    assert got[0].inputs.genes == want[0].inputs.genes
    assert torch.equal(got[0].spots.expression, want[0].spots.expression)
    assert torch.equal(got[0].inputs.scaler["frozen_mean"], want[0].inputs.scaler["frozen_mean"])
    assert np.array_equal(got[0].spots.y, want[0].spots.y)
    # another fold fits on S1
    assert got[1].inputs.genes != want[1].inputs.genes


def test_control_probes_are_no_genes():
    slides = [
        data.Slide(
            sp.csr_matrix((3, 4)),
            np.array(["B", "NegControlProbe_1", "A", "BLANK_0001"]),
            np.arange(3).astype(str),
            np.zeros((3, 2)),
        )
    ]
    assert hest.shared_genes(slides) == ["A", "B"]


def test_scaler_sees_scored_training_spots_and_scales_each_view(task):
    config = config_of(task, gene_scale="slide")
    loaded = load(config, ["S1", "S2"], ["S3"])
    features = torch.cat([s.features[s.scored] for s in loaded.train_samples])
    inputs = loaded.whole.inputs
    assert torch.allclose(inputs.scaler["frozen_mean"], features.mean(0), atol=1e-4)
    x, half = inputs.image(loaded.test[0], config), features.shape[1]
    assert x.shape[1] == 2 * half
    assert torch.allclose(x[:, half:].mean(0), torch.zeros(half), atol=1e-4)
    first = loaded.train_samples[0]
    expression = inputs.expression(first, config)[first.scored]
    assert torch.allclose(expression.mean(0), torch.zeros(len(inputs.genes)), atol=0.2)


def test_inner_folds_leave_patients_then_slides_then_tiles(task):
    config = config_of(task)
    task = load(config, ["S1", "S2", "S3", "S4"], ["S4"])

    def folds(*names):
        task.train_samples = [s for s in samples if s.name in names]
        return [(f.spots.names, [s.name for s in f.held_out]) for f in task.folds()]

    samples = task.train_samples
    assert folds("S1", "S2", "S3", "S4") == [
        (["S2", "S3", "S4"], ["S1"]),
        (["S1", "S3", "S4"], ["S2"]),
        (["S1", "S2"], ["S3", "S4"]),
    ]
    assert folds("S3", "S4") == [(["S4"], ["S3"]), (["S3"], ["S4"])]
    task.train_samples = samples[:1]
    for fold in task.folds():
        is_fit = np.isin(np.arange(60), fold.spots.row)
        (held_out,) = fold.held_out
        assert not (is_fit & held_out.scored).any() and (is_fit | held_out.scored).all()
    config.val, task.train_samples = "random", samples
    (fold,) = task.folds()
    n_held_out = sum(s.scored.sum() for s in fold.held_out)
    assert len(fold.spots) + n_held_out == 240 and 30 < n_held_out < 66


@pytest.mark.parametrize("n_slides", [1, 2, 3])
def test_one_fold_is_a_fold(task, n_slides):
    """--folds 1: two groups at least, where there are groups; one set of tiles on an only slide."""
    names = ["S1", "S2", "S3"][:n_slides]
    folds = load(config_of(task, folds=1), names, ["S4"]).folds()
    assert len(folds) == (1 if n_slides == 1 else 2)
    assert all(len(f.spots) and f.held_out for f in folds)


def test_unmeasured_target_stands_at_the_mean_of_the_other_slides(task):
    loaded = load(config_of(task), ["S1", "S2"], ["S3"])
    first, second = loaded.train_samples
    first.measured[3], first.y[:, 3] = False, 0
    spots = retrieval_task.Spots([first, second], loaded.whole.inputs, loaded.config)
    assert np.allclose(spots.y[spots.slide == 0, 3], second.y[:, 3].mean(), atol=1e-5)


def test_ridge_is_the_benchmarks_formula():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(80, 12)) + 2, rng.normal(size=(80, 4)) + 5
    want = x @ np.linalg.solve(x.T @ x + 100 / 48 * np.eye(12), x.T @ y)
    assert np.allclose(baselines.official_ridge(x, y).predict(x), want, atol=1e-2)


def test_slide_accuracy():
    rng = np.random.default_rng(0)
    z, slide = rng.normal(size=(300, 8)), np.repeat([0, 1, 2], 100)
    assert (
        abs(hest.slide_accuracy(z, slide) - 1 / 3) < 0.12
        and hest.slide_accuracy(z + 5 * np.eye(8)[slide], slide) > 0.95
    )
    assert np.isnan(hest.slide_accuracy(z, slide * 0))


# --------------------------------------------------------------------------------------- end to end


def test_end_to_end_record_atlas_and_predict(task, tmp_path, capsys):
    cm.main(flags(task, tmp_path, "--fold", "0", "--val", "groups"))
    record, folder = run_of(capsys)
    assert folder == tmp_path / "runs" / "cmrcnet" / "sim" / "fold0" / folder.parent.name / "seed0"
    names = {
        "train_mean",
        "ridge_pca256",
        "ridge_raw",
        "ridge_scaled",
        "knn",
        "knn_scaled",
        "image_only",
        "contrastive_only",
    }
    assert (
        set(record["baselines"]) == names
        and not record["leaks_patient"]
        and record["gene_lists"] == "training slides"
        and record["target"] == "cp10k"
    )
    keys = {
        "pcc_mean",
        "pcc_pooled",
        "pcc_heg",
        "pcc_hvg",
        "pcc_marker",
        "gene_gene_pearson",
        "variance_ratio_median",
        "rmse",
        "rate_pcc",
    }
    assert all(
        keys <= set(s) | {"gene_gene_pearson"}
        for s in [record["metrics"], *record["baselines"].values()]
    )
    assert keys | {
        "slide_accuracy_image",
        "contrastive",
        "contrastive_guess",
        "ceiling_pcc",
        "val_pcc",
    } <= set(record["metrics"])
    assert (
        abs(record["metrics"]["contrastive_guess"] - np.log(16)) < 1e-6
        and record["baselines"]["train_mean"]["pcc_mean"] == 0
    )
    arrays = np.load(folder / "arrays.npz")
    n = 50
    want = metrics.pcc_summary(arrays["true"][:, :n], arrays["pred"][:, :n], arrays["slide"])[
        "pcc_mean"
    ]
    assert abs(want - record["metrics"]["pcc_mean"]) < 1e-5
    assert {f.name for f in folder.iterdir()} >= {
        "genes.png",
        "gene_gene.png",
        "training.png",
        "model.pt",
        "atlas.h5",
        "latest.pt",
    } - {"latest.pt"}

    # --predict reads the same values from the atlas, on the HEST folder and on a bare folder of
    # patches; and any gene of the training slides
    test = str(arrays["slide"][0])
    more = [
        "--slice",
        test,
        "--predict",
        str(folder / "model.pt"),
        "--k",
        "10",
        "--cache",
        str(tmp_path / "c"),
    ]
    for i, root in enumerate((task, task / "patches")):
        cm.main(["--data", str(root), "--runs", str(tmp_path / f"p{i}"), *more])
        _, where = run_of(capsys)
        got = np.load(where / "arrays.npz")
        row = {b: j for j, b in enumerate(got["barcodes"])}
        here = arrays["slide"] == test
        assert (
            np.abs(
                got["pred"][[row[b] for b in arrays["barcodes"][here]]] - arrays["pred"][here]
            ).max()
            < 1e-4
        )
    cm.main(["--data", str(task), "--runs", str(tmp_path / "all"), "--genes", "all", *more])
    every = np.load(run_of(capsys)[1] / "arrays.npz")
    assert (
        set(every["genes"]) == set(data.load_hest(task, test).genes)
        and every["pred"].shape[1] == 60
    )
    (tmp_path / "two.json").write_text(json.dumps(every["genes"][[5, 2]].tolist()))
    cm.main(
        [
            "--data",
            str(task),
            "--runs",
            str(tmp_path / "two"),
            "--genes",
            str(tmp_path / "two.json"),
            "--index",
            "ivf",
            "--recall",
            "1",
            *more,
        ]
    )
    two = np.load(run_of(capsys)[1] / "arrays.npz")
    assert np.allclose(two["pred"], every["pred"][:, [5, 2]], atol=1e-5)


def test_curve_of_k_is_that_of_runs_with_other_k(task):
    """One model, several k: the same as retrieving with each of them."""
    loaded = load(config_of(task), ["S1", "S2"], ["S3"])
    model = cm.build(loaded.config, loaded.whole)
    keys, queries = loaded.whole.keys(model), loaded.whole.queries(model, loaded.test)
    values = loaded.whole.spots.values
    curve = retrieval_record.pcc_by_k(loaded, cm.predict(queries, keys, values, loaded.config))
    assert list(curve) == [10, 20, 50, 100]  # of 120 keys
    for k in (20, 100):
        again = cm.predict(queries, keys, values, config_of(task, k=k)).expression
        assert abs(loaded.score(again)["pcc_mean"] - curve[k]) < 1e-5


@pytest.mark.parametrize(
    "more",
    [
        ("--reconstruct", "genes"),
        ("--schedule", "two-stage", "--epochs", "4"),
        ("--batches", "slide", "--values", "slide"),
        ("--norm_sim", "--tau", "0.1", "--index", "ivf"),
    ],
)
def test_options_run_and_are_predicted_with(task, tmp_path, capsys, more):
    cm.main(flags(task, tmp_path, "--fold", "0", *more))
    record, folder = run_of(capsys)
    assert np.isfinite(record["metrics"]["pcc_mean"])
    with np.load(folder / "arrays.npz") as arrays:
        trained = {name: arrays[name] for name in ("barcodes", "pred", "slide")}
    if "two-stage" in more:
        assert [row[2] > 0 for row in record["history"]] == [False, False, True, True]
    test = str(trained["slide"][0])
    words = ["--data", task, "--slice", test, "--predict", folder / "model.pt", "--k", "10"]
    words += ["--runs", tmp_path / "p", "--cache", task.parent / "cache"]
    cm.main([str(word) for word in words])
    with np.load(run_of(capsys)[1] / "arrays.npz") as arrays:
        if "ivf" not in more:
            is_test = trained["slide"] == test
            assert np.allclose(arrays["pred"], trained["pred"][is_test], atol=1e-3)


def test_reconstruction_of_genes_changes_places():
    """Gene tokens are masked and asked for; the image is key and value; the target is h."""
    model, config = model_of(reconstruct="genes", dropout=0.0)
    part = model.eval().reconstruction
    tokens, s = torch.randn(3, 5, 6), torch.rand(3, 9)
    x, y = part.genes(s), part.image(tokens)
    x = part.cross(x, y, y)[0]
    for block in part.fusion:
        x = block(x, y)
    assert torch.allclose(part(tokens, s), x.mean(1), atol=1e-5)
    z, h, r = torch.randn(3, 8, 16)
    error = cm.total_loss(config, z, h, r)[1][2]
    assert torch.allclose(error, (r - h).square().mean())


def test_batches_of_one_slide_hold_one_slide(task):
    config = config_of(task, batches="slide", batch=16)
    fold = load(config, ["S1", "S2", "S3"], ["S4"]).whole
    fold.spots.features = torch.arange(180.0)[:, None]
    torch.manual_seed(0)
    rows = [image[:, 0].long() for image, _ in fold.batches()]
    slides = [set(fold.spots.slide[part].tolist()) for part in rows]
    assert len(rows) == 9 and all(len(part) == 16 for part in rows)
    assert all(len(found) == 1 for found in slides)
    # slides in random order, no spot twice
    assert [next(iter(found)) for found in slides] != sorted(next(iter(f)) for f in slides)
    assert len(torch.cat(rows).unique()) == 144


def test_values_scaled_by_slide():
    rng = np.random.default_rng(0)
    y, slide = rng.random((50, 3)) * [1, 5, 9] + 2, np.repeat([0, 1], [20, 30])
    y[20:] += 7
    out = retrieval_task.scaled_by_slide(y, slide)
    for number in (0, 1):
        own, before = out[slide == number], y[slide == number]
        assert np.allclose(own.mean(0), y.mean(0), atol=1e-4)
        assert np.allclose(own.std(0), y.std(0), rtol=1e-3)
        assert np.allclose(metrics.pcc(own, before), 1)


@pytest.mark.parametrize("preset", list(cm.PRESETS))
def test_no_device_chooses_the_model(preset, monkeypatch):
    """The same widths and backbone with a GPU and without one."""
    tables = []
    for has_gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        config = cm.run.parse(cm.Config, ["--preset", preset])
        with torch.device("meta"):
            tables.append(retrieval_record.parameter_table(cm.CMRC(config, 42, 100)))
    assert tables[0] == tables[1]


def test_bfloat16_products_stay_near_float32(task, tmp_path, capsys):
    found = []
    for more in ([], ["--bf16"]):
        cm.main(flags(task, tmp_path, *more))
        record, folder = run_of(capsys)
        found.append(
            (
                record["history"][-1][0],
                np.load(folder / "arrays.npz")["embedding"],
                folder.parent.name,
            )
        )
    (loss, z, name), (loss_near, z_near, name_near) = found
    assert (
        "bf16" not in name and "bf16-True" in name_near and 0 < abs(loss_near - loss) < 0.02 * loss
    )
    # channels of a LayerNorm: their standard deviation is about 1
    assert z_near.dtype == np.float32 and 0 < np.abs(z_near - z).mean() < 0.03


def test_resume_gives_the_same_weights(task, tmp_path, capsys):
    more = ("--fold", "0", "--save_every", "1", "--val", "groups", "--folds", "2", "--epochs", "3")
    calls = []

    def stop(*a, save=cm.run.write_atomically, **k):
        save(*a, **k)
        calls.append(1)
        if len(calls) == 5:  # in the second fold
            raise KeyboardInterrupt

    cm.main(flags(task, tmp_path / "once", *more))
    once = torch.load(run_of(capsys)[1] / "model.pt", weights_only=True)["weights"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cm.run, "write_atomically", stop)
        cm.main(flags(task, tmp_path / "again", *more))
    cm.main(flags(task, tmp_path / "again", *more, "--resume"))
    again = torch.load(run_of(capsys)[1] / "model.pt", weights_only=True)["weights"]
    assert all(torch.equal(v, again[k]) for k, v in once.items())
    latest = next((tmp_path / "again").rglob("latest.pt"))
    with pytest.raises(DataError, match="other flags"):
        resume_elsewhere(task, tmp_path, latest, more)
    # its record would stop a run on other data before the checkpoint does
    next((tmp_path / "again").rglob("run.json")).unlink()
    read = []
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(DataError, match="other files, slides or genes"),
    ):
        patch.setattr(
            cm.run, "file_checksum", lambda *paths: read.extend(paths) or "of slides that changed"
        )
        cm.main(flags(task, tmp_path / "again", *more, "--resume"))
    # every slide's counts and pictures
    read = {Path(f).resolve() for f in read}
    assert read >= {
        f.resolve()
        for folder in ("adata", "patches")
        for f in (task / folder).iterdir()
        if f.stem in {g.stem for g in read}
    }
    assert {f.parent.name for f in read} >= {"adata", "patches"} and len({f.stem for f in read}) > 2
    latest.write_bytes(latest.read_bytes()[:5000])  # an interrupted copy
    with pytest.raises(DataError, match="not a whole cmrcnet checkpoint"):
        cm.main(flags(task, tmp_path / "again", *more, "--resume"))


def resume_elsewhere(task, tmp_path, latest, more):
    """Resume a run of other flags from a latest.pt that was put into its folder."""
    words = flags(task, tmp_path / "other", *more, "--k", "9")
    name = retrieval_task.variant(cm.run.parse(cm.Config, words))
    folder = tmp_path / "other" / "runs" / "cmrcnet" / "sim" / "fold0" / name / "seed0"
    folder.mkdir(parents=True)
    shutil.copy(latest, folder)
    cm.main([*words, "--resume"])


def test_split_by_sample_says_that_it_leaks_the_patient(task, tmp_path, capsys):
    for split, leaks, train in (("sample", True, ["S1", "S2", "S4"]), ("section", True, ["S4"])):
        cm.main(
            flags(task, tmp_path, "--split", split, "--slice", "S3", "--reconstruction", "none")
        )
        record, folder = run_of(capsys)
        assert (
            record["leaks_patient"] is leaks
            and record["train_slides"] == train
            and folder.parent.name.startswith(f"paper-{split}")
        )
    cm.main(
        flags(task, tmp_path, "--split", "patient", "--patient", "P3", "--reconstruction", "none")
    )
    assert run_of(capsys)[0]["leaks_patient"] is False


def test_tiny_vit_end_to_end(task, tmp_path, capsys):
    cm.main(
        [
            *flags(
                task,
                tmp_path,
                "--epochs",
                "1",
                "--split",
                "section",
                "--slice",
                "S4",
                "--backbone",
                "tiny",
            ),
        ]
    )
    record, folder = run_of(capsys)
    assert record["parameters"]["vit"] > 1e6 and "ridge_scaled" not in record["baselines"]
    smaller = record["smaller_than_released"]
    assert set(smaller) == {"backbone", "dim", "snn", "n_hvg", "epochs"}
    assert smaller["backbone"].startswith("a ViT of 4 layers, 192 wide, 50 tokens")
    cm.main(
        [
            "--data",
            str(task),
            "--slice",
            "S1",
            "--predict",
            str(folder / "model.pt"),
            "--k",
            "5",
            "--runs",
            str(tmp_path / "p"),
            "--cache",
            str(tmp_path / "c"),
        ]
    )


def test_simulated_link_is_found_and_shuffled_pairs_are_not(tmp_path_factory, tmp_path, capsys):
    """The known link: at least .8 of the noise ceiling. Shuffled pairs: about 0 on average. One
    draw is not 0: three latent variables rule all genes, so that a chance relation moves all of
    them at once."""
    root = simulate.simulate_hest(
        tmp_path_factory.mktemp("link") / "sim", n_slides=3, n_spots=150, patch_size=16, n_genes=60
    )
    more = ("--fold", "0", "--n_hvg", "60", "--k", "10", "--reconstruction", "none")
    cm.main(flags(root, tmp_path, *more, "--epochs", "25"))
    found = run_of(capsys)[0]["metrics"]
    assert found["pcc_mean"] > 0.8 * found["ceiling_pcc"] > 0.3
    shuffled = []
    for seed in range(4):
        cm.main(
            flags(root, tmp_path, *more, "--epochs", "4", "--shuffle_pairs", "--seed", str(seed))
        )
        shuffled.append(run_of(capsys)[0]["metrics"]["pcc_mean"])
    assert abs(np.mean(shuffled)) < 0.2 and max(shuffled) < found["pcc_mean"] - 0.1


def test_shuffling_keeps_images_and_breaks_pairs():
    slide = data.Slide(None, None, np.arange(10).astype(str), np.zeros((10, 2)))
    samples = []
    for i in range(3):
        samples.append(retrieval_task.Sample(slide, torch.arange(10 * i, 10 * i + 10.0)[:, None]))
    retrieval_task.shuffle_pairs(samples, 0)
    after = torch.cat([s.features for s in samples]).flatten()
    assert sorted(after.tolist()) == list(range(30)) and (after == torch.arange(30.0)).sum() < 6
    # over slides, or the slides' means would stay paired
    assert (after[:10] >= 10).any()


def test_two_processes_have_the_loss_curve_of_one(task, tmp_path):
    """Without dropout and masks, of which every process has its own; and one line is printed
    once."""
    curves = []
    script = tmp_path / "ddp.py"
    script.write_text(
        "import cmrcnet\nfrom evaluation import retrieval_record\n"
        "retrieval_record.draw = lambda *a: None\n"
        "cmrcnet.GENE_DROPOUT = 0.0\ncmrcnet.run.cli(cmrcnet.main)\n"
    )
    more = ("--fold", "0", "--epochs", "4", "--dropout", "0", "--mask_rate", "0")
    runs = [(n, flags(task, tmp_path / str(n), *more)) for n in (1, 2)]
    printed = in_processes("cmrcnet", script, runs)
    assert len(printed[0].splitlines()) == len(printed[1].splitlines()) > 8
    for n, _ in runs:
        path = next((tmp_path / str(n)).rglob("run.json"))
        record = json.loads(path.read_text())
        assert record["processes"] == n
        curves.append(np.array([h[:3] for h in record["history"]]))
    assert np.abs(curves[0] - curves[1]).max() < 1e-4 and curves[0][-1, 0] < curves[0][0, 0]


def test_real_slides(real_data, tmp_path, capsys):
    """A section of patient C from its others, features of every eighth pixel."""
    for name in ("C2", "C3", "C4", "C5"):
        slide = data.load_hest(real_data / "her2st", name)
        np.savez(
            tmp_path / f"{name}.npz",
            embedding=data.handmade_descriptor(slide.patches[:][:, ::8, ::8]),
            barcodes=slide.barcodes,
        )
    cm.main(
        [
            "--data",
            str(real_data / "her2st"),
            "--split",
            "section",
            "--slice",
            "C2",
            "--runs",
            str(tmp_path),
            "--val",
            "none",
            "--epochs",
            "6",
            "--reconstruction",
            "none",
            "--dim",
            "64",
            "--backbone",
            "features",
            *("--preset", "tuned"),
            "--encoder",
            str(tmp_path / "{sample}.npz"),
        ]
    )
    record, _ = run_of(capsys)
    assert (
        record["metrics"]["pcc_mean"] > 0.2
        and record["n_markers"] > 8
        and record["low_count_spots"]["C2"] == 2
    )


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "more, told",
    [
        (("--k", "500"), "fewer than --k 500"),
        (("--batch", "1"), "--batch is 1"),
        (("--mask_rate", "1.5"), "--mask_rate"),
        (("--snn", "48"), "dim snn"),
        (("--weights", "x.pt"), "--backbone base"),
        (("--fold", "9"), "9"),
        (("--genes", "none.json"), "none.json"),
        (("--min_counts", "100000000"), "min_counts"),
    ],
)
def test_bad_flags(task, tmp_path, more, told):
    with pytest.raises(DataError, match=told):
        cm.main(flags(task, tmp_path, *more))
    assert not list(tmp_path.rglob("run.json"))


@pytest.mark.parametrize(
    "shape, kind",
    [((60, 16, 16, 4), "uint8"), ((60, 16, 16, 3), "float32"), ((60, 16, 16), "uint8")],
)
def test_patches_that_are_not_rgb(task, tmp_path, shape, kind):
    root = tmp_path / "sim"
    shutil.copytree(task, root)
    for path in (root / "patches").glob("*.h5"):
        with h5py.File(path, "a") as f:
            del f["img"]
            f["img"] = np.zeros(shape, kind)
    with pytest.raises(DataError, match="uint8"):
        cm.main(flags(root, tmp_path))


def test_command_line_says_it_in_one_sentence_with_status_2(task, tmp_path, capfd):
    assert status_of(cm.__file__, *flags(task, tmp_path, "--batch", "1")) == 2
    told = capfd.readouterr().err.strip()
    assert told.startswith("error: --batch is 1") and len(told.splitlines()) == 1


@pytest.fixture(scope="module")
def trained(task, tmp_path_factory):
    """Folder of a finished small run."""
    where = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval_record, "draw", lambda *args: None)
        cm.main(flags(task, where, "--reconstruction", "none"))
    return next(where.rglob("run.json")).parent


def wrong_input(kind, task, trained, folder):
    """Words of a command with one thing wrong, made in `folder`, and what the error says."""
    rng = np.random.default_rng(0)
    train = flags(task, folder, "--fold", "0", "--encoder", str(folder / "{sample}.npz"))
    predict = [
        "--data",
        task,
        "--runs",
        folder / "r",
        "--cache",
        task.parent / "cache",
        "--k",
        "10",
    ]
    predict += ["--predict", folder / "model.pt"]
    if kind in ("one section lacks a barcode", "features of two widths"):
        for name in ("S1", "S2", "S3", "S4"):
            barcodes = data.load_hest(task, name, counts=False).barcodes
            width = 4 + (kind == "features of two widths" and name == "S3")
            rows = 59 if kind == "one section lacks a barcode" and name == "S3" else 60
            values = rng.normal(size=(rows, width))
            np.savez(folder / f"{name}.npz", embedding=values, barcodes=barcodes[:rows])
        return train, "lacks 1 of the 60 barcodes" if "lacks" in kind else "slide S3 has 5 features"
    for name in ("model.pt", "atlas.h5"):
        shutil.copy(trained / name, folder)
    if kind == "a layer without weights":
        saved = torch.load(folder / "model.pt", weights_only=True)
        del saved["weights"]["gene_head.w2.weight"]
        torch.save(saved, folder / "model.pt")
        return predict, "gene_head.w2.weight"
    if kind == "genes that the atlas lacks":
        (folder / "g.json").write_text('["NOT_A_GENE"]')
        return [*predict, "--genes", folder / "g.json"], "NOT_A_GENE"
    return flags(task, folder, "--k", "999"), "fewer than --k 999"


@pytest.mark.parametrize(
    "kind",
    [
        "one section lacks a barcode",
        "features of two widths",
        "a layer without weights",
        "genes that the atlas lacks",
        "k above the training spots",
    ],
)
def test_wrong_input_is_one_sentence_with_status_2(kind, task, trained, tmp_path, capfd):
    words, message = wrong_input(kind, task, trained, tmp_path)
    assert status_of(cm.__file__, *words) == 2
    error = capfd.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and message in error[0]
    assert not list(tmp_path.rglob("run.json"))


def test_atlas_and_checkpoint_must_belong_together(task, trained, tmp_path):
    more = [
        "--data",
        str(task),
        "--runs",
        str(tmp_path / "r"),
        "--cache",
        str(tmp_path / "c"),
        "--k",
        "10",
    ]

    def predict(*words):
        with pytest.raises(DataError) as error:
            cm.main([*more, *words])
        return str(error.value)

    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    model, atlas = folder / "model.pt", folder / "atlas.h5"
    whole = atlas.read_bytes()
    for change, told in (
        ({"encoder": "vit:base"}, "another encoder"),
        ({"inputs": 1}, "other genes"),
        ({"fingerprint": "0"}, "another model"),
    ):
        atlas.write_bytes(whole)
        with h5py.File(atlas, "a") as f:
            if "inputs" in change:
                f["inputs"][0] = b"OTHER"
            else:
                f.attrs.update(change)
        assert told in predict("--predict", str(model))
    atlas.write_bytes(whole[: len(whole) // 2])
    assert "a whole cmrcnet atlas" in predict("--predict", str(model))
    atlas.write_bytes(whole)
    assert "fewer than --k 5000" in predict("--predict", str(model), "--k", "5000")
    (tmp_path / "g.json").write_text('["NOT_A_GENE"]')
    assert "NOT_A_GENE" in predict("--predict", str(model), "--genes", str(tmp_path / "g.json"))
    np.savez(
        tmp_path / "S1.npz",
        embedding=np.zeros((60, 5), "f"),
        barcodes=data.load_hest(task, "S1", counts=False).barcodes,
    )
    assert "encoder of the training run" in predict(
        "--predict", str(model), "--slice", "S1", "--encoder", str(tmp_path / "{sample}.npz")
    )
    # what is given is compared, not what the checkpoint has
    assert "another encoder" in predict("--predict", str(model), "--encoder", "some/model")
    (tmp_path / "empty").mkdir()
    assert "holds neither" in predict("--predict", str(model), "--data", str(tmp_path / "empty"))
    model.write_bytes(model.read_bytes()[:3000])
    assert "not a whole cmrcnet checkpoint" in predict("--predict", str(model))
    assert not list((tmp_path / "r").rglob("run.json"))
