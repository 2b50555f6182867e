"""A field of single cells with crops and a known truth."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from scipy.spatial import cKDTree

from plainst.readers.checked import DataError
from plainst.readers.crops import write_cells
from plainst.simulate.cortex import (
    draw_counts,
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
