"""Results in files that other tools open: CSV for any table program, `result.h5ad` for scanpy and
Seurat, `loupe.csv` for the Loupe browser.

    python -m plainst export runs/multist/dlpfc/151673/default/seed0/run.json

writes them for a finished run of any of the five methods. A run writes the same files itself:

    record.finish(..., arrays, files=files | export.files_of("multist", arrays, [slide], config))

One h5ad holds one slide, because barcodes repeat from slide to slide; its layout is that of anndata
0.12 (https://anndata.readthedocs.io/en/stable/fileformat-prose.html). Nothing is ever written
beside the data.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import h5py
import numpy as np
import scipy.sparse as sp

from plainst.h5ad import write_anndata
from plainst.neighbours import lattice_pitch
from plainst.readers import load_hest, load_slide
from plainst.readers.checked import NPZ_ERRORS, DataError, open_h5, read_json
from plainst.readers.crops import Cells, load_cells
from plainst.readers.slides import Slide
from plainst.readers.visium import find_file
from plainst.run import write_together
from plainst.tables import Table, names_of, write_csv, write_loupe

# with more genes than that the predicted expression stands in result.h5ad alone
GENES_IN_CSV = 200
# a Visium spot is 55 um wide, and 100 um away from the next
SPOT_OF_PITCH = 0.55


# arrays of names
TEXTS = {"barcodes", "ids", "slide", "genes", "classes", "gene_sets", "probes"}
COUNTS, PREDICTED = "counts", "predicted expression"
# of spatia: by the network alone, and its mean with a ridge
EXPRESSION_LAYERS = (
    *("imputed", "imputed_with_ridge", "image_to_genes", "image_to_genes_with_ridge"),
)


@dataclass
class Result:
    """All that one h5ad holds: N spots of one slide, or N cells.

    table (N rows); xy (N, 2) full-resolution px; embedding (N, D) or None; x (N, G) counts as CSR,
    dense expression, or None, which of them `x_is` says; genes (G,); layers {name: (N, G)}; grid
    (N, 2) array row and column, or None; slide where image and scale come from, or None; category
    the column that Loupe gets, '' for none; target the scale of predicted expression, as the
    method's --target names it. Raises ValueError where these do not fit each other.
    """

    method: str
    table: Table
    xy: np.ndarray
    embedding: np.ndarray | None = None
    x: np.ndarray | sp.csr_matrix | None = None
    x_is: str = "nothing"
    genes: np.ndarray = field(default_factory=lambda: np.array([], dtype=str))
    layers: dict[str, np.ndarray] = field(default_factory=dict)
    grid: np.ndarray | None = None
    slide: Slide | None = None
    sample: str = ""
    category: str = ""
    target: str = ""

    def __post_init__(self):
        n = len(self.table.ids)
        if self.xy.shape != (n, 2):
            raise ValueError(f"xy is of shape {self.xy.shape} for {n} {self.table.kind}")
        if self.embedding is not None and (self.embedding.ndim, len(self.embedding)) != (2, n):
            raise ValueError(f"the embedding is of shape {self.embedding.shape} for {n} rows")
        matrices = dict(self.layers) if self.x is None else self.layers | {"x": self.x}
        for name, values in matrices.items():
            if values.shape != (n, len(self.genes)):
                raise ValueError(f"{name} is {values.shape} for {n} rows, {len(self.genes)} genes")


def write_h5ad(file, result: Result) -> None:
    """The result as an AnnData file, to an open, named and still empty binary file; it is written
    through its name, because HDF5 reads back what it wrote."""
    table = result.table
    obs = dict(table.columns)
    if result.grid is not None:
        obs |= {"array_row": result.grid[:, 0], "array_col": result.grid[:, 1]}
        # other spots are in no Slide
        obs["in_tissue"] = np.ones(len(table.ids), dtype=np.int64)
    obsm = {"spatial": np.asarray(result.xy, dtype=np.float64)}
    if result.embedding is not None:
        obsm["X_plainst"] = result.embedding
    facts = {name: getattr(result, name) for name in ("method", "sample", "target")}
    uns = {"plainst": facts | {"X": result.x_is}} | _picture(result.slide)
    write_anndata(file.name, table.ids, obs, result.genes, result.x, obsm, result.layers, uns)


def _picture(slide: Slide | None) -> dict:
    """uns entries of a slide: its scale and, with an image, what scanpy.pl.spatial draws."""
    entries = {}
    if slide is None:
        return entries
    if slide.um_per_px:
        entries["um_per_px"] = float(slide.um_per_px)
    if slide.patient:
        entries["patient"] = slide.patient
    # scanpy stops at an entry without an image
    if slide.image is not None and slide.image_scale:
        size = "lowres" if "tissue_lowres_image" in Path(slide.image_file).name else "hires"
        scales = _scale_factors(slide) | {f"tissue_{size}_scalef": float(slide.image_scale)}
        if "spot_diameter_fullres" not in scales:
            scales["spot_diameter_fullres"] = SPOT_OF_PITCH * lattice_pitch(slide.xy)
        picture = {"images": {size: slide.image}, "scalefactors": scales, "metadata": {}}
        entries["spatial"] = {slide.sample: picture}
    return entries


def _scale_factors(slide: Slide) -> dict[str, float]:
    """Scale factors that stand beside the slide: scalefactors_json.json of Space Ranger, or those
    of the one library of an h5ad."""
    if Path(slide.source).suffix == ".h5ad":
        with open_h5(slide.source, "an h5ad file") as handle:
            libraries = handle.get("uns/spatial", {})
            library = next(iter(libraries.values())) if len(libraries) == 1 else {}
            nodes = dict(library.get("scalefactors", {}))
            factors = {k: v[()] for k, v in nodes.items() if isinstance(v, h5py.Dataset)}
    else:
        path = find_file(Path((slide.tables or [slide.source])[0]).parent, "scalefactors_json.json")
        factors = read_json(path) if path else {}
    numbers = (int, float, np.integer, np.floating)
    return {k: float(v) for k, v in factors.items() if isinstance(v, numbers) and 0 < v < np.inf}


# --------------------------------------------------------------------------------------------------
# What each method decides: from the arrays of its record
# --------------------------------------------------------------------------------------------------


def _classes(arrays: dict) -> dict:
    """gat_fusion: the class, its probability and that of every class; `scored`: held out and
    labelled."""
    prob, classes = arrays["prob"], arrays["classes"]
    if prob.shape[1] != len(classes):
        raise ValueError(f"{prob.shape[1]} probabilities of {len(classes)} classes")
    columns = {"predicted": names_of(arrays["pred"], classes), "confidence": prob.max(axis=1)}
    columns |= {f"p_{name}": prob[:, i] for i, name in enumerate(classes)}
    columns |= {"scored": arrays["test"]} | _labels(arrays)
    return {"columns": columns, "embedding": arrays.get("embedding"), "category": "predicted"}


def _domains(arrays: dict) -> dict:
    """multist: the domain after and before diffusion, its confidence and the pseudotime."""
    final = "fused" if "fused" in arrays else "gene"
    columns = {
        "domain": names_of(arrays["domains"]),
        "domain_raw": names_of(arrays[f"labels_{final}_raw"]),
    }
    for name in ("confidence", "pseudotime", "attention_entropy"):
        if name in arrays:
            columns[name] = arrays[name]
    embedding = arrays["fused" if final == "fused" else "z"]
    return {"columns": columns | _labels(arrays), "embedding": embedding, "category": "domain"}


def _labels(arrays: dict) -> dict:
    """The annotation that came with the data, where there is one."""
    if not (arrays["labels"] >= 0).any():
        return {}
    return {"label": names_of(arrays["labels"], arrays.get("classes"))}


def _expression(arrays: dict) -> dict:
    """stformer, cmrcnet: predicted genes, scores of named gene sets, which spots were scored."""
    columns = {}
    scores, sets = arrays.get("pathway_scores"), arrays.get("gene_sets", ())
    if len(sets):
        columns = {name: scores[:, i] for i, name in enumerate(sets)}
    if "scored" in arrays:
        columns["scored"] = arrays["scored"]
    return {
        "columns": columns,
        "embedding": arrays.get("embedding", scores),
        "x": arrays["pred"],
        "x_is": PREDICTED,
        "genes": arrays["genes"],
        "layers": {"measured": arrays["true"]} if "true" in arrays else {},
    }


def _cells(arrays: dict) -> dict:
    """spatia: clusters of all cells; of the scored cells what the generated and the real pictures
    measure (mean of the draws), and as layers their predicted expression; NaN for the others."""
    n, columns = len(arrays["ids"]), {"cluster": names_of(arrays["clusters"])}
    scored = arrays.get("scored", np.array([], np.int64))

    def of_all(values):
        """values (n_scored, ...) in the rows of all cells."""
        out = np.full((n, *values.shape[1:]), np.nan, np.float32)
        out[scored] = values
        return out

    if "scored" in arrays:
        columns["scored"] = np.isin(np.arange(n), scored)
    if "probes_generated" in arrays:
        made, real = arrays["probes_generated"].mean(axis=0), arrays["probes_real"]
        names = arrays.get("probes", ("own_area", "other_area", "near_density"))
        for i, probe in enumerate(names):
            columns[f"{probe}_generated"] = of_all(made[:, i])
            columns[f"{probe}_real"] = of_all(real[:, i])
    part = {
        "columns": columns | _labels(arrays),
        "embedding": arrays["z"],
        "genes": arrays["genes"],
        "layers": {k: of_all(arrays[k]) for k in EXPRESSION_LAYERS if k in arrays},
        "category": "cluster",
    }
    if "expression" in arrays:
        part |= {"x": of_all(arrays["expression"]), "x_is": "measured expression, normalised"}
    return part


@dataclass(frozen=True)
class Content:
    """What the record of a method holds: how its arrays are read, the arrays it must have, those it
    may have, and whether their rows are cells."""

    read: Callable[[dict], dict]
    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()
    is_cells: bool = False


_H_AND_E = Content(
    _expression,
    ("slide", "barcodes", "xy", "genes", "pred"),
    ("embedding", "pathway_scores", "gene_sets", "scored", "true"),
)
CONTENTS = {
    "gat_fusion": Content(
        _classes,
        ("barcodes", "xy", "labels", "classes", "test", "prob", "pred"),
        ("slide", "embedding"),
    ),
    "multist": Content(
        _domains,
        ("barcodes", "xy", "labels", "classes", "domains", "z", "labels_gene_raw"),
        (
            *("slide", "fused", "labels_fused_raw"),
            *("confidence", "pseudotime", "attention_entropy"),
        ),
    ),
    "stformer": _H_AND_E,
    "cmrcnet": _H_AND_E,
    "spatia": Content(
        _cells,
        ("ids", "xy", "labels", "genes", "z", "clusters"),
        (
            *("expression", "scored", *EXPRESSION_LAYERS),
            *("probes_generated", "probes_real", "probes", "classes"),
        ),
        is_cells=True,
    ),
}


def results_of(
    method: str,
    arrays: dict[str, np.ndarray],
    sources: Iterable[Slide | Cells] = (),
    target: str = "",
) -> list[Result]:
    """Arrays of a record -> one Result per slide, in the order of `arrays['slide']` where that is
    there.

    sources: the slides (by their sample name), or the one file of cells: counts, image and array
    positions come from them, joined by barcode; target: the method's --target, if it has one.
    Raises ValueError where the arrays do not fit each other, DataError where a source is another
    slide.
    """
    content, sources = CONTENTS[method], list(sources)
    part = content.read(arrays)
    ids, xy = arrays["ids" if content.is_cells else "barcodes"], arrays["xy"]
    names = arrays.get("slide")
    if names is not None and names.shape != ids.shape:
        raise ValueError(f"{len(names)} names of slides for {len(ids)} spots")
    samples = [""] if names is None else list(dict.fromkeys(names.tolist()))
    columns = part.pop("columns")
    if len(samples) > 1:
        columns = {"slide": names} | columns
    table = Table(ids, columns, "cells" if content.is_cells else "spots")
    result = Result(method, table, xy, target=target, **part)
    if content.is_cells:
        return [_with_cells(result, sources[0]) if sources else result]
    by_name = {slide.sample: slide for slide in sources}
    results = []
    for sample in samples:
        rows = None if names is None else np.flatnonzero(names == sample)
        slide = by_name.get(sample) if sample else next(iter(sources), None)
        one = replace(_rows_of(result, rows), sample=sample)
        results.append(one if slide is None else _with_slide(one, slide))
    return results


def _rows_of(result: Result, rows: np.ndarray | None) -> Result:
    """The result of some of its rows; None: of all."""
    if rows is None:
        return result
    table = result.table
    return replace(
        result,
        table=Table(table.ids[rows], {k: v[rows] for k, v in table.columns.items()}, table.kind),
        xy=result.xy[rows],
        embedding=None if result.embedding is None else result.embedding[rows],
        x=None if result.x is None else result.x[rows],
        layers={name: values[rows] for name, values in result.layers.items()},
    )


def _with_slide(result: Result, slide: Slide) -> Result:
    """The result with array positions, image and, unless it has predicted expression, counts of the
    slide."""
    rows = _join(result, slide.barcodes, slide.xy, slide.source or slide.sample)
    grid = None if slide.grid is None else slide.grid[rows]
    result = replace(result, slide=slide, sample=slide.sample, grid=grid)
    if result.x is not None or slide.counts is None:
        return result
    counts = slide.counts if isinstance(rows, slice) else slide.counts[rows]
    return replace(result, x=counts, x_is=COUNTS, genes=slide.genes)


def _with_cells(result: Result, cells: Cells) -> Result:
    """The result with counts, sections and names of classes of the cell file."""
    rows = _join(result, cells.ids, cells.xy, cells.source)
    if not np.array_equal(cells.genes, result.genes):
        raise DataError(f"{cells.source} has other genes than the record: give its own file")
    columns = {"section": names_of(cells.section[rows], cells.sections)} | result.table.columns
    if "label" in columns:
        columns["label"] = names_of(cells.labels[rows], cells.classes)
    table = Table(result.table.ids, columns, "cells")
    return replace(result, table=table, x=cells.counts[rows], x_is=COUNTS)


def _join(result: Result, ids: np.ndarray, xy: np.ndarray, source) -> np.ndarray | slice:
    """Rows of a source that are the rows of the result, by id. Raises DataError unless all are
    there, at the same places: Visium barcodes are the same on every slide."""
    wanted = result.table.ids
    rows = slice(None)
    if not np.array_equal(ids, wanted):
        row = {name: i for i, name in enumerate(ids.tolist())}
        rows = np.array([row.get(name, -1) for name in wanted.tolist()], dtype=np.int64)
    is_whole = isinstance(rows, slice) or bool((rows >= 0).all())
    if not is_whole or not np.allclose(xy[rows], result.xy, rtol=0, atol=0.5):
        raise DataError(
            f"{source} holds other {result.table.kind} than the record: give the data of this run"
        )
    return rows


def files_of(method: str, arrays: dict, sources: Iterable, config) -> dict[str, Callable]:
    """The files that a run writes of its arrays, by name: those of `writers`, h5ad and loupe.csv
    with --h5ad."""
    results = results_of(method, arrays, sources, getattr(config, "target", ""))
    return writers(results, config.h5ad)


def writers(results: Sequence[Result], h5ad: bool = True) -> dict[str, Callable]:
    """{file name: function that writes it to an open binary file}, as Run.finish and write_together
    take them: spots.csv (cells.csv) of all slides and, with `h5ad`, per slide result.h5ad and,
    where the method decides on one category, loupe.csv; of several slides result_<slide>.h5ad."""
    tables, genes, x = [result.table for result in results], (), ()
    if results[0].x_is == PREDICTED and len(results[0].genes) <= GENES_IN_CSV:
        genes, x = results[0].genes, [result.x for result in results]
    files = {f"{tables[0].kind}.csv": lambda file: write_csv(file, tables, genes, x)}
    if not h5ad:
        return files
    marks = [f"_{result.sample}" if len(results) > 1 else "" for result in results]
    for mark, one in zip(marks, results):
        if one.category:
            files[f"loupe{mark}.csv"] = functools.partial(
                write_loupe, table=one.table, name=one.category
            )
    for mark, one in zip(marks, results):
        files[f"result{mark}.h5ad"] = functools.partial(write_h5ad, result=one)
    return files


# --------------------------------------------------------------------------------------------------
# python -m plainst export
# --------------------------------------------------------------------------------------------------


def read_record(path) -> tuple[Path, dict]:
    """run.json of a finished run, or its folder -> (folder, what run.json holds). Raises DataError
    for half a record and for one of another version."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if not path.is_dir() and path.name != "run.json":
        raise DataError(f"{path} is no record: give the run.json of a run, or its folder")
    for name in ("run.json", "arrays.npz"):
        if not (folder / name).is_file():
            raise DataError(
                f"{folder} has no {name}: give the folder of a run that finished, or run it again"
            )
    record = read_json(folder / "run.json")
    with _of_this_version(folder / "run.json"):
        if record["method"] not in CONTENTS or not isinstance(record["config"]["data"], str):
            raise ValueError(f"its method is {record['method']}")
    return folder, record


