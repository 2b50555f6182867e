"""In-silico perturbation: what a classifier of spots says when genes are set to zero or to their
mean, each gene against all others and sets of genes against random sets.

`predict` is a callable, inputs x (N, G) float32 -> class probabilities (N, C).
"""

from dataclasses import dataclass

import numpy as np


@dataclass
class Change:
    """Effect of sets of genes on the spots of each class that was predicted before.

    flips (S, C): share of the spots of a class whose class changes, for each of S sets; drop (S,
    C): mean loss of log-probability of the class predicted before, in nats, positive where the set
    speaks for the class; spots (S, N) bool: those whose class changes.
    """

    flips: np.ndarray
    drop: np.ndarray
    spots: np.ndarray


def perturb(predict, x, sets, value):
    """The `Change` of setting the columns of each of `sets` [(g,) int] of x (N, G) to value (G,);
    x is as before afterwards."""
    prob = predict(x)  # (N, C)
    pred, n_classes = prob.argmax(1), prob.shape[1]
    is_class = (pred == np.arange(n_classes)[:, None]).astype(float)  # (C, N)
    n_spots = np.maximum(is_class.sum(1), 1)  # (C,)
    log_before = log_probability(prob, pred)  # (N,)
    flips, drop = np.zeros((len(sets), n_classes)), np.zeros((len(sets), n_classes))
    spots = np.zeros((len(sets), len(x)), bool)
    for i, columns in enumerate(sets):
        original = x[:, columns].copy()
        x[:, columns] = value[columns]
        after = predict(x)
        x[:, columns] = original
        spots[i] = after.argmax(1) != pred
        flips[i] = is_class @ spots[i] / n_spots
        drop[i] = is_class @ (log_before - log_probability(after, pred)) / n_spots
    return Change(flips, drop, spots)


def log_probability(prob, labels):
    """(N,) log of the probability of labels (N,), at least 1e-7, in prob (N, C)."""
    return np.log(np.clip(prob[np.arange(len(prob)), labels], 1e-7, 1))


def against_random(predict, x, columns, value, n_random=20, seed=0):
    """Flips and drop of a set of genes beside random sets of its size.

    columns (g,) of x (N, G), value (G,). Returns {"flips", "drop": of the set over all spots,
    "random_flips", "random_drop": (n_random,), "p": share of random sets, the set itself counted,
    with a drop at least as large}. Raises ValueError where x has too few other genes.
    """
    others = np.setdiff1d(np.arange(x.shape[1]), columns)
    if len(others) < len(columns):
        raise ValueError(f"{len(columns)} of {x.shape[1]} genes leave no random set beside them")
    rng = np.random.default_rng(seed)
    sets = [np.asarray(columns)]
    sets += [rng.choice(others, len(columns), replace=False) for _ in range(n_random)]
    prob = predict(x)
    n_spots = np.bincount(prob.argmax(1), minlength=prob.shape[1])  # (C,)
    change = perturb(predict, x, sets, value)
    drop = change.drop @ n_spots / len(x)  # (S,)
    flips = change.spots.mean(1)  # (S,)
    return {
        "flips": float(flips[0]),
        "drop": float(drop[0]),
        "random_flips": flips[1:],
        "random_drop": drop[1:],
        "p": float((1 + (drop[1:] >= drop[0]).sum()) / len(drop)),
    }
