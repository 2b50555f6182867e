"""What bench/speed.py measures against: torch_geometric's layers with our weights, scanpy's
preprocessing, reading by hand; and the embeddings to search.

Needs requirements-dev.txt; nothing but the benches and their tests import this file.
"""

import copy
import json
import tempfile
import warnings
from pathlib import Path

import h5py
import numpy as np
import scipy.sparse as sp
import torch
from sklearn.cluster import KMeans
from sklearn.neighbors import NearestNeighbors
from torch import nn
from torch.nn import functional as F

import cmrcnet
import gat_fusion
import multist
from data import DataError
from plainst import neighbour_sums


def dev(name):
    """Import a module of requirements-dev.txt. Raises DataError where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return __import__(name, fromlist=["_"])
    except ImportError as error:
        raise DataError(
            f"this part of bench/speed.py needs {name.split('.')[0]}: "
            "pip install -r requirements-dev.txt"
        ) from error


def edge_index(table):
    """(N, k) table -> edges (2, N k) of torch_geometric: from the neighbour to the spot."""
    table = torch.as_tensor(table)
    return torch.stack(
        [table.flatten(), torch.arange(len(table)).repeat_interleave(table.shape[1])]
    )


def with_loops(edges, n):
    """Edges (2, E) and a loop at each of the n spots."""
    return torch.cat([edges, torch.arange(n).expand(2, n)], 1)


def copied_gat(ours, **flags):
    """GATConv with the weights of a gat_fusion.GraphAttention."""
    peer = dev("torch_geometric.nn").GATConv(
        ours.project.in_features, ours.u.shape[1], heads=ours.heads, dropout=ours.dropout.p, **flags
    )
    with torch.no_grad():
        for to, of in (
            (peer.lin.weight, ours.project.weight),
            (peer.att_src, ours.u[None]),
            (peer.att_dst, ours.v[None]),
            (peer.bias, ours.bias),
        ):
            to.copy_(of)
    return peer


def copied_gcn(weight, bias=None, **flags):
    """GCNConv with a given weight (out, in) and bias or none."""
    peer = dev("torch_geometric.nn").GCNConv(
        weight.shape[1], weight.shape[0], bias=bias is not None, **flags
    )
    with torch.no_grad():
        peer.lin.weight.copy_(weight)
        if bias is not None:
            peer.bias.copy_(bias)
    return peer


def graph_layers(table):
    """{layer: {name: function of x (N, 128)}}, ours first, all with the same weights. The peers'
    work that one graph needs only once is done here."""
    n, k = table.shape
    graph, edges = neighbour_sums.Neighbours(table), edge_index(table)
    loops = with_loops(edges, n)
    gat, gcn = gat_fusion.GraphAttention(128, 128, 4, 0.0), gat_fusion.GraphConvolution(128, 128)
    default, ready = copied_gat(gat), copied_gat(gat, add_self_loops=False)
    plain, cached, csr = (
        copied_gcn(gcn.project.weight, gcn.bias, cached=c) for c in (False, True, True)
    )
    adjacency = quietly(
        lambda: (
            torch.sparse_coo_tensor(edges.flip(0), torch.ones(n * k), (n, n))
            .coalesce()
            .to_sparse_csr()
        )
    )
    weights = torch.rand(n, 1, k + 1, generator=torch.Generator().manual_seed(0))
    # places of the table -> order of `loops`
    ordered = torch.cat([weights[:, 0, 1:].flatten(), weights[:, 0, 0]])
    their_sum = dev("torch_geometric.nn").SimpleConv(aggr="sum")
    return {
        "graph attention": {
            "GraphAttention": lambda x: gat(x, graph)[0],
            "GATConv": lambda x: default(x, edges),
            "GATConv, loops added beforehand": lambda x: ready(x, loops),
        },
        "GCN": {
            "GraphConvolution": lambda x: gcn(x, graph)[0],
            "GCNConv": lambda x: plain(x, edges),
            "GCNConv, cached": lambda x: cached(x, edges),
            "GCNConv, cached, CSR": lambda x: csr(x, adjacency),
        },
        "weighted kNN gather": {
            "neighbour_sum": lambda x: neighbour_sums.neighbour_sum(
                weights.detach().requires_grad_(), x[:, None], graph.with_self
            )[:, 0],
            "SimpleConv, edge weights": lambda x: their_sum(
                x, loops, ordered.detach().requires_grad_()
            ),
        },
    }


def forward_backward(layer, x):
    """(output, gradient of x) of one pass with loss sum of squares."""
    x = x.clone().requires_grad_()
    out = layer(x)
    out.square().sum().backward()
    return out.detach(), x.grad


def largest_difference(a, b):
    """Largest absolute difference of outputs and gradients, relative to the largest value of
    each."""
    return max(((u - v).abs().max() / v.abs().max()).item() for u, v in zip(a, b))


class PeerGraphAttention(nn.Module):
    """gat_fusion.GraphAttention made of torch_geometric's GATConv, same weights."""

    def __init__(self, ours, edges, n):
        super().__init__()
        self.conv, self.edges = copied_gat(ours, add_self_loops=False), with_loops(edges, n)

    def forward(self, h, graph):
        return self.conv(h, self.edges), None


