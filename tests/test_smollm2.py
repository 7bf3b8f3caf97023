"""A real model with a chat template, on questions from a file, through every stage."""
import json

import pytest
import torch

from gcpo.core import PrefixTree, derive_seed, read_metrics
from gcpo.collider import Contexts, LONG, integrate
from gcpo.policy import load_policy
from gcpo.sample import sample_alone, sample_groups
from gcpo.score import logp_alone, tree_logp
from gcpo.train import Config, prepare, train

QUESTIONS = [("What is 2 + 3?", "5"), ("What is 7 - 4?", "3"), ("What is 6 + 1?", "7"), ("What is 9 - 2?", "7"), ("What is 4 + 4?", "8")]


@pytest.fixture
def chat(tmp_path):
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps({"problem": q, "answer": a}) + "\n" for q, a in QUESTIONS))
    return dict(model="smollm2", data=str(tmp_path / "sums.jsonl"), rewards=["accuracy"], template="long", stop=[], num_generations=3, prompts_per_step=2, max_completion_length=12,
                max_draw_length=12, max_continuation_length=8, max_steps=1, lora_r=4, beta=0.02, kl_without_signal=True, device="cpu", output_dir=str(tmp_path / "run"))


def test_chat_questions_from_a_file(chat, tmp_path):
    config = Config.checked(chat)
    recipe, policy, queries, held_out = prepare(config)
    assert len(queries) == 4 and len(held_out) == 1 and queries[0].shared > 20
    group, = sample_groups(policy, queries[:1], 3, recipe.how)
    alone = sample_alone(policy, queries[0].ids, derive_seed(0, "rollout", queries[0].id, 1), recipe.how)
    assert torch.equal(alone.ids, group.ids_G[1])
    group, = integrate(policy, [group], recipe.collider)
    tree = PrefixTree()
    text = policy.tokenizer.decode(tree.ids(Contexts(policy, group, LONG, tree).context(0, group.draws_G_J[0][1])))
    assert text.startswith("<|im_start|>system") and "What is 2 + 3?\n\nCandidate answers:\n\n- " in text and "Integrated answer:" in text
    assert text.endswith("Give your own answer.<|im_end|>\n<|im_start|>assistant\n") and text.count("\n\n- ") >= 2
    run_dir = train(config)
    row = read_metrics(run_dir)[0]
    assert row["causal/groups"] == 2 and row["kl/causal"] > 0 and row["tokens/draws"] > 0
    prompt, answer = queries[0].ids, group.ids_G[0]
    with torch.no_grad():
        trained = load_policy(str(run_dir / "policy"), device="cpu")
        ours, = tree_logp(trained, [-1, 0], [prompt, answer], [1])
        assert torch.allclose(ours, logp_alone(trained, prompt, answer), atol=1e-4)
