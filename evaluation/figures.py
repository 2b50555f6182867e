"""Every picture: of a run, and of the report over many runs."""

import io
import textwrap
from collections import defaultdict
from dataclasses import dataclass

import matplotlib
import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

import metrics
from evaluation.cells import detected_genes
from evaluation.clustering import match_classes
from plainst.readers.checked import NPZ_ERRORS, DataError

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# --------------------------------------------------------------------------------------------------
# spatia
# --------------------------------------------------------------------------------------------------


def rgb_picture(x):
    """(C, S, S) uint8 -> (S, S, 3): the channels as red, green, blue; one channel is grey."""
    x = x[:3] if len(x) > 1 else x.repeat(3, 0)
    empty = np.zeros((3 - len(x), *x.shape[1:]), x.dtype)
    return np.concatenate([x, empty]).transpose(1, 2, 0)


def draw_generated(dataset, expression, probes, generated):
    """Real above generated cells, by fifths of the gene that goes with the area of the others.

    expression (n, G), probes (n, 3) of the real pictures, generated (n, C, S, S) -> figure.
    """
    rows = dataset.rows["test"]
    # of the others; of the only channel where there is one
    area = np.repeat(probes[:, min(1, probes.shape[1] - 1)][:, None], expression.shape[1], 1)
    r = np.nan_to_num(metrics.pcc(expression, area))
    gene = int(np.argmax(np.where(detected_genes(dataset), np.abs(r), -1)))
    fifths = np.array_split(np.argsort(expression[:, gene], kind="stable"), 5)
    figure, axes = plt.subplots(10, 8, figsize=(8, 10.5))
    for axis in axes.flat:
        axis.set_axis_off()
    for i, fifth in enumerate(fifths):
        places = np.linspace(0, len(fifth) - 1, min(8, len(fifth))).astype(int)
        for j, cell in enumerate(fifth[places]):
            axes[2 * i, j].imshow(rgb_picture(dataset.cells.crops[rows[cell]]))
            axes[2 * i + 1, j].imshow(rgb_picture(generated[cell]))
        title = f"{dataset.cells.genes[gene]}, fifth {i + 1}: real above, generated below"
        axes[2 * i, 0].set_title(title, fontsize=7, loc="left")
    return figure


def draw_embedding(dataset, z, losses):
    """The embedding z (N, d) of the scored cells as colours in the tissue and as two components,
    and the loss of every stage, {name: values} -> figure."""
    rows = dataset.rows["test"]
    section, xy, labels = (
        a[rows] for a in (dataset.cells.section, dataset.cells.xy, dataset.cells.labels)
    )
    figure, axes = plt.subplots(1, 3, figsize=(12, 4))
    colour = PCA(3).fit_transform(z[rows])
    low, high = np.percentile(colour, 2, 0), np.percentile(colour, 98, 0)
    colour = np.clip((colour - low) / (high - low + 1e-9), 0, 1)
    is_shown = section == section[0]
    axes[0].scatter(*xy[is_shown].T, c=colour[is_shown], s=8, linewidths=0)
    axes[0].set(title="first three components of z as colours", aspect="equal")
    axes[0].invert_yaxis()
    has_labels = (labels >= 0).any()
    style = {"c": labels, "cmap": "tab10"} if has_labels else {"c": colour}
    axes[1].scatter(*PCA(2).fit_transform(z[rows]).T, s=6, linewidths=0, **style)
    axes[1].set_title("z, two components" + (", coloured by class" if has_labels else ""))
    for name, values in losses.items():
        smooth = np.convolve(values, np.ones(20) / 20, "valid") if len(values) > 60 else values
        axes[2].plot(np.linspace(0, 1, len(smooth)), smooth, label=name)
    axes[2].set(title="loss of the stages", xlabel="share of the steps")
    axes[2].legend()
    return figure


