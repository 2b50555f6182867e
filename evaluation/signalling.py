"""Ligand-receptor scores between neighbouring domains, and the tables of pairs that they take."""

import csv
from pathlib import Path

import numpy as np
from scipy.stats import false_discovery_control

import data
from data import DataError
from plainst import run

# names of the two columns of a table of pairs, in lower case
COLUMNS = (("ligand", "receptor"), ("ligand gene symbol", "receptor gene symbol"))

# pairs known from the cortex
PAIRS = [
    ("APOE", "LRP1"), ("BDNF", "NTRK2"), ("CCK", "CCKBR"), ("CNTN1", "NRCAM"),
    ("CX3CL1", "CX3CR1"), ("CXCL12", "CXCR4"), ("CXCL14", "CXCR4"), ("EFNA5", "EPHA4"),
    ("FGF1", "FGFR2"), ("GAS6", "AXL"), ("IGF1", "IGF1R"), ("JAG1", "NOTCH1"), ("NRG1", "ERBB4"),
    ("NRXN1", "NLGN1"), ("NRXN3", "NLGN2"), ("NTF3", "NTRK3"), ("PDGFA", "PDGFRA"),
    ("PENK", "OPRM1"), ("PSAP", "GPR37"), ("PTN", "PTPRZ1"), ("RELN", "LRP8"), ("SEMA3A", "NRP1"),
    ("SLIT2", "ROBO1"), ("SPP1", "CD44"), ("SST", "SSTR2"), ("TAC1", "TACR1"), ("VEGFA", "FLT1"),
    ("VIP", "VIPR1"), ("APP", "CD74"), ("MIF", "CD74"), ("COL1A1", "CD44"), ("FN1", "ITGB1"),
    ("TGFB1", "TGFBR2"), ("WNT5A", "FZD3"),
]  # fmt: skip


def read_pairs(path):
    """[(ligand, receptor)] of a table of pairs; a complex is its genes, joined by `+`.

    Known are: two columns ligand,receptor (a header allowed); connectomeDB2020 (tab-separated,
    `Ligand gene symbol`, `Receptor gene symbol`); CellPhoneDB v5 (`interaction_input.csv`, with
    `gene_input.csv` and `complex_input.csv` of the same prefix beside it). Raises DataError for
    another shape, naming the known columns.
    """
    rows = read_rows(path)
    header = [cell.lower() for cell in rows[0]]
    if {"partner_a", "partner_b"} <= set(header):
        return cellphonedb_pairs(Path(path), rows)
    for ligand, receptor in COLUMNS:
        if ligand in header and receptor in header:
            columns, rows = (header.index(ligand), header.index(receptor)), rows[1:]
            break
    else:
        if any(len(row) != 2 for row in rows):
            known = ", ".join("/".join(names) for names in COLUMNS)
            raise DataError(
                f"{path} has a row with fewer than two columns, or more of them and none of the "
                f"known names ({known}, partner_a/partner_b): give ligand,receptor"
            )
        columns = (0, 1)
    pairs = [(row[columns[0]], row[columns[1]]) for row in rows if len(row) > max(columns)]
    if not pairs:
        raise DataError(f"{path} holds no ligand-receptor pair: give two columns ligand,receptor")
    return list(dict.fromkeys(pairs))