@contextlib.contextmanager
def _of_this_version(path):
    """What names, shapes and kinds raise that do not fit each other becomes a DataError about the
    part `path` of a record."""
    try:
        yield
    except DataError:
        raise
    except NPZ_ERRORS as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{path} is damaged or of another version of this program ({reason}): run it again"
        ) from error


def read_arrays(path, method: str) -> dict[str, np.ndarray]:
    """The arrays of a record that an export needs; pictures stay unread. Raises DataError."""
    content = CONTENTS[method]
    with _of_this_version(path), np.load(path, allow_pickle=False) as file:
        names = [*content.needed, *(name for name in content.optional if name in file.files)]
        arrays = {name: file[name] for name in names}
        for name in TEXTS & set(arrays):
            is_text = arrays[name].dtype.kind == "U" or not arrays[name].size
            if arrays[name].ndim != 1 or not is_text:
                raise ValueError(f"{name} is {arrays[name].dtype} of shape {arrays[name].shape}")
    for sample in set(arrays.get("slide", np.array([], dtype=str)).tolist()):
        if not sample or sample != Path(sample).name or not sample.isprintable():
            raise DataError(f"{path} names a slide {sample!r}: it is damaged, run it again")
    return arrays


def _source(method: str, root: str, sample: str) -> Slide | Cells:
    """What a run read: the slide, or the file of cells. Raises DataError where it is gone."""
    if CONTENTS[method].is_cells:
        return load_cells(root)
    if CONTENTS[method] is _H_AND_E:
        # the prediction takes the place of the counts
        return load_hest(root, sample, patches=False, counts=False)
    return load_slide(root, sample or None)


