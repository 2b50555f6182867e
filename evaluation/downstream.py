"""What is read off domains and embeddings: pseudotime and ligand-receptor scores."""

import csv

import numpy as np
import scipy.sparse as sp
from scipy.stats import false_discovery_control
from sklearn.neighbors import NearestNeighbors

import data
import metrics
from data import DataError
from evaluation.clustering import components
from plainst import run

# --------------------------------------------------------------------------------------------------
# Pseudotime
# --------------------------------------------------------------------------------------------------

LAYER_ORDER = ["WM", "Layer6", "Layer5", "Layer4", "Layer3", "Layer2", "Layer1"]


def class_ranks(slide, order=""):
    """(N,) rank of each spot's class from the root outwards, nan where the class has none, or None
    without an order.

    order: classes, comma-separated; empty: LAYER_ORDER where all classes are among these. Raises
    DataError where no class is in the order.
    """
    names = [c.strip() for c in order.split(",") if c.strip()]
    if not names and set(slide.classes) <= set(LAYER_ORDER):
        names = LAYER_ORDER
    if order and not set(names) & set(slide.classes):
        raise DataError(
            f"none of --order {order} is a class of slide {slide.sample} "
            f"({', '.join(slide.classes)}): name the classes"
        )
    if not names or not slide.classes:
        return None
    rank = np.array([names.index(c) if c in names else np.nan for c in slide.classes] + [np.nan])
    return rank[slide.labels]


def root_domain(x, genes, domains, gene):
    """The domain whose spots express `gene` most, or None where the panel lacks it, and a text that
    says so. x (N, G) CSR log expression, domains (N,)."""
    column = np.flatnonzero(np.char.upper(genes.astype(str)) == gene.upper())
    if not len(column):
        return None, "an end of the first diffusion component"
    level = np.asarray(x[:, column[0]].todense()).ravel()
    names = np.unique(domains)
    mean = [level[domains == name].mean() for name in names]
    return names[np.argmax(mean)], f"domain with most {gene}"


def pseudotime(h, root_domain, seed=0, most=5000, neighbours=15, n_components=15):
    """Diffusion pseudotime (Haghverdi et al. 2016) from a spot of `root_domain` (N,) bool: (N,) in
    [0, 1], nan where unreachable.

    root_domain None: from an end of the first diffusion component, either end, of the largest
    connected piece.

    dpt(i, root) = |sum_l lambda_l / (1 - lambda_l) (psi_l(i) - psi_l(root))| over the diffusion
    components of the 15-nearest-neighbour graph of h (N, d) in its principal components. Beyond
    `most` spots it is computed on a random subset and carried over by the 5 nearest of it.
    """
    x = components(h)
    rows = np.sort(np.random.default_rng(seed).choice(len(x), min(most, len(x)), replace=False))
    if root_domain is None:
        root_domain = np.ones(len(x), bool)
    if not root_domain[rows].any():
        rows[0] = np.flatnonzero(root_domain)[0]
    part = x[rows]
    near, d = nearest(part, part, min(neighbours, len(part) - 1) + 1)
    near, d = near[:, 1:], d[:, 1:]
    # each spot's own scale
    sigma = np.maximum(d[:, -1], 1e-12)
    w = np.exp(-(d**2) / (sigma[:, None] * sigma[near]))
    graph = data.table_to_csr(near, w)
    graph = graph.maximum(graph.T)
    piece = sp.csgraph.connected_components(graph, directed=False)[1]
    # the component that holds most of the root domain
    at_root = np.bincount(piece[root_domain[rows]]).argmax()
    use = np.flatnonzero(piece == at_root)
    out = np.full(len(part), np.nan)
    out[use] = diffusion_time(graph[use][:, use].tocsr(), root_domain[rows][use], n_components)
    if len(part) == len(x):
        return out
    near, _ = nearest(part, x, min(5, len(part)))
    # (N, 5), nan for spots that cannot be reached
    near_time = out[near]
    reached = np.isfinite(near_time)
    mean = np.where(reached, near_time, 0).sum(1) / np.maximum(reached.sum(1), 1)
    return np.where(reached[:, 0], mean, np.nan)


