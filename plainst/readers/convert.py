"""In-situ sequencing reads and 10x Xenium output -> the cell file of `crops`.

# spots.csv + label_image.coo.npz, the pciSeq demo of mouse hippocampus CA1
python -m plainst convert ca1 <folder> <cells.h5>
# needs the extra [xenium]: tifffile, imagecodecs, pyarrow
python -m plainst convert xenium <bundle> <cells.h5>
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from scipy.spatial import cKDTree

from plainst.readers import load_slide
from plainst.readers.checked import NPZ_ERRORS, DataError
from plainst.readers.crops import BLOCK, require, write_cells
from plainst.readers.cut import (
    cut_window,
    pool_pixels,
    read_cell_labels,
    read_stain,
    report_cells,
)
from plainst.readers.xenium import from_xenium


def read_spots(path) -> tuple[np.ndarray, np.ndarray]:
    """CSV with columns Gene, x, y (any order) -> gene names (R,), positions (R, 2) px."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:
            rows = csv.reader(handle, strict=True)
            header = next(rows, [])
            require(
                {"Gene", "x", "y"} <= set(header),
                path,
                f"has columns {', '.join(header) or '(none)'}",
                "it needs Gene, x and y",
            )
            gene, x, y = (header.index(name) for name in ("Gene", "x", "y"))
            table = [(row[gene], float(row[x]), float(row[y])) for row in rows if row]
    except (OSError, UnicodeDecodeError, csv.Error, ValueError, IndexError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} cannot be read as a table of reads ({error}): give a CSV file with "
            "columns Gene, x and y"
        ) from error
    require(bool(table), path, "holds no read", "give a row per read")
    genes, x, y = zip(*table)
    xy = np.stack([x, y], axis=1)  # (R, 2)
    require(
        bool(np.isfinite(xy).all()),
        path,
        "has a position that is no finite number",
        "correct or delete it",
    )
    return np.array(genes, dtype=str), xy


def read_label_image(path) -> np.ndarray:
    """scipy.sparse .npz -> (H, W) integers, 0 = background."""
    if not Path(path).is_file():
        raise DataError(f"{path} does not exist: check the path or download it")
    try:
        image = sp.load_npz(path)
        if hasattr(image, "check_format"):
            # toarray would write beyond its memory where a column is out of range
            image.check_format()
        require(
            image.dtype.kind in "iu" and image.nnz > 0 and image.data.min() >= 0,
            path,
            "holds no label image",
            "give nucleus numbers from 1 on",
        )
        require(
            np.iinfo(np.int32).max > image.data.max(),
            path,
            "has nucleus numbers above 2^31",
            "number the nuclei from 1 on",
        )
        require(
            np.prod(image.shape, dtype=float) < 1e8 + 1e3 * image.nnz,
            path,
            f"declares {image.shape} px for {image.nnz} of nuclei",
        )
        return image.astype(np.int32).toarray()
    except NPZ_ERRORS as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} cannot be read as a sparse label image ({error}): it is truncated or of "
            "another kind, download it again"
        ) from error