class PeerCrossAttention(nn.Module):
    """gat_fusion.CrossAttentionLayer with torch_geometric's TransformerConv in place of its
    attention, same weights."""

    def __init__(self, ours, edges):
        super().__init__()
        dim = ours.query.in_features
        self.rest, self.edges = ours, edges
        self.conv = dev("torch_geometric.nn").TransformerConv(
            dim, dim // ours.heads, ours.heads, root_weight=False, dropout=ours.dropout.p
        )
        for to, of in (
            (self.conv.lin_query, ours.query),
            (self.conv.lin_key, ours.key),
            (self.conv.lin_value, ours.value),
        ):
            to.load_state_dict(of.state_dict())

    def forward(self, z, s, graph):
        rest = self.rest
        z = rest.norm1(z + rest.dropout(rest.out(self.conv((s, z), self.edges))))
        return rest.norm2(z + rest.dropout(rest.ffn(z))), None


def peer_fusion(ours, table):
    """A GatFusion (full, cross) whose graph layers are torch_geometric's, with the weights of
    `ours`."""
    peer, edges = copy.deepcopy(ours), edge_index(table)
    peer.graph.convolutions = nn.ModuleList(
        PeerGraphAttention(layer, edges, len(table)) for layer in peer.graph.convolutions
    )
    peer.cross = nn.ModuleList(PeerCrossAttention(layer, edges) for layer in peer.cross)
    return peer


class PeerEncoder(multist.Encoder):
    """multist.Encoder (serial) with torch_geometric's GCNConv, normalisation cached, for its two
    convolutions."""

    def forward(self, x, graph):
        f = self.mlp(x)  # (N, 16)
        h = self.convs[0](self.dropout(f), graph.directed)  # (N, 64)
        return torch.cat([f, self.convs[1](self.dropout(F.relu(h)), graph.directed)], 1)


def directed(graph):
    """A plainst.graphs.Graph with its edges in both directions, (2, 2 E), for torch_geometric."""
    graph.directed = torch.cat([graph.edges, graph.edges.flip(0)], 1)
    return graph


class PeerAutoEncoder(multist.AutoEncoder):
    """multist.AutoEncoder with torch_geometric's GCNConv for its three graph convolutions, same
    weights."""

    def __init__(self, ours, config):
        super().__init__(len(ours.m), config)
        self.encoder = PeerEncoder(len(ours.m), config.branches)
        self.load_state_dict(ours.state_dict())
        self.encoder.convs = nn.ModuleList(
            copied_gcn(w.weight, cached=True) for w in (self.encoder.w1, self.encoder.w2)
        )
        self.conv = copied_gcn(self.decoder.weight, cached=True)

    def decode(self, z, graph):
        return self.conv(self.dropout(z), graph.directed)


def visium_by_hand(folder):
    """Counts (N, G), positions (N, 2), image of a Space Ranger folder. scanpy.read_visium is
    deprecated and wants both images: this is less work."""
    spatial, matrix = (
        folder / "spatial",
        quietly(lambda: dev("scanpy").read_10x_h5(folder / "filtered_feature_bc_matrix.h5")),
    )
    places = dev("pandas").read_csv(spatial / "tissue_positions_list.csv", header=None, index_col=0)
    json.loads((spatial / "scalefactors_json.json").read_text())
    picture = next(
        spatial / name
        for name in ("tissue_hires_image.png", "tissue_lowres_image.png")
        if (spatial / name).exists()
    )
    return (
        matrix.X,
        places.loc[matrix.obs_names, [5, 4]].to_numpy(float),
        dev("matplotlib.pyplot").imread(picture),
    )


