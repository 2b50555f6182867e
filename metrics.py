"""Every score of the project: labels in, flat dicts of floats (or one array per gene) out.

    1 input checks       2 clustering        3 classification and calibration
    4 boundary of annotated domains          5 spatial order
    6 gene prediction    7 distributions     8 several seeds

Conventions. Labels are integers, -1 = none, and a row without a true label is never scored. A score
that is undefined is nan, never a silent 0 or 1; the one exception (a constant prediction) is stated
at `pcc_summary`. Unusable input raises ValueError. Nothing here is N x N.
"""

import numpy as np
from scipy import sparse, stats
from scipy.linalg import eigh, svdvals
from scipy.spatial import cKDTree
from sklearn import metrics as sk
from sklearn.metrics.pairwise import polynomial_kernel

from plainst.classes import class_ranks


# ----------------------------------------------------------------------------------- 1 input checks
def _same_rows(**arrays):
    """The arrays by keyword as numpy arrays; ValueError unless all have the same number of rows."""
    arrays = {name: np.asarray(a) for name, a in arrays.items()}
    if len({a.shape[:1] for a in arrays.values()}) > 1 or any(a.ndim == 0 for a in arrays.values()):
        raise ValueError(
            "row counts differ: "
            + ", ".join(f"{name} has shape {a.shape}" for name, a in arrays.items())
        )
    return list(arrays.values())


def _labelled(true, *others, **named):
    """(true, others...) restricted to rows whose true label is not -1; ValueError if none is
    left."""
    true, *others = _same_rows(true=true, **named)
    if true.ndim != 1:
        raise ValueError(f"labels must be one per row, true has shape {true.shape}")
    keep = true != -1
    if not keep.any():
        raise ValueError(f"no labelled rows to score: all {len(true)} true labels are -1")
    return [true[keep]] + [a[keep] for a in others]


def _is_constant(low, high, dtype):
    """Whether columns with these extremes vary by no more than the round-off of their own dtype
    (integers: not at all)."""
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    eps = 4 * np.finfo(dtype).eps if np.issubdtype(dtype, np.floating) else 0.0
    return high - low <= eps * np.maximum(np.abs(low), np.abs(high))


# ------------------------------------------------------------------------------------- 2 clustering
def clustering(true, pred):
    """Agreement of a partition with the annotation, whatever the clusters are called.

    true (N,) int, -1 = left out; pred (N,) cluster names of any type (a -1 in pred is a cluster
    like any other). Returns ari (Hubert & Arabie 1985), nmi and ami (Vinh et al. 2010; arithmetic
    mean of the entropies), completeness, homogeneity (Rosenberg & Hirschberg 2007). Completeness
    alone is 1 for a single cluster: read it beside homogeneity. Raises ValueError for a shape
    mismatch or when no row is labelled."""
    true, pred = _labelled(true, pred=pred)
    homogeneity, completeness, _ = sk.homogeneity_completeness_v_measure(true, pred)
    return {
        "ari": float(sk.adjusted_rand_score(true, pred)),
        "nmi": float(sk.normalized_mutual_info_score(true, pred, average_method="arithmetic")),
        "ami": float(sk.adjusted_mutual_info_score(true, pred, average_method="arithmetic")),
        "completeness": float(completeness),
        "homogeneity": float(homogeneity),
    }


# ----------------------------------------------------------------- 3 classification and calibration
def _checked_probabilities(true, prob):
    """true (n,) int64 in [0, C), prob (n, C) float64 of the labelled rows, or ValueError."""
    true, prob = _labelled(true, prob=prob)
    true, prob = true.astype(np.int64), prob.astype(np.float64)
    if prob.ndim != 2:
        raise ValueError(f"prob must be (N, C), it has shape {prob.shape}")
    if true.min() < 0 or true.max() >= prob.shape[1]:
        raise ValueError(
            f"true labels must lie in 0..{prob.shape[1] - 1} (the columns of prob) or be -1, "
            f"found {true.min()}..{true.max()}"
        )
    if not np.isfinite(prob).all() or prob.min() < 0 or np.abs(prob.sum(1) - 1).max() > 1e-3:
        raise ValueError(
            "prob must hold probabilities: finite, not negative, every row summing to 1 "
            "within 0.001 (apply softmax first)"
        )
    return true, prob


