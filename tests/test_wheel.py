"""The built package, away from its checkout: what it needs of data and notebooks is in it."""
import ast
import configparser
import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions, requires

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

COMES_WITH = dict(tokenizers="transformers", huggingface_hub="transformers", sympy="torch", latex2sympy2_extended="math-verify", IPython="ipykernel", traitlets="ipykernel")
name_of = lambda requirement: re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def test_what_is_imported_is_required():
    "By the package itself, or by the required package that it comes with; what an extra brings is imported inside functions only."
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    required = {extra: {name_of(r) for r in settings["DEFAULT"][f"{extra}requirements"].split()} for extra in ("", "tasks_", "slurm_", "vllm_", "deepspeed_", "trackers_")}
    known, missing = packages_distributions(), []
    for module in sorted((ROOT / "gcpo").glob("*.py")):
        tree = ast.parse(module.read_text())
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in {n.split(".")[0] for n in names} - sys.stdlib_module_names:
                allowed = required[""] if node in tree.body else set().union(*required.values())
                carrier = COMES_WITH.get(name)
                through = carrier in required[""] and name_of(name) in {name_of(r) for r in requires(carrier)}
                if not through and not {name_of(d) for d in known.get(name, [name])} & allowed:
                    missing.append(f"{module.name}:{node.lineno} {name}")
    assert missing == [], "add them to settings.ini"


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


@pytest.mark.slow
def test_a_wheel_in_an_empty_environment(wheel, tmp_path):
    "Installed with what it asks for and nothing else: it is used, and trains, from a directory that knows nothing of the checkout."
    python = tmp_path / "env" / "bin" / "python"
    for command in ([sys.executable, "-m", "venv", tmp_path / "env"], [python, "-m", "pip", "install", "--quiet", "torch==2.13.0"], [python, "-m", "pip", "install", "--quiet", wheel]):
        subprocess.run(command, check=True, capture_output=True, text=True)
    bare = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "GCPO_"))}
    run = "--model tiny --shots 0 --lora_r 0 --max_steps 2 --eval_steps 2 --eval_size 20 --train_size 50 --device cpu --output_dir run".split()
    for command in ([python, "-c", USE, tmp_path / "env"], [python.parent / "gcpo-train", *run], [python.parent / "gcpo-report", "run", "--output", "run.html"]):
        done = subprocess.run(command, cwd=tmp_path, env=bare, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert (tmp_path / "run" / "policy" / "model.safetensors").exists() and (tmp_path / "run.html").stat().st_size > 10_000
