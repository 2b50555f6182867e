"""metrics.py against naive loops, scikit-learn / scipy, values worked out by hand, and the real
DLPFC labels."""

import csv
import warnings

import numpy as np
import pytest
from scipy import linalg, stats
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import dijkstra
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist
from sklearn import metrics as sk

import data
import metrics

HEX = [(0, -2), (0, 2), (-1, -1), (-1, 1), (1, -1), (1, 1)]
SQUARE = [(0, -1), (0, 1), (-1, 0), (1, 0)]


@pytest.fixture(autouse=True)
def no_warnings():
    """Undefined scores are handled on purpose, so no metric may lean on a warning from below."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        # scikit-learn's UndefinedMetricWarning among them
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def ring(grid, offsets):
    """(N, k) row numbers of the lattice neighbours, -1 = none."""
    where = {tuple(map(int, rc)): i for i, rc in enumerate(grid)}
    return np.array(
        [[where.get((int(r) + dr, int(c) + dc), -1) for dr, dc in offsets] for r, c in grid]
    )


def square_lattice(height, width):
    grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1).reshape(
        -1, 2
    )
    return grid, ring(grid, SQUARE)


def hex_lattice(height, width):
    grid = np.array([(r, 2 * c + r % 2) for r in range(height) for c in range(width)])
    return grid, ring(grid, HEX)


def rotate(xy, degrees):
    a = np.deg2rad(degrees)
    return xy @ np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])


def one_hot(labels, n_classes):
    return np.eye(n_classes)[np.asarray(labels)]


# --------------------------------------------------------------------------------------- clustering
def naive_ari(true, pred):
    """Pair counting over all N (N - 1) / 2 pairs (Hubert & Arabie)."""
    both = only_true = only_pred = pairs = 0
    for i in range(len(true)):
        for j in range(i):
            t, p = true[i] == true[j], pred[i] == pred[j]
            both, only_true, only_pred, pairs = (
                both + (t and p),
                only_true + t,
                only_pred + p,
                pairs + 1,
            )
    expected = only_true * only_pred / pairs
    return (both - expected) / ((only_true + only_pred) / 2 - expected)


def naive_nmi(true, pred):
    joint = np.array(
        [[np.mean((true == t) & (pred == p)) for p in np.unique(pred)] for t in np.unique(true)]
    )
    p_true, p_pred = joint.sum(1), joint.sum(0)
    information = sum(
        joint[i, j] * np.log(joint[i, j] / p_true[i] / p_pred[j])
        for i, j in zip(*np.nonzero(joint))
    )
    h_true, h_pred = -(p_true * np.log(p_true)).sum(), -(p_pred * np.log(p_pred)).sum()
    return information / ((h_true + h_pred) / 2), information / h_true, information / h_pred


def test_clustering_agrees_with_pair_counting_and_entropies(rng):
    true, pred = rng.integers(0, 4, 120), rng.integers(0, 5, 120)
    pred[:60] = true[:60]
    score = metrics.clustering(true, pred)
    assert score["ari"] == pytest.approx(naive_ari(true, pred))
    nmi, homogeneity, completeness = naive_nmi(true, pred)
    assert (score["nmi"], score["homogeneity"], score["completeness"]) == pytest.approx(
        (nmi, homogeneity, completeness)
    )
    assert score["ami"] == pytest.approx(
        sk.adjusted_mutual_info_score(true, pred, average_method="arithmetic")
    )
    assert set(score) == {"ari", "nmi", "ami", "completeness", "homogeneity"} and all(
        type(v) is float for v in score.values()
    )


def test_clustering_leaves_unlabelled_rows_out_and_does_not_read_cluster_names(rng):
    true, pred = rng.integers(0, 3, 90), rng.integers(0, 3, 90)
    base = metrics.clustering(true, pred)
    assert metrics.clustering(
        np.append(true, [-1] * 40), np.append(pred, rng.integers(0, 3, 40))
    ) == pytest.approx(base)
    assert metrics.clustering(
        np.array([2, 0, 1])[true], np.array(["b", "c", "a"])[pred]
    ) == pytest.approx(base)
    assert metrics.clustering(true, true + 7) == pytest.approx(dict.fromkeys(base, 1.0))


def test_one_cluster_is_complete_but_worthless():
    score = metrics.clustering([0, 0, 1, 1], [5, 5, 5, 5])
    assert (
        score["completeness"] == 1
        and score["homogeneity"] == 0
        and score["ari"] == 0
        and score["ami"] == 0
    )


def test_clustering_refuses_bad_input():
    with pytest.raises(ValueError, match="row counts differ"):
        metrics.clustering([0, 1], [0, 1, 1])
    with pytest.raises(ValueError, match="no labelled rows"):
        metrics.clustering([-1, -1], [0, 1])
    with pytest.raises(ValueError, match="one per row"):
        metrics.clustering([[0, 1]], [[0, 1]])


# ----------------------------------------------------------------------------------- classification
def naive_kappa(true, pred, n_classes):
    weight = np.array([[(i - j) ** 2 for j in range(n_classes)] for i in range(n_classes)])
    observed = np.zeros((n_classes, n_classes))
    for t, p in zip(true, pred):
        observed[t, p] += 1
    expected = np.outer(observed.sum(1), observed.sum(0)) / len(true)
    return 1 - (weight * observed).sum() / (weight * expected).sum()


def naive_ece(true, prob, bins=15):
    confidence, correct, ece = prob.max(1), prob.argmax(1) == true, 0
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if inside.any():
            ece += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return ece


def test_classification_agrees_with_sklearn_and_loops(rng):
    true = rng.integers(0, 5, 400)
    prob = rng.dirichlet(np.ones(5), 400) + 0.4 * one_hot(true, 5)
    prob /= prob.sum(1, keepdims=True)
    score, pred = metrics.classification(true, prob, range(5)), prob.argmax(1)
    assert score["accuracy"] == sk.accuracy_score(true, pred)
    assert score["macro_f1"] == pytest.approx(sk.f1_score(true, pred, average="macro"))
    assert score["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(true, pred))
    assert score["kappa_quadratic"] == pytest.approx(naive_kappa(true, pred, 5))
    assert score["top2"] == pytest.approx(sk.top_k_accuracy_score(true, prob, k=2, labels=range(5)))
    assert score["log_loss"] == pytest.approx(sk.log_loss(true, prob, labels=range(5)))
    assert score["ece"] == pytest.approx(naive_ece(true, prob))
    assert {name: score[name] for name in ("ari", "nmi", "ami")} == {
        name: metrics.clustering(true, pred)[name] for name in ("ari", "nmi", "ami")
    }
    assert all(type(v) is float for v in score.values())
    # an unlabelled row is not even read
    more = np.append(true, -1), np.vstack([prob, np.full(5, np.nan)])
    padded = metrics.classification(*more, range(5))
    assert padded == pytest.approx(score)


def test_classification_by_hand():
    prob = np.array([[0.7, 0.2, 0.1], [0.1, 0.5, 0.4], [0.3, 0.3, 0.4], [0.6, 0.3, 0.1]])
    score = metrics.classification([0, 2, 2, 1], prob, range(3))  # arg-max 0, 1, 2, 0
    assert score["accuracy"] == 0.5 and score["top2"] == 1
    assert score["macro_f1"] == pytest.approx((2 / 3 + 0 + 2 / 3) / 3)
    assert score["balanced_accuracy"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert score["log_loss"] == pytest.approx(-np.log([0.7, 0.4, 0.4, 0.3]).mean())
    # four spots in four different bins
    assert score["ece"] == pytest.approx((0.3 + 0.5 + 0.6 + 0.6) / 4)
    # observed (i-j)^2: 0 1 0 1; over all 16 pairs: 26
    assert score["kappa_quadratic"] == pytest.approx(1 - (2 / 4) / (26 / 16))
    assert metrics.classification([1, 2], prob[:2])["log_loss"] == pytest.approx(
        -np.log([0.2, 0.4]).mean()
    )


def test_kappa_follows_the_order_of_the_layers():
    true = np.array([0, 1, 2, 3] * 5)
    near, far = true.copy(), true.copy()
    near[0], far[0] = 1, 3  # the same number of errors, one layer off or three
    kappa = [
        metrics.classification(true, one_hot(p, 4), ["Layer1", "Layer2", "L3", "WM"])
        for p in (true, near, far)
    ]
    kappa = [scores["kappa_quadratic"] for scores in kappa]
    assert kappa[0] == 1 and kappa[0] > kappa[1] > kappa[2]


def test_kappa_needs_an_order_of_the_classes(rng):
    true = rng.integers(0, 4, 200)
    pred = np.where(rng.random(200) < 0.7, true, rng.integers(0, 4, 200))

    def kappa(classes):
        return metrics.classification(true, one_hot(pred, 4), classes)["kappa_quadratic"]

    assert kappa(["1", "2", "9", "10"]) == pytest.approx(naive_kappa(true, pred, 4))
    # columns sorted as text: the numbers decide
    rank = np.array([0, 3, 1, 2])
    by_value = naive_kappa(rank[true], rank[pred], 4)
    assert (
        kappa(["1", "10", "2", "9"]) == kappa(["0", "2.5", "1", "1.5"]) == pytest.approx(by_value)
    )
    # layers, white matter deepest wherever its column stands
    rank = np.array([3, 0, 1, 2])
    by_depth = naive_kappa(rank[true], rank[pred], 4)
    assert kappa(["WM", "Layer1", "Layer2", "Layer6"]) == pytest.approx(by_depth)
    for classes in (None, ["tumour", "stroma", "fat", "1"], ["1", "1.0", "2", "3"]):
        assert np.isnan(kappa(classes))
    with pytest.raises(ValueError, match="4 columns, but 3 classes"):
        kappa(["1", "2", "3"])


def test_certain_and_wrong_costs_the_clipped_log_loss():
    assert metrics.classification([0, 1], one_hot([1, 1], 2))["log_loss"] == pytest.approx(
        -(np.log(1e-7) + np.log(1 - 1e-7)) / 2
    )


def test_macro_f1_counts_predicted_classes_and_balanced_accuracy_those_of_the_truth():
    # a class the tissue lacks is predicted once
    true, pred = np.array([1, 1, 1, 2, 2, 2]), np.array([1, 1, 0, 2, 2, 2])
    score = metrics.classification(true, one_hot(pred, 4))
    assert score["macro_f1"] == pytest.approx((0 + 0.8 + 1) / 3)
    assert score["macro_f1"] == sk.f1_score(true, pred, average="macro")
    assert score["balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)


def test_one_class_only():
    alone = metrics.classification([1, 1, 1], one_hot([1, 1, 1], 3), range(3))
    assert alone["accuracy"] == alone["macro_f1"] == alone["balanced_accuracy"] == alone[
        "ari"
    ] == 1 and np.isnan(alone["kappa_quadratic"])
    mixed = metrics.classification([1, 1, 1], one_hot([1, 1, 0], 3), range(3))
    assert mixed["kappa_quadratic"] == 0 and mixed["balanced_accuracy"] == pytest.approx(2 / 3)
    assert metrics.classification([0, 0], np.ones((2, 1)))["top2"] == 1


def test_top2_breaks_ties_as_argmax_does():
    assert metrics.classification([0, 1, 1, 3], np.full((4, 4), 0.25))["top2"] == 0.75


@pytest.mark.parametrize(
    "true, prob, message",
    [
        ([0, 1], [[0.5, 0.6], [0.5, 0.5]], "summing to 1"),
        ([0, 1], [[1.2, -0.2], [0.5, 0.5]], "not negative"),
        ([0, 1], [[2.0, 1.0], [-1.0, 3.0]], "summing to 1"),
        ([0, 1], [[np.nan, 1], [0.5, 0.5]], "finite"),
        ([0, 2], [[0.5, 0.5], [0.5, 0.5]], "0..1"),
        ([0, -2], [[0.5, 0.5], [0.5, 0.5]], "or be -1"),
        ([0, 1], [0.5, 0.5], "prob must be"),
        ([0, 1, 1], [[0.5, 0.5], [0.5, 0.5]], "row counts differ"),
        ([-1, -1], [[0.5, 0.5], [0.5, 0.5]], "no labelled rows"),
    ],
)
def test_classification_refuses_what_is_no_probability(true, prob, message):
    with pytest.raises(ValueError, match=message):
        metrics.classification(np.array(true), np.array(prob))


def test_half_precision_softmax_is_accepted(rng):
    prob = rng.dirichlet(np.ones(7), 50)
    full, half = (
        metrics.classification(rng.integers(0, 7, 50) * 0 + 3, prob.astype(t))
        for t in (np.float32, np.float16)
    )
    assert half["log_loss"] == pytest.approx(full["log_loss"], rel=1e-2)


def test_calibrated_model_has_no_calibration_error(rng):
    prob = rng.dirichlet(np.ones(4), 200_000)
    # truth drawn from the model's own probabilities
    true = (prob.cumsum(1) < rng.random((len(prob), 1))).sum(1).clip(0, 3)
    assert metrics.classification(true, prob)["ece"] < 0.006


def test_overconfident_model_has_the_known_calibration_error(rng):
    true = np.zeros(1000, int)
    prob = (
        one_hot(np.where(np.arange(1000) < 700, 0, 1), 2) * 0.9 + 0.05
    )  # says .95, is right in .7
    assert metrics.classification(true, prob)["ece"] == pytest.approx(0.25)
    assert metrics.classification(true, prob * 0.5 + 0.25)["ece"] == pytest.approx(
        0.025
    )  # says .725
    assert metrics.expected_calibration_error([1, 0], [1.0, 0.0]) == 0
    # an edge belongs to the bin below
    assert metrics.expected_calibration_error([1, 0, 1], [0.5, 0.3, 0.9], bins=2) == pytest.approx(
        (0.2 + 0.1) / 3
    )


def test_calibration_bins_do_not_cancel():
    """One bin over- and one under-confident by .2: the error is .2, not 0, and falls to 0 with a
    single bin."""
    correct, confidence = np.repeat([1, 1, 0, 1, 0], [6, 2, 2, 4, 6]), np.repeat([0.6, 0.6], 10)
    confidence[10:] = 0.6
    assert metrics.expected_calibration_error(correct, confidence) == pytest.approx(0)
    confidence[:10], confidence[10:] = 0.62, 0.58  # right in .8 and in .4: gaps +.18 and -.18
    assert metrics.expected_calibration_error(correct, confidence) == pytest.approx(0.18)
    assert metrics.expected_calibration_error(correct, confidence, bins=1) == pytest.approx(0)


# ----------------------------------------------------------------------------------------- boundary
def reference_distance(labels, neighbours):
    """Loop for the boundary set, scipy's Dijkstra on the labelled graph for the distances."""
    n, edges, boundary = len(labels), [], []
    for i in range(n):
        beside = [j for j in neighbours[i] if j >= 0 and labels[j] >= 0] if labels[i] >= 0 else []
        edges += [(i, j) for j in beside]
        if any(labels[j] != labels[i] for j in beside):
            boundary.append(i)
    expected = np.full(n, n)
    if boundary:
        i, j = np.array(edges).T
        steps = dijkstra(
            coo_matrix((np.ones(len(i)), (i, j)), shape=(n, n)).tocsr(),
            indices=boundary,
            unweighted=True,
            min_only=True,
        )
        expected = np.where(np.isfinite(steps), steps, n)
    return np.where(labels < 0, -1, expected)


