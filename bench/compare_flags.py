"""What --bf16, --compile and one thread do to a training loop: python bench/compare_flags.py
[method ...] [--turns N] [--limit S] (make compare-flags).

Every method runs with its default flags and --dropout 0 until the loops of bench/profile_loops.py
have made a few turns (a step, or an epoch where it counts epochs). Every variant is a process of
its own; the default is run twice, first and last, so the second tells the noise. Seconds of the
first two turns together (they compile, from an empty cache), the median of the others, and how far
the losses of the first and of the last turn are from the default's. Compiled code draws the random
numbers that eager code draws. Only a method's first loop begins with the same weights in all
variants: a later one begins with what the loops before made. Real data where PLAINST_DATA says so,
else simulated. Writes flags.json after every method; ends with 1 where a program failed, whose last
line of errors stands in its row.
"""

import argparse
import importlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout, suppress
from itertools import islice
from pathlib import Path
from unittest import mock

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.profile_loops import METHODS, Enough, data_folder  # noqa: E402
from plainst import run  # noqa: E402

VARIANTS = {
    "default": [],
    "bf16": ["--bf16"],
    "one thread": ["--threads", "1"],
    "compile": ["--compile"],
    "default again": [],
}
# of multist it is a constant, spatia has none
WITHOUT_DROPOUT = ("gat_fusion", "stformer", "cmrcnet")
WARM = 2


class Loops:
    """Stands in for run.progress: notes seconds and losses of the first turns of the wanted loops,
    and cuts all loops short."""

    def __init__(self, wanted, turns):
        self.wanted, self.turns, self.number, self.found, self.losses = (
            wanted,
            WARM + turns,
            -1,
            {},
            None,
        )

    def __call__(self, iterable, desc, **_):
        self.number += 1
        number, seconds, losses, items = self.number, [], [], iter(iterable)
        if number not in self.wanted:
            yield from islice(items, self.turns)
            return
        for _ in range(self.turns):
            self.losses, start = [], time.perf_counter()
            yield next(items)
            seconds.append(time.perf_counter() - start)
            losses.append(self.losses)
        self.losses = None
        self.found[f"{number} {desc}"] = {"seconds": seconds, "losses": losses}
        if number == max(self.wanted):
            raise Enough

    def backward(self, loss, *args, **kwargs):
        """Stands in for Tensor.backward."""
        if self.losses is not None:
            self.losses.append(float(loss.detach()))
        return BACKWARD(loss, *args, **kwargs)


BACKWARD = torch.Tensor.backward


def one(method, folder, turns, flags):
    """{loop: seconds and losses of its turns} of one run in this process. With --compile, compiled
    code draws eager random numbers from here on."""
    if "--compile" in flags:
        from torch._inductor import config

        config.fallback_random = True
    source, own, wanted = METHODS[method]
    loops = Loops(wanted, turns)
    words = [
        "--data",
        str(folder / source),
        "--runs",
        str(folder / "runs"),
        *own.replace("CACHE", str(folder / "features")).split(),
        *(["--dropout", "0"] if method in WITHOUT_DROPOUT else []),
        *flags,
    ]
    with (
        mock.patch.object(run, "progress", loops),
        mock.patch.object(torch.Tensor, "backward", lambda *a, **k: loops.backward(*a, **k)),
        redirect_stdout(io.StringIO()),
        suppress(Enough),
    ):
        importlib.import_module(method).main(words)
    return loops.found


def apart(losses, base):
    """Largest relative difference of the losses of the first turn, and of the last; None where the
    turns had another number of steps."""
    if [len(turn) for turn in losses] != [len(turn) for turn in base]:
        return None
    return [
        float(np.max([abs(a - b) / max(abs(b), 1e-12) for a, b in zip(losses[i], base[i])]))
        for i in (0, -1)
    ]


