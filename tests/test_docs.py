"""README and docs: every command parses and runs on simulated files, every function and file that a
page names is there."""

import dataclasses
import importlib
import itertools
import json
import re
import shlex
from collections import Counter

import pytest
import torch
from matplotlib.figure import Figure

import data
import spatia
import stformer
from bench import figure_honest
from conftest import ROOT, without_idle_flags
from experiments.__main__ import LISTS
from plainst import run, simulate

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
METHODS = {"gat_fusion", "multist", "stformer", "cmrcnet", "spatia"}
SHORT = {
    "multist": "--epochs 4 --dec_epochs 2 --fusion_epochs 1 --n_starts 1 --permutations 5 "
    "--n_pcs 20",
    "gat_fusion": "--epochs 3",
    "stformer": "--epochs 2 --folds 0 --members 1",
    "cmrcnet": "--epochs 2 --val none --k 5",
    "spatia": "--draws 2 --ode_steps 2 --steps_a 3 --steps_b 3 --steps_c 3",
    "cortex": "--n_spots 260 --n_genes 120",
    "hest": "--n_spots 40 --patch_size 16 --n_genes 60",
    "cells": "--n_cells 200 --n_genes 48",
    "xenium": "--n_cells 60 --n_genes 48",
}


def commands(page):
    """Commands of a page, fenced or inline, without prompts and comments."""
    text = page.read_text(encoding="utf-8")
    fenced = [
        line
        for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
        for line in block.splitlines()
    ]
    inline = [
        " ".join(c.split())
        for c in re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    ]
    return [
        c.split(" #")[0].strip() for c in fenced + inline if re.match(r"(python|make|torchrun) ", c)
    ]


def words(command):
    """The command's words; `...` stands for flags that the text leaves out."""
    return [w for w in shlex.split(command) if w != "..."]


def program(given):
    """(module, words behind its name) of a command, given as words: of `python -m package` it is
    package.__main__, of `python room/file.py` room.file."""
    if "-m" in given:
        name, words_behind = given[given.index("-m") + 1], given[given.index("-m") + 2 :]
        return name if (ROOT / f"{name.replace('.', '/')}.py").is_file() else f"{name}.__main__", (
            words_behind
        )
    script = next(w for w in given if w.endswith(".py"))
    return script.removesuffix(".py").replace("/", "."), given[given.index(script) + 1 :]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_command_parses(page, capsys):
    for command in commands(page):
        given = words(command)
        if given[0] == "make":
            targets = [w for w in given[1:] if "=" not in w and not w.startswith("-")]
            makefile = (ROOT / "Makefile").read_text()
            for target in targets:
                by_list = re.sub(r"^reproduce-(.+)$", "reproduce-%", target)
                names = "|".join(map(re.escape, {target, by_list}))
                assert re.search(rf"^({names}):", makefile, re.M), f"{page.name}: {command}"
                if by_list != target:
                    assert target.removeprefix("reproduce-") in LISTS, f"{page.name}: {command}"
            for name in (w.split("=")[0] for w in given[1:] if "=" in w):
                assert f"$({name})" in makefile or re.search(rf"\b{name}\b", makefile), (
                    f"{page.name}: {command}"
                )
            continue
        module, given = program(given)
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), f"{page.name}: {command}"
        try:
            if module in METHODS:
                method = importlib.import_module(module)
                method.check(run.parse(method.Config, given))
            elif module == "plainst.__main__":
                known = importlib.import_module(module)
                assert given[0] in known.COMMANDS, f"{page.name}: {command}"
                known.main([*given[:2], "--help"])
        except SystemExit as stop:
            assert stop.code == 0, f"{page.name}: {command}"
        if module == "plainst.__main__":
            flags = {w.split("=")[0] for w in given if w.startswith("--")}
            listed = set(re.findall(r"--\w+", capsys.readouterr().out))
            assert flags <= listed, f"{page.name}: {command}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"


def is_named_in(path, name):
    """Whether `name`, dotted or not, is in the module of this file, or set on its objects."""
    thing = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    for part in name.split("."):
        thing = getattr(thing, part, None)
    last = re.escape(name.split(".")[-1])
    source = (ROOT / path).read_text(encoding="utf-8")
    return thing is not None or re.search(rf"\b(def|self\.|class )\s*{last}\b", source)


# the equations of the others stand in the docstrings of their files: tests/test_annotate.py
WITH_TABLE = [m for m in sorted(METHODS) if r"\tag{" not in (ROOT / f"{m}.py").read_text("utf-8")]


