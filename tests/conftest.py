"""Puts the project root on the path, keeps torch on one thread, and says where the golden data lies."""
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT.parent / "shared" / "golden"
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)          # for `python -m lab.world` from any folder
torch.set_num_threads(1)                      # the tests are many small things: a second thread only waits


@pytest.fixture(scope="session")
def golden():
    """Folder with published samples and reference numbers; tests that need it skip where it is absent."""
    if not GOLDEN.is_dir():
        pytest.skip(f"no golden data at {GOLDEN}")
    return GOLDEN
