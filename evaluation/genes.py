"""A run of a network that predicts the genes of patches by way of pathway scores: flags, slides,
baselines, members, scores, and the prediction of new slides.

What is the method's own comes from it: `train`, as in stformer.py, and `build`(config, dim_in,
n_genes, n_pathways), which makes the network.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import metrics
from data import DataError
from evaluation import figures, hest
from evaluation.samples import Scaler, predict, to_sample
from plainst import run
from plainst.features import input_files
from plainst.jobs import Job, Jobs

# columns of the printed table
COLUMNS = (
    *("pcc_mean", "pcc_pooled", "variance_ratio_median", "rmse", "slide_mean_rmse", "rate_pcc"),
)

# --------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------


def check(config, quadrants):
    """Raise DataError, naming the flag, for a value that no run can use, or for one that does
    nothing beside the others. quadrants: the names that --interactions may have."""
    rules = dict.fromkeys(("pathways", "epochs", "members", "batch"), run.AT_LEAST_ONE)
    at_least_zero = ("fold", "min_counts", "rings", "pcc_weight", "lambda_pathway", "save_every")
    rules |= dict.fromkeys(at_least_zero, run.AT_LEAST_ZERO)
    rules |= {
        "lr": run.POSITIVE,
        "dropout": (lambda v: 0 <= v < 1, "from 0 to below 1"),
        "folds": (lambda v: v == 0 or v >= 2, "0, or 2 or more"),
    }
    run.check_flags(config, rules)
    run.refuse_idle_flags(config, idle_flags(config, quadrants_of(config, quadrants)))
    if config.head == "softplus" and config.loss != "zinb" and config.target_scale != "none":
        raise DataError(
            f"--head softplus gives no negative value, as --target_scale {config.target_scale} "
            "asks for: give --head linear or --target_scale none"
        )
    has_correlation = config.loss in ("pcc", "mse_pcc") or config.lambda_pathway > 0
    if config.mode == "global" and has_correlation and config.batch < 2:
        raise DataError(
            f"--mode global with --loss {config.loss} and --lambda_pathway "
            f"{config.lambda_pathway:g} correlates the slides of a batch: give --batch 2 or more, "
            "or --loss mse and --lambda_pathway 0"
        )


def idle_flags(config, quadrants):
    """Rules for the flags that do nothing beside the others, as `run.refuse_idle_flags` takes
    them. --rings still rules the baselines."""
    if config.predict:
        return [run.idle_with_predict(config, ())]
    split, has_h2h = f"with --split {config.split}", "h2h" in quadrants
    is_local = has_h2h and config.h2h == "local" and config.rings > 0
    has_pcc = config.loss in ("pcc", "mse_pcc")
    return [
        (config.split != "folds", split, ("fold",)),
        (config.split != "patient", split, ("patient",)),
        (config.split != "section", split, ("slice",)),
        (not has_h2h, f"with --interactions {config.interactions}", ("h2h",)),
        (not is_local, "without local h2h of a ring or more", ("distance_bias",)),
        (not config.gene_sets, "without --gene_sets", ("shuffle_sets", "lambda_pathway")),
        (bool(config.gene_sets), "with --gene_sets", ("pathways",)),
        (not has_pcc, f"with --loss {config.loss}", ("pcc_weight",)),
        (config.loss == "zinb", "with --loss zinb", ("head", "target_scale")),
    ]


def quadrants_of(config, quadrants):
    """`p2p,h2p` of --interactions -> ("p2p", "h2p"), `all` -> all `quadrants`. Raises DataError for
    an unknown name."""
    text = config.interactions
    names = quadrants if text == "all" else tuple(text.split(","))
    if not set(names) <= set(quadrants):
        raise DataError(
            f"--interactions {text} is not a comma-separated choice of {', '.join(quadrants)}: "
            "correct it"
        )
    return names


def variant(config):
    """Folder name of the run: split where it is not the folder's own, size, and every other flag
    that is not at its default."""
    words = [config.size]
    if config.split != "folds":
        words = [config.split, *words]
    return run.variant(config, words, ("split", "fold", "patient", "size", "fast"))


# --------------------------------------------------------------------------------------------------
# Gene sets
# --------------------------------------------------------------------------------------------------


def read_gmt(path, genes, rng=None):
    """GMT file -> set names, membership (P, G) float32 of the sets with a gene on the list; with
    `rng` the genes are permuted (control)."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read as a GMT file ({error}): give name, description and "
            "genes, tab-separated"
        ) from error
    rows = [line.rstrip("\n").split("\t") for line in lines if line.strip()]
    member = np.array([np.isin(genes, row[2:]) for row in rows], np.float32)
    member = member.reshape(len(rows), len(genes))
    has_gene = member.any(1)
    if not has_gene.any():
        raise DataError(
            f"{path} has no set with one of the {len(genes)} target genes: check species, "
            "gene naming and the tab-separated format"
        )
    member = member[has_gene]
    if rng is not None:
        member = member[:, rng.permutation(len(genes))]
    return [row[0] for row, is_used in zip(rows, has_gene) if is_used], torch.tensor(member)


