"""Fixtures shared by all tests, one thread for each test process, and the tests in random order."""

import json
import os
import random
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

# before torch is imported; the processes that tests start inherit it
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import threadpoolctl
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
# a plugin may have loaded numpy before the line above
threadpoolctl.threadpool_limits(1)

from plainst import run, simulate  # noqa: E402 - the path is set above
from plainst.readers.checked import DataError  # noqa: E402


def in_processes(module, script, runs):
    """What a script prints in each of `runs`, [(number of processes, arguments)]; it uses
    `module`, which is loaded once for all."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "processes.py"), module, str(script)]
        + [json.dumps([[n, list(map(str, words))] for n, words in runs])],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def without_idle_flags(module, words):
    """Words of a command of a method, but for the flags that do nothing beside the others: for
    short settings that are appended to any command."""
    words = [str(word) for word in words]
    while True:
        try:
            module.check(run.parse(module.Config, words))
        except DataError as error:
            idle = re.match(r"--(\w+) has no effect", str(error))
            if not idle:
                return words
            first = next(i for i, w in enumerate(words) if re.fullmatch(f"--(no-)?{idle[1]}", w))
            has_value = first + 1 < len(words) and not words[first + 1].startswith("--")
            words = words[:first] + words[first + 1 + has_value :]
        else:
            return words


def status_of(script, *words):
    """Exit status of a script that is run as a program, in this process."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", [str(script), *map(str, words)])
        runpy.run_path(str(script), run_name="__main__")
    return stop.value.code


def exit_status(main, command):
    """Exit status of a script's `main`; command: the text that is typed behind its name."""
    with pytest.raises(SystemExit) as stop:
        run.cli(main, shlex.split(command))
    return stop.value.code


def printed_record(text):
    """The record whose path is the last line of what a run printed."""
    return json.loads(Path(text.strip().splitlines()[-1]).read_text())


def pytest_addoption(parser):
    parser.addoption(
        "--shuffle", type=int, metavar="SEED", help="files, and the tests in each, in random order"
    )


def pytest_collection_modifyitems(config, items):
    """With --shuffle: the order of the seed; tests of a file stay together, as its module fixtures
    do."""
    seed = config.getoption("--shuffle")
    if seed is None:
        return
    rng = random.Random(seed)
    files = list(dict.fromkeys(item.path for item in items))
    rng.shuffle(files)
    place = {path: i for i, path in enumerate(files)}
    rng.shuffle(items)
    items.sort(key=lambda item: place[item.path])


@pytest.fixture(autouse=True)
def one_thread():
    """A test that asks for more threads leaves none behind."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data():
    """Folder of real data: $PLAINST_DATA, else ../shared/data beside the checkout; the test is
    skipped where neither exists."""
    folder = Path(os.environ.get("PLAINST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist (set PLAINST_DATA)")
    return folder


@pytest.fixture(scope="session")
def cortex(tmp_path_factory):
    """Three simulated slices as Space Ranger folders: s1 and s2 of one donor, s3 of another."""
    root = tmp_path_factory.mktemp("cortex") / "sim"
    for i, donor in ((1, "A"), (2, "A"), (3, "B")):
        names = {"sample": f"s{i}", "donor": donor, "donor_seed": ord(donor)}
        slide = simulate.simulate_cortex(400, 300, 5, seed=i, **names)
        simulate.write_visium(slide, root / f"s{i}")
    return root
