
#| export
import argparse
import json
import math
import os
import shutil
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Callable, Literal, Sequence

import torch
import yaml
from pydantic import Field, model_validator
from torch import Tensor
from tqdm.auto import tqdm

from gcpo.advantage import clipped, flip_rate, group_advantage, has_signal, product, sign_aware
from gcpo.collider import DRAWS, ENCODINGS, ORDERS, TEMPLATES, Collider, content, contexts_logp, continue_contexts, encode, integrate
from gcpo.core import Group, MetricsLog, Parameters, derive_seed, environment, read_metrics, row_mask, share_heads, uncommitted, writable_dir, write_atomic
from gcpo.data import Row, load_rows, to_query
from gcpo.kl import k3, phi_autoregressive, phi_ess, phi_tokenwise, reference_mean, reference_ratio, reference_sum, treat_floor, treat_mask
from gcpo.loss import dr_grpo_loss, gcpo_loss, grpo_loss, gvpo_loss
from gcpo.policy import Policy, load_policy, reference_of, save_policy
from gcpo.reward import load_reward, name_of, reward_table
from gcpo.sample import Sampling, rollout, sample_groups
from gcpo.score import groups_logp
from gcpo.upsilon import batch_means, centred, centroid, constant, cosine, euclidean, gaussian, ones, shuffled, spread, upsilon



#| export
class DataParameters(Parameters):
    "What is trained on, and how completions are drawn and judged."
    model: str = Field("smollm2", description="tiny, smollm2, a directory, or a hub id", min_length=1)
    data: str = Field("largest_of_three", description="a generated task, or a .jsonl file with prompt (or problem, question) and answer", min_length=1)
    eval_data: str = Field("", description=".jsonl file of held-out questions; empty: held out from data")
    train_size: int = Field(1000, ge=1, description="training questions of a generated task")
    eval_size: int = Field(200, ge=1, description="held-out questions that an evaluation uses")
    shots: int = Field(3, ge=0, le=16, description="worked examples before each question of a generated task")
    rewards: list[str] = Field(["first_line_match"], min_length=1, description="reward functions by name, or package.module:function")
    reward_weights: list[float] = Field([], description="one weight per reward; empty: all 1")
    output_dir: str = Field("runs/gcpo", min_length=1, description="the run's directory; the same command continues a run that lies there")
    num_generations: int = Field(8, ge=2, description="responses a group, n")
    prompts_per_step: int = Field(4, ge=1, description="groups a step")
    max_completion_length: int = Field(16, ge=1, description="tokens of a response")
    temperature: float = Field(1.0, gt=0, description="sampling temperature; log-probs are taken at it too")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling; 1 is off")
    top_k: int = Field(0, ge=0, description="keep the k likeliest tokens; 0 is off")
    min_p: float = Field(0.0, ge=0, le=1, description="keep tokens of at least this share of the likeliest; 0 is off")
    stop: list[str] = Field(["\n"], description="strings that end a completion")
    mask_truncated_completions: bool = Field(False, description="leave completions that hit max_completion_length out of the loss")



#| export
class MethodParameters(DataParameters):
    "The method: collider and budgets, Upsilon, weighting, both KL terms, objective."
    objective: Literal["gcpo", "grpo", "dr_grpo", "gvpo"] = Field("gcpo", description="the loss; all but gcpo ignore what follows up to kappa")
    alpha: float = Field(2.0, ge=0, description="scale of Upsilon (Eq. 11)")
    weight: Literal["projected", "centroid", "shuffled", "constant", "ones"] = Field("projected", description="Upsilon, or a control: centroid, shuffled, constant (alpha), ones (GRPO)")
    similarity: Literal["gaussian", "euclidean", "cosine"] = Field("gaussian", description="how states are compared; the median response scores 1/2 (gaussian, euclidean)")
    weighting: Literal["product", "clipped", "sign_aware"] = Field("product", description="how A and Upsilon give B")
    collider: Literal["loo", "paper", "fresh"] = Field("loo", description="how integrated answers are drawn for Phi")
    num_draws: int = Field(2, ge=2, description="integrated answers a context, J; 1 is degenerate")
    num_continuations: int = Field(1, ge=1, description="continuations a context, m")
    max_draw_length: int = Field(16, ge=1, description="tokens of an integrated answer")
    max_continuation_length: int = Field(16, ge=1, description="tokens of a continuation")
    context_budget: int = Field(256, ge=1, description="tokens that a context shows of a response")
    context_order: Literal["divide_and_conquer", "fixed"] = Field("divide_and_conquer", description="order of the others in a context")
    template: Literal["short", "long"] = Field("short", description="words around the candidates")
    encoding: Literal["alone", "in_context"] = Field("alone", description="how answers become states")
    centre: bool = Field(False, description="subtract the mean state of the step's other prompts before comparing (ours; only cosine needs it)")
    kappa: float = Field(0.06, ge=0, description="weight of the causal KL term (Eq. 13)")
    reference: Literal["ratio", "mean", "sum"] = Field("ratio", description="reading of Eq. 12; sum is as printed")
    autoregressive: bool = Field(False, description="weigh Phi's draws by the tokens before (mean and ratio)")
    nonpositive: Literal["floor", "mask"] = Field("floor", description="what to do with tokens whose projected probability is not positive")
    floor: float = Field(1e-6, gt=0, lt=1, description="the floor of projected probabilities")
    causal_clamp: float = Field(5.0, gt=0, description="bound of the causal log-ratio, nats")
    policy_side: Literal["x", "q"] = Field("x", description="the policy in the causal term: given x_i as printed, or given q")
    kl_without_signal: bool = Field(False, description="causal KL also for groups whose rewards are all equal")



