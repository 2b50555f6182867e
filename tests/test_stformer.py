"""stformer: quadrants against the dense masked reference, padding, losses against their
definitions, leaks, baselines, end-to-end runs, bad input."""

import dataclasses
import itertools
import json
import subprocess
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import Ridge
from torch.nn import functional as F

import data
import metrics
import stformer as st
from conftest import in_processes, status_of
from data import DataError
from evaluation import bags, baselines, genes, hest, patch_baselines, samples
from plainst import jobs, quadrants, run, simulate
from plainst.features import input_files

COMBINATIONS = [c for r in range(1, 5) for c in itertools.combinations(st.QUADRANTS, r)]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Four simulated slides of four patients, genes a function of the patch; and the same with two
    of them made sections of one patient."""
    root = simulate.simulate_hest(
        tmp_path_factory.mktemp("hest") / "sim", n_slides=4, n_spots=60, patch_size=16, n_genes=60
    )
    (root / "metadata.csv").write_text("id,patient\nS1,P1\nS2,P2\nS3,P3\nS4,P3\n")
    return root


@pytest.fixture(autouse=True)
def no_figures(request, monkeypatch):
    """Figures are half the time of a small run: only the end-to-end test draws them."""
    if request.node.name != "test_end_to_end_record_resume_and_predict":
        monkeypatch.setattr(genes, "draw", lambda *args: None)


def test_unknown_patient_means_leaking(tmp_path):
    """A slide without a patient may be of any patient: the split leaks and names it."""
    root = simulate.simulate_hest(tmp_path / "h", n_slides=3, n_spots=40, patch_size=8, n_genes=60)
    for path in (root / "adata").glob("*.h5ad"):
        with h5py.File(path, "a") as handle:
            del handle["uns/patient"]
    (root / "metadata.csv").write_text("id,patient\nS1,P1\nS2,\nS3,nan\n")
    split, _, _, _, leaks = hest.hest_partition(root, "folds", 0)
    assert leaks and split.leaks_position
    assert "no patient on both sides" not in split.detail
    for name in ("S2", "S3"):
        assert name in split.detail.split("patient of ")[1].split(" unknown")[0]
    (root / "metadata").mkdir()
    for name in ("S2", "S3"):
        (root / "metadata" / f"{name}.json").write_text(json.dumps({"patient": f"of {name}"}))
    split, _, _, _, leaks = hest.hest_partition(root, "folds", 0)
    assert not leaks and split.detail.endswith("no patient on both sides")
    (root / "metadata" / "S3.json").write_text('{"patient": "P1"}')
    split, train, test, _, leaks = hest.hest_partition(root, "sample", sample="S1")
    assert leaks and split.detail.endswith(
        "other slides of the same patient train: leaks the patient"
    )


def tuned(**more):
    """The preset `tuned` with other flags."""
    return dataclasses.replace(run.of_preset(st.Config, "tuned"), **more)


def flags(root, tmp_path, *more):
    return [
        "--preset",
        "tuned",
        "--data",
        str(root),
        "--runs",
        str(tmp_path / "runs"),
        "--cache",
        str(Path(root).parent / "cache"),
        "--epochs",
        "3",
        "--folds",
        "0",
        "--members",
        "1",
        "--size",
        "mini",
        "--rings",
        "1",
        *more,
    ]


def sample_of(n=150, dim=8, rings=2, seed=0, genes=5):
    """A sample of scattered spots (so that the table is uneven), with random features and
    targets."""
    rng = np.random.default_rng(seed)
    slide = data.Slide(
        None, np.array([]), np.arange(n).astype(str), rng.random((n, 2)) * n**0.5, sample=f"s{seed}"
    )
    x, y = (torch.tensor(rng.normal(size=(n, d)), dtype=torch.float32) for d in (dim, genes))
    return samples.Sample(
        slide.sample,
        slide.sample,
        x,
        *samples.neighbourhood(slide, rings),
        y,
        y.abs().round(),
        torch.full((n,), 1e4),
        torch.ones(n, dtype=torch.bool),
        torch.ones(genes, dtype=torch.bool),
        slide,
    )


# ---------------------------------------------------------------------------------------- attention


def allowed(sample, n_tokens, on, h2h):
    """(P + S, P + S) bool, from the names of the quadrants and the table, in loops."""
    size = n_tokens + len(sample.x)
    allow = torch.eye(size, dtype=torch.bool)
    rows = {"p": range(n_tokens), "h": range(n_tokens, size)}
    for query, key in ((name[0], name[2]) for name in on if name != "h2h" or h2h == "whole"):
        for i in rows[query]:
            allow[i, rows[key].start : rows[key].stop] = True
    if "h2h" in on and h2h == "local":
        for i, (row, rings) in enumerate(zip(sample.table.tolist(), sample.ring.tolist())):
            for j in (j for j, ring in zip(row, rings) if ring >= 0):
                allow[n_tokens + i, n_tokens + j] = True
    return allow


@pytest.mark.parametrize("h2h", ["local", "whole"])
def test_mask_of_the_quadrants(h2h):
    """Against loops, for all combinations; a padded patch is read by itself alone."""
    sample = sample_of(40)
    patches = samples.collate([sample, sample_of(50, seed=1)])["patches"]
    reads = st.ring_matrix(patches) >= 0
    if h2h == "whole":
        reads = torch.ones_like(reads)
    for on in COMBINATIONS:
        mask = st.quadrant_mask(on, 3, reads, patches.is_real)
        assert mask.shape == (2, 53, 53)
        assert torch.equal(mask[0, :43, :43], allowed(sample, 3, on, h2h)), on
        assert torch.equal(mask[0, :, 43:], torch.eye(53, dtype=torch.bool)[:, 43:])


@pytest.mark.parametrize("h2h", ["local", "whole"])
def test_every_combination_of_quadrants_equals_the_dense_mask(h2h):
    """The fast form, the plain form and torch's own attention with the mask of loops: values; the
    first two: gradients."""
    torch.manual_seed(0)
    sample = sample_of()
    patches = samples.collate([sample])["patches"]
    assert len(COMBINATIONS) == 15
    for on in COMBINATIONS:
        rings = 2 if h2h == "local" and "h2h" in on else 0
        layer = st.QuadrantAttention(16, 2, on, h2h, rings)
        if layer.bias is not None:
            torch.nn.init.normal_(layer.bias)
        x = torch.randn(1, 155, 16, requires_grad=True)
        out, gradients = [], []
        for layer.fast in (True, False):
            out.append(layer(x, 5, patches))
            inputs = [x, *layer.parameters()]
            gradients.append(torch.autograd.grad(out[-1].square().sum(), inputs))
        assert torch.allclose(*out, atol=1e-5), on
        for a, b in zip(*gradients):
            assert torch.allclose(a, b, atol=1e-3, rtol=1e-4), on
        q, k, v = layer.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        mask = torch.where(allowed(sample, 5, on, h2h), 0.0, -torch.inf)[None]
        if layer.bias is not None:
            ring = st.ring_matrix(patches)[0].clamp(min=0)
            bias = F.pad(layer.bias[ring].permute(2, 0, 1), (5, 0, 5, 0))
            mask = mask + bias
        dense = F.scaled_dot_product_attention(q, k, v, mask[None]).transpose(1, 2).flatten(2)
        assert torch.allclose(out[0], layer.out(dense), atol=1e-5), on


def test_fast_and_plain_agree_on_padded_batches():
    batch = samples.collate([sample_of(70, seed=1), sample_of(150, seed=2, rings=1)])
    for more in ({}, {"h2h": "whole"}, {"interactions": "p2h,h2p"}, {"interactions": "p2p"}):
        fast, plain = (make(sample_of(), fast=is_fast, **more) for is_fast in (True, False))
        with torch.no_grad():
            genes_fast, genes_plain = fast(**batch)["genes"], plain(**batch)["genes"]
        real = batch["valid"]
        assert torch.allclose(genes_fast[real], genes_plain[real], atol=1e-5), more


def test_layer_equals_its_equation():
    torch.manual_seed(0)
    patches = samples.collate([sample_of()])["patches"]
    layer = st.Layer(16, 2, st.QUADRANTS, "local", 2).eval()
    x = torch.randn(1, 155, 16)
    hidden = x + layer.attention(F.layer_norm(x, (16,)), 5, patches)
    first, second = layer.ffn[1], layer.ffn[4]
    want = hidden + second(F.gelu(first(F.layer_norm(hidden, (16,)))))
    assert torch.allclose(layer(x, 5, patches), want, atol=1e-5)


def test_pieces_give_the_numbers_of_the_whole(monkeypatch):
    """Long slides are done in pieces: values and gradients stay."""
    batch, found = samples.collate([sample_of(200)]), []
    for piece in (16384, 70):
        monkeypatch.setattr(quadrants, "PIECE", piece)
        model = make(sample_of())
        out = model(**batch)["genes"]
        out.square().sum().backward()
        found.append([out, *(p.grad for p in model.parameters())])
    assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(*found))


def test_blocks_hold_the_table():
    """Every (spot, neighbour, ring) of the table stands in the blocks once, and nothing else
    does."""
    sample = sample_of(333)
    rows, keys, ring, slot = sample.blocks
    assert rows.shape[1] <= 64 and (rows.flatten()[slot] == torch.arange(333)).all()
    found = set()
    for i, at in enumerate(slot.tolist()):
        block, place = divmod(at, rows.shape[1])
        found |= {
            (i, int(keys[block, u]), int(ring[block, place, u]))
            for u in torch.nonzero(ring[block, place] >= 0).flatten()
        }
    used = sample.ring >= 0
    assert found == set(
        zip(
            torch.arange(333)[:, None].expand_as(used)[used].tolist(),
            sample.table[used].tolist(),
            sample.ring[used].tolist(),
        )
    )


def test_lattice_neighbourhood_is_rings_of_the_lattice():
    grid = simulate.lattice(400)[:300]
    slide = data.Slide(
        None, np.array([]), np.arange(300).astype(str), simulate.lattice_pixels(grid), grid
    )
    _, table, ring, _ = samples.neighbourhood(slide, 2)
    middle = (ring >= 0).all(1)
    assert middle.any() and table.shape == (300, 19)
    assert (torch.bincount(ring[middle][0]) == torch.tensor([1, 6, 12])).all()
    assert (table[ring < 0] == torch.arange(300)[:, None].expand_as(table)[ring < 0]).all()


def make(sample, layers=2, **more):
    torch.manual_seed(0)
    config = tuned(**more)
    model = st.PathwayTransformer(config, sample.x.shape[1], 5, 4).eval()
    model.layers = model.layers[:layers]
    return model


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"position": "sincos"},
        {"position": "mlp", "h2h": "whole"},
        {"interactions": "p2h,h2p"},
        {"mode": "global"},
        {"interactions": "p2p"},
    ],
)
def test_padding_and_batch_mates_change_nothing(more):
    a, b = sample_of(70, seed=1), sample_of(150, seed=2, rings=1)
    model = make(a, **more)
    with torch.no_grad():
        alone, together = model(**samples.collate([a])), model(**samples.collate([b, a]))
    for name, value in alone.items():
        other = together[name][1] if more.get("mode") == "global" else together[name][1, :70]
        assert torch.allclose(value[0], other, atol=1e-6), name
    loud = samples.collate([b, a])
    # whatever stands in the padding
    loud["x"][1, 70:] = 1e3
    with torch.no_grad():
        assert torch.allclose(
            model(**loud)["scores"][1][:70], together["scores"][1][:70], atol=1e-6
        )


def test_who_hears_of_whom():
    """Perturb patch 0: with local h2h one layer reaches its neighbours, the bottleneck needs two
    layers, and without both nobody hears."""
    sample = sample_of()
    batch = samples.collate([sample])
    changed = batch | {"x": batch["x"].clone()}
    changed["x"][0, 0] += 3
    near = torch.zeros(150, dtype=torch.bool)
    near[((sample.table == 0) & (sample.ring >= 0)).any(1)] = True

    def moved(layers, on):
        model, h = make(sample, layers, interactions=on, distance_bias=False), []
        hook = model.norm.register_forward_hook(lambda _, __, out: h.append(out[:, 4:]))
        with torch.no_grad():
            model(**batch), model(**changed)
        hook.remove()
        return (h[0] - h[1]).abs().amax(-1)[0] > 1e-7

    assert (moved(1, "h2h") == near).all()
    only_me = torch.arange(150) == 0
    assert (moved(1, "p2h,h2p") == only_me).all() and moved(2, "p2h,h2p").all()
    assert (moved(2, "p2p,p2h") == only_me).all()


def test_checkpointing_gives_the_same_gradients():
    sample = sample_of()
    batch, grads = samples.collate([sample]), []
    for on in (False, True):
        model = make(sample, checkpointing=on).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model(**batch)["genes"].square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads))


def test_genes_are_a_linear_map_of_scaled_cosines():
    sample = sample_of(30)
    batch, sequence = samples.collate([sample]), []
    for more in ({}, {"tau": "fixed"}):
        model = make(sample, **more)
        model.norm.register_forward_hook(lambda _, __, out: sequence.append(out[0]))
        with torch.no_grad():
            out = model(**batch)
        tokens, h = sequence[-1][:4], sequence[-1][4:]
        tau = 1.0 if more else 1 / 0.07
        for i, p in ((0, 0), (7, 3)):
            cosine = h[i] @ tokens[p] / h[i].norm() / tokens[p].norm()
            assert torch.isclose(out["scores"][0, i, p], tau * cosine, rtol=1e-4, atol=1e-5)
        want = out["scores"][0] @ model.genes.weight.T + model.genes.bias
        assert torch.allclose(out["genes"][0], want, atol=1e-5)


@pytest.mark.parametrize(
    "size, count",
    [("tiny", 1_840_696), ("small", 7_464_120), ("medium", 19_385_656), ("large", 85_735_992)],
)
def test_parameter_counts(size, count):
    plain = {
        "size": size,
        "distance_bias": False,
        "tau": "fixed",
        "loss": "mse",
        "position": "none",
    }
    more = plain | {"position": "mlp", "loss": "zinb"}
    with torch.device("meta"):
        model = st.PathwayTransformer(tuned(**plain), 768, 1000, 50)
        learned = st.PathwayTransformer(tuned(**more), 768, 1000, 50)
    dim = st.SIZES[size][1]
    assert sum(p.numel() for p in model.parameters()) == count
    assert sum(p.numel() for p in learned.parameters()) == count + dim * dim + 4 * dim + 2 * (
        50 * 1000 + 1000
    )


def test_sincos_position_is_shift_invariant_and_as_defined():
    place, valid = torch.rand(1, 30, 2) * 20, torch.ones(1, 30, dtype=torch.bool)
    code = st.Position("sincos", 16)
    out = code(place, valid)
    assert torch.allclose(out, code(place + 100, valid), atol=1e-4)
    x = (place - place.mean(1))[0, 3, 1]
    assert torch.allclose(out[0, 3, 8 + 2 * 1], torch.sin(x * 10000 ** (-2 / 8)), atol=1e-5)


# ------------------------------------------------------------------------------------------- losses


def masked_batch(seed=0):
    rng = np.random.default_rng(seed)
    pred, true = (torch.tensor(rng.normal(size=(2, 20, 6)), dtype=torch.float64) for _ in range(2))
    mask = torch.tensor(rng.random((2, 20, 1)) < 0.8) & torch.tensor(rng.random((2, 1, 6)) < 0.9)
    return pred, true, mask


def test_mse_and_pcc_equal_their_definitions_on_the_cropped_slides():
    pred, true, mask = masked_batch()
    # constant truth: no correlation
    true[0, :, 1] = 3.0
    assert torch.isclose(st.masked_mse(pred, true, mask), (pred - true)[mask].square().mean())
    r, defined = st.masked_pcc(pred, true, mask)
    for b, g in np.ndindex(2, 6):
        rows = mask[b, :, g]
        if rows.sum() > 1 and (b, g) != (0, 1):
            assert (
                defined[b, g]
                and abs(r[b, g] - np.corrcoef(pred[b, rows, g], true[b, rows, g])[0, 1]) < 1e-6
            )
        else:
            assert not defined[b, g]
    assert torch.isclose(st.pcc_loss(pred, true, mask), 1 - r[defined].mean())
    assert (
        st.pcc_loss(3 * true + 1, true, mask).abs() < 1e-6
        and abs(st.pcc_loss(-true, true, mask) - 2) < 1e-6
    )


def test_targets_in_units_of_the_slide_or_of_the_training_spots():
    """Within a slide: mean 0 and variance 1 over the spots that count, 0 elsewhere; against a loop
    over slides and genes."""
    y, mask = torch.randn(2, 9, 4) * 3 + 5, torch.rand(2, 9, 4) < 0.7
    mask[:, :2] = True
    z = samples.Scaler(
        {"y_mean": torch.arange(4.0), "y_std": torch.full((4,), 2.0)}
    ).standardise_targets(y, mask, "slide")
    for b, g in np.ndindex(2, 4):
        use = mask[b, :, g]
        column = y[b, use, g]
        assert (
            torch.allclose(
                z[b, use, g],
                (column - column.mean()) / (column.std(correction=0) + 1e-3),
                atol=1e-5,
            )
            and not z[b, ~use, g].any()
        )
    assert torch.allclose(
        samples.Scaler(
            {"y_mean": torch.arange(4.0), "y_std": torch.full((4,), 2.0)}
        ).standardise_targets(y, mask, "train"),
        (y - torch.arange(4.0)) / 2,
    )


def test_unmeasured_and_low_count_places_reach_no_loss():
    pred, true, mask = masked_batch()
    pred.requires_grad_()
    for loss in (
        st.masked_mse,
        st.pcc_loss,
        lambda p, t, m: st.zinb_nll(t.abs().round(), p.exp(), p.exp(), p, m),
        lambda p, t, m: st.pathway_loss(
            p @ torch.ones(6, 3, dtype=p.dtype), t, m, torch.eye(6, dtype=p.dtype)[:3]
        ),
    ):
        poisoned = torch.where(mask, true, torch.full_like(true, 77.0))
        assert torch.isclose(loss(pred, true, mask), loss(pred, poisoned, mask))
    for loss in (st.masked_mse, st.pcc_loss):
        grad = torch.autograd.grad(loss(pred, true, mask), pred)[0]
        assert (grad[~mask] == 0).all() and (grad[mask] != 0).any()


@pytest.mark.parametrize("target", ["log1p", "cp10k"])
def test_zinb_does_not_read_the_counts_of_what_it_predicts(target):
    """The library is the sum of the answers: a test spot's own stays out of its prediction."""
    train, a = sample_of(40, seed=1), sample_of(50, seed=2)
    train.library = torch.arange(40.0) * 100 + 500
    train.scored[30:] = False
    config = tuned(loss="zinb", target=target, size="mini")
    scaler = samples.Scaler.fit([train])
    assert scaler.tensors["median_library"] == 500 + 100 * 14
    model = st.PathwayTransformer(config, 8, 5, 6)
    genes = samples.predict([model], a, scaler, config)[0]
    b = sample_of(50, seed=2)
    b.counts, b.y, b.library = b.counts * 9 + 3, b.y + 1, b.library * torch.rand(50)
    assert np.array_equal(samples.predict([model], b, scaler, config)[0], genes)
    # and a new slide, which has no counts, is predicted alike
    b.y = b.counts = b.library = None
    assert np.allclose(samples.predict([model], b, scaler, config)[0], genes, atol=1e-6)
    # counts of the median spot, or of 10,000
    depth = 1e4 if target == "cp10k" else 1900
    with torch.no_grad():
        out = model.eval()(**samples.collate([a]))
    mean = depth / 1e4 * scaler.tensors["rate"] * F.softplus(out["genes"][0] + 0.5413)
    want = torch.log1p(mean * torch.sigmoid(-out["pi"][0]))
    assert np.allclose(genes, want.numpy(), atol=1e-5)


