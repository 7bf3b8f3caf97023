"""All methods on one path: the same first rollouts for equal seeds, one place of difference, and ReST-MCTS* as a run that can be interrupted."""
import json
import subprocess

import pytest
from conftest import BIN, ROOT, SMALL

import gcpo.train
from gcpo.core import read_metrics
from gcpo.train import METHODS, Config, read_completions, train

ONE_STEP = {**{k: v for k, v in SMALL.items() if k not in ("beta", "num_iterations")}, "max_steps": 1, "eval_size": 2}
SEARCH = dict(ONE_STEP, method="rest_mcts", max_steps=12, search_step_length=1, search_separator="", search_branch=5, search_temperature=1.2, search_iterations=6, search_questions=10, eval_size=20)


def test_equal_seeds_equal_first_rollouts(tmp_path):
    rollouts = {}
    for method in METHODS:
        if method != "rest_mcts":
            run = train(Config.checked({**ONE_STEP, "method": method, "output_dir": str(tmp_path / method)}))
            rollouts[method] = read_completions(run)[["prompt", "completion"]].values.tolist()
    assert len(rollouts) == 12 and all(r == rollouts["grpo"] for r in rollouts.values())
    other = train(Config.checked({**ONE_STEP, "method": "grpo", "seed": 1, "output_dir": str(tmp_path / "other")}))
    assert read_completions(other)[["prompt", "completion"]].values.tolist() != rollouts["grpo"]


def test_the_negative_control_is_judged_by_the_real_reward(tmp_path):
    run = train(Config.checked({**ONE_STEP, "method": "random_reward", "eval_size": 40, "output_dir": str(tmp_path / "random")}))
    plain = train(Config.checked({**ONE_STEP, "method": "gcpo", "eval_size": 40, "output_dir": str(tmp_path / "plain")}))
    assert read_metrics(run)[0]["eval/reward"] == read_metrics(plain)[0]["eval/reward"]
    assert "random_reward" in read_completions(run) and "first_line_match" not in read_completions(run)


def untimed(run) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(run)]


def test_search_is_a_run_that_continues_where_it_was_stopped(tmp_path, monkeypatch):
    whole = train(Config.checked({**SEARCH, "output_dir": str(tmp_path / "whole")}))
    rows = untimed(whole)
    assert len(rows) > 2 and sum(row.get("tokens/generated", 0) for row in rows) <= 12 * 3 * 4 * 8 and (whole / "policy").is_dir()
    calls, evaluate = [], gcpo.train.evaluate_run

    def stop(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*args)
    monkeypatch.setattr(gcpo.train, "evaluate_run", stop)
    broken = Config.checked({**SEARCH, "output_dir": str(tmp_path / "broken")})
    with pytest.raises(KeyboardInterrupt):
        train(broken)
    monkeypatch.undo()
    assert untimed(train(broken)) == rows


def test_search_runs_as_a_notebook(tmp_path):
    (tmp_path / "run.yaml").write_text(json.dumps({**SEARCH, "max_steps": 4, "output_dir": str(tmp_path / "run")}))
    done = subprocess.run([BIN / "papermill", ROOT / "nbs" / "50_train.ipynb", tmp_path / "out.ipynb", "-f", tmp_path / "run.yaml", "--no-progress-bar"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "tokens generated" in (tmp_path / "out.ipynb").read_text() and (tmp_path / "run" / "policy").is_dir()
