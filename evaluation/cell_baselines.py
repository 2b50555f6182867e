"""Predictors of single cells that a network has to beat: ridge and nearest neighbours whose penalty
and number are chosen by folds of the training cells, PCA; and the inputs that they read.

n training rows, q query rows, p inputs, m targets. Folds are strips of neighbouring cells, because
cells beside each other resemble each other.
"""

import numpy as np
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

N_FOLDS = 5
ALPHAS = np.logspace(-1, 5, 13)
# numbers of neighbours to choose from
COUNTS = (5, 10, 20, 40, 80)


def strips(cells, rows):
    """Folds (n,) in 0 .. N_FOLDS - 1 of the cells `rows`: ten strips of equally many cells along x
    in each section, dealt out in turn."""
    fold = np.zeros(len(rows), np.int64)
    for section in np.unique(cells.section[rows]):
        members = np.flatnonzero(cells.section[rows] == section)
        order = np.argsort(cells.xy[rows[members], 0], kind="stable")
        strip = np.arange(len(members)) * 2 * N_FOLDS // len(members)
        fold[members[order]] = strip % N_FOLDS
    return fold


def ridge_path(x, y, query):
    """Predictions (q, m) of ridge on z-scored inputs, one array after the other for each of ALPHAS:
    fit on x (n, p), y (n, m)."""
    mean, std = x.mean(0), x.std(0)
    std = np.where(std > 1e-12, std, 1.0)
    x, query, offset = (x - mean) / std, (query - mean) / std, y.mean(0)
    value, axes = np.linalg.eigh(x.T @ x)  # (p,), (p, p)
    target = axes.T @ (x.T @ (y - offset))  # (p, m)
    rotated = query @ axes  # (q, p)
    for alpha in ALPHAS:
        yield rotated @ (target / (value.clip(min=0) + alpha)[:, None]) + offset


def knn_path(x, y, query):
    """Means of y over the nearest training rows, for each of COUNTS that there are rows for."""
    counts = [k for k in COUNTS if k <= len(x)] or [len(x)]
    nearest = NearestNeighbors(n_neighbors=counts[-1]).fit(x).kneighbors(query)[1]  # (q, k)
    total, before = np.zeros((len(query), y.shape[1])), 0
    for k in counts:
        total = total + y[nearest[:, before:k]].sum(1)
        before = k
        yield total / k


def by_folds(path, x, y, query, fold):
    """Predictions (q, m) of the setting of `path` (`ridge_path` or `knn_path`) that is best on the
    folds of the training rows, chosen for each target: fold (n,)."""
    x, y, query = (np.asarray(a, np.float64) for a in (x, y, query))
    errors = 0.0
    for number in np.unique(fold):
        is_out = fold == number
        guesses = path(x[~is_out], y[~is_out], x[is_out])
        part = [np.square(guess - y[is_out]).sum(0) for guess in guesses]
        errors = errors + np.array(part)  # (settings, m)
    best = errors.argmin(0)  # (m,)
    out = np.zeros((len(query), y.shape[1]))
    for number, guess in enumerate(path(x, y, query)):
        out[:, best == number] = guess[:, best == number]
    return out


def ridge(x, y, query, fold):
    """Ridge, one penalty a target: fit on x (n, p), y (n, m), predict query (q, p) -> (q, m)."""
    return by_folds(ridge_path, x, y, query, fold)


def knn(x, y, query, fold):
    """Mean of y over the k nearest training rows, one k a target, shapes as in `ridge`."""
    return by_folds(knn_path, x, y, query, fold)


def equal_blocks(blocks, fit):
    """Blocks of inputs [(N, p_i)] side by side, each z-scored by the rows `fit` and scaled to the
    same variance: distances to which every block contributes alike. -> (N, sum p_i)."""
    scaled = []
    for block in blocks:
        std = block[fit].std(0)
        std = np.where(std > 1e-12, std, 1.0)
        scaled.append((block - block[fit].mean(0)) / std / np.sqrt(block.shape[1]))
    return np.concatenate(scaled, 1)


def average_with_ridge(linear, inner, y, head, fit, rows, fold):
    """Mean of a network's head and of a ridge on [linear terms, the head's hidden layer], fitted on
    training cells. linear (N, p), inner (N, q), y (n_fit, m), head (n, m) -> (n, m)."""
    x = np.concatenate([linear, inner], 1)
    return (ridge(x[fit], y, x[rows], fold) + head) / 2


def pca_impute(x, query, is_hidden, rank=15):
    """Probabilistic reading of PCA: scores of `query` from the visible genes by ridge on the
    loadings, hidden genes from the scores. x (n, G) complete, query (q, G), is_hidden (G,) bool ->
    (q, hidden)."""
    pca = PCA(min(rank, *x.shape), random_state=0).fit(x)
    visible = pca.components_[:, ~is_hidden]  # (r, visible)
    residual = x - pca.inverse_transform(pca.transform(x))
    noise = max(float(np.mean(np.var(residual, axis=0))), 1e-6)
    inner = visible @ visible.T + np.diag(noise / pca.explained_variance_)
    centred = (query - pca.mean_)[:, ~is_hidden]
    loadings = pca.components_[:, is_hidden]
    return centred @ visible.T @ np.linalg.inv(inner) @ loadings + pca.mean_[is_hidden]


def components(x, fit, n_components):
    """Principal components (N, at most n_components) of x (N, p), axes of the rows `fit`."""
    pca = PCA(min(n_components, len(fit) - 1, x.shape[1]), random_state=0).fit(x[fit])
    return pca.transform(x)


def pixel_components(n_components, fit, *others):
    """Principal components of the pixels of pictures (n, C, S, S) uint8, fitted on `fit`: of `fit`
    and of each of the others, (n, at most n_components)."""
    pixels = [images.reshape(len(images), -1) / 255 for images in (fit, *others)]
    pca = PCA(min(n_components, len(fit) - 1), random_state=0).fit(pixels[0])
    return [pca.transform(x) for x in pixels]


def density(dataset, rows):
    """-log distance of the cells `rows` to the 5th and the farthest neighbour of the niche, in px:
    (n, 2)."""
    xy = dataset.cells.xy
    # (n, k), ascending
    apart = np.linalg.norm(xy[dataset.niche[rows].numpy()] - xy[rows][:, None], axis=-1)
    return -np.log(apart[:, [min(4, apart.shape[1] - 1), -1]] + 1)


def niche_means(dataset, values):
    """values (N, p) of all cells -> their means over the niche of every cell that is in a part, in
    its row; zeros elsewhere."""
    out, rows = np.zeros_like(values), dataset.used_rows
    for part in np.array_split(rows, -(-len(rows) // 4096)):
        out[part] = values[dataset.niche[part].numpy()].mean(1)
    return out
