"""Every predictor that a method has to beat, written once."""

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

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


def neighbour_baselines(x, near, y, tests, tests_near):
    """The benchmark's ridge on the mean features of the neighbourhood, and on the spot's own beside
    them: what a network that reads neighbours has to beat. x, near (N, F)."""
    both = np.concatenate([x, near], 1)
    tests_both = [np.concatenate(pair, 1) for pair in zip(tests, tests_near)]
    return {
        "ridge_neighbour": predict_genes(official_ridge, near, y, tests_near),
        "ridge_own_and_neighbour": predict_genes(official_ridge, both, y, tests_both),
    }


def neighbour_mean(x, table, is_neighbour):
    """Mean of x (S, F) over the rows of a table (S, K), where is_neighbour (S, K); torch. In
    pieces: (S, K, F) of a large slide would not fit."""
    weight = is_neighbour.float()[..., None]  # (S, K, 1)
    pieces = zip(table.split(4096), weight.split(4096))
    return torch.cat([(x[rows] * w).sum(1) / w.sum(1) for rows, w in pieces])
