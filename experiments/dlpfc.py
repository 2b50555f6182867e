"""Cortical layers and domains on the twelve DLPFC slices: `make reproduce-dlpfc`."""

from pathlib import Path

from experiments import SEEDS, Job
from plainst.readers import list_slices

DATA = "datasets/dlpfc"
DONORS = {  # donor: its serial sections (Maynard et al. 2021)
    "Br5292": ("151507", "151508", "151509", "151510"),
    "Br5595": ("151669", "151670", "151671", "151672"),
    "Br8100": ("151673", "151674", "151675", "151676"),
}
LAYERS = {  # model of gat_fusion: its flags
    "full-cross": "--mode full --fusion cross",
    "full-gated": "--mode full --fusion gated",
    "concat": "--mode concat",
    "gat_only": "--mode gat_only",
    "gcn_only": "--mode gcn_only",
    "gcn_full-cross": "--mode gcn_full --fusion cross",
    "expr_only": "--mode expr_only",
}
FLOORS = {"none": "--mode none"}  # the baselines alone; where MODELS and SPLITS name it
HELD_OUT = (
    "full-cross",
)  # also on blocks and on another slice; others where MODELS and SPLITS name them
SPLITS = ("random", "blocks", "slice")
FOLDS = (0, 1, 2, 3, 4)  # of the blocks
DOMAINS = {  # preset of multist: its variants
    "paper": {
        "default": "",
        "image-off": "--image off",
        "image-permuted": "--image permuted",
        "direction-gene_reads_image": "--direction gene_reads_image",
    },
    "released": {"default": ""},
    "tuned": {"default": ""},
}
PRESETS = {"gat_fusion": ("paper", "tuned")}


def siblings(name, names):
    """The other slices of the donor of `name` among `names`; of an unknown donor, all others."""
    donor = next((slices for slices in DONORS.values() if name in slices), names)
    return [other for other in names if other in donor and other != name]


def jobs(data=DATA, slices=(), seeds=SEEDS, splits=SPLITS, folds=FOLDS):
    """Every model on random spots, the chosen ones on blocks and on another slice; then domains."""
    is_public = Path(data) == Path(DATA)
    present = list_slices(data) if Path(data).is_dir() else []
    all_public = [name for names in DONORS.values() for name in names]
    names = list(slices) or (all_public if is_public else present)
    for name in names:
        download = ""
        if is_public and name not in present:
            download = f"download dlpfc --slices {name} --out {data}"
        for seed in seeds:
            for split, model, flags in layer_runs(name, names, splits, folds):
                is_extra = model in FLOORS or (split != "random" and model not in HELD_OUT)
                what, text = f"gat_fusion/{model}", f"--slice {name} {flags}"
                run = ("gat_fusion", data, name, text, seed, what)
                for preset in PRESETS["gat_fusion"]:
                    yield Job(*run, preset, split, download, is_extra)
            for preset, variants in DOMAINS.items():
                for variant, flags in variants.items():
                    model, text = f"multist/{variant}", f"--slice {name} {flags}"
                    yield Job("multist", data, name, text, seed, model, preset, "", download)


def layer_runs(name, names, splits, folds):
    """(split, model, flags) of the supervised runs of one slice."""
    for model, flags in (LAYERS | FLOORS).items():
        if "random" in splits:
            yield "random", model, f"--split random {flags}"
        if "blocks" in splits:
            for fold in folds:
                yield "blocks", model, f"--split blocks --fold {fold} {flags}"
        others = siblings(name, names)
        if "slice" in splits and others:
            yield "slice", model, f"--split slice --train {','.join(others)} {flags}"
