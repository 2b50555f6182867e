"""Slides -> Space Ranger folders and HEST task folders, as the readers read them."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import scipy.sparse as sp
from PIL import Image

from plainst.readers.checked import DataError
from plainst.readers.slides import Slide
from plainst.simulate.cortex import (
    PATCH_UM,
    PITCH,
    lattice,
    lattice_barcodes,
)


@contextmanager
def new_folder(folder):
    """A temporary sibling that becomes `folder` when the block ends well and vanishes when it does
    not."""
    folder = Path(folder).absolute()
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    if folder.exists():
        raise DataError(f"{folder} exists already: delete it or choose another name")
    try:
        part.mkdir(parents=True)
        yield part
        os.replace(part, folder)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be written ({error.strerror or error}): check the path, the "
            "rights and the free space"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_visium(slide: Slide, folder, layout: str = "list", matrix_version: int = 3) -> Path:
    """Space Ranger folder with metadata.tsv as spatialLIBD's. layout: 'list' (version 1), 'header'
    (2, 3) or 'parquet' (HD); HDF5 version 3 or 2.

    Raises DataError for a folder that exists, a slide without counts or lattice, or an unknown
    layout; then nothing is written.
    """
    if (
        layout not in ("list", "header", "parquet")
        or matrix_version not in (2, 3)
        or slide.grid is None
        or slide.counts is None
    ):
        raise DataError(
            f"{folder}: layout must be list, header or parquet, matrix_version 2 or 3, and "
            "the slide needs counts and a lattice"
        )
    with new_folder(folder) as part:
        (part / "spatial").mkdir()
        _write_10x_h5(slide, part / "filtered_feature_bc_matrix.h5", matrix_version)
        _write_positions(slide, part / "spatial", layout)
        scales = {"spot_diameter_fullres": 0.7 * PITCH, "fiducial_diameter_fullres": 1.05 * PITCH}
        image = None if slide.image is None else Image.fromarray(slide.image)
        for name, size in (("hires", 2000), ("lowres", 600)) if image else ():
            ratio = min(1.0, size / max(image.size))
            scaled = (
                image
                if ratio == 1
                else image.resize(
                    [round(ratio * side) for side in image.size], Image.Resampling.BOX
                )
            )
            scaled.save(part / "spatial" / f"tissue_{name}_image.png", compress_level=3)
            scales[f"tissue_{name}_scalef"] = slide.image_scale * ratio
        (part / "spatial" / "scalefactors_json.json").write_text(json.dumps(scales))
        _write_metadata(slide, part / "metadata.tsv", scales.get("tissue_lowres_scalef", 1.0))
    return Path(folder)


def _write_10x_h5(slide: Slide, path: Path, version: int) -> None:
    n, ids = slide.n_genes, [f"ENSG{g:011d}" for g in range(slide.n_genes)]
    zipped = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
    text = (
        {"genes": ids, "gene_names": slide.genes}
        if version == 2
        else {
            "features/id": ids,
            "features/name": slide.genes,
            "features/feature_type": ["Gene Expression"] * n,
            "features/genome": ["GRCh38"] * n,
        }
    )
    with h5py.File(path, "w") as handle:
        handle.attrs.update({"version": np.int64(2), "filetype": "matrix"})
        group = handle.create_group("matrix" if version == 3 else "GRCh38")
        # CSR of N x G is CSC of G x N
        for name, kind in (("data", np.int32), ("indices", np.int64), ("indptr", np.int64)):
            values = getattr(slide.counts, name)
            out = group.create_dataset(
                name, values.shape, kind, chunks=(min(len(values), 2**18) or 1,), **zipped
            )
            # HDF5 converts the type, a piece at a time: no second copy of the matrix
            for start in range(0, len(values), 2**24):
                out[start : start + 2**24] = values[start : start + 2**24]
        group["shape"] = np.array([n, slide.n_spots], dtype=np.int32)
        for name, values in {"barcodes": slide.barcodes, **text}.items():
            group[name] = np.asarray(values).astype("S")


def _write_positions(slide: Slide, spatial: Path, layout: str) -> None:
    """All spots of the lattice, off-tissue ones too, in the zigzag order of Space Ranger; px of the
    latter by the affine map of the former."""
    grid = lattice(slide.n_spots, slide.grid.max(axis=0) + 1)
    key = np.array([int(grid[:, 1].max()) + 1, 1])
    grid = grid[~np.isin(grid @ key, slide.grid @ key)]
    # (3, 2)
    affine = np.linalg.lstsq(
        np.column_stack([slide.grid, np.ones(slide.n_spots)]), slide.xy, rcond=None
    )[0]
    xy = np.rint(np.column_stack([grid, np.ones(len(grid))]) @ affine)
    table = np.concatenate(
        [
            np.column_stack([np.ones(slide.n_spots), slide.grid, slide.xy[:, ::-1]]),
            np.column_stack([np.zeros(len(grid)), grid, xy[:, ::-1]]),
        ]
    )  # (M, 5)
    order = np.lexsort([table[:, 2], table[:, 1] // 2])
    barcodes, table = (
        np.concatenate([slide.barcodes, lattice_barcodes(grid)])[order].tolist(),
        table[order],
    )
    names = [
        "barcode",
        "in_tissue",
        "array_row",
        "array_col",
        "pxl_row_in_fullres",
        "pxl_col_in_fullres",
    ]
    if layout == "parquet":
        import pyarrow.parquet

        columns = [barcodes, *table[:, :3].T.astype(np.int64), *table[:, 3:].T]
        pyarrow.parquet.write_table(
            pyarrow.table(dict(zip(names, columns))), spatial / "tissue_positions.parquet"
        )
        return
    with open(
        spatial / ("tissue_positions_list.csv" if layout == "list" else "tissue_positions.csv"),
        "w",
        encoding="utf-8",
    ) as handle:
        handle.write(",".join(names) + "\n" if layout == "header" else "")
        handle.writelines(
            ",".join([barcode, *(f"{v:.15g}" for v in row)]) + "\n"
            for barcode, row in zip(barcodes, table.tolist())
        )


def _write_metadata(slide: Slide, path: Path, lowres_scale: float) -> None:
    """As R's write.table does: a row name that has no header, so a row has one field more than the
    header; sorted by barcode."""
    layers = np.array([*slide.classes, "NA"])[slide.labels]  # -1 is the last: none
    (imagecol, imagerow), umi = (
        (slide.xy * lowres_scale).T,
        np.asarray(slide.counts.sum(axis=1)).ravel(),
    )
    columns = {
        "barcode": slide.barcodes,
        "sample_name": [slide.sample] * slide.n_spots,
        "tissue": [1] * slide.n_spots,
        "row": slide.grid[:, 0],
        "col": slide.grid[:, 1],
        "imagerow": imagerow.round(9),
        "imagecol": imagecol.round(9),
        "sum_umi": umi,
        "sum_gene": np.diff(slide.counts.indptr),
        "subject": [slide.patient] * slide.n_spots,
        "layer_guess": layers,
        "layer_guess_reordered": layers,
        "layer_guess_reordered_short": np.char.replace(layers, "Layer", "L"),
    }
    rows = sorted(zip(*(np.asarray(values).tolist() for values in columns.values())))
    with open(path, "w", encoding="utf-8") as handle:
        handle.write("\t".join(columns) + "\n")
        handle.writelines("\t".join(map(str, (row[0], *row))) + "\n" for row in rows)


def write_hest(
    slides: list[Slide], folder, patch_size: int = 224, truth: dict | None = None
) -> Path:
    """HEST-benchmark task folder: adata/, patches/, splits/ (leave one patient out),
    var_50genes.json, metadata.csv, and truth.npz when given.

    Patches are the slide's own, else 112 um squares cut from its image. The 50 genes are those
    whose log1p counts vary most over all slides.
    """
    patients = sorted({slide.patient for slide in slides})
    if len(patients) < 2 or any(list(slide.genes) != list(slides[0].genes) for slide in slides):
        raise DataError(
            f"{folder}: a HEST task needs slides of two patients at least, with the same genes"
        )
    with new_folder(folder) as part:
        for name in ("adata", "patches", "splits"):
            (part / name).mkdir()
        for slide in slides:
            _write_h5ad(slide, part / "adata" / f"{slide.sample}.h5ad")
            _write_patches(slide, part / "patches" / f"{slide.sample}.h5", patch_size)
        for k, patient in enumerate(patients):
            for name in ("train", "test"):
                rows = [
                    f"{s.sample},patches/{s.sample}.h5,adata/{s.sample}.h5ad"
                    for s in slides
                    if (s.patient == patient) == (name == "test")
                ]
                (part / "splits" / f"{name}_{k}.csv").write_text(
                    "\n".join(["sample_id,patches_path,expr_path", *rows, ""])
                )
        logs = sp.vstack([slide.counts for slide in slides]).astype(np.float64).log1p()
        variance = np.asarray(
            logs.multiply(logs).mean(axis=0) - np.square(logs.mean(axis=0))
        ).ravel()
        (part / "var_50genes.json").write_text(
            json.dumps(
                {"genes": slides[0].genes[np.argsort(-variance, kind="stable")[:50]].tolist()},
                indent=1,
            )
        )
        (part / "metadata.csv").write_text(
            "\n".join(["id,patient", *(f"{s.sample},{s.patient}" for s in slides), ""])
        )
        if truth is not None:
            np.savez(part / "truth.npz", **truth)
    return Path(folder)


def _put(group: h5py.Group, name: str, value) -> None:
    """One element of AnnData's on-disk format; a dict with `_index` is a data frame, one with
    `codes` a categorical."""
    if isinstance(value, (dict, sp.csr_matrix)):
        item, sparse, attrs = group.create_group(name), sp.issparse(value), {}
        for key, part in (
            ((key, getattr(value, key)) for key in ("data", "indices", "indptr"))
            if sparse
            else value.items()
        ):
            _put(item, key, part)
        if sparse:
            kind, version, attrs["shape"] = "csr_matrix", "0.1.0", np.array(value.shape)
        elif "_index" in value:
            order = np.array([key for key in value if key != "_index"], dtype=h5py.string_dtype())
            kind, version, attrs = "dataframe", "0.2.0", {"_index": "_index", "column-order": order}
        else:
            kind, version, attrs = (
                ("categorical", "0.2.0", {"ordered": False})
                if "codes" in value
                else ("dict", "0.1.0", {})
            )
    else:
        array, text, version, attrs = (
            np.asarray(value),
            isinstance(value, str) or np.asarray(value).dtype.kind == "U",
            "0.2.0",
            {},
        )
        item = group.create_dataset(
            name,
            data=array.astype(object) if text else array,
            dtype=h5py.string_dtype() if text else None,
        )
        kind = (
            ("string-array" if text else "array")
            if array.ndim
            else ("string" if text else "numeric-scalar")
        )
    item.attrs.update({"encoding-type": kind, "encoding-version": version, **attrs})


def _write_h5ad(slide: Slide, path: Path) -> None:
    (row, column), inside = slide.grid.T, np.ones(slide.n_spots, dtype=np.int64)
    obs = {
        "_index": slide.barcodes,
        "in_tissue": inside,
        "array_row": row,
        "array_col": column,
        "pxl_row_in_fullres": slide.xy[:, 1],
        "pxl_col_in_fullres": slide.xy[:, 0],
    }
    if slide.classes:
        obs["label"] = {
            "codes": slide.labels.astype(np.int8),
            "categories": np.array(slide.classes),
        }
    elements = {
        "X": slide.counts,
        "obs": obs,
        "var": {"_index": slide.genes},
        "obsm": {"spatial": slide.xy},
        "layers": {},
        "obsp": {},
        "varm": {},
        "varp": {},
        "uns": {"sample_id": slide.sample, "patient": slide.patient, "um_per_px": slide.um_per_px},
    }
    with h5py.File(path, "w") as handle:
        handle.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        for name, value in elements.items():
            _put(handle, name, value)


def _write_patches(slide: Slide, path: Path, size: int) -> None:
    """img (N, size, size, 3), coords (N, 2) upper left corner in full-resolution px, barcode (N,
    1)."""
    side, shape = PATCH_UM / slide.um_per_px, (slide.n_spots, size, size, 3)
    picture = Image.fromarray(slide.image) if slide.patches is None else None
    with h5py.File(path, "w") as handle:
        images = handle.create_dataset(
            "img", shape, np.uint8, chunks=(1, *shape[1:]), compression="gzip", compression_opts=1
        )
        for i, corner in enumerate(slide.xy - side / 2):
            box = [v * (slide.image_scale or 1) for v in (*corner, *(corner + side))]
            images[i] = (
                slide.patches[i]
                if picture is None
                else np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR, box=box))
            )
        images.attrs.update({"patch_size": size, "patch_um": PATCH_UM})
        handle["coords"], handle["barcode"] = (
            np.rint(slide.xy - side / 2).astype(np.int64),
            slide.barcodes.astype("S")[:, None],
        )
