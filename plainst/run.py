"""What every script does around the science: flags from a dataclass, seed, device, progress, one
record per run.

A method declares its flags as a dataclass that extends `Config`; the string under each field is its
help text. A run is complete when `run.json` exists: every file is written beside its place, then
all are renamed into it, `run.json` last.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import platform
import random
import resource
import shutil
import subprocess
import sys
import time
import typing
import zipfile
from pathlib import Path

import h5py
import numpy as np
import scipy
import sklearn
import torch
from tqdm import tqdm

from plainst.flags import (  # noqa: F401 - a script reads its flags through `run`
    AT_LEAST_ONE,
    AT_LEAST_ZERO,
    POSITIVE,
    SEED,
    SILENT,
    Config,
    SlideConfig,
    check_flags,
    data_name,
    idle_with_predict,
    of_preset,
    parse,
    refuse_idle_flags,
    resumable,
    variant,
)
from plainst.readers.checked import JSON_ERRORS, NPZ_ERRORS, DataError, file_checksum


def seed_everything(seed, deterministic=True):
    """Seed python, numpy and torch; with `deterministic`, refuse kernels whose result depends on
    scheduling."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    # a debugging aid that costs a tenth of a training step
    torch.utils.deterministic.fill_uninitialized_memory = False


def pick_device(name="auto"):
    """`auto` -> cuda where there is one, else cpu. Raises DataError for a device that is not
    there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DataError(
            f"device {name!r} is not usable here ({str(error).splitlines()[0]}): choose "
            "--device auto or cpu"
        ) from error
    return device


def autocast(config, device):
    """Context of a forward pass and its loss: bfloat16 products with --bf16, else nothing changes.
    Parameters and their gradients stay float32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=config.bf16)


def compiled(network, config):
    """The network itself, compiled in place with --compile (names of the weights stay). Raises
    DataError where a CPU has no C++ compiler."""
    if config.compile:
        if next(network.parameters()).device.type == "cpu" and not (
            shutil.which(os.environ.get("CXX", ""))
            or shutil.which("g++")
            or shutil.which("clang++")
        ):
            raise DataError(
                "--compile needs a C++ compiler on a CPU: install g++ or clang++, or leave "
                "the flag out"
            )
        network.compile()
    return network


def shuffled(items):
    """The items in random order; one alone costs no random number, so a whole slide trains as if
    there were no tiles."""
    return [items[i] for i in torch.randperm(len(items)).tolist()] if len(items) > 1 else items


def finite(loss, name, epoch):
    """The loss as a number. Raises DataError, naming it, where it is none."""
    value = loss.item()
    if not np.isfinite(value):
        raise DataError(
            f"the {name} is {value} at epoch {epoch}: lower --lr, or check the inputs for extreme "
            "values"
        )
    return value


def join_processes(device="auto"):
    """Join the group that `torchrun` announces in the environment -> (rank, number of processes,
    device of this one); (0, 1, device) without one.

    gloo on CPU, nccl on CUDA, where process i of a machine takes GPU i. Raises DataError where the
    group cannot be joined.
    """
    n = int(os.environ.get("WORLD_SIZE", 1))
    where = pick_device(device)
    if n == 1:
        return 0, 1, where
    if where.type == "cuda":
        where = pick_device(
            f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if where.index is None else str(where)
        )
        torch.cuda.set_device(where)
    if not torch.distributed.is_initialized():
        try:
            torch.distributed.init_process_group("nccl" if where.type == "cuda" else "gloo")
        except (RuntimeError, ValueError) as error:
            raise DataError(
                f"cannot join the {n} processes of torchrun ({str(error).splitlines()[0]}): "
                "start all of them with one torchrun"
            ) from error
    return torch.distributed.get_rank(), n, where


def progress(iterable, desc, **kwargs):
    """tqdm on a terminal, silent elsewhere."""
    return tqdm(iterable, desc=desc, disable=None, leave=False, **kwargs)