# --------------------------------------------------------------------------------------------------
# The task: slides, genes, split
# --------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """What one training reads: slides to fit and to validate on with features scaled, and all that
    is fitted on the former alone."""

    fit: list  # [Sample]
    val: list  # [Sample]
    scaler: Scaler
    # names of the genes (G,) and of the gene sets
    genes: list
    sets: list
    # (P, G) or None
    member: torch.Tensor

    def widths(self, config):
        """Features of a patch, genes, pathways."""
        return self.fit[0].x.shape[1], len(self.genes), len(self.sets) or config.pathways


class Task:
    """What a run trains on and is scored on.

    `raw`: {name: Sample}, features unscaled; `genes`: names (G,); `all`: the `Part` of all training
    slides; `test`: [Sample] scored, features scaled; `rates`: noise-free expression of simulated
    test slides, or None.
    """

    def __init__(self, config):
        self.config, self.is_bag = config, config.mode == "global"
        self.split, self.train_names, self.test_names, self.part, self.leaks = hest.hest_partition(
            config.data, config.split, config.fold, config.patient, config.slice
        )

    def load(self):
        """Read the slides; prints what is left out of them."""
        c = self.config
        if run.processes()[1] > 1 and (c.save_every or c.resume):
            raise DataError(
                "several processes write no checkpoints: leave --save_every and --resume away, "
                "or start one process"
            )
        if run.processes()[1] > 1 and c.gene_sets and c.genes.isdigit():
            raise DataError(
                "several processes share no inner folds whose gene sets differ: give a list of "
                "genes with --genes, or start one process"
            )
        self.raw, self.genes = load(c, self.train_names, self.test_names)
        if c.permute_pairs:
            self.raw |= {n: shuffled_pairs(self.raw[n], c.seed) for n in self.train_names}
        self.all = self.part_of(self.training_slides(), [])
        test = [self.raw[n] for n in self.test_names]
        self.test = [self.all.scaler.features(s, c.scale) for s in test]
        self.rates = hest.simulated_rates(c.data, test, self.genes, normalised=False)

    def training_slides(self):
        """[Sample] of the training side, features unscaled."""
        return [self.raw[n] for n in self.train_names]

    def inner_parts(self, n_folds):
        """[Part] of the cross-validation inside the training slides; empty with 0 folds."""
        slides = self.training_slides()
        folds = hest.inner_folds(slides, n_folds, lambda s: s.place)
        if self.config.folds and not folds:
            raise DataError(
                f"slide {slides[0].name} is too small to train on alone: give more training slides"
            )
        return [self.part_of(fit, val) for fit, val in folds]

    def part_of(self, fit, val):
        """`Part` of slides with unscaled features. Where the most variable genes are predicted,
        those of the spots to fit are chosen."""
        c, genes = self.config, self.genes
        if val and c.genes.isdigit():
            slides = [s.slide.subset(np.flatnonzero(s.scored)) for s in fit]
            genes = hest.target_genes(c.genes, slides, c.data, c.min_counts)
            fit = [with_targets(s, genes, c.target) for s in fit]
            val = [with_targets(s, genes, c.target) for s in val]
        sets, member = [], None
        if c.gene_sets:
            rng = np.random.default_rng(c.seed) if c.shuffle_sets else None
            sets, member = read_gmt(c.gene_sets, genes, rng)
        scaler = Scaler.fit(fit, c.target_scale)
        fit, val = ([scaler.features(s, c.scale) for s in side] for side in (fit, val))
        return Part(fit, val, scaler, genes, sets, member)

    def files(self):
        """Files whose content can change a number of the run."""
        slides = [self.raw[n].slide for n in [*self.train_names, *self.test_names]]
        more = [*hest.task_files(self.config), self.config.gene_sets]
        return input_files(slides, self.config.encoder, more)

    def test_slides(self):
        """[Slide] of the test side."""
        return [s.slide for s in self.test]

    def describe(self):
        """One line: what is trained on and scored."""
        tokens = f"{self.config.pathways} tokens without gene sets"
        if self.all.sets:
            tokens = f"{len(self.all.sets)} gene sets with a target gene"
        n_features = self.raw[self.test_names[0]].x.shape[1]
        return (
            f"{self.part}: {self.split.detail}; train {' '.join(self.train_names)}, "
            f"test {' '.join(self.test_names)}; {len(self.genes)} genes, {n_features} features, "
            f"{tokens}"
        )

    def facts(self):
        """What the record says of the task."""
        c = self.config
        low = {n: int((~s.scored).sum()) for n, s in self.raw.items()}
        chosen = "training slides"
        if c.genes == "task":
            chosen = "the folder's list, chosen by its makers on all slides"
        reads_all = c.h2h == "whole" and ("h2h" in c.interactions or c.interactions == "all")
        return {
            "grows_with": "spots squared, by h2h whole" if reads_all else "spots",
            "target": c.target,
            "leaks_patient": self.leaks,
            "train_slides": self.train_names,
            "test_slides": self.test_names,
            "low_count_spots": low,
            "genes": chosen,
        }


def load(config, train_names, test_names):
    """Samples by name (features unscaled), genes; prints what was filtered."""
    has_pictures = not hest.has_feature_files(config.encoder)
    slides = hest.load_slides(config.data, [*train_names, *test_names], has_pictures)
    fit = [slides[n] for n in train_names]
    genes = hest.target_genes(config.genes, fit, config.data, config.min_counts)
    samples = {n: to_sample(config, slides[n], genes) for n in slides}
    width = samples[train_names[0]].x.shape[1]
    for sample in samples.values():
        if sample.x.shape[1] != width:
            raise DataError(
                f"--encoder {config.encoder} gives slide {sample.name} {sample.x.shape[1]} "
                f"features and slide {train_names[0]} {width}: make the features of all slides "
                "with one encoder"
            )
        hest.say_what_is_left_out(sample, config.min_counts)
    return samples, genes


def with_targets(sample, genes, target):
    """The sample with the expression of other genes as what is to be predicted."""
    arrays = hest.target_expression(sample.slide, genes, target)
    y, counts, library, measured = map(torch.from_numpy, arrays)
    return replace(sample, y=y, counts=counts, library=library, measured=measured)


def shuffled_pairs(sample, seed):
    """The sample with another spot's image at every spot (control)."""
    rows = hest.permuted_pairs(len(sample.x), seed)
    return replace(sample, x=sample.x[torch.from_numpy(rows)])