@pytest.mark.parametrize("method", WITH_TABLE)
def test_equations_name_functions_that_exist(method):
    """The third column of a method's first table names what stands in its file, or in the file
    that follows in brackets: functions, classes, names in the record."""
    lines = (ROOT / "docs" / f"{method}.md").read_text(encoding="utf-8").splitlines()
    head = next(i for i, line in enumerate(lines) if "| in the file |" in line)
    table = itertools.takewhile(lambda line: line.startswith("|"), lines[head + 2 :])
    n_names = 0
    for cell in (row.split("|")[3] for row in table):
        rooms = re.findall(r"\(([\w/]+\.py)\)", cell)
        for name in re.findall(r"`([A-Za-z_][\w.]*)`", cell):
            n_names += 1
            assert any(is_named_in(path, name) for path in (f"{method}.py", *rooms)), (
                f"docs/{method}.md names {name}"
            )
    assert n_names > 8


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """The folder in which a reader of the pages works: every file that their commands name,
    simulated and small."""
    root = tmp_path_factory.mktemp("reader")
    for seed, name in enumerate(
        ("my_visium", "my_folder", "datasets/dlpfc/151673", "datasets/dlpfc/151674")
    ):
        simulate.write_visium(
            simulate.simulate_cortex(260, 120, seed=seed, sample=name[-6:], donor="Br1"),
            root / name,
        )
    for file, folder in (("my_labels.csv", "my_folder"), ("shuffled.csv", "datasets/dlpfc/151673")):
        slide = data.load_visium(root / folder)
        lines = [f"{b},{slide.classes[k]}" for b, k in zip(slide.barcodes, slide.labels) if k >= 0]
        (root / file).write_text("\n".join(["barcode,label", *lines]) + "\n")
    simulate.simulate_hest(root / "my_task", n_slides=4, n_spots=40, patch_size=16, n_genes=60)
    slides = [
        dataclasses.replace(
            data.load_hest(root / "my_task", f"S{i + 1}"), sample=name, patient=name[0]
        )
        for i, name in enumerate(("C2", "C3", "B2", "D1"))
    ]
    simulate.write_hest(slides, root / "datasets" / "her2st", 16)
    (root / "datasets" / "hallmark").mkdir()
    names = slides[0].genes
    (root / "datasets/hallmark/h.all.symbols.gmt").write_text(
        "".join(f"SET{k}\thttp://none\t" + "\t".join(names[k::6]) + "\n" for k in range(6))
    )
    for cells in (root / "cells.h5", root / "datasets" / "ca1" / "cells.h5"):
        simulate.simulate_cells(cells, n_cells=300, n_genes=48, n_sections=3, size=16)
    return root


def runnable():
    """Commands of all pages that a reader can type as they stand, those that read another's run
    last. The others are named here with the reason."""
    left = {
        # the network: tests/test_download.py runs it against a loopback server
        "python -m plainst download",
        # a label image and a Xenium bundle: tests/test_cells.py
        "python -m plainst convert",
        # minutes to hours: each has a test that runs a part
        "python bench/",
    }
    found = [
        c
        for page in PAGES
        for c in commands(page)
        if c.startswith("python ")
        and not c.startswith(tuple(left))
        and not re.search(r"<|\.\.\.", c)
    ]
    return sorted(
        dict.fromkeys(found),
        key=lambda c: (not c.startswith("python -m plainst simulate"), "--predict" in c),
    )


def test_every_command_of_the_pages_runs(reader, monkeypatch, capsys):
    """From files to records with the commands of README and docs, on simulated files and with short
    settings appended; figures are drawn for all, and painted for the first command of a method."""
    monkeypatch.chdir(reader)
    paint, painted = Figure.savefig, Counter()

    def painted_once(figure, file, **flags):
        painted[name] += name not in ran
        return paint(figure, file, **flags) if name not in ran else None

    monkeypatch.setattr(Figure, "savefig", painted_once)
    monkeypatch.setitem(
        spatia.SIZES,
        "tiny",
        dataclasses.replace(
            spatia.SIZES["tiny"],
            dim=16,
            niche=5,
            tissue=4,
            decoder_dim=16,
            decoder_layers=1,
            decoder_patch=4,
            steps=(3, 3, 3),
            batch=(16, 16, 8),
        ),
    )
    ran = []
    for command in runnable():
        name, given = program(words(command))
        is_method = name in METHODS
        is_simulator = name == "plainst.__main__"
        short = (
            SHORT[given[1] if is_simulator else name].split() if is_method or is_simulator else []
        )
        # of the small slide a buffer of the default's width leaves nothing
        if is_method and "blocks" in given:
            short += ["--buffer", "1"]
        if {"--predict", "--help"} & set(given):
            short = []
        module, given_short = importlib.import_module(name), [*given, *short]
        if is_method and short:
            given_short = without_idle_flags(module, given_short)
        try:
            status = module.main(given_short)
        except SystemExit as stop:
            status = stop.code
        assert not status, command
        out = capsys.readouterr().out
        ran.append(name)
        if "--help" in given or not is_method:
            continue
        made = reader / out.split()[-1]
        assert json.loads(made.read_text())["method"] == name, command
        # the short settings are part of the folder's name
        if command.endswith("--split random --mode full --seed 0"):
            wanted = reader / "runs/gat_fusion/dlpfc/151673/paper-random-full-cross/seed0"
            wanted.parent.mkdir(parents=True, exist_ok=True)
            made.parent.rename(wanted)
    assert METHODS <= set(ran) and len(ran) > 25 and METHODS <= {m for m in painted if painted[m]}


