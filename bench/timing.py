"""Seconds and memory of calls that take turns, and the tables of what was measured."""

import ctypes
import gc
import statistics
import time
from pathlib import Path

import numpy as np
import torch


def timed(function, threads):
    """Seconds and result of one call. What scanpy loads changes the number of threads behind
    torch's back: it is set anew."""
    torch.set_num_threads(threads)
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def memory_added(function):
    """Result of a call and the MB of resident memory it adds at its highest; nan where the kernel
    does not tell (not Linux)."""

    def status(field):
        return (
            next(
                int(line.split()[1])
                for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith(field)
            )
            / 2**10
        )

    gc.collect()
    # freed memory goes back, or the next call would reuse it unseen
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
    try:
        # VmHWM starts again from what is resident now
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
    except OSError:
        return function(), float("nan")
    result = function()
    return result, status("VmHWM") - before


def compare(case, functions, options, difference=None, target=None, note=""):
    """functions {name: call}, ours first -> one row per peer. difference(ours, peer) of results
    should be small; target is the ratio to reach."""
    (mine, _), *others = functions.items()
    results, memory, seconds = {}, {}, {name: [] for name in functions}
    for name, call in functions.items():
        torch.set_num_threads(options.threads)
        results[name], memory[name] = memory_added(call)
    apart = {
        name: None if difference is None else float(difference(results[mine], results[name]))
        for name, _ in others
    }
    results.clear()
    for turn in range(options.repeats):
        for name in list(functions)[:: 1 if turn % 2 else -1]:
            seconds[name].append(timed(functions[name], options.threads)[0])
    half = {name: statistics.median(s) for name, s in seconds.items()}
    common = {
        "case": case,
        "ours": mine,
        "ours_s": half[mine],
        "ours_mb": memory[mine],
        "repeats": options.repeats,
        "note": note,
    }
    return shown(
        [
            common
            | {
                "peer": name,
                "peer_s": half[name],
                "peer_mb": memory[name],
                "difference": apart[name],
                "target": target,
                "ratio": statistics.median(p / o for o, p in zip(seconds[mine], seconds[name])),
            }
            for name, _ in others
        ]
    )


def shown(rows):
    """Print rows and return them."""
    for row in rows:
        print("  " + " | ".join(cells(row)), flush=True)
    return rows


HEAD = ("case", "ours", "s", "MB", "peer", "s", "MB", "times faster", "difference", "note")


def cells(row):
    """The words of one row of the table."""

    def number(name, form):
        return "" if row.get(name) is None or np.isnan(row[name]) else format(row[name], form)

    ratio = number("ratio", ".2f")
    if ratio and row.get("target"):
        ratio += f" (target {row['target']:g}{'' if row['ratio'] >= row['target'] else ', missed'})"
    return [
        row["case"],
        row.get("ours", ""),
        number("ours_s", ".4g"),
        number("ours_mb", ".0f"),
        row.get("peer", ""),
        number("peer_s", ".4g"),
        number("peer_mb", ".0f"),
        ratio,
        number("difference", ".1e"),
        row.get("note", ""),
    ]


def markdown(records):
    """The tables of all parts."""
    out = [
        "# Speed beside the peers",
        "",
        "Written by bench/speed.py. Above 1 ours is faster. Compare ratios, not seconds.",
    ]
    for name, r in records.items():
        rows = [HEAD, ["---"] * len(HEAD), *(cells(row) for row in r["rows"])]
        out += [
            "",
            f"## {name}",
            "",
            f"{r['threads']} threads, {r['processors']} processors, load average "
            f"{r['load_before']:.1f} before and "
            f"{r['load_after']:.1f} after; torch {r['versions']['torch']}; "
            f"{r['date']}{', quick' if r['quick'] else ''}",
            "",
        ]
        out += ["| " + " | ".join(words) + " |" for words in rows]
    return "\n".join([*out, ""])
