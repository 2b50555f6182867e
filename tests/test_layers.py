"""evaluation/layers.py and evaluation/new_slides.py with the modes of gat_fusion: slides, split,
inputs, baselines, tiles, frozen vectors, runs without a network, prediction on a new slide."""

import csv
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge

import data
import gat_fusion as gf
import metrics
from conftest import exit_status, printed_record
from data import DataError
from evaluation import layers
from plainst import run, simulate, tiles
from plainst.features import input_files
from plainst.scaled import ScaledRows

CPU = torch.device("cpu")
SMALL = "--epochs 2 --dim 16"
FUSIONS = ("cross", "gated", "concat")


def gat(command):
    """Exit status of gat_fusion.py; the command as it is typed."""
    return exit_status(gf.main, command)


def short(root, **flags):
    """Configuration of a short run on s1."""
    return gf.Config(data=str(root), **{"slice": "s1", "epochs": 3, "dim": 16, **flags})


def mode_of(c):
    return gf.MODES[c.mode]


def load(c):
    return layers.load(c, mode_of(c))


def task_of(c, slides=None):
    """Task of a configuration, its slides read or given."""
    return layers.Task(c, mode_of(c), load(c) if slides is None else slides)


def reach(pitch_um=100.0, **flags):
    """Receptive field of a mode."""
    c = gf.Config(**flags)
    return layers.receptive_field(c, mode_of(c), pitch_um)


def buffer_of(**flags):
    """Default buffer of --split blocks."""
    c = gf.Config(**flags)
    return layers.default_buffer(c, mode_of(c))


def only(folder, name):
    """The one file of a name below a folder."""
    (path,) = Path(folder).rglob(name)
    return path


def without_counts(root, folder):
    """Copy of the slices without their count matrices."""
    shutil.copytree(root, folder)
    for path in folder.rglob("*.h5"):
        path.unlink()
    return folder


def vectors(path, slide, width=8, seed=0):
    """A file of frozen vectors of all spots of a slide."""
    values = np.random.default_rng(seed).normal(size=(slide.n_spots, width))
    np.savez(path, embedding=values, barcodes=slide.barcodes)
    return path


# ----------------------------------------------------------------------- how far a prediction looks


def test_receptive_field_counts_hops_and_rings():
    assert reach() == 3 and reach(fusion="gated") == 2 and reach(fusion="concat") == 2
    assert reach(k=18) == 6 and reach(layers=1) == 2
    assert reach(mode="expr_only") == 1 and reach(mode="none", k=96) == 1
    assert reach(mode="gcn_only") == 2 and reach(mode="embedding") == 3


def test_receptive_field_counts_the_crop():
    """A crop of 310 um reaches two pitches of 100 um, twenty of a finer lattice, and one of a
    coarser."""
    for fusion in FUSIONS:
        assert reach(mode="img_expr", fusion=fusion) == 2
        assert reach(8.0, mode="img_expr", fusion=fusion) == 20
    assert reach(mode="multimodal") == 3 and reach(50.0, mode="multimodal") == 4
    assert reach(155.0, mode="img_expr") == 1
    # one hop over three rings
    assert reach(mode="img_expr", k=36) == 3 and reach(mode="img_expr", k=36, fusion="gated") == 2


def test_default_buffer_is_one_for_all_modes_and_never_below_the_field():
    buffers = {buffer_of(mode=mode, fusion=fusion) for mode in gf.MODES for fusion in FUSIONS}
    assert buffers == {3.0}
    assert buffer_of(k=18) == 6 and buffer_of(layers=1) == 2
    c = gf.Config(mode="img_expr")
    assert layers.default_buffer(c, mode_of(c), 8.0) == 20


def test_block_split_of_the_task_knows_its_reach(cortex):
    """The same tiles and training spots for every mode; a buffer below the mode's own field is
    called a leak."""
    blocks = {"split": "blocks", "n_blocks": 3}
    first = task_of(short(cortex, **blocks)).split
    for mode, fusion in (("full", "gated"), ("expr_only", "cross"), ("img_expr", "cross")):
        split = task_of(short(cortex, mode=mode, fusion=fusion, **blocks)).split
        assert np.array_equal(split.train, first.train) and not split.leaks_position
    assert not first.leaks_position
    for fusion, leaks in (("cross", True), ("gated", False)):
        c = short(cortex, buffer=2.0, fusion=fusion, **blocks)
        assert task_of(c).split.leaks_position == leaks


# ---------------------------------------------------------------------------------- slides, library


@pytest.mark.parametrize(
    ("edit", "message"),
    [(lambda y: np.full_like(y, -1), "no labels"), (lambda y: np.zeros_like(y), "one class")],
)
def test_slides_that_cannot_be_learned(cortex, edit, message):
    slides = load(short(cortex))
    slides[0].labels = edit(slides[0].labels)
    with pytest.raises(DataError, match=message):
        task_of(short(cortex), slides)


