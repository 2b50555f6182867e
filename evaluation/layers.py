"""The protocol of supervised layers: slides, split, inputs, baselines and scores, one class a spot.

A method gives its table of modes, `{name: mode}`; of a mode are read `expression` ("mlp", "frozen"
or ""), `graph`, `image` and `fusion`.
"""

from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch

import data
import metrics
from data import DataError
from evaluation import baselines
from plainst import run
from plainst.features import input_files, spots_with_vector
from plainst.scaled import ScaledRows, agreed_library, library_sizes
from plainst.tiles import make_tiles, prediction_size

SHOWN = ("ari", "nmi", "accuracy", "macro_f1", "kappa_quadratic", "log_loss", "boundary_accuracy")

# --------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------


def fusion_of(config, mode):
    """How two embeddings meet in a mode: as the mode says, where it leaves it open as --fusion
    says."""
    return config.fusion if mode.fusion == "any" else mode.fusion


def has_heads(config, mode):
    """Whether a part of the mode has attention heads."""
    return mode.graph == "gat" or fusion_of(config, mode) == "cross"


def check(config, modes):
    """Raise DataError, naming the flag, for a value that no run can use, or for one that does
    nothing in the chosen mode and split."""
    mode = modes[config.mode]
    at_least_one = ("n_blocks", "k", "n_top_genes", "dim", "heads", "layers", "epochs")
    rules = dict.fromkeys(at_least_one, run.AT_LEAST_ONE)
    rules |= dict.fromkeys(("tile", "buffer"), run.AT_LEAST_ZERO)
    rules |= {
        "lr": run.POSITIVE,
        "split_seed": run.SEED,
        "dropout": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
        "min_shared": (lambda v: 0 <= v <= 1, "from 0 to 1"),
    }
    run.check_flags(config, rules)
    if config.dim % config.heads and has_heads(config, mode):
        raise DataError(f"--heads is {config.heads}: it must divide --dim {config.dim}")
    if mode.graph and mode.image and config.fusion == "concat":
        raise DataError(
            f"--fusion concat leaves no gate for the image of --mode {config.mode}: choose cross "
            "or gated"
        )
    if config.predict:
        used = ("labels", "min_shared", "tile", "bf16", "compile", "embedding", "scale", "fast")
        run.refuse_idle_flags(config, [run.idle_with_predict(config, (*used, *config.columns()))])
        return
    run.refuse_idle_flags(config, idle_flags(config, mode))
    if mode.expression == "frozen" and not config.embedding:
        raise DataError(
            f"--mode {config.mode} needs frozen vectors: name a .npy or .npz file with --embedding"
        )


def idle_flags(config, mode):
    """Rules for the flags that do nothing in the chosen mode and split, as `run.refuse_idle_flags`
    takes them. The linear baselines read the genes in every mode without frozen vectors."""
    case, split = f"in --mode {config.mode}", f"with --split {config.split}"
    is_blocks, is_holdout = config.split == "blocks", config.split in ("slice", "donor")
    has_graph = bool(mode.graph) or fusion_of(config, mode) == "cross"
    # --k and --layers also make the default buffer of the blocks
    is_graph_idle = not has_graph and not (is_blocks and not config.buffer)
    network = ("dim", "dropout", "lr", "epochs", "bf16", "compile", "fast", "h5ad")
    genes = ("n_top_genes", "library", "scale")
    return [
        (config.mode == "none", case, network),
        (mode.fusion != "any", case, ("fusion",)),
        (not has_heads(config, mode), case, ("heads",)),
        (not has_graph, case, ("fast",)),
        (is_graph_idle, case, ("k", "layers")),
        *input_rules(config.mode, mode),
        (mode.expression == "frozen", case, genes),
        (not is_blocks, split, ("fold", "n_blocks", "buffer")),
        (not is_holdout, split, ("train",)),
        (True, "without --predict", ("min_shared",)),
    ]


def input_rules(name, mode):
    """Rules for the flags of inputs that a mode does not read."""
    case = f"in --mode {name}"
    return [
        (mode.expression != "frozen", case, ("embedding",)),
        (not mode.image, case, ("encoder",)),
    ]


def variant(config, mode):
    """Folder name of the run: preset, split, mode, fusion, and every other flag that is not at its
    default."""
    split = f"{config.split}-{config.train or 'all'}".replace(",", "+")
    split = {"random": "random", "blocks": f"blocks{config.fold}"}.get(config.split, split)
    words = [split, config.mode]
    if mode.fusion == "any":
        words.append(config.fusion)
    silent = ("split", "fold", "train", "mode", "fusion", "min_shared")
    return run.variant(config, words, silent, files=("embedding", "encoder", "labels"))


