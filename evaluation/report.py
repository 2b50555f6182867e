"""runs/ -> the comparison: tables (Markdown and one self-contained HTML page) and figures. Reads
run records only, never a model.

    python -m evaluation.report --runs runs [--data dlpfc] [--out runs/report]

Every cell is the median over the runs of that row (folds and seeds) with their minimum and maximum,
and says how many of them are undefined; nothing is a best of anything. A row holds runs of one
preset, and baselines of one choice of the settings that change them. Four kinds of table:
supervised layers by split (`split` and `ari` in the record), unsupervised domains (no split, an
`ari` and baselines), genes from H&E by split (`pcc_mean`), and single cells.
"""

import argparse
import base64
import html
import re
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from evaluation import figures
from evaluation.records import (
    BASELINES,
    DOMAINS,
    SHOWN_CELLS,
    Row,
    cell_entry,
    domain_entry,
    gene_entry,
    is_undefined,
    layer_entry,
    read_runs,
    rows_of,
    scores_of,
    split_name,
    trains_nothing,
)
from plainst.readers.checked import DataError
from plainst.run import cli, write_atomically

# README of the released system (gcn_only: its RESULTS.md): mean +- std over 12 slices, all genes,
# one seed, random split. Shown for context.
PUBLISHED = {
    "full-cross": ".928 +- .022",
    "full-gated": ".920 +- .027",
    "concat": ".917 +- .026",
    "gat_only": ".919 +- .029",
    "gcn_only": ".922 +- .027",
    "expr_only": ".356 +- .068",
    "multimodal-cross": ".928 +- .023",
}
# {method: {slice: ARI}}, as its paper prints it
PUBLISHED_DOMAINS = {"multist": {"151673": ".620"}}
# {method and flags: mean PCC}, arXiv 2506.08854, not comparable
PUBLISHED_GENES = {"cmrcnet": ".3117", "cmrcnet reconstruction-none": ".2933"}
SHOWN = ("nmi", "accuracy", "top2", "interior_accuracy", "boundary_accuracy", "log_loss")
SHOWN += ("macro_f1", "kappa_quadratic")
SHOWN_DOMAINS = ("ami", "completeness", "homogeneity")
SHOWN_GENES = ("pcc_pooled", "variance_ratio_median", "slide_mean_rmse")
PANELS_CELLS = {
    "cond_pcc_other_area": ("PCC of mean pixels, other nuclei", "ridge_context"),
    "impute_pcc_mean": ("imputation, mean PCC over genes", "ridge_all"),
    "image_to_genes_pcc_mean": ("image to genes, mean PCC over genes", "ridge_all"),
    # score: (axis, the baseline that is drawn as a dashed line)
    "annotation_macro_f1": ("annotation, macro-F1", "pca_both_niche"),
}
# what was published, where, and why it may not be compared
SOURCES = {
    "gat_fusion": "gat_fusion: published ARI from the README (gcn_only: RESULTS.md) of the "
    "released system, mean +- std over 12 slices, all genes, one seed, random split; comparable "
    "only on random spots of the 12 slices with all genes, and there position alone answers.",
    "multist": "multist: published ARI from arXiv 2601.13331; not comparable where the slice here "
    "holds a subset of the genes or the low-resolution image.",
    "stformer": "stformer: its source reports no score.",
    "cmrcnet": "cmrcnet: arXiv 2506.08854 reports a mean PCC of .2933 without and .3117 with "
    "reconstruction on its 50 most expressed genes; not comparable because its genes are chosen "
    "on the test slide, its folds share patients and its data sets are others.",
    "spatia": "spatia: arXiv 2507.04704 reports Frechet distances on other data, features and "
    "splits: not comparable.",
}
APART = (
    "[...]: rows of one name that must not be put into one, because these settings change them; "
    "data 1, 2, ...: the files of a slice or fold changed between runs (see `files` in run.json)."
)
TARGETS = {
    "gat_fusion": "make reproduce-dlpfc",
    "multist": "make reproduce-dlpfc",
    "stformer": "make reproduce-her2st",
    "cmrcnet": "make reproduce-her2st",
    "spatia": "make reproduce-ca1",
}
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:100rem;padding:0 1rem;"
    "color:#222}h2{margin-top:2.2rem;font-size:1.15rem}"
    ".wide{overflow-x:auto}table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}"
    "th,td{padding:.25rem .6rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}"
    "th{border-bottom:2px solid #888}"
    "td:first-child,th:first-child{text-align:left;position:sticky;left:0;background:#fff}"
    "tbody tr:hover td{background:#f4f6fa}"
    ".note{color:#555;font-size:13px}img{max-width:100%}"
)


