"""What a trained gat_fusion looks at: a map of its fused embedding, and which genes move a layer.

    python bench/explain_layers.py runs/gat_fusion/dlpfc/151673/<variant>/seed0/model.pt \
      --data datasets/dlpfc --slice 151673 --out runs/explain

Writes embedding.png (t-SNE of up to 3,000 spots, coloured by annotated and by predicted layer),
genes.csv (a row a gene: flips and drop of every layer, see evaluation/perturbation.py), genes.png
(the genes with the largest drop of each layer beside what 95 % of all genes stay below) and
sets.csv (the top genes of each layer together, and --markers, against 20 random sets of genes).
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gat_fusion
from evaluation import figures, layers, new_slides, perturbation
from plainst import run
from plainst.readers.checked import DataError
from plainst.run import write_atomically
from plainst.tiles import make_tiles

# published markers of the layers of the human cortex (Maynard et al. 2021), where a panel has them
MARKERS = {
    "L1": "RELN AQP4 MSX1",
    "L2/3": "HPCAL1 CUX2 LAMP5 CARTPT ENC1",
    "L4": "RORB NEFH",
    "L5": "PCP4 TRABD2A ETV1 BCL11B",
    "L6": "KRT17 NTNG2 TLE4 NR4A2",
    "WM": "MBP MOBP PLP1 GFAP MAG CNP",
}


def open_model(options):
    """(x (N, G), zero (G,), outputs, labels (N,), what the checkpoint holds) of a checkpoint and a
    slide; zero: the z-scores of genes without a count; outputs: x -> prob (N, C), {"embedding"}."""
    words = ["--predict", options.model, "--data", options.data, "--slice", options.slice]
    asked = run.parse(gat_fusion.Config, words)
    saved, known, config = new_slides.read_checkpoint(asked, gat_fusion.check, gat_fusion.MODES)
    mode = gat_fusion.MODES[known.mode]
    if mode.expression == "frozen" or mode.image:
        raise DataError(f"{options.model} has mode {known.mode}: genes alone can be perturbed")
    slide = layers.load_one(config, config.slice or None, None, False)
    rows, _ = new_slides.genes_of(config, saved, slide)
    x, scaler = rows[:], rows.scalers[0]
    zero = np.maximum(-scaler.mean / scaler.std, -10).astype(np.float32)
    with run.checkpoint_fits(options.model):
        model = gat_fusion.GatFusion(config, saved["dim_in"], 0, len(saved["classes"]))
        model.load_state_dict(saved["weights"])
    table = layers.data.knn_table(slide.xy, config.k, name=slide.sample)
    hops = layers.hops(config, mode)

    def outputs(values):
        (tile,) = make_tiles((values, None), table, [slide.xy], 0, hops, "cpu")
        return layers.predict(model, [tile], slide.n_spots, config)

    labels, _ = new_slides.labels_of(slide, saved["classes"])
    return x, zero, outputs, labels, saved


def sets_of(change, genes, classes, n_top):
    """{name: columns} of the top genes of each layer, and of the published markers at hand."""
    column = {gene: j for j, gene in enumerate(genes)}
    sets = {}
    for c, name in enumerate(classes):
        sets[f"top {n_top} of {name}"] = np.argsort(-change.drop[:, c])[:n_top]
    for name, markers in MARKERS.items():
        columns = [column[gene] for gene in markers.split() if gene in column]
        if columns:
            shown = ", ".join(genes[j] for j in columns)
            sets[f"markers of {name}: {shown}"] = np.array(columns)
    return sets


def write_rows(path, header, rows):
    """A CSV, written whole or not at all."""

    def write(file):
        lines = [",".join(f'"{v}"' if isinstance(v, str) else f"{v:.6g}" for v in r) for r in rows]
        file.write("\n".join([",".join(header), *lines, ""]).encode())

    write_atomically(path, write, "--out")


def main(argv=None):
    """Write the figures and tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="model.pt of a run")
    parser.add_argument("--data", default="datasets/dlpfc", help="as of the run")
    parser.add_argument("--slice", default="", help="slice to explain")
    parser.add_argument("--out", default="runs/explain", help="folder to write")
    parser.add_argument("--value", choices=["zero", "mean"], default="zero", help="of the genes")
    parser.add_argument("--n_genes", type=int, default=0, help="first so many; 0: all")
    parser.add_argument("--n_top", type=int, default=10, help="genes of a set of a layer")
    options = parser.parse_args(argv)
    x, zero, outputs, labels, saved = open_model(options)
    classes, genes = saved["classes"], saved["expression"]["genes"]
    out = Path(options.out)
    prob, extra = outputs(x)
    value = zero if options.value == "zero" else np.zeros_like(zero)
    singles = [np.array([j]) for j in range(options.n_genes or len(genes))]
    change = perturbation.perturb(lambda v: outputs(v)[0], x, singles, value)
    header = ["gene", *(f"{kind}_{c}" for kind in ("flips", "drop") for c in classes)]
    rows = [
        [genes[j], *change.flips[j].tolist(), *change.drop[j].tolist()] for j in range(len(singles))
    ]
    write_rows(out / "genes.csv", header, rows)
    rows = []
    for name, columns in sets_of(change, genes, classes, options.n_top).items():
        beside = perturbation.against_random(lambda v: outputs(v)[0], x, columns, value)
        row = [beside["flips"], np.median(beside["random_flips"]), beside["drop"]]
        rows.append([name, *row, np.median(beside["random_drop"]), beside["p"]])
        print("{}: flips {:.3f} (random {:.3f}), drop {:.3f} ({:.3f}), p {:.3f}".format(*rows[-1]))
    header = ["set", "flips", "flips_of_random_sets", "drop", "drop_of_random_sets", "p"]
    write_rows(out / "sets.csv", header, rows)
    for name, figure in {
        "embedding": figures.draw_embedding_map(
            extra["embedding"], labels, prob.argmax(1), classes
        ),
        "genes": figures.draw_gene_changes(change.drop, genes, classes),
    }.items():
        write_atomically(
            out / f"{name}.png",
            lambda f, figure=figure: figure.savefig(f, dpi=110, bbox_inches="tight", format="png"),
            "--out",
        )
    n_flips = change.spots.sum(1)
    print(
        f"{len(singles)} genes one by one: median {np.median(n_flips):.0f}, most {n_flips.max()} "
        f"of {len(x)} spots change layer ({genes[int(n_flips.argmax())]})"
    )
    print(out / "sets.csv")
    return 0


if __name__ == "__main__":
    run.cli(main)
