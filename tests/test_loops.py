"""The programs that look at training loops, on tiny simulated data: every wanted loop is measured,
and differences of losses are seen."""

import json
from contextlib import suppress

import pytest
import torch

from bench import compare_flags, profile_loops
from plainst import run, simulate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data of the names that data_folder makes, small."""
    folder = tmp_path_factory.mktemp("loops")
    simulate.write_visium(
        simulate.simulate_cortex(220, 300, sample="151673"), folder / "dlpfc" / "151673"
    )
    return folder


def test_profile_tells_operators_and_our_functions_of_every_loop(folder, monkeypatch, capsys):
    """Simulated data where PLAINST_DATA is not set; the three loops of multist."""
    monkeypatch.delenv("PLAINST_DATA", raising=False)
    monkeypatch.setattr(
        profile_loops.simulate,
        "simulate_cortex",
        lambda *a, made=simulate.simulate_cortex, **k: made(220, 300, **k),
    )
    monkeypatch.setattr(profile_loops.simulate, "simulate_hest", lambda *a, **k: None)
    monkeypatch.setattr(profile_loops.simulate, "simulate_cells", lambda *a, **k: None)
    profile_loops.main(["multist", "--turns", "1"])
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("##")] == [
        "## multist Stage I",
        "## multist Stage II",
        "## multist Stage III",
    ]
    assert all(f"multist.stage{i}_terms x1 " in out for i in (1, 2))
    # Stage III goes through the slide in batches
    assert "multist.stage3_terms x" in out
    assert (
        out.count("float64 results a turn | 0") == 3
        and out.count("graphs built a turn | none") == 3
    )


def test_losses_of_two_runs_are_equal_and_those_in_bf16_are_near(folder):
    """One loop of gat_fusion; the rest of the program is left out."""
    found = {
        name: compare_flags.one("gat_fusion", folder, 2, flags)
        for name, flags in {
            "default": [],
            "again": [],
            "bf16": ["--bf16"],
            "other": ["--lr", "0.1"],
        }.items()
    }
    rows = {row[1]: row for row in compare_flags.table("gat_fusion", found)}
    assert list(found["default"]) == ["0 epochs"] and all(row[3] > 0 for row in rows.values())
    assert rows["again"][5] == [0, 0] and 0 < rows["bf16"][5][0] < 0.02
    assert rows["other"][5][0] == 0 and rows["other"][5][1] > 0.05, (
        "the first loss is that of the same weights"
    )


@pytest.mark.parametrize("method", ["gat_fusion", "multist", "stformer", "cmrcnet", "spatia"])
def test_compiled_networks_have_the_losses_of_eager_ones(method, folder, tmp_path, monkeypatch):
    """What torch.compile traces, run without generating code (which takes minutes): the same losses
    in every loop, over two steps and more."""
    if method in ("stformer", "cmrcnet"):
        folder = simulate.simulate_hest(
            tmp_path / "her2st", n_slides=6, n_spots=40, patch_size=16, n_genes=60
        ).parent
    if method == "spatia":
        folder = simulate.simulate_cells(
            tmp_path / "cells.h5", n_cells=240, n_genes=48, n_sections=3, size=16
        ).parent
    used = []
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self, compile=torch.nn.Module.compile: (
            used.append(self),
            compile(self, backend="eager"),
        ),
    )
    found = {
        name: compare_flags.one(method, folder, 1, flags)
        for name, flags in (("default", []), ("compile", ["--compile"]))
    }
    assert used and list(found["compile"]) == list(found["default"])
    for row in compare_flags.table(method, found)[1::2]:
        assert row[1] == "compile" and max(row[5]) < 1e-4, row


def test_loops_are_cut_short_and_only_the_wanted_ones_noted(monkeypatch):
    """Loops 0 to 2, of which the first and the last are wanted; losses before, between and after
    are not theirs."""
    loops, weight = compare_flags.Loops((0, 2), 1), torch.ones(1, requires_grad=True)
    monkeypatch.setattr(run, "progress", loops)
    monkeypatch.setattr(torch.Tensor, "backward", lambda *a, **k: loops.backward(*a, **k))
    turns = []
    with suppress(compare_flags.Enough):
        for name in "abc":
            for i in run.progress(range(100), name):
                turns.append((name, i))
                (weight * i).sum().backward()
            weight.sum().backward()
    assert turns == [(name, i) for name in "abc" for i in range(3)]
    assert {k: v["losses"] for k, v in loops.found.items()} == {
        "0 a": [[0.0], [1.0], [2.0]],
        "2 c": [[0.0], [1.0], [2.0]],
    }


def test_table_of_differences():
    """Ratios against the default, a variant with other steps, a loss that is not a number, and a
    variant that took too long."""
    loop = {"seconds": [9.0, 1.0, 2.0, 2.0, 2.0], "losses": [[1.0, 2.0]] * 5}
    half = {"seconds": [20.0, 3.0, 1.0, 1.0, 1.0], "losses": [[1.0, 2.2]] * 5}
    other = {"seconds": [1.0] * 5, "losses": [[1.0]] * 4 + [[1.0, 2.0]]}
    broken = {"seconds": [1.0] * 5, "losses": [[1.0, 2.0]] * 4 + [[1.0, float("nan")]]}
    found = {
        "default": {"l": loop},
        "a": {"l": half},
        "b": {"l": other},
        "c": {"l": broken},
        "d": "not within 60 s",
    }
    rows = [compare_flags.text(r) for r in compare_flags.table("m", found)]
    assert rows == [
        "| m | d | not within 60 s | | | |",
        "| m l | default | 10.00 | 2.0000 | 1.00 | 0e+00; 0e+00 |",
        "| m l | a | 23.00 | 1.0000 | 2.00 | 1e-01; 1e-01 |",
        "| m l | b | 2.00 | 1.0000 | 2.00 | other number of steps |",
        "| m l | c | 2.00 | 1.0000 | 2.00 | 0e+00; nan |",
    ]
    assert compare_flags.table("m", {"default": "not within 60 s", "a": {"l": half}}) == [
        ("m", "default", "not within 60 s")
    ]


def test_program_records_what_ran_and_tells_what_failed(folder, tmp_path, monkeypatch, capsys):
    """Processes of their own: gat_fusion runs, stformer lacks its data and says so in its row, the
    exit status is 1; a limit is kept."""
    monkeypatch.setattr(
        compare_flags,
        "data_folder",
        lambda to: [(to / f.name).symlink_to(f) for f in folder.iterdir()],
    )
    assert (
        compare_flags.main(
            [
                "gat_fusion",
                "stformer",
                "--turns",
                "1",
                "--variants",
                "default",
                "--out",
                str(tmp_path),
            ]
        )
        == 1
    )
    out = capsys.readouterr().out
    rows = json.loads((tmp_path / "flags.json").read_text())["rows"]
    assert [row[:2] for row in rows] == [
        ["gat_fusion 0 epochs", "default"],
        ["stformer", "default"],
    ]
    assert rows[1][2].startswith("failed: ") and "her2st" in rows[1][2] and "her2st" in out
    assert (
        compare_flags.main(
            [
                "gat_fusion",
                "--turns",
                "1",
                "--variants",
                "default",
                "--limit",
                "0.1",
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )
    assert "| gat_fusion | default | not within 0.1 s |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        compare_flags.main(["--turns", "0"])
