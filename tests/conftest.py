"""Fixtures shared by all tests."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def real_data():
    """Folder of real data: $PLAINST_DATA, else ../shared/data beside the checkout; the test is
    skipped where neither exists."""
    folder = Path(os.environ.get("PLAINST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist (set PLAINST_DATA)")
    return folder
