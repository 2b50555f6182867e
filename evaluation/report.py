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
import io
import json
import re
import statistics
import textwrap
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
from scipy.optimize import linear_sum_assignment

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from plainst.readers.checked import JSON_ERRORS, NPZ_ERRORS, DataError  # noqa: E402
from plainst.run import cli, write_atomically  # noqa: E402

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
    "cond_pcc_other_area": ("PCC of generated other-nuclei area", "ridge"),
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


def rows_of(records):
    """{(split, leaks): {row name: {slice: [metrics of every run]}}}, the baselines as rows of their
    own, once per split, slice and inputs."""
    table, seen = defaultdict(lambda: defaultdict(lambda: defaultdict(list))), set()
    for r in records:
        if r["split"] is None or "ari" not in r["metrics"]:
            continue
        group, config = (r["split"]["name"], r["split"]["leaks_position"]), r.get("config", {})
        inputs = (
            *(config.get(k) for k in ("scale", "hvg", "n_top_genes", "labels")),
            r.get("library", config.get("library")),
        )
        for baseline, values in r["baselines"].items():
            key = (group, r["data"], r["part"], r["split"]["detail"], inputs, baseline)
            # the same numbers stand in every run of this split on these inputs
            if key not in seen:
                seen.add(key)
                table[group][baseline][r["part"]].append(values)
        name = row_name(r)
        if name not in BASELINES:
            table[group][name][r["part"]].append(r["metrics"])
    return table


def domain_rows(records):
    """{row name: {slice: [metrics of every run]}} of the unsupervised records: `<method>
    <variant>`, and each baseline once per slice and seed."""
    table, seen = defaultdict(lambda: defaultdict(list)), set()
    for r in records:
        # a prediction from a checkpoint has no baselines
        if r["split"] is not None or "ari" not in r["metrics"] or not r["baselines"]:
            continue
        for baseline, values in r["baselines"].items():
            key = (
                r["data"],
                r["part"],
                r.get("config", {}).get("seed"),
                baseline,
                json.dumps(values, sort_keys=True),
            )
            if key not in seen:
                seen.add(key)
                table[baseline][r["part"]].append(values)
        table[f"{r['method']} {r['variant']}"][r["part"]].append(r["metrics"])
    return table


def gene_rows(records):
    """{title: {row name: {slice or fold: [metrics of every run]}}} of the runs that predict genes,
    each baseline once per seed and value."""
    table, seen = defaultdict(lambda: defaultdict(lambda: defaultdict(list))), set()
    for r in records:
        if r["split"] is None or "pcc_mean" not in r["metrics"]:
            continue
        split = r["split"]["name"]
        title = f"genes from H&E, split `{split}`" + (
            " - leaks the patient" if r.get("leaks_patient") else " - patients held out"
        )
        # its baselines saw the wrong pairs too
        control = r.get("config", {}).get("permute_pairs") or r.get("config", {}).get(
            "shuffle_pairs"
        )
        for baseline, values in ({} if control else r["baselines"]).items():
            key = (title, r["data"], r["part"], baseline, json.dumps(values, sort_keys=True))
            if key not in seen:
                seen.add(key)
                table[title][baseline][r["part"]].append(values)
        table[title][f"{r['method']} {r['variant'].removeprefix(split + '-')}"][r["part"]].append(
            r["metrics"]
        )
    return table


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


def cell_rows(records):
    """{title: {row name: [metrics of every run]}} of the single-cell runs, each baseline once per
    seed and value. A baseline's distance to the real pictures stands in the column of the generated
    ones, and the distance of two halves of the real ones as a row of its own."""
    table, seen = defaultdict(lambda: defaultdict(list)), set()
    for r in records:
        if not any(k in r["metrics"] for k in SHOWN_CELLS):
            continue
        split, found = r["split"] or {}, dict(r["baselines"])
        title = "single cells" + (
            f", split `{split['name']}`"
            + (" - leaks position" if split.get("leaks_position") else "")
            if split
            else ""
        )
        if "fd_floor" in r["metrics"]:
            found["real_against_real"] = {"fd_generated": r["metrics"]["fd_floor"]}
        for name, values in found.items():
            key = (
                title,
                r["data"],
                r["part"],
                r.get("config", {}).get("seed"),
                name,
                json.dumps(values, sort_keys=True),
            )
            if key not in seen:
                seen.add(key)
                table[title][name].append({"fd_generated": values.get(f"fd_{name}")} | values)
        table[title][f"{r['method']} {r['variant']}"].append(r["metrics"])
    return table


