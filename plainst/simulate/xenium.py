"""A Xenium-shaped output folder of simulated cells: counts, centres, outlines and a stain image in
the real layout, with labels.csv beside them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from plainst.readers.checked import DataError
from plainst.simulate.cells import _ellipses, cell_field
from plainst.simulate.files import _write_10x_h5, new_folder

UM_PER_PX = 0.2125
# image px per px of the cell field
ZOOM = 4
# of a stain, at brightness 1 and as background
LIGHT, DARK = 4000, 100
# corners of an outline
CORNERS = 24


def stain_image(xy, truth, rng) -> np.ndarray:
    """(H, W) uint16: every cell as the textured ellipse of `cell_field`, the brighter one where two
    overlap, with noise; xy (N, 2) image px."""
    reach = int(np.ceil(truth["major"].max())) + 2
    width, height = np.ceil(xy.max(0)).astype(int) + reach + 1
    image, side = np.zeros((height, width), np.float32), 2 * reach
    for i, (x, y) in enumerate(np.floor(xy).astype(int).tolist()):
        offset = (xy[i] - [x, y])[None, None]  # (1, 1, 2)
        light = _ellipses(offset, truth, np.array([[i]]), side)[1][0, 0]  # (side, side)
        top, left = max(y - reach, 0), max(x - reach, 0)
        part = image[top : y + reach, left : x + reach]
        cut = light[top - y + reach :, left - x + reach :][: part.shape[0], : part.shape[1]]
        np.maximum(part, cut, out=part)
    noisy = DARK + LIGHT * image + rng.normal(0, DARK / 4, image.shape)
    return np.clip(np.rint(noisy), 0, 2**16 - 1).astype(np.uint16)


def simulate_xenium(folder, n_cells: int = 3000, n_genes: int = 120, seed: int = 0) -> Path:
    """Write a Xenium-shaped folder of one section of `cell_field`: experiment.xenium, matrix as
    10x HDF5, cells and cell_boundaries as parquet, morphology_focus as tiled OME-TIFF, labels.csv.
    Needs tifffile and pyarrow. Raises DataError on a bad argument or without them."""
    try:
        import pyarrow
        import pyarrow.parquet
        import tifffile
    except ImportError as error:
        raise DataError(
            f"{folder} cannot be written without tifffile and pyarrow ({error}): "
            "pip install tifffile pyarrow"
        ) from error
    cells = cell_field(n_cells, n_genes, 1, seed=seed)
    truth = dict(cells["truth"])
    for name in ("major", "minor"):
        truth[name] = truth[name] * ZOOM
    truth["texture"] = truth["texture"] / ZOOM
    xy, ids = cells["xy"] * ZOOM, np.array([f"cell{i:07d}-1" for i in range(n_cells)])
    turn = np.linspace(0, 2 * np.pi, CORNERS + 1)  # closed
    along = truth["major"][:, None] * np.cos(turn)  # (N, corners)
    across = truth["minor"][:, None] * np.sin(turn)
    cosine, sine = np.cos(truth["angle"])[:, None], np.sin(truth["angle"])[:, None]
    x = xy[:, :1] + along * cosine - across * sine
    y = xy[:, 1:] + along * sine + across * cosine
    tables = {
        "cells": {
            "cell_id": ids,
            "x_centroid": xy[:, 0] * UM_PER_PX,
            "y_centroid": xy[:, 1] * UM_PER_PX,
            "cell_area": np.pi * truth["major"] * truth["minor"] * UM_PER_PX**2,
        },
        "cell_boundaries": {
            "cell_id": np.repeat(ids, CORNERS + 1),
            "vertex_x": (x * UM_PER_PX).ravel(),
            "vertex_y": (y * UM_PER_PX).ravel(),
        },
    }
    image = stain_image(xy, truth, np.random.default_rng([seed, 12]))
    matrix = SimpleNamespace(n_genes=n_genes, n_spots=n_cells, barcodes=ids)
    matrix.genes, matrix.counts = cells["genes"], cells["counts"]
    with new_folder(folder) as part:
        (part / "experiment.xenium").write_text(json.dumps({"pixel_size": UM_PER_PX}))
        _write_10x_h5(matrix, part / "cell_feature_matrix.h5", 3)
        for name, columns in tables.items():
            pyarrow.parquet.write_table(pyarrow.table(columns), part / f"{name}.parquet")
        (part / "morphology_focus").mkdir()
        tifffile.imwrite(
            part / "morphology_focus" / "morphology_focus_0000.ome.tif",
            image,
            tile=(1024, 1024),
            metadata={"axes": "YX", "Channel": {"Name": "DAPI"}},
        )
        with open(part / "labels.csv", "w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(["cell_id", "label"])
            rows.writerows(zip(ids, np.array(cells["classes"])[cells["labels"]]))
    return Path(folder)