# --------------------------------------------------------------------------------------------------
# Slides and inputs
# --------------------------------------------------------------------------------------------------


def load(config, mode):
    """Slides of the run: the scored one first, then the training slices of --split slice / donor.

    Counts are read where the mode does not have frozen vectors; `--mode none` reads them where the
    slide has them.
    """
    is_holdout = config.split in ("slice", "donor")
    if is_holdout:
        refuse_one_slide(config)
    is_frozen = mode.expression == "frozen"
    slides = [load_one(config, config.slice or None, config.labels or None, is_frozen)]
    if is_holdout:
        names = training_slices(config, slides[0])
        slides += [load_one(config, name, None, is_frozen) for name in names]
    if is_frozen:
        refuse_shared_vectors(config.embedding, slides)
    if config.split == "donor":
        first = slides[0]
        data.check_donors(slides)
        if any(s.patient == first.patient for s in slides[1:]):
            raise DataError(
                f"--split donor was given a training slice of the donor of {first.sample} "
                f"({first.patient}): choose other slices with --train"
            )
    return slides


def load_one(config, sample, labels, is_frozen):
    """One slide: with its counts, or where vectors are frozen its spots that have one."""
    columns = config.columns()
    if is_frozen:
        slide = data.load_slide(config.data, sample, counts=False, labels=labels, **columns)
        return with_vectors(config.embedding, slide)
    if config.mode == "none":
        slide = data.load_slide(config.data, sample, counts=False, labels=labels, **columns)
        if Path(slide.source).suffix not in (".h5", ".h5ad", ".loom"):
            print(f"{slide.sample} has no count matrix: baselines from coordinates only")
            return slide
    return data.load_slide(config.data, sample, labels=labels, **columns)


def with_vectors(path, slide):
    """The slide without the spots that have no vector in the file; says how many. Raises DataError
    where none has one."""
    has_vector = spots_with_vector(path, slide)  # (N,)
    if has_vector.all():
        return slide
    print(f"{slide.sample}: {(~has_vector).sum()} spots without a vector are left out")
    return slide.subset(has_vector)


def is_of_one_slide(path):
    """Whether a path names the same file for every slide."""
    return "{slice}" not in path and "{sample}" not in path


def refuse_shared_vectors(path, slides):
    """Raise DataError where one file of vectors would serve two spots of one barcode: Visium slides
    share most of their barcodes."""
    barcodes = np.concatenate([s.barcodes for s in slides])
    if is_of_one_slide(path) and len(np.unique(barcodes)) < len(barcodes):
        raise DataError(
            f"{path} cannot hold the vectors of {', '.join(s.sample for s in slides)}, which share "
            "barcodes: give one file a slide, --embedding with {slice} in its name"
        )


def refuse_one_slide(config):
    """Raise DataError for --split slice / donor where --data or --labels is of one slide."""
    if config.labels:
        raise DataError(
            f"--labels {config.labels} is for one slide, --split {config.split} reads several: put "
            "labels beside each slide"
        )
    if data.is_one_slide(config.data, config.library_key):
        raise DataError(
            f"{config.data} is one slide, --split {config.split} needs several: give the parent "
            f"folder that holds them, --data {Path(config.data).absolute().parent} --slice "
            f"{config.slice or Path(config.data).absolute().stem}"
        )


def training_slices(config, first):
    """Names of the slices to train on: --train, else for slice all others of the donor of `first`,
    for donor all of the other donors. Raises DataError where there is none."""
    names = [name.strip() for name in config.train.split(",") if name.strip()]
    if not names:
        others = [
            data.load_slide(config.data, name, counts=False, **config.columns())
            for name in data.list_slices(config.data, config.library_key)
            if name != first.sample
        ]
        if config.split == "donor":
            data.check_donors([first, *others])
        is_same = config.split == "slice"
        names = [s.sample for s in others if (s.patient == first.patient) == is_same]
    if not names or first.sample in names:
        raise DataError(
            f"--split {config.split} finds no other slice to train on beside {first.sample} in "
            f"{config.data}: name them with --train"
        )
    return names


