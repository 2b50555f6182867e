"""Damaged files of every format that is read: each case ends in a DataError of one line, or in data
that are valid and not silently wrong.

The readers run in a child process with 2 GB of memory and a time limit: a crash or an endless loop
inside a C library is a failed case, not the end of the tests. Cases are the same in every run;
`PLAINST_FUZZ=20` runs twenty times as many.
"""

import hashlib
import json
import os
import re
import resource
import select
import shutil
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
FACTOR, SECONDS, LIMIT = int(os.environ.get("PLAINST_FUZZ", 1)), 30, 2 << 30

# format: file below the folder of good files, kind of the file; the readers are in `readers_of`
FORMATS = {
    "10x v3": ("vis/filtered_feature_bc_matrix.h5", "hdf5"),
    "10x v2": ("v2.h5", "hdf5"),
    "h5ad": ("hest/adata/S1.h5ad", "hdf5"),
    "patches": ("hest/patches/S1.h5", "hdf5"),
    "cells": ("cells.h5", "hdf5"),
    "loom": ("cortex.loom", "hdf5"),
    "atlas": ("cmrcnet/atlas.h5", "hdf5"),
    "positions": ("vis/spatial/tissue_positions_list.csv", "text"),
    "metadata.tsv": ("vis/metadata.tsv", "text"),
    "labels": ("labels.csv", "text"),
    "scale factors": ("vis/spatial/scalefactors_json.json", "json"),
    "image": ("vis/spatial/tissue_hires_image.png", "binary"),
    "GMT": ("sets.gmt", "text"),
    "split": ("hest/splits/train_0.csv", "text"),
    "HEST metadata": ("hest/metadata.csv", "text"),
    "gene list": ("hest/var_50genes.json", "json"),
    "cell outlines": ("segmented_outputs/cell_segmentations.geojson", "json"),
    "donors": ("slice_donors.csv", "text"),
    "pairs": ("pairs.csv", "text"),
    "reads": ("ca1/spots.csv", "text"),
    "label image": ("ca1/label_image.coo.npz", "binary"),
    "npz": ("emb.npz", "binary"),
    "npy": ("emb.npy", "binary"),
    "features": ("features/S1.npz", "binary"),
    "manifest": ("out/manifest.json", "json"),
    "part note": ("out/a.csv.part.json", "json"),
    "gat_fusion": ("gat_fusion/model.pt", "torch"),
    "cmrcnet": ("cmrcnet/model.pt", "torch"),
    "stformer": ("stformer/model.pt", "torch"),
    "spatia": ("spatia/latest.pt", "torch"),
}
KINDS = {
    kind: [name for name, (_, k) in FORMATS.items() if k == kind]
    for kind in ("hdf5", "text", "json", "binary", "torch")
}


