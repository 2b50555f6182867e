"""report: tables from run records."""
import json

import pytest

import report
from data import DataError


def write(root, part, variant, seed, ari, split="random", leaks=True, floor=0.9):
    folder = root / "gat_fusion" / "dlpfc" / part / variant / f"seed{seed}"
    folder.mkdir(parents=True)
    scores = {"accuracy": 0.5, "macro_f1": 0.5, "kappa_quadratic": None, "log_loss": 1.0, "boundary_accuracy": 0.2}
    (folder / "run.json").write_text(json.dumps({
        "method": "gat_fusion", "metrics": {"ari": ari, "gain_over_coords_knn": ari - floor, **scores}, "baselines": {"coords_knn": {"ari": floor, **scores}},
        "split": {"name": split, "leaks_position": leaks, "detail": f"{variant.split('-')[0]}"}, "git_commit": "0123456789", "versions": {"torch": "2"},
        "device": "cpu", "seconds": 3.0, "peak_rss_mb": 100}))


def row(text, name):
    return next(line for line in text.splitlines() if line.startswith(f"| {name} |"))


def test_median_and_spread_over_seeds(tmp_path):
    for seed, ari in enumerate((0.8, 0.95, 0.91)):
        write(tmp_path, "151673", "random-full-cross", seed, ari)
    write(tmp_path, "151674", "random-full-cross", 0, 0.7)
    write(tmp_path, "151674", "slice-151673-full-cross", 0, 0.6, "slice")
    text = report.markdown(report.read_runs(tmp_path))
    assert "| full-cross | 0.910 (0.800-0.950) | 0.700 |" in text and ".928 +- .022" in row(text, "full-cross")
    knn = row(text, "coords_knn").split(" | ")
    assert knn[1] == "0.900" and knn[-2] == "2"                     # once per split and slice, not once per run
    assert text.index("coords_knn") < text.index("full-cross") and "Split `slice`" in text


def test_program_writes_table_and_figure(tmp_path, capsys):
    write(tmp_path, "s", "blocks0-full-cross", 0, 0.5, "blocks", False)
    assert report.main(["--runs", str(tmp_path)]) == 0
    assert (tmp_path / "report.md").read_text().startswith("### Split `blocks` - does not leak position")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(DataError, match="--data"):
        report.main(["--runs", str(tmp_path), "--data", "other"])


def test_bad_records(tmp_path):
    with pytest.raises(DataError, match="no run record"):
        report.read_runs(tmp_path)
    (tmp_path / "run.json").write_text("{half")
    with pytest.raises(DataError, match="run.json"):
        report.read_runs(tmp_path)
