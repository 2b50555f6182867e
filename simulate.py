"""A small synthetic cortex, image-to-gene tasks and a cell field with a known truth, written in the
real file formats.

    # Space Ranger folders datasets/sim/sim1, datasets/sim/sim2
    python simulate.py cortex datasets/sim --n_spots 1200 --n_slices 2
    # a HEST-benchmark task folder
    python simulate.py hest datasets/simhest --link ring2
    # a cell file: crops and counts of single cells
    python simulate.py cells datasets/simcells.h5 --n_cells 3000

Nothing is ever N x G dense: counts are drawn in chunks of rows, each with its own random stream,
and kept sparse.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import math
import os
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import scipy.sparse as sp
from PIL import Image
from scipy.spatial import cKDTree

from data import DataError, Slide, write_cells

LAYERS = ["Layer1", "Layer2", "Layer3", "Layer4", "Layer5", "Layer6", "WM"]
# of cortical depth, close to slice 151673
SHARE = np.array([0.10, 0.10, 0.22, 0.10, 0.17, 0.17, 0.14])
# UMIs relative to the mean spot, as in 151673
LAYER_DEPTH = np.array([0.45, 1.1, 1.25, 1.15, 1.1, 0.8, 0.8])
NUCLEI = np.array([5.0, 20.0, 11.0, 24.0, 9.0, 13.0, 19.0])  # per 100 um lattice cell
NUCLEUS_UM = np.array([3.2, 3.8, 5.2, 3.4, 6.0, 4.6, 3.0])  # radius
# neuropil; myelin takes the stain up most
EOSIN_OD = np.array([0.30, 0.36, 0.38, 0.41, 0.42, 0.47, 0.66])
# optical density of R, G, B: haematoxylin, eosin (Ruifrok & Johnston 2001)
STAINS = np.array([[0.65, 0.70, 0.29], [0.13, 0.92, 0.30]], dtype=np.float32)
# full-resolution px: spots of a row, rows, slide border
PITCH, ROW_STEP, MARGIN = 138, 119.51, 2050
# side of a HEST patch: 224 px of .5 um
PATCH_UM = 112.0


def lattice(n_spots: int, at_least=(0, 0)) -> np.ndarray:
    """(M, 2) row, column of a Visium capture area (row + column even): 78 x 128, or larger of that
    aspect until `n_spots` fill at most 80 %."""
    scale = max(1.0, math.sqrt(n_spots / (0.8 * 78 * 64)))
    rows, half = (
        2 * math.ceil(max(78 * scale, at_least[0]) / 2),
        math.ceil(max(128 * scale, at_least[1]) / 2),
    )
    row, col = np.divmod(np.arange(rows * half), half)
    return np.stack([row, 2 * col + row % 2], axis=1)  # (M, 2)


def lattice_pixels(grid: np.ndarray) -> np.ndarray:
    """Lattice row, column (N, 2) -> full-resolution px x, y (N, 2), whole numbers as in positions
    files."""
    return np.rint(grid[:, ::-1] * [PITCH / 2, ROW_STEP] + MARGIN)


def lattice_barcodes(grid: np.ndarray) -> np.ndarray:
    """16-mers + '-1' of lattice positions (M, 2): a bijection, the same on every slide (as on
    Visium), in no spatial order when sorted."""
    x = (grid[:, 0].astype(np.uint32) << np.uint32(16)) | grid[:, 1].astype(np.uint32)
    # the invertible finaliser of MurmurHash3
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    # (M, 16)
    letters = np.frombuffer(b"ACGT", dtype="S1")[
        (x[:, None] >> np.arange(0, 32, 2, dtype=np.uint32)) & np.uint32(3)
    ]
    return np.char.add(np.ascontiguousarray(letters).view("S16")[:, 0], b"-1").astype(str)


class Tissue:
    """Outline and curved layers of one section as functions of position; lengths in units of its
    side, so that n_spots changes the size only."""

    def __init__(self, rng: np.random.Generator, n_spots: int, grid: np.ndarray, n_classes: int):
        xy = lattice_pixels(grid)
        self.frame = float(xy.max() + MARGIN)  # px, side of the square picture
        self.centre, self.side = (
            (xy.min(axis=0) + xy.max(axis=0)) / 2,
            math.sqrt(n_spots * PITCH * ROW_STEP),
        )
        self.tilt, self.radius, self.aspect = (
            rng.uniform(-0.3, 0.3),
            rng.uniform(0.9, 1.8),
            rng.uniform(0.92, 1.12),
        )
        self.phase, self.cycles = rng.uniform(0, 2 * np.pi, 5), rng.uniform(1.2, 2.6)
        self.share = SHARE[-n_classes:] / SHARE[-n_classes:].sum()
        # (C + 1,) depth of the layer boundaries, 0 = pia
        self.edges = np.concatenate([[0], np.cumsum(self.share)])
        score = self.geometry(xy)[0]
        # lattice positions that are tissue: the innermost
        self.rows = np.sort(np.argpartition(score, n_spots - 1)[:n_spots])
        self.rim = float(score[self.rows].max())
        self.quantiles = np.quantile(self.geometry(xy[self.rows])[1], np.linspace(0, 1, 1001))

    def geometry(self, xy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(..., 2) px -> outline (...), a rounded block with a wavy rim that grows outwards, and
        arcs (...) that grow away from the pia on top."""
        turn = np.array(
            [
                [math.cos(self.tilt), -math.sin(self.tilt)],
                [math.sin(self.tilt), math.cos(self.tilt)],
            ]
        )
        a, b = np.moveaxis((xy - self.centre) / self.side @ turn, -1, 0)
        rim = 1 + sum(
            size * np.sin(k * np.arctan2(b, a) + phase)
            for size, k, phase in zip((0.05, 0.025, 0.012), (3, 7, 19), self.phase)
        )
        wave = 0.03 * np.sin(2 * np.pi * self.cycles * a + self.phase[3]) + 0.012 * np.sin(
            15 * a + self.phase[4]
        )
        return (
            np.abs(a * self.aspect) ** 5 + np.abs(b / self.aspect) ** 5
        ) ** 0.2 * rim, wave - np.hypot(a, b - self.radius)

    def depth(self, xy: np.ndarray) -> np.ndarray:
        """(..., 2) px -> (...) share of the tissue that lies above, in [0, 1]: layer proportions
        hold for any outline."""
        return np.interp(self.geometry(xy)[1], self.quantiles, np.linspace(0, 1, 1001))

    def blend(self, depth: np.ndarray, table: np.ndarray) -> np.ndarray:
        """A per-layer quantity (7,) at `depth`, changing gradually across the boundaries."""
        # (2 C,)
        stops = np.stack(
            [self.edges[:-1] + 0.3 * self.share, self.edges[1:] - 0.3 * self.share], axis=1
        ).ravel()
        return np.interp(depth, stops, np.repeat(table[-len(self.share) :], 2))


