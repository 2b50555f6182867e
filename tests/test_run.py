"""run: flags, records, atomic writes, errors."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
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


def finished(tmp_path, **more):
    record = run.Run(
        "toy",
        Flags(data=str(tmp_path / "sim.h5ad"), seed=3, runs=str(tmp_path / "runs"), device="cpu"),
        "s1",
        "plain",
    )
    return record, record.finish(
        {"ari": np.float32(0.5), "nan": float("nan")},
        {"majority": {"ari": 0}},
        {"x": np.arange(3)},
        7,
        data.Split("random", *np.zeros((3, 2), bool), True, "why"),
        "abc",
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
        and record["data_checksum"] == "abc"
        and record["versions"]["torch"] == torch.__version__
        and record["processor"]
    )
    assert sorted(p.name for p in path.parent.iterdir()) == ["arrays.npz", "model.pt", "run.json"]


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


def make(folder, *words):
    """Exit status and output of `make -n` with this Makefile in another folder."""
    done = subprocess.run(
        ["make", "-n", "-f", str(ROOT / "Makefile"), "PY=python3", "SEEDS=0", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_makefile(tmp_path):
    slices = tmp_path / "datasets" / "dlpfc"
    slices.mkdir(parents=True)
    # an interrupted download: the others are still to come
    (slices / "151673.h5ad").touch()
    status, out = make(
        tmp_path,
        "sweep",
        "SLICES=151673 151674",
        "MODELS=full",
        "HELD_OUT_MODELS=gcn_full",
        "SPLITS=random slice",
    )
    assert status == 0 and "plainst download dlpfc --slices 151674 --out datasets/dlpfc" in out
    assert (
        "--slice 151673 --split random --mode full --fusion cross" in out
        and out.count("--split random") == 2
    )
    assert (
        "--slice 151673 --split slice --train 151674 --mode gcn_full --fusion cross" in out
        and out.count("--split slice") == 2
    )
    assert make(tmp_path, "sweep", "SPLITS=random", "MODELS=full")[1].count("gat_fusion.py") == 12
    record = tmp_path / "runs" / "gat_fusion" / "dlpfc" / "151673" / "random-full-cross" / "seed0"
    record.mkdir(parents=True)
    (record / "run.json").touch()
    out = make(tmp_path, "sweep", "SLICES=151673", "SPLITS=random", "MODELS=full")[1]
    assert (
        "plainst download" not in out and "gat_fusion.py" not in out and "evaluation.report" in out
    )
    mine = tmp_path / "mine"
    mine.mkdir()
    done = subprocess.run(
        ["make", "-f", str(ROOT / "Makefile"), "PY=false", "sweep", "DATA=mine"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (
        done.returncode == 2
        and "DATA=mine holds no slice" in done.stderr
        and "download" not in done.stdout
    )
    (mine / "a.h5ad").touch()
    status, out = make(tmp_path, "sweep", "DATA=mine", "SPLITS=random", "MODELS=gat_only")
    assert (
        status == 0
        and out.count("gat_fusion.py") == 1
        and "--data mine --slice a" in out
        and "plainst download" not in out
    )
    for name in ("DATA", "RUNS"):
        status, out = make(tmp_path, "sweep", f"{name}=my folder")
        assert status == 2 and f'{name} is "my folder"' in out


def folder_of(script, words, monkeypatch):
    """(data, slice or fold, variant) of a run, as its program names them."""
    module = importlib.import_module(script.removesuffix(".py"))
    config = run.parse(module.Config, words)
    if script == "spatia.py":  # which names its record before it reads a file
        named = []

        def named_only(method, config, part, variant, start, name):
            named.append((name, part, variant))
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(run, "Run", named_only)
            module.main(words)
        return named[0]
    if script == "cmrcnet.py":
        config = module.resolved(config)
    by_fold = script in ("stformer.py", "cmrcnet.py") and not config.slice
    part = f"fold{config.fold}" if by_fold else config.slice
    return Path(config.data).name, part, module.variant(config)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_targets_of_make_are_the_files_that_the_runs_write(tmp_path, monkeypatch):
    """Else every run would be made again by the next make."""
    for path in (
        *("datasets/dlpfc/151673.h5ad", "datasets/dlpfc/151674.h5ad", "datasets/ca1/cells.h5"),
        *("datasets/her2st/splits/test_0.csv", "datasets/hallmark/h.all.symbols.gmt"),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    words = (
        "SLICES=151673 151674",
        "MODELS=full gcn_only expr_only",
        "HELD_OUT_MODELS=full-gated",
        "MULTIST=default image:off k:12+alpha:0.5 dec:False",
        "SPATIA=default mae:False+niche:False rho:0.25",
        *("SECTIONS=C2", "FOLDS=0 1", "CONTROLS=1", "ABLATE_CMRCNET=1"),
    )
    # the data base of make: every target with its recipe
    _, out = make(tmp_path, "-p", "reproduce", *words)
    rules = re.findall(r"^(runs/\S+/run\.json):(?:.*\n)(?:#.*\n)*\t *python3 (.*)$", out, re.M)
    scripts = set()
    for target, command in rules:
        script, *flags = command.split()
        scripts.add(script)
        data, part, variant = folder_of(script, flags, monkeypatch)
        method = script.removesuffix(".py")
        assert target == f"runs/{method}/{data}/{part}/{variant}/seed0/run.json", command
    assert len(rules) > 60 and len(scripts) == 5


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_launch_stands_before_every_run(tmp_path):
    """LAUNCH="srun ..." or "torchrun ..." as the README gives it: every training run goes through
    it, reports and downloads do not."""
    for path in (
        "datasets/dlpfc/151673.h5ad",
        "datasets/ca1/cells.h5",
        "datasets/her2st/splits/test_0.csv",
        "datasets/her2st/splits/train_0.csv",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    ran = set()
    for target in ("reproduce-dlpfc", "reproduce-hest", "reproduce-ca1"):
        status, out = make(
            tmp_path,
            target,
            "LAUNCH=srun --gres=gpu:1",
            "SLICES=151673",
            "HEST=datasets/her2st",
            "SECTIONS=C2",
        )
        assert status == 0, out
        for line in out.splitlines():
            script = next((w for w in line.split() if w.endswith(".py")), None)
            if " -m " in line:  # reports, simulators, downloads
                assert not line.startswith("srun")
            elif script:
                assert line.startswith("srun --gres=gpu:1 python3 "), line
                ran.add(script)
    assert ran == {"gat_fusion.py", "multist.py", "stformer.py", "cmrcnet.py", "spatia.py"}


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
