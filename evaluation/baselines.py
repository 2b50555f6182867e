"""Every predictor that a method has to beat, written once."""

import warnings
from typing import Protocol

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import cg
from scipy.spatial import cKDTree
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge, RidgeCV
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import data
import metrics
from evaluation.clustering import gmm_tied, majority_vote

# --------------------------------------------------------------------------------------------------
# Genes from H&E: the same features, targets, training spots and scores as the method
# --------------------------------------------------------------------------------------------------


def official_ridge(x, y, n_components=None):
    """Ridge of the HEST benchmark (Jaume et al. 2024): alpha = 100 / (dim x genes), no intercept,
    lsqr; after z-score and PCA to n_components, or on x as it is. x (N, F), y (N, G)."""
    dim = min(n_components or x.shape[1], *x.shape)
    ridge = Ridge(
        alpha=100 / (dim * y.shape[1]),
        fit_intercept=False,
        solver="lsqr",
        max_iter=1000,
        random_state=0,
    )
    if n_components is not None:
        ridge = make_pipeline(StandardScaler(), PCA(dim, random_state=0), ridge)
    return ridge.fit(x, y)


def pca_ridge(x, y):
    """The benchmark's ridge on 256 principal components."""
    return official_ridge(x, y, 256)


def chosen_ridge(x, y):
    """Ridge with an intercept whose penalty is chosen by leave-one-out on the training spots."""
    return RidgeCV(np.logspace(0, 5, 11)).fit(x, y)


def nearest_spots(x, y):
    """Mean of the 30 training spots of the nearest z-scored features, weighted by 1 / distance."""
    knn = KNeighborsRegressor(min(30, len(y)), weights="distance")
    return make_pipeline(StandardScaler(), knn).fit(x, y)


def predict_genes(fit, x, y, tests, n_targets=None):
    """[prediction (S, G) of every test slide] of `fit`(x, y), a fitted regressor.

    x (N, F), y (N, G) float64 of the training spots, tests [(S, F)]. The first n_targets genes and
    the others are fitted apart: the benchmark's alpha depends on the number of genes.
    """
    sides = (y[:, :n_targets], y[:, n_targets:]) if n_targets else (y,)
    models = [fit(x, side) for side in sides if side.shape[1]]
    return [np.concatenate([m.predict(test) for m in models], 1) for test in tests]


def feature_baselines(x, y, tests, n_targets=None):
    """{name: [prediction (S, G) of every test slide]} from the features of the spot alone."""
    return {
        "ridge_pca256": predict_genes(pca_ridge, x, y, tests, n_targets),
        "ridge_raw": predict_genes(official_ridge, x, y, tests, n_targets),
        "knn": predict_genes(nearest_spots, x, y, tests, n_targets),
    }


def scaled_baselines(x, y, tests, n_targets=None):
    """The same two predictors on the scaled features that a network reads, the penalty chosen."""
    return {
        "ridge_scaled": predict_genes(chosen_ridge, x, y, tests, n_targets),
        "knn_scaled": predict_genes(nearest_spots, x, y, tests, n_targets),
    }


def ridge_path(x, y, tests, penalties):
    """[[prediction (S, G) of every test slide] of every penalty] of ridge with an intercept on
    z-scored features: x (N, F), y (N, G), tests [(S, F)]. One decomposition serves all penalties:
    of the smaller of the N x N and F x F products."""
    mean, std = x.mean(0), np.maximum(x.std(0), 1e-9)
    z, level = (x - mean) / std, y.mean(0)
    is_wide = x.shape[1] > len(x)
    values, vectors = np.linalg.eigh(z @ z.T if is_wide else z.T @ z)
    right = y - level if is_wide else z.T @ (y - level)
    right = vectors.T @ right
    path = []
    for penalty in penalties:
        solved = vectors @ (right / (np.maximum(values, 0) + penalty)[:, None])
        weights = z.T @ solved if is_wide else solved  # (F, G)
        path.append([(test - mean) / std @ weights + level for test in tests])
    return path


def neighbour_mean(x, table, is_neighbour):
    """Mean of x (S, F) over the rows of a table (S, K), where is_neighbour (S, K); torch. In
    pieces: (S, K, F) of a large slide would not fit."""
    weight = is_neighbour.float()[..., None]  # (S, K, 1)
    pieces = zip(table.split(4096), weight.split(4096))
    return torch.cat([(x[rows] * w).sum(1) / w.sum(1) for rows, w in pieces])


# --------------------------------------------------------------------------------------------------
# Layers: supervised, one class a spot. Each returns class probabilities (N, C) for all spots
# --------------------------------------------------------------------------------------------------

# spots that smoothed_lr averages over, the spot itself not counted
SMOOTHED = 36
# training spots that components are fitted on where x makes its rows on request
MOST_FOR_PCA = 20_000


class Target(Protocol):
    """What a supervised baseline is fitted to; the task of a method is one."""

    labels: np.ndarray  # (N,) int, -1 = none
    n_classes: int  # C
    split: data.Split  # masks train, val (N,)


def majority(target):
    """The largest training class for everyone."""
    counts = np.bincount(target.labels[target.split.train], minlength=target.n_classes)
    return np.tile(np.eye(target.n_classes)[counts.argmax()], (len(target.labels), 1))  # (N, C)