# -------------------------------------------------------------------------------- the child process
def write_good_files(root):
    """One small good file of every format."""
    import scipy.sparse as sp
    import torch

    import cmrcnet
    import data
    import gat_fusion
    import stformer
    from evaluation import figures, retrieval_record
    from evaluation import genes as gene_runs
    from plainst import run, simulate

    # half the time of a prediction; git is most of the rest
    gene_runs.draw = lambda *args: None
    figures.draw_gat_fusion = retrieval_record.draw = lambda *args: None
    run.git_commit = lambda: ""
    simulate.write_visium(
        simulate.simulate_cortex(200, 60, n_classes=5, seed=1, image_px=300), root / "vis"
    )
    simulate.write_visium(
        simulate.simulate_cortex(200, 60, n_classes=5, seed=1, image_px=300),
        root / "old",
        matrix_version=2,
    )
    (root / "old" / "filtered_feature_bc_matrix.h5").rename(root / "v2.h5")
    simulate.simulate_hest(root / "hest", n_slides=3, n_spots=40, patch_size=8, n_genes=60)
    simulate.simulate_cells(root / "cells.h5", n_cells=60, n_genes=48, n_sections=2, size=16)
    slide = data.load_slide(root / "vis")
    write_loom(root / "cortex.loom", slide)
    write_segmented(root / "segmented_outputs", slide.subset(np.arange(30)))
    (root / "slice_donors.csv").write_text("slice,donor\nvis,Br1\nother,Br2\n")
    vectors = np.random.default_rng(0).normal(size=(slide.n_spots, 4))
    np.savez(root / "emb.npz", embedding=vectors, barcodes=slide.barcodes)
    np.save(root / "emb.npy", vectors)
    names = [
        f"{b},{slide.classes[c] if c >= 0 else 'NA'}" for b, c in zip(slide.barcodes, slide.labels)
    ]
    (root / "labels.csv").write_text("\n".join(["barcode,label", *names, ""]))
    hest = data.load_hest(root / "hest", "S1")
    genes = hest.genes
    (root / "sets.gmt").write_text(
        "".join("\t".join([f"SET{i}", "none", *genes[i:40:3]]) + "\n" for i in range(4))
    )
    (root / "pairs.csv").write_text(
        "ligand,receptor\n" + "".join(f"{a},{b}\n" for a, b in zip(genes[:9], genes[9:18]))
    )
    (root / "features").mkdir()
    np.savez(
        root / "features" / "S1.npz", embedding=vectors[:40], coords=hest.xy, barcodes=hest.barcodes
    )
    (root / "ca1").mkdir()
    image = np.kron(np.arange(1, 10).reshape(3, 3), np.pad(np.ones((12, 12), int), 4))
    sp.save_npz(root / "ca1" / "label_image.coo.npz", sp.coo_matrix(image))
    reads = np.random.default_rng(0).integers(0, 60, (200, 2))
    (root / "ca1" / "spots.csv").write_text(
        "Gene,x,y\n" + "".join(f"G{i % 7},{x},{y}\n" for i, (x, y) in enumerate(reads))
    )
    (root / "out").mkdir()
    record = {
        "url": "http://127.0.0.1/a.csv",
        "size": 4,
        "sha256": "ab" * 32,
        "date": "2024-01-01T00:00:00Z",
    }
    (root / "out" / "manifest.json").write_text(json.dumps({"a.csv": record, "b/c.csv": record}))
    (root / "out" / "a.csv.part.json").write_text(
        json.dumps({"url": "http://127.0.0.1:9/a.csv", "validator": '"1"', "total": 8})
    )
    small = ["--epochs", "1", "--device", "cpu", "--threads", "1", "--runs", str(root / "runs")]
    hest_flags = ["--data", str(root / "hest"), "--cache", str(root / "cache"), *small]
    gat_fusion.main([*f"--data {root}/vis --dim 8 --heads 2".split(), *small])
    cmrcnet.main(
        [
            *hest_flags,
            "--val",
            "none",
            "--dim",
            "8",
            "--snn",
            "16",
            "--n_hvg",
            "10",
            "--batch",
            "16",
            "--k",
            "5",
            "--backbone",
            "features",
            "--markers",
            "none",
        ]
    )
    stformer.main([*hest_flags, "--folds", "0", "--pathways", "3"])
    for name in ("gat_fusion", "cmrcnet", "stformer"):
        (root / name).mkdir()
        for path in (root / "runs" / name).rglob("model.pt"):
            for file in (path, *path.parent.glob("atlas.h5")):
                shutil.copy(file, root / name / file.name)
    (root / "spatia").mkdir()
    weights = torch.nn.Linear(3, 2).state_dict()
    torch.save(
        {"config": {"seed": 0}, "done": {"A": {"model": weights, "history": [1.0]}}, "going": None},
        root / "spatia" / "latest.pt",
    )


def write_loom(path, slide):
    with h5py.File(path, "w") as handle:
        handle["matrix"] = slide.counts.T.toarray()
        handle["row_attrs/Gene"] = slide.genes.astype("S")
        handle["col_attrs/CellID"] = slide.barcodes.astype("S")
        handle["col_attrs/X"], handle["col_attrs/Y"] = slide.xy.T
        handle["col_attrs/Region"] = slide.labels


def write_segmented(folder, slide):
    """segmented_outputs/ of Space Ranger 4, a square around every spot."""
    from plainst import simulate

    slide.barcodes = np.array([f"cellid_{i:09d}-1" for i in range(slide.n_spots)])
    simulate.write_visium(slide, folder)
    for path in (*(folder / "spatial").glob("tissue_positions*"), folder / "metadata.tsv"):
        path.unlink(missing_ok=True)
    matrix = folder / "filtered_feature_bc_matrix.h5"
    matrix.rename(folder / "filtered_feature_cell_matrix.h5")
    square = np.array([[0, 0], [9, 0], [9, 9], [0, 9], [0, 0]])
    features = [
        {
            "properties": {"cell_id": i},
            "geometry": {"type": "Polygon", "coordinates": [(square + centre).tolist()]},
        }
        for i, centre in enumerate(slide.xy)
    ]
    text = json.dumps({"type": "FeatureCollection", "features": features})
    (folder / "cell_segmentations.geojson").write_text(text)


def digest(value):
    """Shape and content as text, the same for equal numbers of another type."""
    value = np.asarray(value)
    value = (
        value.astype("f8")
        if value.dtype.kind in "biuf"
        else np.char.encode(value.astype("U"), "utf-8", "surrogatepass")
    )
    return f"{value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"


