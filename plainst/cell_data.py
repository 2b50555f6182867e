"""The cells of one run as a network reads them: expression with hidden genes, pictures in every
orientation, and who is near whom.

Rows are those of the cell file everywhere; N cells, G genes, C channels, S pixels, k members of a
niche, t squares of the tissue.
"""

import copy
from dataclasses import replace

import numpy as np
import torch
from scipy.spatial import cKDTree

from plainst.neighbours import knn_table
from plainst.readers.checked import DataError

PARTS = ("train", "val", "test")
# rows that are made dense at a time
CHUNK = 4096
# bytes of crops that are held in memory; larger files are read in every step
IN_MEMORY = 2**31
# channels and side that stand in for the crops of a file without pictures
NO_PICTURE = (1, 16)


class Normaliser:
    """Counts -> standardised expression, fitted on training cells; genes that are hidden leave no
    trace in the others.

    x_g = log1p(c_g / total * M), z = clip((x - mean) / std, +-5), M the median total. With hidden
    genes the total is that of the visible ones, and M is multiplied with the share p of the counts
    that these genes have in the training cells: hidden counts enter nothing.
    """

    def fit(self, counts, log_moments):
        """counts (n, G) CSR of the training cells; log_moments(counts, M) -> mean and variance (G,)
        of x, by the preprocessing of the floor above."""
        total = np.asarray(counts.sum(1), np.float64).ravel()
        share = np.asarray(counts.sum(0), np.float64).ravel() / total.sum()
        self.median = float(np.median(total))
        self.share = torch.tensor(share, dtype=torch.float32)  # (G,) p
        mean, var = log_moments(counts, self.median)
        self.mean = torch.tensor(mean, dtype=torch.float32)
        std = np.where(var > 1e-8, np.sqrt(var), 1.0)
        self.std = torch.tensor(std, dtype=torch.float32)
        self.depth = (float(np.log(total).mean()), float(np.log(total).std() + 1e-6))
        return self

    def __call__(self, counts, hidden=None):
        """counts (B, G) float, hidden (B, G) bool -> z (B, G), 0 where hidden; depth (B, 1)
        standardised log total."""
        visible = torch.ones_like(counts) if hidden is None else (~hidden).to(counts.dtype)
        share = (visible * self.share).sum(1, keepdim=True).clamp(min=1e-3)  # (B, 1)
        total = (counts * visible).sum(1, keepdim=True).clamp(min=1)  # (B, 1)
        x = torch.log1p(counts / total * self.median * share)
        z = ((x - self.mean) / self.std).clamp(-5, 5) * visible
        return z, ((total / share).log() - self.depth[0]) / self.depth[1]

    @classmethod
    def from_state(cls, state):
        """The normaliser that `state` describes."""
        self = cls()
        self.median, self.depth = state["median"], tuple(state["depth"])
        self.share, self.mean, self.std = (state[name] for name in ("share", "mean", "std"))
        return self

    def state(self):
        """What a saved model needs to read new counts: numbers and tensors by name."""
        return {
            "median": self.median,
            "share": self.share,
            "mean": self.mean,
            "std": self.std,
            "depth": list(self.depth),
        }


