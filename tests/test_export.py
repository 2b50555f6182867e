"""Results in files that other tools open: what is written, read back by anndata, scanpy, pandas and
our own reader."""

import csv
import errno
import io
import json
import os
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.sparse as sp

from conftest import ROOT
from plainst import export, h5ad, run
from plainst.__main__ import main as plainst
from plainst.export import Result, Table
from plainst.readers import load_h5ad, load_slide
from plainst.readers.checked import DataError
from plainst.readers.crops import load_cells
from plainst.simulate import simulate_cells, simulate_cortex, simulate_hest, write_visium

anndata = pytest.importorskip("anndata")


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as handle:
        return list(csv.reader(handle))


def read(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return anndata.read_h5ad(path)


@pytest.fixture(scope="module")
def cortex(tmp_path_factory):
    """Folder with two Visium slides, sim1 and sim2."""
    folder = tmp_path_factory.mktemp("cortex")
    for seed, name in enumerate(("sim1", "sim2")):
        slide = simulate_cortex(n_spots=220, n_genes=50, seed=seed, sample=name, image_px=400)
        write_visium(slide, folder / name)
    return folder


def multist_arrays(slide, seed=0):
    """Arrays as multist writes them, 11 domains."""
    rng = np.random.default_rng(seed)
    domains = np.resize(np.arange(11), slide.n_spots)
    return {
        "z": rng.normal(size=(slide.n_spots, 4)).astype(np.float32),
        "labels_gene_raw": domains[::-1],
        "domains": domains,
        "labels": slide.labels,
        "classes": np.array(slide.classes),
        "barcodes": slide.barcodes,
        "xy": slide.xy,
        "pseudotime": np.where(np.arange(slide.n_spots) == 3, np.nan, rng.random(slide.n_spots)),
    }


def write_record(folder, method, arrays, **config):
    """run.json and arrays.npz of a run that finished; -> the folder."""
    folder.mkdir(parents=True)
    record = {"method": method, "config": config, "metrics": {}, "versions": run.versions()}
    (folder / "run.json").write_text(json.dumps(record))
    np.savez_compressed(folder / "arrays.npz", **arrays)
    return folder


@pytest.fixture
def visium(cortex, tmp_path):
    """(slide, its arrays, folder of a record of multist on it)."""
    slide = load_slide(cortex, "sim1")
    arrays = multist_arrays(slide)
    record = write_record(
        tmp_path / "runs/seed0", "multist", arrays, data=str(cortex), slice="sim1"
    )
    return slide, arrays, record


# --------------------------------------------------------------------------------------------------
# CSV
# --------------------------------------------------------------------------------------------------


def test_csv_quotes_and_digits_and_missing_values():
    ids = np.array(["A,1", 'B"2', "C-3"])
    columns = {
        "layer": np.array(["L2/3", "", "a, b"]),
        "single": np.array([0.1, np.nan, 1 / 3], dtype=np.float32),
        "double": np.array([0.1 + 0.2, 1e-300, -np.inf]),
        "count": np.array([1, 2, 3]),
        "scored": np.array([True, False, True]),
    }
    file = io.BytesIO()
    export.write_csv(file, [Table(ids, columns)])
    rows = list(csv.reader(io.StringIO(file.getvalue().decode())))
    assert rows[0] == ["barcode", "layer", "single", "double", "count", "scored"]
    assert [row[0] for row in rows[1:]] == ids.tolist()
    assert [row[1] for row in rows[1:]] == ["L2/3", "", "a, b"]
    assert [row[2] for row in rows[1:]] == ["0.1", "", "0.33333334"]
    assert np.array_equal([float(row[3]) for row in rows[1:]], columns["double"])
    assert rows[1][4:] == ["1", "True"]


def test_csv_of_cells_begins_with_id_and_blocks_of_rows_join(monkeypatch):
    monkeypatch.setattr("plainst.tables.ROWS", 3)
    tables = [
        Table(np.array([f"c{i}" for i in range(n)]), {"v": np.arange(n)}, "cells") for n in (7, 2)
    ]
    file = io.BytesIO()
    export.write_csv(file, tables, ["G1"], [np.ones((7, 1)), np.zeros((2, 1))])
    rows = list(csv.reader(io.StringIO(file.getvalue().decode())))
    assert rows[0] == ["id", "v", "G1"]
    assert [row[1] for row in rows[1:]] == [*"0123456", *"01"]
    assert [row[2] for row in rows[1:]] == ["1.0"] * 7 + ["0.0"] * 2


def test_loupe_is_two_columns_without_spots_that_have_no_value():
    table = Table(np.array(["A-1", "B-1"]), {"domain": np.array(["3", ""])})
    file = io.BytesIO()
    export.write_loupe(file, table, "domain")
    assert file.getvalue() == b"Barcode,domain\nA-1,3\n"


def test_columns_whose_names_hdf5_cannot_hold_are_renamed():
    columns = {name: np.zeros(1) for name in ("p_L2/3", "p_L2_3", "barcode", ".", "_index", "a\0b")}
    names = list(Table(np.array(["A"]), columns).columns)
    assert names == ["p_L2_3", "p_L2_3-1", "barcode-1", ".-1", "_index-1", "ab"]
    with pytest.raises(ValueError, match="column x is"):
        Table(np.array(["A"]), {"x": np.zeros(2)})


def test_names_of_numbers():
    assert export.names_of(np.array([1, -1, 0]), ["a", "b"]).tolist() == ["b", "", "a"]
    assert export.names_of(np.array([2, 0])).tolist() == ["2", "0"]
    for codes in ([2, 0], [-2, 0]):
        with pytest.raises(ValueError, match="class numbers"):
            export.names_of(np.array(codes), ["a", "b"])


# --------------------------------------------------------------------------------------------------
# h5ad
# --------------------------------------------------------------------------------------------------


def some_anndata(path, x):
    h5ad.write_anndata(
        path,
        np.array(["a,1", "b", "c"]),
        {
            "domain": np.array(["10", "2", ""]),
            "empty": np.array(["", "", ""]),
            "t": np.array([0.5, np.nan, 1.0]),
            "n": np.array([1, 2, 3]),
            "scored": np.array([True, False, True]),
        },
        np.array(["G/1", "G2"]),
        x,
        {"spatial": np.arange(6.0).reshape(3, 2), "X_plainst": np.ones((3, 4), np.float32)},
        {} if x is None else {"measured": np.full((3, 2), 2.0, np.float32)},
        {"plainst": {"X": "counts", "k": 3}, "spatial": {"s": {"images": {}}}},
    )


@pytest.mark.parametrize("kind", ("csr", "dense", "none"))
def test_anndata_reads_what_was_written(kind, tmp_path):
    dense = np.array([[0, 3], [1, 0], [0, 0]])
    x = {"csr": sp.csr_matrix(dense.astype(np.int32)), "dense": dense / 7, "none": None}[kind]
    some_anndata(tmp_path / "a.h5ad", x)
    a = read(tmp_path / "a.h5ad")
    assert a.obs_names.tolist() == ["a,1", "b", "c"] and a.var_names.tolist() == ["G/1", "G2"]
    assert a.obs["domain"].cat.categories.tolist() == ["2", "10"]  # numbers sort as numbers
    assert a.obs["domain"].isna().tolist() == [False, False, True]
    assert a.obs["empty"].isna().all() and a.obs["scored"].dtype == bool
    assert list(a.obs) == ["domain", "empty", "t", "n", "scored"]
    assert np.array_equal(a.obs["t"], [0.5, np.nan, 1.0], equal_nan=True)
    assert np.array_equal(a.obsm["spatial"], np.arange(6.0).reshape(3, 2))
    assert a.obsm["X_plainst"].shape == (3, 4)
    assert a.uns["plainst"] == {"X": "counts", "k": 3}
    if x is None:
        assert a.X is None
    else:
        assert sp.issparse(a.X) == (kind == "csr")
        assert np.array_equal(
            a.X.toarray() if sp.issparse(a.X) else a.X, dense / (7, 1)["r" in kind]
        )


def encodings(path):
    """{place: (encoding-type, encoding-version)} of all that an h5ad holds."""
    marks = {}
    with h5py.File(path) as handle:
        names = [""]
        handle.visit(names.append)
        for name in names:
            attrs = handle[name or "/"].attrs
            marks[name] = tuple(attrs.get(f"encoding-{part}") for part in ("type", "version"))
    return marks


def test_encodings_are_those_of_anndata_itself(tmp_path):
    some_anndata(tmp_path / "ours.h5ad", sp.csr_matrix(np.eye(3, 2, dtype=np.int32)))
    read(tmp_path / "ours.h5ad").write_h5ad(tmp_path / "theirs.h5ad")
    assert encodings(tmp_path / "ours.h5ad") == encodings(tmp_path / "theirs.h5ad")


def test_many_categories_need_wider_codes(tmp_path):
    names = np.array([f"c{i:03d}" for i in range(128)])
    h5ad.write_anndata(tmp_path / "a.h5ad", names, {"c": names}, names[:0])
    assert read(tmp_path / "a.h5ad").obs["c"].astype(str).tolist() == names.tolist()


def test_parts_of_another_size_are_refused():
    table = Table(np.array(["a", "b"]), {})
    for part in (
        {"xy": np.zeros((3, 2))},
        {"embedding": np.zeros((3, 2))},
        {"x": np.zeros((2, 2)), "genes": np.array(["g"])},
        {"layers": {"measured": np.zeros((2, 2))}},
    ):
        with pytest.raises(ValueError):
            Result("multist", table, **({"xy": np.zeros((2, 2))} | part))


# --------------------------------------------------------------------------------------------------
# Records
# --------------------------------------------------------------------------------------------------


def test_visium_record_opens_in_anndata_scanpy_and_here(visium, capsys):
    slide, arrays, record = visium
    assert not plainst(["export", str(record / "run.json")])
    assert capsys.readouterr().out.splitlines()[-1] == str(record / "result.h5ad")
    a = read(record / "result.h5ad")
    assert a.obs_names.tolist() == slide.barcodes.tolist()
    assert (a.X != slide.counts).nnz == 0 and a.uns["plainst"]["X"] == "counts"
    assert a.var_names.tolist() == slide.genes.tolist()
    assert np.array_equal(a.obsm["spatial"], slide.xy)
    assert np.array_equal(a.obsm["X_plainst"], arrays["z"])
    assert a.obs["domain"].astype(int).tolist() == arrays["domains"].tolist()
    assert a.obs["domain"].cat.categories.tolist() == [str(i) for i in range(11)]
    assert np.array_equal(a.obs["pseudotime"], arrays["pseudotime"], equal_nan=True)
    assert np.array_equal(a.obs[["array_row", "array_col"]], slide.grid)
    table = rows_of(record / "spots.csv")
    assert table[0] == ["barcode", "domain", "domain_raw", "pseudotime", "label"]
    assert table[4][3] == "" and len(table) == 1 + slide.n_spots
    assert rows_of(record / "loupe.csv")[:2] == [["Barcode", "domain"], [slide.barcodes[0], "0"]]

    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    scanpy = pytest.importorskip("scanpy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = scanpy.pl.spatial(a, color="domain", show=False)
    assert axes[0].images[0].get_array().shape[:2] == slide.image.shape[:2]
    matplotlib.pyplot.close("all")

    again = load_h5ad(record / "result.h5ad")
    assert again.barcodes.tolist() == slide.barcodes.tolist()
    assert (again.counts != slide.counts).nnz == 0
    for name in ("xy", "grid", "labels", "genes", "image"):
        assert np.array_equal(getattr(again, name), getattr(slide, name)), name
    for name in ("image_scale", "um_per_px", "patient", "classes"):
        assert getattr(again, name) == getattr(slide, name), name


def test_scale_factors_are_those_of_the_slide(cortex, visium):
    _, _, record = visium
    export.export_record(record)
    stored = read(record / "result.h5ad").uns["spatial"]["sim1"]["scalefactors"]
    given = json.loads((cortex / "sim1/spatial/scalefactors_json.json").read_text())
    assert stored["spot_diameter_fullres"] == given["spot_diameter_fullres"]
    # and once more from the h5ad itself
    slide = load_h5ad(record / "result.h5ad")
    assert export._scale_factors(slide) == pytest.approx(stored)


def test_rows_are_joined_by_barcode(cortex, tmp_path):
    slide = load_slide(cortex, "sim1")
    some = slide.subset(np.random.default_rng(0).permutation(slide.n_spots)[:50])
    record = write_record(
        tmp_path / "r", "multist", multist_arrays(some), data=str(cortex / "sim1")
    )
    export.export_record(record)
    a = read(record / "result.h5ad")
    assert a.obs_names.tolist() == some.barcodes.tolist()
    assert (a.X != some.counts).nnz == 0
    assert np.array_equal(a.obs["array_row"], some.grid[:, 0])


@pytest.mark.parametrize("reason", ("gone", "other slide"))
def test_without_its_data_a_record_gives_what_its_arrays_hold(reason, visium, cortex, capsys):
    slide, arrays, record = visium
    facts = json.loads((record / "run.json").read_text())
    change = {"gone": {"data": "/nowhere"}, "other slide": {"slice": "sim2"}}[reason]
    facts["config"] |= change
    (record / "run.json").write_text(json.dumps(facts))
    export.export_record(record)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "written from arrays.npz alone" in lines[0]
    a = read(record / "result.h5ad")
    assert a.X is None and a.uns["plainst"]["X"] == "nothing" and "spatial" not in a.uns
    assert np.array_equal(a.obsm["X_plainst"], arrays["z"])
    if reason == "gone":
        export.export_record(record, data=cortex)
        assert read(record / "result.h5ad").shape == (slide.n_spots, slide.n_genes)


def test_out_takes_the_files_and_csv_of_the_run_stays(visium, cortex, tmp_path):
    _, _, record = visium
    before = sorted(p for p in cortex.rglob("*"))
    (record / "spots.csv").write_text("barcode,domain\nmine,1\n")
    assert export.export_record(record) == [record / "loupe.csv", record / "result.h5ad"]
    assert (record / "spots.csv").read_text() == "barcode,domain\nmine,1\n"
    place = tmp_path / "for_friends"
    export.export_record(record / "run.json", place)
    assert sorted(p.name for p in place.iterdir()) == ["loupe.csv", "result.h5ad", "spots.csv"]
    assert sorted(p for p in cortex.rglob("*")) == before


def test_slides_of_one_record_become_one_h5ad_each(cortex, tmp_path):
    slides = [load_slide(cortex, name) for name in ("sim1", "sim2")]
    n = [slide.n_spots for slide in slides]
    genes = np.array(["A", "B/C"])
    arrays = {
        "slide": np.repeat(["sim1", "sim2"], n),
        "barcodes": np.concatenate([slide.barcodes for slide in slides]),
        "xy": np.concatenate([slide.xy for slide in slides]),
        "genes": genes,
        "pred": np.random.default_rng(0).random((sum(n), 2)).astype(np.float32),
        "gene_sets": np.array(["SET/1", "SET2"]),
        "pathway_scores": np.ones((sum(n), 2), np.float32),
    }
    results = export.results_of("stformer", arrays, slides, "cp10k")
    place = tmp_path / "out"
    run.write_together({place / k: write for k, write in export.writers(results).items()})
    names = ["result_sim1.h5ad", "result_sim2.h5ad", "spots.csv"]
    assert sorted(p.name for p in place.iterdir()) == names
    a = read(place / "result_sim2.h5ad")
    assert a.obs_names.tolist() == slides[1].barcodes.tolist()
    assert np.array_equal(a.X, arrays["pred"][n[0] :]) and a.var_names.tolist() == genes.tolist()
    assert a.uns["plainst"]["X"] == "predicted expression"
    assert a.uns["plainst"]["target"] == "cp10k" and list(a.uns["spatial"]) == ["sim2"]
    table = rows_of(place / "spots.csv")
    assert table[0] == ["barcode", "slide", "SET_1", "SET2", "A", "B/C"]
    assert len(table) == 1 + sum(n)
    assert np.array_equal(np.array(table[1:])[:, 4:].astype(np.float32), arrays["pred"])


def test_many_predicted_genes_stand_in_the_h5ad_alone(cortex):
    slide, n_genes = load_slide(cortex, "sim1"), export.GENES_IN_CSV + 1
    arrays = {
        "slide": np.repeat(["sim1"], slide.n_spots),
        "barcodes": slide.barcodes,
        "xy": slide.xy,
        "genes": np.array([f"G{i}" for i in range(n_genes)]),
        "pred": np.ones((slide.n_spots, n_genes), np.float32),
    }
    file = io.BytesIO()
    export.writers(export.results_of("cmrcnet", arrays))["spots.csv"](file)
    assert file.getvalue().splitlines()[0] == b"barcode"


def test_a_run_writes_the_same_files_with_its_record(cortex, tmp_path):
    @dataclass
    class Flags(run.Config):
        h5ad: bool = True
        "also write result.h5ad"

    slide = load_slide(cortex, "sim1")
    config = Flags(data=str(cortex), slice="sim1", runs=str(tmp_path))
    record, arrays = run.Run("multist", config, "sim1", "default"), multist_arrays(slide)
    results = export.results_of("multist", arrays, [slide])
    path = record.finish({}, {}, arrays, files=export.writers(results, config.h5ad))
    place = tmp_path / "later"
    export.export_record(path, place)
    for name in ("spots.csv", "loupe.csv", "result.h5ad"):
        assert (path.parent / name).read_bytes() == (place / name).read_bytes(), name
    assert list(export.writers(results, h5ad=False)) == ["spots.csv"]


# --------------------------------------------------------------------------------------------------
# Bad records
# --------------------------------------------------------------------------------------------------


def damage(record, what):
    arrays = dict(np.load(record / "arrays.npz"))
    facts = json.loads((record / "run.json").read_text())
    if what.startswith("no "):
        (record / what.removeprefix("no ")).unlink()
    elif what == "cut":
        content = (record / "arrays.npz").read_bytes()
        (record / "arrays.npz").write_bytes(content[: len(content) // 2])
    elif what == "not JSON":
        (record / "run.json").write_text("{")
    elif what in ("list", "method", "config"):
        changed = {"list": [], "method": facts | {"method": "x"}, "config": facts | {"config": {}}}
        (record / "run.json").write_text(json.dumps(changed[what]))
    else:
        change = {
            "old names": {"z": None},
            "short": {"domains": arrays["domains"][:-1]},
            "codes": {"labels": arrays["labels"] + 99},
            "barcodes": {"barcodes": np.arange(len(arrays["barcodes"]))},
            "slide": {"slide": np.repeat(["../up"], len(arrays["barcodes"]))},
            "slides": {"slide": np.repeat(["sim1"], len(arrays["barcodes"]) - 1)},
            "flat": {"z": arrays["z"][:, 0]},
        }[what]
        arrays = {k: v for k, v in (arrays | change).items() if v is not None}
        np.savez_compressed(record / "arrays.npz", **arrays)


@pytest.mark.parametrize(
    "what",
    (
        *("no run.json", "no arrays.npz", "cut", "not JSON", "list", "method", "config"),
        *("old names", "short", "codes", "barcodes", "slide", "slides", "flat"),
    ),
)
def test_half_a_record_or_one_of_another_version_is_one_sentence(what, visium, tmp_path, capsys):
    _, _, record = visium
    damage(record, what)
    with pytest.raises(SystemExit) as stop:
        plainst(["export", str(record), "--out", str(tmp_path / "out")])
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == ""
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    assert (str(record) in said.err and "run it again" in said.err) or what == "not JSON"
    assert not (tmp_path / "out").exists()


def test_another_file_is_no_record(visium, tmp_path, capsys):
    _, _, record = visium
    for path in (record / "arrays.npz", tmp_path / "nowhere"):
        with pytest.raises(SystemExit):
            plainst(["export", str(path)])
        assert "give the run.json of a run" in capsys.readouterr().err


def test_full_disk_leaves_the_old_files(visium, monkeypatch):
    _, _, record = visium
    export.export_record(record)
    before = {path.name: path.read_bytes() for path in record.iterdir()}

    def full(path, start, size):
        if size:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(h5ad, "_reserve", full)
    with pytest.raises(DataError, match="No space left on device.*another folder with --out"):
        export.export_record(record)
    assert {path.name: path.read_bytes() for path in record.iterdir()} == before


# --------------------------------------------------------------------------------------------------
# The five methods, and a million spots
# --------------------------------------------------------------------------------------------------

FAST_MULTIST = (
    "--epochs 2 --dec_epochs 2 --fusion_epochs 1 --n_starts 1 --n_pcs 10 "
    "--permutations 10 --no-figures"
)
FAST_CMRCNET = (
    "--epochs 1 --dim 16 --snn 32 --n_hvg 20 --batch 16 --k 10 --markers none --val none "
    "--backbone features"
)
RUNS = {
    "gat_fusion": "--data {made}/cortex --slice sim1 --epochs 1 --dim 8 --heads 1",
    "multist": f"--data {{made}}/cortex --slice sim1 {FAST_MULTIST}",
    "stformer": "--data {made}/hest --epochs 1 --folds 0 --members 1",
    "cmrcnet": f"--data {{made}}/hest {FAST_CMRCNET}",
    "spatia": "--data {made}/cells.h5 --steps_a 2 --steps_b 2 --steps_c 2 --draws 1 --ode_steps 2",
}


@pytest.fixture(scope="module")
def made(cortex, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    (folder / "cortex").symlink_to(cortex)
    simulate_hest(folder / "hest", n_spots=40, patch_size=32, n_slides=3)
    simulate_cells(folder / "cells.h5", n_cells=150, n_genes=48, n_sections=3, size=16)
    return folder


@pytest.mark.parametrize("method", RUNS)
def test_record_of_every_method_is_exported(method, made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = pytest.importorskip(method)
    words = RUNS[method].format(made=made).split()
    assert not module.main([*words, "--runs", "runs", "--device", "cpu"])
    record = capsys.readouterr().out.splitlines()[-1]
    assert not plainst(["export", record])
    lines = capsys.readouterr().out.splitlines()
    # the CSV is there already, the run's own
    assert len(lines) == 1 + (method in ("gat_fusion", "multist", "spatia"))
    a = read(lines[-1])
    arrays = dict(np.load(record.replace("run.json", "arrays.npz")))
    is_cells = method == "spatia"
    table = rows_of(Path(record).with_name("cells.csv" if is_cells else "spots.csv"))
    assert table[0][0] == ("id" if is_cells else "barcode")
    assert [row[0] for row in table[1:]] == a.obs_names.tolist()
    assert a.obs_names.tolist() == arrays["ids" if is_cells else "barcodes"].tolist()
    assert np.array_equal(a.obsm["spatial"], arrays["xy"]) and len(a.obsm["X_plainst"]) == len(a)
    if method in ("stformer", "cmrcnet"):
        assert np.array_equal(a.X, arrays["pred"])
        assert np.array_equal(a.layers["measured"], arrays["true"])
        assert np.array_equal(np.array(table[1:])[:, -1].astype(np.float32), arrays["pred"][:, -1])
    elif is_cells:
        cells = load_cells(made / "cells.h5")
        rows = [cells.ids.tolist().index(name) for name in a.obs_names]
        assert (a.X != cells.counts[rows]).nnz == 0
        assert a.obs["section"].tolist() == [cells.sections[i] for i in cells.section[rows]]
        # all cells of the file; what is predicted of the scored ones, the others are missing
        assert a.obs_names.tolist() == cells.ids.tolist() and a.obs["cluster"].notna().all()
        scored = arrays["scored"]
        assert np.array_equal(a.layers["imputed"][scored], arrays["imputed"])
        assert np.isnan(np.delete(a.layers["imputed"], scored, 0)).all()
        assert np.flatnonzero(a.obs["scored"]).tolist() == scored.tolist()
    else:
        classes = arrays["classes"].tolist()
        given = [classes[i] if i >= 0 else "" for i in arrays["labels"]]
        assert a.obs["label"].astype(object).fillna("").tolist() == given
    if method == "gat_fusion":
        assert np.allclose(a.obs[[f"p_{name}" for name in classes]], arrays["prob"])
        assert a.obs["predicted"].tolist() == [classes[i] for i in arrays["pred"]]


def folder_of(capsys):
    """Folder of the record whose path was printed last, and the names of its files."""
    folder = Path(capsys.readouterr().out.splitlines()[-1]).parent
    return folder, {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("method", RUNS)
def test_every_run_and_prediction_writes_its_results(method, made, tmp_path, monkeypatch, capsys):
    """A CSV always; with --h5ad, which names no folder, what the export of the record gives."""
    monkeypatch.chdir(tmp_path)
    module = pytest.importorskip(method)
    words = [*RUNS[method].format(made=made).split(), "--device", "cpu"]
    csv_name = "cells.csv" if method == "spatia" else "spots.csv"
    loupe = {"loupe.csv"} if method in ("gat_fusion", "multist", "spatia") else set()
    assert not module.main([*words, "--runs", "runs"])
    bare, names = folder_of(capsys)
    assert csv_name in names and not names & {"result.h5ad", "loupe.csv"}
    assert not module.main([*words, "--runs", "more", "--h5ad"])
    full, more = folder_of(capsys)
    assert more == names | {"result.h5ad"} | loupe
    assert full.relative_to("more") == bare.relative_to("runs")
    assert (full / csv_name).read_bytes() == (bare / csv_name).read_bytes()
    written = read(full / "result.h5ad")
    assert not plainst(["export", str(bare)])
    exported = read(bare / "result.h5ad")
    assert written.obs.equals(exported.obs)
    assert (written.X != exported.X).sum() == 0
    assert all((full / name).read_bytes() == (bare / name).read_bytes() for name in loupe)
    if method == "multist":
        assert written.obs["confidence"].between(1 / 20, 1).all()
    if method == "multist":
        return
    data_words = words[:4] if method == "gat_fusion" else words[:2]
    predict = [*data_words, "--predict", str(bare / "model.pt"), "--device", "cpu"]
    predict += ["--k", "10"] * (method == "cmrcnet")
    assert not module.main([*predict, "--runs", "new", "--h5ad"])
    folder, names = folder_of(capsys)
    assert csv_name in names and loupe <= names
    names_of_rows = "ids" if method == "spatia" else "barcodes"
    ids = np.load(folder / "arrays.npz")[names_of_rows].tolist()
    assert [row[0] for row in rows_of(folder / csv_name)[1:]] == ids
    found = sorted(name for name in names if name.endswith(".h5ad"))
    assert sum(len(read(folder / name)) for name in found) == len(ids)


def test_time_and_memory_of_an_export(tmp_path):
    """PLAINST_EXPORT_SPOTS=1000000 pytest -s -k time_and_memory: the bounds of a million spots."""
    n = int(os.environ.get("PLAINST_EXPORT_SPOTS", 30_000))
    rng = np.random.default_rng(0)
    side = int(np.ceil(np.sqrt(n)))
    row, col = np.divmod(np.arange(n), side)
    xy = np.stack([col * 100.0 + row % 2 * 50, row * 86.6], axis=1)
    barcodes = np.array([f"{i:016d}-1" for i in range(n)])
    counts = sp.csr_matrix(rng.poisson(0.7, size=(n, 10)).astype(np.int32))
    genes = np.array([f"G{i}" for i in range(10)])
    grid = {"array_row": row, "array_col": 2 * col + row % 2}
    h5ad.write_anndata(tmp_path / "slide.h5ad", barcodes, grid, genes, counts, {"spatial": xy})
    slide = load_h5ad(tmp_path / "slide.h5ad", counts=False)
    arrays = multist_arrays(slide) | {"z": rng.normal(size=(n, 30)).astype(np.float32)}
    record = write_record(tmp_path / "r", "multist", arrays, data=str(tmp_path / "slide.h5ad"))
    # ru_maxrss would count the process that starts this one
    code = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from plainst.export import main\n"
        "main(sys.argv[1:])\n"
        "status = Path('/proc/self/status')\n"
        "text = status.read_text() if status.exists() else 'VmHWM: 0'\n"
        "print(int(re.search(r'VmHWM:\\s*(\\d+)', text)[1]) // 1024, file=sys.stderr)\n"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, str(record)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, peak_mb = time.perf_counter() - start, int(done.stderr.split()[-1])
    print(f"{n} spots: {seconds:.1f} s, {peak_mb} MB, programs and libraries included")
    assert done.stdout.splitlines()[-1] == str(record / "result.h5ad")
    with h5py.File(record / "result.h5ad") as handle:
        assert handle["obsm/X_plainst"].shape == (n, 30)
        assert handle["X/indptr"].shape == (n + 1,)
    # a start of the libraries on a busy machine, then what a million may take
    assert seconds < 30 + n * 30e-6 and peak_mb < 600 + n * 1400e-6
