"""Time and memory against the number of spots, on simulated slides: python bench/scale.py
gat_fusion|multist|stformer|hd|all [--out runs/scale] (make scale).

Every size is a process of its own, whose record is kept: an interrupted run goes on. gat_fusion and
multist: from the files of a simulated cortex of 1,000 genes to domains or layers, every stage of
the default flags but for few epochs and, at a million spots, compact tiles with a halo (--tile);
the `_wide` parts have 4,000 genes, of which 3,000 are used. The baselines of gat_fusion are left
out: gat_fusion.py itself times them. stformer: one forward and backward pass of the small preset,
recomputed layers. hd: a simulated Visium HD folder, 600,000 bins x 18,000 genes, through
multist.py, genes only (the features of an image crop take some 5 ms a bin). Writes
scale_<part>.json and .png.
"""

import argparse
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import gat_fusion  # noqa: E402
import multist  # noqa: E402
import stformer  # noqa: E402
from evaluation import clustering, domains, downstream, layers, samples, signalling  # noqa: E402
from plainst import graphs, run, simulate, tiles  # noqa: E402

SIZES = {
    "gat_fusion": (10_000, 100_000, 1_000_000),
    "multist": (10_000, 100_000, 1_000_000),
    "stformer": (5_000, 20_000, 100_000),
    "gat_fusion_wide": (100_000,),
    "multist_wide": (100_000,),
}
TILE = 50_000  # at a million spots
LIMIT_GB = {
    "gat_fusion": {100_000: 8, 1_000_000: 16},
    "multist": {100_000: 8, 1_000_000: 16},
    "hd": {600_000: 20},
}
LIMIT_GB |= {"gat_fusion_wide": {100_000: 8}, "multist_wide": {100_000: 8}}
EPOCHS = 3
# seconds in which a short stage is measured again: up to 3 and up to 25 times
AGAIN, OFTEN = 20.0, 1.0


class Clock:
    """Seconds of named stages; peak resident memory after each."""

    def __init__(self):
        self.seconds, self.peak, self.last = {}, {}, time.perf_counter()

    def lap(self, name, times=1):
        """Note what passed since the last lap, divided by `times`."""
        now = time.perf_counter()
        self.seconds[name], self.last, self.peak[name] = (
            (now - self.last) / times,
            now,
            run.peak_rss_mb(),
        )

    def median(self, name, work):
        """What `work` returns, timed as the median of up to three times, of which none begins later
        than AGAIN seconds after the first; of work of milliseconds up to 25, within OFTEN
        seconds."""
        seconds, begin, found = [], time.perf_counter(), None
        while not seconds or time.perf_counter() - begin < (
            AGAIN if len(seconds) < 3 else OFTEN if len(seconds) < 25 else 0
        ):
            # the last result is gone before the next one is made
            found, start = None, time.perf_counter()
            found = work()
            seconds.append(time.perf_counter() - start)
        self.lap(name)
        self.seconds[name] = float(np.median(seconds))
        return found


def cortex(folder, n, n_genes):
    """Path of a simulated slide of n spots, made where it is lacking."""
    path = folder / f"cortex{n}x{n_genes}"
    if not path.is_dir():
        simulate.write_visium(simulate.simulate_cortex(n, n_genes), path)
    return path


def one_gat_fusion(folder, n, n_genes=1000):
    """Load, inputs, graph, epochs (each a step of training a tile and a pass over all spots),
    prediction."""
    clock, path = Clock(), str(cortex(folder, n, n_genes))
    config = gat_fusion.Config(data=path, epochs=EPOCHS, tile=TILE if n > 100_000 else 0)
    mode = gat_fusion.MODES[config.mode]
    clock.lap("simulation, or nothing")
    slides = clock.median("load", lambda: layers.load(config, mode))

    def inputs():
        task = layers.Task(config, mode, slides)
        task.x  # noqa: B018 - made on first use
        return task

    task = clock.median("inputs", inputs)
    clock.median("graph", lambda: task.table(config.k))
    run.seed_everything(0)
    model, *_ = gat_fusion.train(task, torch.device("cpu"))
    # train ends with a pass of prediction and makes its graph again
    clock.lap("epoch", EPOCHS + 1)

    def inference():
        parts = task.tiles(tiles.prediction_size(config.tile, "cpu"), "cpu")
        return layers.predict(model, parts, n, config)

    clock.median("inference", inference)
    return clock


