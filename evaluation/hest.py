"""The protocol of H&E -> genes, for every method that predicts genes from patches: which slides
train and test, which genes are predicted, on which scale, and how a prediction is scored.

A sample is any object with the fields

    name, patient, slide    of one slide with S spots
    scored   (S,) bool      spots with enough counts
    measured (G,) bool      genes on the slide's panel
    y        (S, G)         what is to be predicted; None for a slide without counts

as numpy arrays or as tensors on the CPU; `config` is any configuration with the flags of
stformer.py and cmrcnet.py that are named.
"""

import copy
import re
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import metrics
from data import Split, common_genes, hvg_seurat, image_features, mean_var, normalise_log1p
from plainst import run
from plainst.readers.checked import DataError, read_gene_list, read_npz
from plainst.readers.patches import (
    hest_genes,
    hest_samples,
    hest_split,
    load_hest,
    load_patch_folder,
)

MARKERS = {
    "breast": "ERBB2 ESR1 PGR EPCAM KRT5 KRT7 KRT8 KRT14 ACTA2 PECAM1 CD3E CD4 CD8A MS4A1 CD68 LUM",
    # stated before any training
    "colorectal": (
        "EPCAM CEACAM5 MUC2 KRT20 CDX2 OLFM4 LGR5 PECAM1 CD3E CD4 CD8A MS4A1 CD68 LUM COL1A1 ACTA2"
    ),
}
# probes of panels that are no genes
CONTROLS = re.compile("(NegControl|BLANK|antisense|Unassigned|Deprecated)", re.IGNORECASE)


# --------------------------------------------------------------------------------------------------
# Which slides train and test, which genes are predicted
# --------------------------------------------------------------------------------------------------


def hest_partition(root, by="folds", fold=0, patient="", sample=""):
    """Which slides of a HEST folder train and which are scored: by `folds` (splits/*_<fold>.csv),
    `patient`, `section` (one slide held out, the others of its patient train) or `sample` (one
    slide held out, all others train).

    Returns Split over the folder's slides, train names, test names, the run's folder name, whether
    it leaks the patient. A slide without a known patient may be of any: with one on either side the
    split leaks, and its detail names it.

    Raises DataError where a side would be empty or a slide has no file.
    """
    if by == "folds":
        train_names, test_names = hest_split(root, fold)
        part, detail = f"fold{fold}", f"splits/{{train,test}}_{fold}.csv"
    names = hest_samples(root)
    known = {n: load_hest(root, n, patches=False, counts=False).patient for n in names}
    of = {n: known[n] or n for n in names}
    if by == "patient":
        test_names = [n for n in names if of[n] == patient]
        train_names = [n for n in names if n not in test_names]
        # names a folder; the patient's name may hold a /
        part, detail = re.sub(r"[^\w.+-]|^\.+", "_", patient), f"patient {patient} held out"
    elif by == "section":
        test_names = [n for n in names if n == sample]
        train_names = [n for n in names if n not in test_names and of[n] == of.get(sample)]
        part, detail = (
            sample,
            f"section {sample} held out, the others of patient {of.get(sample)} train",
        )
    elif by == "sample":
        test_names, train_names = (
            [n for n in names if n == sample],
            [n for n in names if n != sample],
        )
        part, detail = sample, f"section {sample} held out, all others train"
    missing = [n for n in [*train_names, *test_names] if n not in of]
    if missing or not train_names or not test_names:
        wanted = {
            "folds": f"--fold {fold}",
            "patient": f"--patient {patient!r}",
            "section": f"--slice {sample!r}",
            "sample": f"--slice {sample!r}",
        }[by]
        there = ", ".join(
            f"{p}: {' '.join(n for n in names if of[n] == p)}" for p in sorted(set(of.values()))
        )
        raise DataError(
            f"{root}: {wanted} leaves {len(train_names)} slides to train on and "
            f"{len(test_names)} to score, "
            f"{len(missing)} of them without a file: choose from {there}"
        )
    shared = {of[n] for n in train_names} & {of[n] for n in test_names}
    unknown = [n for n in [*train_names, *test_names] if not known[n]]
    leaks = bool(shared or unknown)
    if shared:
        detail += ", other slides of the same patient train: leaks the patient"
    if unknown:
        detail += (
            f", patient of {', '.join(unknown)} unknown (name it in {Path(root) / 'metadata.csv'}, "
            "columns id,patient): may leak the patient"
        )
    if not leaks:
        detail += ", no patient on both sides"
    sides = np.isin(names, train_names), np.isin(names, test_names)
    return (
        Split(by, sides[0], np.zeros(len(names), bool), sides[1], leaks, detail),
        train_names,
        test_names,
        part,
        leaks,
    )


