"""What the papers share and a reader opens: preprocessing, splits, and the door to the loaders.

Whatever is fitted (genes, scaler, principal components) is fitted on the rows it is given, which
are training rows everywhere in this project. Graphs are (N, k) tables of neighbour rows or sparse
matrices; nothing is N x N. The loaders, tables and features of `plainst` are passed on:
`data.load_slide(...)` is how the methods call them.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from scipy.linalg import eigh
from scipy.spatial import cKDTree
from sklearn.decomposition import PCA
from sklearn.model_selection import train_test_split

from plainst.classes import sorted_classes
from plainst.features import (
    crops,
    handmade_descriptor,
    image_features,
    is_features_file,
    pretrained_encoder,
    read_embedding,
    slice_path,
)
from plainst.neighbours import (
    describe_slide,
    distances,
    knn_table,
    lattice_pitch,
    lattice_table,
    median_tiles,
    neighbour_mean,
    normalised_adjacency,
    normalised_knn_graph,
    smoothing_matrix,
    symmetric_union,
    table_to_csr,
    with_halo,
)
from plainst.readers import (
    hest_genes,
    hest_samples,
    is_one_slide,
    list_slices,
    load_h5ad,
    load_hest,
    load_patch_folder,
    load_slide,
    load_visium,
)
from plainst.readers.checked import (
    DataError,
    file_checksum,
    open_h5,
    read_array,
    read_gene_list,
    read_npz,
)
from plainst.readers.convert import from_ca1, from_xenium
from plainst.readers.crops import Cells, load_cells, write_cells
from plainst.readers.slides import Patches, Slide
from plainst.readers.visium import read_10x_h5

# --------------------------------------------------------------------------------------------------
# Preprocessing: fitted on the training rows only, applied to all rows
# --------------------------------------------------------------------------------------------------


def normalise_log1p(counts, library_size=None, target_sum=1e4):
    """Library-size normalisation to `target_sum` and log1p; stays sparse, spots without counts stay
    zero.

    counts (N, G) CSR raw; library_size (N,) total UMIs per spot, own row sums where None (give it
    where the file holds a subset of the genes). Returns (N, G) CSR float32.
    """
    out = sp.csr_matrix(counts, dtype=np.float32, copy=True)
    if library_size is None:
        library_size = out.sum(1)
    total = np.asarray(library_size, np.float64).ravel()  # (N,)
    scale = np.divide(target_sum, total, out=np.zeros_like(total), where=total > 0)
    out.data = np.log1p(out.data * np.repeat(scale, np.diff(out.indptr)).astype(np.float32))
    return out


def mean_var(x):
    """Column means and unbiased variances of a CSR or CSC (N, G) matrix in float64, without
    densifying: (G,), (G,)."""
    n = x.shape[0]
    # squares of 32-bit counts overflow from 46,341 on
    x = x.astype(np.float64) if x.dtype.kind in "iu" else x
    mean = np.asarray(x.mean(0, dtype=np.float64)).ravel()
    square = np.asarray(x.multiply(x).sum(0, dtype=np.float64)).ravel() / n
    return mean, np.maximum(square - mean**2, 0) * n / max(n - 1, 1)


def _top(score, n_top):
    """The columns of the `n_top` largest scores, in file order; ties go to the earlier gene."""
    return np.sort(np.argsort(-np.nan_to_num(score, nan=-np.inf), kind="stable")[:n_top])


def hvg_seurat(log_counts, n_top=3000):
    """Highly variable genes by binned normalised dispersion (Satija et al. 2015), on log1p data.
    Returns sorted columns (n_top,)."""
    x = log_counts.copy()
    x.data = np.expm1(x.data.astype(np.float64))
    mean, var = mean_var(x)
    mean[mean == 0] = 1e-12
    dispersion = np.where(var > 0, var, np.nan) / mean
    dispersion, mean = np.log(dispersion), np.log1p(mean)
    edges = np.linspace(mean.min(), mean.max(), 21)
    # right-closed bins: the smallest mean belongs to the first
    edges[0] -= (edges[-1] - edges[0]) * 1e-3
    bins = np.searchsorted(edges, mean, side="left")
    score = np.full(len(mean), np.nan)
    for b in np.unique(bins):
        rows = (bins == b) & np.isfinite(dispersion)
        if rows.sum() == 1:
            # a bin of one gene: its deviation is taken as one
            score[rows] = 1.0
        elif rows.any():
            spread = dispersion[rows].std(ddof=1) or 1.0
            score[rows] = (dispersion[rows] - dispersion[rows].mean()) / spread
    return _top(score, n_top)


def _loess(x, y, span=0.3, knots=500):
    """Local quadratic regression with tricube weights (Cleveland 1979), evaluated at quantile knots
    and interpolated: (G,) -> (G,)."""
    order = np.argsort(x, kind="stable")
    xs, ys = x[order], y[order]
    q = max(int(span * len(xs)), 4)
    at = np.unique(np.quantile(xs, np.linspace(0, 1, min(knots, len(xs)))))
    fit = np.empty(len(at))
    for i, centre in enumerate(at):
        lo = np.clip(np.searchsorted(xs, centre) - q, 0, len(xs) - q)
        hi = min(lo + 2 * q, len(xs))
        near = lo + np.argpartition(np.abs(xs[lo:hi] - centre), q - 1)[:q]
        d = xs[near] - centre
        reach = np.abs(d).max() or 1.0
        w = np.sqrt(np.clip(1 - (np.abs(d) / reach) ** 3, 0, None) ** 3)
        basis = np.stack([np.ones(q), d / reach, (d / reach) ** 2], 1)  # (q, 3)
        fit[i] = np.linalg.lstsq(basis * w[:, None], ys[near] * w, rcond=None)[0][0]
    return np.interp(x, at, fit)


def hvg_seurat_v3(counts, n_top=3000):
    """Highly variable genes by variance of clipped standardised counts (Stuart et al. 2019), on raw
    counts. Sorted columns (n_top,)."""
    n = counts.shape[0]
    mean, var = mean_var(counts)
    seen = var > 0
    score = np.full(len(mean), -1.0)
    expected = np.sqrt(10 ** _loess(np.log10(mean[seen]), np.log10(var[seen])))
    x = counts[:, np.flatnonzero(seen)].tocsc().astype(np.float64)
    x.data = np.minimum(x.data, np.repeat(expected * np.sqrt(n) + mean[seen], np.diff(x.indptr)))
    total, square = np.asarray(x.sum(0)).ravel(), np.asarray(x.multiply(x).sum(0)).ravel()
    score[seen] = (n * mean[seen] ** 2 + square - 2 * total * mean[seen]) / ((n - 1) * expected**2)
    return _top(score, n_top)


class Standardise:
    """z-score with clip, fitted on training rows.

    A count matrix has its zeros at z = -mean/std, so clipping from above can be done on the stored
    values alone: the matrix stays sparse up to the last step, and PCA never sees a dense one.
    """

    def __init__(self, clip=10.0):
        self.clip = clip

    def fit(self, x):
        """x (n, G) CSR of training rows."""
        self.mean, var = mean_var(x)  # (G,), (G,)
        self.std = np.where(var > 0, np.sqrt(var), 1.0)
        return self

    def scaled(self, x):
        """(N, G) CSR of min(x, mean + clip * std) / std, that is z + mean / std, still sparse."""
        out = sp.csr_matrix(x, dtype=np.float32, copy=True)
        cap = (self.mean + self.clip * self.std).astype(np.float32)[out.indices]
        out.data = np.minimum(out.data, cap) / self.std.astype(np.float32)[out.indices]
        return out

    def transform(self, x):
        """(N, G) dense float32 z-scores within +-clip."""
        z = self.scaled(x).toarray()  # (N, G)
        z -= (self.mean / self.std).astype(np.float32)
        return np.maximum(z, -self.clip, out=z)


class Expression:
    """Gene filter -> library size -> log1p -> HVG -> z-score with clip, as one fit/transform pair.

    `fit` sees training rows only; `transform` aligns any other slide by gene *name* (a missing gene
    is at the training mean, z = 0).
    flavor: `seurat` (on log data), `seurat_v3` (on counts) or `none` (all genes that pass the
    filter).
    """

    def __init__(self, n_top_genes=3000, flavor="seurat", min_spots=3, target_sum=1e4, clip=10.0):
        self.n_top_genes, self.flavor, self.min_spots = n_top_genes, flavor, min_spots
        self.target_sum, self.clip = target_sum, clip

    def fit(self, counts, genes, library_size=None):
        """counts (n, G) CSR raw counts of the training rows, genes (G,), library_size (n,) or None:
        the sum over all G genes, before the filter, as in `log1p`. Raises DataError on an empty
        panel."""
        seen = np.flatnonzero(counts.getnnz(axis=0) >= min(self.min_spots, counts.shape[0]))
        if len(seen) == 0:
            raise DataError(
                f"no gene is seen in {self.min_spots} training spots: give a slide with "
                "counts or more training spots"
            )
        x = normalise_log1p(counts, library_size, self.target_sum)[:, seen]
        counts = counts[:, seen]
        pick = {
            "seurat": lambda: hvg_seurat(x, self.n_top_genes),
            "seurat_v3": lambda: hvg_seurat_v3(counts, self.n_top_genes),
            "none": lambda: np.arange(len(seen)),
        }[self.flavor]()
        self.genes = np.asarray(genes)[seen][pick]  # (n_top,)
        self.scaler = Standardise(self.clip).fit(x[:, pick])
        return self

    def log1p(self, counts, genes, library_size=None):
        """(N, n_top) CSR of log1p values in the fitted gene order, and the mask (n_top,) of genes
        this panel has. library_size (N,), None: the sum over all genes of `counts`."""
        x = normalise_log1p(counts, library_size, self.target_sum).tocsc()
        column = {g: j for j, g in reversed(list(enumerate(genes)))}
        at = np.array([column.get(g, -1) for g in self.genes])
        present = at >= 0
        if not present.any():
            raise DataError(
                f"this slide shares none of the {len(self.genes)} genes of the training "
                "slides: check species and gene naming"
            )
        x = x[:, np.where(present, at, 0)].tocsr()
        return (x if present.all() else (x @ sp.diags(present.astype(np.float32))).tocsr()), present

    def transform(self, counts, genes, library_size=None, own_scale=False):
        """(N, n_top) dense float32 z-scores; genes that this panel lacks are 0, the training mean.
        Raises DataError if none is shared.

        `own_scale` z-scores by these rows themselves instead of the training rows: the usual answer
        to batch effects between slides."""
        x, present = self.log1p(counts, genes, library_size)
        z = (Standardise(self.clip).fit(x) if own_scale else self.scaler).transform(x)
        z[:, ~present] = 0
        return z

    def pca(self, counts, genes, n_components=50, fit_rows=None, library_size=None, seed=0):
        """(N, n_components) float32 principal components of the z-scores, fitted on `fit_rows`,
        without densifying (N, n_top)."""
        x = self.scaler.scaled(self.log1p(counts, genes, library_size)[0])
        rows = np.arange(x.shape[0]) if fit_rows is None else fit_rows
        if rows.dtype == bool:
            rows = np.flatnonzero(rows)
        return truncated_pca(x, n_components, rows, seed)

    def state(self):
        """Plain tensors-and-strings state for a checkpoint; `from_state` rebuilds it."""
        return {
            "n_top_genes": self.n_top_genes,
            "flavor": self.flavor,
            "min_spots": self.min_spots,
            "target_sum": self.target_sum,
            "clip": self.clip,
            "genes": self.genes.tolist(),
            "mean": self.scaler.mean.tolist(),
            "std": self.scaler.std.tolist(),
        }

    @classmethod
    def from_state(cls, state):
        """Inverse of `state`. Raises KeyError, TypeError or ValueError where the parts do not fit
        each other."""
        out = cls(*(state[k] for k in ("n_top_genes", "flavor", "min_spots", "target_sum", "clip")))
        out.genes, out.scaler = np.array(state["genes"]), Standardise(state["clip"])
        out.scaler.mean = np.array(state["mean"], float)
        out.scaler.std = np.array(state["std"], float)
        if not all(isinstance(gene, str) for gene in state["genes"]):
            raise ValueError("a gene is no name")
        if not out.genes.shape == out.scaler.mean.shape == out.scaler.std.shape or not (
            np.isfinite(out.scaler.mean).all() and (out.scaler.std > 0).all()
        ):
            raise ValueError("its genes, means and deviations do not fit each other")
        return out


def truncated_pca(x, n_components, fit_rows=None, seed=0):
    """(N, n_components) float32 scores of a sparse or dense (N, G) matrix; centring is implicit, a
    sparse matrix is never densified as a whole.

    By Lanczos iterations (ARPACK), or of a tall sparse matrix by its (G, G) covariance where that
    is less work: same components up to sign. sklearn's `covariance_eigh` gives the same, but took
    half as long again and twice the memory at 291,000 x 1,000.
    """
    fit = x if fit_rows is None else x[fit_rows]
    n_components = min(n_components, min(fit.shape) - 1)
    if (
        sp.issparse(fit)
        and len(fit.indptr) > 10 * fit.shape[1]
        and fit.shape[1] ** 2 < 1e5 * fit.nnz / fit.shape[0]
    ):
        mean, axes = covariance_axes(fit.tocsr(), n_components)
        return np.concatenate(
            [(part @ axes - mean @ axes).astype(np.float32) for part in dense_parts(x.tocsr())]
        )
    pca = PCA(n_components, svd_solver="arpack", random_state=seed).fit(fit)
    return pca.transform(x).astype(np.float32)


def covariance_axes(x, n_components):
    """Mean (G,) and the leading eigenvectors (G, n_components), largest first, of the covariance of
    x (N, G) CSR."""
    mean, square = np.asarray(x.mean(0), np.float64).ravel(), np.zeros((x.shape[1],) * 2)
    for part in dense_parts(x):
        part -= mean
        square += part.T @ part
    # (G, n_components)
    axes = eigh(square, subset_by_index=[len(mean) - n_components, len(mean) - 1])[1][:, ::-1]
    return mean, axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(n_components)])


def dense_parts(x, rows=10_000):
    """x (N, G) CSR as float64 arrays of at most `rows` rows, one after the other."""
    for i in range(0, x.shape[0], rows):
        yield x[i : i + rows].toarray().astype(np.float64)


# --------------------------------------------------------------------------------------------------
# Splits
# --------------------------------------------------------------------------------------------------


@dataclass
class Split:
    """Boolean masks (N,) train / val / test; spots in none of them are unlabelled, or buffer."""

    name: str
    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    leaks_position: bool
    detail: str = ""


def random_split(labels, seed=42):
    """The published split: labelled spots 60/20/20, stratified, spots drawn at random inside one
    slice. It leaks position: about 60 % of a test spot's neighbours are training spots. Raises
    DataError with fewer than two classes, or too few spots of one."""
    rows = np.flatnonzero(labels >= 0)
    check_labels(labels)
    try:
        train, rest = train_test_split(
            rows, train_size=0.6, stratify=labels[rows], random_state=seed
        )
        val, test = train_test_split(rest, train_size=0.5, stratify=labels[rest], random_state=seed)
    except ValueError as error:
        raise DataError(
            f"the labels cannot be split 60/20/20 within each class ({error}): drop or merge "
            "classes of fewer than five spots"
        ) from error
    return Split(
        "random",
        *(_mask(r, len(labels)) for r in (train, val, test)),
        True,
        f"60/20/20 stratified, seed {seed}",
    )


def block_split(
    labels, xy, fold=0, n_blocks=5, n_folds=5, buffer=3.0, pitch=None, seed=0, val=True, reach=0.0
):
    """Whole n_blocks x n_blocks tiles of the tissue's bounding box are held out. Tiles are dealt to
    folds at random; the next fold's tiles are for validation (`val`). Spots within `buffer` lattice
    pitches of a test spot are dropped, then validation spots within it of a training spot: what is
    trained without validation loses nothing to it.

    labels (N,) int, xy (N, 2) px, pitch px (median nearest-neighbour distance where None). `reach`
    is the model's receptive field in pitches: the split leaks position where the buffer is 0 or
    smaller than that. Raises DataError where the test, the validation (if asked for) or all but one
    training class would be empty.
    """
    check_labels(labels)
    if not 0 <= fold < n_folds:
        raise DataError(f"fold {fold} does not exist: folds go from 0 to {n_folds - 1}")
    low, high = xy.min(0), xy.max(0)
    # (N, 2)
    tile = np.minimum(
        ((xy - low) / np.maximum(high - low, 1e-9) * n_blocks).astype(int), n_blocks - 1
    )
    deal = np.random.default_rng(seed).permutation(np.arange(n_blocks**2) % n_folds)
    fold_of = deal[tile[:, 0] * n_blocks + tile[:, 1]]  # (N,)
    labelled = labels >= 0
    test = labelled & (fold_of == fold)
    if not test.any():
        raise DataError(
            f"fold {fold} of the {n_blocks} x {n_blocks} blocks holds no labelled spot: "
            "choose another fold or fewer blocks"
        )
    radius = buffer * (pitch or lattice_pitch(xy)) + 1e-6 if buffer > 0 else -1.0
    usable = labelled & ~test & ~_within(xy, test, radius)
    is_val_tile = (fold_of == (fold + 1) % n_folds) & val
    train = usable & ~is_val_tile
    validate = usable & is_val_tile & ~_within(xy, train, radius)
    detail = (
        f"fold {fold} of {n_folds}, {n_blocks} x {n_blocks} blocks, buffer {buffer:g} pitches, "
        f"seed {seed}"
    )
    if len(np.unique(labels[train])) < 2:
        raise DataError(
            f"the buffer of {buffer:g} pitches leaves fewer than two classes to train on: "
            "choose a smaller buffer or more blocks"
        )
    if val and not validate.any():
        raise DataError(
            f"fold {fold} of the {n_blocks} x {n_blocks} blocks with a buffer of {buffer:g} "
            "pitches leaves no labelled spot for validation: "
            "choose a smaller buffer, another number of blocks or another fold"
        )
    return Split("blocks", train, validate, test, buffer <= 0 or buffer < reach, detail)


def _within(xy, part, radius):
    """(N,) spots within `radius` of a spot of `part` (N,), those of the part themselves included;
    none where the radius is negative or the part empty."""
    if radius < 0 or not part.any():
        return np.zeros(len(xy), bool)
    return cKDTree(xy[part]).query(xy)[0] <= radius


def holdout_split(slides, labels, name="slice", seed=0, n_blocks=5):
    """Slide 0 is scored, the others train; a fifth of their n_blocks x n_blocks tiles is for
    validation. labels (N,) stacked over slides.

    `slice` leaks position where a slide is, or may be (patient unknown), of the scored slide's
    donor: neighbouring sections are near copies, and the detail names them. `donor` does not; it
    raises DataError unless every slide's patient is known and no training slide is of the donor.
    """
    of_donor = [s.sample for s in slides[1:] if s.patient == slides[0].patient != ""]
    unknown = [s.sample for s in slides if not s.patient]
    if name == "donor":
        check_donors(slides)
    if name == "donor" and of_donor:
        raise DataError(
            f"slices {', '.join(of_donor)} are of donor {slides[0].patient}, as is the scored "
            f"{slides[0].sample}: take them out of --train, or use --split slice"
        )
    start = np.cumsum([0] + [s.n_spots for s in slides])
    for s, a, b in zip(slides, start, start[1:]):
        check_labels(labels[a:b], s.sample)
    train, val = np.zeros(len(labels), bool), np.zeros(len(labels), bool)
    for i in range(1, len(slides)):
        rows = slice(start[i], start[i + 1])
        part = block_split(
            labels[rows], slides[i].xy, 0, n_blocks, buffer=0.0, seed=seed, val=False
        )
        train[rows], val[rows] = part.train, part.test
    test = (labels >= 0) & (np.arange(len(labels)) < start[1])
    detail = (
        f"{slides[0].sample} held out, trained on {', '.join(s.sample for s in slides[1:])}, a "
        "fifth of their blocks for validation"
    )
    if of_donor:
        detail += f"; {', '.join(of_donor)} of the same donor: leaks the donor"
    if unknown:
        detail += f"; donor of {', '.join(unknown)} unknown: may leak the donor"
    return Split(name, train, val, test, bool(of_donor or unknown), detail)


def cell_split(cells, test_every=4, width=600.0, offset=None, buffer=None, val=4, fold=0):
    """Split of cells by section where there are three or more, else by blocks of `width` px along x
    within each section.

    Every `test_every`-th unit (section or block) is the test, the one numbered `offset` first
    (default test_every // 2), moved on by `fold`; every `val`-th of the others is for validation
    (0: none). Among blocks, training and validation cells within `buffer` of a test cell of their
    section, then training cells within it of a validation cell, are in no part. `buffer` is in um,
    or in px where the cell file has no um_per_px; None: the diagonal of a crop, beyond which no two
    crops overlap; a smaller one leaks position. With three sections and test_every 4 it is every
    third. Raises DataError where a part would be empty. Returns a Split over cells, masks (N,).
    """
    by_section = len(cells.sections) >= 3
    every = min(test_every, len(cells.sections)) if by_section else test_every
    if test_every < 2 or not 0 <= fold < every or not width > 0 or val < 0 or val == 1:
        raise DataError(
            f"test_every {test_every}, fold {fold}, width {width:g} and val {val} make no split: "
            f"give test_every >= 2, a fold from 0 to {every - 1}, width > 0, val 0 or >= 2"
        )
    # (N,)
    unit = cells.section if by_section else np.floor(cells.xy[:, 0] / width).astype(np.int64)
    first = every // 2 if offset is None else offset
    tested = unit % every == (first + fold) % every
    others = np.unique(unit[~tested])
    is_val_unit = np.zeros(len(unit), bool)
    if val and len(others):
        is_val_unit = np.isin(unit, others[min(val // 2, len(others) - 1) :: val])
    diagonal = cells.crop_diagonal
    radius, length = _buffer_of(cells, diagonal, buffer)
    if by_section:
        # sections have no distance
        radius = -1.0
    usable = ~tested & ~_near(cells, tested, radius)
    validated = is_val_unit & usable
    train = usable & ~validated & ~_near(cells, validated, radius)
    what = "sections" if by_section else "blocks"
    parts = {"test": tested, "train on": train} | ({"validate": validated} if val else {})
    for name, part in parts.items():
        if not part.any():
            raise DataError(
                f"{cells.source} has no cell to {name} among its {len(np.unique(unit))} "
                f"{what}: choose another fold, smaller blocks or buffer"
            )
    detail = f"every {every}th of {len(np.unique(unit))} {what}"
    detail += " is the test" if by_section else f" of {width:g} px along x is the test"
    detail += f", fold {fold}; "
    detail += f"every {val}th of the others for validation" if val else "no validation"
    if by_section:
        detail += "; the cell file names no donors, so sections of one may stand on both sides"
    else:
        n_dropped = int((~(tested | validated | train)).sum())
        detail += f"; {n_dropped} cells within {length} of a cell that is held out dropped"
    overlaps = not by_section and radius < diagonal
    if overlaps:
        detail += "; crops overlap: leaks position"
    return Split(what, train, validated, tested, overlaps, detail)


def _buffer_of(cells, diagonal, buffer):
    """`buffer` of `cell_split` in full-resolution px, and in words; diagonal of a crop px."""
    if np.isnan(cells.um_per_px):
        radius = diagonal if buffer is None else buffer
        return radius, f"{radius:.4g} px (the cell file has no um_per_px)"
    radius = diagonal if buffer is None else buffer / cells.um_per_px
    return radius, f"{radius * cells.um_per_px:.4g} um ({radius:.4g} px)"


def _near(cells, part, radius):
    """(N,) cells within `radius` px of a cell of `part` (N,) in the same section."""
    out = np.zeros(len(part), bool)
    for s in np.unique(cells.section[part]):
        rows = cells.section == s
        out[rows] = _within(cells.xy[rows], part[rows], radius)
    return out


def check_labels(labels, name=""):
    """Raise DataError, naming slide `name`, unless at least two classes have labelled spots."""
    present = np.unique(labels[labels >= 0])
    if len(present) == 0:
        raise DataError(
            f"{describe_slide(name)} has no labels: give metadata.tsv, barcode_level_layer_map.tsv "
            "or a two-column CSV with --labels"
        )
    if len(present) == 1:
        raise DataError(
            f"{describe_slide(name)} has one class only: a classifier needs at least two, add "
            "labels or choose another slide"
        )


def check_donors(slides):
    """Raise DataError, naming the slide, unless every slide's patient is known."""
    for slide in slides:
        if not slide.patient:
            raise DataError(
                f"slide {slide.sample} names no patient, so donors cannot be told apart: add "
                "`subject` to its metadata.tsv "
                "(h5ad: obs column `patient`), or use --split slice with --train"
            )


def _mask(rows, n):
    out = np.zeros(n, bool)
    out[rows] = True
    return out


def common_genes(slides):
    """Genes that all slides have, in the order of the first. Raises DataError if there is none."""
    shared = set(slides[0].genes).intersection(*(s.genes for s in slides[1:]))
    if not shared:
        raise DataError(
            f"slides {', '.join(s.sample for s in slides)} share no gene: check species and "
            "gene naming"
        )
    return np.array([g for g in slides[0].genes if g in shared])


def global_labels(slides):
    """One label map over several slides: (list of classes in the order of `sorted_classes`; list
    of (N_i,) label arrays in that numbering)."""
    classes = sorted_classes(c for s in slides for c in s.classes)
    code = {c: i for i, c in enumerate(classes)}
    return classes, [np.array([code[c] for c in s.classes] + [-1])[s.labels] for s in slides]