class Task:
    """All spots of the slides of one run, stacked (the scored slide first), with one label map, one
    split and block-diagonal graphs.

    labels (N,) int, -1 = none; place (N, 2) what a coordinates-only predictor may see: pixels
    inside one slide, coordinates standardised per slide across slides; slide_of (N,) which slide a
    spot belongs to; x (N, D) float32 inputs, made on first use; library `given` or `own`, one for
    all slides; reach the receptive field in lattice pitches.
    """

    def __init__(self, config, mode, slides):
        self.config, self.mode, self.slides = config, mode, slides
        self.classes, labels = data.global_labels(slides)
        self.labels, self.n_classes = np.concatenate(labels), len(self.classes)
        self.slide_of = np.repeat(np.arange(len(slides)), [s.n_spots for s in slides])
        self.is_scored_slide = self.slide_of == 0
        self.place = slides[0].xy  # (N, 2)
        if len(slides) > 1:
            self.place = np.concatenate([(s.xy - s.xy.mean(0)) / s.xy.std(0) for s in slides])
        self.has_counts = all(s.counts is not None for s in slides)
        self.library = agreed_library(config.library, slides)
        # Visium's where the slide does not tell
        pitch_um = data.lattice_pitch(slides[0].xy) * (slides[0].um_per_px or 0) or 100.0
        self.reach = receptive_field(config, mode, pitch_um)
        data.check_labels(labels[0], slides[0].sample)
        self.split = self.make_split(pitch_um)

    def make_split(self, pitch_um):
        """data.Split as --split says; pitch_um micrometres between spots."""
        c = self.config
        if c.split == "random":
            return data.random_split(self.labels, c.split_seed)
        if c.split == "blocks":
            buffer = c.buffer or default_buffer(c, self.mode, pitch_um)
            blocks = {"buffer": buffer, "seed": c.split_seed, "reach": self.reach}
            return data.block_split(self.labels, self.slides[0].xy, c.fold, c.n_blocks, **blocks)
        return data.holdout_split(self.slides, self.labels, c.split, c.split_seed)

    def describe(self):
        """What is trained on and scored, in a sentence or two."""
        split, test = self.split, self.split.test
        text = (
            f"{self.slides[0].sample}: {self.is_scored_slide.sum()} spots, split {split.name} "
            f"({split.detail}): {split.train.sum()} train, {split.val.sum()} validation, "
            f"{test.sum()} test"
        )
        if split.leaks_position:
            text += "; this split leaks position"
        if self.has_counts:
            text += f"\nlibrary size: {self.library}"
            without = [s.sample for s in self.slides if s.library_size is None]
            if without and self.config.library == "given":
                text += f" for all slides, {', '.join(without)} came without"
        return text

    @cached_property
    def pitch(self):
        """Lattice pitch of the scored slide, in the units of place."""
        return data.lattice_pitch(self.place[self.is_scored_slide])

    @cached_property
    def boundary_distance(self):
        """(n,) lattice steps of the scored slide's spots to the nearest other label."""
        return boundary_distance(self.slides[0], self.labels[self.is_scored_slide])

    def table(self, k):
        """(N, k) rows of the k nearest spots, never across slides."""
        starts = np.cumsum([0] + [s.n_spots for s in self.slides])
        tables = [data.knn_table(s.xy, k, name=s.sample) for s in self.slides]
        return np.concatenate([table + start for table, start in zip(tables, starts)])

    @cached_property
    def expression(self):
        """data.Expression: gene choice and scaler, fitted on training rows."""
        c, genes = self.config, data.common_genes(self.slides)
        parts = [(s, self.split.train[self.slide_of == i]) for i, s in enumerate(self.slides)]
        # of all genes of a slide, as in `scaled_slide`, not of those that all slides share
        sizes = np.concatenate([library_sizes(s, self.library)[rows] for s, rows in parts])
        counts = [s.select_genes(genes).counts[rows] for s, rows in parts if rows.any()]
        return data.Expression(c.n_top_genes).fit(sp.vstack(counts).tocsr(), genes, sizes)

    @cached_property
    def x(self):
        """(N, D) inputs: z-scores of the genes, or frozen vectors; with --tile the z-scores stand
        behind `ScaledRows`, which makes rows on request."""
        if self.mode.expression == "frozen":
            vectors = [data.read_embedding(self.config.embedding, s) for s in self.slides]
            return np.concatenate(vectors)
        is_own = scales_by_slide(self.config)
        parts = [scaled_slide(self.expression, s, self.library, is_own) for s in self.slides]
        if self.config.tile:
            return ScaledRows(parts)
        return np.concatenate([ScaledRows([part])[:] for part in parts])

    @cached_property
    def components(self):
        """(N, 50) principal components of x, for the linear baselines."""
        return baselines.principal_components(self.x, self.split.train, self.config.tile)

    @cached_property
    def image(self):
        """(N, D) frozen image features, standardised by training rows, or None where the mode has
        no image branch."""
        if not self.mode.image:
            return None
        features = np.concatenate([image_features(self.config, s) for s in self.slides])
        rows = self.split.train
        self.image_scale = (features[rows].mean(0), features[rows].std(0) + 1e-6)
        return ((features - self.image_scale[0]) / self.image_scale[1]).astype(np.float32)

    @property
    def widths(self):
        """Width of x and of the image features (0 without them), and the number of classes."""
        dim_image = 0 if self.image is None else self.image.shape[1]
        return self.x.shape[1], dim_image, self.n_classes

    def tiles(self, size, device):
        """The `Tile`s of at most `size` spots, with all that a prediction for them looks at."""
        return make_tiles(
            (self.x, self.image),
            self.table(self.config.k),
            [s.xy for s in self.slides],
            size,
            hops(self.config, self.mode),
            device,
        )

    def batches(self, device):
        """([Batch] to train on, [Tile] to predict with): the whole at once, or tiles of --tile."""
        tiles = list(self.tiles(self.config.tile, device))
        labels, is_train = (
            torch.as_tensor(v, device=device) for v in (self.labels, self.split.train)
        )
        batches = []
        for tile in tiles:
            rows = is_train[tile.rows]  # (n,)
            rows[tile.n_own :] = False
            if rows.any():
                batches.append(Batch(tile, rows, labels[tile.rows][rows]))
        size = prediction_size(self.config.tile, device)
        if size != self.config.tile and len(self.labels) > size:
            tiles = list(self.tiles(size, device))
        return batches, tiles

    def arrays(self, baseline_prob):
        """{name: array} of the scored slide for the record: what it is, and the class that each
        baseline says, pred_<name> (n,); baseline_prob {name: (N, C)}."""
        rows = self.is_scored_slide
        arrays = {f"pred_{name}": prob[rows].argmax(1) for name, prob in baseline_prob.items()}
        return arrays | {
            "barcodes": self.slides[0].barcodes,
            "xy": self.slides[0].xy,
            "labels": self.labels[rows],
            "test": self.split.test[rows],
            "classes": np.array(self.classes),
        }

    def outputs(self, prob, extra):
        """{name: array} of what a network says about the scored slide: prob (N, C), extra
        {name: (N, ...)}."""
        rows = self.is_scored_slide
        arrays = {name: value[rows] for name, value in extra.items()}
        neighbours = self.table(self.config.k)[rows]
        return arrays | {
            "neighbours": neighbours,
            "prob": prob[rows],
            "pred": prob[rows].argmax(1),
        }

    def files(self):
        """Files whose content can change a number of this run."""
        return input_files_of(self.config, self.mode, self.slides)