def target_genes(spec, slides, root, min_counts=100):
    """Names of the genes to predict: `task` (the folder's var_50genes.json), a number (so many most
    variable genes of the training `slides`), or the path of a JSON list. Raises DataError for a
    gene without a count in any training slide."""
    if spec == "task":
        genes = hest_genes(root)
    elif spec.isdigit():
        total = {}
        for s in slides:
            rows = np.asarray(s.counts.sum(1)).ravel() >= min_counts
            for g, v in zip(s.genes, mean_var(normalise_log1p(s.counts[np.flatnonzero(rows)]))[1]):
                total[g] = total.get(g, 0.0) + v
        genes = [str(g) for g in sorted(total, key=lambda g: -total[g])[: int(spec)]]
    else:
        genes = read_gene_list(spec)
    seen = set()
    for s in slides:
        seen.update(s.genes[np.asarray(s.counts.sum(0)).ravel() > 0])
    silent = [g for g in genes if g not in seen]
    if silent or not genes:
        raise DataError(
            f"{root}: {len(silent)} of the {len(genes)} target genes ({', '.join(silent[:3])} "
            "...) have no count in any training "
            "slide: take them off the list or add slides"
        )
    return genes


def target_expression(slide, genes, target="cp10k"):
    """y (N, G) float32: log1p of counts per 10,000 (`cp10k`) or of raw counts (`log1p`), counts (N,
    G), library (N,), measured (G,) bool. A gene that the panel lacks is 0 and unmeasured; where a
    symbol stands twice the first is taken."""
    column = {g: j for j, g in reversed(list(enumerate(slide.genes)))}
    columns = np.array([column.get(g, -1) for g in genes])
    library = slide.library_size
    if library is None:
        library = np.asarray(slide.counts.sum(1), np.float64).ravel()
    counts = slide.counts.tocsc()[:, np.maximum(columns, 0)].tocsr()
    y = normalise_log1p(counts, library) if target == "cp10k" else counts.log1p()
    y, counts = y.toarray(), counts.toarray()
    y[:, columns < 0], counts[:, columns < 0] = 0, 0
    return *(np.asarray(a, np.float32) for a in (y, counts, library)), columns >= 0


def enough_counts(slide, min_counts):
    """(S,) bool, spots with enough counts. Raises DataError for a slide with fewer than two."""
    library = slide.library_size
    if library is None:
        library = np.asarray(slide.counts.sum(1)).ravel()
    scored = library >= min_counts
    if scored.sum() < 2:
        raise DataError(
            f"slide {slide.sample} has {scored.sum()} spots with {min_counts} counts or more: "
            "leave it out or lower --min_counts"
        )
    return scored


def permuted_pairs(n_spots, seed):
    """(S,) rows of a slide in random order: the control of all methods takes the image of a
    training spot from one row and its expression from the other, within its slide."""
    return np.random.default_rng([seed, n_spots]).permutation(n_spots)


def shared_genes(slides):
    """Genes that all slides measure, without the control probes of panels, sorted (a set's order
    changes from run to run)."""
    genes = [str(g) for g in common_genes(slides) if not CONTROLS.match(g)]
    if not genes:
        raise DataError(
            f"slides {', '.join(s.sample for s in slides)} share control probes only: check "
            "the panels"
        )
    return sorted(genes)


def log_expression(slide, genes, target="cp10k"):
    """(S, len(genes)) CSR of log1p values of genes that the slide measures; the library is of all
    its genes."""
    column = {g: j for j, g in reversed(list(enumerate(slide.genes)))}
    if target == "cp10k":
        values = normalise_log1p(slide.counts, slide.library_size)
    else:
        values = slide.counts.astype(np.float32).log1p()
    return values.tocsc()[:, [column[g] for g in genes]].tocsr()