#| export
class Config(MethodParameters):
    "All parameters of a training run. `Config.checked(dict)` checks names, types and bounds, and what must hold together."
    beta: float = Field(0.0, ge=0, description="weight of the KL to the reference policy (gvpo: its reward scale, 0.1 in its paper)")
    epsilon: float = Field(0.2, ge=0, description="clip range of the importance ratio")
    epsilon_high: float | None = Field(None, ge=0, description="upper clip range; none: epsilon")
    scale_rewards: bool = Field(True, description="divide advantages by the group's standard deviation")
    num_iterations: int = Field(1, ge=1, description="optimiser steps on each batch of rollouts")
    groups_per_microbatch: int = Field(4, ge=1, description="groups in one backward pass; a group is never split")
    max_steps: int = Field(20, ge=1, description="batches of rollouts")
    learning_rate: float = Field(2e-4, gt=0, description="peak learning rate; 2e-4 suits LoRA, the paper's full fine-tuning has 1e-6")
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field("cosine", description="schedule over the run")
    warmup_ratio: float = Field(0.1, ge=0, le=1, description="share of optimiser steps that warm up")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's decoupled decay")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient clipping, L2")
    lora_r: int = Field(16, ge=0, description="rank of LoRA on all linear layers; 0 trains all weights")
    lora_alpha: int = Field(32, ge=1, description="LoRA scale")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="dtype of the weights")
    bf16: bool = Field(False, description="compute in bfloat16 (autocast)")
    device: str = Field("", description="cpu, cuda, cuda:1; empty: cuda if there is one")
    gradient_checkpointing: bool = Field(False, description="trade compute for memory in the backward pass")
    eval_steps: int = Field(10, ge=1, description="evaluate before every so many steps, and at the end")
    save_steps: int = Field(10, ge=1, description="checkpoint after every so many steps")
    save_total_limit: int = Field(2, ge=1, description="checkpoints kept")
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field([], description="trackers of accelerate")
    seed: int = Field(0, ge=0, description="of everything")

    @classmethod
    def from_namespace(cls, names: dict) -> "Config":
        "From the variables of a papermill notebook: the parameters cell, and papermill's own cell with what the user injected."
        plain = {k: v for k, v in names.items() if isinstance(v, (bool, int, float, str, list, dict, type(None))) and not k.startswith("_") and k not in ("In", "Out")}
        return cls.checked({k: _number(k, v) for k, v in plain.items()}, "notebook parameters")

    @model_validator(mode="after")
    def _together(self):
        if self.reward_weights and len(self.reward_weights) != len(self.rewards):
            raise ValueError(f"reward_weights has {len(self.reward_weights)} entries for {len(self.rewards)} rewards; give one each, or none")
        if self.objective == "gvpo" and self.beta == 0:
            raise ValueError("objective='gvpo' with beta=0 has no gradient: beta is its reward scale; its paper uses 0.1")
        if self.autoregressive and self.reference == "sum":
            raise ValueError("autoregressive=True has no meaning for reference='sum', whose mass is not one; use mean or ratio")
        if self.centre and self.prompts_per_step < 2 and self.objective == "gcpo" and self.weight in ("projected", "centroid", "shuffled"):
            raise ValueError("centre=True needs states of other prompts, and prompts_per_step is 1; use at least 2 prompts a step, or centre=False")
        return self



#| export
UPSILONS = {"projected": upsilon, "centroid": centroid, "shuffled": shuffled, "constant": constant, "ones": ones}
SIMILARITIES = {"cosine": cosine, "euclidean": euclidean, "gaussian": gaussian}
WEIGHTINGS = {"product": product, "clipped": clipped, "sign_aware": sign_aware}
REFERENCES = {"sum": reference_sum, "mean": reference_mean, "ratio": reference_ratio}
TREATMENTS = {"floor": treat_floor, "mask": treat_mask}


@dataclass(frozen=True)
class Recipe:
    "A configuration in functions. `weigh(z, Z, seed)` gives Upsilon; `project(logp_G_J_T, logp_q_G_T)` the causal reference."
    config: Config
    how: Sampling
    collider: Collider
    rewards: tuple[Callable, ...]
    weigh: Callable
    project: Callable
    treat: Callable
    objective: Callable
    needs_continuations: bool
    needs_states: bool
    kappa: float

    @property
    def needs_draws(self) -> bool:
        return self.needs_continuations or self.kappa > 0



#| export
def make_recipe(config: Config) -> Recipe:
    "Resolve every word of a configuration. Raises ValueError for an unknown reward function."
    c, causal = config, config.objective == "gcpo"
    how = Sampling(c.max_completion_length, c.temperature, c.top_k, c.top_p, c.min_p, tuple(c.stop))
    collider = Collider(DRAWS[c.collider], c.num_draws, c.num_continuations, replace(how, max_new_tokens=c.max_draw_length),
                        replace(how, max_new_tokens=c.max_continuation_length), c.context_budget, TEMPLATES[c.template], ORDERS[c.context_order])
    own_draw = c.collider == "paper"
    settings = dict(alpha=c.alpha, similarity=SIMILARITIES[c.similarity], own_draw=own_draw)
    weigh = {"shuffled": lambda z, Z, seed: shuffled(z, Z, seed=seed, **settings)}.get(c.weight, lambda z, Z, seed: UPSILONS[c.weight](z, Z, **settings))
    project = partial(REFERENCES[c.reference], floor=c.floor)
    if c.reference != "sum":
        project = partial(project, phi=phi_autoregressive if c.autoregressive else phi_tokenwise, own_draw=own_draw)
    return Recipe(c, how, collider, tuple(map(load_reward, c.rewards)), weigh, project, TREATMENTS[c.nonpositive], OBJECTIVES[c.objective],
                  causal and c.weight in ("projected", "shuffled"), causal and c.weight not in ("ones", "constant"), c.kappa if causal else 0.0)



