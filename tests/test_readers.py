"""Readers against naive parsers, the anndata and scanpy libraries, hand-written old layouts and
damaged files."""

import csv
import hashlib
import json
import shutil
import struct
import subprocess
import sys
import warnings
import zlib
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.sparse as sp
from PIL import Image

from conftest import ROOT
from data import DataError
from plainst import readers
from plainst.readers import checked, loom, slides
from plainst.readers import visium as space_ranger

N_SPOTS, N_GENES = 60, 12


@pytest.fixture
def counts():
    return np.random.default_rng(0).poisson(0.7, (N_SPOTS, N_GENES)).astype(np.int32)


def barcodes(n=N_SPOTS):
    return [f"{'ACGT'[i % 4]}{'ACGT'[i // 4 % 4]}{'ACGT'[i // 16 % 4]}{i:04d}-1" for i in range(n)]


def lattice(n=N_SPOTS, pitch=100.0):
    """Row, column of a hex lattice and its pixels (x, y), x along columns."""
    row = np.arange(n) // 10
    col = 2 * (np.arange(n) % 10) + row % 2
    return row, col, 200 + col * pitch / 2, 300 + row * pitch * np.sqrt(3) / 2


def write_10x(path, dense, names=None, codes=None, ids=None, kind=None, dtype=np.int32):
    """10x HDF5 v3 as Space Ranger lays it out: features x barcodes, CSC."""
    matrix = sp.csc_matrix(dense.T)
    genes = names or [f"G{j}" for j in range(dense.shape[1])]
    with h5py.File(path, "w") as handle:
        group = handle.create_group("matrix")
        group["barcodes"] = np.array(codes or barcodes(len(dense)), dtype="S")
        group["data"], group["indices"], group["indptr"] = (
            matrix.data.astype(dtype),
            matrix.indices.astype(np.int64),
            matrix.indptr.astype(np.int64),
        )
        group["shape"] = np.array(matrix.shape, dtype=np.int32)
        group["features/name"] = np.array(genes, dtype="S")
        group["features/id"] = np.array(
            ids or [f"ENSG{j:011d}" for j in range(len(genes))], dtype="S"
        )
        group["features/feature_type"] = np.array(
            kind or ["Gene Expression"] * len(genes), dtype="S"
        )
        group["features/genome"] = np.array(["GRCh38"] * len(genes), dtype="S")


def write_visium(folder, dense, header=False, image=True):
    """A small Space Ranger folder; positions are in reversed order and hold out-of-tissue spots, so
    a join by row would fail."""
    (folder / "spatial").mkdir(parents=True)
    write_10x(folder / "filtered_feature_bc_matrix.h5", dense)
    row, col, x, y = lattice(len(dense))
    lines = [
        f"{b},1,{r},{c},{v:.0f},{u:.0f}"
        for b, r, c, u, v in zip(barcodes(len(dense)), row, col, x, y)
    ]
    lines = ["OUT-1,0,77,127,9000,9000", *lines][::-1]
    name = "tissue_positions.csv" if header else "tissue_positions_list.csv"
    (folder / "spatial" / name).write_text(
        "\n".join([",".join(space_ranger.POSITIONS)] * header + lines) + "\n"
    )
    scales = {
        "spot_diameter_fullres": 70.0,
        "tissue_hires_scalef": 0.2,
        "tissue_lowres_scalef": 0.1,
    }
    (folder / "spatial" / "scalefactors_json.json").write_text(json.dumps(scales))
    if image:
        pixels = np.random.default_rng(1).integers(0, 255, (150, 180, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "spatial" / "tissue_lowres_image.png")
    return folder


@pytest.fixture
def visium(tmp_path, counts):
    return write_visium(tmp_path / "S1", counts)


# --------------------------------------------------------------------------------------- real files
@pytest.mark.parametrize(
    "name, n_spots, n_genes, n_unlabelled, patient",
    [
        ("151673", 3639, 8513, 28, "Br8100"),
        ("151674", 3673, 5000, 38, "Br8100"),
        ("151510", 4634, 500, 39, "Br5292"),
    ],
)
def test_dlpfc_folder(real_data, name, n_spots, n_genes, n_unlabelled, patient):
    folder = real_data / "dlpfc" / name
    slide = readers.load_visium(folder)
    assert slide.counts.shape == (n_spots, n_genes) == (slide.n_spots, slide.n_genes)
    assert (
        (slide.labels < 0).sum() == n_unlabelled
        and slide.patient == patient
        and slide.sample == name
    )
    assert slide.classes == ["Layer1", "Layer2", "Layer3", "Layer4", "Layer5", "Layer6", "WM"]
    with h5py.File(folder / "filtered_feature_bc_matrix.h5") as handle:
        assert slide.barcodes.tolist() == [b.decode() for b in handle["matrix/barcodes"]]
        assert slide.counts.data.sum() == handle["matrix/data"][()].sum()
    header, *rows = [
        line.split("\t") for line in (folder / "metadata.tsv").read_text().splitlines()
    ]
    # + 1: R row names have no header
    label = {row[0]: row[1 + header.index("layer_guess")] for row in rows}
    total = {row[0]: float(row[1 + header.index("sum_umi")]) for row in rows}
    position = {
        row[0]: row
        for row in (
            line.split(",")
            for line in (folder / "spatial" / "tissue_positions_list.csv").read_text().split()
        )
    }
    for i, barcode in enumerate(slide.barcodes):
        assert ("NA" if slide.labels[i] < 0 else slide.classes[slide.labels[i]]) == label[barcode]
        assert slide.xy[i].tolist() == [float(position[barcode][5]), float(position[barcode][4])]
        assert slide.grid[i].tolist() == [int(position[barcode][2]), int(position[barcode][3])]
        assert position[barcode][1] == "1" and slide.library_size[i] == total[barcode]
    assert 0.715 < slide.um_per_px < 0.73  # 100 um over the 138 px between neighbours of one row
    assert (
        slide.image.shape == (600, 600, 3)
        and slide.image.dtype == np.uint8
        and slide.image_scale == pytest.approx(0.045004502)
    )


def test_real_matrix_equals_scanpy(real_data):
    scanpy = pytest.importorskip("scanpy")
    path = real_data / "dlpfc" / "151673" / "filtered_feature_bc_matrix.h5"
    matrix, genes, codes = space_ranger.read_10x_h5(path)
    theirs = scanpy.read_10x_h5(path)
    assert (matrix != theirs.X.astype(np.int32)).nnz == 0
    theirs.var_names_make_unique()
    assert (
        genes.tolist() == theirs.var_names.tolist() and codes.tolist() == theirs.obs_names.tolist()
    )
    assert matrix.dtype == np.int32 and matrix.has_canonical_format and matrix.data.min() > 0


# slice: spots, labelled, classes, as counted on the published annotation
LABELS_ONLY = {
    "151507": (4226, 4221, 7),
    "151508": (4384, 4381, 7),
    "151509": (4789, 4788, 7),
    "151669": (3661, 3636, 5),
    "151670": (3498, 3484, 5),
    "151671": (4110, 4093, 5),
    "151672": (4015, 3888, 5),
    "151675": (3592, 3566, 7),
    "151676": (3460, 3431, 7),
}


def test_labels_only_folders(real_data):
    found = {}
    for name in readers.list_slices(real_data / "dlpfc_labels_only"):
        slide = readers.load_slide(real_data / "dlpfc_labels_only", name, counts=False)
        found[name] = (slide.n_spots, int((slide.labels >= 0).sum()), len(slide.classes))
        assert (
            slide.counts is None
            and slide.n_genes == 0
            and slide.barcodes.tolist() == sorted(slide.barcodes.tolist())
        )
    assert found == LABELS_ONLY
    with pytest.raises(DataError, match="filtered_feature_bc_matrix.h5"):
        readers.load_visium(real_data / "dlpfc_labels_only" / "151507")


def test_counts_false_keeps_the_row_order_of_the_matrix(real_data):
    full, bare = (
        readers.load_visium(real_data / "dlpfc" / "151673", counts=flag) for flag in (True, False)
    )
    assert (
        full.barcodes.tolist() == bare.barcodes.tolist()
        and (full.labels == bare.labels).all()
        and bare.counts is None
    )


@pytest.mark.parametrize("sample", ["A2", "C4"])
def test_hest_patches_join_by_barcode(real_data, sample):
    slide = readers.load_hest(real_data / "her2st", sample)
    with h5py.File(real_data / "her2st" / "patches" / f"{sample}.h5") as handle:
        images, codes = handle["img"][()], [code[0].decode() for code in handle["barcode"][()]]
    expected = images[[codes.index(barcode) for barcode in slide.barcodes]]
    rows = np.random.default_rng(0).permutation(slide.n_spots)[:40]
    assert (
        slide.patches.shape == (slide.n_spots, 224, 224, 3) and len(slide.patches) == slide.n_spots
    )
    assert (slide.patches[rows] == expected[rows]).all()
    assert (slide.patches[[3, 3, 1]] == expected[[3, 3, 1]]).all() and (
        slide.patches[5] == expected[5]
    ).all()
    assert (slide.patches[-1] == expected[-1]).all()
    assert (slide.patches[10:2:-3] == expected[10:2:-3]).all() and slide.patches[[]].shape == (
        0,
        224,
        224,
        3,
    )
    part = slide.subset(rows)
    assert (
        part.patches[2:9] == expected[rows[2:9]]
    ).all() and part.barcodes.tolist() == slide.barcodes[rows].tolist()
    with pytest.raises(IndexError):
        slide.patches[slide.n_spots]


def test_hest_task_folder(real_data):
    root = real_data / "her2st"
    assert (
        readers.hest_samples(root)
        == readers.list_slices(root)
        == ["A2", "B4", "C2", "C3", "C4", "C5"]
    )
    assert readers.hest_split(root, 1) == (["A2", "C2", "C3", "C4", "C5"], ["B4"])
    genes = readers.hest_genes(root)
    assert len(genes) == 50 and genes[0] == "SCGB2A2"
    slide = readers.load_slide(root, "C3")
    assert slide.patient == "C" and slide.n_spots == 180 and 0.68 < slide.um_per_px < 0.69
    assert slide.select_genes(genes).genes.tolist() == genes
    for call in (
        lambda: readers.hest_split(root, 9),
        lambda: readers.load_hest(root, "Z9"),
        lambda: readers.hest_genes(root / "adata"),
    ):
        with pytest.raises(DataError):
            call()


@pytest.mark.parametrize("sample", ["B1", "H1"])
def test_real_h5ad_equals_anndata(real_data, sample):
    anndata = pytest.importorskip("anndata")
    path = real_data / "her2st_labelled" / f"{sample}.h5ad"
    slide, theirs = readers.load_slide(path), anndata.read_h5ad(path)
    assert (slide.counts != theirs.X).nnz == 0 and slide.genes.tolist() == theirs.var_names.tolist()
    assert (
        slide.barcodes.tolist() == theirs.obs_names.tolist()
        and (slide.xy == theirs.obsm["spatial"]).all()
    )
    names = ["undetermined" if code < 0 else slide.classes[code] for code in slide.labels]
    assert (
        names == theirs.obs["label"].tolist()
        and "undetermined" not in slide.classes
        and slide.patient == sample[0]
    )


# ----------------------------------------------------------------------------- Space Ranger layouts
@pytest.mark.parametrize("layout", ["list", "header", "txt", "parquet", "prefixed"])
def test_positions_layouts(tmp_path, counts, layout):
    folder = write_visium(tmp_path / "S1", counts, header=layout == "header")
    spatial = folder / "spatial"
    if layout == "txt":
        (spatial / "tissue_positions_list.csv").rename(folder / "tissue_positions_list.txt")
    if layout == "prefixed":  # as in the archive of the original DLPFC publication
        (folder / "filtered_feature_bc_matrix.h5").rename(
            folder / "S1_filtered_feature_bc_matrix.h5"
        )
        (spatial / "tissue_lowres_image.png").rename(spatial / "S1_tissue_lowres_image.png")
    if layout == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        rows = [
            line.split(",") for line in (spatial / "tissue_positions_list.csv").read_text().split()
        ]
        columns = {
            name: [row[j] if j == 0 else float(row[j]) for row in rows]
            for j, name in enumerate(space_ranger.POSITIONS)
        }
        parquet.write_table(pyarrow.table(columns), spatial / "tissue_positions.parquet")
        (spatial / "tissue_positions_list.csv").unlink()
    slide = readers.load_visium(folder)
    row, col, x, y = lattice()
    assert slide.barcodes.tolist() == barcodes() and (slide.counts.toarray() == counts).all()
    assert (slide.grid == np.stack([row, col], 1)).all() and np.abs(
        slide.xy - np.stack([x, y], 1)
    ).max() <= 0.5
    assert (
        slide.um_per_px == pytest.approx(1.0, rel=2e-3)
        and slide.image.shape == (150, 180, 3)
        and slide.image_scale == 0.1
    )


def test_parquet_without_pyarrow(visium, monkeypatch):
    (visium / "spatial" / "tissue_positions_list.csv").rename(
        visium / "spatial" / "tissue_positions.parquet"
    )
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"tissue_positions.parquet.*pip install pyarrow"):
        readers.load_visium(visium)


