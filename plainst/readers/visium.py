"""Space Ranger folders (Visium, Visium HD) -> Slide."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import scipy.sparse as sp
from PIL import Image

from plainst.readers.checked import (
    JSON_ERRORS,
    DataError,
    check_unique,
    check_xy,
    count_matrix,
    count_problem,
    open_h5,
    read_array,
    read_json,
    read_names,
    warn_if_cut,
)
from plainst.readers.slides import (
    IMAGE_ERRORS,
    Slide,
    check_fit,
    join_labels,
    lattice_um_per_px,
    library_of,
    read_image,
    read_label_table,
    read_metadata,
    unique_genes,
)


def read_10x_h5(path, counts: bool = True) -> tuple[sp.csr_matrix | None, np.ndarray, np.ndarray]:
    """10x HDF5 (v3 `matrix/features`, or v2 `<genome>/gene_names`) -> counts (N, G) int32 CSR,
    genes (G,), barcodes (N,).

    The file stores features x barcodes as CSC, which is barcodes x features as CSR. Only 'Gene
    Expression' features are kept. With counts=False
    the matrix is not read: None, no genes, barcodes. Raises DataError (unreadable, NaN, negative or
    non-integer counts, repeated barcodes).
    """
    with open_h5(path, "a 10x HDF5 matrix") as handle:
        groups = (
            [handle["matrix"]]
            if "matrix" in handle
            else [g for g in handle.values() if isinstance(g, h5py.Group) and "gene_names" in g]
        )
        if len(groups) != 1:
            raise DataError(
                f"{path} holds {len(groups)} 10x matrices: give a "
                "filtered_feature_bc_matrix.h5 of one genome"
            )
        group = groups[0]
        barcodes = read_names(group["barcodes"])
        check_unique(barcodes, path)
        if not counts:
            return None, np.array([], dtype=str), barcodes
        genes = read_names(group["features/name" if "features" in group else "gene_names"])
        n_genes, n_spots = read_array(group["shape"], "iu", (2,)).tolist()
        if len(barcodes) != n_spots or len(genes) != n_genes:
            raise DataError(
                f"{path} has a {n_genes} x {n_spots} matrix but {len(genes)} genes and "
                f"{len(barcodes)} barcodes: download it again"
            )
        data = read_array(group["data"], "iuf")
        problem = count_problem(data)
        if problem:
            raise DataError(
                f"{path} holds {problem} in its counts: give the raw matrix that Space Ranger wrote"
            )
        # (N, G)
        matrix = count_matrix(
            data,
            read_array(group["indices"], "iu"),
            read_array(group["indptr"], "iu"),
            (n_spots, n_genes),
        )
        kinds = (
            read_names(group["features/feature_type"], n_genes)
            if "features" in group
            else np.full(n_genes, "Gene Expression")
        )
        keep = np.flatnonzero(kinds == "Gene Expression")
    if not len(keep):
        raise DataError(
            f"{path} holds no feature of type Gene Expression: give a gene expression matrix"
        )
    if len(keep) < len(genes):
        matrix, genes = matrix[:, keep], genes[keep]
    return matrix, unique_genes(genes, path), barcodes


def _folder_labels(folder: Path, sample: str, labels, barcodes: np.ndarray):
    """labels (N,), classes, patient, library size (N,) or None, files read: from `labels`, else
    metadata.tsv, else barcode_level_layer_map.tsv."""
    codes, classes, patient, library_size = np.full(len(barcodes), -1, dtype=np.int64), [], "", None
    metadata = folder / "metadata.tsv"
    table, column = read_metadata(metadata) if metadata.is_file() else ({}, None)
    files = [str(metadata)] if metadata.is_file() else []
    records = [table.get(barcode, {}) for barcode in barcodes.tolist()]
    patient = next((record["subject"] for record in records if record.get("subject")), "")
    try:
        library_size = library_of([float(record["sum_umi"]) for record in records], metadata)
    except (KeyError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        library_size = None  # no such column, or a spot without a row
    layer_map = next(
        (
            path
            for path in (base / "barcode_level_layer_map.tsv" for base in (folder, folder.parent))
            if path.is_file()
        ),
        None,
    )
    if labels is not None:
        codes, classes = join_labels(read_label_table(labels, sample), barcodes, labels)
        files.append(str(labels))
    elif column is not None:
        codes, classes = join_labels(
            {barcode: record.get(column, "") for barcode, record in table.items()},
            barcodes,
            metadata,
        )
    elif layer_map is not None:
        found = read_label_table(layer_map, sample)
        codes, classes = join_labels(found, barcodes, layer_map)
        files.append(str(layer_map))
    return codes, classes, patient, library_size, files


POSITIONS = (
    "barcode",
    "in_tissue",
    "array_row",
    "array_col",
    "pxl_row_in_fullres",
    "pxl_col_in_fullres",
)


def find_file(folder: Path, *names: str) -> Path | None:
    """The first of `names` in the folder or its spatial/, also with a sample prefix
    (151673_tissue_hires_image.png)."""
    for name in names:
        for base in (folder / "spatial", folder):
            if (base / name).is_file():
                return base / name
            prefixed = sorted(base.glob(f"*_{name}"))
            if prefixed:
                return prefixed[0]
    return None


def _read_positions(path: Path) -> dict[str, np.ndarray]:
    """Columns of a positions file: CSV without (Space Ranger 1) or with (2, 3) a header, or parquet
    (Visium HD)."""
    try:
        if path.suffix == ".parquet":
            try:
                from pyarrow import parquet
            except ImportError as error:
                raise DataError(f"{path} needs pyarrow to be read: pip install pyarrow") from error
            table = parquet.read_table(path, columns=list(POSITIONS))
            columns = {name: table[name].to_numpy() for name in POSITIONS}
        else:
            with open(path, encoding="utf-8-sig") as handle:
                header = handle.readline().strip().split(",")
            if header == [""]:
                raise ValueError("it is empty")
            warn_if_cut(path)
            named = "in_tissue" in header
            kinds = [("barcode", "O")] + [(name, "f8") for name in POSITIONS[1:]]
            columns = np.loadtxt(
                path,
                delimiter=",",
                dtype=kinds,
                skiprows=int(named),
                ndmin=1,
                encoding="utf-8",
                comments=None,
                usecols=[header.index(name) for name in POSITIONS] if named else range(6),
            )
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} is not a positions table ({error}): it needs the columns "
            f"{', '.join(POSITIONS)}"
        ) from error
    columns = {name: np.asarray(columns[name]) for name in POSITIONS}
    columns["barcode"] = columns["barcode"].astype(str)
    check_unique(columns["barcode"], path)
    # (R, 5)
    numbers = np.stack(
        [np.asarray(columns[name], dtype=np.float64) for name in POSITIONS[1:]], axis=1
    )
    if not (np.abs(numbers) < 1e9).all() or (numbers[:, :3] != np.rint(numbers[:, :3])).any():
        raise DataError(
            f"{path} holds a position that is no finite number or an array row or column that "
            "is not whole: copy it again"
        )
    return columns


def _folder_image(
    folder: Path, xy: np.ndarray
) -> tuple[Callable[[], np.ndarray] | None, float | None, dict, str]:
    """Function that reads the hires (else lowres) image, its scale, the scale factors, and the
    image's path."""
    path, scales = find_file(folder, "scalefactors_json.json"), {}
    if path is not None:
        try:
            scales = {
                key: float(value)
                for key, value in read_json(path).items()
                if not isinstance(value, (str, list))
            }
        except JSON_ERRORS as error:
            raise DataError(
                f"{path} is not a JSON object of scale factors ({error}): copy it again from "
                "the Space Ranger output"
            ) from error
        if not all(
            0 < scales.get(key, 1) < float("inf")
            for key in ("tissue_hires_scalef", "tissue_lowres_scalef", "microns_per_pixel")
        ):
            raise DataError(
                f"{path} holds a scale factor that is not positive: copy it again from the "
                "Space Ranger output"
            )
    for size in ("hires", "lowres"):
        picture = find_file(folder, f"tissue_{size}_image.png", f"tissue_{size}_image.jpg")
        if picture is None:
            continue
        key = f"tissue_{size}_scalef"
        if key not in scales:
            path = path or folder / "spatial" / "scalefactors_json.json"
            raise DataError(
                f"{path} has no {key} for {picture.name}: copy scalefactors_json.json from "
                "the Space Ranger output"
            )
        try:
            with Image.open(picture, formats=("PNG", "JPEG")) as image:
                width, height = image.size
                # reads the chunks, not the pixels: a truncated file is found now and not after
                # training
                image.verify()
        except IMAGE_ERRORS as error:
            raise DataError(
                f"{picture} cannot be read as an image ({error}): it is truncated, copy it "
                "again or delete it"
            ) from error
        check_fit(xy, scales[key], height, width, picture)
        return functools.partial(read_image, picture), scales[key], scales, str(picture)
    return None, None, scales, ""


