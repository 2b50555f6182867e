"""The figures and tables of bench/explain_layers.py, from a short run on simulated slides."""

import csv

import pytest

import gat_fusion
from bench import explain_layers
from plainst import run, simulate


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(model.pt of a short run on a simulated slice, folder of the slice)."""
    root = tmp_path_factory.mktemp("explain")
    slide = simulate.simulate_cortex(300, 80, 5, seed=1, sample="s1", donor="A", donor_seed=1)
    simulate.write_visium(slide, root / "sim" / "s1")
    words = ["--data", root / "sim", "--slice", "s1", "--mode", "gcn_only", "--epochs", 30]
    gat_fusion.main([str(word) for word in [*words, "--dim", 16, "--runs", root / "runs"]])
    return next(root.rglob("model.pt")), root / "sim"


def test_top_genes_beat_random_sets_and_everything_is_written(model, tmp_path):
    model, data = model
    words = [str(model), "--data", str(data), "--slice", "s1", "--out", str(tmp_path / "o")]
    assert explain_layers.main([*words, "--n_top", "5"]) == 0
    files = {path.name for path in (tmp_path / "o").iterdir()}
    assert files == {"embedding.png", "genes.csv", "genes.png", "sets.csv"}
    with open(tmp_path / "o" / "genes.csv", newline="") as file:
        genes = list(csv.DictReader(file))
    assert len(genes) > 50 and {"gene", "flips_Layer3", "drop_Layer3"} <= set(genes[0])
    with open(tmp_path / "o" / "sets.csv", newline="") as file:
        sets = list(csv.DictReader(file))
    tops = [row for row in sets if row["set"].startswith("top")]
    # genes with the largest drop of one layer move the whole slide more than random ones
    assert sum(float(row["p"]) < 0.1 for row in tops) >= len(tops) / 2


def test_frozen_vectors_have_no_genes_to_perturb(model, tmp_path, capsys):
    import torch

    saved = torch.load(model[0], weights_only=True)
    saved["config"] |= {"mode": "embedding", "embedding": "{slice}.npz"}
    torch.save(saved, tmp_path / "e.pt")
    with pytest.raises(SystemExit) as stop:
        run.cli(explain_layers.main, [str(tmp_path / "e.pt"), "--slice", "s1"])
    assert stop.value.code == 2 and "genes alone can be perturbed" in capsys.readouterr().err
