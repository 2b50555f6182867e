"""Run a script alone and in several processes that torchrun's variables join, in copies of one
process that has loaded the libraries: python tests/processes.py MODULE SCRIPT '[[N, [ARGUMENT]]]'.

The last line printed is JSON: what each run printed. Exit status 1 where a process failed. torchrun
itself is started by test_two_processes_write_one_record.
"""

import importlib
import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
SECONDS = 200  # after which the system ends a process that waits for another


def copy_of_this(script, words, out, joined):
    """Process id of a copy that runs the script with its output in the file `out`."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    status = 1
    try:
        signal.alarm(SECONDS)
        os.dup2(out.fileno(), 1)
        os.environ.update(joined)
        sys.argv = [script, *words]
        runpy.run_path(script, run_name="__main__")
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status if isinstance(status, int) else 1)


def run(script, n, words):
    """What n processes print; ends with status 1 where one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {
            "WORLD_SIZE": str(n),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
        }
    with tempfile.TemporaryFile() as out:
        processes = [
            copy_of_this(
                script, words, out, group | {"RANK": str(i), "LOCAL_RANK": str(i)} if n > 1 else {}
            )
            for i in range(n)
        ]
        statuses = [os.waitpid(pid, 0)[1] for pid in processes]  # wait for all of them
        if any(statuses):
            sys.exit(1)
        out.seek(0)
        return out.read().decode()


if __name__ == "__main__":
    module, script, runs = sys.argv[1:]
    importlib.import_module(module)
    print(json.dumps([run(script, n, words) for n, words in json.loads(runs)]))
