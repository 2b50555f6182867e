"""Single cells of the mouse hippocampus CA1: `make reproduce-ca1`."""

from pathlib import Path

from experiments import SEEDS, Job

DATA = "datasets/ca1/cells.h5"
DOWNLOAD = "download ca1 --out datasets/ca1; convert ca1 datasets/ca1 datasets/ca1/cells.h5"
FOLDS = (0,)
PRESETS = ("tuned",)


def jobs(data=DATA, seeds=SEEDS, folds=FOLDS):
    """The default run on every fold of the blocks."""
    for seed in seeds:
        for fold in folds:
            for preset in PRESETS:
                flags = f"--fold {fold}"
                download = DOWNLOAD if data == DATA and not Path(data).exists() else ""
                part, split = f"test-fold{fold}", "blocks"
                yield Job(
                    "spatia", data, part, flags, seed, "spatia/default", preset, split, download
                )