@dataclass
class Table:
    """Title, column names, rows of text, notes below."""

    title: str
    columns: list
    rows: list = field(default_factory=list)
    notes: list = field(default_factory=list)


def gene_table(title, rows):
    """Table of predicted genes: mean PCC per slice or fold, its mean over them, medians of the
    other scores, runs."""
    parts = sorted({p for row in rows.values() for p in row})
    out = Table(
        title,
        [
            "method",
            *(f"PCC {p}" for p in parts),
            "mean of medians",
            *SHOWN_GENES,
            "runs",
            "published PCC",
        ],
    )
    for row in ordered(rows):
        every = [m for runs in rows[row].values() for m in runs]
        values = [scores_of(rows[row].get(p, []), "pcc_mean") for p in parts]
        # a mean over the slices that are defined would be one over easier slices
        is_whole = all(v and not any(map(is_undefined, v)) for v in values)
        mean = f"{statistics.mean(map(statistics.median, values)):.3f}" if is_whole else "-"
        published = PUBLISHED_GENES.get(re.sub(r" features-?", " ", row.name).strip(), "")
        out.rows.append(
            [
                str(row),
                *map(cell, values),
                mean,
                *spreads(every, SHOWN_GENES),
                str(len(every)),
                published,
            ]
        )
    return out


def cell(values):
    """`median (min-max)` of the values that are defined, and how many are not; a dash without
    any."""
    defined = [v for v in values if not is_undefined(v)]
    text = "-"
    if defined:
        text = f"{statistics.median(defined):.3f}"
    if len(defined) > 1:
        text += f" ({min(defined):.3f}-{max(defined):.3f})"
    n = len(values) - len(defined)
    return f"{text}, {n} of {len(values)} undefined" if n else text


def ordered(rows):
    """Baselines first, in the order of BASELINES, then the models by name."""
    place = {name: i for i, name in enumerate(BASELINES)}
    return sorted(rows, key=lambda r: (not r.is_baseline, place.get(r.name, len(place)), r))


def median_fact(runs, name):
    """The median of a fact of the runs as a whole number, a dash where no run has it."""
    values = scores_of(runs, name)
    return f"{statistics.median(values):,.0f}" if values else "-"


def spreads(runs, names):
    """The median of each named score over the runs that have it, with its spread."""
    return [cell(scores_of(runs, name)) for name in names]


def domain_table(rows):
    """Table of domains: ARI per slice, medians of the other scores, runs, published ARI."""
    slices = sorted({s for row in rows.values() for s in row})
    out = Table(
        DOMAINS, ["method", *(f"ARI {s}" for s in slices), *SHOWN_DOMAINS, "runs", "published ARI"]
    )
    for row in ordered(rows):
        every = [m for runs in rows[row].values() for m in runs]
        published = ", ".join(
            f"{s}: {ari}"
            for s, ari in PUBLISHED_DOMAINS.get(row.name.split()[0], {}).items()
            if s in slices
        )
        columns = [cell(scores_of(rows[row].get(s, []), "ari")) for s in slices]
        out.rows.append(
            [str(row), *columns, *spreads(every, SHOWN_DOMAINS), str(len(every)), published]
        )
    return out


def layer_table(split, leaks, rows):
    """Table of supervised layers on one split: ARI per slice, medians of the other scores, gain
    over the coordinates, runs, published ARI."""
    slices = sorted({s for row in rows.values() for s in row})
    out = Table(
        f"Split `{split}`" + (" - leaks position" if leaks else " - does not leak position"),
        [
            "model",
            *(f"ARI {s}" for s in slices),
            *SHOWN,
            "ARI gain over coords_knn",
            "parameters",
            "seconds",
            "runs",
            "published ARI",
        ],
    )
    is_dlpfc = all(re.fullmatch(r"151[56]\d\d", s) for s in slices)
    published = PUBLISHED if split == "random" and is_dlpfc else {}
    for row in ordered(rows):
        every = [m for runs in rows[row].values() for m in runs]
        columns = [cell(scores_of(rows[row].get(s, []), "ari")) for s in slices]
        out.rows.append(
            [
                str(row),
                *columns,
                *spreads(every, SHOWN),
                cell(scores_of(every, "gain_over_coords_knn")),
                median_fact(every, "n_params"),
                median_fact(every, "seconds"),
                str(len(every)),
                published.get(row.name, ""),
            ]
        )
    return out


