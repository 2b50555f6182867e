"""experiments: which runs a sweep makes, where their records lie, what narrows it; the Makefile."""

import importlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

import data
import experiments
from conftest import ROOT
from data import DataError
from experiments import Job, ablations, ca1, dlpfc, her2st, platforms
from experiments.__main__ import main as experiments_main
from plainst import run, simulate
from plainst.run import cli

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="no make here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A place with small data under the names of the public ones."""
    root = tmp_path_factory.mktemp("sweep")
    for seed, name in enumerate(("151673", "151674")):
        slide = simulate.simulate_cortex(260, 120, seed=seed, sample=name, donor="Br8100")
        simulate.write_visium(slide, root / "datasets" / "dlpfc" / name)
    simulate.simulate_hest(root / "datasets/her2st", n_slides=3, n_spots=40, patch_size=16)
    simulate.simulate_cells(root / "datasets/ca1/cells.h5", n_cells=200, n_genes=48, size=16)
    (root / "datasets/hallmark").mkdir()
    genes = [f"g{i}" for i in range(9)]
    (root / ablations.GENE_SETS).write_text("SET\tnone\t" + "\t".join(genes) + "\n")
    return root


def commands(folder, *words):
    """Lines that `make -n` prints in a folder, with this Makefile, as status and text."""
    done = subprocess.run(
        ["make", "-n", "-f", str(ROOT / "Makefile"), f"PY={sys.executable}", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(folder)},
    )
    return done.returncode, done.stdout + done.stderr


class Named(Exception):
    """The program has named its record."""


def test_records_are_the_files_that_the_runs_write(folder, monkeypatch):
    """Else make would repeat every run, every time."""
    monkeypatch.chdir(folder)
    every = [
        *dlpfc.jobs(slices=("151673", "151674"), seeds=(3,)),
        *her2st.jobs(slices=("S1",), seeds=(3,)),
        *ca1.jobs(seeds=(3,)),
        *ablations.jobs(slices=("151673",), seeds=(3,)),
    ]
    made, class_of_runs = [], run.Run

    def named_only(*arguments):
        made.append(class_of_runs(*arguments).folder / "run.json")
        raise Named

    monkeypatch.setattr(run, "Run", named_only)
    checked = {}
    for job in every:
        if job.method in ("stformer", "cmrcnet") and job.part == "151673":
            continue  # a slice of another list
        if job.split == "section":
            continue  # the simulated task has one slide a patient
        words = shlex.split(job.flags)
        key = (job.method, *(w for w in words if w.startswith("--")))
        if key in checked:
            continue
        with pytest.raises(Named):
            importlib.import_module(job.method).main(job.words("runs")[1:])
        assert str(made[-1]) == str(job.record("runs")), job
        checked[key] = job
    assert len({job.method for job in checked.values()}) == 5 and len(checked) > 25