def one_multist(folder, n, n_genes=1000):
    """Load, inputs, graph, Stages I to III, clustering with diffusion, downstream scores."""
    clock, path = Clock(), cortex(folder, n, n_genes)
    clock.lap("simulation, or nothing")
    config = multist.Config(
        data=str(path),
        branches="serial",
        gan="off",
        epochs=EPOCHS,
        dec_epochs=EPOCHS,
        fusion_epochs=1,
        n_starts=1,
        permutations=20,
        runs=str(folder),
        tile=TILE if n > 100_000 else 0,
    )
    slide = clock.median("load", lambda: data.load_slide(config.data))
    x = clock.median("inputs", lambda: torch.as_tensor(domains.preprocess(slide, config)))
    graph = clock.median("graph", lambda: graphs.Graph(slide.xy, config.k))
    run.seed_everything(0)
    model, optimiser, adversary = multist.train_stage1(x, graph, config, [])
    clock.lap("Stage I, epoch", EPOCHS)
    clock.median("inference", lambda: model.embed(x, graph))
    epochs = multist.train_stage2(model, optimiser, adversary, x, graph, 7, config, [])
    clock.lap("Stage II with k-means, epoch", epochs)
    z = model.embed(x, graph)
    # random batches read most of the image embeddings of a small slide, and 128 each of a large one
    if n <= 10_000:
        f = torch.as_tensor(domains.image_features(slide, config, "cpu"))
        multist.train_stage3(z, f, slide.xy, config, [])
    h = z.numpy()
    clock.lap("image features, Stage III, epoch")
    labels = clock.median(
        "clustering",
        lambda: clustering.diffuse_labels(clustering.gmm_tied(h, 7, config.n_starts)[0], slide.xy),
    )
    log = domains.log_matrix(slide, config)
    times, _ = downstream.compared_times(
        slide, log, {"gene": h}, "gene", x.numpy(), labels, config.root_gene
    )
    clock.median(
        "downstream",
        lambda: downstream.downstream(slide, log, times, labels, None, draws=20),
    )
    return clock


def one_stformer(folder, n):
    """Graph, and processor seconds of forward + backward over all threads (a busy machine does not
    change them much): 768 features, 1,000 genes."""
    clock, side = Clock(), int(np.ceil(n**0.5))
    grid, rng = np.stack(np.divmod(np.arange(n), side), 1), np.random.default_rng(0)
    graph = samples.neighbourhood(
        data.Slide(None, np.array([]), np.arange(n).astype(str), grid * 100.0, grid), 2
    )
    clock.lap("graph")
    y = torch.tensor(rng.random((n, 1000), dtype=np.float32))
    sample = samples.Sample(
        "a",
        "a",
        torch.tensor(rng.standard_normal((n, 768), dtype=np.float32)),
        *graph,
        y,
        y,
        torch.full((n,), 1e4),
        torch.ones(n, dtype=torch.bool),
        torch.ones(1000, dtype=torch.bool),
    )
    config = stformer.Config(size="small", checkpointing=True)
    model = stformer.PathwayTransformer(config, 768, 1000, 50)
    batch, start = samples.collate([sample]), time.process_time()
    out = model(**batch)["genes"]
    (
        stformer.masked_mse(out, batch["y"], batch["scored"])
        + stformer.pcc_loss(out, batch["y"], batch["scored"])
    ).backward()
    clock.lap("step")
    clock.seconds["step"] = time.process_time() - start
    return clock