def test_hires_preferred_outs_folder_and_microns_per_pixel(tmp_path, counts):
    folder = write_visium(tmp_path / "brain" / "outs", counts)
    Image.fromarray(np.full((300, 360), 7, dtype=np.uint8)).save(
        folder / "spatial" / "tissue_hires_image.png"
    )
    path = folder / "spatial" / "scalefactors_json.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "microns_per_pixel": 0.27}))
    slide = readers.load_visium(folder)
    # grey -> RGB
    assert (
        slide.image.shape == (300, 360, 3) and (slide.image == 7).all() and slide.image_scale == 0.2
    )
    assert slide.um_per_px == 0.27 and slide.sample == "brain"


def test_out_of_tissue_rows_of_a_raw_matrix_are_dropped(visium, counts):
    path = visium / "spatial" / "tissue_positions_list.csv"
    path.write_text(path.read_text().replace(f"{barcodes()[4]},1,", f"{barcodes()[4]},0,"))
    slide = readers.load_visium(visium)
    assert (
        slide.barcodes.tolist() == barcodes()[:4] + barcodes()[5:]
        and (slide.counts.toarray() == np.delete(counts, 4, axis=0)).all()
    )


def test_v3_keeps_gene_expression_and_unsorted_entries(tmp_path, counts):
    kind = ["Gene Expression"] * 10 + ["Antibody Capture"] * 2
    write_10x(tmp_path / "m.h5", counts, kind=kind)
    # reverse the entries of the first spot, as an unsorted file has them
    with h5py.File(tmp_path / "m.h5", "a") as handle:
        end = handle["matrix/indptr"][1]
        for name in ("data", "indices"):
            handle[f"matrix/{name}"][:end] = handle[f"matrix/{name}"][:end][::-1]
    matrix, genes, _ = space_ranger.read_10x_h5(tmp_path / "m.h5")
    assert (
        genes.tolist() == [f"G{j}" for j in range(10)]
        and (matrix.toarray() == counts[:, :10]).all()
        and matrix.has_sorted_indices
    )


def test_v2_matrix(tmp_path, counts):
    matrix = sp.csc_matrix(counts.T)
    with h5py.File(tmp_path / "old.h5", "w") as handle:
        group = handle.create_group("GRCh38")
        group["barcodes"], group["genes"] = (
            np.array(barcodes(), dtype="S"),
            np.array([f"ENSG{j}" for j in range(N_GENES)], dtype="S"),
        )
        group["gene_names"] = np.array([f"G{j}" for j in range(N_GENES)], dtype="S")
        group["data"], group["indices"], group["indptr"], group["shape"] = (
            matrix.data,
            matrix.indices,
            matrix.indptr,
            np.array(matrix.shape),
        )
    ours, genes, codes = space_ranger.read_10x_h5(tmp_path / "old.h5")
    assert (
        (ours.toarray() == counts).all()
        and genes.tolist() == [f"G{j}" for j in range(N_GENES)]
        and codes.tolist() == barcodes()
    )
    scanpy = pytest.importorskip("scanpy")
    assert (scanpy.read_10x_h5(tmp_path / "old.h5").X.toarray() == counts).all()


def test_repeated_symbols_as_anndata_names_them(tmp_path, counts):
    names = ["A", "B", "A", "A", "A-1", "C", "B", "D", "E", "F", "H", "I"]
    write_10x(tmp_path / "m.h5", counts, names=names)
    with pytest.warns(UserWarning, match=r"m\.h5: 3 repeated gene symbols"):
        matrix, genes, _ = space_ranger.read_10x_h5(tmp_path / "m.h5")
    assert (
        len(set(genes)) == N_GENES
        and genes[2].startswith("A-")
        and (matrix.toarray() == counts).all()
    )
    utils = pytest.importorskip("anndata.utils")
    pandas = pytest.importorskip("pandas")
    assert genes.tolist() == utils.make_index_unique(pandas.Index(names)).tolist()


# ------------------------------------------------------------------------------------------- labels
@pytest.mark.parametrize(
    "form", ["csv", "tsv with header", "layer map in parent", "metadata", "metadata reordered"]
)
def test_label_files(visium, form):
    names = [("L1", "WM", "L3")[i % 3] for i in range(N_SPOTS)]
    names[5] = "NA"
    path, given = visium / "truth.txt", True
    if form == "csv":
        path.write_text("\n".join(f"{b},{n}" for b, n in list(zip(barcodes(), names))[::-1]))
    elif form == "tsv with header":
        path.write_text(
            "\n".join(["barcode\tlayer"] + [f"{b}\t{n}" for b, n in zip(barcodes(), names)])
        )
    elif form == "layer map in parent":
        path, given = visium.parent / "barcode_level_layer_map.tsv", False
        path.write_text(
            "\n".join(
                [f"{b}\tother\tL6" for b in barcodes()]
                + [f"{b}\tS1\t{n}" for b, n in zip(barcodes(), names)]
            )
        )
    else:
        path, given = visium / "metadata.tsv", False
        column = "layer_guess_reordered" if "reordered" in form else "layer_guess"
        header = f"barcode\tsum_umi\tsubject\t{column}"
        path.write_text(
            "\n".join(
                [header]
                + [
                    f"r{i}\t{b}\t{i + 100}\tBr1\t{n}"
                    for i, (b, n) in enumerate(zip(barcodes(), names))
                ]
            )
        )
    slide = readers.load_visium(visium, labels=path if given else None)
    assert (
        slide.classes == ["Layer1", "Layer3", "WM"]
        and slide.labels[:6].tolist() == [0, 2, 1, 0, 2, -1]
        and slide.labels.dtype == np.int64
    )
    if form.startswith("metadata"):
        assert slide.patient == "Br1" and slide.library_size.tolist() == [
            100.0 + i for i in range(N_SPOTS)
        ]


def test_slide_names_the_files_it_was_read_from(visium, tmp_path):
    """What a checksum of the inputs must take in: positions, labels and image beside the counts."""
    slide = readers.load_slide(visium)
    assert Path(slide.tables[0]).name.startswith("tissue_positions") and Path(
        slide.image_file
    ).name.startswith("tissue_")
    (tmp_path / "mine.csv").write_text("".join(f"{code},a\n" for code in slide.barcodes))
    assert readers.load_slide(visium, labels=str(tmp_path / "mine.csv")).tables[-1] == str(
        tmp_path / "mine.csv"
    )
    (visium / "metadata.tsv").write_text(_labels())
    scales, metadata = readers.load_slide(visium).tables[1:]
    assert Path(scales).name == "scalefactors_json.json"
    assert metadata == str(visium / "metadata.tsv")
    assert all(
        Path(f).is_file()
        for f in (*readers.load_slide(visium).tables, slide.image_file, slide.source)
    )
    assert (
        readers.is_one_slide(visium)
        and not readers.is_one_slide(visium.parent / "none")
        and readers.is_one_slide(slide.source)
    )


def test_slide_without_labels(visium):
    slide = readers.load_visium(visium)
    assert (slide.labels == -1).all() and slide.classes == [] and slide.library_size is None