def test_zinb_equals_scipy():
    grid = np.meshgrid([0, 1, 3, 40], [0.1, 2, 50], [0.3, 1, 20], [0.01, 0.3, 0.9])
    y, mu, theta, pi = (torch.tensor(a, dtype=torch.float64).flatten() for a in grid)
    nb = stats.nbinom.pmf(y.numpy(), theta.numpy(), (theta / (theta + mu)).numpy())
    expected = -np.log(np.where(y == 0, pi, 0) + (1 - pi.numpy()) * nb)
    for i in range(len(y)):
        one = st.zinb_nll(y[i], mu[i], theta[i], torch.logit(pi[i]), torch.tensor(True))
        assert abs(one - expected[i]) < 1e-8 * max(1, abs(expected[i]))


def test_pathway_targets_are_mean_z_scores_of_members():
    _, true, mask = masked_batch()
    # a gene that slide 0 does not measure
    mask[0, :, 0] = False
    member = torch.tensor(
        [[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0]], dtype=torch.float64
    )
    target, present = st.pathway_targets(true, mask, member)
    rows = mask[0, :, 1]
    z = (true[0, rows, 1] - true[0, rows, 1].mean()) / true[0, rows, 1].std()
    assert torch.allclose(target[0, rows, 0], z)  # its other member alone
    # a set of three measured members has their mean
    y, rows = true[1], mask[1].all(1)
    measured = [y[mask[1, :, g], g] for g in (2, 3, 4)]
    parts = [(y[rows, g] - m.mean()) / m.std() for g, m in zip((2, 3, 4), measured)]
    assert torch.allclose(target[1, rows, 1], torch.stack(parts).mean(0))
    assert present[0].tolist() == [True, True, False] and present[1].all()
    assert st.pathway_loss(target, true, mask, member).abs() < 1e-5


