"""Break one random line at a time and see whether the tests notice: python bench/mutate.py [--n 20]
[--seed 0] [--only gat_fusion.py ...] (make mutate).

A mutant differs from a module in one operator, comparison, number or `not`, outside of figures and
printed text. It is made in a copy of the checkout and the tests that know the module (TESTS) are
run until their first failure. A mutant that survives is shown: either a test is missing or the
change makes no difference.
"""

import argparse
import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# file or folder, the tests that know it: the first pattern that fits counts
TESTS = {
    "data.py": ["data", "gat_fusion", "layers"],
    "metrics.py": ["metrics"],
    "gat_fusion.py": ["gat_fusion", "layers", "numerics"],
    "multist.py": ["multist", "numerics"],
    "stformer.py": ["stformer", "numerics"],
    "cmrcnet.py": ["cmrcnet", "numerics"],
    "spatia.py": ["spatia", "numerics"],
    "plainst/run.py": ["run", "restart"],
    "plainst/download.py": ["download"],
    "plainst/features.py": ["data"],
    "plainst/neighbours.py": ["data", "layers"],
    "plainst/simulate/xenium.py": ["cells"],
    "plainst/simulate/*": ["simulate"],
    "plainst/readers/convert.py": ["cells"],
    "plainst/readers/xenium.py": ["cells"],
    "plainst/readers/cut.py": ["cells"],
    "plainst/readers/crops.py": ["cells"],
    "plainst/readers/*": ["readers", "data"],
    "plainst/scaled.py": ["layers"],
    "plainst/tiles.py": ["layers"],
    "plainst/neighbour_sums.py": ["gat_fusion", "numerics"],
    "plainst/jobs.py": ["stformer", "cmrcnet"],
    "plainst/quadrants.py": ["stformer"],
    "plainst/retrieval.py": ["cmrcnet"],
    "plainst/vit_weights.py": ["cmrcnet"],
    "plainst/cell_*.py": ["spatia"],
    "plainst/patch_tokens.py": ["spatia"],
    "plainst/transformer.py": ["spatia"],
    "plainst/stages.py": ["spatia"],
    "evaluation/cell*.py": ["spatia"],
    "evaluation/pictures.py": ["spatia"],
    "evaluation/bags.py": ["stformer"],
    "evaluation/genes.py": ["stformer"],
    "evaluation/new_patches.py": ["stformer"],
    "evaluation/patch_baselines.py": ["stformer"],
    "evaluation/samples.py": ["stformer"],
    "evaluation/layers.py": ["layers", "gat_fusion"],
    "evaluation/new_slides.py": ["layers"],
    "evaluation/baselines.py": ["layers", "gat_fusion", "stformer", "cmrcnet"],
    "plainst/graphs.py": ["multist"],
    "plainst/stain.py": ["multist"],
    "plainst/losses.py": ["multist"],
    "evaluation/clustering.py": ["multist"],
    "evaluation/domains.py": ["multist"],
    "evaluation/joint.py": ["joint"],
    "evaluation/downstream.py": ["downstream"],
    "evaluation/signalling.py": ["downstream"],
    "evaluation/hest.py": ["stformer", "cmrcnet"],
    "evaluation/retrieval_*.py": ["cmrcnet"],
    "evaluation/atlas.py": ["cmrcnet"],
    "evaluation/report.py": ["report"],
    # what no line above names is called by methods
    "*": ["gat_fusion", "layers", "multist", "stformer", "cmrcnet", "spatia"],
}
# pictures, and a line that hands words on
LEFT_OUT = ("evaluation/figures.py", "plainst/__main__.py")
# functions of pictures, printed text and flags
SKIPPED = (
    "draw",
    "figure",
    "line",
    "main",
    "print",
    "plot",
    "page",
    "match_classes",
    "score_row",
    "domain_names",
)
SWAPS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}


