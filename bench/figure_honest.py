"""What a split lets a score be, in one chart: python bench/figure_honest.py [--runs runs] [--noise
runs/honest] [--out docs/honest_evaluation.png].

Reads the records of gat_fusion.py below --runs (make reproduce-dlpfc) and those of the slice whose
genes are noise (make honest). One group of bars a
split: median of the ARI on test spots over slices, folds and seeds, from the least to the greatest;
--slices says which slices a split is to show. What has no record, or was never published, gets no
bar: it is named as missing, in the chart and on the terminal.
"""

import argparse
import re
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import DataError  # noqa: E402
from evaluation import report  # noqa: E402
from evaluation.records import layer_entry, read_runs, rows_of  # noqa: E402
from plainst import run  # noqa: E402

SPLITS = {
    "random": "random spots",
    "blocks": "held-out blocks with buffer",
    "slice": "held-out slice",
}
NOISE, PUBLISHED = (
    "graph convolution on genes of noise (simulated slice)",
    "published network: mean and standard deviation, 12 slices",
)
BARS = {
    "coords_knn": ("labels only: kNN of the coordinates", "0.75"),
    "coords_rbf": ("labels only: RBF of the coordinates", "0.55"),
    NOISE: (NOISE, "crimson"),
    PUBLISHED: (PUBLISHED, "tab:orange"),
    "smoothed_lr": ("genes: logistic regression on the neighbour mean", "tab:green"),
    "full-cross": ("genes: gat_fusion, cross-attention", "tab:blue"),
}


def values_of(records, slices=(), preset=""):
    """{split: {row: [ARI of every run]}} of the models and baselines of BARS as a preset has them;
    blocks only where the buffer covers the receptive field. Baselines once per slice and fold.

    slices: pairs (split, slice); a split that is named in one shows only the slices named with it;
    preset: '' where the records are of one. Raises DataError for several presets, and for runs
    that must not be put into one bar.
    """
    out, named = {}, {split for split, _ in slices}
    shown = (*BARS, "gcn_only")
    records = [r for r in records if r["method"] == "gat_fusion" and r["row"] in shown]
    records = [r for r in records if preset in ("", r["preset"])]
    presets = sorted({r["preset"] for r in records})
    if len(presets) > 1:
        raise DataError(
            f"the records are of the presets {', '.join(presets)}: choose one with --preset"
        )
    for (split, leaks), rows in rows_of(records, layer_entry).items():
        if split in SPLITS and not (split == "blocks" and leaks):
            for row, parts in rows.items():
                found = [
                    m["ari"]
                    for part, runs in parts.items()
                    if split not in named or (split, part) in slices
                    for m in runs
                ]
                if found and row.name in out.setdefault(split, {}):
                    raise DataError(
                        f"{row} on split {split} is not to be put into one bar with other runs of "
                        "its name: choose the slices with --slices, or another folder with --runs"
                    )
                if None in found:
                    raise DataError(f"{row} has an undefined ARI on split {split}: run it again")
                if found:
                    out[split][row.name] = found
    return out


def bars_of(real, noise):
    """{split: {bar: (middle, low, high, runs)}} of the bars that there are; `real` and `noise` are
    what values_of returns."""
    out = {}
    for split in SPLITS:
        found = real.get(split, {}) | {NOISE: noise.get(split, {}).get("gcn_only")}
        out[split] = {
            name: (statistics.median(v), min(v), max(v), len(v))
            for name in BARS
            if (v := found.get(name))
        }
        # the only split that was published
        if split == "random":
            mean, std = map(float, re.findall(r"\d*\.\d+", report.PUBLISHED["full-cross"]))
            out[split][PUBLISHED] = (mean, mean - std, mean + std, 12)
    return out