def quietly(function):
    """Result of a call without its warnings: scanpy's of gene symbols that stand twice and of
    densifying, torch's of CSR tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function()


def scanpy_expression(slide, n_top, n_pcs):
    """(N, n_pcs) principal components: the usual scanpy lines, with the settings of
    data.Expression."""
    scanpy = dev("scanpy")
    a = dev("anndata").AnnData(slide.counts.astype(np.float32))
    scanpy.pp.filter_genes(a, min_cells=3)
    scanpy.pp.normalize_total(a, target_sum=1e4)
    scanpy.pp.log1p(a)
    scanpy.pp.highly_variable_genes(a, n_top_genes=min(n_top, a.n_vars), flavor="seurat")
    a = a[:, a.var["highly_variable"]].copy()
    quietly(lambda: scanpy.pp.scale(a, max_value=10))
    scanpy.pp.pca(a, n_comps=n_pcs)
    return a.obsm["X_pca"]


def sklearn_graph(xy, k):
    """D^-1/2 (A + I) D^-1/2 (N, N) CSR as squidpy.gr.spatial_neighbors (coord_type generic) makes
    the neighbours, symmetrised by union."""
    distance = NearestNeighbors(n_neighbors=k).fit(xy).kneighbors_graph(mode="distance")
    a = sp.csr_matrix(
        (np.ones_like(distance.data), distance.indices, distance.indptr), distance.shape
    )
    a = a.maximum(a.T) + sp.identity(len(xy), format="csr")
    d = sp.diags(1 / np.sqrt(np.asarray(a.sum(1)).ravel()))
    return (d @ a @ d).tocsr()


def trained_embeddings(folder):
    """Gene keys (1008, 256) of the training spots and image queries (325, 256) of A2, of a model of
    the default flags but 256 wide."""
    with tempfile.TemporaryDirectory() as runs:
        cmrcnet.main(
            [
                "--data",
                str(folder),
                "--fold",
                "0",
                "--preset",
                "tuned",
                "--dim",
                "256",
                "--reconstruction",
                "none",
                "--val",
                "none",
                "--epochs",
                "15",
                "--runs",
                runs,
                "--cache",
                runs,
            ]
        )
        path = next(Path(runs).rglob("run.json")).parent
        with h5py.File(path / "atlas.h5", "r") as f:
            return f["keys"][:], np.load(path / "arrays.npz")["embedding"]


def replicate(real, n, kind, seed):
    """(n, d) float32 copies of the rows of `real` in turn, and the variance of the change over the
    variance of `real`.

    noise: a real embedding plus Gaussian noise with the covariance of the real ones around the
    centre of their k-means cluster; interpolated: a random place between a real embedding and one
    of its ten nearest, so it stays where the real ones are.
    """
    rng, n_clusters = np.random.default_rng(seed), min(32, len(real) // 8)
    unit = real / np.linalg.norm(real, axis=1, keepdims=True)
    near = np.argsort(-(unit @ unit.T), axis=1)[:, 1:11]  # (N, 10)
    owner = KMeans(n_clusters, n_init=2, random_state=seed).fit(real)
    # (N, d) spread within clusters
    rest = real - owner.cluster_centers_[owner.labels_]
    out, change = np.empty((n, real.shape[1]), np.float32), 0.0
    for start in range(0, n, 20000):
        row = np.arange(start, min(start + 20000, n)) % len(real)
        delta = rng.random((len(row), 1)) * (
            real[near[row, rng.integers(0, 10, len(row))]] - real[row]
        )
        # sum of g_j r_j / sqrt(n) has the cluster's covariance
        for c in range(n_clusters) if kind == "noise" else ():
            here, members = (
                np.flatnonzero(owner.labels_[row] == c),
                np.flatnonzero(owner.labels_ == c),
            )
            delta[here] = (
                rng.normal(size=(len(here), len(members))) @ rest[members] / len(members) ** 0.5
            )
        out[start : start + len(row)] = real[row] + delta
        change += (delta**2).sum() / n
    return torch.from_numpy(out), float(change / ((real - real.mean(0)) ** 2).sum(1).mean())
