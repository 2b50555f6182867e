"""report: tables from run records."""

import json

import numpy as np
import pytest

from data import DataError
from evaluation import figures, records, report


def write(root, part, variant, seed, ari, split="random", leaks=True, floor=0.9, **config):
    folder = root / "gat_fusion" / "dlpfc" / part / variant / f"seed{seed}"
    folder.mkdir(parents=True)
    scores = {
        "accuracy": 0.5,
        "macro_f1": 0.5,
        "kappa_quadratic": None,
        "log_loss": 1.0,
        "boundary_accuracy": 0.2,
    }
    (folder / "run.json").write_text(
        json.dumps(
            {
                "method": "gat_fusion",
                "config": {"seed": seed} | config,
                "metrics": {"ari": ari, "gain_over_coords_knn": ari - floor, **scores},
                "baselines": {"coords_knn": {"ari": floor, **scores}},
                "split": {
                    "name": split,
                    "leaks_position": leaks,
                    "detail": f"{variant.split('-')[0]}",
                },
                "git_commit": "0123456789",
                "versions": {"torch": "2"},
                "device": "cpu",
                "seconds": 3.0,
                "peak_rss_mb": 100,
            }
        )
    )


def write_domains(root, part, variant, seed, ari, floor, method="multist", **more):
    folder = root / method / "dlpfc" / part / variant / f"seed{seed}"
    folder.mkdir(parents=True)
    rest = {"nmi": 0.5, "completeness": 0.25, "homogeneity": None}
    (folder / "run.json").write_text(
        json.dumps(
            {
                "method": method,
                "config": {"seed": seed},
                "metrics": {"ari": ari, "ami": 0.375, "ari_gene": 0.1, **rest},
                "split": None,
                "git_commit": "0123456789",
                "baselines": {
                    "pca_gmm": {"ari": floor, "ami": 0.5, **rest},
                    "neighbour_mean_gmm": {"ari": floor + 0.25, "ami": 0.5, **rest},
                },
                "versions": {"torch": "2"},
                "device": "cpu",
                "seconds": 3.0,
                "peak_rss_mb": 100,
            }
            | more
        )
    )


def row(text, name):
    return next(line for line in text.splitlines() if line.startswith(f"| {name} |"))


def test_median_and_spread_over_seeds(tmp_path):
    for seed, ari in enumerate((0.8, 0.95, 0.91)):
        write(tmp_path, "151673", "random-full-cross", seed, ari)
    write(tmp_path, "151674", "random-full-cross", 0, 0.7)
    write(tmp_path, "151674", "slice-151673-full-cross", 0, 0.6, "slice", train="151673")
    text = report.markdown(report.read_runs(tmp_path))
    assert "| full-cross | 0.910 (0.800-0.950) | 0.700 |" in text and ".928 +- .022" in row(
        text, "full-cross"
    )
    knn = row(text, "coords_knn").split(" | ")
    # once per split and slice, not once per run
    assert knn[1] == "0.900" and knn[-2] == "2"
    assert text.index("coords_knn") < text.index("full-cross") and "Split `slice`" in text


def test_a_run_without_a_network_gives_its_baselines_only(tmp_path):
    """No row of its own, and nothing that could be missing."""
    write(tmp_path, "151673", "random-full-cross", 0, 0.8, mode="full")
    write(tmp_path, "151674", "random-none", 0, 0.0, floor=0.75, mode="none")
    path = next(tmp_path.rglob("random-none/seed0/run.json"))
    record = json.loads(path.read_text()) | {"metrics": {}, "n_params": 0}
    path.write_text(json.dumps(record))
    every = report.read_runs(tmp_path)
    text = report.markdown(every)
    assert row(text, "coords_knn").split(" | ")[1:3] == ["0.900", "0.750"]
    assert row(text, "full-cross").split(" | ")[1:3] == ["0.800", "-"]
    assert "| none" not in text and "these rows lack" not in text
    assert report.markdown(every[1:]).count("\n| coords_knn") == 1