def test_no_image(cortex, tmp_path, capsys):
    shutil.copytree(cortex / "s1", tmp_path / "d" / "s1")
    for picture in (tmp_path / "d" / "s1" / "spatial").glob("*.png"):
        picture.unlink()
    where = f"--data {tmp_path}/d --slice s1 --runs {tmp_path}/r"
    assert gat(f"{where} --mode multimodal {SMALL}") == 2
    assert "has no image" in capsys.readouterr().err


def test_one_slide_where_several_are_needed(cortex, tmp_path, capsys):
    for split in ("slice", "donor"):
        assert gat(f"--data {cortex}/s1 --split {split} --train s2 --runs {tmp_path}/r") == 2
        remedy = f"parent folder that holds them, --data {cortex} --slice s1"
        assert remedy in capsys.readouterr().err


def test_donor_split_needs_every_patient(cortex):
    """A slide of an unknown patient may be of the scored slide's donor."""
    slides = [data.load_slide(cortex, name) for name in ("s1", "s3")]
    labels = np.concatenate(data.global_labels(slides)[1])
    assert not data.holdout_split(slides, labels, "donor").leaks_position
    assert not data.holdout_split(slides, labels, "slice").leaks_position
    for unknown in slides:
        known, unknown.patient = unknown.patient, ""
        assert data.holdout_split(slides, labels, "slice").leaks_position
        with pytest.raises(DataError, match=f"slide {unknown.sample} names no patient"):
            data.holdout_split(slides, labels, "donor")
        unknown.patient = known


def without(root, folder, *columns):
    """Copy of the slices with the named columns of metadata.tsv taken away, from every slice or
    only from those in a (slice, column) pair."""
    shutil.copytree(root, folder)
    for path in folder.rglob("metadata.tsv"):
        rows = list(csv.reader(path.open(), delimiter="\t"))
        is_gone = [name in columns or (path.parent.name, name) in columns for name in rows[0]]
        # R writes a row name without a header
        shift = len(rows[1]) - len(rows[0])
        is_gone_below = [False] * shift + is_gone
        lines = []
        for i, row in enumerate(rows):
            cells = zip(row, is_gone_below if i else is_gone)
            lines.append("\t".join(cell for cell, gone in cells if not gone) + "\n")
        path.write_text("".join(lines))
    return folder


def test_donor_split_of_files_without_a_patient(cortex, tmp_path, capsys):
    root = without(cortex, tmp_path / "d", ("s2", "subject"))
    assert data.load_slide(root, "s2").patient == "" and data.load_slide(root, "s1").patient == "A"
    words = f"--slice s1 --split donor --runs {tmp_path}/r {SMALL}"
    assert gat(f"--data {root} {words}") == 2
    assert "slide s2 names no patient" in capsys.readouterr().err
    assert gat(f"--data {root} --train s3 {words}") == 0
    capsys.readouterr()
    root = without(cortex, tmp_path / "e", "subject")  # nobody is another donor's
    assert gat(f"--data {root} {words}") == 2
    assert "slide s1 names no patient" in capsys.readouterr().err