def of_slide(slide, **more):
    """What a Slide holds, its invariants checked."""
    found = {
        "barcodes": slide.barcodes,
        "genes": slide.genes,
        "xy": slide.xy,
        "labels": [slide.classes[c] if c >= 0 else "" for c in slide.labels],
        **more,
    }
    assert len(set(slide.barcodes)) == len(slide.barcodes) == len(slide.xy) == len(slide.labels)
    if slide.counts is not None:
        assert slide.counts.shape == (len(slide.barcodes), len(slide.genes)) and len(
            set(slide.genes)
        ) == len(slide.genes)
        slide.counts.check_format()
        found["counts"] = slide.counts.toarray()
        assert slide.counts.data.size == 0 or slide.counts.data.min() > 0
    if slide.library_size is not None:
        assert (slide.library_size >= 0).all()
        found["library"] = slide.library_size
    assert slide.um_per_px is None or 0 < slide.um_per_px < np.inf
    if slide.image is not None:
        assert (
            slide.image.dtype == np.uint8
            and slide.image.ndim == 3
            and 0 < slide.image_scale < np.inf
        )
        found["image"] = slide.image
    if slide.patches is not None:
        assert len(slide.patches) == len(slide.barcodes) and slide.patches.shape[3] == 3
        found["patches"] = slide.patches[:]
    return found


def of_cells(cells):
    assert cells.counts.shape == (len(cells.ids), len(cells.genes)) and len(set(cells.ids)) == len(
        cells.ids
    )
    assert cells.section.max() < len(cells.sections) and cells.labels.max() < len(cells.classes)
    return {
        "counts": cells.counts.toarray(),
        "barcodes": cells.ids,
        "genes": cells.genes,
        "xy": cells.xy,
        "crops": cells.crops[:],
        "labels": cells.labels,
        "section": cells.section,
        **({} if cells.masks is None else {"masks": cells.masks[:]}),
    }


def tensors(saved):
    """Nested dict of tensors and plain values -> flat dict of arrays."""
    import torch

    if isinstance(saved, dict):
        return {f"{k}/{key}": v for k, value in saved.items() for key, v in tensors(value).items()}
    if isinstance(saved, (list, tuple)):
        return {
            f"{k}/{key}": v for k, value in enumerate(saved) for key, v in tensors(value).items()
        }
    return {"": saved.numpy() if torch.is_tensor(saved) else np.array(repr(saved))}


def readers_of(root):
    """{format: function that reads the file in place and returns {name: array}}."""
    import cmrcnet
    import data
    import gat_fusion
    import stformer
    from evaluation import genes as gene_runs
    from evaluation import hest as hest_protocol
    from evaluation import retrieval_task, signalling
    from plainst import download, retrieval, run
    from plainst.readers import convert
    from plainst.readers.slides import donor_of

    slide = data.load_slide(root / "vis")
    atlas = run.read_checkpoint(root / "cmrcnet" / "model.pt", "checkpoint")
    genes = data.load_hest(root / "hest", "S1").genes.tolist()

    def matrix(path):
        counts, genes, barcodes = data.read_10x_h5(path)
        return {"counts": counts.toarray(), "genes": genes, "barcodes": barcodes}

    def visium():
        return of_slide(data.load_slide(root / "vis"))

    def hest(patches=True):
        return of_slide(data.load_hest(root / "hest", "S1", patches))

    def atlas_of():
        encoder = retrieval_task.encoder_name(cmrcnet.Config(**atlas["config"]))
        keys, values, genes, _ = retrieval.read_atlas(
            root / "cmrcnet" / "atlas.h5", encoder, atlas["inputs"], atlas["fingerprint"]
        )
        return {"keys": keys.numpy(), "values": values.toarray(), "genes": genes}

    def load(name):
        return tensors(run.read_checkpoint(root / name / "model.pt", "checkpoint"))

    def predict(module, folder):
        """What --predict says."""
        model, runs = str(root / module.__name__ / "model.pt"), root / "predicted"
        shutil.rmtree(runs, ignore_errors=True)
        module.main(
            [
                "--data",
                str(root / folder),
                "--predict",
                model,
                "--runs",
                str(runs),
                "--cache",
                str(root / "cache"),
                "--device",
                "cpu",
                *(["--k", "5"] if module is cmrcnet else []),
                *([] if folder == "vis" else ["--slice", "S1"]),
            ]
        )
        with np.load(next(runs.rglob("arrays.npz"))) as arrays:
            return dict(arrays)

    def note():
        # nobody listens on port 9: what matters is what is asked for
        try:
            download._stream("http://127.0.0.1:9/a.csv", root / "out" / "a.csv.part", None, 1)
        except download._Retry:
            pass
        return {}

    def reads():
        gene, xy = convert.read_spots(root / "ca1" / "spots.csv")
        return {"gene": gene, "xy": xy}

    return {
        "10x v3": visium,
        "10x v2": lambda: matrix(root / "v2.h5"),
        "h5ad": lambda: hest(patches=False),
        "patches": hest,
        "loom": lambda: of_slide(data.load_slide(root / "cortex.loom")),
        "cell outlines": lambda: of_slide(data.load_slide(root / "segmented_outputs")),
        "donors": lambda: {"patient": donor_of(root / "vis", "vis")[0]},
        "cells": lambda: of_cells(data.load_cells(root / "cells.h5")),
        "atlas": atlas_of,
        "positions": visium,
        "metadata.tsv": visium,
        "scale factors": visium,
        "image": visium,
        "labels": lambda: of_slide(data.load_slide(root / "vis", labels=root / "labels.csv")),
        "GMT": lambda: dict(
            zip(
                ("names", "member"),
                (np.asarray(v) for v in gene_runs.read_gmt(root / "sets.gmt", genes)),
            )
        ),
        "split": lambda: dict(
            zip(("train", "test"), hest_protocol.hest_partition(root / "hest", "folds", 0)[1:3])
        ),
        "HEST metadata": hest,
        "gene list": lambda: {"genes": data.hest_genes(root / "hest")},
        "pairs": lambda: {"pairs": signalling.read_pairs(root / "pairs.csv")},
        "reads": reads,
        "label image": lambda: {
            "image": convert.read_label_image(root / "ca1" / "label_image.coo.npz")
        },
        "npz": lambda: {"x": data.read_embedding(root / "emb.npz", slide)},
        "npy": lambda: {"x": data.read_embedding(root / "emb.npy", slide)},
        "features": lambda: of_slide(data.load_patch_folder(root / "features")[0]),
        "manifest": lambda: {
            "manifest": json.dumps(download.Folder(root / "out").manifest(), sort_keys=True)
        },
        "part note": note,
        "gat_fusion": lambda: load("gat_fusion"),
        "cmrcnet": lambda: load("cmrcnet"),
        "stformer": lambda: load("stformer"),
        "gat_fusion --predict": lambda: predict(gat_fusion, "vis"),
        "cmrcnet --predict": lambda: predict(cmrcnet, "hest"),
        "stformer --predict": lambda: predict(stformer, "hest"),
        "spatia": lambda: tensors(
            run.read_checkpoint(
                root / "spatia" / "latest.pt", "checkpoint", ["config", "done", "going"]
            )
        ),
    }