def test_parameters_and_seconds_stand_beside_the_scores(tmp_path):
    write(tmp_path, "151673", "random-full-cross", 0, 0.8)
    path = next(tmp_path.rglob("run.json"))
    record = json.loads(path.read_text()) | {"n_params": 1_107_063, "seconds": 29.6}
    path.write_text(json.dumps(record))
    text = report.markdown(report.read_runs(tmp_path))
    (head,) = (line for line in text.splitlines() if line.startswith("| model"))
    columns = dict(zip(head.split(" | "), row(text, "full-cross").split(" | ")))
    assert columns["parameters"] == "1,107,063" and columns["seconds"] == "30"
    assert columns["nmi"] == "-" and columns["log_loss"] == "1.000"
    columns = dict(zip(head.split(" | "), row(text, "coords_knn").split(" | ")))
    assert columns["parameters"] == columns["seconds"] == "-"


def test_baselines_of_frozen_vectors_stand_apart_by_their_file(tmp_path):
    """The file of vectors changes the linear baselines, not those of coordinates."""
    for i, name in enumerate(("a.npz", "b.npz")):
        variant = f"random-embedding-cross-embedding-{name}"
        write(tmp_path, "151673", variant, 0, 0.8, mode="embedding", embedding=name)
        path = next(tmp_path.rglob(f"{variant}/seed0/run.json"))
        record = json.loads(path.read_text())
        scores = record["baselines"]["coords_knn"]
        record["baselines"]["embedding_lr"] = scores | {"ari": 0.25 + i / 2}
        record["split"]["detail"] = "seed 42"
        path.write_text(json.dumps(record))
    text = report.markdown(report.read_runs(tmp_path))
    assert row(text, "embedding_lr [embedding a.npz]").split(" | ")[1] == "0.250"
    assert row(text, "embedding_lr [embedding b.npz]").split(" | ")[1] == "0.750"
    assert row(text, "coords_knn").split(" | ")[1] == "0.900"


def test_program_writes_table_and_figure(tmp_path, capsys):
    write(tmp_path, "s", "blocks0-full-cross", 0, 0.5, "blocks", False, fold=0)
    assert report.main(["--runs", str(tmp_path)]) == 0
    assert (
        (tmp_path / "report.md")
        .read_text()
        .startswith("### Split `blocks` - does not leak position")
    )
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(DataError, match="--data"):
        report.main(["--runs", str(tmp_path), "--data", "other"])


def test_row_names_come_from_the_config(tmp_path):
    """Names of slices may hold hyphens; flags that are not at their default stay in the row's
    name."""
    write(tmp_path, "a-1", "slice-a-2+b-1-full-cross", 0, 0.5, "slice", train="a-2,b-1")
    write(tmp_path, "a-1", "slice-all-gcn_only", 0, 0.5, "slice", train="")
    write(tmp_path, "a-1", "donor-b-1-expr_only-hvg-none", 0, 0.5, "donor", train="b-1")
    write(tmp_path, "a-1", "blocks3-full-gated-k-18", 0, 0.5, "blocks", fold=3)
    tables = report.rows_of(report.read_runs(tmp_path), report.layer_entry)
    names = {split: set(map(str, rows)) for (split, _), rows in tables.items()}
    assert {
        split: {name for name in rows if not name.startswith("coords_knn")}
        for split, rows in names.items()
    } == {
        "slice": {"full-cross [train a-2,b-1]", "gcn_only [train all]"},
        "donor": {"expr_only-hvg-none"},
        "blocks": {"full-gated-k-18"},
    }


