"""The five task families of single cells with their baselines.

    generation     a cell's expression -> its picture         task_generation
    imputation     four fifths of the genes -> the others     task_imputation
    prediction     a cell's picture -> its expression         task_image_to_genes
    annotation     frozen embedding -> class                  task_labels
    clustering     frozen embedding -> partition              task_labels

Each task scores a method beside the predictors that it has to beat, on the same cells: everything
is fitted on the cells of the part "train" and scored on those of the part "test". What the tasks
need of a method they call through `Method`.

N cells of the file, n scored, G genes, d wide; the dataset is a `plainst.cell_data.CellDataset`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.spatial import cKDTree
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import metrics
from evaluation.pictures import ImageFeatures, generated_images, morphology
from plainst import run

# imputation hides 1/5 of the genes of a cell, each gene once
ROUNDS = 5
# ridge penalties, chosen by leave-one-out inside the training cells
ALPHAS = np.logspace(-1, 5, 13)
# columns of `channel_coverage`
PROBES = ("own_area", "other_area", "near_density")


@dataclass
class Method:
    """What the tasks ask of a trained method. Embeddings are tensors on the dataset's device.

    embed(modality, hidden=None) -> (N, d): embeddings of all cells, zeros for those in no part;
        modality "img" or "fused"; hidden (N, G) bool on the CPU: genes that are hidden.
    predict_genes(z, rows, has_context) -> (n, G), (n, q) numpy: standardised expression of the
        cells `rows` read from embeddings z (N, d) of them and, with `has_context`, of their
        surroundings; and the hidden layer that it is read from.
    generate(rows, draws) -> (draws, n, C, S, S) uint8: pictures from counts, or None.
    """

    embed: Callable
    predict_genes: Callable
    generate: Callable | None = None


@dataclass
class TaskResult:
    """Of one task: scores {name: float} of the method, baselines {predictor: the same}, arrays
    {name: numpy} worth keeping."""

    scores: dict = field(default_factory=dict)
    baselines: dict = field(default_factory=dict)
    arrays: dict = field(default_factory=dict)


# --------------------------------------------------------------------------------------------------
# Predictors to beat, and what is read from them
# --------------------------------------------------------------------------------------------------


def ridge(x, y, query):
    """Ridge with z-scored inputs, the penalty by leave-one-out on the training rows: fit on x (n,
    p), y (n, m), predict query (q, p) -> (q, m)."""
    return make_pipeline(StandardScaler(), RidgeCV(ALPHAS)).fit(x, y).predict(query)


def knn(x, y, query, k=20):
    """Mean of y over the k nearest training rows, shapes as in `ridge`."""
    return KNeighborsRegressor(min(k, len(x))).fit(x, y).predict(query)


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


def average_with_ridge(linear, inner, y, head, fit, rows):
    """Mean of the network's head and of a ridge on [linear terms, the head's hidden layer], fitted
    on training cells. Few cells make a network that is alone in finding the linear part lose to
    ridge; the record has both parts. linear (N, p), inner (N, q), y (n_fit, m), head (n, m) -> (n,
    m)."""
    x = np.concatenate([linear, inner], 1)
    return (ridge(x[fit], y, x[rows]) + head) / 2


def pixel_components(n_components, fit, *others):
    """Principal components of the pixels of pictures (n, C, S, S) uint8, fitted on `fit`: of `fit`
    and of each of the others, (n, at most n_components)."""
    pixels = [images.reshape(len(images), -1) / 255 for images in (fit, *others)]
    pca = PCA(min(n_components, len(fit) - 1), random_state=0).fit(pixels[0])
    return [pca.transform(x) for x in pixels]


def density(dataset, part):
    """-log distance to the 5th and the farthest neighbour of the niche, in px: (n, 2)."""
    rows, xy = dataset.rows[part], dataset.cells.xy
    # (n, k), ascending
    apart = np.linalg.norm(xy[dataset.niche[rows].numpy()] - xy[rows][:, None], axis=-1)
    return -np.log(apart[:, [min(4, apart.shape[1] - 1), -1]] + 1)


def detected_genes(dataset):
    """(G,) genes seen in more than 3 % of the training cells."""
    counts = dataset.counts[dataset.rows["train"]]
    return counts.getnnz(0) > 0.03 * counts.shape[0]


def defined(values):
    """The values (n,) that are not nan, or a single nan where there is none."""
    values = values[~np.isnan(values)]
    return values if len(values) else np.array([np.nan])


def gene_scores(true, pred, detected, prefix):
    """PCC per gene over cells (mean over the detected genes that vary, as in
    `metrics.scored_pcc`), RMSE. -> flat dict."""
    r = defined(metrics.scored_pcc(true, pred)[detected])
    return {
        f"{prefix}_pcc_mean": float(np.mean(r)),
        f"{prefix}_pcc_median": float(np.median(r)),
        f"{prefix}_rmse": float(np.sqrt(np.mean((true - pred)[:, detected] ** 2))),
    }


def gene_result(true, guesses, detected, prefix, arrays):
    """TaskResult of predicted expression, guesses {predictor: (n, G)}: those of the method are
    `model`, `model_own` (without surroundings) and `network` (its network part alone)."""
    scored = {name: gene_scores(true, g, detected, prefix) for name, g in guesses.items()}
    scores = scored.pop("model")
    for name, key in (("model_own", "own"), ("network", "network")):
        scores[f"{prefix}_{key}_pcc_mean"] = scored.pop(name)[f"{prefix}_pcc_mean"]
    return TaskResult(scores, scored, arrays)


# --------------------------------------------------------------------------------------------------
# Expression -> picture
# --------------------------------------------------------------------------------------------------


def channel_coverage(images, channels):
    """Three numbers of pictures (n, C, S, S) uint8 that a generator should get right, PROBES:
    covered area of the own cell, of the others, of the others in the central half. Channels `own`
    and `other` by name, else the first and the last. -> (n, 3)."""
    own = channels.index("own") if "own" in channels else 0
    other = channels.index("other") if "other" in channels else -1
    quarter = images.shape[-1] // 4
    x = images.astype(np.float32) / 255
    centre = x[:, other, quarter:-quarter, quarter:-quarter]
    return np.stack([x[:, own].mean((1, 2)), x[:, other].mean((1, 2)), centre.mean((1, 2))], 1)


def probe_scores(real, guess):
    """{cond_pcc_<probe>: PCC over cells} of a guess of the probes, both (n, 3): a plain correlation
    of pixel means."""
    r = metrics.scored_pcc(real, guess)
    return {f"cond_pcc_{probe}": value for probe, value in zip(PROBES, r)}


def task_generation(dataset, method, seed, draws):
    """genes -> image: PCC of the probes over cells (mean of the draws, one draw, shuffled),
    distances of distributions, round trip."""
    fit, rows, channels = dataset.rows["train"], dataset.rows["test"], dataset.cells.channels
    x_fit, x = dataset.expression_matrix("train"), dataset.expression_matrix("test")
    real_fit, real = dataset.cells.crops[fit], dataset.cells.crops[rows]
    made = method.generate(rows, draws)  # (draws, n, C, S, S)
    probes_fit, probes = channel_coverage(real_fit, channels), channel_coverage(real, channels)
    probes_made = np.stack([channel_coverage(images, channels) for images in made])
    nearest = cKDTree(x_fit).query(x, k=min(8, len(fit)))[1]  # (n, 8)
    expression = dataset.all_expression()
    niche_fit, niche = (expression[dataset.niche[r]].mean(1).cpu().numpy() for r in (fit, rows))
    both_fit, both = np.concatenate([x_fit, niche_fit], 1), np.concatenate([x, niche], 1)
    shuffle = np.random.default_rng(seed).permutation(len(rows))
    guesses = {
        "ridge": ridge(x_fit, probes_fit, x),
        "ridge_context": ridge(both_fit, probes_fit, both),
        "retrieval": probes_fit[nearest].mean(1),
        "knn": knn(x_fit, probes_fit, x),
        "shuffled": probes_made.mean(0)[shuffle],
    }
    baselines = {name: probe_scores(probes, guess) for name, guess in guesses.items()}
    scores = probe_scores(probes, probes_made.mean(0))
    one = np.mean([metrics.scored_pcc(probes, p) for p in probes_made], 0)
    scores |= {f"cond_pcc_{probe}_one_draw": r for probe, r in zip(PROBES, one)}
    features = ImageFeatures().fit(real_fit)
    f_fit, f_real, f_made = features(real_fit), features(real), features(made[0])
    scores |= named_distances(generated_images(f_real, f_made, f_fit, seed), "generated")
    retrieved = generated_images(f_real, f_fit[nearest[:, 0]], f_fit, seed)
    baselines["retrieval"] |= named_distances(retrieved, "retrieval")
    scores["fd_retrieval"] = retrieved["fd"]
    mean = np.tile(np.rint(real_fit.mean(0)).astype(np.uint8), (len(rows), 1, 1, 1))
    of_mean = generated_images(f_real, features(mean), f_fit, seed)
    baselines["mean_image"] = {"fd_mean_image": of_mean["fd"]}
    low_fit, low_real, low_made = pixel_components(32, real_fit, real, made[0])
    of_pixels = generated_images(low_real, low_made, low_fit, seed)
    scores |= {f"{name}_pca": of_pixels[name] for name in ("fd", "fd_floor")}
    # round trip: expression read back from the pictures, by what real pictures teach
    back = ridge(f_fit, x_fit[:, :-1], np.concatenate([f_made, f_real]))
    detected = detected_genes(dataset)
    for name, guess in (("", back[: len(rows)]), ("_ceiling", back[len(rows) :])):
        r = defined(metrics.scored_pcc(x[:, :-1], guess)[detected])
        scores[f"round_trip_pcc{name}"] = float(np.mean(r))
    scores |= truth_scores(dataset, rows, probes_made.mean(0)[:, 0], probes[:, 0])
    arrays = {"generated": made[0], "probes_generated": probes_made, "probes_real": probes}
    return TaskResult(scores, baselines, arrays)


def named_distances(scores, name):
    """Scores of `generated_images`; distances to the real pictures carry the name of whose they
    are."""
    return {f"{k}_{name}" if k in ("fd", "kid", "w1", "ks_d") else k: v for k, v in scores.items()}


def truth_scores(dataset, rows, made, real):
    """Where a simulation gives its size program: PCC of the own area with it, over all cells and
    within types; of the real pictures beside it."""
    truth = dataset.cells.truth
    if "program" not in truth or "type" not in truth:
        return {}
    program, kind = truth["program"][rows], truth["type"][rows]

    def within_types(values):
        if not len(kind):
            return values
        means = [values[kind == k].mean() for k in range(kind.max() + 1)]
        return values - np.array(means)[kind]

    scores = {}
    for name, area in (("", made), ("_real", real)):
        r = np.corrcoef(area, program)[0, 1]
        r_within = np.corrcoef(within_types(area), within_types(program))[0, 1]
        scores[f"program_pcc{name}"] = float(r)
        scores[f"program_pcc_within_type{name}"] = float(r_within)
    return scores


# --------------------------------------------------------------------------------------------------
# Hidden genes, and picture -> expression
# --------------------------------------------------------------------------------------------------


def imputation_folds(dataset, seed):
    """Which round hides which genes of a cell: (N, G) in 0 .. ROUNDS - 1; a fifth of a cell's genes
    at a time, other fifths in its neighbours. Also the fold of every gene (G,) and cell (N,): a
    gene is hidden in a cell in round (gene + cell) % ROUNDS."""
    rng = np.random.default_rng([seed, 11])
    gene_fold = rng.permutation(dataset.cells.n_genes) % ROUNDS
    cell_fold = rng.permutation(dataset.cells.n_cells) % ROUNDS
    return torch.tensor((gene_fold[None] + cell_fold[:, None]) % ROUNDS), gene_fold, cell_fold


def task_imputation(dataset, method, seed):
    """A fifth of a cell's genes is hidden, its neighbours hide other fifths; five rounds, so that
    every value is predicted once."""
    hidden_in, gene_fold, cell_fold = imputation_folds(dataset, seed)
    fit, rows, (n, n_genes) = dataset.rows["train"], dataset.rows["test"], dataset.counts.shape
    everyone, niche = np.concatenate([fit, rows]), dataset.niche.numpy()
    full = {part: dataset.expression_matrix(part)[:, :-1] for part in ("train", "test")}
    visible = np.zeros((ROUNDS, n, n_genes + 1), np.float32)
    heads, inners = {}, {}  # with and without surroundings: (ROUNDS, N, G), (ROUNDS, N, q)
    for r in range(ROUNDS):
        seen = dataset.expression(everyone, hidden_in[everyone] == r)
        visible[r, everyone] = torch.cat(seen, 1).cpu().numpy()
        z = method.embed("fused", hidden_in == r)
        for has_context in (True, False):
            head, inner = method.predict_genes(z, everyone, has_context)
            for store, values in ((heads, head), (inners, inner)):
                shape = (ROUNDS, n, values.shape[1])
                store.setdefault(has_context, np.zeros(shape, np.float32))[r, everyone] = values
    names = (
        *("model", "model_own", "network", "gene_mean", "knn", "neighbours"),
        *("ridge", "ridge_context", "pca"),
    )
    guesses = {name: np.zeros((len(rows), n_genes)) for name in names}
    # the genes of one fold; every cell in the round that hides them
    for fold in range(ROUNDS):
        genes, round_of = gene_fold == fold, (fold + cell_fold) % ROUNDS
        # (N, G + 1); hidden values count as the mean, 0
        own = visible[round_of, np.arange(n)]
        beside = visible[round_of[:, None], niche].mean(1)
        both, y = np.concatenate([own, beside], 1), full["train"][:, genes]
        # (N, genes) share of the niche that shows a gene
        shows = hidden_in.numpy()[niche] != round_of[:, None, None]
        share = shows[..., genes].mean(1).clip(1 / niche.shape[1])
        for name, has_context, linear in (("model", True, both), ("model_own", False, own)):
            head = heads[has_context][round_of, np.arange(n)][rows][:, genes]
            inner = inners[has_context][round_of, np.arange(n)]
            guesses[name][:, genes] = average_with_ridge(linear, inner, y, head, fit, rows)
            if has_context:
                guesses["network"][:, genes] = head
        guesses["neighbours"][:, genes] = beside[rows][:, :-1][:, genes] / share[rows]
        guesses["ridge"][:, genes] = ridge(own[fit], y, own[rows])
        guesses["ridge_context"][:, genes] = ridge(both[fit], y, both[rows])
        guesses["knn"][:, genes] = knn(own[fit][:, :-1], y, own[rows][:, :-1])
        guesses["pca"][:, genes] = pca_impute(full["train"], own[rows][:, :-1], genes)
    arrays = {"imputed": guesses["model"].astype(np.float32), "expression": full["test"]}
    return gene_result(full["test"], guesses, detected_genes(dataset), "impute", arrays)


def task_image_to_genes(dataset, method):
    """image -> genes: from the cell's own picture, and with the pictures of its surroundings; never
    from anyone's expression."""
    fit, rows = dataset.rows["train"], dataset.rows["test"]
    everyone, n_fit = np.concatenate([fit, rows]), len(fit)
    y, true = (dataset.expression_matrix(part)[:, :-1] for part in ("train", "test"))
    crops = [dataset.cells.crops[r] for r in (fit, rows)]
    crowding = [density(dataset, part) for part in ("train", "test")]
    features = ImageFeatures().fit(crops[0])
    own = [np.hstack([features(c), d]) for c, d in zip(crops, crowding)]
    of_cell = np.zeros((dataset.cells.n_cells, own[0].shape[1]))
    of_cell[everyone] = np.concatenate(own)
    beside = [of_cell[dataset.niche[r].numpy()].mean(1) for r in (fit, rows)]
    both = [np.hstack(pair) for pair in zip(own, beside)]
    z = method.embed("img")
    i_fit, i_rows = np.arange(n_fit), np.arange(n_fit, len(everyone))
    guesses = {}
    for name, has_context, linear in (("model", True, both), ("model_own", False, own)):
        head, inner = method.predict_genes(z, everyone, has_context)
        guesses[name] = average_with_ridge(
            np.concatenate(linear), inner, y, head[n_fit:], i_fit, i_rows
        )
        if has_context:
            guesses["network"] = head[n_fit:]
    shapes = [
        np.hstack([morphology(c[:, 0] / 255.0, features.thresholds[0]), d])
        for c, d in zip(crops, crowding)
    ]
    low = pixel_components(50, *crops)
    guesses |= {
        "ridge_morphology_density": ridge(shapes[0], y, shapes[1]),
        "ridge_image_pca": ridge(low[0], y, low[1]),
        "knn": knn(low[0], y, low[1]),
        "ridge_features_density": ridge(own[0], y, own[1]),
        "ridge_features_context": ridge(both[0], y, both[1]),
        "gene_mean": np.zeros_like(true),
    }
    arrays = {"image_to_genes": guesses["model"].astype(np.float32)}
    return gene_result(true, guesses, detected_genes(dataset), "image_to_genes", arrays)


