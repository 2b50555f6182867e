"""The house: which files stand at the top, and which floor may import which."""

import ast
import subprocess
import tomllib

import pytest

from bench import mutate
from conftest import ROOT

METHODS = {"gat_fusion", "multist", "cmrcnet", "stformer", "spatia"}
TOP = {
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "NOTICE"),
    *("Makefile", "pyproject.toml", "requirements.txt", "requirements-dev.txt", ".gitignore"),
    *(f"{method}.py" for method in METHODS),
    *("data.py", "metrics.py"),
    *(".ci", "plainst", "evaluation", "experiments", "bench", "docs", "course", "tests"),
}
ABOVE = {  # room: what it may not import, because it stands above or beside
    "plainst": METHODS | {"data", "metrics", "evaluation", "experiments", "bench", "tests"},
    "data": METHODS | {"metrics", "evaluation", "experiments", "bench", "tests"},
    "metrics": METHODS | {"data", "evaluation", "experiments", "bench", "tests"},
    "evaluation": METHODS | {"experiments", "bench", "tests"},
    **{method: METHODS - {method} | {"experiments", "bench", "tests"} for method in METHODS},
}


def tracked():
    """Paths of the files under version control, or all but hidden ones outside a checkout."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [path for path in done.stdout.splitlines() if (ROOT / path).exists()]


def imported(path):
    """First words of every module that a file imports, at its top or inside a function."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import hides its floor"
            modules.add(node.module.split(".")[0])
    return modules


def test_top_level_is_the_list_of_the_design():
    assert {path.split("/")[0] for path in tracked()} <= TOP


@pytest.mark.parametrize("room", sorted(ABOVE))
def test_nothing_imports_upwards(room):
    files = [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").exists() else (ROOT / room).rglob("*.py")
    files = list(files)
    assert files
    for path in files:
        assert not imported(path) & ABOVE[room], path.relative_to(ROOT)


def test_only_methods_are_long():
    for path in tracked():
        is_code = path.endswith(".py") and not path.startswith("tests/")
        if is_code and path.removesuffix(".py") not in METHODS:
            lines = (ROOT / path).read_text(encoding="utf-8").count("\n")
            assert lines <= 600, f"{path} has {lines} lines"


def test_every_source_has_tests_that_break_with_it():
    for source in mutate.sources():
        assert mutate.tests_of(source), source
    assert not [pattern for pattern in mutate.TESTS if not list(ROOT.glob(pattern))]


def test_nothing_is_installed_into_site_packages():
    """pyproject.toml lists dependencies and tools; `import data` must never reach somebody else."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert settings["tool"]["setuptools"] == {"packages": []}
    assert "scripts" not in settings["project"] and "py-modules" not in str(settings)