def cell_table(title, rows):
    """Table of single cells: every score as median and spread over runs; a baseline has the scores
    of its own task."""
    out = Table(title, ["method", *SHOWN_CELLS, "runs"])
    for row in ordered(rows):
        every = [m for runs in rows[row].values() for m in runs]
        out.rows.append([str(row), *spreads(every, SHOWN_CELLS), str(len(every))])
    return out


def tables_of(records):
    """Every table of the records, data set by data set."""
    names = sorted({r["data"] for r in records})
    return [
        t
        for name in names
        for t in tables_of_data(
            [r for r in records if r["data"] == name], f" - {name}" if len(names) > 1 else ""
        )
    ]


def tables_of_data(records, suffix=""):
    """The tables of one data set; under each what was published, where, and why it may not be
    compared."""
    layers, domains, genes, cells = (
        sorted(rows_of(records, entry_of).items())
        for entry_of in (layer_entry, domain_entry, gene_entry, cell_entry)
    )
    groups = [
        *((layer_table(*group, rows), ["gat_fusion"]) for group, rows in layers),
        *((domain_table(rows), ["multist"]) for _, rows in domains),
        *((gene_table(title, rows), ["stformer", "cmrcnet"]) for title, rows in genes),
        *((cell_table(title, rows), ["spatia"]) for title, rows in cells),
    ]
    for table, methods in groups:
        names = " ".join(r[0] for r in table.rows)
        for method in methods:
            if method in ("stformer", "cmrcnet") and method not in names:
                table.rows.append([method, "missing", *[""] * (len(table.columns) - 2)])
            table.notes.append(SOURCES[method])
        if "[" in names:
            table.notes.append(APART)
        table.title += suffix
    return [table for table, _ in groups]


def footer(records):
    """What the numbers are and where they come from."""
    commits = sorted({short_commit(r.get("git_commit", "")) for r in records})
    commit = ", ".join(commits)
    if "+" in commit:
        commit += " (+: files that differ from the commit)"
    torches = sorted({r.get("versions", {}).get("torch", "unknown") for r in records})
    devices = sorted(
        {" on ".join(filter(None, (r.get("device"), r.get("processor")))) for r in records}
    )
    seconds = [r["seconds"] for r in records if "seconds" in r]
    memory = [r["peak_rss_mb"] for r in records if "peak_rss_mb" in r]
    return (
        f"Median (min-max) over folds and seeds; {len(records)} runs, commit {commit}, "
        f"torch {', '.join(torches)}, {', '.join(devices)}; run time median "
        f"{statistics.median(seconds or [0]):.0f} s, peak memory {max(memory or [0])} MB."
    )


def short_commit(commit):
    """Nine digits of a commit, with the `+` of a tree that differs from it."""
    return commit[:9] + "+" * commit.endswith("+")


def absent(records):
    """What a side-by-side reading would want and no record has: methods without a run, and rows
    that lack a seed, slice or fold that others have."""
    out = [
        f"{m} has no run here ({target})"
        for m, target in TARGETS.items()
        if m not in {r["method"] for r in records}
    ]
    # {(method, data, split): {variant: {(slice or fold, seed)}}}
    groups = defaultdict(lambda: defaultdict(set))
    for r in records:
        if trains_nothing(r):
            continue
        split, config = split_name(r), r["config"]
        row = str(Row(r["row"] or r["method"], r["preset"]))
        run = (r["part"], config.get("fold"), config.get("seed"))
        groups[r["method"], r["data"], split][row].add(run)
    for (method, data, split), variants in groups.items():
        every = set().union(*variants.values())
        short = [
            f"{name} {len(every) - len(found)}" for name, found in variants.items() if found < every
        ]
        if short:
            out.append(
                f"{method} on {data}{f', split {split}' if split else ''}: of {len(every)} slices, "
                f"folds and seeds these rows lack {', '.join(short)}"
            )
    return out


def markdown(records):
    """The tables as one Markdown text."""
    out = []
    for t in tables_of(records):
        out += [
            "",
            f"### {t.title}",
            "",
            "| " + " | ".join(t.columns) + " |",
            "|---" * len(t.columns) + "|",
            *("| " + " | ".join(r) + " |" for r in t.rows),
        ]
        out += ["", *t.notes]
    return (
        "\n".join(
            [*out, "", *(f"Missing: {line}." for line in absent(records)), "", footer(records)]
        ).strip()
        + "\n"
    )