# --------------------------------------------------------------------------------------------------
# Members: cross-validation inside the training slides chooses the number of epochs
# --------------------------------------------------------------------------------------------------


def train_queue(queue, train, make, everything, inner, config, device, is_bag=False):
    """The inner parts choose the number of epochs; then `members` models are trained on everything.
    Under torchrun the parts, and then the members, are shared out to the processes.

    make: `Part` -> network. Returns models, the best mean validation score (nan without inner
    parts); the histories of parts and members are the queue's.
    """

    def train_on(part, epochs):
        def work(number, saved, save):
            job = Job(config, number, saved, save)
            return train(partial(make, part), part, config, device, epochs, job, is_bag)

        return work

    for part in inner:
        queue.do(train_on(part, config.epochs), keep_weights=True)
    epochs, best = config.epochs, float("nan")
    if inner:
        queue.exchange(0, epochs, device, partial(make, everything))
        epochs, best = hest.best_epochs(queue.histories()[: len(inner)])
    for _ in range(config.members):
        queue.do(train_on(everything, epochs), keep_weights=True)
    queue.exchange(len(inner), epochs, device, partial(make, everything))
    models = [make(everything).to(device) for _ in range(config.members)]
    for model, job in zip(models, queue.done[len(inner) :]):
        model.load_state_dict(job["weights"])
    return models, best


def train_members(task, train, build, record):
    """The members of a run: models, histories of the inner folds and the members, the best mean
    validation score, and [(Part, network after all epochs)] of the inner folds."""
    config, device = task.config, record.device

    def make(part):
        model = build(config, *part.widths(config))
        if part.member is not None:
            model.start_from_sets(part.member)
        return model

    latest = record.folder / "latest.pt"
    names = [str(gene) for gene in task.genes]
    origin = [task.origin, task.train_names, task.test_names, names]
    queue = Jobs(config, latest, origin, "stformer checkpoint", is_shared=True)
    inner = task.inner_parts(config.folds)
    models, best = train_queue(
        queue, train, make, task.all, inner, config, device, is_bag=task.is_bag
    )
    networks = [make(part).to(device) for part in inner]
    for network, job in zip(networks, queue.done):
        network.load_state_dict(job["weights"])
    return models, queue.histories(), best, list(zip(inner, networks))


# --------------------------------------------------------------------------------------------------
# Scores
# --------------------------------------------------------------------------------------------------


def score(samples, predictions, rates=None):
    """Scores across the scored spots of the samples, and of the slide's mean."""
    scores = hest.score(samples, predictions, rates)
    return scores | hest.slide_mean_scores(samples, predictions)