@pytest.mark.parametrize("name", ["dlpfc", "her2st", "ca1", "platforms", "ablations"])
def test_no_two_jobs_share_a_record_and_every_flag_is_known(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    few = {"slices": ("151673", "151674")} if name == "dlpfc" else {}
    jobs = list(importlib.import_module(f"experiments.{name}").jobs(**few))
    text = experiments.rules(jobs, "runs", "python3", "")
    assert text.count("/run.json:") == len(jobs)
    assert len({job.seed for job in jobs}) == len(experiments.SEEDS)


def test_platforms_name_the_labels_of_their_files(real_data):
    """The column that a list names is there, with the classes of the data's README."""
    from plainst.readers import load_slide

    for path, key in platforms.SLIDES.items():
        slide = load_slide(real_data / path, label_key=key)
        assert len(slide.classes) > 2 and (slide.labels >= 0).mean() > 0.5, path


def test_what_narrows_a_sweep():
    job = Job("multist", "d", "s", "", 0, "multist/image-off", "tuned")
    extra = Job("gat_fusion", "d", "s", "", 0, "gat_fusion/x", split="blocks", is_extra=True)
    assert experiments.is_chosen(job) and not experiments.is_chosen(extra)
    assert experiments.is_chosen(job, ["multist"])
    assert experiments.is_chosen(job, ["multist/image-off"])
    assert not experiments.is_chosen(job, ["multist/k-3"])
    assert not experiments.is_chosen(extra, ["gat_fusion"])
    assert not experiments.is_chosen(extra, ["gat_fusion/x"])
    assert experiments.is_chosen(extra, ["gat_fusion/x"], splits=["blocks"])
    assert not experiments.is_chosen(extra, ["gat_fusion/x"], splits=["random"])
    assert not experiments.is_chosen(job, presets=["paper"])


def test_bad_lists_are_one_sentence(capsys):
    with pytest.raises(DataError, match="--colour"):
        Job("multist", "d", "s", "--colour x --hue 3", 0, "multist").record("runs")
    one = Job("multist", "d", "s", "", 0, "multist")
    with pytest.raises(DataError, match="two jobs of the list write"):
        experiments.rules([one, one], "runs")
    with pytest.raises(DataError, match="make cannot handle"):
        experiments.rules([Job("multist", "my data", "s", "", 0, "multist")], "runs")
    for words, text in (
        (["ca1", "--slices", "a"], "--slices means nothing for the list ca1"),
        (["dlpfc", "--models", "nothing"], "no run of the list dlpfc is left"),
        (["her2st", "--data", "none"], "none holds no splits"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli(experiments_main, words)
        error = capsys.readouterr().err.strip()
        assert stop.value.code == 2 and text in error and len(error.splitlines()) == 1


@needs_make
def test_make_runs_what_is_lacking(folder, tmp_path):
    words = ("reproduce-dlpfc", "SEEDS=0", "SPLITS=random", "MODELS=gat_fusion/concat multist")
    runs = f"RUNS={tmp_path / 'runs'}"
    status, out = commands(folder, *words, runs, "SLICES=151673 151675")
    assert status == 0, out
    n_presets = len(dlpfc.PRESETS["gat_fusion"])
    n_domains = sum(len(variants) for variants in dlpfc.DOMAINS.values())
    assert out.count("gat_fusion.py") == 2 * n_presets
    assert out.count("multist.py") == 2 * n_domains
    assert out.count("plainst download dlpfc --slices 151675") == 1  # the other slice is there
    assert "slices 151673 --out" not in out and "evaluation.report" in out
    record = re.search(
        r"^  (\S*multist\S*151673/tuned/seed0/run.json)",
        (tmp_path / "runs/dlpfc.mk").read_text(),
        re.M,
    )
    path = folder / record[1]
    path.parent.mkdir(parents=True)
    path.touch()
    _, out = commands(folder, *words, runs, "SLICES=151673")
    assert out.count("multist.py") == 5  # one record is there


@needs_make
def test_launch_stands_before_every_run(folder, tmp_path):
    """LAUNCH="srun ..." as the README gives it: every training run goes through it, reports and
    downloads do not."""
    ran = set()
    for name in ("dlpfc", "her2st", "ca1"):
        words = (f"reproduce-{name}", "SEEDS=0", "LAUNCH=srun --gres=gpu:1")
        more = ("SLICES=151673",) if name == "dlpfc" else ("SPLITS=folds",) * (name == "her2st")
        status, out = commands(folder, *words, *more, f"RUNS={tmp_path / 'runs'}")
        assert status == 0, out
        for line in out.splitlines():
            script = re.search(r"\b(\w+\.py) --data", line)
            if script:
                assert line.startswith("srun --gres=gpu:1 "), line
                ran.add(script[1])
            else:
                assert not line.startswith("srun")
    assert ran == {"gat_fusion.py", "multist.py", "stformer.py", "cmrcnet.py", "spatia.py"}


def test_slices_of_the_demo_can_be_held_out_in_blocks(tmp_path):
    """At the default buffer a smaller slide has one validation spot or none: a network would stop
    at its first epoch."""
    flags = re.search(r"simulate cortex \S+ (.*)", (ROOT / "Makefile").read_text())[1]
    simulate.main(["cortex", str(tmp_path), *flags.split()])
    for name in ("sim1", "sim2"):
        slide = data.load_slide(tmp_path, name, counts=False)
        split = data.block_split(slide.labels, slide.xy, 0, buffer=3.0)
        assert split.val.sum() >= 8, name


@needs_make
def test_makefile_is_short_and_says_what_it_can(folder):
    text = (ROOT / "Makefile").read_text()
    assert len(text.splitlines()) <= 100 and not re.search(r"\$\((foreach|eval|call) ", text)
    assert max(map(len, text.splitlines())) <= 100
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "reproduce-%" in done.stdout and "gpu-check" in done.stdout
