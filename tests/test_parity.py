"""Losses against implementations that we did not write: TRL's GRPOTrainer, forms of GVPO published elsewhere; and TRL's reward functions run by ours."""
import math
import warnings
from functools import partial

import pytest
import torch
import trl.trainer.grpo_trainer as trl_module
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from trl.rewards import accuracy_reward, get_cosine_scaled_reward, get_repetition_penalty_reward, get_soft_overlong_punishment, reasoning_accuracy_reward, think_format_reward

from gcpo.advantage import group_advantage, product
from gcpo.loss import constant, dr_grpo_loss, gcpo_loss, grpo_loss, gvpo_loss, k3_corrected, k3_plain, per_sequence, per_token, sequence_ratio, token_ratio
from gcpo.policy import locate
from gcpo.reward import checked_rewards, load_reward, reward_table

GROUPS, SIZE, LENGTH = 2, 4, 9
WITHIN = 1e-6
PROMPTS = ["Numbers: 17 52 38\nLargest:", "Numbers: 4 9 6\nLargest:"]


# ---- what is compared: TRL's trainer on the tiny policy, and the same numbers by hand

def trainer_of(directory, reward=lambda completions, **columns: [0.0] * len(completions), kind=GRPOTrainer, **settings):
    "TRL's own trainer, by its own configuration, over the tiny policy in float64, its distribution flattened so that no token is hopeless."
    model = AutoModelForCausalLM.from_pretrained(locate("tiny"), dtype=torch.float64)
    model.get_output_embeddings().weight.data.mul_(.25)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = GRPOConfig(str(directory), **{**dict(
            use_cpu=True, bf16=False, gradient_checkpointing=False, per_device_train_batch_size=GROUPS * SIZE, num_generations=SIZE, max_completion_length=LENGTH + 3, beta=0.0,
            report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=1000, max_steps=1, seed=0, temperature=1.0), **settings})
        return kind(model, reward_funcs=reward, args=arguments, processing_class=AutoTokenizer.from_pretrained(locate("tiny")),
                    train_dataset=Dataset.from_list([{"prompt": p} for p in PROMPTS * 8]))


def token_logp(model, batch):
    "Log-probs of the completions by transformers' ordinary forward pass: logits, log-softmax, gather."
    ids, seen = (torch.cat([batch[f"prompt_{what}"], batch[f"completion_{what}"]], dim=1) for what in ("ids", "mask"))
    T = batch["completion_ids"].shape[1]
    logits = model(input_ids=ids, attention_mask=seen).logits[:, -T - 1:-1]
    return logits.log_softmax(-1).gather(-1, batch["completion_ids"][:, :, None])[:, :, 0]


def hand_made(model, spread):
    "Two groups of four ragged responses, one wholly masked; old log-probs that differ by `spread` per token, None for a first pass."
    g = torch.Generator().manual_seed(4)
    rows, prompt = GROUPS * SIZE, 6
    pick = lambda T: torch.randint(3, model.config.vocab_size, (rows, T), generator=g)
    length = torch.tensor([4, 9, 7, 1, 5, 9, 2, 0])[:, None]
    padded = torch.tensor([0, 0, 0, 0, 2, 2, 2, 2])[:, None]
    batch = dict(prompt_ids=pick(prompt), prompt_mask=(torch.arange(prompt) >= padded).long(), completion_ids=pick(LENGTH), completion_mask=(torch.arange(LENGTH) < length).long())
    reward = torch.tensor([1., 0, 0, 1, .5, .2, .9, .1], dtype=torch.float64)
    batch["advantages"] = torch.cat([group_advantage(r) for r in reward.split(SIZE)])
    with torch.no_grad(): logp = token_logp(model, batch)
    noise = lambda scale: scale * torch.randn(logp.shape, generator=g, dtype=torch.float64)
    batch["ref_per_token_logps"] = logp + noise(.5)
    if spread: batch["old_per_token_logps"] = logp + noise(spread)
    batch["num_items_in_batch"] = batch["completion_mask"].sum()
    return batch


