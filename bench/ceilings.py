"""What this machine can do, and how much of it the hot loops of the methods reach: the part
`ceilings` of bench/speed.py."""

import statistics

import numpy as np
import torch

import data
import gat_fusion
import multist
from bench import peers
from bench.timing import shown, timed
from plainst import graphs, neighbour_sums
from plainst.retrieval import exact_topk


def best(function, options):
    """Least seconds of some calls after a warm-up: what the machine can do, not what it does on
    average."""
    function()
    return min(timed(function, options.threads)[0] for _ in range(options.repeats))


def hot_loops(options):
    """(name, call, floating-point operations, bytes) of the hot loops. Bytes: every gathered row
    once a gather, every other array once a use."""
    n, k, generator = 300 if options.quick else 36_000, 6, torch.Generator().manual_seed(0)
    xy, d, heads = np.random.default_rng(0).random((n, 2)), 128, 4
    x = torch.randn(n, d, generator=generator)
    table, layer = (
        neighbour_sums.Neighbours(data.knn_table(xy, k)),
        gat_fusion.GraphAttention(d, d, heads, 0.0),
    )
    places = n * (k + 1)
    yield (
        f"gat_fusion graph attention, {n:,} spots, k = {k}",
        lambda: peers.forward_backward(lambda h: layer(h, table)[0], x),
        6 * n * d * d + 6 * places * d,
        4 * (3 * places * d + 10 * n * d + 10 * places * heads) + 8 * 4 * places * heads,
    )
    graph, h = graphs.Graph(xy, k), torch.randn(n, 64, generator=generator)
    edges = len(graph.columns)
    yield (
        f"multist graph convolution, {n:,} spots x 64",
        lambda: peers.forward_backward(lambda h: graphs.graph_product(h, graph), h),
        2 * 2 * edges * 64,
        2 * (edges * (64 * 4 + 8 + 4) + n * 64 * 4) + 4 * n * 64 * 4,
    )
    config = multist.Config()
    tiles = graphs.SpotBatches(xy, config.m, "cpu")
    view = tiles.view(tiles.random(config.batch)[0])
    wide, attend = config.fused_dim, multist.CrossAttention(config.fused_dim, multist.HEADS)
    n_tokens, b = len(view.visible), len(view.queries)
    tokens = torch.randn(n_tokens, wide, generator=generator)
    yield (
        f"multist cross-attention, {b} queries, {n_tokens} tokens, m = {config.m}",
        lambda: peers.forward_backward(
            lambda t: attend(t[view.queries], t, view.neighbours, view.offset)[0], tokens
        ),
        3 * 2 * (4 * (b + n_tokens) * wide**2 + 4 * b * config.m * wide),
        4 * 2 * (8 * b * config.m * wide + 12 * (b + n_tokens) * wide),
    )
    m, q = (3000, 200) if options.quick else (200_000, 1_000)
    keys, queries = (torch.randn(rows, 256, generator=generator) for rows in (m, q))
    yield (
        f"cmrcnet exact retrieval, {q:,} x {m:,} x 256",
        lambda: exact_topk(queries, keys, 50),
        2 * q * m * 256,
        4 * (m * 256 * 3 + 2 * q * m),
    )


def ceilings(options, scratch):
    """Matmul and copy ceilings of this machine, and the share of the nearer one that the hot loops
    reach."""
    n, size = (256, 2**20) if options.quick else (2048, 2**27)
    a, b = torch.rand(n, n), torch.rand(n, n)
    source, target = torch.ones(size), torch.empty(size)
    matmul_s, copy_s = (
        best(call, options) for call in (lambda: a @ b, lambda: target.copy_(source))
    )
    flops, rate = 2 * n**3 / matmul_s, 2 * 4 * size / copy_s
    rows = [
        {
            "case": f"ceiling: float32 matmul {n}",
            "ours_s": matmul_s,
            "gflops": flops / 1e9,
            "note": f"{flops / 1e9:.0f} GFLOP/s",
        },
        {
            "case": f"ceiling: copy of {4 * size / 2**20:.0f} MB",
            "ours_s": copy_s,
            "gbytes": rate / 1e9,
            "note": f"{rate / 1e9:.1f} GB/s, read + write",
        },
    ]
    shown(rows)
    for name, call, operations, moved in hot_loops(options):
        call()
        s = statistics.median(timed(call, options.threads)[0] for _ in range(options.repeats))
        bound, share = max(
            ("matmul", operations / flops / s), ("copy", moved / rate / s), key=lambda p: p[1]
        )
        rows += shown(
            [
                {
                    "case": name,
                    "ours_s": s,
                    "gflop": operations / 1e9,
                    "gbyte": moved / 1e9,
                    "bound": bound,
                    "share": share,
                    "note": (
                        f"{share:.0%} of the {bound} ceiling ({operations / 1e9:.2f} GFLOP, "
                        f"{moved / 1e9:.2f} GB)"
                    ),
                }
            ]
        )
    return rows