# -------------------------------------------------------------------------------------------- Slide
def test_subset_select_genes_and_lazy_image(counts):
    reads = []

    def read():
        reads.append(1)
        return np.zeros((4, 5, 3), dtype=np.uint8)

    slide = readers.Slide(
        sp.csr_matrix(counts),
        np.array([f"G{j}" for j in range(N_GENES)]),
        np.array(barcodes()),
        np.arange(2.0 * N_SPOTS).reshape(-1, 2),
        labels=np.arange(N_SPOTS) % 3,
        classes=["a", "b", "c"],
        image=read,
        library_size=np.arange(N_SPOTS),
    )
    mask = np.arange(N_SPOTS) % 4 == 1
    for rows in (mask, np.flatnonzero(mask), np.flatnonzero(mask).tolist()):
        part = slide.subset(rows)
        assert (part.counts.toarray() == counts[mask]).all() and part.barcodes.tolist() == np.array(
            barcodes()
        )[mask].tolist()
        assert (part.xy == slide.xy[mask]).all() and (part.labels == slide.labels[mask]).all()
        assert (part.library_size == slide.library_size[mask]).all()
        assert part.grid is None and part.n_spots == mask.sum() and slide.n_spots == N_SPOTS
    assert slide.subset([]).n_spots == 0 and not reads and "S" in repr(slide) and not reads
    assert slide.image.shape == (4, 5, 3) and slide.image is slide.image and reads == [1]
    chosen = slide.select_genes(["G7", "G2"])
    assert (
        chosen.genes.tolist() == ["G7", "G2"]
        and (chosen.counts.toarray() == counts[:, [7, 2]]).all()
    )
    with pytest.raises(DataError, match="lacks 1 of the 2 genes"):
        slide.select_genes(["G1", "none"])
    slide.image = np.full((2, 2, 4), 0.5)
    assert (
        slide.image.shape == (2, 2, 3)
        and slide.image.dtype == np.uint8
        and (slide.image == 128).all()
    )