def _nuclei(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Label image (H, W) -> nucleus numbers (M,), ascending, and centroids x, y (M, 2)."""
    row, col = np.nonzero(image)
    numbers, which, area = np.unique(image[row, col], return_inverse=True, return_counts=True)
    return numbers, np.stack(
        [np.bincount(which, col) / area, np.bincount(which, row) / area], axis=1
    )


def from_ca1(
    folder,
    out,
    radius: float = 35.0,
    min_reads: int = 8,
    crop_px: int = 96,
    size: int = 32,
    stain="",
    labels="",
) -> Path:
    """In-situ sequencing reads (spots.csv) and a nuclear label image (label_image.coo.npz, scipy
    sparse) -> cell file.

    A read belongs to the nucleus whose centroid is nearest, within `radius` px; nuclei with fewer
    than `min_reads` reads are dropped (the counts of both are printed). The crop of crop_px x
    crop_px px around the centroid has channels `own` nucleus and `other` nuclei and, with `stain`,
    a grey image of the size of the label image, its file's name without the ending; it is
    average-pooled to size x size. labels: see `read_cell_labels`. xy are nucleus centroids, ids
    nucleus numbers; the files give no pixel size. Raises DataError, also where reads lie outside
    the image.
    """
    folder = Path(folder)
    read_gene, read_xy = read_spots(folder / "spots.csv")
    image = read_label_image(folder / "label_image.coo.npz")
    height, width = image.shape
    # nearer ones may belong to a nucleus at the rim
    outside = ((read_xy < -radius) | (read_xy >= np.array([width, height]) + radius)).any(axis=1)
    require(
        not outside.any(),
        folder / "spots.csv",
        f"has {outside.sum()} reads outside the {width} x {height} px image",
        "give reads and label image of one section, in the same pixels",
    )
    require(
        4 <= size <= crop_px <= min(height, width) and crop_px % size == 0,
        folder / "label_image.coo.npz",
        f"is {width} x {height} px, and a crop of {crop_px} px cannot be cut from it and pooled to "
        f"{size} px",
        "choose a crop no wider than the image and a multiple of its size in the cell file",
    )
    pool = crop_px // size
    numbers, centroid = _nuclei(image)
    stains = [read_stain(stain, image.shape)] if stain else []
    channels = ["own", "other", *([Path(stain).stem] if stain else [])]
    codes, classes = np.full(len(numbers), -1), []
    if labels:
        codes, classes = read_cell_labels(labels, numbers.astype(str))
    # (R,), M where none is near
    nucleus = cKDTree(centroid).query(read_xy, distance_upper_bound=radius)[1]
    genes, column = np.unique(read_gene, return_inverse=True)
    used = nucleus < len(numbers)
    # (M, G)
    counts = sp.csr_matrix(
        (np.ones(used.sum(), np.int32), (nucleus[used], column[used])),
        shape=(len(numbers), len(genes)),
    )
    keep = np.flatnonzero(np.asarray(counts.sum(axis=1)).ravel() >= max(1, min_reads))
    require(
        len(keep) > 0,
        folder / "spots.csv",
        f"gives no nucleus {min_reads} reads",
        "check that x and y are px of the label image",
    )
    middle = np.rint(centroid).astype(int)

    def crop(m):
        window = cut_window(image, *middle[m], crop_px)
        masks = [window == numbers[m], (window > 0) & (window != numbers[m])]
        pictures = [255 * pool_pixels(np.stack(masks), pool)]
        pictures += [
            pool_pixels(cut_window(pixels, *middle[m], crop_px)[None], pool) for pixels in stains
        ]
        return np.rint(np.concatenate(pictures)).astype(np.uint8)  # (C, S, S)

    blocks = (np.stack([crop(m) for m in keep[i : i + BLOCK]]) for i in range(0, len(keep), BLOCK))
    write_cells(
        out,
        counts=counts[keep],
        genes=genes,
        ids=numbers[keep],
        xy=centroid[keep],
        section=np.zeros(len(keep), int),
        sections=[folder.resolve().name],
        crops=blocks,
        channels=channels,
        labels=codes[keep],
        classes=classes,
        px_per_crop_px=float(pool),
    )
    report_cells(
        out,
        len(keep),
        counts[keep],
        channels,
        size,
        f"{len(numbers) - len(keep)} nuclei with fewer than {min_reads} reads and "
        f"{(~used).sum()} reads further than {radius:g} px from any",
    )
    return Path(out)


def from_h5ad(path, out, labels="", label_key: str = "") -> Path:
    """Single cells of an h5ad (raw counts, obsm spatial) -> cell file without pictures. Labels are
    those of the column `label_key` of obs, or of a CSV, see `read_cell_labels`; cells without a
    count are dropped and counted in a printed line. Raises DataError."""
    slide = load_slide(path, label_key=label_key or None)
    keep = np.flatnonzero(np.diff(slide.counts.indptr) > 0)
    require(len(keep) > 0, path, "has no cell with a count", "give raw counts")
    codes, classes = slide.labels, slide.classes
    if labels:
        codes, classes = read_cell_labels(labels, slide.barcodes)
    write_cells(
        out,
        counts=slide.counts[keep],
        genes=slide.genes,
        ids=slide.barcodes[keep],
        xy=slide.xy[keep],
        section=np.zeros(len(keep), int),
        sections=[slide.sample],
        labels=codes[keep],
        classes=classes,
        um_per_px=slide.um_per_px or float("nan"),
    )
    print(
        f"{out}: {len(keep)} cells x {len(slide.genes)} genes, no pictures, {len(classes)} classes;"
        f" dropped {slide.n_spots - len(keep)} cells without a count",
        flush=True,
    )
    return Path(out)


def main(argv=None):
    """Converters to the cell file; exit status 2 and one sentence on bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m plainst convert",
        description="Convert single-cell data to the cell file that spatia.py reads.",
    )
    commands = parser.add_subparsers(dest="what", required=True)
    ca1 = commands.add_parser("ca1", help="in-situ sequencing reads and a nuclear label image")
    ca1.add_argument("folder", help="folder with spots.csv and label_image.coo.npz")
    ca1.add_argument("--stain", default="", help="grey image of the same pixels: one channel more")
    ca1.add_argument("--crop_px", type=int, default=96, help="side of a crop in px (%(default)s)")
    xenium = commands.add_parser("xenium", help="10x Xenium: counts, centres, morphology image")
    xenium.add_argument("folder", help="Xenium output folder")
    xenium.add_argument(
        "--field_um", type=float, default=27.2, help="side of a crop in um (%(default)s)"
    )
    h5ad = commands.add_parser("h5ad", help="cells of an h5ad: counts, places, no pictures")
    h5ad.add_argument("folder", metavar="file", help="h5ad file")
    h5ad.add_argument("--label_key", default="", help="column of obs with the labels")
    for command in (ca1, xenium):
        command.add_argument(
            "--size", type=int, default=32, help="side of a crop in the cell file (%(default)s)"
        )
    for command in (ca1, xenium, h5ad):
        command.add_argument("out", help="cell file to write, .h5")
        command.add_argument("--labels", default="", help="CSV with columns cell_id and label")
    options = vars(parser.parse_args(argv))
    convert = {"ca1": from_ca1, "xenium": from_xenium, "h5ad": from_h5ad}[options.pop("what")]
    try:
        convert(options.pop("folder"), options.pop("out"), **options)
    except DataError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