def test_any_folder_above_the_records_gives_the_same_tables(tmp_path, monkeypatch):
    write(tmp_path, "151673", "random-full-cross", 0, 0.8)
    texts = {
        report.markdown(report.read_runs(f))
        for f in (tmp_path, tmp_path / "gat_fusion", tmp_path / "gat_fusion" / "dlpfc" / "151673")
    }
    monkeypatch.chdir(tmp_path / "gat_fusion")
    assert (
        texts == {report.markdown(report.read_runs("."))}
        and report.main(["--runs", str(tmp_path / "gat_fusion"), "--data", "dlpfc"]) == 0
    )


def test_baselines_once_per_inputs(tmp_path):
    """The same split on other inputs (library size, scale, genes) has other baselines; another seed
    or model on the same inputs has not."""
    write(tmp_path, "s", "random-full-cross", 0, 0.8, library="given", scale="auto", hvg="seurat")
    write(tmp_path, "s", "random-full-cross", 1, 0.8, library="given", scale="auto", hvg="seurat")
    for n, other in enumerate(({"library": "own"}, {"scale": "slice"}, {"hvg": "none"})):
        write(
            tmp_path,
            "s",
            f"random-full-cross-{n}",
            0,
            0.8,
            floor=0.5,
            **{"library": "given", "scale": "auto", "hvg": "seurat"} | other,
        )
    text = report.markdown(report.read_runs(tmp_path))
    rows = {
        line.split(" | ")[0]: line.split(" | ")[1]
        for line in text.splitlines()
        if line.startswith("| coords_knn")
    }
    assert rows == {
        "| coords_knn [library given, scale auto, hvg seurat]": "0.900",
        "| coords_knn [library own, scale auto, hvg seurat]": "0.500",
        "| coords_knn [library given, scale slice, hvg seurat]": "0.500",
        "| coords_knn [library given, scale auto, hvg none]": "0.500",
    }
    assert "rows of one name that must not be put into one" in text


def test_a_setting_that_changes_no_baseline_parts_no_row(tmp_path):
    write(tmp_path, "s", "random-full-cross", 0, 0.8, library="given", hvg="seurat")
    write(tmp_path, "s", "random-full-cross-1", 0, 0.8, library="own", hvg="seurat")
    # seen beside no other choice: it may be what makes the difference
    write(tmp_path, "t", "random-full-cross", 0, 0.8, library="own", hvg="none")
    rows = report.rows_of(report.read_runs(tmp_path), report.layer_entry)["random", True]
    assert {str(row) for row in rows if row.is_baseline} == {
        "coords_knn [hvg seurat]",
        "coords_knn [hvg none]",
    }


def test_settings_that_matter():
    """Two methods write the same baseline beside flags of their own; a row is parted only where
    scores differ, or nothing shows that they do not."""

    def run(place, score, **settings):
        return place, settings, {"pcc_mean": score}

    same = [run("a", 0.5, method="x", rings=2), run("a", 0.5, method="x", rings=3)]
    same.append(run("a", 0.5, method="y", markers="breast"))
    assert records.settings_that_matter(same) == []
    assert records.settings_that_matter([*same, run("a", 0.25, method="z")]) == ["method"]
    other = run("b", 0.25, method="y", markers="all")
    assert records.settings_that_matter([*same, other]) == ["markers"]


def changed(path, **facts):
    """Change facts of a record; -> it."""
    record = json.loads(path.read_text()) | facts
    path.write_text(json.dumps(record))
    return record