def test_file_checksum(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    (tmp_path / "b").write_bytes(b"y")
    assert readers.file_checksum(tmp_path / "a") == hashlib.sha256(b"x" * 3_000_000).hexdigest()
    assert (
        readers.file_checksum(tmp_path / "a", tmp_path / "b")
        == hashlib.sha256(b"x" * 3_000_000 + b"y").hexdigest()
    )
    with pytest.raises(DataError, match="cannot be read"):
        readers.file_checksum(tmp_path / "c")


# --------------------------------------------------------------------------------------------- h5ad
def make_adata(counts, kind="csr", dtype=np.float32):
    anndata, pandas = pytest.importorskip("anndata"), pytest.importorskip("pandas")
    row, col, x, y = lattice()
    label = pandas.Categorical([("WM", "Layer2", None)[i % 3] for i in range(N_SPOTS)])
    obs = pandas.DataFrame(
        {
            "array_row": row,
            "array_col": col,
            "layer_guess": label,
            "text": [f"t{i % 2}" for i in range(N_SPOTS)],
            "number": pandas.array([i if i % 5 else None for i in range(N_SPOTS)], dtype="Int64"),
        },
        index=barcodes(),
    )
    obs["group"] = pandas.Categorical([i % 4 for i in range(N_SPOTS)])
    wrap = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": np.asarray}[kind]
    return anndata.AnnData(
        wrap(counts.astype(dtype)),
        obs=obs,
        var=pandas.DataFrame(index=[f"G{j}" for j in range(N_GENES)]),
        obsm={"spatial": np.stack([x, y], 1)},
    )


@pytest.mark.parametrize("kind", ["csr", "csc", "dense"])
def test_h5ad_matrix_kinds(tmp_path, counts, kind):
    adata = make_adata(counts, kind)
    adata.uns["patient"] = "P1"
    pixels = np.random.default_rng(2).random((200, 180, 3)).astype(np.float32)
    adata.uns["spatial"] = {
        "lib": {
            "images": {"hires": pixels, "lowres": pixels[:50]},
            "scalefactors": {"tissue_hires_scalef": 0.15, "tissue_lowres_scalef": 0.03},
        }
    }
    adata.write_h5ad(tmp_path / "s.h5ad")
    slide = readers.load_h5ad(tmp_path / "s.h5ad")
    assert (
        (slide.counts.toarray() == counts).all()
        and slide.counts.dtype == np.int32
        and isinstance(slide.counts, sp.csr_matrix)
    )
    assert (
        slide.counts.has_sorted_indices
        and slide.genes.tolist() == adata.var_names.tolist()
        and slide.barcodes.tolist() == barcodes()
    )
    assert (slide.xy == adata.obsm["spatial"]).all() and slide.um_per_px == pytest.approx(1.0)
    assert slide.grid.tolist() == adata.obs[["array_row", "array_col"]].to_numpy().tolist()
    assert (
        slide.classes == ["Layer2", "WM"]
        and slide.labels[:4].tolist() == [1, 0, -1, 1]
        and (slide.sample, slide.patient) == ("s", "P1")
    )
    assert (
        slide.image.shape == (200, 180, 3)
        and slide.image_scale == 0.15
        and (slide.image == np.rint(pixels * 255)).all()
    )
    assert readers.load_h5ad(tmp_path / "s.h5ad", label_key="text").classes == ["t0", "t1"]
    assert readers.load_h5ad(tmp_path / "s.h5ad", label_key="group").labels.tolist() == [
        i % 4 for i in range(N_SPOTS)
    ]
    assert readers.load_h5ad(tmp_path / "s.h5ad", label_key="group").classes == ["0", "1", "2", "3"]
    number = readers.load_h5ad(tmp_path / "s.h5ad", label_key="number").labels
    assert ((number < 0) == (np.arange(N_SPOTS) % 5 == 0)).all()


@pytest.mark.parametrize("place", ["layer", "raw"])
def test_h5ad_counts_beside_normalised_x(tmp_path, counts, place):
    adata = make_adata(counts)
    if place == "raw":
        adata.raw = adata.copy()
        adata = adata[:, 2:].copy()  # raw keeps all genes
    else:
        adata.layers["counts"] = adata.X.copy()
    adata.X = np.log1p(adata.X.toarray() * 1.7)
    adata.write_h5ad(tmp_path / "s.h5ad")
    slide = readers.load_h5ad(tmp_path / "s.h5ad")
    assert (slide.counts.toarray() == counts).all() and slide.n_genes == N_GENES
    assert (
        readers.load_h5ad(
            tmp_path / "s.h5ad", layer="counts" if place == "layer" else "raw"
        ).counts.toarray()
        == counts
    ).all()
    with pytest.raises(DataError, match=r"s\.h5ad.*non-integer.*--layer NAME"):
        readers.load_h5ad(tmp_path / "s.h5ad", layer="X")


def test_h5ad_without_counts_or_coordinates(tmp_path, counts):
    adata = make_adata(counts)
    del adata.obsm["spatial"]
    adata.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(DataError, match=r"a\.h5ad has no coordinates"):
        readers.load_h5ad(tmp_path / "a.h5ad")
    adata.obs["pxl_col_in_fullres"], adata.obs["pxl_row_in_fullres"] = (
        np.arange(N_SPOTS) * 2.0,
        np.arange(N_SPOTS) * 3.0,
    )
    adata.obs["in_tissue"] = (np.arange(N_SPOTS) % 2).astype(int)
    adata.write_h5ad(tmp_path / "a.h5ad")
    slide = readers.load_h5ad(tmp_path / "a.h5ad", layer="X")
    assert (
        slide.barcodes.tolist() == barcodes()[1::2]
        and slide.xy[1].tolist() == [6.0, 9.0]
        and (slide.counts.toarray() == counts[1::2]).all()
    )
    adata.obsm["spatial"] = np.where(
        np.arange(N_SPOTS)[:, None] == 3, np.nan, np.ones((N_SPOTS, 2))
    )
    adata.write_h5ad(tmp_path / "c.h5ad")
    with pytest.raises(DataError, match=r"c\.h5ad has coordinates .*not finite"):
        readers.load_h5ad(tmp_path / "c.h5ad")
    with pytest.raises(DataError, match="no obs column nope: choose one of"):
        readers.load_h5ad(tmp_path / "a.h5ad", label_key="nope")
    with pytest.raises(DataError, match="no nope: give raw counts"):
        readers.load_h5ad(tmp_path / "a.h5ad", layer="nope")
    for value, problem in ((np.nan, "NaN"), (-1.0, "negative"), (0.5, "non-integer")):
        bad = adata.copy()
        bad.X.data[3] = value
        bad.write_h5ad(tmp_path / "b.h5ad")
        with pytest.raises(DataError, match=rf"b\.h5ad holds {problem}"):
            readers.load_h5ad(tmp_path / "b.h5ad")


@pytest.mark.parametrize("age", ["0.6", "0.7"])
def test_h5ad_old_encodings(tmp_path, counts, age):
    """AnnData 0.6: obs, var and obsm are compound datasets, categories in uns; 0.7:
    obs/__categories by reference. Written with h5py by hand."""
    path, matrix, (row, _, x, y) = (
        tmp_path / "old.h5ad",
        sp.csr_matrix(counts.astype(np.float32)),
        lattice(),
    )
    codes = np.array([(1, 0, -1)[i % 3] for i in range(N_SPOTS)], dtype=np.int8)
    with h5py.File(path, "w") as handle:
        group = handle.create_group("X")
        group["data"], group["indices"], group["indptr"] = (
            matrix.data,
            matrix.indices,
            matrix.indptr,
        )
        handle.create_group("uns")
        if age == "0.6":
            group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = (
                "csr",
                np.array(matrix.shape),
            )
            obs = np.zeros(
                N_SPOTS, dtype=[("index", "S12"), ("layer_guess", "i1"), ("array_row", "i8")]
            )
            obs["index"], obs["layer_guess"], obs["array_row"] = (
                np.array(barcodes(), dtype="S"),
                codes,
                row,
            )
            handle["obs"] = obs
            handle["var"] = np.array(
                [(f"G{j}".encode(),) for j in range(N_GENES)], dtype=[("index", "S5")]
            )
            obsm = np.zeros(N_SPOTS, dtype=[("X_pca", "f4", (3,)), ("spatial", "f8", (2,))])
            obsm["spatial"] = np.stack([x, y], 1)
            handle["obsm"] = obsm
            handle["uns/layer_guess_categories"] = np.array([b"Layer2", b"WM"])
        else:
            group.attrs["encoding-type"], group.attrs["shape"] = (
                "csr_matrix",
                np.array(matrix.shape),
            )
            handle["obs/index"], handle["var/_index"] = (
                np.array(barcodes(), dtype=object),
                np.array([f"G{j}" for j in range(N_GENES)], dtype=object),
            )
            handle["obs"].attrs["_index"], handle["var"].attrs["_index"] = "index", "_index"
            handle["obs/layer_guess"] = codes
            handle["obs/__categories/layer_guess"] = np.array(["Layer2", "WM"], dtype=object)
            handle["obs/layer_guess"].attrs["categories"] = handle[
                "obs/__categories/layer_guess"
            ].ref
            handle["obsm/spatial"] = np.stack([x, y], 1)
    slide = readers.load_h5ad(path)
    assert (
        (slide.counts.toarray() == counts).all()
        and slide.barcodes.tolist() == barcodes()
        and slide.genes[3] == "G3"
    )
    assert (
        slide.classes == ["Layer2", "WM"]
        and (slide.labels == codes).all()
        and (slide.xy == np.stack([x, y], 1)).all()
    )


# --------------------------------------------------------------------------------------------- HEST
@pytest.fixture
def hest(tmp_path, counts):
    adata = make_adata(counts)
    (tmp_path / "st").mkdir()
    (tmp_path / "patches").mkdir()
    adata.write_h5ad(tmp_path / "st" / "T1.h5ad")
    # reversed, one spot without a patch, one patch without a spot
    with h5py.File(tmp_path / "patches" / "T1.h5", "w") as handle:
        codes = [*barcodes()[:0:-1], "unknown-1"]
        handle["barcode"] = np.array(codes, dtype="S").reshape(-1, 1)
        handle["img"] = np.broadcast_to(
            np.arange(N_SPOTS, dtype=np.uint8)[:, None, None, None], (N_SPOTS, 4, 4, 3)
        )
    (tmp_path / "HEST_v1_1_0.csv").write_text(
        'dataset_title,id,patient,pixel_size_um_estimated\n"a, b",T1,Patient 1,0.25\n'
    )
    return tmp_path


def test_hest_1k_layout(hest, counts):
    slide = readers.load_slide(hest, "T1")
    assert (
        slide.patient == "Patient 1"
        and slide.um_per_px == 0.25
        and slide.barcodes.tolist() == barcodes()[1:]
    )
    assert slide.patches[:][:, 0, 0, 0].tolist() == [N_SPOTS - 1 - i for i in range(1, N_SPOTS)]
    assert (slide.counts.toarray() == counts[1:]).all() and readers.load_hest(
        hest, "T1", patches=False
    ).n_spots == N_SPOTS


@pytest.mark.parametrize(
    "text, patient",
    [
        ('{"id": "T1", "patient": "Patient 7", "pixel_size_um_estimated": 0.5}', "Patient 7"),
        ('{"patient": 7}', "7"),
        ('{"patient": null}', ""),
        ('{"patient": NaN, "pixel_size_um_estimated": NaN}', ""),
        ('{"patient": "unknown"}', ""),
    ],
)
def test_hest_1k_patient_from_the_json_of_a_sample(hest, text, patient):
    (hest / "HEST_v1_1_0.csv").unlink()
    (hest / "metadata").mkdir()
    path = hest / "metadata" / "T1.json"
    path.write_text(text)
    slide = readers.load_hest(hest, "T1", patches=False)
    assert slide.patient == patient and str(path) in slide.tables
    if "0.5" in text:
        assert slide.um_per_px == 0.5
    (hest / "metadata.csv").write_text("id,patient\nT1,P9\n")
    assert readers.load_hest(hest, "T1", patches=False).patient == "P9"
    for bad, message in (("[1]", "no JSON object"), ("{", "cannot be read as JSON")):
        path.write_text(bad)
        with pytest.raises(DataError, match=message):
            readers.load_hest(hest, "T1", patches=False)


def test_hest_bad_patches(hest):
    with h5py.File(hest / "patches" / "T1.h5", "a") as handle:
        del handle["barcode"]
        handle["barcode"] = np.array([f"x{i}" for i in range(N_SPOTS)], dtype="S").reshape(-1, 1)
    with pytest.raises(DataError, match=r"T1\.h5 shares no barcode with .*T1\.h5ad"):
        readers.load_hest(hest, "T1")
    (hest / "patches" / "T1.h5").unlink()
    with pytest.raises(DataError, match=r"T1\.h5 does not exist"):
        readers.load_hest(hest, "T1")
    (hest / "splits").mkdir()
    with pytest.raises(DataError, match="none here"):
        readers.hest_split(hest, 0)


# ---------------------------------------------------------------------------------------- bad input
def _edit(path, old, new):
    path.write_text(path.read_text().replace(old, new))


def _truncate(path, keep=0.6):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def _edit_h5(folder, name, change):
    with h5py.File(folder / "filtered_feature_bc_matrix.h5", "a") as handle:
        values = change(handle[name][()])
        del handle[name]
        handle[name] = values


def _drop(folder, name):
    with h5py.File(folder / "filtered_feature_bc_matrix.h5", "a") as handle:
        del handle[name]


def _put(index, value, dtype):
    def change(values):
        values = values.astype(dtype)
        values[index] = value
        return values

    return change


MATRIX, POSITIONS, SCALES = (
    "filtered_feature_bc_matrix.h5",
    "spatial/tissue_positions_list.csv",
    "spatial/scalefactors_json.json",
)
IMAGE = "spatial/tissue_lowres_image.png"
BAD = {
    "missing h5": (lambda f: (f / MATRIX).unlink(), "has no filtered_feature_bc_matrix"),
    "truncated h5": (lambda f: _truncate(f / MATRIX), "cannot be read as a 10x HDF5 matrix"),
    "text as h5": (
        lambda f: (f / MATRIX).write_text("<html>"),
        "cannot be read as a 10x HDF5 matrix",
    ),
    "no features": (lambda f: _drop(f, "matrix/features/name"), "cannot be read as"),
    "index out of range": (
        lambda f: _edit_h5(f, "matrix/indices", _put(0, 999, "i8")),
        "cannot be read as",
    ),
    "empty positions": (lambda f: (f / POSITIONS).write_text(""), "is not a positions table"),
    "no positions": (lambda f: (f / POSITIONS).unlink(), "has no tissue_positions"),
    "malformed positions": (
        lambda f: _edit(f / POSITIONS, ",1,", ",yes,"),
        "is not a positions table",
    ),
    "no shared barcode": (
        lambda f: _edit(f / POSITIONS, "-1,", "-2,"),
        "holds none of the 60 barcodes",
    ),
    "a barcode missing": (
        lambda f: _edit(f / POSITIONS, barcodes()[7], "XXX"),
        r"holds only 59 of the 60 barcodes.*1 missing",
    ),
    "barcode twice in matrix": (
        lambda f: _edit_h5(f, "matrix/barcodes", _put(1, barcodes()[0].encode(), "S9")),
        "2 times",
    ),
    "barcode twice in positions": (
        lambda f: _edit(f / POSITIONS, barcodes()[1], barcodes()[0]),
        "2 times",
    ),
    "nothing in tissue": (lambda f: _edit(f / POSITIONS, ",1,", ",0,"), "marks no spot"),
    "NaN": (lambda f: _edit_h5(f, "matrix/data", _put(2, np.nan, "f4")), "holds NaN"),
    "negative": (lambda f: _edit_h5(f, "matrix/data", _put(2, -4, "i4")), "holds negative"),
    "non-integer": (lambda f: _edit_h5(f, "matrix/data", _put(2, 1.5, "f4")), "holds non-integer"),
    "image of another slide": (
        lambda f: _edit(f / SCALES, "0.1}", "1.0}"),
        "does not fit its scale factor 1",
    ),
    "no scale factor": (
        lambda f: _edit(f / SCALES, "tissue_lowres_scalef", "other"),
        "has no tissue_lowres_scalef",
    ),
    "no scale factor file": (lambda f: (f / SCALES).unlink(), "has no tissue_lowres_scalef"),
    "malformed JSON": (lambda f: _truncate(f / SCALES), "not a JSON object"),
    "JSON list": (lambda f: (f / SCALES).write_text("[1]"), "not a JSON object"),
    "truncated PNG": (lambda f: _truncate(f / IMAGE), "cannot be read as an image"),
    "empty PNG": (lambda f: (f / IMAGE).write_text(""), "cannot be read as an image"),
    "labels of another slide": (
        lambda f: (f / "metadata.tsv").write_text("barcode\tlayer_guess\nzzz\tLayer1\n"),
        "shares no barcode",
    ),
    "values beyond the last row pointer": (
        lambda f: _edit_h5(f, "matrix/indptr", lambda v: np.minimum(v, v[-2])),
        "row pointers",
    ),
    "fractional indices": (
        lambda f: _edit_h5(f, "matrix/indices", lambda v: v + 0.5),
        "matrix/indices is float64",
    ),
    "numbers as barcodes": (
        lambda f: _edit_h5(f, "matrix/barcodes", lambda v: np.arange(len(v))),
        "instead of a list of names",
    ),
    "name not UTF-8": (
        lambda f: _edit_h5(f, "matrix/features/name", _put(0, b"caf\xe9", "S9")),
        "cannot be read as",
    ),
    "no expression": (
        lambda f: _edit_h5(
            f, "matrix/features/feature_type", lambda v: np.full(v.shape, b"Antibody")
        ),
        "no feature of type",
    ),
    "complex counts": (
        lambda f: _edit_h5(f, "matrix/data", lambda v: v + 1j),
        "matrix/data is complex",
    ),
    "infinite position": (lambda f: _edit(f / POSITIONS, ",300,", ",inf,"), "no finite number"),
    "NaN position": (lambda f: _edit(f / POSITIONS, ",300,", ",nan,"), "no finite number"),
    "position beyond any image": (
        lambda f: _edit(f / POSITIONS, ",300,", ",1e300,"),
        "no finite number",
    ),
    "fractional lattice": (lambda f: _edit(f / POSITIONS, ",1,0,", ",1,0.5,"), "not whole"),
    "infinite scale": (lambda f: _edit(f / SCALES, "0.1}", "1e400}"), "not positive"),
    "endless scale": (
        lambda f: _edit(f / SCALES, "0.1}", "1" + "0" * 400 + "}"),
        "not a JSON object",
    ),
    "nested JSON": (lambda f: (f / SCALES).write_text("[" * 100_000), "cannot be read as JSON"),
    "no pixel size": (
        lambda f: _edit(f / SCALES, "{", '{"microns_per_pixel": -1, '),
        "not positive",
    ),
    "image of a billion pixels": (lambda f: _bomb(f / IMAGE), "cannot be read as an image"),
    "image of another kind": (
        lambda f: Image.new("RGB", (180, 150)).save(f / IMAGE, "TIFF"),
        "cannot be read as an image",
    ),
    "quote that is never closed": (
        lambda f: (f / "metadata.tsv").write_text(_labels('"')),
        "cannot be read as a text table",
    ),
    "short row": (
        lambda f: (f / "metadata.tsv").write_text(_labels() + "AAAC-1\n"),
        "has a row of 1 fields",
    ),
    "labels twice": (
        lambda f: (f / "metadata.tsv").write_text(_labels() + f"{barcodes()[0]}\tWM\t5\n"),
        "twice",
    ),
    "negative library": (
        lambda f: (f / "metadata.tsv").write_text(_labels().replace("\t5\n", "\t-5\n")),
        "negative or infinite",
    ),
    "empty labels": (lambda f: (f / "metadata.tsv").write_text(""), "is empty"),
}


def _labels(quote=""):
    return "barcode\tlayer_guess\tsum_umi\n" + "".join(
        f"{code}\t{quote if i == 30 else ''}Layer1\t5\n" for i, code in enumerate(barcodes())
    )


def _bomb(path):
    """The head of a PNG that declares 40,000 x 40,000 pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    )


@pytest.mark.parametrize("case", BAD)
def test_bad_visium_input(visium, case):
    damage, message = BAD[case]
    readers.load_visium(visium)  # sound before
    damage(visium)
    with pytest.raises(DataError, match=message) as caught:
        readers.load_visium(visium)
    text = str(caught.value)
    # names the file, is one line, ends in a remedy
    assert str(visium) in text and "\n" not in text and ":" in text


def test_image_that_breaks_after_loading(visium):
    slide = readers.load_visium(visium)
    _truncate(visium / IMAGE)
    with pytest.raises(DataError, match=r"tissue_lowres_image\.png cannot be read as an image"):
        slide.image.sum()


@pytest.mark.parametrize(
    "text, message",
    [
        ("a,b\nc,d\n", "shares no barcode"),
        ("a,b,c,d\n", "has 4 columns"),
        ("a,b\na,c\n", "holds barcode a 2 times"),
        ("a,b\nc,d, e\n", "has rows of 2 and of 3 fields"),
        ('a,b\nc,"d\n', "cannot be read as a text"),
        ("", "is empty"),
        (None, "cannot be read as a text"),
    ],
)
def test_bad_label_file(visium, text, message):
    path = visium / "labels.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=rf"labels\.csv {message}"):
        readers.load_visium(visium, labels=path)


def test_load_slide_detects_layouts(tmp_path, counts):
    write_visium(tmp_path / "root" / "S1", counts)
    root = tmp_path / "root"
    assert (
        readers.list_slices(root) == ["S1"]
        and readers.load_slide(root).sample == readers.load_slide(root / "S1").sample == "S1"
    )
    shutil.copytree(root / "S1", root / "S2")
    assert readers.load_slide(root, "S2").sample == "S2" and readers.list_slices(root) == [
        "S1",
        "S2",
    ]
    nowhere = tmp_path / "nowhere"
    for call, message in (
        (lambda: readers.load_slide(root), r"holds 2 slices \(S1, S2\)"),
        (lambda: readers.load_slide(root, "S3"), "has no slice S3: choose one of S1, S2"),
        (lambda: readers.load_slide(nowhere), "nowhere"),
        (lambda: readers.load_slide(tmp_path / "x.h5ad"), r"x\.h5ad"),
        (lambda: readers.list_slices(nowhere), "is not a folder"),
        (lambda: readers.load_visium(nowhere), "is not a folder"),
    ):
        with pytest.raises(DataError, match=message):
            call()
    make_adata(counts).write_h5ad(root / "H.h5ad")
    labels = root / "labels.csv"
    labels.write_text("\n".join(f"{b},{'ab'[i % 2]}" for i, b in enumerate(barcodes())))
    assert readers.load_slide(root, "H").classes == ["Layer2", "WM"] and readers.load_slide(
        root, "H", labels="text"
    ).classes == ["t0", "t1"]
    assert readers.load_slide(root, "H", labels=labels).labels.tolist() == [
        i % 2 for i in range(N_SPOTS)
    ]
    assert readers.load_slide(root, "H", counts=False).counts is None and readers.list_slices(
        root
    ) == ["H", "S1", "S2"]
    _truncate(root / "H.h5ad")
    with pytest.raises(DataError, match=r"H\.h5ad cannot be read as an h5ad file"):
        readers.load_slide(root, "H")


# ------------------------------------------------------------------------ damage that fuzzing found
def _h5ad(handle, name, change):
    values = change(handle[name][()])
    attributes = dict(handle[name].attrs)
    del handle[name]
    handle[name] = values
    handle[name].attrs.update(attributes)


def _huge(handle, name):
    del handle[name]
    handle.create_dataset(name, (1 << 31,), "i4", chunks=(1 << 20,))


def _outside(handle, name):
    shape = handle[name].shape
    del handle[name]
    handle.create_dataset(name, shape, "u1", external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])


BAD_H5AD = {
    "category below -1": (
        lambda f: _h5ad(f, "obs/layer_guess/codes", lambda v: v - 2),
        "category below -1",
    ),
    "fractional category": (
        lambda f: _h5ad(f, "obs/layer_guess/codes", lambda v: v + 0.5),
        "float64",
    ),
    "short column": (lambda f: _h5ad(f, "obs/in_tissue", lambda v: v[:1]), "in_tissue has shape"),
    "more rows than spots": (
        lambda f: _h5ad(f, "obs/_index", lambda v: v[:-1]),
        "cannot be read as an h5ad",
    ),
    "matrix of another shape": (
        lambda f: f["X"].attrs.update(shape=[N_SPOTS, N_GENES + 1]),
        "of shape",
    ),
    "matrix of another kind": (
        lambda f: f["X"].attrs.update({"encoding-type": "coo_matrix"}),
        "coo_matrix",
    ),
    "2 billion values in no bytes": (
        lambda f: _huge(f, "X/data"),
        "declares 8589934592 bytes and stores 0",
    ),
    "values in another file": (lambda f: _outside(f, "X/data"), "lies in another file"),
    "coordinates turned": (
        lambda f: _h5ad(f, "obsm/spatial", lambda v: v.T),
        "coordinates of float64",
    ),
    "coordinates as text": (
        lambda f: _h5ad(f, "obsm/spatial", lambda v: v.astype("S")),
        "obsm/spatial is",
    ),
    "pixel size": (lambda f: f.create_dataset("uns/um_per_px", data=np.inf), "um_per_px of inf"),
    "negative library": (
        lambda f: f.create_dataset("obs/sum_umi", data=np.full(N_SPOTS, -1.0)),
        "negative or infinite",
    ),
    "no spot": (
        lambda f: [_h5ad(f, f"obs/{n}", lambda v: v[:0]) for n in ("_index",)],
        "cannot be read as|holds no spot",
    ),
}


@pytest.mark.parametrize("case", BAD_H5AD)
def test_bad_h5ad_input(tmp_path, counts, case):
    damage, message = BAD_H5AD[case]
    adata = make_adata(counts)
    adata.obs["in_tissue"] = 1
    path = tmp_path / "s.h5ad"
    adata.write_h5ad(path)
    assert readers.load_h5ad(path).n_spots == N_SPOTS
    with h5py.File(path, "a") as handle:
        if "uns" not in handle:
            handle.create_group("uns")
        column = f"obs/{handle['obs'].attrs['_index']}"
        if column != "obs/_index":
            handle.move(column, "obs/_index")
            handle["obs"].attrs["_index"] = "_index"
        damage(handle)
    with pytest.raises(DataError, match=message) as caught:
        readers.load_h5ad(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("first", [0, 16, 24])
def test_string_heap_that_never_ends(tmp_path, counts, first):
    """libhdf5 walks a heap of zeros for ever; in a process of its own, which can be ended."""
    path = tmp_path / "s.h5ad"
    make_adata(counts).write_h5ad(path)
    whole = path.read_bytes()
    at = whole.index(b"GCOL")
    path.write_bytes(whole[: at + first] + bytes(4096 - first) + whole[at + 4096 :])
    code = (
        "import sys\nfrom plainst import readers\ntry:\n readers.load_h5ad(sys.argv[1])\n"
        "except readers.DataError as error:\n print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    assert done.returncode == 0 and f"{path} cannot be read as an h5ad file" in done.stdout, (
        done.stderr
    )


def test_heaps_of_good_files_pass(tmp_path):
    """Many strings, one longer than a heap of the usual size, and text that looks like a heap."""
    words = [f"word{i}" * (i % 9) for i in range(3000)] + ["long" * 20_000, "GCOL\1"]
    with h5py.File(tmp_path / "a.h5", "w") as handle:
        handle["words"], handle["fixed"] = words, np.array([b"GCOL\2", b"GCOL"] * 9)
        handle.attrs["word"] = "a" * 5000
    with readers.open_h5(tmp_path / "a.h5", "a test") as handle:
        assert (
            checked.decode_strings(handle["words"]).tolist() == words
            and handle.attrs["word"] == "a" * 5000
            and handle["fixed"][0] == b"GCOL\2"
        )


def test_integer_or_bright_images_are_refused(counts):
    slide = readers.Slide(
        sp.csr_matrix(counts),
        np.arange(N_GENES).astype(str),
        np.array(barcodes()),
        np.zeros((N_SPOTS, 2)),
    )
    for bad in (
        np.full((4, 4, 3), 255.0),
        np.full((4, 4, 3), 300),
        np.full((4, 4, 3), np.nan),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros(4, np.uint8),
    ):
        with pytest.raises(DataError, match="cannot be used"):
            slide.image = bad


def test_names_do_not_leave_the_folder(visium, hest):
    for name in ("../S1", "/etc", "a/b", "..", "."):
        with pytest.raises(DataError):
            readers.load_slide(visium.parent, name)
        with pytest.raises(DataError):
            readers.load_slide(hest, name)


@pytest.mark.parametrize(
    "text, message",
    [
        ("sample_id,x\nA\n", "row of another length"),
        ("id,x\nA,1\n", "no column sample_id"),
        ("sample_id\nA\nA\n", "name a sample twice"),
        ("sample_id\nB\n", "name a sample twice"),
    ],
)
def test_bad_splits(hest, text, message):
    (hest / "splits").mkdir()
    (hest / "splits" / "train_0.csv").write_text(text)
    (hest / "splits" / "test_0.csv").write_text("sample_id\nB\n")
    with pytest.raises(DataError, match=message):
        readers.hest_split(hest, 0)


@pytest.mark.parametrize(
    "text", ['"TP53"', '{"genes": "TP53"}', "[1]", '["A", "A"]', "{}", "[" * 100_000, "1" * 5000]
)
def test_bad_gene_lists(hest, text):
    (hest / "var_50genes.json").write_text(text)
    with pytest.raises(DataError, match="var_50genes.json"):
        readers.hest_genes(hest)


@pytest.mark.parametrize(
    "row, message",
    [
        ("T1,P,-1\n", "not positive"),
        ("T1,P,inf\n", "not positive"),
        ("T1,P\n", "another length"),
        ("T1,P,1\nT1,Q,2\n", "2 times"),
    ],
)
def test_bad_hest_metadata(hest, row, message):
    (hest / "HEST_v1_1_0.csv").write_text("id,patient,pixel_size_um_estimated\n" + row)
    with pytest.raises(DataError, match=message):
        readers.load_hest(hest, "T1")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"coords": np.full((3, 2), np.nan)}, "coordinates"),
        ({"coords": np.zeros((2, 2))}, "coordinates"),
        ({"barcodes": ["a", "b", "a"]}, "2 times"),
        ({"barcodes": [1, 2, 3]}, "barcodes of"),
    ],
)
def test_bad_features(tmp_path, change, message):
    np.savez(
        tmp_path / "a.npz",
        **(
            {"embedding": np.zeros((3, 4)), "coords": np.zeros((3, 2)), "barcodes": ["a", "b", "c"]}
            | change
        ),
    )
    with pytest.raises(DataError, match=message):
        readers.load_patch_folder(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"coords": np.full((3, 2), np.inf)}, "coordinates"),
        ({"barcode": [b"a", b"a", b"b"]}, "2 times"),
        ({"barcode": [b"a", b"b"]}, "3 patches but 2"),
        ({"img": np.zeros((3, 4, 4, 4), np.uint8)}, "uint8"),
    ],
)
def test_bad_patch_folder(tmp_path, change, message):
    with h5py.File(tmp_path / "a.h5", "w") as handle:
        handle.update(
            {
                "img": np.zeros((3, 4, 4, 3), np.uint8),
                "coords": np.zeros((3, 2)),
                "barcode": [b"a", b"b", b"c"],
            }
            | change
        )
    with pytest.raises(DataError, match=message):
        readers.load_patch_folder(tmp_path)


def test_messages_are_one_printable_line():
    assert len(str(DataError("a" * 5000))) < 1200 and str(DataError("a" * 900)) == "a" * 900
    assert str(DataError("a\nb \x1b[31m \udcff \u00e4")) == "a\\nb \\x1b[31m \\udcff \u00e4"


def test_last_row_that_may_be_cut(visium):
    path = visium / POSITIONS
    path.write_text(path.read_text().rstrip("\n")[:-1])
    with pytest.warns(UserWarning, match="does not end with a line break"):
        readers.load_visium(visium)


# --------------------------------------------------------------------- tables of two slides, mixed
def mixed_slide(real_data, tmp_path, matrix, spatial, metadata, name="S"):
    """A Space Ranger folder whose three parts are of the slices that are named."""
    folder = tmp_path / name
    folder.mkdir()
    root = real_data / "dlpfc"
    shutil.copy(root / matrix / MATRIX, folder / MATRIX)
    (folder / "spatial").mkdir()
    for path in (root / spatial / "spatial").iterdir():
        shutil.copyfile(path, folder / "spatial" / path.name)
    if metadata:
        shutil.copyfile(root / metadata / "metadata.tsv", folder / "metadata.tsv")
    return folder


@pytest.mark.parametrize(
    "matrix, spatial, metadata, message",
    [
        ("151673", "151674", "151674", r"137 of the 3639 barcodes .* and 171 of its 3673"),
        ("151673", "151674", "151673", r"137 of the 3639 barcodes .* of two slides"),
        ("151673", "151674", None, r"137 of the 3639 barcodes .* of two slides"),
        ("151673", "151673", "151674", r"metadata\.tsv is of sample 151674, the slide is S"),
        ("151510", "151510", "151674", r"metadata\.tsv is of sample 151674, the slide is S"),
    ],
)
def test_parts_of_two_slices(real_data, tmp_path, matrix, spatial, metadata, message):
    """Barcodes repeat on every slide: 151673 with the spots and labels of 151674 had 17 % wrong
    labels."""
    with pytest.raises(DataError, match=message):
        readers.load_visium(mixed_slide(real_data, tmp_path, matrix, spatial, metadata))


def test_labels_of_another_slice(real_data, tmp_path):
    """With --labels: as metadata.tsv it names its sample; as two columns its labels lie on bare
    glass."""
    folder = real_data / "dlpfc" / "151673"
    other = real_data / "dlpfc" / "151674" / "metadata.tsv"
    with pytest.raises(DataError, match="is of sample 151674, the slide is 151673"):
        readers.load_slide(folder, labels=other)
    table = readers.read_label_table(other, "151674")
    path = tmp_path / "labels.csv"
    path.write_text("".join(f"{code},{name}\n" for code, name in table.labels.items()))
    with pytest.raises(DataError, match=r"labels\.csv labels 150 spots that lie off the tissue"):
        readers.load_slide(folder, labels=path)


def test_no_pair_of_dlpfc_slices_joins_in_silence(real_data):
    """All 132 pairs: labels of one on another are an error or a warning; its own pass without a
    word, the 28 unlabelled spots of 151673 too."""
    tissue, labels = {}, {}
    for folder in [*(real_data / "dlpfc").iterdir(), *(real_data / "dlpfc_labels_only").iterdir()]:
        positions = space_ranger._read_positions(folder / "spatial" / "tissue_positions_list.csv")
        tissue[folder.name] = positions["barcode"][positions["in_tissue"] > 0]
        table = readers.read_label_table(folder / "metadata.tsv", folder.name)
        names = {code: name for code, name in table.labels.items() if name != "NA"}
        labels[folder.name] = slides.LabelTable(names, "", str(folder))
    said = Counter()
    for name, barcodes_of in tissue.items():
        for other, table in labels.items():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    slides.join_labels(table, barcodes_of, [name], barcodes_of)
                    said[name == other, "warning" if caught else "silence"] += 1
                except DataError:
                    said[name == other, "error"] += 1
    assert said == {(True, "silence"): 12, (False, "error"): 123, (False, "warning"): 9}


def test_renamed_folder_of_one_slide_loads(real_data, tmp_path):
    """The matrix names its library and the metadata its sample: the folder may have any name."""
    folder = mixed_slide(real_data, tmp_path, "151673", "151673", "151673", "my_brain")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slide = readers.load_visium(folder)
    assert slide.sample == "my_brain" and (slide.labels < 0).sum() == 28


def test_label_file_must_cover_half_of_the_spots(visium):
    path = visium / "few.csv"
    path.write_text(f"{barcodes()[0]},WM\n")
    with pytest.raises(DataError, match=r"few\.csv names 1 of the 60 spots.*NA where"):
        readers.load_visium(visium, labels=path)
    path.write_text(
        "".join(f"{code},{'WM' if i < 9 else 'NA'}\n" for i, code in enumerate(barcodes()))
    )
    assert (readers.load_visium(visium, labels=path).labels >= 0).sum() == 9
    path.write_text("".join(f"{code},WM\n" for code in barcodes()[:40]))
    with pytest.warns(UserWarning, match=r"few\.csv has no row for 20 of the 60 spots"):
        assert (readers.load_visium(visium, labels=path).labels >= 0).sum() == 40


def test_label_file_of_an_h5ad(tmp_path, counts):
    """An h5ad does not know its bare glass: labels without a spot are a warning, few rows an
    error."""
    make_adata(counts).write_h5ad(tmp_path / "s.h5ad")
    path = tmp_path / "mine.csv"
    path.write_text("".join(f"{code},a\n" for code in [*barcodes(), "AAAC-9", "AAAG-9"]))
    with pytest.warns(UserWarning, match=r"mine\.csv .* labels 2 spots that the slide lacks"):
        readers.load_slide(tmp_path / "s.h5ad", labels=path)
    path.write_text(f"{barcodes()[3]},a\n")
    with pytest.raises(DataError, match=r"mine\.csv names 1 of the 60 spots"):
        readers.load_slide(tmp_path / "s.h5ad", labels=path)


def test_files_of_several_samples_in_one_folder(visium):
    spatial = visium / "spatial"
    (visium / MATRIX).rename(visium / f"GSM1_{MATRIX}")
    (spatial / "tissue_positions_list.csv").rename(spatial / "GSM2_tissue_positions_list.csv")
    with pytest.raises(DataError, match=r"mixes files of several samples \(GSM1_.*, GSM2_"):
        readers.load_visium(visium)
    shutil.copy(
        spatial / "GSM2_tissue_positions_list.csv", spatial / "GSM1_tissue_positions_list.csv"
    )
    with pytest.raises(DataError, match=r"holds 2 files for tissue_positions_list.csv \(GSM1_"):
        readers.load_visium(visium)
    (spatial / "GSM2_tissue_positions_list.csv").unlink()
    assert readers.load_visium(visium).n_spots == N_SPOTS
    (spatial / "tissue_lowres_image.png").rename(spatial / "GSM2_tissue_lowres_image.png")
    with pytest.raises(DataError, match="mixes files of several samples"):
        readers.load_visium(visium)


def test_spots_off_the_tissue_are_named(visium):
    path = visium / "spatial" / "tissue_positions_list.csv"
    _edit(path, f"{barcodes()[4]},1,", f"{barcodes()[4]},0,")
    with pytest.warns(UserWarning, match="1 of the 60 barcodes .* lie off the tissue"):
        readers.load_visium(visium)
    _edit(path, "OUT-1,0,", "OUT-1,1,")
    with pytest.raises(DataError, match="1 of its 60 in-tissue spots have no counts, as where"):
        readers.load_visium(visium)


def test_one_missing_library_size_is_named(visium):
    """A spot without a row took the library size of the whole slide away without a word."""
    lines = _labels().splitlines(keepends=True)
    (visium / "metadata.tsv").write_text("".join([*lines[:9], *lines[10:]]))
    with pytest.warns(UserWarning, match=r"no sum_umi for 1 of the 60 spots.*row sum"):
        assert readers.load_visium(visium).library_size is None
    (visium / "metadata.tsv").write_text("".join(lines))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert readers.load_visium(visium).library_size.tolist() == [5.0] * N_SPOTS


def test_one_missing_library_size_in_an_h5ad(tmp_path, counts):
    adata = make_adata(counts)
    adata.obs["sum_umi"] = np.where(np.arange(N_SPOTS) == 7, np.nan, 50.0)
    adata.write_h5ad(tmp_path / "s.h5ad")
    with pytest.warns(UserWarning, match=r"s\.h5ad gives no sum_umi for 1 of the 60 spots"):
        assert readers.load_h5ad(tmp_path / "s.h5ad").library_size is None


# ------------------------------------------------------------------- several libraries in one h5ad
@pytest.fixture
def two_libraries(tmp_path, counts):
    """Two slides on the same lattice in one file with the same barcodes, as concat writes them."""
    pandas = pytest.importorskip("pandas")
    adata = make_adata(counts)
    half = np.arange(N_SPOTS) < N_SPOTS // 2
    adata.obs["library_id"] = pandas.Categorical(np.where(half, "one/a", "two"))
    adata.obs["donor"] = np.where(half, "D1", "D2")
    adata.obs_names = barcodes(N_SPOTS // 2) * 2
    adata.obsm["spatial"] = np.concatenate([adata.obsm["spatial"][half]] * 2)
    adata.write_h5ad(tmp_path / "both.h5ad")
    return tmp_path / "both.h5ad"


def test_libraries_are_read_one_at_a_time(two_libraries, counts):
    with pytest.raises(
        DataError, match=r"both\.h5ad holds 2 libraries .* library_id.*--slice.*--library_key"
    ):
        readers.load_slide(two_libraries)
    assert readers.list_slices(two_libraries) == ["one_a", "two"]
    assert not readers.is_one_slide(two_libraries)
    first, second = (readers.load_slide(two_libraries, name) for name in ("one/a", "two"))
    assert (first.sample, first.patient) == ("one_a", "D1")
    assert (second.sample, second.patient) == ("two", "D2")
    assert (np.concatenate([first.counts.toarray(), second.counts.toarray()]) == counts).all()
    assert first.barcodes.tolist() == second.barcodes.tolist() == barcodes(N_SPOTS // 2)
    assert len(first.labels) == len(second.grid) == N_SPOTS // 2
    with pytest.raises(DataError, match="has no library three: choose one of one_a, two"):
        readers.load_slide(two_libraries, "three")
    # beside other files: the folder lists files, the file its libraries
    assert readers.list_slices(two_libraries.parent) == ["both"]
    with pytest.raises(DataError, match="holds 2 libraries"):
        readers.load_slide(two_libraries.parent, "both")


def test_library_key(two_libraries):
    assert readers.list_slices(two_libraries, library_key="donor") == ["D1", "D2"]
    assert readers.load_slide(two_libraries, "D2", library_key="donor").sample == "D2"
    with pytest.raises(DataError, match="no obs column nope: .*--library_key"):
        readers.load_slide(two_libraries, library_key="nope")
    with pytest.raises(DataError, match="2 times"):  # taken as one tissue, its barcodes repeat
        readers.load_slide(two_libraries, library_key="none")


def test_usual_library_columns_and_images(tmp_path, counts):
    adata = make_adata(counts)
    for name in ("sample", "batch"):
        adata.obs[name] = np.where(np.arange(N_SPOTS) < 30, "0", "1")
        adata.write_h5ad(tmp_path / "s.h5ad")
        with pytest.raises(DataError, match=f"2 libraries in obs column {name}"):
            readers.load_slide(tmp_path / "s.h5ad")
        assert readers.load_slide(tmp_path / "s.h5ad", library_key="none").n_spots == N_SPOTS
        del adata.obs[name]
    adata.obs["sample"] = barcodes()  # a name a spot is no library
    adata.write_h5ad(tmp_path / "s.h5ad")
    assert readers.load_slide(tmp_path / "s.h5ad").sample == "s"
    adata.uns["spatial"] = {
        name: {
            "images": {"hires": np.full((200, 180, 3), value)},
            "scalefactors": {"tissue_hires_scalef": 0.15},
        }
        for name, value in (("a", 0.0), ("b", 1.0))
    }
    adata.write_h5ad(tmp_path / "s.h5ad")
    with pytest.raises(DataError, match=r"2 libraries \(a, b\) and no obs column.*--library_key"):
        readers.load_slide(tmp_path / "s.h5ad")
    adata.obs["half"] = np.where(np.arange(N_SPOTS) < 30, "a", "b")
    adata.write_h5ad(tmp_path / "s.h5ad")
    slide = readers.load_slide(tmp_path / "s.h5ad", "b", library_key="half")
    assert (slide.image == 255).all() and slide.n_spots == 30


# ----------------------------------------------------------------------- columns and layers by name
def test_keys_of_an_h5ad(tmp_path, counts):
    adata = make_adata(counts)
    adata.layers["mine"] = adata.X * 2
    adata.var["symbol"] = ["A", "A", "", *(f"S{j}" for j in range(3, N_GENES))]
    adata.write_h5ad(tmp_path / "s.h5ad")
    keys = {"label_key": "text", "layer": "mine", "gene_key": "symbol"}
    with pytest.warns(UserWarning, match="1 repeated gene symbols"):
        slide = readers.load_slide(tmp_path / "s.h5ad", **keys)
    assert slide.classes == ["t0", "t1"] and (slide.counts.toarray() == 2 * counts).all()
    assert slide.genes[:4].tolist() == ["A", "A-1", "G2", "S3"]
    nothing = dict.fromkeys((*keys, "library_key"), "")
    assert readers.load_slide(tmp_path / "s.h5ad", **nothing).classes == ["Layer2", "WM"]
    for name in keys:
        with pytest.raises(DataError, match=f"--{name}"):
            readers.load_slide(tmp_path / "s.h5ad", **{name: "nope"})


def test_keys_of_a_folder(visium):
    rows = [f"{code}\tWM\t{'ab'[i % 2]}/x\t5\n" for i, code in enumerate(barcodes())]
    (visium / "metadata.tsv").write_text("".join(["barcode\tlayer_guess\tmine\tsum_umi\n", *rows]))
    assert readers.load_slide(visium, label_key="mine").classes == ["a/x", "b/x"]
    table = visium / "mine.csv"
    table.write_text('cell,"my, label",other\n' + "".join(f'"{c}","1, 2",x\n' for c in barcodes()))
    slide = readers.load_slide(visium, labels=table, label_key="my, label")
    assert slide.classes == ["1, 2"] and slide.library_size is not None
    assert readers.load_slide(visium, gene_key="id").genes[2] == "ENSG00000000002"
    for keys, message in (
        ({"label_key": "nope"}, "no column nope: choose one of .*--label_key"),
        ({"labels": table}, "name the label column with --label_key"),
        ({"gene_key": "nope"}, "no gene column nope: .*--gene_key"),
        ({"layer": "counts"}, "--layer counts is for h5ad files"),
        ({"library_key": "a"}, "--library_key a is for h5ad files"),
    ):
        with pytest.raises(DataError, match=message):
            readers.load_slide(visium, **keys)
    (visium / "metadata.tsv").unlink()
    with pytest.raises(DataError, match="no metadata.tsv to take --label_key mine from"):
        readers.load_slide(visium, label_key="mine")


def test_labels_of_every_column_type(tmp_path, counts):
    """Integers with gaps are numbers with a point in pandas: no class may be called 0.0."""
    pandas = pytest.importorskip("pandas")
    adata = make_adata(counts)
    code = np.arange(N_SPOTS) % 12
    gap = np.arange(N_SPOTS) == 5
    adata.obs["int"] = pandas.array(np.where(gap, 0, code), dtype="Int64")
    adata.obs.loc[gap.tolist(), "int"] = pandas.NA
    adata.obs["float"] = np.where(gap, np.nan, code)
    adata.obs["category"] = pandas.Categorical(adata.obs["float"])
    adata.obs["half"] = np.where(gap, np.nan, code / 2)
    adata.obs["bool"] = pandas.array(
        [None if g else bool(c % 2) for g, c in zip(gap, code)], "boolean"
    )
    adata.obs["plain"] = code % 2 == 0
    adata.write_h5ad(tmp_path / "s.h5ad")

    def load(name):
        slide = readers.load_h5ad(tmp_path / "s.h5ad", label_key=name)
        assert (slide.labels[5] < 0) == (name != "plain")
        return slide

    for name in ("int", "float", "category"):
        assert load(name).classes == [str(i) for i in range(12)]  # 2 before 10
        assert load(name).labels[11] == 11
    assert load("half").classes[:3] == ["0.0", "0.5", "1.0"]
    assert load("bool").classes == load("plain").classes == ["False", "True"]


def test_names_with_commas_quotes_and_slashes(tmp_path, counts):
    """In barcodes, labels and genes: a CSV of R or Python quotes them, nothing is cut."""
    adata = make_adata(counts)
    names = [f'{code},"{i}"' for i, code in enumerate(barcodes())]
    adata.obs_names = names
    adata.var_names = [f"HLA-A/B,{j // 2}" for j in range(N_GENES)]
    adata.write_h5ad(tmp_path / "s.h5ad")
    with open(tmp_path / "mine.csv", "w", newline="") as handle:
        csv.writer(handle).writerows([n, ("L2/3", 'a "b", c')[i % 2]] for i, n in enumerate(names))
    with pytest.warns(UserWarning, match="6 repeated gene symbols"):
        slide = readers.load_slide(tmp_path / "s.h5ad", labels=tmp_path / "mine.csv")
    assert slide.barcodes.tolist() == names and slide.classes == ["L2/3", 'a "b", c']
    assert slide.genes[:3].tolist() == ["HLA-A/B,0", "HLA-A/B,0-1", "HLA-A/B,1"]


@pytest.mark.parametrize(
    "names, is_swapped",
    [
        (("x", "y"), False),
        (("pxl_row_in_fullres", "pxl_col_in_fullres"), True),
        (("a", "b"), False),
    ],
)
def test_spatial_as_a_data_frame(tmp_path, counts, names, is_swapped):
    pandas = pytest.importorskip("pandas")
    adata = make_adata(counts)
    xy = adata.obsm["spatial"]
    adata.obsm["spatial"] = pandas.DataFrame(xy, index=adata.obs_names, columns=list(names))
    adata.write_h5ad(tmp_path / "s.h5ad")
    slide = readers.load_h5ad(tmp_path / "s.h5ad")
    assert (slide.xy == (xy[:, ::-1] if is_swapped else xy)).all()


def test_quoted_positions_of_r(visium):
    path = visium / "spatial" / "tissue_positions_list.csv"
    rows = [line.split(",") for line in path.read_text().split()]
    quoted = [",".join([f'"{row[0]}"', *row[1:]]) for row in rows]
    head = ",".join(f'"{name}"' for name in space_ranger.POSITIONS)
    before = readers.load_visium(visium)
    path.write_text("\n".join([head, *quoted]) + "\n")
    assert (readers.load_visium(visium).xy == before.xy).all()


# ----------------------------------------------------------------- Visium HD and other platforms
def write_hd(folder, counts):
    """outs/ of Space Ranger 4: two bin sizes and cells; returns the cells' centres."""
    for name in ("square_002um", "square_008um"):
        write_visium(folder / "binned_outputs" / name, counts, header=True)
    cells = folder / "segmented_outputs"
    write_visium(cells, counts)
    (cells / "spatial" / "tissue_positions_list.csv").unlink()
    (cells / MATRIX).unlink()
    codes = [f"cellid_{i + 1:09d}-1" for i in range(len(counts))]
    write_10x(cells / "filtered_feature_cell_matrix.h5", counts, codes=codes)
    centres = np.stack(lattice(len(counts))[2:], axis=1)
    shape = np.array([[0, 0], [30, 0], [30, 10], [0, 10], [0, 0]]) - [15, 5]
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [(shape + centre).tolist()]},
            "properties": {"cell_id": i + 1},
        }
        for i, centre in enumerate(centres)
    ][::-1]
    text = json.dumps({"type": "FeatureCollection", "features": features})
    (cells / "cell_segmentations.geojson").write_text(text)
    return centres