def serve(root):
    """Read what the names on standard input ask for; answer with one line of JSON each."""
    from data import DataError

    answers, sys.stdout = sys.stdout, sys.stderr
    write_good_files(root)
    read = readers_of(root)
    used = (
        int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        if sys.platform == "linux"
        else 0
    )
    if used:
        resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT, used + LIMIT))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        answer = {"error": None, "problem": None, "arrays": {}, "warned": False}
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                found = {name: np.asarray(value) for name, value in read[line.strip()]().items()}
                for name, value in found.items():
                    assert value.dtype.kind != "f" or np.isfinite(value).all(), (
                        f"{name} is not finite"
                    )
                    assert value.dtype.kind != "O", f"{name} holds objects"
                    answer["arrays"][name] = digest(value)
                answer["labels"] = [str(v) for v in found.get("labels", [])]
            except DataError as error:
                answer["error"] = str(error)
            except (Exception, SystemExit):
                # what the test is after: anything but a DataError is reported, not swallowed
                answer["problem"] = traceback.format_exc()
        answer["warned"] = any(issubclass(w.category, UserWarning) for w in warned)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    serve(Path(sys.argv[1]))
    sys.exit(0)


# --------------------------------------------------------------------------------------- the parent
import data  # noqa: E402 - conftest.py, or the child above, has put the modules on the path
from evaluation import hest as hest_protocol  # noqa: E402
from plainst import run  # noqa: E402

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies


class Child:
    """The reading process, started again when it was lost."""

    def __init__(self, root):
        self.root, self.process, self.good, self.cases = root, None, {}, 0

    def start(self):
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir(parents=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(self.root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            stderr=open(self.root.parent / "child.log", "wb"),
        )
        assert self.line(180) == "ready", (self.root.parent / "child.log").read_text()[-3000:]
        self.bytes = {name: (self.root / file).read_bytes() for name, (file, _) in FORMATS.items()}

    def line(self, seconds):
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            return "hangs"
        return self.process.stdout.readline().decode().strip() or "died"

    def read(self, name):
        """The answer about a file as it lies there."""
        self.process.stdin.write(f"{name}\n".encode())
        self.process.stdin.flush()
        line = self.line(SECONDS)
        if line in ("hangs", "died"):
            self.stop()
            return {"problem": f"the reading process {line}", "error": None, "arrays": {}}
        return json.loads(line)

    def try_damaged(self, name, content):
        """Put `content` in place of the file, or let it change it; read; check what is true of
        every case. Returns the answer."""
        if self.process is None:
            self.start()
        path = self.root / FORMATS[name.removesuffix(" --predict")][0]
        if name not in self.good:
            self.good[name] = self.read(name)
            assert self.good[name]["error"] is None and self.good[name]["problem"] is None, (
                self.good[name]
            )
        self.cases += 1
        content(path) if callable(content) else path.write_bytes(content)
        answer = self.read(name)
        if answer["problem"] and os.environ.get("PLAINST_FUZZ_KEEP"):
            shutil.copy(path, os.environ["PLAINST_FUZZ_KEEP"])
        if self.process is not None:
            path.unlink(missing_ok=True)
            path.write_bytes(self.bytes[name.removesuffix(" --predict")])
        assert not answer["problem"], answer["problem"]
        assert answer["error"] is None or (
            "\n" not in answer["error"] and len(answer["error"]) < 2000
        ), answer["error"]
        return answer

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def child(tmp_path_factory):
    child = Child(tmp_path_factory.mktemp("fuzz") / "good")
    child.start()
    yield child
    child.stop()
    print(f"{child.cases} cases")


def cases(n):
    """The same n x PLAINST_FUZZ cases in every run."""
    return hypothesis.settings(
        max_examples=n * FACTOR,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )


place = st.integers(0, 2**32)
damage = st.one_of(
    st.tuples(st.just("cut"), place),
    st.tuples(st.just("flip"), place, st.integers(0, 7)),
    st.tuples(st.just("zero"), place, st.integers(1, 512)),
    st.tuples(st.just("noise"), place, st.binary(min_size=1, max_size=24)),
    st.tuples(st.just("drop"), place, st.integers(1, 200)),
    st.tuples(st.just("twice"), place, st.integers(1, 200)),
)
MARKS = re.compile(
    rb"GCOL|TREE|HEAP|SNOD|OHDR|BTHD|FRHP|PK\x01\x02|PK\x03\x04|PK\x05\x06|\x89HDF|IHDR|IDAT|NUMPY"
)


def damaged(good, marks, ops, near):
    """The bytes after all damages; `near` moves the first to the neighbourhood of one of `marks`,
    structures of the format, where it does most."""
    out = bytearray(good)
    for number, (what, at, *more) in enumerate(ops):
        at = (
            marks[near % len(marks)] + at % 64
            if number == 0 and marks and near is not None and what != "cut"
            else at
        )
        at %= max(1, len(out))
        if what == "cut":
            del out[at:]
        elif what == "flip":
            out[at : at + 1] = bytes(b ^ 1 << more[0] for b in out[at : at + 1])
        elif what == "zero":
            out[at : at + more[0]] = bytes(len(out[at : at + more[0]]))
        elif what == "noise":
            out[at : at + len(more[0])] = more[0][: len(out) - at]
        elif what == "drop":
            del out[at : at + more[0]]
        elif what == "twice":
            out[at:at] = out[at : at + more[0]]
    return bytes(out)


NEAR = st.one_of(st.none(), place)
N_BYTES = {"hdf5": 110, "text": 60, "json": 60, "binary": 60, "torch": 40}


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_bytes(child, name):
    kind = FORMATS[name][1]
    marks = [found.start() for found in MARKS.finditer(child.bytes[name])]

    @cases(N_BYTES[kind])
    @hypothesis.given(st.lists(damage, min_size=1, max_size=3), NEAR)
    def check(ops, near):
        content = damaged(child.bytes[name], marks, ops, near)
        answer = child.try_damaged(name, content)
        if kind == "torch" and answer["error"] is None:
            # every byte that matters has a checksum
            assert answer["arrays"] == child.good[name]["arrays"]

    check()


# -------------------------------------------------------------------------------- structured damage
def naive(path, name):
    """What the format's matrix and row names are, by loops: {array: digest}. Differs from `readers`
    in every line."""
    with h5py.File(path) as f:
        if name == "patches":
            return {}
        if name == "loom":
            dense = np.zeros(f["matrix"].shape[::-1])
            for (gene, cell), value in np.ndenumerate(f["matrix"][()]):
                dense[cell, gene] = value
            names = [
                v.decode() if isinstance(v, bytes) else str(int(v)) for v in f["col_attrs/CellID"]
            ]
            return {"counts": digest(dense), "barcodes": digest(names)}
        group, rows, cols = {
            "10x v3": ("matrix", "matrix/barcodes", "matrix/features/name"),
            "h5ad": ("X", "obs/_index", "var/_index"),
            "cells": ("counts", "ids", "genes"),
            "atlas": ("/", "keys", "genes"),
        }.get(name) or next((g, f"{g}/barcodes", f"{g}/gene_names") for g in f)
        data, indices, indptr = (f[group][part][()] for part in ("data", "indices", "indptr"))
        # floats: added in the reader's precision
        dense = np.zeros((len(f[rows]), len(f[cols])), data.dtype if name == "atlas" else float)
        assert len(indptr) == len(dense) + 1 and indptr[-1] == len(data) == len(indices)
        for i in range(len(dense)):
            for at in range(int(indptr[i]), int(indptr[i + 1])):
                assert 0 <= indices[at] < dense.shape[1]
                dense[i, int(indices[at])] += data[at]
        names = [v.decode() for v in f[rows][()]] if name != "atlas" else []
        if name == "10x v3":
            dense = dense[
                :, [kind == b"Gene Expression" for kind in f["matrix/features/feature_type"][()]]
            ]
    return (
        {"values": digest(dense)}
        if name == "atlas"
        else {"counts": digest(dense), "barcodes": digest(names)}
    )


def places(path):
    """(name, attribute or '') of everything in an HDF5 file."""
    found = []
    with h5py.File(path) as f:
        f.visititems(
            lambda name, node: found.extend(
                [(name, "")] * isinstance(node, h5py.Dataset) + [(name, a) for a in node.attrs]
            )
        )
        return sorted(found + [("/", a) for a in f.attrs])


ARRAY_CHANGES = {
    "float": lambda v, k: (
        v.astype(float) + k % 2 / 2
        if v.dtype.kind in "iu"
        else np.arange(v.size, dtype=float).reshape(v.shape)
    ),
    "text": lambda v, k: np.full(v.shape, b"text"),
    "complex": lambda v, k: np.full(v.shape, 1 + 2j),
    "bool": lambda v, k: np.ones(v.shape, bool),
    "turned": lambda v, k: np.ascontiguousarray(v.T) if v.ndim > 1 else v[None],
    "flat": lambda v, k: v.ravel(),
    "empty": lambda v, k: v[:0],
    "shorter": lambda v, k: v[:-1],
    "longer": lambda v, k: np.concatenate([v, v[-1:]]),
    "backwards": lambda v, k: v[::-1],
    "repeated": lambda v, k: put(v, k, v.flat[(k + 1) % v.size]),
    "zero": lambda v, k: put(v, k, np.zeros(1, v.dtype)[0]),
    "below": lambda v, k: put(
        v.astype(float if v.dtype.kind == "f" else int)
        if v.dtype.kind in "iuf"
        else np.zeros(v.shape, int),
        k,
        -2 - k % 3,
    ),
    "large": lambda v, k: put(
        v,
        k,
        np.iinfo(v.dtype).max - k % 2
        if v.dtype.kind in "iu"
        else 1e300
        if v.dtype.kind == "f"
        else v.flat[0],
    ),
    "nan": lambda v, k: put(
        v.astype(float) if v.dtype.kind in "iuf" else np.zeros(v.shape),
        k,
        [np.nan, np.inf, -np.inf][k % 3],
    ),
    "latin": lambda v, k: put(
        v.astype("S9") if v.dtype.kind == "S" else np.full(v.shape, b"x", "S9"), k, b"caf\xe9\xff"
    ),
    "path": lambda v, k: put(
        v.astype("S99") if v.dtype.kind in "SO" else np.full(v.shape, b"", "S99"),
        k,
        b"../../../../etc/passwd",
    ),
    "control": lambda v, k: put(
        v.astype("S99") if v.dtype.kind in "SO" else np.full(v.shape, b"", "S99"),
        k,
        b"a\nb\x1b[31m",
    ),
    "scalar": lambda v, k: v.flat[k % v.size],
}
PLACE_CHANGES = ("gone", "huge", "big", "group", "link outside", "link to itself", "outside")


def put(values, k, value):
    values = values.copy()
    values.flat[k % values.size] = value
    return values


def change(path, where, how, k):
    """Change one dataset or attribute of an HDF5 file in place; a change that does not fit it
    leaves the file as it was."""
    name, attribute = where
    with h5py.File(path, "a") as f:
        holder, key = (f[name].attrs, attribute) if attribute else (f, name)
        node = holder[key]
        value = np.asarray(node[()] if isinstance(node, h5py.Dataset) else node)
        if how in ARRAY_CHANGES:
            if not value.size or (
                value.ndim == 0 and how in ("turned", "empty", "shorter", "longer", "backwards")
            ):
                return
            value = value.astype("S") if value.dtype.kind in "OU" else value
            value = ARRAY_CHANGES[how](value, k)
            del holder[key]
            holder[key] = value
        elif how == "gone" or attribute:
            del holder[key]
        else:
            dtype = node.dtype
            del f[name]
            if how in ("huge", "big"):
                f.create_dataset(
                    name,
                    (1 << (40 if how == "huge" else 31), *value.shape[1:]),
                    dtype,
                    chunks=(1024, *value.shape[1:]),
                )
            elif how == "group":
                f.create_group(name)
            elif how == "outside":
                f.create_dataset(
                    name, value.shape, "u1", external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)]
                )
            else:
                f[name] = (
                    h5py.ExternalLink("/etc/passwd", "/")
                    if how == "link outside"
                    else h5py.SoftLink(f"/{name}")
                )