def draw_cells(record, dataset, arrays, z, losses):
    """Both figures of a run on cells, kept in `record`: generated beside real cells where there are
    any, the embedding z (N, d) and the losses."""
    if "generated" in arrays:
        real = arrays["expression"], arrays["probes_real"]
        record.figure("generated", draw_generated(dataset, *real, arrays["generated"]))
    record.figure("embedding", draw_embedding(dataset, z, losses))
    plt.close("all")


# --------------------------------------------------------------------------------------------------
# Genes from H&E
# --------------------------------------------------------------------------------------------------


def maps(rows, xy):
    """Figure of maps: rows of (title, values (S,)), each on its own colour scale from the 2nd to
    the 98th percentile."""
    n_columns = max(map(len, rows))
    size = (2.6 * n_columns, 2.7 * len(rows))
    figure, axes = plt.subplots(len(rows), n_columns, figsize=size, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for row_of_axes, row in zip(axes, rows):
        for axis, (title, values) in zip(row_of_axes, row):
            low, high = np.nanpercentile(values, (2, 98))
            axis.scatter(
                *xy.T,
                c=values,
                s=max(0.3, 5000 / len(xy)),
                linewidths=0,
                vmin=low,
                vmax=high if high > low else low + 1,
                cmap="viridis",
            )
            axis.set_title(title, fontsize=8)
            axis.set_aspect("equal")
            axis.invert_yaxis()
    return figure


def most_varied_maps(values, names, xy):
    """Maps of the ten columns of values (S, C) that vary most, five a row."""
    order = np.argsort(-values.std(0))[:10]
    halves = [order[:5], order[5:]] if len(order) > 5 else [order]
    return maps([[(names[j], values[:, j]) for j in half] for half in halves], xy)


def gene_maps(sample, predicted, genes, n_targets=None):
    """True and predicted maps of the five best and the five worst of the first n_targets genes of a
    slide; without truth of the genes that vary most."""
    xy, predicted = sample.slide.xy, np.asarray(predicted)
    if sample.y is None:
        return most_varied_maps(predicted, genes, xy)
    true, scored = np.asarray(sample.y), np.asarray(sample.scored)
    r = metrics.scored_pcc(true[scored], predicted[scored])
    r = np.where(np.asarray(sample.measured), r, np.nan)[:n_targets]
    order = [j for j in np.argsort(-r) if np.isfinite(r[j])]
    shown = np.where(scored[:, None], true, np.nan)
    rows = []
    for side in (order[:5], order[-5:]):
        rows.append([(f"{genes[j]} true", shown[:, j]) for j in side])
        rows.append([(f"{genes[j]} predicted, r {r[j]:.2f}", predicted[:, j]) for j in side])
    return maps(rows, xy)


def gene_gene_maps(true, predicted):
    """Correlations between genes beside each other: true, predicted (N, G)."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 4))
    for axis, title, x in zip(axes, ("true", "predicted"), (true, predicted)):
        axis.imshow(np.corrcoef(x[:, x.std(0) > 0].T), vmin=-1, vmax=1, cmap="RdBu_r")
        axis.set_title(f"gene-gene correlation, {title}")
    return figure


def training_curves(losses, scores, title, guess=None):
    """Losses {label: [one an epoch]} beside validation scores {label: the same}; guess: the loss of
    random guessing, drawn as a line on a logarithmic axis."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3))
    for axis, curves in zip(axes, (losses, scores)):
        for label, values in curves.items():
            axis.plot(values, label=label)
        if curves:
            axis.legend(fontsize=7)
    if guess is not None:
        axes[0].axhline(guess, color="gray", linestyle=":", label="log(batch): guessing")
        axes[0].set_yscale("log")
        axes[0].legend(fontsize=7)
    axes[0].set(xlabel="epoch", title="training loss")
    axes[1].set(xlabel="epoch", title=title)
    return figure


def pcc_by_k(curve, k):
    """PCC against the number of neighbours, {k: PCC}; a line at the run's own k."""
    figure, axis = plt.subplots(figsize=(4, 3))
    axis.plot(list(curve), list(curve.values()), "o-")
    axis.axvline(k, color="gray", linestyle=":")
    axis.set(xscale="log", xlabel="neighbours k", ylabel="mean PCC, test slides")
    return figure


def close():
    """Forget all figures of pyplot; those that a run keeps are saved when it finishes."""
    plt.close("all")


# --------------------------------------------------------------------------------------------------
# gat_fusion
# --------------------------------------------------------------------------------------------------


def draw_gat_fusion(record, slide, arrays, history):
    """The pictures of a gat_fusion run: truth, prediction, coordinates-only and errors on the
    tissue; with a history (epochs, 2), loss and validation ARI; with `attention`, that of the last
    layer.

    arrays: as in the record, labels, test (N,) and classes, perhaps pred, pred_coords_knn (N,) and
    attention (N, heads, k).
    """
    record.figure("tissue", draw_layers(slide.xy, arrays))
    if history is not None:
        record.figure("training", draw_history(history))
    if "attention" in arrays:
        record.figure("attention", draw_attention(slide.xy, arrays["attention"]))
    plt.close("all")


def dot_size(xy):
    """Area of a spot's dot in a panel of 4.4 inches."""
    return max(0.5, 12000 / len(xy))


def as_tissue(axis):
    """Axes of a slide: equal units, y down, no ticks."""
    axis.set(aspect="equal", xticks=[], yticks=[])
    axis.invert_yaxis()


def draw_layers(xy, arrays):
    """Side by side the truth and, as far as the arrays hold them, the prediction, the vote of
    coordinates and the errors of the prediction."""
    titles = {
        "labels": "truth",
        "pred": "prediction",
        "pred_coords_knn": "coordinates only, no gene",
    }
    panels = [(title, arrays[name]) for name, title in titles.items() if name in arrays]
    n_axes = len(panels) + ("pred" in arrays)
    figure, axes = plt.subplots(1, n_axes, figsize=(4.4 * n_axes, 4.4), squeeze=False)
    axes, size, palette = axes[0], dot_size(xy), plt.get_cmap("tab10")
    for axis, (title, codes) in zip(axes, panels):
        for c, name in enumerate(arrays["classes"]):
            axis.scatter(*xy[codes == c].T, s=size, color=palette(c % 10), label=name, linewidths=0)
        axis.set_title(title)
    if "pred" in arrays:
        draw_errors(axes[-1], xy, arrays, size)
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="lower center",
        ncols=len(arrays["classes"]),
        markerscale=4,
        frameon=False,
    )
    for axis in axes:
        as_tissue(axis)
    return figure