@pytest.mark.parametrize("start", ["P1/outs", "P1", "P1/outs/binned_outputs"])
def test_visium_hd_output(tmp_path, counts, start):
    centres = write_hd(tmp_path / "P1" / "outs", counts)
    root = tmp_path / start
    names = ["P1_segmented_outputs", "P1_square_002um", "P1_square_008um"]
    assert readers.list_slices(root) == names and not readers.is_one_slide(root)
    with pytest.raises(DataError, match="holds 3 slices"):
        readers.load_slide(root)
    for name in ("P1_square_008um", "square_008um"):
        slide = readers.load_slide(root, name)
        assert slide.sample == "P1_square_008um" and (slide.counts.toarray() == counts).all()
    cells = readers.load_slide(root, "segmented_outputs")
    assert cells.sample == "P1_segmented_outputs" and cells.grid is None
    assert np.allclose(cells.xy, centres) and (cells.counts.toarray() == counts).all()
    assert cells.image is not None and cells.image_scale == 0.1


def test_hd_parts_of_several_samples(tmp_path, counts):
    write_hd(tmp_path / "P1" / "outs", counts)
    write_hd(tmp_path / "P2" / "outs", counts)
    write_visium(tmp_path / "P3" / "outs", counts)
    names = readers.list_slices(tmp_path)
    assert len(names) == 7 and {"P1_square_008um", "P2_square_008um", "P3"} <= set(names)
    for name in ("P2_square_008um", "P3"):
        assert readers.load_slide(tmp_path, name).sample == name
    one = tmp_path / "P2" / "outs" / "binned_outputs" / "square_008um"
    assert readers.load_slide(one).sample == "P2_square_008um"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: text[:-20], "cannot be read as JSON"),
        (lambda text: "[1]", "no GeoJSON of cell outlines"),
        (lambda text: text.replace("cell_id", "id"), "no GeoJSON of cell outlines"),
        (lambda text: text.replace('"cell_id": 7}', '"cell_id": 777}'), "holds only 59 of the 60"),
        (lambda text: '{"features": []}', "holds 0 cells"),
        (lambda text: text.replace('"cell_id": 7}', '"cell_id": 8}'), "holds 59 cells in 60"),
        (lambda text: text.replace("[[[", '[[["a",'), "no GeoJSON of cell outlines"),
    ],
)
def test_bad_cell_outlines(tmp_path, counts, change, message):
    write_hd(tmp_path / "outs", counts)
    path = tmp_path / "outs" / "segmented_outputs" / "cell_segmentations.geojson"
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=message):
        readers.load_slide(path.parent)


