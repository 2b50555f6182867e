"""A slide in compact tiles, each with all that its spots see through a graph, as tensors."""

import numpy as np
import torch

from plainst.neighbour_sums import Neighbours
from plainst.neighbours import median_tiles, with_halo

# spots that a CPU predicts at a time: their arrays are used again, where larger ones would go back
# to the system
AT_ONCE = 20_000


class Tile:
    """Some spots and all that they look at: rows (n,), the tile's own `n_own` first, and the
    `Neighbours` of these n spots.

    What a model says about the tile's own spots is what it says about them in the whole, up to
    rounding (a test holds it to 1e-5). arrays: what `inputs` takes rows of; whole: all spots are in
    this tile, whose inputs are then made once and held.
    """

    def __init__(self, rows, n_own, table, arrays, device, whole=False):
        self.rows, self.n_own, self.device = rows, n_own, device
        self.graph = Neighbours(table, device)
        self._arrays, self._rows, self._inputs = arrays, slice(None) if whole else rows, None
        if whole:
            self._inputs = self.inputs()

    def inputs(self):
        """The tile's rows (n, ...) of each array on the device, None for one that is None; those of
        one tile among many are made dense each time anew."""
        if self._inputs:
            return self._inputs
        return tuple(
            None if values is None else torch.as_tensor(values[self._rows], device=self.device)
            for values in self._arrays
        )


def make_tiles(arrays, table, positions, size, hops, device):
    """Yield the `Tile`s of a run: one of all spots (size 0), or compact ones of at most `size`
    spots with a halo of `hops` steps of the graph.

    arrays: (N, ...) each, or what gives rows by index; table (N, k), -1 = empty; positions: the
    coordinates (n, 2) of each slide, stacked as the arrays.
    """
    n = len(table)
    if not size or size >= n:
        yield Tile(np.arange(n), n, table, arrays, device, whole=True)
        return
    start, pad = 0, np.full(n, -1)
    for xy in positions:
        for own_rows in median_tiles(xy, size):
            rows, near = with_halo(table, own_rows + start, hops, pad)
            yield Tile(rows, len(own_rows), near, arrays, device)
        start += len(xy)


def prediction_size(size, device):
    """Spots of a tile in prediction: those of training, `size`; where that is 0, the whole, on a
    CPU `AT_ONCE`."""
    return size or (AT_ONCE if torch.device(device).type == "cpu" else 0)
