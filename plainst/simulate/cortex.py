"""A layered cortex with known truth: lattice, stained picture, programs, counts."""

from __future__ import annotations

import functools
import math
import os
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import scipy.sparse as sp
from PIL import Image

from plainst.readers.checked import DataError
from plainst.readers.slides import Slide

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


def stain(h: np.ndarray, e: np.ndarray) -> np.ndarray:
    """Haematoxylin and eosin amounts (...) -> (..., 3) uint8 by Beer-Lambert."""
    return np.stack(
        [
            np.rint(245 * np.exp(-(h * STAINS[0, c] + e * STAINS[1, c]))).astype(np.uint8)
            for c in range(3)
        ],
        axis=-1,
    )


def clouds(rng, size: int, cells: int) -> np.ndarray:
    """(size, size) smooth noise of about unit variance with `cells` bumps a side."""
    bumps = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
    return np.asarray(bumps.resize((size, size), Image.Resampling.BICUBIC)) * np.float32(1.4)


def draw_discs(
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
    inside = np.clip((edge + 2.5 * clouds(rng, size, size // 12)) / 3, 0, 1)
    texture = (
        1
        + 0.06 * clouds(rng, size, 14)
        + 0.05 * clouds(rng, size, size // 16)
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
    draw_discs(
        nuclei,
        np.zeros(len(at), dtype=np.int64),
        at * scale,
        radius,
        rng.uniform(0.5, 1.1, len(at)),
    )
    return stain(inside * (nuclei[0] + 0.25 * eosin * texture), inside * eosin * texture + 0.01)


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