def export_record(record, out=None, data=None) -> list[Path]:
    """Write the files of `writers` for the record of a finished run, into its folder or `out`; a
    CSV that is there stays.

    data: folder or file of the data where it is no longer at its place. Without the data the files
    hold what the arrays hold, and a sentence says so. Returns the paths, the last an h5ad. Raises
    DataError.
    """
    folder, facts = read_record(record)
    method, config = facts["method"], facts["config"]
    arrays = read_arrays(folder / "arrays.npz", method)
    make = functools.partial(results_of, method, target=str(config.get("target") or ""))
    names = arrays.get("slide", np.array([str(config.get("slice") or "")])).tolist()
    sources = []
    with _of_this_version(folder / "arrays.npz"):
        for name in dict.fromkeys(names):
            try:
                source = _source(method, str(data or config["data"]), name)
                # or another slide has taken its place
                make(arrays, [source])
            except DataError as error:
                print(
                    f"{error}; written from arrays.npz alone (--data names the place of the data)"
                )
            else:
                sources.append(source)
        files = writers(make(arrays, sources))
    place = Path(out) if out else folder
    paths = {place / name: write for name, write in files.items()}
    paths = {p: write for p, write in paths.items() if p.suffix == ".h5ad" or not p.exists()}
    write_together(paths, "--out")
    return [*paths]


def main(argv=None):
    """Command line; exit status 2 and one sentence on a bad record."""
    parser = argparse.ArgumentParser(
        prog="python -m plainst export",
        description="result.h5ad, loupe.csv and spots.csv (cells.csv) of a finished run, for "
        "scanpy, Seurat, Loupe and table programs; the last line printed is the path of the h5ad.",
    )
    parser.add_argument("record", help="run.json of a run, or its folder")
    parser.add_argument("--out", help="folder to write into (default: the folder of the record)")
    parser.add_argument("--data", help="where the data is now, if it is not where the run had it")
    options = parser.parse_args(argv)
    try:
        paths = export_record(options.record, options.out, options.data)
    except DataError as error:
        parser.exit(2, f"error: {error}\n")
    print(*paths, sep="\n")
