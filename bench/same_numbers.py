"""Do two trees of this project compute the same numbers, bit by bit?

    python bench/same_numbers.py --base HEAD~1                 # that commit against the files here
    python bench/same_numbers.py --base e90f451 --only multist --real datasets_with_real_data

Every method runs briefly in many of its modes, on simulated data and, where it is there, on real
data: splits, fusions, tiles, an interrupted and resumed run, prediction with a saved model. Of each
run the SHA-256 of every array of `arrays.npz`, of every tensor of `model.pt` and of the metrics,
baselines and split in `run.json` are compared; of the simulators and converters every array that
they write. A commit that moves code must leave all of them equal. Exit status 1 where one differs.

What is not compared: seconds, memory, dates, versions, figures. What only the later tree has is
named, and is no difference.
"""

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("gat_fusion", "multist", "stformer", "cmrcnet", "spatia")
MAKERS = {  # name of what is made: (old script, new command, words)
    "cortex": ("simulate", "simulate", "cortex {out} --n_spots 260 --n_genes 120 --n_slices 3"),
    "hest": ("simulate", "simulate", "hest {out} --n_spots 60 --patch_size 32 --n_slides 4"),
    "ring2": ("simulate", "simulate", "hest {out} --n_spots 60 --patch_size 32 --link ring2"),
    "cells.h5": (
        "simulate",
        "simulate",
        "cells {out} --n_cells 240 --n_genes 48 --n_sections 3 --size 16",
    ),
    "one_section.h5": (
        "simulate",
        "simulate",
        "cells {out} --n_cells 600 --n_genes 48 --n_sections 1 --size 16",
    ),
    "ca1.h5": ("data", "convert", "ca1 {real}/ca1 {out}"),
    "xenium.h5": ("data", "convert", "xenium {real}/xenium_tiny {out}"),
}