def nearest(points, query, k):
    """Rows of the k nearest points to each query and their distances, exact, in chunks: (Q, k), (Q,
    k)."""
    search = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(points)
    d, rows = search.kneighbors(query)
    return rows, d


def diffusion_time(graph, at_root, n_components):
    """Pseudotime on one connected weighted graph (n, n) CSR from the extreme spot of `at_root` (n,)
    bool: (n,) in [0, 1]."""
    n = graph.shape[0]
    density = 1 / np.asarray(graph.sum(1)).ravel()
    # density normalisation (Coifman & Lafon 2006)
    graph = sp.diags(density) @ graph @ sp.diags(density)
    root_degree = 1 / np.sqrt(np.asarray(graph.sum(1)).ravel())
    symmetric = sp.diags(root_degree) @ graph @ sp.diags(root_degree)
    start = np.random.default_rng(0).standard_normal(n)
    values, vectors = sp.linalg.eigsh(
        symmetric, k=min(n_components, n - 2) + 1, which="LA", v0=start
    )
    # without the stationary component
    order = np.argsort(-values)[1:]
    values, vectors = values[order], vectors[:, order] * root_degree[:, None]
    first = vectors[:, 0] * np.sign(vectors[at_root, 0].mean() - vectors[:, 0].mean() or 1)
    root = np.flatnonzero(at_root)[first[at_root].argmax()]
    distance = np.linalg.norm(
        values / (1 - np.minimum(values, 1 - 1e-9)) * (vectors - vectors[root]), axis=1
    )
    return distance / max(distance.max(), 1e-12)


# --------------------------------------------------------------------------------------------------
# Ligand-receptor scores between neighbouring domains
# --------------------------------------------------------------------------------------------------

PAIRS = [
    ("APOE", "LRP1"),
    ("BDNF", "NTRK2"),
    ("CCK", "CCKBR"),
    ("CNTN1", "NRCAM"),
    ("CX3CL1", "CX3CR1"),
    ("CXCL12", "CXCR4"),
    ("CXCL14", "CXCR4"),
    ("EFNA5", "EPHA4"),
    ("FGF1", "FGFR2"),
    ("GAS6", "AXL"),
    ("IGF1", "IGF1R"),
    ("JAG1", "NOTCH1"),
    ("NRG1", "ERBB4"),
    ("NRXN1", "NLGN1"),
    ("NRXN3", "NLGN2"),
    ("NTF3", "NTRK3"),
    ("PDGFA", "PDGFRA"),
    ("PENK", "OPRM1"),
    ("PSAP", "GPR37"),
    ("PTN", "PTPRZ1"),
    ("RELN", "LRP8"),
    ("SEMA3A", "NRP1"),
    ("SLIT2", "ROBO1"),
    ("SPP1", "CD44"),
    ("SST", "SSTR2"),
    ("TAC1", "TACR1"),
    ("VEGFA", "FLT1"),
    ("VIP", "VIPR1"),
    ("APP", "CD74"),
    ("MIF", "CD74"),
    ("COL1A1", "CD44"),
    ("FN1", "ITGB1"),
    ("TGFB1", "TGFBR2"),
    ("WNT5A", "FZD3"),
]