def test_loss_is_the_sum_of_its_parts():
    fit = [sample_of(40, seed=1)]
    scaler, batch = samples.Scaler.fit(fit), samples.collate(fit)
    out, member = make(fit[0])(**batch), torch.eye(5)[:4]
    true = (batch["y"] - scaler.tensors["y_mean"]) / scaler.tensors["y_std"]
    mse, pcc = (f(out["genes"], true, batch["scored"]) for f in (st.masked_mse, st.pcc_loss))
    aux = st.pathway_loss(out["scores"], true, batch["scored"], member)

    def loss(member=None, **flags):
        return st.loss_of(out, batch, scaler, tuned(**flags), member)

    assert torch.isclose(loss(loss="mse"), mse) and torch.isclose(loss(loss="pcc"), pcc)
    assert torch.isclose(loss(loss="mse_pcc", pcc_weight=0.3), mse + 0.3 * pcc)
    assert torch.isclose(loss(member, loss="mse", lambda_pathway=0.5), mse + 0.5 * aux)
    assert torch.isclose(loss(loss="mse", lambda_pathway=0.5), mse)


def test_softplus_head_predicts_values_as_they_are():
    fit = [sample_of(40, seed=1)]
    fit[0].y = fit[0].y.abs()
    scaler, batch = samples.Scaler.fit(fit), samples.collate(fit)
    config = run.of_preset(st.Config, "paper")
    model = make(fit[0], **{k: v for k, v in vars(config).items() if k not in ("typed", "preset")})
    with torch.no_grad():
        out = model(**batch)
        want = F.softplus(model.genes(out["scores"]))
    assert torch.allclose(out["genes"], want, atol=1e-5) and (out["genes"] > 0).all()
    assert np.allclose(samples.predict([model], fit[0], scaler, config)[0], want[0], atol=1e-5)
    mse = st.masked_mse(out["genes"], batch["y"], batch["scored"])
    assert torch.isclose(st.loss_of(out, batch, scaler, config), mse)
    assert torch.equal(scaler.features(fit[0], config.scale).x, fit[0].x)


