"""The protocol of expression by retrieval: flags, slides, genes and scales fitted on training
spots, folds inside them, baselines and scores.

A model is any module with `embed_image`, `embed_genes` and `vit` (None on frozen features).
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

import data
import metrics
from data import DataError
from evaluation import baselines, hest
from plainst import jobs, run, stages
from plainst.features import input_files

# --------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------


def check(config, heads):
    """Raise DataError, naming the flag, for an impossible value, for widths that do not fit each
    other, or for a flag that does nothing. heads: must divide --dim."""
    one, zero = run.AT_LEAST_ONE, run.AT_LEAST_ZERO
    rules = dict.fromkeys(("n_hvg", "dim", "snn", "k", "epochs", "folds"), one)
    rules |= dict.fromkeys(("fold", "min_counts", "save_every"), zero)
    rules |= dict.fromkeys(("tau", "lr"), run.POSITIVE)
    rules |= {
        "mask_rate": (lambda v: 0 <= v <= 1, "from 0 to 1"),
        "recall": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
        "dropout": (lambda v: 0 <= v < 1, "from 0 to below 1"),
        "batch": (lambda v: v >= 2, "2 or more, a contrastive loss tells a spot from others"),
    }
    run.check_flags(config, rules)
    if config.dim % heads or config.snn % config.dim:
        raise DataError(
            f"--dim is {config.dim} and --snn {config.snn}: {heads} heads must divide dim, and dim "
            "snn"
        )
    if config.weights and config.backbone != "base":
        raise DataError(
            f"--weights {config.weights} is a ViT-B/32 checkpoint: give --backbone base with it"
        )
    run.refuse_idle_flags(config, idle_flags(config))


def idle_flags(config):
    """Rules for the flags that do nothing beside the others, as `run.refuse_idle_flags` takes
    them. With a ViT, --encoder still rules the baselines."""
    exact = (config.index == "exact", "with --index exact", ("recall",))
    if config.predict:
        used = ("genes", "k", "weighting", "index", "recall")
        return [run.idle_with_predict(config, used), exact]
    split, has_vit = f"with --split {config.split}", config.backbone != "features"
    has_one = config.split in ("section", "sample")
    is_alone = config.reconstruction == "none"
    unread = ("mask_rate", "share", "snn", "reconstruct", "schedule")
    return [
        exact,
        (not config.fast, "with --no-fast, which searches exactly", ("index", "recall")),
        (config.split != "folds", split, ("fold",)),
        (config.split != "patient", split, ("patient",)),
        (not has_one, split, ("slice",)),
        (has_vit, f"with --backbone {config.backbone}", ("scale",)),
        (is_alone, "with --reconstruction none", unread),
        (config.val != "groups", f"with --val {config.val}", ("folds",)),
    ]


def variant(config):
    """Folder name of the run: preset, split where it is not the folder's own, backbone, and every
    other flag that the preset has otherwise."""
    words = [config.split] * (config.split != "folds") + [config.backbone]
    return run.variant(config, words, ("split", "fold", "patient", "backbone", "fast"))


def encoder_name(config):
    """What turns a patch into the model's input: the ViT, or the frozen encoder."""
    if config.backbone != "features":
        return f"vit:{config.backbone}"
    return "file" if hest.has_feature_files(config.encoder) else config.encoder


def require_spots(n, k, what):
    """Raise DataError where there are fewer spots than neighbours to average."""
    if n < k:
        raise DataError(
            f"{what} has {n} spots with enough counts, fewer than --k {k}: choose a smaller "
            "--k or more training slides"
        )


class Sides(NamedTuple):
    """Which slides train and test."""

    split: data.Split
    train: list  # names
    test: list
    part: str  # folder name of the run
    leaks_patient: bool


def sides_of(config):
    """`Sides` of the flags --split, --fold, --patient and --slice."""
    c = config
    return Sides(*hest.hest_partition(c.data, c.split, c.fold, c.patient, c.slice))


# --------------------------------------------------------------------------------------------------
# Slides -> tensors
# --------------------------------------------------------------------------------------------------


