"""10x Xenium output -> the cell file of `crops`: counts, centres, outlines, morphology image."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageDraw

from plainst.readers.checked import DataError, read_json
from plainst.readers.crops import BLOCK, require, write_cells
from plainst.readers.cut import pool_pixels, read_cell_labels, report_cells
from plainst.readers.visium import read_10x_h5


class _Plane:
    """One channel of a TIFF file: the maximum over `pages` (z planes) of the windows that are asked
    for; only tiles under a window are decoded."""

    def __init__(self, path, pages):
        self.path, self.pages, self.tiles = path, pages, OrderedDict()
        self.height, self.width = pages[0].shape
        self.tile_height, self.tile_width = pages[0].chunks
        # two rows of tiles: cells come in the order of tiles, so that each is decoded once
        self.n_cached = 2 * pages[0].chunked[-1] + 2

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
            if len(self.tiles) > self.n_cached:
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


def exposure(raw) -> tuple[np.ndarray, np.ndarray]:
    """The 1 % quantile of every channel and the distance from it to the 99.8 % quantile, (C, 1, 1)
    each, over up to 256 of the crops raw (N, C, S, S)."""
    sample = np.sort(np.random.default_rng(0).permutation(len(raw))[:256])
    low, high = np.quantile(raw[sample], [0.01, 0.998], axis=(0, 2, 3))[..., None, None]
    return low, np.maximum(high - low, 1e-6)


def from_xenium(bundle, out, field_um: float = 27.2, size: int = 32, labels="") -> Path:
    """10x Xenium output folder -> cell file: cell_feature_matrix.h5, cells.parquet,
    experiment.xenium, morphology OME-TIFF (full resolution).

    The crop of size x size px shows field_um (rounded to a whole number of image px per crop px)
    around the cell's centre, one channel per morphology_focus image (else the maximum over the z
    stack), average-pooled. A channel's 1 % and 99.8 % quantiles over up to 256 cells become 0 and
    255, an exposure setting of the slide. Control probes are left out, cells without a gene count
    dropped and counted in a printed line. Rows are in the order of image tiles. Masks are the cell
    outlines where the bundle has them. labels: see `read_cell_labels`. Raises DataError, also for
    cells outside the image.
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
    codes, classes = np.full(len(ids), -1), []
    if labels:
        codes, classes = read_cell_labels(labels, ids)
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
        require(
            pool * size <= min(height, width),
            bundle,
            f"has an image of {width} x {height} px, and a crop of {pool * size} px is wider",
            "choose a smaller field",
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
            return pool_pixels(
                np.stack([plane.window(x, y, pool * size) for plane in planes]), pool
            )

        shape = (len(keep), len(planes), size, size)
        raw = np.memmap(files.enter_context(TemporaryFile()), np.float32, "w+", shape=shape)
        for row, i in enumerate(keep):
            raw[row] = crop(i)
        low, span = exposure(raw)

        def block(first):
            pixels = (raw[first : first + BLOCK] - low) / span
            return np.rint(255 * np.clip(pixels, 0, 1)).astype(np.uint8)

        write_cells(
            out,
            counts=counts[keep],
            genes=genes,
            ids=ids[keep],
            xy=xy[keep],
            section=np.zeros(len(keep), int),
            sections=[bundle.resolve().name],
            crops=(block(first) for first in range(0, len(keep), BLOCK)),
            channels=channels,
            labels=codes[keep],
            classes=classes,
            masks=_outline_masks(bundle, pyarrow, ids[keep], xy[keep], um_per_px, pool, size),
            um_per_px=um_per_px,
            px_per_crop_px=float(pool),
        )
    shown = pool * size * um_per_px
    report_cells(
        out,
        len(keep),
        counts[keep],
        channels,
        size,
        f"{len(ids) - len(keep)} cells without a gene count; a crop shows {shown:.4g} um",
    )
    return Path(out)