def ours(function, model, batch, **arguments):
    "Our loss of the same batch: one group at a time, averaged over groups; so are the metrics."
    logp = token_logp(model, batch)
    old = batch.get("old_per_token_logps", logp)
    parts = [function(*(x[s] for x in (logp, old, batch["advantages"], batch["completion_mask"])), ref_logp_G_T=batch["ref_per_token_logps"][s], **arguments)
             for s in (slice(i, i + SIZE) for i in range(0, len(logp), SIZE))]
    return sum(loss for loss, _ in parts) / len(parts), {name: sum(metrics[name] for _, metrics in parts) / len(parts) for name in parts[0][1]}


def gradient_of(loss, model):
    return torch.cat([p.flatten() for p in torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True, retain_graph=True)])


def differences(theirs, mine, model):
    "Largest differences of loss and of any parameter's gradient; the gradient compared must not be zero."
    gradient = gradient_of(theirs, model)
    assert gradient.norm() > 1e-3, "a comparison of nothing"
    return (theirs - mine).abs().item(), (gradient - gradient_of(mine, model)).abs().max().item()


# ---- one loss on one batch

def over_all(batch, groups=GROUPS):
    return partial(per_token, tokens=float(batch["num_items_in_batch"]) / groups)


def no_causal_term(logp, old, adv, mask, **arguments):
    return gcpo_loss(logp, old, product(adv, torch.ones_like(adv)), mask, kappa=0.0, **arguments)


def by(loss_type, level="token", **more):
    return dict(loss_type=loss_type, importance_sampling_level=level, **more)


HIGHER, TIGHT, LIMIT = dict(epsilon=.2, epsilon_high=.28), dict(epsilon=.03, epsilon_high=.04), partial(constant, max_length=LENGTH + 3)
METHODS = {  # name: TRL's settings, our function, its arguments for the batch
    "grpo": (by("grpo"), grpo_loss, lambda b: {}),
    "grpo, clip-higher": (by("grpo", **HIGHER), grpo_loss, lambda b: HIGHER),
    "dr_grpo": (by("dr_grpo", scale_rewards="none", **HIGHER), dr_grpo_loss, lambda b: dict(max_length=LENGTH + 3, **HIGHER)),
    "bnpo": (by("bnpo"), grpo_loss, lambda b: dict(normalise=over_all(b))),
    "dapo": (by("dapo", **HIGHER), grpo_loss, lambda b: dict(normalise=over_all(b), **HIGHER)),
    "gspo": (by("grpo", "sequence", **TIGHT), grpo_loss, lambda b: dict(ratio=sequence_ratio, **TIGHT)),
    "gspo, dapo": (by("dapo", "sequence", **TIGHT), grpo_loss, lambda b: dict(ratio=sequence_ratio, normalise=over_all(b), **TIGHT)),
    "gspo, dr_grpo": (by("dr_grpo", "sequence", **TIGHT), dr_grpo_loss, lambda b: dict(max_length=LENGTH + 3, ratio=sequence_ratio, **TIGHT)),
    "gcpo without its changes": (by("grpo", **HIGHER), no_causal_term, lambda b: HIGHER),
    "gcpo without its changes, gspo, dr_grpo": (by("dr_grpo", "sequence", **TIGHT), no_causal_term, lambda b: dict(ratio=sequence_ratio, normalise=LIMIT, **TIGHT)),
}


def trainer_and_batch(directory, method, beta, spread, corrected):
    trainer = trainer_of(directory, beta=beta, use_bias_correction_kl=corrected, **METHODS[method][0])
    trainer.current_gradient_accumulation_steps = 1
    return trainer, trainer.model.train(), hand_made(trainer.model, spread)


@pytest.mark.parametrize("spread", [0, .3], ids=["first pass", "later pass"])
@pytest.mark.parametrize("beta, corrected", [(0.0, False), (.04, False), (.04, True)], ids=["beta=0", "beta", "beta, corrected"])
@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients_are_trls(tmp_path, method, beta, corrected, spread):
    trainer, model, batch = trainer_and_batch(tmp_path, method, beta, spread, corrected)
    _, function, arguments = METHODS[method]
    mine, metrics = ours(function, model, batch, beta=beta, penalty=k3_corrected if corrected else k3_plain, **arguments(batch))
    loss, gradient = differences(trainer.compute_loss(model, batch), mine, model)
    print(f"\nparity: {method}, beta={beta}, corrected={corrected}, spread={spread}: loss {loss:.1e}, gradients {gradient:.1e}", end="")
    assert loss < WITHIN and gradient < WITHIN, "through TRL's own log-probs, which are float32 whatever the model"
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (token_logp(model, batch), torch.zeros(batch["completion_ids"].shape), None)
    loss, gradient = differences(trainer.compute_loss(model, batch), mine, model)
    print(f"; given log-probs in float64: {loss:.1e}, {gradient:.1e}")
    assert loss < 1e-12 and gradient < 1e-12, "the formula itself"
    if spread: assert metrics["clip/low"] > 0 and metrics["clip/high"] > 0, "some tokens are clipped on either side"