def _stain(h: np.ndarray, e: np.ndarray) -> np.ndarray:
    """Haematoxylin and eosin amounts (...) -> (..., 3) uint8 by Beer-Lambert."""
    return np.stack(
        [
            np.rint(245 * np.exp(-(h * STAINS[0, c] + e * STAINS[1, c]))).astype(np.uint8)
            for c in range(3)
        ],
        axis=-1,
    )


def _clouds(rng, size: int, cells: int) -> np.ndarray:
    """(size, size) smooth noise of about unit variance with `cells` bumps a side."""
    bumps = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
    return np.asarray(bumps.resize((size, size), Image.Resampling.BICUBIC)) * np.float32(1.4)


def _discs(
    canvas: np.ndarray, owner: np.ndarray, xy: np.ndarray, radius: np.ndarray, ink: np.ndarray
) -> None:
    """Anti-aliased discs, (K, 2) px centres, painted into canvas (B, H, W) at image `owner` by
    maximum, all discs at once."""
    reach, base = math.ceil(radius.max() + 0.5), np.floor(xy).astype(np.int64)
    for dy, dx in np.ndindex(2 * reach + 1, 2 * reach + 1):
        at = base + (dx - reach, dy - reach)  # (K, 2)
        cover = np.clip(radius + 0.5 - np.hypot(*(at + 0.5 - xy).T), 0, 1) * ink
        use = (cover > 0) & (at >= 0).all(axis=1) & (at < canvas.shape[:0:-1]).all(axis=1)
        np.maximum.at(canvas, (owner[use], at[use, 1], at[use, 0]), cover[use].astype(np.float32))