#| export
def _old(group: Group, logp_G_T: Tensor) -> Tensor:
    "The sampling policy's log-probs; on the first pass over fresh rollouts they are the policy's own."
    return group.old_logp_G_T if len(group.old_logp_G_T) else logp_G_T.detach()


def _grpo(c: Config, g: Group, logp_G_T: Tensor, logp_x_G_T: Tensor | None, mask_G_T: Tensor):
    ref = g.ref_logp_G_T if len(g.ref_logp_G_T) else None
    return grpo_loss(logp_G_T, _old(g, logp_G_T), g.adv_G, mask_G_T, c.epsilon, c.beta, ref, c.epsilon_high)


def _dr_grpo(c: Config, g: Group, logp_G_T: Tensor, logp_x_G_T: Tensor | None, mask_G_T: Tensor):
    ref = g.ref_logp_G_T if len(g.ref_logp_G_T) else None
    return dr_grpo_loss(logp_G_T, _old(g, logp_G_T), g.adv_G, mask_G_T, c.epsilon, c.beta, ref, c.epsilon_high, max_length=c.max_completion_length)


def _gvpo(c: Config, g: Group, logp_G_T: Tensor, logp_x_G_T: Tensor | None, mask_G_T: Tensor):
    return gvpo_loss(logp_G_T, _old(g, logp_G_T), g.reward_G, mask_G_T, c.beta)


def _gcpo(c: Config, g: Group, logp_G_T: Tensor, logp_x_G_T: Tensor | None, mask_G_T: Tensor):
    ref = g.ref_logp_G_T if len(g.ref_logp_G_T) else None
    if logp_x_G_T is None:
        return gcpo_loss(logp_G_T, _old(g, logp_G_T), g.weight_G, mask_G_T, kappa=0.0, epsilon=c.epsilon, beta=c.beta, ref_logp_G_T=ref, epsilon_high=c.epsilon_high)
    return gcpo_loss(logp_G_T, _old(g, logp_G_T), g.weight_G, mask_G_T, logp_x_G_T, g.causal_ref_logp_G_T, c.kappa, c.epsilon, c.beta, ref,
                     c.epsilon_high, g.causal_mask_G_T, c.causal_clamp)


OBJECTIVES = {"gcpo": _gcpo, "grpo": _grpo, "dr_grpo": _dr_grpo, "gvpo": _gvpo}



#| export
def score_rewards(groups: Sequence[Group], recipe: Recipe) -> list[Group]:
    "The groups with reward_G: the weighted sum over the reward functions, NaN where none scores, and each function's own reward."
    n = [len(g) for g in groups]
    repeat = lambda name: [g.query.columns.get(name) for g in groups for _ in g.ids_G]
    columns = {name: repeat(name) for name in {k for g in groups for k in g.query.columns}}
    completions = [_as_trl(g, text) for g in groups for text in g.completions]
    ids = [x.tolist() for g in groups for x in g.ids_G]
    table_N_F = reward_table(recipe.rewards, [g.query.prompt for g in groups for _ in g.ids_G], completions, {**columns, "completion_ids": ids})
    weights = torch.tensor(recipe.config.reward_weights or [1.0] * len(recipe.rewards))
    reward_N = (table_N_F * weights).nansum(1).where(~table_N_F.isnan().all(1), math.nan)
    return [replace(g, reward_G=r, reward_G_F=t) for g, r, t in zip(groups, reward_N.split(n), table_N_F.split(n))]


def judge(groups: Sequence[Group], recipe: Recipe) -> list[Group]:
    "The groups with rewards, advantages, and what a group without causal stages has for good: Upsilon = 1, B = A."
    advantage = partial(group_advantage, scale=recipe.config.scale_rewards and recipe.config.objective != "dr_grpo")
    judged = [(g, advantage(g.reward_G)) for g in score_rewards(groups, recipe)]
    return [replace(g, adv_G=adv_G, weight_G=adv_G, upsilon_G=torch.ones(len(g))) for g, adv_G in judged]


def _as_trl(group: Group, text: str) -> str | list:
    return text if isinstance(group.query.prompt, str) else [{"role": "assistant", "content": text}]



#| export
def weigh(groups: Sequence[Group], recipe: Recipe, step_seed: tuple) -> list[Group]:
    "Step 5: the groups with upsilon_G and weight_G = B. States are centred by the step's other prompts if the configuration says so."
    if not groups:
        return []
    c = recipe.config
    means = batch_means([g.z_G_D for g in groups]) if c.centre and recipe.needs_states and len(groups) > 1 else [None] * len(groups)
    out = []
    for g, mean_D in zip(groups, means):
        shift = (lambda x: centred(x, mean_D) if len(x) else x) if mean_D is not None else (lambda x: x)
        z_G_D = g.z_G_D if len(g.z_G_D) else torch.zeros(len(g), 1)
        upsilon_G = recipe.weigh(shift(z_G_D), shift(g.Z_G_J_M_D), derive_seed(*step_seed, "shuffle", g.query.id))
        out.append(replace(g, upsilon_G=upsilon_G, weight_G=WEIGHTINGS[c.weighting](g.adv_G, upsilon_G)))
    return out



#| export
@torch.no_grad()
def remember(policy: Policy, reference: Callable, groups: Sequence[Group], recipe: Recipe) -> list[Group]:
    "The groups with old_logp_G_T, ref_logp_G_T (beta > 0) and causal_ref_logp_G_T, causal_mask_G_T (groups with draws, kappa > 0)."
    c, out = recipe.config, list(groups)
    has_draws = [recipe.kappa > 0 and len(g.draws_G_J) > 0 for g in out]
    if out and (c.num_iterations > 1 or any(has_draws)):
        out = [replace(g, old_logp_G_T=logp) for g, logp in zip(out, groups_logp(policy, out, c.temperature)[0])]
    if out and c.beta > 0 and c.objective != "gvpo":
        with reference() as ref:
            out = [replace(g, ref_logp_G_T=logp) for g, logp in zip(out, groups_logp(ref, out, c.temperature)[0])]
    in_contexts = iter(contexts_logp(policy, [g for g, d in zip(out, has_draws) if d], recipe.collider, c.num_draws, c.temperature))
    return [_with_causal_reference(g, next(in_contexts), recipe) if d else g for g, d in zip(out, has_draws)]


