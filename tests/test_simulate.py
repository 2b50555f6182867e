"""simulate.py against the loaders, scanpy and anndata, and against the truth that it claims."""

import subprocess
import sys
import time
import tracemalloc

import h5py
import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.metrics import f1_score

import data
from conftest import ROOT
from plainst import simulate
from plainst.simulate import cortex, files, simulate_cortex, simulate_hest, write_hest, write_visium


@pytest.fixture(scope="module")
def slide():
    return simulate_cortex()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    root = tmp_path_factory.mktemp("hest")
    return {
        link: simulate_hest(root / link, link=link, patch_size=32, n_spots=150, n_genes=60, seed=3)
        for link in ("patch", "ring2", "none")
    }


def dense_log(slide, size=1000):
    total = np.maximum(np.asarray(slide.counts.sum(axis=1)), 1)
    return np.log1p(slide.counts.toarray() / total * size)


def one_spot_accuracy(slide):
    """Held-out accuracy of logistic regression on the genes of a single spot, random split."""
    x, rows = (
        dense_log(slide),
        np.random.default_rng(0).permutation(np.flatnonzero(slide.labels >= 0)),
    )
    train, test = rows[: len(rows) * 8 // 10], rows[len(rows) * 8 // 10 :]
    x = (x - x[train].mean(axis=0)) / (x[train].std(axis=0) + 1e-6)
    model = LogisticRegression(C=0.003, max_iter=500).fit(x[train], slide.labels[train])
    return model.score(x[test], slide.labels[test])


def same_counts(a, b):
    return a.shape == b.shape and (a != b).nnz == 0


def layer_means(slide):
    x = dense_log(slide)
    # (C, G)
    return np.array([x[slide.labels == c].mean(axis=0) for c in range(len(slide.classes))])


@pytest.mark.parametrize(("layout", "version"), [("list", 3), ("header", 2), ("parquet", 3)])
def test_visium_folder_reads_back(tmp_path, layout, version):
    if layout == "parquet":
        pytest.importorskip("pyarrow")
    slide = simulate_cortex(400, 60, seed=5, image_px=700)
    back = data.load_visium(write_visium(slide, tmp_path / "sim1", layout, version))
    assert same_counts(back.counts, slide.counts)
    for name in ("genes", "barcodes", "xy", "grid", "labels", "library_size", "image"):
        np.testing.assert_array_equal(getattr(back, name), getattr(slide, name), err_msg=name)
    assert (back.classes, back.sample, back.patient) == (slide.classes, "sim1", "SimA")
    assert back.image_scale == pytest.approx(slide.image_scale) and back.um_per_px == pytest.approx(
        slide.um_per_px, rel=0.01
    )


def test_visium_folder_opens_in_scanpy(tmp_path, slide):
    scanpy = pytest.importorskip("scanpy")
    folder = write_visium(slide, tmp_path / "s")
    adata = scanpy.read_10x_h5(folder / "filtered_feature_bc_matrix.h5")
    assert same_counts(adata.X.tocsr(), slide.counts)
    assert (
        list(adata.obs_names) == slide.barcodes.tolist()
        and list(adata.var_names) == slide.genes.tolist()
    )


def test_visium_files_have_the_traps_of_the_real_ones(tmp_path, slide):
    folder = write_visium(slide, tmp_path / "s")
    header, *rows = [
        line.rstrip("\n").split("\t") for line in (folder / "metadata.tsv").read_text().splitlines()
    ]
    assert {len(row) for row in rows} == {len(header) + 1}
    names = [row[0] for row in rows]
    assert (
        names == sorted(names)
        and names != slide.barcodes.tolist()
        and sum(row[-1] == "NA" for row in rows) == (slide.labels < 0).sum() > 0
    )
    positions = [
        line.split(",")
        for line in (folder / "spatial" / "tissue_positions_list.csv").read_text().splitlines()
    ]
    assert (
        len(positions) == 78 * 64 == len({row[0] for row in positions})
        and sum(row[1] == "1" for row in positions) == 1200
    )
    assert all((int(row[2]) + int(row[3])) % 2 == 0 for row in positions)
    assert [row[0] for row in positions if row[1] == "1"] != slide.barcodes.tolist()
    x, y = np.array([[int(row[5]), int(row[4])] for row in positions]).T
    assert (
        np.all(x == np.rint(2050 + 69 * np.array([int(row[3]) for row in positions])))
        and y.min() == 2050
    )
    assert [
        Image.open(folder / "spatial" / f"tissue_{n}_image.png").size for n in ("hires", "lowres")
    ] == [(2000, 2000), (600, 600)]


def test_nothing_half_written(tmp_path, slide, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_write_metadata", full)
    with pytest.raises(data.DataError, match="No space left"):
        write_visium(slide, tmp_path / "s")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "s").mkdir()
    with pytest.raises(data.DataError, match="exists already"):
        write_visium(slide, tmp_path / "s")


@pytest.mark.parametrize("n_classes", [5, 6, 7])
def test_layers(n_classes):
    slide = simulate_cortex(1500, 50, n_classes, seed=2, unlabelled=0)
    assert (
        slide.classes == simulate.LAYERS[-n_classes:]
        and slide.n_spots == len(set(slide.barcodes.tolist())) == 1500
    )
    y = np.array([slide.xy[slide.labels == c, 1].mean() for c in range(n_classes)])
    assert np.all(np.diff(y) > 0)  # the pia is on top
    share = np.bincount(slide.labels) / 1500
    np.testing.assert_allclose(
        share, simulate.SHARE[-n_classes:] / simulate.SHARE[-n_classes:].sum(), atol=0.01
    )
    distance = np.sort(np.hypot(*(slide.xy - slide.xy[0]).T))[1:7]
    assert distance.max() < 139 * 2 and (slide.grid.sum(axis=1) % 2 == 0).all()


def test_counts_are_negative_binomial_with_depth_variation():
    slide = simulate_cortex(3000, 300, seed=1, signal=0, depth_sd=0, dropout=0)
    x = slide.counts.toarray().astype(float)
    mean, variance = x.mean(axis=0), x.var(axis=0)
    used = mean > 0.5
    # the ratio is 1 + mean / theta; of Poisson counts 1.0 +- .03
    assert used.sum() > 20 and np.mean(variance[used] > 1.06 * mean[used]) > 0.95
    theta = np.random.default_rng([0, 5]).gamma(4.0, 0.75, 300) + 0.3
    assert np.median(variance[used] / (mean + mean**2 / theta)[used]) == pytest.approx(1, abs=0.05)
    deep = np.log(simulate_cortex(3000, 300, seed=1, signal=0).library_size)
    assert 0.35 < deep.std() < 0.55 and np.log(slide.library_size).std() < 0.2


def test_dropout_loses_its_share():
    full, half = simulate_cortex(600, 100, dropout=0), simulate_cortex(600, 100, dropout=0.5)
    assert half.counts.nnz / full.counts.nnz == pytest.approx(0.5, abs=0.03)


def test_seeds(slide):
    again, other = simulate_cortex(), simulate_cortex(seed=1)
    assert (
        same_counts(again.counts, slide.counts)
        and np.array_equal(again.xy, slide.xy)
        and np.array_equal(again.labels, slide.labels)
    )
    assert np.array_equal(again.image, slide.image)
    assert not np.array_equal(other.grid, slide.grid) and not same_counts(
        other.counts, slide.counts
    )


def test_result_does_not_depend_on_threads(monkeypatch):
    many = simulate_cortex(5000, 600)
    monkeypatch.setattr(cortex.os, "cpu_count", lambda: 1)
    assert same_counts(many.counts, simulate_cortex(5000, 600).counts)


def test_programs_belong_to_the_donor(slide):
    def correlation(a, b):
        a, b = layer_means(a), layer_means(b)
        # of layer differences: the base level is taken out
        return np.corrcoef((a - a.mean(axis=0)).ravel(), (b - b.mean(axis=0)).ravel())[0, 1]

    sibling, stranger = simulate_cortex(seed=1), simulate_cortex(seed=1, program_seed=9)
    assert correlation(slide, sibling) > 0.8 and abs(correlation(slide, stranger)) < 0.3
    donor = simulate_cortex(seed=1, donor="SimB")
    shift = [
        np.log((s.counts.mean(axis=0) + 1e-3) / (slide.counts.mean(axis=0) + 1e-3)).A1.std()
        for s in (sibling, donor)
    ]
    assert shift[1] > 2 * shift[0] and correlation(slide, donor) > 0.6


def test_difficulty(slide):
    scores = [
        one_spot_accuracy(slide),
        one_spot_accuracy(simulate_cortex(seed=1)),
        one_spot_accuracy(simulate_cortex(seed=4)),
    ]
    assert 0.58 < np.mean(scores) < 0.75, scores
    assert one_spot_accuracy(simulate_cortex(signal=3)) > 0.8


def test_noise_genes_hold_no_layer():
    slide = simulate_cortex(2500, 200, noise_genes=True)
    majority = np.bincount(slide.labels[slide.labels >= 0]).max() / (slide.labels >= 0).sum()
    assert one_spot_accuracy(slide) < majority + 0.04
    size = [np.log(slide.library_size[slide.labels == c]).mean() for c in range(7)]
    assert np.ptp(size) < 0.12  # library size tells nothing either


def test_image_shows_layers(slide):
    image, at = slide.image, np.rint(slide.xy * slide.image_scale).astype(int)
    assert (
        image.shape == (2000, 2000, 3)
        and image.dtype == np.uint8
        and np.all(image[:50].min(axis=(0, 1)) > 230)
    )
    reach = 9
    crops = np.array(
        [image[y - reach : y + reach + 1, x - reach : x + reach + 1] for x, y in at]
    ).reshape(len(at), -1, 3)
    nuclei = (crops[..., 0] < 150).mean(axis=1)  # eosin leaves red bright
    mean = {name: nuclei[slide.labels == c].mean() for c, name in enumerate(slide.classes)}
    assert mean["Layer4"] > 2 * mean["Layer1"] and mean["Layer3"] > 2 * mean["Layer1"], mean
    green = [crops[slide.labels == c, :, 1].mean() for c in range(7)]
    assert green[6] < green[5] - 10 < green[0] - 20  # white matter takes most stain, layer 1 least


def test_large_slide_is_sparse_and_bounded():
    tracemalloc.start()
    start = time.process_time()
    slide = simulate_cortex(60_000, 500)
    seconds, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert slide.n_spots == 60_000 and len(np.unique(slide.barcodes)) == 60_000
    # bytes; the dense matrix in float64 is .24e9, in the intermediate steps a multiple
    assert seconds < 30 and peak < 0.4e9
    rows, columns = simulate.lattice(60_000).max(axis=0) + 1
    assert (
        columns / rows == pytest.approx(128 / 78, rel=0.02)
        and np.bincount(slide.labels + 1).min() > 500
    )


def test_ring2_mean_against_naive():
    grid = simulate.lattice(200)[:400]
    features = np.random.default_rng(0).normal(size=(400, 2))
    where = {tuple(g): i for i, g in enumerate(grid.tolist())}
    steps = [
        (0, -4),
        (0, 4),
        (-1, -3),
        (-1, 3),
        (1, -3),
        (1, 3),
        (-2, -2),
        (-2, 2),
        (2, -2),
        (2, 2),
        (-2, 0),
        (2, 0),
    ]
    naive = [
        np.mean(
            [features[where[r + dr, c + dc]] for dr, dc in steps if (r + dr, c + dc) in where],
            axis=0,
        )
        for r, c in grid.tolist()
    ]
    np.testing.assert_allclose(simulate.ring2_mean(grid, features), naive)


def hest_arrays(root, sample):
    anndata = pytest.importorskip("anndata")
    adata = anndata.read_h5ad(root / "adata" / f"{sample}.h5ad")
    with h5py.File(root / "patches" / f"{sample}.h5") as handle:
        barcodes = handle["barcode"][:, 0].astype(str)
        assert barcodes.tolist() == adata.obs_names.tolist()
        return adata, handle["img"][()], handle["coords"][()]


def test_hest_structure(tasks):
    adata, images, coords = hest_arrays(tasks["patch"], "S2")
    assert (
        adata.shape == (150, 60) and images.shape == (150, 32, 32, 3) and images.dtype == np.uint8
    )
    np.testing.assert_allclose(
        coords + simulate.PATCH_UM / adata.uns["um_per_px"] / 2, adata.obsm["spatial"], atol=0.51
    )
    assert {"array_row", "array_col", "pxl_row_in_fullres"} <= set(adata.obs) and adata.uns[
        "patient"
    ] == "P2"
    back = data.load_hest(tasks["patch"], "S2")
    assert (
        same_counts(back.counts, adata.X)
        and back.patient == "P2"
        and back.genes.tolist() == adata.var_names.tolist()
    )
    np.testing.assert_array_equal(np.asarray(back.patches[np.arange(5)]), images[:5])
    np.testing.assert_allclose(back.xy, adata.obsm["spatial"])
    folds = [
        [
            (tasks["patch"] / "splits" / f"{name}_{k}.csv").read_text().split()
            for name in ("train", "test")
        ]
        for k in range(3)
    ]
    assert [len(train) for train, _ in folds] == [3] * 3 and folds[1][1] == [
        "sample_id,patches_path,expr_path",
        "S2,patches/S2.h5,adata/S2.h5ad",
    ]


@pytest.mark.parametrize(
    ("link", "own", "ring"),
    [("patch", True, False), ("ring2", False, True), ("none", False, False)],
)
def test_hest_link_is_the_truth(tasks, link, own, ring):
    def xy(sample):
        adata, images, _ = hest_arrays(tasks[link], sample)
        grid = adata.obs[["array_row", "array_col"]].to_numpy()
        features = images.reshape(len(images), -1, 3).mean(axis=1) / 255
        return features, simulate.ring2_mean(grid, features), np.log1p(adata.X.toarray())

    train, (own_test, ring_test, genes) = (
        [np.concatenate(parts) for parts in zip(xy("S1"), xy("S2"))],
        xy("S3"),
    )
    expressed = genes.mean(axis=0) > 1

    def r2(x, x_test):
        error = (LinearRegression().fit(x, train[2]).predict(x_test) - genes)[:, expressed]
        return 1 - np.median(
            (error**2).sum(axis=0) / ((genes - genes.mean(axis=0))[:, expressed] ** 2).sum(axis=0)
        )

    assert (r2(train[0], own_test) > 0.5) == own and (r2(train[1], ring_test) > 0.5) == ring
    assert own or r2(train[0], own_test) < 0.1
    assert ring or r2(train[1], ring_test) < 0.1
    truth = np.load(tasks[link] / "truth.npz")
    rate = truth["base"] + truth["z_S3"] @ truth["weights"]
    assert (
        np.median([np.corrcoef(rate[:, g], genes[:, g])[0, 1] for g in np.flatnonzero(expressed)])
        > 0.7
    )


def test_cortex_as_hest(tmp_path):
    slides = [
        simulate_cortex(220, 60, seed=i, sample=f"s{i}", donor=f"D{i}", image_px=800)
        for i in range(2)
    ]
    adata, images, _ = hest_arrays(write_hest(slides, tmp_path / "t", patch_size=32), "s1")
    assert same_counts(adata.X, slides[1].counts)
    named = np.where(slides[1].labels < 0, "nan", np.array(slides[1].classes)[slides[1].labels])
    assert adata.obs["label"].astype(object).fillna("nan").tolist() == named.tolist()
    deep = adata.obsm["spatial"][:, 1]
    model = Ridge().fit(images.reshape(len(images), -1, 3).mean(axis=1), deep)
    # patches are cut where the spots are
    assert model.score(images.reshape(len(images), -1, 3).mean(axis=1), deep) > 0.3
    with pytest.raises(data.DataError, match="two patients"):
        write_hest(slides[:1], tmp_path / "u")


@pytest.mark.parametrize(
    "bad",
    [
        {"n_spots": 199},
        {"n_spots": 1_000_001},
        {"n_classes": 4},
        {"n_genes": 10},
        {"seed": -1},
        {"signal": float("nan")},
    ],
)
def test_bad_values(bad):
    with pytest.raises(data.DataError, match=next(iter(bad))):
        simulate_cortex(**bad)


def test_command_line(tmp_path, capsys):
    simulate.main(
        [
            "cortex",
            str(tmp_path / "c"),
            "--n_spots",
            "210",
            "--n_genes",
            "56",
            "--n_classes",
            "5",
            "--n_slices",
            "2",
            "--n_donors",
            "2",
        ]
    )
    slides = [data.load_visium(tmp_path / "c" / name) for name in ("sim1", "sim2")]
    assert (
        [s.patient for s in slides] == ["SimA", "SimB"]
        and slides[0].classes[0] == "Layer3"
        and slides[0].n_spots == 210
    )
    assert not np.array_equal(slides[0].barcodes, slides[1].barcodes) and np.array_equal(
        slides[0].genes, slides[1].genes
    )
    for arguments in (
        ["cortex", "--n_classes", "8"],
        ["cortex", "--n_spots", "10"],
        ["hest", "--link", "magic"],
        ["cortex", "--n_slices", "0"],
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            simulate.main([arguments[0], str(tmp_path / "x"), *arguments[1:]])
        assert stop.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "x").exists()
    shown = subprocess.run(
        [sys.executable, "-m", "plainst", "simulate", "cortex", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--n_spots" in shown.stdout and "default: 1200" in shown.stdout


# --------------------------------------------------------------------------------------- cell field
@pytest.fixture(scope="module")
def field(tmp_path_factory):
    return data.load_cells(simulate.simulate_cells(tmp_path_factory.mktemp("cells") / "sim.h5"))


def cell_scores(field, x, split):
    """Held-out macro-F1 of the types and Pearson correlations with the truth, from features x (N,
    D), on another section."""
    fit = split.train | split.val
    x = (x - x[fit].mean(axis=0)) / (x[fit].std(axis=0) + 1e-6)
    guess = (
        LogisticRegression(C=0.03, max_iter=300)
        .fit(x[fit], field.labels[fit])
        .predict(x[split.test])
    )
    found = {
        name: Ridge(300.0).fit(x[fit], field.truth[name][fit]).predict(x[split.test])
        for name in ("program", "brightness", "area")
    }
    return (
        f1_score(field.labels[split.test], guess, average="macro"),
        {
            name: np.corrcoef(value, field.truth[name][split.test])[0, 1]
            for name, value in found.items()
        },
    )


def test_cell_field_is_a_cell_file(field):
    assert (field.n_cells, field.n_genes, field.sections, field.classes[0]) == (
        3000,
        120,
        ["sim1", "sim2", "sim3", "sim4"],
        "type1",
    )
    assert (
        field.crops.shape == (3000, 2, 32, 32)
        and field.masks.shape == (3000, 32, 32)
        and field.section_sizes.tolist() == [750] * 4
    )
    assert {"program", "type", "domain", "area", "brightness"} <= set(field.truth)
    assert all(len(v) == 3000 for v in field.truth.values()) and np.array_equal(
        field.labels, field.truth["type"]
    )
    assert (field.truth["domain"] != field.labels).mean() == pytest.approx(0.15, abs=0.03)
    assert abs(field.truth["program"].mean()) < 0.1 and field.truth[
        "program"
    ].std() == pytest.approx(1, abs=0.05)


def test_genes_tell_type_and_program(field):
    split, total = data.cell_split(field), np.asarray(field.counts.sum(axis=1))
    x = np.log1p(field.counts.toarray() / total * 150)
    f1, pcc = cell_scores(field, x, split)
    assert f1 > 0.93 and min(pcc.values()) > 0.7
    f1_domain = f1_score(
        field.labels[split.test], field.truth["domain"][split.test], average="macro"
    )
    # the place alone does not do it: 15 % are mixed
    assert f1 > f1_domain + 0.05
    _, shuffled = cell_scores(field, x[np.random.default_rng(0).permutation(3000)], split)
    assert max(map(abs, shuffled.values())) < 0.15
    mean, var = field.counts.toarray().mean(axis=0), field.counts.toarray().var(axis=0)
    assert (var > mean).mean() > 0.95  # over-dispersed


def test_pictures_tell_size_program_and_something_of_the_type(field):
    crops, masks, truth = field.crops[:] / 255, field.masks[:], field.truth
    own = (crops[:, 0] > 0.5).sum(axis=(1, 2))
    assert (truth["major"] >= truth["minor"]).all()
    fits = truth["major"] < 14
    assert fits.mean() > 0.9
    np.testing.assert_allclose(masks.sum(axis=(1, 2))[fits], truth["area"][fits], rtol=0.1, atol=4)
    np.testing.assert_allclose(own[fits], truth["area"][fits], rtol=0.12, atol=6)
    assert np.corrcoef(own, truth["program"])[0, 1] > 0.6
    light = np.array([c[0][m].mean() for c, m in zip(crops, masks)])
    assert np.corrcoef(light, truth["brightness"])[0, 1] > 0.8
    features = np.column_stack(
        [own, light, crops[:, 1].mean(axis=(1, 2)), [c[0][m].std() for c, m in zip(crops, masks)]]
    )
    f1, _ = cell_scores(field, features, data.cell_split(field))
    # five types: more than chance, less than the genes
    assert 0.3 < f1 < 0.9


def test_neighbours_are_drawn_where_they_are(field):
    """Channel 1 shows the cells of the same section at their places, and nothing where there is
    none; noise has s.d. .05."""
    crops, checked = field.crops[:].astype(float) / 255, 0
    empty = []
    for i in range(0, 3000, 25):
        mates = np.flatnonzero((field.section == field.section[i]) & (np.arange(3000) != i))
        offset = field.xy[mates] - field.xy[i]
        distance = np.hypot(*offset.T)
        for dx, dy in offset[
            (np.abs(offset) < 14).all(axis=1) & (distance > field.truth["major"][i] + 2)
        ]:
            assert crops[i, 1, int(np.floor(16 + dy)), int(np.floor(16 + dx))] > 0.35
            checked += 1
        y, x = np.mgrid[:32, :32] + 0.5 - 16
        free = np.ones((32, 32), bool)
        for (dx, dy), reach in zip(
            np.vstack([offset, [0, 0]]),
            np.append(field.truth["major"][mates], field.truth["major"][i]) + 1,
        ):
            free &= np.hypot(x - dx, y - dy) > reach
        empty.append(crops[i][:, free].ravel())
    empty = np.concatenate(empty)
    assert checked > 30 and len(empty) > 1000 and empty.max() < 0.3
    # half of the noise is cut off at zero
    assert np.sqrt(np.mean(empty**2) * 2) == pytest.approx(0.05, rel=0.1)


def test_cell_field_depends_on_the_seed_only(field, tmp_path):
    small = [simulate.cell_field(200, n_sections=2, seed=seed) for seed in (1, 1, 2)]
    crops = [np.concatenate(list(f["crops"])) for f in small]
    assert same_counts(small[0]["counts"], small[1]["counts"]) and np.array_equal(
        crops[0], crops[1]
    )
    assert not same_counts(small[0]["counts"], small[2]["counts"]) and not np.array_equal(
        crops[0], crops[2]
    )
    paths = [
        simulate.simulate_cells(tmp_path / f"{i}.h5", 200, n_sections=2, seed=1) for i in range(2)
    ]
    assert data.file_checksum(paths[0]) == data.file_checksum(paths[1])


def test_larger_crops_show_the_same_field_of_view(tmp_path):
    small, large = (
        data.load_cells(simulate.simulate_cells(tmp_path / f"{s}.h5", 100, n_sections=1, size=s))
        for s in (32, 64)
    )
    shrunk = large.crops[:].reshape(100, 2, 32, 2, 32, 2).mean(axis=(3, 5))
    assert (
        np.abs(shrunk - small.crops[:]).mean() < 12
        and np.corrcoef(shrunk.ravel(), small.crops[:].ravel())[0, 1] > 0.97
    )
    assert large.um_per_px == small.um_per_px / 2


@pytest.mark.parametrize(
    "flags",
    [
        ["--n_cells", "10"],
        ["--n_genes", "20"],
        ["--size", "8"],
        ["--n_sections", "9", "--n_cells", "100"],
        ["--seed", "-1"],
    ],
)
def test_bad_flags_of_the_cell_field(tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as stop:
        simulate.main(["cells", str(tmp_path / "c.h5"), *flags])
    assert (
        stop.value.code == 2
        and flags[0][2:] in capsys.readouterr().err
        and not list(tmp_path.iterdir())
    )


def test_cell_field_command_line(tmp_path, capsys):
    simulate.main(
        ["cells", str(tmp_path / "c.h5"), "--n_cells", "120", "--n_sections", "3", "--seed", "4"]
    )
    assert (
        capsys.readouterr().out.strip() == str(tmp_path / "c.h5")
        and data.load_cells(tmp_path / "c.h5").n_cells == 120
    )