def test_runs_on_changed_files_stand_in_rows_of_their_own(tmp_path):
    """Another mode reads more files, which is no change; the same file with another checksum is."""
    counts = {"a.h5": {"size": 1, "sha256": "1" * 64}}
    image = {"a.png": {"size": 1, "sha256": "3" * 64}}
    corrected = {"a.h5": {"size": 1, "sha256": "2" * 64}}
    for seed, files in enumerate((counts, counts, corrected)):
        write(tmp_path, "s", "random-full-cross", seed, 0.8, floor=0.5 + 0.25 * (seed > 1))
        path = tmp_path / f"gat_fusion/dlpfc/s/random-full-cross/seed{seed}/run.json"
        changed(path, files=files, data_checksum=files["a.h5"]["sha256"])
    write(tmp_path, "s", "random-img_expr", 0, 0.7, floor=0.5)
    path = tmp_path / "gat_fusion/dlpfc/s/random-img_expr/seed0/run.json"
    changed(path, files=image, data_checksum="4" * 64)
    text = report.markdown(report.read_runs(tmp_path))
    assert row(text, "full-cross [data 1]").split(" | ")[-2] == "2"
    assert row(text, "full-cross [data 2]").split(" | ")[-2] == "1"
    assert row(text, "coords_knn [data 2]").split(" | ")[1] == "0.750"
    assert row(text, "img_expr").split(" | ")[1] == "0.700"


def test_presets_stand_apart(tmp_path):
    """The first word of a folder is its preset: no row mixes two, the published score is found
    under either, and the split is still taken off."""
    for preset, ari in (("tuned", 0.8), ("paper", 0.6)):
        variant = f"{preset}-random-full-cross"
        write(tmp_path, "151673", variant, 0, ari, preset=preset)
        variant = f"{preset}-slice-151674-gcn_only"
        write(tmp_path, "151673", variant, 0, ari, "slice", preset=preset, train="151674")
    for preset, variant in (("tuned", "tuned"), ("paper", "paper-image-off")):
        write_domains(tmp_path, "151673", variant, 0, 0.5, 0.25, config={"preset": preset})
    of_runs = report.read_runs(tmp_path)
    text = report.markdown(of_runs)
    assert row(text, "full-cross (tuned)").split(" | ")[1] == "0.800"
    assert row(text, "full-cross (paper)").split(" | ")[1] == "0.600"
    assert all(".928" in row(text, f"full-cross ({p})") for p in ("tuned", "paper"))
    assert row(text, "gcn_only (tuned)") and row(text, "multist (tuned)").endswith("151673: .620 |")
    assert row(text, "multist image-off (paper)") and "Missing: gat_fusion" not in text
    first = min(of_runs, key=figures._main_variant_first)
    assert first["variant"] == "paper-random-full-cross"
    figures.draw_scores(report.panels_of(of_runs))


def test_undefined_scores_show(tmp_path):
    """Two of four runs without a correlation are no median of the other two, unsaid."""
    for seed, ari in enumerate((0.5, None, 0.75, float("nan"))):
        write_domains(tmp_path, "a", "full", seed, ari, 0.25)
    of_runs = report.read_runs(tmp_path)
    text = report.markdown(of_runs)
    assert "| 0.625 (0.500-0.750), 2 of 4 undefined |" in row(text, "multist full")
    (panel,) = report.panels_of(of_runs)
    assert "multist full, 2 undefined" in panel.rows
    assert report.cell([None, None]) == "-, 2 of 2 undefined" and report.cell([]) == "-"


def test_a_mean_over_slices_needs_all_of_them():
    rows = {report.Row("stformer mini"): {"a": [{"pcc_mean": 0.5}, {"pcc_mean": None}]}}
    (line,) = report.gene_table("t", rows).rows
    assert line[1:3] == ["0.500, 1 of 2 undefined", "-"]


def test_a_changed_tree_shows_in_the_footer(tmp_path):
    write(tmp_path, "s", "random-full-cross", 0, 0.8)
    path = tmp_path / "gat_fusion/dlpfc/s/random-full-cross/seed0/run.json"
    changed(path, git_commit="0123456789abcdef+")
    assert "commit 012345678+ (+: files that differ" in report.markdown(report.read_runs(tmp_path))


