"""run: flags, records, atomic writes, errors."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
import torch

import data
from conftest import ROOT
from plainst import run


@dataclass
class Flags(run.Config):
    """Flags of a toy method."""

    rate: float = 0.5
    """share of spots, in % of
    all"""
    kind: Literal["a", "b"] = "a"
    "which"
    fast: bool = False
    "skip the slow part"


def test_flags_come_from_the_dataclass(capsys):
    flags = run.parse(
        Flags, ["--rate", "0.25", "--kind", "b", "--fast", "--slice", "x", "--no-deterministic"]
    )
    assert (flags.rate, flags.kind, flags.fast, flags.slice, flags.deterministic, flags.seed) == (
        0.25,
        "b",
        True,
        "x",
        False,
        0,
    )
    with pytest.raises(SystemExit) as stop:
        run.parse(Flags, ["--kind", "c"])
    assert stop.value.code == 2
    with pytest.raises(SystemExit):
        run.parse(Flags, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert (
        "share of spots, in % of all (default: 0.5)" in text
        and "seed of initialisation and training" in text
    )


def started(folder, runs):
    """A toy run on folder/sim.h5ad."""
    config = Flags(data=str(folder / "sim.h5ad"), seed=3, runs=str(runs), device="cpu")
    return run.Run("toy", config, "s1", "plain")


def finished(tmp_path, **more):
    record = started(tmp_path, tmp_path / "runs")
    return record, record.finish(
        {"ari": np.float32(0.5), "nan": float("nan")},
        {"majority": {"ari": 0}},
        {"x": np.arange(3)},
        7,
        data.Split("random", *np.zeros((3, 2), bool), True, "why"),
        **more,
    )


def test_record(tmp_path, capsys):
    _, path = finished(
        tmp_path, files={"model.pt": lambda f: torch.save({"w": torch.ones(2)}, f)}, epochs=4
    )
    assert path == tmp_path / "runs" / "toy" / "sim" / "s1" / "plain" / "seed3" / "run.json"
    assert capsys.readouterr().out.strip().splitlines()[-1] == str(path)
    record = json.loads(path.read_text())
    assert (
        record["metrics"] == {"ari": 0.5, "nan": None}
        and record["baselines"] == {"majority": {"ari": 0}}
        and record["epochs"] == 4
    )
    assert (
        record["split"] == {"name": "random", "leaks_position": True, "detail": "why"}
        and record["config"]["rate"] == 0.5
    )
    assert (
        record["n_params"] == 7
        and record["data_checksum"] == ""
        and record["versions"]["torch"] == torch.__version__
        and record["processor"]
    )
    assert sorted(p.name for p in path.parent.iterdir()) == ["arrays.npz", "model.pt", "run.json"]


def written(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_record_on_other_data_is_not_overwritten(tmp_path):
    """/A/proj/s1 and /B/proj/s1 have one path: the second stops before it trains, and again before
    it writes; the same data elsewhere, or a half record, does not stop a run."""
    a, b, copy = (
        written(tmp_path / d / "sim.h5ad", t) for d, t in (("A", "1"), ("B", "2"), ("C", "1"))
    )
    first = started(a.parent, tmp_path / "runs")
    first.note_inputs([a])
    late = started(b.parent, tmp_path / "runs")
    late.note_inputs([b])
    path = first.finish({"ari": 0.5}, {}, {})
    before = path.read_bytes()
    with pytest.raises(data.DataError, match="sim.h5ad differs.*--runs"):
        started(b.parent, tmp_path / "runs").note_inputs([b])
    with pytest.raises(data.DataError, match="run.json.*other data.*--runs"):
        late.finish({"ari": 0.1}, {}, {})
    assert path.read_bytes() == before
    again = started(copy.parent, tmp_path / "runs")
    again.note_inputs([copy])
    assert again.finish({"ari": 0.25}, {}, {}) == path
    path.write_text('{"data_checksum": ')
    late.finish({"ari": 0.1}, {}, {})
    assert json.loads(path.read_text())["metrics"] == {"ari": 0.1}


def test_the_record_lists_its_files_as_they_were_at_the_start(tmp_path, monkeypatch):
    root = tmp_path / "proj"
    counts, gmt = written(root / "s1" / "c.h5", "1"), written(tmp_path / "x" / "c.h5", "22")
    other = written(tmp_path / "y" / "c.h5", "333")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "git_commit", lambda: "at the start")
    record = run.Run("toy", Flags(data="proj", runs=str(tmp_path / "r"), device="cpu"), "s1", "v")
    checksum = record.note_inputs([counts, gmt, str(other), "x/c.h5", counts])
    counts.write_text("changed since")
    monkeypatch.setattr(run, "git_commit", lambda: "of later")
    facts = json.loads(record.finish({}, {}, {}).read_text())
    assert facts["git_commit"] == "at the start" and facts["data_checksum"] == checksum
    assert {name: file["size"] for name, file in facts["files"].items()} == {
        "s1/c.h5": 1,
        "c.h5": 2,
        "y/c.h5": 3,
        "x/c.h5": 2,
    }
    assert facts["files"]["s1/c.h5"]["sha256"] == hashlib.sha256(b"1").hexdigest()
    assert str(tmp_path) not in json.dumps(facts["files"])
    with pytest.raises(data.DataError, match="none.csv cannot be read"):
        record.note_inputs([tmp_path / "none.csv"])


@pytest.mark.parametrize(
    "path, name",
    [
        ("/A/p1/outs/binned_outputs/square_008um", "p1_square_008um"),
        ("/A/p1/binned_outputs/square_008um", "p1_square_008um"),
        ("/A/p1/outs/binned_outputs", "p1"),
        ("/A/p1/outs/segmented_outputs", "p1_segmented_outputs"),
        ("/A/p1/outs", "p1"),
        ("/A/dlpfc", "dlpfc"),
        ("/A/x.h5ad", "x"),
        ("/A/ca1/cells.h5", "ca1"),
    ],
)
def test_name_of_the_data(path, name):
    assert run.data_name(path) == name


def test_a_full_disk_names_the_flag_of_the_folder(tmp_path):
    written(tmp_path / "out", "a file, not a folder")
    with pytest.raises(data.DataError, match="another folder with --out"):
        run.write_atomically(tmp_path / "out" / "a", lambda f: f.write(b"x"), "--out")


def test_nothing_is_written_before_the_end_and_json_comes_last(tmp_path):
    def broken(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(data.DataError, match="No space left"):
        finished(tmp_path, files={"model.pt": broken})
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_write_atomically_keeps_the_old_file(tmp_path):
    path = tmp_path / "a"
    run.write_atomically(path, lambda f: f.write(b"old"))

    def broken(file):
        file.write(b"ne")
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        run.write_atomically(path, broken)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_flags_that_no_run_can_use():
    rules = {"rate": run.POSITIVE}
    run.check_flags(Flags(), rules)
    for flags, name in (
        (Flags(rate=0.0), "rate is 0.0"),
        (Flags(rate=float("nan")), "rate is nan"),
        (Flags(seed=-1), "seed is -1"),
        (Flags(seed=2**32), "seed is 4294967296"),
        (Flags(threads=-2), "threads is -2"),
    ):
        with pytest.raises(data.DataError, match=f"--{name}"):
            run.check_flags(flags, rules)


def test_seeds_and_device():
    run.seed_everything(5)
    a = torch.rand(3), np.random.rand(3)
    run.seed_everything(5)
    assert torch.equal(a[0], torch.rand(3)) and np.array_equal(a[1], np.random.rand(3))
    assert run.pick_device("cpu").type == "cpu"
    with pytest.raises(data.DataError, match="--device auto"):
        run.pick_device("nonsense")


def test_bf16_and_compile_act_only_where_asked_for(monkeypatch):
    net, x = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.GELU()), torch.randn(5, 4)
    with run.autocast(Flags(), "cpu"):
        exact = net(x)
    with run.autocast(Flags(bf16=True), torch.device("cpu")):
        near = net(x)
    assert (
        exact.dtype == torch.float32
        and near.dtype == torch.bfloat16
        and (near - exact).abs().max() < 0.02
    )
    near.float().sum().backward()
    assert net[0].weight.grad.dtype == torch.float32
    used = []
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self, compile=torch.nn.Module.compile: (
            used.append(self),
            compile(self, backend="eager"),
        ),
    )
    assert run.compiled(net, Flags()) is net and not used
    names = list(net.state_dict())
    assert (
        run.compiled(net, Flags(compile=True)) is net
        and used == [net]
        and list(net.state_dict()) == names
    )
    assert torch.allclose(net(x), exact)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(data.DataError, match="C\\+\\+ compiler"):
        run.compiled(net, Flags(compile=True))


def test_errors_are_one_sentence_and_status_2(capsys):
    def main(argv):
        raise data.DataError("a.h5 is bad: get another")

    with pytest.raises(SystemExit) as stop:
        run.cli(main)
    assert stop.value.code == 2 and capsys.readouterr().err == "error: a.h5 is bad: get another\n"


def test_unwritable_runs_folder(tmp_path):
    (tmp_path / "runs").write_text("a file, not a folder")
    with pytest.raises(data.DataError, match="--runs"):
        finished(tmp_path)


def test_runs_from_another_folder(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "gat_fusion.py"), "--data", "none"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: ")
        and "Traceback" not in done.stderr
    )


def test_two_processes_write_one_record(tmp_path):
    """Under torchrun the processes share one group, and only the first writes."""
    script = tmp_path / "toy.py"
    script.write_text(
        "import sys, torch\nfrom plainst import run\n"
        "record = run.Run('toy', run.Config(data='d', runs=sys.argv[1], device='cpu'), 'a', 'b')\n"
        "total = torch.tensor(float(record.rank + 1))\n"
        "torch.distributed.all_reduce(total)\n"
        "record.finish({'total': total.item()}, {}, {})\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            "--standalone",
            str(script),
            str(tmp_path / "runs"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    path = tmp_path / "runs" / "toy" / "d" / "a" / "b" / "seed0" / "run.json"
    assert done.stdout.split() == [str(path)]
    record = json.loads(path.read_text())
    assert record["processes"] == 2 and record["metrics"] == {"total": 3.0}


def test_an_interrupt_is_one_sentence(capsys):
    def main(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run.cli(main)
    assert (
        stop.value.code == 130 and capsys.readouterr().err == "interrupted: no record was written\n"
    )
