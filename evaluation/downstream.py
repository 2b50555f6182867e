"""What is read off domains and embeddings: pseudotime with its baselines, marker genes, and
ligand-receptor scores (evaluation/signalling.py), with their tables."""

import csv
import io

import numpy as np
import scipy.sparse as sp
from scipy.stats import false_discovery_control, norm, rankdata
from sklearn.neighbors import NearestNeighbors

import data
import metrics
from data import DataError
from evaluation import signalling
from evaluation.clustering import components

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


def order_scores(times, ranks):
    """{pseudotime_spearman_<name>: correlation of a time (N,) with the ranks (N,) of the classes},
    nan where fewer than three spots have both. Names of the dictionary `times`: '' for the one that
    counts."""
    scores = {}
    for name, time in times.items():
        has_both = np.isfinite(ranks) & np.isfinite(time)
        value = float("nan")
        if has_both.sum() > 2:
            value = metrics.spearman(time[has_both], ranks[has_both])
        scores[f"pseudotime_spearman_{name}".removesuffix("_")] = value
    return scores


def compared_times(slide, x, embeddings, output, components, domains, root_gene):
    """Pseudotimes {name: (N,)} from one root: '' of the embedding that counts, the others by name,
    and what a method has to beat: the same function on the mean of 20 components over a spot and
    its 6 nearest, and the mean of the root gene there, without any pseudotime. And a text that
    tells the root."""
    root, text = root_domain(x, slide.genes, domains, root_gene)
    is_root = None if root is None else domains == root
    near = data.knn_table(slide.xy, min(6, slide.n_spots - 1))
    times = {"": pseudotime(embeddings[output], is_root)}
    times |= {name: pseudotime(h, is_root) for name, h in embeddings.items() if name != output}
    times["neighbour_mean"] = pseudotime(data.neighbour_mean(components[:, :20], near), is_root)
    if root is not None:
        column = np.flatnonzero(np.char.upper(slide.genes.astype(str)) == root_gene.upper())[0]
        mean = data.neighbour_mean(x[:, [column]], near)
        # high at the root, where time is 0
        times["root_gene"] = -np.asarray(mean.todense()).ravel()
    return times, text


# --------------------------------------------------------------------------------------------------
# Marker genes
# --------------------------------------------------------------------------------------------------


def rank_sums(x, code, k):
    """Wilcoxon's rank sum of every gene in every domain, ties at their mean rank, and the variance
    of a rank: (K, G), (G,).

    x (N, G) CSC, not negative; code (N,) in 0..k-1. Only the stored values are sorted: the zeros
    share one rank.
    """
    n, sizes = len(code), np.bincount(code, minlength=k)
    sums, variance = np.empty((k, x.shape[1])), np.empty(x.shape[1])
    for gene in range(x.shape[1]):
        part = slice(x.indptr[gene], x.indptr[gene + 1])
        values, rows = x.data[part], x.indices[part]
        n_zero = n - len(values)
        rank_of_zero = (n_zero + 1) / 2
        ranks = n_zero + rankdata(values)
        more = np.bincount(code[rows], ranks - rank_of_zero, minlength=k)
        sums[:, gene] = sizes * rank_of_zero + more
        square = n_zero * rank_of_zero**2 + (ranks**2).sum()
        variance[gene] = square / n - ((n + 1) / 2) ** 2
    return sums, variance


def marker_genes(x, genes, domains, n_top=50, min_spots=10):
    """Genes that a domain has more of than all other spots: Wilcoxon's rank-sum test with the
    normal approximation, two-sided, Benjamini-Hochberg over all genes and domains.

    x (N, G) CSR log expression, domains (N,). Returns rows (domain, gene, difference of mean log
    expression, z, p, q), of each domain the `n_top` largest z. Domains were found on the same
    counts, so p is a way to order genes, not the chance of a false one.
    """
    seen = np.flatnonzero(x.getnnz(axis=0) >= min_spots)
    names, code = np.unique(domains, return_inverse=True)
    x, k, n = x[:, seen].tocsc(), len(names), len(domains)
    if k < 2 or not len(seen):
        return []
    x.eliminate_zeros()
    sums, variance = rank_sums(x, code, k)
    sizes = np.bincount(code, minlength=k)[:, None]  # (K, 1)
    spread = np.sqrt(sizes * (n - sizes) / max(n - 1, 1) * variance)
    expected = sizes * (n + 1) / 2
    z = np.divide(sums - expected, spread, out=np.zeros_like(sums), where=spread > 0)  # (K, G)
    p = 2 * norm.sf(np.abs(z))
    q = false_discovery_control(p.ravel()).reshape(p.shape)
    one_hot = np.eye(k)[code]
    inside = (x.T @ one_hot).T / sizes  # (K, G)
    outside = (np.asarray(x.sum(0)) - inside * sizes) / (n - sizes)
    rows = []
    for i, name in enumerate(names):
        for j in np.argsort(-z[i], kind="stable")[:n_top]:
            more = inside[i, j] - outside[i, j]
            rows.append((name, genes[seen[j]], more, z[i, j], p[i, j], q[i, j]))
    return rows


# --------------------------------------------------------------------------------------------------
# All of it, for a record
# --------------------------------------------------------------------------------------------------


def write_table(rows, file):
    """Write rows as a CSV to an open binary file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    file.write(text.getvalue().encode())


def downstream(slide, x, times, domains, ranks, pairs=signalling.PAIRS, draws=10_000):
    """What is read off domains (N,): arrays, metrics, and files {name: function that writes}.

    x (N, G) CSR log expression; times {name: (N,)} of `compared_times`, empty for none; ranks (N,)
    as `class_ranks` gives them or None; no ligand-receptor score with 0 draws.
    """
    arrays, scores, files = {}, {}, {}
    if times:
        arrays["pseudotime"] = times[""]
        if ranks is not None:
            scores |= order_scores(times, ranks)
    markers = marker_genes(x, slide.genes, domains)
    shown = [(*row[:2], *(f"{value:.4g}" for value in row[2:])) for row in markers]
    header = ("domain", "gene", "difference", "z", "p", "q")
    files["markers.csv"] = lambda file: write_table([header, *shown], file)
    if draws:
        near = data.knn_table(slide.xy, min(6, slide.n_spots - 1))
        pairs, score, p, q = signalling.ligand_receptor(x, slide.genes, pairs, domains, near, draws)
        names = np.array([f"{a}>{b}" for a, b in pairs], dtype=str)
        arrays |= {"lr_score": score, "lr_p": p, "lr_q": q, "lr_pairs": names}
        scores |= {"lr_pairs": len(pairs), "lr_significant": int((q < 0.05).sum())}
        scores["lr_pairs_significant"] = int((q < 0.05).any((1, 2)).sum())
        table = signalling.pairs_table(arrays | {"domains": domains})
        files["ligand_receptor.csv"] = lambda file: write_table(table, file)
    return arrays, scores, files
