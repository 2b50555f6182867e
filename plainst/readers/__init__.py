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
from plainst.readers.foreign import refuse_foreign
from plainst.readers.h5ad import h5ad_libraries, load_h5ad
from plainst.readers.hd import hd_parts, sample_of
from plainst.readers.loom import load_loom
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
from plainst.readers.visium import has_file, load_visium


def _is_visium(folder: Path) -> bool:
    return folder.is_dir() and (
        (folder / "spatial").is_dir() or has_file(folder, "filtered_feature_bc_matrix.h5")
    )


def is_one_slide(root, library_key: str | None = None) -> bool:
    """Whether `root` is itself a slide (a Visium folder, or a file of one library), not a folder of
    slides."""
    root = Path(root)
    if root.suffix == ".h5ad" and root.is_file():
        return len(h5ad_libraries(root, library_key)) <= 1
    return root.is_file() or (_is_visium(root) and not hd_parts(root.resolve()))


def _slices(root: Path, library_key: str | None) -> dict[str, Path]:
    """{name: path} of the slides under root; of an h5ad the libraries it holds."""
    if root.is_file():
        names = h5ad_libraries(root, library_key) if root.suffix == ".h5ad" else []
        return dict.fromkeys(names or [root.stem], root)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder: give the folder that holds the slices")
    if (root / "st").is_dir() or (root / "adata").is_dir():
        return {name: hest_folder(root) / f"{name}.h5ad" for name in hest_samples(root)}
    parts = hd_parts(root)
    if parts:
        return parts
    found = {}
    for path in sorted(root.iterdir()):
        if path.is_dir() and hd_parts(path):
            found.update(hd_parts(path))
        elif _is_visium(path):
            found[path.name] = path
        elif _is_visium(path / "outs"):
            found[path.name] = path / "outs"
        elif path.suffix in (".h5ad", ".loom") and path.is_file():
            found.setdefault(path.stem, path)
    return found


def list_slices(root, library_key: str | None = None) -> list[str]:
    """Names under root that `load_slide(root, name)` reads: Visium folders, parts of a Visium HD
    output, h5ad and loom files, the samples of a HEST folder, or the libraries of one h5ad file."""
    return sorted(_slices(Path(root).resolve(), library_key))


def _choose(root: Path, sample: str | None, library_key: str | None) -> str:
    """The name of the one slide under root, or of the part of a Visium HD output that `sample`
    names without the sample in front (square_008um)."""
    if sample is not None:
        whole = [name for name in hd_parts(root) if name.endswith(f"_{sample}")]
        return whole[0] if len(whole) == 1 else sample
    names = list_slices(root, library_key)
    if len(names) != 1:
        raise DataError(
            f"{root} holds {len(names)} slices "
            f"({', '.join(names) or 'no Visium folder, h5ad or HEST layout'}): name one "
            "of them"
        )
    return names[0]


def load_slide(
    root,
    sample: str | None = None,
    counts: bool = True,
    labels=None,
    label_key: str | None = None,
    layer: str | None = None,
    gene_key: str | None = None,
    library_key: str | None = None,
) -> Slide:
    """Visium folder, h5ad or loom file, or one `sample` of a folder of those, of a Visium HD
    output, of a HEST layout or of an h5ad file of several libraries -> Slide.

    `labels`: a label file as in `load_visium`, or the name of an obs column of an h5ad. `label_key`
    names the label column of an h5ad's obs, of metadata.tsv or of the file `labels`; `layer`,
    `gene_key` and `library_key` are those of `load_h5ad` (`gene_key` of `load_visium` too); '' is
    None. Raises DataError, with the names to choose from.
    """
    label_key, layer, gene_key = label_key or None, layer or None, gene_key or None
    library_key, root = library_key or None, Path(root).resolve()
    is_h5ad = root.is_file() and root.suffix == ".h5ad"
    if sample is not None and not is_h5ad and Path(sample).name != sample:
        raise DataError(f"{sample!r} is no name of a slice in {root}: give a name without folders")
    refuse_foreign(root)
    if is_h5ad:
        library = None if sample is None else sample.replace("/", "_")
        if library == root.stem and library not in h5ad_libraries(root, library_key):
            library = None
        return _with_labels(
            labels,
            label_key,
            lambda key: load_h5ad(root, key, layer, counts, gene_key, library_key, library),
        )
    is_folder_of_slides = root.is_dir() and (not _is_visium(root) or bool(hd_parts(root)))
    if is_folder_of_slides:
        sample = _choose(root, sample, library_key)
    path = root
    if sample is not None and not (sample in (root.name, sample_of(root)) and _is_visium(root)):
        found = _slices(root, library_key) if root.is_dir() else {}
        path = found.get(sample, root / sample)
    refuse_foreign(path)
    if path.is_dir():
        _refuse_flags(path, "folder", layer=layer, library_key=library_key)
        return load_visium(path, counts, labels, label_key, gene_key)
    if path.suffix == ".loom" and path.is_file():
        _refuse_flags(path, "loom file", library_key=library_key)
        return _with_labels(
            labels, label_key, lambda key: load_loom(path, key, layer, counts, gene_key)
        )
    path = path if path.suffix == ".h5ad" else path.with_name(path.name + ".h5ad")
    if (root / "st").is_dir() or (root / "adata").is_dir():
        return _with_labels(
            labels,
            label_key,
            lambda key: load_hest(root, sample, True, key, counts, layer, gene_key, library_key),
        )
    if path.is_file():
        return _with_labels(
            labels,
            label_key,
            lambda key: load_h5ad(path, key, layer, counts, gene_key, library_key),
        )
    names = ", ".join(list_slices(root)) if root.is_dir() else ""
    if names:
        raise DataError(f"{root} has no slice {sample}: choose one of {names}")
    raise DataError(f"{root} is neither a folder of slices nor an h5ad: check the path")


def _refuse_flags(path: Path, kind: str, **flags: str | None) -> None:
    for flag, value in flags.items():
        if value is not None:
            raise DataError(f"--{flag} {value} is for h5ad files, {path} is a {kind}: leave it out")


def _with_labels(labels, label_key: str | None, load: Callable[[str | None], Slide]) -> Slide:
    """The slide that `load(obs column)` reads, with labels from the file `labels` where that is
    one."""
    if labels is None or not Path(labels).is_file():
        return load(label_key or labels)
    slide = load(None)
    table = read_label_table(labels, slide.sample, label_key)
    slide.labels, slide.classes = join_labels(table, slide.barcodes, [slide.sample])
    slide.tables = [*slide.tables, str(labels)]
    return slide
