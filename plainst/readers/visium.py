"""Space Ranger folders (Visium, Visium HD) -> Slide."""

from __future__ import annotations

import functools
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
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
    decode_strings,
    open_h5,
    read_array,
    read_json,
    read_names,
    warn_if_cut,
)
from plainst.readers.hd import CELL_MATRIX, OUTLINE_FILES, read_outlines, sample_of
from plainst.readers.slides import (
    GAP,
    IMAGE_ERRORS,
    STRAY,
    LabelTable,
    Slide,
    beside,
    check_fit,
    check_partners,
    donor_of,
    encode_labels,
    join_labels,
    lattice_um_per_px,
    library_of,
    read_image,
    read_label_table,
    read_metadata,
    sample_named,
    unique_genes,
)


def read_10x_h5(
    path, counts: bool = True, gene_key: str | None = None
) -> tuple[sp.csr_matrix | None, np.ndarray, np.ndarray]:
    """10x HDF5 (v3 `matrix/features`, or v2 `<genome>/gene_names`) -> counts (N, G) int32 CSR,
    genes (G,), barcodes (N,).

    The file stores features x barcodes as CSC, which is barcodes x features as CSR. Only 'Gene
    Expression' features are kept. Genes are symbols, or the column `gene_key` of v3's features
    ('id'). With counts=False the matrix is not read: None, no genes, barcodes. Raises DataError
    (unreadable, NaN, negative or non-integer counts, repeated barcodes).
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
        genes = read_names(_gene_column(group, gene_key, path))
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


def _gene_column(group: h5py.Group, gene_key: str | None, path):
    if gene_key is None:
        return group["features/name" if "features" in group else "gene_names"]
    columns = group.get("features", {})
    if gene_key not in columns:
        names = [name for name in columns if not name.startswith("_")]
        raise DataError(
            f"{path} has no gene column {gene_key}: choose one of {', '.join(names) or '(none)'} "
            "with --gene_key, or leave it out"
        )
    return columns[gene_key]


def library_names(path) -> list[str]:
    """The names of the libraries that Space Ranger noted in a 10x HDF5, [] where there is none."""
    with open_h5(path, "a 10x HDF5 matrix") as handle:
        if "library_ids" not in handle.attrs:
            return []
        names = decode_strings(handle.attrs["library_ids"])
        return [str(name) for name in np.atleast_1d(names)]


@dataclass
class _FolderTables:
    """What the text tables of a folder say of its spots: labels (N,), classes, patient, library
    size (N,) or None, and the files read."""

    labels: np.ndarray
    classes: list[str]
    patient: str
    library_size: np.ndarray | None
    files: list[str]


def _read_tables(
    folder: Path, samples: list[str], labels, label_key, barcodes: np.ndarray, tissue
) -> _FolderTables:
    """Labels from the file `labels`, else metadata.tsv, else barcode_level_layer_map.tsv.

    samples: the names the slide goes by; tissue: barcodes of all in-tissue spots, or None."""
    out = _FolderTables(np.full(len(barcodes), -1, dtype=np.int64), [], "", None, [])
    path = folder / "metadata.tsv"
    table, column = {}, None
    if path.is_file():
        table, column = read_metadata(path, None if labels else label_key)
        out.files.append(str(path))
    elif label_key and labels is None:
        raise DataError(
            f"{folder} has no metadata.tsv to take --label_key {label_key} from: give the table "
            "with --labels"
        )
    if table:
        names = {barcode: row.get(column, "") for barcode, row in table.items()}
        metadata = LabelTable(names, sample_named(table), str(path))
        check_partners(metadata, barcodes, samples, tissue)
    rows = [table.get(barcode, {}) for barcode in barcodes.tolist()]
    out.patient = next((row["subject"] for row in rows if row.get("subject")), "")
    if not out.patient:
        out.patient, files = donor_of(folder, samples[0])
        out.files += files
    if any("sum_umi" in row for row in rows):
        out.library_size = library_of([_number(row.get("sum_umi", "")) for row in rows], path)
    layer_map = beside(folder, "barcode_level_layer_map.tsv")
    source = None
    if labels is not None:
        source = read_label_table(labels, samples[0], label_key)
        out.files.append(str(labels))
    elif column is not None:
        out.labels, out.classes = encode_labels([row.get(column, "") for row in rows])
    elif layer_map is not None:
        source = read_label_table(layer_map, samples[0])
        out.files.append(str(layer_map))
    if source is not None:
        out.labels, out.classes = join_labels(source, barcodes, samples, tissue)
    return out


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


POSITIONS = (
    "barcode",
    "in_tissue",
    "array_row",
    "array_col",
    "pxl_row_in_fullres",
    "pxl_col_in_fullres",
)
POSITION_FILES = (
    "tissue_positions.csv",
    "tissue_positions_list.csv",
    "tissue_positions_list.txt",
    "tissue_positions.parquet",
)
SPACE_RANGER_FILE = re.compile(
    r"(filtered_feature_(bc|cell)_matrix|tissue_(positions|hires|lowres)|scalefactors"
    r"|graphclust_annotated_cell_segm|cell_segm)"
)


def _candidates(folder: Path, name: str) -> list[Path]:
    """The file `name` in spatial/ or the folder, else those with a sample prefix
    (151673_tissue_hires_image.png) in the first of the two that has any."""
    for base in (folder / "spatial", folder):
        if (base / name).is_file():
            return [base / name]
        prefixed = sorted(base.glob(f"*_{name}"))
        if prefixed:
            return prefixed
    return []


def has_file(folder: Path, *names: str) -> bool:
    return any(_candidates(folder, name) for name in names)


def find_file(folder: Path, *names: str) -> Path | None:
    """The first of `names` in the folder or its spatial/, also with a sample prefix. Raises
    DataError where files of several prefixes are to choose from: barcodes are the same on every
    slide, so a wrong choice would go unseen."""
    for name in names:
        paths = _candidates(folder, name)
        if len(paths) > 1:
            raise DataError(
                f"{folder} holds {len(paths)} files for {name} ({paths[0].name}, {paths[1].name} "
                "...): put the files of each sample into a folder of their own"
            )
        if paths:
            return paths[0]
    return None


def _prefix(path: Path | None) -> str:
    """'GSM1_' of GSM1_tissue_positions_list.csv; '' for a plain name or no file."""
    match = None if path is None else SPACE_RANGER_FILE.search(path.name)
    return path.name[: match.start()] if match else ""


def _check_prefixes(folder: Path, paths: list[Path | None]) -> None:
    named = {_prefix(path): path for path in paths if _prefix(path)}
    if len(named) > 1:
        first, second, *_ = named.values()
        raise DataError(
            f"{folder} mixes files of several samples ({first.name}, {second.name}): put the files "
            "of each sample into a folder of their own"
        )


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
                header = [name.strip('"') for name in handle.readline().strip().split(",")]
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
                quotechar='"',
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


def _check_tissue(barcodes: np.ndarray, positions: dict, matrix_path, positions_path) -> None:
    """A filtered matrix holds the in-tissue spots of its positions file, all and only those. Spots
    off the tissue (a raw matrix, an edited in_tissue) or spots that are missing (quality filters,
    empty bins) have innocent reasons; both together mean two slides, as in 130 of the 132 pairs of
    DLPFC slices."""
    tissue = set(positions["barcode"][positions["in_tissue"] > 0].tolist())
    off = sum(barcode not in tissue for barcode in barcodes.tolist())
    absent = len(tissue) - (len(barcodes) - off)
    what = (
        f"{off} of the {len(barcodes)} barcodes of {matrix_path} lie off the tissue of "
        f"{positions_path} and {absent} of its {len(tissue)} in-tissue spots have no counts"
    )
    if off == len(barcodes):
        raise DataError(
            f"{positions_path} marks no spot of the matrix as in tissue: take both files from "
            "the same Space Ranger run"
        )
    if off and absent and off + absent > STRAY * len(tissue):
        raise DataError(
            f"{what}, as where they are of two slides: take both from the same Space Ranger run"
        )
    # bins of Visium HD without a count are left out of its filtered matrix
    is_binned = str(barcodes[0]).startswith("s_0")
    if off or (absent > GAP * len(tissue) and not is_binned):
        warnings.warn(
            f"{what}: spots off the tissue are left out; check that both are of one slide",
            stacklevel=3,
        )


def load_visium(
    folder,
    counts: bool = True,
    labels=None,
    label_key: str | None = None,
    gene_key: str | None = None,
) -> Slide:
    """Space Ranger output folder -> Slide of its in-tissue spots; of Visium HD one
    binned_outputs/square_*um, or segmented_outputs/ with cells as spots.

    Rows follow the barcodes of filtered_feature_bc_matrix.h5. With counts=False the matrix is not
    needed: then rows follow the matrix if it is there, else metadata.tsv, else the positions file.
    `labels`: a two-column CSV/TSV (barcode, label), metadata.tsv or barcode_level_layer_map.tsv;
    without it the latter two are looked for. `label_key`: the label column of a table with a
    header; `gene_key`: the column of the matrix's features that names genes ('id'). Raises
    DataError for any file that is missing, damaged or of another slide.
    """
    # a linked slice keeps the name of the link
    folder = Path(os.path.abspath(folder))
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: give a Space Ranger output folder")
    sample = sample_of(folder)
    matrix_path = find_file(folder, "filtered_feature_bc_matrix.h5", CELL_MATRIX)
    if matrix_path is None and counts:
        raise DataError(
            f"{folder} has no filtered_feature_bc_matrix.h5: copy it from the Space Ranger "
            "output (or load with counts=False)"
        )
    is_cells = matrix_path is not None and matrix_path.name.endswith(CELL_MATRIX)
    names = OUTLINE_FILES if is_cells else POSITION_FILES
    positions_path = find_file(folder, *names)
    if positions_path is None:
        raise DataError(
            f"{folder / 'spatial'} has no {', '.join(names)}: copy it from the Space Ranger output"
        )
    _check_prefixes(folder, [matrix_path, positions_path])
    positions = (read_outlines if is_cells else _read_positions)(positions_path)
    in_tissue = positions["in_tissue"] > 0
    matrix, genes, samples = None, np.array([], dtype=str), [sample]
    if matrix_path is not None:
        matrix, genes, barcodes = read_10x_h5(matrix_path, counts, gene_key)
        samples += library_names(matrix_path)
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
    if matrix_path is not None and not is_cells:
        _check_tissue(barcodes, positions, matrix_path, positions_path)
    keep = np.flatnonzero(in_tissue[rows])
    if not len(keep):
        raise DataError(
            f"{positions_path} marks no spot as in tissue: copy it from the Space Ranger output"
        )
    if len(keep) < len(rows):
        rows, barcodes = rows[keep], barcodes[keep]
        matrix = None if matrix is None else matrix[keep]
    # x, y
    xy = check_xy(
        np.stack(
            [positions["pxl_col_in_fullres"][rows], positions["pxl_row_in_fullres"][rows]], axis=1
        ),
        len(rows),
        positions_path,
    )
    grid = None
    if not is_cells:
        # (N, 2)
        grid = np.stack([positions["array_row"][rows], positions["array_col"][rows]], axis=1)
        grid = grid.astype(np.int64)
    tissue = None if is_cells else positions["barcode"][in_tissue].tolist()
    tables = _read_tables(folder, samples, labels, label_key, barcodes, tissue)
    image, scale, scales, image_file = _folder_image(folder, xy)
    _check_prefixes(folder, [matrix_path, positions_path, Path(image_file)])
    um_per_px = scales.get("microns_per_pixel") or lattice_um_per_px(grid, xy)
    scales_path = find_file(folder, "scalefactors_json.json")
    scale_files = [] if scales_path is None else [str(scales_path)]
    return Slide(
        matrix,
        genes,
        barcodes,
        xy,
        grid,
        tables.labels,
        tables.classes,
        image,
        scale,
        None,
        um_per_px,
        sample,
        tables.patient,
        str(matrix_path or positions_path),
        tables.library_size,
        [str(positions_path), *scale_files, *tables.files],
        image_file,
    )
