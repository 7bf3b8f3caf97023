"""A run as a whole: papermill and command line agree, seeds decide everything, nothing finished is lost to kill -9, the adapter is everyone's."""
import json
import os
import signal
import subprocess
import sys

import pandas as pd
import pytest
import torch
import yaml
from conftest import BIN, ROOT

from gcpo.core import read_metrics
from gcpo.train import Config, read_completions, train
from warm import warm


def without_times(run_dir):
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(run_dir)]


def command(parameters, driver="from gcpo.train import main; main()"):
    arguments = [x for k, v in parameters.items() for x in (f"--{k}", yaml.safe_dump(v).strip().removesuffix("...").strip() if not isinstance(v, str) else v)]
    return warm(driver, *arguments)


def weights(run_dir):
    return (run_dir / "policy" / "model.safetensors").read_bytes()


KILLS = {
    # in the middle of the third step's second pass over its batch
    "in a step": "import gcpo.train as t; old = t.Optimiser.step; n = [0]\ndef step(self, check):\n    n[0] += 1\n    if n[0] == 6: os.kill(os.getpid(), 9)\n    return old(self, check)\nt.Optimiser.step = step",
    # half of the second checkpoint's optimiser state is on the disk
    "while a checkpoint is written": "import gcpo.train as t; old = torch.save; n = [0]\ndef save(state, path):\n    n[0] += 1\n    old(state, path)\n    if n[0] == 2:\n        size = os.path.getsize(path); os.truncate(path, size // 2); os.kill(os.getpid(), 9)\ntorch.save = save",
    # metrics and completions of the step are written, its checkpoint is not
    "between metrics and checkpoint": "import gcpo.train as t; old = t.Run.save\ndef save(self, policy, optimiser, step):\n    if step == 4: os.kill(os.getpid(), 9)\n    old(self, policy, optimiser, step)\nt.Run.save = save",
    # the last line of the metrics is torn
    "while metrics are written": "import gcpo.core as c, gcpo.train as t; old = c.MetricsLog.append\ndef append(self, step, **v):\n    if step == 3:\n        open(self.path, 'a').write('{\"step\": 3, \"rew'); os.kill(os.getpid(), 9)\n    old(self, step, **v)\nc.MetricsLog.append = append",
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    from conftest import SMALL
    directory = tmp_path_factory.mktemp("whole") / "run"
    done = command({**SMALL, "output_dir": str(directory)})
    assert done.returncode == 0, done.stdout[-2000:]
    assert "held out, before" in done.stdout and "next:" in done.stdout
    return directory


def test_a_run_does_not_go_on_with_other_questions(small, tmp_path):
    def write(first, last):
        answers = [first, *map(str, range(2, 30)), last]
        mine.write_text("".join(json.dumps(dict(id=str(i), prompt=f"{i} + 1 =", answer=answer)) + "\n" for i, answer in enumerate(answers)))

    mine = tmp_path / "mine.jsonl"
    asked = Config.checked({**small, "data": str(mine), "max_steps": 1, "eval_size": 6, "rewards": ["first_line_match"]})
    write("1", "30")
    assert train(asked) == train(asked)
    for first, last, told in (("2", "30", "questions: there"), ("1", "29", "held_out: there")):
        write(first, last)
        with pytest.raises(ValueError, match=told):
            train(asked)


def test_two_runs_with_one_seed_agree_byte_for_byte(small, uninterrupted):
    assert command(small).returncode == 0
    again = type(uninterrupted)(small["output_dir"])
    assert json.dumps(without_times(again)) == json.dumps(without_times(uninterrupted))
    assert weights(again) == weights(uninterrupted)
    assert read_completions(again).equals(read_completions(uninterrupted))


def test_questions_are_the_same_in_every_process():
    "Whatever the hash seed is by which Python orders sets: reasoning-gym's ransom notes are made by walking through some."
    pytest.importorskip("reasoning_gym")
    code = "from gcpo.benchmark import source_rows\nfrom gcpo.data import TASKS\nprint([source_rows(name, 6, 1) for name in ('reasoning_gym:ransom_note', 'reasoning_gym:word_ladder', *TASKS)])"
    first, second = (subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True).stdout for seed in "12")
    assert first == second and "Ransom note" in first