def places(tree):
    """[(node, change)]: everything in the functions of a module that can be broken, in the order of
    the text."""
    out = []

    def visit(node, inside):
        name = (
            getattr(node, "name", "") if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else ""
        )
        if name.startswith(SKIPPED) or isinstance(node, (ast.Raise, ast.JoinedStr)):
            return
        inside = inside or isinstance(node, ast.FunctionDef)
        if inside:
            if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in SWAPS:
                out.append((node, "op"))
            elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
                out.append((node, "ops"))
            elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
                out.append((node, "value"))
            elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
                out.append((node, "drop"))
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(tree, False)
    return out


def broken(source, number):
    """(text of the module with place `number` broken, the line before, the line after)."""
    tree = ast.parse(source)
    node, change = places(tree)[number]
    statement = min(
        (
            s
            for s in ast.walk(tree)
            if isinstance(s, ast.stmt) and s.lineno <= node.lineno <= s.end_lineno
        ),
        key=lambda s: s.end_lineno - s.lineno,
    )
    before = ast.unparse(copy.deepcopy(node))
    if change == "op":
        node.op = SWAPS[type(node.op)]()
    elif change == "ops":
        node.ops[0] = SWAPS[type(node.ops[0])]()
    elif change == "value":
        node.value = (not node.value) if isinstance(node.value, bool) else node.value + 1
    elif isinstance(node.op, ast.Not):
        node.operand = ast.UnaryOp(ast.Not(), node.operand)
    else:
        node.op = ast.UAdd()
    return ast.unparse(tree), statement.lineno, before, ast.unparse(node)


def sources():
    """Paths below the checkout, as text, of every module that a method is made of."""
    rooms = [
        ROOT.glob("*.py"),
        *((ROOT / room).rglob("*.py") for room in ("plainst", "evaluation")),
    ]
    paths = sorted(path.relative_to(ROOT).as_posix() for room in rooms for path in room)
    return [path for path in paths if path not in LEFT_OUT]


def tests_of(source):
    """Test files of the module at this path: those of TESTS, and one of its own name."""
    known = next(names for pattern, names in TESTS.items() if fnmatch(source, pattern))
    names = dict.fromkeys([Path(source).stem, *known])
    return [f"tests/test_{n}.py" for n in names if (ROOT / "tests" / f"test_{n}.py").exists()]


def caught(folder, source, text, limit):
    """Whether the tests of the module `source` fail (or hang) with `text` in its place."""
    path = folder / source
    whole = path.read_text()
    path.write_text(text)
    files = tests_of(source)
    try:
        found = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files],
            cwd=folder,
            timeout=limit,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        )
        return found.returncode != 0
    except subprocess.TimeoutExpired:
        return True
    finally:
        path.write_text(whole)


def main(argv=None):
    """Print a line a mutant and the share that was caught."""
    parser = argparse.ArgumentParser(prog="bench/mutate.py", description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=20, help="mutants")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument(
        "--only", nargs="*", default=sources(), choices=sources(), metavar="FILE", help="modules"
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=1200,
        help="seconds of tests after which a mutant counts as caught",
    )
    options = parser.parse_args(argv)
    texts = {path: (ROOT / path).read_text() for path in options.only}
    every = [(path, i) for path, text in texts.items() for i in range(len(places(ast.parse(text))))]
    chosen, n_caught = random.Random(options.seed).sample(every, min(options.n, len(every))), 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "main")
        shutil.copytree(
            ROOT,
            folder,
            ignore=shutil.ignore_patterns(".venv", ".git", "runs", "datasets", "__pycache__"),
        )
        for source, number in chosen:
            text, lineno, before, after = broken(texts[source], number)
            found = caught(folder, source, text, options.limit)
            n_caught += found
            print(
                f"{'caught  ' if found else 'SURVIVED'} {source}:{lineno}: {before} -> {after}",
                flush=True,
            )
    print(f"{n_caught} of {len(chosen)} caught ({len(every)} places)")


if __name__ == "__main__":
    main()