GAT = "--data {made}/cortex --slice sim1 --epochs 4 --dim 16 --heads 2"
MULTIST = (
    "--data {made}/cortex --slice sim1 --epochs 6 --dec_epochs 4 --fusion_epochs 1 "
    "--n_starts 2 --n_pcs 20 --permutations 20 --no-figures"
)
STFORMER = "--data {made}/hest --preset tuned --epochs 3 --folds 2 --members 2"
CMRCNET = (
    "--data {made}/hest --preset tuned --epochs 2 --folds 2 --dim 32 --snn 64 --n_hvg 20 "
    "--batch 16 --k 10 --markers none"
)
SPATIA = "--steps_a 6 --steps_b 6 --steps_c 6 --draws 2 --ode_steps 2"
JOBS = {
    "gat_fusion": [
        *(f"{GAT} --mode {mode}" for mode in ("expr_only", "gat_only", "gcn_only", "concat")),
        *(f"{GAT} --mode {mode}" for mode in ("full", "gcn_full", "img_expr", "multimodal")),
        f"{GAT} --mode none",
        *(f"{GAT} --fusion {fusion}" for fusion in ("gated", "concat")),
        *(f"{GAT} --mode img_expr --fusion {fusion}" for fusion in ("gated", "concat")),
        f"{GAT} --mode multimodal --fusion gated --scale slice",
        f"{GAT} --mode gcn_full --no-fast",
        f"{GAT} --split blocks --fold 1 --buffer 1 --n_blocks 4",
        f"{GAT} --split slice --train sim2",
        f"{GAT} --tile 100 --k 9",
        f"{GAT} --library own --n_top_genes 60",
        "--data {made}/cortex --slice sim2 --predict {runs}/gat_fusion/4/**/model.pt",
        "--data {real}/dlpfc --slice 151673 --epochs 2",
        "--data {real}/dlpfc --slice 151674 --split slice --train 151673 --epochs 2 --dim 32",
    ],
    "multist": [
        *(f"{MULTIST} --preset {preset}" for preset in ("paper", "released", "tuned")),
        *(f"{MULTIST} --gan {gan}" for gan in ("off", "mean")),
        f"{MULTIST} --branches serial --norm cpm --weight_decay 0.01",
        f"{MULTIST} --mask_mode replace --hvg seurat_v3",
        f"{MULTIST} --mask_mode zero --library own --k 9",
        f"{MULTIST} --direction gene_reads_image --m 1",
        f"{MULTIST} --n_domains bic --image noise --k 0",
        f"{MULTIST} --image permuted --no-dec --tile 100",
        f"{MULTIST} --image off --n_domains 5 --root_gene none",
        "--data {real}/dlpfc --slice 151673 --epochs 4 --dec_epochs 2 --fusion_epochs 1 "
        "--n_starts 1 --permutations 10",
    ],
    "stformer": [
        STFORMER,
        f"{STFORMER} --mode global --loss mse --members 1",
        f"{STFORMER} --h2h whole --position sincos --members 1",
        f"{STFORMER} --position mlp --interactions p2p,p2h,h2p --members 1",
        f"{STFORMER} --gene_sets {{made}}/sets.gmt --lambda_pathway 0.1 --members 1",
        f"{STFORMER} --gene_sets {{made}}/sets.gmt --shuffle_sets --members 1 --loss pcc",
        f"{STFORMER} --loss zinb --members 1 --no-distance_bias",
        f"{STFORMER} --loss mse --target log1p --scale slide --target_scale slide --members 1",
        f"{STFORMER} --split patient --patient P1 --permute_pairs --members 1 --folds 0",
        f"{STFORMER} --batch 2 --genes 20 --tau fixed --checkpointing",
        f"{STFORMER} --save_every 1 --seed 7 STOP",
        f"{STFORMER} --save_every 1 --seed 7 --resume",
        "--data {made}/hest --predict {runs}/stformer/0/**/model.pt",
        "--data {made}/ring2 --predict {runs}/stformer/0/**/model.pt",
        "--data {real}/her2st --fold 0 --epochs 2 --folds 2 --members 1 "
        "--encoder {real}/her2st_features/{{sample}}.npz",
        "--data {real}/her2st --split section --slice C2 --epochs 1 --folds 0 --members 1",
    ],
    "cmrcnet": [
        f"{CMRCNET} --backbone features",
        f"{CMRCNET} --backbone features --reconstruction cosine --norm_sim --tau 0.1 --scale train",
        f"{CMRCNET} --backbone features --reconstruction none --no-share --gene_scale train",
        f"{CMRCNET} --backbone features --weighting softmax --index ivf --recall 0.8",
        f"{CMRCNET} --backbone features --val random --shuffle_pairs --target log1p",
        f"{CMRCNET} --backbone features --split sample --slice S2 --oracle_genes --val none",
        f"{CMRCNET} --backbone features --split patient --patient P1 --gene_scale slide --genes 12",
        f"{CMRCNET} --backbone tiny --epochs 1 --val none",
        f"{CMRCNET} --backbone features --save_every 1 --seed 7 STOP",
        f"{CMRCNET} --backbone features --save_every 1 --seed 7 --resume",
        "--data {made}/hest --predict {runs}/cmrcnet/0/**/model.pt --genes all",
        "--data {real}/her2st --fold 0 --backbone features --epochs 2 --val none --k 20",
        "--data {real}/her2st --split section --slice C2 --backbone features --epochs 1 --val none",
    ],
    "spatia": [
        f"--data {{made}}/cells.h5 {SPATIA}",
        f"--data {{made}}/cells.h5 {SPATIA} --path ddpm --rho 0.25 --condition expression",
        f"--data {{made}}/cells.h5 {SPATIA} --no-fusion --no-niche --condition none --guidance 0",
        f"--data {{made}}/cells.h5 {SPATIA} --no-mae --no-tissue --no-generate",
        f"--data {{made}}/one_section.h5 {SPATIA} --width 100 --buffer 10 --score val "
        "--no-generate",
        f"--data {{made}}/cells.h5 {SPATIA} --save_every 2 --seed 7 STOP",
        f"--data {{made}}/cells.h5 {SPATIA} --save_every 2 --seed 7 --resume",
        f"--data {{made}}/ca1.h5 {SPATIA} --draws 1",
    ],
}


class Stopped(Exception):
    """A run that was interrupted on purpose, to be resumed."""


def array_digest(values):
    """SHA-256 of kind, shape and content of a numpy array."""
    text = f"{values.dtype.str} {values.shape} "
    content = repr(values.tolist()).encode() if values.dtype.hasobject else values.tobytes()
    return hashlib.sha256(text.encode() + content).hexdigest()


