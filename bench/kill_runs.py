"""Kill every program at many moments, and ask that what stands there in the end is what an
undisturbed run gives.

    # ten random kills and every write of each program
    python bench/kill_runs.py --out kills
    python bench/kill_runs.py --out kills --only gat_fusion download --kills 3 --points 5

Random kills: the command line gets SIGKILL at a moment drawn from the duration of the undisturbed
run, then the same command is started again in the same folder, with --resume where the program has
it and a checkpoint is there. Kills at points: a process gets SIGKILL just before the n-th time that
it opens, renames, makes or removes a file in its folder, for every n; the file about to be renamed,
else the one opened last, is cut in half first, as a kill in the middle of writing leaves it. After
every kill each file under a final name must be whole, and run.json must not stand without its
companions. At the end every file must equal that of the undisturbed run byte for byte, model.pt bit
by bit of every tensor, but for dates, seconds and memory in run.json and manifest.json and for
latest.pt, which must load. Exit status 1 where one does not.
"""

import argparse
import contextlib
import http.server
import importlib
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import scipy.sparse as sp
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from plainst import simulate  # noqa: E402

QUICK = "--seed 3 --threads 1 --device cpu --runs runs"
CHECKPOINTS = "--save_every 1 --cache features"
# name: (program, flags, has --resume); {data}: simulated inputs, {url}: the server
JOBS = {
    "gat_fusion": (
        "gat_fusion",
        "--data {data}/cortex --slice sim1 --mode multimodal --epochs 6 --dim 16 "
        f"--cache features {QUICK}",
        False,
    ),
    "multist": (
        "multist",
        "--data {data}/cortex --slice sim1 --epochs 12 --dec_epochs 4 "
        f"--fusion_epochs 1 --n_starts 1 --permutations 20 {QUICK}",
        False,
    ),
    "stformer": (
        "stformer",
        f"--data {{data}}/hest --epochs 3 --folds 2 --members 1 --rings 1 {CHECKPOINTS} {QUICK}",
        True,
    ),
    "cmrcnet": (
        "cmrcnet",
        "--data {data}/hest --epochs 3 --val groups --folds 2 --dim 32 --snn 64 --n_hvg 20 "
        f"--batch 16 --k 10 --backbone features --markers none {CHECKPOINTS} {QUICK}",
        True,
    ),
    "spatia": (
        "spatia",
        "--data {data}/cells.h5 --steps_a 4 --steps_b 4 --steps_c 4 --draws 1 --ode_steps 2 "
        f"--save_every 2 {QUICK}",
        True,
    ),
    "simulate-cortex": (
        "plainst simulate",
        "cortex cortex --n_spots 300 --n_genes 60 --n_slices 2",
        False,
    ),
    "simulate-hest": ("plainst simulate", "hest hest --n_spots 40 --patch_size 32", False),
    "simulate-cells": (
        "plainst simulate",
        "cells field/cells.h5 --n_cells 200 --n_genes 48",
        False,
    ),
    "convert": ("plainst convert", "ca1 {data}/ca1 cells.h5", False),
    "download": ("plainst download", "ca1 --out ca1 --mirror {url} --backoff 0.01", False),
}
# what a kill may leave: nothing of ours reads it as finished
PASSING = re.compile(r"(\.tmp|\.part|\.part\.json|\.lock)(/|$)")


# ------------------------------------------------------------------------------------------- inputs


def inputs(folder, served_rows=150_000):
    """Small data of every kind, written once; `served_rows` lines and numbers to download."""
    for kind, name, flags in (
        ("cortex", "cortex", "--n_spots 200 --n_genes 120 --n_slices 2"),
        ("hest", "hest", "--n_spots 60 --patch_size 32"),
        ("cells", "cells.h5", "--n_cells 200 --n_genes 48 --n_sections 3 --size 16"),
    ):
        if not (folder / name).exists():
            with contextlib.redirect_stdout(None):
                simulate.main([kind, str(folder / name), *flags.split()])
    rng, image = np.random.default_rng(0), np.zeros((400, 400), np.int32)
    (folder / "ca1").mkdir(exist_ok=True)
    rows = []
    # 9 x 9 nuclei, 12 reads near each
    for number in range(1, 82):
        y, x = 40 * np.array(divmod(number - 1, 9)) + 20
        image[y : y + 12, x : x + 12] = number
        rows += [
            f"gene{rng.integers(20)},{x + rng.integers(12)},{y + rng.integers(12)}\n"
            for _ in range(12)
        ]
    (folder / "ca1" / "spots.csv").write_text("Gene,x,y\n" + "".join(rows))
    sp.save_npz(folder / "ca1" / "label_image.coo.npz", sp.coo_matrix(image))
    served = folder / "served"
    served.mkdir(exist_ok=True)
    (served / "spots.csv").write_text(
        "Gene,x,y\n" + "".join(f"gene{i % 97},{i},{i * 7 % 5000}\n" for i in range(served_rows))
    )
    np.savez(
        served / "label_image.coo.npz",
        row=rng.integers(0, 9, served_rows),
        col=rng.integers(0, 9, served_rows),
    )


