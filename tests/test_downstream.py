"""Pseudotime, marker genes and ligand-receptor scores against naive forms, planted answers and
nulls."""

import io

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.stats import false_discovery_control, mannwhitneyu

import data
import metrics
from data import DataError
from evaluation import downstream, signalling


def hexagons(rows=12, columns=14):
    """(rows * columns, 2) positions of a hexagonal lattice, pitch 100."""
    r, c = np.divmod(np.arange(rows * columns), columns)
    return np.stack([100.0 * c + 50 * (r % 2), 86.6 * r], 1)


def section(n_genes=60, seed=0):
    """Positions (576, 2), four bands of domains, and expression (576, G) whose genes have smooth
    patterns of their own in space, unrelated to each other."""
    rng, xy = np.random.default_rng(seed), hexagons(24, 24)
    labels = (4 * xy[:, 1] / (xy[:, 1].max() + 1)).astype(int)
    place = (xy / 800) @ rng.normal(size=(2, n_genes)) + rng.uniform(0, 6, n_genes)
    level = rng.uniform(0.5, 2.5, n_genes)
    x = np.maximum(level * (1.2 + np.sin(place)) + 0.3 * rng.normal(size=place.shape), 0)
    return xy, labels, x.astype(np.float32)


def test_pseudotime_follows_a_curve_also_on_a_subset():
    t = np.sort(np.random.default_rng(0).uniform(0, 1, 600))
    h = np.stack([np.cos(3 * t), np.sin(3 * t), t], 1) + 0.01 * np.random.default_rng(
        1
    ).standard_normal((600, 3))
    for most in (5000, 300):
        found = downstream.pseudotime(h, t < 0.05, most=most)
        assert metrics.spearman(found, t) > 0.99 and found.min() >= 0 and found.max() <= 1
    assert metrics.spearman(downstream.pseudotime(h, t > 0.95), t) < -0.99  # from the other end


def test_pseudotime_of_spots_out_of_reach_is_nan():
    rng = np.random.default_rng(0)
    h = np.concatenate([rng.standard_normal((100, 3)), 1e3 + rng.standard_normal((60, 3))])
    found = downstream.pseudotime(h, np.arange(160) < 10)
    assert np.isfinite(found[:100]).all() and np.isnan(found[100:]).all()
    # also where it is carried over from a subset
    found = downstream.pseudotime(h, np.arange(160) < 10, most=80)
    assert np.isfinite(found[:100]).all() and np.isnan(found[100:]).all()


def test_time_is_compared_with_what_needs_no_network():
    rng = np.random.default_rng(0)
    xy = 1000 * rng.random((600, 2))
    depth = xy[:, 1] / 1000
    x = np.column_stack([rng.poisson(9 * (1 - depth)), rng.poisson(3, 600)]).astype(np.float32)
    slide = data.Slide(None, np.array(["Mbp", "b"]), np.arange(600).astype(str), xy, sample="s")
    h = np.column_stack([np.cos(3 * depth), np.sin(3 * depth), depth])
    h += 0.01 * rng.standard_normal(h.shape)
    components = 5 * h + 0.05 * rng.standard_normal(h.shape)
    times, text = downstream.compared_times(
        slide,
        sp.csr_matrix(x),
        {"gene": h, "fused": h[:, :2]},
        "gene",
        components,
        (8 * depth).astype(int),
        "MBP",
    )
    assert set(times) == {"", "fused", "neighbour_mean", "root_gene"} and "most MBP" in text
    scores = downstream.order_scores(times, depth)
    assert set(scores) == {
        "pseudotime_spearman",
        *(f"pseudotime_spearman_{name}" for name in ("fused", "neighbour_mean", "root_gene")),
    }
    assert min(scores.values()) > 0.85 and scores["pseudotime_spearman"] > 0.98
    none = downstream.order_scores({"": np.full(600, np.nan)}, depth)
    assert np.isnan(none["pseudotime_spearman"])


