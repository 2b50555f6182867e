"""Genes from H&E on a HEST-benchmark task folder: `make reproduce-her2st`."""

from pathlib import Path

from experiments import SEEDS, Job
from plainst.readers.checked import DataError

DATA = "datasets/her2st"
SECTIONS = ("C2", "C3", "C4", "C5")  # of one patient: leaks the patient, and the record says so
ENCODER = ""  # file of features with {sample} in its name; empty: the hand-made descriptor
PRESETS = {"stformer": ("paper", "tuned"), "cmrcnet": ("paper", "tuned")}
SECTION_MODELS = {  # model: its flags on a held-out section
    "stformer": {"default": "", "patch-only": "--interactions p2p"},
    "cmrcnet": {"default": ""},
}
FOLD_MODELS = {
    "stformer": {"default": ""},
    "cmrcnet": {"default": ""},
}


def jobs(data=DATA, slices=(), seeds=SEEDS, splits=("folds", "section"), encoder=ENCODER):
    """Every fold of the folder, then every section of `slices`, with both methods."""
    sections = slices or (SECTIONS if Path(data) == Path(DATA) else ())
    folds = folds_of(data)
    if not folds and not sections:
        raise DataError(f"{data} holds no splits/test_<k>.csv: give a HEST-benchmark task folder")
    both = f"--encoder {encoder}" if encoder else ""
    for seed in seeds:
        if "folds" in splits:
            for fold in folds:
                where = f"--fold {fold} {both}"
                yield from runs_of(FOLD_MODELS, data, f"fold{fold}", where, seed, "folds")
        if "section" in splits:
            for name in sections:
                where = f"--split section --slice {name} {both}"
                yield from runs_of(SECTION_MODELS, data, name, where, seed, "section")


def folds_of(data):
    """Numbers of the folder's own splits, as text; none where the folder is not there."""
    numbers = [path.stem.removeprefix("test_") for path in Path(data).glob("splits/test_*.csv")]
    return sorted(numbers, key=lambda number: (len(number), number))


def runs_of(models, data, part, where, seed, split):
    """The jobs of one fold or section."""
    for method, variants in models.items():
        for variant, flags in variants.items():
            model = f"{method}/{variant}"
            for preset in PRESETS[method]:
                yield Job(method, data, part, f"{where} {flags}", seed, model, preset, split)
