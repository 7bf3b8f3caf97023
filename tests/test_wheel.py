"""The built package, away from its checkout: what it needs of data and notebooks is in it."""
import os
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT

USE = """
import sys
from pathlib import Path
import gcpo
from gcpo.batch import notebook_path
from gcpo.core import data_dir
from gcpo.policy import load_policy
from gcpo.record import load_group
from gcpo.statistics import published
here = Path(sys.argv[1]).resolve()
assert Path(gcpo.__file__).resolve().is_relative_to(here) and data_dir().resolve().is_relative_to(here) and notebook_path("50_train").is_relative_to(here)
assert load_policy("tiny", device="cpu").window == 1024 and len(load_group("figure-1").group) > 1 and len(published()) > 10
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    files = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", place, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    built, = place.glob("gcpo-*.whl")
    return built


def test_a_wheel_holds_the_package_and_nothing_of_the_workshop(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = [n for n in file.namelist() if ".dist-info/" not in n]
    assert all(n.startswith("gcpo/") for n in names) and {"gcpo/train.py", "gcpo/nbs/50_train.ipynb", "gcpo/nbs/params/table1.yaml", "gcpo/recorded/tiny/model.safetensors"} <= {*names}
    assert not [n for n in names if "tests" in n or n.endswith("00_core.ipynb")] and wheel.stat().st_size < 8_000_000


def test_a_wheel_works_away_from_the_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "installed")
    done = subprocess.run([sys.executable, "-c", USE, tmp_path / "installed"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
