"""Evaluation from end to end: as a notebook, killed and continued, of a run's own policy, and on code."""
import json
import signal
import subprocess
import time

import pytest
from conftest import BIN, ROOT, SMALL

from gcpo.evaluate import Evaluation, evaluate, read_records, read_results
from gcpo.train import Config, train

TINY = dict(model="tiny", benchmarks=["largest_of_three"], max_problems=40, num_samples=2, max_completion_length=6, temperature=1.0, top_p=1.0, problems_at_once=4)


def outcome(directory) -> list:
    return read_records(directory).sort_values(["problem_id", "sample"])[["problem_id", "sample", "completion", "score"]].values.tolist()


def command(directory) -> list[str]:
    return [str(BIN / "gcpo-evaluate"), *(part for name, value in {**TINY, "output_dir": str(directory)}.items() for part in (f"--{name}", json.dumps(value) if isinstance(value, list) else str(value)))]


def test_killed_and_continued(tmp_path):
    whole = evaluate(Evaluation.checked({**TINY, "output_dir": str(tmp_path / "whole")}))
    process = subprocess.Popen(command(tmp_path / "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while len(list((tmp_path / "killed").glob("records/*/*.parquet"))) < 2 and time.time() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "killed").glob("records/*/*.parquet")}
    assert 2 <= len(kept) < 10, "killed in the middle"
    done = subprocess.run(command(tmp_path / "killed"), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "largest_of_three:" in done.stdout, done.stderr[-2000:]
    assert outcome(tmp_path / "killed") == outcome(whole.directory)
    assert all((tmp_path / "killed" / "records" / "largest_of_three" / name).stat().st_mtime_ns == stamp for name, stamp in kept.items()), "what was finished is not done again"


def test_the_notebook(tmp_path):
    done = subprocess.run([BIN / "papermill", ROOT / "nbs" / "51_evaluate.ipynb", tmp_path / "out.ipynb", "-y", json.dumps({**TINY, "benchmarks": ["addition", "reasoning_gym:chain_sum"], "prompt_style": "text", "max_problems": 8,
                           "output_dir": str(tmp_path / "run")}), "--no-progress-bar"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    table = read_results(tmp_path / "run").table
    assert list(table.index) == ["addition", "reasoning_gym:chain_sum"] and (table.problems == 8).all() and (table.low <= table.score).all() and (table.score <= table.high).all()


def test_a_runs_policy_knows_what_it_was_trained_on(tmp_path):
    sums = [{"id": f"q{i}", "problem": f"{i} + {i} =", "answer": str(2 * i)} for i in range(12)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, [{**q, "prompt": q["problem"]} for q in sums])))
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps({**q, "id": f"t{i}", "prompt": q["problem"].replace("+", " + ")}) for i, q in enumerate(sums[:6])))
    run = train(Config.checked({**SMALL, "data": str(tmp_path / "train.jsonl"), "rewards": ["first_line_match"], "max_steps": 1, "prompts_per_step": 2, "eval_size": 2, "output_dir": str(tmp_path / "run")}))
    asked = Evaluation.checked({**TINY, "model": str(run / "policy"), "benchmarks": [str(tmp_path / "test.jsonl")], "max_problems": 0, "output_dir": str(tmp_path / "told")})
    told = evaluate(asked)
    assert told.table.trained_on.tolist() == [6] and "TRAINED ON 6" in str(told)
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(ValueError, match="check_overlap=False"):
        evaluate(asked.model_copy(update=dict(output_dir=str(tmp_path / "unknown"))))
    untold = evaluate(asked.model_copy(update=dict(output_dir=str(tmp_path / "unchecked"), check_overlap=False)))
    assert "was not looked for" in str(untold) and "trained_on" not in untold.table


def test_code_is_run(tmp_path):
    results = evaluate(Evaluation.checked({**TINY, "benchmarks": ["humaneval"], "prompt_style": "text", "max_problems": 2, "max_completion_length": 12, "output_dir": str(tmp_path / "code")}))
    assert results.table.score.tolist() == [0.0] and results.table.ungraded.tolist() == [0] and len(results.records) == 4
