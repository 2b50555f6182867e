"""Files -> Slide: `load_slide` looks at what is there and calls the reader of its kind."""

from __future__ import annotations

import copy
import csv
import functools
import hashlib
import io
import json
import os
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import scipy.sparse as sp
from PIL import Image

from plainst.readers.checked import (
    H5_ERRORS,
    JSON_ERRORS,
    NPZ_ERRORS,
    DataError,
    check_stored_size,
    check_unique,
    check_xy,
    count_matrix,
    count_problem,
    decode_strings,
    file_checksum,
    open_h5,
    read_array,
    read_gene_list,
    read_json,
    read_names,
    read_npz,
    read_table,
    warn_if_cut,
)
from plainst.readers.h5ad import load_h5ad
from plainst.readers.patches import (
    hest_folder,
    hest_genes,
    hest_samples,
    hest_split,
    load_hest,
    load_patch_folder,
)
from plainst.readers.slides import (
    IMAGE_ERRORS,
    NO_LABEL,
    Patches,
    Slide,
    as_uint8,
    check_fit,
    encode_labels,
    join_labels,
    lattice_um_per_px,
    library_of,
    read_image,
    read_label_table,
    read_metadata,
    unique_genes,
)
from plainst.readers.visium import find_file, load_visium


def _is_visium(folder: Path) -> bool:
    return folder.is_dir() and (
        (folder / "spatial").is_dir()
        or find_file(folder, "filtered_feature_bc_matrix.h5") is not None
    )


def is_one_slide(root) -> bool:
    """Whether `root` is itself a slide (a Visium folder or a file), not a folder of slides."""
    return Path(root).is_file() or _is_visium(Path(root))


def list_slices(root) -> list[str]:
    """Names under root that `load_slide(root, name)` reads: Visium folders, h5ad files, or the
    samples of a HEST folder."""
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder: give the folder that holds the slices")
    if (root / "st").is_dir() or (root / "adata").is_dir():
        return hest_samples(root)
    return sorted(
        path.name if path.is_dir() else path.stem
        for path in root.iterdir()
        if path.suffix == ".h5ad" or _is_visium(path)
    )


def load_slide(root, sample: str | None = None, counts: bool = True, labels=None) -> Slide:
    """Visium folder, h5ad file, or one `sample` of a folder of Visium folders, of h5ad files or of
    a HEST layout -> Slide.

    `labels`: a label file as in `load_visium`, or the name of an obs column of an h5ad. Raises
    DataError, with the names to choose from.
    """
    root = Path(root).resolve()
    if sample is not None and Path(sample).name != sample:
        raise DataError(f"{sample!r} is no name of a slice in {root}: give a name without folders")
    if sample is None and root.is_dir() and not _is_visium(root):
        names = list_slices(root)
        if len(names) != 1:
            raise DataError(
                f"{root} holds {len(names)} slices "
                f"({', '.join(names) or 'no Visium folder, h5ad or HEST layout'}): name one "
                "of them"
            )
        sample = names[0]
    path = root if sample is None or (root.name == sample and _is_visium(root)) else root / sample
    if path.is_dir():
        return load_visium(path, counts, labels)
    path = path if path.suffix == ".h5ad" else path.with_name(path.name + ".h5ad")
    is_file = labels is not None and Path(labels).is_file()
    label_key = None if is_file else labels
    if path.is_file():
        slide = load_h5ad(path, label_key, counts=counts)
    elif (root / "st").is_dir() or (root / "adata").is_dir():
        slide = load_hest(root, sample, label_key=label_key, counts=counts)
    else:
        names = ", ".join(list_slices(root)) if root.is_dir() else ""
        if names:
            raise DataError(f"{root} has no slice {sample}: choose one of {names}")
        raise DataError(f"{root} is neither a folder of slices nor an h5ad: check the path")
    if is_file:
        slide.labels, slide.classes = join_labels(
            read_label_table(labels, slide.sample), slide.barcodes, labels
        )
        slide.tables = [str(labels)]
    return slide