WRONG = {
    "the clip the other way round": ("grpo, clip-higher", dict(epsilon=.28, epsilon_high=.2)),
    "a symmetric clip": ("dapo", dict(epsilon_high=None)),
    "a token's ratio for a sequence's": ("gspo", dict(ratio=token_ratio)),
    "a sequence's ratio for a token's": ("grpo", dict(ratio=sequence_ratio)),
    "per sequence for per token": ("dapo", dict(normalise=per_sequence)),
    "each group's own tokens": ("dapo", dict(normalise=per_token)),
    "another maximum": ("dr_grpo", dict(max_length=LENGTH + 4)),
    "per sequence for a constant": ("gcpo without its changes, gspo, dr_grpo", dict(normalise=per_sequence)),
    "the other penalty": ("grpo", dict(penalty=k3_corrected)),
    "no penalty": ("grpo", dict(beta=0.0)),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_the_comparison_sees(tmp_path, mistake):
    method, wrong = WRONG[mistake]
    trainer, model, batch = trainer_and_batch(tmp_path, method, .04, .3, False)
    _, function, arguments = METHODS[method]
    mine, _ = ours(function, model, batch, **{**dict(beta=.04), **arguments(batch), **wrong})
    loss, gradient = differences(trainer.compute_loss(model, batch), mine, model)
    assert loss > 100 * WITHIN and gradient > 100 * WITHIN


@pytest.mark.parametrize("what", ["mask", "old", "advantages"])
def test_the_comparison_sees_other_inputs(tmp_path, what):
    trainer, model, batch = trainer_and_batch(tmp_path, "grpo", .04, .3, False)
    other = {"mask": dict(completion_mask=torch.ones_like(batch["completion_mask"])), "old": dict(old_per_token_logps=token_logp(model, batch)),
             "advantages": dict(advantages=batch["advantages"].flip(0))}[what]
    loss, gradient = differences(trainer.compute_loss(model, batch), ours(grpo_loss, model, {**batch, **other}, beta=.04)[0], model)
    assert loss > 100 * WITHIN and gradient > 100 * WITHIN


# ---- micro-batches, and TRL's own loop

@pytest.mark.parametrize("method", ["grpo", "dr_grpo", "dapo", "gspo"])
def test_accumulated_micro_batches_are_the_mean_over_groups(tmp_path, method):
    settings, function, arguments = METHODS[method]
    trainer = trainer_of(tmp_path, per_device_train_batch_size=SIZE, gradient_accumulation_steps=GROUPS, beta=.04, use_bias_correction_kl=False, **settings)
    trainer.current_gradient_accumulation_steps = GROUPS
    model, batch = trainer.model.train(), hand_made(trainer.model, .3)
    halves = [{name: x if x.ndim == 0 else x[i:i + SIZE] for name, x in batch.items()} for i in range(0, GROUPS * SIZE, SIZE)]
    theirs = sum(trainer.compute_loss(model, half) for half in halves)
    loss, gradient = differences(theirs, ours(function, model, batch, beta=.04, **arguments(batch))[0], model)
    assert loss < WITHIN and gradient < WITHIN


class Watched(GRPOTrainer):
    "TRL's trainer, unchanged but for a look at what each of its steps computes."
    seen, rewarded = (), ()

    def compute_loss(self, model, inputs, **kwargs):
        loss = super().compute_loss(model, inputs, **kwargs)
        self.seen = [*self.seen, self.compare(loss, model, inputs)]
        return loss


@pytest.mark.parametrize("method", ["grpo", "dr_grpo", "dapo", "gspo"])
def test_from_rewards_through_trls_own_training_loop(tmp_path, method, monkeypatch):
    "Two batches of TRL's samples, two iterations each: TRL's advantages, old and reference log-probs, loss and gradients at each step. Some rewards are None."
    settings, function, arguments = METHODS[method]
    monkeypatch.setattr(trl_module, "shuffle_sequence_dict", lambda batch: batch)
    g, rewarded = torch.Generator().manual_seed(2), []

    def reward(completions, **columns):
        rewarded.append([None if i == 1 else score for i, score in enumerate(torch.rand(len(completions), generator=g).tolist())])
        return rewarded[-1]

    def compare(theirs, model, inputs):
        reward_G = torch.tensor([math.nan if r is None else r for r in rewarded[-1]])
        advantages = torch.cat([group_advantage(r, scale=method != "dr_grpo") for r in reward_G.split(SIZE)])
        torch.testing.assert_close(advantages, inputs["advantages"], rtol=0, atol=WITHIN)
        mine, metrics = ours(function, model, {**inputs, "advantages": advantages}, beta=.04, penalty=k3_corrected, **arguments(inputs))
        return *differences(theirs, mine, model), abs(float(metrics["ratio/mean"]) - 1), float(metrics["kl/ref"])

    trainer = trainer_of(tmp_path, reward=reward, kind=Watched, beta=.04, num_iterations=2, max_steps=4, learning_rate=1e-3, lr_scheduler_type="constant", **settings)
    trainer.compare = compare
    trainer.train()
    loss, gradient, off_policy, kl = zip(*trainer.seen)
    assert len(trainer.seen) == 4 and len(rewarded) == 2
    assert max(loss) < WITHIN and max(gradient) < WITHIN
    assert off_policy[0] < WITHIN and off_policy[1] > 1e-4 and off_policy[3] > 1e-4 and min(kl) > 0


# ---- GVPO

def gvpo_as_variance(R_G, reward_G):
    "The defining formula: half the unbiased variance of the implicit reward's distance to the reward."
    error_G = (R_G - R_G.mean()) - (reward_G - reward_G.mean())
    return .5 * (error_G ** 2).sum() / (len(R_G) - 1)


def gvpo_as_recipe(R_G, reward_G):
    "As the authors' recipe in verl (recipe/gvpo) has it: the mean implicit reward is a constant."
    return .5 * (((R_G - R_G.mean().detach()) - (reward_G - reward_G.mean())) ** 2).sum() / (len(R_G) - 1)


def gvpo_as_weights(R_G, reward_G):
    "As policy gradient (arXiv 2504.19599): -beta sum_i w_i log pi / (n - 1), the weights w_i constant and of sum 0; the same gradient, another value."
    weight_G = (reward_G - reward_G.mean()) - (R_G - R_G.mean())
    return -(weight_G.detach() * R_G).sum() / (len(R_G) - 1)


@pytest.mark.parametrize("written", [gvpo_as_variance, gvpo_as_recipe, gvpo_as_weights])
@pytest.mark.parametrize("spread", [0, .3], ids=["first pass", "later pass"])
def test_gvpo_is_its_formula(tmp_path, written, spread):
    model = trainer_of(tmp_path).model
    batch, beta = hand_made(model, spread), .1
    reward_G, rows = torch.tensor([1., 0, .3, .8], dtype=torch.float64), slice(4, 8)
    logp, mask = token_logp(model, batch)[rows], batch["completion_mask"][rows]
    old = batch["old_per_token_logps"][rows] if spread else logp.detach()
    R_G = torch.stack([beta * sum(logp[i, t] - old[i, t] for t in range(LENGTH) if mask[i, t]) if mask[i].any() else logp.sum() * 0 for i in range(SIZE)])
    mine, _ = gvpo_loss(logp, old, reward_G, mask, beta=beta, group_size=SIZE)
    loss, gradient = differences(written(R_G, reward_G), mine, model)
    assert gradient < 1e-12
    if written is not gvpo_as_weights: assert loss < 1e-12


def test_gvpo_by_hand():
    """Three responses of 2, 1 and 3 tokens, beta = 1/2. Sums of the log-ratios: 0.3 - 0.1 = 0.2; -0.4; 0.1 + 0.1 + 0.4 = 0.6. R = [0.1, -0.2, 0.3], mean 1/15.
    R - mean R = [1/30, -4/15, 7/30]; rewards [1, 0, 0.5], r - mean r = [1/2, -1/2, 0]; the difference is e = [-14, 7, 7]/30.
    Loss ([14^2 + 7^2 + 7^2] / 900) / (2 * 2) = 294/3600 = 0.0816667. Gradient beta e_i / 2 at each token: [-14, 7, 7]/120 = [-0.1166667, 0.0583333, 0.0583333]."""
    old = torch.full((3, 3), -2., dtype=torch.float64)
    logp = (old + torch.tensor([[.3, -.1, 5], [-.4, 7, 7], [.1, .1, .4]], dtype=torch.float64)).requires_grad_()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]])
    loss, _ = gvpo_loss(logp, old, torch.tensor([1., 0, .5], dtype=torch.float64), mask, beta=.5)
    assert loss.item() == pytest.approx(294 / 3600, abs=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss, logp)[0], mask * torch.tensor([[-14.], [7], [7]], dtype=torch.float64) / 120, rtol=0, atol=1e-12)