def read_rows(path):
    """Rows of a CSV, or of a tab-separated table, as lists of stripped cells, empty rows left out.
    Raises DataError for a file that is none, or that is empty."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            file.seek(0)
            table = csv.reader(file, strict=True, delimiter="\t" if "\t" in first else ",")
            rows = [[cell.strip() for cell in row] for row in table]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{path} cannot be read as a ligand-receptor CSV ({error}): give two columns "
            "ligand,receptor"
        ) from error
    rows = [row for row in rows if any(row)]
    if not rows:
        raise DataError(f"{path} holds no ligand-receptor pair: give two columns ligand,receptor")
    return rows


def cellphonedb_pairs(path, rows):
    """The pairs of CellPhoneDB's interactions, partners resolved through its tables of genes and
    complexes. Raises DataError where these are not beside it, or name other columns."""
    tables = {}
    for kind, names in (("gene", ("uniprot", "gene_name")), ("complex", ("complex_name",))):
        beside = path.with_name(path.name.replace("interaction_input", f"{kind}_input"))
        if beside == path or not beside.is_file():
            raise DataError(
                f"{path} has partners of CellPhoneDB, whose {kind}_input.csv is not beside it: put "
                "it there"
            )
        header, *cells = read_rows(beside)
        lacking = [name for name in names if name not in header]
        if lacking:
            raise DataError(f"{beside} has no column {lacking[0]}: give the file of CellPhoneDB v5")
        tables[kind] = [dict(zip(header, row)) for row in cells]
    parts = {row["uniprot"]: [row["gene_name"]] for row in tables["gene"]}
    gene_of = {row["uniprot"]: row["gene_name"] for row in tables["gene"]}
    for row in tables["complex"]:
        proteins = [row.get(f"uniprot_{i}", "") for i in range(1, 6)]
        proteins = [p for p in proteins if p]
        # a complex with a part of unknown gene cannot be scored
        if all(p in gene_of for p in proteins):
            parts[row["complex_name"]] = [gene_of[p] for p in proteins]
    header, *cells = rows
    pairs = []
    for row in (dict(zip(header, values)) for values in cells):
        partners = row["partner_a"], row["partner_b"]
        if all(parts.get(partner) for partner in partners):
            pairs.append(tuple("+".join(parts[partner]) for partner in partners))
    if not pairs:
        raise DataError(
            f"no interaction of {path} has genes in its tables: give files of one version"
        )
    return list(dict.fromkeys(pairs))


def matched_genes(level, mean, n):
    """Columns (n,) of the genes whose mean expression `mean` (G,) is nearest to `level`."""
    return np.argsort(np.abs(np.log1p(mean) - np.log1p(level)), kind="stable")[:n]


def domain_means(ligands, receptors, neighbours, code, k):
    """s(a, b) = mean of x_iL x_jR over neighbour pairs i in domain a, j in b, of every ligand with
    every receptor: (K, K, p, q), nan where a and b never touch.

    ligands (N, p), receptors (N, q), neighbours (N, N) CSR of ones, code (N,) in 0..k-1.
    """
    out = np.full((k, k, ligands.shape[1], receptors.shape[1]), np.nan)
    for b in range(k):
        is_b = (code == b).astype(float)
        count = neighbours @ is_b  # (N,)
        total = neighbours @ (receptors * is_b[:, None])  # (N, q)
        for a in range(k):
            rows = code == a
            n_pairs = count[rows].sum()
            if n_pairs:
                out[a, b] = ligands[rows].T @ total[rows] / n_pairs
    return out


def ligand_receptor(x, genes, pairs, labels, near, draws=10_000, seed=0):
    """Domain-to-domain ligand-receptor scores over spatial neighbours (spots hold several cells, so
    not cell-to-cell).

    s(a, b) as in `domain_means`, a complex the minimum of its parts. Null: the same score, on the
    same domains, of other pairs: of sqrt(draws) genes whose mean is nearest to the ligand's, with
    as many for the receptor. So domains and the genes' own patterns stay what they are, and the
    question is whether *this* pair meets more than another of its level does. p = (1 + #(null >=
    s)) / (1 + draws), Benjamini-Hochberg over all pairs and domain pairs. Permuted labels, the
    usual null, make most random pairs significant: any two genes with a pattern beat it.

    x (N, G) CSR log expression, near (N, k), labels (N,). Returns (pairs that the panel holds,
    score (n, K, K), p (n, K, K), q (n, K, K)); domain pairs that never touch are nan.
    """
    column = {g: i for i, g in reversed(list(enumerate(genes)))}
    pairs = [p for p in pairs if all(g in column for side in p for g in side.split("+"))]
    names, code = np.unique(labels, return_inverse=True)
    k = len(names)
    if not pairs:
        return [], *(np.zeros((0, k, k)) for _ in range(3))
    x, neighbours = x.tocsc(), data.table_to_csr(near)
    mean = np.asarray(x.mean(0)).ravel()  # (G,)
    rng, expressed = np.random.default_rng(seed), np.flatnonzero(mean > 0)
    n_matched = min(int(np.ceil(draws**0.5)), len(expressed) - 1)
    score, p = np.empty((2, len(pairs), k, k))
    for row, pair in enumerate(run.progress(pairs, "ligand-receptor")):
        sides, chosen = [], []
        for side in pair:
            own = [column[g] for g in side.split("+")]
            level = x[:, own].toarray().min(1).astype(np.float64)  # (N,)
            others = np.setdiff1d(expressed, own)
            # ties between genes of one level in random order
            others = rng.permutation(others)
            others = others[matched_genes(level.mean(), mean[others], n_matched)]
            chosen.append(others)
            sides.append(np.column_stack([level, x[:, others].toarray()]))  # (N, 1 + n)
        means = domain_means(*sides, neighbours, code, k)  # (K, K, 1 + n, 1 + n)
        score[row] = means[:, :, 0, 0]
        # a gene with itself is no pair
        is_pair = chosen[0][:, None] != chosen[1]
        null = means[:, :, 1:, 1:][:, :, is_pair]  # (K, K, draws)
        above = (null >= score[row][:, :, None] - 1e-12).sum(2)
        p[row] = np.where(np.isfinite(score[row]), (1 + above) / (1 + null.shape[2]), np.nan)
    q = np.full_like(p, np.nan)
    q[np.isfinite(p)] = false_discovery_control(p[np.isfinite(p)])
    return pairs, score, p, q


def pairs_table(arrays):
    """Rows of ligand_receptor.csv from the arrays of a run: a pair in two domains that touch, the
    smallest p first."""
    names = np.unique(arrays["domains"])
    rows = []
    for pair, a, b in np.argwhere(np.isfinite(arrays["lr_p"])):
        values = [arrays[name][pair, a, b] for name in ("lr_score", "lr_p", "lr_q")]
        ligand, receptor = arrays["lr_pairs"][pair].split(">")
        rows.append([ligand, receptor, names[a], names[b], *(f"{v:.4g}" for v in values)])
    rows.sort(key=lambda row: float(row[5]))
    return [["ligand", "receptor", "from", "to", "score", "p", "q"], *rows]