def _with_causal_reference(g: Group, logp_G_J_T: Tensor, recipe: Recipe) -> Group:
    causal_ref, floored_G_T = recipe.project(logp_G_J_T, g.old_logp_G_T)
    mask_G_T = row_mask(g.ids_G).to(floored_G_T.device)
    return replace(g, causal_ref_logp_G_T=causal_ref, floored_G_T=floored_G_T & mask_G_T, causal_mask_G_T=recipe.treat(mask_G_T, floored_G_T),
                   context_logp_G_J_T=logp_G_J_T)



#| export
class NonFiniteError(FloatingPointError):
    "A loss, gradient or reference that is not finite. `groups`: the batch in which it arose; `file`: where it was written."

    def __init__(self, quantity: str, step: int, groups: Sequence[Group], where: str = "", file: str | Path = ""):
        self.quantity, self.step, self.groups, self.where = quantity, step, groups, where
        super().__init__(f"step {step}{where}: {quantity} not finite. This step did not change the policy; the last checkpoint is kept. "
                         "Likely causes: a learning rate that is too high, bfloat16 weights, or a reward out of all proportion."
                         + (f" The batch was written to '{file}'" if file else ""))


def require_finite(quantity: str, value: Tensor, step: int, groups: Sequence[Group], group: Group | None = None) -> None:
    "Raises NonFiniteError, naming the quantity, step and group, unless every entry of `value` is finite."
    if not torch.isfinite(value).all():
        raise NonFiniteError(quantity, step, groups, f", group '{group.query.id}'" if group else "")



#| export
def group_losses(policy: Policy, groups: Sequence[Group], recipe: Recipe) -> list[tuple[Tensor, dict]]:
    "(loss, metrics) of each group, from one packed pass over the responses and, for the causal term at x_i, one over the contexts."
    c = recipe.config
    logps, entropies = groups_logp(policy, groups, c.temperature, entropy=True)
    causal = [g for g in groups if len(g.causal_ref_logp_G_T)]
    at_x = iter(contexts_logp(policy, causal, recipe.collider, draws=1, temperature=c.temperature)) if c.policy_side == "x" else None
    out = []
    for g, logp_G_T, entropy_G_T in zip((g.to(policy.device) for g in groups), logps, entropies):
        real_G_T = row_mask(g.ids_G).to(policy.device)
        mask_G_T = real_G_T & ~(g.truncated_G & c.mask_truncated_completions)[:, None]
        logp_x_G_T = None if not len(g.causal_ref_logp_G_T) else next(at_x)[:, 0] if at_x else logp_G_T
        loss, metrics = recipe.objective(c, g, logp_G_T, logp_x_G_T, mask_G_T)
        out.append((loss, {**metrics, "policy/entropy": entropy_G_T[real_G_T].mean()}))
    return out


def update(policy: Policy, groups: Sequence[Group], count: int, recipe: Recipe, optimiser: "Optimiser", step: int) -> dict[str, float]:
    "One optimiser step on the groups that have a gradient (`count`: all groups of the step). Returns metrics averaged over the groups."
    c, sums = recipe.config, defaultdict(list)
    for lo in range(0, len(groups), c.groups_per_microbatch):
        micro = groups[lo:lo + c.groups_per_microbatch]
        with optimiser.accelerator.autocast():
            losses = group_losses(policy, micro, recipe)
        for g, (loss, metrics) in zip(micro, losses):
            require_finite("loss", loss, step, groups, g)
            for name, value in {**metrics, "loss/total": loss.detach()}.items():
                sums[name].append(float(value))
        optimiser.accelerator.backward(sum(loss for loss, _ in losses) / count)
    grad_norm = optimiser.step(lambda norm: require_finite("gradient", norm, step, groups))
    return {**{name: sum(v) / len(v) for name, v in sums.items()}, "optim/grad_norm": grad_norm}



#| export
class Optimiser:
    "AdamW, schedule and clipping over a policy's trainable weights."

    def __init__(self, policy: Policy, config: Config):
        from accelerate import Accelerator
        from transformers import get_scheduler
        self.accelerator = Accelerator(mixed_precision="bf16" if config.bf16 else "no", cpu=policy.device.type == "cpu")
        if self.accelerator.num_processes > 1:
            raise ValueError(f"{self.accelerator.num_processes} processes were started, but this version trains in one: start without accelerate launch or torchrun")
        self.weights, self.max_norm = policy.trainable(), config.max_grad_norm
        self.adamw = torch.optim.AdamW(self.weights, lr=config.learning_rate, weight_decay=config.weight_decay)
        total = config.max_steps * config.num_iterations
        self.schedule = get_scheduler(config.lr_scheduler_type, self.adamw, num_warmup_steps=math.ceil(config.warmup_ratio * total), num_training_steps=total)

    def step(self, check: Callable[[Tensor], None]) -> float:
        "Clip, check the norm, step, clear. Returns the norm before clipping."
        for w in self.weights:
            w.grad = torch.zeros_like(w) if w.grad is None else w.grad
        norm = torch.nn.utils.clip_grad_norm_(self.weights, self.max_norm)
        check(norm)
        self.adamw.step()
        self.schedule.step()
        self.adamw.zero_grad()
        return float(norm)

    @property
    def learning_rate(self) -> float:
        return self.schedule.get_last_lr()[0]