def variable_genes(slides, n_hvg, min_counts):
    """Union of the n_hvg highly variable genes of every slide among those that all measure,
    sorted."""
    genes = np.array(shared_genes(slides))
    chosen = set()
    for s in slides:
        x = log_expression(s, genes)[enough_counts(s, min_counts)]
        chosen.update(genes[hvg_seurat(x, min(n_hvg, len(genes)))].tolist())
    return sorted(chosen)


def gene_lists(slides, genes, min_counts, target, markers, n=50):
    """{heg, hvg, marker: names} out of `genes`: largest mean log expression, largest variance over
    the spots of `slides`; the stated markers (a key of MARKERS, or names joined by commas)."""
    x = sp.vstack(
        [log_expression(s, genes, target)[enough_counts(s, min_counts)] for s in slides]
    ).tocsr()
    mean, var = mean_var(x)
    wanted = MARKERS[markers].split() if markers in MARKERS else markers.split(",")
    return {
        "heg": [genes[j] for j in np.argsort(-mean, kind="stable")[:n]],
        "hvg": [genes[j] for j in np.argsort(-var, kind="stable")[:n]],
        "marker": [g for g in wanted if g in set(genes)],
    }


def genes_to_read(spec, targets, available):
    """Names to read out of an atlas with the genes `available`: task = `targets`, all, or a JSON
    list. Raises DataError for a gene that is not there."""
    if spec in ("task", "all"):
        genes = {"task": targets, "all": available}[spec]
    else:
        genes = read_gene_list(spec)
    absent = [g for g in genes if g not in set(available)]
    if absent or not genes:
        raise DataError(
            f"the atlas lacks {len(absent)} of the {len(genes)} genes asked for "
            f"({', '.join(absent[:3])} ...): take them off the list"
        )
    return genes


# --------------------------------------------------------------------------------------------------
# Slides and their image features
# --------------------------------------------------------------------------------------------------


def has_feature_files(encoder):
    """Whether --encoder names files of features, not a model."""
    return Path(encoder).suffix in (".npy", ".npz")


def load_slides(root, names, patches=True):
    """{name: Slide} of a HEST folder; `patches`: whether the pictures are needed."""
    return {n: load_hest(root, n, patches=patches) for n in names}


def new_slides(config, known, pixels=False):
    """[Slide] of --data for --predict. The flags `known` of the training run take from `config`
    those that say where the new slides are and where to compute.

    pixels: the network reads patches, whatever the encoder.
    """
    for name in ("data", "slice", "cache", "device"):
        setattr(known, name, getattr(config, name))
    if config.encoder != type(config).encoder:
        known.encoder = config.encoder
    need = pixels or not has_feature_files(known.encoder)
    slides = load_patch_folder(known.data, known.slice, need)
    if Path(slides[0].source).suffix == ".npz":
        known.encoder = str(Path(known.data) / "{sample}.npz")
    return slides


def slide_features(config, slide):
    """(S, F) float32 frozen image features. Raises DataError on NaN and on patches that are not
    RGB."""
    if slide.patches is not None and slide.patches.shape[-1] != 3:
        raise DataError(
            f"{slide.patches.path} holds patches of shape {slide.patches.shape[1:]}: they "
            "must be uint8 RGB, (h, w, 3)"
        )
    encoder = config.encoder.replace("{sample}", slide.sample)
    x = image_features(
        slide,
        encoder,
        cache=config.cache or Path(config.data) / ".features",
        device=str(run.pick_device(config.device)),
    )
    finite = np.isfinite(x).all(1)
    if not finite.all():
        raise DataError(
            f"the features of slide {slide.sample} from {encoder} hold NaN or infinity in "
            f"{(~finite).sum()} spots: make them again"
        )
    return torch.tensor(x)


def check_width(x, width, name, encoder, checkpoint):
    """Raise DataError where the features x (S, F) of slide `name` are not as wide as those that the
    checkpoint was trained on."""
    if x.shape[1] != width:
        raise DataError(
            f"slide {name} has {x.shape[1]} features ({encoder}), the checkpoint {checkpoint} was "
            f"trained on {width}: make the features with the encoder of the training run"
        )