def draw_errors(axis, xy, arrays, size):
    """The test spots whose prediction is wrong, among all spots."""
    is_wrong = (arrays["labels"] != arrays["pred"]) & arrays["test"]
    axis.scatter(*xy.T, s=size, color="0.88", linewidths=0)
    axis.scatter(*xy[arrays["test"]].T, s=size, color="0.65", linewidths=0)
    axis.scatter(*xy[is_wrong].T, s=size * 1.5, color="crimson", linewidths=0)
    axis.set_title(f"errors: {is_wrong.sum()} of {arrays['test'].sum()} test spots")


def draw_history(history):
    """Loss and validation ARI (epochs, 2) over the epochs."""
    figure, axis = plt.subplots(figsize=(5, 3))
    axis.plot(history[:, 0], color="0.4", label="training cross-entropy")
    axis.plot(history[:, 1], color="crimson", label="validation ARI")
    axis.set_xlabel("epoch")
    axis.legend()
    return figure


def draw_attention(xy, attention):
    """Entropy of the mean attention of the heads (N, heads, k) over the k neighbours, on the
    tissue."""
    alpha = attention.mean(1)  # (N, k)
    entropy = -(alpha * np.log(np.maximum(alpha, 1e-12))).sum(1) / np.log(alpha.shape[1])
    figure, axis = plt.subplots(figsize=(5, 4.4))
    dots = axis.scatter(*xy.T, s=dot_size(xy), c=entropy, linewidths=0)
    figure.colorbar(dots, label="attention entropy / log k (1 = plain mean)")
    as_tissue(axis)
    return figure