# --------------------------------------------------------------------------------------------------
# Classes
# --------------------------------------------------------------------------------------------------


def coherence(dataset, rows, cluster):
    """`metrics.spatial_coherence`, mean over the sections, by their cells."""
    section, xy = dataset.cells.section[rows], dataset.cells.xy[rows]
    names, sizes = np.unique(section, return_counts=True)
    values = [
        metrics.spatial_coherence(cluster[section == name], xy[section == name]) for name in names
    ]
    return float(np.average(values, weights=sizes))


def label_scores(x_fit, x, y_fit, y, n_classes, seed):
    """Scores of inputs x_fit (n_fit, p), x (n, p) by classes y_fit, y, and the clusters (n,) found
    in x: logistic regression; k-means with K = number of classes (oracle)."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x_fit, y_fit)
    prob = np.zeros((len(x), n_classes))
    prob[:, model.classes_] = model.predict_proba(x)
    annotation = metrics.classification(y, prob)
    scaler = StandardScaler().fit(x_fit)
    means = KMeans(n_classes, n_init=10, random_state=seed).fit(scaler.transform(x_fit))
    cluster = means.predict(scaler.transform(x))
    partition = metrics.clustering(y, cluster)
    names = ("macro_f1", "accuracy", "balanced_accuracy")
    scores = {f"annotation_{name}": annotation[name] for name in names}
    scores |= {f"clustering_{name}": partition[name] for name in ("ari", "nmi")}
    return scores, cluster


def task_labels(dataset, z, seed):
    """Annotation (logistic regression on frozen embeddings) and clustering (k-means, K = number of
    classes: oracle) where the file has labels. z {name: (N, d) numpy}: embeddings; the scores of
    `z` bear no suffix, those of the others their name."""
    labels, train, test = dataset.cells.labels, dataset.rows["train"], dataset.rows["test"]
    is_fit, is_scored = labels[train] >= 0, labels[test] >= 0
    fit, rows, n_classes = train[is_fit], test[is_scored], len(dataset.cells.classes)
    if not len(rows) or len(np.unique(labels[fit])) < 2:
        return TaskResult()
    inputs = {name: (values[fit], values[rows]) for name, values in z.items()}
    x_fit, x = dataset.expression_matrix("train"), dataset.expression_matrix("test")
    pca = PCA(min(30, x_fit.shape[1] - 1), random_state=0).fit(x_fit)
    expression = pca.transform(x_fit[is_fit]), pca.transform(x[is_scored])
    image = pixel_components(50, dataset.cells.crops[fit], dataset.cells.crops[rows])
    both = [np.hstack(pair) for pair in zip(expression, image)]
    inputs |= {"pca_expression": expression, "pca_image": image, "pca_both": both}
    result = TaskResult()
    for name, (a, b) in inputs.items():
        scores, cluster = label_scores(a, b, labels[fit], labels[rows], n_classes, seed)
        scores["clustering_coherence"] = coherence(dataset, rows, cluster)
        if name.startswith("pca"):
            result.baselines[name] = scores
        else:
            suffix = "" if name == "z" else f"_{name}"
            result.scores |= {f"{key}{suffix}": value for key, value in scores.items()}
    return result


# --------------------------------------------------------------------------------------------------
# All tasks together
# --------------------------------------------------------------------------------------------------


def joined(results):
    """One TaskResult of several; a predictor of more than one task has the scores of all."""
    out = TaskResult()
    for result in results:
        out.scores |= result.scores
        out.arrays |= result.arrays
        for name, scores in result.baselines.items():
            out.baselines.setdefault(name, {}).update(scores)
    return out


def print_scores(name, scores, baselines):
    """The printed table: a line for the method `name` and for each baseline, with the scores that
    it has."""
    for predictor, values in [(name, scores), *baselines.items()]:
        shown = {k: v for k, v in values.items() if not k.startswith("loss") and "median" not in k}
        run.say(f"{predictor:<26}" + "  ".join(f"{k} {v:.3f}" for k, v in shown.items()))
