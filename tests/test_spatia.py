"""spatia: token merging, paths, leak rules, hidden genes, processes, resume, simulated truth,
records, bad input."""

import copy
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sparse
import torch
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import metrics
import spatia as sp
from conftest import in_processes, status_of
from data import DataError
from evaluation import cell_runs
from evaluation import cells as tasks
from evaluation.cell_baselines import (
    ALPHAS,
    COUNTS,
    density,
    equal_blocks,
    knn,
    niche_means,
    pca_impute,
    ridge,
    strips,
)
from plainst import run, simulate
from plainst.cell_batches import CellBatch, ContextBatch, cell_batch, context_batch, picture_batch
from plainst.cell_data import random_orientation
from plainst.patch_tokens import cut_patches, join_patches
from plainst.stages import Stages, step_generator
from plainst.transformer import Attention, Block, CrossBlock

SMALL = dataclasses.replace(
    sp.SIZES["tiny"],
    dim=16,
    image_layers=1,
    gene_layers=0,
    latents=3,
    niche=5,
    tissue=4,
    decoder_dim=16,
    decoder_layers=1,
    decoder_patch=4,
    steps=(4, 4, 4),
    batch=(16, 16, 8),
)


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    return simulate.simulate_cells(
        tmp_path_factory.mktemp("cells") / "field" / "cells.h5",
        n_cells=240,
        n_genes=48,
        n_sections=3,
        size=16,
    )


@pytest.fixture(autouse=True)
def small(request, monkeypatch):
    """Everything on a very small preset; figures only where the test is about them."""
    monkeypatch.setitem(sp.SIZES, "tiny", SMALL)
    if "figures" not in request.node.name:
        monkeypatch.setattr(cell_runs.figures, "draw_cells", lambda *args: None)


def flags(path, tmp_path, *more):
    draws = [] if "--no-generate" in more else ["--draws", "2", "--ode_steps", "2"]
    return [
        "--data",
        str(path),
        "--runs",
        str(tmp_path / "runs"),
        "--device",
        "cpu",
        *draws,
        *more,
    ]


def config_of(path, *more):
    return run.parse(sp.Config, ["--data", str(path), "--device", "cpu", *more])


def stages_of(config, folder):
    """A checkpoint in `folder`; none is written without --save_every."""
    return Stages(config, Path(folder) / "latest.pt", "spatia checkpoint", "", "cells")


@pytest.fixture(scope="module")
def trained(cells, tmp_path_factory):
    """A field, a cell model, conditions, a generator with random (not zero) output layers: enough
    for the leak rules."""
    config = config_of(cells)
    field = cell_runs.load(config, SMALL, torch.device("cpu"))
    torch.manual_seed(0)
    cell = sp.CellModel(field.shape, field.cells.n_genes, SMALL).eval()
    generator = sp.Generator(config, field.shape, field.cells.n_genes, SMALL, cell.gene).eval()
    for p in generator.parameters():
        torch.nn.init.normal_(p, std=0.1)
    context = sp.ContextModel(field.cells.n_genes, SMALL).eval()
    return config, field, cell, generator, context


# ------------------------------------------------------------------------------------ token merging


def test_rho_zero_is_the_plain_block_bit_for_bit():
    torch.manual_seed(0)
    block = sp.DiTBlock(16, 2, 2)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, c, y = torch.randn(3, 64, 16), torch.randn(3, 16), torch.randn(3, 5, 16)
    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulate(c)[:, None].chunk(6, -1)
    plain = x + gate1 * block.attention(block.norm1(x) * (1 + scale1) + shift1)
    plain = plain + block.cross(block.norm2(plain), y)
    plain = plain + gate2 * block.ffn(block.norm3(plain) * (1 + scale2) + shift2)
    assert torch.equal(block(x, c, y, 0.0), plain)
    assert not torch.allclose(block(x, c, y, 0.5), plain, atol=1e-3)


