"""Layers of a new slide from a saved model: the checkpoint, genes aligned by name, scores where the
new slide has labels."""

from dataclasses import replace

import numpy as np
import torch

import data
import metrics
from data import DataError
from evaluation import figures, layers
from plainst import export, run
from plainst.scaled import ScaledRows
from plainst.tiles import make_tiles, prediction_size

# of a checkpoint
NEEDED = ["config", "classes", "weights", "dim_in", "expression", "image_scale"]
# flags that --predict takes from its own command line
OF_THIS_RUN = (
    *("data", "slice", "labels", "seed", "device", "threads", "deterministic", "runs", "cache"),
    *("min_shared", "tile", "bf16", "compile", "h5ad", "fast"),
)


def checkpoint(task, model):
    """Everything that --predict needs, as tensors, numbers and strings: loads with
    weights_only=True."""
    is_frozen = task.mode.expression == "frozen"
    return {
        "config": vars(task.config).copy(),
        "classes": task.classes,
        "weights": model.state_dict(),
        "dim_in": task.x.shape[1],
        "library": task.library,
        "expression": None if is_frozen else task.expression.state(),
        "image_scale": None if task.image is None else [torch.tensor(v) for v in task.image_scale],
    }


def read_checkpoint(config, check, modes):
    """(what `checkpoint` saved, the flags to predict with: the checkpoint's, but for the place of
    things and what is typed of --scale, --embedding, --encoder and the names of columns)."""
    path, typed = config.predict, config.typed.split()
    saved = run.read_checkpoint(path, "gat_fusion checkpoint", NEEDED)
    known = run.saved_flags(path, type(config), saved["config"], check)
    mode = modes[known.mode]
    run.refuse_idle_flags(config, layers.input_rules(known.mode, mode))
    is_frozen = mode.expression == "frozen"
    run.refuse_idle_flags(config, [(is_frozen, "on frozen vectors", ("scale",))])
    with run.checkpoint_fits(path):
        if not all(isinstance(name, str) for name in saved["classes"]):
            raise ValueError("a class has no name")
    if mode.image and saved["image_scale"] is None:
        raise DataError(f"{path} has mode {known.mode} but no image_scale: train it again")
    is_elsewhere = (config.data, config.slice) != (known.data, known.slice)
    is_given = "embedding" in typed or not layers.is_of_one_slide(known.embedding)
    if is_frozen and is_elsewhere and not is_given:
        raise DataError(
            f"{path} was trained on the vectors {known.embedding}, which are of its own slide: "
            "name those of the new one with --embedding"
        )
    flags = {name: getattr(config, name) for name in OF_THIS_RUN}
    from_typed = ("scale", "embedding", "encoder", *config.columns())
    flags |= {name: getattr(config, name) for name in from_typed if name in typed}
    return saved, known, replace(known, **flags, predict=path)


def inputs_of(config, mode, saved, slide):
    """x (N, dim_in), an array or `ScaledRows`, standardised image features (N, D) or None, and the
    library, of a new slide. Raises DataError where they do not fit the checkpoint."""
    if mode.expression == "frozen":
        x, library = vectors_of(config, saved, slide), ""
    else:
        x, library = genes_of(config, saved, slide)
    return x, image_of(config, saved, slide) if mode.image else None, library


def vectors_of(config, saved, slide):
    """(N, dim_in) frozen vectors of a slide."""
    x = data.read_embedding(config.embedding, slide)
    if x.shape[1] != saved["dim_in"]:
        raise DataError(
            f"{data.slice_path(config.embedding, slide)} has vectors of width {x.shape[1]}, "
            f"{config.predict} was trained on {saved['dim_in']}: give vectors of the same model "
            "with --embedding"
        )
    return x


