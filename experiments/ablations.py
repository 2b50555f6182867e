"""What each method depends on, one change at a time: `make ablations`.

Each list is {name of the variant: its flags}; the run without a change is part of every list.
"""

from itertools import product
from pathlib import Path

from experiments import SEEDS, Job, dlpfc, her2st
from experiments.ca1 import DATA as CA1
from experiments.ca1 import DOWNLOAD

SLICES = ("151673", "151674")
MULTIST = [  # of the preset paper; each part switched off, then the source's open question 3
    "",
    *("--image off", "--image permuted", "--image noise", "--image zero"),
    *("--mask_mode none", "--mask_mode replace", "--mask_mode zero"),
    *("--gan off", "--gan mean", "--no-dec", "--diffusion_steps 0", "--diffusion_steps 3"),
    *("--m 1", "--direction gene_reads_image", "--branches serial"),
    *("--mask_rate 0.5", "--mask_rate 0.65", "--mask_rate 0.95"),
    *("--alpha 0.3", "--alpha 0.5", "--alpha 0.9"),
    *("--k 3", "--k 12", "--k 18"),
]
CMRCNET = [
    "",
    *("--mask_rate 0.0", "--mask_rate 0.3", "--mask_rate 0.7"),
    "--reconstruction cosine",
    *(f"--reconstruction cosine --mask_rate {rate}" for rate in ("0.0", "0.3", "0.7")),
    "--reconstruction none",
    *("--reconstruct genes", "--schedule two-stage"),
    *("--shuffle_pairs", "--no-share", "--weighting softmax"),
]
STFORMER = [  # controls: no context but through the pathways, no distance, images of other spots
    "",
    *("--interactions p2p", "--interactions p2p,p2h,h2p"),
    *("--no-distance_bias", "--permute_pairs"),
]
GENE_SETS = "datasets/hallmark/h.all.symbols.gmt"
STFORMER_SETS = ["", "--shuffle_sets"]  # with the gene sets of the file above
SPATIA = ["", "--rho 0.25", "--rho 0.5"]
SPATIA_PARTS = ("--no-mae", "--no-fusion", "--no-niche", "--no-tissue")  # every subset of them


def label(flags):
    """Short name of a variant: `--image off` -> `image-off`; of none `default`."""
    return flags.removeprefix("--").replace(" --", "+").replace(" ", "-") or "default"


def jobs(data="", slices=(), seeds=SEEDS, encoder=her2st.ENCODER):
    """The variants of all methods; `data` stands for each method's own folder where it is empty."""
    for seed in seeds:
        yield from multist_jobs(data or dlpfc.DATA, slices or SLICES, seed)
        yield from hest_jobs(data or her2st.DATA, slices or her2st.SECTIONS, seed, encoder)
        yield from spatia_jobs(data or CA1, seed)


def multist_jobs(data, slices, seed):
    """One slice after the other."""
    for name in slices:
        is_lacking = data == dlpfc.DATA and not (Path(data) / name).exists()
        download = f"download dlpfc --slices {name} --out {data}" if is_lacking else ""
        for flags in MULTIST:
            model, text = f"multist/{label(flags)}", f"--slice {name} {flags}"
            yield Job("multist", data, name, text, seed, model, "paper", "", download)


def hest_jobs(data, slices, seed, encoder):
    """Held-out sections of one patient, one after the other; of cmrcnet the folder's folds, too."""
    both = f"--encoder {encoder} " if encoder else ""
    retrieval = [("cmrcnet", flags) for flags in CMRCNET]
    variants = [*retrieval, *(("stformer", flags) for flags in STFORMER)]
    if Path(GENE_SETS).exists():
        variants += [("stformer", f"--gene_sets {GENE_SETS} {f}".strip()) for f in STFORMER_SETS]
    for name in slices:
        where = f"--split section --slice {name} {both}"
        for method, flags in variants:
            model = f"{method}/{label(flags)}"
            yield Job(method, data, name, where + flags, seed, model, "tuned", "section")
    for fold in her2st.folds_of(data):
        for method, flags in retrieval:
            model, text = f"{method}/{label(flags)}", f"--fold {fold} {both}{flags}"
            yield Job(method, data, f"fold{fold}", text, seed, model, "tuned", "folds")


def spatia_jobs(data, seed):
    """Every subset of the parts that can be left out, without the generator; merging with it."""
    subsets = [" ".join(filter(None, parts)) for parts in product(*(("", p) for p in SPATIA_PARTS))]
    download = DOWNLOAD if data == CA1 and not Path(data).exists() else ""
    for flags in [*SPATIA, *(f"{parts} --no-generate".strip() for parts in subsets)]:
        model = f"spatia/{label(flags)}"
        yield Job("spatia", data, "test-fold0", flags, seed, model, "tuned", "blocks", download)
