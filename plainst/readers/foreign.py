"""Formats of other platforms and libraries: which one a path is of, and the line to convert it."""

from __future__ import annotations

from pathlib import Path

from plainst.readers.checked import DataError

TO_H5AD = "then give the .h5ad"


def _is_zarr(path: Path) -> bool:
    return any((path / name).is_file() for name in (".zgroup", ".zattrs", "zarr.json"))


def _refuse_zarr(path: Path) -> None:
    if any((path / name).is_dir() for name in ("tables", "table", "shapes", "points", "images")):
        raise DataError(
            f"{path} is a SpatialData zarr, which needs its library: write one table of it with "
            f'python -c "import spatialdata; '
            f"spatialdata.read_zarr('{path}').tables['table'].write_h5ad('{path.stem}.h5ad')\" "
            f"(its other tables: .tables), {TO_H5AD}"
        )
    raise DataError(
        f"{path} is an AnnData zarr, which needs its library: write it with "
        f'python -c "import anndata; '
        f"anndata.read_zarr('{path}').write_h5ad('{path.stem}.h5ad')\", {TO_H5AD}"
    )


def _refuse_folder(path: Path) -> None:
    if _is_zarr(path):
        _refuse_zarr(path)
    if (path / "experiment.xenium").is_file():
        raise DataError(
            f"{path} is a Xenium output folder: convert it to single cells with "
            f"python -m plainst convert xenium {path} {path.name}.h5, for spatia.py"
        )
    if (path / "cell_by_gene.csv").is_file() and (path / "cell_metadata.csv").is_file():
        raise DataError(
            f'{path} is a MERSCOPE output folder: write it with python -c "import squidpy; '
            f"squidpy.read.vizgen('{path}', counts_file='cell_by_gene.csv', "
            f"meta_file='cell_metadata.csv').write_h5ad('{path.name}.h5ad')\", {TO_H5AD}"
        )
    counts = next(iter(sorted(path.glob("*_exprMat_file.csv"))), None)
    if counts is not None:
        metadata = counts.name.replace("_exprMat_file", "_metadata_file")
        raise DataError(
            f'{path} is a CosMx output folder: write it with python -c "import squidpy; '
            f"squidpy.read.nanostring('{path}', counts_file='{counts.name}', "
            f"meta_file='{metadata}').write_h5ad('{path.name}.h5ad')\", {TO_H5AD}"
        )


def _refuse_file(path: Path) -> None:
    if path.suffix == ".h5":
        raise DataError(
            f"{path} alone holds no positions: give the Space Ranger folder that holds it and "
            "spatial/ (a cell file is for spatia.py)"
        )
    if path.suffix.lower() in (".rds", ".rdata", ".rda", ".qs"):
        raise DataError(
            f"{path} is an R object: write it in R with zellkonverter::writeH5AD(sce, "
            f"'{path.stem}.h5ad'), a Seurat object after as.SingleCellExperiment(), with the "
            f"positions in reducedDim(sce, 'spatial'), {TO_H5AD}"
        )


def refuse_foreign(path: Path) -> None:
    """Raise DataError with the line that converts, where `path` is of a known format that h5py
    alone cannot read; else do nothing."""
    if path.is_dir():
        _refuse_folder(path)
    elif path.is_file():
        _refuse_file(path)
