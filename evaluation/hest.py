"""The protocol of H&E -> genes: which slides train and test, which genes are predicted, on which
scale."""

import re

import numpy as np

from data import Split, mean_var, normalise_log1p
from plainst.readers.checked import DataError, read_gene_list
from plainst.readers.patches import hest_genes, hest_samples, hest_split, load_hest


def hest_partition(root, by="folds", fold=0, patient="", sample=""):
    """Which slides of a HEST folder train and which are scored: by `folds` (splits/*_<fold>.csv),
    `patient`, `section` (one slide held out, the others of its patient train) or `sample` (one
    slide held out, all others train).

    Returns Split over the folder's slides, train names, test names, the run's folder name, whether
    it leaks the patient.

    Raises DataError where a side would be empty or a slide has no file.
    """
    if by == "folds":
        train_names, test_names = hest_split(root, fold)
        part, detail = f"fold{fold}", f"splits/{{train,test}}_{fold}.csv"
    names = hest_samples(root)
    of = {n: load_hest(root, n, patches=False, counts=False).patient or n for n in names}
    if by == "patient":
        test_names = [n for n in names if of[n] == patient]
        train_names = [n for n in names if n not in test_names]
        # names a folder; the patient's name may hold a /
        part, detail = re.sub(r"[^\w.+-]|^\.+", "_", patient), f"patient {patient} held out"
    elif by == "section":
        test_names = [n for n in names if n == sample]
        train_names = [n for n in names if n not in test_names and of[n] == of.get(sample)]
        part, detail = (
            sample,
            f"section {sample} held out, the others of patient {of.get(sample)} train",
        )
    elif by == "sample":
        test_names, train_names = (
            [n for n in names if n == sample],
            [n for n in names if n != sample],
        )
        part, detail = sample, f"section {sample} held out, all others train"
    missing = [n for n in [*train_names, *test_names] if n not in of]
    if missing or not train_names or not test_names:
        wanted = {
            "folds": f"--fold {fold}",
            "patient": f"--patient {patient!r}",
            "section": f"--slice {sample!r}",
            "sample": f"--slice {sample!r}",
        }[by]
        there = ", ".join(
            f"{p}: {' '.join(n for n in names if of[n] == p)}" for p in sorted(set(of.values()))
        )
        raise DataError(
            f"{root}: {wanted} leaves {len(train_names)} slides to train on and "
            f"{len(test_names)} to score, "
            f"{len(missing)} of them without a file: choose from {there}"
        )
    leaks = bool({of[n] for n in train_names} & {of[n] for n in test_names})
    detail += (
        ", other slides of the same patient train: leaks the patient"
        if leaks
        else ", no patient on both sides"
    )
    sides = np.isin(names, train_names), np.isin(names, test_names)
    return (
        Split(by, sides[0], np.zeros(len(names), bool), sides[1], leaks, detail),
        train_names,
        test_names,
        part,
        leaks,
    )


def target_genes(spec, slides, root, min_counts=100):
    """Names of the genes to predict: `task` (the folder's var_50genes.json), a number (so many most
    variable genes of the training `slides`), or the path of a JSON list. Raises DataError for a
    gene without a count in any training slide."""
    if spec == "task":
        genes = hest_genes(root)
    elif spec.isdigit():
        total = {}
        for s in slides:
            rows = np.asarray(s.counts.sum(1)).ravel() >= min_counts
            for g, v in zip(s.genes, mean_var(normalise_log1p(s.counts[np.flatnonzero(rows)]))[1]):
                total[g] = total.get(g, 0.0) + v
        genes = [str(g) for g in sorted(total, key=lambda g: -total[g])[: int(spec)]]
    else:
        genes = read_gene_list(spec)
    seen = set()
    for s in slides:
        seen.update(s.genes[np.asarray(s.counts.sum(0)).ravel() > 0])
    silent = [g for g in genes if g not in seen]
    if silent or not genes:
        raise DataError(
            f"{root}: {len(silent)} of the {len(genes)} target genes ({', '.join(silent[:3])} "
            "...) have no count in any training "
            "slide: take them off the list or add slides"
        )
    return genes


def target_expression(slide, genes, target="cp10k"):
    """y (N, G) float32: log1p of counts per 10,000 (`cp10k`) or of raw counts (`log1p`), counts (N,
    G), library (N,), measured (G,) bool. A gene that the panel lacks is 0 and unmeasured; where a
    symbol stands twice the first is taken."""
    column = {g: j for j, g in reversed(list(enumerate(slide.genes)))}
    at = np.array([column.get(g, -1) for g in genes])
    library = (
        np.asarray(slide.counts.sum(1), np.float64).ravel()
        if slide.library_size is None
        else slide.library_size
    )
    counts = slide.counts.tocsc()[:, np.maximum(at, 0)].tocsr()
    y = (
        normalise_log1p(counts, library).toarray()
        if target == "cp10k"
        else np.log1p(counts.toarray())
    )
    counts = counts.toarray()
    y[:, at < 0], counts[:, at < 0] = 0, 0
    return *(np.asarray(a, np.float32) for a in (y, counts, library)), at >= 0