def say_what_is_left_out(sample, min_counts, n_targets=None):
    """Print how many spots of a sample are not scored and how many targets it lacks, if any."""
    scored, measured = np.asarray(sample.scored), np.asarray(sample.measured)[:n_targets]
    if not (scored.all() and measured.all()):
        run.say(
            f"{sample.name}: {(~scored).sum()} of {len(scored)} spots have fewer than {min_counts} "
            f"counts and are not scored; {(~measured).sum()} target genes are not on its panel"
        )


def task_files(config):
    """Files of a HEST folder, beside its slides, whose content can change a number of a run: the
    tables of its fold, its list of genes, and the truth of a simulated task."""
    root, files = Path(config.data), []
    if config.split == "folds":
        files += [root / "splits" / f"{side}_{config.fold}.csv" for side in ("train", "test")]
    if config.genes == "task":
        files.append(root / "var_50genes.json")
    elif not config.genes.isdigit():
        files.append(Path(config.genes))
    truth = root / "truth.npz"
    return [*files, truth] if truth.is_file() else files


# --------------------------------------------------------------------------------------------------
# Scales: of features and of targets, from the scored training spots
# --------------------------------------------------------------------------------------------------


def mean_and_std(parts):
    """Mean and standard deviation (F,) float32 over the rows of all tensors (n, F)."""
    x = torch.cat(parts).double()
    return x.mean(0).float(), x.std(0, correction=0).clamp(min=1e-6).float()


def scaled_features(x, mean, std, scale):
    """x (S, F) z-scored by the training spots (`train`), by the slide's own spots (`slide`), or
    both side by side, (S, 2 F)."""
    if scale == "both":
        return torch.cat([scaled_features(x, mean, std, by) for by in ("train", "slide")], 1)
    if scale == "slide":
        mean, std = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
    return (x - mean) / std


def target_statistics(samples, by="train"):
    """{y_mean, y_std, rate: (G,) float32} over the scored spots of the samples that measure the
    gene: mean and spread of the target (within slides where by = "slide"), and mean counts per
    10,000. The samples also have `counts` (S, G) and `library` (S,); all tensors."""

    def total(value):
        """Sum of value(sample) (S, G) over scored spots and measured genes."""
        return sum(value(s)[s.scored].sum(0, dtype=torch.float64) * s.measured for s in samples)

    n = total(lambda s: torch.ones_like(s.y)).clamp(min=1)  # (G,)
    mean = total(lambda s: s.y) / n
    centre = {
        s.name: (mean if by == "train" else s.y[s.scored].mean(0, dtype=torch.float64)).float()
        for s in samples
    }
    std = (total(lambda s: (s.y - centre[s.name]).square()) / n).sqrt()
    rate = total(lambda s: s.counts / s.library[:, None] * 1e4) / n
    return {
        "y_mean": mean.float(),
        "y_std": torch.where(std > 1e-6, std, 1.0).float(),
        "rate": rate.clamp(min=1e-3).float(),
    }


def standardise_targets(y, mask, mean, std, by):
    """Targets (B, S, G) in units of their spread over the training spots (`train`), or z-scored
    within each slide over the places of the mask (`slide`)."""
    if by == "train":
        return (y - mean) / std
    n = mask.sum(1, keepdim=True).clamp(min=1)
    centred = (y - (y * mask).sum(1, keepdim=True) / n) * mask
    return centred / ((centred.square().sum(1, keepdim=True) / n).sqrt() + 1e-3)


def fill_unmeasured(y, measured):
    """y (N, G) with genes that a slide lacks at their mean over the other slides, and that mean
    (G,) float64; measured (N, G) bool."""
    n = np.maximum(measured.sum(0), 1)
    mean = (y * measured).sum(0, dtype=np.float64) / n
    return np.where(measured, y, mean.astype(y.dtype)), mean


# --------------------------------------------------------------------------------------------------
# Validation inside the training slides
# --------------------------------------------------------------------------------------------------