def cell_table(title, rows):
    """Table of single cells: every score as median and spread over runs; a baseline has the scores
    of its own task."""
    out = Table(title, ["method", *SHOWN_CELLS, "runs"])
    for name in sorted(rows, key=lambda n: (" " in n, n)):
        out.rows.append([name, *spreads(rows[name], SHOWN_CELLS), str(len(rows[name]))])
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
    groups = [
        (layer_table(split, leaks, rows), ["gat_fusion"])
        for (split, leaks), rows in sorted(rows_of(records).items())
    ]
    if domain_rows(records):
        groups.append((domain_table(domain_rows(records)), ["multist"]))
    groups += [
        (gene_table(title, rows), ["stformer", "cmrcnet"])
        for title, rows in sorted(gene_rows(records).items())
    ]
    groups += [
        (cell_table(title, rows), ["spatia"]) for title, rows in sorted(cell_rows(records).items())
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


def png_of(figure):
    """A figure as PNG bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    plt.close(figure)
    return buffer.getvalue()


def layer_maps(records):
    """{slice: [(title, xy (N, 2), code (N,))]}: the annotation, then the first seed of the layer
    and domain runs; first one of every method and split, its main variant, then the others.

    Domains carry no names: each takes the colour of a layer by the assignment that agrees with the
    annotation most (drawing only, no score).
    """
    out, rank = {}, defaultdict(int)
    main = ("full-cross", "default")
    for r in sorted(
        records,
        key=lambda r: (
            r["method"],
            not r["variant"].endswith(main),
            r["variant"],
            r.get("config", {}).get("seed", 0),
        ),
    ):
        path = r["path"].parent / "arrays.npz"
        if "ari" not in r["metrics"] or not path.is_file():
            continue
        try:
            with np.load(path, allow_pickle=False) as arrays:
                found = next((arrays[k] for k in ("pred", "domains") if k in arrays), None)
                if found is None or "labels" not in arrays or not (arrays["labels"] >= 0).any():
                    continue
                xy, labels = arrays["xy"], arrays["labels"]
        except NPZ_ERRORS as error:
            raise DataError(
                f"{path} cannot be read ({error}): delete its folder and run again"
            ) from error
        name, title = f"{r['data']} {r['part']}", f"{r['method']}\n{r['variant']}"
        maps = out.setdefault(name, {"annotation": ((-1,), xy, labels)})
        if title not in maps:
            if r["split"] is None:
                rows = labels >= 0
                agree = np.zeros((found.max() + 1, max(labels.max(), found.max()) + 1))
                np.add.at(agree, (found[rows], labels[rows]), 1)
                found = linear_sum_assignment(-agree)[1][found]
            group = (name, r["method"], (r["split"] or {}).get("name"))
            maps[title] = ((rank[group], len(maps)), xy, found)
            rank[group] += 1
    return {
        name: [
            (title, xy, code)
            for title, (_, xy, code) in sorted(maps.items(), key=lambda item: item[1][0])
        ]
        for name, maps in out.items()
    }


def draw_maps(maps, most=12):
    """A grid: a row a slice, the annotation first; `most` maps a slice at most, so that they can be
    read."""
    width = min(max(map(len, maps.values())), most)
    figure, axes = plt.subplots(
        len(maps), width, figsize=(2.1 * width, 2.4 * len(maps)), squeeze=False
    )
    for line, (name, row) in zip(axes, sorted(maps.items())):
        for axis in line:
            axis.axis("off")
        for axis, (title, xy, code) in zip(line, row[:most]):
            axis.scatter(
                *xy.T,
                s=1.2,
                c=np.where(code < 0, np.nan, code),
                cmap="tab10",
                vmin=0,
                vmax=9,
                linewidths=0,
            )
            axis.set_aspect("equal")
            axis.invert_yaxis()
            more = f" ({len(row) - most} more not drawn)" if len(row) > most else ""
            axis.set_title(f"{name}{more}\n{title}" if title == "annotation" else title, fontsize=6)
    figure.tight_layout()
    return figure


def draw(records):
    """Dots, one a run: a panel per table of layers, domains and genes, one line per row; dashed:
    the median of the baseline to beat."""
    tables = [
        (
            (
                f"{split} ({'leaks position' if leaks else 'no position leak'})",
                "ARI on test spots",
                "coords_knn",
            ),
            rows,
        )
        for (split, leaks), rows in sorted(rows_of(records).items())
    ]
    if domain_rows(records):
        tables.append(
            ((DOMAINS, "ARI on labelled spots", "neighbour_mean_gmm"), domain_rows(records))
        )
    tables += [
        ((title.replace("`", ""), "mean PCC over genes", "ridge_raw"), rows)
        for title, rows in sorted(gene_rows(records).items())
    ]
    cells = [
        ((data, title), rows)
        for data in sorted({r["data"] for r in records})
        for title, rows in cell_rows([r for r in records if r["data"] == data]).items()
    ]
    for (data, title), rows in cells:
        for key, (label, floor) in PANELS_CELLS.items():
            one = {
                name: {data: [{"pcc_mean": m[key]} for m in runs if m.get(key) is not None]}
                for name, runs in rows.items()
            }
            one = {name: row for name, row in one.items() if row[data]}
            if one:
                tables.append(((f"{title.replace('`', '')}, {data}", label, floor), one))
    columns = min(len(tables), 3)
    heights = [
        0.9 + 0.24 * max(len(rows) for _, rows in tables[i : i + columns])
        for i in range(0, len(tables), columns)
    ]
    figure, axes = plt.subplots(
        len(heights),
        columns,
        squeeze=False,
        figsize=(5.6 * columns, sum(heights) + 0.5),
        height_ratios=heights,
        layout="constrained",
    )
    colour = {
        s: plt.get_cmap("tab10")(i % 10)
        for i, s in enumerate(
            sorted({s for _, rows in tables for row in rows.values() for s in row})
        )
    }
    legend = {}
    for axis in axes.flat[len(tables) :]:
        axis.remove()
    for axis, ((title, label, floor_name), rows) in zip(axes.flat, tables):
        names = ordered(rows)[::-1]
        for y, name in enumerate(names):
            for s, runs in rows[name].items():
                dots = [v for v in (m.get("ari", m.get("pcc_mean")) for m in runs) if v is not None]
                legend[s] = axis.scatter(
                    dots, [y] * len(dots), s=22, alpha=0.75, color=colour[s], linewidths=0
                )
        floor = [
            v
            for runs in rows.get(floor_name, {}).values()
            for v in (m.get("ari", m.get("pcc_mean")) for m in runs)
            if v is not None
        ]
        if floor:
            axis.axvline(statistics.median(floor), ls="--", color="0.5", lw=1)
        axis.set(yticks=range(len(names)), yticklabels=names, xlabel=label, xlim=(-0.1, 1.02))
        axis.tick_params(axis="y", labelsize=7)
        axis.set_title(textwrap.fill(title, 44), fontsize=9)
        axis.grid(axis="x", color="0.92")
    figure.legend(
        [legend[s] for s in sorted(legend)],
        sorted(legend),
        loc="outside lower center",
        ncols=8,
        fontsize=8,
        frameon=False,
    )
    return figure


def main(argv=None):
    """Print the tables; write <out>.md, <out>.html, <out>.png and, where runs hold labels,
    <out>_maps.png."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
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
    out, text, maps = (
        Path(flags.out or Path(flags.runs) / "report"),
        markdown(records),
        layer_maps(records),
    )
    pictures = {"Scores, one dot a run": png_of(draw(records))} | (
        {"Tissue maps, first seed": png_of(draw_maps(maps))} if maps else {}
    )
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