def _touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    return root


@pytest.mark.parametrize(
    "name, files, message",
    [
        ("a.zarr", [".zgroup", "obs/.zgroup"], r"AnnData zarr.*anndata.read_zarr\('.*a.zarr'\)"),
        ("a.zarr", ["zarr.json", "tables/zarr.json"], r"SpatialData zarr.*tables\['table'\]"),
        ("bundle", ["experiment.xenium"], "python -m plainst convert xenium .*bundle"),
        ("region_0", ["cell_by_gene.csv", "cell_metadata.csv"], "squidpy.read.vizgen"),
        ("cosmx", ["R5_exprMat_file.csv"], "squidpy.read.nanostring.*R5_metadata_file.csv"),
    ],
)
def test_folders_of_other_platforms(tmp_path, name, files, message):
    root = _touch(tmp_path / name, *files)
    for call in (lambda: readers.load_slide(root), lambda: readers.load_slide(tmp_path, name)):
        with pytest.raises(DataError, match=message) as caught:
            call()
        assert str(root) in str(caught.value) and "\n" not in str(caught.value)


def test_matrix_alone(visium, tmp_path):
    with pytest.raises(DataError, match="alone holds no positions: give the Space Ranger folder"):
        readers.load_slide(visium / MATRIX)
    with pytest.raises(DataError, match=r"zellkonverter::writeH5AD\(sce, 'brain.h5ad'\)"):
        readers.load_slide(_touch(tmp_path, "brain.rds") / "brain.rds")