@pytest.mark.parametrize(
    "facts, problem",
    [
        ({"metrics": None}, "it lacks metrics"),
        ({"baselines": {"coords_knn": 0.5}}, "the scores of coords_knn are float"),
        ({"metrics": {"ari": "high"}}, "ari of metrics is str"),
        ({"split": "random"}, "its split has no name"),
        ({"config": []}, "it lacks config"),
    ],
)
def test_records_of_another_version_are_named(tmp_path, facts, problem):
    write(tmp_path, "s", "random-full-cross", 0, 0.8)
    path = tmp_path / "gat_fusion/dlpfc/s/random-full-cross/seed0/run.json"
    changed(path, **facts)
    before = path.read_bytes()
    with pytest.raises(DataError, match=f"seed0/run.json is half a record.*{problem}"):
        report.main(["--runs", str(tmp_path)])
    assert path.read_bytes() == before and not list(tmp_path.glob("report*"))


def test_a_full_disk_names_the_flag_of_the_report(tmp_path):
    write(tmp_path, "s", "random-full-cross", 0, 0.8)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="choose another folder with --out"):
        report.main(["--runs", str(tmp_path), "--out", str(tmp_path / "file" / "report")])


def test_unsupervised_domains(tmp_path):
    for seed, ari in enumerate((0.5, 0.625, 0.75)):
        write_domains(tmp_path, "151673", "full", seed, ari, 0.25)
    # the same baselines again: counted once
    write_domains(tmp_path, "151673", "gene", 0, 0.5, 0.25)
    write_domains(tmp_path, "151674", "full", 0, None, 0.5)
    write_domains(
        tmp_path,
        "151674",
        "predict-random-full-cross-0a",
        0,
        0.9,
        0,
        "gat_fusion",
        baselines={},
        checkpoint="model.pt",
    )
    write(tmp_path, "151673", "random-full-cross", 0, 0.8)
    of_runs = report.read_runs(tmp_path)
    text = report.markdown(of_runs)
    assert (
        "### domains (unsupervised)\n\n| method | ARI 151673 | ARI 151674 | ami | "
        "completeness | homogeneity | runs | published ARI |" in text
    )
    assert (
        row(text, "multist full")
        == "| multist full | 0.625 (0.500-0.750) | -, 1 of 1 undefined | 0.375 (0.375-0.375) | "
        "0.250 (0.250-0.250) | -, 4 of 4 undefined | 4 | 151673: .620 |"
    )
    assert (
        row(text, "pca_gmm") == "| pca_gmm | 0.250 (0.250-0.250) | 0.500 | 0.500 (0.500-0.500) | "
        "0.250 (0.250-0.250) | -, 4 of 4 undefined | 4 |  |"
    )
    assert (
        row(text, "neighbour_mean_gmm").startswith(
            "| neighbour_mean_gmm | 0.500 (0.500-0.500) | 0.750 |"
        )
        and "predict" not in text
    )
    assert "### Split `random`" in text and text.index("pca_gmm") < text.index("multist full")
    assert len(figures.draw_scores(report.panels_of(of_runs)).axes) == 2


