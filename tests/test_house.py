"""The house in order: notebooks, package and README in step, imports downward, nothing orphaned, settings in one place."""
import ast
import configparser
import importlib
import json
import re
import shutil
import subprocess
import sys
import time

import pytest
from conftest import BIN, ROOT

NOTEBOOKS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
NUMBER = {nb.stem.split("_", 1)[1]: int(nb.stem[:2]) for nb in NOTEBOOKS if int(nb.stem[:2]) < 50}
EXPORTING = set(NUMBER)


def cells(path):
    return json.loads(path.read_text())["cells"]


def test_package_is_the_notebooks_export(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv*", ".git", "runs", "_docs", "data", "__pycache__", "*.egg-info"))
    for module in EXPORTING:
        (copy / "gcpo" / f"{module}.py").unlink()
    subprocess.run([BIN / "nbdev_export"], cwd=copy, check=True, capture_output=True)
    for module in EXPORTING:
        assert (copy / "gcpo" / f"{module}.py").read_text() == (ROOT / "gcpo" / f"{module}.py").read_text(), f"gcpo/{module}.py is not its notebook's export: run nbdev_export"


def test_notebooks_are_clean(tmp_path):
    notebooks = [*NOTEBOOKS, ROOT / "nbs" / "index.ipynb", *(ROOT / "nbs" / "tours").glob("*.ipynb")]
    for file in [ROOT / "settings.ini", *notebooks]:
        shutil.copy(file, tmp_path)
    subprocess.run([BIN / "nbdev_clean", "--fname", tmp_path], cwd=tmp_path, check=True, capture_output=True)
    for nb in notebooks:
        assert json.loads((tmp_path / nb.name).read_text()) == json.loads(nb.read_text()), f"{nb.name}: run nbdev_clean"
        assert nb.stat().st_size < 600_000


def test_notebooks_were_run_to_their_end():
    for nb in NOTEBOOKS:
        for cell in cells(nb):
            if cell["cell_type"] == "code":
                assert not any(o["output_type"] == "error" for o in cell["outputs"]), f"{nb.name} holds an error"


def test_readme_is_the_index(tmp_path):
    subprocess.run([BIN / "jupyter", "nbconvert", "--to", "markdown", "--no-input", "--output-dir", tmp_path, "--output", "README", "--NbConvertApp.output_files_dir=nbs/images", ROOT / "nbs" / "index.ipynb"],
                   check=True, capture_output=True)
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text(), "run make readme"


def test_imports_point_downward_and_nothing_is_orphaned():
    modules = {p.stem for p in (ROOT / "gcpo").glob("*.py")} - {"__init__", "_modidx"}
    assert modules == EXPORTING, "every module has a numbered notebook, and every such notebook below 50 a module"
    for module in modules:
        for node in ast.walk(ast.parse((ROOT / "gcpo" / f"{module}.py").read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                parts = name.split(".")
                imported = parts[-1] if isinstance(node, ast.ImportFrom) and node.level else parts[1] if parts[0] == "gcpo" and len(parts) > 1 else None
                if imported is not None:
                    assert NUMBER[imported] < NUMBER[module], f"{module} imports {imported}"


def test_every_export_is_followed_by_an_assertion():
    for nb in NOTEBOOKS:
        sources = ["".join(c["source"]) for c in cells(nb) if c["cell_type"] == "code"]
        for i, source in enumerate(sources):
            if re.match(r"#\| ?export", source) and re.search(r"^(def|class) ", source, re.M):
                assert any(re.search(r"\bassert\b|raises", s) for s in sources[i + 1:i + 8]), f"{nb.name}: {source[:80]}"


def test_every_public_function_says_what_it_does():
    silent = [f"gcpo/{module}.py:{node.lineno} {node.name}" for module in EXPORTING for node in ast.parse((ROOT / "gcpo" / f"{module}.py").read_text()).body
              if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and not ast.get_docstring(node)]
    assert silent == [], "give them a docstring: what comes out, shapes, units, errors"


def test_import_is_light():
    code = "import sys, time; t = time.perf_counter(); import gcpo; s = time.perf_counter() - t; print(s, [m for m in ('torch', 'plotly', 'transformers') if m in sys.modules])"
    seconds, loaded = min(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split(" ", 1) for _ in range(3))
    assert float(seconds) < 0.1 and loaded.strip() == "[]"


def test_package_does_not_need_development_tools():
    code = "import sys, gcpo.train; print([m for m in ('nbdev', 'fastcore', 'plotly', 'ipywidgets', 'trl') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_settings_are_the_only_source():
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    shown = subprocess.run([sys.executable, "setup.py", "--name", "--version"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert shown[-2:] == [settings["DEFAULT"]["lib_name"], settings["DEFAULT"]["version"]]
    assert settings["DEFAULT"]["version"] in (ROOT / "gcpo" / "__init__.py").read_text()
    assert f"\nversion: {settings['DEFAULT']['version']}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize("notebook, kind", [("50_train", "gcpo.train:Config"), ("51_evaluate", "gcpo.evaluate:Evaluation"), ("52_report", "gcpo.report:Report")])
def test_parameters_cell_is_the_configuration(notebook, kind):
    from gcpo.core import cell
    module, name = kind.split(":")
    kind = getattr(importlib.import_module(module), name)
    source, = ["".join(c["source"]) for c in cells(ROOT / "nbs" / f"{notebook}.ipynb") if "parameters" in c["metadata"].get("tags", [])]
    assert source == cell(kind), f"the parameters cell of {notebook} should be\n{cell(kind)}"
    values = {}
    exec(source, values)
    assert {k: v for k, v in values.items() if not k.startswith("_")} == kind().model_dump()


def test_the_demo_is_valid():  # the others: test_params
    from gcpo.core import read_parameters
    from gcpo.train import Config
    Config.checked(read_parameters(ROOT / "nbs" / "params" / "demo.yaml"), "demo.yaml")