def test_boundary_distance_on_stripes():
    grid, neighbours = square_lattice(4, 9)
    labels = (grid[:, 1] >= 4).astype(int)
    expected = np.where(grid[:, 1] < 4, 3 - grid[:, 1], grid[:, 1] - 4)
    assert (metrics.boundary_distance(labels, neighbours) == expected).all()


def test_boundary_distance_without_boundary_and_with_gaps():
    neighbours = square_lattice(1, 7)[1]
    assert (metrics.boundary_distance(np.zeros(7, int), neighbours) == 7).all()
    # a gap is no boundary
    assert metrics.boundary_distance(np.array([0, 0, -1, 1, 1, 2, 2]), neighbours).tolist() == [
        7,
        7,
        -1,
        1,
        0,
        0,
        1,
    ]
    assert (metrics.boundary_distance(np.full(7, -1), neighbours) == -1).all()
    # the padding is not the last row
    assert (metrics.boundary_distance(np.arange(3), np.full((3, 6), -1)) == 3).all()
    assert (metrics.boundary_distance(np.arange(3), np.empty((3, 0), int)) == 3).all()


@pytest.mark.parametrize("seed", range(6))
def test_boundary_distance_agrees_with_dijkstra(seed):
    rng = np.random.default_rng(seed)
    grid, neighbours = hex_lattice(14, 15)
    keep = rng.random(len(grid)) < 0.85  # holes in the tissue
    grid = rng.permutation(grid[keep])
    neighbours = ring(grid, HEX)
    labels = (grid[:, 0] + rng.integers(0, 3, len(grid)) // 2 > 6).astype(int) + (grid[:, 1] > 20)
    labels[rng.random(len(grid)) < 0.2] = -1
    distance = metrics.boundary_distance(labels, neighbours)
    assert (distance == reference_distance(labels, neighbours)).all() and distance.max() >= 2


def test_boundary_distance_refuses_bad_neighbours():
    for bad in ([[1], [2]], [[1], [-2]], [1, 0], [[1]]):
        with pytest.raises(ValueError):
            metrics.boundary_distance([0, 1], bad)


def test_boundary_accuracy_by_hand():
    true = np.array([0, 0, 0, 0, 1, 1, 1, -1])
    pred = np.array([0, 0, 0, 1, 1, 0, 1, 1])
    distance = np.array([3, 2, 1, 0, 0, 1, 8, -1])
    assert metrics.boundary_accuracy(true, pred, distance) == pytest.approx(
        {
            "boundary_accuracy": 0.5,
            "interior_accuracy": 0.8,
            "accuracy_distance_0": 0.5,
            "accuracy_distance_1": 0.5,
            "accuracy_distance_2": 1,
            "accuracy_distance_3plus": 1,
            "boundary_share": 2 / 7,
            "share_within_1": 4 / 7,
            # the errors are at 0 and 1
            "errors_within_1": 1,
        }
    )
    held_out = metrics.boundary_accuracy(
        true, pred, distance, mask=np.array([1, 0, 0, 1, 0, 1, 0, 1], bool)
    )
    assert held_out == pytest.approx(
        {
            "boundary_accuracy": 0,
            "interior_accuracy": 0.5,
            "accuracy_distance_0": 0,
            "accuracy_distance_1": 0,
            "accuracy_distance_2": np.nan,
            "accuracy_distance_3plus": 1,
            "boundary_share": 1 / 3,
            "share_within_1": 2 / 3,
            "errors_within_1": 1,
        },
        nan_ok=True,
    )
    # a spot without a distance is not scored
    assert metrics.boundary_accuracy([0, 1], [0, 0], [0, -1])["boundary_share"] == 1
    with pytest.raises(ValueError, match="inside the mask"):
        metrics.boundary_accuracy(true, pred, distance, mask=np.zeros(8, bool))
    with pytest.raises(ValueError, match="row counts differ"):
        metrics.boundary_accuracy(true, pred, distance, mask=np.ones(7, bool))


def read_labels_grid_and_pixels(folder):
    """Layer, (array_row, array_col) and pixel (x, y) of the in-tissue spots, joined by barcode;
    metadata.tsv has one field more than names."""
    with open(folder / "metadata.tsv", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))
    shift = len(rows[1]) - len(rows[0])
    barcode, layer = (rows[0].index(name) + shift for name in ("barcode", "layer_guess_reordered"))
    layers = {row[barcode]: row[layer] for row in rows[1:]}
    with open(folder / "spatial" / "tissue_positions_list.csv", newline="") as file:
        spots = [row for row in csv.reader(file) if row[1] == "1"]
    names = ["Layer1", "Layer2", "Layer3", "Layer4", "Layer5", "Layer6", "WM"]
    labels = np.array(
        [names.index(layers[row[0]]) if layers.get(row[0]) in names else -1 for row in spots]
    )
    return (
        labels,
        np.array([[int(row[2]), int(row[3])] for row in spots]),
        np.array([[float(row[5]), float(row[4])] for row in spots]),
    )