def coords_knn(target, xy):
    """Inverse-distance vote of the nearest training *labels*, xy (N, 2); k by validation ARI. No
    gene is seen."""
    train = target.split.train
    models = [
        KNeighborsClassifier(k, weights="distance").fit(xy[train], target.labels[train])
        for k in (1, 3, 5, 7, 9, 12, 15, 20, 30)
        if k <= train.sum()
    ]
    return best_on_validation(
        target,
        (to_all_classes(m.predict_proba(xy), m.classes_, target.n_classes) for m in models),
    )


def coords_rbf(target, xy, pitch):
    """RBF-kernel ridge on one-hot labels over positions xy (N, 2); bandwidth, in units of `pitch`,
    and ridge by validation ARI. No gene is seen.

    The kernel is cut at 4 bandwidths, so it is a sparse matrix and the solve (conjugate gradients)
    stays linear in the number of spots.
    """
    train = target.split.train
    onehot = np.eye(target.n_classes)[target.labels[train]]  # (n, C)
    seen, pieces = cKDTree(xy[train]), np.array_split(xy, len(xy) // 50_000 + 1)

    def predict(bandwidth, ridge):
        def kernel(a, b):
            d = a.sparse_distance_matrix(b, 4 * bandwidth, output_type="coo_matrix").tocsr()
            d.data = np.exp(-0.5 * (d.data / bandwidth) ** 2)
            return d

        square = kernel(seen, seen) + ridge * sp.identity(len(onehot))
        # (n, C)
        weights = np.stack([cg(square, y, rtol=1e-6, maxiter=300)[0] for y in onehot.T], 1)
        # (N, C)
        score = np.concatenate([kernel(cKDTree(piece), seen) @ weights for piece in pieces])
        score = np.clip(score, 1e-6, None)
        return score / score.sum(1, keepdims=True)

    return best_on_validation(
        target, (predict(b * pitch, ridge) for b in (2.0, 3.0) for ridge in (0.1, 0.3))
    )


def logistic(target, x):
    """Multinomial logistic regression on x (N, D), fitted on training rows; inverse regularisation
    by validation ARI."""
    train = target.split.train
    x = (x - x[train].mean(0)) / (x[train].std(0) + 1e-9)

    def predict(c):
        with warnings.catch_warnings():
            # 300 steps are enough for a baseline; the score says so itself
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = LogisticRegression(C=c, max_iter=300).fit(x[train], target.labels[train])
        return to_all_classes(model.predict_proba(x), model.classes_, target.n_classes)

    return best_on_validation(target, (predict(c) for c in (0.003, 0.03, 0.3)))


def smoothed_lr(target, x, table):
    """Logistic regression on x (N, D) averaged over a spot and its neighbours, table (N, k)."""
    return logistic(target, data.neighbour_mean(x, table))


def principal_components(x, train, at_once=0):
    """(N, 50) principal components of x (N, D), fitted on the rows of the mask `train`, for the
    linear baselines.

    at_once: rows to take at a time from an x that makes them on request; then at most MOST_FOR_PCA
    evenly spaced training rows are fitted on. 0: all at once.
    """
    rows = np.flatnonzero(train)
    fit = rows[:: len(rows) // MOST_FOR_PCA + 1] if at_once else rows
    pca = PCA(min(50, len(fit) - 1, x.shape[1]), svd_solver="randomized", random_state=0)
    pca.fit(x[fit])
    step = at_once or len(train)
    return np.concatenate([pca.transform(x[i : i + step]) for i in range(0, len(train), step)])


def best_on_validation(target, candidates):
    """The candidate (N, C) with the best ARI on the validation spots; the first on ties or where
    there is no validation spot."""
    val = target.split.val
    candidates = list(candidates)
    if not val.any():
        return candidates[0]
    return max(
        candidates, key=lambda p: metrics.clustering(target.labels[val], p[val].argmax(1))["ari"]
    )


def to_all_classes(prob, classes, n_classes):
    """Columns of the classes that a model saw -> columns of all classes: (N, len(classes)) -> (N,
    C)."""
    out = np.zeros((len(prob), n_classes))
    out[:, classes] = prob
    return out


# --------------------------------------------------------------------------------------------------
# Domains: unsupervised. Each returns domains (N,) for all spots
# --------------------------------------------------------------------------------------------------


def pca_gmm(components, k, n_init=10, seed=0):
    """The tied mixture on 20 principal components. components (N, P), most important first."""
    return gmm_tied(components[:, :20], k, n_init, seed)[0]


def neighbour_mean_gmm(components, xy, k, n_init=10, seed=0, n_near=6):
    """The tied mixture on the mean of 20 principal components over a spot and its `n_near` nearest,
    with one vote of the 18 nearest. Needs more than 18 spots, and than n_near."""
    mean = data.neighbour_mean(components[:, :20], data.knn_table(xy, n_near))
    return majority_vote(gmm_tied(mean, k, n_init, seed)[0], data.knn_table(xy, 18))


def unsupervised_domains(components, xy, k, n_init=10, seed=0, n_near=6):
    """{name: domains (N,)} of every baseline that so many spots allow. n_near: neighbours that the
    method averages over; where these are not 6, a neighbour mean of as many stands beside."""
    out = {"pca_gmm": pca_gmm(components, k, n_init, seed)}
    if len(xy) > 18:
        out["neighbour_mean_gmm"] = neighbour_mean_gmm(components, xy, k, n_init, seed)
        if n_near != 6:
            mean = neighbour_mean_gmm(components, xy, k, n_init, seed, n_near)
            out["neighbour_mean_same_k_gmm"] = mean
    return out