def inner_folds(samples, n, place):
    """[(fit, validation samples)], n folds at most: each leaves out other patients, or slides where
    there is one patient, or tiles of 4 x 4 pitches of an only slide.

    place: sample -> (S, 2) positions in lattice pitches.
    """
    if n < 1:
        return []
    names = [s.patient for s in samples]
    if len(set(names)) == 1:
        names = [s.name for s in samples]
    groups = sorted(set(names), key=names.index)
    if len(groups) > 1:
        number = {s.name: groups.index(g) for s, g in zip(samples, names)}
        n = min(len(groups), max(n, 2))
        held_out = [
            {s.name: np.full(len(s.scored), number[s.name] % n == f) for s in samples}
            for f in range(n)
        ]
    else:
        xy = np.asarray(place(samples[0]))  # (S, 2)
        tile = ((xy - xy.min(0)) // 4).astype(int)
        fold = (tile[:, 0] + 2 * tile[:, 1]) % 5  # (S,)
        held_out = [{samples[0].name: fold == f} for f in range(min(n, 5))]
    folds = [divided(samples, masks) for masks in held_out]
    return [(fit, val) for fit, val in folds if fit and val]


def divided(samples, masks):
    """Copies of the samples to fit and to validate on: masks {name: (S,) bool} are the spots of the
    second side. A slide with fewer than two scored spots on a side is left out there."""
    sides = []
    for is_fit in (True, False):
        side = [copy.copy(s) for s in samples]
        for s in side:
            mask = ~masks[s.name] if is_fit else masks[s.name]
            s.scored = s.scored & (torch.from_numpy(mask) if torch.is_tensor(s.scored) else mask)
        sides.append([s for s in side if s.scored.sum() > 1])
    return sides


def smooth(curve, reach=2):
    """Mean over `reach` epochs before and after: the best epoch of a few slides is then not the
    luckiest one."""
    kernel = np.ones(2 * reach + 1)
    if len(curve) < len(kernel):
        return np.asarray(curve)
    n = np.convolve(np.ones_like(curve), kernel, "same")
    return np.convolve(curve, kernel, "same") / n


def best_epochs(histories):
    """Number of epochs with the best validation score, which stands last in every row of a history,
    and that score: of the smoothed mean over the folds."""
    scores = [[row[-1] for row in history] for history in histories]  # (folds, epochs)
    curve = smooth(np.mean(scores, axis=0))
    return int(curve.argmax()) + 1, float(curve.max())


# --------------------------------------------------------------------------------------------------
# Scores
# --------------------------------------------------------------------------------------------------


def scored_rows(samples, values, kind=None):
    """The scored rows of values [(S, G)], one slide below the other: (N, G)."""
    pairs = zip(samples, values)
    return np.concatenate([np.asarray(v, kind)[np.asarray(s.scored)] for s, v in pairs])


def stacked(samples, predictions):
    """True and predicted values (N, G) float32 of the scored spots, measured (N, G) bool, slide
    (N,)."""
    true = scored_rows(samples, [s.y for s in samples], np.float32)
    sizes = [int(s.scored.sum()) for s in samples]
    measured = [np.tile(np.asarray(s.measured), (n, 1)) for s, n in zip(samples, sizes)]
    slide = np.repeat([s.name for s in samples], sizes)
    predicted = scored_rows(samples, predictions, np.float32)
    return true, predicted, np.concatenate(measured), slide


def score(samples, predictions, rates=None, n_targets=None):
    """metrics.pcc_summary of the first n_targets genes over the scored spots, with pcc_mean (within
    slides) and pcc_pooled (all test slides together, as the HEST benchmark has it, there with
    target log1p); rate_pcc: pcc_mean against the noise-free `rates` of simulated slides."""
    true, predicted, measured, slide = stacked(samples, predictions)
    t = slice(0, n_targets)
    scores = metrics.pcc_summary(true[:, t], predicted[:, t], slide, measured[:, t])
    if rates is not None:
        rates = scored_rows(samples, rates)
        against = metrics.pcc_summary(rates[:, t], predicted[:, t], slide, measured[:, t])
        scores["rate_pcc"] = against["pcc_mean"]
    return scores


def slide_mean_scores(samples, predictions):
    """How well the slide's mean is met: slide_mean_rmse, slide_mean_pcc (over genes)."""
    errors, correlations = [], []
    for s, predicted in zip(samples, predictions):
        rows, measured = np.asarray(s.scored), np.asarray(s.measured)
        true = np.asarray(s.y)[rows].mean(0)[measured]  # (G,)
        predicted = np.asarray(predicted)[rows].mean(0)[measured]
        errors.append(np.sqrt(np.mean((true - predicted) ** 2)))
        correlations.append(metrics.pcc(true[:, None], predicted[:, None])[0])
    return {
        "slide_mean_rmse": float(np.mean(errors)),
        "slide_mean_pcc": float(np.mean(correlations)),
    }


def gene_list_scores(samples, predictions, genes, lists):
    """pcc_heg, pcc_hvg, pcc_marker: mean PCC of the genes on the slide's lists {slide: {heg, hvg,
    marker: names}}; gene_gene_*: agreement of the correlations among the HEG."""
    true, predicted, _, slide = stacked(samples, predictions)
    column, scores = {g: j for j, g in enumerate(genes)}, {}
    for name in ("heg", "hvg", "marker"):
        means, agreement = [], []
        for s in samples:
            columns = [column[g] for g in lists[s.name][name] if s.measured[column[g]]]
            if columns:
                pair = [a[slide == s.name][:, columns] for a in (true, predicted)]
                means.append(metrics.pcc_summary(*pair)["pcc_mean"])
                agreement.append(metrics.gene_gene_agreement(*pair))
        scores[f"pcc_{name}"] = float(np.mean(means)) if means else float("nan")
        if name == "heg" and agreement:
            scores |= {
                f"gene_gene_{k}": float(np.mean([a[k] for a in agreement])) for k in agreement[0]
            }
    return scores


def slide_accuracy(embedding, slide, seed=0):
    """Balanced accuracy of telling the training slides apart from an embedding, by 5-fold logistic
    regression on at most 2,000 spots: 1 / slides where it holds no trace of the slide. nan where
    there is one slide."""
    rows = np.random.default_rng(seed).permutation(len(slide))[:2000]
    code, count = np.unique(slide[rows], return_counts=True)
    rows = rows[np.isin(slide[rows], code[count >= 5])]
    if len(np.unique(slide[rows])) < 2:
        return float("nan")
    classes, true = np.unique(slide[rows], return_inverse=True)
    prob = cross_val_predict(
        make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=200)),
        embedding[rows],
        true,
        cv=5,
        method="predict_proba",
    )
    return metrics.classification(true, prob)["balanced_accuracy"]


