"""Small pictures of cells in numbers: shape, texture, and how far generated pictures are from real
ones.

The features are classical and fixed (no network that saw other pictures), so a distance means the
same on every panel; the distances themselves are those of `metrics`.
"""

import numpy as np
from scipy import stats
from scipy.spatial import cKDTree

import metrics

MORPHOLOGY = (
    *("area", "perimeter", "major", "minor", "eccentricity", "extent", "fill"),
    *("mean", "std", "max"),
)


# the first of them tell the shape, the others grey levels
N_SHAPES = 7


def stain_channel(channels):
    """Number of the first channel that is no mask, or None."""
    return next((i for i, name in enumerate(channels) if name not in ("own", "other")), None)


def stain_statistics(images, inside):
    """Eleven numbers of a stain in each cell: images (n, S, S) in [0, 1], inside (n, S, S) bool ->
    (n, 11): inside the cell mean, s.d., quantiles 0, .1, .25, .5, .75, .9, 1 and the mean gradient
    magnitude; the mean of the crop. Of a cell without a pixel all but the last are 0."""
    out = np.zeros((len(images), 11))
    for row, (image, mask) in enumerate(zip(images, inside)):
        out[row, 10] = image.mean()
        if not mask.any():
            continue
        values = image[mask]
        gradient = np.hypot(*np.gradient(image))[mask].mean()
        quantiles = np.quantile(values, [0, 0.1, 0.25, 0.5, 0.75, 0.9, 1])
        out[row, :10] = [values.mean(), values.std(), *quantiles, gradient]
    return out


def morphology(images, threshold=0.5):
    """Ten numbers of the foreground (pixels above `threshold`) of each picture: images (n, S, S) in
    [0, 1] -> (n, 10) float64, names MORPHOLOGY.

    In px: area; perimeter (pixel edges between foreground and the rest); major, minor axis (4 sqrt
    of the eigenvalues of the foreground's covariance, an ellipse's full axes); eccentricity; extent
    = area / bounding box; fill = area / area of that ellipse; mean, std, max intensity inside. All
    0 where nothing is above the threshold. One region or several: all foreground counts."""
    images = np.asarray(images, np.float64)
    n, side, _ = images.shape
    inside = images > threshold
    area = inside.sum((1, 2))
    padded = np.pad(inside, ((0, 0), (1, 1), (1, 1)))
    perimeter = sum((np.diff(padded.astype(np.int8), axis=k) != 0).sum((1, 2)) for k in (1, 2))
    at, per = np.arange(side) - (side - 1) / 2, np.maximum(area, 1)
    # (n, S) pixels of a row, of a column
    row, col = inside.sum(2), inside.sum(1)
    y, x = row @ at / per, col @ at / per
    # 1/12: a pixel is a square, not a point
    yy, xx = row @ at**2 / per - y**2 + 1 / 12, col @ at**2 / per - x**2 + 1 / 12
    xy = np.einsum("nij,i,j->n", inside, at, at, optimize=True) / per - x * y
    spread = np.sqrt(((xx - yy) / 2) ** 2 + xy**2)
    big, small = (xx + yy) / 2 + spread, np.maximum((xx + yy) / 2 - spread, 1 / 12)
    box = np.prod(
        [(m.shape[1] - (m > 0).argmax(1) - (m[:, ::-1] > 0).argmax(1)) for m in (row, col)], axis=0
    )
    mean = (images * inside).sum((1, 2)) / per
    std = np.sqrt(np.maximum((images**2 * inside).sum((1, 2)) / per - mean**2, 0))
    out = np.stack(
        [
            area,
            perimeter,
            4 * np.sqrt(big),
            4 * np.sqrt(small),
            np.sqrt(1 - small / big),
            area / box,
            area / (4 * np.pi * np.sqrt(big * small)),
            mean,
            std,
            np.where(inside, images, 0).max((1, 2)),
        ],
        1,
    )
    return np.where(area[:, None] > 0, out, 0)