def test_losses_of_slide_means():
    """Global mode: every loss is over the slides of the batch, as it else is over spots."""
    fit = [sample_of(40, seed=i) for i in range(3)]
    fit[0].scored[:9] = False
    fit[1].measured[2] = False
    scaler, batch, member = samples.Scaler.fit(fit), samples.collate(fit), torch.eye(5)[:4]
    out = make(fit[0], mode="global", loss="zinb")(**batch)
    mean = torch.stack([s.y[s.scored].mean(0) for s in fit])
    true = ((mean - scaler.tensors["y_mean"]) / scaler.tensors["y_std"])[None]
    mask, pred = torch.stack([s.measured for s in fit])[None], out["genes"][None]
    assert pred.shape == (1, 3, 5)

    def loss(**flags):
        config = tuned(mode="global", **flags)
        return st.loss_of(out, batch, scaler, config, member, is_bag=True)

    mse, pcc = st.masked_mse(pred, true, mask), st.pcc_loss(pred, true, mask)
    assert torch.isclose(loss(loss="mse"), mse) and torch.isclose(loss(loss="pcc"), pcc)
    assert torch.isclose(loss(loss="mse_pcc"), mse + pcc) and pcc > 0.01
    aux = st.pathway_loss(out["scores"][None], true, mask, member)
    assert torch.isclose(loss(loss="mse", lambda_pathway=0.5), mse + 0.5 * aux) and aux > 0.01
    counts = torch.stack([s.counts[s.scored].sum(0) for s in fit])[None]
    library = torch.stack([s.library[s.scored].sum() for s in fit])[None]
    pi, theta = out["pi"][None], out["theta"][None]
    mu = scaler.mean_counts({"genes": pred}, library)
    assert torch.isclose(loss(loss="zinb"), st.zinb_nll(counts, mu, theta, pi, mask))


def test_agreement_of_pathways_is_the_correlation_of_the_loss():
    a, b = sample_of(40, seed=1), sample_of(50, seed=2)
    a.scored[:5], b.measured[2] = False, False
    member = torch.tensor([[1.0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 1]])
    scores, want = [torch.randn(len(s.x), 3) for s in (a, b)], []
    for s, values in zip((a, b), scores):
        mask = (s.scored[:, None] & s.measured)[None]
        target, is_present = st.pathway_targets(s.y[None], mask, member)
        mask = mask.any(-1, keepdim=True) & is_present[:, None]
        r, is_defined = st.masked_pcc(values[None], target, mask)
        want += r[is_defined].tolist()
    assert len(want) == 5
    found = genes.pathway_agreement([a, b], [v.numpy() for v in scores], member)
    assert abs(found - np.mean(want)) < 1e-5


def test_gmt_and_shuffled_sets(tmp_path):
    (tmp_path / "a.gmt").write_text("SET_A\turl\tG1\tG2\nSET_B\turl\tX\nSET_C\turl\tG2\tG3\tY\n")
    panel = ["G0", "G1", "G2", "G3"]
    names, member = genes.read_gmt(tmp_path / "a.gmt", panel)
    assert names == ["SET_A", "SET_C"] and member.tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]
    shuffled = genes.read_gmt(tmp_path / "a.gmt", panel, np.random.default_rng(2))[1]
    assert (shuffled.sum(1) == member.sum(1)).all() and not torch.equal(shuffled, member)
    model = st.PathwayTransformer(tuned(), 8, 4, 2)
    model.start_from_sets(member)
    assert torch.equal(model.genes.weight, member.T / 2) and (model.genes.bias == 0).all()


def test_hallmark_sets(real_data):
    panel = data.hest_genes(real_data / "her2st")
    names, member = genes.read_gmt(real_data / "hallmark" / "h.all.symbols.gmt", panel)
    assert (
        20 < len(names) <= 50
        and member[names.index("HALLMARK_ALLOGRAFT_REJECTION"), panel.index("B2M")] == 1
    )


# --------------------------------------------------------------------------------------------- data


def test_official_ridge_is_the_normal_equation():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(80, 12)) + 2, rng.normal(size=(80, 4)) + 5
    alpha = 100 / (12 * 4)
    found = baselines.official_ridge(x, y).predict(x)
    assert np.allclose(found, x @ np.linalg.solve(x.T @ x + alpha * np.eye(12), x.T @ y), atol=1e-2)
    z = (x - x.mean(0)) / x.std(0)
    by_hand = Ridge(alpha=100 / (5 * 4), fit_intercept=False, solver="cholesky")
    from sklearn.decomposition import PCA

    scores = PCA(5, random_state=0).fit_transform(z)
    assert np.allclose(
        baselines.official_ridge(x, y, 5).predict(x),
        by_hand.fit(scores, y).predict(scores),
        atol=1e-2,
    )


def test_unmeasured_genes_are_masked_not_zero(task):
    slide = data.load_hest(task, "S1")
    y, counts, library, measured = hest.target_expression(
        slide, [slide.genes[3], "NOT_THERE", slide.genes[0]], "cp10k"
    )
    assert measured.tolist() == [True, False, True]
    total = np.asarray(slide.counts.sum(1)).ravel()
    assert np.allclose(library, total) and np.allclose(
        counts[:, 2], slide.counts[:, 0].toarray().ravel()
    )
    assert np.allclose(
        y[:, 0], np.log1p(slide.counts[:, 3].toarray().ravel() / total * 1e4), atol=1e-5
    )
    assert np.allclose(
        hest.target_expression(slide, [slide.genes[3]], "log1p")[0][:, 0],
        np.log1p(slide.counts[:, 3].toarray().ravel()),
    )


def test_scaler_leaves_low_counts_and_unmeasured_genes_out():
    a, b = sample_of(40, seed=1), sample_of(50, seed=2)
    a.scored[:5], b.measured[2] = False, False
    want = samples.Scaler.fit([a, b]).tensors
    a.y[:5], a.x[:5], b.y[:, 2] = 1e3, 1e3, 1e3
    assert all(torch.equal(v, want[k]) for k, v in samples.Scaler.fit([a, b]).tensors.items())
    assert torch.allclose(want["y_mean"][2], a.y[5:, 2].mean(), atol=1e-6)


def test_inner_folds_leave_patients_out_then_slides_then_tiles():
    slides = [dataclasses.replace(sample_of(40, seed=i), patient=p) for i, p in enumerate("AABCC")]

    def place(sample):
        return sample.place

    for fit, val in hest.inner_folds(slides, 5, place):
        assert not {s.patient for s in fit} & {s.patient for s in val} and len(fit) + len(val) == 5
    assert len(hest.inner_folds(slides, 5, place)) == 3 and hest.inner_folds(slides, 0, place) == []
    assert [[s.name for s in val] for _, val in hest.inner_folds(slides[:2], 5, place)] == [
        ["s0"],
        ["s1"],
    ]
    for (fit,), (val,) in hest.inner_folds([sample_of(400)], 3, place):
        assert not (fit.scored & val.scored).any() and (fit.scored | val.scored).all()


def test_gene_list_of_training_slides_only(task):
    slides = [data.load_hest(task, n) for n in ("S1", "S2")]
    chosen = hest.target_genes("7", slides, task)
    variance = sum(data.mean_var(data.normalise_log1p(s.counts))[1] for s in slides)
    assert len(chosen) == 7 and set(chosen) == set(slides[0].genes[np.argsort(-variance)[:7]])


