"""bench/speed.py and bench/gpu_check.py: every part runs, its peers compute what we compute, and
what they report can be wrong."""

import json
import math
import sys
import time

import numpy as np
import pytest
import torch

pytest.importorskip("torch_geometric")
pytest.importorskip("scanpy")

import data
import gat_fusion
import multist
from bench import gpu_check, peers, timing
from bench import speed as bench
from plainst import graphs
from plainst.neighbour_sums import Neighbours


@pytest.fixture(autouse=True)
def threads():
    """scanpy changes the number of threads of this process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def options(tmp_path):
    return bench.argparse.Namespace(quick=True, repeats=1, threads=1, out=tmp_path)


@pytest.fixture
def table():
    return data.knn_table(np.random.default_rng(0).random((150, 2)), 6)


def rows_of(part, tmp_path):
    """The record of one part, made through the command line."""
    assert (
        bench.main(
            [part, "--quick", "--repeats", "1", "--threads", "1", "--out", str(tmp_path / "out")]
        )
        == 0
    )
    record = json.loads((tmp_path / "out" / f"{part}.json").read_text())
    assert (
        record["threads"] == 1
        and record["quick"]
        and record["versions"]["torch"] == torch.__version__
    )
    text = (tmp_path / "out" / "bench.md").read_text()
    assert f"## {part}" in text
    for row in record["rows"]:
        assert row["case"] in text
        if "ratio" in row:
            assert (
                math.isfinite(row["ratio"])
                and row["ratio"] > 0
                and row["ours_s"] > 0
                and row["peer_s"] > 0
            )
    return record["rows"]


def test_attention_part(tmp_path):
    rows = rows_of("attention", tmp_path)
    assert len(rows) == 2 * 6 and all(row["difference"] < 1e-5 for row in rows)
    assert {row["target"] for row in rows if row["case"].startswith("graph attention")} == {2}


def test_training_part(tmp_path):
    rows = rows_of("training", tmp_path)
    inputs, epoch, whole = rows[:3]
    assert whole["ours_s"] == pytest.approx(
        inputs["ours_s"] + gat_fusion.Config().epochs * epoch["ours_s"]
    )
    assert whole["ratio"] == pytest.approx(whole["peer_s"] / whole["ours_s"])
    assert "left out" in rows[-1]["note"]


def test_loaders_part(tmp_path):
    rows = rows_of("loaders", tmp_path)
    assert len(rows) == 3 and all(row["difference"] == 0 for row in rows)


def test_preprocessing_part(tmp_path):
    expression, graph, both = rows_of("preprocessing", tmp_path)
    assert expression["difference"] < 1e-3 and graph["difference"] < 0.05 and both["target"] == 2


def test_retrieval_part(tmp_path):
    rows = rows_of("retrieval", tmp_path)
    assert all(row["difference"] < 0.01 for row in rows if "difference" in row)
    recall = [row["recall"] for row in rows if "recall" in row]
    assert recall[0] < recall[1] and recall[1] > 0.9
    assert (tmp_path / "out" / "cmrcnet_recall.png").stat().st_size > 0


def test_ceilings_part(tmp_path):
    matmul, copied, *loops = rows_of("ceilings", tmp_path)
    assert matmul["gflops"] > 0 and copied["gbytes"] > 0 and len(loops) == 4
    assert all(0 < row["share"] < 2 and row["bound"] in ("matmul", "copy") for row in loops)


def test_layers_equal_torch_geometrics(table):
    x = torch.randn(150, 128, generator=torch.Generator().manual_seed(0))
    for layer, functions in peers.graph_layers(table).items():
        (ours, *others) = (peers.forward_backward(f, x) for f in functions.values())
        for theirs in others:
            for a, b in zip(ours, theirs):
                assert torch.allclose(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item()), layer
    # other weights
    a, b = (
        peers.forward_backward(peers.graph_layers(table)["GCN"]["GraphConvolution"], x)
        for _ in range(2)
    )
    assert peers.largest_difference(a, b) > 1e-2


def test_swapped_models_equal_ours(table):
    torch.manual_seed(0)
    x = torch.randn(150, 20)
    ours = gat_fusion.GatFusion(gat_fusion.Config(), 20, 0, 4).eval()
    peer, graph = peers.peer_fusion(ours, table).eval(), Neighbours(table)
    x.requires_grad_()
    a, b = (m(x, graph)[0] for m in (ours, peer))
    assert torch.allclose(a, b, atol=1e-5)
    weight = torch.randn_like(a)
    a, b = (torch.autograd.grad((v * weight).sum(), x)[0] for v in (a, b))
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * a.abs().max().item())
    x = x.detach()
    graph = peers.directed(graphs.Graph(np.random.default_rng(0).random((150, 2)), 6))
    ours = multist.AutoEncoder(20, multist.Config(branches="serial")).eval()
    peer = peers.PeerAutoEncoder(ours, multist.Config(branches="serial")).eval()
    a, b = ours.encoder(x, graph), peer.encoder(x, graph)
    assert torch.allclose(a, b, atol=1e-5) and torch.allclose(
        ours.decode(a, graph), peer.decode(b, graph), atol=1e-5
    )
    with torch.no_grad():
        # the swapped layer is the one that is used
        peer.encoder.convs[0].lin.weight.add_(0.1)
    assert not torch.allclose(a, peer.encoder(x, graph), atol=1e-3)


def test_compare_takes_turns_and_says_what_missed(options):
    order = []

    def call(name, seconds):
        order.append(name)
        time.sleep(seconds)
        return {"ours": 1.0, "slow": 1.5, "fast": 1.0}[name]

    options.repeats = 4
    slow, fast = timing.compare(
        "case",
        {
            name: lambda n=name, s=s: call(n, s)
            for name, s in (("ours", 0.02), ("slow", 0.08), ("fast", 0.005))
        },
        options,
        lambda a, b: abs(a - b),
        target=2,
    )
    assert (
        order[:3] == ["ours", "slow", "fast"]
        and order[3:9] == ["fast", "slow", "ours", "ours", "slow", "fast"]
        and len(order) == 15
    )
    assert 2 < slow["ratio"] < 6 and fast["ratio"] < 1 and slow["difference"] == 0.5
    assert "missed" in timing.cells(fast)[7] and "missed" not in timing.cells(slow)[7]


@pytest.mark.skipif(
    not sys.platform.startswith("linux"),
    reason="the kernel tells the highest resident memory on Linux only",
)
def test_memory_added():
    found, added = timing.memory_added(lambda: np.ones(2**23).sum())  # 64 MB, freed at the end
    assert found == 2**23 and 55 < added < 90


def test_too_large_is_left_out_and_said(options, monkeypatch):
    monkeypatch.setattr(bench, "LIMIT_GB", 1e-9)
    (row,) = bench.layers_at(
        np.random.default_rng(0).random((50, 2)), 6, "50 spots, k = 6", options
    )
    assert "left out" in row["note"] and "ratio" not in row


def test_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_geometric.nn", None)
    with pytest.raises(data.DataError, match="pip install -r requirements-dev.txt"):
        peers.dev("torch_geometric.nn")


def test_bad_flags(tmp_path):
    with pytest.raises(data.DataError, match="at least 1"):
        bench.main(["ceilings", "--quick", "--repeats", "-1", "--out", str(tmp_path)])
    (tmp_path / "file").touch()
    with pytest.raises(data.DataError, match="--out"):
        bench.main(["ceilings", "--quick", "--out", str(tmp_path / "file")])


def test_gpu_check_without_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count("\n") == 1 and not (tmp_path / "out").exists()


def test_gpu_check_of_the_cpu_with_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "SEEDS", (0,))
    assert (
        gpu_check.main(
            ["--out", str(tmp_path), "--device", "cpu", "--quick", "--methods", "gat_fusion"]
        )
        == 0
    )
    record = json.loads((tmp_path / "gpu_check.json").read_text())
    (result,) = record["results"]
    assert (
        record["passed"]
        and result["difference"] == 0
        and result["cpu_runs"][0]["turn_s"]["epochs"] > 0
    )
    assert [r["score"] for r in result["device_runs"]] == [r["score"] for r in result["cpu_runs"]]
    assert (
        "| gat_fusion | ari |" in (tmp_path / "gpu_check.md").read_text()
        and "passed" in capsys.readouterr().out
    )


def test_gpu_check_fails_on_a_difference_and_on_an_error(tmp_path):
    def runs(*scores):
        return [{"score": s} for s in scores]

    # .07 apart, .06 spread + .05
    assert gpu_check.judged("multist", runs(0.50, 0.54), runs(0.56, 0.62))["passed"]
    assert not gpu_check.judged("multist", runs(0.50, 0.54), runs(0.66, 0.70))["passed"]
    with open(tmp_path / "log", "w") as log:
        broken = gpu_check.one_run(
            "gat_fusion",
            tmp_path / "absent",
            "--epochs 1",
            torch.device("cpu"),
            0,
            tmp_path / "runs",
            log,
        )
    assert broken["error"].startswith("DataError") and "absent" in (tmp_path / "log").read_text()
    result = gpu_check.judged("gat_fusion", [broken], runs(0.5))
    assert not result["passed"] and "FAILED DataError" in gpu_check.table([result])
