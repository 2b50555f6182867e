"""Time and memory of one forward and backward pass of stformer against the number of spots: python tests/scale_stformer.py [folder] (make scale).

Small preset, 768 features, 1,000 genes, recomputed layers (--checkpointing), local h2h with distance bias. A process a size, whose record is kept.
Writes scale_stformer.png and .json into the folder.
"""
import json
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import run  # noqa: E402
import stformer as st  # noqa: E402

SIZES = (5000, 20000, 100000)


def one_step(n):
    """-> seconds of the graph, processor seconds of forward + backward over all threads (a busy machine does not change them much), peak memory."""
    side = int(np.ceil(n ** 0.5))
    grid = np.stack(np.divmod(np.arange(n), side), 1)
    slide = data.Slide(None, np.array([]), np.arange(n).astype(str), grid * 100.0, grid)
    rng = np.random.default_rng(0)
    start = time.perf_counter()
    graph = st.neighbourhood(slide, 2)
    seconds = time.perf_counter() - start
    y = torch.tensor(rng.random((n, 1000), dtype=np.float32))
    sample = st.Sample("a", "a", torch.tensor(rng.standard_normal((n, 768), dtype=np.float32)), *graph, y, y,
                       torch.full((n,), 1e4), torch.ones(n, dtype=torch.bool), torch.ones(1000, dtype=torch.bool))
    layers, dim, heads = st.PRESETS["small"]
    model = st.PathwayTransformer(768, 1000, 50, layers, dim, heads, distance_bias=True, checkpointing=True)
    batch = st.collate([sample])
    start = time.process_time()
    out = model(**batch)["genes"]
    loss = st.masked_mse(out, batch["y"], batch["scored"]) + st.pcc_loss(out, batch["y"], batch["scored"])
    loss.backward()
    return {"spots": n, "graph_s": seconds, "step_s": time.process_time() - start, "peak_rss_mb": run.peak_rss_mb()}


def record(folder, n):
    """The measurement of n spots, made in a process of its own where it is lacking."""
    path = folder / f"stformer_{n}.json"
    if not path.is_file():
        done = subprocess.run([sys.executable, __file__, "--size", str(n)], check=True, capture_output=True, text=True)
        path.write_text(done.stdout.splitlines()[-1])
    return json.loads(path.read_text())


def main(folder):
    """Print the table, write the figure."""
    rows = [record(folder, n) for n in SIZES]
    for r in rows:
        print(f"{r['spots']} spots: graph {r['graph_s']:.1f} s, forward + backward {r['step_s']:.1f} processor s, peak {r['peak_rss_mb']:.0f} MB")
    slope = np.polyfit(np.log(SIZES), np.log([r["step_s"] for r in rows]), 1)[0]
    print(f"slope of log seconds over log spots: {slope:.2f}")
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4))
    axes[0].loglog(SIZES, [r["step_s"] for r in rows], marker="o", color="black", label=f"forward + backward, slope {slope:.2f}")
    axes[0].loglog(SIZES, [r["graph_s"] for r in rows], marker=".", label="graph")
    axes[0].loglog(SIZES, [rows[0]["step_s"] * n / SIZES[0] for n in SIZES], ls=":", color="0.5", label="linear")
    axes[0].set(xlabel="spots", ylabel="processor seconds")
    axes[0].legend(fontsize=8, frameon=False)
    axes[1].loglog(SIZES, [r["peak_rss_mb"] for r in rows], marker="o", color="black")
    axes[1].axhline(8192, ls=":", color="crimson")
    axes[1].set(xlabel="spots", ylabel="peak memory, MB", ylim=(100, 20000))
    figure.tight_layout()
    figure.savefig(folder / "scale_stformer.png", dpi=110)
    (folder / "scale_stformer.json").write_text(json.dumps({"rows": rows, "slope": slope}, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--size"]:
        print(json.dumps(one_step(int(sys.argv[2]))))
    else:
        target = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/scale")
        target.mkdir(parents=True, exist_ok=True)
        main(target)