def test_own_library_of_slides_with_different_panels(cortex):
    """The scaler is fitted on the values that the network sees: a spot's own library is over all
    genes of its file, not over the genes that the slides share."""
    c = short(cortex, split="slice", train="s2", library="own", scale="train")
    slides = load(c)
    slides[0] = slides[0].select_genes(slides[0].genes[: slides[0].n_genes // 2])
    task = task_of(c, slides)
    z = task.x[task.split.train]
    is_clipped = (np.abs(z) > 9.9).any(0)
    np.testing.assert_allclose(z[:, ~is_clipped].mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(z[:, ~is_clipped].std(0, ddof=1), 1, atol=1e-3)


def test_one_library_rule_for_all_slides(cortex, tmp_path, capsys):
    """A training slide without given sizes switches the whole run to own row sums; the record and
    the checkpoint say so."""
    root = without(cortex, tmp_path / "d", ("s2", "sum_umi"))
    slides = [data.load_slide(root, name) for name in ("s1", "s2")]
    assert slides[0].library_size is not None and slides[1].library_size is None
    c = short(root, split="slice", train="s2")
    task, own = task_of(c, slides), task_of(replace(c, library="own"), slides)
    assert task.library == "own" and np.array_equal(task.x, own.x)
    assert task_of(short(root), slides[:1]).library == "given"
    where = f"--data {root} --runs {tmp_path}/r"
    assert gat(f"--slice s1 --split slice --train s2 {where} {SMALL}") == 0
    out = capsys.readouterr().out
    assert "library size: own for all slides, s2 came without" in out
    assert printed_record(out)["library"] == "own"
    assert gat(f"--slice s1 {where} {SMALL}") == 0
    out = capsys.readouterr().out
    assert "library size: given" in out and printed_record(out)["library"] == "given"
    model = Path(out.strip().splitlines()[-1]).with_name("model.pt")
    assert torch.load(model, weights_only=True)["library"] == "given"
    assert gat(f"--slice s2 --predict {model} {where}") == 0
    out = capsys.readouterr().out
    assert "library size: own, s2 came without one" in out
    assert printed_record(out)["library"] == "own"


def test_z_scores_of_several_slides_row_by_row(cortex):
    slides = [data.load_slide(cortex, name) for name in ("s1", "s2")]
    slides[1] = slides[1].select_genes(slides[1].genes[5:])
    e = data.Expression(200).fit(slides[0].counts, slides[0].genes)
    parts = [layers.scaled_slide(e, s, "own", True) for s in slides]
    want = np.concatenate([e.transform(s.counts, s.genes, own_scale=True) for s in slides])
    rows = np.random.default_rng(0).permutation(len(want))[:50]
    assert np.array_equal(ScaledRows(parts)[rows], want[rows])
    assert np.array_equal(ScaledRows(parts[1:])[:], want[slides[0].n_spots :])


# --------------------------------------------------------------------------------- the run's record


def test_record_holds_neighbours_reading_time_and_all_inputs(cortex, tmp_path, capsys, monkeypatch):
    times, read, make = {}, layers.load, run.Run

    def noted_load(*args):
        times["reading"] = time.perf_counter()
        return read(*args)

    def noted_run(*args):
        record = make(*args)
        times["start"] = record.start
        return record

    monkeypatch.setattr(layers, "load", noted_load)
    monkeypatch.setattr(run, "Run", noted_run)
    slide = data.load_slide(cortex, "s1")
    checksums = []
    for name in ("a", "b"):
        labelled = zip(slide.barcodes, slide.labels)
        lines = [f"{barcode},{name}{label}\n" for barcode, label in labelled if label >= 0]
        (tmp_path / "l.csv").write_text("".join(lines))
        where = f"--data {cortex} --slice s1 --labels {tmp_path}/l.csv --runs {tmp_path}/{name}"
        assert gat(f"{where} {SMALL} --k 4") == 0
        checksums.append(printed_record(capsys.readouterr().out)["data_checksum"])
    assert checksums[0] != checksums[1] and times["start"] < times["reading"]
    arrays = np.load(only(tmp_path / "b", "arrays.npz"))
    np.testing.assert_array_equal(arrays["neighbours"], data.knn_table(arrays["xy"], 4))
    assert arrays["attention"].shape == (*arrays["neighbours"].shape[:1], 4, 4)


def test_files_a_run_depends_on(cortex, real_data):
    slide = data.load_slide(cortex, "s1")

    def files(slide, **flags):
        c = short(cortex, **flags)
        return layers.input_files_of(c, mode_of(c), [slide])

    assert [Path(f).name for f in files(slide, mode="multimodal")] == [
        "filtered_feature_bc_matrix.h5",
        "tissue_positions_list.csv",
        "scalefactors_json.json",
        "metadata.tsv",
        "tissue_hires_image.png",
    ]
    assert files(slide, mode="embedding", embedding="e/{slice}.npz")[-1] == "e/s1.npz"
    assert files(slide, mode="img_expr", encoder="f.npy")[-1] == "f.npy"
    hest = data.load_hest(real_data / "her2st", "A2", counts=False)
    names = input_files([hest, hest], "f/{sample}.npz", ["sets.gmt", ""])
    expected = ["A2.h5ad", "metadata.csv", "A2.h5", "A2.npz", "sets.gmt"]
    assert [Path(f).name for f in names] == expected
    suffixes = [Path(f).suffix for f in files(hest, mode="img_expr")]
    assert suffixes == [".h5ad", ".csv", ".h5"]


def variant(**flags):
    """Folder name of a run of the preset `paper`."""
    return gf.variant(gf.Config(preset="paper", **flags))


def test_variants_of_files_with_one_name_differ():
    a, b = (variant(mode="embedding", embedding=f"{folder}/e.npz") for folder in "ab")
    assert a != b and a.startswith("paper-random-embedding-cross-embedding-e.npz_") and "/" not in a
    assert variant(encoder="x/resnet") != variant(encoder="y/resnet")


def test_variants_name_split_mode_fusion_and_what_is_not_the_default():
    def variant(**flags):
        return gf.variant(gf.Config(preset="paper", **flags))

    assert (
        variant() == "paper-random-full-cross" and variant(k=18) == "paper-random-full-cross-k-18"
    )
    assert variant(mode="img_expr", fusion="concat") == "paper-random-img_expr-concat"
    assert variant(mode="concat") == "paper-random-concat"
    assert variant(mode="none", split="blocks", fold=2) == "paper-blocks2-none"
    assert (
        variant(split="slice", train="a,b", fast=False) == "paper-slice-a+b-full-cross-fast-False"
    )


# ---------------------------------------------------------------------------------------- baselines


def test_rbf_equals_dense_kernel_ridge(cortex):
    task = task_of(short(cortex))
    pitch, train, val = data.lattice_pitch(task.place), task.split.train, task.split.val
    onehot = np.eye(task.n_classes)[task.labels[train]]
    best_ari, best = -1, None
    for bandwidth in (2.0, 3.0):
        for ridge in (0.1, 0.3):
            gamma = 0.5 / (bandwidth * pitch) ** 2
            model = KernelRidge(kernel="rbf", alpha=ridge, gamma=gamma)
            pred = model.fit(task.place[train], onehot).predict(task.place).argmax(1)
            ari = metrics.clustering(task.labels[val], pred[val])["ari"]
            if ari > best_ari:
                best_ari, best = ari, pred
    ours = layers.baselines_of(task)["coords_rbf"]().argmax(1)
    assert (ours == best).mean() > 0.99


def test_real_floor(real_data):
    """Coordinates-only scores of three real slices on the published split (12-slice mean: kNN .922,
    RBF .938)."""
    expected = {"151673": (0.916, 0.938), "151674": (0.892, 0.917), "151510": (0.910, 0.924)}
    for name, scores in expected.items():
        c = gf.Config(data=str(real_data / "dlpfc"), slice=name, mode="none")
        task = task_of(c)
        test, floors = task.split.test, layers.baselines_of(task)
        found = []
        for baseline in ("coords_knn", "coords_rbf"):
            pred = floors[baseline]()[test].argmax(1)
            found.append(metrics.clustering(task.labels[test], pred)["ari"])
        assert found == pytest.approx(scores, abs=0.01)


def test_mode_none_trains_nothing_and_scores_every_baseline(cortex, tmp_path, capsys):
    """The same baselines as beside a network; no model, no score, no curve, no prediction."""
    where = f"--data {cortex} --slice s1 --split blocks --n_blocks 3"
    assert gat(f"{where} --mode none --runs {tmp_path}/none") == 0
    out = capsys.readouterr().out
    record = printed_record(out)
    assert record["metrics"] == {} and record["n_params"] == 0 and record["epochs"] == 0
    assert "library size: given" in out and record["library"] == "given"
    names = ["majority", "coords_knn", "coords_rbf", "expr_lr", "smoothed_lr"]
    assert list(record["baselines"]) == names and "training" not in record["laps"]
    for name in names:
        assert f"\n{name} " in out
    folder = only(tmp_path / "none", "run.json").parent
    assert folder.parent.name == "paper-blocks0-none-n_blocks-3"
    assert {path.name for path in folder.iterdir()} == {"run.json", "arrays.npz", "tissue.png"}
    arrays = np.load(folder / "arrays.npz")
    assert not {"prob", "pred", "embedding", "attention"} & set(arrays.files)
    assert gat(f"{where} --mode full --runs {tmp_path}/full {SMALL}") == 0
    assert printed_record(capsys.readouterr().out)["baselines"] == record["baselines"]
    beside = np.load(only(tmp_path / "full", "arrays.npz"))
    for name in names:
        assert np.array_equal(arrays[f"pred_{name}"], beside[f"pred_{name}"])


def test_mode_none_of_a_folder_without_counts(cortex, tmp_path, capsys):
    """Coordinates only, and a sentence says so."""
    root = without_counts(cortex, tmp_path / "d")
    words = f"--slice s1 --split slice --mode none --runs {tmp_path}/r"
    assert gat(f"--data {root} {words}") == 0
    out = capsys.readouterr().out
    for name in ("s1", "s2"):
        assert f"{name} has no count matrix: baselines from coordinates only" in out
    assert "library size" not in out
    names = ["majority", "coords_knn", "coords_rbf"]
    alone = printed_record(out)["baselines"]
    assert list(alone) == names
    # the same spots in another order
    assert gat(f"--data {cortex} {words}") == 0
    beside = printed_record(capsys.readouterr().out)["baselines"]
    for name in names:
        assert alone[name]["ari"] == pytest.approx(beside[name]["ari"], abs=0.02)
    assert gat(f"--data {root} --slice s1 --mode none --runs {tmp_path}/r") == 0
    assert list(printed_record(capsys.readouterr().out)["baselines"]) == names


def test_mode_none_on_real_labels_without_counts(real_data, tmp_path, capsys):
    where = f"--data {real_data}/dlpfc_labels_only --slice 151507 --runs {tmp_path}"
    assert gat(f"{where} --mode none") == 0
    out = capsys.readouterr().out
    assert "151507 has no count matrix: baselines from coordinates only" in out
    baselines = printed_record(out)["baselines"]
    assert baselines["coords_knn"]["ari"] == pytest.approx(0.926, abs=0.01)
    assert baselines["coords_rbf"]["ari"] == pytest.approx(0.931, abs=0.01)


# ----------------------------------------------------------------------------------- frozen vectors


def test_vectors_are_joined_by_barcode(cortex, tmp_path):
    slide = data.load_slide(cortex, "s1", counts=False)
    order = np.random.default_rng(0).permutation(slide.n_spots)
    values = np.random.default_rng(1).normal(size=(slide.n_spots, 8)).astype(np.float32)
    path = tmp_path / "e.npz"
    np.savez(path, embedding=values[order], barcodes=slide.barcodes[order])
    task = task_of(short(cortex, mode="embedding", embedding=str(path)))
    assert np.array_equal(task.x, values)


def test_embedding_modes_need_no_count_matrix(cortex, tmp_path, capsys):
    """The linear baselines read the vectors."""
    root = without_counts(cortex, tmp_path / "d")
    path = vectors(tmp_path / "e.npz", data.load_slide(cortex, "s1", counts=False))
    names = ["majority", "coords_knn", "coords_rbf", "embedding_lr", "embedding_smoothed_lr"]
    for mode in ("embedding", "embedding_only"):
        where = f"--data {root} --slice s1 --runs {tmp_path}/r"
        assert gat(f"{where} --mode {mode} --embedding {path} {SMALL}") == 0
        out = capsys.readouterr().out
        assert "library size" not in out and "without a vector" not in out
        record = printed_record(out)
        assert list(record["baselines"]) == names
        assert record["metrics"].keys() >= {f"gain_over_{name}" for name in names}
        assert [Path(name).name for name in record["files"]] == [
            "tissue_positions_list.csv",
            "scalefactors_json.json",
            "metadata.tsv",
            "e.npz",
        ]


def test_embedding_modes_do_not_read_the_counts_that_are_there(cortex, tmp_path):
    path = vectors(tmp_path / "e.npz", data.load_slide(cortex, "s1", counts=False))
    task = task_of(short(cortex, mode="embedding", embedding=str(path)))
    assert not task.has_counts and task.slides[0].counts is None
    assert task.x.shape == (task.slides[0].n_spots, 8)


def test_baselines_of_vectors_read_the_vectors(cortex, tmp_path):
    """Vectors that hold the label are read by both; noise is read by none."""
    slide = data.load_slide(cortex, "s1", counts=False)
    onehot = np.eye(len(slide.classes))[slide.labels]
    np.savez(tmp_path / "good.npz", embedding=onehot, barcodes=slide.barcodes)
    vectors(tmp_path / "noise.npz", slide)
    accuracy = {}
    for name in ("good", "noise"):
        c = short(cortex, mode="embedding_only", embedding=str(tmp_path / f"{name}.npz"))
        task = task_of(c)
        test, floors = task.split.test, layers.baselines_of(task)
        pred = floors["embedding_lr"]()[test].argmax(1)
        accuracy[name] = (pred == task.labels[test]).mean()
        smoothed = floors["embedding_smoothed_lr"]()[test].argmax(1)
        accuracy[f"{name}, smoothed"] = (smoothed == task.labels[test]).mean()
    assert accuracy["good"] > 0.99 and accuracy["good, smoothed"] > 0.6
    assert accuracy["noise"] < 0.5 and accuracy["noise, smoothed"] < 0.6


def test_spots_without_a_vector_are_left_out_and_counted(cortex, tmp_path, capsys):
    slide = data.load_slide(cortex, "s1", counts=False)
    kept = np.arange(slide.n_spots) % 5 > 0
    path = vectors(tmp_path / "e.npz", slide.subset(kept))
    where = f"--data {cortex} --slice s1 --runs {tmp_path}/r --mode embedding"
    assert gat(f"{where} --embedding {path} {SMALL}") == 0
    out = capsys.readouterr().out
    assert f"s1: {(~kept).sum()} spots without a vector are left out" in out
    arrays = np.load(only(tmp_path / "r", "arrays.npz"))
    assert list(arrays["barcodes"]) == list(slide.barcodes[kept])
    assert arrays["neighbours"].max() < kept.sum()
    # and so does a prediction
    model = only(tmp_path / "r", "model.pt")
    assert gat(f"--data {cortex} --slice s1 --runs {tmp_path}/p --predict {model}") == 0
    assert f"s1: {(~kept).sum()} spots without a vector" in capsys.readouterr().out
    again = np.load(only(tmp_path / "p", "arrays.npz"))
    np.testing.assert_allclose(again["prob"], arrays["prob"], atol=1e-6)


def test_vectors_of_another_slide(cortex, tmp_path, capsys):
    slide = data.load_slide(cortex, "s1", counts=False)
    slide.barcodes = np.array([f"other-{barcode}" for barcode in slide.barcodes])
    path = vectors(tmp_path / "e.npz", slide)
    where = f"--data {cortex} --slice s1 --runs {tmp_path}/r --mode embedding"
    assert gat(f"{where} --embedding {path} {SMALL}") == 2
    error = capsys.readouterr().err
    assert f"{path} has no barcode of slide s1" in error and "give the vectors" in error
    assert not (tmp_path / "r").exists()


def test_vectors_of_several_slices(cortex, tmp_path, capsys):
    """One file a slide: slices share barcodes, and one file for all would give a spot the vector of
    another slice's."""
    for name in ("s1", "s2"):
        vectors(tmp_path / f"{name}.npz", data.load_slide(cortex, name, counts=False))
    where = f"--data {cortex} --slice s1 --runs {tmp_path}/r --split slice --train s2"
    assert gat(f"{where} --mode embedding --embedding {tmp_path}/{{slice}}.npz {SMALL}") == 0
    capsys.readouterr()
    assert gat(f"{where} --mode embedding --embedding {tmp_path}/s1.npz {SMALL}") == 2
    error = capsys.readouterr().err
    assert "vectors of s1, s2, which share barcodes" in error and "{slice}" in error


# -------------------------------------------------------------------------------------------- tiles


def test_probabilities_are_float64_made_on_the_cpu(monkeypatch):
    """Some devices have no float64: the conversion must follow the move."""
    table = data.knn_table(np.random.default_rng(0).random((60, 2)), 5)
    model, calls = gf.GatFusion(gf.Config(dim=16), 20, 0, 3), []

    def watched(name, method):
        def call(self):
            calls.append(name)
            return method(self)

        return call

    for name in ("cpu", "double"):
        monkeypatch.setattr(torch.Tensor, name, watched(name, getattr(torch.Tensor, name)))
    arrays = (np.ones((60, 20), np.float32), None)
    tile = tiles.Tile(np.arange(60), 60, table, arrays, "cpu", whole=True)
    prob, _ = layers.predict(model, [tile], 60, gf.Config())
    assert prob.dtype == np.float64 and calls[:2] == ["cpu", "double"]


@pytest.mark.parametrize(
    ("mode", "fusion"),
    [
        ("full", "cross"),
        ("gcn_full", "cross"),
        ("full", "gated"),
        ("gcn_only", "cross"),
        ("concat", "cross"),
        ("expr_only", "cross"),
        ("img_expr", "cross"),
    ],
)
def test_tiles_with_a_halo_say_what_the_whole_slide_says(mode, fusion):
    """A halo of one step less does not: the test can fail."""
    rng, c = np.random.default_rng(0), gf.Config(mode=mode, fusion=fusion, heads=2, dim=32)
    xy = rng.random((700, 2))
    arrays = tuple(rng.normal(size=(700, width)).astype(np.float32) for width in (20, 9))
    table = data.knn_table(xy, 6)
    table[rng.random(table.shape) < 0.1] = -1  # empty places
    table[5] = -1  # a spot alone
    model, hops = gf.GatFusion(c, 20, 9, 3), layers.hops(c, mode_of(c))
    slides = [xy[:300], xy[300:]]
    whole = list(tiles.make_tiles(arrays, table, slides, 0, hops, "cpu"))
    parts = list(tiles.make_tiles(arrays, table, slides, 100, hops, "cpu"))
    assert len(whole) == 1 and len(parts) == 8
    rows = np.concatenate([tile.rows[: tile.n_own] for tile in parts])
    assert sorted(rows) == list(range(700))
    (p, e), (q, f) = (layers.predict(model, t, 700, c) for t in (whole, parts))
    assert abs(p - q).max() < 1e-5 and abs(e["embedding"] - f["embedding"]).max() < 1e-5
    if hops == 0:
        return
    narrow = []
    for tile in parts:
        halo = data.with_halo(table, tile.rows[: tile.n_own], hops - 1, np.full(700, -1))
        narrow.append(tiles.Tile(halo[0], tile.n_own, halo[1], arrays, "cpu"))
    assert abs(layers.predict(model, narrow, 700, c)[0] - p).max() > 1e-4


def test_training_on_tiles(cortex, tmp_path):
    """One tile of all spots is the whole slide, bit for bit; several learn as well, and predict
    alike with any tile."""

    def run_of(name, words):
        assert gat(f"--data {cortex} --runs {tmp_path}/{name} {words}") == 0
        path = only(tmp_path / name, "run.json")
        return json.loads(path.read_text()), np.load(path.with_name("arrays.npz"))

    words = "--slice s1 --epochs 15 --dim 16 --tile"
    whole, large = run_of("whole", f"{words} 0"), run_of("large", f"{words} 1000000")
    for name in ("prob", "embedding", "attention"):
        assert np.array_equal(whole[1][name], large[1][name])
    tiled = run_of("tiled", f"{words} 150")
    assert tiled[0]["metrics"]["ari"] > 0.5
    assert tiled[0]["baselines"]["coords_rbf"] == whole[0]["baselines"]["coords_rbf"]
    model = only(tmp_path / "tiled", "model.pt")
    probs = []
    for n in (0, 90):
        words = f"--slice s2 --predict {model} --tile {n}"
        probs.append(run_of(f"predict{n}", words)[1]["prob"])
    assert abs(probs[0] - probs[1]).max() < 1e-5


def test_a_large_slide_is_predicted_in_tiles_and_trained_whole(cortex, monkeypatch):
    """On a CPU, above AT_ONCE spots: same predictions, same losses."""
    out, sizes, make = [], [], tiles.Tile.__init__

    def noted(self, rows, n_own, *more, **flags):
        sizes.append(n_own)
        make(self, rows, n_own, *more, **flags)

    monkeypatch.setattr(tiles.Tile, "__init__", noted)
    for most in (20_000, 100):
        monkeypatch.setattr(tiles, "AT_ONCE", most)
        run.seed_everything(0)
        _, prob, extra, history = gf.train(task_of(short(cortex)), CPU)
        out.append((prob, extra["embedding"], history[:, 0]))
    assert max(abs(a - b).max() for a, b in zip(*out)) < 1e-5
    assert sizes[:2] == [len(out[0][0])] * 2 and max(sizes[2:]) <= 100


# --------------------------------------------------------------------------------------- new slides


@pytest.fixture(scope="module")
def checkpoint(cortex, tmp_path_factory):
    """model.pt of a short run on s1, beside its record and arrays."""
    runs = tmp_path_factory.mktemp("runs")
    assert gat(f"--data {cortex} --slice s1 --runs {runs} {SMALL}") == 0
    return only(runs, "model.pt")


def prediction(cortex, model, runs, *words):
    """Arrays of a prediction on s2."""
    text = " ".join(map(str, words))
    assert gat(f"--data {cortex} --slice s2 --predict {model} --runs {runs} {text}") == 0
    return np.load(only(runs, "arrays.npz"))


def test_predict_from_a_checkpoint(cortex, checkpoint, tmp_path, capsys):
    trained_on = np.load(checkpoint.with_name("arrays.npz"))
    flags = f"--predict {checkpoint} --runs {tmp_path}"
    assert gat(f"--data {cortex} --slice s1 {flags}/p") == 0
    assert "s1 has 100% of the checkpoint's" in capsys.readouterr().out
    again = np.load(only(tmp_path / "p", "arrays.npz"))
    np.testing.assert_allclose(again["prob"], trained_on["prob"], atol=1e-6)
    slide = data.load_visium(cortex / "s2")
    simulate.write_visium(slide.select_genes(slide.genes[:40]), tmp_path / "few" / "s2")
    assert gat(f"--data {tmp_path}/few/s2 {flags}/q") == 2
    assert "fewer than --min_shared" in capsys.readouterr().err
    assert not list((tmp_path / "q").rglob("*.json"))
    assert gat(f"--data {tmp_path}/few/s2 {flags}/q --min_shared 0.01") == 0


def test_predict_without_fast_gives_the_same(cortex, checkpoint, tmp_path):
    plain = prediction(cortex, checkpoint, tmp_path / "plain", "--no-fast")
    fast = prediction(cortex, checkpoint, tmp_path / "fast", "--fast")
    assert abs(plain["prob"] - fast["prob"]).max() < 1e-5


def test_predict_scales_the_new_slide_as_asked(cortex, checkpoint, tmp_path):
    """By the training rows of the checkpoint, or by its own spots; untyped: as in training."""
    found = {}
    for scale in ("", "train", "slice", "auto"):
        words = f"--scale {scale}" if scale else ""
        found[scale] = prediction(cortex, checkpoint, tmp_path / f"r{scale}", words)["prob"]
    assert np.array_equal(found[""], found["train"]) and np.array_equal(found[""], found["auto"])
    assert abs(found["slice"] - found["train"]).max() > 1e-3


def test_predict_scales_by_slice_what_was_trained_so(cortex, tmp_path):
    where = f"--data {cortex} --slice s1 --runs {tmp_path}/trained"
    assert gat(f"{where} --split slice --train s3 {SMALL}") == 0
    model = only(tmp_path / "trained", "model.pt")
    found = {}
    for scale in ("", "train", "slice"):
        words = f"--scale {scale}" if scale else ""
        found[scale] = prediction(cortex, model, tmp_path / f"r{scale}", words)["prob"]
    assert np.array_equal(found[""], found["slice"])
    assert abs(found["slice"] - found["train"]).max() > 1e-3


def test_predict_refuses_a_scale_of_frozen_vectors(cortex, tmp_path, capsys):
    path = vectors(tmp_path / "e.npz", data.load_slide(cortex, "s1", counts=False))
    where = f"--data {cortex} --slice s1 --runs {tmp_path}/r"
    assert gat(f"{where} --mode embedding --embedding {path} {SMALL}") == 0
    model = only(tmp_path / "r", "model.pt")
    for scale in ("slice", "train"):
        assert gat(f"{where} --predict {model} --scale {scale}") == 2
        assert "--scale has no effect on frozen vectors" in capsys.readouterr().err


def test_two_checkpoints_two_predictions(cortex, checkpoint, tmp_path):
    where = f"--data {cortex} --runs {tmp_path}/r"
    assert gat(f"{where} --slice s1 --seed 1 {SMALL}") == 0
    for model in (checkpoint, only(tmp_path / "r", "model.pt")):
        moved = tmp_path / "model.pt"
        moved.write_bytes(model.read_bytes())
        assert gat(f"{where} --slice s2 --predict {moved}") == 0
    names = [path.parent.parent.name for path in (tmp_path / "r").rglob("s2/*/seed0/run.json")]
    assert len(names) == 2
    assert all(name.startswith("predict-paper-random-full-cross-") for name in names)


def test_predict_counts_classes_that_the_checkpoint_lacks(cortex, checkpoint, tmp_path, capsys):
    slide = data.load_slide(cortex, "s2")
    names = np.array(slide.classes)[slide.labels]
    names[:30] = "tumour"
    lines = [f"{barcode},{name}\n" for barcode, name in zip(slide.barcodes, names)]
    (tmp_path / "l.csv").write_text("".join(lines))
    where = f"--data {cortex} --slice s2 --labels {tmp_path}/l.csv --runs {tmp_path}/r"
    assert gat(f"{where} --predict {checkpoint}") == 0
    out = capsys.readouterr().out
    assert "30 spots are not scored, the checkpoint has no class tumour" in out
    assert printed_record(out)["spots_of_absent_classes"] == {"tumour": 30}


@pytest.mark.parametrize(("mode", "flag"), [("embedding", "embedding"), ("multimodal", "encoder")])
def test_predict_with_vectors_of_the_new_slide(cortex, tmp_path, capsys, mode, flag):
    """--embedding and --encoder of the command override the checkpoint's file, and their width is
    checked."""
    one, two = (data.load_slide(cortex, name, counts=False) for name in ("s1", "s2"))
    old, new = vectors(tmp_path / "1.npz", one), vectors(tmp_path / "2.npz", two)
    wide = vectors(tmp_path / "w.npz", two, 9)
    where = f"--data {cortex} --slice s1 --runs {tmp_path}/r"
    assert gat(f"{where} --mode {mode} --{flag} {old} {SMALL}") == 0
    model = only(tmp_path / "r", "model.pt")
    words = f"--data {cortex} --slice s2 --predict {model} --runs {tmp_path}/p"
    capsys.readouterr()
    assert gat(words) == 2
    # slices share barcodes: those of the training slide must not pass for the new one's
    message = "1.npz, which are of its own slide" if mode == "embedding" else "1.npz lacks"
    assert message in capsys.readouterr().err
    assert gat(f"{words} --{flag} {wide}") == 2
    assert "width 9" in capsys.readouterr().err and not list((tmp_path / "p").rglob("*.json"))
    assert gat(f"{words} --{flag} {new}") == 0
    assert printed_record(capsys.readouterr().out)["config"][flag] == str(new)


def test_predict_uses_this_runs_device_and_needs_the_image_scale(cortex, tmp_path, capsys):
    where = f"--data {cortex} --slice s1 --runs {tmp_path} --cache {tmp_path}/c"
    assert gat(f"{where} --mode multimodal --device cpu {SMALL}") == 0
    saved = torch.load(only(tmp_path, "model.pt"), weights_only=True)
    saved["config"]["device"] = "cuda:77"  # trained on another machine
    torch.save(saved, tmp_path / "elsewhere.pt")
    assert gat(f"{where} --predict {tmp_path}/elsewhere.pt") == 0
    torch.save(saved | {"image_scale": None}, tmp_path / "lost.pt")
    capsys.readouterr()
    assert gat(f"{where} --predict {tmp_path}/lost.pt") == 2
    assert "image_scale" in capsys.readouterr().err
    torch.save({"config": saved["config"]}, tmp_path / "half.pt")
    assert gat(f"{where} --predict {tmp_path}/half.pt") == 2
    assert "not a gat_fusion checkpoint" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--slice nowhere", "nowhere"),
        ("--k 500", "smaller k"),
        ("--split blocks --fold 9", "fold 9"),
        ("--split blocks --buffer 60", "smaller buffer"),
        ("--split slice --train s1", "--train"),
        ("--split donor --train s2", "donor"),
        ("--mode embedding", "--embedding"),
        ("--device cuda:77", "--device"),
        ("--predict missing.pt", "missing.pt"),
        ("--lr 1e30 --epochs 9", "cross-entropy"),
        ("--split slice --labels l.csv", "beside each slide"),
        ("--split donor --labels l.csv", "--labels"),
        ("--heads 3", "--heads is 3"),
        ("--dropout 1", "--dropout"),
        ("--dropout nan", "--dropout"),
        ("--epochs 0", "--epochs"),
        ("--layers 0", "--layers"),
        ("--k 0", "--k is 0"),
        ("--n_top_genes 0", "--n_top_genes"),
        ("--heads 0", "--heads"),
        ("--dim 0", "--dim"),
        ("--seed -1", "--seed"),
        ("--split_seed -1", "--split_seed"),
        ("--buffer -1", "--buffer"),
        ("--n_blocks 0", "--n_blocks"),
        ("--lr 0", "--lr"),
        ("--min_shared 2 --predict x.pt", "--min_shared"),
        ("--mode none --h5ad", "--h5ad has no effect in --mode none"),
        ("--mode none --lr 0.1", "--lr has no effect in --mode none"),
        ("--mode embedding --embedding e.npz --scale slice", "--scale has no effect"),
    ],
)
def test_bad_flags_are_one_sentence_and_status_2(cortex, tmp_path, capsys, flags, message):
    assert gat(f"--data {cortex} --slice s1 --runs {tmp_path}/r {flags}") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not list(tmp_path.rglob("*.*"))


def test_bfloat16_on_a_cpu_says_once_that_it_is_slower(cortex, tmp_path, capsys):
    where = f"--data {cortex} --slice s1 --device cpu --runs {tmp_path}"
    for words, n in (("--bf16", 1), ("", 0)):
        assert gat(f"{where} {SMALL} {words}") == 0
        assert capsys.readouterr().out.count("--bf16 on a CPU") == n