def test_boundary_share_of_the_dlpfc_slices(real_data):
    """First-ring neighbours give 27.6 % on 151673 and 21.3 % on average. The shares reported before
    (28.3 %, 21.7 %, range 13.8-29.2 %) are those of the six nearest labelled spots in pixels, which
    reach across holes and past the tissue edge: reproduced here as well."""
    folders = [
        path.parent
        for root in ("dlpfc", "dlpfc_labels_only")
        for path in sorted((real_data / root).glob("*/metadata.tsv"))
    ]
    lattice, nearest = {}, {}
    for folder in folders:
        labels, grid, xy = read_labels_grid_and_pixels(folder)
        neighbours = ring(grid, HEX)
        distance = metrics.boundary_distance(labels, neighbours)
        assert (distance == reference_distance(labels, neighbours)).all()
        lattice[folder.name] = metrics.boundary_accuracy(labels, labels, distance)["boundary_share"]
        labels, xy = labels[labels >= 0], xy[labels >= 0]
        six = cKDTree(xy).query(xy, 7)[1][:, 1:]
        nearest[folder.name] = metrics.boundary_accuracy(
            labels, labels, metrics.boundary_distance(labels, six)
        )["boundary_share"]
    assert (lattice["151673"], nearest["151673"]) == pytest.approx((0.2761, 0.2833), abs=1e-4)
    assert all(lattice[name] <= nearest[name] for name in lattice)
    if len(lattice) == 12:
        assert (np.mean(list(lattice.values())), np.mean(list(nearest.values()))) == pytest.approx(
            (0.2127, 0.2171), abs=1e-4
        )
        assert (min(nearest.values()), max(nearest.values())) == pytest.approx(
            (0.138, 0.292), abs=6e-4
        )


