"""Files -> Slide: readers for Space Ranger (Visium, Visium HD) folders, AnnData h5ad files and HEST folders.

They need h5py, numpy, scipy and pillow only. Everything is joined by barcode, never by row order; whatever is wrong with a file is reported as a
`DataError` of one sentence with its path and a remedy. `data` passes all public names on: `data.load_slide(...)` is how the project calls them.
"""
from __future__ import annotations

import copy
import csv
import functools
import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import scipy.sparse as sp
from PIL import Image, UnidentifiedImageError


class DataError(ValueError):
    """Input that cannot be used; the message is one sentence that names the file and the remedy."""


# ---------------------------------------------------------------------------------------------------------------- slide
@dataclass(eq=False)
class Slide:
    """N spots (or cells) x G genes of one tissue section. Unlabelled spots stay in: they are tissue.

    counts (N, G) CSR raw integer counts, or None when loaded with counts=False; genes (G,) symbols; barcodes (N,); xy (N, 2) full-resolution
    pixels, x right, y down; grid (N, 2) integer lattice row, column or None; labels (N,) index into classes, -1 = none; image (H, W, 3) uint8 or
    None (given as an array, or as a function without arguments that is called on first use); image_scale image px per full-resolution px;
    patches lazily read (N, h, w, 3) uint8 or None; um_per_px micrometres per full-resolution px; source the file that holds the counts;
    library_size (N,) total counts of a spot over ALL measured genes when the file tells (its matrix may hold a gene subset), else None;
    tables the text files read beside the counts (positions, labels, library sizes); image_file the file of the image or ''.
    """

    counts: sp.csr_matrix | None
    genes: np.ndarray
    barcodes: np.ndarray
    xy: np.ndarray
    grid: np.ndarray | None = None
    labels: np.ndarray | None = None
    classes: list[str] = field(default_factory=list)
    image: np.ndarray | Callable[[], np.ndarray] | None = None
    image_scale: float | None = None
    patches: Patches | None = None
    um_per_px: float | None = None
    sample: str = ""
    patient: str = ""
    source: str = ""
    library_size: np.ndarray | None = None
    tables: list[str] = field(default_factory=list)
    image_file: str = ""

    def __post_init__(self):
        if self.labels is None:
            self.labels = np.full(self.n_spots, -1, dtype=np.int64)

    @property
    def n_spots(self) -> int:
        return len(self.barcodes)

    @property
    def n_genes(self) -> int:
        return len(self.genes)

    def __repr__(self) -> str:
        return f"Slide({self.sample!r}, {self.n_spots} spots x {self.n_genes} genes, {len(self.classes)} classes, source={self.source!r})"

    def subset(self, rows) -> Slide:
        """The slide of the spots in `rows` (boolean mask (N,) or index array, in that order); image and patches stay unread."""
        rows = np.asarray(rows)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
        out = copy.copy(self)
        for name in ("counts", "barcodes", "xy", "grid", "labels", "library_size"):
            value = getattr(self, name)
            setattr(out, name, None if value is None else value[rows])
        out.patches = None if self.patches is None else self.patches.subset(rows)
        return out

    def select_genes(self, names: Sequence[str]) -> Slide:
        """The slide with the genes `names`, in that order. Raises DataError when one of them is absent: an absent gene is missing, not zero."""
        column = {gene: j for j, gene in enumerate(self.genes)}
        absent = [name for name in names if name not in column]
        if absent:
            raise DataError(f"{self.source or self.sample} lacks {len(absent)} of the {len(names)} genes asked for ({', '.join(absent[:5])} ...): "
                            "ask for genes common to all slides")
        columns = np.array([column[name] for name in names], dtype=np.int64)
        out = copy.copy(self)
        out.genes = self.genes[columns]
        out.counts = None if self.counts is None else self.counts[:, columns]
        return out


def _get_image(slide: Slide) -> np.ndarray | None:
    if callable(slide._image):
        slide._image = slide._image()
    return slide._image


def _set_image(slide: Slide, value) -> None:
    if isinstance(value, np.ndarray):
        value = _as_uint8(value)
    slide._image = value


# After the decorator, so that the dataclass keeps None as the field's default while reading goes through the property.
Slide.image = property(_get_image, _set_image, doc="(H, W, 3) uint8 or None, read on first use")


def _as_uint8(image: np.ndarray) -> np.ndarray:
    """(H, W), (H, W, 3) or (H, W, 4), uint8 or float in [0, 1] -> (H, W, 3) uint8."""
    if image.dtype != np.uint8:
        image = np.clip(np.rint(np.asarray(image, dtype=np.float32) * 255), 0, 255).astype(np.uint8)
    return np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image[..., :3]


