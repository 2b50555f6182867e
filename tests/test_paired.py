"""Paired differences of records: pairs by slice, split and seed, baselines without a seed."""

import json

import pytest

from evaluation import paired
from plainst.readers.checked import DataError


def write(root, part, row, seed, ari, floor=0.5, fold=0):
    """A record of gat_fusion on blocks."""
    folder = root / f"gat_fusion/d/{part}/paper-blocks{fold}-{row}/seed{seed}"
    folder.mkdir(parents=True)
    record = {
        "method": "gat_fusion",
        "config": {"seed": seed, "preset": "paper", "fold": fold},
        "metrics": {"ari": ari},
        "baselines": {"coords_knn": {"ari": floor}},
        "split": {"name": "blocks", "leaks_position": False, "detail": f"fold {fold}"},
    }
    (folder / "run.json").write_text(json.dumps(record))


@pytest.fixture
def runs(tmp_path):
    for seed, (a, b) in enumerate([(0.8, 0.6), (0.7, 0.6)]):
        write(tmp_path, "s1", "full-cross", seed, a)
        write(tmp_path, "s1", "concat", seed, b)
    write(tmp_path, "s2", "full-cross", 0, 0.4, floor=0.9)
    write(tmp_path, "s2", "concat", 0, 0.5, floor=0.9)
    # no pair: another fold
    write(tmp_path, "s2", "concat", 0, 0.0, fold=1)
    return tmp_path


def test_pairs_are_of_one_slice_fold_and_seed(runs):
    records = paired.read_runs(runs)
    found = paired.differences(records, "full-cross", "concat")
    assert found["s1"] == pytest.approx([0.2, 0.1]) and found["s2"] == pytest.approx([-0.1])
    assert paired.summary(found) == pytest.approx((0.025, -0.1, 0.15, 1, 2))
    # a baseline stands beside every seed
    found = paired.differences(records, "full-cross", "coords_knn")
    assert found["s1"] == pytest.approx([0.3, 0.2]) and found["s2"] == pytest.approx([-0.5])
    with pytest.raises(DataError, match="both gcn_only and concat"):
        paired.differences(records, "gcn_only", "concat")


def test_the_command_prints_the_summary(runs, capsys):
    paired.main(["full-cross", "concat", "--split", "blocks", "--runs", str(runs)])
    out = capsys.readouterr().out
    assert "s1: +0.150 (2 pairs)" in out
    assert "median +0.025 (-0.100 to +0.150) over 2 slices, 1 above zero" in out