def expected_calibration_error(correct, confidence, bins=15):
    """ECE = sum_b n_b / N |accuracy_b - mean confidence_b| over equal-width bins (l, u] (Guo et al.
    2017, eq. 3). correct, confidence (N,)."""
    correct, confidence = _same_rows(correct=correct, confidence=confidence)
    # (N,) in 0..bins-1
    which = np.digitize(confidence, np.linspace(0, 1, bins + 1)[1:-1], right=True)
    # (bins,) n_b (accuracy_b - confidence_b)
    gap = np.bincount(which, weights=correct.astype(np.float64) - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(confidence))


def quadratic_kappa(true, pred, classes):
    """Cohen's kappa with weights (i - j)^2 (Cohen 1968); true, pred (n,) int, indices into the
    class names `classes` (C,), i and j the ranks of `class_ranks`.

    nan where the classes have no order or are unknown (None), and where truth and prediction are
    one and the same single class: chance agreement is then 1."""
    rank = None if classes is None else class_ranks(classes)
    if rank is None or len(np.union1d(true, pred)) < 2:
        return float("nan")
    labels = np.arange(len(rank))
    return float(sk.cohen_kappa_score(rank[true], rank[pred], labels=labels, weights="quadratic"))


def classification(true, prob, classes=None):
    """Scores of a probabilistic classifier.

    true (N,) int, -1 = left out; prob (N, C) class probabilities; classes (C,) the names of the
    columns, which decide whether kappa_quadratic is defined: see `quadratic_kappa`.
    macro_f1: as in scikit-learn, mean over the classes in the scored truth or the prediction: a
    class that the tissue lacks counts 0 once it is predicted. balanced_accuracy: recall averaged
    over the classes in the scored truth. top2: true class among the two most probable, ties to the
    lower column. log_loss: mean -log p_true in nats, p clipped to [1e-7, 1 - 1e-7]. ece: 15
    equal-width bins of the top probability. Returns a flat dict, with ari, nmi, ami of the arg-max
    as well. Raises ValueError for a shape mismatch, no labelled row, labels outside the columns,
    or rows of prob that are no probabilities."""
    true, prob = _checked_probabilities(true, prob)
    if classes is not None and len(classes) != prob.shape[1]:
        raise ValueError(f"prob has {prob.shape[1]} columns, but {len(classes)} classes are named")
    pred = prob.argmax(1)  # (n,)
    in_truth = np.unique(true)
    p_true = np.clip(prob[np.arange(len(true)), true], 1e-7, 1 - 1e-7)
    top2 = np.argsort(-prob, axis=1, kind="stable")[:, :2]  # (n, 2)
    partition = clustering(true, pred)
    recall = sk.recall_score(true, pred, labels=in_truth, average="macro", zero_division=0)
    return {
        "ari": partition["ari"],
        "nmi": partition["nmi"],
        "ami": partition["ami"],
        "accuracy": float((pred == true).mean()),
        "macro_f1": float(sk.f1_score(true, pred, average="macro", zero_division=0)),
        "balanced_accuracy": float(recall),
        "kappa_quadratic": quadratic_kappa(true, pred, classes),
        "top2": float((top2 == true[:, None]).any(1).mean()),
        "log_loss": float(-np.log(p_true).mean()),
        "ece": expected_calibration_error(pred == true, np.minimum(prob.max(1), 1.0)),
    }