class Run:
    """One run: `runs/<method>/<data>/<slice or fold>/<variant>/seed<k>/` with run.json, arrays.npz
    and figures.

    `start` is the time.perf_counter() from which `seconds` counts, to take in the reading of files;
    `name` replaces the last part of --data as <data>. Creating it seeds everything and chooses the
    device; nothing is written before `finish`, so a run that fails leaves no record. Under torchrun
    `rank` and `world` number the processes, and only the first writes.
    """

    def __init__(self, method, config, part, run_name, start=None, name=None):
        self.method, self.config, self.start = (
            method,
            config,
            time.perf_counter() if start is None else start,
        )
        name = name or data_name(config.data)
        self.folder = Path(config.runs) / method / name / part / run_name / f"seed{config.seed}"
        seed_everything(config.seed, config.deterministic)
        if config.threads:
            torch.set_num_threads(config.threads)
        self.rank, self.world, self.device = join_processes(config.device)
        if config.bf16 and self.device.type == "cpu":
            say("--bf16 on a CPU: most are slower with it than without")
        self.figures, self.laps = {}, {}
        # what ran is what stood there when it began
        self.commit, self.files, self.checksum = git_commit(), {}, ""

    def note_inputs(self, paths):
        """Note the files that the run reads, right after loading: the record lists their sizes and
        SHA-256, as they are now. Returns the checksum of the whole.

        Raises DataError for a file that cannot be read, and where a run on other data has its
        record at the place of this one.
        """
        self.files = list_files(paths, self.config.data)
        self.checksum = checksum_of(self.files)
        self.check_place()
        return self.checksum

    def check_place(self):
        """Raise DataError where the record at the place of this one was made from other files: two
        folders of one name share a path."""
        path = self.folder / "run.json"
        try:
            old = json.loads(path.read_text())
            checksum, files = old["data_checksum"], old.get("files", {})
            changed = [name for name in self.files if files.get(name) != self.files[name]]
        except JSON_ERRORS:
            # none, or no whole one: nothing that this run could be told from
            return
        if self.checksum and checksum and checksum != self.checksum:
            which = f" ({changed[0]} differs)" if files and changed else ""
            raise DataError(
                f"{path} is the record of a run on other data{which}: choose another folder with "
                "--runs, or move that record away"
            )

    def lap(self, name):
        """Note under `name` the seconds since the lap before (the first: since the start); they
        stand in the record."""
        self.laps[name] = round(time.perf_counter() - self.start - sum(self.laps.values()), 2)

    def figure(self, name, figure):
        """Keep a matplotlib figure, saved as <name>.png when the run finishes."""
        self.figures[name] = figure

    def finish(self, metrics, baselines, arrays, n_params=0, split=None, files=None, **more):
        """Write figures, arrays.npz, `files` and, last, run.json; print the record's path as the
        last line. Returns that path.

        metrics: flat dict of numbers; baselines: {name: the same}; arrays: {name: numpy array};
        split: a data.Split or None;
        files: {file name: function that writes to an open binary file}; `more` goes into the record
        as it is. Raises DataError as `note_inputs` and `write_together` do.
        """
        # the same path may have been taken since the start
        self.check_place()
        record = {
            "method": self.method,
            "config": dataclasses.asdict(self.config),
            "metrics": _plain(metrics),
            "baselines": _plain(baselines),
            "split": None
            if split is None
            else {
                "name": split.name,
                "leaks_position": split.leaks_position,
                "detail": split.detail,
            },
            "n_params": n_params,
            "seconds": round(time.perf_counter() - self.start, 2),
            "laps": self.laps,
            "peak_rss_mb": round(peak_rss_mb()),
            "device": device_name(self.device),
            "processor": processor(),
            "versions": versions(),
            "git_commit": self.commit,
            "processes": self.world,
            "data_checksum": self.checksum,
            "files": self.files,
            "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
            **_plain(more),
        }
        if self.world > 1:
            # no process leaves the group while another still needs it
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
            if self.rank:
                return self.folder / "run.json"
        writers = {
            f"{name}.png": lambda f, figure=figure: figure.savefig(
                f, dpi=110, bbox_inches="tight", format="png"
            )
            for name, figure in self.figures.items()
        }
        writers |= files or {}
        writers["arrays.npz"] = lambda f: np.savez_compressed(f, **arrays)
        path = self.folder / "run.json"
        writers[path.name] = lambda f: f.write(
            json.dumps(record, indent=1, allow_nan=False).encode()
        )
        write_together({self.folder / name: write for name, write in writers.items()})
        print(path, flush=True)
        return path