class Batch(NamedTuple):
    """A tile to train on: rows (n,) bool of the spots with a loss, and their labels."""

    tile: object
    rows: torch.Tensor
    labels: torch.Tensor

    def inputs(self):
        """What a model takes: x (n, D), the graph, image (n, D) or None."""
        x, image = self.tile.inputs()
        return x, self.tile.graph, image


def input_files_of(config, mode, slides):
    """Files whose content can change a number of a run on `slides`."""
    encoder = config.encoder if mode.image else ""
    vectors = [config.embedding] if mode.expression == "frozen" else []
    return input_files(slides, encoder, vectors)


def scales_by_slide(config):
    """Whether each slide is z-scored by its own spots."""
    is_holdout = config.split in ("slice", "donor")
    return config.scale == "slice" or (config.scale == "auto" and is_holdout)


def scaled_slide(expression, slide, library, is_own):
    """A slide as a part of `ScaledRows`, in the gene order of `expression`; library `given` or
    `own`, as agreed for the run; is_own: z-scored by the slide's own spots."""
    sizes = library_sizes(slide, library)
    x, is_present = expression.log1p(slide.counts, slide.genes, sizes)  # (N, G) CSR, (G,)
    scaler = data.Standardise(expression.clip).fit(x) if is_own else expression.scaler
    return x, scaler, ~is_present


def image_features(config, slide):
    """(N, D) frozen features of the crop around each spot, cached by image, encoder and crop."""
    cache, device = config.cache or Path(config.data) / ".features", run.pick_device(config.device)
    return data.image_features(slide, config.encoder, CROP_UM, cache, device)


# side of the image crop in micrometres: the published 64 hires pixels are 3.1 spot pitches
CROP_UM = 310.0

# --------------------------------------------------------------------------------------------------
# How far a prediction looks
# --------------------------------------------------------------------------------------------------


