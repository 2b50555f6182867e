"""Several slices as one: common genes, labels under common names, positions far apart, so that no
neighbourhood reaches from one to another."""

import copy

import numpy as np
import scipy.sparse as sp

import data
from data import DataError
from plainst.classes import sorted_classes

# what the slices must share of the smallest panel, and at least so many genes
MIN_SHARE, MIN_GENES = 0.2, 20


def common_genes(slides):
    """Genes that all slides have, in the order of the first. Raises DataError for too few."""
    shared = set(slides[0].genes).intersection(*(slide.genes for slide in slides[1:]))
    smallest = min(len(set(slide.genes)) for slide in slides)
    if len(shared) < max(MIN_GENES, MIN_SHARE * smallest):
        names = ", ".join(slide.sample for slide in slides)
        raise DataError(
            f"slices {names} share {len(shared)} genes of {smallest}: check species and gene "
            "naming, or run each alone"
        )
    return [gene for gene in dict.fromkeys(slides[0].genes) if gene in shared]


def place_apart(positions):
    """[(n, 2)] of slides -> (N, 2) in lattice pitches of each, one beside the other. Every gap is
    wider than any slide, so that the k nearest spots are of the same slide where it has more than
    k."""
    positions = [xy / max(data.lattice_pitch(xy), 1e-9) for xy in positions]
    widest = max(np.linalg.norm(np.ptp(xy, axis=0)) for xy in positions)
    placed, left = [], 0.0
    for xy in positions:
        xy = xy - xy.min(0) + [left, 0.0]
        left = xy[:, 0].max() + 1.01 * widest + 1
        placed.append(xy)
    return np.concatenate(placed)


def join(slides):
    """One `Slide` of all spots of several, and the number of its slide for each spot (N,).

    Barcodes become `sample:barcode`. The joined slide has neither image nor lattice nor scale.
    Raises DataError where they share too few genes.
    """
    genes = common_genes(slides)
    parts = [slide.select_genes(genes) for slide in slides]
    out = copy.copy(parts[0])
    out.sample = "+".join(slide.sample for slide in slides)
    out.counts = sp.vstack([part.counts for part in parts]).tocsr()
    out.xy = place_apart([part.xy for part in parts])
    names = [f"{part.sample}:{barcode}" for part in parts for barcode in part.barcodes]
    out.barcodes = np.array(names)
    out.classes = sorted_classes({name for part in parts for name in part.classes})
    out.labels = np.concatenate([labels_in(part, out.classes) for part in parts])
    # totals of all measured genes where every file tells them, else of the genes of its own panel
    totals = [np.asarray(slide.counts.sum(1)).ravel() for slide in slides]
    known = [slide.library_size for slide in slides]
    has_all = all(size is not None for size in known)
    out.library_size = np.concatenate(known if has_all else totals)
    out.image = out.image_scale = out.patches = out.grid = out.um_per_px = None
    out.image_file = ""
    files = [str(path) for slide in slides for path in (slide.source, *slide.tables)]
    out.tables = [path for path in dict.fromkeys(files) if path and path != str(out.source)]
    return out, np.repeat(np.arange(len(parts)), [part.n_spots for part in parts])


def labels_in(slide, classes):
    """Labels (N,) of a slide as rows of other classes, -1 for none."""
    row = {name: i for i, name in enumerate(classes)}
    of_class = np.array([row[name] for name in slide.classes] + [-1])
    return of_class[slide.labels]
