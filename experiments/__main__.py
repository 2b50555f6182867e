"""python -m experiments <list> [--slices ...] [--seeds ...]: rules for make, or a listing."""

import argparse
import importlib
import inspect
import shlex
import sys

from experiments import SEEDS, is_chosen, rules
from plainst import run
from plainst.readers.checked import DataError

LISTS = ("dlpfc", "layers", "vectors", "her2st", "ca1", "platforms", "ablations")


def main(argv=None):
    """Print the rules, or with --list the commands, of the runs that are chosen."""
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    parser.add_argument("name", choices=LISTS, metavar="list", help=", ".join(LISTS))
    for flag, text in (
        ("slices", "slices, or sections to hold out one by one"),
        ("seeds", f"seeds, {' '.join(map(str, SEEDS))} without it"),
        ("models", "methods, or single models such as gat_fusion/concat"),
        ("presets", "presets"),
        ("splits", "splits, for example random blocks slice"),
        ("folds", "folds of the blocks"),
    ):
        parser.add_argument(f"--{flag}", nargs="*", default=[], help=text)
    parser.add_argument("--data", default="", help="folder or file, the list's own without it")
    parser.add_argument("--encoder", default="", help="features of H&E patches, {sample} in it")
    parser.add_argument("--vectors", default="", help="frozen vectors of spots, {slice} in it")
    parser.add_argument("--runs", default="runs", help="folder of the records")
    parser.add_argument("--python", default="python", help="interpreter that the rules call")
    parser.add_argument("--launch", default="", help="words before every command, e.g. srun")
    parser.add_argument("--list", action="store_true", help="the commands, not rules for make")
    options = parser.parse_args(argv)
    make_jobs = importlib.import_module(f"experiments.{options.name}").jobs
    known = inspect.signature(make_jobs).parameters
    words = {}
    for name in ("data", "encoder", "vectors", "slices", "seeds", "folds"):
        value = getattr(options, name)
        if value and name not in known:
            raise DataError(f"--{name} means nothing for the list {options.name}: leave it out")
        if value:
            words[name] = [int(v) for v in value] if name in ("seeds", "folds") else value
    chosen = [
        job
        for job in make_jobs(**words)
        if is_chosen(job, options.models, options.presets, options.splits)
    ]
    if not chosen:
        raise DataError(f"no run of the list {options.name} is left: widen --models or --splits")
    if options.list:
        for job in chosen:
            print(shlex.join([options.python, *job.words(options.runs)]))
        print(f"{len(chosen)} runs", file=sys.stderr)
        return 0
    print(rules(chosen, options.runs, options.python, options.launch))
    return 0


if __name__ == "__main__":
    run.cli(main)
