"""Speed beside the tools that people use, as ratios: python bench/speed.py
attention|training|loaders|preprocessing|retrieval|ceilings|all [--quick].

Ours and the peers (bench/peers.py) take turns in one process after a warm-up, with the same number
of threads; a ratio is the median over the turns of seconds of the peer / seconds of ours in the
same turn: above 1 ours is faster. A machine that others use changes seconds more than ratios; its
load stands in the record. Memory is what the warm-up call adds to the resident memory at its
highest (Linux). Real data is found through PLAINST_DATA, else a slice is simulated. Writes
<out>/<part>.json and, from all parts there, <out>/bench.md. Needs requirements-dev.txt.

    python bench/speed.py all --out runs/bench
    python bench/speed.py retrieval --queries 20000 --keys 500000
"""

import argparse
import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import gat_fusion  # noqa: E402
import metrics  # noqa: E402
import multist  # noqa: E402
from bench import peers  # noqa: E402
from bench.ceilings import ceilings  # noqa: E402
from bench.timing import compare, markdown, shown, timed  # noqa: E402
from data import DataError  # noqa: E402
from evaluation import domains  # noqa: E402
from plainst import graphs, neighbour_sums, run, simulate  # noqa: E402
from plainst.retrieval import TILE, InvertedFile, exact_topk  # noqa: E402

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

# a call that would need more is left out, and the table says so
LIMIT_GB = 10


# Data


def real(*parts):
    """Path of real data under PLAINST_DATA, or None."""
    path = Path(os.environ.get("PLAINST_DATA", ROOT.parent / "shared" / "data"), *parts)
    return path if path.exists() else None


def visium_folder(options, scratch):
    """(Visium folder of 151673, or of a simulated slice in `scratch`; its name)."""
    folder = None if options.quick else real("dlpfc", "151673")
    if folder:
        return folder, "151673"
    n, g = (300, 200) if options.quick else (3600, 8500)
    return simulate.write_visium(
        simulate.simulate_cortex(n, g, image_px=600), Path(scratch) / "simulated"
    ), f"simulated {n} x {g}"


# (a) graph layers


def attention(options, scratch):
    """Graph attention, GCN and the weighted gather, 128 wide, 4 heads, forward + backward."""
    folder, rows = None if options.quick else real("dlpfc", "151673"), []
    for n in (300,) if options.quick else options.spots:
        xy, name = np.random.default_rng(0).random((n, 2)), f"{n:,} random spots"
        if folder and n == 3_600:
            xy, name = data.load_visium(folder, counts=False).xy, "151673, 3,639 spots"
        for k in (6, 18) if options.quick else (6, 18, 96):
            rows += layers_at(xy, k, f"{name}, k = {k}", options)
    return rows


def layers_at(xy, k, name, options):
    """Rows of the three layers on one graph, or one that says why not."""
    need = len(xy) * (k + 1) * 128 * 4 * 4 / 2**30
    if need > LIMIT_GB:
        return shown(
            [
                {
                    "case": name,
                    "note": (
                        "left out: a peer that holds about four (edges, 128) tensors at once "
                        f"needs {need:.0f} GB"
                    ),
                }
            ]
        )
    x, rows = torch.randn(len(xy), 128, generator=torch.Generator().manual_seed(0)), []
    for layer, functions in peers.graph_layers(data.knn_table(xy, k)).items():
        target = (2 if k <= 18 else 1) if layer == "graph attention" else None
        calls = {f: lambda g=g: peers.forward_backward(g, x) for f, g in functions.items()}
        rows += compare(f"{layer}, {name}", calls, options, peers.largest_difference, target)
    return rows


# (b) training


def epoch_of(model, loss, evaluate):
    """A function that makes one epoch: loss of the training mode, backward, step, then a pass of
    the evaluation mode."""
    step = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def epoch():
        model.train()
        step.zero_grad()
        loss(model).backward()
        step.step()
        model.eval()
        with torch.no_grad():
            return evaluate(model)

    return epoch


def fusion_epochs(x, labels, table):
    """{name: one epoch} of gat_fusion full, ours and with torch_geometric's layers."""
    graph, rows = neighbour_sums.Neighbours(table), labels >= 0
    ours = gat_fusion.GatFusion(gat_fusion.Config(), x.shape[1], 0, int(labels.max()) + 1)
    models = {
        "gat_fusion full": ours,
        "the same with GATConv, TransformerConv": peers.peer_fusion(ours, table),
    }

    def loss(model):
        return F.cross_entropy(model(x, graph)[0][rows], labels[rows])

    return {name: epoch_of(m, loss, lambda m: m(x, graph)) for name, m in models.items()}


