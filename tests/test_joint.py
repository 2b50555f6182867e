"""Several slices in one run, vectors instead of genes, and the number of domains by stability."""

import json

import h5py
import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.metrics import adjusted_rand_score

import data
import multist
from data import DataError
from evaluation import clustering, domains, joint
from plainst import run, simulate
from plainst.graphs import Graph
from plainst.h5ad import write_anndata

QUICK = (
    *("--preset", "tuned", "--epochs", "5", "--n_models", "2", "--n_starts", "2", "--n_pcs", "20"),
    *("--permutations", "0", "--no-figures", "--device", "cpu"),
)


def section(name, n=60, genes=40, classes=("a", "b"), seed=0):
    """A slide of n spots at random places."""
    rng = np.random.default_rng(seed)
    return data.Slide(
        sp.csr_matrix(rng.poisson(2, (n, genes))),
        np.array([f"g{i}" for i in range(genes)]),
        np.array([f"s{i}" for i in range(n)]),
        1000 * rng.random((n, 2)) + seed,
        labels=rng.integers(-1, len(classes), n),
        classes=list(classes),
        sample=name,
        source=f"{name}.h5ad",
    )


def test_joined_slides_keep_their_spots_and_share_no_neighbour():
    one, two = section("one"), section("two", 80, classes=("b", "c"), seed=1)
    two.genes = two.genes[::-1]
    both, part = joint.join([one, two])
    assert both.n_spots == 140 and both.sample == "one+two" and both.classes == ["a", "b", "c"]
    assert len(set(both.barcodes)) == 140 and both.barcodes[60] == "two:s0"
    for number, slide in enumerate((one, two)):
        mine = both.subset(part == number)
        names = [slide.classes[label] if label >= 0 else "" for label in slide.labels]
        assert names == [both.classes[label] if label >= 0 else "" for label in mine.labels]
        column = list(slide.genes).index("g3")
        at = list(both.genes).index("g3")
        assert np.array_equal(mine.counts[:, [at]].toarray(), slide.counts[:, [column]].toarray())
    table = data.knn_table(both.xy, 30)
    assert (part[table] == part[:, None]).all() and Graph(both.xy, 6).pieces >= 2
    few = section("few")
    few.genes = np.array([f"x{i}" for i in range(39)] + ["g0"])
    with pytest.raises(DataError, match="slices one, few share 1 genes of 40"):
        joint.join([one, few])


def test_every_slice_of_a_joint_run_has_mean_zero():
    """Another depth of the second slice is no difference between them."""
    one, two = section("one"), section("two", 80, seed=1)
    two.counts = (two.counts * 5).tocsr()
    both, part = joint.join([one, two])
    config = multist.Config(n_pcs=10, library="own")
    x = domains.inputs(both, config, part)
    assert np.abs(x[part == 0].mean(0)).max() < 1e-4 and np.abs(x[part == 1].mean(0)).max() < 1e-4
    alone = domains.inputs(one, config)
    assert alone.shape == (60, 10)


@pytest.fixture(scope="module")
def cortex(tmp_path_factory):
    folder = tmp_path_factory.mktemp("joint") / "sim"
    simulate.main(
        ["cortex", str(folder), "--n_spots", "300", "--n_genes", "120", "--n_slices", "2"]
    )
    return folder


def record_of(runs, *words):
    multist.main([*QUICK, "--runs", str(runs), *map(str, words)])
    path = next(runs.rglob("run.json"))
    return json.loads(path.read_text()), dict(np.load(path.parent / "arrays.npz"))


def test_joint_run_scores_each_slice_and_all(cortex, tmp_path):
    record, arrays = record_of(tmp_path, "--data", cortex, "--slice", "sim1,sim2")
    found, part = arrays["domains"], arrays["slice"]
    assert len(found) == 600 and part.sum() == 300
    for number, name in enumerate(("sim1", "sim2")):
        rows = part == number
        score = data_ari(arrays["labels"][rows], found[rows])
        assert record["metrics"][f"ari_{name}"] == pytest.approx(score)
    assert record["metrics"]["ari"] == pytest.approx(data_ari(arrays["labels"], found))
    assert len(record["files"]) >= 4  # counts and positions of both


def data_ari(labels, found):
    return adjusted_rand_score(labels[labels >= 0], found[labels >= 0])


def test_vectors_instead_of_genes(tmp_path):
    slide, rng = section("one", 60), np.random.default_rng(0)
    codes = rng.normal(3, 2, (60, 8)).astype(np.float32)
    path = tmp_path / "one.h5ad"
    write_anndata(
        str(path),
        slide.barcodes,
        {"label": np.array(["a", "b"])[slide.labels % 2]},
        slide.genes,
        slide.counts.astype(np.float32),
        {"spatial": slide.xy, "X_pca": codes},
    )
    loaded = data.load_slide(path)
    x = domains.inputs(loaded, multist.Config(embedding="X_pca"))
    want = codes - codes.mean(0)
    np.testing.assert_allclose(x, want / want.std(), atol=1e-4)
    with pytest.raises(DataError, match=r"no obsm\['X_scvi'\].*one of X_pca, spatial"):
        domains.inputs(loaded, multist.Config(embedding="X_scvi"))
    np.save(tmp_path / "short.npy", codes[:50])
    with pytest.raises(DataError, match="has 50 rows, slide one 60 spots"):
        domains.inputs(loaded, multist.Config(embedding=str(tmp_path / "short.npy")))
    loaded.source = "folder/matrix.h5"
    with pytest.raises(DataError, match="no .npy or .npz file"):
        domains.inputs(loaded, multist.Config(embedding="X_pca"))
    with h5py.File(path) as handle:
        assert handle["obsm/X_pca"].shape == (60, 8)


def test_stability_finds_the_number_of_blobs(cortex, capsys, monkeypatch):
    rng = np.random.default_rng(0)
    centres = 9 * rng.permutation(np.eye(8))[:5]
    h = np.concatenate([c + rng.standard_normal((80, 8)) for c in centres])
    k, curve = clustering.stable_k(h, 4, high=9)
    assert k == 5 and set(curve) == set(range(2, 10)) and curve[5] > 0.99
    words = [*QUICK, "--data", str(cortex), "--slice", "sim1", "--n_domains", "stability"]
    monkeypatch.setattr(domains, "FEWEST_FOR_STABILITY", 301)
    with pytest.raises(SystemExit):
        run.cli(multist.main, words)
    assert "needs at least 301 spots, slide sim1 has 300" in capsys.readouterr().err
