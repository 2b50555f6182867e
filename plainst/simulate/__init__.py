"""A small synthetic cortex, image-to-gene tasks and a cell field with a known truth, written in the
real file formats.

    # Space Ranger folders datasets/sim/sim1, datasets/sim/sim2
    python -m plainst simulate cortex datasets/sim --n_spots 1200 --n_slices 2
    # a HEST-benchmark task folder
    python -m plainst simulate hest datasets/simhest --link ring2
    # a cell file: crops and counts of single cells
    python -m plainst simulate cells datasets/simcells.h5 --n_cells 3000
    # a Xenium-shaped folder (needs tifffile and pyarrow)
    python -m plainst simulate xenium datasets/simxenium --n_cells 3000

Nothing is ever N x G dense: counts are drawn in chunks of rows, each with its own random stream,
and kept sparse.
"""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path

from plainst.readers.checked import DataError
from plainst.simulate.cells import cell_field, cell_programs, simulate_cells
from plainst.simulate.cortex import (
    EOSIN_OD,
    LAYER_DEPTH,
    LAYERS,
    NUCLEI,
    NUCLEUS_UM,
    PATCH_UM,
    PITCH,
    SHARE,
    STAINS,
    Tissue,
    clouds,
    draw_counts,
    gene_programs,
    lattice,
    lattice_barcodes,
    lattice_pixels,
    simulate_cortex,
    stain,
)
from plainst.simulate.files import new_folder, write_hest, write_visium
from plainst.simulate.patches import patch_features, ring2_mean, simulate_hest
from plainst.simulate.xenium import simulate_xenium

FLAGS = {
    "n_spots": "tissue spots of a slice (cortex: 200 to 1,000,000)",
    "n_genes": "genes",
    "n_classes": "5 (Layer3..WM), 6 or 7 (Layer1..WM)",
    "signal": (
        "strength of the layer programs; at 1 the genes of one spot name its layer in two of "
        "three cases"
    ),
    "noise_genes": "counts without any layer information, to test for leakage",
    "program_seed": "genes and markers",
    "seed": "tissue, images and counts",
    "n_slides": "slides, one a patient",
    "patch_size": "px",
    "n_cells": "cells of all sections together",
    "n_sections": "tissue sections",
    "size": "side of a crop, px",
    "link": (
        "what sets the genes of a spot: its own patch (patch), the patches two steps away "
        "(ring2) or neither (none)"
    ),
}


def main(argv=None) -> None:
    """Command line; exit status 2 and one sentence on a bad argument."""
    parser = argparse.ArgumentParser(
        prog="python -m plainst simulate", description=__doc__.split("\n")[0]
    )
    commands = parser.add_subparsers(dest="what", required=True)
    for what, function, text in (
        (
            "cortex",
            simulate_cortex,
            "layered slices as Space Ranger folders OUT/sim1, OUT/sim2 ...",
        ),
        (
            "hest",
            simulate_hest,
            "a HEST-benchmark task folder whose genes are a known function of the H&E patches",
        ),
        (
            "cells",
            simulate_cells,
            "a cell file: crops and counts of single cells with a known truth",
        ),
        ("xenium", simulate_xenium, "a Xenium-shaped folder of single cells, with labels.csv"),
    ):
        command = commands.add_parser(
            what,
            help=text,
            description=text,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        command.add_argument("out", help="file to write" if what == "cells" else "folder to write")
        for name, default in (
            (p.name, p.default)
            for p in inspect.signature(function).parameters.values()
            if p.name in FLAGS
        ):
            kind = {"action": "store_true"} if default is False else {"type": type(default)}
            command.add_argument(f"--{name}", default=default, help=FLAGS[name], **kind)
    cortex = commands.choices["cortex"]
    cortex.add_argument("--n_slices", type=int, default=2, help="slices, each with its own seed")
    cortex.add_argument(
        "--n_donors",
        type=int,
        default=1,
        help="donors that the slices are shared out to; donors differ by a batch effect",
    )
    options = vars(parser.parse_args(argv))
    what, out = options.pop("what"), Path(options.pop("out"))
    try:
        if what != "cortex":
            makers = {"hest": simulate_hest, "cells": simulate_cells, "xenium": simulate_xenium}
            print(makers[what](out, **options))
            return
        n_slices, n_donors, seed = (options.pop(name) for name in ("n_slices", "n_donors", "seed"))
        if not 1 <= n_donors <= n_slices <= 26:
            raise DataError(
                f"n_slices is {n_slices} and n_donors {n_donors}: 26 slices at most and no "
                "more donors than slices"
            )
        for i in range(n_slices):
            slide = simulate_cortex(
                seed=1000 * seed + i,
                sample=f"sim{i + 1}",
                donor=f"Sim{chr(65 + i * n_donors // n_slices)}",
                **options,
            )
            print(write_visium(slide, out / slide.sample))
    except DataError as error:
        parser.exit(2, f"error: {error}\n")