def stage1_epochs(x, xy):
    """{name: one epoch} of multist Stage I, which has no evaluation pass."""
    config = multist.Config(branches="serial", gan="off")
    graph, ours = (
        peers.directed(graphs.Graph(xy, config.k)),
        multist.AutoEncoder(x.shape[1], config),
    )
    models = {
        "multist Stage I": ours,
        "the same with GCNConv, cached": peers.PeerAutoEncoder(ours, config),
    }

    def loss(model):
        return sum(multist.stage1_terms(model, None, x, graph, config).values())

    return {name: epoch_of(m, loss, lambda m: None) for name, m in models.items()}


def training(options, scratch):
    """One epoch with our layers and with the ecosystem's; whole training as the sum of inputs,
    graph and the most epochs that the defaults make."""
    folder, name = visium_folder(options, scratch)
    slide = data.load_visium(folder)
    rows = compare(f"inputs and graph, {name}", preparations(slide)["both"], options)
    prepared = rows[0]
    x, labels = (
        torch.as_tensor(a)
        for a in (
            data.Expression().fit(slide.counts, slide.genes).transform(slide.counts, slide.genes),
            slide.labels,
        )
    )
    components = torch.as_tensor(domains.preprocess(slide, multist.Config()))
    for method, n, epochs in (
        (
            "gat_fusion",
            gat_fusion.Config().epochs,
            fusion_epochs(x, labels, data.knn_table(slide.xy, 6)),
        ),
        ("multist Stage I", multist.Config().epochs, stage1_epochs(components, slide.xy)),
    ):
        (epoch,) = compare(f"{method}, one epoch, {name}", epochs, options)
        ours, peer = (prepared[who] + n * epoch[who] for who in ("ours_s", "peer_s"))
        rows += [
            epoch,
            *shown(
                [
                    {
                        "case": f"{method}, whole: inputs + graph + {n} epochs, {name}",
                        "ours": "plainst",
                        "ours_s": ours,
                        "peer_s": peer,
                        "peer": "scanpy, torch_geometric",
                        "ratio": peer / ours,
                        "note": "sum of the medians, not run as one",
                    }
                ]
            ),
        ]
    return rows + shown(
        [
            {
                "case": "cmrcnet, stformer, spatia",
                "note": "left out: torch_geometric and scanpy have no counterpart of their layers",
            }
        ]
    )


# (c) loaders


def loaders(options, scratch):
    """Reading the same files, from the page cache. Ours also checks counts, barcodes and the fit of
    image and positions."""
    scanpy, anndata, path = peers.dev("scanpy"), peers.dev("anndata"), Path(scratch) / "slice.h5ad"
    folder, name = visium_folder(options, scratch)
    matrix = folder / "filtered_feature_bc_matrix.h5"
    slide = peers.quietly(lambda: scanpy.read_10x_h5(matrix))
    slide.var_names_make_unique()
    slide.obsm["spatial"] = peers.visium_by_hand(folder)[1]
    slide.write_h5ad(path)

    def visium():
        found = data.load_visium(folder)
        return found.counts, found.xy, found.image

    def apart(a, b):
        return abs(a - b).max()

    return [
        *compare(
            f"10x HDF5, {name}",
            {
                "read_10x_h5": lambda: data.read_10x_h5(matrix)[0],
                "scanpy.read_10x_h5": lambda: peers.quietly(lambda: scanpy.read_10x_h5(matrix).X),
            },
            options,
            apart,
        ),
        *compare(
            f"Visium folder with image, {name}",
            {
                "load_visium": visium,
                "read_10x_h5, pandas, imread": lambda: peers.visium_by_hand(folder),
            },
            options,
            lambda a, b: apart(a[0], b[0]) + apart(a[1], b[1]),
        ),
        *compare(
            f"h5ad, {name}",
            {
                "load_h5ad": lambda: data.load_h5ad(path).counts,
                "anndata.read_h5ad": lambda: anndata.read_h5ad(path).X,
            },
            options,
            apart,
        ),
    ]


# (d) preprocessing


def preparations(slide, n_top=3000, n_pcs=50):
    """{step: {name: call}}: counts -> principal components, positions -> normalised graph, and
    both; ours first."""

    def ours():
        return (
            data.Expression(n_top)
            .fit(slide.counts, slide.genes)
            .pca(slide.counts, slide.genes, n_pcs)
        )

    def our_graph():
        return data.normalised_knn_graph(slide.xy, 6)[0]

    def theirs():
        return peers.scanpy_expression(slide, n_top, n_pcs)

    def their_graph():
        return peers.sklearn_graph(slide.xy, 6)

    return {
        "expression": {"data.Expression": ours, "scanpy.pp": theirs},
        "graph": {"data.normalised_knn_graph": our_graph, "sklearn, scipy": their_graph},
        "both": {
            "data": lambda: (ours(), our_graph()),
            "scanpy.pp, sklearn, scipy": lambda: (theirs(), their_graph()),
        },
    }