# ---------------------------------------------------------------------------------------- baselines


def test_nystrom_attention_with_a_landmark_per_token_is_attention(monkeypatch):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 12, 8, dtype=torch.float64) * 0.5 for _ in range(3))
    exact = (q @ k.transpose(1, 2) / 8**0.5).softmax(-1) @ v
    assert (bags.nystrom_attention(q, k, v, 12) - exact).abs().max() < 0.05
    a = torch.softmax(torch.randn(3, 6, 6, dtype=torch.float64) * 2, -1)
    assert torch.allclose(bags.pseudo_inverse(a, 40), torch.linalg.pinv(a), atol=1e-6)
    # six steps of the iteration are what the .05 is for
    monkeypatch.setattr(bags, "pseudo_inverse", torch.linalg.pinv)
    assert torch.allclose(
        bags.nystrom_attention(3 * q, k, v, 12),
        (3 * q @ k.transpose(1, 2) / 8**0.5).softmax(-1) @ v,
        atol=1e-6,
    )


@pytest.mark.parametrize("kind", [bags.ABMIL, bags.TransMIL])
def test_bags_ignore_padding_and_learn_a_slide_mean(kind):
    torch.manual_seed(0)
    a, b = sample_of(70, seed=1), sample_of(90, seed=2)
    model = kind(8, 5).eval()
    with torch.no_grad():
        assert torch.allclose(
            model(**samples.collate([a]))["genes"][0],
            model(**samples.collate([a, b]))["genes"][0],
            atol=1e-5,
        )
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    batch, want = samples.collate([a, b]), torch.tensor([[1.0] * 5, [-1.0] * 5])
    for _ in range(40):
        loss = F.mse_loss(model(**batch)["genes"], want)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.05


# --------------------------------------------------------------------------------------- end to end


def test_end_to_end_record_resume_and_predict(task, tmp_path, capsys, monkeypatch):
    st.main(flags(task, tmp_path, "--fold", "0", "--folds", "2", "--save_every", "1"))
    path = Path(capsys.readouterr().out.strip().splitlines()[-1])
    assert (
        path
        == tmp_path / "runs" / "stformer" / "sim" / "fold0" / path.parts[-3] / "seed0" / "run.json"
    )
    record = json.loads(path.read_text())
    names = {
        "train_mean",
        "coordinates",
        "ridge_pca256",
        "ridge_raw",
        "ridge_own",
        "ridge_rings",
        "ridge_rings_place",
        "knn",
        "linear",
        "abmil",
        "transmil",
        "average_with_ridge",
    }
    assert (
        set(record["baselines"]) == names
        and not record["split"]["leaks_position"]
        and not record["leaks_patient"]
        and record["target"] == "cp10k"
    )
    keys = {"pcc_mean", "pcc_pooled", "variance_ratio_median", "slide_mean_rmse"}
    assert all(keys <= set(s) for s in [record["metrics"], *record["baselines"].values()])
    assert (
        record["baselines"]["train_mean"]["pcc_mean"] == 0
        and record["baselines"]["abmil"]["variance_ratio_median"] == 0
    )
    arrays = np.load(path.with_name("arrays.npz"))
    want = metrics.pcc_summary(
        arrays["true"][arrays["scored"]],
        arrays["pred"][arrays["scored"]],
        arrays["slide"][arrays["scored"]],
    )["pcc_mean"]
    assert abs(want - record["metrics"]["pcc_mean"]) < 1e-6
    assert {f.name for f in path.parent.iterdir()} >= {
        "genes.png",
        "pathways.png",
        "training.png",
        "model.pt",
        "latest.pt",
    }

    # interrupted in the second fold, resumed: the same weights
    full = torch.load(path.with_name("model.pt"), weights_only=True)
    latest = torch.load(path.with_name("latest.pt"), weights_only=True)
    assert (
        len(latest["done"]) == 2
        and len(latest["going"]["history"]) == record["epochs"]
        and np.isfinite(record["metrics"]["val_pcc"])
    )
    stopped = [0]

    def stop_early(*a, save=st.run.write_atomically, **k):
        save(*a, **k)
        stopped[0] += 1
        if stopped[0] == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(genes, "draw", lambda *args: None)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(st.run, "write_atomically", stop_early)
        st.main(flags(task, tmp_path / "again", "--fold", "0", "--folds", "2", "--save_every", "1"))
    st.main(
        flags(
            task, tmp_path / "again", "--fold", "0", "--folds", "2", "--save_every", "1", "--resume"
        )
    )
    again = torch.load(
        Path(capsys.readouterr().out.strip().splitlines()[-1]).with_name("model.pt"),
        weights_only=True,
    )
    assert all(
        torch.equal(a[k], b[k]) for a, b in zip(full["weights"], again["weights"]) for k in a
    )
    # its record would stop a run on other data before the checkpoint does
    next((tmp_path / "again").rglob("run.json")).unlink()
    read = []
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(DataError, match="other files, slides or genes"),
    ):
        patch.setattr(
            st.run, "file_checksum", lambda *paths: read.extend(paths) or "of slides that changed"
        )
        st.main(
            flags(
                task,
                tmp_path / "again",
                "--fold",
                "0",
                "--folds",
                "2",
                "--save_every",
                "1",
                "--resume",
            )
        )
    # every slide's counts and pictures
    read = {Path(f).resolve() for f in read}
    assert read >= {
        f.resolve()
        for folder in ("adata", "patches")
        for f in (task / folder).iterdir()
        if f.stem in {g.stem for g in read}
    }
    assert {f.parent.name for f in read} >= {"adata", "patches"} and len({f.stem for f in read}) > 2
    with pytest.MonkeyPatch.context() as patch, pytest.raises(DataError, match="other flags"):
        patch.setattr(st.run, "resumable", lambda config: {"lr": -1.0})
        st.main(
            flags(
                task,
                tmp_path / "again",
                "--fold",
                "0",
                "--folds",
                "2",
                "--save_every",
                "1",
                "--resume",
            )
        )
    capsys.readouterr()

    # --predict on the HEST folder, and on a bare folder of its patches, gives the run's predictions
    test = arrays["slide"][0]
    st.main(
        [
            "--data",
            str(task),
            "--slice",
            str(test),
            "--predict",
            str(path.with_name("model.pt")),
            "--runs",
            str(tmp_path / "p"),
            "--cache",
            str(tmp_path / "c"),
        ]
    )
    st.main(
        [
            "--data",
            str(task / "patches"),
            "--slice",
            str(test),
            "--predict",
            str(path.with_name("model.pt")),
            "--runs",
            str(tmp_path / "q"),
            "--cache",
            str(tmp_path / "c"),
        ]
    )
    one, bare = (
        np.load(Path(line).with_name("arrays.npz"))
        for line in capsys.readouterr().out.strip().splitlines()
    )
    assert (
        np.allclose(one["pred"], arrays["pred"], atol=1e-5)
        and (one["barcodes"] == arrays["barcodes"]).all()
    )
    assert bare["pred"].shape == one["pred"].shape and np.isfinite(bare["pred"]).all()


def test_bfloat16_products_stay_near_float32(task, tmp_path, capsys):
    """The linear layer, a baseline, stays as it is."""
    found = []
    for more in ([], ["--bf16"]):
        st.main(flags(task, tmp_path, *more))
        path = Path(capsys.readouterr().out.strip().splitlines()[-1])
        found.append(
            (
                np.load(path.with_name("arrays.npz")),
                json.loads(path.read_text())["baselines"]["linear"],
                path.parents[1].name,
            )
        )
    (exact, linear, name), (near, linear_near, name_near) = found
    assert "bf16" not in name and "bf16-True" in name_near and linear == linear_near
    spread = exact["pred"].std(0).mean()
    assert 0 < np.abs(near["pred"] - exact["pred"]).mean() < 0.05 * spread