def file_checksum(*paths) -> str:
    """SHA-256 (hex) of the bytes of the files, one after the other; of one file it is what `sha256sum` prints."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            with open(path, "rb") as handle:
                for block in iter(lambda: handle.read(1 << 20), b""):
                    digest.update(block)
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}): check the path") from error
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------- checks and HDF5
@contextmanager
def _open_h5(path, what: str):
    """h5py.File for reading; whatever h5py raises while the file is in use becomes a DataError about `path`."""
    if not Path(path).is_file():
        raise DataError(f"{path} does not exist: check the path or download it")
    try:
        with h5py.File(path, "r") as handle:
            yield handle
    except DataError:
        raise
    except (OSError, KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path} cannot be read as {what} ({reason}): it is truncated or of another kind, download or export it again") from error


def _decode(values) -> np.ndarray:
    """HDF5 dataset, or a field read from a compound one, -> numpy array, with str for any kind of string."""
    values = np.asarray(values[()] if isinstance(values, h5py.Dataset) else values)
    if values.dtype.kind == "O":
        values = np.array([v.decode("utf-8") if isinstance(v, bytes) else str(v) for v in values.ravel().tolist()], dtype=str).reshape(values.shape)
    return np.char.decode(values, "utf-8") if values.dtype.kind == "S" else values


def _count_problem(values: np.ndarray) -> str | None:
    """What keeps `values` from being raw counts: 'NaN', 'negative values', 'non-integer values', or None."""
    if values.size and values.dtype.kind == "f" and not np.isfinite(values).all():
        return "NaN or infinite values"
    if values.size and values.min() < 0:
        return "negative values"
    if values.size and values.dtype.kind == "f" and (values != np.rint(values)).any():
        return "non-integer values"
    return "values above 2^31" if values.size and values.max() > np.iinfo(np.int32).max else None


def _count_matrix(data, indices, indptr, shape) -> sp.csr_matrix:
    """CSR int32 in canonical form: sorted, no duplicates, no stored zeros (a gene filter may count stored entries)."""
    matrix = sp.csr_matrix((data.astype(np.int32), indices, indptr), shape=tuple(int(n) for n in shape))
    matrix.check_format(full_check=True)
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    return matrix


def _check_unique(barcodes: np.ndarray, path) -> None:
    if len(np.unique(barcodes)) != len(barcodes):
        name, n = Counter(barcodes.tolist()).most_common(1)[0]
        raise DataError(f"{path} holds barcode {name} {n} times: make barcodes unique (one file per slide)")


def _unique_genes(genes: np.ndarray, path) -> np.ndarray:
    """Repeated symbols become SYMBOL, SYMBOL-1, ... as anndata's var_names_make_unique does: distinct Ensembl ids are distinct columns."""
    taken, used, seen, out = set(genes.tolist()), Counter(), set(), []
    for gene in genes.tolist():
        name = gene
        while name in seen or (name != gene and name in taken):
            used[gene] += 1
            name = f"{gene}-{used[gene]}"
        seen.add(name)
        out.append(name)
    renamed = [gene for gene, name in zip(genes.tolist(), out) if gene != name]
    if renamed:
        warnings.warn(f"{path}: {len(renamed)} repeated gene symbols ({', '.join(renamed[:3])}) were made unique by -1, -2, ...", stacklevel=3)
    return np.array(out, dtype=str)


def read_10x_h5(path, counts: bool = True) -> tuple[sp.csr_matrix | None, np.ndarray, np.ndarray]:
    """10x HDF5 (v3 `matrix/features`, or v2 `<genome>/gene_names`) -> counts (N, G) int32 CSR, genes (G,), barcodes (N,).

    The file stores features x barcodes as CSC, which is barcodes x features as CSR. Only 'Gene Expression' features are kept. With counts=False
    the matrix is not read: None, no genes, barcodes. Raises DataError (unreadable, NaN, negative or non-integer counts, repeated barcodes).
    """
    with _open_h5(path, "a 10x HDF5 matrix") as handle:
        groups = [handle["matrix"]] if "matrix" in handle else [g for g in handle.values() if isinstance(g, h5py.Group) and "gene_names" in g]
        if len(groups) != 1:
            raise DataError(f"{path} holds {len(groups)} 10x matrices: give a filtered_feature_bc_matrix.h5 of one genome")
        group = groups[0]
        barcodes = _decode(group["barcodes"])
        _check_unique(barcodes, path)
        if not counts:
            return None, np.array([], dtype=str), barcodes
        data = group["data"][()]
        problem = _count_problem(data)
        if problem:
            raise DataError(f"{path} holds {problem} in its counts: give the raw matrix that Space Ranger wrote")
        n_genes, n_spots = group["shape"][()]
        matrix = _count_matrix(data, group["indices"][()], group["indptr"][()], (n_spots, n_genes))  # (N, G)
        if "features" in group:
            genes = _decode(group["features/name"])
            keep = np.flatnonzero(_decode(group["features/feature_type"]) == "Gene Expression")
        else:
            genes, keep = _decode(group["gene_names"]), np.arange(n_genes)
        if len(barcodes) != n_spots or len(genes) != n_genes:
            raise DataError(f"{path} has a {n_genes} x {n_spots} matrix but {len(genes)} genes and {len(barcodes)} barcodes: download it again")
    if len(keep) < len(genes):
        matrix, genes = matrix[:, keep], genes[keep]
    return matrix, _unique_genes(genes, path), barcodes


# --------------------------------------------------------------------------------------------------------------- labels
_NO_LABEL = frozenset({"", "na", "nan", "none", "<na>", "undetermined"})
_CORTEX = {**{f"L{i}": f"Layer{i}" for i in range(1, 7)}, "WM": "WM"}


