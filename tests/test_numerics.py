"""Losses in float32 against float64, their gradients against finite differences, and inputs at the
edge: huge counts, empty spots, constant genes, spots at one place."""

import dataclasses
import json

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch.nn import functional as F

import cmrcnet
import data
import gat_fusion
import multist
import spatia
import stformer
from evaluation import domains
from plainst import simulate


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


MASK = (drawn(2, 9, 5, seed=7) > -0.8).double()
MEMBER = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 1, 1]], dtype=torch.float64)
COUNTS = torch.tensor([0.0, 1, 7, 40, 300], dtype=torch.float64).expand(2, 9, 5)


def edges(z):
    """The two halves of multist.edge_loss on fixed pairs."""
    pairs = torch.tensor([[0, 1, 2, 5], [3, 4, 6, 7]])
    return (
        F.softplus(-multist.edge_logits(z, pairs)).mean()
        + F.softplus(multist.edge_logits(z, pairs.flip(0).roll(1, 1))).mean()
    )


# name: (loss of its arguments, the arguments); each is smooth where it is taken
LOSSES = {
    "gat_fusion cross-entropy": (
        lambda h: F.cross_entropy(
            h, torch.arange(8) % 3, gat_fusion.class_weights(np.arange(8) % 3, 3).to(h.dtype)
        ),
        [drawn(8, 3)],
    ),
    "multist edges": (edges, [drawn(8, 4)]),
    "multist masked consistency": (
        lambda a, b: multist.masked_consistency(a, b, torch.tensor([0, 2, 5])),
        [drawn(8, 4), drawn(8, 4, seed=1)],
    ),
    "multist DEC": (
        lambda z, c: multist.dec_kl(
            multist.dec_p(multist.dec_q(drawn(8, 4).to(z.dtype), drawn(3, 4, seed=1).to(z.dtype))),
            multist.dec_q(z, c),
        ),
        [drawn(8, 4), drawn(3, 4, seed=1)],
    ),
    "multist SDM": (lambda a, b: multist.sdm(a, b, 0.1), [drawn(8, 4), drawn(8, 4, seed=1)]),
    "multist contrast": (
        lambda a, b: multist.info_nce(a, b, 0.1),
        [drawn(8, 4), drawn(8, 4, seed=1)],
    ),
    "cmrcnet contrast": (
        lambda z, h: cmrcnet.contrastive(z, h).mean(),
        [drawn(8, 4), drawn(8, 4, seed=1)],
    ),
    "cmrcnet contrast of cosines": (
        lambda z, h: cmrcnet.contrastive(z, h, 0.2, True).mean(),
        [drawn(8, 4), drawn(8, 4, seed=1)],
    ),
    "cmrcnet reconstruction, mse": (
        lambda r, z: cmrcnet.reconstruction_error(r, z, "mse").mean(),
        [drawn(8, 4), drawn(8, 4, seed=1)],
    ),
    "cmrcnet reconstruction, cosine": (
        lambda r, z: cmrcnet.reconstruction_error(r, z, "cosine").mean(),
        [drawn(8, 4), drawn(8, 4, seed=1)],
    ),
    "stformer MSE": (
        lambda p, t: stformer.masked_mse(p, t, MASK.to(p.dtype)),
        [drawn(2, 9, 5), drawn(2, 9, 5, seed=1)],
    ),
    "stformer PCC": (
        lambda p, t: stformer.pcc_loss(p, t, MASK.to(p.dtype)),
        [drawn(2, 9, 5), drawn(2, 9, 5, seed=1)],
    ),
    "stformer ZINB": (
        lambda m, t, p: stformer.zinb_nll(
            COUNTS.to(m.dtype), m.exp(), t.exp(), p, MASK.to(m.dtype)
        ),
        [drawn(2, 9, 5), drawn(2, 9, 5, seed=1), drawn(2, 9, 5, seed=2)],
    ),
    "stformer pathways": (
        lambda s: stformer.pathway_loss(
            s, drawn(2, 9, 5).to(s.dtype), MASK.bool(), MEMBER.to(s.dtype)
        ),
        [drawn(2, 9, 2, seed=1)],
    ),
    "spatia contrast": (
        lambda a, b, t: spatia.info_nce(a, b, t, slice(None)),
        [drawn(8, 4), drawn(8, 4, seed=1), torch.tensor(-1.5, dtype=torch.float64)],
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients(name):
    """float32 within 1e-4 of float64, which finite differences confirm."""
    loss, inputs = LOSSES[name]
    found = []
    for kind in (torch.float64, torch.float32):
        args = [a.to(kind).requires_grad_() for a in inputs]
        value = loss(*args)
        found.append(
            [value.detach().double(), *(g.double() for g in torch.autograd.grad(value, args))]
        )
        assert all(torch.isfinite(f).all() for f in found[-1])
    for exact, single in zip(*found):
        assert (exact - single).abs().max() <= 1e-4 * exact.abs().max().clamp_min(1)
    assert torch.autograd.gradcheck(loss, [a.clone().requires_grad_() for a in inputs], atol=1e-6)


def test_the_fisher_metric_is_a_constant():
    """Its gradient is that of the distance in a metric that stands still, by finite differences
    with the metric held."""
    a, b = drawn(40, 5), 1.5 * drawn(40, 5, seed=1) + 0.3
    metric = (torch.cov(a.T) + torch.cov(b.T)) / 2
    metric = metric + 1e-3 * metric.diagonal().mean() * torch.eye(5, dtype=torch.float64)
    (grad,) = torch.autograd.grad(multist.fisher_mmd(a.requires_grad_(), b), a)
    step = 1e-6 * drawn(40, 5, seed=2)

    def held(a):
        gap = a.mean(0) - b.mean(0)
        return gap @ torch.linalg.solve(metric, gap)

    assert float((grad * step).sum()) == pytest.approx(
        float(held(a.detach() + step) - held(a.detach() - step)) / 2, rel=1e-5
    )
    assert float(multist.fisher_mmd(a.detach().float(), b.float())) == pytest.approx(
        float(multist.fisher_mmd(a.detach(), b)), rel=1e-4
    )


def test_zinb_of_a_million_counts():
    """Counts of a million: float32 within 1e-4 of float64."""
    y = torch.tensor([[[0.0, 1e6]]], dtype=torch.float64)
    args = (y, 0 * y + 9e5, 0 * y + 2, 0 * y - 1, 0 * y + 1)
    exact, single = (
        float(stformer.zinb_nll(*(a.to(kind) for a in args)))
        for kind in (torch.float64, torch.float32)
    )
    assert np.isfinite(exact) and single == pytest.approx(exact, rel=1e-4)


@pytest.fixture(scope="module")
def harsh(tmp_path_factory):
    """A cortex with a gene of a million UMIs in a spot, spots without UMIs, a constant gene, a gene
    of zeros, and five spots at one place."""
    slide = simulate.simulate_cortex(400, 120, 5, seed=3)
    x = slide.counts.tolil()
    x[7] = 0
    x[8] = 0
    x[:, 3] = 0
    x[:, 4] = 2
    x[11, 5] = 10**6
    slide.counts = sp.csr_matrix(x.tocsr().astype(np.int32))
    slide.xy[20:25] = slide.xy[20]
    slide.library_size = np.asarray(slide.counts.sum(1), np.float64).ravel()
    path = tmp_path_factory.mktemp("harsh") / "s1"
    simulate.write_visium(slide, path)
    return path


def finite_record(folder):
    (path,) = folder.rglob("run.json")
    told, arrays = json.loads(path.read_text()), np.load(path.with_name("arrays.npz"))
    for name in arrays:
        assert (
            arrays[name].dtype.kind != "f"
            or not arrays[name].size
            or np.isfinite(arrays[name]).mean() > 0.98
        ), name
    return told


def test_gat_fusion_on_a_harsh_slide(harsh, tmp_path):
    gat_fusion.main(f"--data {harsh} --epochs 4 --dim 16 --runs {tmp_path}".split())
    assert all(np.isfinite(v) for v in finite_record(tmp_path)["metrics"].values() if v is not None)


def test_multist_on_a_harsh_slide(harsh, tmp_path):
    multist.main(
        [
            "--data",
            str(harsh),
            "--epochs",
            "12",
            "--dec_epochs",
            "4",
            "--fusion_epochs",
            "1",
            "--n_starts",
            "1",
            "--permutations",
            "5",
            "--gan",
            "fisher",
            "--fused_dim",
            "16",
            "--no-figures",
            "--runs",
            str(tmp_path),
        ]
    )
    told = finite_record(tmp_path)
    assert all(np.isfinite(r["value"]) and np.isfinite(r["grad_norm"]) for r in told["losses"])


def test_inputs_of_a_harsh_slide_stay_within_their_bounds(harsh):
    slide = data.load_visium(harsh)
    z = data.Expression(100).fit(slide.counts, slide.genes).transform(slide.counts, slide.genes)
    assert np.isfinite(z).all() and abs(z).max() <= 10.0
    x = domains.preprocess(slide, dataclasses.replace(multist.Config(), n_pcs=20))
    assert (
        np.isfinite(x).all()
        and np.isfinite(domains.preprocess(slide, multist.Config(norm="cpm", n_pcs=20))).all()
    )


def test_a_niche_of_one_cell_and_of_none():
    """One member: finite, and its own content counts. All members absent: what they hold changes
    nothing, and the gradient is finite."""
    torch.manual_seed(0)
    reader, where = spatia.SetTransformer(8, 2, 4, 1), torch.zeros(3, 1, 2)
    one, other = torch.randn(3, 1, 8), torch.randn(3, 1, 8)
    assert torch.isfinite(reader(one, where)).all() and not torch.allclose(
        reader(one, where), reader(other, where)
    )
    nobody = torch.zeros(3, 1, dtype=torch.bool)
    assert torch.equal(reader(one, where, nobody), reader(other, where, nobody))
    reader(one.requires_grad_(), where, nobody).square().sum().backward()
    assert (one.grad == 0).all() and all(
        torch.isfinite(p.grad).all() for p in reader.parameters() if p.grad is not None
    )