def test_batches_are_collated_once_and_padding_is_known(task):
    a, b = sample_of(40, seed=1), sample_of(50, seed=2)
    batch = samples.collate([a])
    padded = samples.collate([a, b])["patches"]
    assert batch["patches"].is_unpadded and not padded.is_unpadded
    model = make(a)
    with torch.no_grad():
        whole = model(**batch)
        masked = model(**batch | {"patches": batch["patches"]._replace(is_unpadded=False)})
    assert torch.allclose(whole["genes"], masked["genes"], atol=1e-5)
    calls, config = [], tuned(epochs=3, size="mini", members=1)

    def counted(parts, device, collate=samples.collate):
        calls.append(len(parts))
        return collate(parts, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "collate", counted)
        train_linear([a, b], [a], config)
    # two slides and one for validation, whatever the number of epochs
    assert calls == [1, 1, 1] and a.batch is None


def train_linear(fit, val, config):
    """One linear layer, trained as the model is."""
    part = genes.Part(fit, val, samples.Scaler.fit(fit), [], [], None)
    job, device = jobs.Job(config, 0), torch.device("cpu")
    return st.train(lambda: bags.OneLinear(8, 5), part, config, device, config.epochs, job)


def test_predict_from_features_files(task, tmp_path, capsys):
    for n in data.hest_samples(task):
        slide = data.load_hest(task, n)
        np.savez(
            tmp_path / f"{n}.npz",
            embedding=data.handmade_descriptor(slide.patches[:]),
            barcodes=slide.barcodes,
            coords=slide.xy,
        )
    st.main(flags(task, tmp_path, "--encoder", str(tmp_path / "{sample}.npz")))
    path = Path(capsys.readouterr().out.strip().splitlines()[-1])
    st.main(
        [
            "--data",
            str(tmp_path),
            "--predict",
            str(path.with_name("model.pt")),
            "--runs",
            str(tmp_path / "runs"),
        ]
    )
    found = np.load(Path(capsys.readouterr().out.strip().splitlines()[-1]).with_name("arrays.npz"))
    here = found["slide"] == "S1"
    assert here.sum() == 60 and set(found["slide"]) == {"S1", "S2", "S3", "S4"}


@pytest.mark.parametrize(
    "more",
    [
        ["--loss", "zinb"],
        ["--mode", "global", "--loss", "mse"],
        ["--mode", "global", "--loss", "pcc", "--batch", "3"],
        ["--mode", "global", "--loss", "zinb"],
        ["--interactions", "p2h,h2p", "--position", "mlp", "--loss", "pcc"],
        [
            "--h2h",
            "whole",
            "--position",
            "sincos",
            "--tau",
            "fixed",
            "--loss",
            "mse",
            "--batch",
            "2",
            "--target",
            "log1p",
        ],
        ["--permute_pairs", "--scale", "slide", "--genes", "20", "--checkpointing"],
        ["--preset", "paper", "--members", "2"],
        ["--preset", "paper", "--loss", "zinb", "--batch", "2"],
    ],
)
def test_variants_run(task, tmp_path, capsys, more):
    st.main(flags(task, tmp_path, "--epochs", "1", *more))
    record = json.loads(Path(capsys.readouterr().out.strip().splitlines()[-1]).read_text())
    assert np.isfinite(record["metrics"]["pcc_mean"]) and record["metrics"][
        "pcc_mean"
    ] == pytest.approx(0, abs=1)


def test_sets_and_patient_split(task, tmp_path, capsys):
    genes = data.hest_genes(task)
    (tmp_path / "a.gmt").write_text(
        "".join(f"SET{i}\turl\t" + "\t".join(genes[5 * i : 5 * i + 5]) + "\n" for i in range(4))
    )
    st.main(
        flags(
            task,
            tmp_path,
            "--split",
            "patient",
            "--patient",
            "P3",
            "--gene_sets",
            str(tmp_path / "a.gmt"),
            "--lambda_pathway",
            "0.5",
            "--shuffle_sets",
        )
    )
    record = json.loads(Path(capsys.readouterr().out.strip().splitlines()[-1]).read_text())
    assert (
        record["test_slides"] == ["S3", "S4"]
        and not record["leaks_patient"]
        and np.isfinite(record["metrics"]["pathway_pcc"])
    )
    st.main(flags(task, tmp_path, "--split", "section", "--slice", "S3"))
    record = json.loads(Path(capsys.readouterr().out.strip().splitlines()[-1]).read_text())
    assert (
        record["train_slides"] == ["S4"]
        and record["leaks_patient"]
        and "leaks the patient" in record["split"]["detail"]
    )


def test_same_seed_same_numbers_and_poisoned_test_slide_changes_nothing(task, tmp_path, capsys):
    """What is fitted does not see the held-out slide: with its counts poisoned the model is the
    same, bit for bit."""
    st.main(flags(task, tmp_path, "--genes", "20", "--fold", "0"))
    first = Path(capsys.readouterr().out.strip().splitlines()[-1])
    test = json.loads(first.read_text())["test_slides"][0]
    poisoned = tmp_path / "poisoned"
    subprocess.run(["cp", "-r", str(task), str(poisoned)], check=True)
    import h5py

    with h5py.File(poisoned / "adata" / f"{test}.h5ad", "r+") as file:
        file["X/data"][:] = file["X/data"][:][::-1] * 7
    st.main(flags(poisoned, tmp_path, "--genes", "20", "--fold", "0"))
    second = Path(capsys.readouterr().out.strip().splitlines()[-1])
    one, two = (torch.load(p.with_name("model.pt"), weights_only=True) for p in (first, second))
    assert one["genes"] == two["genes"] and all(
        torch.equal(one["weights"][0][k], two["weights"][0][k]) for k in one["weights"][0]
    )


def test_inner_split_is_fitted_on_its_own_slides(task, tmp_path):
    """What a fold of the inner cross-validation trains on, its scaler and its most variable genes,
    does not see the slide that it validates on."""
    argv = flags(task, tmp_path, "--genes", "20", "--folds", "3")
    runs = genes.Task(run.parse(st.Config, argv))
    runs.load()
    clean = runs.inner_parts(3)
    held_out = clean[0].val[0].name
    poisoned = runs.raw[held_out]
    counts = poisoned.slide.counts
    counts.data[:] = counts.data[::-1] * 50
    poisoned.x[:] = poisoned.x * 9 + 1
    poisoned.y[:] = poisoned.y * 9 + 1
    again = runs.inner_parts(3)[0]
    assert held_out not in {s.name for s in again.fit} and again.genes == clean[0].genes
    for name, value in clean[0].scaler.tensors.items():
        assert torch.equal(value, again.scaler.tensors[name]), name
    for s, t in zip(clean[0].fit, again.fit):
        assert torch.equal(s.x, t.x) and torch.equal(s.y, t.y)
    # the other folds train on that slide: their scaler moves
    others = runs.inner_parts(3)[1]
    assert not torch.equal(others.scaler.tensors["y_mean"], clean[1].scaler.tensors["y_mean"])


def test_permuted_pairs_stay_within_their_slide(task):
    rows = hest.permuted_pairs(60, 3)
    assert sorted(rows) == list(range(60)) and (rows != np.arange(60)).any()
    assert (hest.permuted_pairs(60, 3) == rows).all() and (hest.permuted_pairs(60, 4) != rows).any()
    sample = sample_of(60)
    out = genes.shuffled_pairs(sample, 3)
    assert torch.equal(out.x, sample.x[rows]) and out.y is sample.y