def measured(method, variant, folder, options):
    """What `one` gives, from a process of its own; where it gives nothing, why."""
    with tempfile.TemporaryDirectory() as cache:
        told = Path(cache, "record.json")
        words = [
            sys.executable,
            __file__,
            method,
            "--turns",
            str(options.turns),
            "--folder",
            str(folder),
            "--variant",
            variant,
            "--record",
            str(told),
        ]
        environment = (
            os.environ
            | {"TORCHINDUCTOR_CACHE_DIR": cache}
            | ({"OMP_NUM_THREADS": "1"} if variant == "one thread" else {})
        )
        try:
            ended = subprocess.run(
                words,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                timeout=options.limit,
                env=environment,
            )
        except subprocess.TimeoutExpired:
            return f"not within {options.limit:g} s"
        if ended.returncode:
            return "failed: " + (ended.stderr.strip().splitlines() or ["without a word"])[-1]
        return json.loads(told.read_text())


def table(method, found):
    """Rows of one method: loop, variant, seconds of the first turns, median of the others, times
    faster than the default, differences of the losses; or method, variant, why there is nothing."""
    base = found["default"]
    rows = [(method, variant, why) for variant, why in found.items() if isinstance(why, str)]
    if isinstance(base, str):
        return rows
    for loop, usual in base.items():
        for variant, loops in found.items():
            if not isinstance(loops, str):
                seconds, losses = loops[loop]["seconds"], loops[loop]["losses"]
                each = statistics.median(seconds[WARM:])
                rows.append(
                    (
                        f"{method} {loop}",
                        variant,
                        sum(seconds[:WARM]),
                        each,
                        statistics.median(usual["seconds"][WARM:]) / each,
                        apart(losses, usual["losses"]),
                    )
                )
    return rows


def text(row):
    """One row of the printed table."""
    if len(row) == 3:
        return "| {} | {} | {} | | | |".format(*row)
    loop, variant, first, each, ratio, difference = row
    told = (
        "other number of steps" if difference is None else "; ".join(f"{d:.0e}" for d in difference)
    )
    return f"| {loop} | {variant} | {first:.2f} | {each:.4f} | {ratio:.2f} | {told} |"


def main(argv=None):
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="bench/compare_flags.py", description=__doc__.split("\n")[0]
    )
    parser.add_argument("methods", nargs="*", default=list(METHODS), help="which methods")
    parser.add_argument("--turns", type=int, default=5, help="turns that are timed, after two")
    parser.add_argument(
        "--limit",
        type=float,
        default=900,
        help="seconds a variant may take, data and compiling included",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        default=list(VARIANTS),
        choices=VARIANTS,
        help="which variants; the default is always run",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/flags"), help="folder of the record")
    parser.add_argument(
        "--folder",
        type=Path,
        default=None,
        help="run one --variant here, on the data in this folder, and write its --record",
    )
    parser.add_argument("--variant", choices=VARIANTS, default="default")
    parser.add_argument("--record", type=Path, default=None)
    options = parser.parse_args(argv)
    if not 1 <= options.turns <= 20:
        parser.error("--turns is from 1 to 20: some loops have no more")
    if options.folder:
        options.record.write_text(
            json.dumps(
                one(options.methods[0], options.folder, options.turns, VARIANTS[options.variant])
            )
        )
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with redirect_stdout(io.StringIO()):
            data_folder(folder)
        print(
            "| loop | variant | first two turns, s | a turn, s | times faster | loss apart: "
            "first turn; last |\n|---|---|---|---|---|---|"
        )
        options.out.mkdir(parents=True, exist_ok=True)
        for method in options.methods:
            new = table(
                method,
                {
                    v: measured(method, v, folder, options)
                    for v in dict.fromkeys(["default", *options.variants])
                },
            )
            print("\n".join(map(text, new)), flush=True)
            rows += new
            record = {
                "rows": rows,
                "git_commit": run.git_commit(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            }
            run.write_atomically(
                options.out / "flags.json",
                lambda f, record=record: f.write(json.dumps(record, indent=1).encode()),
            )
    return int(any(str(row[2]).startswith("failed") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