def naive_groups(f, rho, choice):
    """The same matching for one picture, one token after the other."""
    n = len(f)
    side = round(n**0.5)
    cells = [
        [(2 * i + a) * side + 2 * j + b for a in (0, 1) for b in (0, 1)]
        for i in range(side // 2)
        for j in range(side // 2)
    ]
    dst = [cell[k] for cell, k in zip(cells, choice.tolist())]
    found = []
    for s in sorted(set(range(n)) - set(dst)):
        best = [
            (float(torch.cosine_similarity(f[s], f[d], 0)), k)
            for k, d in enumerate(dst)
            if max(abs(s // side - d // side), abs(s % side - d % side)) <= 2
        ]
        found.append((max(best), s))
    found.sort(key=lambda v: -v[0][0])
    group = {d: {d} for d in dst}
    for (_, k), s in found[: round(rho * n)]:
        group[dst[k]].add(s)
    return sorted(map(sorted, [*group.values(), *({s} for _, s in found[round(rho * n) :])]))


@pytest.mark.parametrize("rho", [0.25, 0.5, 0.75])
def test_merging_equals_the_naive_matching(rho):
    torch.manual_seed(1)
    f, choice = torch.randn(2, 64, 8), torch.randint(4, (2, 16))
    groups = sp.merge_groups(f, rho, choice)
    assert groups.shape == (2, 64 - round(rho * 64), 64) and (groups.sum(1) == 1).all()
    for b in range(2):
        assert sorted(torch.nonzero(row).flatten().tolist() for row in groups[b]) == naive_groups(
            f[b], rho, choice[b]
        )


def test_merged_tokens_are_near_and_unmerging_inverts_equal_tokens():
    torch.manual_seed(2)
    groups = sp.merge_groups(torch.randn(1, 256, 8), 0.75)
    for row in groups[0]:
        at = torch.nonzero(row).flatten()
        place = torch.stack([at // 16, at % 16], 1)
        # each within 2 of the destination they share
        assert (place[:, None] - place).abs().amax() <= 4
    # two rows of the grid are equal: merging what is equal loses nothing
    x = torch.randn(1, 64, 8)[:, torch.arange(64) // 16 * 16]
    groups = sp.merge_groups(x, 0.5)
    back = groups.transpose(1, 2) @ (groups @ x / groups.sum(-1, keepdim=True))
    assert torch.allclose(back, x, atol=1e-6)


def test_proportional_attention_equals_attention_on_copies():
    """Merged tokens that are equal weigh as much as their members: same output as plain
    attention."""
    torch.manual_seed(3)
    attention = Attention(8, 2)
    x = torch.randn(2, 64, 8)[:, torch.arange(64) // 16 * 16]
    assert torch.allclose(sp.merged_attention(attention, x, 0.5), attention(x), atol=1e-5)


def test_gradients_through_merging_are_finite_and_reach_every_token():
    x = torch.randn(2, 64, 8, requires_grad=True)
    sp.merged_attention(Attention(8, 2), x, 0.75).square().sum().backward()
    assert torch.isfinite(x.grad).all() and (x.grad.abs().sum(-1) > 0).all()


# -------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize("path, steps", [("flow", 1), ("ddpm", 200)])
def test_sampler_inverts_the_path(path, steps):
    """With the true velocity towards one image the sampler arrives at that image."""
    torch.manual_seed(0)
    x0, x1 = torch.randn(2, 1, 4, 4), torch.rand(2, 1, 4, 4) * 2 - 1

    def velocity(x, t):
        if path == "flow":
            return x1 - x0
        return sp.on_path("ddpm", t, x0, x1)[1]

    assert torch.allclose(sp.sample(path, velocity, x0, steps), x1, atol=1e-5)
    for t in (0.0, 1.0):
        assert torch.allclose(
            sp.on_path(path, torch.full((2,), t), x0, x1)[0], x1 if t else x0, atol=1e-6
        )


def test_path_targets_are_the_derivatives():
    """flow: d x_t / d t; ddpm: minus the derivative by the angle pi t / 2."""
    (x0, x1), t, e = (
        torch.randn(2, 3, 1, 2, 2, dtype=torch.float64),
        torch.rand(3, dtype=torch.float64),
        1e-6,
    )
    for path, factor in (("flow", 1), ("ddpm", -2 / torch.pi)):
        slope = (sp.on_path(path, t + e, x0, x1)[0] - sp.on_path(path, t - e, x0, x1)[0]) / (2 * e)
        assert torch.allclose(sp.on_path(path, t, x0, x1)[1], factor * slope, atol=1e-6)


@pytest.mark.parametrize("path", ["flow", "ddpm"])
def test_two_gaussians_are_recovered(path):
    """The best velocity for 1-D data at -1 and +1 (closed form posterior mean) gives back both,
    half and half."""

    def velocity(x, t):
        s, a = (
            (1 - t, t)
            if path == "flow"
            else (torch.cos(torch.pi * t / 2), torch.sin(torch.pi * t / 2))
        )
        s, a = (v.view(-1, 1, 1, 1) for v in (s, a))
        x1 = torch.tanh(a * x / s.clamp(min=1e-3) ** 2)  # E[x1 | x_t]
        x0 = (x - a * x1) / s.clamp(min=1e-3)
        return x1 - x0 if path == "flow" else a * x0 - s * x1

    torch.manual_seed(0)
    found = sp.sample(path, velocity, torch.randn(4000, 1, 1, 1), 40).flatten()
    assert ((found.abs() - 1).abs() < 0.15).float().mean() > 0.95 and abs(
        (found > 0).float().mean() - 0.5
    ) < 0.05


# --------------------------------------------------------------------------------------- leak rules


def changed_field(field, images=(), counts=()):
    """The field with the pictures, or the counts, of some cells changed."""
    out = copy.copy(field)
    out.stored, out.counts = field.stored.clone(), field.counts.copy().tolil()
    for i in images:
        out.stored[i] = 255 - out.stored[i]
    for i in counts:
        out.counts[i] = out.counts[i].toarray()[:, ::-1] * 2 + 1
    out.counts = out.counts.tocsr()
    return out


def test_the_generator_reads_expression_only(trained):
    """Own and neighbours' pictures change nothing in the condition; own, a niche member's and a far
    cell's expression do."""
    config, field, cell, generator, _ = trained
    i = int(field.rows["test"][0])
    near = int(field.niche[i, 0])
    far = int(
        np.flatnonzero(
            np.isin(field.square, field.tissue[i])
            & ~np.isin(np.arange(240), [*field.niche[i].tolist(), i])
        )[0]
    )
    outside = int(field.rows["train"][0])

    def condition(f):
        with torch.no_grad():
            return cell_runs.Conditions(f, cell)(generator, [i])

    base = condition(field)
    assert torch.equal(base, condition(changed_field(field, images=[i, near, far])))
    for row in (i, near, far):
        assert (base - condition(changed_field(field, counts=[row]))).abs().max() > 1e-5, row
    # another part of the split: no neighbour
    assert torch.equal(base, condition(changed_field(field, counts=[outside])))


def test_images_to_genes_never_reads_expression(trained):
    config, field, cell, _, context = trained
    rows = field.rows["test"][:3]
    i, near = int(rows[0]), int(field.niche[rows[0], 0])

    def predicted(f, on=(True, True)):
        z = cell_runs.embed_all(cell, f, modality="img")["img"]
        return torch.tensor(cell_runs.context_genes(f, context, z[rows], z, rows, on)[0][0])

    base = predicted(field)
    assert torch.equal(base, predicted(changed_field(field, counts=[i, near])))
    assert not torch.allclose(base, predicted(changed_field(field, images=[near])), atol=1e-6)
    # without context: own picture only
    off, moved = (False, False), changed_field(field, images=[i])
    assert torch.equal(predicted(field, off), predicted(changed_field(field, images=[near]), off))
    assert not torch.allclose(predicted(field, off), predicted(moved, off), atol=1e-6)
    # the niche alone: its pictures, not those of the tissue
    far = next(
        int(j)
        for j in np.flatnonzero(np.isin(field.square, field.tissue[i]))
        if j not in field.niche[i]
    )
    niche, farther = (True, False), changed_field(field, images=[far])
    assert torch.equal(predicted(field, niche), predicted(farther, niche))
    assert not torch.equal(predicted(field), predicted(farther))
    assert not torch.equal(predicted(field, niche), predicted(field, off))


def test_a_cell_is_no_member_of_its_surroundings(trained):
    """The self-excluded prediction of a cell does not move when its own embedding does."""
    _, field, cell, _, context = trained
    z = torch.randn(field.cells.n_cells, SMALL.dim)
    rows = field.rows["test"][:5]
    moved = z.clone()
    moved[rows[0]] += 5
    a, b = (cell_runs.context_genes(field, context, None, v, rows[:1])[0] for v in (z, moved))
    assert np.array_equal(a, b)
    assert not (
        field.niche.numpy()[np.concatenate(list(field.rows.values()))]
        == np.concatenate(list(field.rows.values()))[:, None]
    ).any()
    assert not (field.tissue == field.square[:, None])[field.square >= 0].any()


def test_neighbours_stay_within_section_and_part(trained):
    _, field, *_ = trained
    for part in ("train", "test"):
        rows = field.rows[part]
        assert np.isin(field.niche[rows], rows).all()
        assert (field.cells.section[field.niche[rows]] == field.cells.section[rows][:, None]).all()
        square = {
            int(s): field.cells.section[np.flatnonzero(field.square == s)[0]]
            for s in np.unique(field.tissue[rows])
            if s >= 0
        }
        assert all(
            square[int(s)] == field.cells.section[r]
            for r in rows
            for s in field.tissue[r]
            if s >= 0
        )


def test_hidden_genes_leave_no_trace(trained):
    """Whatever the hidden counts are, the visible values, the depth and the embedding are the
    same."""
    _, field, cell, *_ = trained
    counts = torch.tensor(field.counts[:4].toarray())
    hidden = torch.rand(4, counts.shape[1], generator=torch.Generator().manual_seed(0)) < 0.3
    loud = torch.where(hidden, 100 * counts + 7, counts)
    for a, b in zip(field.normalise(counts, hidden), field.normalise(loud, hidden)):
        assert torch.equal(a, b)
    z, depth = field.normalise(counts, hidden)
    assert (z[hidden] == 0).all()
    with torch.no_grad():
        assert torch.equal(
            cell.gene(z, depth, hidden), cell.gene(torch.where(hidden, 9.0, z), depth, hidden)
        )


def test_fitted_on_training_cells_only(trained, cells, tmp_path):
    """With the counts of the test cells poisoned, what is fitted is the same, bit for bit."""
    config, field, *_ = trained
    original = data.load_cells(cells)
    counts = original.counts.tolil()
    counts[field.rows["test"]] = counts[field.rows["test"]].toarray() * 9 + 1
    data.write_cells(
        tmp_path / "cells.h5",
        counts=counts.tocsr(),
        genes=original.genes,
        ids=original.ids,
        xy=original.xy,
        section=original.section,
        sections=original.sections,
        crops=original.crops[:],
        channels=original.channels,
        labels=original.labels,
        classes=original.classes,
    )
    state = []
    for path in (cells, tmp_path / "cells.h5"):
        config = config_of(path)
        f = cell_runs.load(config, SMALL, torch.device("cpu"))
        torch.manual_seed(0)
        model = sp.CellModel(f.shape, f.cells.n_genes, SMALL)
        sp.train_cells(config, SMALL, stages_of(config, tmp_path), f, model)
        state.append((f.normalise.state(), model.state_dict()))
    assert all(torch.equal(state[0][1][k], state[1][1][k]) for k in state[0][1])
    assert (
        torch.equal(state[0][0]["mean"], state[1][0]["mean"])
        and state[0][0]["median"] == state[1][0]["median"]
    )


# ------------------------------------------------------------------------------------------ modules


def test_evaluation_sees_the_whole_image_and_is_deterministic(trained):
    _, field, cell, *_ = trained
    rows = field.rows["test"][:6]
    a, b = (cell_runs.embed(cell, field, rows) for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    with torch.no_grad():
        x = field.images(rows)
        assert cell.image(x).shape == (6, 1 + cell.n_patches, SMALL.dim)
        for patch in range(cell.n_patches):  # every patch counts
            y = cut_patches(x, SMALL.patch).clone()
            y[:, patch] = -y[:, patch] + 0.3
            assert not torch.equal(
                cell.image(join_patches(y, SMALL.patch, 2))[:, 0], cell.image(x)[:, 0]
            )


def test_patches_and_their_inverse():
    x = torch.arange(2 * 3 * 8 * 8.0).view(2, 3, 8, 8)
    p = cut_patches(x, 4)
    assert torch.equal(join_patches(p, 4, 3), x) and torch.equal(
        p[0, 1].view(3, 4, 4), x[0, :, :4, 4:]
    )


def test_gene_tokens_start_at_the_principal_components():
    """Before any step the mean gene token holds the components linearly."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 8)) @ rng.standard_normal((8, 48)) + 2 * rng.standard_normal(
        (400, 48)
    )
    plain = sp.GeneTokenizer(48, SMALL)
    gene, z = copy.deepcopy(plain).init_from_pca(x), torch.tensor(x, dtype=torch.float32)
    assert torch.equal(gene.latents, plain.latents)
    scores = (x - x.mean(0)) @ np.linalg.svd(x - x.mean(0), full_matrices=False)[2][:8].T

    def explained(model):
        with torch.no_grad():
            token = model(z, torch.zeros(400, 1)).mean(1).numpy()
        fit = make_pipeline(StandardScaler(), RidgeCV(ALPHAS)).fit(token[:300], scores[:300])
        return fit.score(token[300:], scores[300:])

    assert explained(gene) > 0.9 > explained(plain) + 0.2


def test_absent_modalities(trained):
    """Leaving a modality out by a mask equals not giving it, and each of the three embeddings
    differs."""
    _, field, cell, *_ = trained
    rows = field.rows["train"][:4]
    with torch.no_grad():
        x_img, x_gene = cell.image(field.images(rows)), cell.gene(*field.expression(rows))
        off = torch.zeros(4, dtype=torch.bool)
        assert torch.allclose(
            cell.fuse(x_img, x_gene, ~off, off)[0], cell.fuse(x_img)[0], atol=1e-6
        )
        assert torch.allclose(
            cell.fuse(x_img, x_gene, off, ~off)[0],
            cell.fuse(cell.absent_img.repeat(2, 1)[: x_img.shape[1]].expand(4, -1, -1), x_gene)[0],
            atol=1e-6,
        )
        fused, img, gene = (
            cell.fuse(x_img, x_gene)[0],
            cell.fuse(x_img)[0],
            cell.fuse(None, x_gene)[0],
        )
    assert not torch.allclose(fused, img, atol=1e-3) and not torch.allclose(fused, gene, atol=1e-3)


def test_fusion_works_both_ways_and_can_be_left_out(trained):
    _, field, cell, *_ = trained
    rows = field.rows["train"][:2]
    with torch.no_grad():
        x_img, x_gene = cell.image(field.images(rows)), cell.gene(*field.expression(rows))
        _, img, gene = cell.fuse(x_img, x_gene)
        other_img, other_gene = (
            cell.fuse(x_img, x_gene.flip(2))[1],
            cell.fuse(x_img.flip(2), x_gene)[2],
        )
        assert not torch.allclose(img, other_img, atol=1e-4) and not torch.allclose(
            gene, other_gene, atol=1e-4
        )
        plain = sp.CellModel(field.shape, field.cells.n_genes, SMALL, fusion=False)
        assert torch.equal(plain.fuse(x_img, x_gene)[1], x_img) and torch.equal(
            plain.fuse(x_img, x_gene)[2], x_gene
        )


def test_info_nce_is_the_symmetric_cross_entropy():
    torch.manual_seed(0)
    a, b, log_tau = torch.randn(5, 4), torch.randn(5, 4), torch.tensor(0.5).log()
    score = torch.tensor([[float(torch.cosine_similarity(x, y, 0)) / 0.5 for y in b] for x in a])
    want = -(score.log_softmax(1).diagonal().sum() + score.T.log_softmax(1).diagonal().sum()) / 2
    assert torch.allclose(sp.info_nce(a, b, log_tau, slice(0, 5)), want, atol=1e-5)
    halves = [sp.info_nce(a, b, log_tau, rows) for rows in (slice(0, 2), slice(2, 5))]
    assert torch.allclose(sum(halves), want, atol=1e-5)


def softmax_read(attention, x, y, bias=0.0):
    """One picture's attention, head by head: x (n, d) reads y (m, d)."""
    heads, width = attention.heads, x.shape[1] // attention.heads
    q, kv, outs = attention.q(x), attention.kv(y), []
    k, v = kv[:, : x.shape[1]], kv[:, x.shape[1] :]
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        weights = (q[:, part] @ k[:, part].T / width**0.5 + bias).softmax(1)
        outs.append(weights @ v[:, part])
    return attention.out(torch.cat(outs, 1))


def test_attention_equals_its_equation():
    torch.manual_seed(0)
    attention, x, y, bias = (
        Attention(8, 2),
        torch.randn(2, 5, 8),
        torch.randn(2, 3, 8),
        torch.randn(2, 3),
    )
    found = attention(x, y, bias[:, None, None])
    for b in range(2):
        torch.testing.assert_close(found[b], softmax_read(attention, x[b], y[b], bias[b]))
        torch.testing.assert_close(attention(x)[b], softmax_read(attention, x[b], x[b]))
        # one set of queries for all
        shared = attention(x[:1], y)[b]
        torch.testing.assert_close(shared, softmax_read(attention, x[0], y[b]))


def test_blocks_equal_their_equations():
    torch.manual_seed(0)
    block, cross = Block(8, 2, 3), CrossBlock(8, 2, 3, 0.1)
    torch.nn.init.normal_(cross.scale)
    x, y = torch.randn(5, 8), torch.randn(3, 8)
    h = x + softmax_read(block.attention, block.norm(x), block.norm(x))
    torch.testing.assert_close(block(x[None])[0], h + block.ffn(h))
    h = x + cross.scale * softmax_read(cross.attention, cross.norm(x), cross.norm_y(y))
    torch.testing.assert_close(cross(x[None], y[None])[0], h + cross.ffn(h))
    linear1, linear2 = block.ffn[1], block.ffn[3]
    want = linear2(torch.nn.functional.gelu(linear1(block.ffn[0](x))))
    torch.testing.assert_close(block.ffn(x), want)


def test_the_cell_equals_its_equations(trained):
    """Fusion, the joined vector and the head of the genes, for one cell, written out."""
    _, field, cell, *_ = trained
    rows = field.rows["train"][:2]
    with torch.no_grad():
        x_img, x_gene = cell.image(field.images(rows)), cell.gene(*field.expression(rows))
        z, img, gene = cell.fuse(x_img, x_gene)
        genes = cell.genes(z, img, gene)
        for b in range(2):
            (to_img,), (to_gene,), (old_img, old_gene) = (
                cell.to_img,
                cell.to_gene,
                (x_img[b], x_gene[b]),
            )
            read = softmax_read(to_img.attention, to_img.norm(old_img), to_img.norm_y(old_gene))
            new_img = old_img + to_img.scale * read
            read = softmax_read(to_gene.attention, to_gene.norm(old_gene), to_gene.norm_y(old_img))
            new_gene = old_gene + to_gene.scale * read
            new_img, new_gene = new_img + to_img.ffn(new_img), new_gene + to_gene.ffn(new_gene)
            torch.testing.assert_close(img[b], new_img, rtol=1e-4, atol=1e-5)
            want = cell.norm(cell.join(torch.cat([new_img[0], new_gene.mean(0)])))
            torch.testing.assert_close(z[b], want, rtol=1e-4, atol=1e-5)
            read = softmax_read(cell.query, cell.gene.name, torch.cat([new_img, new_gene]))
            for g in (0, 17, 47):
                value = cell.gene.name[g] @ cell.hidden(want)
                value = value + cell.to_value(read[g])[0] + cell.bias[g]
                torch.testing.assert_close(genes[b, g], value, rtol=1e-4, atol=1e-5)


def test_the_union_equals_its_equation(trained):
    _, field, _, _, context = trained
    z, rows = torch.randn(field.cells.n_cells, SMALL.dim), field.rows["test"][:3]
    near, near_places, far, far_places, exists = field.surroundings(z, field.square_means(z), rows)
    with torch.no_grad():
        z_niche = context.niche(near, near_places)
        z_tissue = context.tissue(far, far_places, exists)
        gate_n, gate_t = context.gates
        union = (
            z[rows] + gate_n * context.from_niche(z_niche) + gate_t * context.from_tissue(z_tissue)
        )
        has_context = torch.tensor([[True, True], [False, False], [True, False]])
        found = context(z[rows], near, near_places, far, far_places, exists, has_context)
        niche_only = z[rows] + gate_n * context.from_niche(z_niche)
        wanted = torch.stack([union[0], z[rows][1], niche_only[2]])
    torch.testing.assert_close(found, context.norm(wanted))


@pytest.mark.parametrize("path", ["flow", "ddpm"])
def test_the_target_follows_from_the_painted_picture(trained, path):
    """The network's target is the one of a path that ends in the picture it paints: from x_t and
    the target that picture can be computed, and it lies within +-1.05."""
    _, field, _, generator, _ = trained
    generator = copy.deepcopy(generator)
    generator.path = path
    x, t = torch.randn(3, 2, 16, 16), torch.tensor([0.1, 0.5, 0.8])
    y = torch.randn(3, *generator.null.shape)
    with torch.no_grad():
        u, s = generator(x, t, y), t[:, None, None, None]
    if path == "flow":
        picture = x + (1 - s) * u
        noise = (x - s * picture) / (1 - s)
    else:
        sine, cosine = torch.sin(torch.pi * s / 2), torch.cos(torch.pi * s / 2)
        picture, noise = sine * x - cosine * u, cosine * x + sine * u
    assert 0.01 < picture.std() and picture.abs().max() < 1.0501
    on_path, target = sp.on_path(path, t, noise, picture)
    torch.testing.assert_close(on_path, x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(target, u, rtol=1e-3, atol=1e-3)


def test_the_losses_of_the_stages_are_their_parts(trained):
    """Stage A: hidden genes, hidden patches and contrast, summed row by row; stage B: the genes
    that are not shown, and the cosine where nothing is."""
    config, field, cell, _, context = trained
    with torch.no_grad():
        batch = cell_batch(field, step_generator(0, 0, 0), 12, cell.n_patches, 0.3, 0.5, 0.3)
        assert isinstance(batch, CellBatch) and not (batch.has_img & batch.has_gene).all()
        x_img = cell.image(batch.picture, batch.keep)
        x_gene = cell.gene(batch.expression, batch.depth, batch.hidden)
        z, img, gene = cell.fuse(x_img, x_gene, batch.has_img, batch.has_gene)
        guess, painted = cell.genes(z, img, gene), cell.mae_decode(img, batch.keep)
        target = cut_patches(batch.picture, SMALL.patch)
        want = sp.info_nce(
            cell.fuse(x_img)[0], cell.fuse(None, x_gene)[0], cell.log_tau, batch.rows
        )
        want = 0.1 * want
        for b in range(12):
            lost = [p for p in range(cell.n_patches) if p not in batch.keep[b].tolist()]
            genes = batch.hidden[b] if batch.has_gene[b] else torch.ones(48, dtype=torch.bool)
            want = want + (guess[b] - batch.target[b])[genes].square().mean()
            if batch.has_img[b]:
                want = want + (painted[b] - target[b])[lost].square().mean()
        torch.testing.assert_close(sp.cell_loss(config, cell, batch), want, rtol=1e-4, atol=1e-4)

        cached = torch.stack(list(cell_runs.embed_all(cell, field).values()))
        squares = torch.stack([field.square_means(v) for v in cached])
        batch = context_batch(field, step_generator(0, 1, 0), 12, 0.2, 0.5)
        assert isinstance(batch, ContextBatch) and len(batch.shown.unique()) == 4
        losses = []
        for b in range(12):
            row, shown, modality = (
                batch.rows[b : b + 1],
                int(batch.shown[b]),
                int(batch.modality[b]),
            )
            z = context.absent[None]
            if shown:
                mask = batch.hidden[b : b + 1] if shown > 1 else None
                name = ("img", "gene", "fused")[shown - 1]
                z = cell_runs.embed(cell, field, row, mask, name)[name]
            surroundings = field.surroundings(cached[modality], squares[modality], row)
            genes, guess = context.heads(context(z, *surroundings, batch.has_context[b : b + 1]))
            wanted = batch.hidden[b] if shown > 1 else torch.ones(48, dtype=torch.bool)
            loss = (genes - field.expression(row)[0])[0, wanted].square().mean()
            if not shown:
                loss = loss + (1 - torch.cosine_similarity(guess[0], cached[2, row[0]], 0)) / 2
            losses.append(loss)
        found = sp.context_loss(field, cell, context, cached, squares, batch)
        torch.testing.assert_close(found, torch.stack(losses).mean(), rtol=1e-4, atol=1e-4)


def test_eight_orientations():
    x = torch.arange(16.0).view(1, 1, 4, 4).expand(8, -1, -1, -1).clone()
    y = random_orientation(x.clone(), torch.arange(8))
    assert torch.equal(y[0], x[0]) and len({tuple(v.flatten().tolist()) for v in y}) == 8
    assert all(sorted(v.flatten().tolist()) == list(range(16)) for v in y)


def test_set_transformer_ignores_absent_members_and_bears_none(trained):
    torch.manual_seed(0)
    reader = sp.SetTransformer(16, 2, 2, 1)
    tokens, where, there = (
        torch.randn(2, 4, 16),
        torch.randn(2, 4, 2),
        torch.tensor([[True, True, False, False], [False] * 4]),
    )
    with torch.no_grad():
        out = reader(tokens, where, there)
        assert (
            torch.allclose(
                out, reader(torch.where(there[..., None], tokens, 50.0), where, there), atol=1e-5
            )
            and torch.isfinite(out).all()
        )
        order = torch.tensor([1, 0, 2, 3])
        # a set has no order
        assert torch.allclose(
            out, reader(tokens[:, order], where[:, order], there[:, order]), atol=1e-5
        )


def test_a_small_field_is_learned(cells, tmp_path, monkeypatch):
    """The three losses fall well below their start."""
    monkeypatch.setitem(
        sp.SIZES, "tiny", dataclasses.replace(SMALL, steps=(60, 100, 40), lr=(3e-3, 1e-2, 2e-3))
    )
    size = sp.SIZES["tiny"]
    config = config_of(cells)
    shared = (
        config,
        size,
        stages_of(config, tmp_path),
        cell_runs.load(config, size, torch.device("cpu")),
    )
    field = shared[-1]
    torch.manual_seed(0)
    cell, a = sp.train_cells(*shared, sp.CellModel(field.shape, field.cells.n_genes, size))
    context, b = sp.train_context(*shared, cell, sp.ContextModel(field.cells.n_genes, size))
    conditions = cell_runs.Conditions(field, cell)
    generator, c = sp.train_decoder(
        *shared, conditions, sp.Generator(config, field.shape, field.cells.n_genes, size, cell.gene)
    )
    for losses, factor in ((a, 0.85), (b, 0.98), (c, 0.85)):
        assert np.mean(losses[-20:]) < factor * np.mean(losses[:10]), (losses[:10], losses[-20:])


# ------------------------------------------------------------------------------------------ the run


def last_record(capsys):
    path = Path(capsys.readouterr().out.strip().splitlines()[-1])
    return path, json.loads(path.read_text())


def test_end_to_end_record_and_figures(cells, tmp_path, capsys):
    sp.main(flags(cells, tmp_path))
    path, record = last_record(capsys)
    assert (
        path
        == tmp_path
        / "runs"
        / "spatia"
        / "field"
        / "test-fold0"
        / path.parts[-3]
        / "seed0"
        / "run.json"
    )
    m, b = record["metrics"], record["baselines"]
    probes = ("own_area", "other_area", "near_density")
    assert {f"cond_pcc_{p}" for p in probes} | {
        "fd_generated",
        "fd_floor",
        "fd_retrieval",
        "impute_pcc_mean",
        "image_to_genes_pcc_mean",
        "annotation_macro_f1",
        "annotation_macro_f1_z_gene",
        "clustering_ari",
        "nearest_train",
        "round_trip_pcc",
        "round_trip_pcc_ceiling",
        "program_pcc",
        "fd_generated_shape",
        "fd_floor_shape",
        "gate_niche",
        "gate_tissue",
        "fusion_scale_image",
        "fusion_scale_genes",
        *(
            f"{task}_{level}_pcc_mean"
            for task in GENE_TASKS
            for level in ("cell", "niche", "tissue")
        ),
        *(f"annotation_macro_f1_{z}" for z in ("z_cell", "z_niche", "z_tissue")),
    } <= set(m)
    assert {
        "ridge",
        "ridge_context",
        "knn",
        "neighbours",
        "pca",
        "gene_mean",
        "retrieval",
        "shuffled",
        "mean_image",
        "ridge_morphology_density",
        "ridge_image_pca",
        "pca_expression",
        "pca_image",
        "pca_both_niche",
        "picture_shape",
        "retrieval_context",
        "knn_context",
    } <= set(b)
    # the network alone is the row; its mean with a ridge, and what reads all it reads, are others
    for task in GENE_TASKS:
        for name in ("network_and_ridge", "ridge_all", "knn_all"):
            assert b[name][f"{task}_pcc_mean"] != m[f"{task}_pcc_mean"]
    for name in ("retrieval", "retrieval_context"):
        assert {"fd_retrieval", "fd_floor", "fd_retrieval_shape", "fd_floor_shape"} <= set(b[name])
    assert "fd_mean_image_shape" in b["mean_image"]
    assert (
        b["gene_mean"]["impute_pcc_mean"] == 0
        and b["retrieval"]["nearest_train"] == 0
        and not record["split"]["leaks_position"]
    )
    assert {f.name for f in path.parent.iterdir()} == {
        "run.json",
        "arrays.npz",
        "cells.csv",
        "model.pt",
        "generated.png",
        "embedding.png",
    }
    arrays = np.load(path.with_name("arrays.npz"))
    n = record["n_scored"]
    assert (
        arrays["generated"].shape == (n, 2, 16, 16)
        and arrays["probes_generated"].shape == (2, n, 3)
        and arrays["z_held_out"].shape == (n, SMALL.dim)
        and arrays["z"].shape == (240, SMALL.dim)
        and len(arrays["scored"]) == n
    )
    want = metrics.pcc(arrays["probes_real"], arrays["probes_generated"].mean(0))
    assert np.allclose(np.nan_to_num(want), [m[f"cond_pcc_{p}"] for p in probes], atol=1e-6)
    saved = torch.load(path.with_name("model.pt"), weights_only=True)
    assert len(saved["genes"]) == 48 and {"cell", "context", "generator", "normaliser"} <= set(
        saved
    )


def same_weights(a, b):
    return all(
        torch.equal(x[part][k], y[part][k])
        for x, y in [(a, b)]
        for part in ("cell", "context", "generator")
        for k in x[part]
    )


def test_same_seed_same_numbers_and_resume(cells, tmp_path, capsys, monkeypatch):
    """Interrupted in each of the stages and resumed, a run has the weights of a run that was
    not."""
    for name in ("task_generation", "task_imputation", "task_image_to_genes", "task_labels"):
        monkeypatch.setattr(tasks, name, lambda *args: tasks.TaskResult())
    monkeypatch.setattr(cell_runs.export, "files_of", lambda *args: {})
    sp.main(flags(cells, tmp_path, "--save_every", "3"))
    path, _ = last_record(capsys)
    full = torch.load(path.with_name("model.pt"), weights_only=True)
    # writes of latest.pt: A at 3, A done, B at 3, B done, C at 3
    for stop in (1, 3, 5):
        count = [0]

        def stop_early(*a, save=run.write_atomically, count=count, stop=stop):
            save(*a)
            count[0] += 1
            if count[0] == stop:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(sp.run, "write_atomically", stop_early)
            sp.main(flags(cells, tmp_path / str(stop), "--save_every", "3"))
        capsys.readouterr()
        sp.main(flags(cells, tmp_path / str(stop), "--save_every", "3", "--resume"))
        again = torch.load(last_record(capsys)[0].with_name("model.pt"), weights_only=True)
        assert same_weights(full, again), stop
    with pytest.raises(DataError, match="other flags"):
        latest = next((tmp_path / "1").rglob("latest.pt"))
        stages_of(config_of(cells, "--resume", "--no-mae"), latest.parent)
    # its record would stop a run on other data before the checkpoint does
    next((tmp_path / "1").rglob("run.json")).unlink()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(DataError, match="other cells"):
        patch.setattr(sp.run, "file_checksum", lambda *paths: "of cells that changed")
        sp.main(flags(cells, tmp_path / "1", "--save_every", "3", "--resume"))


def test_bfloat16_products_stay_near_float32(cells, tmp_path, capsys):
    found = []
    for more in ([], ["--bf16"]):
        sp.main(flags(cells, tmp_path, "--rho", "0", *more))
        path, record = last_record(capsys)
        found.append(
            (np.load(path.with_name("arrays.npz")), record["metrics"], path.parents[1].name)
        )
    (exact, m, name), (near, m_near, name_near) = found
    assert "bf16" not in name and "bf16-True" in name_near
    assert all(0 < abs(m_near[f"loss_{s}"] - m[f"loss_{s}"]) < 0.02 * m[f"loss_{s}"] for s in "ABC")
    assert (
        0 < np.abs(near["z_held_out"] - exact["z_held_out"]).mean() < 0.03
        and np.abs(near["generated"].astype(int) - exact["generated"]).mean() < 3
    )


@pytest.mark.parametrize(
    "more",
    [
        ["--path", "ddpm", "--rho", "0.5", "--guidance", "0"],
        ["--condition", "none", "--no-mae", "--no-fusion"],
        [
            "--no-niche",
            "--no-tissue",
            "--score",
            "val",
            "--no-generate",
        ],
    ],
)
def test_variants_run(cells, tmp_path, capsys, more):
    sp.main(flags(cells, tmp_path, *more))
    _, record = last_record(capsys)
    assert all(v is None or np.isfinite(v) for v in record["metrics"].values())
    assert ("fd_generated" in record["metrics"]) == ("--no-generate" not in more)
    if "val" in more:
        assert record["split"]["name"].endswith("val")


def test_generated_pictures_do_not_depend_on_what_is_generated_beside_them(trained, tmp_path):
    config, field, cell, generator, _ = trained
    config = dataclasses.replace(config, ode_steps=2, guidance=0.5)
    shared = config, SMALL, field, cell_runs.Conditions(field, cell), generator
    rows = field.rows["test"]
    a = sp.generate(*shared, rows, 2, chunk=16)
    b = sp.generate(*shared, rows[:16], 1, chunk=16)
    assert (
        a.shape == (2, len(rows), 2, 16, 16)
        and np.abs(a[0, :16].astype(int) - b[0]).max() <= 1
        and not np.array_equal(a[0], a[1])
    )


def test_guidance_acts_early_only(trained, tmp_path, monkeypatch):
    """Velocities are (1 + w) v(Y) - w v(nothing) up to t = .6, v(Y) after it."""
    config, field, cell, generator, _ = trained
    conditions, rows, seen = cell_runs.Conditions(field, cell), field.rows["test"][:8], []
    monkeypatch.setattr(
        sp,
        "sample",
        lambda path, velocity, x, steps: (
            seen.append([velocity(x, x.new_full((len(x),), t)) for t in (0.3, 0.9)]) or x
        ),
    )
    for w in (0.0, 1.0, 3.0):
        changed = dataclasses.replace(config, guidance=w)
        sp.generate(changed, SMALL, field, conditions, generator, rows, 1)
    plain, one, three = seen
    assert all(torch.equal(v[1], plain[1]) for v in (one, three)) and not torch.allclose(
        one[0], plain[0]
    )
    torch.testing.assert_close(three[0] - plain[0], 3 * (one[0] - plain[0]), rtol=1e-3, atol=1e-3)


def test_decoder_channels_count_by_inverse_variance(trained, monkeypatch):
    _, field, cell, generator, _ = trained
    var = field.images(field.rows["train"]).var((0, 2, 3))
    torch.testing.assert_close(
        field.channel_weight.flatten() * var,
        (field.channel_weight.flatten() * var).mean().expand(2),
    )
    conditions, draw = cell_runs.Conditions(field, cell), torch.Generator().manual_seed(0)
    batch = picture_batch(field, draw, 16, SMALL.decoder_layers, len(generator.place), 0.1)
    losses = []
    for weight in ((2.0, 0.0), (0.0, 2.0), (1.0, 1.0)):
        monkeypatch.setattr(field, "channel_weight", torch.tensor(weight)[:, None, None])
        losses.append(sp.decoder_loss(field, conditions, generator, 0.0, batch).item())
    assert losses[2] == pytest.approx((losses[0] + losses[1]) / 2, rel=1e-4)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_two_processes_sum_to_one(cells, tmp_path):
    """As torchrun starts two processes: the losses of A and C are those of one process."""
    script = tmp_path / "go.py"
    script.write_text(f"""
import dataclasses, json, sys
import torch
import spatia as sp
from evaluation import cell_runs
from plainst import run

size = dataclasses.replace(
    sp.SIZES["tiny"], dim=16, image_layers=1, gene_layers=0, latents=3, niche=5, tissue=4,
    decoder_dim=16, decoder_layers=1, steps=(4, 4, 4), batch=(16, 16, 8), rho=0.5,
)
config = run.parse(
    sp.Config, ["--data", {str(cells)!r}, "--device", "cpu", "--runs", {str(tmp_path)!r}]
)
record = run.Run("spatia", config, "x", "y")
f = cell_runs.load(config, size, record.device)
stages = sp.Stages(config, record.folder / "latest.pt", "checkpoint", "", "cells")
shared = config, size, stages, f
torch.manual_seed(0)
cell, a = sp.train_cells(*shared, sp.CellModel(f.shape, f.cells.n_genes, size))
context, b = sp.train_context(*shared, cell, sp.ContextModel(f.cells.n_genes, size))
conditions = cell_runs.Conditions(f, cell)
torch.manual_seed(1)
generator = sp.Generator(config, f.shape, f.cells.n_genes, size, cell.gene)
generator, c = sp.train_decoder(*shared, conditions, generator)
made = sp.generate(config, size, f, conditions, generator, f.rows["test"][:20], 1, chunk=8)
if record.rank == 0:
    open(sys.argv[1], "w").write(json.dumps([a, b, c, made.ravel().tolist()]))
if record.world > 1:
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
""")
    in_processes("spatia", script, [(1, [tmp_path / "one"]), (2, [tmp_path / "two"])])
    found = [json.loads((tmp_path / name).read_text()) for name in ("one", "two")]
    for one, two in zip(found[0][:3], found[1][:3]):
        assert np.allclose(one, two, rtol=1e-4, atol=1e-5), (one, two)
    assert np.abs(np.subtract(found[0][3], found[1][3])).max() <= 1


def test_gradients_are_summed_not_averaged(trained, monkeypatch):
    """The losses of two half batches, as two processes compute them, add up to that of the whole
    batch, for cells and for pictures."""
    config, field, cell, generator, _ = trained
    conditions, losses = cell_runs.Conditions(field, cell), []
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        monkeypatch.setattr(run, "processes", lambda rank=rank, world=world: (rank, world))
        draw = torch.Generator().manual_seed(5)
        batch = picture_batch(field, draw, 8, SMALL.decoder_layers, len(generator.place), 0.1)
        pictures = sp.decoder_loss(field, conditions, generator, 0.5, batch)
        batch = cell_batch(field, draw, 8, cell.n_patches, 0.3, 0.5, 0.15)
        # the contrast needs the rows of the others
        alone = batch._replace(rows=slice(0, 0))
        monkeypatch.setattr(run, "gather", lambda x: x[:0])
        losses.append((pictures.item(), sp.cell_loss(config, cell, alone).item()))
        monkeypatch.undo()
    for whole, first, second in zip(*losses):
        assert abs(whole - first - second) < 1e-4 * abs(whole)


# ---------------------------------------------------------------------------------------- baselines


def test_low_rank_recovers_low_rank_data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 3)) @ rng.normal(size=(3, 20)) + 0.05 * rng.normal(size=(400, 20))
    genes = np.arange(20) < 4
    found = pca_impute(x[:300], np.where(genes, 0, x[300:]), genes, 3)
    assert metrics.pcc(x[300:, genes], found).min() > 0.98


def test_every_value_is_hidden_once_and_most_neighbours_show_it(trained):
    """A fifth a round, every value once; a neighbour hides the same genes in one of five cases."""
    _, field, *_ = trained
    folds = tasks.imputation_folds(field, 0)
    hidden = torch.stack([tasks.hidden_in_round(*folds, r) for r in range(tasks.ROUNDS)])
    assert hidden.shape == (5, 240, 48) and (hidden.sum(0) == 1).all()
    assert (hidden.float().mean(2) - 0.2).abs().max() < 0.02
    rows = torch.as_tensor(field.used_rows)
    beside = hidden[:, field.niche[rows]]  # (5, n, k, G)
    is_hidden = hidden[:, rows][:, :, None].expand_as(beside)
    assert abs(beside[is_hidden].float().mean() - 0.2) < 0.03


def test_what_is_visible_is_what_a_naive_loop_sees(trained):
    _, field, *_ = trained
    gene_fold, cell_fold = tasks.imputation_folds(field, 0)
    own, beside, share = tasks.visible_inputs(field, gene_fold, cell_fold, 3)
    for i in field.used_rows[::40]:
        hidden = tasks.hidden_in_round(gene_fold, cell_fold, (3 + cell_fold[i]) % tasks.ROUNDS)
        assert np.array_equal(np.flatnonzero(hidden[i]), np.flatnonzero(gene_fold == 3))
        niche = field.niche[i]
        values = [torch.cat(field.expression([j], hidden[[j]]), 1)[0] for j in [i, *niche.tolist()]]
        np.testing.assert_allclose(own[i], values[0], atol=1e-6)
        np.testing.assert_allclose(beside[i], torch.stack(values[1:]).mean(0), atol=1e-5)
        shows = (~hidden[niche]).float().mean(0).numpy()[gene_fold == 3]
        np.testing.assert_allclose(share[i], shows, atol=1e-6)


def fake_method(field):
    """A network that says the same of every cell, by the level that it reads."""

    def predict(z, rows, level):
        value = 1 + 2 * level[0] + 4 * level[1]
        noise = np.random.default_rng(value).normal(0, 0.02, (len(rows), field.cells.n_genes))
        return noise.astype(np.float32), np.zeros((len(rows), 2), np.float32)

    return tasks.Method(lambda modality, hidden=None: None, predict)


GENE_TASKS = ("impute", "image_to_genes")


def run_gene_task(field, task):
    if task == "impute":
        return tasks.task_imputation(field, fake_method(field), 0)
    return tasks.task_image_to_genes(field, fake_method(field))


@pytest.mark.parametrize("task", GENE_TASKS)
def test_the_network_alone_is_the_row(trained, task):
    """The scores and the exported expression are the head's; its mean with a ridge stands apart;
    every level has its own score."""
    _, field, *_ = trained
    result, true = run_gene_task(field, task), field.expression_matrix("test")[:, :-1]
    key = {"impute": "imputed"}.get(task, task)
    alone, mixed = result.arrays[key], result.arrays[f"{key}_with_ridge"]
    detected = tasks.detected_genes(field)
    for row, guess in ((result.scores, alone), (result.baselines["network_and_ridge"], mixed)):
        want = tasks.gene_scores(true, guess, detected, task)
        assert row[f"{task}_pcc_mean"] == pytest.approx(want[f"{task}_pcc_mean"], abs=1e-6)
    assert abs(result.scores[f"{task}_pcc_mean"]) < 0.1  # noise
    assert result.baselines["network_and_ridge"][f"{task}_pcc_mean"] > 0.1
    levels = [result.scores[f"{task}_{level}_pcc_mean"] for level in ("cell", "niche", "tissue")]
    assert len({*levels, result.scores[f"{task}_pcc_mean"]}) == 4


@pytest.mark.parametrize("task", GENE_TASKS)
def test_baselines_read_pictures_and_surroundings(trained, task, monkeypatch):
    """Where the pictures of the surroundings tell the expression, the baselines that read all find
    it, the others do not."""
    _, field, *_ = trained
    expression = field.all_expression()[:, :-1].numpy().astype(np.float64)
    monkeypatch.setattr(tasks, "picture_features", lambda dataset: np.zeros((240, 3)))
    niche = np.zeros_like(expression)
    niche[field.used_rows] = expression[field.used_rows]
    monkeypatch.setattr(tasks, "niche_means", lambda dataset, values: niche)
    b = run_gene_task(field, task).baselines
    pcc = {name: scores[f"{task}_pcc_mean"] for name, scores in b.items()}
    assert pcc["ridge_all"] > 0.6 and pcc["knn_all"] > pcc["knn"] + 0.1, pcc
    assert pcc["ridge_all"] > max(v for k, v in pcc.items() if not k.endswith(("_all", "context")))


def test_penalty_and_number_of_neighbours_are_chosen_for_each_target_by_folds():
    """Against scikit-learn, one target after the other, on the same folds."""
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GridSearchCV, PredefinedSplit
    from sklearn.neighbors import KNeighborsRegressor

    rng = np.random.default_rng(0)
    x, query, fold = (
        rng.normal(size=(150, 12)) * 3 + 1,
        rng.normal(size=(7, 12)),
        np.arange(150) % 5,
    )
    signal = x @ rng.normal(size=(12, 3))
    y = np.column_stack([signal[:, 0], 0.2 * signal[:, 1] + rng.normal(size=150) * 5, x[:, 0] > 1])
    split, chosen = PredefinedSplit(fold), []
    for target in range(3):
        score = "neg_mean_squared_error"
        model = make_pipeline(StandardScaler(), Ridge())
        search = GridSearchCV(model, {"ridge__alpha": ALPHAS}, cv=split, scoring=score)
        search.fit(x, y[:, target])
        chosen.append(search.best_params_["ridge__alpha"])
        found = ridge(x, y, query, fold)[:, target]
        np.testing.assert_allclose(found, search.predict(query), rtol=1e-6)
        search = GridSearchCV(
            KNeighborsRegressor(), {"n_neighbors": COUNTS}, cv=split, scoring=score
        )
        search.fit(x, y[:, target])
        found = knn(x, y, query, fold)[:, target]
        np.testing.assert_allclose(found, search.predict(query), rtol=1e-6)
    assert len(set(chosen)) > 1


def test_folds_are_strips_of_neighbours(trained):
    _, field, *_ = trained
    rows = field.rows["train"]
    fold = strips(field.cells, rows)
    for section in np.unique(field.cells.section[rows]):
        order = np.argsort(field.cells.xy[rows, 0] + 1e9 * (field.cells.section[rows] != section))
        runs = fold[order[: (field.cells.section[rows] == section).sum()]]
        assert (np.diff(runs) != 0).sum() == 9 and np.bincount(runs).min() >= len(runs) // 5 - 2


def test_blocks_of_inputs_weigh_alike():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(500, 3)) * 100, rng.normal(size=(500, 40))
    x = equal_blocks([a, b], np.arange(400))
    assert x[:400, :3].var(0).sum() == pytest.approx(1) == x[:400, 3:].var(0).sum()


def test_niche_means_and_density(trained):
    _, field, *_ = trained
    values, i = np.random.default_rng(0).normal(size=(240, 2)), field.rows["test"][3]
    found = niche_means(field, values)
    np.testing.assert_allclose(found[i], values[field.niche[i]].mean(0))
    far = np.hypot(*(field.cells.xy[field.niche[i]] - field.cells.xy[i]).T).max()
    assert density(field, np.array([i]))[0, 1] == pytest.approx(-np.log(far + 1))


# ---------------------------------------------------------------------------------------- bad input


def fails(argv, *words):
    with pytest.raises(DataError) as error:
        sp.main(argv)
    text = str(error.value)
    assert "\n" not in text and all(w in text for w in words), text


def test_status_is_2_without_a_traceback(tmp_path, capfd):
    assert status_of(sp.__file__, *flags(tmp_path / "none.h5", tmp_path)) == 2
    told = capfd.readouterr().err
    assert (
        told.startswith("error: ") and "Traceback" not in told and not (tmp_path / "runs").exists()
    )


def test_bad_flags(cells, tmp_path):
    for more, word in (
        (["--rho", "0.9"], "rho"),
        (["--draws", "0"], "draws"),
        (["--width", "nan"], "width"),
        (["--guidance", "-1"], "guidance"),
        (["--fold", "9"], "fold"),
        (["--test_every", "1"], "test_every"),
    ):
        fails(flags(cells, tmp_path, *more), word)
    fails(flags(cells, tmp_path, "--resume"), "latest.pt", "checkpoint")
    assert not (tmp_path / "runs").exists()


def test_sections_smaller_than_a_niche_are_left_out(tmp_path, monkeypatch, capsys):
    """One small section of four: a sentence, and the others train; all too small: an error."""
    given = simulate.cells.cell_field(n_cells=200, n_genes=48, n_sections=4, size=16)
    given["section"] = np.minimum(np.arange(200) // 65, 3)  # 65, 65, 65, 5
    path = data.write_cells(tmp_path / "cells.h5", **given)
    for fold in (0, 2, 3):
        config = config_of(path, "--fold", str(fold))
        field = cell_runs.load(config, SMALL, torch.device("cpu"))
        assert (
            "section sim4 has 5 cells in the train part, fewer than a niche of 6: they are left out"
        ) in capsys.readouterr().out
        assert sum(len(rows) for rows in field.rows.values()) == 195
    # it alone is held out
    fails(flags(path, tmp_path, "--fold", "1"), "cells.h5", "niche of 6 cells in the test part")
    monkeypatch.setitem(sp.SIZES, "tiny", dataclasses.replace(SMALL, niche=70))
    fails(flags(path, tmp_path), "cells.h5", "no section has a niche of 71 cells", "wider")


def test_crops_that_patches_do_not_fit(cells, tmp_path, monkeypatch):
    monkeypatch.setitem(sp.SIZES, "tiny", dataclasses.replace(SMALL, decoder_patch=5))
    fails(flags(cells, tmp_path), "cells.h5", "16 px")


def test_corrupted_file(cells, tmp_path):
    raw = Path(cells).read_bytes()
    (tmp_path / "cells.h5").write_bytes(raw[: len(raw) // 2])
    fails(flags(tmp_path / "cells.h5", tmp_path), "cells.h5")


# ---------------------------------------------------------------------------------------- real data


def test_ca1_split_and_ridge_are_the_published_anchor(real_data, tmp_path):
    """645 test cells, and ridge from expression to the three probes near .35 / .75 / .57."""
    data.from_ca1(real_data / "ca1", tmp_path / "cells.h5")
    field = cell_runs.load(config_of(tmp_path / "cells.h5"), SMALL, torch.device("cpu"))
    fit, rows = field.rows["train"], field.rows["test"]
    assert (len(fit), len(rows)) == (1506, 645)
    x = [field.expression_matrix(part)[:, :-1] for part in ("train", "test")]
    p = [tasks.channel_coverage(field.cells.crops[r], field.cells.channels) for r in (fit, rows)]
    found = metrics.pcc(p[1], ridge(x[0], p[0], x[1], strips(field.cells, fit)))
    assert np.allclose(found, [0.35, 0.75, 0.57], atol=0.03), found


def test_undefined_correlations_stay_undefined():
    """A gene or a probe that does not vary over the scored cells has no correlation: no zero of it
    enters a mean. A constant guess of what varies scores 0."""
    rng = np.random.default_rng(0)
    true, guess = rng.normal(size=(30, 4)), rng.normal(size=(30, 4))
    true[:, 1], guess[:, 2] = 3, 3
    scores = tasks.gene_scores(true, guess, np.ones(4, bool), "impute")
    r = metrics.pcc(true, guess)
    assert scores["impute_pcc_mean"] == pytest.approx((r[0] + 0 + r[3]) / 3)
    nothing = tasks.gene_scores(true, guess, np.arange(4) == 1, "impute")
    assert np.isnan([nothing["impute_pcc_mean"], nothing["impute_pcc_median"]]).all()
    names = tasks.probe_names(["own", "other"])
    own, other, near = tasks.probe_scores(true[:, :3], guess[:, :3], names).values()
    assert own == pytest.approx(r[0]) and np.isnan(other) and near == 0


def test_probes_are_called_what_they_measure():
    """A stain has a mean over the crop, which is no area of the cell; masks have areas."""
    images = np.random.default_rng(0).integers(0, 255, (6, 3, 8, 8)).astype(np.uint8)
    assert tasks.probe_names(["DAPI", "18S", "a/b"]) == ["mean_dapi", "mean_18s", "mean_a_b"]
    found = tasks.channel_coverage(images, ["DAPI", "18S", "a/b"])
    np.testing.assert_allclose(found, images.mean((2, 3)) / 255, rtol=1e-5)
    channels = ["own", "other", "DAPI"]
    assert tasks.probe_names(channels) == ["own_area", "other_area", "near_density", "mean_dapi"]
    found = tasks.channel_coverage(images, channels)
    np.testing.assert_allclose(found[:, 2], images[:, 1, 2:-2, 2:-2].mean((1, 2)) / 255, rtol=1e-5)
    np.testing.assert_allclose(found[:, 3], images[:, 2].mean((1, 2)) / 255, rtol=1e-5)


def test_the_penalty_of_a_classifier_and_the_weight_of_rare_classes():
    """A class of five in a hundred is found; noise is shrunk by the folds."""
    rng = np.random.default_rng(0)
    y = (np.arange(400) % 20 == 0).astype(int)
    x = rng.normal(size=(400, 30))
    x[:, 0] += 2 * y
    model = tasks.classifier(x, y, np.arange(400) // 8 % 5)
    new = rng.normal(size=(400, 30))
    new[:, 0] += 2 * y
    guess = model.predict(new)
    assert (guess[y == 1] == 1).mean() > 0.5 and model[-1].C == 0.01
    clean = np.column_stack([y + 0.01 * rng.normal(size=400), rng.normal(size=400)])
    assert (tasks.classifier(clean, y, np.arange(400) // 8 % 5).predict(clean) == y).all()


def test_types_are_read_from_the_stain(tmp_path):
    """Where a type is bright in the stain, and nothing else tells it, eleven numbers find it."""
    given, rng = simulate.cells.cell_field(n_cells=300, n_genes=48, n_sections=3, size=16), None
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 300)
    crops = np.concatenate(list(given["crops"]))
    stain = rng.integers(0, 100, (300, 1, 16, 16)) + 100 * labels[:, None, None, None]
    given |= {"crops": np.concatenate([crops, stain.astype(np.uint8)], 1), "masks": None}
    given |= {"channels": ["own", "other", "dapi"], "labels": labels, "classes": ["a", "b"]}
    path = data.write_cells(tmp_path / "cells.h5", **given)
    field = cell_runs.load(config_of(path), SMALL, torch.device("cpu"))
    result = tasks.task_labels(field, {"z_img": rng.normal(size=(300, 4))}, 0)
    score = {k: v["annotation_balanced_accuracy"] for k, v in result.baselines.items()}
    assert score["picture_stain"] > 0.95 < score["picture_shape_stain"]
    assert score["picture_shape"] < 0.7
    assert result.scores["annotation_balanced_accuracy_z_img"] < 0.7


def test_cells_without_pictures_train_and_are_scored(tmp_path, capsys, monkeypatch):
    """Expression alone: no generated picture, no score from pictures, and nothing of the image part
    has learned; flags about pictures are refused."""
    given = simulate.cells.cell_field(n_cells=240, n_genes=48, n_sections=3, size=16)
    given |= {"crops": None, "masks": None, "channels": []}
    path = data.write_cells(tmp_path / "cells.h5", **given)
    sp.main(["--data", str(path), "--runs", str(tmp_path / "runs"), "--device", "cpu"])
    out, record = last_record(capsys)
    m = record["metrics"]
    assert {"impute_pcc_mean", "annotation_macro_f1", "annotation_macro_f1_z_gene"} <= set(m)
    assert not [k for k in m if k.startswith(("cond_pcc", "fd_", "image_to_genes")) or "z_img" in k]
    assert "pca_expression_niche" in record["baselines"] and not record["config"]["generate"]
    assert {"crops", "generated"}.isdisjoint(np.load(out.with_name("arrays.npz")).files)
    saved = torch.load(out.with_name("model.pt"), weights_only=True)
    assert "generator" not in saved
    with pytest.raises(DataError, match="--draws has no effect on .*, which holds no pictures"):
        sp.main(["--data", str(path), "--runs", str(tmp_path / "r"), "--draws", "3"])


def test_the_image_part_learns_nothing_from_cells_without_pictures(tmp_path):
    given = simulate.cells.cell_field(n_cells=240, n_genes=48, n_sections=3, size=16)
    given |= {"crops": None, "masks": None, "channels": []}
    config = config_of(data.write_cells(tmp_path / "cells.h5", **given))
    field = cell_runs.load(config, SMALL, torch.device("cpu"))
    cell = sp.CellModel(field.shape, 48, SMALL, has_pictures=False)
    batch = cell_batch(field, step_generator(0, 0, 0), 8, cell.n_patches, 0.3, 0.5, 0.15)
    assert batch.has_gene.all() and not batch.has_img.any()
    loss = sp.cell_loss(config, cell, batch)
    loss.backward()
    grads = [p.grad for p in cell.image.parameters() if p.grad is not None]
    assert torch.isfinite(loss) and all((g == 0).all() for g in grads)
    z = cell_runs.embed_all(cell, field)
    assert (z["img"] == 0).all() and torch.equal(z["fused"], z["gene"])


@pytest.fixture(scope="module")
def finished(cells, tmp_path_factory):
    """model.pt of a short run, and its arrays."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sp.SIZES, "tiny", SMALL)
        patch.setattr(cell_runs.figures, "draw_cells", lambda *args: None)
        sp.main(flags(cells, folder, "--no-generate"))
    path = next(folder.rglob("model.pt"))
    return path, dict(np.load(path.with_name("arrays.npz")))


def predicted(path, model, tmp_path, capsys, *more):
    words = ["--data", str(path), "--predict", str(model), "--runs", str(tmp_path / "new")]
    sp.main([*words, "--device", "cpu", *more])
    out, record = last_record(capsys)
    return dict(np.load(out.with_name("arrays.npz"))), record


def rewritten(path, out, **changes):
    """The cell file with some arguments of write_cells changed."""
    c = data.load_cells(path)
    words = {name: getattr(c, name) for name in ("counts", "genes", "ids", "xy", "section")}
    words |= {name: getattr(c, name) for name in ("sections", "channels", "labels", "classes")}
    return data.write_cells(out, **words | {"crops": c.crops[:]} | changes)


def test_every_cell_has_an_embedding_and_a_cluster(finished, cells):
    """In the order of the file, whatever part it is in; a scored cell's embedding inside its part
    is that of the whole section, which is all held out here."""
    _, arrays = finished
    given = data.load_cells(cells)
    assert arrays["ids"].tolist() == given.ids.tolist() and arrays["z"].shape == (240, SMALL.dim)
    assert np.abs(arrays["z"]).sum(1).min() > 0
    assert set(arrays["clusters"].tolist()) == set(range(len(given.classes)))
    held_out = arrays["z_held_out"]
    np.testing.assert_allclose(arrays["z"][arrays["scored"]], held_out, atol=1e-5)


def test_a_saved_model_embeds_cells_as_its_run_did(finished, cells, tmp_path, capsys):
    model, arrays = finished
    # genes in another order, one gene more: aligned by name
    given = data.load_cells(cells)
    order = np.random.default_rng(0).permutation(48)
    extra = given.counts[:, :1]
    counts = sparse.hstack([given.counts[:, order], extra]).tocsr()
    genes = [*given.genes[order], "NEW"]
    path = rewritten(cells, tmp_path / "b.h5", counts=counts, genes=genes)
    found, record = predicted(path, model, tmp_path, capsys)
    np.testing.assert_allclose(found["z"], arrays["z"], atol=1e-4)
    assert record["metrics"]["genes_shared"] == 1 and "clustering_ari" in record["metrics"]
    assert (tmp_path / "new").rglob("cells.csv")
    rows = next((tmp_path / "new").rglob("cells.csv")).read_text().splitlines()
    assert len(rows) == 241 and "cluster" in rows[0]


def test_absent_genes_are_hidden_and_too_few_are_refused(finished, cells, tmp_path, capsys):
    model, arrays = finished
    given = data.load_cells(cells)
    part = rewritten(cells, tmp_path / "p.h5", counts=given.counts[:, :40], genes=given.genes[:40])
    found, record = predicted(part, model, tmp_path, capsys)
    assert record["metrics"]["genes_shared"] == pytest.approx(40 / 48)
    assert 0 < np.abs(found["z"] - arrays["z"]).mean() < 1
    few = rewritten(cells, tmp_path / "f.h5", counts=given.counts[:, :20], genes=given.genes[:20])
    for path, words in (
        (few, ("f.h5", "42%", "--min_shared 50%")),
        (rewritten(cells, tmp_path / "n.h5", genes=[f"x{i}" for i in range(48)]), ("n.h5", "0%")),
        (rewritten(cells, tmp_path / "c.h5", channels=["a", "b"]), ("c.h5", "channels a, b")),
    ):
        fails(["--data", str(path), "--predict", str(model), "--runs", str(tmp_path / "r")], *words)
    more = ["--data", str(cells), "--predict", str(model), "--draws", "2"]
    fails(more, "--draws has no effect with --predict")
    fails(["--data", str(cells), "--min_shared", "0.2"], "--min_shared has no effect without")
    fails(["--data", str(cells), "--predict", str(cells)], "is not a spatia checkpoint")