def list_files(paths, root):
    """{name: {"size": bytes, "sha256": hex}} of the files `paths`, in their order.

    A file below `root` (--data: a folder, or a file beside which others lie) is named from it, any
    other by its relative path as given or, given absolute, by as many last parts of it as tell it
    from the others: no record holds the path of a machine. Raises DataError for a file that cannot
    be read.
    """
    root = root if os.path.isdir(root) else os.path.dirname(os.path.abspath(root))
    names = {path: _name_below(path, root) for path in dict.fromkeys(map(str, paths))}
    taken = {name for name in names.values() if name}
    files = {}
    for path, name in names.items():
        parts, n = Path(path).parts, 1
        while name is None:
            tail = path if not os.path.isabs(path) else "/".join(parts[-n:])
            name = None if tail in taken and n < len(parts) else tail
            n += 1
        taken.add(name)
        checksum = file_checksum(path)
        files[name] = {"size": os.path.getsize(path), "sha256": checksum}
    return files


def _name_below(path, root):
    """Path of a file from the folder `root`, None for one that lies elsewhere. A link counts as
    lying where it stands, then where it leads."""
    for place in (os.path.abspath, os.path.realpath):
        if Path(place(path)).is_relative_to(place(root)):
            return Path(place(path)).relative_to(place(root)).as_posix()
    return None


def checksum_of(files):
    """SHA-256 (hex) of the SHA-256 of the files of `list_files`, in their order; '' without
    files. Names do not count: a copy of the data is the same data."""
    if not files:
        return ""
    return hashlib.sha256("".join(file["sha256"] for file in files.values()).encode()).hexdigest()


def write_atomically(path, write, flag="--runs"):
    """Call write(file) on a temporary neighbour of `path` and rename it into place, so that no
    reader sees half a file; makes its folder. flag: as in `write_together`."""
    write_together({Path(path): write}, flag)


def write_together(files, flag="--runs"):
    """Write {path: function of an open binary file} to temporary neighbours, then rename them in
    order.

    The last file says that the others are whole: an old one goes before the first rename, so that
    it never stands beside files of another run. Raises DataError where the disk is full or refuses,
    which names the `flag` that chooses another folder; then every old file is as it was, whole.
    """
    temporary = {path: Path(f"{path}.{os.getpid()}.tmp") for path in files}
    try:
        for path, write in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary[path], "wb") as file:
                write(file)
                file.flush()
                # or a power cut after the rename could leave an empty file
                os.fsync(file.fileno())
        if len(files) > 1:
            path.unlink(missing_ok=True)
        for path, part in temporary.items():
            os.replace(part, path)
    except (OSError, RuntimeError) as error:
        # torch.save hides a full disk in a RuntimeError
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise DataError(
            f"{path} cannot be written ({reason.strerror or reason}): free some space, or "
            f"choose another folder with {flag}"
        ) from error
    finally:
        for part in temporary.values():
            # a read-only disk: what was raised above says so
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def _plain(value):
    """numpy -> JSON: NaN and infinity become null, arrays become lists."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(v) for v in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return value


def peak_rss_mb():
    """Peak resident memory of this process in MB (ru_maxrss is in KiB on Linux, in bytes on
    macOS)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def device_name(device):
    """Name of the accelerator, or `cpu x <threads>`."""
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} x {torch.get_num_threads()} threads"
    )


def versions():
    """Versions of everything that can change a number."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "scikit-learn": sklearn.__version__,
        "h5py": h5py.__version__,
    }


def processor():
    """Name of the CPU, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )


