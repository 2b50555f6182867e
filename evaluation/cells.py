"""The five task families of single cells with their baselines.

    generation     a cell's expression -> its picture         task_generation
    imputation     four fifths of the genes -> the others     task_imputation
    prediction     a cell's picture -> its expression         task_image_to_genes
    annotation     frozen embedding -> class                  task_labels
    clustering     frozen embedding -> partition              task_labels

Each task scores a method beside the predictors that it has to beat, on the same cells: everything
is fitted on the cells of the part "train" and scored on those of the part "test". Its scores are
those of its network alone; the mean of the network and a ridge is a row of its own,
`network_and_ridge`. The baselines called `_all` read whatever the network reads. What the tasks
need of a method they call through `Method`.

N cells of the file, n scored, G genes, d wide; the dataset is a `plainst.cell_data.CellDataset`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.spatial import cKDTree
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import metrics
from evaluation.cell_baselines import (
    average_with_ridge,
    components,
    density,
    equal_blocks,
    knn,
    niche_means,
    pca_impute,
    pixel_components,
    ridge,
    strips,
)
from evaluation.pictures import (
    N_SHAPES,
    ImageFeatures,
    generated_images,
    morphology,
    stain_channel,
    stain_statistics,
)
from plainst import run

# imputation hides 1/5 of the genes of a cell, each gene once
ROUNDS = 5
# surroundings that a prediction reads: of the niche, of the tissue
LEVELS = {
    "cell": (False, False),
    "niche": (True, False),
    "tissue": (False, True),
    "all": (True, True),
}


@dataclass
class Method:
    """What the tasks ask of a trained method. Embeddings are tensors on the dataset's device.

    embed(modality, hidden=None) -> (N, d): embeddings of all cells, zeros for those in no part;
        modality "img" or "fused"; hidden (N, G) bool on the CPU: genes that are hidden.
    predict_genes(z, rows, level) -> (n, G), (n, q) numpy: standardised expression of the cells
        `rows` read from embeddings z (N, d) of them and of their surroundings, as far as `level`,
        a value of LEVELS, says; and the hidden layer that it is read from.
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
# What several tasks read
# --------------------------------------------------------------------------------------------------


def picture_features(dataset):
    """Classical features of every cell's picture and its density, (N, p), zeros for cells in no
    part; the features are fitted on training pictures. Without pictures the density alone."""
    rows, crops = dataset.used_rows, dataset.cells.crops
    values = density(dataset, rows)
    if dataset.has_pictures:
        features = ImageFeatures().fit(crops[dataset.rows["train"]])
        values = np.hstack([features(crops[rows]), values])
    out = np.zeros((dataset.cells.n_cells, values.shape[1]))
    out[rows] = values
    return out


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


def gene_result(true, levels, guesses, detected, prefix, arrays):
    """TaskResult of predicted expression, each (n, G): levels {level: of the network alone},
    guesses {predictor: of the others}."""
    scores = gene_scores(true, levels["all"], detected, prefix)
    for level in ("cell", "niche", "tissue"):
        alone = gene_scores(true, levels[level], detected, prefix)
        scores[f"{prefix}_{level}_pcc_mean"] = alone[f"{prefix}_pcc_mean"]
    baselines = {name: gene_scores(true, g, detected, prefix) for name, g in guesses.items()}
    return TaskResult(scores, baselines, arrays)


# --------------------------------------------------------------------------------------------------
# Expression -> picture
# --------------------------------------------------------------------------------------------------


def probe_names(channels):
    """Names of the columns of `channel_coverage`."""
    names = []
    for channel in channels:
        if channel == "own":
            names.append("own_area")
        elif channel == "other":
            names += ["other_area", "near_density"]
        else:
            word = "".join(c if c.isalnum() else "_" for c in channel.lower())
            names.append(f"mean_{word}")
    return names


def channel_coverage(images, channels):
    """Numbers of pictures (n, C, S, S) uint8 that a generator should get right, `probe_names`: of
    the masks called `own` and `other` the covered area, of `other` that in the central half, too;
    of a stain its mean over the crop, which is no area of the cell. -> (n, probes)."""
    quarter = images.shape[-1] // 4
    x = images.astype(np.float32) / 255
    columns = []
    for number, channel in enumerate(channels):
        columns.append(x[:, number].mean((1, 2)))
        if channel == "other":
            columns.append(x[:, number, quarter:-quarter, quarter:-quarter].mean((1, 2)))
    return np.stack(columns, 1)