def read_pairs(path):
    """[(ligand, receptor)] from a two-column CSV, a header line `ligand,receptor` allowed. Raises
    DataError for another shape."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [
                [cell.strip() for cell in row]
                for row in csv.reader(file, strict=True)
                if any(cell.strip() for cell in row)
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{path} cannot be read as a ligand-receptor CSV ({error}): give two columns "
            "ligand,receptor"
        ) from error
    if any(len(row) < 2 for row in rows):
        raise DataError(
            f"{path} has a row with fewer than two columns: give ligand,receptor in each"
        )
    rows = rows[1:] if rows and rows[0][0].lower() == "ligand" else rows
    if not rows:
        raise DataError(f"{path} holds no ligand-receptor pair: give two columns ligand,receptor")
    return list(dict.fromkeys((row[0], row[1]) for row in rows))


def ligand_receptor(x, genes, pairs, labels, near, permutations=1000, seed=0):
    """Domain-to-domain ligand-receptor scores over spatial neighbours (spots hold several cells, so
    not cell-to-cell).

    s(a, b) = mean of x_iL x_jR over neighbour pairs i in a, j in b; null: the domain labels
    permuted over spots; p = (1 + #(null >= s)) / (1 + permutations), Benjamini-Hochberg over all
    pairs and domain pairs. x (N, G) CSR log expression, near (N, k), labels (N,). Returns (pairs
    that the panel holds, score (n, K, K), p (n, K, K), q (n, K, K)); domain pairs that never touch
    are nan.
    """
    column = {g: i for i, g in reversed(list(enumerate(genes)))}
    pairs = [pair for pair in pairs if pair[0] in column and pair[1] in column]
    names, code = np.unique(labels, return_inverse=True)
    k, i, j = len(names), np.repeat(np.arange(len(near)), near.shape[1]), near.ravel()
    if not pairs:
        return [], *(np.zeros((0, k, k)) for _ in range(3))
    x = x.tocsc()
    # (N, n) each
    ligand, receptor = (x[:, [column[pair[side]] for pair in pairs]].toarray() for side in (0, 1))
    # (E, n)
    product = (ligand[i] * receptor[j]).astype(np.float64)

    def means(code):
        cell = code[i] * k + code[j]
        gather = sp.csr_matrix(
            (np.ones(len(cell)), (cell, np.arange(len(cell)))), shape=(k * k, len(cell))
        )
        count = np.bincount(cell, minlength=k * k)[:, None]
        # (K K, n)
        return np.divide(
            gather @ product, count, out=np.full((k * k, len(pairs)), np.nan), where=count > 0
        )

    score, above, drawn = means(code), 0, 0
    rng = np.random.default_rng(seed)
    for _ in run.progress(range(permutations), "ligand-receptor"):
        null = means(rng.permutation(code))
        above, drawn = above + (null >= score - 1e-12), drawn + np.isfinite(null)
    p = np.where(np.isfinite(score), (1 + above) / (1 + drawn), np.nan)
    q = np.full_like(p, np.nan)
    q[np.isfinite(p)] = false_discovery_control(p[np.isfinite(p)])
    return pairs, *(a.T.reshape(len(pairs), k, k) for a in (score, p, q))


# --------------------------------------------------------------------------------------------------
# Both, for a record
# --------------------------------------------------------------------------------------------------


def downstream(slide, x, h, domains, ranks, pairs=PAIRS, root_gene="MBP", permutations=1000):
    """Pseudotime, its root, its Spearman correlation with the order of the classes, and the
    ligand-receptor scores: (arrays, metrics, texts).

    x (N, G) CSR log expression, embedding h (N, d), domains (N,), ranks (N,) as `class_ranks` gives
    them or None. No pseudotime under 20 spots; no scores with 0 permutations.
    """
    arrays, scores = {}, {}
    root, text = root_domain(x, slide.genes, domains, root_gene)
    print(f"pseudotime starts in: {text}")
    if slide.n_spots >= 20:
        arrays["pseudotime"] = pseudotime(h, None if root is None else domains == root)
        if ranks is not None:
            use = np.isfinite(ranks) & np.isfinite(arrays["pseudotime"])
            scores["pseudotime_spearman"] = (
                metrics.spearman(arrays["pseudotime"][use], ranks[use])
                if use.sum() > 2
                else float("nan")
            )
    if permutations:
        near = data.knn_table(slide.xy, min(6, slide.n_spots - 1))
        pairs, score, p, q = ligand_receptor(x, slide.genes, pairs, domains, near, permutations)
        arrays |= {
            "lr_score": score,
            "lr_p": p,
            "lr_q": q,
            "lr_pairs": np.array([f"{a}-{b}" for a, b in pairs], dtype=str),
        }
        scores |= {"lr_pairs": len(pairs), "lr_significant": int((q < 0.05).sum())}
    return arrays, scores, {"pseudotime_root": text}
