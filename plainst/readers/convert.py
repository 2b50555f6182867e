"""In-situ sequencing reads and 10x Xenium output -> the cell file of `crops`.

# spots.csv + label_image.coo.npz, the pciSeq demo of mouse hippocampus CA1
python -m plainst convert ca1 <folder> <cells.h5>
# needs the extra [xenium]: tifffile, imagecodecs, pyarrow
python -m plainst convert xenium <bundle> <cells.h5>
"""

from __future__ import annotations

import argparse
import csv
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import scipy.sparse as sp
from PIL import Image, ImageDraw
from scipy.spatial import cKDTree

from plainst.readers.checked import (
    NPZ_ERRORS,
    DataError,
    read_json,
)
from plainst.readers.crops import BLOCK, require, write_cells
from plainst.readers.visium import read_10x_h5


def _pool(pixels: np.ndarray, factor: int) -> np.ndarray:
    """(..., S f, S f) -> (..., S, S) float32, mean over f x f pixels."""
    *lead, height, width = pixels.shape
    return pixels.reshape(*lead, height // factor, factor, width // factor, factor).mean(
        (-3, -1), dtype=np.float32
    )


def _window(image: np.ndarray, x: int, y: int, side: int) -> np.ndarray:
    """(H, W) -> (side, side) whose pixel [side // 2, side // 2] is the image's [y, x]; zeros beyond
    the border."""
    top, left = y - side // 2, x - side // 2
    out = np.zeros((side, side), image.dtype)
    inside = image[max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)]
    out[
        max(-top, 0) : max(-top, 0) + inside.shape[0],
        max(-left, 0) : max(-left, 0) + inside.shape[1],
    ] = inside
    return out