def _encode_labels(names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Label names -> labels (N,) int64 with -1 for none, classes in alphabetical order (Layer1 .. Layer6, WM for the cortex)."""
    names = ["" if str(name).strip().lower() in _NO_LABEL else str(name).strip() for name in names]
    if set(names) - {""} <= set(_CORTEX):
        names = [_CORTEX.get(name, "") for name in names]
    classes = sorted(set(names) - {""})
    code = {name: i for i, name in enumerate(classes)}
    return np.array([code.get(name, -1) for name in names], dtype=np.int64), classes


def _read_table(path) -> tuple[list[str], list[list[str]]]:
    """First row and all rows after it, of a tab- or comma-separated file."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:
            delimiter = "\t" if "\t" in handle.readline() else ","
            handle.seek(0)
            rows = [row for row in csv.reader(handle, delimiter=delimiter) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a text table ({error}): give a CSV or TSV file") from error
    if not rows:
        raise DataError(f"{path} is empty: give a table with a row per barcode")
    return rows[0], rows[1:]


def _metadata(path) -> tuple[dict[str, dict[str, str]], str | None]:
    """spatialLIBD metadata.tsv -> {barcode: row} and its label column. R writes row names that have no header: rows may be one field longer."""
    header, rows = _read_table(path)
    label = next((name for name in ("layer_guess", "layer_guess_reordered") if name in header), None)
    table = {}
    for row in rows:
        record = dict(zip(header, row[len(row) - len(header):] if len(row) > len(header) else row))
        table[record.get("barcode", row[0])] = record
    return table, label


def _label_table(path, sample: str) -> dict[str, str]:
    """{barcode: label} from metadata.tsv, barcode_level_layer_map.tsv (barcode, slice, label) or a two-column file, header or not."""
    header, rows = _read_table(path)
    if "layer_guess" in header or "layer_guess_reordered" in header:
        table, label = _metadata(path)
        return {barcode: record[label] for barcode, record in table.items()}
    rows = [header, *rows]
    width = max(len(row) for row in rows)
    if width == 3 and any(row[1] == sample for row in rows if len(row) == 3):
        return {row[0]: row[2] for row in rows if len(row) == 3 and row[1] == sample}
    if width != 2:
        raise DataError(f"{path} has {width} columns and no rows for {sample}: give two columns, barcode and label")
    return {row[0]: row[1] for row in rows if len(row) == 2}


def _join_labels(table: dict[str, str], barcodes: np.ndarray, path) -> tuple[np.ndarray, list[str]]:
    if not any(barcode in table for barcode in barcodes.tolist()):
        raise DataError(f"{path} shares no barcode with the slide (it has {next(iter(table), 'none')}, the slide {barcodes[0]}): "
                        "give the label file of this slide")
    return _encode_labels([table.get(barcode, "") for barcode in barcodes.tolist()])


def _folder_labels(folder: Path, sample: str, labels, barcodes: np.ndarray):
    """labels (N,), classes, patient, library size (N,) or None, files read: from `labels`, else metadata.tsv, else barcode_level_layer_map.tsv."""
    codes, classes, patient, library_size = np.full(len(barcodes), -1, dtype=np.int64), [], "", None
    metadata = folder / "metadata.tsv"
    table, column = _metadata(metadata) if metadata.is_file() else ({}, None)
    files = [str(metadata)] if metadata.is_file() else []
    records = [table.get(barcode, {}) for barcode in barcodes.tolist()]
    patient = next((record["subject"] for record in records if record.get("subject")), "")
    try:
        library_size = np.array([float(record["sum_umi"]) for record in records])
    except (KeyError, ValueError):
        library_size = None  # no such column, or a spot without a row
    layer_map = next((path for path in (base / "barcode_level_layer_map.tsv" for base in (folder, folder.parent)) if path.is_file()), None)
    if labels is not None:
        codes, classes = _join_labels(_label_table(labels, sample), barcodes, labels)
        files.append(str(labels))
    elif column is not None:
        codes, classes = _join_labels({barcode: record.get(column, "") for barcode, record in table.items()}, barcodes, metadata)
    elif layer_map is not None:
        found = _label_table(layer_map, sample)
        codes, classes = _join_labels(found, barcodes, layer_map)
        files.append(str(layer_map))
    return codes, classes, patient, library_size, files


# --------------------------------------------------------------------------------------------------------------- Visium
_POSITIONS = ("barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres")


def _find(folder: Path, *names: str) -> Path | None:
    """The first of `names` in the folder or its spatial/, also with a sample prefix (151673_tissue_hires_image.png)."""
    for name in names:
        for base in (folder / "spatial", folder):
            if (base / name).is_file():
                return base / name
            prefixed = sorted(base.glob(f"*_{name}"))
            if prefixed:
                return prefixed[0]
    return None


def _read_positions(path: Path) -> dict[str, np.ndarray]:
    """Columns of a positions file: CSV without (Space Ranger 1) or with (2, 3) a header, or parquet (Visium HD)."""
    try:
        if path.suffix == ".parquet":
            try:
                from pyarrow import parquet
            except ImportError as error:
                raise DataError(f"{path} needs pyarrow to be read: pip install pyarrow") from error
            table = parquet.read_table(path, columns=list(_POSITIONS))
            columns = {name: table[name].to_numpy() for name in _POSITIONS}
        else:
            with open(path, encoding="utf-8-sig") as handle:
                header = handle.readline().strip().split(",")
            if header == [""]:
                raise ValueError("it is empty")
            named = "in_tissue" in header
            kinds = [("barcode", "O")] + [(name, "f8") for name in _POSITIONS[1:]]
            columns = np.loadtxt(path, delimiter=",", dtype=kinds, skiprows=int(named), ndmin=1, encoding="utf-8", comments=None,
                                 usecols=[header.index(name) for name in _POSITIONS] if named else range(6))
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not a positions table ({error}): it needs the columns {', '.join(_POSITIONS)}") from error
    columns = {name: np.asarray(columns[name]) for name in _POSITIONS}
    columns["barcode"] = columns["barcode"].astype(str)
    _check_unique(columns["barcode"], path)
    return columns


def _read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError) as error:
        raise DataError(f"{path} cannot be read as an image ({error}): it is truncated, copy it again or delete it") from error


def _check_fit(xy: np.ndarray, scale: float, height: int, width: int, path) -> None:
    """More than 5 % of the spots outside the image means that scale factor and image are not of one slide."""
    at = xy * scale  # (N, 2) image px
    outside = ((at < 0) | (at >= [width, height])).any(axis=1).mean() if len(at) else 0.0
    if outside > 0.05:
        raise DataError(f"{path} ({width} x {height} px) does not fit its scale factor {scale:g}: {outside:.0%} of the spots fall outside, "
                        "put the image and scalefactors_json.json of the same slide in place")


def _folder_image(folder: Path, xy: np.ndarray) -> tuple[Callable[[], np.ndarray] | None, float | None, dict, str]:
    """Function that reads the hires (else lowres) image, its scale, the scale factors, and the image's path."""
    path, scales = _find(folder, "scalefactors_json.json"), {}
    if path is not None:
        try:
            scales = {key: float(value) for key, value in json.loads(path.read_text(encoding="utf-8")).items() if not isinstance(value, (str, list))}
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise DataError(f"{path} is not a JSON object of scale factors ({error}): copy it again from the Space Ranger output") from error
    for size in ("hires", "lowres"):
        picture = _find(folder, f"tissue_{size}_image.png", f"tissue_{size}_image.jpg")
        if picture is None:
            continue
        key = f"tissue_{size}_scalef"
        if not scales.get(key, 0) > 0:
            path = path or folder / "spatial" / "scalefactors_json.json"
            raise DataError(f"{path} has no {key} for {picture.name}: copy scalefactors_json.json from the Space Ranger output")
        try:
            with Image.open(picture) as image:
                width, height = image.size
                image.verify()  # reads the chunks, not the pixels: a truncated file is found now and not after training
        except (OSError, SyntaxError, ValueError, UnidentifiedImageError) as error:
            raise DataError(f"{picture} cannot be read as an image ({error}): it is truncated, copy it again or delete it") from error
        _check_fit(xy, scales[key], height, width, picture)
        return functools.partial(_read_image, picture), scales[key], scales, str(picture)
    return None, None, scales, ""


def _lattice_um_per_px(grid: np.ndarray | None, xy: np.ndarray) -> float | None:
    """Micrometres per px of a Visium hexagonal lattice (row + column even, 100 um between neighbours), else None.

    The least-squares lattice vectors span 50 x 86.6 um a cell; unlike the distance to the nearest spot they average the rounding of coordinates away
    and bear missing spots. `spot_diameter_fullres` is not 55 um: on 151673 it would give .571 um/px, where the lattice gives .727.
    """
    if grid is None or (grid.sum(axis=1) % 2).any():
        return None
    vectors, _, rank, _ = np.linalg.lstsq(np.column_stack([grid, np.ones(len(grid))]).astype(np.float64), xy, rcond=None)  # (3, 2)
    area = abs(np.linalg.det(vectors[:2]))  # px^2 of one step in row x one step in column
    return float(np.sqrt(50.0 * 50.0 * np.sqrt(3.0) / area)) if rank == 3 and area > 0 else None


def _row_of(barcodes: np.ndarray, positions: dict, matrix_path, positions_path) -> np.ndarray:
    """Row of each barcode in the positions file. Raises DataError when barcodes have no position."""
    row = {barcode: i for i, barcode in enumerate(positions["barcode"].tolist())}
    rows = np.array([row.get(barcode, -1) for barcode in barcodes.tolist()], dtype=np.int64)
    missing = int((rows < 0).sum())
    if missing:
        some = "none" if missing == len(rows) else f"only {len(rows) - missing}"
        raise DataError(f"{positions_path} holds {some} of the {len(rows)} barcodes of {matrix_path} ({missing} missing, such as "
                        f"{barcodes[rows < 0][0]}): take both files from the same Space Ranger run")
    return rows


def load_visium(folder, counts: bool = True, labels=None) -> Slide:
    """Space Ranger 1-3 output folder (or one binned_outputs/square_*um of Visium HD) -> Slide of its in-tissue spots.

    Rows follow the barcodes of filtered_feature_bc_matrix.h5. With counts=False the matrix is not needed: then rows follow the matrix if it is there,
    else metadata.tsv, else the positions file. `labels`: a two-column CSV/TSV (barcode, label), metadata.tsv or barcode_level_layer_map.tsv; without
    it the latter two are looked for. Raises DataError for any file that is missing, damaged or of another slide.
    """
    folder = Path(os.path.abspath(folder))                               # a linked slice keeps the name of the link
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: give a Space Ranger output folder")
    sample = folder.parent.name if folder.name == "outs" else folder.name
    positions_path = _find(folder, "tissue_positions.csv", "tissue_positions_list.csv", "tissue_positions_list.txt", "tissue_positions.parquet")
    if positions_path is None:
        raise DataError(f"{folder / 'spatial'} has no tissue_positions.csv, tissue_positions_list.csv or .parquet: "
                        "copy spatial/ from the Space Ranger output")
    matrix_path = _find(folder, "filtered_feature_bc_matrix.h5")
    if matrix_path is None and counts:
        raise DataError(f"{folder} has no filtered_feature_bc_matrix.h5: copy it from the Space Ranger output (or load with counts=False)")
    positions = _read_positions(positions_path)
    in_tissue = positions["in_tissue"] > 0
    matrix, genes = None, np.array([], dtype=str)
    if matrix_path is not None:
        matrix, genes, barcodes = read_10x_h5(matrix_path, counts=counts)
    else:
        barcodes = positions["barcode"][in_tissue]
        listed = _metadata(folder / "metadata.tsv")[0] if (folder / "metadata.tsv").is_file() else {}
        rank = {barcode: i for i, barcode in enumerate(listed)}
        barcodes = barcodes[np.argsort([rank.get(barcode, len(rank)) for barcode in barcodes.tolist()], kind="stable")]
    rows = _row_of(barcodes, positions, matrix_path, positions_path)
    keep = np.flatnonzero(in_tissue[rows])
    if not len(keep):
        raise DataError(f"{positions_path} marks no spot of the matrix as in tissue: take both files from the same Space Ranger run")
    if len(keep) < len(rows):
        rows, barcodes, matrix = rows[keep], barcodes[keep], None if matrix is None else matrix[keep]
    xy = np.stack([positions["pxl_col_in_fullres"][rows], positions["pxl_row_in_fullres"][rows]], axis=1).astype(np.float64)  # (N, 2) x, y
    grid = np.stack([positions["array_row"][rows], positions["array_col"][rows]], axis=1).astype(np.int64)  # (N, 2)
    codes, classes, patient, library_size, tables = _folder_labels(folder, sample, labels, barcodes)
    image, scale, scales, image_file = _folder_image(folder, xy)
    um_per_px = scales.get("microns_per_pixel") or _lattice_um_per_px(grid, xy)
    return Slide(matrix, genes, barcodes, xy, grid, codes, classes, image, scale, None, um_per_px, sample, patient,
                 str(matrix_path or positions_path), library_size, [str(positions_path), *tables], image_file)


# ----------------------------------------------------------------------------------------------------------------- h5ad
_LABEL_KEYS = ("sce.layer_guess", "layer_guess", "label", "labels", "Layer", "layer", "ground_truth", "Ground Truth", "Region", "region")


def _fields(node) -> list[str]:
    """Column names of a data frame: an HDF5 group, or the compound dataset of AnnData < 0.7."""
    return [name for name in (node.dtype.names if isinstance(node, h5py.Dataset) else node.keys()) if name != "__categories"]


def _column(handle: h5py.File, frame, name: str) -> np.ndarray:
    """One data frame column: strings as str ('' = missing), numbers as numbers (NaN = missing); every AnnData encoding of categoricals."""
    node = frame[name]
    if isinstance(node, h5py.Group) and "mask" in node:  # nullable-integer, -boolean, -string-array
        values, mask = _decode(node["values"]), node["mask"][()].astype(bool)
        return np.where(mask, "" if values.dtype.kind == "U" else np.nan, values)
    if isinstance(node, h5py.Group):
        codes, categories = node["codes"][()], _decode(node["categories"])
    elif isinstance(node, h5py.Dataset) and "categories" in node.attrs:  # AnnData 0.7: reference to obs/__categories/<name>
        codes, categories = node[()], _decode(handle[node.attrs["categories"]])
    elif f"uns/{name}_categories" in handle:  # AnnData < 0.7
        codes, categories = np.asarray(node[()] if isinstance(node, h5py.Dataset) else node), _decode(handle[f"uns/{name}_categories"])
    else:
        return _decode(node)
    if (codes < 0).any():  # -1 = missing: the appended last category
        categories = np.append(categories, np.nan if categories.dtype.kind == "f" else "")
    return categories[codes]


def _index(handle: h5py.File, frame) -> np.ndarray:
    names = _fields(frame)
    name = _decode(frame.attrs["_index"]).item() if "_index" in frame.attrs else next((n for n in ("_index", "index") if n in names), names[0])
    return _column(handle, frame, name).astype(str)


def _read_matrix(node, shape: tuple[int, int]) -> tuple[sp.csr_matrix | None, str | None]:
    """CSR, CSC or dense X -> (counts (N, G) int32 CSR, None), or (None, what keeps it from being counts). Dense X is read in blocks of rows."""
    if isinstance(node, h5py.Dataset):
        blocks = []
        for start in range(0, shape[0], 4096):
            block = node[start:start + 4096]
            problem = _count_problem(block)
            if problem:
                return None, problem
            blocks.append(sp.csr_matrix(block.astype(np.int32)))
        return sp.vstack(blocks, format="csr"), None
    data = node["data"][()]
    problem = _count_problem(data)
    if problem:
        return None, problem
    kind = node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", "csr"))
    kind = kind.decode() if isinstance(kind, bytes) else str(kind)
    if kind.startswith("csc"):
        return _count_matrix(data, node["indices"][()], node["indptr"][()], shape[::-1]).T.tocsr(), None
    return _count_matrix(data, node["indices"][()], node["indptr"][()], shape), None


def _h5ad_counts(handle: h5py.File, layer: str | None, n_spots: int, path) -> tuple[sp.csr_matrix, np.ndarray]:
    """Integer counts and their genes: `layer` ('X', 'raw' or a name in layers/), else the first of X, layers/counts and raw/X that holds counts."""
    raw, raw_var = ("raw/X", "raw/var") if "raw/X" in handle else ("raw.X", "raw.var")  # the second pair: AnnData < 0.7
    places = {"X": ("X", "var"), "counts": ("layers/counts", "var"), "raw": (raw, raw_var)}
    if layer is not None:
        places = {layer: places.get(layer, (f"layers/{layer}", "var"))}
    problem = None
    for where, var in places.values():
        if where not in handle:
            continue
        genes = _index(handle, handle[var])
        matrix, found = _read_matrix(handle[where], (n_spots, len(genes)))
        if matrix is not None:
            return matrix, _unique_genes(genes, path)
        problem = problem or f"{found} in {where}"
    layers = ", ".join(handle["layers"]) if "layers" in handle else ""
    problem = problem or f"no {layer or 'X'}"
    raise DataError(f"{path} holds {problem}: give raw counts, with layer=<name> if they are in a layer (layers here: {layers or 'none'})")


def _h5ad_image(path, key: str) -> np.ndarray:
    with _open_h5(path, "an h5ad file") as handle:
        return _as_uint8(handle[key][()])


def _h5ad_picture(handle: h5py.File, path: Path, xy: np.ndarray) -> tuple[Callable[[], np.ndarray] | None, float | None]:
    """uns/spatial/<library>/images/{hires, lowres, ...}: function that reads it, and its scale factor."""
    libraries = handle.get("uns/spatial", {})
    library = path.stem if path.stem in libraries else next(iter(libraries), None) if len(libraries) == 1 else None
    images = {} if library is None else libraries[library].get("images", {})
    for size in sorted(images, key=lambda name: ("hires", "lowres").index(name) if name in ("hires", "lowres") else 2):
        key = f"uns/spatial/{library}/scalefactors/tissue_{size}_scalef"
        if key not in handle:
            raise DataError(f"{path} has an image {size} but no {key}: export both or remove the image")
        scale, picture = float(handle[key][()]), images[size]
        _check_fit(xy, scale, *picture.shape[:2], path)
        return functools.partial(_h5ad_image, path, picture.name), scale
    return None, None


def _h5ad_xy(handle: h5py.File, obs, path) -> np.ndarray:
    names = _fields(obs)
    obsm = handle.get("obsm")
    if obsm is not None and "spatial" in _fields(obsm) and not isinstance(obsm["spatial"], h5py.Group):
        return np.asarray(obsm["spatial"][()] if isinstance(obsm, h5py.Group) else obsm["spatial"], dtype=np.float64)[:, :2]
    if {"pxl_col_in_fullres", "pxl_row_in_fullres"} <= set(names):
        return np.stack([_column(handle, obs, f"pxl_{axis}_in_fullres").astype(np.float64) for axis in ("col", "row")], axis=1)
    raise DataError(f"{path} has no coordinates: it needs obsm['spatial'] or obs columns pxl_col_in_fullres and pxl_row_in_fullres")


def load_h5ad(path, label_key: str | None = None, layer: str | None = None, counts: bool = True) -> Slide:
    """AnnData file (any AnnData version; CSR, CSC or dense X) -> Slide of its in-tissue spots, rows in file order.

    Counts: `layer` ('X', 'raw' or a name in layers/), else the first of X, layers/counts, raw/X that holds integers. Labels: obs column `label_key`,
    else the first known one (sce.layer_guess, layer_guess, label, ...); NaN and 'undetermined' are -1. Raises DataError.
    """
    path = Path(path).resolve()
    with _open_h5(path, "an h5ad file") as handle:
        obs = handle["obs"]
        names, barcodes = _fields(obs), _index(handle, obs)
        _check_unique(barcodes, path)
        matrix, genes = _h5ad_counts(handle, layer, len(barcodes), path) if counts else (None, np.array([], dtype=str))
        xy = _h5ad_xy(handle, obs, path)
        if xy.shape != (len(barcodes), 2) or not np.isfinite(xy).all():
            raise DataError(f"{path} has coordinates of shape {xy.shape} or not finite: it needs one finite x, y per spot in obsm['spatial']")
        grid = None
        if {"array_row", "array_col"} <= set(names):
            grid = np.stack([_column(handle, obs, name).astype(np.float64) for name in ("array_row", "array_col")], axis=1)
            grid = grid.astype(np.int64) if np.isfinite(grid).all() else None
        if label_key is not None and label_key not in names:
            raise DataError(f"{path} has no obs column {label_key}: choose one of {', '.join(names)}")
        label_key = label_key or next((key for key in _LABEL_KEYS if key in names), None)
        labels, classes = _encode_labels(_column(handle, obs, label_key).tolist()) if label_key else (None, [])
        tissue = _column(handle, obs, "in_tissue").astype(np.float64) > 0 if "in_tissue" in names else np.ones(len(barcodes), dtype=bool)
        umi = next((key for key in ("sum_umi", "sce.sum_umi") if key in names), None)
        library_size = _column(handle, obs, umi).astype(np.float64) if umi else None
        patient = _decode(handle["uns/patient"]).item() if isinstance(handle.get("uns/patient"), h5py.Dataset) else None
        donor = next((key for key in ("patient", "subject", "donor", "sce.subject") if key in names), None)
        patient = patient or (_column(handle, obs, donor).astype(str)[0] if donor and len(barcodes) else "")
        um_per_px = float(handle["uns/um_per_px"][()]) if "uns/um_per_px" in handle else _lattice_um_per_px(grid, xy)
        image, scale = _h5ad_picture(handle, path, xy)
    slide = Slide(matrix, genes, barcodes, xy, grid, labels, classes, image, scale, None, um_per_px, path.stem, str(patient), str(path), library_size,
                  image_file="" if image is None else str(path))
    return slide if tissue.all() or not tissue.any() else slide.subset(tissue)


# ----------------------------------------------------------------------------------------------------------------- HEST
class Patches:
    """(N, h, w, 3) uint8 patches in an HDF5 file, read when indexed; `rows` are the rows of the file that belong to this slide, in its order.

    The file is opened for every read and closed after it, so the object can be copied to worker processes.
    """

    def __init__(self, path, rows: np.ndarray | None = None):
        self.path = str(path)
        with _open_h5(path, "HEST patches") as handle:
            shape = handle["img"].shape
            if len(shape) != 4 or handle["img"].dtype != np.uint8:
                raise DataError(f"{path} holds img of shape {shape}, {handle['img'].dtype}: it must be (N, h, w, 3) uint8")
        self.rows = np.arange(shape[0]) if rows is None else np.asarray(rows, dtype=np.int64)
        self.shape = (len(self.rows), *shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, rows) -> Patches:
        return Patches(self.path, self.rows[rows])

    def __getitem__(self, item) -> np.ndarray:
        """int -> (h, w, 3); slice, index array or boolean mask -> (n, h, w, 3), in the order asked for."""
        wanted = self.rows[item]
        rows, inverse = np.unique(wanted, return_inverse=True)
        starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)  # h5py reads a run of rows much faster than a list of them
        out = np.empty((len(rows), *self.shape[1:]), dtype=np.uint8)
        with _open_h5(self.path, "HEST patches") as handle:
            for start, stop in zip(starts, [*starts[1:], len(rows)]):
                handle["img"].read_direct(out, np.s_[rows[start]:rows[stop - 1] + 1], np.s_[start:stop])
        return out[0] if np.ndim(wanted) == 0 else out[inverse.reshape(-1)]  # (n, h, w, 3)