class Sample:
    """One slide with S spots and G genes read out (targets first).

    features (S, F) frozen features as they are; images uint8 (S, px, px, 3) with a ViT, else None;
    y (S, G) expression, None without counts; measured (G,) bool; scored (S,) bool: enough counts.
    """

    def __init__(self, slide, features, images=None):
        self.name, self.patient, self.slide = slide.sample, slide.patient, slide
        self.features, self.images = features, images
        self.y = self.measured = self.scored = None

    def read_counts(self, genes, config):
        """Fill y, measured and scored."""
        self.scored = hest.enough_counts(self.slide, config.min_counts)
        self.read_targets(genes, config)

    def read_targets(self, genes, config):
        """Fill y and measured for these genes."""
        self.y, _, _, self.measured = hest.target_expression(self.slide, genes, config.target)


def read_images(slide, px):
    """(S, px, px, 3) uint8 patches, resized where they have another size; 150 kB a spot at 224
    pixels stay in memory. Raises DataError for a slide without patches."""
    if slide.patches is None:
        raise DataError(
            f"slide {slide.sample} has no patches: give a HEST folder with patches/, or "
            "--backbone features"
        )
    images = torch.empty(slide.n_spots, px, px, 3, dtype=torch.uint8)
    for rows in torch.arange(slide.n_spots).split(256):
        part = torch.from_numpy(slide.patches[rows.numpy()])  # (n, h, w, 3)
        if part.shape[1:3] != (px, px):
            part = part.permute(0, 3, 1, 2).float()
            part = F.interpolate(part, size=(px, px), mode="bilinear", antialias=True)
            part = part.round().clamp(0, 255).permute(0, 2, 3, 1)
        images[rows] = part.to(torch.uint8)
    return images


def samples_of(config, slides, vits):
    """`Sample`s with image inputs of slides. Raises DataError where the features of two slides are
    not equally wide."""
    samples = []
    for slide in slides:
        images = None
        if config.backbone != "features":
            images = read_images(slide, vits[config.backbone].pixels)
        samples.append(Sample(slide, hest.slide_features(config, slide), images))
    first = samples[0]
    for sample in samples:
        width, known = sample.features.shape[1], first.features.shape[1]
        if width != known:
            raise DataError(
                f"slide {sample.name} has {width} features ({config.encoder}), slide {first.name} "
                f"{known}: make the features of all slides with one encoder"
            )
    return samples


def shuffle_pairs(samples, seed):
    """Give every spot the image of another spot of any of the samples (control). Within slides
    would not do: the slides' means would stay paired."""
    sizes = [len(s.features) for s in samples]
    order = np.random.default_rng([seed, 11]).permutation(sum(sizes))
    rows = torch.from_numpy(order)
    names = ["features"] if samples[0].images is None else ["features", "images"]
    for name in names:
        together = torch.cat([getattr(s, name) for s in samples])[rows]
        for sample, part in zip(samples, together.split(sizes)):
            setattr(sample, name, part)


class Inputs:
    """What makes the network's inputs of slides: genes of the gene branch, mean and spread of
    features and expression, {name: tensor}."""

    def __init__(self, genes, scaler):
        self.genes, self.scaler = genes, scaler

    @classmethod
    def fit(cls, samples, config, genes):
        """From the scored spots of training samples."""
        scaler = {}
        expression = [log_expression(s, genes) for s in samples]
        parts = {"frozen": [s.features for s in samples], "s": expression}
        for name, values in parts.items():
            mean, std = hest.mean_and_std([v[s.scored] for s, v in zip(samples, values)])
            scaler |= {f"{name}_mean": mean, f"{name}_std": std}
        return cls(genes, scaler)

    def image(self, sample, config):
        """(S, F') scaled features as --scale says, or uint8 (S, px, px, 3)."""
        if config.backbone != "features":
            return sample.images
        mean, std = self.scaler["frozen_mean"], self.scaler["frozen_std"]
        return hest.scaled_features(sample.features, mean, std, config.scale)

    def expression(self, sample, config):
        """(S, I) expression vector, scaled as --gene_scale says."""
        s = log_expression(sample, self.genes)
        if config.gene_scale == "none":
            return s
        mean, std = self.scaler["s_mean"], self.scaler["s_std"]
        if config.gene_scale == "slide":
            own = s[sample.scored]
            mean, std = own.mean(0), own.std(0, correction=0)
        # a gene seen once is not worth 30 sigma
        return ((s - mean) / std.clamp(min=0.1)).clamp(-10, 10)