def _report(out, kept: int, counts, channels, size: int, dropped: str) -> None:
    median = np.median(np.asarray(counts.sum(axis=1)))
    print(
        f"{out}: {kept} cells x {counts.shape[1]} genes, median {median:g} counts, crops "
        f"{len(channels)} x {size} x {size} "
        f"({', '.join(channels)}); dropped {dropped}",
        flush=True,
    )


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
    folder, out, radius: float = 35.0, min_reads: int = 8, side: int = 96, pool: int = 3
) -> Path:
    """In-situ sequencing reads (spots.csv) and a nuclear label image (label_image.coo.npz, scipy
    sparse) -> cell file.

    A read belongs to the nucleus whose centroid is nearest, within `radius` px; nuclei with fewer
    than `min_reads` reads are dropped (the counts of both are printed). The crop of side x side px
    around the centroid has channels `own` nucleus and `other` nuclei, average-pooled by `pool`. xy
    are nucleus centroids, ids nucleus numbers; the files give no pixel size. Raises DataError, also
    where reads lie outside the image.
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
    numbers, centroid = _nuclei(image)
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
        window = _window(image, *middle[m], side)
        # (2, S, S)
        return np.rint(
            255
            * _pool(np.stack([window == numbers[m], (window > 0) & (window != numbers[m])]), pool)
        ).astype(np.uint8)

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
        channels=["own", "other"],
        px_per_crop_px=float(pool),
    )
    _report(
        out,
        len(keep),
        counts[keep],
        ["own", "other"],
        side // pool,
        f"{len(numbers) - len(keep)} nuclei with fewer than {min_reads} reads and "
        f"{(~used).sum()} reads further than {radius:g} px from any",
    )
    return Path(out)


class _Plane:
    """One channel of a TIFF file: the maximum over `pages` (z planes) of the windows that are asked
    for; only tiles under a window are decoded."""

    def __init__(self, path, pages):
        self.path, self.pages, self.tiles = path, pages, OrderedDict()
        self.height, self.width = pages[0].shape
        self.tile_height, self.tile_width = pages[0].chunks

    def _tile(self, row: int, col: int) -> np.ndarray:
        key = (row, col)
        if key not in self.tiles:
            index, planes = row * self.pages[0].chunked[1] + col, []
            for page in self.pages:
                file = page.parent.filehandle
                file.seek(page.dataoffsets[index])
                packed = file.read(page.databytecounts[index])
                if len(packed) < page.databytecounts[index]:
                    raise OSError("the file ends early")
                decoded, _, shape = page.decode(packed, index, jpegtables=page.jpegtables)
                planes.append(
                    np.zeros(page.chunks, page.dtype)
                    if decoded is None
                    else decoded.reshape(decoded.shape[-3:-1])[: shape[1], : shape[2]]
                )
            self.tiles[key] = np.max(planes, axis=0)
            # of 1024 x 1024 px, 2 MB each; cells come in the order of tiles
            if len(self.tiles) > 24:
                self.tiles.popitem(last=False)
        self.tiles.move_to_end(key)
        return self.tiles[key]

    def window(self, x: int, y: int, side: int) -> np.ndarray:
        """(side, side) around pixel [y, x]; zeros beyond the border. Raises DataError where the
        file is damaged."""
        top, left, th, tw = y - side // 2, x - side // 2, self.tile_height, self.tile_width
        out = np.zeros((side, side), self.pages[0].dtype)
        try:
            for row in range(max(top, 0) // th, (min(top + side, self.height) - 1) // th + 1):
                for col in range(max(left, 0) // tw, (min(left + side, self.width) - 1) // tw + 1):
                    tile = self._tile(row, col)
                    y0, x0 = max(top, row * th), max(left, col * tw)
                    part = tile[
                        y0 - row * th : max(top + side - row * th, 0),
                        x0 - col * tw : max(left + side - col * tw, 0),
                    ]
                    out[
                        y0 - top : y0 - top + part.shape[0], x0 - left : x0 - left + part.shape[1]
                    ] = part
        except (OSError, ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
            raise DataError(
                f"{self.path} cannot be decoded ({error}): it is truncated or of another "
                "kind, copy it again"
            ) from error
        return out


def _xenium_images(bundle: Path) -> list[Path]:
    """The morphology images of a bundle, one file per channel: the focus images, else the
    projection, else the z stack."""
    found = sorted((bundle / "morphology_focus").glob("*.ome.tif"))
    found = (
        found
        or [
            p
            for name in ("focus", "mip")
            for p in [bundle / f"morphology_{name}.ome.tif"]
            if p.is_file()
        ][:1]
    )
    found = found or [p for p in [bundle / "morphology.ome.tif"] if p.is_file()]
    require(
        bool(found),
        bundle,
        "has no morphology image",
        "give a Xenium output folder with morphology_focus/ or morphology.ome.tif",
    )
    return found


def _xenium_planes(bundle: Path, tifffile, files: ExitStack) -> tuple[list[_Plane], list[str]]:
    """One plane per channel, of one size, and the channels' names from the OME-XML (file names
    where it does not tell)."""
    planes, paths, names = [], _xenium_images(bundle), []
    for path in paths:
        try:
            # as OME each file would claim the pages of all
            tiff = files.enter_context(tifffile.TiffFile(path, is_ome=False))
            pages = [
                page for page in tiff.pages if page.ndim == 2 and page.shape == tiff.pages[0].shape
            ]
            # of every file: it stands at the end, so a file that was cut short lacks it
            xml = ElementTree.fromstring(tiff.pages[0].description)
            names = names or [
                item.get("Name") for item in xml.iter() if item.tag.endswith("}Channel")
            ]
        except (
            OSError,
            ValueError,
            TypeError,
            KeyError,
            IndexError,
            RuntimeError,
            ElementTree.ParseError,
        ) as error:
            raise DataError(
                f"{path} cannot be read as an OME-TIFF ({error}): it is truncated or of "
                "another kind, copy it again"
            ) from error
        require(
            bool(pages), path, "has no grey image", "give the morphology image that Xenium wrote"
        )
        planes.append(_Plane(path, pages))
        require(
            (planes[-1].height, planes[-1].width) == (planes[0].height, planes[0].width),
            path,
            "differs in size from the other channels",
            "take all morphology images from one bundle",
        )
    if len(names) != len(paths) or None in names or len(set(names)) < len(names):
        names = [path.name.removesuffix(".ome.tif") for path in paths]
    return planes, names


def _read_parquet(path: Path, pyarrow, *columns: str) -> list:
    """Columns of a parquet file: the first as (ids (M,) str, row -> id (R,)), the others as float64
    (R,)."""
    try:
        table = pyarrow.parquet.read_table(path, columns=list(columns))
        first = table[columns[0]].combine_chunks().dictionary_encode()
        names = [
            v.decode("utf-8") if isinstance(v, bytes) else str(v)
            for v in first.dictionary.to_pylist()
        ]
        return [
            (np.array(names, dtype=str), first.indices.to_numpy()),
            *(table[c].to_numpy().astype(np.float64) for c in columns[1:]),
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{path} cannot be read with columns {', '.join(columns)} ({reason}): copy it "
            "from the bundle again"
        ) from error


def _xenium_cells(bundle: Path, pyarrow):
    """counts (N, G), genes, ids, centres (N, 2) px, um per px; joined by cell id, all cells."""
    path = bundle / "experiment.xenium"
    try:
        um_per_px = float(read_json(path)["pixel_size"])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise DataError(
            f"{path} gives no pixel_size ({error}): give a Xenium output folder"
        ) from error
    require(
        0 < um_per_px < np.inf,
        path,
        f"gives a pixel_size of {um_per_px}",
        "copy it from the bundle again",
    )
    counts, genes, ids = read_10x_h5(bundle / "cell_feature_matrix.h5")
    (names, which), x, y = _read_parquet(
        bundle / "cells.parquet", pyarrow, "cell_id", "x_centroid", "y_centroid"
    )
    row = dict(zip(names[which].tolist(), range(len(which))))
    missing = [name for name in ids.tolist() if name not in row]
    require(
        not missing,
        bundle / "cells.parquet",
        f"lacks {len(missing)} of the {len(ids)} cells of the matrix "
        f"({', '.join(missing[:1])} ...)",
        "take both from one bundle",
    )
    rows = np.array([row[name] for name in ids.tolist()], dtype=np.int64)
    return counts, genes, ids, np.stack([x[rows], y[rows]], axis=1) / um_per_px, um_per_px


def _outline_masks(
    bundle: Path, pyarrow, ids, xy, um_per_px: float, pool: int, size: int
) -> Iterator[np.ndarray] | None:
    """Blocks (b, S, S) bool of the cells' outlines in their crops, in the order of ids; None where
    the bundle has no outlines."""
    path = bundle / "cell_boundaries.parquet"
    if not path.is_file():
        return None
    (names, which), x, y = _read_parquet(path, pyarrow, "cell_id", "vertex_x", "vertex_y")
    order = np.argsort(which, kind="stable")
    points = np.stack([x, y], axis=1)[order] / um_per_px  # (R, 2) px, grouped by cell
    ends = np.searchsorted(which[order], np.arange(len(names) + 1))
    code = {name: i for i, name in enumerate(names.tolist())}

    def draw(i):
        image, k = Image.new("1", (size, size)), code.get(ids[i], -1)
        polygon = (
            (points[ends[k] : ends[k + 1]] - np.floor(xy[i])) / pool + size / 2 if k >= 0 else ()
        )
        if len(polygon) >= 3:
            # pillow counts from pixel centres
            ImageDraw.Draw(image).polygon([tuple(p) for p in (polygon - 0.5).tolist()], fill=1)
        return np.asarray(image)

    return (
        np.stack([draw(i) for i in range(a, min(a + BLOCK, len(ids)))])
        for a in range(0, len(ids), BLOCK)
    )


def from_xenium(bundle, out, field_um: float = 27.2, size: int = 32) -> Path:
    """10x Xenium output folder -> cell file: cell_feature_matrix.h5, cells.parquet,
    experiment.xenium, morphology OME-TIFF (full resolution).

    The crop of size x size px shows field_um (rounded to a whole number of image px per crop px)
    around the cell's centre, one channel per morphology_focus image (else the maximum over the z
    stack), average-pooled. A channel's 1 % and 99.8 % quantiles over up to 256 cells become 0 and
    255, an exposure setting of the slide. Control probes are left out, cells without a gene count
    dropped and counted in a printed line. Rows are in the order of image tiles. Masks are the cell
    outlines where the bundle has them. Raises DataError, also for cells outside the image.
    """
    try:
        import imagecodecs  # noqa: F401 - decodes JPEG 2000 for tifffile
        import pyarrow.parquet
        import tifffile
    except ImportError as error:
        raise DataError(
            f"{bundle} cannot be read without tifffile, imagecodecs and pyarrow ({error}): "
            "pip install tifffile imagecodecs pyarrow"
        ) from error
    bundle = Path(bundle)
    require(bundle.is_dir(), bundle, "is not a folder", "give a Xenium output folder")
    counts, genes, ids, xy, um_per_px = _xenium_cells(bundle, pyarrow)
    require(
        size >= 4 and field_um >= size * um_per_px / 2,
        bundle,
        f"has {um_per_px} um per px, too coarse for {size} px in {field_um} um",
        "choose a larger field or a smaller crop",
    )
    pool = max(1, round(field_um / um_per_px / size))
    with ExitStack() as files:
        planes, channels = _xenium_planes(bundle, tifffile, files)
        height, width = planes[0].height, planes[0].width
        outside = ~((xy >= 0) & (xy < [width, height])).all(axis=1)
        require(
            not outside.any(),
            bundle / "cells.parquet",
            f"has {outside.sum()} cells outside the {width} x {height} px image",
            "take table and image from one bundle",
        )
        keep = np.flatnonzero(np.diff(counts.indptr) > 0)
        require(
            len(keep) > 0,
            bundle / "cell_feature_matrix.h5",
            "has no cell with a gene count",
            "check the panel",
        )
        tile = np.floor(xy[keep] / [planes[0].tile_width, planes[0].tile_height])
        keep = keep[np.lexsort([tile[:, 0], tile[:, 1]])]

        def crop(i):
            x, y = np.floor(xy[i]).astype(int).tolist()
            # (C, S, S)
            return _pool(np.stack([plane.window(x, y, pool * size) for plane in planes]), pool)

        sample = np.sort(np.random.default_rng(0).permutation(len(keep))[:256])
        # (C, 1, 1) each
        low, high = np.quantile(
            np.stack([crop(i) for i in keep[sample]]), [0.01, 0.998], axis=(0, 2, 3)
        )[..., None, None]
        span = np.maximum(high - low, 1e-6)

        def block(rows):
            return np.stack(
                [
                    np.rint(255 * np.clip((crop(i) - low) / span, 0, 1)).astype(np.uint8)
                    for i in rows
                ]
            )

        write_cells(
            out,
            counts=counts[keep],
            genes=genes,
            ids=ids[keep],
            xy=xy[keep],
            section=np.zeros(len(keep), int),
            sections=[bundle.resolve().name],
            crops=(block(keep[i : i + BLOCK]) for i in range(0, len(keep), BLOCK)),
            channels=channels,
            masks=_outline_masks(bundle, pyarrow, ids[keep], xy[keep], um_per_px, pool, size),
            um_per_px=um_per_px,
            px_per_crop_px=float(pool),
        )
    shown = pool * size * um_per_px
    _report(
        out,
        len(keep),
        counts[keep],
        channels,
        size,
        f"{len(ids) - len(keep)} cells without a gene count; a crop shows {shown:.4g} um",
    )
    return Path(out)


def main(argv=None):
    """Converters to the cell file; exit status 2 and one sentence on bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m plainst convert",
        description="Convert single-cell data to the cell file that spatia.py reads.",
    )
    commands = parser.add_subparsers(dest="what", required=True)
    for what, source, text in (
        (
            "ca1",
            "folder with spots.csv and label_image.coo.npz",
            "in-situ sequencing reads and a nuclear label image",
        ),
        ("xenium", "Xenium output folder", "10x Xenium: counts, cell centres and morphology image"),
    ):
        command = commands.add_parser(what, help=text, description=text)
        command.add_argument("folder", help=source)
        command.add_argument("out", help="cell file to write, .h5")
    options = parser.parse_args(argv)
    try:
        (from_ca1 if options.what == "ca1" else from_xenium)(options.folder, options.out)
    except DataError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