def streaming_pcc(chunks):
    """Pearson r (G,) from six sums over chunks of (pred, true), each (S, G): exercise 6 of
    docs/stformer.md."""
    n, sums = 0, 0
    for x, y in chunks:
        # (5, G)
        n, sums = (
            n + len(x),
            sums
            + torch.stack([x.sum(0), y.sum(0), (x * x).sum(0), (y * y).sum(0), (x * y).sum(0)]),
        )
    x, y, xx, yy, xy = sums
    return (xy - x * y / n) / ((xx - x * x / n) * (yy - y * y / n)).sqrt()


def test_streaming_sums_agree_with_masked_pcc():
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(1000, 20, generator=generator, dtype=torch.float64)
    pred = 0.3 * true + torch.randn(1000, 20, generator=generator, dtype=torch.float64)

    def difference(x, y):
        return (streaming_pcc(zip(x.split(77), y.split(77))) - whole).abs().max()

    whole = stformer.masked_pcc(pred[None], true[None], torch.ones(1, 1000, 20, dtype=torch.bool))[
        0
    ][0]
    assert difference(pred, true) < 1e-9 and difference(pred.float(), true.float()) < 1e-5
    # sums of squares of numbers far from 0 cancel:
    assert difference(pred + 1000, true + 1000) < 1e-6
    # in single precision nothing is left of r
    assert difference((pred + 1000).float(), (true + 1000).float()) > 0.01


def test_chart_of_the_honest_page(tmp_path, capsys):
    """Medians of the slices asked for; a block split that leaks does not count, and what has no run
    is named as missing."""

    def record(folder, part, variant, split, leaks, ari, seed=0):
        path = tmp_path / folder / "gat_fusion" / "d" / part / variant / f"seed{seed}" / "run.json"
        path.parent.mkdir(parents=True)
        path.write_text(
            json.dumps(
                {
                    "method": "gat_fusion",
                    "metrics": {"ari": ari},
                    "baselines": {"coords_knn": {"ari": 0.5}},
                    "split": {"name": split, "leaks_position": leaks, "detail": ""},
                    "config": {"seed": seed},
                }
            )
        )

    for seed, ari in enumerate((0.1, 0.2, 0.6)):
        record("runs", "a", "random-full-cross", "random", True, ari, seed)
    record("runs", "b", "random-full-cross", "random", True, 0.9)
    record("runs", "a", "blocks0-full-cross", "blocks", True, 0.9)
    record("honest", "sim1", "random-gcn_only", "random", True, 0.3)
    folders = [
        "--runs",
        str(tmp_path / "runs"),
        "--noise",
        str(tmp_path / "honest"),
        "--out",
        str(tmp_path / "chart.png"),
    ]
    assert (
        figure_honest.main([*folders, "--slices", "random:a"]) == 0
        and (tmp_path / "chart.png").stat().st_size > 5000
    )
    lines = capsys.readouterr().out.splitlines()
    assert "0.200 (0.100-0.600), 3 values" in next(
        line for line in lines if line.startswith("random") and "gat_fusion" in line
    )
    assert sum(line.endswith("missing") for line in lines) == 2 + 6 + 6
    with pytest.raises(data.DataError, match="--slices blocks"):
        figure_honest.main([*folders, "--slices", "blocks"])


def test_chart_of_the_honest_page_shows_one_preset(tmp_path, capsys):
    def record(preset, variant, ari, **config):
        name = f"gat_fusion/d/a/{preset}-random-{variant}/seed0/run.json"
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        facts = {
            "method": "gat_fusion",
            "metrics": {"ari": ari},
            "baselines": {"coords_knn": {"ari": 0.5 + 0.25 * (variant != "full-cross")}},
            "split": {"name": "random", "leaks_position": True, "detail": ""},
            "config": {"seed": 0, "preset": preset} | config,
        }
        path.write_text(json.dumps(facts))

    folders = ["--runs", str(tmp_path), "--noise", str(tmp_path), "--out", str(tmp_path / "c.png")]
    record("tuned", "full-cross", 0.875, library="given")
    # an ablation, whose baselines are others
    record("tuned", "full-cross-library-own", 0.125, library="own")
    record("paper", "full-cross", 0.25, library="given")
    with pytest.raises(data.DataError, match="paper, tuned: choose one with --preset"):
        figure_honest.main(folders)
    assert figure_honest.main([*folders, "--preset", "tuned"]) == 0
    out = capsys.readouterr().out
    assert "0.875 (0.875-0.875), 1 values" in out and "0.500 (0.500-0.500), 1 values" in out