def preprocessing(options, scratch):
    """Filter, normalise, log1p, HVG, z-score, PCA and the spatial graph."""
    folder, name = visium_folder(options, scratch)
    calls = preparations(data.load_visium(folder))

    def components_apart(a, b):
        return 1 - min(abs(np.corrcoef(a[:, i], b[:, i])[0, 1]) for i in range(5))

    def edges_apart(a, b):
        return ((a != 0) != (b != 0)).nnz / a.nnz

    return [
        *compare(
            f"filter, normalise, log1p, HVG, z-score, PCA, {name}",
            calls["expression"],
            options,
            components_apart,
            note="difference: 1 - correlation of components",
        ),
        *compare(
            f"spatial graph, k = 6, {name}",
            calls["graph"],
            options,
            edges_apart,
            note="difference: share of edges; ties on the lattice",
        ),
        *compare(f"both, {name}", calls["both"], options, target=2),
    ]


# (e) retrieval


def embeddings(options):
    """Keys and queries (n, d) float32 of a trained model, or simulated ones in 32 clusters; what
    they are."""
    folder = None if options.quick else real("her2st")
    if folder:
        return *peers.trained_embeddings(folder), "her2st embeddings"
    rng = np.random.default_rng(0)
    centre = rng.normal(size=(32, 32 if options.quick else 256))
    drawn = (
        (centre[rng.integers(32, size=n)] + 0.5 * rng.normal(size=(n, centre.shape[1]))).astype(
            np.float32
        )
        for n in (1000, 300)
    )
    return *drawn, "simulated embeddings"


def neighbours_apart(a, b):
    """Share of neighbours that differ, (Q, k) indices each."""
    return 1 - metrics.recall_at_k(np.asarray(a), np.asarray(b))