def probe_scores(real, guess, names):
    """{cond_pcc_<probe>: PCC over cells} of a guess of the probes, both (n, probes): a plain
    correlation of pixel means."""
    r = metrics.scored_pcc(real, guess)
    return {f"cond_pcc_{probe}": value for probe, value in zip(names, r)}


def task_generation(dataset, method, seed, draws):
    """genes -> image: PCC of the probes over cells (mean of the draws, one draw, shuffled),
    distances of distributions, round trip."""
    fit, rows, channels = dataset.rows["train"], dataset.rows["test"], dataset.cells.channels
    real_fit, real = dataset.cells.crops[fit], dataset.cells.crops[rows]
    made = method.generate(rows, draws)  # (draws, n, C, S, S)
    names = probe_names(channels)
    probes_fit, probes = channel_coverage(real_fit, channels), channel_coverage(real, channels)
    probes_made = np.stack([channel_coverage(images, channels) for images in made])
    guesses, nearest = probe_guesses(dataset, probes_fit)
    shuffle = np.random.default_rng(seed).permutation(len(rows))
    guesses["shuffled"] = probes_made.mean(0)[shuffle]
    result = TaskResult(probe_scores(probes, probes_made.mean(0), names))
    for name, guess in guesses.items():
        result.baselines[name] = probe_scores(probes, guess, names)
    one = np.mean([metrics.scored_pcc(probes, p) for p in probes_made], 0)
    result.scores |= {f"cond_pcc_{probe}_one_draw": r for probe, r in zip(names, one)}
    for suffix, has_grey in (("", True), ("_shape", False)):
        features = ImageFeatures(has_grey).fit(real_fit)
        f_fit, f_real, f_made = features(real_fit), features(real), features(made[0])
        distances = named_distances(generated_images(f_real, f_made, f_fit, seed), "generated")
        result.scores |= {f"{key}{suffix}": value for key, value in distances.items()}
        for name, index in nearest.items():
            copies = generated_images(f_real, f_fit[index[:, 0]], f_fit, seed)
            distances = named_distances(copies, "retrieval")
            result.baselines[name] |= {f"{key}{suffix}": v for key, v in distances.items()}
        mean = np.tile(np.rint(real_fit.mean(0)).astype(np.uint8), (len(rows), 1, 1, 1))
        of_mean = generated_images(f_real, features(mean), f_fit, seed)
        result.baselines.setdefault("mean_image", {})[f"fd_mean_image{suffix}"] = of_mean["fd"]
        if has_grey:
            result.scores |= round_trip(dataset, f_fit, f_made, f_real)
    result.scores["fd_retrieval"] = result.baselines["retrieval"]["fd_retrieval"]
    low_fit, low_real, low_made = pixel_components(32, real_fit, real, made[0])
    of_pixels = generated_images(low_real, low_made, low_fit, seed)
    result.scores |= {f"{name}_pca": of_pixels[name] for name in ("fd", "fd_floor")}
    result.scores |= truth_scores(dataset, rows, probes_made.mean(0)[:, 0], probes[:, 0])
    result.arrays |= {"generated": made[0], "probes_generated": probes_made}
    result.arrays |= {"probes_real": probes, "probes": np.array(names)}
    return result


def probe_guesses(dataset, probes_fit):
    """{predictor: (n, probes)} of the predictors that read what the generator reads: the cell's own
    expression, and with it the niche's mean (`_context`); and {name: (n, 8)} training cells of
    nearest expression, whose pictures `retrieval` copies."""
    fit, rows = dataset.rows["train"], dataset.rows["test"]
    own = dataset.all_expression().cpu().numpy()  # (N, G + 1)
    beside = niche_means(dataset, own)
    near = equal_blocks([own, beside], fit)
    fold = strips(dataset.cells, fit)
    both = np.concatenate([own, beside], 1)
    nearest = {}
    for name, x in (("retrieval", own), ("retrieval_context", near)):
        nearest[name] = cKDTree(x[fit]).query(x[rows], k=range(1, min(8, len(fit)) + 1))[1]
    guesses = {
        "ridge": ridge(own[fit], probes_fit, own[rows], fold),
        "ridge_context": ridge(both[fit], probes_fit, both[rows], fold),
        "knn": knn(own[fit], probes_fit, own[rows], fold),
        "knn_context": knn(near[fit], probes_fit, near[rows], fold),
    }
    guesses |= {name: probes_fit[index].mean(1) for name, index in nearest.items()}
    return guesses, nearest