def neighbour_tables(xy, group, k, t, path=""):
    """Who is near whom, only among cells of the same group (a section within one part of the split;
    -1: belongs to none). xy (N, 2) px, group (N,) int.

    -> niche (N, k) rows of the k nearest other cells, and their places (N, k, 2); square (N,) of
    every cell, sides chosen so that squares hold about ten, -1 without a group; tissue (N, t) the
    nearest squares but the cell's own, -1 where there are fewer, and the places (N, t, 2) of their
    cells' mean. Places are relative to the cell, in square sides. Raises DataError for a section
    with fewer than k + 1 cells in a part.
    """
    n, n_squares = len(xy), 0
    niche, square, tissue = np.zeros((n, k), np.int64), np.full(n, -1), np.full((n, t), -1)
    niche_places = np.zeros((n, k, 2), np.float32)
    tissue_places = np.zeros((n, t, 2), np.float32)
    for g in np.unique(group[group >= 0]):
        rows = np.flatnonzero(group == g)
        if len(rows) < k + 1:
            raise DataError(
                f"{path}: a section has {len(rows)} cells in one part of the split, fewer than a "
                f"niche of {k + 1}: leave the section out or make the blocks wider"
            )
        places = xy[rows]
        table = knn_table(places, k)  # (n_g, k)
        tenth = places[table[:, min(9, k - 1)]]
        # a disc with the tenth neighbour on its rim has the area of the square; 1: all at one place
        side = np.sqrt(np.pi) * np.median(np.linalg.norm(tenth - places, axis=1)) or 1.0
        corner = np.floor(places / side).astype(np.int64)
        corners, square_of = np.unique(corner, axis=0, return_inverse=True)
        square_of = square_of.reshape(-1)
        total = np.stack([np.bincount(square_of, places[:, axis]) for axis in (0, 1)], 1)
        centre = total / np.bincount(square_of)[:, None]  # (squares, 2)
        ranks = np.arange(1, min(t + 1, len(corners)) + 1)
        nearest = cKDTree(centre).query(places, k=ranks)[1]  # (n_g, <= t + 1)
        for i, row in enumerate(nearest):
            others = row[row != square_of[i]][:t]
            tissue[rows[i], : len(others)] = others + n_squares
            tissue_places[rows[i], : len(others)] = (centre[others] - places[i]) / side
        niche[rows], square[rows] = rows[table], square_of + n_squares
        niche_places[rows] = (places[table] - places[:, None]) / side
        n_squares += len(corners)
    return [torch.tensor(a) for a in (niche, niche_places, square, tissue, tissue_places)]