def test_markers_equal_the_test_of_scipy_and_name_the_planted_gene():
    rng = np.random.default_rng(0)
    domains = np.repeat([3, 5, 9], [30, 50, 40])
    x = rng.poisson(1.0, (120, 25)).astype(np.float32)
    x[domains == 5, 7] += 3
    rows = downstream.marker_genes(
        sp.csr_matrix(x), np.array([f"g{i}" for i in range(25)]), domains
    )
    assert len(rows) == 75 and next(r for r in rows if r[0] == 5)[1] == "g7"
    p = {}
    for domain in (3, 5, 9):
        for gene in range(25):
            pair = x[domains == domain, gene], x[domains != domain, gene]
            test = mannwhitneyu(*pair, use_continuity=False, method="asymptotic")
            p[domain, f"g{gene}"] = test.pvalue
    q = dict(zip(p, false_discovery_control(list(p.values()))))
    for domain, gene, more, z, p_found, q_found in rows:
        assert p_found == pytest.approx(p[domain, gene], rel=1e-6)
        assert q_found == pytest.approx(q[domain, gene], rel=1e-6)
        column = x[:, int(gene[1:])]
        gap = column[domains == domain].mean() - column[domains != domain].mean()
        assert more == pytest.approx(gap, abs=1e-5) and (z > 0 or gap < 0.2)
    assert downstream.marker_genes(sp.csr_matrix(x), np.arange(25), np.zeros(120)) == []


def test_scores_are_means_over_neighbours():
    xy, labels, x = section(6)
    near = data.knn_table(xy, 6)
    means = signalling.domain_means(x[:, :2], x[:, 2:5], data.table_to_csr(near), labels, 4)
    for a, b in ((0, 0), (1, 2), (2, 1)):
        pairs = [(i, j) for i in range(576) for j in near[i] if (labels[i], labels[j]) == (a, b)]
        naive = np.mean([x[i, 1] * x[j, 4] for i, j in pairs])
        assert means[a, b, 1, 2] == pytest.approx(naive, rel=1e-5)
    assert np.isnan(means[0, 3]).all()


def test_ligand_receptor_finds_the_planted_pair():
    """Ligand in domain 0 and receptor in domain 1 on both sides of one border; a complex has what
    its scarcest part has."""
    xy, _, x = section(80)
    rng = np.random.default_rng(1)
    labels = (xy[:, 0] > xy[:, 0].mean()).astype(int)
    edge = np.abs(xy[:, 0] - xy[:, 0].mean()) < 200
    x[:, :3] = 0.3 * rng.random((576, 3))
    x[edge & (labels == 0), 0] += 9
    x[edge & (labels == 1), 1] += 9
    x[edge & (labels == 1), 2] += 9
    genes = np.array(["L", "R", "S", *(f"g{i}" for i in range(77))])
    pairs = [("L", "R"), ("L", "R+S"), ("L", "R+g5"), ("g1", "g2"), ("L", "absent")]
    near = data.knn_table(xy, 6)
    known, score, p, q = signalling.ligand_receptor(
        sp.csr_matrix(x), genes, pairs, labels, near, 3600
    )
    assert known == pairs[:4] and score.shape == (4, 2, 2)
    assert q[0, 0, 1] < 0.05 and q[1, 0, 1] < 0.05 and q[0, 1, 0] > 0.2 and q[3].min() > 0.05
    assert score[1, 0, 1] < score[0, 0, 1] and score[2, 0, 1] < 0.9 * score[0, 0, 1]
    assert (q >= p - 1e-12).all()
    nothing = signalling.ligand_receptor(sp.csr_matrix(x), genes, [("a", "b")], labels, near, 9)
    assert nothing[0] == [] and nothing[1].shape == (0, 2, 2)


def test_random_pairs_are_seldom_significant():
    """Genes with patterns of their own that have nothing to do with each other: at most 5 % of the
    pairs have any q below .05; permuted labels would call most of them significant."""
    xy, labels, x = section(120)
    rng, genes = np.random.default_rng(2), np.array([f"g{i}" for i in range(120)])
    pairs = [tuple(rng.choice(genes, 2, replace=False)) for _ in range(60)]
    near = data.knn_table(xy, 6)
    _, score, p, q = signalling.ligand_receptor(sp.csr_matrix(x), genes, pairs, labels, near, 2500)
    assert (q < 0.05).any((1, 2)).mean() <= 0.05
    # p is not conservative either
    assert 0.02 < (p[np.isfinite(p)] < 0.1).mean() < 0.2
    neighbours = data.table_to_csr(near)
    shuffled = [rng.permutation(labels) for _ in range(30)]
    is_above = 0
    for (ligand, receptor), mine in zip(pairs, score):
        sides = x[:, [int(ligand[1:])]], x[:, [int(receptor[1:])]]
        null = [signalling.domain_means(*sides, neighbours, s, 4)[:, :, 0, 0] for s in shuffled]
        is_above += np.nanmax(mine) > np.nanmax(null)
    assert is_above > 0.5 * len(pairs)


