"""Domains without labels: tied-covariance Gaussian mixture, number of domains, label smoothing,
agreement with an annotation."""

import warnings
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from scipy.optimize import linear_sum_assignment
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_limits

import data
import metrics
from data import DataError


def components(h, most=30):
    """(N, d) -> (N, min(most, numerical rank)) principal components. Components beyond the rank are
    round-off, and a tied covariance would weigh them like any other."""
    h = np.asarray(h, np.float64)
    u, s, _ = np.linalg.svd(h - h.mean(0), full_matrices=False)
    rank = int((s**2 > 1e-6 * s[0] ** 2).sum()) if s[0] > 0 else 0
    return u[:, : min(most, rank)] * s[: min(most, rank)]


def gmm_tied(h, k, n_init=10, seed=0):
    """Domains by a Gaussian mixture with one covariance for all (mclust's EEE), EM from `n_init`
    k-means starts, the likeliest taken.

    h (N, d) -> labels (N,), the fitted mixture. mclust starts from model-based hierarchical
    clustering instead. Raises DataError where k exceeds the number of spots or nothing varies.
    """
    if k > len(h):
        raise DataError(
            f"{k} domains cannot be found among {len(h)} spots: choose a smaller --n_domains"
        )
    # few spots cannot carry a 30 x 30 covariance
    x = components(h, max(1, min(30, (len(h) - k) // 3)))
    if x.shape[1] == 0:
        raise DataError("the embedding is the same for every spot: check that the counts vary")
    return fit_mixture(x, k, n_init, seed)


def fit_mixture(x, k, n_init, seed):
    """The tied mixture on components x (N, d) as they are: labels (N,), the fitted mixture."""
    ridge = 1e-6 * x.var(0).mean()
    mixture = GaussianMixture(
        k, covariance_type="tied", n_init=n_init, random_state=seed, reg_covar=ridge, max_iter=300
    )
    # threads only wait for each other on 30 columns
    with warnings.catch_warnings(), threadpool_limits(1):
        # fewer distinct rows than domains, or 300 steps
        warnings.simplefilter("ignore", ConvergenceWarning)
        return mixture.fit_predict(x), mixture


class Candidate(NamedTuple):
    """One start of the mixture on one latent: the domains (N,) as it gives them and after label
    diffusion, and the share of spots whose neighbours are elsewhere (PAS) before diffusion."""

    model: int
    start: int
    raw: np.ndarray
    smooth: np.ndarray
    pas: float


def candidates_of(latents, xy, k, n_starts, seed, diffuse):
    """`Candidate`s: `n_starts` single starts of the mixture of k domains on each of the latents
    [(N, d)]. diffuse: function of labels (N,) -> labels (N,)."""
    found = []
    for model, latent in enumerate(latents):
        x = components(latent, max(1, min(30, (len(latent) - k) // 3)))
        for start in range(n_starts):
            raw, _ = fit_mixture(x, k, 1, seed * 1000 + model * n_starts + start)
            found.append(Candidate(model, start, raw, diffuse(raw), metrics.pas(raw, xy)))
    return found


def agreements(candidates):
    """(n, n) adjusted Rand index between the smoothed domains of every two candidates."""
    n = len(candidates)
    out = np.eye(n)
    for i in range(n):
        for j in range(i):
            pair = candidates[i].smooth, candidates[j].smooth
            out[i, j] = out[j, i] = adjusted_rand_score(*pair)
    return out


def coherent_half(candidates):
    """Rows of the half of the candidates that is most coherent in space (least PAS), the one that
    agrees most with the others of the half first; and the agreements (n, n) of all. No label is
    read.

    The least PAS alone often chooses a mixture that has left out a thin domain; the agreement alone
    may be won by a common mistake."""
    agreement = agreements(candidates)
    order = np.argsort([c.pas for c in candidates], kind="stable")
    half = order[: max(2, len(candidates) // 2)]
    mean = agreement[np.ix_(half, half)].mean(1)
    return half[np.argsort(-mean, kind="stable")], agreement


def vote(labels):
    """Domains (N,) that most of several labellings [(N,)] in 0..k-1 give, and the share (N,) of
    them that do; each is renumbered first so that it overlaps most with the first."""
    votes = np.zeros((len(labels[0]), max(found.max() for found in labels) + 1))
    for found in labels:
        votes[np.arange(len(found)), match_classes(found, labels[0])] += 1
    return votes.argmax(1), votes.max(1) / len(labels)


def spread_of(candidates, agreement, chosen, classes):
    """What remains uncertain, {metric: value}: agreement of the chosen candidate with the others
    and of all pairs; where there is an annotation (N,), -1 for none, the ARI of all of them."""
    pairs = agreement[np.triu_indices(len(candidates), 1)]
    others = np.delete(agreement[chosen], chosen)
    out = {"agreement_chosen": others.mean(), "agreement_pairs": pairs.mean()}
    if (classes >= 0).any():
        ari = [metrics.clustering(classes, c.smooth)["ari"] for c in candidates]
        out |= {"ari_candidates_median": np.median(ari)}
        out |= {"ari_candidates_min": min(ari), "ari_candidates_max": max(ari)}
    return {name: float(value) for name, value in out.items()}


def choose_k(h, low=2, high=20, seed=0):
    """Number of domains with the lowest Bayesian information criterion of the tied mixture, and {k:
    bic}; at least 10 spots a domain are asked for.

    Raises DataError with fewer than 10 `low` spots."""
    if len(h) < 10 * low:
        raise DataError(
            f"{len(h)} spots are too few to choose the number of domains: give it with --n_domains"
        )
    high = min(high, len(h) // 10)
    x, bic = components(h, min(30, (len(h) - high) // 3)), {}
    for k in range(low, high + 1):
        bic[k] = fit_mixture(x, k, 1, seed)[1].bic(x)
    return min(bic, key=bic.get), bic


def stable_k(h, n_starts=6, seed=0, low=2, high=15):
    """Number of domains that single starts of the tied mixture on h (N, d) agree on most, and {k:
    mean adjusted Rand index of every two starts}.

    Two or three coarse domains are stable almost always. So k is the largest whose agreement is
    above that of its two neighbours and within .1 of the best; where there is none, the best."""
    x, curve = components(h, min(30, (len(h) - high) // 3)), {}
    for k in range(low, high + 1):
        found = [fit_mixture(x, k, 1, seed * 1000 + start)[0] for start in range(max(n_starts, 2))]
        pairs = [
            adjusted_rand_score(found[i], found[j]) for i in range(len(found)) for j in range(i)
        ]
        curve[k] = float(np.mean(pairs))
    best = max(curve.values())
    peaks = [
        k
        for k in range(low + 1, high)
        if curve[k] > max(curve[k - 1], curve[k + 1]) and curve[k] >= best - 0.1
    ]
    return (max(peaks) if peaks else max(curve, key=curve.get)), curve


def number_of_domains(choice, slide, embedding=None, seed=0):
    """Number of domains and how it was chosen. choice: `oracle` (as many as the labels have), `bic`
    (on the embedding (N, d)) or a number.

    Raises DataError for oracle without labels of two classes, or more domains than spots."""
    if choice == "bic":
        return choose_k(embedding, seed=seed)[0], "bic"
    if choice == "oracle":
        k = len(np.unique(slide.labels[slide.labels >= 0]))
        if k < 2:
            lack = "no labels" if k == 0 else "labels of one class only"
            raise DataError(
                f"slide {slide.sample} has {lack}, so the number of domains cannot be taken from "
                "them: give --n_domains bic or a number"
            )
    else:
        k = int(choice)
    if k > slide.n_spots:
        raise DataError(
            f"{k} domains cannot be found among the {slide.n_spots} spots of slide "
            f"{slide.sample}: choose a smaller --n_domains"
        )
    return k, "oracle" if choice == "oracle" else "user"


def diffuse_labels(labels, xy, steps=3, k=7, self_weight=1.0, share=0.01):
    """Label diffusion: Y <- W Y, anchors kept, rows normalised, `steps` times; label = argmax.
    labels (N,) int, xy (N, 2) -> (N,).

    W: exp(-d^2 / sigma^2) over the k nearest spots, sigma = median neighbour distance, plus the
    spot itself. Anchors: per domain the ceil(1 %) spots whose neighbours agree most, by rank (by
    threshold, as released, ties make 12 % of them). Without self weight even the true labels are
    eroded (ARI .85 after 10 steps on 151673).
    """
    if steps == 0 or len(labels) <= k:
        return labels.copy()
    near = data.knn_table(xy, k)
    # (N, k)
    d = data.distances(xy, near)
    w = np.exp(-((d / max(np.median(d), 1e-9)) ** 2))
    names, code = np.unique(labels, return_inverse=True)
    # (N,)
    agree = (w * (code[near] == code[:, None])).sum(1)
    anchors = np.concatenate(
        [
            rows[np.argsort(-agree[rows], kind="stable")[: int(np.ceil(share * len(rows)))]]
            for rows in (np.flatnonzero(code == c) for c in range(len(names)))
        ]
    )
    walk = data.table_to_csr(near, w)
    walk = walk + sp.identity(len(labels), format="csr") * self_weight
    walk = sp.diags(1 / np.asarray(walk.sum(1)).ravel()) @ walk
    # (N, K)
    y = np.eye(len(names))[code]
    anchored = y[anchors]
    for _ in range(steps):
        y = walk @ y
        y[anchors] = anchored
        y /= y.sum(1, keepdims=True)
    return names[y.argmax(1)]


def majority_vote(labels, near):
    """The commonest label among a spot and its neighbours `near` (N, k): one smoothing round of the
    baseline."""
    names, code = np.unique(labels, return_inverse=True)
    one_hot = np.eye(len(names))[code]
    return names[(one_hot + one_hot[near].sum(1)).argmax(1)]


def match_classes(labels, classes):
    """Domains (N,) renumbered so that they share numbers with the classes (N,), -1 for none, that
    they overlap most (one to one, Hungarian)."""
    names, code = np.unique(labels, return_inverse=True)
    n = max(len(names), classes.max() + 1)
    overlap = np.zeros((n, n))
    np.add.at(overlap, (code[classes >= 0], classes[classes >= 0]), 1)
    return linear_sum_assignment(-overlap)[1][code]


def domain_scores(slide, domains):
    """Agreement with the annotation where there is one, and the label-free smoothness of the
    domains (N,): {metric: value}."""
    scores = metrics.clustering(slide.labels, domains) if (slide.labels >= 0).any() else {}
    n_found = len(np.unique(domains))
    return scores | {"pas": metrics.pas(domains, slide.xy), "n_found": n_found}


def linear_r2(z, h):
    """Share of the variance of h (N, d) that a linear map of z (N, e) explains: 1 where h is
    nothing but z, mapped."""
    z, h = np.asarray(z, np.float64), np.asarray(h, np.float64)
    z, h = z - z.mean(0), h - h.mean(0)
    rest = h - z @ np.linalg.lstsq(z, h)[0]
    return float(1 - (rest**2).sum() / max((h**2).sum(), 1e-300))


def score_row(name, scores):
    """One printed row of domain scores."""
    shown = ("ari", "ami", "completeness", "homogeneity", "pas")
    return f"{name:24s}" + "  ".join(f"{k} {scores[k]:.3f}" for k in shown if k in scores)


def domains_of(embeddings, slide, k, final, n_init=10, seed=0, diffuse=diffuse_labels, fitted=None):
    """Mixture and label diffusion on every embedding {name: (N, d)}; prints a row of scores each.

    diffuse: function of labels and positions; fitted {name: (labels, those after diffusion,
    confidence)} of what is known. Returns {labels_<name>_raw, labels_<name>: (N,)} and
    {<metric>_<name>_raw, <metric>_<name>: value}; the scores of `final` + diffusion stand there
    without a suffix, too, and `confidence` (N,): the probability that its mixture gives the domain
    of a spot before diffusion.
    """
    arrays, scores, fitted = {}, {}, fitted or {}
    for name, embedding in embeddings.items():
        # an image that is the same everywhere has no domains
        if not np.ptp(embedding, axis=0).any() and name != final:
            continue
        if name in fitted:
            raw, smooth, confidence = fitted[name]
        else:
            raw, mixture = gmm_tied(embedding, k, n_init, seed)
            smooth = diffuse(raw, slide.xy)
            # the columns that the mixture was fitted on
            x = components(embedding, mixture.n_features_in_)
            confidence = mixture.predict_proba(x).max(axis=1)
        raw_scores, smooth_scores = domain_scores(slide, raw), domain_scores(slide, smooth)
        print(score_row(name, raw_scores))
        print(score_row(f"{name} + diffusion", smooth_scores))
        arrays |= {f"labels_{name}_raw": raw, f"labels_{name}": smooth}
        scores |= {f"{metric}_{name}_raw": value for metric, value in raw_scores.items()}
        scores |= {f"{metric}_{name}": value for metric, value in smooth_scores.items()}
        if name == final:
            scores |= smooth_scores
            arrays["confidence"] = confidence
    return arrays, scores