# ------------------------------------------------------------------ 4 boundary of annotated domains
def boundary_distance(labels, neighbours):
    """Lattice steps from every spot to the boundary between annotated domains.

    labels (N,) int, -1 = none, of the FULL slide (not of a split); neighbours (N, k) int row
    numbers of the adjacent lattice spots, -1 = padding, symmetric (if j is beside i, i is beside
    j): the six of the first hexagonal ring, whatever graph the model uses. (Six nearest LABELLED
    spots by distance instead reach over holes and the tissue edge and give more boundary: 28.3 %
    instead of 27.6 % on 151673.) Returns (N,) int64: 0 = a labelled neighbour carries another
    label; d = d steps over labelled spots to the nearest such spot; -1 = unlabelled; N = no
    boundary in this spot's connected component (more than any true distance, so it counts as
    interior). Breadth-first, O(N k)."""
    labels, neighbours = _same_rows(labels=labels, neighbours=neighbours)
    n = len(labels)
    if neighbours.ndim != 2 or (
        neighbours.size and (neighbours.max() >= n or neighbours.min() < -1)
    ):
        raise ValueError(f"neighbours must be (N, k) row numbers below {n}, or -1 for padding")
    labelled = labels != -1
    # (N, k); a padded entry reads row -1 and is masked by its sign
    beside = (neighbours >= 0) & labelled[neighbours] & labelled[:, None]
    distance = np.where(labelled, n, -1).astype(np.int64)
    frontier = np.flatnonzero((beside & (labels[neighbours] != labels[:, None])).any(1))
    steps = 0
    while frontier.size:
        distance[frontier] = steps
        reached = neighbours[frontier][beside[frontier]]
        # labelled spots that no earlier step has reached
        frontier = np.unique(reached[distance[reached] == n])
        steps += 1
    return distance


def boundary_accuracy(true, pred, distance, mask=None):
    """Accuracy by distance to the annotated boundary.

    true, pred, distance (N,) int, distance from `boundary_distance` on the full slide; mask (N,)
    bool, True = scored (e.g. the test spots). Returns boundary_accuracy (distance 0),
    interior_accuracy (1 or more), accuracy_distance_0, _1, _2, _3plus (components without boundary
    included), boundary_share = share of the scored spots on the boundary, share_within_1 and
    errors_within_1 = share of them, and of the errors among them, at most one step from it; nan
    where there is no such spot. Raises ValueError for a shape mismatch or no labelled row."""
    true, pred, distance = _same_rows(true=true, pred=pred, distance=distance)
    scored = (true != -1) & (distance >= 0)
    if mask is not None:
        scored = scored & _same_rows(true=true, mask=mask)[1].astype(bool)
    if not scored.any():
        raise ValueError("no labelled rows to score inside the mask")
    correct, distance = (true == pred)[scored], distance[scored]

    def accuracy(where):
        return float(correct[where].mean()) if where.any() else np.nan

    at_boundary = accuracy(distance == 0)
    return {
        "boundary_accuracy": at_boundary,
        "interior_accuracy": accuracy(distance > 0),
        "accuracy_distance_0": at_boundary,
        "accuracy_distance_1": accuracy(distance == 1),
        "accuracy_distance_2": accuracy(distance == 2),
        "accuracy_distance_3plus": accuracy(distance >= 3),
        "boundary_share": float((distance == 0).mean()),
        "share_within_1": float((distance <= 1).mean()),
        "errors_within_1": float((distance[~correct] <= 1).mean()) if (~correct).any() else np.nan,
    }


# ---------------------------------------------------------------------------------- 5 spatial order
def _nearest(xy, k):
    """(N, k) distances and row numbers of the k nearest other points; a point is never its own
    neighbour, duplicates included."""
    distance, index = cKDTree(xy).query(xy, k=k + 1)  # (N, k + 1)
    other = index != np.arange(len(xy))[:, None]
    # more than k duplicates hide the point itself: drop the farthest instead
    other[other.all(1), -1] = False
    return distance[other].reshape(-1, k), index[other].reshape(-1, k)


def _placed(pred, xy):
    pred, xy = _same_rows(pred=pred, xy=xy)
    keep = pred != -1
    if keep.sum() < 2:
        raise ValueError("spatial order needs at least two spots with a label")
    return pred[keep], xy[keep].astype(np.float64)