class CellDataset:
    """The cells of one run: counts, pictures, neighbours.

    cells: a `Cells`; split: masks (N,) of the parts; normalise: a fitted `Normaliser`; k cells make
    a niche, t squares a tissue. rows {part: row numbers}; niche, square, tissue and their places:
    see `neighbour_tables`; shape (C, S); has_pictures: whether the file has crops. Tensors come on
    `device`, tables stay on the CPU.
    """

    def __init__(self, cells, split, normalise, k, t, device):
        self.cells, self.normalise, self.device = cells, normalise, device
        self.k, self.t = k, t
        self.set_split(split)
        self.counts = cells.counts.tocsr().astype(np.float32)
        self.has_pictures = cells.crops is not None
        self.shape, self.stored = NO_PICTURE, None
        if not self.has_pictures:
            return
        n, c, s, _ = cells.crops.shape
        self.shape = (c, s)
        if n * c * s * s < IN_MEMORY:
            self.stored = torch.tensor(cells.crops[np.arange(n)])
        train = self.rows["train"]
        sample = self.images(train[:: -(-len(train) // CHUNK)])
        # (C, 1, 1): a sparse channel counts as much as a full one
        weight = 1 / sample.var((0, 2, 3)).clamp(min=1e-4)
        self.channel_weight = (weight / weight.mean())[:, None, None]

    def set_split(self, split):
        """Take masks of the parts, and make the tables of neighbours inside each."""
        cells, self.split = self.cells, split
        self.rows = {part: np.flatnonzero(getattr(split, part)) for part in PARTS}
        group = np.full(cells.n_cells, -1)
        for i, part in enumerate(PARTS):
            rows = self.rows[part]
            group[rows] = i * len(cells.sections) + cells.section[rows]
        self.niche, self.niche_places, self.square, self.tissue, self.tissue_places = (
            neighbour_tables(cells.xy, group, self.k, self.t, cells.source)
        )

    def unsplit(self):
        """The same cells in one part, with neighbours wherever they are; without the sections that
        have no niche of k + 1 cells."""
        whole, sizes = copy.copy(self), self.cells.section_sizes
        has_niche = (sizes > self.k)[self.cells.section]
        nobody = np.zeros_like(has_niche)
        whole.set_split(replace(self.split, train=nobody, val=nobody, test=has_niche))
        return whole

    @property
    def used_rows(self):
        """Rows of the cells that are in a part, part by part."""
        return np.concatenate([self.rows[part] for part in PARTS])

    def images(self, rows):
        """(B, C, S, S) float in [-1, 1]; from memory where all crops fit into 2 GB, else from the
        file; black where the file has no pictures."""
        if not self.has_pictures:
            return torch.full((len(rows), *NO_PICTURE, NO_PICTURE[1]), -1.0, device=self.device)
        if self.stored is not None:
            x = self.stored[rows]
        else:
            x = torch.tensor(self.cells.crops[np.asarray(rows)])
        return x.to(self.device).float() / 127.5 - 1

    def expression(self, rows, hidden=None):
        """Standardised expression (B, G) and depth (B, 1) of `rows`, with the genes `hidden` (B, G)
        hidden."""
        counts = torch.tensor(self.counts[np.asarray(rows)].toarray())
        z, depth = self.normalise(counts, None if hidden is None else hidden.cpu())
        return z.to(self.device), depth.to(self.device)

    def expression_matrix(self, part):
        """Expression and depth of the cells of a part, (n, G + 1) numpy."""
        rows = self.rows[part]
        chunks = np.array_split(rows, -(-len(rows) // CHUNK))
        return np.concatenate([torch.cat(self.expression(c), 1).cpu().numpy() for c in chunks])

    def all_expression(self):
        """Expression and depth of every cell in its row, (N, G + 1), zeros for cells in no part."""
        rows = self.used_rows
        out = torch.zeros(self.cells.n_cells, self.cells.n_genes + 1, device=self.device)
        for chunk in np.array_split(rows, -(-len(rows) // CHUNK)):
            out[chunk] = torch.cat(self.expression(chunk), 1)
        return out

    def square_means(self, z):
        """z (N, d) of all cells -> (squares, d), mean over the members."""
        is_used = self.square >= 0
        square_of = self.square[is_used].to(z.device)
        total = z.new_zeros(int(self.square.max()) + 1, z.shape[1])
        total = total.index_add(0, square_of, z[is_used.to(z.device)])
        return total / torch.bincount(square_of, minlength=len(total))[:, None]

    def surroundings(self, z, squares, rows, modality=None):
        """What the cells `rows` can read of z (N, d) and its `square_means`: of the niche z (B, k,
        d) and places (B, k, 2); of the tissue z (B, t, d), places (B, t, 2) and which squares exist
        (B, t). With modality (B,), z (m, N, d) and squares (m, n, d) hold several embeddings, and a
        row reads the one of its number."""
        rows, device = torch.as_tensor(rows), z.device
        niche, tissue = self.niche[rows].to(device), self.tissue[rows].to(device)
        squares_of = tissue.clamp(min=0)
        if modality is None:
            near, far = z[niche], squares[squares_of]
        else:
            number = modality.to(device)[:, None]
            near, far = z[number, niche], squares[number, squares_of]
        near_places = self.niche_places[rows].to(device)
        far_places = self.tissue_places[rows].to(device)
        return near, near_places, far, far_places, tissue >= 0


def random_orientation(x, which):
    """Each image of x (B, C, S, S) in one of its eight orientations, which (B,) in 0..7:
    orientation carries no information."""
    pixel = torch.arange(x[0, 0].numel()).view(x.shape[2:])
    turns = [torch.rot90(pixel, k) for k in range(4)]
    # (8, S, S) number of the pixel that comes here
    sources = torch.stack([*turns, *(turn.flip(1) for turn in turns)])
    source = sources[which.cpu()].to(x.device).flatten(1)  # (B, S S)
    return x.flatten(2).gather(2, source[:, None].expand(-1, x.shape[1], -1)).view(x.shape)