def log_expression(sample, genes):
    """(S, I) float32 log1p of counts per 10,000 of a sample."""
    return torch.from_numpy(hest.log_expression(sample.slide, genes).toarray())


def scaled_by_slide(y, slide):
    """y (N, G) z-scored within each slide (N,), times the spread of all rows, plus their mean."""
    out = np.empty_like(y)
    for number in np.unique(slide):
        own = y[slide == number]
        out[slide == number] = (own - own.mean(0)) / (own.std(0) + 1e-6)
    return out * y.std(0) + y.mean(0)


class Spots:
    """N scored spots of several samples: what is trained on, and the rows of the atlas.

    images [(n, ...)] of every sample, expression (N, I), y (N, G), slide (N,) number of the sample,
    row (N,) in it; values (N, G) y as --values says.
    """

    def __init__(self, samples, inputs, config):
        rows = [np.flatnonzero(s.scored) for s in samples]
        self.names = [s.name for s in samples]
        self.slide = np.repeat(np.arange(len(samples)), [len(r) for r in rows])
        self.row = np.concatenate(rows)
        # pictures are not copied
        self.of_slide = [inputs.image(s, config) for s in samples]
        self.features = None
        if config.backbone == "features":
            self.features = torch.cat([x[r] for x, r in zip(self.of_slide, rows)])  # (N, F')
        expression = [inputs.expression(s, config)[r] for s, r in zip(samples, rows)]
        self.expression = torch.cat(expression)  # (N, I)
        y = np.concatenate([s.y[r] for s, r in zip(samples, rows)])  # (N, G)
        measured = np.stack([s.measured for s in samples])[self.slide]  # (N, G)
        self.y, _ = hest.fill_unmeasured(y, measured)
        self.values = self.y
        if config.values == "slide":
            self.values = scaled_by_slide(self.y, self.slide)

    def __len__(self):
        return len(self.row)

    def image(self, rows):
        """Image input of some rows: (n, F') or (n, px, px, 3)."""
        if self.features is not None:
            return self.features[rows]
        places = zip(self.slide[rows], self.row[rows])
        return torch.stack([self.of_slide[i][j] for i, j in places])


def random_flip_rotate(image):
    """Flips and quarter turns of square patches (B, px, px, 3) at random, as released."""
    u = torch.rand(len(image), 3, device=image.device)
    for axis in (1, 2):
        is_flipped = (u[:, axis - 1] < 0.5)[:, None, None, None]
        image = torch.where(is_flipped, image.flip(axis), image)
    turns = (u[:, 2] * 4).long()[:, None, None, None]
    for n in (1, 2, 3):
        image = torch.where(turns == n, image.rot90(n, (1, 2)), image)
    return image


