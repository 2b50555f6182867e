"""Does every method train on a CUDA device, and give the scores it gives on a CPU? python
bench/gpu_check.py [--out runs/gpu_check] (make gpu-check).

Simulated data, every method shortly, two seeds, on the device and on the CPU, in one process. A
CUDA device draws other random numbers than a CPU, so scores are those of other seeds: the check
fails (exit status 1) where the mean main score differs by more than the spread over seeds + .05, or
where a run ends with an error. Writes gpu_check.json, gpu_check.md and log.txt (what the methods
print) into the folder. Without a CUDA device it says so and ends with status 0; --device cpu
compares the CPU with itself.
"""

import argparse
import contextlib
import importlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plainst import run, simulate  # noqa: E402

TOLERANCE = 0.05
SEEDS = (0, 1)
# main score, simulated data, flags, flags of --quick
METHODS = {
    "gat_fusion": ("ari", "cortex/sim1", "--epochs 60", "--epochs 3 --n_top_genes 60"),
    "multist": (
        "ari",
        "cortex/sim1",
        "--epochs 200 --dec_epochs 60 --fusion_epochs 10 --permutations 0",
        "--epochs 4 --dec_epochs 2 --fusion_epochs 1 --n_starts 1 --permutations 0 --n_pcs 20 "
        "--no-figures",
    ),
    "stformer": ("pcc_mean", "hest", "--epochs 15 --members 1", "--epochs 2 --folds 0 --members 1"),
    "cmrcnet": (
        "pcc_mean",
        "hest",
        "--preset tuned --epochs 15",
        "--preset tuned --epochs 2 --val none --k 5",
    ),
    "spatia": (
        "impute_pcc_mean",
        "cells.h5",
        "--steps_a 150 --steps_b 150 --steps_c 150 --draws 2 --ode_steps 4",
        "--steps_a 4 --steps_b 4 --no-generate",
    ),
}


def simulate_data(folder, quick):
    """One slice, one HEST task and one cell file."""
    spots, genes, patches, cells = (220, 80, 24, 200) if quick else (1500, 600, 150, 1200)
    simulate.write_visium(simulate.simulate_cortex(spots, genes), folder / "cortex" / "sim1")
    simulate.simulate_hest(
        folder / "hest", n_spots=patches, patch_size=16 if quick else 64, n_genes=60
    )
    simulate.simulate_cells(folder / "cells.h5", n_cells=cells, n_genes=60)


class Clock:
    """Stands in for run.progress, around which every training loop is written: seconds of each
    turn, by the loop's name."""

    def __init__(self, device):
        self.device, self.seconds = device, {}

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self, iterable, desc, **_):
        for item in iterable:
            start = self.now()
            yield item
            self.seconds.setdefault(desc, []).append(self.now() - start)

    def medians(self):
        """{name of the loop: median seconds of an epoch or step}."""
        return {desc: statistics.median(s) for desc, s in self.seconds.items()}


def one_run(method, source, flags, device, seed, folder, log):
    """Train and score one model -> {score, seconds, seconds of a turn of each loop, MB on the
    device}, or {error}."""
    score, clock, cuda = METHODS[method][0], Clock(device), device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    words = [
        "--data",
        str(source),
        "--seed",
        str(seed),
        "--device",
        str(device),
        "--runs",
        str(folder),
        *flags.split(),
    ]
    print(f"\n{method} {' '.join(words)}", file=log, flush=True)
    start = time.perf_counter()
    try:
        with contextlib.redirect_stdout(log), mock.patch.object(run, "progress", clock):
            importlib.import_module(method).main(words)
    except (RuntimeError, ValueError) as error:
        # an operation that CUDA lacks, memory, a loss that is not finite (DataError)
        print(f"{method}: {error}", file=log, flush=True)
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    record = json.loads(next(folder.rglob("run.json")).read_text())
    return {
        "score": record["metrics"][score],
        "seconds": time.perf_counter() - start,
        "turn_s": clock.medians(),
        "device": record["device"],
        "peak_gpu_mb": torch.cuda.max_memory_allocated(device) / 2**20 if cuda else None,
    }