# ------------------------------------------------------------------------------------ spatial order
def naive_pas(pred, xy, k=10):
    abnormal = 0
    for i in range(len(xy)):
        order = [j for j in np.argsort(((xy - xy[i]) ** 2).sum(1), kind="stable") if j != i][:k]
        abnormal += sum(pred[j] != pred[i] for j in order) > k / 2
    return abnormal / len(xy)


def naive_chaos(pred, xy):
    """As SDMBench: domains of one or two spots add nothing."""
    z, total = (xy - xy.mean(0)) / xy.std(0), 0
    for i in range(len(xy)):
        distances = [
            np.linalg.norm(z[i] - z[j]) for j in range(len(xy)) if j != i and pred[j] == pred[i]
        ]
        total += min(distances) if len(distances) > 1 else 0
    return total / len(xy)


def test_pas_and_chaos_agree_with_loops(rng):
    xy = rng.random((250, 2)) * [300, 80]
    pred = (xy[:, 0] // 60).astype(int)
    pred[rng.random(250) < 0.3] = rng.integers(0, 5)
    pred[7], pred[[8, 9]] = 99, 98  # a domain of one spot and one of two
    assert metrics.pas(pred, xy) == naive_pas(pred, xy) > 0
    assert metrics.pas(pred, xy, k=5) == naive_pas(pred, xy, 5)
    assert metrics.chaos(pred, xy) == pytest.approx(naive_chaos(pred, xy))
    some = np.where(rng.random(250) < 0.2, -1, pred)
    assert metrics.pas(some, xy) == naive_pas(some[some >= 0], xy[some >= 0])
    assert metrics.chaos(some, xy) == pytest.approx(naive_chaos(some[some >= 0], xy[some >= 0]))


def test_pas_and_chaos_of_a_real_slice_are_those_of_sdmbench(real_data, rng):
    """All distances and a sort, as SDMBench computes them."""
    slide = data.load_slide(real_data / "dlpfc", "151673")
    labelled = slide.labels >= 0
    pred, xy = slide.labels[labelled], slide.xy[labelled].astype(float)
    pred = np.where(rng.random(len(pred)) < 0.2, rng.integers(0, 7, len(pred)), pred)
    pred[5], pred[[7, 8]] = 50, 51
    apart = cdist(xy, xy)
    np.fill_diagonal(apart, np.inf)
    near = np.argsort(apart, 1)[:, :10]
    assert metrics.pas(pred, xy) == ((pred[near] != pred[:, None]).sum(1) > 5).mean()
    z = (xy - xy.mean(0)) / xy.std(0)
    apart = cdist(z, z)
    np.fill_diagonal(apart, np.inf)
    domains = [pred == name for name in range(7)]
    total = sum(apart[np.ix_(domain, domain)].min(1).sum() for domain in domains)
    assert metrics.chaos(pred, xy) == pytest.approx(total / len(pred))


def test_pas_needs_six_of_ten():
    angle = np.arange(10) * np.pi / 5
    xy = np.vstack(
        [
            [0, 0],
            np.stack([np.cos(angle), np.sin(angle)], 1),
            100 + np.arange(40).reshape(20, 2) / 100,
        ]
    )
    for different, abnormal in ((5, 0), (6, 1)):
        pred = np.zeros(31, int)
        pred[1 : 1 + different] = np.arange(1, 1 + different) % 2 + 1
        centre_is_abnormal = naive_pas(pred, xy) * 31 - sum(
            naive_pas_spot(pred, xy, i) for i in range(1, 31)
        )
        assert round(centre_is_abnormal) == abnormal and metrics.pas(pred, xy) == pytest.approx(
            naive_pas(pred, xy)
        )


def naive_pas_spot(pred, xy, i):
    order = [j for j in np.argsort(((xy - xy[i]) ** 2).sum(1), kind="stable") if j != i][:10]
    return sum(pred[j] != pred[i] for j in order) >= 6


def test_spatial_order_prefers_domains_to_noise_and_ignores_pose(rng):
    xy = rng.random((600, 2)) * 100
    domains, noise = (xy[:, 0] // 25).astype(int), rng.integers(0, 4, 600)
    assert (
        metrics.pas(domains, xy) < 0.05
        and metrics.pas(noise, xy) > 0.9
        and metrics.chaos(domains, xy) < metrics.chaos(noise, xy)
    )
    moved = rotate(xy, 33) * 7 + [5, -900]
    assert metrics.pas(noise, moved) == metrics.pas(noise, xy)
    quarter = rotate(xy, 90) * 7 + [5, -900]
    assert metrics.chaos(noise, quarter) == pytest.approx(metrics.chaos(noise, xy))
    names = np.array([3, 1, 0, 2])
    assert metrics.pas(names[noise], xy) == metrics.pas(noise, xy) and metrics.chaos(
        names[noise], xy
    ) == pytest.approx(metrics.chaos(noise, xy))


def test_spatial_order_at_the_edges(rng):
    same_place = np.zeros((30, 2))
    assert (
        metrics.pas(np.zeros(30, int), same_place) == 0
        and metrics.chaos(np.zeros(30, int), same_place) == 0
    )
    # with more duplicates than neighbours no spot becomes its own neighbour
    assert metrics.pas(np.arange(30), same_place) == 1
    # ten others are needed, and a domain of three
    assert np.isnan(metrics.pas(np.arange(10), rng.random((10, 2))))
    assert metrics.pas(np.arange(11), rng.random((11, 2))) == 1
    assert np.isnan(metrics.chaos([0, 0, 1, 1], rng.random((4, 2))))
    with pytest.raises(ValueError, match="two spots"):
        metrics.pas([0, -1], [[0, 0], [1, 0]])


def naive_moran(x, neighbours):
    z, n, weight, cross = x - x.mean(), len(x), 0.0, 0.0
    for i in range(n):
        beside = [j for j in neighbours[i] if j >= 0]
        for j in beside:
            weight += 1 / len(beside)
            cross += z[i] * z[j] / len(beside)
    return n / weight * cross / (z**2).sum()


def test_moran_agrees_with_the_double_sum(rng):
    grid, _ = hex_lattice(12, 9)
    grid = rng.permutation(grid)[:80]  # irregular edge, some spots alone
    neighbours = ring(grid, HEX)
    neighbours[:3] = -1
    values = np.stack(
        [rng.normal(size=80), grid[:, 0] + rng.normal(size=80), rng.poisson(2, 80)], 1
    )
    assert metrics.moran_i(values, neighbours) == pytest.approx(
        [naive_moran(v, neighbours) for v in values.T]
    )
    assert metrics.moran_i(values[:, 1], neighbours)[0] == pytest.approx(
        naive_moran(values[:, 1], neighbours)
    )
    assert metrics.moran_i(values * 3 - 8, neighbours) == pytest.approx(
        metrics.moran_i(values, neighbours)
    )


def test_moran_of_known_patterns(rng):
    grid, neighbours = square_lattice(40, 40)
    values = np.stack([grid.sum(1) % 2, grid[:, 0], rng.normal(size=1600), np.full(1600, 0.1)], 1)
    checkerboard, gradient, noise, constant = metrics.moran_i(values, neighbours)
    assert (
        checkerboard == pytest.approx(-1)
        and gradient > 0.98
        and abs(noise) < 0.06
        and np.isnan(constant)
    )
    assert np.isnan(metrics.moran_i(values, np.full((1600, 4), -1))).all()
    draws = metrics.moran_i(rng.normal(size=(100, 3000)), square_lattice(10, 10)[1])
    assert draws.mean() == pytest.approx(-1 / 99, abs=0.005)


def test_moran_agrees_with_scanpy(rng):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scanpy_metrics = pytest.importorskip("scanpy.metrics")
    grid, neighbours = hex_lattice(15, 15)
    i, slot = np.nonzero(neighbours >= 0)
    graph = coo_matrix(
        (1 / (neighbours >= 0).sum(1)[i], (i, neighbours[i, slot])), shape=(225, 225)
    ).tocsr()
    values = rng.normal(size=(225, 4)) + grid[:, :1] * [0, 0.1, 0.3, 1]
    assert metrics.moran_i(values, neighbours) == pytest.approx(
        scanpy_metrics.morans_i(graph, values.T.copy()), rel=1e-5
    )


# ---------------------------------------------------------------------------------- gene prediction
def test_pcc_agrees_with_scipy_gene_by_gene(rng):
    true = rng.poisson(3, (60, 600)).astype(np.float32)  # more genes than one chunk
    pred = (true + rng.normal(size=true.shape) * rng.uniform(0.1, 9, 600)).astype(np.float32)
    r = metrics.pcc(true, pred)
    assert r.shape == (600,) and r.dtype == np.float64
    assert r == pytest.approx(
        [stats.pearsonr(true[:, g].astype(float), pred[:, g].astype(float))[0] for g in range(600)],
        abs=1e-9,
    )
    mask = rng.random(true.shape) < 0.7
    hidden = np.where(mask, true, np.nan)  # unmeasured places may hold anything
    expected = [
        stats.pearsonr(true[mask[:, g], g].astype(float), pred[mask[:, g], g].astype(float))[0]
        for g in range(600)
    ]
    assert metrics.pcc(hidden, pred, mask) == pytest.approx(expected, abs=1e-9)


def test_pcc_of_constant_genes_is_nan_and_of_large_offsets_is_not(rng):
    x = rng.normal(size=200)
    true = np.stack([x, x, np.full(200, 0.1), x, x + 1e6], 1)
    pred = np.stack([2 * x + 5, np.full(200, 0.3), x, -x, x], 1)
    assert metrics.pcc(true, pred) == pytest.approx([1, np.nan, np.nan, -1, 1], nan_ok=True)
    # a constant after float32 round-off
    jitter = (np.float32(0.1) + np.float32(1e-8) * rng.integers(-1, 2, 200)).astype(np.float32)
    assert jitter.std() > 0 and np.isnan(metrics.pcc(x[:, None], jitter[:, None])).all()


def test_pcc_refuses_bad_input(rng):
    x = rng.normal(size=(5, 3))
    with pytest.raises(ValueError, match="shape"):
        metrics.pcc(x, x[:, :2])
    with pytest.raises(ValueError, match="shape"):
        metrics.pcc(x, x, np.ones((5, 1), bool))
    with pytest.raises(ValueError, match="pred has a measured value"):
        metrics.pcc(x, np.where(x == x.max(), np.nan, x))
    with pytest.raises(ValueError, match="row counts differ"):
        metrics.pcc_summary(x, x, slide_ids=[0, 1])
    with pytest.raises(ValueError, match="non-empty"):
        metrics.pcc(x[:0], x[:0])


def naive_summary(true, pred, slides, mask):
    means, medians, stds, ratios, counts = [], [], [], [], [0, 0]
    for s in np.unique(slides):
        r, ratio = [], []
        for g in range(true.shape[1]):
            rows = (slides == s) & mask[:, g]
            t, p = true[rows, g], pred[rows, g]
            if t.min() == t.max():
                counts[0] += 1
                continue
            counts[1] += p.min() == p.max()
            r.append(0 if p.min() == p.max() else stats.pearsonr(t, p)[0])
            ratio.append(p.var() / t.var())
        means, medians, stds, ratios = (
            means + [np.mean(r)],
            medians + [np.median(r)],
            stds + [np.std(r)],
            ratios + [np.median(ratio)],
        )
    pooled = []
    for g in range(true.shape[1]):
        t, p = true[mask[:, g], g], pred[mask[:, g], g]
        if t.min() < t.max():
            pooled.append(0 if p.min() == p.max() else stats.pearsonr(t, p)[0])
    return {
        "pcc_mean": np.mean(means),
        "pcc_median": np.mean(medians),
        "pcc_std": np.mean(stds),
        "n_constant_truth": counts[0],
        "n_constant_pred": counts[1],
        "n_unmeasured": 0,
        "pcc_pooled": np.mean(pooled),
        "rmse": np.sqrt(((true - pred)[mask] ** 2).mean()),
        "variance_ratio_median": np.mean(ratios),
    }


def test_pcc_summary_agrees_with_the_loop(rng):
    slides = rng.choice(["A", "B", "C"], 150)
    true, mask = rng.normal(size=(150, 20)), rng.random((150, 20)) < 0.8
    pred = 0.5 * true + rng.normal(size=true.shape) * 0.4
    true[slides == "A", 3], pred[slides == "B", 5], true[:, 7], pred[:, 9] = 0, 2, 1, 1
    assert metrics.pcc_summary(true, pred, slides, mask) == pytest.approx(
        naive_summary(true, pred, slides, mask)
    )
    assert metrics.pcc_summary(true, pred) == pytest.approx(
        naive_summary(true, pred, np.zeros(150), np.ones((150, 20), bool))
    )


def hest_pearson_mean(true, pred):
    """`pearson_mean` of the HEST benchmark: a gene over all spots of the test split together."""
    return np.mean([stats.pearsonr(true[:, g], pred[:, g])[0] for g in range(true.shape[1])])


def test_pcc_pooled_is_that_of_the_hest_benchmark(rng):
    slides = np.repeat(["A", "B"], [60, 90])
    true = np.log1p(rng.poisson(np.where(slides == "A", 1, 6)[:, None] * (0.5 + rng.random(12))))
    pred = true + rng.normal(size=true.shape)
    score = metrics.pcc_summary(true, pred, slides)
    within = [hest_pearson_mean(true[slides == s], pred[slides == s]) for s in "AB"]
    assert score["pcc_pooled"] == pytest.approx(hest_pearson_mean(true, pred))
    assert score["pcc_mean"] == pytest.approx(np.mean(within))
    assert score["pcc_pooled"] > score["pcc_mean"] + 0.1


def test_scored_pcc_leaves_undefined_undefined(rng):
    true, pred = rng.normal(size=(20, 3)), rng.normal(size=(20, 3))
    true[:, 1], pred[:, 2] = 1, 1
    found = metrics.scored_pcc(true, pred)
    assert found[0] == metrics.pcc(true, pred)[0] and np.isnan(found[1]) and found[2] == 0


def test_collapsed_model_scores_zero_and_is_counted(rng):
    true = rng.normal(size=(40, 6))
    score = metrics.pcc_summary(true, np.tile(true.mean(0), (40, 1)))
    assert (
        score["pcc_mean"] == score["pcc_pooled"] == score["variance_ratio_median"] == 0
        and score["n_constant_pred"] == 6
    )
    assert score["rmse"] == pytest.approx(np.sqrt(true.var(0).mean()))
    perfect = metrics.pcc_summary(true, true)
    assert (
        perfect["pcc_mean"] == pytest.approx(1)
        and perfect["rmse"] == 0
        and perfect["variance_ratio_median"] == 1
    )


def test_knowing_only_the_slide_gives_pooled_but_no_within_slide_correlation(rng):
    slides = np.repeat([0, 1], 200)
    true = rng.normal(size=(400, 10)) + 5 * slides[:, None]
    score = metrics.pcc_summary(true, rng.normal(size=true.shape) + 5 * slides[:, None], slides)
    assert abs(score["pcc_mean"]) < 0.1 and score["pcc_pooled"] > 0.8


def test_unmeasured_genes_are_left_out_and_counted(rng):
    true, pred = rng.normal(size=(30, 4)), rng.normal(size=(30, 4))
    slides, mask = np.repeat([0, 1], 15), np.ones((30, 4), bool)
    mask[:15, 2], mask[1:15, 3] = False, False  # gene 2 absent from slide 0, gene 3 seen there once
    score = metrics.pcc_summary(true, pred, slides, mask)
    first, second = metrics.pcc(true[:15, :2], pred[:15, :2]), metrics.pcc(true[15:], pred[15:])
    assert score["pcc_mean"] == pytest.approx((first.mean() + second.mean()) / 2)
    assert score["n_unmeasured"] == 2 and score["n_constant_truth"] == 0
    nothing = metrics.pcc_summary(true, pred, slides, np.zeros_like(mask))
    assert np.isnan(
        [
            nothing[name]
            for name in ("pcc_mean", "pcc_median", "pcc_pooled", "rmse", "variance_ratio_median")
        ]
    ).all()
    constant = metrics.pcc_summary(np.ones((30, 4)), pred, slides)
    assert np.isnan(constant["pcc_mean"]) and constant["n_constant_truth"] == 8


def test_spearman_agrees_with_scipy(rng):
    a, b = rng.poisson(2, 80), rng.poisson(2, 80)  # many ties
    by_ranks = np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1]
    assert metrics.spearman(a, b) == pytest.approx(by_ranks)
    x = rng.normal(size=50)
    assert metrics.spearman(x, np.exp(x)) == pytest.approx(1) and isinstance(
        metrics.spearman(x, x), float
    )
    assert np.isnan(metrics.spearman(x, np.ones(50)))
    with pytest.raises(ValueError, match="finite"):
        metrics.spearman(x, np.where(x > 1, np.nan, x))


def test_gene_gene_agreement_by_hand(rng):
    true = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6))
    same = metrics.gene_gene_agreement(true, 3 * true + 1)
    assert same == pytest.approx(
        {"pearson": 1, "spearman": 1, "frobenius": 0, "slope": 1}, abs=1e-9
    )
    pred = true + rng.normal(size=true.shape)
    a, b = (np.corrcoef(x.T)[np.triu_indices(6, 1)] for x in (true, pred))
    found = metrics.gene_gene_agreement(true, pred)
    assert found["pearson"] == pytest.approx(np.corrcoef(a, b)[0, 1]) and found[
        "spearman"
    ] == pytest.approx(stats.spearmanr(a, b)[0])
    # noise shrinks correlations
    assert found["slope"] == pytest.approx(np.polyfit(a, b, 1)[0]) and found["slope"] < 1
    assert found["frobenius"] == pytest.approx(np.sqrt(((a - b) ** 2).sum() / (a**2).sum()))
    smooth = metrics.gene_gene_agreement(pred, true)
    assert smooth["slope"] > found["slope"]