def test_ring2_genes_need_context(tmp_path):
    """Genes that depend on the patches two steps away: local h2h finds their true rates, a
    patch-only model does not."""
    root = simulate.simulate_hest(
        tmp_path / "ring2", n_slides=4, n_spots=500, link="ring2", patch_size=16
    )
    truth = np.load(root / "truth.npz")
    found = {}
    for on in ("p2p,p2h,h2p,h2h", "p2p"):
        config = tuned(
            data=str(root),
            cache=str(tmp_path / "c"),
            interactions=on,
            epochs=30 if "h2h" in on else 10,
            lr=5e-3,
            dropout=0.0,
            position="none",
        )
        raw, names = genes.load(config, ["S1", "S2", "S3"], ["S4"])
        scaler = samples.Scaler.fit([raw[n] for n in ("S1", "S2", "S3")], "slide")
        s = {n: scaler.features(raw[n], "train") for n in raw}
        part = genes.Part([s["S1"], s["S2"], s["S3"]], [], scaler, names, [], None)
        model, _ = st.train(
            lambda c=config: st.PathwayTransformer(c, 42, 50, 20),
            part,
            config,
            torch.device("cpu"),
            config.epochs,
            jobs.Job(config, 0),
        )
        column = [list(truth["genes"]).index(g) for g in names]
        rate = truth["z_S4"] @ truth["weights"][:, column]
        found[on] = metrics.pcc_summary(rate, samples.predict([model], s["S4"], scaler, config)[0])[
            "pcc_mean"
        ]
    assert found["p2p,p2h,h2p,h2h"] > 0.85 and abs(found["p2p"]) < 0.15, found


# ---------------------------------------------------------------------------------------- bad input


def fails(argv, *words):
    """main raises DataError, one sentence with these words, and writes no record."""
    with pytest.raises(DataError) as error:
        st.main(argv)
    text = str(error.value)
    assert "\n" not in text and all(w in text for w in words), text


def test_status_is_2_without_a_traceback(task, tmp_path, capfd):
    assert status_of(st.__file__, *flags(task, tmp_path, "--fold", "9")) == 2
    told = capfd.readouterr().err
    assert (
        told.startswith("error: ") and "Traceback" not in told and not (tmp_path / "runs").exists()
    )


def test_two_processes_have_the_numbers_of_one(task, tmp_path):
    found = []
    script = tmp_path / "two.py"
    script.write_text(
        "import stformer\nfrom evaluation import genes\ngenes.draw = lambda *a: None\n"
        "stformer.run.cli(stformer.main)\n"
    )
    more = ("--fold", "0", "--folds", "3", "--members", "2")
    runs = [(n, flags(task, tmp_path / str(n), *more)) for n in (1, 2)]
    for (n, _), told in zip(runs, in_processes("stformer", script, runs)):
        record = json.loads(next((tmp_path / str(n)).rglob("run.json")).read_text())
        lines = told.splitlines()
        assert record["processes"] == n and told.count("gain over ridge") == 1
        assert len(lines) == len(set(lines)), "a line is printed by every process"
        with np.load(next((tmp_path / str(n)).rglob("arrays.npz"))) as arrays:
            found.append((record["metrics"], record["baselines"], arrays["pred"]))
    assert (
        found[0][0] == found[1][0]
        and found[0][1] == found[1][1]
        and (found[0][2] == found[1][2]).all()
    )


def test_bad_flags(task, tmp_path):
    fails(flags(task, tmp_path, "--split", "section", "--slice", "S9"), "S9", "S1")
    fails(flags(task, tmp_path, "--split", "patient", "--patient", "nobody"), "nobody")
    fails(flags(task, tmp_path, "--interactions", "p2p,h2x"), "h2x")
    fails(flags(task, tmp_path, "--genes", str(tmp_path / "none.json")), "none.json")
    assert not (tmp_path / "runs").exists()


def test_loss_that_a_bag_of_one_slide_lacks(task, tmp_path):
    more = ("--mode", "global", "--loss")
    fails(flags(task, tmp_path, *more, "mse_pcc"), "--mode global", "--batch 2")
    sets = ("--gene_sets", "a.gmt", "--lambda_pathway", "0.5")
    fails(flags(task, tmp_path, *more, "mse", *sets), "--lambda_pathway 0.5", "--batch 2")


def test_softplus_of_standardised_genes(task, tmp_path):
    fails(flags(task, tmp_path, "--head", "softplus"), "--head", "--target_scale none")


def test_gmt_without_a_gene_of_the_panel(task, tmp_path):
    (tmp_path / "a.gmt").write_text("SET\turl\tFOO\tBAR\n")
    fails(flags(task, tmp_path, "--gene_sets", str(tmp_path / "a.gmt")), "a.gmt", "gene naming")
    fails(flags(task, tmp_path, "--gene_sets", str(tmp_path / "missing.gmt")), "missing.gmt")


def test_feature_width_differs_from_the_checkpoint(task, tmp_path, capsys):
    st.main(flags(task, tmp_path, "--epochs", "1"))
    path = Path(capsys.readouterr().out.strip().splitlines()[-1])
    wide = tmp_path / "wide"
    wide.mkdir()
    np.savez(
        wide / "a.npz",
        embedding=np.zeros((30, 7)),
        barcodes=np.arange(30).astype(str),
        coords=np.random.default_rng(0).random((30, 2)),
    )
    fails(
        [
            "--data",
            str(wide),
            "--predict",
            str(path.with_name("model.pt")),
            "--runs",
            str(tmp_path / "p"),
        ],
        "7 features",
        "42",
    )
    fails(
        ["--data", str(wide), "--predict", str(path), "--runs", str(tmp_path / "p")],
        "run.json",
        "checkpoint",
    )
    fails(
        ["--data", str(tmp_path / "nothing"), "--predict", str(path.with_name("model.pt"))],
        "nothing",
    )
    assert not (tmp_path / "p").exists()


def changed(task, tmp_path, change, name="S1"):
    """A copy of the task with the h5ad (and patches) of one slide changed."""
    import h5py

    root = tmp_path / "changed"
    subprocess.run(["cp", "-r", str(task), str(root)], check=True)
    with (
        h5py.File(root / "adata" / f"{name}.h5ad", "r+") as adata,
        h5py.File(root / "patches" / f"{name}.h5", "r+") as patches,
    ):
        change(adata, patches)
    return root


def test_disjoint_barcodes(task, tmp_path):
    def rename(adata, patches):
        patches["barcode"][:] = np.array(
            [[f"X{i}"] for i in range(60)], dtype=patches["barcode"].dtype
        )

    fails(flags(changed(task, tmp_path, rename), tmp_path), "barcode", "S1")


def test_slide_of_one_spot(task, tmp_path):
    def one_spot(adata, patches):
        names = patches["barcode"][:]
        names[1:] = np.array([[f"X{i}"] for i in range(59)], dtype=names.dtype)
        patches["barcode"][:] = names

    fails(flags(changed(task, tmp_path, one_spot), tmp_path), "S1", "1 spot")


def test_slide_of_low_counts(task, tmp_path):
    fails(flags(task, tmp_path, "--min_counts", "1000000"), "1000000 counts", "--min_counts")


def test_all_zero_gene(task, tmp_path):
    gene = "SIM99999"
    (tmp_path / "genes.json").write_text(json.dumps([*data.hest_genes(task)[:5], gene]))
    fails(
        flags(task, tmp_path, "--genes", str(tmp_path / "genes.json")),
        gene,
        "no count in any training slide",
    )


def test_nan_features(task, tmp_path):
    for n in data.hest_samples(task):
        slide = data.load_hest(task, n, patches=False)
        x = np.ones((slide.n_spots, 4))
        x[3] = np.nan
        np.savez(tmp_path / f"{n}.npz", embedding=x, barcodes=slide.barcodes)
    fails(flags(task, tmp_path, "--encoder", str(tmp_path / "{sample}.npz")), "S", "NaN")