def test_donor_beside_the_slices(visium, tmp_path, counts):
    make_adata(counts).write_h5ad(tmp_path / "H.h5ad")
    path = tmp_path / "slice_donors.csv"
    path.write_text("slice,donor\nS1,Br1\nH,Br2\n")
    slide = readers.load_slide(tmp_path, "S1")
    assert slide.patient == "Br1" and str(path) in slide.tables
    assert readers.load_slide(tmp_path, "H").patient == "Br2"
    (visium / "metadata.tsv").write_text(
        "barcode\tsubject\n" + "".join(f"{c}\tBr9\n" for c in barcodes())
    )
    assert readers.load_slide(tmp_path, "S1").patient == "Br9"  # its own table first
    (visium / "metadata.tsv").unlink()
    path.write_text("name\nS1\n")
    with pytest.raises(
        DataError, match=r"slice_donors\.csv is no table of the columns slice,donor"
    ):
        readers.load_slide(tmp_path, "S1")


# --------------------------------------------------------------------------------------------- loom
def write_loom(path, counts):
    """As loompy lays it out: genes x cells, attributes of rows and columns."""
    _, _, x, y = lattice(len(counts))
    with h5py.File(path, "w") as handle:
        handle["matrix"] = counts.T.astype(np.float64)
        handle["layers/double"] = 2 * counts.T
        handle["row_attrs/Gene"] = np.array([f"G{j}" for j in range(counts.shape[1])], dtype="S")
        handle["row_attrs/Accession"] = np.array([f"E{j}" for j in range(counts.shape[1])], "S")
        handle["col_attrs/CellID"] = np.arange(len(counts)) + 100
        handle["col_attrs/X"], handle["col_attrs/Y"] = x, y
        handle["col_attrs/Region"] = np.array([("L2/3", "L4")[i % 2] for i in range(len(x))], "S")
        handle["col_attrs/ClusterID"] = np.arange(len(x)) % 11
        handle["col_attrs/Valid"] = (np.arange(len(x)) != 3).astype(np.int64)
    return path


