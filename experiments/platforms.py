"""Domains on other platforms than Visium, each a public h5ad file: `make reproduce-platforms`."""

from experiments import SEEDS, Job

DATA = "datasets"
SLIDES = {  # folder/file: (key of the labels, flags)
    "starmap_visual_cortex/BY3.h5ad": "layer",
    "starmap_mpfc/BZ5.h5ad": "domain",
    "starmap_mpfc/BZ9.h5ad": "domain",
    "osmfish/cortex.h5ad": "region",
    "pdac_st/pdac_a.h5ad": "region",
}
PRESETS = ("paper", "released", "tuned")


def jobs(data=DATA, slices=(), seeds=SEEDS):
    """multist on every slide of the list, or on those whose file is named in `slices`."""
    for path, key in SLIDES.items():
        name = path.split("/")[-1].removesuffix(".h5ad")
        if slices and name not in slices:
            continue
        for seed in seeds:
            for preset in PRESETS:
                flags = f"--label_key {key}"
                yield Job("multist", f"{data}/{path}", name, flags, seed, "multist/default", preset)
