"""Every picture of a run."""

import matplotlib
import numpy as np
from sklearn.decomposition import PCA

import metrics
from evaluation.cells import detected_genes

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

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
    area = np.repeat(probes[:, 1:2], expression.shape[1], 1)
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
