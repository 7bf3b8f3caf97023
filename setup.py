"""Packaging: everything is read from settings.ini."""
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    keywords=cfg["keywords"].split(),
    packages=[*find_packages(include=["gcpo", "gcpo.*"]), "gcpo.nbs", "gcpo.recorded"],
    package_dir={"gcpo.nbs": "nbs", "gcpo.recorded": "data"},
    package_data={"gcpo.nbs": ["5*.ipynb", "params/*.yaml", "params/*/*"], "gcpo.recorded": ["tiny/*", "groups/*", "figure_1/*.json", "published_scores.csv"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={extra: cfg[f"{extra}_requirements"].split() for extra in ("dev", "tasks", "slurm", "vllm", "deepspeed", "trackers")},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
