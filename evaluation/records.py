"""runs/ -> rows of tables: run records read and checked, and which runs may stand in one row.

A row holds runs of one preset. A baseline stands in the records of many runs: it counts once, and
runs whose settings or files change it have rows of their own.
"""

import json
import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from plainst.readers.checked import JSON_ERRORS, DataError

BASELINES = (
    "majority",
    "coords_knn",
    "coords_rbf",
    "expr_lr",
    "smoothed_lr",
    "embedding_lr",
    "embedding_smoothed_lr",
    "pca_gmm",
    "neighbour_mean_gmm",
)
SHOWN_CELLS = (
    "cond_pcc_own_area",
    "cond_pcc_other_area",
    "cond_pcc_near_density",
    "fd_generated",
    "impute_pcc_mean",
    "image_to_genes_pcc_mean",
    "annotation_macro_f1",
)
DOMAINS = "domains (unsupervised)"
FACTS = ("n_params", "seconds")  # of a record, beside its scores
# the settings on which the baselines of a kind of table depend, flags or facts of the record
COLUMNS = ("label_key", "layer", "gene_key", "library_key")
LAYER_SETTINGS = (*COLUMNS, "labels", "library", "scale", "hvg", "n_top_genes", "split_seed")
LAYER_SETTINGS += ("n_blocks", "buffer", "embedding")
DOMAIN_SETTINGS = (*COLUMNS, "n_domains", "norm", "library", "hvg", "n_top_genes", "n_pcs")
DOMAIN_SETTINGS += ("n_init", "diffusion_steps", "diffusion_k", "permutations", "root_gene")
GENE_SETTINGS = ("method", "genes", "target", "min_counts", "encoder", "scale", "target_scale")
GENE_SETTINGS += ("markers", "oracle_genes", "rings", "folds", "members", "mode")
CELL_SETTINGS = ("test_every", "width", "buffer", "size", "draws")


def read_runs(folder):
    """List of run records below `folder`, without those of `make demo`, `honest` and `scale`; each
    with its data, part (slice or fold), variant, preset and row (the variant without preset and
    split). Raises DataError if there is none or one is damaged or of another version."""
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
        problem = problem_of(record)
        if problem:
            raise DataError(
                f"{path} is half a record, or of another version ({problem}): run it again, or "
                f"move it out of {folder}"
            )
        record |= dict(zip(("data", "part", "variant"), parts[1:])) | {"path": path}
        record["preset"], record["row"] = preset_and_row(record)
        records.append(record)
    if not records:
        raise DataError(
            f"{folder} holds no run record (run.json): run a method first, for example make demo"
        )
    return records


def problem_of(record):
    """What keeps a record from standing in a table, in words, or ''."""
    for name in ("config", "metrics", "baselines"):
        if not isinstance(record.get(name), dict):
            return f"it lacks {name}"
    split = record.get("split")
    if split is not None and not (isinstance(split, dict) and isinstance(split.get("name"), str)):
        return "its split has no name"
    tables = {"metrics": record["metrics"], **record["baselines"]}
    for name, scores in tables.items():
        if not isinstance(scores, dict):
            return f"the scores of {name} are {type(scores).__name__}"
        for score, value in scores.items():
            if not isinstance(value, (int, float, type(None))):
                return f"{score} of {name} is {type(value).__name__}"
    return ""


def preset_and_row(record):
    """(preset, variant without preset and split) of a record. Names of slices may hold hyphens, so
    what stands before is known, not searched for; a record without presets has ''."""
    config, split, row = record["config"], record["split"], record["variant"]
    preset = config.get("preset", "")
    if preset and (row == preset or row.startswith(f"{preset}-")):
        row = row.removeprefix(preset).removeprefix("-")
    else:
        preset = ""
    if split is not None:
        train = str(config.get("train") or "all").replace(",", "+")
        prefixes = {
            "blocks": f"blocks{config.get('fold', 0)}-",
            "slice": f"slice-{train}-",
            "donor": f"donor-{train}-",
        }
        row = row.removeprefix(prefixes.get(split["name"], f"{split['name']}-"))
    return preset, row


class Row(NamedTuple):
    """A line of a table: a baseline, or a model of one preset. apart: what tells it from a line of
    the same name, in words."""

    name: str
    preset: str = ""
    apart: str = ""
    is_baseline: bool = False

    def __str__(self):
        preset = f" ({self.preset})" if self.preset else ""
        apart = f" [{self.apart}]" if self.apart else ""
        return f"{self.name}{preset}{apart}"


