"""Time and memory of multist against the number of spots, on simulated slides: python tests/scale_multist.py [folder] (make scale).

Few epochs, the same at every size, all stages: what is compared is the time per spot. A size whose record exists is not run again.
Writes scale_multist.png and .json into the folder.
"""
import json
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SIZES = (3600, 18000, 100000)
SHORT = ["--epochs", "20", "--dec_epochs", "10", "--fusion_epochs", "1", "--n_init", "1", "--permutations", "20"]


def record(folder, n):
    """run.json of the slide with n spots, made where it is lacking."""
    found = sorted((folder / "multist" / f"n{n}").rglob("run.json"))
    if not found:
        if not (folder / f"n{n}").is_dir():
            subprocess.run([sys.executable, ROOT / "simulate.py", "cortex", folder / f"n{n}", "--n_spots", str(n), "--n_genes", "1000", "--n_slices", "1"],
                           check=True)
        subprocess.run([sys.executable, ROOT / "multist.py", "--data", folder / f"n{n}", "--slice", "sim1", "--runs", folder, *SHORT], check=True)
        found = sorted((folder / "multist" / f"n{n}").rglob("run.json"))
    return json.loads(found[0].read_text())


def main(folder):
    """Print the table, write the figure."""
    records = {n: record(folder, n) for n in SIZES}
    rows = {n: {"seconds": r["seconds"], "ms_per_spot": 1e3 * r["seconds"] / n, "peak_rss_mb": r["peak_rss_mb"], **r["laps"]} for n, r in records.items()}
    for n, row in rows.items():
        print(n, row)
    print("time per spot, largest to smallest slide:", round(rows[SIZES[-1]]["ms_per_spot"] / rows[SIZES[0]]["ms_per_spot"], 2))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for name in records[SIZES[0]]["laps"]:
        axes[0].loglog(SIZES, [records[n]["laps"][name] for n in SIZES], marker=".", lw=1, label=name)
    axes[0].loglog(SIZES, [records[n]["seconds"] for n in SIZES], marker="o", color="black", label="all")
    axes[0].loglog(SIZES, [records[SIZES[0]]["seconds"] * n / SIZES[0] for n in SIZES], ls=":", color="0.5", label="linear")
    axes[0].set(xlabel="spots", ylabel="seconds", title="short run, every stage")
    axes[0].legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes[1].loglog(SIZES, [records[n]["peak_rss_mb"] for n in SIZES], marker="o", color="black")
    axes[1].set(xlabel="spots", ylabel="peak memory, MB", ylim=(100, 20000))
    axes[1].axhline(8192, ls=":", color="crimson")
    figure.tight_layout()
    figure.savefig(folder / "scale_multist.png", dpi=110)
    (folder / "scale_multist.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/scale")
    target.mkdir(parents=True, exist_ok=True)
    main(target)