def draw_embedding_map(embedding, labels, pred, classes, most=3000):
    """t-SNE of at most `most` spots, evenly spaced rows of embedding (N, D), coloured by annotated
    labels (N,), -1 = none, and by predicted ones."""
    rows = np.arange(0, len(embedding), max(1, -(-len(embedding) // most)))
    places = TSNE(random_state=0, init="pca").fit_transform(embedding[rows])  # (n, 2)
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.6))
    palette = plt.get_cmap("tab10")
    for axis, title, codes in zip(axes, ("annotated", "predicted"), (labels[rows], pred[rows])):
        for c, name in enumerate(classes):
            is_shown = codes == c
            axis.scatter(*places[is_shown].T, s=4, color=palette(c % 10), label=name, linewidths=0)
        axis.set(title=f"fused embedding, {title} layer", xticks=[], yticks=[])
    handles = axes[1].get_legend_handles_labels()
    figure.legend(*handles, loc="lower center", ncols=len(classes), markerscale=4, frameon=False)
    return figure


def draw_gene_changes(drop, genes, classes, n_top=8):
    """For each class the genes with the largest drop (S, C) of its log-probability, beside what 95
    % of all genes stay below (dashed)."""
    figure, axes = plt.subplots(1, len(classes), figsize=(2.1 * len(classes), 2.6), squeeze=False)
    for c, axis in enumerate(axes[0]):
        top = np.argsort(-drop[:, c])[:n_top][::-1]
        axis.barh([genes[j] for j in top], drop[top, c], color="tab:blue")
        axis.axvline(np.percentile(drop[:, c], 95), color="0.3", linestyle="--")
        axis.set_title(classes[c], fontsize=9)
        axis.tick_params(labelsize=7)
    figure.supxlabel("mean loss of log-probability with the gene set to zero (nats)", fontsize=8)
    figure.tight_layout()
    return figure


# --------------------------------------------------------------------------------------------------
# multist
# --------------------------------------------------------------------------------------------------


def draw_multist(record, slide, arrays, log, final):
    """Give `record` the figures of a run: domains before and after diffusion beside the annotation;
    pseudotime; attention entropy; ligand-receptor scores; losses.

    arrays: what the run writes; log: rows of loss terms; final: name of the embedding that counts.
    """
    panels = {}
    for name in dict.fromkeys(["gene", final]):
        panels[f"{name}, before diffusion"] = arrays[f"labels_{name}_raw"]
        panels[f"{name} + diffusion"] = arrays[f"labels_{name}"]
    record.figure("domains", draw_domains(slide, panels))
    for name, label in (
        ("pseudotime", "pseudotime"),
        ("attention_entropy", "attention entropy / log m (1 = plain mean)"),
    ):
        if name in arrays and np.isfinite(arrays[name]).any():
            record.figure(name, draw_values(slide, arrays[name], label))
    if len(arrays.get("lr_pairs", [])):
        names = domain_names(slide, arrays["domains"])
        best = np.nanmin(arrays["lr_p"], axis=(1, 2), initial=1.0)
        rows = np.sort(np.argsort(best, kind="stable")[:40])
        shown = {name: arrays[name][rows] for name in ("lr_score", "lr_q", "lr_pairs")}
        record.figure("ligand_receptor", draw_pairs(shown, names))
    record.figure("losses", draw_losses(log))
    plt.close("all")


def draw_tissue(axis, slide, values, title, **options):
    """Spots in their places, coloured by `values`; y downwards. -> what a colour bar needs."""
    size = max(0.3, 14000 / slide.n_spots)
    spots = axis.scatter(*slide.xy.T, s=size, c=values, linewidths=0, **options)
    axis.set_title(title)
    as_tissue(axis)
    return spots


def draw_domains(slide, domains_by_title):
    """Figure: {title: domains (N,)} beside the annotation where there is one, in the colours of the
    classes that the domains overlap most."""
    panels = {"annotation": slide.labels} if (slide.labels >= 0).any() else {}
    panels |= {
        title: match_classes(domains, slide.labels) for title, domains in domains_by_title.items()
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 4.2), squeeze=False)
    for axis, (title, values) in zip(axes[0], panels.items()):
        colours = plt.get_cmap("tab20" if values.max() > 9 else "tab10")(values % 20)
        colours[values < 0] = (0.9, 0.9, 0.9, 1)
        draw_tissue(axis, slide, colours, title)
    return figure