@dataclass
class Entry:
    """Where a run stands: in the table `group`, on the line `name` (None: its baselines only).

    baselines {name: scores} are lines of their own; a baseline that stands in the records of
    several runs counts once, where `inputs` and its scores are the same. settings {flag: value}:
    what can change the baselines.
    """

    group: object
    name: str | None
    baselines: dict
    inputs: tuple = ()
    settings: dict = field(default_factory=dict)


def rows_of(records, entry_of):
    """{group: {Row: {slice or fold: [scores of every run]}}} of the records of which `entry_of`
    makes an Entry, not None."""
    table, seen = defaultdict(lambda: defaultdict(lambda: defaultdict(list))), set()
    entries = [(record, entry_of(record)) for record in records]
    entries = [(record, entry) for record, entry in entries if entry is not None]
    editions = editions_of(records)
    observed = defaultdict(list)
    for (r, entry), edition in zip(entries, [editions[r["path"]] for r, _ in entries]):
        for baseline, scores in entry.baselines.items():
            settings = {**entry.settings, **edition}
            place = (r["data"], r["part"], entry.inputs, r["config"].get("seed"))
            observed[entry.group, baseline].append((place, settings, scores))
        if entry.name is not None:
            row = Row(entry.name, r["preset"], words_of(edition))
            facts = {name: r[name] for name in FACTS if name in r}
            table[entry.group][row][r["part"]].append(facts | r["metrics"])
    for (group, baseline), runs in observed.items():
        names = settings_that_matter(runs)
        for place, settings, scores in runs:
            chosen = {name: settings.get(name) for name in names}
            row = Row(baseline, "", words_of(chosen), True)
            # a score that no seed changes counts once
            key = (group, row, place[:3], json.dumps(scores, sort_keys=True))
            if key not in seen:
                seen.add(key)
                table[group][row][place[1]].append(scores)
    return table


def words_of(settings):
    """{name: value} in words."""
    return ", ".join(f"{name} {value or 'none'}" for name, value in settings.items())


def settings_that_matter(runs):
    """Names of the settings by which the runs [(place, settings, scores)] of a baseline must not be
    put into one row: those that vary, less every one without which each row still holds runs that
    are seen to agree. Earlier settings stay before later ones."""
    every = dict.fromkeys(name for _, settings, _ in runs for name in settings)
    common = set.intersection(*(set(scores) for _, _, scores in runs))
    # {choice of settings: {place: {scores}}}
    choices = defaultdict(lambda: defaultdict(set))
    for place, settings, scores in runs:
        # a record from before a flag existed has it empty
        choice = tuple(str(settings.get(name) or "") for name in every)
        choices[choice][place].add(rounded(scores, common))
    names = [i for i in range(len(every)) if len({choice[i] for choice in choices}) > 1]
    for name in reversed(names):
        others = [i for i in names if i != name]
        groups = defaultdict(list)
        for choice, places in choices.items():
            groups[tuple(choice[i] for i in others)].append(places)
        if all(map(agree, groups.values())):
            names = others
    return [name for i, name in enumerate(every) if i in names]


def agree(choices):
    """Whether choices of settings [{place: {scores}}] give the same scores wherever two of them
    stand at one place, and such places link all of them."""
    linked, left = dict(choices[0]), choices[1:]
    while left:
        near = [places for places in left if linked.keys() & places.keys()]
        if not near:
            return False
        for places in near:
            if any(linked[place] != places[place] for place in linked.keys() & places.keys()):
                return False
            linked |= places
        left = [places for places in left if not any(places is other for other in near)]
    return True


def rounded(scores, names):
    """The scores `names` as a tuple that two runs of the same numbers share."""
    values = [scores[name] for name in sorted(names)]
    return tuple(None if is_undefined(v) else round(v, 6) for v in values)