@pytest.mark.parametrize("name", KINDS["hdf5"])
def test_changed_hdf5(child, name):
    whole = child.root / FORMATS[name][0]
    where = places(whole)
    counted = naive(whole, name)

    @cases(90)
    @hypothesis.given(
        st.sampled_from(where), st.sampled_from([*ARRAY_CHANGES, *PLACE_CHANGES]), place
    )
    def check(where, how, k):
        found = {}

        def damage(path):
            change(path, where, how, k)
            shutil.copy(path, child.root.parent / "case.h5")

        answer = child.try_damaged(name, damage)
        if answer["error"] is None and name != "patches":
            found = naive(child.root.parent / "case.h5", name)
            assert found == {key: answer["arrays"][key] for key in found}
        elif answer["error"] is None and where[0] != "img":
            assert (
                answer["arrays"]["patches"] == child.good[name]["arrays"]["patches"]
                or where[0] == "barcode"
            )

    child.good.setdefault(name, child.read(name))
    assert counted == {key: child.good[name]["arrays"][key] for key in counted}
    check()


ODD = [
    None,
    True,
    -1,
    0,
    1e300,
    float("nan"),
    float("inf"),
    "",
    "../../../etc/passwd",
    "a\nb",
    [],
    {},
    [[]],
    ["A", "A"],
    [1],
    {"genes": 1},
    10**400,
    "\ud800",
]


