"""Every picture."""

import matplotlib
import numpy as np

import metrics

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

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
    r = np.nan_to_num(metrics.pcc(true[scored], predicted[scored]))
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


def close():
    """Forget all figures of pyplot; those that a run keeps are saved when it finishes."""
    plt.close("all")
