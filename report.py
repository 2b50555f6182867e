"""runs/ -> the comparison table (Markdown) and its figure. Reads run records only, never a model.

    python report.py --runs runs [--data dlpfc] [--out runs/report]

Every cell is the median over the runs of that row (folds and seeds) with their minimum and maximum; nothing is a best of anything.
Three kinds of table: supervised layers by split (`split` and `ari` in the record), unsupervised domains (no split, an `ari` and baselines), and
genes from H&E by split (`pcc_mean`).
"""
import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from data import DataError  # noqa: E402
from run import cli, write_atomically  # noqa: E402

# Seed-time README of the released system: mean +- std over 12 slices, all genes, one seed, random split. Shown for context.
PUBLISHED = {"full-cross": ".928 +- .022", "full-gated": ".920 +- .027", "concat": ".917 +- .026", "gat_only": ".919 +- .029", "gcn_only": ".922 +- .027",
             "expr_only": ".356 +- .068", "multimodal-cross": ".928 +- .023"}
PUBLISHED_DOMAINS = {"multist": {"151673": ".620"}}                      # {method: {slice: ARI}}, as its paper prints it
SHOWN = ("accuracy", "macro_f1", "kappa_quadratic", "log_loss", "boundary_accuracy")
SHOWN_DOMAINS = ("ami", "completeness", "homogeneity")
SHOWN_GENES = ("pcc_pooled", "variance_ratio_median", "slide_mean_rmse")
BASELINES = ("majority", "coords_knn", "coords_rbf", "expr_lr", "smoothed_lr", "pca_gmm", "neighbour_mean_gmm")
DOMAINS = "domains (unsupervised)"


def read_runs(folder):
    """List of run records below `folder`. Raises DataError if there is none or one is not readable."""
    records = []
    for path in sorted(Path(folder).rglob("run.json")):
        try:
            record = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise DataError(f"{path} is not a run record ({error}): delete it and run again") from error
        parts = path.absolute().parts[-6:-2]                            # <method>/<data>/<slice>/<variant>/seed<k>/run.json, wherever `folder` begins
        if len(parts) < 4 or not isinstance(record, dict) or "method" not in record:
            raise DataError(f"{path} is not a run record of this project: move it out of {folder}")
        records.append(record | dict(zip(("data", "part", "variant"), parts[1:])))
    if not records:
        raise DataError(f"{folder} holds no run record (run.json): run a method first, for example make demo")
    return records


def row_name(record):
    """The variant without what the config says of its split: slices' names may hold hyphens, so the prefix is known, not searched for."""
    config = record.get("config", {})
    named = {"blocks": f"blocks{config.get('fold', 0)}", "slice": None, "donor": None}.get(record["split"]["name"], record["split"]["name"])
    return record["variant"].removeprefix((named or f"{record['split']['name']}-{config.get('train') or 'all'}".replace(",", "+")) + "-")


def rows_of(records):
    """{(split, leaks): {row name: {slice: [metrics of every run]}}}, the baselines as rows of their own, once per split, slice and inputs."""
    table, seen = defaultdict(lambda: defaultdict(lambda: defaultdict(list))), set()
    for r in records:
        if r["split"] is None or "ari" not in r["metrics"]:
            continue
        group, config = (r["split"]["name"], r["split"]["leaks_position"]), r.get("config", {})
        inputs = (*(config.get(k) for k in ("scale", "hvg", "n_top_genes", "labels")), r.get("library", config.get("library")))
        for baseline, values in r["baselines"].items():
            key = (group, r["data"], r["part"], r["split"]["detail"], inputs, baseline)
            if key not in seen:                                        # the same numbers stand in every run of this split on these inputs
                seen.add(key)
                table[group][baseline][r["part"]].append(values)
        name = row_name(r)
        if name not in BASELINES:
            table[group][name][r["part"]].append(r["metrics"])
    return table


def domain_rows(records):
    """{row name: {slice: [metrics of every run]}} of the unsupervised records: `<method> <variant>`, and each baseline once per slice and seed."""
    table, seen = defaultdict(lambda: defaultdict(list)), set()
    for r in records:
        if r["split"] is not None or "ari" not in r["metrics"] or not r["baselines"]:    # a prediction from a checkpoint has no baselines
            continue
        for baseline, values in r["baselines"].items():
            key = (r["data"], r["part"], r.get("config", {}).get("seed"), baseline, json.dumps(values, sort_keys=True))
            if key not in seen:
                seen.add(key)
                table[baseline][r["part"]].append(values)
        table[f"{r['method']} {r['variant']}"][r["part"]].append(r["metrics"])
    return table


