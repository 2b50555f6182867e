"""The table that gat_fusion's source opens with, on splits that leak and splits that do not:
`make reproduce-layers`; and the choice of `tuned`."""

from experiments import Job
from experiments.dlpfc import DATA

MODES = {  # model: its flags
    "expr_only": "--mode expr_only",
    "gat_only": "--mode gat_only",
    "gcn_only": "--mode gcn_only",
    "concat": "--mode concat",
    "full-gated": "--mode full --fusion gated",
    "full-cross": "--mode full --fusion cross",
    "gcn_full-cross": "--mode gcn_full --fusion cross",
    "img_expr-gated": "--mode img_expr --fusion gated",
    "img_expr-cross": "--mode img_expr --fusion cross",
    "multimodal-cross": "--mode multimodal --fusion cross",
}
FROZEN = {
    "embedding_only": "--mode embedding_only",
    "embedding-cross": "--mode embedding --fusion cross",
}
# of the blocks: the field of k = 18 with cross-attention, so that all rows train on the same spots
BUFFER = 6
FOLDS = (0, 1, 2, 3, 4)
SLICES = ("151673",)
# scored slice: training slices
NEXT = {"151674": "151673"}
OTHER_DONOR = {"151510": "151673,151674"}
OF_DONORS = ("expr_only", "gat_only", "gcn_only", "full-cross")
# the mode of the preset `tuned`
TUNED = "full-cross"
# what `tuned` was chosen from, by validation ARI on the blocks of 151673
CANDIDATES = {
    f"{model}-k-{k}-layers-{layers}": f"{MODES[model]} --k {k} --layers {layers}"
    for model in ("gcn_only", "gat_only", "full-cross")
    for k, layers in ((6, 1), (18, 2))  # (6, 2) is the paper's: a row of the table
}


def jobs(data=DATA, slices=SLICES, seeds=(0, 1, 2), folds=FOLDS, vectors=""):
    """Random spots, the next slice, another donor, blocks; on the blocks the candidates, too."""
    frozen = {name: f"{flags} --embedding {vectors}" for name, flags in FROZEN.items()}
    models = MODES | (frozen if vectors else {})

    def job(part, split, model, flags, seed, preset="paper", **more):
        name, text = f"gat_fusion/{model}", f"--slice {part} {split} {flags}"
        split_name = split.split()[1]
        return Job("gat_fusion", data, part, text, seed, name, preset, split_name, **more)

    wholes = [(part, "--split random") for part in slices]
    wholes += [(part, f"--split slice --train {train}") for part, train in NEXT.items()]
    blocks = [f"--split blocks --fold {fold} --buffer {BUFFER}" for fold in folds]
    blocks = [(part, split) for split in blocks for part in slices]
    for seed in seeds:
        for place in wholes + blocks:
            yield job(*place, TUNED, MODES[TUNED], seed, "tuned")
        for model, flags in models.items():
            for place in wholes:
                yield job(*place, model, flags, seed)
    for model in OF_DONORS:
        for part, train in OTHER_DONOR.items():
            yield job(part, f"--split donor --train {train}", model, MODES[model], seeds[0])
    for seed in seeds:
        for model, flags in (models | CANDIDATES).items():
            for place in blocks:
                is_extra = seed != seeds[0] and model in CANDIDATES
                yield job(*place, model, flags, seed, is_extra=is_extra)