@pytest.mark.parametrize("name", KINDS["json"])
def test_changed_json(child, name):
    good = json.loads(child.bytes[name])

    inner = next(iter(good.values())) if isinstance(good, dict) else good
    keys = [
        None,
        "deep",
        *(good if isinstance(good, dict) else range(9)),
        *(inner if isinstance(inner, dict) else []),
    ]

    @cases(40)
    @hypothesis.given(st.sampled_from(keys), st.sampled_from(ODD))
    def check(key, value):
        changed = json.loads(child.bytes[name])
        if key is None:
            changed = value
        elif isinstance(changed, dict) and key in changed:
            changed[key] = value
        elif isinstance(changed, dict) and isinstance(next(iter(changed.values())), dict):
            next(iter(changed.values()))[key] = value
        elif isinstance(changed, list) and isinstance(key, int):
            changed[key] = value
        text = "[" * 100_000 if key == "deep" else json.dumps(changed)
        child.try_damaged(name, text.encode("utf-8", "surrogatepass"))

    check()


CELLS = [
    "",
    "NA",
    "nan",
    "inf",
    "-1",
    "1e400",
    "1e300",
    "0x10",
    "../../../etc/passwd",
    '"',
    'a"b',
    "\0",
    "\ufeff",
    "a,b",
    "a\tb",
    "\r",
    "9" * 5000,
    "\x85",
    "'",
]


@pytest.mark.parametrize("name", KINDS["text"])
def test_changed_tables(child, name):
    good = child.bytes[name].decode()
    mark = "\t" if "\t" in good else ","
    n_rows = good.count("\n")

    @cases(60)
    @hypothesis.given(
        st.sampled_from(
            ["cell", "row twice", "row gone", "column gone", "cell more", "latin", "cut", "no rows"]
        ),
        place,
        place,
        st.sampled_from(CELLS),
    )
    def check(how, row, column, cell):
        rows = [line.split(mark) for line in good.splitlines()]
        line = rows[row % n_rows]
        if how == "cell":
            line[column % len(line)] = cell
        elif how == "row twice":
            rows.insert(column % n_rows, list(line))
        elif how == "row gone":
            rows.remove(line)
        elif how == "column gone":
            rows = [r[: column % len(line)] + r[column % len(line) + 1 :] for r in rows]
        elif how == "cell more":
            line.insert(column % (len(line) + 1), cell)
        elif how == "no rows":
            rows = rows[: row % 2]
        text = ("\n".join(mark.join(r) for r in rows) + "\n").encode("utf-8", "surrogatepass")
        text = (
            text[: row % len(text)]
            if how == "cut"
            else text.replace(b"A", b"\xe9", 1)
            if how == "latin"
            else text
        )
        answer = child.try_damaged(name, text)
        if answer["error"] is None and name in ("labels", "metadata.tsv"):
            before, after = child.good[name]["labels"], answer["labels"]
            wrong = sum(a not in (b, "") for a, b in zip(after, before))
            assert (
                wrong <= (how in ("cell", "latin"))
                or how == "column gone"
                or (how == "cut" and answer["warned"] and wrong == 1)
            ), (how, wrong)
        if answer["error"] is None and name == "positions" and how != "cell":
            same = answer["arrays"]["xy"] == child.good[name]["arrays"]["xy"]
            assert same or (how == "cut" and answer["warned"]), how

    check()