def _hest_folder(root) -> Path:
    for name in ("st", "adata"):
        if (Path(root) / name).is_dir():
            return Path(root).resolve() / name
    raise DataError(f"{root} has neither st/ nor adata/: give a HEST folder or a HEST-benchmark task folder")


def hest_samples(root) -> list[str]:
    """Sample ids of a HEST folder (st/*.h5ad) or a HEST-benchmark task (adata/*.h5ad)."""
    return sorted(path.stem for path in _hest_folder(root).glob("*.h5ad"))


def hest_split(root, fold: int) -> tuple[list[str], list[str]]:
    """(train ids, test ids) of splits/{train,test}_<fold>.csv."""
    sides = []
    for side in ("train", "test"):
        path = Path(root) / "splits" / f"{side}_{fold}.csv"
        if not path.is_file():
            folds = sorted(found.stem.split("_")[1] for found in path.parent.glob(f"{side}_*.csv"))
            raise DataError(f"{path} does not exist: choose one of the folds {', '.join(folds) or '(none here)'}")
        header, rows = _read_table(path)
        column = header.index("sample_id") if "sample_id" in header else 0
        sides.append([row[column] for row in rows])
    return sides[0], sides[1]


def hest_genes(root) -> list[str]:
    """The target genes of a HEST-benchmark task: var_50genes.json."""
    path = Path(root) / "var_50genes.json"
    try:
        genes = json.loads(path.read_text(encoding="utf-8"))
        return [str(gene) for gene in (genes["genes"] if isinstance(genes, dict) else genes)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a JSON list of genes ({error}): download it again") from error


def load_hest(root, sample: str, patches: bool = True, label_key: str | None = None, counts: bool = True) -> Slide:
    """One sample of HEST-1k (st/, patches/, HEST*.csv) or of a HEST-benchmark task (adata/, patches/, metadata.csv) -> Slide.

    With patches, only spots that have one are kept (joined by barcode). Raises DataError, also when h5ad and patches share no barcode.
    """
    folder = _hest_folder(root)
    if sample not in hest_samples(root):
        raise DataError(f"{folder / sample}.h5ad does not exist: choose one of {', '.join(hest_samples(root)) or '(none here)'}")
    slide = load_h5ad(folder / f"{sample}.h5ad", label_key, counts=counts)
    for path in sorted(folder.parent.glob("HEST*.csv")) + sorted(folder.parent.glob("metadata.csv")):
        header, rows = _read_table(path)
        record = next((r for r in (dict(zip(header, row)) for row in rows) if r.get("id") == sample), {})
        slide.patient = record.get("patient") or slide.patient
        try:
            slide.um_per_px = float(record.get("pixel_size_um_estimated") or slide.um_per_px or "nan")
        except ValueError as error:
            raise DataError(f"{path} has a pixel_size_um_estimated of {sample} that is not a number: correct it") from error
    if not patches:
        return slide
    path = folder.parent / "patches" / f"{sample}.h5"
    with _open_h5(path, "HEST patches") as handle:
        found = _decode(handle["barcode" if "barcode" in handle else "barcodes"]).reshape(-1).astype(str)  # (N, 1) -> (N,)
        if len(found) != len(handle["img"]):
            raise DataError(f"{path} has {len(handle['img'])} patches but {len(found)} barcodes: download it again")
    _check_unique(found, path)
    row = {barcode: i for i, barcode in enumerate(found.tolist())}
    rows = np.array([row.get(barcode, -1) for barcode in slide.barcodes.tolist()], dtype=np.int64)
    if not (rows >= 0).any():
        raise DataError(f"{path} shares no barcode with {slide.source}: take both from the same HEST release")
    slide = slide.subset(rows >= 0)
    slide.patches = Patches(path, rows[rows >= 0])
    return slide


def load_patch_folder(root, sample: str = "", patches: bool = True) -> list[Slide]:
    """Slides without counts, for prediction: a HEST layout, a folder of HEST patch files (*.h5: img, coords, barcode), or of features files (*.npz:
    embedding, coords, barcodes). `sample`: only that one; patches=False leaves a HEST layout's patches unread. Raises DataError with what was looked for.
    """
    root = Path(root)
    if (root / "adata").is_dir() or (root / "st").is_dir():
        return [load_hest(root, name, patches, counts=False) for name in ([sample] if sample else hest_samples(root))]
    paths = sorted([*root.glob("patches/*.h5"), *root.glob("*.h5")]) or sorted(root.glob("*.npz"))
    paths = [path for path in paths if sample in ("", path.stem)]
    if not paths:
        raise DataError(f"{root} holds neither adata/, st/, *.h5 patches nor *.npz features{' of ' + sample if sample else ''}: check the path")
    out = []
    for path in paths:
        try:
            if path.suffix == ".h5":
                with h5py.File(path, "r") as handle:
                    barcodes = handle["barcode" if "barcode" in handle else "barcodes"][:].reshape(-1).astype(str)
                    xy = handle["coords"][:].astype(np.float64)
            else:
                with np.load(path, allow_pickle=False) as handle:
                    barcodes, xy = handle["barcodes"].astype(str), handle["coords"].astype(np.float64)
        except (OSError, KeyError, ValueError) as error:
            raise DataError(f"{path} lacks barcodes or coords ({error}): patches need img, coords, barcode; features embedding, coords, "
                            "barcodes") from error
        stack = Patches(path) if path.suffix == ".h5" else None
        out.append(Slide(None, np.array([]), barcodes, xy, patches=stack, sample=path.stem, source=str(path)))
    return out


# ------------------------------------------------------------------------------------------------------- any layout
def _is_visium(folder: Path) -> bool:
    return folder.is_dir() and ((folder / "spatial").is_dir() or _find(folder, "filtered_feature_bc_matrix.h5") is not None)


def is_one_slide(root) -> bool:
    """Whether `root` is itself a slide (a Visium folder or a file), not a folder of slides."""
    return Path(root).is_file() or _is_visium(Path(root))


def list_slices(root) -> list[str]:
    """Names under root that `load_slide(root, name)` reads: Visium folders, h5ad files, or the samples of a HEST folder."""
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder: give the folder that holds the slices")
    if (root / "st").is_dir() or (root / "adata").is_dir():
        return hest_samples(root)
    return sorted(path.name if path.is_dir() else path.stem for path in root.iterdir() if path.suffix == ".h5ad" or _is_visium(path))


def load_slide(root, sample: str | None = None, counts: bool = True, labels=None) -> Slide:
    """Visium folder, h5ad file, or one `sample` of a folder of Visium folders, of h5ad files or of a HEST layout -> Slide.

    `labels`: a label file as in `load_visium`, or the name of an obs column of an h5ad. Raises DataError, with the names to choose from.
    """
    root = Path(root).resolve()
    if sample is None and root.is_dir() and not _is_visium(root):
        names = list_slices(root)
        if len(names) != 1:
            raise DataError(f"{root} holds {len(names)} slices ({', '.join(names) or 'no Visium folder, h5ad or HEST layout'}): name one of them")
        sample = names[0]
    path = root if sample is None or (root.name == sample and _is_visium(root)) else root / sample
    if path.is_dir():
        return load_visium(path, counts, labels)
    path = path if path.suffix == ".h5ad" else path.with_name(path.name + ".h5ad")
    is_file = labels is not None and Path(labels).is_file()
    label_key = None if is_file else labels
    if path.is_file():
        slide = load_h5ad(path, label_key, counts=counts)
    elif (root / "st").is_dir() or (root / "adata").is_dir():
        slide = load_hest(root, sample, label_key=label_key, counts=counts)
    else:
        names = ", ".join(list_slices(root)) if root.is_dir() else ""
        if names:
            raise DataError(f"{root} has no slice {sample}: choose one of {names}")
        raise DataError(f"{root} is neither a folder of slices nor an h5ad: check the path")
    if is_file:
        slide.labels, slide.classes = _join_labels(_label_table(labels, slide.sample), slide.barcodes, labels)
        slide.tables = [str(labels)]
    return slide