def gene_rows(records):
    """{title: {row name: {slice or fold: [metrics of every run]}}} of the runs that predict genes, each baseline once per seed and value."""
    table, seen = defaultdict(lambda: defaultdict(lambda: defaultdict(list))), set()
    for r in records:
        if r["split"] is None or "pcc_mean" not in r["metrics"]:
            continue
        split = r["split"]["name"]
        title = f"genes from H&E, split `{split}`" + (" - leaks the patient" if r.get("leaks_patient") else " - patients held out")
        for baseline, values in r["baselines"].items():
            key = (title, r["data"], r["part"], baseline, json.dumps(values, sort_keys=True))
            if key not in seen:
                seen.add(key)
                table[title][baseline][r["part"]].append(values)
        table[title][f"{r['method']} {r['variant'].removeprefix(split + '-')}"][r["part"]].append(r["metrics"])
    return table


def gene_table(title, rows):
    """Lines of one table of predicted genes: mean PCC per slice or fold, its mean over them, medians of the other scores, runs."""
    parts = sorted({p for row in rows.values() for p in row})
    out = [f"\n### {title}", "", "| method | " + " | ".join(f"PCC {p}" for p in parts) + " | mean of medians | " + " | ".join(SHOWN_GENES) + " | runs |",
           "|---" * (len(parts) + len(SHOWN_GENES) + 3) + "|"]
    for name in sorted(rows, key=lambda n: (" " in n, n)):              # baselines have no space in their names
        every = [m for runs in rows[name].values() for m in runs]
        values = [[m["pcc_mean"] for m in rows[name].get(p, []) if m.get("pcc_mean") is not None] for p in parts]
        mean = f"{statistics.mean(statistics.median(v) for v in values):.3f}" if all(values) else "-"
        out.append(f"| {name} | " + " | ".join([*map(cell, values), mean, *medians(every, SHOWN_GENES), str(len(every))]) + " |")
    return out