def judged(method, here, there):
    """The comparison of the runs on the device and on the CPU: {difference, allowed, passed}, or
    {passed: False} where one has no score."""
    scores = [[r.get("score") for r in runs] for runs in (here, there)]
    found = {
        "method": method,
        "score": METHODS[method][0],
        "device_runs": here,
        "cpu_runs": there,
        "passed": False,
    }
    if any(s is None for part in scores for s in part):
        return found
    difference = abs(statistics.mean(scores[0]) - statistics.mean(scores[1]))
    allowed = max(max(part) - min(part) for part in scores) + TOLERANCE
    return found | {"difference": difference, "allowed": allowed, "passed": difference <= allowed}


def table(results):
    """Markdown: a row a method."""
    out = [
        "| method | score | on the device | on the CPU | difference (allowed) | epoch or "
        "step on the device, ms | on the CPU, ms | whole run, s "
        "| GPU MB | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        here, there = r["device_runs"], r["cpu_runs"]

        def of(runs, name, form):
            return " ".join(format(v[name], form) for v in runs if v.get(name) is not None) or "-"

        def turns(runs):
            return (
                ", ".join(f"{k} {1e3 * v:.1f}" for k, v in runs[0].get("turn_s", {}).items()) or "-"
            )

        errors = "; ".join(v["error"] for v in [*here, *there] if "error" in v)
        gap = f"{r['difference']:.3f} ({r['allowed']:.3f})" if "difference" in r else "-"
        words = [
            r["method"],
            r["score"],
            of(here, "score", ".3f"),
            of(there, "score", ".3f"),
            gap,
            turns(here),
            turns(there),
            f"{of(here, 'seconds', '.1f')} against {of(there, 'seconds', '.1f')}",
            of(here, "peak_gpu_mb", ".0f"),
            "passed" if r["passed"] else "FAILED " + errors,
        ]
        out.append("| " + " | ".join(words).strip() + " |")
    return "\n".join([*out, ""])


def main(argv=None):
    """Exit status: 0 passed or no CUDA device, 1 failed."""
    parser = argparse.ArgumentParser(prog="bench/gpu_check.py", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu_check"), help="folder of the record"
    )
    parser.add_argument(
        "--device",
        default="cuda",
        help="device to compare with the CPU; cpu compares the CPU with itself",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        default=list(METHODS),
        help="methods to check",
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args(argv)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print(
            "gpu-check: there is no CUDA device here, nothing is checked (--device cpu "
            "compares the CPU with itself)."
        )
        return 0
    device, cpu, results = run.pick_device(options.device), torch.device("cpu"), []
    options.out.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as scratch,
        open(options.out / "log.txt", "w", encoding="utf-8") as log,
    ):
        scratch = Path(scratch)
        simulate_data(scratch, options.quick)
        for method in options.methods:
            _, source, long, short = METHODS[method]
            flags = short if options.quick else long
            runs = {
                where: [
                    one_run(
                        method,
                        scratch / source,
                        flags,
                        d,
                        seed,
                        scratch / where / method / str(seed),
                        log,
                    )
                    for seed in SEEDS
                ]
                for where, d in (("device", device), ("cpu", cpu))
            }
            results.append(judged(method, runs["device"], runs["cpu"]))
            print(table(results[-1:]).splitlines()[-1], flush=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    record = {
        "device": name,
        "seeds": SEEDS,
        "quick": options.quick,
        "passed": all(r["passed"] for r in results),
        "results": results,
        "versions": run.versions() | {"cuda": torch.version.cuda},
        "git_commit": run.git_commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }
    text = (
        f"# {name} beside the CPU\n\ntorch {torch.__version__}, {record['date']}, seeds "
        f"{' '.join(map(str, SEEDS))}\n\n{table(results)}"
    )
    for file, content in (("gpu_check.json", json.dumps(record, indent=1)), ("gpu_check.md", text)):
        run.write_atomically(
            options.out / file, lambda f, content=content: f.write(content.encode())
        )
    print(f"{'passed' if record['passed'] else 'FAILED'}: {options.out / 'gpu_check.md'}")
    return 0 if record["passed"] else 1


if __name__ == "__main__":
    run.cli(main)