def test_pairs_file(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("ligand,receptor\nA, B\nC,D\nA,B\n")
    assert signalling.read_pairs(path) == [("A", "B"), ("C", "D")]
    path.write_text("A,B\nC,D\n")
    assert signalling.read_pairs(path) == [("A", "B"), ("C", "D")]
    path.write_text("Ligand gene symbol\tReceptor gene symbol\nA\tB\n")
    assert signalling.read_pairs(path) == [("A", "B")]
    path.write_text("id,source,Receptor,ligand\n1,x,B,A\n")
    assert signalling.read_pairs(path) == [("A", "B")]
    for text, why in (
        ("A\n", "fewer than two columns"),
        ("id,from,to\n1,A,B\n", "none of the known names"),
        ("ligand,receptor\n", "no ligand-receptor pair"),
        ("", "no ligand-receptor pair"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=why):
            signalling.read_pairs(path)
    with pytest.raises(DataError, match="cannot be read"):
        signalling.read_pairs(tmp_path / "none.csv")


def test_cellphonedb_partners_become_genes(tmp_path):
    path = tmp_path / "v5_interaction_input.csv"
    path.write_text("id,partner_a,partner_b\n1,P1,both\n2,P9,P1\n3,P2,odd\n")
    with pytest.raises(DataError, match="gene_input.csv is not beside it"):
        signalling.read_pairs(path)
    (tmp_path / "v5_gene_input.csv").write_text("gene_name,uniprot\nA,P1\nB,P2\nC,P3\n")
    complexes = tmp_path / "v5_complex_input.csv"
    complexes.write_text("complex_name,uniprot_1,uniprot_2\nboth,P2,P3\nodd,P2,P8\n")
    assert signalling.read_pairs(path) == [("A", "B+C")]
    complexes.write_text("name,uniprot_1\nboth,P2\n")
    with pytest.raises(DataError, match="no column complex_name"):
        signalling.read_pairs(path)


def test_whole_public_tables(real_data):
    folder = real_data / "ligand_receptor"
    assert len(signalling.read_pairs(folder / "connectomedb2020_lit.txt")) == 2293
    pairs = signalling.read_pairs(folder / "cellphonedb_v5_interaction_input.csv")
    assert len(pairs) > 2500 and ("CDH1", "ITGB1+ITGA2") in pairs


def test_tables_of_a_run():
    xy, labels, x = section(30)
    genes = np.array([f"g{i}" for i in range(30)])
    slide = data.Slide(None, genes, np.arange(576).astype(str), xy, sample="s")
    pairs = [("g1", "g2"), ("g3", "g4+g5")]
    arrays, scores, files = downstream.downstream(
        slide, sp.csr_matrix(x), {}, labels, None, pairs, 100
    )
    assert set(files) == {"markers.csv", "ligand_receptor.csv"} and scores["lr_pairs"] == 2
    texts = {}
    for name, write in files.items():
        file = io.BytesIO()
        write(file)
        texts[name] = file.getvalue().decode().splitlines()
    assert texts["markers.csv"][0] == "domain,gene,difference,z,p,q"
    assert len(texts["markers.csv"]) == 1 + 4 * 30
    n_touching = np.isfinite(arrays["lr_p"]).sum()
    assert len(texts["ligand_receptor.csv"]) == 1 + n_touching == 1 + 2 * 10
    p = [float(row.split(",")[5]) for row in texts["ligand_receptor.csv"][1:]]
    assert p == sorted(p) and texts["ligand_receptor.csv"][1].split(",")[0] in ("g1", "g3")