class Slow(http.server.BaseHTTPRequestHandler):
    """A file by the last part of its address, about 2 MB a second, with ETag and ranges."""

    def do_GET(self):
        body = (self.server.folder / Path(self.path).name).read_bytes()
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.send_header("ETag", '"v1"')
        self.end_headers()
        for place in range(start, len(body), 1 << 16):
            try:
                self.wfile.write(body[place : min(place + (1 << 16), len(body))])
            except ConnectionError:  # the client was killed
                return
            time.sleep(0.03)

    def log_message(self, *args):
        pass


def serve(folder):
    """-> (address, process id) of a server of the files in `folder`, in a process of its own."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    server.folder, address = folder, f"http://127.0.0.1:{server.server_address[1]}"
    pid = os.fork()
    if not pid:
        server.serve_forever()
    server.server_close()
    return address, pid


# -------------------------------------------------------------------------------- what stands there


def finished_files(folder):
    """{relative path: Path} of the files under final names."""
    found = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: p for name, p in found.items() if not PASSING.search(name)}


def leftovers(folder):
    """Number of files that a kill left under passing names."""
    return sum(
        p.is_file() and bool(PASSING.search(str(p.relative_to(folder)))) for p in folder.rglob("*")
    )


def unit(name):
    """The simulated slice or task folder that is renamed as a whole and holds this file, else the
    file itself."""
    parts = Path(name).parts
    return "/".join(parts[:2]) if parts[0] == "cortex" else "hest" if parts[0] == "hest" else name


def lasting(name, content):
    """What of a JSON record must be the same in every run."""
    content = json.loads(content)
    if name == "manifest.json":
        return {
            file: {k: v for k, v in record.items() if k != "date"}
            for file, record in content.items()
        }
    drop = ("seconds", "peak_rss_mb", "date", "laps", "stage_seconds", "git_commit")
    content["config"].pop("resume", None)
    return {k: v for k, v in content.items() if k not in drop}


def faults(folder, calm, complete):
    """[what is wrong] with the files under final names beside those of the undisturbed run;
    `complete`: all of them must be there."""
    here, wanted, wrong = finished_files(folder), finished_files(calm), []
    for name, path in here.items():
        base = path.name
        if name not in wanted:
            wrong.append(f"{name}: the undisturbed run has no such file")
        elif path.suffix == ".pt":
            try:
                now, end = (torch.load(p, weights_only=True) for p in (path, wanted[name]))
                # its bytes depend on which strings are the same object
                if base == "model.pt" and not same(now, end):
                    wrong.append(f"{name}: differs")
            except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
                wrong.append(f"{name}: {error}")
        elif base == "manifest.json":  # grows file by file
            now, end = lasting(base, path.read_bytes()), lasting(base, wanted[name].read_bytes())
            if now != end if complete else any(end.get(k) != v for k, v in now.items()):
                wrong.append(f"{name}: {now}")
        elif base == "run.json":
            now, end = lasting(base, path.read_bytes()), lasting(base, wanted[name].read_bytes())
            wrong += [
                f"{name}: {k} is {now.get(k)}, not {end.get(k)}"
                for k in now | end
                if now.get(k) != end.get(k)
            ]
        elif path.read_bytes() != wanted[name].read_bytes():
            wrong.append(f"{name}: differs{differing_arrays(path, wanted[name])}")
    # the record says that all is whole
    recorded, begun = (
        any(Path(name).name == "run.json" for name in here),
        {unit(name) for name in here},
    )
    wrong += [
        f"{name}: is not there"
        for name in set(wanted) - set(here)
        if complete or recorded or unit(name) in begun
    ]
    return wrong


def same(a, b):
    """Are two checkpoints equal, every bit of the tensors included?"""
    if isinstance(a, dict):
        return (
            isinstance(b, dict)
            and list(a) == list(b)
            and all(same(a[k], b[k]) for k in a if k != "resume")
        )
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def differing_arrays(path, other):
    """Which arrays of two NPZ or HDF5 files differ, in words."""
    try:
        if path.suffix == ".npz":
            with np.load(path) as a, np.load(other) as b:
                names = [
                    k
                    for k in b.files
                    if k not in a.files
                    or not np.array_equal(a[k], b[k], equal_nan=b[k].dtype.kind == "f")
                ]
                return f" in {names}"
        if path.suffix == ".h5":
            with h5py.File(path) as a, h5py.File(other) as b:
                names = [k for k in b if isinstance(b[k], h5py.Dataset)]
                return f" in {[k for k in names if not np.array_equal(a[k][()], b[k][()])]}"
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        return f" and cannot be read ({error})"
    return ""


# -------------------------------------------------------------------------------------------- kills


class Job:
    """One program in one folder after another."""

    def __init__(self, name, out, data, url):
        program, flags, self.can_resume = JOBS[name]
        self.name, self.out = name, out / name
        # a module at the top, or a command of the package
        self.module, *self.command = program.split()
        self.flags = [f.format(data=data, url=url) for f in flags.split()]
        shutil.rmtree(self.out, ignore_errors=True)
        self.calm, self.folder, self.faults, self.kills = (
            self.out / "calm",
            self.out / "killed",
            [],
            Counter(),
        )

    def words(self, folder):
        """The words behind the program's name; --resume where a checkpoint lies."""
        flags = (
            [*self.flags, "--resume"]
            if self.can_resume and next(folder.rglob("latest.pt"), None)
            else list(self.flags)
        )
        # the simulator refuses to overwrite a folder: the user deletes it or is done
        if self.command == ["simulate"] and (folder / flags[1]).is_dir():
            for written in (folder / flags[1]).iterdir() if flags[0] == "cortex" else ():
                shutil.rmtree(written)
        return [*self.command, *flags]

    def start(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        program = [str(ROOT / f"{self.module}.py")] if not self.command else ["-m", self.module]
        with open(self.out / "log", "ab") as log:
            return subprocess.Popen(
                [sys.executable, *program, *self.words(folder)],
                cwd=folder,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=log,
            )

    def load(self):
        """The module whose `main` takes the words of the command line."""
        return importlib.import_module("plainst.__main__" if self.command else self.module)

    def done(self, folder):
        """The simulator refuses a folder that is there, so such a folder that is there must be
        whole."""
        return (
            self.command == ["simulate"]
            and not faults(folder, self.calm, True)
            and finished_files(folder)
        )

    def check(self, what, complete=False):
        self.kills["left over"] = max(self.kills["left over"], leftovers(self.folder))
        self.faults += [
            f"{self.name}, {what}: {fault}" for fault in faults(self.folder, self.calm, complete)
        ]

    def fresh(self):
        shutil.rmtree(self.folder, ignore_errors=True)

    def finish(self, what, run):
        """Run to the end and compare."""
        status = 0 if self.done(self.folder) else run()
        if status:
            self.faults.append(
                f"{self.name}, {what}: exit status {status} after the restart, see "
                f"{self.out / 'log'}"
            )
        self.check(what + ", finished", complete=True)

    def undisturbed(self, fork):
        """The run to compare with, in a copy of this process or as its user starts it, which takes
        as long as the runs that are killed after so many seconds."""
        start = time.perf_counter()
        if not self.forked(0, self.calm) if fork else self.start(self.calm).wait():
            raise SystemExit(f"{self.name}: the undisturbed run fails, see {self.out / 'log'}")
        self.seconds = time.perf_counter() - start

    def random_kills(self, kills, rng):
        """One folder, killed again and again; when a run is faster than its killer, the result is
        compared and a fresh folder is begun."""
        moments = [(i + rng.random()) / kills * self.seconds for i in range(kills)]
        rng.shuffle(moments)
        self.fresh()
        for moment in moments:
            while True:
                if self.done(self.folder):
                    self.fresh()
                process = self.start(self.folder)
                try:
                    status = process.wait(timeout=moment)
                except subprocess.TimeoutExpired:
                    process.kill()
                    status = process.wait()
                if status == -signal.SIGKILL:
                    break
                if status:
                    self.faults.append(
                        f"{self.name}: exit status {status} after a restart, see {self.out / 'log'}"
                    )
                self.check("a run that was faster than its killer", complete=True)
                self.kills["faster"] += 1
                self.fresh()
                moment *= 0.8
            self.kills["random"] += 1
            self.check(f"killed after {moment:.2f} s")
        self.finish("random kills", lambda: self.start(self.folder).wait())

    def kills_at_points(self, most):
        """Before every write in turn (`most` of them, evenly spread); each time in a fresh folder,
        restarted to the end."""
        self.fresh()
        # counts, and must not be killed
        total = self.forked(0)
        points = np.unique(
            np.linspace(1, total, min(total if most is None else most, total)).round().astype(int)
        )
        for n in points:
            self.fresh()
            if self.forked(n) is not None:
                self.faults.append(f"{self.name}: no {n}-th write")
            self.kills["points"] += 1
            self.check(f"killed before write {n}")
            self.finish(f"killed before write {n}", lambda: 0 if self.forked(0) else 1)

    def forked(self, n, folder=None):
        """The program in a copy of this process, which has its libraries loaded; SIGKILL before the
        n-th write -> None, or the number of writes."""
        folder = folder or self.folder
        folder.mkdir(parents=True, exist_ok=True)
        words, count = self.words(folder), self.out / "count"
        count.unlink(missing_ok=True)
        if not (pid := os.fork()):
            status = 1
            try:
                log = os.open(self.out / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
                os.dup2(log, 1), os.dup2(log, 2)
                os.chdir(folder)
                writes = killer(folder, n)
                status = self.load().main(words) or 0
                count.write_text(str(writes["here"]))
            finally:
                os._exit(status)
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            return None
        return int(count.read_text()) if os.WEXITSTATUS(status) == 0 and count.exists() else 0


def killer(folder, n):
    """Watch this process: SIGKILL before its n-th write below `folder`; 0 only counts. -> Counter
    with the number of writes under `here`."""
    writes, below, opened = Counter(), str(folder) + os.sep, [""]

    def watch(event, args):
        if event == "open":
            path, mode, flags = args
            if isinstance(path, int) or not (
                (isinstance(mode, str) and set(mode) & set("wax+"))
                or flags & (os.O_WRONLY | os.O_RDWR)
            ):
                return
        elif event not in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            return
        path = os.path.abspath(os.fsdecode(args[0]))
        if not path.startswith(below):
            return
        writes["here"] += 1
        if writes["here"] == n:
            half = path if event == "os.rename" else opened[0]
            if os.path.isfile(half):
                os.truncate(half, os.path.getsize(half) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        if event == "open":
            opened[0] = path

    sys.addaudithook(watch)
    return writes


def main(argv=None):
    """Print one line a program; -> 1 where anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for inputs and results")
    parser.add_argument("--only", nargs="+", choices=JOBS, default=list(JOBS), help="programs")
    parser.add_argument("--kills", type=int, default=10, help="random kills of each program")
    parser.add_argument(
        "--points",
        type=int,
        help="writes before which each program is killed, evenly spread; without it, every one",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--rows", type=int, default=150_000, help="lines of the downloaded files")
    options = parser.parse_args(argv)
    out, wrong = options.out.resolve(), []
    (out / "data").mkdir(parents=True, exist_ok=True)
    inputs(out / "data", options.rows)
    url, server = serve(out / "data" / "served")
    print("program          seconds    random kills kills at writes  most left over  faults")
    try:
        for name in options.only:
            job = Job(name, out, out / "data", url)
            # before the forks: a killed copy need not load it again
            job.load()
            job.undisturbed(fork=not options.kills)
            if options.kills:
                job.random_kills(options.kills, random.Random(f"{options.seed} {name}"))
            if options.points is None or options.points:
                job.kills_at_points(options.points)
            counts = "".join(f"{job.kills[k]:16}" for k in ("random", "points", "left over"))
            print(
                f"{name:<16}{job.seconds:8.1f}{counts}{len(job.faults):8}",
                *job.faults,
                sep="\n  ",
                flush=True,
            )
            wrong += job.faults
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
    print(
        f"{len(wrong)} faults"
        if wrong
        else "every killed and restarted program ended with the files of the undisturbed run"
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
