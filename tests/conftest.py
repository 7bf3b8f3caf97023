"""Shared by all tests: no network, few threads, and a small configuration of a run."""
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are small; of several test processes, threads that wait for each other would take the cores from the rest
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["PLOTLY_RENDERER"] = "plotly_mimetype+notebook_connected"  # what papermill's notebooks choose by themselves

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent

SMALL = dict(model="tiny", shots=0, lora_r=0, learning_rate=1e-3, max_steps=6, eval_steps=3, save_steps=2, eval_size=40, device="cpu",
             max_completion_length=8, max_draw_length=8, max_continuation_length=8, beta=0.02, num_iterations=2, prompts_per_step=3, num_generations=4)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes long; run by `make slow`")


@pytest.fixture
def small(tmp_path):
    "Parameters of a run of seconds on tiny, into a directory of its own."
    return {**SMALL, "output_dir": str(tmp_path / "run")}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    "As many as there are cores; eight at most, for the memory's sake."
    return min(8, os.cpu_count() or 1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "Of several test processes one runs a file, for its fixtures' sake; notebooks go to whichever is free. (Marks of groups, as of `--dist loadgroup`, do nothing under pytest 9.2.)"
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return nodeid if nodeid.startswith("tests/test_notebooks") else nodeid.split("::")[0]

    return Files(config, log)
