"""Which runs make which table, as plain lists that make executes.

    python -m experiments dlpfc --list                     # what would run, one command a line
    python -m experiments dlpfc --slices 151673 --seeds 0  # the same as rules for make

Every list is a function `jobs(...)` of its own file. A job is one command and the record that it
writes: `make` runs those whose record is not there yet, so `-j` runs several and an interrupted
sweep goes on. To add a seed, a mode or a preset, edit one list.
"""

import contextlib
import importlib
import io
import shlex
from dataclasses import dataclass
from pathlib import Path

from plainst import run
from plainst.readers.checked import DataError

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Job:
    """One run: `python <method>.py --data <data> <flags> --seed <seed>`.

    part: slice, fold or section, as it stands in the record's path; model: what a table calls it,
    `<method>/<variant>`; split, preset: as in the flags, to choose by; download:
    where the data is lacking, the words behind `python -m plainst` that fetch it, several commands
    parted by `;`.
    """

    method: str
    data: str
    part: str
    flags: str
    seed: int
    model: str
    preset: str = "tuned"
    split: str = ""
    download: str = ""
    is_extra: bool = False  # runs only where --models and --splits name it

    def words(self, runs):
        """Words of the command line behind the interpreter."""
        flags = [*shlex.split(self.flags), "--preset", self.preset, "--seed", str(self.seed)]
        return [f"{self.method}.py", "--data", self.data, *flags, "--runs", str(runs)]

    def record(self, runs):
        """Path of the record that the command writes. Raises DataError for a flag that the method
        does not know, or that does nothing beside the others."""
        module, words = importlib.import_module(self.method), self.words(runs)
        message = io.StringIO()
        try:
            with contextlib.redirect_stderr(message):
                config = run.parse(module.Config, words[1:])
                module.check(config)
        except (SystemExit, DataError) as stop:
            reason = message.getvalue().strip().splitlines()[-1:] or [str(stop)]
            text = f"the list of experiments asks for `{shlex.join(words)}`: "
            raise DataError(text + " ".join(reason).split("error: ")[-1]) from stop
        name = run.data_name(self.data)
        folder = Path(runs) / self.method / name / self.part / module.variant(config)
        return folder / f"seed{self.seed}" / "run.json"


def is_chosen(job, models=(), presets=(), splits=()):
    """Whether the lists of words that narrow a sweep let a job pass; an empty list lets all.

    `multist` takes every model of the method, `multist/default` this one.
    """
    if job.is_extra and not (job.model in models and job.split in splits):
        return False
    is_model = not models or job.model in models or job.method in models
    is_split = not splits or not job.split or job.split in splits
    return is_model and is_split and (not presets or job.preset in presets)


def rules(jobs, runs, python="python", launch=""):
    """The jobs as a makefile: the target `all`, one rule a record, downloads as prerequisites.

    Raises DataError where two jobs write one record, or a path holds what make cannot read.
    """
    records, lines, downloads = {}, [], {}
    for job in jobs:
        path = str(job.record(runs))
        if path in records:
            raise DataError(f"two jobs of the list write {path}: {records[path]} and {job}")
        if any(c in path + job.data for c in " #:$%"):
            raise DataError(f"make cannot handle the path {path!r}: give one without spaces, # : $")
        records[path], before = job, ""
        if job.download:
            before = f" | fetch-{len(downloads)}"
            before = downloads.setdefault(job.download, before)
        command = " ".join(w for w in (launch, python, shlex.join(job.words(runs))) if w)
        lines += [f"{path}:{before}", f"\t{command}", ""]
    head = ["all: \\", *(f"  {path} \\" for path in records), "", ".DELETE_ON_ERROR:", ""]
    phony = " ".join(name.removeprefix(" | ") for name in downloads.values())
    head += [f".PHONY: all {phony}", ""]
    for download, name in downloads.items():
        commands = [f"\t{python} -m plainst {part.strip()}" for part in download.split(";")]
        lines += [f"{name.removeprefix(' | ')}:", *commands, ""]
    return "\n".join(head + lines)