def features_of(task, folder, width=4):
    """A features file of every slide of the task; the pattern of their names."""
    for name in data.hest_samples(task):
        slide = data.load_hest(task, name, patches=False)
        x = np.random.default_rng(0).normal(size=(slide.n_spots, width))
        np.savez(folder / f"{name}.npz", embedding=x, barcodes=slide.barcodes)
    return str(folder / "{sample}.npz")


def test_features_of_two_widths(task, tmp_path):
    pattern = features_of(task, tmp_path)
    with np.load(tmp_path / "S3.npz") as file:
        np.savez(tmp_path / "S3.npz", embedding=np.ones((60, 7)), barcodes=file["barcodes"])
    fails(flags(task, tmp_path, "--encoder", pattern), "S3", "7 features", "one encoder")


def test_features_without_the_barcodes_of_a_section(task, tmp_path):
    pattern = features_of(task, tmp_path)
    np.savez(tmp_path / "S2.npz", embedding=np.ones((2, 4)), barcodes=np.array(["a", "b"]))
    fails(flags(task, tmp_path, "--encoder", pattern), "S2", "lacks 60 of the 60 barcodes")
    (tmp_path / "S2.npz").unlink()
    fails(flags(task, tmp_path, "--encoder", pattern), "S2.npz")


def test_checkpoint_without_weights_of_a_layer(task, tmp_path, capsys):
    st.main(flags(task, tmp_path, "--epochs", "1"))
    path = Path(capsys.readouterr().out.strip().splitlines()[-1]).with_name("model.pt")
    saved = torch.load(path, weights_only=True)
    del saved["weights"][0]["layers.1.attention.out.weight"]
    torch.save(saved, tmp_path / "part.pt")
    argv = ["--data", str(task), "--predict", str(tmp_path / "part.pt")]
    fails([*argv, "--runs", str(tmp_path / "p")], "part.pt", "model.pt of a finished run")
    assert not (tmp_path / "p").exists()


# ---------------------------------------------------------------------------------------- real data


def test_her2st_low_counts_are_filtered_and_baselines_are_above_chance(real_data, tmp_path, capsys):
    root = real_data / "her2st"
    config = tuned(data=str(root), cache=str(tmp_path), encoder=str(tmp_path / "{sample}.npz"))
    for n in ("C4", "C5"):  # every fourth pixel: quick
        slide = data.load_hest(root, n)
        np.savez(
            tmp_path / f"{n}.npz",
            embedding=data.handmade_descriptor(slide.patches[:][:, ::4, ::4]),
            barcodes=slide.barcodes,
        )
    raw, names = genes.load(config, ["C4"], ["C5"])
    assert "C5: 2 of 181 spots" in capsys.readouterr().out and len(names) == 50
    found = patch_baselines.classical_baselines([raw["C4"]], [raw["C5"]])
    scores = {n: genes.score([raw["C5"]], p)["pcc_mean"] for n, p in found.items()}
    assert scores["train_mean"] == 0 and scores["ridge_raw"] > 0.15


# -------------------------------------------------------------------------------------------- bench


def test_share_of_the_ridge_is_chosen_on_inner_parts(task, tmp_path, monkeypatch):
    """The average takes what is better on the inner parts, and the two are mixed on the test
    slides; without inner parts there is no row."""
    runs = genes.Task(run.parse(st.Config, flags(task, tmp_path, "--folds", "2")))
    runs.load()
    inner = [(part, None) for part in runs.inner_parts(2)]
    result = type("Result", (), {"predictions": [np.zeros(s.y.shape) for s in runs.test]})
    for true_network, share in ((True, 0.0), (False, 1.0)):

        def answer(samples, is_true):
            rng = np.random.default_rng(0)
            return [s.y.numpy() if is_true else rng.normal(size=s.y.shape) for s in samples]

        ridge = type(
            "Ridge",
            (),
            {"predict": lambda self, fit, test, a=answer, t=true_network: a(test, not t)},
        )()
        monkeypatch.setattr(
            patch_baselines,
            "predict",
            lambda models, s, *_, a=answer, t=true_network: (a([s], t)[0], None),
        )
        row = patch_baselines.average_row(runs, result, inner, ridge)["average_with_ridge"]
        assert row["ridge_share"] == share
    assert row["pcc_mean"] == pytest.approx(1)
    assert patch_baselines.average_row(runs, result, [], ridge) == {}


def test_ridge_path_is_the_normal_equation():
    rng = np.random.default_rng(0)
    for n, f in ((80, 12), (20, 50)):
        x, y = rng.normal(size=(n, f)) * 3 + 2, rng.normal(size=(n, 4)) + 5
        z = (x - x.mean(0)) / x.std(0)
        path = baselines.ridge_path(x, y, [x], (0.5, 100.0))
        for penalty, (found,) in zip((0.5, 100.0), path):
            want = Ridge(alpha=penalty).fit(z, y).predict(z)
            assert np.allclose(found, want, atol=1e-8)


def test_ridge_reads_what_the_network_reads():
    """Rings against a loop; a spot without a neighbour in a ring stands for it."""
    sample = sample_of(40, rings=1)
    x, inputs = sample.x.double().numpy(), patch_baselines.with_rings(sample)
    n_rings = int(sample.ring.max())
    assert inputs.shape == (40, 8 * (1 + n_rings)) and np.allclose(inputs[:, :8], x)
    for i in range(40):
        for ring in range(1, n_rings + 1):
            rows = sample.table[i][sample.ring[i] == ring].tolist() or [i]
            mean = x[rows].mean(0)
            assert np.allclose(inputs[i, 8 * ring : 8 * ring + 8], mean, atol=1e-5)
    placed = patch_baselines.with_place(sample)
    n_place = placed.shape[1] - inputs.shape[1]
    assert n_place == 2 * patch_baselines.N_CHANNELS and np.allclose(placed[:, :-n_place], inputs)


def test_penalty_is_chosen_on_inner_parts(task, tmp_path):
    runs = genes.Task(run.parse(st.Config, flags(task, tmp_path)))
    runs.load()
    inner = runs.inner_parts(5)
    ridge = patch_baselines.ChosenRidge(patch_baselines.own, inner)
    scores = []
    for penalty in patch_baselines.PENALTIES:
        found = []
        for part in inner:
            assert not {s.name for s in part.fit} & {s.name for s in part.val}
            path = ridge.path(part.fit, part.val, [penalty])
            found.append(hest.score(part.val, path[0])["pcc_mean"])
        scores.append(np.mean(found))
    assert ridge.penalty == patch_baselines.PENALTIES[np.argmax(scores)]


def test_coordinates_alone():
    """Values that are a function of the place are met where a section of the patient trains; of
    another patient only what depends on the distance from the middle is."""
    slides = [dataclasses.replace(sample_of(300, seed=i), patient="P") for i in range(3)]
    for s in slides:
        s.y = torch.stack([s.place[:, 0], s.place.norm(dim=1)], 1)
        s.measured = torch.ones(2, dtype=torch.bool)
    r = metrics.pcc(slides[2].y.numpy(), patch_baselines.of_place(slides[:2], slides[2]))
    assert (r > 0.95).all()
    other = dataclasses.replace(slides[2], patient="Q")
    r = metrics.pcc(other.y.numpy(), patch_baselines.of_place(slides[:2], other))
    assert abs(r[0]) < 0.3 and r[1] > 0.9


def test_the_record_lists_fold_genes_and_metadata(real_data):
    root = real_data / "her2st"
    slide = data.load_hest(root, "A2", counts=False)
    more = hest.task_files(tuned(data=str(root), fold=1))
    files = run.list_files(input_files([slide], "handmade", more), root)
    assert list(files) == [
        "adata/A2.h5ad",
        "metadata.csv",
        "patches/A2.h5",
        "splits/train_1.csv",
        "splits/test_1.csv",
        "var_50genes.json",
    ]
    genes = hest.task_files(tuned(data="none", split="section", genes="mine.json"))
    assert [str(path) for path in genes] == ["mine.json"]
