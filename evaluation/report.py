"""runs/ -> the comparison: tables (Markdown and one self-contained HTML page) and figures. Reads
run records only, never a model.

    python -m evaluation.report --runs runs [--data dlpfc] [--out runs/report]

Every cell is the median over the runs of that row (folds and seeds) with their minimum and maximum;
nothing is a best of anything. Four kinds of table: supervised layers by split (`split` and `ari` in
the record), unsupervised domains (no split, an `ari` and baselines), genes from H&E by split
(`pcc_mean`), and single cells.
"""

import argparse
import base64
import html
import json
import re
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from evaluation import figures
from plainst.readers.checked import JSON_ERRORS, DataError
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
SHOWN = ("accuracy", "macro_f1", "kappa_quadratic", "log_loss", "boundary_accuracy")
SHOWN_DOMAINS = ("ami", "completeness", "homogeneity")
SHOWN_GENES = ("pcc_pooled", "variance_ratio_median", "slide_mean_rmse")
SHOWN_CELLS = (
    "cond_pcc_own_area",
    "cond_pcc_other_area",
    "cond_pcc_near_density",
    "fd_generated",
    "impute_pcc_mean",
    "image_to_genes_pcc_mean",
    "annotation_macro_f1",
)
PANELS_CELLS = {
    "cond_pcc_other_area": ("PCC of mean pixels, other nuclei", "ridge"),
    "impute_pcc_mean": ("imputation, mean PCC over genes", "ridge_context"),
    "image_to_genes_pcc_mean": ("image to genes, mean PCC over genes", "ridge_features_context"),
    # score: (axis, the baseline that is drawn as a dashed line)
    "annotation_macro_f1": ("annotation, macro-F1", "pca_both"),
}
BASELINES = (
    "majority",
    "coords_knn",
    "coords_rbf",
    "expr_lr",
    "smoothed_lr",
    "pca_gmm",
    "neighbour_mean_gmm",
)
DOMAINS = "domains (unsupervised)"
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


def read_runs(folder):
    """List of run records below `folder`, without those of `make demo`, `honest` and `scale`.
    Raises DataError if there is none or one is unreadable."""
    records = []
    for path in sorted(Path(folder).rglob("run.json")):
        if path.relative_to(folder).parts[0] in ("demo", "honest", "scale"):
            continue
        try:
            record = json.loads(path.read_text())
        except JSON_ERRORS as error:
            raise DataError(
                f"{path} is not a run record ({error}): delete it and run again"
            ) from error
        # <method>/<data>/<slice>/<variant>/seed<k>/run.json, wherever `folder` begins
        parts = path.absolute().parts[-6:-2]
        if len(parts) < 4 or not isinstance(record, dict) or "method" not in record:
            raise DataError(f"{path} is not a run record of this project: move it out of {folder}")
        records.append(record | dict(zip(("data", "part", "variant"), parts[1:])) | {"path": path})
    if not records:
        raise DataError(
            f"{folder} holds no run record (run.json): run a method first, for example make demo"
        )
    return records


def row_name(record):
    """The variant without what the config says of its split: slices' names may hold hyphens, so the
    prefix is known, not searched for."""
    config = record.get("config", {})
    named = {"blocks": f"blocks{config.get('fold', 0)}", "slice": None, "donor": None}.get(
        record["split"]["name"], record["split"]["name"]
    )
    return record["variant"].removeprefix(
        (named or f"{record['split']['name']}-{config.get('train') or 'all'}".replace(",", "+"))
        + "-"
    )


@dataclass
class Entry:
    """Where a run stands: in the table `group`, on the line `row` (None: its baselines only).

    baselines {name: scores} are lines of their own; a baseline that stands in the records of
    several runs counts once, where `inputs` are the same and, with `by_value`, its scores too.
    """

    group: object
    row: str | None
    baselines: dict
    inputs: tuple = ()
    by_value: bool = True