def test_gene_gene_agreement_leaves_constant_genes_out(rng):
    true = rng.normal(size=(50, 5))
    pred = true.copy()
    pred[:, 2] = 0.1
    assert metrics.gene_gene_agreement(true, pred) == pytest.approx(
        metrics.gene_gene_agreement(*(np.delete(x, 2, 1) for x in (true, pred)))
    )
    assert np.isnan(list(metrics.gene_gene_agreement(true, np.ones_like(true)).values())).all()
    with pytest.raises(ValueError):
        metrics.gene_gene_agreement(true, pred[:, :3])


def test_recall_at_k():
    exact = np.array([[1, 2, 3], [4, 5, 6]])
    assert metrics.recall_at_k(exact[:, ::-1], exact) == 1
    assert metrics.recall_at_k([[1, 9, -1], [-1, -1, -1]], exact) == pytest.approx(1 / 6)
    with pytest.raises(ValueError):
        metrics.recall_at_k(exact[:, :2], exact)


# ------------------------------------------------------------------------------------ distributions
def test_frechet_distance_agrees_with_the_matrix_square_root(rng):
    a, b = (
        rng.normal(size=(500, 8)) @ rng.normal(size=(8, 8)),
        rng.normal(size=(400, 8)) @ rng.normal(size=(8, 8)) + 2,
    )
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(
        cov_a + cov_b - 2 * linalg.sqrtm(cov_a @ cov_b).real
    )
    assert (
        metrics.frechet_distance(a, b)
        == pytest.approx(expected)
        == pytest.approx(metrics.frechet_distance(b, a))
    )
    q = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    assert metrics.frechet_distance(a @ q, b @ q) == pytest.approx(expected)


