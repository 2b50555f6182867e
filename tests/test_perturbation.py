"""In-silico perturbation on a linear classifier, whose answers are known."""

import numpy as np
import pytest

from evaluation.perturbation import against_random, perturb

RNG = np.random.default_rng(0)


def classifier(weight):
    """x (N, G) -> softmax of x @ weight (G, C)."""

    def predict(x):
        logits = x @ weight
        logits = np.exp(logits - logits.max(1, keepdims=True))
        return logits / logits.sum(1, keepdims=True)

    return predict


@pytest.fixture
def one_gene():
    """Gene 3 alone decides between two classes; (predict, x, value)."""
    weight = np.zeros((8, 2))
    weight[3] = (4.0, -4.0)
    return classifier(weight), RNG.normal(size=(200, 8)).astype(np.float32), np.full(8, -9.0)


def test_only_the_gene_that_decides_changes_a_class(one_gene):
    predict, x, value = one_gene
    before = x.copy()
    change = perturb(predict, x, [np.array([g]) for g in range(8)], value)
    assert np.array_equal(x, before)
    is_first = predict(x).argmax(1) == 0
    # set to -9 all spots are of the second class
    assert change.flips[3].tolist() == [1.0, 0.0]
    assert np.array_equal(change.spots[3], is_first)
    assert not change.spots[[0, 1, 2, 4, 5, 6, 7]].any()
    assert change.drop[3, 0] > 1 and change.drop[3, 1] <= 0
    assert np.allclose(np.delete(change.drop, 3, 0), 0)


def test_the_drop_is_the_mean_loss_of_log_probability(one_gene):
    predict, x, value = one_gene
    change = perturb(predict, x, [np.array([3, 5])], value)
    prob, moved = predict(x), x.copy()
    moved[:, [3, 5]] = -9
    after, pred = predict(moved), prob.argmax(1)
    for c in (0, 1):
        rows = np.flatnonzero(pred == c)
        want = np.mean(np.log(prob[rows, c]) - np.log(np.clip(after[rows, c], 1e-7, 1)))
        assert change.drop[0, c] == pytest.approx(want)


def test_a_set_that_matters_beats_random_sets_and_one_that_does_not_does_not(one_gene):
    predict, x, value = one_gene
    found = against_random(predict, x, [3], value, n_random=19)
    assert found["p"] == pytest.approx(1 / 20) and found["flips"] > 0.3
    assert found["random_drop"].max() == pytest.approx(0)
    idle = against_random(predict, x, [0], np.zeros(8), n_random=19)
    assert idle["p"] > 0.5 and idle["flips"] == 0
    with pytest.raises(ValueError, match="no random set"):
        against_random(predict, x, np.arange(7), value)
