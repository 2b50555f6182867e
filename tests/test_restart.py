"""What a kill, a full disk, another number of threads or another time of day leave as it was.
bench/kill_runs.py does the first at length."""

import contextlib
import functools
import importlib
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import kill_runs
from conftest import ROOT, without_idle_flags
from data import DataError
from evaluation import figures, retrieval_record
from plainst import run

METHODS = ["gat_fusion", "multist", "stformer", "cmrcnet", "spatia"]
# Largest difference between one and two threads of any float array, as a share of its largest
# value; labels are equal. Measured: 4e-7, 2e-6, 2e-7. stformer, spatia: measured by hand in
# docs/hardening.md, slow here
TOLERANCE = {"gat_fusion": 1e-5, "multist": 1e-4, "cmrcnet": 1e-5}
POSTERIORS = {"confidence": 1e-3}  # the exponential of a distance magnifies it; measured: 1.5e-4
FASTER = {
    "gat_fusion": ["--epochs", "2"],
    "multist": [],
    "stformer": ["--folds", "0"],
    "cmrcnet": ["--val", "none"],
    "spatia": ["--steps_b", "2"],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    kill_runs.inputs(folder)
    return folder


def train(method, inputs, folder, monkeypatch, threads=1, *more):
    """The quick run of kill_runs in `folder`; -> its arrays.npz."""
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    before = torch.get_num_threads()
    try:
        flags = [f.format(data=inputs, url="") for f in kill_runs.JOBS[method][1].split()]
        module, words = importlib.import_module(method), [*flags, "--threads", str(threads), *more]
        assert module.main(without_idle_flags(module, words)) == 0
    finally:
        torch.set_num_threads(before)
    with np.load(next(folder.rglob("arrays.npz"))) as arrays:
        return {name: arrays[name] for name in arrays.files}


@pytest.fixture
def small_files():
    """Context in which a file can grow to that many bytes only: the system refuses the rest, as it
    does on a full disk."""

    @contextlib.contextmanager
    def limit(size):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


# --------------------------------------------------------------------------- the same numbers again


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_bits_and_threads_agree(method, inputs, tmp_path, monkeypatch, capsys):
    # figures take most of the time
    for module in (figures, retrieval_record):
        for name in [name for name in vars(module) if name.startswith("draw")]:
            monkeypatch.setattr(module, name, lambda *args: None)
    monkeypatch.setattr(importlib.import_module(method), "draw", lambda *args: None, raising=False)

    def again(name, threads):
        return train(method, inputs, tmp_path / name, monkeypatch, threads, *FASTER[method])

    a, b = again("a", 1), again("b", 1)
    assert set(a) == set(b) and not [
        k for k in a if not np.array_equal(a[k], b[k], equal_nan=a[k].dtype.kind == "f")
    ]
    two = again("two", 2) if method in TOLERANCE else {}
    for k in two:
        if two[k].dtype.kind == "f":
            np.testing.assert_allclose(
                two[k],
                a[k],
                rtol=0,
                atol=(TOLERANCE | POSTERIORS)[k if k in POSTERIORS else method]
                * max(np.nanmax(np.abs(a[k]), initial=0), 1e-12),
                err_msg=k,
            )
        else:
            assert np.array_equal(two[k], a[k]), k


# -------------------------------------------------------------------------------------------- kills


@pytest.mark.parametrize(
    ("programs", "kills", "points"),
    [
        (["gat_fusion", "convert"], 0, 2),
        (["download"], 1, 2),
        pytest.param(["gat_fusion"], 1, 0, marks=pytest.mark.long),
        pytest.param(["convert", "download"], 1, 3, marks=pytest.mark.long),
    ],
)
def test_killed_programs_end_with_the_files_of_undisturbed_ones(
    tmp_path, inputs, programs, kills, points
):
    shutil.copytree(inputs, tmp_path / "data")
    words = [
        sys.executable,
        str(ROOT / "bench" / "kill_runs.py"),
        "--out",
        str(tmp_path),
        "--kills",
        str(kills),
        "--points",
        str(points),
        "--rows",
        "60000",
    ]
    done = subprocess.run(
        [*words, "--only", *programs],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = [line.split() for line in done.stdout.splitlines()[1:-1]]
    assert [row[0] for row in table] == programs and all(
        int(row[2]) == kills and int(row[3]) >= min(points, 1) for row in table
    )


def record(folder, **metrics):
    """Three files that belong together, as a run writes them."""
    values = {
        "model.pt": lambda f: torch.save(metrics, f),
        "arrays.npz": lambda f: np.savez_compressed(f, **metrics),
        "run.json": lambda f: f.write(json.dumps(metrics).encode()),
    }
    run.write_together({folder / name: write for name, write in values.items()})


def read(folder):
    with np.load(folder / "arrays.npz") as arrays:
        return [
            torch.load(folder / "model.pt", weights_only=True),
            {k: int(v) for k, v in arrays.items()},
            json.loads((folder / "run.json").read_text())
            if (folder / "run.json").exists()
            else None,
        ]


def test_no_record_beside_files_of_another_run(tmp_path):
    """Stopped before any rename or removal of a second run in the same folder: run.json is there
    only where all three are of one run."""
    seen = set()
    for stop in range(1, 6):
        record(tmp_path, ari=1)
        assert read(tmp_path) == [{"ari": 1}] * 3
        calls = []

        def counted(*args, do, calls=calls, stop=stop, **options):
            calls.append(args)
            if len(calls) == stop:
                raise KeyboardInterrupt
            return do(*args, **options)

        with pytest.MonkeyPatch.context() as patch:
            for owner, name in ((os, "replace"), (Path, "unlink")):
                patch.setattr(
                    owner,
                    name,
                    functools.partialmethod(counted, do=getattr(owner, name))
                    if owner is Path
                    else functools.partial(counted, do=getattr(owner, name)),
                )
            with contextlib.suppress(KeyboardInterrupt):
                record(tmp_path, ari=2)
        model, arrays, told = read(tmp_path)
        assert told is None or model == arrays == told
        seen.add((model["ari"], arrays["ari"], None if told is None else told["ari"]))
    assert {(1, 1, 1), (2, 1, None), (2, 2, None), (2, 2, 2)} <= seen


def test_half_a_file_under_a_final_name_is_noticed(tmp_path):
    """kill_runs can fail: it sees a cut file, a record without its companions and a checkpoint that
    does not load."""
    calm, here = tmp_path / "calm", tmp_path / "killed"
    for folder in (calm, here):
        folder.mkdir()
        for name in ("arrays.npz", "features.npz"):
            np.savez(folder / name, a=np.arange(99))
        torch.save({"config": {}}, folder / "latest.pt")
        (folder / "run.json").write_text(
            json.dumps({"config": {}, "metrics": {"ari": 1}, "seconds": folder.name})
        )
        (folder / "run.json.7.tmp").write_text("{")
    assert kill_runs.faults(here, calm, complete=True) == []
    for name in ("arrays.npz", "features.npz", "latest.pt"):
        whole = (here / name).read_bytes()
        (here / name).write_bytes(whole[: len(whole) // 2])
        assert [fault.split(":")[0] for fault in kill_runs.faults(here, calm, complete=False)] == [
            name
        ]
        (here / name).unlink()
        assert kill_runs.faults(here, calm, complete=False) == [f"{name}: is not there"]
        (here / name).write_bytes(whole)
    (here / "run.json").write_text(json.dumps({"config": {}, "metrics": {"ari": 2}}))
    assert "metrics" in kill_runs.faults(here, calm, complete=False)[0]


# -------------------------------------------------------------------------------------- a full disk


@pytest.mark.parametrize(
    "write",
    [
        lambda f: torch.save({"a": torch.zeros(99_999)}, f),
        lambda f: np.savez(f, a=np.zeros(99_999)),
        lambda f: f.write(bytes(999_999)),
    ],
    ids=["torch", "numpy", "bytes"],
)
def test_full_disk_is_one_sentence_and_keeps_the_old_file(tmp_path, small_files, write):
    path = tmp_path / "latest.pt"
    run.write_atomically(path, lambda f: torch.save({"epoch": 1}, f))
    with (
        small_files(50_000),
        pytest.raises(
            DataError, match=r"latest\.pt cannot be written \(File too large\): free some space"
        ),
    ):
        run.write_atomically(path, write)
    assert torch.load(path, weights_only=True) == {"epoch": 1} and list(tmp_path.iterdir()) == [
        path
    ]


def test_full_disk_keeps_every_file_of_the_old_record(tmp_path, small_files):
    record(tmp_path, ari=1)
    with small_files(1_000), pytest.raises(DataError, match="free some space"):
        record(tmp_path, ari=2, **{f"score{i}": i for i in range(999)})
    assert read(tmp_path) == [{"ari": 1}] * 3 and len(list(tmp_path.iterdir())) == 3


def test_training_on_a_full_disk_keeps_the_checkpoint(
    inputs, tmp_path, monkeypatch, small_files, capsys
):
    """The disk fills after the first run; the next one ends in one sentence, and --resume goes on
    from the checkpoint that was there."""
    monkeypatch.setattr(importlib.import_module("evaluation.genes"), "draw", lambda *args: None)
    calm = train("stformer", inputs, tmp_path, monkeypatch)
    latest = next(tmp_path.rglob("latest.pt"))
    old = latest.read_bytes()
    with small_files(len(old) // 2), pytest.raises(DataError, match="latest.pt cannot be written"):
        train("stformer", inputs, tmp_path, monkeypatch)
    assert latest.read_bytes() == old and not list(tmp_path.rglob("*.tmp"))
    again = train("stformer", inputs, tmp_path, monkeypatch, 1, "--resume")
    assert all(np.array_equal(calm[k], again[k], equal_nan=calm[k].dtype.kind == "f") for k in calm)


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="mounting a small disk needs root"
)
def test_really_full_disk(tmp_path):
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True
    ).returncode:
        pytest.skip("this system mounts no tmpfs")
    try:
        path = tmp_path / "latest.pt"
        run.write_atomically(path, lambda f: torch.save({"epoch": 1}, f))
        for write in (
            lambda f: torch.save({"a": torch.zeros(999_999)}, f),
            lambda f: np.savez(f, a=np.zeros(999_999)),
        ):
            with pytest.raises(DataError, match="No space left on device"):
                run.write_atomically(path, write)
            assert torch.load(path, weights_only=True) == {"epoch": 1} and list(
                tmp_path.iterdir()
            ) == [path]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