def test_another_seed_is_another_run(small, uninterrupted):
    run_dir = train(Config.checked({**small, "seed": 1, "max_steps": 1}))
    assert without_times(run_dir)[0]["reward/mean"] != without_times(uninterrupted)[0]["reward/mean"] or list(read_completions(run_dir).prompt) != list(read_completions(uninterrupted).prompt[:12])


@pytest.mark.parametrize("moment", KILLS)
def test_killed_run_continues_to_the_same_end(moment, small, uninterrupted):
    killed = command(small, f"import os, torch\n{KILLS[moment]}\nt.main()")
    assert killed.returncode == -signal.SIGKILL, killed.stdout[-2000:]
    run_dir = type(uninterrupted)(small["output_dir"])
    assert not (run_dir / "policy").exists()
    done = command(small)
    assert done.returncode == 0, done.stdout[-2000:]
    assert json.dumps(without_times(run_dir)) == json.dumps(without_times(uninterrupted))
    assert weights(run_dir) == weights(uninterrupted)
    assert read_completions(run_dir).equals(read_completions(uninterrupted))
    assert not list(run_dir.glob("**/part-*")) and not list(run_dir.glob("**/*.part"))


def test_papermill_does_the_same_run(small, uninterrupted, tmp_path):
    parameters = tmp_path / "small.yaml"
    parameters.write_text(yaml.safe_dump({k: v for k, v in small.items() if k != "output_dir"}))
    subprocess.run([BIN / "papermill", ROOT / "nbs" / "50_train.ipynb", tmp_path / "out.ipynb", "-f", parameters, "-p", "output_dir", small["output_dir"]],
                   check=True, capture_output=True)
    assert json.dumps(without_times(small["output_dir"])) == json.dumps(without_times(uninterrupted))
    cells = json.loads((tmp_path / "out.ipynb").read_text())["cells"]
    outputs = "".join(json.dumps(c.get("outputs", "")) for c in cells)
    assert "held out, after" in outputs and "application/vnd.plotly" in outputs
    assert (tmp_path / "out.ipynb").stat().st_size < 600_000


def test_papermill_refuses_a_parameter_that_does_not_exist(tmp_path):
    done = subprocess.run([BIN / "papermill", ROOT / "nbs" / "50_train.ipynb", tmp_path / "out.ipynb", "-p", "num_generation", "4", "-p", "output_dir", tmp_path / "run"], capture_output=True, text=True)
    assert done.returncode != 0 and "did you mean 'num_generations'" in done.stderr and not (tmp_path / "run").exists()


def test_a_saved_adapter_is_everyones(small):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer
    from gcpo.policy import load_policy
    from gcpo.score import logp_alone, tree_logp
    run_dir = train(Config.checked({**small, "lora_r": 4, "max_steps": 2}))
    plain, tokenizer = AutoPeftModelForCausalLM.from_pretrained(run_dir / "policy").eval(), AutoTokenizer.from_pretrained(run_dir / "policy")
    prompt, answer = (torch.tensor(tokenizer.encode(t)) for t in ("Numbers: 17 52 38\nLargest:", " 52\n"))
    with torch.no_grad():
        theirs = plain(torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1:-1].log_softmax(-1).gather(-1, answer[:, None]).squeeze(-1)
        ours, = tree_logp(load_policy(str(run_dir / "policy"), device="cpu"), [-1, 0], [prompt, answer], [1])
        base = logp_alone(load_policy("tiny", device="cpu"), prompt, answer)
    assert torch.allclose(ours, theirs, atol=1e-5) and not torch.allclose(ours, base, atol=1e-4)


def test_record_is_complete(uninterrupted):
    manifest = json.loads((uninterrupted / "manifest.json").read_text())
    assert manifest["config"]["alpha"] == 2.0 and manifest["environment"]["packages"]["torch"] and "output_dir" not in manifest["config"]
    frame = pd.read_parquet(uninterrupted / "completions.parquet")
    assert {"step", "prompt", "completion", "first_line_match", "advantage", "reward", "upsilon", "weight"} <= set(frame.columns) and len(frame) == 6 * 3 * 4
    assert len(list((uninterrupted / "checkpoints").iterdir())) == 2