def page(records, pictures):
    """The tables and pictures {title: PNG bytes} as one HTML page that needs no other file."""
    body = []
    for t in tables_of(records):
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in r) + "</tr>" for r in t.rows
        )
        head = "".join(f"<th>{html.escape(c)}</th>" for c in t.columns)
        notes = "".join(f"<p class=note>{html.escape(n)}</p>" for n in t.notes)
        body.append(
            f"<h2>{html.escape(t.title)}</h2><div class=wide><table><thead><tr>{head}</tr></thead>"
            f"<tbody>{rows}</tbody></table></div>{notes}"
        )
    if absent(records):
        body.append(
            "<h2>Missing</h2><ul>"
            + "".join(f"<li>{html.escape(line)}</li>" for line in absent(records))
            + "</ul>"
        )
    for title, png in pictures.items():
        body.append(
            f'<h2>{html.escape(title)}</h2><img alt="{html.escape(title)}" '
            f'src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8>"
        f"<meta name=viewport content='width=device-width'><title>plainst: side by side</title>"
        f"<style>{STYLE}</style><h1>Side by side</h1>"
        f"<p class=note>{html.escape(footer(records))}</p>" + "".join(body) + "</html>\n"
    )


def panel(title, axis, rows, score, floor):
    """The panel of one table: `score` of every run, and the median of the baseline `floor` where
    all its runs are comparable; a row says how many of its scores are undefined."""
    dots, of_floor = {}, []
    for row in ordered(rows):
        scores = {part: scores_of(runs, score) for part, runs in rows[row].items()}
        every = [v for values in scores.values() for v in values]
        n = sum(map(is_undefined, every))
        label = f"{row}, {n} undefined" if n else str(row)
        dots[label] = {
            part: [v for v in values if not is_undefined(v)] for part, values in scores.items()
        }
        if row.is_baseline and row.name == floor:
            of_floor.append(every)
    # several choices of settings, or a score that is undefined: no one line to beat
    is_one = len(of_floor) == 1 and of_floor[0] and not any(map(is_undefined, of_floor[0]))
    return figures.Panel(title, axis, dots, statistics.median(of_floor[0]) if is_one else None)


def panels_of(records):
    """The panels of the figure of scores, in the order of the tables."""
    panels = []
    for (split, leaks), rows in sorted(rows_of(records, layer_entry).items()):
        title = f"{split} ({'leaks position' if leaks else 'no position leak'})"
        panels.append(panel(title, "ARI on test spots", rows, "ari", "coords_knn"))
    for title, rows in rows_of(records, domain_entry).items():
        panels.append(panel(title, "ARI on labelled spots", rows, "ari", "neighbour_mean_gmm"))
    for title, rows in sorted(rows_of(records, gene_entry).items()):
        title = title.replace("`", "")
        panels.append(panel(title, "mean PCC over genes", rows, "pcc_mean", "ridge_raw"))
    for data in sorted({r["data"] for r in records}):
        for title, rows in rows_of([r for r in records if r["data"] == data], cell_entry).items():
            title = f"{title.replace('`', '')}, {data}"
            runs = {name: [m for p in parts.values() for m in p] for name, parts in rows.items()}
            for score, (axis, floor) in PANELS_CELLS.items():
                scored = {
                    name: {data: metrics}
                    for name, metrics in runs.items()
                    if scores_of(metrics, score)
                }
                if scored:
                    panels.append(panel(title, axis, scored, score, floor))
    return panels


def main(argv=None):
    """Print the tables; write <out>.md, <out>.html, <out>.png and, where runs hold labels,
    <out>_maps.png."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.report",
        description=" ".join(__doc__.split("\n\n")[0].split()),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--runs", default="runs", help="folder of the run records")
    parser.add_argument("--data", default="", help="only the records of this data set, e.g. dlpfc")
    parser.add_argument(
        "--out", default="", help="where to write, without ending; empty: <runs>/report"
    )
    flags = parser.parse_args(argv)
    records = [r for r in read_runs(flags.runs) if flags.data in ("", r["data"])]
    if not tables_of(records):
        raise DataError(
            f"{flags.runs} holds no scored run of {flags.data or 'any data set'}: check --data"
        )
    out, text = Path(flags.out or Path(flags.runs) / "report"), markdown(records)
    maps = figures.layer_maps(records)
    pictures = {"Scores, one dot a run": figures.png_of(figures.draw_scores(panels_of(records)))}
    if maps:
        pictures["Tissue maps, first seed"] = figures.png_of(figures.draw_maps(maps))
    files = {
        ".md": text.encode(),
        ".html": page(records, pictures).encode(),
        **dict(zip((".png", "_maps.png"), pictures.values())),
    }
    for ending, content in files.items():
        place = out.with_name(out.name + ending)
        write_atomically(place, lambda f, content=content: f.write(content), "--out")
    print(text)
    print(out.with_name(out.name + ".html"))
    return 0


if __name__ == "__main__":
    cli(main)
