"""Graph attention against torch_geometric's GATConv: forward + backward in one process, on the 151673 graph and on 100,000 spots.

    make bench        # needs requirements-dev.txt and, for the real graph, PLAINST_DATA
"""
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch_geometric.nn import GATConv

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import gat_fusion  # noqa: E402


def pair(table):
    """The two layers with the same weights as functions of x: ours, theirs."""
    graph, ours, theirs = gat_fusion.Neighbours(table), gat_fusion.GraphAttention(128, 128, 4, 0.0), GATConv(128, 32, heads=4)
    with torch.no_grad():
        for to, of in ((theirs.lin.weight, ours.project.weight), (theirs.att_src, ours.u[None]), (theirs.att_dst, ours.v[None]), (theirs.bias, ours.bias)):
            to.copy_(of)
    edges = torch.stack([graph.others.index.flatten(), torch.arange(len(table)).repeat_interleave(table.shape[1])])
    return lambda x: ours(x, graph)[0], lambda x: theirs(x, edges)


def step(layer, x):
    """Seconds of forward + backward, output, input gradient."""
    x = x.clone().requires_grad_()
    start = time.perf_counter()
    out = layer(x)
    out.square().sum().backward()
    return time.perf_counter() - start, out.detach(), x.grad


def main():
    """Print one line per case and the median ratio."""
    torch.manual_seed(0)
    folder = Path(os.environ.get("PLAINST_DATA", ROOT.parent / "shared" / "data")) / "dlpfc" / "151673"
    places = [("100,000 spots", np.random.default_rng(0).random((100_000, 2)), 5)]
    if folder.is_dir():
        places.insert(0, ("151673", data.load_visium(folder, counts=False).xy, 15))
    ratios = []
    for name, xy, repeats in places:
        for k in (6, 18):
            ours, theirs = pair(data.knn_table(xy, k))
            x = torch.randn(len(xy), 128)
            (_, a, da), (_, b, db) = step(ours, x), step(theirs, x)
            times = [(step(ours, x)[0], step(theirs, x)[0]) for _ in range(repeats)]
            ratios.append(statistics.median(t / o for o, t in times))
            mine, their = (statistics.median(column) * 1e3 for column in zip(*times))
            print(f"{name:<14} k={k:<3} ours {mine:8.1f} ms  GATConv {their:8.1f} ms  ratio {ratios[-1]:.2f}  "
                  f"difference: output {(a - b).abs().max():.1e}, gradient {(da - db).abs().max() / db.abs().max():.1e} (relative)", flush=True)
    print(f"median ratio {statistics.median(ratios):.2f}, smallest {min(ratios):.2f}; {torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == "__main__":
    main()