def round_trip(dataset, f_fit, f_made, f_real):
    """Expression read back from generated pictures by what real training pictures teach, and from
    the real ones (the ceiling): mean PCC over genes. f_*: features (n, p)."""
    x_fit, x = (dataset.expression_matrix(part)[:, :-1] for part in ("train", "test"))
    fold = strips(dataset.cells, dataset.rows["train"])
    back = ridge(f_fit, x_fit, np.concatenate([f_made, f_real]), fold)
    scores, detected = {}, detected_genes(dataset)
    for name, guess in (("", back[: len(x)]), ("_ceiling", back[len(x) :])):
        r = defined(metrics.scored_pcc(x, guess)[detected])
        scores[f"round_trip_pcc{name}"] = float(np.mean(r))
    return scores


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
    """The fold of every gene (G,) and of every cell (N,), in 0 .. ROUNDS - 1: a gene is hidden in a
    cell in round (gene + cell) % ROUNDS, so each once. A cell's fold is drawn at random: of its
    neighbours one in five hides the same genes in the same round, the others show them."""
    rng = np.random.default_rng([seed, 11])
    gene_fold = rng.permutation(dataset.cells.n_genes) % ROUNDS
    cell_fold = rng.permutation(dataset.cells.n_cells) % ROUNDS
    return gene_fold, cell_fold


def hidden_in_round(gene_fold, cell_fold, number):
    """(N, G) bool tensor: what round `number` of `imputation_folds` hides."""
    return torch.tensor((gene_fold[None] + cell_fold[:, None]) % ROUNDS == number)


