"""Retrieval at scale: 20,000 queries x 500,000 keys x 256. Exact search beside one bare matmul + topk, and recall against time of the inverted file.

    python tests/bench_retrieval.py [queries] [keys] [folder of the figure, default docs]      # 2 threads; needs PLAINST_DATA

Keys and queries are a trained model's embeddings (her2st, five sections train, A2 is the query slide), replicated:
  noise         a copy is a real embedding plus Gaussian noise with the covariance of the real embeddings around the centre of their k-means cluster
                (32 clusters): the real spread within a cluster, no more
  interpolated  a copy lies at a random place between a real embedding and one of its ten nearest: it stays where the real ones are
"""
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import h5py
import matplotlib
import numpy as np
import torch
from sklearn.cluster import KMeans

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cmrcnet as cm  # noqa: E402
import metrics  # noqa: E402
import run  # noqa: E402

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

K, PROBES = 50, (1, 4, 8, 16, 32, 64, 96, 128, 192)


def trained_embeddings(folder):
    """Gene keys (1008, 256) of the training spots and image queries (325, 256) of A2, of a model of the default flags but 256 wide."""
    with tempfile.TemporaryDirectory() as runs:
        cm.main(["--data", str(folder), "--fold", "0", "--backbone", "features", "--dim", "256", "--reconstruction", "none", "--val", "none",
                 "--epochs", "15", "--runs", runs, "--cache", runs])
        path = next(Path(runs).rglob("run.json")).parent
        with h5py.File(path / "atlas.h5", "r") as f:
            return f["keys"][:], np.load(path / "arrays.npz")["embedding"]


def replicate(real, n, kind, seed):
    """(n, d) float32 copies of the rows of `real` in turn, and the variance of the change over the variance of `real`."""
    rng = np.random.default_rng(seed)
    unit = real / np.linalg.norm(real, axis=1, keepdims=True)
    near = np.argsort(-(unit @ unit.T), axis=1)[:, 1:11]                # (N, 10)
    owner = KMeans(32, n_init=2, random_state=seed).fit(real)
    rest = real - owner.cluster_centers_[owner.labels_]                 # (N, d) spread within clusters
    out, change = np.empty((n, real.shape[1]), np.float32), 0.0
    for start in range(0, n, 20000):
        row = np.arange(start, min(start + 20000, n)) % len(real)
        delta = rng.random((len(row), 1)) * (real[near[row, rng.integers(0, 10, len(row))]] - real[row])
        for c in range(32) if kind == "noise" else ():                  # sum of g_j r_j / sqrt(n) has the cluster's covariance
            here, members = np.flatnonzero(owner.labels_[row] == c), np.flatnonzero(owner.labels_ == c)
            delta[here] = rng.normal(size=(len(here), len(members))) @ rest[members] / len(members) ** 0.5
        out[start:start + len(row)] = real[row] + delta
        change += (delta ** 2).sum() / n
    return torch.from_numpy(out), float(change / ((real - real.mean(0)) ** 2).sum(1).mean())


def timed(function, *args):
    start = time.perf_counter()
    out = function(*args)
    return time.perf_counter() - start, out


def exact_beside_bare(queries, keys, parts=5):
    """Seconds of a bare chunked matmul + topk and of `exact_topk`, in turns over parts of the queries (a shared machine has good and bad minutes),
    and the exact rows (Q, k)."""
    bare_s, exact_s, rows = 0.0, 0.0, []
    unit = torch.nn.functional.normalize(keys, dim=1)
    step = max(1, cm.TILE // len(keys))
    for part in queries.chunk(parts):
        bare_s += timed(lambda p=part: [(torch.nn.functional.normalize(q, dim=1) @ unit.T).topk(K) for q in p.split(step)])[0]
        s, (_, index) = timed(cm.exact_topk, part, keys, K)
        exact_s += s
        rows.append(index)
    return bare_s, exact_s, torch.cat(rows)


def main(n_queries=20_000, n_keys=500_000, out=ROOT / "docs"):
    """Print the table and the same as JSON, write cmrcnet_recall.png."""
    torch.set_num_threads(2)
    real_keys, real_queries = trained_embeddings(Path(os.environ.get("PLAINST_DATA", ROOT.parent / "shared" / "data")) / "her2st")
    found = {}
    figure, axis = plt.subplots(figsize=(6, 4))
    for kind in ("noise", "interpolated"):
        keys, share = replicate(real_keys, n_keys, kind, 0)
        queries, _ = replicate(real_queries, n_queries, kind, 1)
        if not found:                                                   # the time of an exact search does not depend on the values
            bare_s, exact_s, exact = exact_beside_bare(queries, keys)
            exact = exact[::10]
        else:
            exact = cm.exact_topk(queries[::10], keys, K)[1]
        build_s, ivf = timed(cm.InvertedFile, keys)
        del keys
        curve = []
        print(f"{kind}: change of {share:.2f} of the real variance; bare {bare_s:.1f} s, exact {exact_s:.1f} s ({exact_s / bare_s:.2f} x); "
              f"inverted file of {len(ivf.centre)} lists built in {build_s:.1f} s", flush=True)
        for probe in PROBES:
            s, (_, index) = timed(ivf.topk, queries, K, probe)
            recall = metrics.recall_at_k(index[::10].numpy(), exact.numpy())
            curve.append({"probe": probe, "seconds": s, "recall": recall, "faster": exact_s / s})
            print(f"  probe {probe:<3} {s:7.2f} s   {exact_s / s:6.1f} x faster   recall@{K} {recall:.3f}", flush=True)
            if recall > 0.99:
                break
        found[kind] = {"changed_variance": share, "bare_s": bare_s, "exact_s": exact_s, "ratio": exact_s / bare_s, "build_s": build_s, "curve": curve}
        axis.plot([c["seconds"] for c in curve], [c["recall"] for c in curve], "o-", label=f"inverted file, {kind}")
    found |= {"queries": n_queries, "keys": n_keys, "dim": real_keys.shape[1], "k": K, "peak_rss_mb": run.peak_rss_mb(),
              "threads": torch.get_num_threads()}
    axis.axvline(exact_s, color="black", linestyle=":", label="exact")
    axis.set(xscale="log", xlabel=f"seconds for {n_queries:,} queries, {n_keys:,} keys", ylabel=f"recall@{K}")
    axis.axhline(0.95, color="gray", linewidth=0.5)
    axis.legend(fontsize=7)
    Path(out).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(out) / "cmrcnet_recall.png", dpi=110, bbox_inches="tight")
    print(f"peak memory {found['peak_rss_mb']:.0f} MB\n{json.dumps(found)}")


if __name__ == "__main__":
    main(*(int(a) for a in sys.argv[1:3]), *sys.argv[3:4])