def pas(pred, xy, k=10):
    """Proportion of abnormal spots, lower = smoother: spots of which more than k/2 of the k nearest
    spots carry another label, for k = 10 six or more (Shang & Zhou 2022, SpatialPCA; Yuan et al.
    2024, SDMBench). pred (N,) int, -1 = left out; xy (N, 2). Equal distances in KD-tree order. nan
    where there are not k other spots."""
    pred, xy = _placed(pred, xy)
    if len(pred) <= k:
        return float("nan")
    _, index = _nearest(xy, k)
    return float(((pred[index] != pred[:, None]).sum(1) > k / 2).mean())


def chaos(pred, xy):
    """Mean distance to the nearest spot of the same domain over coordinates z-scored per axis,
    lower = more compact (Shang & Zhou 2022, SpatialPCA; Yuan et al. 2024, SDMBench). pred (N,) int,
    -1 = left out; xy (N, 2). As in SDMBench a domain of one or two spots adds 0 to the sum, and its
    spots count in the mean; nan where there is no larger domain. The z-score per axis makes it free
    of shift and scale and of quarter turns, not of other rotations; it is dominated by the lattice
    pitch, so compare it on one slide only."""
    pred, xy = _placed(pred, xy)
    spread = xy.std(0)
    xy = (xy - xy.mean(0)) / np.where(spread > 0, spread, 1)
    names, sizes = np.unique(pred, return_counts=True)
    domains = [xy[pred == name] for name in names[sizes > 2]]
    if not domains:
        return float("nan")
    return float(sum(_nearest(members, 1)[0].sum() for members in domains) / len(pred))


def spatial_coherence(pred, xy, k=6):
    """Share of the k nearest cells that have the cell's own cluster, mean over cells. pred (N,)
    int, -1 = left out; xy (N, 2)."""
    pred, xy = _placed(pred, xy)
    _, index = _nearest(xy, min(k, len(pred) - 1))
    return float((pred[index] == pred[:, None]).mean())


def moran_i(values, neighbours):
    """Moran's I per column with row-standardised weights: I = (N / S0) sum_i z_i mean_{j beside i}
    z_j / sum_i z_i^2 (Moran 1950), O(N k M).

    values (N, M) or (N,); neighbours (N, k) int, -1 = padding; S0 = number of spots that have a
    neighbour (the rest count in N and the mean). Returns (M,) float64, nan for constant columns and
    when nobody has a neighbour. Expectation without spatial order: -1 / (N - 1)."""
    values, neighbours = _same_rows(values=values, neighbours=neighbours)
    values = values if values.ndim == 2 else values[:, None]
    beside = neighbours >= 0
    degree = beside.sum(1)  # (N,)
    weights = sparse.csr_matrix(
        (
            np.repeat(1 / np.maximum(degree, 1), degree),
            neighbours[beside],
            np.append(0, degree.cumsum()),
        ),
        shape=(len(values), len(values)),
    )
    z = values - values.mean(0, dtype=np.float64)  # (N, M)
    cross, power = np.einsum("nm,nm->m", z, weights @ z), np.einsum("nm,nm->m", z, z)
    defined = ~_is_constant(values.min(0), values.max(0), values.dtype) & (degree.sum() > 0)
    scale = len(values) / max((degree > 0).sum(), 1)
    return np.divide(scale * cross, power, out=np.full(values.shape[1], np.nan), where=defined)


# -------------------------------------------------------------------------------- 6 gene prediction
def _centred(matrix, measured, name):
    """One block of genes: values and deviations from the mean of the measured rows (both (N, g)
    float64, 0 where unmeasured), constant (g,)."""
    # (N, g); whatever stands in an unmeasured place is never read
    x = np.where(measured, matrix, 0).astype(np.float64)
    if not np.isfinite(x).all():
        raise ValueError(f"{name} has a measured value that is nan or infinite")
    n = measured.sum(0)
    low, high = (
        np.where(measured, x, np.inf).min(0, initial=np.inf),
        np.where(measured, x, -np.inf).max(0, initial=-np.inf),
    )
    constant = _is_constant(np.where(n > 0, low, 0), np.where(n > 0, high, 0), matrix.dtype)
    # no round-off passes for variance
    return x, np.where(measured & ~constant, x - x.sum(0) / np.maximum(n, 1), 0), constant