def test_loom(tmp_path, counts, monkeypatch):
    monkeypatch.setattr(loom, "BLOCK", 7)
    path = write_loom(tmp_path / "cortex.loom", counts)
    slide = readers.load_slide(path)
    valid = np.arange(N_SPOTS) != 3
    assert (slide.counts.toarray() == counts[valid]).all() and slide.classes == ["L2/3", "L4"]
    assert slide.barcodes[3] == "104" and slide.genes[2] == "G2" and slide.sample == "cortex"
    assert (slide.xy == np.stack(lattice()[2:], axis=1)[valid]).all()
    assert readers.list_slices(tmp_path) == ["cortex"]
    keys = {"layer": "double", "gene_key": "Accession", "label_key": "ClusterID"}
    slide = readers.load_slide(tmp_path, "cortex", **keys)
    assert slide.counts.sum() == 2 * counts[valid].sum() and slide.genes[2] == "E2"
    assert slide.classes == [str(i) for i in range(11)]
    for name in keys:
        with pytest.raises(DataError, match=rf"no .* nope: choose one of .*--{name}"):
            readers.load_slide(path, **{name: "nope"})


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: f.__delitem__("col_attrs/X"), "has no positions"),
        (lambda f: f.__delitem__("row_attrs/Gene"), "cannot be read as a loom file"),
        (lambda f: _h5ad(f, "matrix", lambda v: v + 0.5), "non-integer values in matrix"),
        (lambda f: _h5ad(f, "matrix", lambda v: v[:, :-1]), "cannot be read as a loom file"),
        (lambda f: _h5ad(f, "col_attrs/CellID", lambda v: v * 0), "60 times"),
        (lambda f: _h5ad(f, "col_attrs/Region", lambda v: v[:3]), "cannot be read as a loom file"),
    ],
)
def test_bad_loom(tmp_path, counts, damage, message):
    path = write_loom(tmp_path / "a.loom", counts)
    with h5py.File(path, "a") as handle:
        damage(handle)
    with pytest.raises(DataError, match=message) as caught:
        readers.load_slide(path)
    assert str(path) in str(caught.value)