@pytest.mark.parametrize("name", ["gat_fusion", "cmrcnet", "stformer"])
def test_changed_checkpoints(child, name):
    import torch

    good = torch.load(child.root / FORMATS[name][0], weights_only=True)

    def paths(value, above=()):
        inside = (
            value.items()
            if isinstance(value, dict)
            else enumerate(value)
            if isinstance(value, list) and above != ("genes",)
            else ()
        )
        return [above] * bool(above) + [
            found for key, v in list(inside)[:40] for found in paths(v, (*above, key))
        ]

    skip = {"runs", "cache", "seed", "threads", "device"}

    @cases(35)
    @hypothesis.given(
        st.sampled_from([found for found in paths(good) if found[-1] not in skip]),
        st.sampled_from(["gone", None, "x", -1, [], {}, "tensor", "turned", "longer"]),
    )
    def check(where, value):
        saved = torch.load(child.root / FORMATS[name][0], weights_only=True)
        holder = saved
        for key in where[:-1]:
            holder = holder[key]
        old = holder[where[-1]]
        if value == "gone":
            del holder[where[-1]]
        elif value == "turned":
            holder[where[-1]] = old.flatten()[None].clone() if torch.is_tensor(old) else old
        elif value == "longer":
            holder[where[-1]] = (
                torch.cat([old, old])
                if torch.is_tensor(old) and old.ndim
                else old * 2
                if isinstance(old, list)
                else old
            )
        else:
            holder[where[-1]] = torch.zeros(3) if value == "tensor" else value
        child.try_damaged(f"{name} --predict", lambda path: torch.save(saved, path))

    check()


def test_endless_heap(child):
    """A string heap of zeros: libhdf5 would walk it for ever."""
    content = child.bytes["h5ad"]
    at = content.index(b"GCOL")
    for first in (16, 24):
        answer = child.try_damaged(
            "h5ad", content[: at + first] + bytes(at + 4096 - at - first) + content[at + 4096 :]
        )
        assert "string heap is broken" in answer["error"] or "cannot be read" in answer["error"]


# ------------------------------------------------------------------ defects of `data` that it found
@pytest.mark.parametrize(
    "values",
    [
        np.full((3, 2), 1e300),
        np.full((3, 2), 1j),
        np.full((3, 2), "a"),
        np.full((3, 2), np.nan),
        np.zeros((3, 2), bool),
    ],
)
def test_vectors_that_are_no_finite_float32(tmp_path, values):
    np.savez(tmp_path / "x.npz", embedding=values, barcodes=["a", "b", "c"])
    with pytest.raises(data.DataError, match="x.npz"):
        data.read_embedding(
            tmp_path / "x.npz",
            data.Slide(None, np.array([]), np.array(["a", "b", "c"]), np.zeros((3, 2))),
        )


def test_vectors_of_a_declared_shape_that_fits_no_memory(tmp_path):
    with open(tmp_path / "x.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f8", "fortran_order": False, "shape": (1 << 45, 8)}
        )
    with pytest.raises(data.DataError, match="x.npy"):
        data.read_embedding(
            tmp_path / "x.npy", data.Slide(None, np.array([]), np.array(["a"]), np.zeros((1, 2)))
        )


def test_one_flipped_bit_of_a_weight_is_noticed(tmp_path):
    """torch.load itself does not compare the checksums."""
    import torch

    weights = torch.arange(100.0)
    torch.save({"weights": weights}, tmp_path / "m.pt")
    content = bytearray((tmp_path / "m.pt").read_bytes())
    content[content.index(weights.numpy().tobytes()) + 42] ^= 1
    (tmp_path / "m.pt").write_bytes(content)
    assert not torch.equal(torch.load(tmp_path / "m.pt", weights_only=True)["weights"], weights)
    with pytest.raises(data.DataError, match="a checksum differs"):
        run.read_checkpoint(tmp_path / "m.pt", "checkpoint")


@pytest.mark.parametrize(
    "saved, message", [([1], "it lacks"), ({"a": 1}, "it lacks b"), (b"old", "not a checkpoint")]
)
def test_checkpoints_of_another_content(tmp_path, saved, message):
    import torch

    torch.save(saved, tmp_path / "m.pt")
    with pytest.raises(data.DataError, match=message):
        run.read_checkpoint(tmp_path / "m.pt", "checkpoint", ["a", "b"])


def test_patients_name_is_no_path(tmp_path):
    from plainst import simulate

    root = simulate.simulate_hest(tmp_path / "h", n_slides=3, n_spots=40, patch_size=8, n_genes=60)
    (root / "metadata.csv").write_text("id,patient\nS1,../../p\nS2,..\nS3,Br8.1\n")
    parts = [
        hest_protocol.hest_partition(root, "patient", patient=name)[3]
        for name in ("../../p", "..", "Br8.1")
    ]
    assert parts == ["__.._p", "_", "Br8.1"]