def cell(values):
    """`median (min-max)` of the numbers that are there, or a dash."""
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    return f"{statistics.median(values):.3f}" + (f" ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 else "")


def ordered(rows):
    """Baselines first, then the models by name."""
    return sorted(rows, key=lambda name: (BASELINES.index(name) if name in BASELINES else len(BASELINES), name))


def medians(runs, names):
    """The median of each named score over the runs that have it, as text."""
    known = {k: [m[k] for m in runs if m.get(k) is not None] for k in names}
    return [f"{statistics.median(known[k]):.3f}" if known[k] else "-" for k in names]


def domain_table(rows):
    """Lines of the unsupervised table: ARI per slice, medians of the other scores, runs, published ARI."""
    slices = sorted({s for row in rows.values() for s in row})
    out = [f"\n### {DOMAINS}", "", "| method | " + " | ".join(f"ARI {s}" for s in slices) + " | " + " | ".join(SHOWN_DOMAINS) + " | runs | published ARI |",
           "|---" * (len(slices) + len(SHOWN_DOMAINS) + 3) + "|"]
    for name in ordered(rows):
        every = [m for runs in rows[name].values() for m in runs]
        published = ", ".join(f"{s}: {ari}" for s, ari in PUBLISHED_DOMAINS.get(name.split()[0], {}).items() if s in slices)
        columns = [cell([m.get("ari") for m in rows[name].get(s, [])]) for s in slices]
        out.append(f"| {name} | " + " | ".join([*columns, *medians(every, SHOWN_DOMAINS), str(len(every)), published]) + " |")
    return out


def markdown(records):
    """The tables as one Markdown text: per split, rows = baselines and models, columns = ARI per slice, then other scores over all slices."""
    out = []
    for (split, leaks), rows in sorted(rows_of(records).items()):
        slices = sorted({s for row in rows.values() for s in row})
        out += [f"\n### Split `{split}`" + (" - leaks position" if leaks else " - does not leak position"), "",
                "| model | " + " | ".join(f"ARI {s}" for s in slices) + " | " + " | ".join(SHOWN) + " | ARI gain over coords_knn | runs | published ARI |",
                "|---" * (len(slices) + len(SHOWN) + 4) + "|"]
        for name in ordered(rows):
            every = [m for runs in rows[name].values() for m in runs]
            columns = [cell([m["ari"] for m in rows[name].get(s, [])]) for s in slices] + medians(every, SHOWN)
            published = PUBLISHED.get(name, "") if split == "random" else ""
            out.append(f"| {name} | " + " | ".join([*columns, cell([m.get("gain_over_coords_knn") for m in every]), str(len(every)), published]) + " |")
    if domain_rows(records):
        out += domain_table(domain_rows(records))
    for title, rows in sorted(gene_rows(records).items()):
        out += gene_table(title, rows)
    first = records[0]
    commits = sorted({r["git_commit"][:9] for r in records})
    out += ["", f"Median (min-max) over folds and seeds; {len(records)} runs, commit {', '.join(commits)}, torch {first['versions']['torch']}, "
            f"{first['device']}; run time median {statistics.median(r['seconds'] for r in records):.0f} s, "
            f"peak memory {max(r['peak_rss_mb'] for r in records)} MB. "
            "Published, random split: 12 slices, all genes, one seed; not the same genes as here unless all genes were downloaded."]
    return "\n".join(out).strip() + "\n"


def draw(records):
    """Dots of ARI: one panel per split and one of the domains, one line per row, one dot per run; dashed: the median of the baseline to beat."""
    tables = [((f"{split} ({'leaks position' if leaks else 'no position leak'})", "ARI on test spots", "coords_knn"), rows)
              for (split, leaks), rows in sorted(rows_of(records).items())]
    if domain_rows(records):
        tables.append(((DOMAINS, "ARI on labelled spots", "neighbour_mean_gmm"), domain_rows(records)))
    tables += [((title.replace("`", ""), "mean PCC over genes", "ridge_raw"), rows) for title, rows in sorted(gene_rows(records).items())]
    figure, axes = plt.subplots(1, len(tables), figsize=(5.2 * len(tables), 1.2 + 0.32 * max(len(rows) for _, rows in tables)), squeeze=False)
    colour = {s: plt.get_cmap("tab10")(i % 10) for i, s in enumerate(sorted({s for _, rows in tables for row in rows.values() for s in row}))}
    legend = {}
    for axis, ((title, label, floor_name), rows) in zip(axes[0], tables):
        names = ordered(rows)[::-1]
        for y, name in enumerate(names):
            for s, runs in rows[name].items():
                dots = [v for v in (m.get("ari", m.get("pcc_mean")) for m in runs) if v is not None]
                legend[s] = axis.scatter(dots, [y] * len(dots), s=22, alpha=0.75, color=colour[s], linewidths=0)
        floor = [v for runs in rows.get(floor_name, {}).values() for v in (m.get("ari", m.get("pcc_mean")) for m in runs) if v is not None]
        if floor:
            axis.axvline(statistics.median(floor), ls="--", color="0.5", lw=1)
        axis.set(yticks=range(len(names)), yticklabels=names, xlabel=label, xlim=(-0.1, 1.02))
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", color="0.92")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.legend([legend[s] for s in sorted(legend)], sorted(legend), loc="lower center", ncols=6, fontsize=8, frameon=False)
    return figure


def main(argv=None):
    """Print the table, write <out>.md and <out>.png."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--runs", default="runs", help="folder of the run records")
    parser.add_argument("--data", default="", help="only the records of this data set, e.g. dlpfc")
    parser.add_argument("--out", default="", help="where to write, without ending; empty: <runs>/report")
    flags = parser.parse_args(argv)
    records = [r for r in read_runs(flags.runs) if flags.data in ("", r["data"])]
    if not rows_of(records) and not domain_rows(records) and not gene_rows(records):
        raise DataError(f"{flags.runs} holds no scored run of {flags.data or 'any data set'}: check --data")
    out, text = Path(flags.out or Path(flags.runs) / "report"), markdown(records)
    try:
        write_atomically(out.with_suffix(".md"), lambda f: f.write(text.encode()))
        write_atomically(out.with_suffix(".png"), lambda f: draw(records).savefig(f, dpi=120, format="png"))
    except OSError as error:
        raise DataError(f"cannot write {out}.md ({error.strerror}): choose another place with --out") from error
    print(text)
    print(out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    cli(main)
