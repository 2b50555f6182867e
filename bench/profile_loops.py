"""What the training loops do beside arithmetic: python bench/profile_loops.py [method ...] [--turns
N] [--flags "..."] (make profile).

Every method runs with its default flags until its training loops have made a few turns (a step, or
an epoch where it counts epochs) and prints a table
a loop: time, operators, what the host waits for, float64, the largest result, and our functions by
their share of a turn, with what they call. Real data where PLAINST_DATA says so (the folders of
../shared/data/README.md), else simulated.
"""

import argparse
import cProfile
import importlib
import io
import os
import pstats
import statistics
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stdout, suppress
from itertools import islice
from pathlib import Path
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plainst import run, simulate  # noqa: E402
from plainst.readers import convert  # noqa: E402

# data, flags, which loops by number
METHODS = {
    "gat_fusion": ("dlpfc", "--slice 151673 --cache CACHE", (0,)),
    "multist": ("dlpfc", "--slice 151673 --cache CACHE", (0, 1, 2)),
    # the linear baseline's first fold, the model's first fold
    "stformer": ("her2st", "--folds 2 --members 1 --cache CACHE", (0, 5)),
    "cmrcnet": ("her2st", "--cache CACHE", (0,)),
    "spatia": ("cells.h5", "", (0, 1, 2)),
}
# results whose size or value the host waits for
SYNC = ("_local_scalar_dense", "nonzero", "is_nonzero", "unique", "masked_select", "equal")

# none of them calls another
LOADING = (
    *("collate", "image", "images", "expression", "batches", "turned"),
    *("sample_batch", "random_orientation"),
)
GRAPHS = ("knn_table", "normalised_knn_graph", "lattice_table", "lattice_pitch", "neighbour_tables")


class Enough(Exception):
    """The last loop that was asked for is measured."""


def is_ours(file):
    """Whether a method is made of this source file: one at the top, or in a room below."""
    path = Path(file)
    if not path.is_relative_to(ROOT):
        return False
    return path.relative_to(ROOT).parts[0] in (path.name, "plainst", "evaluation")


def place():
    """function:line of ours that is being run."""
    frame = sys._getframe(2)
    while frame and not is_ours(frame.f_code.co_filename):
        frame = frame.f_back
    return f"{frame.f_code.co_name}:{frame.f_lineno}" if frame else "the profiler"


class Dispatched(TorchDispatchMode):
    """Counts what one turn dispatches: operators, waits of the host, float64 results; and the
    largest result."""

    def __init__(self):
        super().__init__()
        self.operators, self.waits, self.double, self.largest = (
            Counter(),
            Counter(),
            Counter(),
            (0, ""),
        )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out, name = function(*args, **(kwargs or {})), str(function).split(".")[1]
        self.operators[name] += 1
        # a mask of unknown count
        masked = name in ("index", "index_put_") and any(
            t is not None and t.dtype == torch.bool for t in args[1]
        )
        if masked or name.startswith(SYNC):
            self.waits[f"{name} in {place()}"] += 1
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.layout == torch.strided:
                self.double[name] += t.dtype == torch.float64
                self.largest = max(
                    self.largest, (t.numel() * t.element_size(), f"{name} {tuple(t.shape)}")
                )
        return out


class Loops:
    """Stands in for run.progress, around which every training loop is written: measures the wanted
    ones, cuts every loop short."""

    def __init__(self, method, wanted, turns):
        self.method, self.wanted, self.turns, self.number, self.out = (
            method,
            wanted,
            turns,
            -1,
            sys.stdout,
        )

    def __call__(self, iterable, desc, **_):
        self.number += 1
        items, n = iter(iterable), self.turns
        if self.number not in self.wanted:
            # as many as below: stformer averages the curves of its folds
            yield from islice(items, 3 * n + 3)
            return
        times, calls, ops = [], cProfile.Profile(), Dispatched()
        for _ in range(2 + n):  # two to warm up
            start = time.perf_counter()
            yield next(items)
            times.append(time.perf_counter() - start)
        with profile(activities=[ProfilerActivity.CPU]) as found:
            start = time.perf_counter()
            yield from islice(items, n)
            wall = time.perf_counter() - start
        with ops:
            yield next(items)
        with calls:
            yield from islice(items, n)
        with redirect_stdout(self.out):
            report(
                f"{self.method} {desc}",
                times[2:],
                found.key_averages(),
                wall,
                ops,
                pstats.Stats(calls, stream=io.StringIO()),
                n,
            )
        if self.number == max(self.wanted):
            raise Enough