def _gene_moments(true, pred, mask=None, chunk=256):
    """Per gene over its measured rows: n, var_true, var_pred, covariance, squared_error,
    constant_true, constant_pred, a dict of (G,) arrays. In float64, `chunk` genes at a time so that
    no temporary is larger than (N, chunk)."""
    true, pred = _same_rows(true=true, pred=pred)
    shapes = [true.shape, pred.shape] + ([] if mask is None else [np.shape(mask)])
    if true.ndim != 2 or not true.size or len(set(shapes)) > 1:
        raise ValueError(
            "true, pred and mask must share one non-empty (N, G) shape, got "
            f"{', '.join(map(str, shapes))}"
        )
    parts = []
    for start in range(0, true.shape[1], chunk):
        gene = slice(start, start + chunk)
        # (N, g)
        measured = (
            np.ones(true[:, gene].shape, bool)
            if mask is None
            else np.asarray(mask)[:, gene].astype(bool)
        )
        x, dx, constant_x = _centred(true[:, gene], measured, "true")
        y, dy, constant_y = _centred(pred[:, gene], measured, "pred")
        n = np.maximum(measured.sum(0), 1)
        parts.append(
            {
                "n": measured.sum(0),
                "var_true": (dx * dx).sum(0) / n,
                "var_pred": (dy * dy).sum(0) / n,
                "covariance": (dx * dy).sum(0) / n,
                "squared_error": ((x - y) ** 2).sum(0),
                "constant_true": constant_x,
                "constant_pred": constant_y,
            }
        )
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _correlation(moments):
    """(G,) Pearson from `_gene_moments`, nan where truth or prediction is constant."""
    defined = ~moments["constant_true"] & ~moments["constant_pred"]
    scale = np.sqrt(moments["var_true"]) * np.sqrt(moments["var_pred"])
    return np.clip(
        np.divide(
            moments["covariance"],
            scale,
            out=np.full(len(scale), np.nan),
            where=defined & (scale > 0),
        ),
        -1,
        1,
    )


def pcc(true, pred, mask=None):
    """Pearson correlation of every gene across the rows, (N, G), (N, G) -> (G,) float64; nan where
    truth or prediction is constant.

    mask (N, G) bool, True = measured, False = left out of this gene. Constant = varies by no more
    than the round-off of the array's dtype. Raises ValueError for a shape mismatch and for nan or
    infinity in a measured place."""
    return _correlation(_gene_moments(true, pred, mask))


def scored_pcc(true, pred):
    """`pcc` as it enters a mean: (N, G), (N, G) -> (G,), nan where truth is constant, 0 where only
    the prediction is (leaving it out would reward a collapsed model)."""
    return _scored_correlation(_gene_moments(true, pred))


def _scored_correlation(moments):
    """As `scored_pcc`, from `_gene_moments`."""
    return np.where(
        moments["constant_true"],
        np.nan,
        np.where(moments["constant_pred"], 0.0, _correlation(moments)),
    )


