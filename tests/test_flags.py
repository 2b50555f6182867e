"""Flags: presets under typed flags, flags that do nothing, names of folders, what a checkpoint
holds."""

import dataclasses
import importlib
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest

import cmrcnet
import gat_fusion
import multist
import spatia
import stformer
from data import DataError
from experiments import Job
from plainst import run

METHODS = ("gat_fusion", "multist", "stformer", "cmrcnet", "spatia")


@dataclass
class Flags(run.Config):
    """Flags of an invented method."""

    presets: ClassVar = {"paper": {}, "tuned": {"width": 32, "kind": "b", "is_deep": True}}

    width: int = 8
    "width of the layers"
    kind: Literal["a", "b"] = "a"
    "kind of the layers"
    is_deep: bool = False
    "more of them"
    weights: str = ""
    "a file"


def parsed(method, words):
    """Configuration of a method from a command line, checked."""
    module = importlib.import_module(method)
    config = run.parse(module.Config, words.split())
    module.check(config)
    return config


def test_typed_over_preset_over_default():
    assert run.parse(Flags, []).width == 8
    config = run.parse(Flags, ["--preset", "tuned"])
    assert (config.width, config.kind, config.is_deep) == (32, "b", True)
    assert config.typed == ""
    config = run.parse(Flags, ["--preset", "tuned", "--width", "16", "--kind", "a"])
    assert (config.width, config.kind, config.is_deep) == (16, "a", True)
    assert config.typed.split() == ["width", "kind"]


def test_typed_at_its_default_is_typed():
    config = run.parse(Flags, ["--width", "8", "--no-is_deep", "--preset", "tuned"])
    assert (config.width, config.is_deep, config.kind) == (8, False, "b")
    assert config.typed.split() == ["width", "is_deep"]
    assert run.parse(Flags, ["--width", "8"]).typed == "width"
    assert run.parse(Flags, []).typed == ""


def test_first_preset_is_the_default():
    class Other(Flags):
        presets: ClassVar = dict(reversed(Flags.presets.items()))

    config = run.parse(dataclass(Other), [])
    assert (config.preset, config.width) == ("tuned", 32)
    assert run.of_preset(Flags, "tuned").width == 32


