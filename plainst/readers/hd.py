"""Visium HD output: the names of its parts, and the cell outlines of Space Ranger 4."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from plainst.readers.checked import JSON_ERRORS, DataError, check_xy, read_json

# segmented_outputs/ of Space Ranger 4
CELL_MATRIX = "filtered_feature_cell_matrix.h5"
OUTLINE_FILES = ("cell_segmentations.geojson", "graphclust_annotated_cell_segmentations.geojson")


def sample_of(folder: Path) -> str:
    """The name of the slide in a Space Ranger folder: the folder's own, or that of the sample above
    outs/, binned_outputs/ and segmented_outputs/, with the part behind it."""
    part = ""
    if folder.parent.name == "binned_outputs":
        folder, part = folder.parent.parent, f"_{folder.name}"
    elif folder.name == "segmented_outputs":
        folder, part = folder.parent, f"_{folder.name}"
    return (folder.parent.name if folder.name == "outs" else folder.name) + part


def hd_parts(folder: Path) -> dict[str, Path]:
    """{sample_square_008um: folder} of a Visium HD output (the folder that holds binned_outputs/
    or segmented_outputs/, its outs/, or binned_outputs/ itself); {} for any other folder."""
    if folder.name == "binned_outputs":
        folder = folder.parent
    if not (folder / "binned_outputs").is_dir() and (folder / "outs").is_dir():
        folder = folder / "outs"
    parts = sorted((folder / "binned_outputs").glob("square_*um"))
    if (folder / "segmented_outputs" / CELL_MATRIX).is_file():
        parts.append(folder / "segmented_outputs")
    return {sample_of(part): part for part in parts}


def _centre(ring) -> tuple[float, float]:
    """Centre of area of a polygon, by the shoelace formula; its mean corner where it has no
    area."""
    x, y = np.asarray(ring, dtype=np.float64)[:, :2].T
    # from its own corner: coordinates of 10^4 px would cost digits
    x0, y0 = x[0], y[0]
    x, y = x - x0, y - y0
    cross = x * np.roll(y, -1) - np.roll(x, -1) * y
    area = cross.sum() / 2
    if abs(area) < 1e-9:
        return x0 + x.mean(), y0 + y.mean()
    return (
        x0 + ((x + np.roll(x, -1)) * cross).sum() / (6 * area),
        y0 + ((y + np.roll(y, -1)) * cross).sum() / (6 * area),
    )


def read_outlines(path: Path) -> dict[str, np.ndarray]:
    """cell_segmentations.geojson of Space Ranger 4 -> columns as of a positions file: barcode
    (cellid_000000001-1), in_tissue, and the centre of each outline in full-resolution px."""
    try:
        features, cells = read_json(path)["features"], {}
        for cell in features:
            shape = cell["geometry"]["coordinates"]
            if cell["geometry"]["type"] == "MultiPolygon":
                shape = max(shape, key=lambda polygon: len(polygon[0]))
            cells[f"cellid_{int(cell['properties']['cell_id']):09d}-1"] = _centre(shape[0])
    except (*JSON_ERRORS, IndexError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} is no GeoJSON of cell outlines ({error}): copy it from segmented_outputs/ "
            "again"
        ) from error
    if not cells or len(cells) < len(features):
        raise DataError(
            f"{path} holds {len(cells)} cells in {len(features)} outlines: copy it from "
            "segmented_outputs/ again"
        )
    x, y = check_xy(np.array(list(cells.values())), len(cells), path).T
    return {
        "barcode": np.array(list(cells)),
        "in_tissue": np.ones(len(cells)),
        "pxl_row_in_fullres": y,
        "pxl_col_in_fullres": x,
    }
