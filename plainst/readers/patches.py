"""HEST folders and folders of patches: H&E patches and, where there are any, counts -> Slide."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from plainst.readers.checked import (
    DataError,
    check_unique,
    check_xy,
    decode_strings,
    open_h5,
    read_array,
    read_gene_list,
    read_json,
    read_npz,
    read_table,
)
from plainst.readers.h5ad import load_h5ad
from plainst.readers.slides import (
    Patches,
    Slide,
    has_label,
)


def hest_folder(root) -> Path:
    for name in ("st", "adata"):
        if (Path(root) / name).is_dir():
            return Path(root).resolve() / name
    raise DataError(
        f"{root} has neither st/ nor adata/: give a HEST folder or a HEST-benchmark task folder"
    )


def hest_samples(root) -> list[str]:
    """Sample ids of a HEST folder (st/*.h5ad) or a HEST-benchmark task (adata/*.h5ad)."""
    return sorted(path.stem for path in hest_folder(root).glob("*.h5ad"))


def hest_split(root, fold: int) -> tuple[list[str], list[str]]:
    """(train ids, test ids) of splits/{train,test}_<fold>.csv."""
    sides = []
    for side in ("train", "test"):
        path = Path(root) / "splits" / f"{side}_{fold}.csv"
        if not path.is_file():
            folds = sorted(found.stem.split("_")[1] for found in path.parent.glob(f"{side}_*.csv"))
            raise DataError(
                f"{path} does not exist: choose one of the folds "
                f"{', '.join(folds) or '(none here)'}"
            )
        header, rows = read_table(path)
        if "sample_id" not in header or any(len(row) != len(header) for row in rows):
            raise DataError(
                f"{path} has no column sample_id or a row of another length: download it again"
            )
        sides.append([row[header.index("sample_id")] for row in rows])
    train, test = sides
    if len({*train, *test}) < len(train) + len(test):
        raise DataError(
            f"{path} and its train file name a sample twice: a sample stands once, on one side"
        )
    return train, test


def hest_genes(root) -> list[str]:
    """The target genes of a HEST-benchmark task: var_50genes.json."""
    return read_gene_list(Path(root) / "var_50genes.json")


def _patch_names(handle: h5py.File, path) -> np.ndarray:
    """(N,) barcodes of a patch file. Raises DataError unless there is one per patch and none stands
    twice."""
    # (N, 1) -> (N,)
    found = decode_strings(handle["barcode" if "barcode" in handle else "barcodes"]).reshape(-1)
    if len(found) != len(handle["img"]) or found.dtype.kind != "U":
        raise DataError(
            f"{path} has {len(handle['img'])} patches but {len(found)} barcodes of "
            f"{found.dtype}: download it again"
        )
    check_unique(found, path)
    return found


def _sample_records(root: Path, sample: str) -> list[tuple[Path, dict]]:
    """(file, {column: value}) of each file of a HEST folder that describes the sample: HEST-1k's
    metadata/<id>.json, then HEST*.csv, then metadata.csv. Raises DataError."""
    out = []
    path = root / "metadata" / f"{sample}.json"
    if path.is_file():
        record = read_json(path)
        if not isinstance(record, dict):
            raise DataError(f"{path} holds no JSON object: download it again")
        out.append((path, record))
    for path in [*sorted(root.glob("HEST*.csv")), *root.glob("metadata.csv")]:
        header, rows = read_table(path)
        if "id" not in header or any(len(row) != len(header) for row in rows):
            raise DataError(
                f"{path} has no column id or a row of another length: download it again"
            )
        of_sample = [row for row in rows if row[header.index("id")] == sample]
        if len(of_sample) > 1:
            raise DataError(f"{path} holds {sample} {len(of_sample)} times: keep one row")
        out += [(path, dict(zip(header, row))) for row in of_sample]
    return out


def load_hest(
    root,
    sample: str,
    patches: bool = True,
    label_key: str | None = None,
    counts: bool = True,
    layer: str | None = None,
    gene_key: str | None = None,
    library_key: str | None = None,
) -> Slide:
    """One sample of HEST-1k (st/, patches/, HEST*.csv) or of a HEST-benchmark task (adata/,
    patches/, metadata.csv) -> Slide.

    With patches, only spots that have one are kept (joined by barcode). The patient is that of
    metadata.csv, else of HEST*.csv, else of HEST-1k's metadata/<id>.json, else of the h5ad; '' is
    unknown. label_key, layer, gene_key,
    library_key: as in `load_h5ad`. Raises DataError, also when h5ad and patches share no barcode.
    """
    folder = hest_folder(root)
    if sample not in hest_samples(root):
        raise DataError(
            f"{folder / sample}.h5ad does not exist: choose one of "
            f"{', '.join(hest_samples(root)) or '(none here)'}"
        )
    path = folder / f"{sample}.h5ad"
    slide = load_h5ad(path, label_key, layer, counts, gene_key, library_key)
    for path, record in _sample_records(folder.parent, sample):
        slide.tables = [*slide.tables, str(path)]
        patient = str(record.get("patient") or "").strip()
        if has_label(patient) and patient.lower() not in ("unknown", "n/a"):
            slide.patient = patient
        try:
            pixel = float(record.get("pixel_size_um_estimated") or "nan")
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{path} has a pixel_size_um_estimated of {sample} that is not a number: correct it"
            ) from error
        if pixel <= 0 or pixel == float("inf"):
            raise DataError(
                f"{path} has a pixel_size_um_estimated of {sample} that is not positive: correct it"
            )
        slide.um_per_px = slide.um_per_px if np.isnan(pixel) else pixel
    if not patches:
        return slide
    path = folder.parent / "patches" / f"{sample}.h5"
    with open_h5(path, "HEST patches") as handle:
        found = _patch_names(handle, path)
    row = {barcode: i for i, barcode in enumerate(found.tolist())}
    rows = np.array([row.get(barcode, -1) for barcode in slide.barcodes.tolist()], dtype=np.int64)
    if not (rows >= 0).any():
        raise DataError(
            f"{path} shares no barcode with {slide.source}: take both from the same HEST release"
        )
    slide = slide.subset(rows >= 0)
    slide.patches = Patches(path, rows[rows >= 0])
    return slide


def load_patch_folder(root, sample: str = "", patches: bool = True) -> list[Slide]:
    """Slides without counts, for prediction: a HEST layout, a folder of HEST patch files (*.h5:
    img, coords, barcode), or of features files (*.npz: embedding, coords, barcodes). `sample`: only
    that one; patches=False leaves a HEST layout's patches unread. Raises DataError with what was
    looked for.
    """
    root = Path(root)
    if (root / "adata").is_dir() or (root / "st").is_dir():
        return [
            load_hest(root, name, patches, counts=False)
            for name in ([sample] if sample else hest_samples(root))
        ]
    paths = sorted([*root.glob("patches/*.h5"), *root.glob("*.h5")]) or sorted(root.glob("*.npz"))
    paths = [path for path in paths if sample in ("", path.stem)]
    if not paths:
        raise DataError(
            f"{root} holds neither adata/, st/, *.h5 patches nor *.npz "
            f"features{' of ' + sample if sample else ''}: check the path"
        )
    out = []
    for path in paths:
        if path.suffix == ".h5":
            with open_h5(path, "HEST patches") as handle:
                barcodes, xy = _patch_names(handle, path), read_array(handle["coords"], "iuf")
        else:
            barcodes, xy = read_npz(path, "barcodes", "coords")
            if barcodes.ndim != 1 or barcodes.dtype.kind != "U":
                raise DataError(
                    f"{path} has barcodes of {barcodes.dtype}, shape {barcodes.shape}: save a "
                    "list of strings"
                )
            check_unique(barcodes, path)
        xy = check_xy(xy, len(barcodes), path)
        stack = Patches(path) if path.suffix == ".h5" else None
        out.append(
            Slide(
                None, np.array([]), barcodes, xy, patches=stack, sample=path.stem, source=str(path)
            )
        )
    return out
