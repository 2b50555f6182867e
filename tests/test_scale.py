"""The scale program on tiny sizes: it measures every stage, and its simulated HD slide is what it
says."""

import json

import numpy as np
import pytest

import data
from bench import scale
from plainst import simulate


def test_slope_is_the_exponent():
    sizes = np.array([10, 100, 1000])
    assert scale.slope(sizes, 0.3 * sizes**1.15) == pytest.approx(1.15) and scale.slope(
        sizes, 2.0 * sizes
    ) == pytest.approx(1)


def test_a_short_stage_is_measured_several_times_and_a_long_one_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(scale.time, "perf_counter", lambda: now[0])
    for seconds, calls in (
        ([1.0, 9.0, 2.0], 3),
        ([30.0], 1),
        ([15.0, 8.0], 2),
        ([0.3, 0.5, 0.1, 0.2], 4),
        ([0.01] * 25, 25),
    ):
        clock, left = scale.Clock(), list(seconds)

        def work(left=left):
            now[0] += left.pop(0)
            return len(left)

        assert clock.median("stage", work) == len(seconds) - calls == 0
        assert (
            clock.seconds["stage"] == pytest.approx(np.median(seconds))
            and clock.last == now[0]
            and clock.peak["stage"] > 50
        )


@pytest.mark.parametrize(
    "part, stages",
    [
        ("gat_fusion", {"load", "inputs", "graph", "epoch", "inference"}),
        ("stformer", {"graph", "step"}),
    ],
)
def test_every_stage_is_measured(tmp_path, part, stages, monkeypatch):
    """Without processes of their own: the record is made here."""
    monkeypatch.setattr(
        scale,
        "record",
        lambda part, folder, n: {
            "seconds": (c := scale.ONE[part](folder, n)).seconds,
            "peak": c.peak,
        },
    )
    figure, axes = scale.plt.subplots(1, 2)
    rows = scale.report(part, (220, 330), tmp_path, axes)
    assert set(rows["stages"]) == stages | {"sum"} and all(
        len(r["seconds"]) == 2 and min(r["seconds"]) >= 0 for r in rows["stages"].values()
    )
    assert min(rows["peak_mb"]) > 50 and json.dumps(rows)
    scale.plt.close(figure)


def test_simulated_hd_slide(tmp_path):
    """Sparse counts around the asked total, layers that differ in genes, bins of 8 um, read back
    from a Space Ranger HD folder."""
    slide = scale.hd_slide(2500, 300, umi=150.0)
    total = np.asarray(slide.counts.sum(1)).ravel()
    assert (
        slide.counts.shape == (2500, 300)
        and 140 < total.mean() < 200
        and len(set(slide.genes)) == 300
        and "APOE" in slide.genes
    )
    by_layer = np.stack(
        [np.asarray(slide.counts[slide.labels == c].mean(0)).ravel() for c in (0, 6)]
    )
    assert abs(by_layer[0] - by_layer[1]).max() > 0.3
    read = data.load_slide(
        simulate.write_visium(slide, tmp_path / "square_008um", layout="parquet")
    )
    assert (read.counts != slide.counts).nnz == 0 and np.allclose(read.xy, slide.xy)
    assert data.lattice_pitch(slide.xy) * slide.um_per_px == pytest.approx(8, rel=0.3)
