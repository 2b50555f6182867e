"""Every picture."""

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

# --------------------------------------------------------------------------------------------------
# gat_fusion
# --------------------------------------------------------------------------------------------------


def draw_gat_fusion(record, slide, arrays, history):
    """The pictures of a gat_fusion run: truth, prediction, errors and coordinates-only on the
    tissue; with a history (epochs, 2), loss and validation ARI; with `attention`, that of the last
    layer.

    arrays: as in the record, labels, pred, test (N,) and classes, perhaps coords_knn (N,) and
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
    """Truth, prediction, the vote of coordinates if it is there, and the errors, side by side."""
    panels = [("truth", arrays["labels"]), ("prediction", arrays["pred"])]
    if "coords_knn" in arrays:
        panels.append(("coordinates only, no gene", arrays["coords_knn"]))
    is_wrong = (arrays["labels"] != arrays["pred"]) & arrays["test"]
    figure, axes = plt.subplots(1, len(panels) + 1, figsize=(4.4 * (len(panels) + 1), 4.4))
    size, palette = dot_size(xy), plt.get_cmap("tab10")
    for axis, (title, codes) in zip(axes, panels):
        for c, name in enumerate(arrays["classes"]):
            axis.scatter(*xy[codes == c].T, s=size, color=palette(c % 10), label=name, linewidths=0)
        axis.set_title(title)
    axes[-1].scatter(*xy.T, s=size, color="0.88", linewidths=0)
    axes[-1].scatter(*xy[arrays["test"]].T, s=size, color="0.65", linewidths=0)
    axes[-1].scatter(*xy[is_wrong].T, s=size * 1.5, color="crimson", linewidths=0)
    axes[-1].set_title(f"errors: {is_wrong.sum()} of {arrays['test'].sum()} test spots")
    figure.legend(
        *axes[1].get_legend_handles_labels(),
        loc="lower center",
        ncols=len(arrays["classes"]),
        markerscale=4,
        frameon=False,
    )
    for axis in axes:
        as_tissue(axis)
    return figure


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