class Fold:
    """Spots to train on and slides to validate on, with all that is fitted on the former."""

    def __init__(self, config, fit, held_out, inputs, n_targets, device):
        self.config, self.held_out, self.device = config, held_out, device
        self.n_targets, self.inputs = n_targets, inputs
        self.spots = Spots(fit, self.inputs, config)

    @property
    def dim_in(self):
        """Width of the features that the model reads, 0 with a ViT."""
        return 0 if self.spots.features is None else self.spots.features.shape[1]

    def batches(self):
        """(image (b, ...), expression (b, I)) of every step of an epoch: this process's rows of
        batches in random order, of which the last, incomplete one is dropped."""
        order, rank = torch.randperm(len(self.spots)), run.processes()[0]
        if rank:
            # all processes have the order, each its own dropout and masks
            torch.manual_seed(torch.initial_seed() + rank)
        groups = [order]
        if self.config.batches == "slide":
            slide = torch.from_numpy(self.spots.slide)[order]
            groups = [order[slide == number] for number in slide.unique()]
        steps = [rows for group in groups for rows in whole_batches(group, self.config.batch)]
        if len(groups) > 1:
            # the first rows of the order choose the order of the steps
            steps = [steps[i] for i in order[: len(steps)].argsort()]
        for rows in steps:
            own = rows[stages.rank_slice(len(rows))].numpy()
            expression = self.spots.expression[own].to(self.device)
            image = self.spots.image(own).to(self.device)
            if self.spots.features is None:
                image = random_flip_rotate(image)
            yield image, expression

    def queries(self, model, samples=None):
        """Embeddings z (S, d) of the pictures of every sample, by default of the held-out ones."""
        samples = self.held_out if samples is None else samples
        images = [self.inputs.image(s, self.config) for s in samples]
        return [embed(model.embed_image, x, self.config, self.device) for x in images]

    def keys(self, model):
        """Embeddings h (N, d) of the expression of the training spots."""
        return embed(model.embed_genes, self.spots.expression, self.config, self.device)

    def image_keys(self, model):
        """Embeddings z (N, d) of their pictures."""
        pieces = np.split(np.arange(len(self.spots)), range(1024, len(self.spots), 1024))
        images = (self.spots.image(rows) for rows in pieces)
        parts = [embed(model.embed_image, x, self.config, self.device) for x in images]
        return torch.cat(parts)

    def score(self, predicted):
        """Mean over held-out slides of the mean PCC of the target genes, of predictions (S, G)."""
        scores = []
        for sample, values in zip(self.held_out, predicted):
            columns = np.flatnonzero(sample.measured[: self.n_targets])
            pair = [a[sample.scored][:, columns] for a in (sample.y, values)]
            scores.append(metrics.pcc_summary(*pair)["pcc_mean"])
        return float(np.nanmean(scores)) if np.isfinite(scores).any() else -np.inf