def exact_rows(queries, keys, k, options, name):
    """Exact search of a fifth of the queries beside one bare chunked matmul + topk and
    scikit-learn's brute force."""
    part, unit = queries[: max(1, len(queries) // 5)], F.normalize(keys, dim=1)
    # on unit vectors distance orders as cosine does
    brute = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(unit.numpy())

    def bare():
        return torch.cat(
            [
                (F.normalize(q, dim=1) @ unit.T).topk(k).indices
                for q in part.split(max(1, TILE // len(keys)))
            ]
        )

    return compare(
        f"exact, {len(part):,} queries x {len(keys):,} {name} x {keys.shape[1]}, k = {k}",
        {
            "exact_topk": lambda: exact_topk(part, keys, k)[1],
            "sklearn brute force": lambda: brute.kneighbors(
                F.normalize(part, dim=1).numpy(), return_distance=False
            ),
            "bare matmul + topk": bare,
        },
        options,
        neighbours_apart,
        note="difference: share of neighbours",
    )


def chosen_probe(index, queries, exact, exact_s, k, kind, options):
    """The row of an `InvertedFile` that chooses its own probe for a recall of .95, the choice
    included in the time; exact: rows of every tenth query."""

    def search():
        probe, promised = index.probe_for(queries, k)
        return probe, promised, index.topk(queries, k, probe)[1]

    s, (probe, promised, rows) = timed(search, options.threads)
    recall = metrics.recall_at_k(rows[::10].numpy(), exact.numpy())
    return {
        "case": f"inverted file, {len(queries):,} queries, {kind}, probe {probe} chosen",
        "ours": "InvertedFile.probe_for(recall=0.95)",
        "ours_s": s,
        "peer": "exact_topk",
        "peer_s": exact_s,
        "ratio": exact_s / s,
        "recall": recall,
        "note": f"recall {recall:.3f}, promised {promised:.3f}; the choice is in the time",
    }


def retrieval(options, scratch):
    """Exact search; time and recall of the inverted file, also as <out>/cmrcnet_recall.png."""
    n_queries, n_keys, k = (200, 3000, 5) if options.quick else (options.queries, options.keys, 50)
    real_keys, real_queries, name = embeddings(options)
    rows, (figure, axis) = [], plt.subplots(figsize=(6, 4))
    for kind in ("noise", "interpolated"):
        keys, share = peers.replicate(real_keys, n_keys, kind, 0)
        queries, _ = peers.replicate(real_queries, n_queries, kind, 1)
        # the time of an exact search does not depend on the values
        if not rows:
            rows += exact_rows(queries, keys, k, options, name)
        exact, part = (
            exact_topk(queries[::10], keys, k)[1],
            queries[: max(1, len(queries) // 5)],
        )
        build_s, index = timed(lambda keys=keys: InvertedFile(keys), options.threads)
        curve, recall = [], 0.0
        for probe in (1, 8) if options.quick else (1, 4, 8, 16, 32, 64, 96, 128, 192):
            if recall > 0.99:
                break
            exact_s = timed(partial(exact_topk, part, keys, k), options.threads)[0]
            exact_s *= len(queries) / len(part)
            s, (_, found) = timed(partial(index.topk, queries, k, probe), options.threads)
            recall = metrics.recall_at_k(found[::10].numpy(), exact.numpy())
            curve.append((s, recall))
            rows += shown(
                [
                    {
                        "case": (
                            f"inverted file, {n_queries:,} queries x {n_keys:,} keys, {kind}, "
                            f"probe {probe} of {len(index.centre):,} lists"
                        ),
                        "ours": "InvertedFile",
                        "ours_s": s,
                        "peer": "exact_topk",
                        "peer_s": exact_s,
                        "ratio": exact_s / s,
                        "recall": recall,
                        "changed_variance": share,
                        "build_s": build_s,
                        "note": (
                            f"recall {recall:.3f}; one call; built in {build_s:.1f} s; exact: 5 x "
                            "a fifth, just before"
                        ),
                    }
                ]
            )
        axis.plot(*zip(*curve), "o-", label=f"inverted file, {kind}")
        rows += shown([chosen_probe(index, queries, exact, exact_s, k, kind, options)])
        axis.plot(rows[-1]["ours_s"], rows[-1]["recall"], "kx", markersize=8)
    axis.axvline(exact_s, color="black", linestyle=":", label="exact")
    axis.axhline(0.95, color="gray", linewidth=0.5)
    axis.set(
        xscale="log",
        xlabel=f"seconds for {n_queries:,} queries, {n_keys:,} keys",
        ylabel=f"recall@{k}",
    )
    axis.legend(fontsize=7)
    figure.savefig(options.out / "cmrcnet_recall.png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return rows


# The program

PARTS = {f.__name__: f for f in (attention, training, loaders, preprocessing, retrieval, ceilings)}


def measure(name, options):
    """Run one part and write <out>/<part>.json."""
    before = os.getloadavg()[0]
    torch.manual_seed(0)
    print(f"{name}:", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        rows = PARTS[name](options, scratch)
    rows = [
        {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in row.items()}
        for row in rows
    ]
    record = {
        "part": name,
        "rows": rows,
        "quick": options.quick,
        "threads": options.threads,
        "processors": os.cpu_count(),
        "load_before": before,
        "load_after": os.getloadavg()[0],
        "peak_rss_mb": run.peak_rss_mb(),
        "versions": run.versions(),
        "git_commit": run.git_commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }
    run.write_atomically(
        options.out / f"{name}.json",
        lambda f: f.write(json.dumps(record, indent=1, allow_nan=False).encode()),
    )


def main(argv=None):
    """Measure the parts asked for; print and write the table of all parts that are in the
    folder."""
    parser = argparse.ArgumentParser(prog="bench/speed.py", description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=[*PARTS, "all"])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny sizes, to see that it runs: the numbers mean nothing",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="folder of the records and the table"
    )
    parser.add_argument("--repeats", type=int, default=0, help="turns; 0: 5, or 2 with --quick")
    parser.add_argument(
        "--threads", type=int, default=0, help="threads of torch; 0 leaves its default"
    )
    parser.add_argument(
        "--spots",
        type=int,
        nargs="+",
        default=[3_600, 36_000, 360_000],
        help="attention: spots; 3600 is 151673 where it is there",
    )
    parser.add_argument("--queries", type=int, default=5_000, help="retrieval: queries")
    parser.add_argument("--keys", type=int, default=500_000, help="retrieval: keys")
    options = parser.parse_args(argv)
    options.repeats = options.repeats or (2 if options.quick else 5)
    if (
        min(options.repeats, options.queries, options.keys, *(n // 100 for n in options.spots)) < 1
        or options.threads < 0
    ):
        raise DataError(
            "--repeats, --queries and --keys must be at least 1, --spots 100, --threads 0 or "
            "more: correct them"
        )
    options.threads = options.threads or torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{options.out} cannot be made ({error.strerror}): choose another --out"
        ) from error
    for name in PARTS if options.part == "all" else [options.part]:
        measure(name, options)
    text = markdown(
        {
            name: json.loads((options.out / f"{name}.json").read_text())
            for name in PARTS
            if (options.out / f"{name}.json").is_file()
        }
    )
    run.write_atomically(options.out / "bench.md", lambda f: f.write(text.encode()))
    print(text + str(options.out / "bench.md"))
    return 0


if __name__ == "__main__":
    run.cli(main)