def editions_of(records):
    """{path: {"data": n, "train": slices}} of the records. Runs of one name on one slice or fold
    that read different files have different numbers (1 for the first), and those that trained on
    different slices name them; empty where all agree."""
    files_of, train_of = defaultdict(lambda: defaultdict(set)), defaultdict(set)
    for r in records:
        for name, checksum in content_of(r):
            files_of[r["data"], r["part"]][name].add(checksum)
        train_of[r["data"], r["part"], split_name(r)].add(r["config"].get("train") or "all")
    numbers, out = defaultdict(dict), {}
    for r in records:
        place, out[r["path"]] = (r["data"], r["part"]), {}
        contested = tuple(x for x in content_of(r) if len(files_of[place][x[0]]) > 1)
        if contested:
            of_place = numbers[place]
            out[r["path"]]["data"] = of_place.setdefault(contested, len(of_place) + 1)
        if len(train_of[(*place, split_name(r))]) > 1:
            out[r["path"]]["train"] = r["config"].get("train") or "all"
    return out


def content_of(record):
    """[(name, checksum)] of the files that a run read; of a record without a list of them, the one
    checksum of them all, which other variants need not share."""
    files = record.get("files")
    if files:
        return [(name, file["sha256"]) for name, file in files.items()]
    checksum = record.get("data_checksum")
    return [((record["method"], record["variant"]), checksum)] if checksum else []


def split_name(record):
    """Name of the split of a record, '' without one."""
    return record["split"]["name"] if record["split"] else ""


def settings_of(record, names):
    """{name: value} of those settings that the record has; what it says of itself goes before its
    flags."""
    facts = record["config"] | {k: record[k] for k in ("method", "library") if k in record}
    return {name: facts[name] for name in names if name in facts}


def layer_entry(record):
    """The Entry of a run that predicts labels of held-out spots; its group is (split, leaks)."""
    split, is_scored = record["split"], "ari" in record["metrics"]
    if split is None or not (is_scored or trains_nothing(record)):
        return None
    return Entry(
        (split["name"], split.get("leaks_position", True)),
        record["row"] if is_scored else None,
        record["baselines"],
        (split.get("detail"),),
        settings_of(record, LAYER_SETTINGS),
    )


def trains_nothing(record):
    """Whether a run has baselines alone (`--mode none` of gat_fusion)."""
    return record["config"].get("mode") == "none"


def domain_entry(record):
    """The Entry of an unsupervised run."""
    # a prediction from a checkpoint has no baselines
    if record["split"] is not None or "ari" not in record["metrics"] or not record["baselines"]:
        return None
    inputs, settings = (record["config"].get("seed"),), settings_of(record, DOMAIN_SETTINGS)
    return Entry(DOMAINS, named(record), record["baselines"], inputs, settings)


def named(record):
    """Method and row of a record."""
    return f"{record['method']} {record['row']}".strip()


def gene_entry(record):
    """The Entry of a run that predicts genes from H&E."""
    if record["split"] is None or "pcc_mean" not in record["metrics"]:
        return None
    split, config = record["split"]["name"], record["config"]
    leaks = "leaks the patient" if record.get("leaks_patient") else "patients held out"
    # the baselines of a control saw the wrong pairs too
    is_control = config.get("permute_pairs") or config.get("shuffle_pairs")
    baselines = {} if is_control else record["baselines"]
    settings = settings_of(record, GENE_SETTINGS)
    title = f"genes from H&E, split `{split}` - {leaks}"
    return Entry(title, named(record), baselines, settings=settings)


def cell_entry(record):
    """The Entry of a run on single cells. A baseline's distance to the real pictures stands in the
    column of the generated ones, and the distance of two halves of the real ones is a row."""
    if not any(name in record["metrics"] for name in SHOWN_CELLS):
        return None
    split, title = record["split"] or {}, "single cells"
    if split:
        title += f", split `{split['name']}`"
        title += " - leaks position" if split.get("leaks_position") else ""
    baselines = {}
    for name, scores in record["baselines"].items():
        own = f"fd_{name}"
        baselines[name] = {"fd_generated": scores[own]} | scores if own in scores else scores
    if "fd_floor" in record["metrics"]:
        baselines["real_against_real"] = {"fd_generated": record["metrics"]["fd_floor"]}
    inputs, settings = (record["config"].get("seed"),), settings_of(record, CELL_SETTINGS)
    return Entry(title, named(record), baselines, inputs, settings)


def is_undefined(score):
    """Whether a score that was asked for has no value: null in a record, or NaN."""
    return score is None or not math.isfinite(score)


def scores_of(runs, name):
    """The score `name` of every run that has it, defined or not."""
    return [scores[name] for scores in runs if name in scores]