def rings(k):
    """Rings of a hexagonal lattice that k neighbours fill, 3 r (r + 1) = k: k = 6: 1, 18: 2, 36: 3,
    96: 6."""
    return int(np.ceil((np.sqrt(12 * k + 9) - 3) / 6 - 1e-9))


def hops(config, mode):
    """Steps of the graph that a prediction looks at: one a graph layer, and one more for the
    cross-attention, whose layers all read the same context."""
    n_graph = config.layers if mode.graph else 0
    return n_graph + (fusion_of(config, mode) == "cross")


def receptive_field(config, mode, pitch_um=100.0):
    """Lattice pitches that a prediction can look across, at least 1: hops x rings of the
    k-neighbourhood, or half the image crop if that is more."""
    graph = rings(config.k) * hops(config, mode)
    crop = int(np.ceil(CROP_UM / pitch_um / 2 - 1e-3)) if mode.image else 0
    return float(max(1, graph, crop))


def default_buffer(config, mode, pitch_um=100.0):
    """Buffer of --split blocks in pitches: the field of the widest fusion whatever the mode, so
    that all modes are trained on the same spots."""
    widest = float(rings(config.k) * (config.layers + 1))
    return max(widest, receptive_field(config, mode, pitch_um))


# --------------------------------------------------------------------------------------------------
# Prediction and scores
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict(model, tiles, n_spots, config):
    """prob (N, C) float64 numpy, {"embedding", "attention"} numpy of the spots of all `Tile`s, in
    eval mode."""
    model.eval()
    out = {}
    for tile in tiles:
        with run.autocast(config, tile.device):
            x, image = tile.inputs()
            logits, extra = model(x, tile.graph, image)
        for name, value in {"prob": logits, **extra}.items():
            if value is None:
                continue
            # first to the CPU: some devices have no float64
            value = value[: tile.n_own].float().cpu()
            value = (value.double().softmax(1) if name == "prob" else value).numpy()
            if name not in out:
                out[name] = np.empty((n_spots, *value.shape[1:]), value.dtype)
            out[name][tile.rows[: tile.n_own]] = value
    return out.pop("prob"), out


def boundary_distance(slide, labels):
    """(N,) lattice steps to the nearest other label, on the full labelled lattice, whatever graph
    the model uses."""
    if slide.grid is not None:
        return metrics.boundary_distance(labels, data.lattice_table(slide.grid))
    return metrics.boundary_distance(labels, data.knn_table(slide.xy, 6))


def score(task, prob):
    """Flat dict of the scores of prob (N, C) on the test spots; boundary scores by the lattice
    distance of the scored slide."""
    test, rows = task.split.test, task.is_scored_slide
    scores = metrics.classification(task.labels[test], prob[test], task.classes)
    pred = prob[rows].argmax(1)
    return scores | metrics.boundary_accuracy(
        task.labels[rows], pred, task.boundary_distance, mask=test[rows]
    )


def baselines_of(task):
    """{name: function of nothing -> prob (N, C)} of the predictors that the task has inputs for,
    the trivial ones first. Those of genes, or of frozen vectors, read what the network reads."""
    functions = {
        "majority": lambda: baselines.majority(task),
        "coords_knn": lambda: baselines.coords_knn(task, task.place),
        "coords_rbf": lambda: baselines.coords_rbf(task, task.place, task.pitch),
    }
    prefix = "embedding" if task.mode.expression == "frozen" else "expr"
    smoothed = "embedding_smoothed" if task.mode.expression == "frozen" else "smoothed"
    if task.has_counts or task.mode.expression == "frozen":
        functions[f"{prefix}_lr"] = lambda: baselines.logistic(task, task.components)
        functions[f"{smoothed}_lr"] = lambda: baselines.smoothed_lr(
            task, task.components, task.table(baselines.SMOOTHED)
        )
    return functions


def score_baselines(task):
    """{name: prob (N, C)}, {name: scores} of the baselines; prints a row for each."""
    prob, scores = {}, {}
    for name, function in baselines_of(task).items():
        prob[name] = function()
        scores[name] = score(task, prob[name])
        print(score_row(name, scores[name]), flush=True)
    return prob, scores


def score_row(name, scores):
    """One row of the printed table."""
    return f"{name:<22}" + "  ".join(f"{k} {scores[k]:.3f}" for k in SHOWN)


def gains(scores, others):
    """{"gain_over_<baseline>": difference of ARI} of the scores of a network to those of others."""
    return {f"gain_over_{name}": scores["ari"] - others[name]["ari"] for name in others}
