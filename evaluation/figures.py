"""Every picture: what a method or the report computed, drawn. Nothing here computes a score."""

import io
import textwrap
from collections import defaultdict
from dataclasses import dataclass

import matplotlib
import numpy as np
from scipy.optimize import linear_sum_assignment

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from plainst.readers.checked import NPZ_ERRORS, DataError  # noqa: E402

# --------------------------------------------------------------------------------------------------
# Report
# --------------------------------------------------------------------------------------------------


def png_of(figure):
    """A figure as PNG bytes; it is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    plt.close(figure)
    return buffer.getvalue()


def layer_maps(records):
    """{slice: [(title, xy (N, 2), code (N,))]}: the annotation, then the first seed of the layer
    and domain runs; first one of every method and split, its main variant, then the others.

    Domains carry no names: each takes the colour of a layer by the assignment that agrees with the
    annotation most (drawing only, no score). Raises DataError where arrays.npz is damaged.
    """
    maps, rank = {}, defaultdict(int)
    for r in sorted(records, key=_main_variant_first):
        path = r["path"].parent / "arrays.npz"
        if "ari" not in r["metrics"] or not path.is_file():
            continue
        try:
            with np.load(path, allow_pickle=False) as arrays:
                code = next((arrays[k] for k in ("pred", "domains") if k in arrays), None)
                if code is None or "labels" not in arrays or not (arrays["labels"] >= 0).any():
                    continue
                xy, labels = arrays["xy"], arrays["labels"]
        except NPZ_ERRORS as error:
            raise DataError(
                f"{path} cannot be read ({error}): delete its folder and run again"
            ) from error
        name, title = f"{r['data']} {r['part']}", f"{r['method']}\n{r['variant']}"
        of_slice = maps.setdefault(name, {"annotation": ((-1,), xy, labels)})
        if title not in of_slice:
            if r["split"] is None:
                code = _recoloured(code, labels)
            group = (name, r["method"], (r["split"] or {}).get("name"))
            of_slice[title] = ((rank[group], len(of_slice)), xy, code)
            rank[group] += 1
    return {
        name: [
            (title, xy, code)
            for title, (_, xy, code) in sorted(of_slice.items(), key=lambda item: item[1][0])
        ]
        for name, of_slice in maps.items()
    }


def _main_variant_first(record):
    """Sort key of a record: method, main variant, variant, seed."""
    variant, seed = record["variant"], record.get("config", {}).get("seed", 0)
    return record["method"], not variant.endswith(("full-cross", "default")), variant, seed


def _recoloured(domains, labels):
    """(N,) domains as the codes of the labels that they agree with most, one to one."""
    rows = labels >= 0
    agree = np.zeros((domains.max() + 1, max(labels.max(), domains.max()) + 1))
    np.add.at(agree, (domains[rows], labels[rows]), 1)
    return linear_sum_assignment(-agree)[1][domains]


def draw_maps(maps, most=12):
    """A grid: a row a slice, the annotation first; `most` maps a slice at most, so that they can be
    read."""
    width = min(max(map(len, maps.values())), most)
    figure, axes = plt.subplots(
        len(maps), width, figsize=(2.1 * width, 2.4 * len(maps)), squeeze=False
    )
    for axes_of_slice, (name, row) in zip(axes, sorted(maps.items())):
        for axis in axes_of_slice:
            axis.axis("off")
        for axis, (title, xy, code) in zip(axes_of_slice, row[:most]):
            axis.scatter(
                *xy.T,
                s=1.2,
                c=np.where(code < 0, np.nan, code),
                cmap="tab10",
                vmin=0,
                vmax=9,
                linewidths=0,
            )
            axis.set_aspect("equal")
            axis.invert_yaxis()
            more = f" ({len(row) - most} more not drawn)" if len(row) > most else ""
            axis.set_title(f"{name}{more}\n{title}" if title == "annotation" else title, fontsize=6)
    figure.tight_layout()
    return figure


@dataclass
class Panel:
    """Dots {row: {slice or fold: [score of every run]}}, rows from top to bottom; `floor` is the
    score of the baseline to beat, or None."""

    title: str
    axis: str
    rows: dict
    floor: float | None


def draw_scores(panels):
    """Dots, one a run: a panel a table, one line a row of it; dashed: the baseline to beat."""
    columns = min(len(panels), 3)
    heights = [
        0.9 + 0.24 * max(len(panel.rows) for panel in panels[i : i + columns])
        for i in range(0, len(panels), columns)
    ]
    figure, axes = plt.subplots(
        len(heights),
        columns,
        squeeze=False,
        figsize=(5.6 * columns, sum(heights) + 0.5),
        height_ratios=heights,
        layout="constrained",
    )
    parts = sorted({part for panel in panels for row in panel.rows.values() for part in row})
    colour = {part: plt.get_cmap("tab10")(i % 10) for i, part in enumerate(parts)}
    legend = {}
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, panel in zip(axes.flat, panels):
        names = list(panel.rows)[::-1]
        for y, name in enumerate(names):
            for part, scores in panel.rows[name].items():
                legend[part] = axis.scatter(
                    scores, [y] * len(scores), s=22, alpha=0.75, color=colour[part], linewidths=0
                )
        if panel.floor is not None:
            axis.axvline(panel.floor, ls="--", color="0.5", lw=1)
        axis.set(yticks=range(len(names)), yticklabels=names, xlabel=panel.axis, xlim=(-0.1, 1.02))
        axis.tick_params(axis="y", labelsize=7)
        axis.set_title(textwrap.fill(panel.title, 44), fontsize=9)
        axis.grid(axis="x", color="0.92")
    figure.legend(
        [legend[part] for part in sorted(legend)],
        sorted(legend),
        loc="outside lower center",
        ncols=8,
        fontsize=8,
        frameon=False,
    )
    return figure