class ImageFeatures:
    """Fixed classical features of small pictures, z-scored by training pictures: `morphology` of
    every channel (threshold: Otsu 1979, of all training pixels of the channel), mean intensity in
    eight rings, gradient magnitude in eight orientations (both of the channels' mean).

    z is clipped to +-5, so that no feature that hardly varies in real pictures decides alone;
    features constant in training are left out. Never fitted on scored or generated pictures.

    has_grey False: of the pictures cut at the thresholds, black and white, so that no grey level
    counts. Grey decides much where real pictures have none: masks times .99 are twice as far from
    the masks as other masks are."""

    def __init__(self, has_grey=True):
        self.has_grey = has_grey

    def fit(self, images):
        """images (n, C, S, S) uint8 training pictures."""
        self.thresholds = [_otsu(images[:, c]) for c in range(images.shape[1])]
        raw = self._raw(images)
        self.used = raw.std(0) > 1e-9
        self.mean, self.std = raw[:, self.used].mean(0), raw[:, self.used].std(0)
        return self

    def __call__(self, images):
        """(n, C, S, S) uint8 -> (n, D) float64, D = 10 C + 16 less the constant ones."""
        return np.clip((self._raw(images)[:, self.used] - self.mean) / self.std, -5, 5)

    def _raw(self, images, chunk=4096):
        return np.concatenate(
            [self._part(images[i : i + chunk] / 255.0) for i in range(0, len(images), chunk)]
        )

    def _part(self, x):
        if not self.has_grey:
            x = (x > np.array(self.thresholds)[:, None, None]).astype(np.float64)
        side = x.shape[-1]
        flat = x.mean(1)  # (n, S, S)
        at = np.arange(side) - (side - 1) / 2
        # the corners belong to the last ring
        ring = np.minimum((np.hypot(*np.meshgrid(at, at)) / (side / 2) * 8).astype(int), 7)
        rings = np.stack([flat[:, ring == k].mean(1) for k in range(8)], 1)
        dy, dx = (np.gradient(flat, axis=k) for k in (1, 2))
        # bins centred on the axes, where straight edges are
        way = np.rint(np.arctan2(dy, dx) / (2 * np.pi) * 8).astype(int) % 8
        size = np.hypot(dx, dy)
        ways = np.stack([(size * (way == k)).mean((1, 2)) for k in range(8)], 1)
        return np.concatenate(
            [morphology(x[:, c], t) for c, t in enumerate(self.thresholds)] + [rings, ways], 1
        )


def _otsu(pixels):
    """Threshold in [0, 1] of uint8 pixels that splits them with the largest variance between the
    two classes (Otsu 1979)."""
    count = np.bincount(np.asarray(pixels).ravel(), minlength=256).astype(np.float64)
    below, level = np.cumsum(count), np.cumsum(count * np.arange(256))
    above = below[-1] - below
    between = np.where(
        (below > 0) & (above > 0),
        (level[-1] * below / below[-1] - level) ** 2 / np.maximum(below * above, 1),
        -1.0,
    )
    best = np.flatnonzero(between == between.max())
    # the middle of a flat top: masks are 0 and 255
    return (best.mean() + 0.5) / 255


def generated_images(real, made, train, seed=0, halves=5):
    """Scores of a set of generated pictures by features (n, D) of real scored cells, generated
    pictures of the same cells (row by row) and real training cells.

    fd, kid: Frechet and kernel distance of these hand-made features (FID and KID are of a network's
    features: other numbers), between the generated pictures of one random half of the cells and the
    real pictures of the other half, so that it is on the same footing as fd_floor, kid_floor (real
    against real, the same halves); mean over `halves` splits and both directions. w1: mean
    1-Wasserstein distance of the features, in their training s.d.; w1_floor: of the two real
    halves. ks_d: mean over the features, one at a time, of the two-sample Kolmogorov-Smirnov
    statistic D: 0 = the same distribution, 1 = disjoint (papers whose "KS" goes up mean 1 - D).
    nearest_train: median distance of a generated picture to the nearest training picture over that
    of the real scored ones: far below 1 = copies.
    diversity: mean distance between random pairs, over that of the real ones. Raises ValueError
    unless real and made have the same rows, and as `metrics.frechet_distance`."""
    real, made, train = (np.asarray(x, np.float64) for x in (real, made, train))
    if len(real) != len(made):
        raise ValueError(f"row counts differ: real has {len(real)}, made has {len(made)}")
    distances = metrics.frechet_distance, metrics.kernel_distance, metrics.wasserstein_1d
    rng, found = np.random.default_rng(seed), []
    for _ in range(halves):
        order = rng.permutation(len(real))
        i, j = order[: len(order) // 2], order[len(order) // 2 :]
        found.append(
            [np.mean([f(x[i], real[j]), f(x[j], real[i])]) for f in distances for x in (made, real)]
        )
    fd, fd_floor, kid, kid_floor, w1, w1_floor = np.mean(found, 0)
    tree, pair = cKDTree(train), rng.permutation(len(real))
    nearest = [np.median(tree.query(x)[0]) for x in (made, real)]
    spread = [np.linalg.norm(x - x[pair], axis=1).mean() for x in (made, real)]
    return {
        "fd": float(fd),
        "fd_floor": float(fd_floor),
        "kid": float(kid),
        "kid_floor": float(kid_floor),
        "w1": float(w1),
        "w1_floor": float(w1_floor),
        "ks_d": float(np.mean([stats.ks_2samp(x, y).statistic for x, y in zip(made.T, real.T)])),
        "nearest_train": float(nearest[0] / nearest[1]) if nearest[1] > 0 else np.nan,
        "diversity": float(spread[0] / spread[1]) if spread[1] > 0 else np.nan,
    }