#| export
def train_step(policy: Policy, reference: Callable, queries: Sequence, recipe: Recipe, optimiser: Optimiser, step: int) -> tuple[list[Group], dict]:
    "Rollout, reward, collider, continuations, states, Upsilon, references, update. Returns the groups and the step's metrics."
    c, seed, clock = recipe.config, (recipe.config.seed, step), Clock()
    with clock("rollout"):      groups = sample_groups(policy, queries, c.num_generations, recipe.how, seed)                # y_i ~ pi_old(.|q)
    with clock("reward"):       groups = judge(groups, recipe)                                                              # r_i, A_i (Eq. 6)
    dull, live = split_by(lambda g: has_signal(g.reward_G) or recipe.kappa > 0 and c.kl_without_signal, groups)
    if recipe.needs_draws:
        with clock("draws"):    live = integrate(policy, live, recipe.collider, seed)                                       # y_{n,j}
    if recipe.needs_continuations:
        with clock("continue"): live = continue_contexts(policy, live, recipe.collider, seed)                               # O_{i,j,k} ~ pi_old(.|c_{i,j})
    if recipe.needs_states:
        with clock("encode"):   live = encode(policy, live, recipe.collider, ENCODINGS[c.encoding])                         # z_i, Z_{i,j,k}
    if c.objective == "gcpo":   live = weigh(live, recipe, seed)                                                            # Upsilon_i, B_i (Eq. 11)
    with clock("remember"):     moving = remember(policy, reference, live + (dull if c.beta > 0 else []), recipe)           # pi_old, pi_ref, pi'_ref (Eq. 12)
    check_references(moving, step)
    with clock("update"):
        for _ in range(c.num_iterations):
            rates = dict(**{"optim/learning_rate": optimiser.learning_rate}, **update(policy, moving, len(groups), recipe, optimiser, step))
    done = {g.query.id: g for g in [*dull, *live, *moving]}
    groups = [done[g.query.id] for g in groups]
    return groups, {**step_metrics(policy, groups, live), **rates, **clock.seconds}



#| export
class Clock:
    "Seconds per stage, as metrics `time/stage`."

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str):
        begin = time.perf_counter()
        yield
        self.seconds[f"time/{stage}"] = time.perf_counter() - begin


def split_by(test: Callable, groups: Sequence[Group]) -> tuple[list[Group], list[Group]]:
    "(groups that fail the test, groups that pass it)."
    return [g for g in groups if not test(g)], [g for g in groups if test(g)]


def check_references(groups: Sequence[Group], step: int) -> None:
    "Raises NonFiniteError when a remembered log-prob or reference of a group is not finite."
    for g in groups:
        for quantity in ("old_logp_G_T", "ref_logp_G_T", "causal_ref_logp_G_T", "upsilon_G"):
            require_finite(quantity, getattr(g, quantity), step, groups, g)



#| export
def step_metrics(policy: Policy, groups: Sequence[Group], live: Sequence[Group]) -> dict[str, float]:
    "Rewards, group kinds, lengths, Upsilon and context metrics of a step's groups (`live`: those that went through the causal stages)."
    reward_N, mean = torch.cat([g.reward_G for g in groups]), lambda x: float(torch.as_tensor(x, dtype=torch.float32).mean()) if len(x) else 0.0
    length_N = torch.tensor([len(ids) for g in groups for ids in g.ids_G], dtype=torch.float32)
    scored = [g.reward_G[~g.reward_G.isnan()] for g in groups]
    best = float(reward_N.nan_to_num(-math.inf).max())
    equal = [r for r in scored if len(r) == 0 or bool((r == r[0]).all())]
    metrics = {
        "reward/mean": float(reward_N.nanmean().nan_to_num()), "reward/std": mean([float(r.std()) for r in scored if len(r) > 1]), "reward/unscored": mean(reward_N.isnan()),
        "groups/all_right": mean([len(r) > 0 and bool((r == r[0]).all()) and float(r[0]) == best and best > 0 for r in scored]),
        "groups/mixed": 1 - len(equal) / len(groups), "length/mean": float(length_N.mean()), "length/max": float(length_N.max()),
        "length/truncated": mean(torch.cat([g.truncated_G for g in groups])), "tokens/rollout": float(length_N.sum())}
    metrics["groups/all_wrong"] = max(0.0, 1 - metrics["groups/mixed"] - metrics["groups/all_right"])
    return {**metrics, **_causal_metrics(policy, live)} if any(len(g.draws_G_J) or len(g.z_G_D) for g in live) else metrics


def _causal_metrics(policy: Policy, live: Sequence[Group]) -> dict[str, float]:
    mean = lambda xs: sum(map(float, xs)) / len(xs) if xs else 0.0
    draws = [d for g in live for k, per_i in enumerate(g.draws_G_J) for j, d in enumerate(per_i) if k == 0 or j > 0]
    continuations = [o for g in live for per_i in g.continuations_G_J_M for per_j in per_i for o in per_j]
    return {
        "causal/upsilon_mean": mean([g.upsilon_G.mean() for g in live]), "causal/upsilon_std": mean([spread(g.upsilon_G) for g in live]),
        "causal/flip_rate": mean([flip_rate(g.adv_G, g.weight_G) for g in live]), "causal/groups": float(len(live)), "causal/uncentred": float(len(live) == 1),
        "causal/shortened": mean([g.shortened_G.float().mean() for g in live if len(g.shortened_G)]),
        "causal/floored": mean([g.floored_G_T.sum() / row_mask(g.ids_G).sum() for g in live if len(g.floored_G_T)]),
        "tokens/draws": float(sum(map(len, draws))), "tokens/continuations": float(sum(map(len, continuations)))}