def test_frechet_distance_in_closed_form(rng):
    a, b = rng.normal(size=(300, 1)) * 3 + 1, rng.normal(size=(200, 1)) - 4
    assert metrics.frechet_distance(a, b) == pytest.approx(
        (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    )
    few = rng.normal(size=(6, 20))  # fewer rows than columns: singular covariances
    assert metrics.frechet_distance(few, few + 0.5) == pytest.approx(
        20 * 0.25
    ) and metrics.frechet_distance(few, few) == pytest.approx(0, abs=1e-9)
    for x, y in (
        (a, a[:1]),
        (a, np.ones((5, 2))),
        (a[:, 0], a[:, 0]),
        (a, np.full((5, 1), np.nan)),
    ):
        with pytest.raises(ValueError, match="frechet_distance needs"):
            metrics.frechet_distance(x, y)


def test_wasserstein_by_sorting(rng):
    a, b = rng.normal(size=(100, 3)), rng.gamma(2, size=(100, 3))
    assert metrics.wasserstein_1d(a, b) == pytest.approx(
        np.abs(np.sort(a, 0) - np.sort(b, 0)).mean()
    )
    assert metrics.wasserstein_1d(a[:, 0], a[:, 0] + 2) == pytest.approx(
        2
    ) and metrics.wasserstein_1d([0, 1], [0, 0, 1, 1]) == pytest.approx(0)
    with pytest.raises(ValueError, match="equal width"):
        metrics.wasserstein_1d(a, b[:, :2])


def test_kernel_distance_is_the_unbiased_double_sum(rng):
    a, b = rng.normal(size=(30, 3)), rng.normal(size=(40, 3)) + 0.5

    def mean(x, y, skip):
        return np.mean(
            [
                (u @ v / 3 + 1) ** 3
                for i, u in enumerate(x)
                for j, v in enumerate(y)
                if not (skip and i == j)
            ]
        )

    want = mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)
    assert (
        metrics.kernel_distance(a, b)
        == pytest.approx(want)
        == metrics.kernel_distance(a, b, chunk=7)
    )
    draws = [
        metrics.kernel_distance(rng.normal(size=(40, 2)), rng.normal(size=(60, 2)))
        for _ in range(100)
    ]
    assert min(draws) < 0 and abs(np.mean(draws)) < 3 * np.std(draws) / 10  # unbiased
    with pytest.raises(ValueError, match="equal D"):
        metrics.kernel_distance(a, b[:, :2])