def visible_inputs(dataset, gene_fold, cell_fold, fold):
    """What every cell and its niche show in the round that hides the genes of `fold` in the cell:
    own (N, G + 1) expression and depth, hidden values count as the mean, 0; the niche's mean of the
    same; (N, genes) share of the niche that shows a gene. Zeros for cells in no part."""
    n, genes, rows = dataset.cells.n_cells, gene_fold == fold, dataset.used_rows
    niche = dataset.niche.numpy()
    own = np.zeros((n, dataset.cells.n_genes + 1), np.float32)
    beside, share = np.zeros_like(own), np.zeros((n, genes.sum()), np.float32)
    for number in range(ROUNDS):
        hidden = hidden_in_round(gene_fold, cell_fold, number)
        visible = np.zeros_like(own)
        for part in np.array_split(rows, -(-len(rows) // 4096)):
            seen = dataset.expression(part, hidden[part])
            visible[part] = torch.cat(seen, 1).cpu().numpy()
        members = rows[(fold + cell_fold[rows]) % ROUNDS == number]
        own[members] = visible[members]
        shows = ~hidden[:, genes].numpy()
        for part in np.array_split(members, max(1, -(-len(members) // 4096))):
            beside[part] = visible[niche[part]].mean(1)
            share[part] = shows[niche[part]].mean(1)
    return own, beside, share


def task_imputation(dataset, method, seed):
    """A fifth of the genes of a cell is hidden; five rounds, so that every value is predicted
    once."""
    gene_fold, cell_fold = imputation_folds(dataset, seed)
    fit, rows, n_genes = dataset.rows["train"], dataset.rows["test"], dataset.cells.n_genes
    everyone, n_fit = np.concatenate([fit, rows]), len(fit)
    full = {part: dataset.expression_matrix(part)[:, :-1] for part in ("train", "test")}
    # the network alone: every value in the round that hides it
    levels = {level: np.zeros((len(rows), n_genes), np.float32) for level in LEVELS}
    inner = []  # (n, q) of every round
    for number in range(ROUNDS):
        hidden = hidden_in_round(gene_fold, cell_fold, number)
        z, is_asked = method.embed("fused", hidden), hidden[rows].numpy()
        for level, reads in LEVELS.items():
            asked = everyone if level == "all" else rows
            head, layer = method.predict_genes(z, asked, reads)
            levels[level][is_asked] = head[-len(rows) :][is_asked]
        inner.append(layer)
    pictures = picture_features(dataset)
    pictures = [pictures, niche_means(dataset, pictures)]
    names = ("network_and_ridge", "gene_mean", "knn", "knn_all", "neighbours")
    names += ("ridge", "ridge_context", "ridge_all", "pca")
    guesses = {name: np.zeros((len(rows), n_genes)) for name in names}
    strip, inner = strips(dataset.cells, fit), np.stack(inner)  # (n_fit,), (ROUNDS, n, q)
    for fold in range(ROUNDS):
        genes = gene_fold == fold
        own, beside, share = visible_inputs(dataset, gene_fold, cell_fold, fold)
        y = full["train"][:, genes]
        both = np.concatenate([own, beside], 1)
        everything = np.concatenate([own, beside, *pictures], 1)
        near = equal_blocks([own, beside, *pictures], fit)
        linear = both[everyone]
        layer = inner[(fold + cell_fold[everyone]) % ROUNDS, np.arange(len(everyone))]
        i_fit, i_rows = np.arange(n_fit), np.arange(n_fit, len(everyone))
        guesses["network_and_ridge"][:, genes] = average_with_ridge(
            linear, layer, y, levels["all"][:, genes], i_fit, i_rows, strip
        )
        shown = beside[rows][:, :-1][:, genes]
        guesses["neighbours"][:, genes] = shown / share[rows].clip(1 / dataset.niche.shape[1])
        for name, x in (("ridge", own), ("ridge_context", both), ("ridge_all", everything)):
            guesses[name][:, genes] = ridge(x[fit], y, x[rows], strip)
        for name, x in (("knn", own), ("knn_all", near)):
            guesses[name][:, genes] = knn(x[fit], y, x[rows], strip)
        guesses["pca"][:, genes] = pca_impute(full["train"], own[rows][:, :-1], genes)
    arrays = {"imputed": levels["all"], "expression": full["test"]}
    arrays["imputed_with_ridge"] = guesses["network_and_ridge"].astype(np.float32)
    return gene_result(full["test"], levels, guesses, detected_genes(dataset), "impute", arrays)


def task_image_to_genes(dataset, method):
    """image -> genes: from the cell's own picture, and with the pictures of its surroundings; never
    from anyone's expression."""
    fit, rows, crops = dataset.rows["train"], dataset.rows["test"], dataset.cells.crops
    everyone, n_fit, strip = np.concatenate([fit, rows]), len(fit), strips(dataset.cells, fit)
    y, true = (dataset.expression_matrix(part)[:, :-1] for part in ("train", "test"))
    z, levels = method.embed("img"), {}
    for level, reads in LEVELS.items():
        head, layer = method.predict_genes(z, everyone, reads)
        levels[level] = head[n_fit:]
    own = picture_features(dataset)
    beside = niche_means(dataset, own)
    both = np.hstack([own, beside])
    low = np.zeros((dataset.cells.n_cells, 50))
    pixels = pixel_components(50, crops[fit], crops[dataset.used_rows])[1]
    low = np.zeros((dataset.cells.n_cells, pixels.shape[1]))
    low[dataset.used_rows] = pixels
    low_beside = niche_means(dataset, low)
    features = ImageFeatures().fit(crops[fit])
    shape = np.zeros((dataset.cells.n_cells, 12))
    shape[everyone] = np.hstack(
        [
            morphology(crops[everyone][:, 0] / 255, features.thresholds[0]),
            density(dataset, everyone),
        ]
    )
    inputs = {
        "ridge_morphology_density": shape,
        "ridge_image_pca": low,
        "ridge_features_density": own,
        "ridge_features_context": both,
        "ridge_all": np.hstack([both, low, low_beside]),
    }
    guesses = {name: ridge(x[fit], y, x[rows], strip) for name, x in inputs.items()}
    for name, x in (("knn", low), ("knn_all", equal_blocks([own, beside], fit))):
        guesses[name] = knn(x[fit], y, x[rows], strip)
    i_fit, i_rows = np.arange(n_fit), np.arange(n_fit, len(everyone))
    guesses["network_and_ridge"] = average_with_ridge(
        both[everyone], layer, y, levels["all"], i_fit, i_rows, strip
    )
    guesses["gene_mean"] = np.zeros_like(true)
    arrays = {"image_to_genes": levels["all"].astype(np.float32)}
    arrays["image_to_genes_with_ridge"] = guesses["network_and_ridge"].astype(np.float32)
    detected = detected_genes(dataset)
    return gene_result(true, levels, guesses, detected, "image_to_genes", arrays)


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


def classifier(x, y, fold):
    """Logistic regression on z-scored inputs x (n, p), classes y (n,) weighted alike, fitted; its
    penalty is the one of best balanced accuracy on the folds (n,) of the training rows."""

    def fitted(strength, rows):
        model = LogisticRegression(C=strength, class_weight="balanced", max_iter=500)
        return make_pipeline(StandardScaler(), model).fit(x[rows], y[rows])

    strengths, scores = (0.01, 0.1, 1.0), []
    outs = [fold == number for number in np.unique(fold)]
    outs = [is_out for is_out in outs if len(np.unique(y[~is_out])) > 1]
    for strength in strengths:
        guess = np.full(len(y), -1)
        for is_out in outs:
            guess[is_out] = fitted(strength, ~is_out).predict(x[is_out])
        recall = [np.mean(guess[y == label] == label) for label in np.unique(y)]
        scores.append(np.mean(recall))
    return fitted(strengths[int(np.argmax(scores))], np.ones(len(y), bool))


def label_scores(x_fit, x, y_fit, y, n_classes, seed, fold):
    """Scores of inputs x_fit (n_fit, p), x (n, p) by classes y_fit, y, and the clusters (n,) found
    in x: `classifier`; k-means with K = number of classes (oracle)."""
    model = classifier(x_fit, y_fit, fold)
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
    """Annotation (`classifier` on frozen embeddings) and clustering (k-means, K = number of
    classes: oracle) where the file has labels. z {name: (N, d) numpy}: embeddings; the scores of
    `z` bear no suffix, those of the others their name."""
    labels, train, test = dataset.cells.labels, dataset.rows["train"], dataset.rows["test"]
    fit, rows = train[labels[train] >= 0], test[labels[test] >= 0]
    n_classes, result, fold = len(dataset.cells.classes), TaskResult(), strips(dataset.cells, fit)
    if not len(rows) or len(np.unique(labels[fit])) < 2:
        return result
    for name, x in (z | label_baselines(dataset)).items():
        parts = x[fit], x[rows], labels[fit], labels[rows]
        scores, cluster = label_scores(*parts, n_classes, seed, fold)
        scores["clustering_coherence"] = coherence(dataset, rows, cluster)
        if name in z:
            suffix = "" if name == "z" else f"_{name}"
            result.scores |= {f"{key}{suffix}": value for key, value in scores.items()}
        else:
            result.baselines[name] = scores
    return result


def label_baselines(dataset):
    """{name: (N, p)} inputs of the same classifier: principal components of expression, of pixels,
    both, and each with density and the niche's means; of the picture alone `picture_shape`, the
    shape of what its first channel shows, and where there is a stain `picture_stain`, eleven
    numbers of it, and both."""
    fit, used = dataset.rows["train"], dataset.used_rows
    expression = components(dataset.all_expression().cpu().numpy(), fit, 30)
    crowding = np.zeros((len(expression), 2))
    crowding[used] = density(dataset, used)
    niche = np.hstack([expression, crowding, niche_means(dataset, expression)])
    inputs = {"pca_expression": expression, "pca_expression_niche": niche}
    if dataset.has_pictures:
        inputs |= picture_baselines(dataset, expression, crowding)
    return inputs


def picture_baselines(dataset, expression, crowding):
    """Those of `label_baselines` that read pictures; expression (N, q), crowding (N, 2)."""
    fit, used, crops = dataset.rows["train"], dataset.used_rows, dataset.cells.crops
    image = np.zeros((len(expression), min(50, len(fit) - 1, crops[:1].size)))
    image[used] = pixel_components(50, crops[fit], crops[used])[1]
    both = np.hstack([expression, image])
    surroundings = np.hstack([both, crowding, niche_means(dataset, both)])
    inputs = {"pca_image": image, "pca_both": both, "pca_both_niche": surroundings}
    threshold = ImageFeatures().fit(crops[fit]).thresholds[0]
    shape = morphology(crops[used][:, 0] / 255, threshold)[:, :N_SHAPES]
    pictures = {"picture_shape": shape}
    stained = stain_channel(dataset.cells.channels)
    if stained is not None:
        inside = crops[used][:, 0] / 255 > threshold
        pictures["picture_stain"] = stain_statistics(crops[used][:, stained] / 255, inside)
        pictures["picture_shape_stain"] = np.hstack([shape, pictures["picture_stain"]])
    for name, values in pictures.items():
        inputs[name] = np.zeros((len(both), values.shape[1]))
        inputs[name][used] = values
    return inputs


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