#| export
def evaluate(policy: Policy, queries: Sequence, recipe: Recipe, progress: str = "evaluate") -> dict[str, float]:
    "Mean reward over held-out queries with its 95% interval: `eval/reward`, `eval/low`, `eval/high`, and count, length and truncated share."
    answered = rollout(policy, queries, 1, recipe.how, (recipe.config.seed, "evaluate"), progress=progress)
    reward_N = torch.cat([g.reward_G for g in score_rewards(answered, recipe)])
    scored = reward_N[~reward_N.isnan()]
    low, high = interval(scored)
    length = [len(g.ids_G[0]) for g in answered]
    return {"eval/reward": float(scored.mean()) if len(scored) else math.nan, "eval/low": low, "eval/high": high, "eval/count": float(len(scored)),
            "eval/length": sum(length) / len(length), "eval/truncated": sum(float(g.truncated_G[0]) for g in answered) / len(answered)}


def interval(reward_N: Tensor, confidence: float = 0.95) -> tuple[float, float]:
    "95% interval of the mean: Wilson's for rewards of 0 and 1, else the normal one; NaN for fewer than two."
    from scipy.stats import binomtest, norm
    n = len(reward_N)
    if n < 2:
        return math.nan, math.nan
    if bool(((reward_N == 0) | (reward_N == 1)).all()):
        low, high = binomtest(int(reward_N.sum()), n).proportion_ci(confidence, method="wilson")
        return float(low), float(high)
    half = norm.ppf((1 + confidence) / 2) * float(reward_N.std()) / math.sqrt(n)
    return float(reward_N.mean()) - half, float(reward_N.mean()) + half



#| export
class Run:
    "A run directory: manifest, metrics, completions, checkpoints. Opening one that holds the same configuration continues it."

    def __init__(self, config: Config):
        self.dir, self.config = check_directory(config), config
        manifest = self.dir / "manifest.json"
        if not manifest.exists():
            told = json.loads(config.model_dump_json(exclude={"output_dir"}))
            if diff := uncommitted():
                write_atomic(self.dir / "uncommitted.diff", diff)
            write_atomic(manifest, json.dumps(dict(config=told, environment=environment(), started=time.strftime("%Y-%m-%dT%H:%M:%S%z")), indent=2))
        for part in [*self.dir.glob("checkpoints/part-*"), *self.dir.glob("completions/*.part")]:
            shutil.rmtree(part) if part.is_dir() else part.unlink()

    @property
    def checkpoints(self) -> list[Path]:
        return sorted(self.dir.glob("checkpoints/step-*"))

    @property
    def adapter(self) -> Path:
        "Where the trained policy lies when the run has ended."
        return self.dir / "policy"

    def save(self, policy: Policy, optimiser: Optimiser, step: int) -> None:
        "A checkpoint after `step` steps; older ones beyond save_total_limit go."
        from safetensors.torch import save_file
        final = self.dir / "checkpoints" / f"step-{step:06d}"
        part = final.with_name(f"part-{step:06d}")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        save_file({n: p.detach().contiguous().cpu() for n, p in policy.model.named_parameters() if p.requires_grad}, part / "weights.safetensors")
        torch.save(dict(optimiser=optimiser.adamw.state_dict(), schedule=optimiser.schedule.state_dict(), step=step), part / "optimiser.pt")
        for file in part.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        os.rename(part, final)
        for old in self.checkpoints[:-self.config.save_total_limit]:
            shutil.rmtree(old)

    def load(self, policy: Policy, optimiser: Optimiser) -> int:
        "Restore the newest checkpoint; the number of steps it holds, 0 if there is none. Metrics and completions beyond it are dropped."
        from safetensors.torch import load_file
        step = 0
        if self.checkpoints:
            state = torch.load(self.checkpoints[-1] / "optimiser.pt", weights_only=True, map_location="cpu")
            own = dict(policy.model.named_parameters())
            with torch.no_grad():
                for name, weight in load_file(self.checkpoints[-1] / "weights.safetensors").items():
                    own[name].copy_(weight)
            optimiser.adamw.load_state_dict(state["optimiser"])
            optimiser.schedule.load_state_dict(state["schedule"])
            step = state["step"]
        for part in self.dir.glob("completions/step-*.parquet"):
            if int(part.stem.split("-")[1]) >= step:
                part.unlink()
        return step



#| export
def check_directory(config: Config) -> Path:
    "The run directory. Raises ValueError when it cannot be written to, or holds a run with another configuration (listing the difference)."
    directory = writable_dir(config.output_dir)
    if not (directory / "manifest.json").exists():
        return directory
    there, asked = json.loads((directory / "manifest.json").read_text())["config"], json.loads(config.model_dump_json(exclude={"output_dir"}))
    changed = [f"{k}: there {there.get(k, 'not set')!r}, asked {asked.get(k, 'not set')!r}" for k in sorted({*there, *asked}) if there.get(k) != asked.get(k)]
    if changed:
        raise ValueError(f"'{directory}' holds a run with another configuration; choose another output_dir, or delete it to start anew:\n  " + "\n  ".join(changed))
    return directory



#| export
def completion_rows(groups: Sequence[Group], recipe: Recipe, step: int) -> list[dict]:
    "One row a completion: TRL's columns (step, prompt, completion, each reward function, advantage) and reward, upsilon, weight, y_n."
    rows = []
    for g in groups:
        prompt = g.query.prompt if isinstance(g.query.prompt, str) else json.dumps(g.query.prompt)
        for i, text in enumerate(g.completions):
            each = {name_of(f): float(r) for f, r in zip(recipe.rewards, g.reward_G_F[i])}
            rows.append(dict(step=step, prompt=prompt, completion=text, **each, advantage=float(g.adv_G[i]), reward=float(g.reward_G[i]),
                             upsilon=float(g.upsilon_G[i]), weight=float(g.weight_G[i]), truncated=bool(g.truncated_G[i]), tokens=len(g.ids_G[i]), query=g.query.id, response=i))
    return rows