def test_genes_from_histology(tmp_path):
    for split, part, leaks, values in (
        ("folds", "fold0", False, (0.1, 0.3, 0.2)),
        ("section", "C2", True, (0.4,)),
    ):
        for seed, value in enumerate(values):
            folder = (
                tmp_path
                / "stformer"
                / "her2st"
                / part
                / ("mini" if split == "folds" else "section-mini")
                / f"seed{seed}"
            )
            folder.mkdir(parents=True)
            record = {
                "method": "stformer",
                "config": {"seed": seed},
                "metrics": {"pcc_mean": value, "pcc_pooled": 0.5},
                "baselines": {
                    "ridge_raw": {"pcc_mean": 0.15},
                    "abmil": {"pcc_mean": 0.0 + seed / 1000},
                },
                "leaks_patient": leaks,
                "split": {"name": split, "leaks_position": False, "detail": ""},
                "seconds": 1.0,
                "peak_rss_mb": 9,
                "device": "cpu",
                "versions": {"torch": "2"},
                "git_commit": "abc",
            }
            (folder / "run.json").write_text(json.dumps(record))
    text = report.markdown(report.read_runs(tmp_path))
    assert (
        "split `folds` - patients held out" in text
        and "split `section` - leaks the patient" in text
    )
    rows = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| ")}
    assert (
        "| stformer mini | 0.400 | 0.400 | 0.500 |" in text
        and "| stformer mini | 0.200 (0.100-0.300) | 0.200 | 0.500 (0.500-0.500) |" in text
    )
    assert rows["| ridge_raw"].endswith("| 1 |  |"), "the same baseline in every run counts once"
    folder = folder.parent.with_name("section-mini-permute_pairs-True") / "seed0"
    folder.mkdir(parents=True)
    record |= {
        "config": {"seed": 0, "permute_pairs": True},
        "baselines": {"ridge_raw": {"pcc_mean": -0.15}},
    }
    (folder / "run.json").write_text(json.dumps(record))
    text = report.markdown(report.read_runs(tmp_path))
    assert "-0.15" not in text and "mini-permute_pairs-True" in text, (
        "baselines of a control stay out of the table"
    )
    figures.draw_scores(report.panels_of(report.read_runs(tmp_path)))


def test_report_of_domains_only(tmp_path):
    write_domains(tmp_path, "151673", "full", 0, 0.5, 0.25)
    assert report.main(["--runs", str(tmp_path)]) == 0
    assert (tmp_path / "report.md").read_text().startswith("### domains (unsupervised)") and (
        tmp_path / "report.png"
    ).is_file()


def test_bad_records(tmp_path):
    with pytest.raises(DataError, match="no run record"):
        report.read_runs(tmp_path)
    (tmp_path / "run.json").write_text("{half")
    with pytest.raises(DataError, match="run.json"):
        report.read_runs(tmp_path)