def _row_of(barcodes: np.ndarray, positions: dict, matrix_path, positions_path) -> np.ndarray:
    """Row of each barcode in the positions file. Raises DataError when barcodes have no
    position."""
    row = {barcode: i for i, barcode in enumerate(positions["barcode"].tolist())}
    rows = np.array([row.get(barcode, -1) for barcode in barcodes.tolist()], dtype=np.int64)
    missing = int((rows < 0).sum())
    if missing:
        some = "none" if missing == len(rows) else f"only {len(rows) - missing}"
        raise DataError(
            f"{positions_path} holds {some} of the {len(rows)} barcodes of {matrix_path} "
            f"({missing} missing, such as "
            f"{barcodes[rows < 0][0]}): take both files from the same Space Ranger run"
        )
    return rows


def load_visium(folder, counts: bool = True, labels=None) -> Slide:
    """Space Ranger 1-3 output folder (or one binned_outputs/square_*um of Visium HD) -> Slide of
    its in-tissue spots.

    Rows follow the barcodes of filtered_feature_bc_matrix.h5. With counts=False the matrix is not
    needed: then rows follow the matrix if it is there, else metadata.tsv, else the positions file.
    `labels`: a two-column CSV/TSV (barcode, label), metadata.tsv or barcode_level_layer_map.tsv;
    without it the latter two are looked for. Raises DataError for any file that is missing, damaged
    or of another slide.
    """
    # a linked slice keeps the name of the link
    folder = Path(os.path.abspath(folder))
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: give a Space Ranger output folder")
    sample = folder.parent.name if folder.name == "outs" else folder.name
    positions_path = find_file(
        folder,
        "tissue_positions.csv",
        "tissue_positions_list.csv",
        "tissue_positions_list.txt",
        "tissue_positions.parquet",
    )
    if positions_path is None:
        raise DataError(
            f"{folder / 'spatial'} has no tissue_positions.csv, tissue_positions_list.csv or "
            ".parquet: "
            "copy spatial/ from the Space Ranger output"
        )
    matrix_path = find_file(folder, "filtered_feature_bc_matrix.h5")
    if matrix_path is None and counts:
        raise DataError(
            f"{folder} has no filtered_feature_bc_matrix.h5: copy it from the Space Ranger "
            "output (or load with counts=False)"
        )
    positions = _read_positions(positions_path)
    in_tissue = positions["in_tissue"] > 0
    matrix, genes = None, np.array([], dtype=str)
    if matrix_path is not None:
        matrix, genes, barcodes = read_10x_h5(matrix_path, counts=counts)
    else:
        barcodes = positions["barcode"][in_tissue]
        listed = (
            read_metadata(folder / "metadata.tsv")[0] if (folder / "metadata.tsv").is_file() else {}
        )
        rank = {barcode: i for i, barcode in enumerate(listed)}
        barcodes = barcodes[
            np.argsort(
                [rank.get(barcode, len(rank)) for barcode in barcodes.tolist()], kind="stable"
            )
        ]
    rows = _row_of(barcodes, positions, matrix_path, positions_path)
    keep = np.flatnonzero(in_tissue[rows])
    if not len(keep):
        raise DataError(
            f"{positions_path} marks no spot of the matrix as in tissue: take both files from "
            "the same Space Ranger run"
        )
    if len(keep) < len(rows):
        rows, barcodes, matrix = (
            rows[keep],
            barcodes[keep],
            None if matrix is None else matrix[keep],
        )
    # x, y
    xy = check_xy(
        np.stack(
            [positions["pxl_col_in_fullres"][rows], positions["pxl_row_in_fullres"][rows]], axis=1
        ),
        len(rows),
        positions_path,
    )
    # (N, 2)
    grid = np.stack([positions["array_row"][rows], positions["array_col"][rows]], axis=1).astype(
        np.int64
    )
    codes, classes, patient, library_size, tables = _folder_labels(folder, sample, labels, barcodes)
    image, scale, scales, image_file = _folder_image(folder, xy)
    um_per_px = scales.get("microns_per_pixel") or lattice_um_per_px(grid, xy)
    return Slide(
        matrix,
        genes,
        barcodes,
        xy,
        grid,
        codes,
        classes,
        image,
        scale,
        None,
        um_per_px,
        sample,
        patient,
        str(matrix_path or positions_path),
        library_size,
        [str(positions_path), *tables],
        image_file,
    )