def hd_slide(n_bins, n_genes, umi=150.0, seed=0):
    """A slide of square bins with few UMIs each: Poisson totals around `umi`, each UMI of a gene
    drawn from the bin's layer. The layers, the names of the genes and the picture are those of
    simulate_cortex; the first genes bear the names of ligands and receptors."""
    rng, side = np.random.default_rng(seed), int(np.ceil(n_bins**0.5))
    grid = np.stack(np.divmod(np.arange(n_bins), side), 1)  # (N, 2)
    small = simulate.simulate_cortex(20_000, 50, seed=seed)
    low, span = small.xy.min(0), np.ptp(small.xy, axis=0)
    # bins cover the frame of the small slide
    xy = low + grid[:, ::-1] / side * span
    labels = small.labels[data.knn_table(small.xy, 1, query=xy)[:, 0]]
    genes, base, fold = simulate.gene_programs(n_genes, 7, 0)
    genes = np.array(
        [*dict.fromkeys(name for pair in signalling.PAIRS for name in pair), *genes.tolist()]
    )[:n_genes]
    # (C + 1, G), the last for bins without a label
    share = np.exp(base + np.concatenate([fold, np.zeros((1, n_genes))]))
    total = rng.poisson(umi * rng.lognormal(0, 0.5, n_bins))
    drawn = np.empty(total.sum(), np.int32)
    row = np.repeat(np.arange(n_bins, dtype=np.int32), total)
    for c in range(-1, 7):
        here = labels[row] == c
        cumulated = np.cumsum(share[c])
        drawn[here] = np.searchsorted(cumulated / cumulated[-1], rng.random(here.sum()))
    # equal places are summed
    counts = data.sp.csr_matrix(
        (np.ones(len(row), np.int32), (row, np.minimum(drawn, n_genes - 1))), (n_bins, n_genes)
    )
    names = np.array([f"s_008um_{r:05d}_{c:05d}-1" for r, c in grid.tolist()])
    um = 8 / (span[0] / side)
    return data.Slide(
        counts,
        genes,
        names,
        xy,
        grid,
        labels,
        small.classes,
        small.image,
        small.image_scale,
        None,
        um,
        "square_008um",
        "SimA",
        "simulated",
        np.asarray(counts.sum(1), np.float64).ravel(),
    )


def one_hd(folder, n):
    """Files -> domains, through the program and its record."""
    home = folder / f"hd{n}"
    binned = home / "binned_outputs" / "square_008um"
    if not binned.is_dir():
        slide = hd_slide(n, 18_000 if n > 10_000 else 300)
        simulate.write_visium(slide, binned, layout="parquet")
        scales = binned / "spatial" / "scalefactors_json.json"
        run.write_atomically(
            scales,
            lambda f: f.write(
                json.dumps(
                    json.loads(scales.read_text())
                    | {"bin_size_um": 8.0, "microns_per_pixel": slide.um_per_px}
                ).encode()
            ),
        )
        del slide
    short = [
        "--image",
        "off",
        "--epochs",
        EPOCHS,
        "--dec_epochs",
        EPOCHS,
        "--n_starts",
        1,
        "--permutations",
        20,
        "--tile",
        TILE,
    ]
    subprocess.run(
        [
            sys.executable,
            ROOT / "multist.py",
            "--data",
            binned,
            "--runs",
            home / "runs",
            *map(str, short),
        ],
        check=True,
        stdout=sys.stderr,
    )
    told = json.loads(next((home / "runs").rglob("run.json")).read_text())
    clock = Clock()
    clock.seconds, clock.peak = told["laps"], {"all": told["peak_rss_mb"]}
    return clock


