"""An H&E task whose genes are a known function of the patches."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from scipy.spatial import cKDTree

from plainst.readers.checked import DataError
from plainst.readers.slides import Slide
from plainst.simulate.cortex import (
    PATCH_UM,
    PITCH,
    draw_counts,
    draw_discs,
    gene_programs,
    lattice,
    lattice_barcodes,
    lattice_pixels,
    stain,
)
from plainst.simulate.files import write_hest


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
    draw_discs(
        h,
        owner,
        rng.uniform(0, size, (len(owner), 2)),
        rng.uniform(3, 6, len(owner)) * size / PATCH_UM,
        ink[owner],
    )
    e = eosin[:, None, None].astype(np.float32) * (
        1 + 0.12 * rng.standard_normal(h.shape, dtype=np.float32)
    )
    return stain(h + 0.2 * e, e)


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