def simulated_rates(root, samples, genes, normalised):
    """[expression (S, G) without noise] of a simulated task (truth.npz beside it), None for any
    other: log1p of counts per 10,000, or, not `normalised`, log mean counts up to a constant of the
    gene."""
    path = Path(root) / "truth.npz"
    if not path.is_file():
        return None
    keys = ("genes", "base", "weights", *(f"z_{s.name}" for s in samples))
    names, base, weights, *programs = read_npz(path, *keys)
    column = [names.tolist().index(g) for g in genes]
    if not normalised:
        return [z @ weights[:, column] for z in programs]
    rates = (np.exp(base + z @ weights) for z in programs)
    return [np.log1p(m / m.sum(1, keepdims=True) * 1e4)[:, column] for m in rates]


def table_row(name, scores, columns):
    """One row of the printed table: the columns that there are."""
    return f"{name:<24}" + "  ".join(f"{k} {scores[k]:6.3f}" for k in columns if k in scores)


def spot_arrays(samples, predictions, genes):
    """What arrays.npz holds of every method: spots of all slides one below the other."""
    arrays = {
        "slide": np.repeat([s.name for s in samples], [s.slide.n_spots for s in samples]),
        "barcodes": np.concatenate([s.slide.barcodes for s in samples]),
        "xy": np.concatenate([s.slide.xy for s in samples]),
        "genes": np.array(genes),
        "pred": np.concatenate(predictions).astype(np.float32),
    }
    if samples[0].y is not None:
        arrays["true"] = np.concatenate([np.asarray(s.y) for s in samples])
        arrays["scored"] = np.concatenate([np.asarray(s.scored) for s in samples])
    return arrays