def test_page_is_self_contained_and_says_what_is_missing(tmp_path, capsys):
    write(tmp_path, "a", "random-full-cross", 0, 0.8)
    write_domains(tmp_path, "a", "full", 0, 0.5, 0.25)
    # what make demo leaves in runs/demo is no result
    write_domains(tmp_path / "demo", "a", "full", 0, 0.9, 0.25)
    xy, labels = np.random.default_rng(0).random((40, 2)), np.repeat([0, 1, -1, 2], 10)
    for path, arrays in (
        ("gat_fusion/dlpfc/a/random-full-cross", {"pred": np.abs(labels)}),
        ("multist/dlpfc/a/full", {"domains": (labels + 1) % 3}),
    ):
        np.savez(tmp_path / path / "seed0" / "arrays.npz", xy=xy, labels=labels, **arrays)
    assert report.main(["--runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split()[-1] == str(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert (
        text.count("data:image/png;base64,") == 2
        and "http" not in text
        and 'src="data:' in text
        and "0.900" in text
    )
    assert (
        "cmrcnet has no run here (make reproduce-her2st)" in text
        and "multist has no run" not in text
        and text.count("<td>multist full</td>") == 1
    )
    assert (tmp_path / "report_maps.png").read_bytes().startswith(b"\x89PNG")


def test_maps_show_every_method_and_split_first(tmp_path):
    for k in range(15):
        write(tmp_path, "a", f"random-full-cross-k-{k}", 0, 0.8)
    write(tmp_path, "a", "random-full-cross", 0, 0.8)
    write(tmp_path, "a", "blocks0-full-cross", 0, 0.5, "blocks", False, fold=0)
    write_domains(tmp_path, "a", "default", 0, 0.5, 0.25)
    for path in tmp_path.rglob("run.json"):
        found = {"domains" if "multist" in path.parts else "pred": np.repeat([0, 1], 10)}
        np.savez(
            path.parent / "arrays.npz", xy=np.zeros((20, 2)), labels=np.repeat([0, 1], 10), **found
        )
    (row,) = figures.layer_maps(report.read_runs(tmp_path)).values()
    first = [title.split("\n")[-1] for title, *_ in row[:4]]
    assert (
        first == ["annotation", "blocks0-full-cross", "random-full-cross", "default"]
        and len(row) == 19
    )
    figure = figures.draw_maps({"a": row})
    assert "7 more not drawn" in figure.axes[0].get_title() and len(figure.axes) == 12


def test_missing_runs_are_named(tmp_path):
    for seed in (0, 1):
        write(tmp_path, "a", "random-full-cross", seed, 0.8)
    write(tmp_path, "a", "random-gcn_only", 0, 0.8)
    text = report.markdown(report.read_runs(tmp_path))
    assert (
        "Missing: gat_fusion on dlpfc, split random: of 2 slices, folds and seeds these rows "
        "lack gcn_only 1." in text
    )
    assert "Missing: spatia has no run here (make reproduce-ca1)." in text


def test_domains_take_the_colour_of_the_layer_they_cover(tmp_path):
    write_domains(tmp_path, "a", "full", 0, 0.5, 0.25)
    labels = np.repeat([0, 1, 2, -1], 10)
    np.savez(
        tmp_path / "multist/dlpfc/a/full/seed0/arrays.npz",
        xy=np.zeros((40, 2)),
        labels=labels,
        domains=np.array([3, 0, 2, 1])[labels],
    )
    ((name, row),) = figures.layer_maps(report.read_runs(tmp_path)).items()
    assert name == "dlpfc a" and [t for t, *_ in row] == ["annotation", "multist\nfull"]
    assert (row[1][2][:30] == labels[:30]).all() and set(row[1][2][30:]) == {3}


def test_data_sets_stand_apart_and_cells_have_their_table(tmp_path):
    write(tmp_path, "a", "random-full-cross", 0, 0.8)
    folder = tmp_path / "spatia" / "ca1" / "blocks" / "tiny" / "seed0"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(
        json.dumps(
            {
                "method": "spatia",
                "config": {"seed": 0},
                "metrics": {"cond_pcc_own_area": 0.4, "impute_pcc_mean": 0.3, "fd_floor": 1.25},
                "seconds": 1.0,
                "split": {"name": "blocks", "leaks_position": False, "detail": ""},
                "baselines": {
                    "ridge": {"cond_pcc_own_area": 0.3},
                    "knn": {"impute_pcc_mean": 0.2},
                    "retrieval": {"fd_retrieval": 1.5},
                },
                "peak_rss_mb": 9,
                "device": "cpu",
                "versions": {"torch": "2"},
                "git_commit": "abc",
            }
        )
    )
    text = report.markdown(report.read_runs(tmp_path))
    # published scores stand beside DLPFC slices only
    assert ".922" not in text and ".928" not in text.split("README")[0]
    assert (
        row(text, "retrieval").split(" | ")[4] == "1.500"
        and row(text, "real_against_real").split(" | ")[4] == "1.250"
    )
    assert (
        "### single cells, split `blocks` - ca1" in text
        and "### Split `random` - leaks position - dlpfc" in text
    )
    assert (
        row(text, "ridge").split(" | ")[1:3] == ["0.300", "-"]
        and row(text, "spatia tiny").split(" | ")[1] == "0.400"
    )
    figures.draw_scores(report.panels_of(report.read_runs(tmp_path)))


@pytest.mark.parametrize(
    "name, damage",
    [
        ("run.json", b"\xff\xfe{"),
        ("run.json", b"[" * 100_000),
        ("arrays.npz", b"PK\x03\x04 broken"),
    ],
)
def test_damaged_records_are_named(tmp_path, name, damage):
    write_domains(tmp_path, "a", "full", 0, 0.5, 0.25)
    path = tmp_path / "multist/dlpfc/a/full/seed0" / name
    path.write_bytes(damage)
    with pytest.raises(DataError, match=name):
        figures.layer_maps(report.read_runs(tmp_path))
