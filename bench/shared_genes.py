"""What share of a model's genes a new slide must have: trained on one slice, predicted on another
from which more and more genes are taken at random. Sets the default of --min_shared.

    python bench/shared_genes.py --data datasets/dlpfc --train 151673 --test 151674
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import gat_fusion
import metrics
from evaluation import layers, new_slides
from plainst import run
from plainst.tiles import make_tiles

SHARES = (1.0, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02)


def trained(config, slide):
    """(model, checkpoint) of one slide, random spots held out for early stopping."""
    run.seed_everything(config.seed)
    task = layers.Task(config, gat_fusion.MODES[config.mode], [slide])
    model = gat_fusion.train(task, torch.device("cpu"))[0]
    return model, new_slides.checkpoint(task, model)


def ari_of(config, model, saved, slide):
    """(share of the checkpoint's genes, ARI) of a slide."""
    mode = gat_fusion.MODES[config.mode]
    x, _ = new_slides.genes_of(config, saved, slide)
    table, hops = data.knn_table(slide.xy, config.k), layers.hops(config, mode)
    tiles = make_tiles((x, None), table, [slide.xy], 0, hops, "cpu")
    prob, _ = layers.predict(model, tiles, slide.n_spots, config)
    labels, _ = new_slides.labels_of(slide, saved["classes"])
    share = np.isin(saved["expression"]["genes"], slide.genes).mean()
    return share, metrics.classification(labels, prob)["ari"]


def main(argv=None):
    """Print a row for every mode and seed, a column for every share."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="datasets/dlpfc")
    parser.add_argument("--train", default="151673")
    parser.add_argument("--test", default="151674")
    parser.add_argument("--modes", nargs="*", default=["gcn_only", "full"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1])
    options = parser.parse_args(argv)
    slides = [data.load_slide(options.data, name) for name in (options.train, options.test)]
    common = data.common_genes(slides)
    first, second = (slide.select_genes(common) for slide in slides)
    for mode in options.modes:
        for seed in options.seeds:
            config = gat_fusion.Config(mode=mode, seed=seed, min_shared=0.0)
            model, saved = trained(config, first)
            # as --predict has it where nothing is typed, and by the new slide's own spots
            for scale in ("train", "slice"):
                config.scale = scale
                rng, row = np.random.default_rng(seed), []
                genes = rng.permutation(saved["expression"]["genes"])
                for share in SHARES:
                    part = second.select_genes(genes[: int(share * len(genes))])
                    row.append("{:.2f}: {:.3f}".format(*ari_of(config, model, saved, part)))
                print(f"| {mode} seed {seed}, --scale {scale} | " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