def rows_of(records, entry_of):
    """{group: {row: {slice or fold: [scores of every run]}}} of the records of which `entry_of`
    makes an Entry, not None."""
    table, seen = defaultdict(lambda: defaultdict(lambda: defaultdict(list))), set()
    for r in records:
        entry = entry_of(r)
        if entry is None:
            continue
        for baseline, scores in entry.baselines.items():
            value = json.dumps(scores, sort_keys=True) if entry.by_value else ""
            key = (entry.group, r["data"], r["part"], entry.inputs, baseline, value)
            if key not in seen:
                seen.add(key)
                table[entry.group][baseline][r["part"]].append(scores)
        if entry.row is not None:
            table[entry.group][entry.row][r["part"]].append(r["metrics"])
    return table


def layer_entry(record):
    """The Entry of a run that predicts labels of held-out spots; its group is (split, leaks)."""
    split, config = record["split"], record.get("config", {})
    if split is None or "ari" not in record["metrics"]:
        return None
    flags = [config.get(name) for name in ("scale", "hvg", "n_top_genes", "labels")]
    inputs = (split["detail"], *flags, record.get("library", config.get("library")))
    name = row_name(record)
    return Entry(
        (split["name"], split["leaks_position"]),
        # a run of a baseline alone: its scores stand among the baselines already
        None if name in BASELINES else name,
        record["baselines"],
        inputs,
        by_value=False,
    )


def domain_entry(record):
    """The Entry of an unsupervised run."""
    # a prediction from a checkpoint has no baselines
    if record["split"] is not None or "ari" not in record["metrics"] or not record["baselines"]:
        return None
    name = f"{record['method']} {record['variant']}"
    return Entry(DOMAINS, name, record["baselines"], (record.get("config", {}).get("seed"),))


def gene_entry(record):
    """The Entry of a run that predicts genes from H&E."""
    if record["split"] is None or "pcc_mean" not in record["metrics"]:
        return None
    split, config = record["split"]["name"], record.get("config", {})
    leaks = "leaks the patient" if record.get("leaks_patient") else "patients held out"
    # the baselines of a control saw the wrong pairs too
    is_control = config.get("permute_pairs") or config.get("shuffle_pairs")
    name = f"{record['method']} {record['variant'].removeprefix(split + '-')}"
    baselines = {} if is_control else record["baselines"]
    return Entry(f"genes from H&E, split `{split}` - {leaks}", name, baselines)


def cell_entry(record):
    """The Entry of a run on single cells. A baseline's distance to the real pictures stands in the
    column of the generated ones, and the distance of two halves of the real ones is a row."""
    if not any(name in record["metrics"] for name in SHOWN_CELLS):
        return None
    split, title = record["split"] or {}, "single cells"
    if split:
        title += f", split `{split['name']}`"
        title += " - leaks position" if split.get("leaks_position") else ""
    baselines = {
        name: {"fd_generated": scores.get(f"fd_{name}")} | scores
        for name, scores in record["baselines"].items()
    }
    if "fd_floor" in record["metrics"]:
        baselines["real_against_real"] = {"fd_generated": record["metrics"]["fd_floor"]}
    name = f"{record['method']} {record['variant']}"
    return Entry(title, name, baselines, (record.get("config", {}).get("seed"),))


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
    # baselines have no space in their names
    for name in sorted(rows, key=lambda n: (" " in n, n)):
        every = [m for runs in rows[name].values() for m in runs]
        values = [
            [m["pcc_mean"] for m in rows[name].get(p, []) if m.get("pcc_mean") is not None]
            for p in parts
        ]
        mean = (
            f"{statistics.mean(statistics.median(v) for v in values):.3f}" if all(values) else "-"
        )
        published = PUBLISHED_GENES.get(
            re.sub(r" (section-)?(features|released|base)-?", " ", name).strip(), ""
        )
        out.rows.append(
            [
                name,
                *map(cell, values),
                mean,
                *spreads(every, SHOWN_GENES),
                str(len(every)),
                published,
            ]
        )
    return out


def cell(values):
    """`median (min-max)` of the numbers that are there, or a dash."""
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    return f"{statistics.median(values):.3f}" + (
        f" ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 else ""
    )