def pcc_summary(true, pred, slide_ids=None, mask=None):
    """Summary of gene prediction. true, pred (N, G); slide_ids (N,) any type, None = one slide;
    mask (N, G) bool, True = measured.

    Two means of Pearson's r, which answer different questions:
    * pcc_mean: per gene across the spots of ONE slide, mean over genes, then over slides. With
    pcc_median, pcc_std (ddof 0) and variance_ratio_median (variance of the prediction / of the
    truth; below 1 = too smooth), which are averaged over slides likewise.
    * pcc_pooled: per gene across the spots of all slides together, mean over genes. This is
    `pearson_mean` of the HEST benchmark (Jaume et al. 2024), there on log1p of raw counts;
    differences between slides enter it.
    Where r is undefined, for both:
    * truth constant: the gene is left out and counted in n_constant_truth; fewer than 2 measured
    spots: counted in n_unmeasured.
    * prediction constant where truth varies: scores 0 (leaving it out would reward a collapsed
    model), counted in n_constant_pred.
      All three count (slide, gene) pairs.
    rmse: over all measured entries. Values are nan where no gene is left. Raises ValueError as
    `pcc`."""
    true, pred = _same_rows(true=true, pred=pred)
    slide_ids, _ = _same_rows(
        slide_ids=np.zeros(len(true), int) if slide_ids is None else slide_ids, true=true
    )
    pooled = _gene_moments(true, pred, mask)
    rows, counts = [], np.zeros(3, int)
    for slide in np.unique(slide_ids):
        here = slide_ids == slide
        m = _gene_moments(true[here], pred[here], None if mask is None else np.asarray(mask)[here])
        unmeasured, varies = m["n"] < 2, ~m["constant_true"]
        counts += [
            (~varies & ~unmeasured).sum(),
            (varies & m["constant_pred"]).sum(),
            unmeasured.sum(),
        ]
        if varies.any():
            r = _scored_correlation(m)[varies]  # (genes whose truth varies on this slide,)
            rows.append(
                [
                    r.mean(),
                    np.median(r),
                    r.std(),
                    np.median(m["var_pred"][varies] / m["var_true"][varies]),
                ]
            )
    mean, median, std, ratio = np.mean(rows, axis=0) if rows else np.full(4, np.nan)
    across = _scored_correlation(pooled)[~pooled["constant_true"]]
    n_entries = pooled["n"].sum()
    return {
        "pcc_mean": float(mean),
        "pcc_median": float(median),
        "pcc_std": float(std),
        "n_constant_truth": int(counts[0]),
        "n_constant_pred": int(counts[1]),
        "n_unmeasured": int(counts[2]),
        "pcc_pooled": float(across.mean()) if across.size else np.nan,
        "rmse": float(np.sqrt(pooled["squared_error"].sum() / n_entries)) if n_entries else np.nan,
        "variance_ratio_median": float(ratio),
    }


