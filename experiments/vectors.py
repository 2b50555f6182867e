"""Frozen vectors of the spots of many slices through gat_fusion, random spots and blocks:
`make reproduce-vectors VECTORS="vectors/{slice}.npz"`."""

from pathlib import Path

from experiments import Job
from experiments.dlpfc import DATA
from experiments.layers import BUFFER
from plainst.readers import list_slices

MODES = {
    "embedding-cross": "--mode embedding --fusion cross",
    "embedding-concat": "--mode embedding --fusion concat",
    "embedding-gated": "--mode embedding --fusion gated",
    "embedding_only": "--mode embedding_only",
}


def jobs(data=DATA, slices=(), seeds=(0,), folds=(0, 1, 2, 3, 4), vectors="vectors/{slice}.npz"):
    """Every mode on every slice that has a file of vectors."""
    present = list_slices(data) if Path(data).is_dir() else []
    names = [n for n in slices or present if Path(vectors.replace("{slice}", n)).exists()]
    splits = ["--split random"]
    splits += [f"--split blocks --fold {fold} --buffer {BUFFER}" for fold in folds]
    for split in splits:
        for name in names:
            for model, flags in MODES.items():
                for seed in seeds:
                    text = f"--slice {name} {split} {flags} --embedding {vectors}"
                    model_name, split_name = f"gat_fusion/{model}", split.split()[1]
                    row = ("gat_fusion", data, name, text, seed, model_name, "paper", split_name)
                    yield Job(*row)