def tensors_of(value, place=""):
    """(place, tensor) of every tensor in a nest of dictionaries and lists."""
    if isinstance(value, dict):
        for key in value:
            yield from tensors_of(value[key], f"{place}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from tensors_of(item, f"{place}.{i}")
    elif hasattr(value, "numpy"):
        yield place, value


def digests_of(folder):
    """{file and array: SHA-256} of what a run or a maker left in `folder`."""
    import h5py
    import numpy as np
    import torch

    digests = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        parts = path.relative_to(folder).parts
        seeds = [i for i, part in enumerate(parts) if part.startswith("seed")]
        name = "/".join(parts[seeds[0] + 1 :] if seeds else parts)  # a run's folder may be renamed
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                digests |= {f"{name} {k}": array_digest(arrays[k]) for k in arrays.files}
        elif path.suffix == ".pt":
            content = torch.load(path, weights_only=True, map_location="cpu")
            digests |= {f"{name} {k}": array_digest(t.numpy()) for k, t in tensors_of(content)}
        elif path.suffix in (".h5", ".h5ad"):
            with h5py.File(path) as handle:
                names = []
                handle.visit(names.append)
                for k in names:
                    if isinstance(handle[k], h5py.Dataset):
                        digests[f"{name} {k}"] = array_digest(np.asarray(handle[k][()]))
        elif path.name == "run.json":
            record = json.loads(path.read_text())
            for key in ("metrics", "baselines", "split", "n_params"):
                digests[f"{name} {key}"] = json.dumps(record[key], sort_keys=True)
        elif path.suffix in (".csv", ".json", ".tsv"):
            digests[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return digests


def stop_at_second_checkpoint():
    """Make this process raise Stopped when it renames the second latest.pt; -> the switch."""
    switch = {"left": -1}

    def watch(event, args):
        if event == "os.rename" and switch["left"] > 0 and str(args[1]).endswith("latest.pt"):
            switch["left"] -= 1
            if not switch["left"]:
                raise Stopped

    sys.addaudithook(watch)
    return switch


def run_jobs(method, made, real, runs, tree):
    """Run the jobs of one method here, with relative paths -> {job: {array: digest} or the
    error}."""
    sys.path.insert(0, str(tree))
    module, switch, results = importlib.import_module(method), stop_at_second_checkpoint(), {}
    for number, job in enumerate(JOBS[method]):
        if ("{real}" in job and not real) or (".h5" in job and not made_file(job, made).exists()):
            continue
        words = job.replace("{{", "{").replace("}}", "}").replace("{made}", str(made))
        words = words.replace("{real}", str(real)).replace("{runs}", str(runs)).split()
        words = [str(next(Path().glob(w))) if "**" in w else w for w in words]
        folder = runs / method / str(number)
        if "--resume" in words:  # goes on in the folder of the interrupted run
            folder = runs / method / str(number - 1)
        switch["left"] = 2 if "STOP" in words else -1
        words = [w for w in words if w != "STOP"]
        words += ["--runs", str(folder), "--threads", "1", "--device", "cpu"]
        if method in ("gat_fusion", "stformer", "cmrcnet") and "--predict" not in words:
            words += ["--cache", str(runs / "features")]
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                run_without_idle_flags(module, words)
            results[job] = digests_of(folder)
        except Stopped:
            results[job] = {"stopped": "as asked"}
        except (ValueError, RuntimeError, KeyError, SystemExit):  # both trees must have it
            results[job] = {"error": traceback.format_exc().splitlines()[-1]}
    return results


def run_without_idle_flags(module, words):
    """Run a method without the flags that this tree calls idle: in a tree that takes them they must
    change no number."""
    while True:
        try:
            return module.main(words)
        except ValueError as error:
            idle = re.match(r"--(\w+) has no effect", str(error))
            if not idle:
                raise
            first = next(i for i, w in enumerate(words) if re.fullmatch(f"--(no-)?{idle[1]}", w))
            has_value = first + 1 < len(words) and not words[first + 1].startswith("--")
            words = words[:first] + words[first + 1 + has_value :]


def made_file(job, made):
    """The cell file of a job, or the folder of what is made."""
    names = [w.removeprefix("{made}/") for w in job.split() if w.startswith("{made}/")]
    return made / (names[0] if names else "")


def make_inputs(tree, made, real):
    """Run the simulators and converters of a tree into the folder `made`."""
    made.mkdir(parents=True, exist_ok=True)
    for name, (old, new, words) in MAKERS.items():
        if "{real}" in words and not real:
            continue
        words = words.format(out=made / name, real=real).split()
        is_old = (tree / f"{old}.py").exists() and not (tree / "plainst").is_dir()
        head = [str(tree / f"{old}.py")] if is_old else ["-m", "plainst", new]
        command = [sys.executable, *head, *words]
        subprocess.run(command, cwd=tree, check=True, stdout=subprocess.DEVNULL)
    spec = next((made / "hest").glob("var_*genes.json"))
    genes = json.loads(spec.read_text())
    genes = genes["genes"] if isinstance(genes, dict) else genes
    rows = [f"SET{k}\tnone\t" + "\t".join(genes[k::5]) + "\n" for k in range(5)]
    (made / "sets.gmt").write_text("".join(rows))


def numbers_of(tree, folder, real, only):
    """All digests of one tree -> {method: {job: {array: digest}}}; two processes at a time."""
    made = folder / "made"
    make_inputs(tree, made, real)
    results = {"made": {"all": digests_of(made)}}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    waiting, running = list(only), []
    while waiting or running:
        while waiting and len(running) < 2:
            method = waiting.pop(0)
            words = ["--run", method, "--tree", tree, "--folder", folder, "--real", real or ""]
            command = [sys.executable, __file__, *map(str, words)]
            running.append((method, subprocess.Popen(command, env=environment, cwd=folder)))
        method, process = running.pop(0)
        if process.wait():
            raise SystemExit(f"{tree}: the jobs of {method} did not end")
        results[method] = json.loads((folder / f"{method}.json").read_text())
    return results


def differences(before, after):
    """Lines that name what differs between two results of `numbers_of`, and lines that name what
    only the later has: an array or a table more changes no number."""
    lines, more = [], []
    for method in before:
        for job in sorted(before[method].keys() | after[method].keys()):
            old, new = before[method].get(job, {}), after[method].get(job, {})
            names = [k for k in sorted(old) if old[k] != new.get(k)]
            if names or not old:
                lines.append(f"{method} {job}: {len(names)} of {len(old)} differ: {names[:4]}")
                lines += [f"    {d['error']}" for d in (old, new) if "error" in d]
            more += [f"{method}: new {k}" for k in sorted(new.keys() - old.keys())]
    return lines, list(dict.fromkeys(more))


def main(argv=None):
    """Compare a commit with the files here; -> 1 where a number differs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="HEAD", help="commit to compare with")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    default = os.environ.get("PLAINST_DATA", ROOT.parent / "shared" / "data")
    parser.add_argument("--real", default=str(default), help="folder of real data; '' for none")
    parser.add_argument("--keep", help="JSON file: numbers of --base, made once and read again")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--tree", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    real = Path(options.real).resolve() if options.real and Path(options.real).is_dir() else None
    if options.run:
        folder = options.folder
        results = run_jobs(options.run, Path("made"), real, Path("runs"), options.tree)
        (folder / f"{options.run}.json").write_text(json.dumps(results))
        return 0
    scratch = Path(tempfile.mkdtemp())
    try:
        keep = Path(options.keep) if options.keep else None
        if keep and keep.exists():
            before = json.loads(keep.read_text())
        else:
            clone = ["git", "-C", str(ROOT), "worktree", "add", "--detach", str(scratch / "tree")]
            subprocess.run([*clone, options.base], check=True, capture_output=True)
            before = numbers_of(scratch / "tree", scratch / "before", real, options.only)
            if keep:
                keep.write_text(json.dumps(before))
        after = numbers_of(ROOT, scratch / "after", real, options.only)
    finally:
        remove = ["git", "-C", str(ROOT), "worktree", "remove", "--force", str(scratch / "tree")]
        subprocess.run(remove, check=False, capture_output=True)
        shutil.rmtree(scratch, ignore_errors=True)
    before = {k: v for k, v in before.items() if k in ("made", *options.only)}
    lines, more = differences(before, after)
    print("\n".join(lines + more))
    for method, jobs in after.items():
        errors = sum("error" in found for found in jobs.values())
        count = sum(len(found) for found in jobs.values())
        print(f"{method:<12}{len(jobs):4} jobs{count:7} numbers and arrays, {errors} errors")
        for job, found in jobs.items():
            if "error" in found:
                print(f"    {job}\n        {found['error']}")
    print("different" if lines else "equal")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