def genes_of(config, saved, slide):
    """`ScaledRows` (N, dim_in) of a slide, its genes aligned by name, and its library."""
    with run.checkpoint_fits(config.predict):
        expression = data.Expression.from_state(saved["expression"])
        library = saved.get("library", config.library)
    share = np.isin(expression.genes, slide.genes).mean()
    print(f"{slide.sample} has {share:.0%} of the checkpoint's {len(expression.genes)} genes")
    if share < config.min_shared:
        raise DataError(
            f"{slide.source} has {share:.0%} of the checkpoint's {len(expression.genes)} genes, "
            f"fewer than --min_shared {config.min_shared:.0%}: retrain on the common genes, or "
            "lower --min_shared"
        )
    if slide.library_size is None:
        if library == "given":
            print(
                f"library size: own, {slide.sample} came without one; the checkpoint was trained "
                "on given ones"
            )
        library = "own"
    is_own = layers.scales_by_slide(config)
    return ScaledRows([layers.scaled_slide(expression, slide, library, is_own)]), library


def image_of(config, saved, slide):
    """(N, D) image features of a slide, standardised as in training."""
    with run.checkpoint_fits(config.predict):
        mean, std = (v.numpy() for v in saved["image_scale"])
    features = layers.image_features(config, slide)
    if features.shape[1] != len(mean):
        raise DataError(
            f"encoder {config.encoder} gives {slide.sample} features of width "
            f"{features.shape[1]}, {config.predict} was trained on {len(mean)}: give the encoder "
            "of its training with --encoder"
        )
    return ((features - mean) / std).astype(np.float32)


def predict_slide(config, check, modes, build, start):
    """Predict the layers of a new slide with a saved model: genes aligned by name, the graph built
    inside the new slide. check, modes, build: those of the method; start as in `run.Run`."""
    saved, known, config = read_checkpoint(config, check, modes)
    mode = modes[known.mode]
    slide = layers.load_one(
        config, config.slice or None, config.labels or None, mode.expression == "frozen"
    )
    name = f"predict-{layers.variant(known, mode)}-{data.file_checksum(config.predict)[:8]}"
    record = run.Run("gat_fusion", config, slide.sample, name, start)
    record.note_inputs([*layers.input_files_of(config, mode, [slide]), config.predict])
    x, image, library = inputs_of(config, mode, saved, slide)
    table = data.knn_table(slide.xy, config.k, name=slide.sample)
    record.lap("read")
    widths = (saved["dim_in"], 0 if image is None else image.shape[1], len(saved["classes"]))
    with run.checkpoint_fits(config.predict):
        model = build(config, *widths).to(record.device)
        model.load_state_dict(saved["weights"])
    size, device = prediction_size(config.tile, record.device), record.device
    tiles = make_tiles((x, image), table, [slide.xy], size, layers.hops(config, mode), device)
    prob, extra = layers.predict(model, tiles, slide.n_spots, config)
    record.lap("prediction")
    labels, n_unscored = labels_of(slide, saved["classes"])
    arrays = {
        "barcodes": slide.barcodes,
        "xy": slide.xy,
        "labels": labels,
        "test": labels >= 0,
        "classes": np.array(saved["classes"]),
        "prob": prob,
        "pred": prob.argmax(1),
        "neighbours": table,
        **extra,
    }
    scores = {}
    if len(np.unique(labels[labels >= 0])) > 1:
        scores = metrics.classification(labels, prob, saved["classes"])
        distance = layers.boundary_distance(slide, labels)
        scores |= metrics.boundary_accuracy(labels, prob.argmax(1), distance)
        print(layers.score_row("predict", scores))
    figures.draw_gat_fusion(record, slide, arrays, None)
    record.finish(
        scores,
        {},
        arrays,
        sum(w.numel() for w in model.parameters()),
        files=export.files_of("gat_fusion", arrays, [slide], config),
        checkpoint=config.predict,
        library=library,
        spots_of_absent_classes=n_unscored,
    )
    return 0


def labels_of(slide, classes):
    """(N,) labels of a slide in the numbering of `classes`, -1 = none, and {class that is not among
    them: its number of spots}."""
    code = {name: i for i, name in enumerate(classes)}
    labels = np.array([code.get(name, -1) for name in slide.classes] + [-1])[slide.labels]
    n_unscored = {}
    for i, name in enumerate(slide.classes):
        n_spots = int((slide.labels == i).sum())
        if name not in code and n_spots:
            n_unscored[name] = n_spots
    if n_unscored:
        print(
            f"{slide.sample}: {sum(n_unscored.values())} spots are not scored, the checkpoint has "
            f"no class {', '.join(n_unscored)}"
        )
    return labels, n_unscored
