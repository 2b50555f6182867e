"""Expression of several slides as one matrix: one rule of library sizes, z-scores made row by
row."""

import numpy as np
import scipy.sparse as sp


def agreed_library(wanted, slides):
    """`given` if that is `wanted` and every slide came with library sizes, else `own`: slides
    normalised in two ways would differ by that alone."""
    is_given = wanted == "given" and all(s.library_size is not None for s in slides)
    return "given" if is_given else "own"


def library_sizes(slide, library):
    """(N,) what the counts of a spot are divided by: `given` with the slide, or its `own` sum over
    all genes of the file."""
    if library == "given":
        return slide.library_size
    return np.asarray(slide.counts.sum(1), np.float64).ravel()


class ScaledRows:
    """z-scores (N, G) of stacked slides, kept sparse: indexing makes float32 rows.

    parts: for each slide its values x (n, G) CSR, a scaler whose `transform` makes (n, G) z-scores
    of them, and the genes that the slide lacks (G,) bool, which are at the mean.
    """

    def __init__(self, parts):
        values, self.scalers, self.absent = zip(*parts)
        self.x = sp.vstack(values).tocsr() if len(parts) > 1 else values[0]
        self.shape = self.x.shape
        self.starts = np.cumsum([0] + [x.shape[0] for x in values])[:-1]

    def __getitem__(self, rows):
        rows = np.arange(self.shape[0])[rows]
        z = np.empty((len(rows), self.shape[1]), np.float32)
        slide = np.searchsorted(self.starts, rows, side="right") - 1
        for i, (scaler, absent) in enumerate(zip(self.scalers, self.absent)):
            of_slide = slide == i
            if of_slide.any():
                z[of_slide] = scaler.transform(self.x[rows[of_slide]])
                z[np.ix_(of_slide, absent)] = 0
        return z  # (len(rows), G)