def test_a_gvpo_group_in_pieces_is_refused():
    logp, reward_G = torch.zeros(4, 2), torch.tensor([1., 0, 0, 1])
    gvpo_loss(logp, logp, reward_G, torch.ones(4, 2), group_size=4)
    with pytest.raises(ValueError, match="2 responses of a group of 4.*never split it"):
        gvpo_loss(logp[:2], logp[:2], reward_G[:2], torch.ones(2, 2), group_size=4)


# ---- TRL's reward functions

SAID = ["<think>one plus one</think>\\boxed{2}", "<think>a guess</think>\\boxed{3}", "no thought \\boxed{2}", "<think>no end \\boxed{2}"]
CHAT = [[{"role": "assistant", "content": text}] for text in SAID]
COLUMNS = dict(solution=["$2$", "$2$", "$2$", "no number here"], completion_ids=[[1, 2, 3, 4], [5, 5, 5, 5, 5], [1] * 10, [1, 2]])


@pytest.mark.parametrize("name, direct, expected", [
    ("accuracy_reward", accuracy_reward, [1, 0, 1, None]),
    ("reasoning_accuracy_reward", reasoning_accuracy_reward, [1, 0, 0, 0]),
    ("think_format_reward", think_format_reward, [1, 1, 0, 0]),
])
def test_trls_reward_functions_by_name(name, direct, expected):
    "`package.module:function` in a parameter file; None becomes NaN, not scored."
    function = load_reward(f"trl.rewards:{name}")
    assert function is direct and direct(completions=CHAT, **COLUMNS) == expected
    table = reward_table([function], ["1+1?"] * 4, CHAT, COLUMNS)
    torch.testing.assert_close(table, torch.tensor([[math.nan if x is None else float(x)] for x in expected]), equal_nan=True)


def test_trls_configured_rewards_and_their_sum():
    """TRL's other rewards come from functions that take settings. Lengths 4, 5, 10, 2. Cosine over 10 tokens, right: 0.5 + 0.25 (1 + cos(0.4 pi)) = 0.8272542; wrong, at half: -0.75;
    right at the limit: 0.5; not scored. Repeated bigrams: none; 1 of 4 different: -0.75; 1 of 9: -8/9; none. Overlong beyond 10 - 6: 0; -1/6; -1; 0."""
    functions = [get_cosine_scaled_reward(max_len=10), get_repetition_penalty_reward(ngram_size=2), get_soft_overlong_punishment(10, 6), think_format_reward]
    expected = torch.tensor([[.8272542, 0, 0, 1], [-.75, -.75, -1 / 6, 1], [.5, -8 / 9, -1, 0], [math.nan, 0, 0, 0]])
    torch.testing.assert_close(reward_table(functions, ["1+1?"] * 4, CHAT, COLUMNS), expected, rtol=0, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(checked_rewards(functions, ["1+1?"] * 4, CHAT, COLUMNS, [1, 1, 1, .5]),
                               torch.tensor([1.3272542, -1.1666667, -1.3888889, 0]), rtol=0, atol=1e-6)