def spearman(a, b):
    """Spearman rank correlation of a (N,) and b (N,), ties sharing their mean rank; nan where one
    is constant. Raises ValueError for other shapes and for nan or infinity."""
    a, b = _same_rows(a=a, b=b)
    if a.ndim != 1 or b.ndim != 1:
        raise ValueError(f"ranks need two (N,) arrays, got {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("ranks need finite values: a or b holds nan or infinity")
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(stats.spearmanr(a, b).statistic)


def gene_gene_agreement(true, pred):
    """How far the correlations between genes survive: the Pearson matrices over the rows of true
    and pred (N, G), upper triangles side by side.

    pearson, spearman (of the triangles), frobenius (norm of the difference over the norm of the
    true triangle; 0 = equal) and slope (least squares of the predicted on the true correlations;
    above 1 = inflated, as averages over neighbours do). Genes that are constant on either side are
    left out; nan where fewer than three remain or the triangle does not vary. Raises ValueError for
    a shape mismatch."""
    true, pred = (np.asarray(a, np.float64) for a in _same_rows(true=true, pred=pred))
    if true.shape != pred.shape:
        raise ValueError(f"shapes differ: true {true.shape}, pred {pred.shape}")
    keep = ~(
        _is_constant(true.min(0), true.max(0), np.float32)
        | _is_constant(pred.min(0), pred.max(0), np.float32)
    )
    if keep.sum() < 3:
        return dict.fromkeys(("pearson", "spearman", "frobenius", "slope"), float("nan"))
    above = np.triu_indices(keep.sum(), 1)
    a, b = (np.corrcoef(x[:, keep].T)[above] for x in (true, pred))  # (G (G - 1) / 2,)
    return {
        "pearson": float(pcc(a[:, None], b[:, None])[0]),
        "spearman": spearman(a, b),
        "frobenius": float(np.linalg.norm(b - a) / np.linalg.norm(a)),
        "slope": float(np.cov(a, b)[0, 1] / a.var(ddof=1)) if a.std() else float("nan"),
    }


def recall_at_k(found, exact):
    """Mean share of the exact nearest rows (Q, k) that stand in found (Q, k) too, in any order; -1
    in found = no row. ValueError unless shapes agree."""
    found, exact = _same_rows(found=found, exact=exact)
    if found.shape != exact.shape or found.ndim != 2:
        raise ValueError(
            f"found and exact must both be (Q, k), they are {found.shape} and {exact.shape}"
        )
    return float(np.mean([np.isin(e, f).mean() for e, f in zip(exact, found)]))


# ---------------------------------------------------------------------------------- 7 distributions
def _root(covariance):
    """Symmetric square root; eigenvalues that round-off made negative count as 0."""
    value, vector = eigh(covariance)
    return (vector * np.sqrt(np.clip(value, 0, None))) @ vector.T


def frechet_distance(a, b):
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two feature clouds (N, D), (M, D): the
    "FID" of Heusel et al. 2017, a squared distance.

    Covariances with ddof 1. tr (C_a C_b)^(1/2) = sum of the singular values of C_a^(1/2) C_b^(1/2):
    real and stable where C is singular. Biased upwards for few rows (use >= 10 D; print the value
    of two halves of the real data beside it). ValueError unless N, M >= 2 and D agrees."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    if (
        a.ndim != 2
        or b.ndim != 2
        or a.shape[1] != b.shape[1]
        or min(len(a), len(b)) < 2
        or not (np.isfinite(a).all() and np.isfinite(b).all())
    ):
        raise ValueError(
            "frechet_distance needs two finite (rows >= 2, D) arrays of equal D, got "
            f"{a.shape} and {b.shape}"
        )
    cov_a, cov_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))  # (D, D)
    distance = (
        ((a.mean(0) - b.mean(0)) ** 2).sum()
        + np.trace(cov_a)
        + np.trace(cov_b)
        - 2 * svdvals(_root(cov_a) @ _root(cov_b)).sum()
    )
    return float(max(distance, 0.0))


def wasserstein_1d(a, b):
    """1-Wasserstein distance of each column of a (N, D) and b (M, D) (or (N,), (M,)), mean over the
    columns, in the units of the columns."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    a, b = (x[:, None] if x.ndim == 1 else x for x in (a, b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not len(a) or not len(b):
        raise ValueError(
            f"wasserstein_1d needs two non-empty arrays of equal width, got {a.shape} and {b.shape}"
        )
    return float(np.mean([stats.wasserstein_distance(x, y) for x, y in zip(a.T, b.T)]))


def kernel_distance(a, b, chunk=1024):
    """Unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)^3, the "KID" of
    Binkowski et al. 2018: a (N, D), b (M, D) -> float.

    0 in expectation for equal distributions (a single value may be negative), whatever N and M are.
    O((N + M)^2 D) time, `chunk` rows at a time."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"kernel_distance needs two (rows >= 2, D) arrays of equal D, got {a.shape} and "
            f"{b.shape}"
        )

    def total(x, y):
        parts = (x[i : i + chunk] for i in range(0, len(x), chunk))
        return sum(polynomial_kernel(part, y, degree=3).sum() for part in parts)

    def within(x):
        # without the pairs of a row and itself
        diagonal = ((x * x).sum(1) / x.shape[1] + 1) ** 3  # (rows,)
        return (total(x, x) - diagonal.sum()) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * total(a, b) / (len(a) * len(b)))


# ---------------------------------------------------------------------------------- 8 several seeds
def median_spread(values):
    """median, min, max, std (ddof 0) and n of one score over several seeds or slices. A nan makes
    the result nan: a failed run is not dropped."""
    values = np.asarray(values, np.float64).ravel()
    if not values.size:
        raise ValueError("no values to summarise")
    return {
        "median": float(np.median(values)),
        "min": float(values.min()),
        "max": float(values.max()),
        "std": float(values.std()),
        "n": int(values.size),
    }