def write_completions(directory: Path, rows: list[dict], step: int) -> None:
    import pandas as pd
    (directory / "completions").mkdir(exist_ok=True)
    final = directory / "completions" / f"step-{step:06d}.parquet"
    pd.DataFrame(rows).to_parquet(final.with_suffix(".part"))
    os.replace(final.with_suffix(".part"), final)


def read_completions(run_dir: str | Path):
    "All completions of a run so far, finished or not, as a DataFrame. Raises ValueError if there are none."
    import pandas as pd
    whole, parts = Path(run_dir) / "completions.parquet", sorted(Path(run_dir).glob("completions/step-*.parquet"))
    if not whole.exists() and not parts:
        raise ValueError(f"no completions in '{run_dir}': is it a run directory, and has its first step ended?")
    return pd.read_parquet(whole) if whole.exists() else pd.concat(map(pd.read_parquet, parts), ignore_index=True)


def join_completions(directory: Path) -> None:
    "Put the parts of all steps together as completions.parquet, one part in memory at a time."
    import pyarrow.parquet as pq
    parts = sorted(directory.glob("completions/step-*.parquet"))
    final = directory / "completions.parquet"
    with pq.ParquetWriter(final.with_suffix(".part"), pq.read_schema(parts[0])) as writer:
        for part in parts:
            writer.write_table(pq.read_table(part, schema=pq.read_schema(parts[0])))
    os.replace(final.with_suffix(".part"), final)
    shutil.rmtree(directory / "completions")



#| export
def write_failed(directory: Path, error: NonFiniteError) -> Path:
    "Write the batch of a NonFiniteError to failed-step-N.json."
    plain = lambda v: v.tolist() if isinstance(v, Tensor) else [plain(x) for x in v] if isinstance(v, tuple) else v
    groups = [dict(query=g.query.id, prompt=g.query.prompt, **{f.name: plain(getattr(g, f.name)) for f in fields(g) if f.name not in ("query", "Z_G_J_M_D", "z_G_D")}) for g in error.groups]
    path = directory / f"failed-step-{error.step:06d}.json"
    write_atomic(path, json.dumps(dict(quantity=error.quantity, step=error.step, where=error.where, groups=groups)))
    return path



#| export
def check_window(policy: Policy, queries: Sequence, recipe: Recipe) -> None:
    "Raises ValueError, with the numbers, when a prompt with its completion or the largest context cannot fit the policy's window."
    c, worst = recipe.config, max(queries, key=lambda q: len(q.ids))
    direct = len(worst.ids) + c.max_completion_length
    if direct > policy.window:
        raise ValueError(f"question '{worst.id}' has {len(worst.ids)} tokens; with max_completion_length={c.max_completion_length} that is {direct}, over the window of {policy.window} "
                         f"of '{policy.name}': shorten it, or max_completion_length")
    if not recipe.needs_draws:
        return
    shown = min(c.context_budget, c.max_completion_length)
    template = TEMPLATES[c.template]
    around = len(policy.tokenizer.encode(template.open + template.close, add_special_tokens=False))
    words = len(policy.tokenizer.encode(template.intro + template.integrate + template.integrated_open + template.integrated_close, add_special_tokens=False))
    context = len(worst.ids) + words + c.num_generations * (shown + around) + c.max_draw_length + max(c.max_completion_length, c.max_continuation_length)
    if context > policy.window:
        raise ValueError(f"a causal context of question '{worst.id}' may take {context} tokens ({len(worst.ids)} of question, {c.num_generations} x {shown + around} of responses, "
                         f"{c.max_draw_length} of y_n, and the answer), over the window of {policy.window} of '{policy.name}': lower context_budget, num_generations or the lengths")



