"""What the converters to the cell file share: windows of an image, pooled pixels, a stain image,
labels of cells, and the line that says what was written."""

from __future__ import annotations

import csv
import warnings

import numpy as np
from PIL import Image

from plainst.readers.checked import DataError
from plainst.readers.crops import require
from plainst.readers.slides import IMAGE_ERRORS, encode_labels


def pool_pixels(pixels: np.ndarray, factor: int) -> np.ndarray:
    """(..., S f, S f) -> (..., S, S) float32, mean over f x f pixels."""
    *lead, height, width = pixels.shape
    return pixels.reshape(*lead, height // factor, factor, width // factor, factor).mean(
        (-3, -1), dtype=np.float32
    )


def cut_window(image: np.ndarray, x: int, y: int, side: int) -> np.ndarray:
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


def report_cells(out, kept: int, counts, channels, size: int, dropped: str) -> None:
    median = np.median(np.asarray(counts.sum(axis=1)))
    print(
        f"{out}: {kept} cells x {counts.shape[1]} genes, median {median:g} counts, crops "
        f"{len(channels)} x {size} x {size} "
        f"({', '.join(channels)}); dropped {dropped}",
        flush=True,
    )


def read_stain(path, shape: tuple[int, int]) -> np.ndarray:
    """Grey PNG, TIFF or JPEG of the size of a label image, shape (H, W) -> (H, W) uint8. Eight bits
    stay as they are; of sixteen the 1 % and 99.8 % quantiles become 0 and 255."""
    try:
        # the size is compared before anything is decoded, so a large image is no trap
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=("PNG", "TIFF", "JPEG")) as image:
                height, width = shape
                require(
                    image.size == (width, height),
                    path,
                    f"is {image.size[0]} x {image.size[1]} px, the label image {width} x {height}",
                    "give the stain of the same section, in the same pixels",
                )
                require(
                    image.mode in ("L", "I", "I;16", "I;16B", "F"),
                    path,
                    f"has pixels of kind {image.mode}",
                    "give one grey channel of 8 or 16 bits",
                )
                pixels = np.asarray(image)
    except IMAGE_ERRORS as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} cannot be read as an image ({error}): it is truncated or of another kind, "
            "copy it again"
        ) from error
    if pixels.dtype == np.uint8:
        return pixels
    low, high = np.quantile(pixels, [0.01, 0.998])
    scaled = (pixels - low) / max(high - low, 1e-6)
    return np.rint(255 * np.clip(scaled, 0, 1)).astype(np.uint8)


def read_cell_labels(path, ids: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """CSV with the header cell_id,label -> labels (N,) of the cells `ids`, -1 = none, and classes.
    Raises DataError, also for a cell that is not among them."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:
            rows = csv.DictReader(handle, strict=True)
            names = rows.fieldnames or []
            require(
                {"cell_id", "label"} <= set(names),
                path,
                f"has columns {', '.join(names) or '(none)'}",
                "it needs cell_id and label",
            )
            pairs = [(row["cell_id"], row["label"] or "") for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} cannot be read as a table of labels ({error}): give a CSV file with columns "
            "cell_id and label"
        ) from error
    known, table = set(ids.tolist()), dict(pairs)
    unknown = [name for name in table if name not in known]
    require(
        not unknown,
        path,
        f"labels {len(unknown)} cells that the data lacks ({', '.join(map(str, unknown[:1]))} ...)",
        "give the labels of these cells",
    )
    require(len(table) == len(pairs), path, "labels a cell twice", "give one row a cell")
    return encode_labels([table.get(name, "") for name in ids.tolist()])
