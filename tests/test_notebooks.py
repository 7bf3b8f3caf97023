"""Every numbered notebook that exports runs from top to bottom: their cells hold the unit tests. So does every tour, from recorded data."""
import subprocess

import pytest
from conftest import BIN, ROOT

TOURS = [p for p in sorted((ROOT / "nbs" / "tours").glob("*.ipynb")) if p.stem != "tiny_warm_start"]  # which trains


@pytest.mark.parametrize("notebook", [*sorted((ROOT / "nbs").glob("[0-4]*.ipynb")), *TOURS], ids=lambda p: p.stem)
def test_notebook(notebook):
    done = subprocess.run([BIN / "nbdev_test", "--path", notebook, "--n_workers", "0"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
