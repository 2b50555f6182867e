"""Inner validation of stformer's --linear_weight: python bench/choose_linear_weight.py <HEST task
folder> [sections ...]

For every outer training set (the folder's folds, and each section left out), three transformers and
one linear layer are trained on the inner folds; printed is the best smoothed validation PCC of
their average at each weight. No outer test slide is read.
"""

import copy
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import metrics
import stformer as st
from evaluation import bags, hest
from plainst import run

WEIGHTS = (0, 0.25, 0.5, 0.75, 1)


def predictions(make, fit, val, scaler, config, number):
    """[prediction of every validation slide] after each epoch."""
    found, score = [], st.validation_score
    st.validation_score = lambda model, samples, scaler, config, bag: (
        found.append([st.predict([model], s, scaler, config)[0] for s in samples]) or 0.0
    )
    try:
        st.train_one(make, fit, val, scaler, config, torch.device("cpu"), config.epochs, number)
    finally:
        st.validation_score = score
    return np.array(found, dtype=object)


def pcc(predicted, samples):
    """Mean PCC over the validation slides."""
    rows = [s.scored.numpy() for s in samples]
    return float(
        np.mean(
            [
                metrics.pcc_summary(s.y.numpy()[r], p[r])["pcc_mean"]
                for p, s, r in zip(predicted, samples, rows)
            ]
        )
    )


def curve(config):
    """{weight: best smoothed validation PCC} of one outer training set."""
    _, names, _, part, _ = hest.hest_partition(
        config.data, config.split, config.fold, config.patient, config.slice
    )
    raw, genes = st.load(config, names, [])
    scaler = st.Scaler.fit(list(raw.values()))
    samples = [scaler.features(raw[n], config.scale) for n in names]
    flat, width, curves = copy.copy(config), samples[0].x.shape[1], {w: [] for w in WEIGHTS}
    flat.lr = 1e-2
    for i, (fit, val) in enumerate(hest.inner_folds(samples, config.folds, lambda s: s.place)):
        deep = [
            predictions(
                lambda: st.build(config, width, len(genes), config.pathways),
                fit,
                val,
                scaler,
                config,
                100 * m + i,
            )
            for m in range(3)
        ]
        line = predictions(
            lambda: bags.OneLinear(width, len(genes)), fit, val, scaler, flat, 900 + i
        )
        for w in WEIGHTS:
            curves[w].append(
                [
                    pcc(
                        [
                            (1 - w) * sum(d[e][j] for d in deep) / 3 + w * line[e][j]
                            for j in range(len(val))
                        ],
                        val,
                    )
                    for e in range(config.epochs)
                ]
            )
    found = {w: float(hest.smooth(np.mean(c, 0)).max()) for w, c in curves.items()}
    print(part, {w: round(v, 3) for w, v in found.items()}, flush=True)
    return found


if __name__ == "__main__":
    root, sections = sys.argv[1], sys.argv[2:]
    flags = [
        ["--fold", str(k)] for k in range(len(list((Path(root) / "splits").glob("test_*.csv"))))
    ]
    outer = {"folds": flags, "sections": [["--split", "section", "--slice", s] for s in sections]}
    for name, group in outer.items():
        every = [curve(run.parse(st.Config, ["--data", root, *f])) for f in group]
        if every:
            print(name, {w: round(float(np.mean([e[w] for e in every])), 4) for w in WEIGHTS})