def draw(bars, noise, path):
    """The chart; a diamond on a bar of noise is the kNN of the coordinates on that same simulated
    slice."""
    figure, axis = plt.subplots(figsize=(9.5, 4.8))
    for g, split in enumerate(SPLITS):
        there = [name for name in BARS if name in bars[split]]
        for i, name in enumerate(there):
            middle, low, high, _ = bars[split][name]
            x = g + 0.14 * (i - (len(there) - 1) / 2)
            axis.bar(
                x,
                middle,
                0.125,
                color=BARS[name][1],
                hatch="//" if name == NOISE else None,
                edgecolor="white",
                linewidth=0,
            )
            axis.errorbar(
                x, middle, [[middle - low], [high - middle]], color="black", linewidth=1, capsize=2
            )
            axis.text(
                x,
                max(high, 0) + 0.015,
                f"{middle:.3f}".replace("0.", ".", 1),
                ha="center",
                fontsize=7.5,
            )
            floor = noise.get(split, {}).get("coords_knn")
            if name == NOISE and floor:
                axis.plot(
                    x,
                    statistics.median(floor),
                    "D",
                    color="black",
                    markersize=4,
                    markerfacecolor="white",
                )
        missing = [
            BARS[name][0].split(" (")[0].split(": mean")[0] for name in BARS if name not in there
        ]
        axis.text(
            g,
            -0.17,
            "\n".join(["missing:", *missing]) if missing else "",
            ha="center",
            va="top",
            fontsize=7.5,
            color="0.35",
        )
    keys = [
        axis.bar(
            0,
            0,
            color=colour,
            label=label,
            hatch="//" if label == NOISE else None,
            edgecolor="white",
            linewidth=0,
        )
        for label, colour in BARS.values()
    ]
    keys.insert(
        3,
        axis.plot(
            [],
            [],
            "D",
            color="black",
            markersize=4,
            markerfacecolor="white",
            label="labels only: kNN, on that simulated slice",
        )[0],
    )
    axis.set_xticks(range(len(SPLITS)), SPLITS.values(), fontsize=10)
    axis.set(
        ylabel="ARI on test spots, median (min-max)",
        ylim=(-0.06, 1.02),
        xlim=(-0.55, len(SPLITS) - 0.45),
    )
    axis.axhline(0, color="black", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(
        handles=keys,
        fontsize=7.5,
        frameon=False,
        loc="upper center",
        bbox_to_anchor=(0.5, 1.22),
        ncols=2,
    )
    figure.savefig(path, dpi=100, bbox_inches="tight", format="png")
    plt.close(figure)


def main(argv=None):
    """Print the bars and what is missing, write the chart; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--runs", default="runs", help="folder of the records of the real slices")
    parser.add_argument(
        "--noise",
        default="runs/honest",
        help="folder of the records of the slice whose genes are noise",
    )
    parser.add_argument(
        "--slices",
        nargs="*",
        default=[],
        metavar="SPLIT:SLICE",
        help="e.g. blocks:151673; a split not named shows all",
    )
    parser.add_argument("--preset", default="", help="which one, where the records are of several")
    parser.add_argument("--out", default="docs/honest_evaluation.png", help="file to write")
    options = parser.parse_args(argv)
    wrong = [
        pair for pair in options.slices if pair.split(":")[0] not in SPLITS or pair.count(":") != 1
    ]
    if wrong:
        raise DataError(
            f"--slices {wrong[0]} is not one of {', '.join(f'{s}:<slice>' for s in SPLITS)}: "
            "write for example blocks:151673"
        )
    real = values_of(
        read_runs(options.runs),
        [tuple(pair.split(":")) for pair in options.slices],
        options.preset,
    )
    noise = values_of(read_runs(options.noise), preset=options.preset)
    bars = bars_of(real, noise)
    for split, title in SPLITS.items():
        for name, (label, _) in BARS.items():
            middle, low, high, n = bars[split].get(name, (None, None, None, 0))
            print(
                f"{title:<28} {label:<58} "
                + (f"{middle:.3f} ({low:.3f}-{high:.3f}), {n} values" if n else "missing")
            )
    draw(bars, noise, options.out)
    print(options.out)
    return 0


if __name__ == "__main__":
    run.cli(main)
