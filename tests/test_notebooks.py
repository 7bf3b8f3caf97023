"""Every numbered notebook that exports runs from top to bottom: their cells hold the unit tests. So does every tour, from recorded data."""
import pytest
from conftest import ROOT
from warm import warm

TOURS = [p for p in sorted((ROOT / "nbs" / "tours").glob("*.ipynb")) if p.stem != "tiny_warm_start"]  # which trains


@pytest.mark.parametrize("notebook", [*sorted((ROOT / "nbs").glob("[0-4]*.ipynb")), *TOURS], ids=lambda p: p.stem)
def test_notebook(notebook):
    done = warm(f"import nbdev.test; nbdev.test.nbdev_test({str(notebook)!r}, n_workers=0)")
    assert done.returncode == 0, done.stdout[-3000:]