#| export
def questions_of_step(count: int, per_step: int, step: int, seed: int) -> list[int]:
    "Indices of the questions of a step; each epoch is a permutation, and a step may straddle two."
    places = range(step * per_step, (step + 1) * per_step)
    epochs = {p // count: torch.randperm(count, generator=torch.Generator().manual_seed(derive_seed(seed, "epoch", p // count))) for p in places}
    return [int(epochs[p // count][p % count]) for p in places]



#| export
def prepare(config: Config) -> tuple[Recipe, Policy, list, list]:
    "Check everything and load: recipe, policy, training queries, held-out queries. Nothing is written."
    recipe = make_recipe(config)
    rows, held_out = load_rows(config.data, config.eval_data, config.train_size, config.eval_size, config.seed, config.shots)
    if config.prompts_per_step > len(rows):
        raise ValueError(f"prompts_per_step={config.prompts_per_step}, but there are only {len(rows)} training questions: a step would hold the same question twice")
    torch.manual_seed(config.seed)
    lora = _lora(config) if config.lora_r else None
    policy = load_policy(config.model, lora=lora, device=config.device or None, dtype=config.dtype)
    if config.gradient_checkpointing:
        policy.model.train()
        policy.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        policy.causal_lm.enable_input_require_grads()
    queries, eval_queries = (share_heads([to_query(r, policy.tokenizer) for r in rows]) for rows in (rows, held_out))
    check_window(policy, [*queries, *eval_queries], recipe)
    return recipe, policy, queries, eval_queries


def _lora(config: Config):
    from peft import LoraConfig
    return LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")



#| export
def train(config: Config) -> Path:
    """Train, or continue training, as the configuration says; returns the run directory. A finished run is left as it is.

    Raises ValueError for anything wrong before the first step, NonFiniteError (batch written to the run directory) during it."""
    check_directory(config)
    recipe, policy, queries, held_out = prepare(config)
    run, reference, optimiser = Run(config), reference_of(policy) if config.beta > 0 and config.objective != "gvpo" else None, Optimiser(policy, config)
    if run.adapter.is_dir():
        return run.dir
    first = run.load(policy, optimiser)
    log, trackers = MetricsLog(run.dir / "metrics.jsonl", keep_below=first), start_trackers(config, optimiser)
    bar = tqdm(range(first, config.max_steps), initial=first, total=config.max_steps, desc=f"train {config.output_dir}", mininterval=1)
    told: dict[str, str] = {}
    try:
        for step in bar:
            torch.manual_seed(derive_seed(config.seed, "step", step))
            held = evaluate(policy, held_out, recipe) if step % config.eval_steps == 0 else {}
            batch = [queries[i] for i in questions_of_step(len(queries), config.prompts_per_step, step, config.seed)]
            groups, metrics = train_step(policy, reference, batch, recipe, optimiser, step)
            write_completions(run.dir, completion_rows(groups, recipe, step), step)
            log.append(step, **metrics, **held)
            trackers({**metrics, **held}, step)
            told |= {"reward": f"{metrics['reward/mean']:.2f}"} | ({"held out": f"{held['eval/reward']:.2f}"} if held else {})
            bar.set_postfix(told)
            if (step + 1) % config.save_steps == 0 or step + 1 == config.max_steps:
                run.save(policy, optimiser, step + 1)
    except FloatingPointError as error:
        failed = error if isinstance(error, NonFiniteError) else NonFiniteError(str(error), step, [])
        raise NonFiniteError(failed.quantity, step, failed.groups, failed.where, write_failed(run.dir, failed)) from None
    log.append(config.max_steps, **evaluate(policy, held_out, recipe))
    finish(run, policy)
    return run.dir


def finish(run: Run, policy: Policy) -> None:
    "Put completions together and save the trained policy, whole or not at all: its directory marks a finished run."
    if (run.dir / "completions").is_dir():
        join_completions(run.dir)
    part = run.dir / "part-policy"
    shutil.rmtree(part, ignore_errors=True)
    save_policy(policy, part)
    os.rename(part, run.adapter)


def start_trackers(config: Config, optimiser: Optimiser) -> Callable[[dict, int], None]:
    "A function that logs (metrics, step) to the trackers of `report_to` through accelerate; none by default."
    if not config.report_to:
        return lambda metrics, step: None
    from accelerate import Accelerator
    tracked = Accelerator(log_with=config.report_to, project_dir=config.output_dir, cpu=optimiser.accelerator.device.type == "cpu")
    tracked.init_trackers("gcpo")
    return lambda metrics, step: tracked.log(metrics, step=step)



#| export
def read_run(run_dir: str | Path):
    "metrics.jsonl of a run as a DataFrame indexed by step; evaluations stand in the row of the step before which they were made."
    import pandas as pd
    return pd.DataFrame(read_metrics(run_dir)).set_index("step")



#| export
def parse_arguments(arguments: Sequence[str]) -> Config:
    "A configuration from `--params FILE.yaml` and `--name value`. Raises ValueError as `Config.checked`, and for a faulty file (with its line)."
    parser = argparse.ArgumentParser("gcpo-train", description="Train a policy with GCPO or one of its relatives.", formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser.add_argument("--params", metavar="FILE.yaml", help="parameters from a file; options on the command line override them")
    for name, info in Config.model_fields.items():
        parser.add_argument(f"--{name}", help=f"{info.description} [{info.default!r}]".replace("%", "%%"), default=argparse.SUPPRESS)
    known, unknown = parser.parse_known_args(arguments)
    stray = {u.lstrip("-").split("=")[0]: None for u in unknown if u.startswith("--")} or dict.fromkeys(unknown)
    values = read_parameters(known.params) if known.params else {}
    given = {k: _typed(k, v) for k, v in vars(known).items() if k != "params"}
    return Config.checked({**values, **given, **stray}, known.params or "command line")


def read_parameters(path: str | Path) -> dict:
    "A mapping from a YAML file. Raises ValueError when it is missing, is no YAML (with the line), or holds no mapping."
    if not Path(path).is_file():
        raise ValueError(f"parameter file '{path}' does not exist")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        raise ValueError(f"{path}:{error.problem_mark.line + 1}: not YAML: {error.problem}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected lines such as 'alpha: 2.0', found {type(values).__name__}")
    return {k: _number(k, v) for k, v in values.items()}


def _typed(name: str, text: str) -> Any:
    return text if Config.model_fields[name].annotation is str else _number(name, yaml.safe_load(text))


def _number(name: str, value: Any) -> Any:
    "YAML reads 1e-6 as text: give float parameters a float."
    is_float = name in Config.model_fields and Config.model_fields[name].annotation in (float, float | None)
    try:
        return float(value) if is_float and isinstance(value, str) else value
    except ValueError:
        return value


def main() -> None:
    "The command gcpo-train."
    try:
        config = parse_arguments(sys.argv[1:])
        run_dir = train(config)
    except (ValueError, NonFiniteError) as error:
        sys.exit(f"error: {error}")
    print(summary(run_dir))


def summary(run_dir: str | Path) -> str:
    "Held-out pass rate before and after with intervals, where everything lies, and three things to do next."
    held = [row for row in read_metrics(run_dir) if "eval/reward" in row]
    show = lambda row: f"{row['eval/reward']:.1%} [{row['eval/low']:.1%}, {row['eval/high']:.1%}]"
    return "\n".join([
        f"held out, before: {show(held[0])}", f"held out, after:  {show(held[-1])}   ({int(held[-1]['eval/count'])} questions, 95% intervals)",
        f"run directory:    {run_dir}", f"trained policy:   {Path(run_dir) / 'policy'}", "next:",
        f"  gcpo-train --params nbs/params/demo.yaml --objective grpo --output_dir {run_dir}-grpo      # the same by GRPO",
        f"  papermill nbs/50_train.ipynb out.ipynb -f nbs/params/demo.yaml -p seed 1 -p output_dir {run_dir}-1   # another seed, as a notebook",
        f"  jupyter lab {run_dir}/50_train.ipynb                                                   # look at what happened"])