def test_help_shows_the_values_of_presets(capsys):
    with pytest.raises(SystemExit) as stop:
        run.parse(Flags, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "width of the layers (default: 8, 32 in tuned)" in text
    assert "more of them (default: False, True in tuned)" in text
    assert "a file (default: )" in text
    assert "paper, tuned (default: paper)" in text
    assert "typed" not in text.split("a named set")[0]
    assert "--typed" not in text


@pytest.mark.parametrize(
    "words",
    (["--preset", "best"], ["--widt", "4"], ["--typed", "width"], ["--kind", "c"], ["--unknown"]),
)
def test_wrong_flags_are_status_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        run.parse(Flags, words)
    assert stop.value.code == 2
    assert words[0].split("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_preset_and_an_abbreviation_of_a_method(method, capsys):
    config = importlib.import_module(method).Config
    for words in (["--preset", "best"], ["--see", "1"]):
        with pytest.raises(SystemExit) as stop:
            run.parse(config, words)
        assert stop.value.code == 2
        assert words[0] in capsys.readouterr().err


def test_flags_without_effect_are_named():
    rules = [(True, "here", ("width",)), (False, "elsewhere", ("kind",)), (True, "x", ("kind",))]
    with pytest.raises(DataError, match=r"^--width has no effect here: leave it out$"):
        run.refuse_idle_flags(run.parse(Flags, ["--width", "8"]), rules)
    with pytest.raises(DataError, match="--kind has no effect x"):
        run.refuse_idle_flags(run.parse(Flags, ["--kind", "a"]), rules)
    # of a preset: nobody believes in it
    run.refuse_idle_flags(run.parse(Flags, ["--preset", "tuned"]), rules)


def test_folder_of_a_preset_names_no_flag_of_it():
    def name(words):
        return run.variant(run.parse(Flags, words.split()), files=("weights",))

    assert name("") == "paper"
    assert name("--preset tuned") == "tuned"
    assert name("--preset tuned --width 32 --kind b") == "tuned"
    assert name("--preset tuned --width 8") == "tuned-width-8"
    assert name("--width 32") == "paper-width-32"
    assert name("--h5ad --seed 3 --runs r --threads 2") == "paper"
    assert name("--weights a/w.pt") != name("--weights b/w.pt")


def test_h5ad_may_change_before_a_resume():
    before, after = (run.resumable(run.parse(Flags, words)) for words in ([], ["--h5ad"]))
    assert before == after


def test_saved_flags(tmp_path):
    def check(config):
        run.check_flags(config, {"width": run.AT_LEAST_ONE})

    saved = dataclasses.asdict(run.parse(Flags, ["--preset", "tuned", "--width", "9"]))
    known = run.saved_flags("model.pt", Flags, saved, check)
    assert dataclasses.asdict(known) == saved
    assert known.typed == "width"
    del saved["h5ad"]  # of a version without that flag
    assert not run.saved_flags("model.pt", Flags, saved, check).h5ad
    for wrong in ({"width": "wide"}, {"kind": "c"}, {"new": 1}, {"typed": 3}, {"is_deep": "no"}):
        with pytest.raises(DataError, match=r"model\.pt"):
            run.saved_flags("model.pt", Flags, saved | wrong, check)
    with pytest.raises(DataError, match="--width"):
        run.saved_flags("model.pt", Flags, saved | {"width": 0}, check)


# command line | the flag that does nothing
IDLE = {
    "gat_fusion": """
        --mode concat --fusion cross | fusion
        --mode none --fusion gated | fusion
        --split random --fold 1 | fold
        --n_blocks 4 | n_blocks
        --buffer 2 | buffer
        --split blocks --train 151674 | train
        --mode expr_only --heads 2 | heads
        --mode gcn_only --heads 4 | heads
        --mode gcn_full --fusion gated --heads 2 | heads
        --mode expr_only --layers 3 | layers
        --mode img_expr --fusion gated --k 12 | k
        --mode none --k 12 | k
        --mode none --split blocks --buffer 2 --k 12 | k
        --mode expr_only --split blocks --buffer 2 --k 12 | k
        --mode expr_only --no-fast | fast
        --mode img_expr --fusion concat --no-fast | fast
        --embedding e.npz | embedding
        --encoder x.npz | encoder
        --mode embedding --embedding e.npz --encoder x.npz | encoder
        --mode embedding --embedding e.npz --n_top_genes 50 | n_top_genes
        --mode embedding_only --embedding e.npz --scale train | scale
        --mode embedding_only --embedding e.npz --library own | library
        --mode none --dim 16 | dim
        --mode none --dropout 0 | dropout
        --mode none --heads 2 | heads
        --mode none --epochs 3 | epochs
        --mode none --lr 0.1 | lr
        --mode none --compile | compile
        --mode none --bf16 | bf16
        --mode none --fast | fast
        --mode none --h5ad | h5ad
        --mode none --embedding e.npz | embedding
        --min_shared 0.2 | min_shared
        --predict model.pt --mode full | mode
        --predict model.pt --dim 64 | dim
        --predict model.pt --split random | split
        --predict model.pt --library own | library
    """,
    "multist": """
        --image off --encoder x.npz | encoder
        --image off --direction both | direction
        --image off --m 4 | m
        --image off --alpha 0.5 | alpha
        --image off --fusion_epochs 3 | fusion_epochs
        --preset tuned --readout fused | readout
        --image zero --encoder x.npz | encoder
        --direction gene_reads_image --alpha 0.3 | alpha
        --hvg none --n_top_genes 50 | n_top_genes
        --mask_rate 0 --mask_mode zero | mask_mode
        --gan off --lambda_gan 0.3 | lambda_gan
        --no-dec --dec_epochs 3 | dec_epochs
        --no-dec --dec_clusters 4 | dec_clusters
        --diffusion_steps 0 --self_weight 0 | self_weight
        --permutations 0 --lr_pairs p.csv | lr_pairs
    """,
    "stformer": """
        --patient P1 | patient
        --slice C2 | slice
        --split section --slice C2 --fold 1 | fold
        --interactions p2p,p2h,h2p --h2h whole | h2h
        --h2h whole --distance_bias | distance_bias
        --rings 0 --no-distance_bias | distance_bias
        --shuffle_sets | shuffle_sets
        --lambda_pathway 0.1 | lambda_pathway
        --gene_sets s.gmt --pathways 10 | pathways
        --loss mse --pcc_weight 2 | pcc_weight
        --loss zinb --head linear | head
        --loss zinb --target_scale train | target_scale
        --predict model.pt --size mini | size
        --predict model.pt --genes task | genes
        --predict model.pt --save_every 2 | save_every
    """,
    "cmrcnet": """
        --patient P1 | patient
        --slice C2 | slice
        --split sample --slice C2 --fold 1 | fold
        --backbone tiny --scale both | scale
        --recall 0.9 | recall
        --no-fast --index ivf | index
        --reconstruction none --reconstruct genes | reconstruct
        --reconstruction none --schedule joint | schedule
        --reconstruction none --mask_rate 0.3 | mask_rate
        --reconstruction none --no-share | share
        --reconstruction none --snn 256 | snn
        --val random --folds 3 | folds
        --predict model.pt --epochs 3 | epochs
        --predict model.pt --recall 0.9 | recall
        --predict model.pt --resume | resume
    """,
    "spatia": """
        --no-generate --steps_c 3 | steps_c
        --no-generate --draws 3 | draws
        --no-generate --path flow | path
        --no-generate --rho 0.5 | rho
        --no-generate --guidance 0 | guidance
        --condition none --guidance 0 | guidance
    """,
}
# beside them these do something
BUSY = {
    "gat_fusion": """
        --mode expr_only --split blocks --fold 1 --n_blocks 4 --k 12 --layers 3
        --mode none --split blocks --k 12
        --mode concat --heads 2 --k 12 --layers 1
        --mode gcn_full --fusion cross --heads 2
        --mode none --n_top_genes 50 --scale train --library own --tile 100 --seed 3
        --mode embedding --embedding e.npz --tile 100 --fusion concat
        --mode img_expr --k 12 --heads 2 --layers 1 --no-fast
        --mode expr_only --dim 6
        --mode multimodal --encoder x.npz --fusion gated
        --split slice --train 151674
        --predict model.pt --embedding e.npz --encoder x.npz --min_shared 0.2 --labels l.csv
        --predict model.pt --tile 10 --label_key x --h5ad --bf16 --cache c --slice a
        --predict model.pt --scale slice --no-fast --compile
    """,
    "multist": """
        --mask_mode none --mask_rate 0.3
        --image noise --encoder x.npz
        --gan mean --lambda_gan 0.3
        --image off --dec_epochs 3 --permutations 0
        --preset tuned --image real --m 4 --k 0
    """,
    "stformer": """
        --rings 3 --h2h whole
        --mode global --pcc_weight 2 --loss mse_pcc --batch 2
        --gene_sets s.gmt --shuffle_sets --lambda_pathway 0.1
        --split section --slice C2
        --split patient --patient P1
        --predict model.pt --slice a --encoder x.npz --h5ad
    """,
    "cmrcnet": """
        --backbone tiny --encoder x.npz
        --index ivf --recall 0.8
        --reconstruction none --dropout 0
        --split sample --slice C2
        --predict model.pt --genes all --k 10 --weighting softmax --index ivf --recall 0.8
    """,
    "spatia": """
        --no-generate --steps_a 3 --steps_b 3
        --condition none --draws 3 --path ddpm
    """,
}


def lines(table):
    return [(m, line.strip()) for m, text in table.items() for line in text.strip().splitlines()]


@pytest.mark.parametrize("method, line", lines(IDLE))
def test_flag_without_effect(method, line):
    words, name = line.split(" | ")
    with pytest.raises(DataError, match=f"^--{name} has no effect .*: leave it out$"):
        parsed(method, words)


@pytest.mark.parametrize("method, words", lines(BUSY))
def test_flag_with_effect(method, words):
    parsed(method, words)


@pytest.mark.parametrize("module", (gat_fusion, multist, stformer, cmrcnet, spatia))
def test_no_preset_is_idle(module):
    for name in module.PRESETS:
        module.check(run.parse(module.Config, ["--preset", name]))


def test_commands_of_the_lists_pass_their_checks(real_data):
    data = {"her2st": real_data / "her2st"}
    for name in ("dlpfc", "her2st", "ca1", "platforms", "ablations"):
        make_jobs = importlib.import_module(f"experiments.{name}").jobs
        jobs = list(
            make_jobs(data=str(data[name]), seeds=(0,)) if name in data else make_jobs(seeds=(0,))
        )
        records = {str(job.record("runs")) for job in jobs}
        assert len(records) == len(jobs) > 0


def test_list_with_an_idle_flag():
    job = Job("gat_fusion", "d", "1", "--mode concat --fusion gated", 0, "gat_fusion")
    with pytest.raises(DataError, match=r"gat_fusion\.py .*--fusion has no effect"):
        job.record("runs")
    job = Job("gat_fusion", "d", "1", "--mod concat", 0, "gat_fusion")
    with pytest.raises(DataError, match="--mod"):
        job.record("runs")