def git_commit():
    """Commit of the checkout that holds this file, `+` where the tree differs from it, empty
    outside git."""
    here = Path(__file__).resolve().parent.parent
    try:
        ask = [
            subprocess.run(
                ["git", "-C", str(here), *words],
                capture_output=True,
                text=True,
                check=True,
                timeout=10,
            ).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return ""
    return ask[0] + ("+" if ask[1] else "")


# What torch.load can raise on a broken file: its zip reader, its unpickler and whatever rebuilds a
# tensor.
TORCH_ERRORS = (*NPZ_ERRORS, pickle.UnpicklingError, AssertionError, ImportError)


def read_checkpoint(path, what, needs=(), remedy="give the file of a finished run, or train again"):
    """{name: value} that torch.save wrote, on the CPU; tensors and plain values only. Raises
    DataError: damaged, no `what`, or without the keys `needs`.

    torch does not compare the checksums of the file, so that a flipped bit would be a wrong weight:
    they are compared here.
    """
    import torch

    try:
        # what other programs wrote may be of the old form without checksums
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():
                    raise ValueError("a checksum differs")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        lacking = [name for name in needs if name not in saved]
        if not isinstance(saved, dict) or lacking:
            raise ValueError(f"it lacks {', '.join(lacking) or 'names'}")
    except TORCH_ERRORS as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path} is not a {what} ({reason}): {remedy}") from error
    return saved


@contextlib.contextmanager
def checkpoint_fits(path):
    """What the parts of a checkpoint that do not fit each other raise becomes a DataError about
    `path`."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{path} is not the model.pt of a finished run ({reason}): give that file, of "
            "this version of the program"
        ) from error


def read_latest(path, config, what, needs, origin, files):
    """The checkpoint to go on from with --resume.

    what, needs: as in `read_checkpoint`; origin: what the run is made of (checksum of its files,
    slides, genes), in words of the user `files`. Raises DataError where the file is no checkpoint,
    or was written with other flags or from another origin.
    """
    remedy = "leave --resume away, or run with --save_every first"
    saved = read_checkpoint(path, what, ["config", "data", *needs], remedy)
    if saved["config"] != resumable(config):
        raise DataError(
            f"{path} was written with other flags: use the same flags, or leave --resume away"
        )
    if saved["data"] != origin:
        raise DataError(
            f"{path} was written from other {files}: use the same, or leave --resume away"
        )
    return saved


def saved_flags(path, cls, values, check):
    """The flags that a checkpoint holds, as the dataclass `cls`: of the types and among the choices
    of its fields, and passed by `check`. Raises DataError."""
    with checkpoint_fits(path):
        known = cls(**values)
        if known.preset not in cls.presets:
            raise ValueError(f"it has no preset {known.preset}")
        types = typing.get_type_hints(cls)
        for name in (field.name for field in dataclasses.fields(cls)):
            kind = types[name]
            value, choices = getattr(known, name), typing.get_args(kind)
            if (
                value not in choices
                if choices
                else not isinstance(value, (int, float) if kind is float else kind)
            ):
                raise ValueError(f"its flag {name} is {value}")
        check(known)
    return known


def processes():
    """Rank of this process and number of processes under torchrun; 0 and 1 without it."""
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if joined else (0, 1)


def say(text):
    """Print, in the first process only."""
    if processes()[0] == 0:
        print(text, flush=True)


def gather(x):
    """(b, d) of every process -> (B, d), with a gradient through this process's own rows."""
    rank, world = processes()
    if world == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world)]
    torch.distributed.all_gather(parts, x.detach().contiguous())
    parts[rank] = x
    return torch.cat(parts)


def sum_gradients(parameters, loss):
    """Sum loss and gradients over the processes, in one message; -> the loss of the whole batch."""
    if processes()[1] == 1:
        return loss.detach()
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    flat = torch.cat([p.grad.flatten() for p in parameters] + [loss.detach().view(1)])
    torch.distributed.all_reduce(flat)
    for p, total in zip(parameters, flat[:-1].split([p.numel() for p in parameters])):
        p.grad.copy_(total.view_as(p))
    return flat[-1]


def warmup_cosine(step, steps, warm=0, floor=0.0):
    """Factor of the learning rate: linear over `warm` steps, then a cosine from 1 to `floor`."""
    if step < warm:
        return (step + 1) / warm
    angle = np.pi * (step - warm) / max(1, steps - warm)
    return float(floor + (1 - floor) * (1 + np.cos(angle)) / 2)


def cli(main, argv=None):
    """Exit with main's status; a user's error is one sentence on stderr and status 2."""
    try:
        status = main(argv)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted: no record was written", file=sys.stderr)
        # as a shell has it: 128 + SIGINT
        status = 130
    sys.exit(status or 0)