def _draw_section(tissue: Tissue, seed: int, size: int) -> np.ndarray:
    """(size, size, 3) uint8 H&E-like picture of the whole frame."""
    rng, scale = np.random.default_rng([seed, 3]), size / tissue.frame
    coarse = (np.arange(size // 4) + 0.5) / (size // 4) * tissue.frame
    # (size/4, size/4, 2): the fields are smooth, a quarter of the pixels will do
    xy = np.stack(np.meshgrid(coarse, coarse), axis=-1)
    fields = [
        (tissue.rim * 1.01 - tissue.geometry(xy)[0]) * tissue.side * scale,
        tissue.blend(tissue.depth(xy), EOSIN_OD),
    ]
    edge, eosin = (
        np.asarray(
            Image.fromarray(f.astype(np.float32)).resize((size, size), Image.Resampling.BILINEAR)
        )
        for f in fields
    )
    # a frayed rim of a few px
    inside = np.clip((edge + 2.5 * _clouds(rng, size, size // 12)) / 3, 0, 1)
    texture = (
        1
        + 0.06 * _clouds(rng, size, 14)
        + 0.05 * _clouds(rng, size, size // 16)
        + 0.10 * rng.standard_normal((size, size), dtype=np.float32)
    )
    n = min(int(2 * NUCLEI.max() * (tissue.side / PITCH) ** 2), 400_000)
    # (n, 2) px; thinned to the density of the layer
    at = tissue.centre + rng.uniform(-0.72, 0.72, (n, 2)) * tissue.side
    at = at[
        (tissue.geometry(at)[0] <= tissue.rim)
        & (rng.random(n) * NUCLEI.max() < tissue.blend(tissue.depth(at), NUCLEI))
    ]
    radius = np.maximum(
        tissue.blend(tissue.depth(at), NUCLEUS_UM)
        * PITCH
        / 100
        * scale
        * rng.lognormal(0, 0.2, len(at)),
        0.45,
    )
    nuclei = np.zeros((1, size, size), dtype=np.float32)
    _discs(
        nuclei,
        np.zeros(len(at), dtype=np.int64),
        at * scale,
        radius,
        rng.uniform(0.5, 1.1, len(at)),
    )
    return _stain(inside * (nuclei[0] + 0.25 * eosin * texture), inside * eosin * texture + 0.01)


def gene_programs(
    n_genes: int, n_classes: int = 7, program_seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """genes (G,), log mean count (G,), log fold change (C, G) of each layer. The programs of 5 or 6
    classes are rows of those of 7.

    A layer has G / 28 markers of its own (40 at most) and half as many shared with others; a third
    of an effect reaches the adjoining layers.
    """
    rng, k = np.random.default_rng([program_seed, 1]), min(40, n_genes // 28)
    base, order, effect = (
        rng.normal(math.log(0.11), 1.1, n_genes),
        rng.permutation(n_genes),
        np.zeros((7, n_genes)),
    )
    base[order[: 8 * k]] = rng.normal(math.log(0.25), 0.8, 8 * k)
    for layer in range(7):
        effect[layer, order[layer * k : (layer + 1) * k]] = rng.uniform(0.6, 1.9, k)
        effect[layer, rng.choice(order[7 * k : 8 * k], k // 2, replace=False)] = rng.uniform(
            0.3, 1.0, k // 2
        )
    spread = np.eye(7) + 0.33 * (np.eye(7, k=1) + np.eye(7, k=-1))
    return np.array([f"SIM{g:05d}" for g in range(n_genes)]), base, (spread @ effect)[-n_classes:]


def draw_counts(
    activity, log_fold, log_base, log_depth, theta, dropout: float, seed: int
) -> sp.csr_matrix:
    """Negative-binomial counts (N, G) CSR int32 with mean exp(activity (N, K) @ log_fold (K, G) +
    log_base (G,) + log_depth (N,)).

    theta (G,): variance = mean + mean^2 / theta, drawn as Poisson of a gamma; `dropout`: share of
    the drawn entries that is lost besides. A stream per chunk of rows: the result depends on the
    seed, not on the number of threads.
    """
    n, rows = len(activity), max(1, 2**20 // len(log_base))
    log_fold, log_base, theta = (
        log_fold.astype(np.float32),
        log_base.astype(np.float32),
        theta.astype(np.float32),
    )

    def chunk(start):
        rng, part = np.random.default_rng([seed, 2, start // rows]), slice(start, start + rows)
        # (rows, G)
        rate = np.exp(
            activity[part].astype(np.float32) @ log_fold
            + log_base
            + log_depth[part, None].astype(np.float32)
        )
        rate *= rng.standard_gamma(theta, rate.shape, dtype=np.float32) / theta
        drawn = rng.poisson(rate)
        row, gene = np.nonzero(drawn)
        keep = rng.random(len(row), dtype=np.float32) >= dropout
        row, gene = row[keep], gene[keep]
        return (
            drawn[row, gene].astype(np.int32),
            gene.astype(np.int32),
            np.bincount(row, minlength=len(rate)),
        )

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        values, columns, lengths = map(list, zip(*pool.map(chunk, range(0, n, rows))))
    indptr = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    # rebinding frees the pieces before the next copy is made: the peak is 1.5 times the matrix
    values = np.concatenate(values)
    columns = np.concatenate(columns)
    return sp.csr_matrix((values, columns, indptr), shape=(n, len(log_base)))


def simulate_cortex(
    n_spots: int = 1200,
    n_genes: int = 600,
    n_classes: int = 7,
    seed: int = 0,
    signal: float = 1.0,
    noise_genes: bool = False,
    unlabelled: float = 0.01,
    sample: str = "sim1",
    donor: str = "SimA",
    program_seed: int = 0,
    donor_seed: int | None = None,
    depth_sd: float = 0.4,
    dropout: float = 0.1,
    image_px: int = 2000,
) -> Slide:
    """One layered slice in memory; its image (image_px square) is drawn on first use.

    `seed` makes tissue and counts, `program_seed` genes and markers, `donor_seed` (default: from
    the name `donor`) a log-normal batch factor per
    gene: slices with the same donor share both. `signal` scales all layer differences of the genes;
    noise_genes=True is signal 0: the counts then hold no layer information (the image still does).
    depth_sd: s.d. of log UMIs of a spot. Raises DataError on values outside their range.
    """
    for name, value, low, high in (
        ("n_spots", n_spots, 200, 1_000_000),
        ("n_genes", n_genes, 50, 100_000),
        ("n_classes", n_classes, 5, 7),
        ("seed", seed, 0, 2**63),
        ("signal", signal, 0, 100),
        ("unlabelled", unlabelled, 0, 0.9),
        ("dropout", dropout, 0, 0.99),
    ):
        if not low <= value <= high:
            raise DataError(f"{name} is {value} but must lie in {low} .. {high}")
    rng, signal, grid = (
        np.random.default_rng([seed, 0]),
        0.0 if noise_genes else signal,
        lattice(n_spots),
    )
    tissue = Tissue(rng, n_spots, grid, n_classes)
    # (N, 2) in no spatial order: a row that slips is seen
    grid = grid[rng.permutation(tissue.rows)]
    xy = lattice_pixels(grid)
    depth = tissue.depth(xy)
    # (N,)
    labels = np.clip(np.searchsorted(tissue.edges, depth, side="right") - 1, 0, n_classes - 1)
    # (N, C) distance to the layer
    beyond = np.maximum(
        np.maximum(tissue.edges[:-1] - depth[:, None], depth[:, None] - tissue.edges[1:]), 0
    )
    # cell composition differs from spot to spot
    activity = np.exp(-((beyond / 0.035) ** 2)) * rng.lognormal(0, 0.7, beyond.shape)
    activity /= activity.sum(axis=1, keepdims=True)
    genes, log_base, log_fold = gene_programs(n_genes, n_classes, program_seed)
    log_base = log_base + np.random.default_rng(
        [zlib.crc32(donor.encode()) if donor_seed is None else donor_seed, 4]
    ).normal(0, 0.3, n_genes)
    log_depth = rng.normal(0, depth_sd, n_spots) + signal * np.log(LAYER_DEPTH[-n_classes:])[labels]
    theta = np.random.default_rng([program_seed, 5]).gamma(4.0, 0.75, n_genes) + 0.3
    counts = draw_counts(activity, signal * log_fold, log_base, log_depth, theta, dropout, seed)
    labels[rng.random(n_spots) < unlabelled] = -1
    draw, library_size = (
        functools.partial(_draw_section, tissue, seed, image_px),
        np.asarray(counts.sum(axis=1), dtype=np.float64).ravel(),
    )
    return Slide(
        counts,
        genes,
        lattice_barcodes(grid),
        xy,
        grid,
        labels,
        LAYERS[-n_classes:],
        draw,
        image_px / tissue.frame,
        None,
        100 / PITCH,
        sample,
        donor,
        "simulated",
        library_size,
    )


@contextmanager
def _new_folder(folder):
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
    with _new_folder(folder) as part:
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


def patch_features(patches: np.ndarray) -> np.ndarray:
    """(N, h, w, 3) uint8 -> (N, 3): mean red, green and blue in [0, 1], all that the genes of
    `simulate_hest` can depend on."""
    return patches.reshape(len(patches), -1, 3).mean(axis=1) / 255


def ring2_mean(grid: np.ndarray, features: np.ndarray) -> np.ndarray:
    """(N, 2) lattice, (N, F) -> (N, F): mean over the (at most 12) spots two steps away on the
    hexagonal lattice; needs 19 spots or more."""
    # in pitches: ring 1 at 1, ring 2 at sqrt(3) and 2, ring 3 beyond 2.6
    at = grid * [math.sqrt(0.75), 0.5]
    distance, index = cKDTree(at).query(at, k=19)  # (N, 19)
    weight = ((distance > 1.5) & (distance < 2.1)).astype(float)
    return np.einsum("nk,nkf->nf", weight, features[index]) / weight.sum(axis=1, keepdims=True)


def _draw_patches(rng, n: int, size: int) -> np.ndarray:
    """(n, size, size, 3) uint8: number of nuclei, their stain and the neuropil differ from patch to
    patch, independently."""
    number, ink, eosin = rng.integers(2, 45, n), rng.uniform(0.4, 1.4, n), rng.uniform(0.2, 0.75, n)
    owner, h = np.repeat(np.arange(n), number), np.zeros((n, size, size), dtype=np.float32)
    _discs(
        h,
        owner,
        rng.uniform(0, size, (len(owner), 2)),
        rng.uniform(3, 6, len(owner)) * size / PATCH_UM,
        ink[owner],
    )
    e = eosin[:, None, None].astype(np.float32) * (
        1 + 0.12 * rng.standard_normal(h.shape, dtype=np.float32)
    )
    return _stain(h + 0.2 * e, e)


def simulate_hest(
    folder,
    n_slides: int = 3,
    n_spots: int = 200,
    link: str = "patch",
    patch_size: int = 224,
    seed: int = 0,
    n_genes: int = 100,
) -> Path:
    """HEST-benchmark task with a known truth, one slide a patient, and truth.npz with genes, base,
    weights and z_<id> (N, 3).

    log mean count = base (G,) + z @ weights (3, G), with z standardised (over the task) patch
    features: of the spot itself (link='patch'), averaged over its ring-2 neighbours ('ring2'), or
    of another spot of the slide ('none'). Patches are independent of each other, so under 'ring2'
    the spot's own patch tells nothing. Raises DataError on a bad argument.
    """
    if (
        link not in ("patch", "ring2", "none")
        or n_slides < 2
        or n_spots < 20
        or patch_size < 8
        or n_genes < 50
        or seed < 0
    ):
        raise DataError(
            f"{folder}: link must be patch, ring2 or none, n_slides >= 2, n_spots >= 20, "
            "patch_size >= 8, n_genes >= 50 and seed >= 0"
        )
    rng, grid = np.random.default_rng([seed, 6]), lattice(n_spots)
    middle = lattice_pixels(grid) - lattice_pixels(grid).mean(axis=0)
    grid = grid[np.argsort(np.hypot(*middle.T), kind="stable")[:n_spots]]
    patches = [
        _draw_patches(np.random.default_rng([seed, 7, i]), n_spots, patch_size)
        for i in range(n_slides)
    ]
    z = [patch_features(images) for images in patches]
    z = [
        ring2_mean(grid, f)
        if link == "ring2"
        else f[rng.permutation(n_spots)]
        if link == "none"
        else f
        for f in z
    ]
    z = (np.array(z) - np.mean(z, axis=(0, 1))) / np.std(z, axis=(0, 1))  # (slides, N, 3)
    weights, base, theta = (
        rng.normal(size=(3, n_genes)),
        rng.normal(1.5, 0.8, n_genes),
        np.full(n_genes, 8.0),
    )
    weights *= 0.8 / (z @ weights).std(axis=(0, 1))
    genes, ids, slides = gene_programs(n_genes)[0], [f"S{i + 1}" for i in range(n_slides)], []
    for i, name in enumerate(ids):
        counts = draw_counts(
            z[i], weights, base, rng.normal(0, 0.2, n_spots), theta, 0.02, 1000 * seed + i
        )
        slides.append(
            Slide(
                counts,
                genes,
                lattice_barcodes(grid),
                lattice_pixels(grid),
                grid,
                patches=patches[i],
                um_per_px=100 / PITCH,
                sample=name,
                patient=f"P{i + 1}",
            )
        )
    return write_hest(
        slides,
        folder,
        patch_size,
        {
            "genes": genes,
            "base": base,
            "weights": weights,
            **{f"z_{name}": f for name, f in zip(ids, z)},
        },
    )


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
    with _new_folder(folder) as part:
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


CELL_TYPES = 5
CELL_RADIUS = np.array([5.0, 6.0, 7.0, 8.0, 9.0])  # px of a 32-px crop, by type
# cycles per px of a 32-px crop, by type
CELL_TEXTURE = np.array([0.04, 0.08, 0.12, 0.16, 0.20])
CELL_PITCH = 18.0  # px between neighbours


def _cell_positions(rng, n: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Jittered lattice of n cells: xy (n, 2) px, and the layered domain (n,) of each, top to bottom
    with wavy borders."""
    side = math.ceil(math.sqrt(n))
    node = rng.permutation(side * side)[:n]
    xy = (
        (np.stack([node % side, node // side], axis=1) + 0.5 + rng.uniform(-0.22, 0.22, (n, 2)))
        * CELL_PITCH
        * scale
    )
    extent, wave = side * CELL_PITCH * scale, rng.uniform(0, 2 * np.pi)
    depth = xy[:, 1] / extent + 0.05 * np.sin(2 * np.pi * 1.5 * xy[:, 0] / extent + wave)
    return xy, np.clip((depth * CELL_TYPES).astype(int), 0, CELL_TYPES - 1)


def cell_programs(n_genes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """log base (G,) and log fold change (K, G) of K = types, domains, the size program and the
    intensity program, in this order.

    Of G genes a twelfth marks each type and a twenty-fourth each domain; an eighth carries the size
    program, as many others the intensity program.
    """
    rng = np.random.default_rng([seed, 8])
    order, fold = rng.permutation(n_genes), np.zeros((2 * CELL_TYPES + 2, n_genes))
    widths = [n_genes // 12] * CELL_TYPES + [n_genes // 24] * CELL_TYPES + [n_genes // 8] * 2
    for k, (start, width) in enumerate(zip(np.cumsum([0, *widths]), widths)):
        fold[k, order[start : start + width]] = rng.uniform(
            *((0.8, 1.4) if k < CELL_TYPES else (0.3, 0.6) if k < 2 * CELL_TYPES else (0.45, 0.75)),
            width,
        )
    return rng.normal(0, 0.5, n_genes), fold


def _ellipses(
    offset: np.ndarray, truth: dict, cells: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cover in [0, 1] and brightness (n, K, S, S) of the cells (n, K) whose centres lie `offset`
    (n, K, 2) px from the crops' centres.

    A cell is an ellipse of semi-axes truth major, minor at `angle`, of brightness `intensity`,
    crossed by waves of `texture` cycles per px.
    """
    # (n, K, 1, 1, 2)
    pixel, offset = (
        (np.arange(size) + 0.5 - size / 2).astype(np.float32),
        offset.astype(np.float32)[:, :, None, None],
    )
    dx, dy = pixel - offset[..., 0], pixel[:, None] - offset[..., 1]  # (n, K, 1, S), (n, K, S, 1)
    major, minor, angle, intensity, texture = (
        truth[name][cells].astype(np.float32)[:, :, None, None]
        for name in ("major", "minor", "angle", "intensity", "texture")
    )
    # (n, K, S, S)
    along, across = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    cover = np.clip(
        (1 - np.hypot(along / major, across / minor)) * np.sqrt(major * minor) + 0.5, 0, 1
    )
    turn = 2 * np.pi * texture
    return cover, cover * intensity * (1 + 0.15 * np.cos(turn * along) * np.cos(turn * across))


def _cell_crops(
    xy, section, truth, size: int, noise: float, seed: int, rows: np.ndarray
) -> np.ndarray:
    """Crops (n, 2, S, S) uint8 of the cells `rows`: channel 0 the cell itself, 1 the neighbours of
    its section, beneath it."""
    rng, near = (
        np.random.default_rng([seed, 9, int(rows[0])]),
        np.empty((len(rows), 13), dtype=np.int64),
    )
    for s in np.unique(section[rows]):
        members, mine = np.flatnonzero(section == s), section[rows] == s
        # the cell itself comes first
        near[mine] = members[cKDTree(xy[members]).query(xy[rows[mine]], k=13)[1]]
    cover, light = _ellipses(xy[near] - xy[rows][:, None], truth, near, size)
    # (n, 2, S, S)
    clean = np.stack([light[:, 0], light[:, 1:].max(axis=1) * (1 - cover[:, 0])], axis=1)
    return np.rint(
        255 * np.clip(clean + noise * rng.standard_normal(clean.shape, dtype=np.float32), 0, 1)
    ).astype(np.uint8)


def cell_field(
    n_cells: int = 3000,
    n_genes: int = 120,
    n_sections: int = 4,
    size: int = 32,
    mixing: float = 0.15,
    noise: float = 0.05,
    depth: float = 150.0,
    seed: int = 0,
) -> dict:
    """A cell field with a known truth, as the arguments of `data.write_cells` (crops and masks are
    drawn block by block as they are asked for).

    Five types lie in layered domains; a share `mixing` of the cells has another domain's type.
    Counts (N, G) are negative binomial with mean depth * softmax(base + type + domain + a * size
    program + b * intensity program), a, b ~ N(0, 1), and a log-normal depth. In the picture the
    type sets radius and texture, a stretches the cell (both axes grow, the long one twice as fast
    in the logarithm), b sets its brightness; pixel noise has s.d. `noise`. truth, all (N,): type,
    domain, program (a), brightness (b), area (px), major, minor, angle, intensity, texture. Raises
    DataError on values outside their range.
    """
    for name, value, low, high in (
        ("n_cells", n_cells, 50, 10**7),
        ("n_genes", n_genes, 48, 10**5),
        ("n_sections", n_sections, 1, n_cells // 25),
        ("size", size, 16, 256),
        ("mixing", mixing, 0, 1),
        ("noise", noise, 0, 1),
        ("depth", depth, 20, 10**6),
        ("seed", seed, 0, 2**63),
    ):
        if not low <= value <= high:
            raise DataError(f"{name} is {value} but must lie in {low} .. {high}")
    rng, scale = np.random.default_rng([seed, 10]), size / 32
    section = np.arange(n_cells) * n_sections // n_cells  # (N,)
    places = [_cell_positions(rng, int(n), scale) for n in np.bincount(section)]
    xy, domain = (np.concatenate(part) for part in zip(*places))  # (N, 2), (N,)
    # (N,)
    kind = np.where(
        rng.random(n_cells) < mixing,
        (domain + rng.integers(1, CELL_TYPES, n_cells)) % CELL_TYPES,
        domain,
    )
    a, b = rng.standard_normal((2, n_cells))
    # (N, K)
    activity = np.column_stack([np.eye(CELL_TYPES)[kind], np.eye(CELL_TYPES)[domain], a, b])
    log_base, log_fold = cell_programs(n_genes, seed)
    # (N,)
    norm = np.concatenate(
        [
            np.logaddexp.reduce(part @ log_fold + log_base, axis=1)
            for part in np.array_split(activity, 1 + n_cells // 4096)
        ]
    )
    counts = draw_counts(
        activity,
        log_fold,
        log_base,
        math.log(depth) + rng.normal(0, 0.3, n_cells) - norm,
        np.full(n_genes, 4.0),
        0.0,
        seed,
    )
    stretch = 0.3 * np.clip(a, -2, 2)
    # round at a = -2, 1.8 times as long at a = 2
    major, minor = (
        CELL_RADIUS[kind] * scale * np.exp(v) for v in (stretch + 0.15, stretch / 2 - 0.15)
    )
    truth = {
        "type": kind,
        "domain": domain,
        "program": a,
        "brightness": b,
        "area": np.pi * major * minor,
        "major": major,
        "minor": minor,
        "angle": rng.uniform(0, np.pi, n_cells),
        "intensity": 0.82 + 0.1 * np.tanh(b),
        "texture": CELL_TEXTURE[kind] / scale,
    }

    blocks = np.split(np.arange(n_cells), range(64, n_cells, 64))
    # a block at a time, when asked for
    crops = (_cell_crops(xy, section, truth, size, noise, seed, rows) for rows in blocks)
    masks = (
        _ellipses(np.zeros((len(rows), 1, 2)), truth, rows[:, None], size)[0][:, 0] > 0.5
        for rows in blocks
    )
    return {
        "counts": counts,
        "genes": np.array([f"SIM{g:05d}" for g in range(n_genes)]),
        "ids": np.array([f"cell{i + 1}" for i in range(n_cells)]),
        "xy": xy,
        "section": section,
        "sections": [f"sim{s + 1}" for s in range(n_sections)],
        "crops": crops,
        "masks": masks,
        "channels": ["own", "other"],
        "labels": kind,
        "classes": [f"type{t + 1}" for t in range(CELL_TYPES)],
        "um_per_px": 0.5 / scale,
        "truth": truth,
    }


def simulate_cells(
    path,
    n_cells: int = 3000,
    n_genes: int = 120,
    n_sections: int = 4,
    size: int = 32,
    seed: int = 0,
) -> Path:
    """Write the cell field of `cell_field` as a cell file (`data.load_cells`). Raises DataError on
    a bad argument; then nothing is written."""
    return write_cells(path, **cell_field(n_cells, n_genes, n_sections, size, seed=seed))


FLAGS = {
    "n_spots": "tissue spots of a slice (cortex: 200 to 1,000,000)",
    "n_genes": "genes",
    "n_classes": "5 (Layer3..WM), 6 or 7 (Layer1..WM)",
    "signal": (
        "strength of the layer programs; at 1 the genes of one spot name its layer in two of "
        "three cases"
    ),
    "noise_genes": "counts without any layer information, to test for leakage",
    "program_seed": "genes and markers",
    "seed": "tissue, images and counts",
    "n_slides": "slides, one a patient",
    "patch_size": "px",
    "n_cells": "cells of all sections together",
    "n_sections": "tissue sections",
    "size": "side of a crop, px",
    "link": (
        "what sets the genes of a spot: its own patch (patch), the patches two steps away "
        "(ring2) or neither (none)"
    ),
}


def main(argv=None) -> None:
    """Command line; exit status 2 and one sentence on a bad argument."""
    parser = argparse.ArgumentParser(prog="simulate.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="what", required=True)
    for what, function, text in (
        (
            "cortex",
            simulate_cortex,
            "layered slices as Space Ranger folders OUT/sim1, OUT/sim2 ...",
        ),
        (
            "hest",
            simulate_hest,
            "a HEST-benchmark task folder whose genes are a known function of the H&E patches",
        ),
        (
            "cells",
            simulate_cells,
            "a cell file: crops and counts of single cells with a known truth",
        ),
    ):
        command = commands.add_parser(
            what,
            help=text,
            description=text,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        command.add_argument("out", help="file to write" if what == "cells" else "folder to write")
        for name, default in (
            (p.name, p.default)
            for p in inspect.signature(function).parameters.values()
            if p.name in FLAGS
        ):
            kind = {"action": "store_true"} if default is False else {"type": type(default)}
            command.add_argument(f"--{name}", default=default, help=FLAGS[name], **kind)
    cortex = commands.choices["cortex"]
    cortex.add_argument("--n_slices", type=int, default=2, help="slices, each with its own seed")
    cortex.add_argument(
        "--n_donors",
        type=int,
        default=1,
        help="donors that the slices are shared out to; donors differ by a batch effect",
    )
    options = vars(parser.parse_args(argv))
    what, out = options.pop("what"), Path(options.pop("out"))
    try:
        if what != "cortex":
            print((simulate_hest if what == "hest" else simulate_cells)(out, **options))
            return
        n_slices, n_donors, seed = (options.pop(name) for name in ("n_slices", "n_donors", "seed"))
        if not 1 <= n_donors <= n_slices <= 26:
            raise DataError(
                f"n_slices is {n_slices} and n_donors {n_donors}: 26 slices at most and no "
                "more donors than slices"
            )
        for i in range(n_slices):
            slide = simulate_cortex(
                seed=1000 * seed + i,
                sample=f"sim{i + 1}",
                donor=f"Sim{chr(65 + i * n_donors // n_slices)}",
                **options,
            )
            print(write_visium(slide, out / slide.sample))
    except DataError as error:
        parser.exit(2, f"simulate.py: {error}\n")


if __name__ == "__main__":
    main()