ONE = {
    "gat_fusion": one_gat_fusion,
    "multist": one_multist,
    "stformer": one_stformer,
    "hd": one_hd,
    "gat_fusion_wide": partial(one_gat_fusion, n_genes=4000),
    "multist_wide": partial(one_multist, n_genes=4000),
}


def record(part, folder, n):
    """The measurement of n spots, made in a process of its own where it is lacking."""
    path = folder / f"{part}_{n}.json"
    if not path.is_file():
        subprocess.run(
            [sys.executable, __file__, part, "--out", folder, "--size", str(n)], check=True
        )
    return json.loads(path.read_text())


def slope(sizes, seconds):
    """Least-squares slope of log seconds over log spots."""
    return float(np.polyfit(np.log(sizes), np.log(np.maximum(seconds, 1e-3)), 1)[0])


def report(part, sizes, folder, axes):
    """Rows of one part; prints them, draws them."""
    found = [record(part, folder, n) for n in sizes]
    rows = {"sizes": list(sizes), "peak_mb": [max(r["peak"].values()) for r in found], "stages": {}}
    stages = [s for s in found[0]["seconds"] if not s.startswith("simulation")]
    for stage in [*stages, "sum"]:
        seconds = [
            sum(r["seconds"][s] for s in stages) if stage == "sum" else r["seconds"][stage]
            for r in found
        ]
        rows["stages"][stage] = {
            "seconds": seconds,
            "slope": slope(sizes, seconds) if len(sizes) > 1 else None,
        }
        told = "" if len(sizes) == 1 else f"   slope {rows['stages'][stage]['slope']:.2f}"
        print(f"{part:11s}{stage:34s}" + "".join(f"{s:10.2f}" for s in seconds) + told)
        axes[0].loglog(
            sizes,
            np.maximum(seconds, 1e-3),
            marker="o" if stage == "sum" else ".",
            lw=2 if stage == "sum" else 1,
            color="black" if stage == "sum" else None,
            label=stage + told,
        )
    print(f"{part:11s}{'peak memory, MB':34s}" + "".join(f"{mb:10.0f}" for mb in rows["peak_mb"]))
    axes[0].loglog(
        sizes, [seconds[0] * n / sizes[0] for n in sizes], ls=":", color="0.5", label="linear"
    )
    axes[0].set(
        xlabel="spots", ylabel="processor seconds" if part == "stformer" else "seconds", title=part
    )
    axes[0].legend(fontsize=6, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes[1].loglog(sizes, rows["peak_mb"], marker="o", color="black")
    for n, gb in LIMIT_GB.get(part, {}).items():
        axes[1].plot(n, gb * 1024, marker="_", ms=14, color="crimson")
    axes[1].set(xlabel="spots", ylabel="peak memory, MB", ylim=(100, 40000))
    return rows


def main():
    """Print the tables, write figure and record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=[*ONE, "all"])
    parser.add_argument("--out", type=Path, default=Path("runs/scale"))
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=None, help="spots, instead of the default sizes"
    )
    parser.add_argument(
        "--size", type=int, default=0, help="measure this size in this process and keep its record"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.size:
        clock = ONE[options.part](options.out, options.size)
        text = json.dumps(
            {
                "seconds": clock.seconds,
                "peak": clock.peak,
                "git_commit": run.git_commit(),
                "threads": torch.get_num_threads(),
            },
            indent=1,
        )
        run.write_atomically(
            options.out / f"{options.part}_{options.size}.json", lambda f: f.write(text.encode())
        )
        return
    parts = list(ONE) if options.part == "all" else [options.part]
    figure, axes = plt.subplots(len(parts), 2, figsize=(11, 3.4 * len(parts)), squeeze=False)
    found = {
        p: report(p, options.sizes or SIZES.get(p, (600_000,)), options.out, row)
        for p, row in zip(parts, axes)
    }
    figure.tight_layout()
    figure.savefig(options.out / f"scale_{options.part}.png", dpi=110)
    (options.out / f"scale_{options.part}.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
