"""cells.py: the cell file, its checks, the converters and the split over cells."""

import errno
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.sparse as sp
from PIL import Image

import data
from conftest import ROOT
from plainst.readers import convert, xenium

N, G, C, S = 150, 7, 2, 8


def table(n=N, seed=0, **changes):
    """Arguments of write_cells for n random cells in two sections that share coordinates."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(1.0, (n, G))
    counts[:, 0] += 1
    return {
        "counts": sp.csr_matrix(counts),
        "genes": [f"gene{g}" for g in range(G)],
        "ids": [f"zelle-\u00e4{i}" for i in range(n)],
        "xy": rng.uniform(0, 3000, (n, 2)),
        "section": np.arange(n) % 2,
        "sections": ["left", "right"],
        "crops": rng.integers(0, 256, (n, C, S, S), dtype=np.uint8),
        "channels": ["own", "other"],
    } | changes


@pytest.fixture
def path(tmp_path):
    return data.write_cells(tmp_path / "cells.h5", **table())


def test_what_is_written_is_read_back(tmp_path):
    given = table(
        labels=np.arange(N) % 3 - 1,
        classes=["a", "b"],
        masks=np.random.default_rng(1).random((N, S, S)) < 0.3,
        um_per_px=0.5,
        px_per_crop_px=3,
        truth={"program": np.arange(N) / 7, "name": np.array(["x", "y\u00e9"])},
    )
    found = data.load_cells(data.write_cells(tmp_path / "new" / "cells.h5", **given))
    assert (
        (found.counts != given["counts"]).nnz == 0
        and found.counts.dtype == np.int32
        and (found.n_cells, found.n_genes) == (N, G)
    )
    for name in ("genes", "ids", "xy", "section", "labels"):
        np.testing.assert_array_equal(getattr(found, name), given[name], err_msg=name)
    for name in ("crops", "masks"):
        np.testing.assert_array_equal(getattr(found, name)[:], given[name])
    assert (found.sections, found.channels, found.classes) == (
        ["left", "right"],
        ["own", "other"],
        ["a", "b"],
    )
    assert (found.um_per_px, found.px_per_crop_px) == (
        0.5,
        3.0,
    ) and found.section_sizes.tolist() == [75, 75]
    np.testing.assert_array_equal(found.truth["program"], np.arange(N) / 7)
    assert found.truth["name"].tolist() == ["x", "y\u00e9"] and found.source.endswith("cells.h5")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["cells.h5"]


FULL_DISK = """
import resource, sys
from pathlib import Path
import numpy as np
import test_cells
data, given, path = test_cells.data, test_cells.table(2000), Path(sys.argv[2]) / "cells.h5"
size = (2000, 2, 32, 32)  # 4 MB before compression
given["crops"] = np.random.default_rng(0).integers(0, int(sys.argv[1]), size, dtype=np.uint8)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
data.write_cells(path, **test_cells.table(seed=1))
old, refused = path.read_bytes(), 0
for limit in np.geomspace(500, 2 ** 23, 24).astype(int).tolist():
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        data.write_cells(path, **given)
        break
    except data.DataError as error:
        refused += 1
        reason = "cannot be written (File too large): check the path, the rights and the free space"
        assert reason in str(error)
        assert path.read_bytes() == old
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [p.name for p in path.parent.iterdir()] == ["cells.h5"]
np.testing.assert_array_equal(data.load_cells(path).crops[:], given["crops"])
print("refused", refused)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks the system for room as Linux does")
@pytest.mark.parametrize("values", [2, 256])
def test_a_full_disk_is_one_sentence_wherever_it_fills(tmp_path, values):
    """A file may grow to so many bytes only, as on a full disk, in a process of its own: HDF5 would
    end it in closing a file that it could not write."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(values), str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > 15


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no way to ask for room")
@pytest.mark.parametrize(
    "code, written",
    [(errno.EOPNOTSUPP, True), (errno.EINVAL, True), (errno.EDQUOT, False), (errno.ENOSPC, False)],
)
def test_room_is_asked_for_where_the_file_system_answers(
    path, tmp_path, monkeypatch, code, written
):
    """What was asked for and not used is given back: the bytes are those of a file for which
    nothing was asked."""

    def refuse(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    if written:
        assert data.write_cells(tmp_path / "b.h5", **table()).read_bytes() == path.read_bytes()
    else:
        with pytest.raises(data.DataError, match="b.h5 cannot be written"):
            data.write_cells(tmp_path / "b.h5", **table())
    assert {p.name for p in tmp_path.iterdir()} == {"cells.h5", *["b.h5"] * written}


def test_what_may_be_left_out(path):
    found = data.load_cells(path)
    assert (
        found.masks is None
        and found.classes == []
        and (found.labels == -1).all()
        and np.isnan(found.um_per_px)
        and found.truth == {}
    )


def test_cells_without_pictures(tmp_path):
    """Legal, with no channel and no mask; the split of them drops no cell for overlapping crops."""
    words = table(400, crops=None, channels=[])
    found = data.load_cells(data.write_cells(tmp_path / "c.h5", **words))
    assert found.crops is None and found.channels == [] and found.n_cells == 400
    assert "crops None" in repr(found)
    split = data.cell_split(found, width=300.0, val=0)
    assert (split.train | split.test).all() and not split.leaks_position
    for changes in ({"channels": ["own"]}, {"masks": np.zeros((400, S, S), bool)}):
        with pytest.raises(data.DataError, match="holds no crops: give a crop a cell"):
            data.write_cells(tmp_path / "d.h5", **words | changes)


def test_an_h5ad_becomes_cells_without_pictures(real_data, tmp_path, capsys):
    source = real_data / "starmap_mpfc" / "BZ5.h5ad"
    assert (
        convert.main(["h5ad", str(source), str(tmp_path / "c.h5"), "--label_key", "cell_type"])
        is None
    )
    found = data.load_cells(tmp_path / "c.h5")
    assert (found.n_cells, found.n_genes, len(found.classes)) == (1049, 166, 15)
    slide = data.load_slide(source, label_key="cell_type")
    assert (found.counts != slide.counts).nnz == 0 and (found.labels == slide.labels).all()
    np.testing.assert_array_equal(found.xy, slide.xy)
    assert "no pictures, 15 classes; dropped 0 cells without a count" in capsys.readouterr().out


def test_the_same_cells_give_the_same_bytes(path, tmp_path):
    """The data checksum of a record must not depend on when the file was made."""
    assert data.file_checksum(path) == data.file_checksum(
        data.write_cells(tmp_path / "again.h5", **table())
    )


def test_crops_are_read_by_row(path):
    crops, all_crops = data.load_cells(path).crops, table()["crops"]
    assert crops.shape == (N, C, S, S) and len(crops) == N and crops.path == str(path)
    mask = np.arange(N) % 5 == 1
    for item in (
        0,
        -1,
        np.int64(77),
        [5, 3, 5, 140],
        np.array([149, 0, 64, 63]),
        slice(60, 70),
        slice(None, None, -7),
        mask,
        np.array([], dtype=int),
    ):
        np.testing.assert_array_equal(crops[item], all_crops[item], err_msg=str(item))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(crops))[[9, 2]], all_crops[[9, 2]])
    with pytest.raises(IndexError):
        crops[N]


def test_crops_may_come_block_by_block(tmp_path):
    given = table()
    blocks = (given["crops"][i : i + 40] for i in range(0, N, 40))
    np.testing.assert_array_equal(
        data.load_cells(data.write_cells(tmp_path / "c.h5", **given | {"crops": blocks})).crops[:],
        given["crops"],
    )


def changed(path, **items):
    """The file with datasets replaced (None: deleted) and, for names with @, attributes."""
    with h5py.File(path, "r+") as handle:
        for name, value in items.items():
            if name.startswith("at_"):
                handle.attrs[name[3:]] = value
                continue
            name = name.replace("__", "/")
            if name in handle:
                del handle[name]
            if value is not None:
                handle[name] = value
    return path


def ragged():
    out = np.empty(N, dtype=object)
    out[:] = [np.zeros(4 + i % 3, np.uint8) for i in range(N)]
    return out


BAD = {
    "crops of unequal size": (lambda p: _vlen(p), "unequal size"),
    "crops not square": (
        lambda p: changed(p, crops=np.zeros((N, C, S, S + 1), np.uint8)),
        "unequal size",
    ),
    "crops as float": (
        lambda p: changed(p, crops=np.zeros((N, C, S, S), np.float32)),
        "another kind",
    ),
    "too few crops": (
        lambda p: changed(p, crops=np.zeros((N - 1, C, S, S), np.uint8)),
        "150 cells and 2 channels but crops",
    ),
    "too few channels": (lambda p: changed(p, channels=["own"]), "150 cells and 1 channels"),
    "masks of another size": (lambda p: changed(p, masks=np.zeros((N, S, S + 1), bool)), "masks"),
    "more label ids than cells": (
        lambda p: changed(p, labels=np.zeros(N + 1, np.int32)),
        r"labels of shape \(151,\)",
    ),
    "more label ids than classes": (
        lambda p: changed(p, labels=np.arange(N) % 3, classes=["a", "b"]),
        "label ids outside",
    ),
    "zero-count cells": (
        lambda p: changed(p, counts__data=np.where(np.arange(_nnz(p)) < _row0(p), 0, 1)),
        "1 cells without a single count",
    ),
    "NaN counts": (lambda p: changed(p, counts__data=np.full(_nnz(p), np.nan)), "NaN"),
    "broken CSR": (
        lambda p: changed(p, counts__indices=np.full(_nnz(p), G + 3)),
        "cannot be read as a cell file",
    ),
    "no xy": (lambda p: changed(p, xy=None), "cannot be read as a cell file"),
    "NaN in xy": (lambda p: changed(p, xy=np.full((N, 2), np.nan)), "not finite"),
    "xy of other cells": (lambda p: changed(p, xy=np.zeros((N + 1, 2))), r"xy of shape \(151, 2\)"),
    "unknown section": (lambda p: changed(p, section=np.full(N, 2)), "section numbers"),
    "repeated ids": (lambda p: changed(p, ids=["a"] * N), "150 times"),
    "repeated genes": (lambda p: changed(p, genes=["a"] * G), "gene twice"),
    "another version": (lambda p: changed(p, at_version=2), "not a cell file of version 1"),
    "another format": (lambda p: changed(p, at_format="x"), "not a cell file"),
    "infinite field of view": (lambda p: changed(p, at_px_per_crop_px=np.inf), "px per crop px"),
    "crops in no bytes": (lambda p: _empty(p), "declares"),
    "values beyond the last row pointer": (
        lambda p: changed(p, counts__indptr=np.r_[0, np.full(N, _nnz(p) - 1)]),
        "row pointers",
    ),
    "sections as numbers": (lambda p: changed(p, sections=[1, 2]), "instead of a list of names"),
    "no field of view": (lambda p: changed(p, at_px_per_crop_px=0.0), "px per crop px"),
}


def _vlen(path):
    changed(path, crops=None)
    with h5py.File(path, "r+") as handle:
        handle.create_dataset("crops", data=ragged(), dtype=h5py.vlen_dtype(np.uint8))
    return path


def _empty(path):
    changed(path, crops=None)
    with h5py.File(path, "r+") as handle:
        handle.create_dataset("crops", (N, C, 4096, 4096), np.uint8, chunks=(1, C, 64, 64))


def _nnz(path):
    return h5py.File(path)["counts/data"].shape[0]


def _row0(path):
    return int(h5py.File(path)["counts/indptr"][1])


@pytest.mark.parametrize("case", BAD)
def test_files_that_cannot_be_used(path, case):
    damage, message = BAD[case]
    damage(path)
    with pytest.raises(data.DataError, match=message) as error:
        data.load_cells(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_file(path, share):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(data.DataError, match="truncated"):
        data.load_cells(path)


def test_missing_file(tmp_path):
    with pytest.raises(data.DataError, match="does not exist"):
        data.load_cells(tmp_path / "no.h5")


def test_flipped_bits_in_the_crops_are_noticed(path):
    with h5py.File(path) as handle:
        chunk = handle["crops"].id.get_chunk_info(1)
    whole = bytearray(path.read_bytes())
    whole[chunk.byte_offset + 100] ^= 0xFF
    path.write_bytes(whole)
    crops = data.load_cells(path).crops
    np.testing.assert_array_equal(crops[:64], table()["crops"][:64])
    with pytest.raises(data.DataError, match="cells.h5"):
        crops[64:128]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"crops": [np.zeros((1, C, S, S), np.uint8), np.zeros((1, C, S + 1, S + 1), np.uint8)]},
            "crops of unequal size",
        ),
        ({"crops": np.zeros((N - 1, C, S, S), np.uint8)}, "149 crops for 150 cells"),
        ({"crops": np.zeros((N + 1, C, S, S), np.uint8)}, "more crops than its 150 cells"),
        ({"crops": np.zeros((N, C, S, S))}, "another kind"),
        ({"counts": sp.csr_matrix(np.zeros((N, G), int))}, "150 cells without a single count"),
        ({"counts": sp.csr_matrix(np.full((N, G), 0.5))}, "non-integer"),
        ({"labels": np.zeros(N, int)}, "label ids outside"),
        ({"masks": np.zeros((N, S, S), np.uint8)}, "masks"),
    ],
)
def test_nothing_is_written_when_something_is_wrong(path, tmp_path, changes, message):
    before = path.read_bytes()
    with pytest.raises(data.DataError, match=message):
        data.write_cells(path, **table(seed=1) | changes)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["cells.h5"]


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(data.DataError, match="cannot be written"):
        data.write_cells(tmp_path / "file" / "cells.h5", **table())


# ---------------------------------------------------------------------------------------------- CA1
@pytest.fixture(scope="module")
def ca1(real_data, tmp_path_factory):
    return data.load_cells(
        data.from_ca1(real_data / "ca1", tmp_path_factory.mktemp("ca1") / "cells.h5")
    )


def test_ca1_is_the_recipe(ca1):
    assert (
        (ca1.n_cells, ca1.n_genes) == (2358, 92)
        and ca1.sections == ["ca1"]
        and ca1.px_per_crop_px == 3
        and np.isnan(ca1.um_per_px)
    )
    assert (
        np.median(np.asarray(ca1.counts.sum(axis=1))) == 21.5 and ca1.counts.sum(axis=1).min() == 8
    )
    assert ca1.crops.shape == (2358, 2, 32, 32) and ca1.channels == ["own", "other"]


def test_ca1_against_a_naive_version(ca1, real_data):
    image = sp.load_npz(real_data / "ca1" / "label_image.coo.npz").toarray()
    reads = [
        line.split(",") for line in (real_data / "ca1" / "spots.csv").read_text().splitlines()[1:]
    ]
    numbers = ca1.ids.astype(int)
    at_rim = np.flatnonzero(
        (ca1.xy < 48).any(axis=1) | (ca1.xy > [7602 - 48, 5471 - 48]).any(axis=1)
    )
    assert len(at_rim) > 3
    padded = np.pad(image, 48)
    for i in [*at_rim[:2], *np.random.default_rng(0).choice(2358, 3, replace=False)]:
        y, x = np.nonzero(image == numbers[i])
        np.testing.assert_allclose(ca1.xy[i], [x.mean(), y.mean()])
        cx, cy = np.rint(ca1.xy[i]).astype(int) + 48
        window = padded[cy - 48 : cy + 48, cx - 48 : cx + 48]
        for channel, mask in enumerate(
            (window == numbers[i], (window != 0) & (window != numbers[i]))
        ):
            pooled = mask.reshape(32, 3, 32, 3).mean((1, 3))
            np.testing.assert_array_equal(ca1.crops[i][channel], np.rint(255 * pooled))
    centroids = {}
    # one read at a time: the nearest of all nuclei near it
    for i in np.random.default_rng(1).choice(len(reads), 40, replace=False):
        gene, x, y = reads[i][0], int(reads[i][1]), int(reads[i][2])
        for number in np.unique(image[max(y - 150, 0) : y + 150, max(x - 150, 0) : x + 150]):
            if number and number not in centroids:
                where = np.argwhere(
                    image[max(y - 250, 0) : y + 250, max(x - 250, 0) : x + 250] == number
                )
                centroids[number] = where.mean(0)[::-1] + [max(x - 250, 0), max(y - 250, 0)]
        near = {n: np.hypot(*(c - [x, y])) for n, c in centroids.items()}
        best = min(near, key=near.get, default=None)
        if best is not None and near[best] <= 35 and best in numbers:
            assert (
                ca1.counts[np.flatnonzero(numbers == best)[0], np.flatnonzero(ca1.genes == gene)[0]]
                > 0
            )


def write_ca1(folder, reads, image):
    folder.mkdir(exist_ok=True)
    (folder / "spots.csv").write_text(reads)
    sp.save_npz(folder / "label_image.coo.npz", sp.coo_matrix(image))
    return folder


def toy_image():
    image = np.zeros((120, 200), np.int32)
    image[20:30, 40:50], image[60:70, 150:160], image[100:110, 20:30] = 7, 300, 5
    return image


def test_nuclei_with_few_reads_are_dropped_and_counted(tmp_path, capsys):
    reads = (
        "x,y,Gene\n"
        + "45,25,b\n" * 8
        + "46,26,a\n"
        + "155,64,a\n" * 7
        + "155,110,a\n"
        + "-1,100,a\n"
    )
    found = data.load_cells(
        data.from_ca1(write_ca1(tmp_path / "s1", reads, toy_image()), tmp_path / "c.h5")
    )
    assert (
        found.ids.tolist() == ["7"]
        and found.genes.tolist() == ["a", "b"]
        and found.sections == ["s1"]
    )
    assert found.counts.toarray().tolist() == [[1, 8]]
    out = capsys.readouterr().out
    assert (
        "1 cells x 2 genes" in out
        and "dropped 2 nuclei with fewer than 8 reads and 1 reads" in out
        and out.count("\n") == 1
    )


READS = "Gene,x,y\n" + "a,45,25\n" * 9 + "b,155,64\n" * 9


def write_stain(path, dtype=np.uint8, shape=(120, 200)):
    pixels = np.random.default_rng(0).integers(0, 200, shape).astype(dtype)
    Image.fromarray(pixels * (100 if dtype == np.uint16 else 1)).save(path)
    return pixels


def test_a_stain_is_one_channel_more(tmp_path):
    """Its crop is cut where the masks are cut; 8 bits stay, 16 bits are scaled by quantiles."""
    folder, out = write_ca1(tmp_path / "s", READS, toy_image()), tmp_path / "c.h5"
    pixels = write_stain(tmp_path / "DAPI.png")
    words = {"stain": tmp_path / "DAPI.png", "crop_px": 32, "size": 16}
    found = data.load_cells(data.from_ca1(folder, out, **words))
    assert found.channels == ["own", "other", "DAPI"] and found.px_per_crop_px == 2
    assert found.crops.shape == (2, 3, 16, 16)
    x, y = np.rint(found.xy[0]).astype(int)
    window = pixels[y - 16 : y + 16, x - 16 : x + 16].astype(float)
    pooled = window.reshape(16, 2, 16, 2).mean((1, 3))
    np.testing.assert_array_equal(found.crops[0][2], np.rint(pooled))
    without = data.load_cells(data.from_ca1(folder, tmp_path / "b.h5", crop_px=32, size=16))
    np.testing.assert_array_equal(found.crops[:][:, :2], without.crops[:])
    write_stain(tmp_path / "deep.png", np.uint16)
    words["stain"] = tmp_path / "deep.png"
    deep = data.load_cells(data.from_ca1(folder, tmp_path / "d.h5", **words))
    r = np.corrcoef(deep.crops[:][:, 2].ravel(), found.crops[:][:, 2].ravel())[0, 1]
    assert deep.channels[2] == "deep" and r > 0.99


def test_labels_of_cells_are_joined_by_id(tmp_path):
    """Also those of nuclei with too few reads, which are dropped; no label is -1."""
    folder, table = write_ca1(tmp_path / "s", READS, toy_image()), tmp_path / "labels.csv"
    table.write_text("label,cell_id\nPC,300\n,7\nOligo,5\n")
    words = {"crop_px": 32, "size": 16, "labels": table}
    found = data.load_cells(data.from_ca1(folder, tmp_path / "c.h5", **words))
    assert found.ids.tolist() == ["7", "300"] and found.labels.tolist()[0] == -1
    assert found.classes[found.labels[1]] == "PC"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stain", "small.png"], "small.png is 100 x 120 px, the label image 200 x 120"),
        (["--stain", "colour.png"], "colour.png has pixels of kind RGB"),
        (["--stain", "none.png"], "none.png cannot be read as an image"),
        (["--stain", "cut.png"], "cut.png cannot be read as an image"),
        (["--labels", "unknown.csv"], r"unknown.csv labels 1 cells that the data lacks \(99"),
        (["--labels", "twice.csv"], "twice.csv labels a cell twice"),
        (["--labels", "columns.csv"], "columns.csv has columns cell, type: it needs cell_id and"),
        (["--labels", "none.csv"], "none.csv cannot be read as a table of labels"),
        (["--crop_px", "128"], "a crop of 128 px cannot be cut from it"),
        (["--crop_px", "50"], "a multiple of its size"),
        (["--size", "2"], "pooled to 2 px"),
    ],
)
def test_stains_labels_and_crops_that_cannot_be_used(tmp_path, monkeypatch, capsys, words, message):
    """As on the command line: status 2, one sentence, nothing written."""
    monkeypatch.chdir(tmp_path)
    write_ca1(tmp_path / "s", READS, toy_image())
    write_stain("small.png", shape=(120, 100))
    write_stain("cut.png")
    _truncate(tmp_path / "cut.png")
    Image.fromarray(np.zeros((120, 200, 3), np.uint8)).save("colour.png")
    for name, text in (
        ("unknown.csv", "cell_id,label\n7,PC\n99,PC\n"),
        ("twice.csv", "cell_id,label\n7,PC\n7,PC\n"),
        ("columns.csv", "cell,type\n7,PC\n"),
    ):
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as stop:
        convert.main(["ca1", "s", "c.h5", *words])
    told = capsys.readouterr().err
    assert stop.value.code == 2 and told.startswith("error: ") and told.count("\n") == 1
    assert re.search(message, told), told
    assert not (tmp_path / "c.h5").exists()


@pytest.mark.parametrize(
    ("reads", "message"),
    [
        ("Gene,x,y\n" + "a,45,25\n" * 9 + "a,236,25\n", "1 reads outside the 200 x 120 px image"),
        ("Gene,x,y\n" + "a,45,25\n" * 9 + "a,45,-36\n", "1 reads outside"),
        ("Gene,x\na,1\n", "needs Gene, x and y"),
        ("", "needs Gene, x and y"),
        ("Gene,x,y\n", "holds no read"),
        ("Gene,x,y\na,b,1\n", "cannot be read as a table"),
        ("Gene,x,y\na,1\n", "cannot be read as a table"),
        ("Gene,x,y\na,nan,1\n", "no finite number"),
        ("Gene,x,y\na,45,25\n", "gives no nucleus 8 reads"),
    ],
)
def test_reads_that_cannot_be_used(tmp_path, reads, message):
    with pytest.raises(data.DataError, match=message) as error:
        data.from_ca1(write_ca1(tmp_path / "s", reads, toy_image()), tmp_path / "c.h5")
    assert "spots.csv" in str(error.value) and not (tmp_path / "c.h5").exists()


@pytest.mark.parametrize(
    "damage", ["missing", "truncated", "other", "float", "empty", "huge", "wide", "out of range"]
)
def test_label_images_that_cannot_be_used(tmp_path, damage):
    folder = write_ca1(tmp_path / "s", "Gene,x,y\na,45,25\n" * 1, toy_image())
    path = folder / "label_image.coo.npz"
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "other":
        np.savez(path, x=np.arange(3))
    elif damage == "wide":
        sp.save_npz(path, sp.coo_matrix(([1], ([0], [0])), shape=(2**20, 2**20)))
    elif damage == "out of range":
        image = sp.csr_matrix(toy_image())
        # written beyond the array's memory by toarray
        image.indices[0] = 2**30
        sp.save_npz(path, image)
    else:
        image = (
            toy_image().astype(float)
            if damage == "float"
            else np.zeros((9, 9), int)
            if damage == "empty"
            else np.full((9, 9), 2**40)
        )
        sp.save_npz(path, sp.coo_matrix(image))
    with pytest.raises(data.DataError, match="label_image.coo.npz"):
        data.from_ca1(folder, tmp_path / "c.h5")
    assert not (tmp_path / "c.h5").exists()


def test_command_line(tmp_path):
    """As users run it, and without the packages of the extra [xenium]."""
    folder = write_ca1(tmp_path / "s", "Gene,x,y\n" + "a,45,25\n" * 9, toy_image())
    code = (
        "import runpy, sys; sys.modules.update(tifffile=None, imagecodecs=None, pyarrow=None); "
        "runpy.run_path(sys.argv[1], run_name='__main__')"
    )
    words = [
        "-c",
        code.replace("sys.argv[1]", f"{str(ROOT / 'plainst' / 'readers' / 'convert.py')!r}"),
        "ca1",
        str(folder),
        str(tmp_path / "c.h5"),
    ]
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (0, "") and "1 cells x 1 genes" in done.stdout
    assert data.load_cells(tmp_path / "c.h5").n_cells == 1


@pytest.mark.parametrize("what", ["ca1", "xenium"])
def test_command_line_errors(tmp_path, what, capsys):
    with pytest.raises(SystemExit) as stop:
        convert.main([what, str(tmp_path / "none"), str(tmp_path / "d.h5")])
    err = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and err.startswith("error: ")
        and err.count("\n") == 1
        and "none" in err
    )


# -------------------------------------------------------------------------------------------- split
def gap(found, a, b):
    """Smallest distance between cells of two parts in one section."""
    return min(
        np.hypot(*(found.xy[a & rows][:, None] - found.xy[b & rows]).transpose(2, 0, 1)).min()
        for rows in (found.section == s for s in np.unique(found.section))
        if (a & rows).any() and (b & rows).any()
    )


def overlaps(found, a, b):
    """Cells of part `a` whose crop shares pixels with one of part `b`."""
    side = found.crops.shape[-1] * found.px_per_crop_px
    apart = np.abs(found.xy[a][:, None] - found.xy[b]).max(-1)  # (n_a, n_b)
    same = found.section[a][:, None] == found.section[b]
    return int(((apart < side) & same).any(1).sum())


def test_buffer_of_cells_is_in_micrometres(tmp_path):
    """A platform with smaller pixels keeps the same distance on the tissue."""
    parts = []
    for name, um_per_px in (("a.h5", 0.5), ("b.h5", 0.25)):
        given = table(800, um_per_px=um_per_px, px_per_crop_px=0.5 / um_per_px)
        given["xy"] = given["xy"] * 0.5 / um_per_px
        found = data.load_cells(data.write_cells(tmp_path / name, **given))
        split = data.cell_split(found, width=300.0 / um_per_px, buffer=20.0)
        assert gap(found, split.train, split.test) * um_per_px > 20
        assert "cells within 20 um" in split.detail
        parts.append((split.train, split.test, data.cell_split(found, width=300.0 / um_per_px)))
    for one, other in zip(*parts):
        one, other = getattr(one, "train", one), getattr(other, "train", other)
        np.testing.assert_array_equal(one, other)


def test_ca1_blocks(ca1):
    whole = data.cell_split(ca1, val=0)
    assert (
        (whole.train.sum(), whole.val.sum(), whole.test.sum()) == (1506, 0, 645)
        and "600 px" in whole.detail
        and "cells within 135.8 px (the cell file has no um_per_px)" in whole.detail
        and not whole.leaks_position
    )
    split = data.cell_split(ca1)
    assert (
        np.array_equal(split.test, whole.test)
        and not ((split.train | split.val) & ~whole.train).any()
        and split.val.sum() > 200
    )
    assert not (split.train & split.val).any() and split.train.sum() > 1000
    side = ca1.crops.shape[-1] * ca1.px_per_crop_px
    for a, b in ((split.train, split.test), (split.val, split.test), (split.train, split.val)):
        assert gap(ca1, a, b) > 2**0.5 * side and overlaps(ca1, a, b) == 0
    # the side of a crop is too little: neighbours across a corner share pixels
    narrow = data.cell_split(ca1, val=0, buffer=side)
    assert overlaps(ca1, narrow.test, narrow.train) == 30
    assert narrow.leaks_position and "crops overlap" in narrow.detail
    assert (
        np.sum([data.cell_split(ca1, fold=k).test for k in range(4)], axis=0).tolist() == [1] * 2358
    )
    assert data.cell_split(ca1, buffer=0).leaks_position


def test_blocks_of_two_sections_keep_their_distance_within_the_section(tmp_path):
    found = data.load_cells(data.write_cells(tmp_path / "c.h5", **table(800)))
    split = data.cell_split(found, width=300.0, buffer=60.0)
    assert ((found.xy[:, 0] // 300 % 4 == 2) == split.test).all() and not (
        split.test & (split.train | split.val)
    ).any()
    assert (
        min(
            gap(found, split.train, split.test),
            gap(found, split.train, split.val),
            gap(found, split.val, split.test),
        )
        > 60
    )
    # now section 1 has no test cell: it loses none to the buffer
    found.section[(found.xy[:, 0] // 300) % 4 == 2] = 0
    again = data.cell_split(found, width=300.0, buffer=60.0, val=0)
    assert (
        again.train[found.section == 1].all()
        and not (again.train | again.test)[found.section == 0].all()
    )


def test_sections(tmp_path):
    for n, every in ((3, 3), (4, 4), (9, 4)):
        given = table(180, sections=[f"s{i}" for i in range(n)], section=np.arange(180) % n)
        found = data.load_cells(data.write_cells(tmp_path / "c.h5", **given))
        splits = [data.cell_split(found, fold=k) for k in range(every)]
        assert np.sum([s.test for s in splits], axis=0).tolist() == [1] * 180
        for s in splits:
            assert s.name == "sections" and "sections" in s.detail and not s.leaks_position
            parts = [set(found.section[part].tolist()) for part in (s.train, s.val, s.test)]
            assert (
                all(parts)
                and sum(map(len, parts)) == n == len(set.union(*parts))
                and (s.train | s.val | s.test).all()
            )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"width": 1e5}, "no cell to test"),
        ({"buffer": 1e4}, "no cell to"),
        ({"fold": 4}, "make no split"),
        ({"width": 0.0}, "make no split"),
        ({"val": 1}, "make no split"),
        ({"test_every": 1}, "make no split"),
    ],
)
def test_splits_that_cannot_be_made(path, flags, message):
    with pytest.raises(data.DataError, match=message):
        data.cell_split(data.load_cells(path), **flags)


# ------------------------------------------------------------------------------------------- Xenium
@pytest.fixture(scope="module")
def bundle(real_data):
    for name in ("tifffile", "imagecodecs", "pyarrow"):
        pytest.importorskip(name)
    return real_data / "xenium_tiny"


@pytest.fixture
def copy(bundle, tmp_path):
    shutil.copytree(bundle, tmp_path / "bundle", copy_function=shutil.copy)
    for p in [tmp_path / "bundle", *(tmp_path / "bundle").rglob("*")]:
        p.chmod(0o755 if p.is_dir() else 0o644)
    return tmp_path / "bundle"


def naive_crop(image, xy, pool, size=32):
    x, y = np.floor(xy).astype(int) + 200
    half = pool * size // 2
    window = np.pad(image, 200)[y - half : y + half, x - half : x + half].astype(float)
    return window.reshape(size, pool, size, pool).mean((1, 3))


def test_xenium_bundle(bundle, tmp_path, capsys):
    import pyarrow.parquet
    import tifffile

    found = data.load_cells(data.from_xenium(bundle, tmp_path / "c.h5"))
    counts, genes, ids = data.read_10x_h5(bundle / "cell_feature_matrix.h5")
    has = np.asarray(counts.sum(axis=1)).ravel() > 0
    assert (
        sorted(found.ids) == sorted(ids[has])
        and found.n_cells == 21
        and found.genes.tolist() == genes.tolist()
        and len(genes) == 5006
    )
    assert "dropped 15 cells without a gene count; a crop shows 27.2 um" in capsys.readouterr().out
    assert (
        found.sections == ["xenium_tiny"]
        and found.um_per_px == 0.2125
        and found.px_per_crop_px == 4
        and found.crops.shape == (21, 4, 32, 32)
    )
    assert found.channels == ["DAPI", "ATP1A1/CD45/E-Cadherin", "18S", "alphaSMA/Vimentin"]
    cells_table = pyarrow.parquet.read_table(bundle / "cells.parquet").to_pydict()
    for i in range(21):
        k, row = (
            cells_table["cell_id"].index(found.ids[i]),
            int(np.flatnonzero(ids == found.ids[i])[0]),
        )
        np.testing.assert_allclose(
            found.xy[i] * 0.2125, [cells_table["x_centroid"][k], cells_table["y_centroid"][k]]
        )
        assert (found.counts[i] != counts[row]).nnz == 0
        # um2, against the table's
        area = found.masks[i].sum() * (4 * 0.2125) ** 2
        assert area == pytest.approx(min(cells_table["cell_area"][k], 27.2**2), rel=0.35, abs=6)
    image = tifffile.imread(
        bundle / "morphology_focus" / "morphology_focus_0001.ome.tif", is_ome=False, level=0
    )
    raw, crops = (
        np.stack([naive_crop(image, xy, 4) for xy in found.xy]),
        found.crops[:,][:, 1].astype(float),
    )
    low, high = np.quantile(raw, [0.01, 0.998])
    np.testing.assert_allclose(crops, 255 * np.clip((raw - low) / (high - low), 0, 1), atol=0.51)


def test_xenium_reads_only_the_tiles_under_the_cells(bundle, tmp_path, monkeypatch):
    import tifffile

    decoded, whole = [], xenium._Plane._tile

    def tile(self, row, col):
        decoded.append((self.path, row, col))
        return whole(self, row, col)

    monkeypatch.setattr(xenium._Plane, "_tile", tile)
    monkeypatch.setattr(
        tifffile.TiffPage, "asarray", lambda *a, **k: pytest.fail("a whole page was read")
    )
    data.from_xenium(bundle, tmp_path / "c.h5")
    # of the 24 tiles of a page
    assert 0 < len({d[1:] for d in decoded}) < 12


def test_xenium_decodes_each_tile_once(bundle, tmp_path, monkeypatch):
    import tifffile

    decoded, whole = [], tifffile.TiffPage.decode.__get__

    def counted(page):
        decode = whole(page, type(page))

        def wrapper(packed, index, **words):
            decoded.append((page.parent.filename, page.index, index))
            return decode(packed, index, **words)

        return wrapper

    monkeypatch.setattr(tifffile.TiffPage, "decode", property(counted))
    data.from_xenium(bundle, tmp_path / "c.h5")
    assert decoded and len(decoded) == len(set(decoded))


def test_xenium_labels_and_wide_crops(bundle, tmp_path):
    ids = data.read_10x_h5(bundle / "cell_feature_matrix.h5")[2]
    (tmp_path / "l.csv").write_text(
        "cell_id,label\n" + "".join(f"{i},t{len(i) % 2}\n" for i in ids)
    )
    found = data.load_cells(data.from_xenium(bundle, tmp_path / "c.h5", labels=tmp_path / "l.csv"))
    assert (found.labels >= 0).all() and set(found.classes) <= {"t0", "t1"}
    with pytest.raises(data.DataError, match="a crop of 3776 px is wider"):
        data.from_xenium(bundle, tmp_path / "d.h5", field_um=800.0)
    (tmp_path / "l.csv").write_text("cell_id,label\nnobody,t0\n")
    with pytest.raises(data.DataError, match="labels 1 cells that the data lacks"):
        data.from_xenium(bundle, tmp_path / "d.h5", labels=tmp_path / "l.csv")


def test_xenium_z_stack(copy, tmp_path):
    import tifffile

    shutil.rmtree(copy / "morphology_focus")
    (copy / "cell_boundaries.parquet").unlink()
    stack = np.random.default_rng(0).integers(0, 200, (3, 1950, 4500), dtype=np.uint8)
    tifffile.imwrite(
        copy / "morphology.ome.tif",
        stack,
        tile=(512, 256),
        metadata={"axes": "ZYX", "Channel": {"Name": "DAPI"}},
    )
    image = stack.max(axis=0)
    found = data.load_cells(data.from_xenium(copy, tmp_path / "c.h5", field_um=20, size=16))
    assert (
        found.channels == ["DAPI"]
        and found.masks is None
        and found.px_per_crop_px == 6
        and found.crops.shape == (21, 1, 16, 16)
    )
    raw = np.stack([naive_crop(image, xy, 6, 16) for xy in found.xy])
    low, high = np.quantile(raw, [0.01, 0.998])
    np.testing.assert_allclose(
        found.crops[:,][:, 0], 255 * np.clip((raw - low) / (high - low), 0, 1), atol=0.51
    )


def _truncate(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def _pixel_size(bundle, value):
    path = bundle / "experiment.xenium"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pixel_size": value}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: (b / "experiment.xenium").unlink(), "experiment.xenium gives no pixel_size"),
        (lambda b: _pixel_size(b, 0.0), "pixel_size of 0.0"),
        (lambda b: _pixel_size(b, 0.05), "cells outside the 5789 x 3522 px image"),
        (lambda b: _pixel_size(b, 4.25), "too coarse"),
        (lambda b: (b / "cells.parquet").unlink(), "cells.parquet cannot be read"),
        (lambda b: _truncate(b / "cells.parquet"), "cells.parquet cannot be read"),
        (
            lambda b: shutil.copy(b / "nucleus_boundaries.parquet", b / "cells.parquet"),
            "cells.parquet cannot be read",
        ),
        (
            lambda b: _truncate(b / "cell_feature_matrix.h5"),
            "cell_feature_matrix.h5 cannot be read",
        ),
        (
            lambda b: _truncate(b / "morphology_focus" / "morphology_focus_0002.ome.tif", 0.2),
            "morphology_focus_0002.ome.tif cannot be",
        ),
        (
            lambda b: _truncate(b / "morphology_focus" / "morphology_focus_0002.ome.tif", 0.99),
            "morphology_focus_0002.ome.tif cannot be",
        ),
        (
            lambda b: (b / "morphology_focus" / "morphology_focus_0001.ome.tif").write_text("no"),
            "morphology_focus_0001.ome.tif cannot be read",
        ),
        (
            lambda b: (shutil.rmtree(b / "morphology_focus"), (b / "morphology.ome.tif").unlink()),
            "no morphology image",
        ),
    ],
)
def test_bundles_that_cannot_be_used(copy, tmp_path, damage, message):
    damage(copy)
    with pytest.raises(data.DataError, match=message) as error:
        data.from_xenium(copy, tmp_path / "c.h5")
    assert "\n" not in str(error.value) and not (tmp_path / "c.h5").exists()


def test_xenium_without_its_packages(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(data.DataError, match="pip install tifffile imagecodecs pyarrow"):
        data.from_xenium(tmp_path, tmp_path / "c.h5")


def test_a_simulated_xenium_folder_from_simulation_to_tables(tmp_path, capsys, monkeypatch):
    """simulate -> convert -> spatia -> CSV and h5ad, as the reader types it; crops show the
    simulated cells, masks have their areas."""
    for name in ("tifffile", "imagecodecs", "pyarrow"):
        pytest.importorskip(name)
    anndata = pytest.importorskip("anndata")
    import spatia
    from plainst import simulate

    monkeypatch.chdir(tmp_path)
    simulate.main(["xenium", "bundle", "--n_cells", "400", "--n_genes", "48"])
    with pytest.raises(data.DataError, match="exists already"):
        simulate.simulate_xenium("bundle", 400, 48)
    words = ["xenium", "bundle", "cells.h5", "--labels", "bundle/labels.csv", "--field_um", "27.2"]
    convert.main([*words, "--size", "32"])
    found, given = data.load_cells("cells.h5"), simulate.cell_field(400, 48, 1)
    assert found.n_cells == 400 and found.channels == ["DAPI"] and len(found.classes) == 5
    number = np.array([int(name[4:11]) for name in found.ids])
    assert (found.counts != given["counts"][number]).nnz == 0
    np.testing.assert_allclose(found.xy, given["xy"][number] * 4, atol=1e-6)
    kinds = np.array(given["classes"])[given["labels"][number]]
    assert [found.classes[i] for i in found.labels] == kinds.tolist()
    # a crop px is 4 image px, one px of the simulated field
    area, truth = found.masks[:].sum((1, 2)), given["truth"]["area"][number]
    assert np.corrcoef(area, truth)[0, 1] > 0.95
    # every pixel that an outline touches counts
    np.testing.assert_allclose(np.median(area / truth), 1.1, atol=0.05)
    crops, masks = found.crops[:][:, 0], found.masks[:]
    assert crops[masks].mean() > 1.5 * crops[~masks].mean()
    small = "--steps_a 2 --steps_b 2 --steps_c 2 --draws 1 --ode_steps 2 --h5ad"
    spatia.main(["--data", "cells.h5", "--width", "400", "--runs", "runs", *small.split()])
    folder = Path(capsys.readouterr().out.splitlines()[-1]).parent
    written = anndata.read_h5ad(folder / "result.h5ad")
    assert written.obs_names.tolist() == found.ids.tolist() and written.obs["cluster"].notna().all()
    assert "mean_dapi_generated" in written.obs and "own_area_real" not in written.obs
    assert (folder / "cells.csv").read_text().count("\n") == 401