def report(name, times, events, wall, ops, calls, n):
    """Print the table of one loop."""
    own = sorted(events, key=lambda e: -e.self_cpu_time_total)
    inside = sum(e.self_cpu_time_total for e in own) / 1e6

    def listed(pairs):
        return ", ".join(f"{k} {v}" for k, v in pairs if v) or "none"

    def top(counter):
        return f"{counter.total()}: {listed(counter.most_common(6))}"

    ours = [
        (f, c[1] / n, c[3] / calls.total_tt, file)
        for (file, _, f), c in calls.stats.items()
        if is_ours(file)
    ]
    rows = {
        "seconds a turn": (
            f"{statistics.median(times):.4f} (median of {len(times)}, {min(times):.4f} to "
            f"{max(times):.4f})"
        ),
        "outside operators": f"{1 - inside / wall:.0%} (under the profiler)",
        "operators by own time": listed(
            (e.key.removeprefix("aten::"), f"{e.self_cpu_time_total / 1e6 / inside:.0%}")
            for e in own[:8]
        ),
        "operators a turn": top(ops.operators),
        "host synchronisations a turn": top(ops.waits),
        "float64 results a turn": top(ops.double),
        "largest result": f"{ops.largest[0] / 2**20:.1f} MB, {ops.largest[1]}",
        "graphs built a turn": listed((f, k) for f, k, *_ in ours if f in GRAPHS),
        "data loading": f"{sum(share for f, _, share, _ in ours if f in LOADING):.0%}",
        "our functions": listed(
            (f"{Path(file).stem}.{f} x{k:g}", f"{v:.0%}")
            for f, k, v, file in sorted(ours, key=lambda p: -p[2])[:14]
            if v > 0.01
        ),
    }
    print(
        f"\n## {name}\n\n| | |\n|---|---|\n" + "\n".join(f"| {k} | {v} |" for k, v in rows.items()),
        flush=True,
    )


def data_folder(folder):
    """Real data linked into `folder`, or simulated data of the same shapes."""
    real = os.environ.get("PLAINST_DATA")
    if real:
        for name in ("dlpfc", "her2st"):
            (folder / name).symlink_to(Path(real, name).resolve())
        convert.from_ca1(Path(real, "ca1"), folder / "cells.h5")
        return
    simulate.write_visium(
        simulate.simulate_cortex(3600, 3000, sample="151673"), folder / "dlpfc" / "151673"
    )
    simulate.simulate_hest(folder / "her2st", n_slides=6, n_spots=220, patch_size=64)
    simulate.simulate_cells(folder / "cells.h5", n_cells=2400, n_genes=92)


def main(argv=None):
    """Print the tables."""
    parser = argparse.ArgumentParser(
        prog="bench/profile_loops.py", description=__doc__.split("\n")[0]
    )
    parser.add_argument("methods", nargs="*", default=list(METHODS), help="which methods")
    parser.add_argument("--turns", type=int, default=5, help="turns that are timed")
    parser.add_argument(
        "--flags", default="", help="more flags for the methods, such as '--threads 1'"
    )
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with redirect_stdout(io.StringIO()):
            data_folder(folder)
        for method in options.methods:
            source, flags, wanted = METHODS[method]
            loops = Loops(method, wanted, options.turns)
            words = [
                "--data",
                str(folder / source),
                "--runs",
                str(folder / "runs"),
                *flags.replace("CACHE", str(folder / "features")).split(),
                *options.flags.split(),
            ]
            with (
                mock.patch.object(run, "progress", loops),
                redirect_stdout(io.StringIO()),
                suppress(Enough),
            ):
                importlib.import_module(method).main(words)


if __name__ == "__main__":
    main()