def whole_batches(rows, batch):
    """[(batch,)] of rows (n,) without the last, incomplete one; all rows where they are fewer, as
    far as the processes share them evenly. Raises DataError for too few rows for any."""
    world = run.processes()[1]
    size = min(batch, len(rows) // world * world)
    if size < 2:
        raise DataError(
            f"a slide has {len(rows)} spots to train on: leave it out, or use --batches mixed"
        )
    return rows[: len(rows) // size * size].split(size)


def mean_losses(losses):
    """Mean of the loss tensors (3,) of an epoch, as floats. Raises DataError where the loss is no
    number. The only place where the host waits for the device."""
    mean = torch.stack(losses).mean(0).tolist()
    if not np.isfinite(mean[0]):
        raise DataError(
            f"the loss is {mean[0]}: lower --lr, or check the inputs for extreme values"
        )
    return mean


@torch.no_grad()
def embed(function, x, config, device, batch=1024):
    """Embeddings (S, d) float32 of rows x by a method of a model, without dropout."""
    function.__self__.eval()
    parts = []
    for part in x.split(batch):
        with run.autocast(config, device):
            parts.append(function(part.to(device)).float())
    return torch.cat(parts)


class Prediction(NamedTuple):
    """What retrieval gives for several slides: a list of one entry a slide, and keys."""

    expression: list  # (S, G)
    rows: list  # (S, k) of the keys
    queries: list  # (S, d)
    keys: torch.Tensor  # (M, d)
    recall: float


# --------------------------------------------------------------------------------------------------
# The task
# --------------------------------------------------------------------------------------------------


class Task:
    """What a run trains on and is scored on. The values of test slides reach nothing that is
    fitted, but for --oracle_genes.

    train, test: samples; genes read out, n_targets of them first; lists {test slide: {heg, hvg,
    marker: names}}; whole: the `Fold` of all training spots.
    """

    def __init__(self, config, sides, vits, device):
        self.config, self.sides, self.device = config, sides, device
        need = config.backbone != "features" or not hest.has_feature_files(config.encoder)
        slides = hest.load_slides(config.data, [*sides.train, *sides.test], need)
        self.slides = list(slides.values())
        fit = [slides[n] for n in sides.train]
        targets = hest.target_genes(config.genes, fit, config.data, config.min_counts)
        self.n_targets, self.lists = len(targets), self.gene_lists(slides, fit)
        listed = [g for lists in self.lists.values() for names in lists.values() for g in names]
        self.genes = list(dict.fromkeys([*targets, *listed]))
        seen = self.slides if config.oracle_genes else fit
        input_genes = hest.variable_genes(seen, config.n_hvg, config.min_counts)
        samples = samples_of(config, self.slides, vits)
        for s in samples:
            s.read_counts(self.genes, config)
            hest.say_what_is_left_out(s, config.min_counts, self.n_targets)
        self.train_samples = samples[: len(fit)]
        self.test = samples[len(fit) :]
        n_spots = sum(s.scored.sum() for s in self.train_samples)
        require_spots(n_spots, config.k, f"the training side ({', '.join(sides.train)})")
        if config.shuffle_pairs:
            shuffle_pairs(self.train_samples, config.seed)
        inputs = Inputs.fit(self.train_samples, config, input_genes)
        self.whole = Fold(config, self.train_samples, [], inputs, self.n_targets, device)
        self.rates = hest.simulated_rates(config.data, self.test, self.genes, normalised=True)

    def gene_lists(self, slides, fit):
        """{test slide: {heg, hvg, marker: names}}, from the training slides or, with
        --oracle_genes, from the truth of each test slide."""
        c, shared = self.config, hest.shared_genes(fit)
        choice = (c.min_counts, c.target, c.markers)
        if not c.oracle_genes:
            return dict.fromkeys(self.sides.test, hest.gene_lists(fit, shared, *choice))
        lists = {}
        for name in self.sides.test:
            measured = set(slides[name].genes)
            own = [g for g in shared if g in measured]
            lists[name] = hest.gene_lists([slides[name]], own, *choice)
        return lists

    def files(self):
        """Files whose content can change a number of this run."""
        more = [*hest.task_files(self.config), self.config.weights]
        return input_files(self.slides, self.config.encoder, more)

    def describe(self):
        """What is trained on and scored, in a sentence."""
        sides = self.sides
        n_markers = len(self.lists[sides.test[0]]["marker"])
        return (
            f"{sides.part}: {sides.split.detail}; train {' '.join(sides.train)}, test "
            f"{' '.join(sides.test)}; {len(self.whole.spots)} training spots, {self.n_targets} "
            f"target genes, {len(self.whole.inputs.genes)} genes in the gene branch, {n_markers} "
            f"markers measured, {encoder_name(self.config)}"
        )

    def folds(self):
        """[`Fold`] inside the training slides: other patients, else other slides, else tiles of an
        only slide; or a random fifth of the spots; none with --val none."""
        c = self.config
        if c.val == "none":
            return []
        if c.val == "random":
            rng = np.random.default_rng(c.seed)
            masks = {s.name: rng.random(len(s.scored)) < 0.2 for s in self.train_samples}
            sides = [hest.divided(self.train_samples, masks)]
        else:
            sides = hest.inner_folds(self.train_samples, c.folds, lattice_place)
        # enough spots to average k of them
        return [self.fold(*s) for s in sides if sum(f.scored.sum() for f in s[0]) >= c.k]

    def fold(self, fit, held_out):
        """`Fold` of training samples, which are copies: genes, scales and, where --genes is a
        number, targets are chosen anew, on the spots to fit alone."""
        c, slides = self.config, [s.slide.subset(s.scored) for s in fit]
        genes, n_targets = self.whole.inputs.genes, self.n_targets
        if not c.oracle_genes:
            genes = hest.variable_genes(slides, c.n_hvg, c.min_counts)
        if c.genes.isdigit():
            targets = hest.target_genes(c.genes, slides, c.data, c.min_counts)
            n_targets = len(targets)
            for sample in (*fit, *held_out):
                sample.read_targets(targets, c)
        inputs = Inputs.fit(fit, c, genes)
        return Fold(c, fit, held_out, inputs, n_targets, self.device)

    def test_images(self):
        """Image input of every test slide."""
        return [self.whole.inputs.image(s, self.config) for s in self.test]

    def train(self, train, config, record=None):
        """Validation inside the training slides chooses the number of epochs, then one model is
        trained on all of them.

        train(fold, config, job, n_epochs) -> model, history; record: its folder holds the latest.pt
        of --save_every, None for none. Returns the model, the histories (folds, then the model) and
        the best validation score (nan without).
        """
        latest = origin = None
        if record is not None:
            latest, names = record.folder / "latest.pt", [*self.genes, *self.whole.inputs.genes]
            origin = [record.checksum, self.sides.train, self.sides.test, [str(g) for g in names]]
        queue = jobs.Jobs(config, latest, origin, "whole cmrcnet checkpoint")

        def train_on(fold, n_epochs, **job):
            return train(fold, config, jobs.Job(config, **job), n_epochs)

        folds, n_epochs, best = self.folds(), config.epochs, float("nan")
        for fold in folds:
            queue.do(partial(train_on, fold, n_epochs))
        if folds:
            n_epochs, best = hest.best_epochs(queue.histories())
        model = queue.do(partial(train_on, self.whole, n_epochs))
        histories = queue.histories()
        warn_when_guessing(histories[-1], min(config.batch, len(self.whole.spots)))
        return model, histories, best

    def baselines(self):
        """{name: [prediction (S, G) of every test slide]} on the frozen features; `_scaled`: on
        what the image branch sees, where that is features."""
        y, train, test = self.whole.spots.y.astype(np.float64), self.train_samples, self.test
        x = torch.cat([s.features[s.scored] for s in train]).double().numpy()
        tests = [s.features.double().numpy() for s in test]
        mean = self.whole.spots.y.mean(0)
        predictions = {"train_mean": [np.tile(mean, (len(s.features), 1)) for s in test]}
        predictions |= baselines.feature_baselines(x, y, tests, self.n_targets)
        if self.whole.spots.features is not None:
            x = self.whole.spots.features.double().numpy()
            tests = [images.double().numpy() for images in self.test_images()]
            predictions |= baselines.scaled_baselines(x, y, tests, self.n_targets)
        return predictions

    def score(self, predictions):
        """Scores of the target genes, and of the HEG, HVG and marker lists."""
        scores = hest.score(self.test, predictions, self.rates, self.n_targets)
        return scores | hest.gene_list_scores(self.test, predictions, self.genes, self.lists)

    def diagnostics(self, history, image_keys, keys):
        """Scores that say whether to believe the others: losses beside guessing, slides told apart
        from the embeddings, the noise ceiling of simulated slides."""
        scores = {
            "contrastive": history[-1][1],
            "contrastive_guess": float(np.log(min(self.config.batch, len(self.whole.spots)))),
            "reconstruction_error": history[-1][2],
        }
        for name, embedding in (("image", image_keys), ("gene", keys)):
            embedding = embedding.cpu().numpy()
            accuracy = hest.slide_accuracy(embedding, self.whole.spots.slide)
            scores[f"slide_accuracy_{name}"] = accuracy
        if self.rates is not None:
            scores["ceiling_pcc"] = self.score(self.rates)["pcc_mean"]
        return scores


def lattice_place(sample):
    """(S, 2) positions of a sample's spots in lattice pitches."""
    xy = sample.slide.xy
    return (xy - xy.min(0)) / data.lattice_pitch(xy)


def warn_when_guessing(history, batch):
    """Print a warning where the contrastive loss of the last epoch is still that of random
    guessing, log(batch)."""
    last, guess = history[-1][1], np.log(batch)
    if last > 0.95 * guess:
        run.say(
            f"warning: the contrastive loss is {last:.2f}, random guessing has log({batch}) = "
            f"{guess:.2f}: image and expression have not been matched; train longer, raise --lr, "
            "or check the pairing"
        )