def draw_values(slide, values, label):
    """Figure: a number of every spot, with a colour bar."""
    figure, axis = plt.subplots(figsize=(5, 4.4))
    figure.colorbar(draw_tissue(axis, slide, values, "", cmap="viridis"), label=label)
    return figure


def domain_names(slide, domains):
    """A short name per domain, in the order of the scores' axes: its number and, behind a colon,
    the class that most of its spots have."""
    names = []
    for i, domain in enumerate(np.unique(domains)):
        inside = slide.labels[(domains == domain) & (slide.labels >= 0)]
        names.append(
            f"{i}:" + slide.classes[np.bincount(inside).argmax()].replace("Layer", "L")
            if len(inside)
            else str(i)
        )
    return names


def draw_pairs(arrays, names):
    """Figure: heat map of ligand-receptor scores, each pair relative to its own maximum; a dot
    where q < 0.05. arrays: lr_score and lr_q (n, K, K), lr_pairs (n,); names of the K domains."""
    n, k, _ = arrays["lr_score"].shape
    score, q = (arrays[name].reshape(n, k * k) for name in ("lr_score", "lr_q"))
    touching = np.isfinite(score).any(0)
    shown = score[:, touching] / np.maximum(np.nanmax(score, 1, keepdims=True), 1e-12)
    figure, axis = plt.subplots(figsize=(2 + 0.16 * touching.sum(), 1.2 + 0.2 * n))
    figure.colorbar(
        axis.imshow(shown, aspect="auto", cmap="magma"),
        label="score / largest of the pair",
        pad=0.01,
    )
    y, x = np.nonzero(q[:, touching] < 0.05)
    axis.scatter(x, y, s=5, color="white", edgecolors="black", linewidths=0.3)
    axis.set_xticks(
        range(touching.sum()),
        [f"{names[i // k]} > {names[i % k]}" for i in np.flatnonzero(touching)],
        rotation=90,
        fontsize=6,
    )
    axis.set_yticks(range(n), arrays["lr_pairs"], fontsize=7)
    axis.set_title(
        "ligand in a > receptor in b (domains, with the class of most of their spots); dot: "
        "q < .05",
        fontsize=8,
    )
    return figure


def draw_losses(log):
    """Figure: every weighted loss term of every stage, and the norm of its gradient."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6))
    for stage, term in dict.fromkeys((row["stage"], row["term"]) for row in log):
        rows = [row for row in log if (row["stage"], row["term"]) == (stage, term)]
        for axis, key in zip(axes, ("value", "grad_norm")):
            axis.plot(
                [row["epoch"] for row in rows],
                [max(abs(row[key]), 1e-12) for row in rows],
                marker=".",
                label=f"{stage} {term}",
            )
    for axis, title in zip(axes, ("weighted loss terms", "their gradient norms")):
        axis.set(yscale="log", xlabel="epoch of the stage", title=title)
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


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
    is_main = record["row"] in ("full-cross", "default", "")
    seed = record["config"].get("seed", 0)
    return record["method"], not is_main, record["variant"], seed


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