class Result:
    """What trained models say of the test slides: `predictions` [(S, G)] and `pathways` [(S, P), or
    (P,) in global mode], the mean over the models."""

    def __init__(self, task, models):
        self.task, self.models = task, models
        self.predictions, self.pathways = predict_genes(
            models, task.test, task.all.scaler, task.config
        )

    def scores(self):
        """Flat dict of the scores on the test slides."""
        task = self.task
        scores = score(task.test, self.predictions, task.rates)
        if task.all.member is not None and not task.is_bag:
            member = task.all.member
            scores["pathway_pcc"] = pathway_agreement(task.test, self.pathways, member)
        return scores

    def shown(self):
        """Samples, predictions, pathway scores, names of genes and of sets: what arrays and figures
        are made of."""
        task = self.task
        return task.test, self.predictions, self.pathways, task.genes, task.all.sets

    def arrays(self):
        """What arrays.npz holds."""
        return arrays_of(*self.shown())

    def checkpoint(self):
        """Everything that --predict needs, as tensors, numbers and strings: loads with
        weights_only=True."""
        return {
            "config": vars(self.task.config).copy(),
            "genes": list(self.task.genes),
            "gene_sets": list(self.task.all.sets),
            "scaler": self.task.all.scaler.tensors,
            "weights": [model.state_dict() for model in self.models],
        }


def predict_genes(models, samples, scaler, config):
    """[genes (S, G)] of the samples, where a bag's answer stands at every spot, and [pathway
    scores]."""
    pairs = [predict(models, s, scaler, config) for s in samples]
    genes = [values for values, _ in pairs]
    if config.mode == "global":
        genes = [np.tile(mean, (len(s.x), 1)) for mean, s in zip(genes, samples)]
    return genes, [scores for _, scores in pairs]


def pathway_agreement(samples, pathways, member):
    """Mean PCC of the pathway scores with z-scored, member-averaged measured genes, over sets and
    test slides."""
    correlations = []
    for s, scores in zip(samples, pathways):
        rows, measured = np.asarray(s.scored), np.asarray(s.measured)
        y, a = np.asarray(s.y)[rows][:, measured], np.asarray(member)[:, measured]  # (P, G')
        z = (y - y.mean(0)) / np.maximum(y.std(0, ddof=1), 1e-6)
        n_members = a.sum(1)
        target = z @ a.T / np.maximum(n_members, 1)  # (S', P)
        r = metrics.scored_pcc(target, scores[rows])  # (P,), nan where the target is constant
        correlations += r[(n_members > 0) & np.isfinite(r)].tolist()
    return float(np.mean(correlations)) if correlations else float("nan")


def gains(scores, others):
    """{"gain_over_<baseline>": difference of the mean PCC} of a network to every other."""
    return {f"gain_over_{name}": scores["pcc_mean"] - others[name]["pcc_mean"] for name in others}


def score_row(name, scores):
    """One row of the printed table."""
    row = hest.table_row(name, scores, COLUMNS)
    if "gain_over_ridge_raw" in scores:
        raw, pca = scores["gain_over_ridge_raw"], scores["gain_over_ridge_pca256"]
        row += f"  gain over ridge {raw:+.3f} (raw), {pca:+.3f} (PCA 256)"
    return row


def arrays_of(samples, predictions, pathways, genes, sets):
    """What arrays.npz holds: spots of all slides one below the other."""
    arrays = hest.spot_arrays(samples, predictions, genes)
    arrays["gene_sets"] = np.array(sets, dtype=str)
    if pathways[0] is not None and pathways[0].ndim == 2:
        arrays["pathway_scores"] = np.concatenate(pathways)
    return arrays


def draw(record, samples, predictions, pathways, genes, sets, histories=()):
    """Figures of the first slide: true and predicted maps of the five best and the five worst
    genes, pathway maps; training curves."""
    record.figure("genes", figures.gene_maps(samples[0], predictions[0], genes))
    scores = pathways[0]
    if scores is not None and scores.ndim == 2:
        names = [name.removeprefix("HALLMARK_").lower()[:24] for name in sets]
        names = names or [f"token {j}" for j in range(scores.shape[1])]
        record.figure("pathways", figures.most_varied_maps(scores, names, samples[0].slide.xy))
    if histories:
        losses = {f"job {i}": [row[0] for row in h] for i, h in enumerate(histories)}
        curves = {f"fold {i}": [row[1] for row in h] for i, h in enumerate(histories)}
        curves = {name: v for name, v in curves.items() if np.isfinite(v[-1])}
        record.figure("training", figures.training_curves(losses, curves, "validation score"))
    figures.close()
