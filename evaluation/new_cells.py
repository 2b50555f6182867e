"""Embeddings and clusters of a new cell file from a saved model: genes aligned by name, those that
the new panel lacks are hidden, as genes are hidden in training."""

from dataclasses import replace

import numpy as np
import scipy.sparse as sp
import torch

import data
import metrics
from data import DataError, Split
from evaluation import cell_runs
from plainst import export, run
from plainst.cell_data import CellDataset, Normaliser

# of a checkpoint
NEEDED = ["config", "genes", "normaliser", "channels", "shape", "cell", "context"]
# flags that --predict takes from its own command line
OF_THIS_RUN = (
    *("data", "seed", "device", "threads", "deterministic", "runs", "predict", "min_shared"),
    *("bf16", "compile", "h5ad", "typed"),
)


def align_genes(cells, genes, path, min_shared):
    """The cells with counts in the order of the model's genes, 0 for those that the file lacks, and
    (G,) which it lacks. Raises DataError where it has too few of them, or a cell has no count of
    one."""
    column = {gene: i for i, gene in enumerate(cells.genes.tolist())}
    is_absent = np.array([gene not in column for gene in genes])
    share = 1 - is_absent.mean()
    run.say(f"{cells.source} has {share:.0%} of the {len(genes)} genes of {path}")
    if share < min_shared or is_absent.all():
        raise DataError(
            f"{cells.source} has {share:.0%} of the {len(genes)} genes of {path}, fewer than "
            f"--min_shared {min_shared:.0%}: train on the common genes, or lower --min_shared"
        )
    counts = sp.hstack([cells.counts, sp.csr_matrix((cells.n_cells, 1), dtype=cells.counts.dtype)])
    order = [column.get(gene, cells.n_genes) for gene in genes]
    return replace(cells, counts=counts.tocsr()[:, order], genes=np.array(genes)), is_absent


def check_pictures(cells, saved, path):
    """The cells without pictures where the model reads none. Raises DataError where it was trained
    on pictures of another size or with other channels."""
    if not saved["channels"]:
        return replace(cells, crops=None, channels=[])
    if cells.crops is None:
        run.say(f"{cells.source} holds no pictures: embeddings of expression alone")
        return cells
    wanted = (saved["channels"], saved["shape"])
    if (list(cells.channels), list(cells.crops.shape[1:3])) != wanted:
        raise DataError(
            f"{cells.source} has crops of {cells.crops.shape[2]} px with channels "
            f"{', '.join(cells.channels)}, {path} was trained on {saved['shape'][1]} px with "
            f"{', '.join(saved['channels'])}: convert the cells alike"
        )
    return cells


def predict_cells(config, check, sizes, cell_class, context_class, start):
    """Embed and cluster the cells of --data with the model of --predict. check, sizes, classes of
    the networks: those of the method; start as in `run.Run`."""
    path = config.predict
    saved = run.read_checkpoint(path, "spatia checkpoint", NEEDED)
    known = run.saved_flags(path, type(config), saved["config"], check)
    config = replace(known, **{name: getattr(config, name) for name in OF_THIS_RUN})
    size, genes = cell_runs.size_of(known, sizes), saved["genes"]
    source = data.load_cells(config.data)
    cells, is_absent = align_genes(source, genes, path, config.min_shared)
    cells = check_pictures(cells, saved, path)
    name = f"predict-{cell_runs.place(known)[1]}-{data.file_checksum(path)[:8]}"
    record = run.Run("spatia", config, "all", name, start)
    record.note_inputs([config.data, path])
    nobody = np.zeros(cells.n_cells, bool)
    has_niche = (cells.section_sizes > size.niche)[cells.section]
    if not has_niche.any():
        raise DataError(
            f"{cells.source}: no section has a niche of {size.niche + 1} cells: give more cells"
        )
    with run.checkpoint_fits(path):
        normalise = Normaliser.from_state(saved["normaliser"])
        split = Split("none", has_niche, nobody, nobody, False)
        dataset = CellDataset(cells, split, normalise, size.niche, size.tissue, record.device)
        shape = tuple(saved["shape"])
        cell = cell_class(shape, len(genes), size, known.fusion, bool(saved["channels"]))
        context = context_class(len(genes), size, known.niche, known.tissue)
        for model, part in ((cell, "cell"), (context, "context")):
            model.load_state_dict(saved[part])
            model.to(record.device).eval()
    record.lap("read")
    hidden = torch.tensor(is_absent).expand(cells.n_cells, -1) if is_absent.any() else None
    arrays = cell_runs.every_cell(dataset, cell, context, config.seed, hidden)
    record.lap("prediction")
    scores, is_scored = {"genes_shared": float(1 - is_absent.mean())}, cells.labels >= 0
    if len(np.unique(cells.labels[is_scored])) > 1:
        partition = metrics.clustering(cells.labels[is_scored], arrays["clusters"][is_scored])
        scores |= {f"clustering_{key}": partition[key] for key in ("ari", "nmi")}
    arrays["genes"] = source.genes
    files = export.files_of("spatia", arrays, [source], config)
    n_params = sum(p.numel() for model in (cell, context) for p in model.parameters())
    record.finish(scores, {}, arrays, n_params, files=files, checkpoint=path)
    return 0