def ordered(rows):
    """Baselines first, then the models by name."""
    return sorted(
        rows,
        key=lambda name: (BASELINES.index(name) if name in BASELINES else len(BASELINES), name),
    )


def spreads(runs, names):
    """The median of each named score over the runs that have it, with its spread."""
    return [cell([m.get(k) for m in runs]) for k in names]


def domain_table(rows):
    """Table of domains: ARI per slice, medians of the other scores, runs, published ARI."""
    slices = sorted({s for row in rows.values() for s in row})
    out = Table(
        DOMAINS, ["method", *(f"ARI {s}" for s in slices), *SHOWN_DOMAINS, "runs", "published ARI"]
    )
    for name in ordered(rows):
        every = [m for runs in rows[name].values() for m in runs]
        published = ", ".join(
            f"{s}: {ari}"
            for s, ari in PUBLISHED_DOMAINS.get(name.split()[0], {}).items()
            if s in slices
        )
        columns = [cell([m.get("ari") for m in rows[name].get(s, [])]) for s in slices]
        out.rows.append(
            [name, *columns, *spreads(every, SHOWN_DOMAINS), str(len(every)), published]
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
            "runs",
            "published ARI",
        ],
    )
    for name in ordered(rows):
        every = [m for runs in rows[name].values() for m in runs]
        columns = [cell([m["ari"] for m in rows[name].get(s, [])]) for s in slices] + spreads(
            every, SHOWN
        )
        # DLPFC
        published = (
            PUBLISHED.get(name, "")
            if split == "random" and all(re.fullmatch(r"151[56]\d\d", s) for s in slices)
            else ""
        )
        out.rows.append(
            [
                name,
                *columns,
                cell([m.get("gain_over_coords_knn") for m in every]),
                str(len(every)),
                published,
            ]
        )
    return out


def cell_table(title, rows):
    """Table of single cells: every score as median and spread over runs; a baseline has the scores
    of its own task."""
    out = Table(title, ["method", *SHOWN_CELLS, "runs"])
    for name in sorted(rows, key=lambda n: (" " in n, n)):
        every = [m for runs in rows[name].values() for m in runs]
        out.rows.append([name, *spreads(every, SHOWN_CELLS), str(len(every))])
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
        table.title += suffix
    return [table for table, _ in groups]


def footer(records):
    """What the numbers are and where they come from."""
    first = records[0]
    commits = sorted({r["git_commit"][:9] for r in records})
    devices = sorted(
        {" on ".join(filter(None, (r["device"], r.get("processor")))) for r in records}
    )
    return (
        f"Median (min-max) over folds and seeds; {len(records)} runs, commit {', '.join(commits)}, "
        f"torch {first['versions']['torch']}, {', '.join(devices)}; run time median "
        f"{statistics.median(r['seconds'] for r in records):.0f} s, "
        f"peak memory {max(r['peak_rss_mb'] for r in records)} MB."
    )


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
        split, seed = (r["split"] or {}).get("name"), r.get("config", {}).get("seed")
        groups[r["method"], r["data"], split][row_name(r) if split else r["variant"]].add(
            (r["part"], r.get("config", {}).get("fold"), seed)
        )
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
    """The panel of one table: `score` of every run, and the median of the baseline `floor`."""
    dots = {
        name: {
            part: [m[score] for m in runs if m.get(score) is not None]
            for part, runs in rows[name].items()
        }
        for name in ordered(rows)
    }
    values = [v for numbers in dots.get(floor, {}).values() for v in numbers]
    return figures.Panel(title, axis, dots, statistics.median(values) if values else None)


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
                    if any(m.get(score) is not None for m in metrics)
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
    try:
        for ending, content in files.items():
            write_atomically(
                out.with_name(out.name + ending), lambda f, content=content: f.write(content)
            )
    except OSError as error:
        raise DataError(
            f"cannot write {out}.md ({error.strerror}): choose another place with --out"
        ) from error
    print(text)
    print(out.with_name(out.name + ".html"))
    return 0


if __name__ == "__main__":
    cli(main)