def test_spatial_coherence(rng):
    xy = np.stack(np.meshgrid(np.arange(40), np.arange(40)), -1).reshape(-1, 2) + rng.uniform(
        -0.1, 0.1, (1600, 2)
    )
    assert metrics.spatial_coherence((xy[:, 0] > 19.5).astype(int), xy) > 0.95
    assert metrics.spatial_coherence(rng.integers(0, 4, 1600), xy) == pytest.approx(0.25, abs=0.03)


# ----------------------------------------------------------------- several seeds and the whole file
def test_median_spread():
    assert metrics.median_spread([3, 1, 2, 10]) == pytest.approx(
        {"median": 2.5, "min": 1, "max": 10, "std": np.sqrt(12.5), "n": 4}
    )
    assert metrics.median_spread(np.float32([0.5])) == {
        "median": 0.5,
        "min": 0.5,
        "max": 0.5,
        "std": 0,
        "n": 1,
    }
    failed = metrics.median_spread([0.5, np.nan])
    assert np.isnan(failed["median"]) and failed["n"] == 2
    with pytest.raises(ValueError, match="no values"):
        metrics.median_spread([])


def test_large_slide_is_linear_in_spots(rng):
    """100,000 spots through everything spatial; an N x N array would be 80 GB."""
    n = 100_000
    grid = np.stack([np.arange(n) // 400, np.arange(n) % 400], 1)
    r, c = grid.T
    neighbours = np.stack(
        [
            np.where(c > 0, np.arange(n) - 1, -1),
            np.where(c < 399, np.arange(n) + 1, -1),
            np.where(r > 0, np.arange(n) - 400, -1),
            np.where(r < 249, np.arange(n) + 400, -1),
        ],
        1,
    )
    labels = r // 50
    distance = metrics.boundary_distance(labels, neighbours)
    assert distance.max() == 49 and (distance == 0).sum() == 8 * 400
    assert metrics.pas(labels, grid) == 0 and metrics.chaos(labels, grid) > 0
    assert metrics.moran_i(rng.normal(size=(n, 3)), neighbours) == pytest.approx(0, abs=0.02)
