"""Every engine gives what `sample` gives, leaves the policy as it was, and refuses what `sample` refuses."""
import copy
import threading

import pytest
import torch


import gcpo.engine as engines
from gcpo.engine import ENGINES, has_continuous, sample_continuous
from gcpo.core import PrefixTree, derive_seed
from gcpo.policy import Policy, build_tiny, for_sampling, load_policy
from gcpo.sample import Sampling, probabilities, sample
from test_architectures import CONFIGS, policy_of

needs_continuous = pytest.mark.skipif(not has_continuous(), reason="continuous batching needs transformers 5.23")
RUNNABLE = ["generate", pytest.param("continuous", marks=needs_continuous)]
HOWS = [Sampling(12, temperature=0), Sampling(12, temperature=0, stop=("\n",)), Sampling(20, temperature=1.3), Sampling(20, temperature=1.5, stop=("1", "\n")), Sampling(20, temperature=2.0, top_k=5),
        Sampling(20, temperature=2.0, top_p=0.8), Sampling(20, temperature=2.0, min_p=0.1), Sampling(20, temperature=1.7, top_k=30, top_p=0.95, min_p=0.02), Sampling(1)]


@pytest.fixture(scope="module")
def tiny():
    return load_policy("tiny", device="cpu")


@pytest.fixture
def policy(tiny):
    return Policy(copy.deepcopy(tiny.model), tiny.tokenizer, tiny.name)


def with_lora(noise=0.05):
    policy = load_policy("tiny", lora=4, device="cpu")
    with torch.no_grad(), torch.random.fork_rng([]):
        torch.manual_seed(1)
        for p in policy.trainable():
            p += noise * torch.randn_like(p)
    return policy


def request(policy):
    "Unequal prompts, some deep, in a tree; several rows below some."
    encode = lambda text: policy.tokenizer(text, return_tensors="pt").input_ids[0]
    tree = PrefixTree()
    roots = [tree.add(-1, encode(text)) for text in ("Numbers: 17 52 38\nLargest:", "Numbers: 9 4\nSum:", "N")]
    deep = [tree.add(tree.add(tree.add(-1, encode("Numbers: 31 77 20\nProposed answers:")), encode(a)), encode(b), encode("\nLargest:")) for a in (" 31", " 77") for b in (" 20", " 77")]
    leaves = [roots[0]] * 4 + [roots[1]] * 3 + [roots[2]] * 2 + deep * 2
    return tree, leaves, [derive_seed("engines", r) for r in range(len(leaves))]


def same(ours, theirs):
    return len(ours) == len(theirs) and all(torch.equal(a.ids, b.ids) and a.ids.dtype == b.ids.dtype and a.truncated == b.truncated for a, b in zip(ours, theirs))


@pytest.mark.parametrize("how", HOWS, ids=str)
@pytest.mark.parametrize("name", RUNNABLE)
def test_the_tokens_of_sample(name, how, tiny):
    tree, leaves, seeds = request(tiny)
    expected = sample(tiny, tree, leaves, seeds, how)
    assert same(ENGINES[name](tiny, tree, leaves, seeds, how), expected)
    if how.max_new_tokens > 1:
        assert 1 < len({s.ids.shape for s in expected}) or not how.stop, "no row ended early: the test shows less than it should"


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_row_does_not_depend_on_the_others(name, tiny):
    tree, leaves, seeds = request(tiny)
    how, engine = Sampling(20, temperature=1.5, stop=("1",)), ENGINES[name]
    whole = engine(tiny, tree, leaves, seeds, how)
    assert same(engine(tiny, tree, leaves[5:6], seeds[5:6], how), whole[5:6])
    assert same(engine(tiny, tree, leaves[::-1], seeds[::-1], how), whole[::-1])
    for budget in (1, 80, 300):
        assert same(engine(tiny, tree, leaves, seeds, how, token_budget=budget), whole)


def test_continuous_batching_is_found_where_it_is():
    import transformers
    from packaging.version import Version
    assert has_continuous() or Version(transformers.__version__) < Version("5.23")


@needs_continuous
def test_continuous_begins_rows_anew_when_pages_run_out(tiny, monkeypatch):
    from transformers.generation.continuous_batching.offloading_manager import OffloadingManager
    real, pushed_out = OffloadingManager.offload_requests, []
    monkeypatch.setattr(OffloadingManager, "offload_requests", lambda self: pushed_out.append(1) or real(self))
    tree, how = PrefixTree(), Sampling(40, temperature=2.0)
    rows = tree, [tree.add(-1, torch.arange(10, 35))] * 12, list(range(12))
    assert same(sample_continuous(tiny, *rows, how, token_budget=1), sample(tiny, *rows, how)) and pushed_out


@pytest.mark.parametrize("name", RUNNABLE)
def test_seeds_and_filters_draw_from_the_right_distribution(name, tiny):
    tree = PrefixTree()
    prompt = tiny.tokenizer("Numbers: 17 52 38\nLargest: ", return_tensors="pt").input_ids[0]
    how, draws = Sampling(1, temperature=1.5, top_k=12, min_p=0.01), 1500
    drawn = ENGINES[name](tiny, tree, [tree.add(-1, prompt)] * draws, list(range(draws)), how)
    with torch.no_grad():
        expected = draws * probabilities(tiny.model(prompt[None]).logits[0, -1:].float(), how)[0]
    seen = torch.bincount(torch.cat([s.ids for s in drawn]), minlength=len(expected))
    assert seen[expected == 0].sum() == 0 and (expected > 0).sum() > 5
    real = expected > 0
    chi2, freedom = ((seen - expected)[real] ** 2 / expected[real]).sum().item(), int(real.sum()) - 1
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_checkpoint_has_no_say_and_the_policy_is_as_it_was(name, policy):
    tree, leaves, seeds = request(policy)
    config = policy.causal_lm.generation_config
    config.update(repetition_penalty=3.0, no_repeat_ngram_size=1, do_sample=True, temperature=0.1, top_k=1, min_new_tokens=9, suppress_tokens=list(range(20, 60)), num_return_sequences=2, use_cache=False)
    policy.model.train()
    before = [(p, p.data_ptr(), p.detach().clone()) for p in policy.model.parameters()]
    state, threads = torch.get_rng_state(), threading.active_count()
    assert same(ENGINES[name](policy, tree, leaves, seeds, HOWS[3]), sample(policy, tree, leaves, seeds, HOWS[3]))
    assert policy.causal_lm.config._attn_implementation == "tree" and policy.causal_lm.generation_config is config and config.top_k == 1
    assert all(m.training for m in policy.model.modules())
    assert all(p.data_ptr() == at and torch.equal(p, value) for p, at, value in before)
    assert torch.equal(torch.get_rng_state(), state) and threading.active_count() == threads


@pytest.mark.parametrize("name", RUNNABLE)
def test_gradient_checkpointing(name, policy):
    tree, leaves, seeds = request(policy)
    policy.model.train()
    policy.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    assert same(ENGINES[name](policy, tree, leaves, seeds, HOWS[2]), sample(policy, tree, leaves, seeds, HOWS[2]))


@pytest.mark.parametrize("name", RUNNABLE)
def test_adapters_count(name, tiny):
    policy = with_lora()
    tree, leaves, seeds = request(policy)
    expected = sample(policy, tree, leaves, seeds, HOWS[2])
    assert not same(expected, sample(tiny, tree, leaves, seeds, HOWS[2]))
    assert same(ENGINES[name](policy, tree, leaves, seeds, HOWS[2]), expected)
    with for_sampling(policy):
        assert same(ENGINES[name](policy, tree, leaves, seeds, HOWS[2]), expected)
    with policy.model.disable_adapter():
        assert same(ENGINES[name](policy, tree, leaves, seeds, HOWS[2]), sample(tiny, tree, leaves, seeds, HOWS[2]))


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("name", RUNNABLE)
def test_other_architectures(name, architecture):
    policy = policy_of(CONFIGS[architecture])
    tree, leaves, seeds = request(policy)
    assert same(ENGINES[name](policy, tree, leaves, seeds, HOWS[2]), sample(policy, tree, leaves, seeds, HOWS[2]))


@pytest.mark.parametrize("ends", [[1, 5, 30], None], ids=["several", "none"])
@pytest.mark.parametrize("name", RUNNABLE)
def test_end_ids(name, ends, policy, monkeypatch):
    tree, leaves, seeds = request(policy)
    policy.causal_lm.generation_config.eos_token_id = ends
    if ends is None:
        policy = Policy(policy.model, copy.deepcopy(policy.tokenizer), policy.name)
        policy.tokenizer.eos_token = None
        assert not policy.end_ids
    how = Sampling(20, temperature=2.5)
    expected = sample(policy, tree, leaves, seeds, how)
    assert all(s.truncated for s in expected) == (ends is None)
    assert same(ENGINES[name](policy, tree, leaves, seeds, how), expected)


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_policy_that_has_diverged(name, policy):
    tree, leaves, seeds = request(policy)
    with torch.no_grad():
        policy.causal_lm.base_model.norm.weight.fill_(torch.nan)
    threads = threading.active_count()
    with pytest.raises(FloatingPointError, match="logits of the policy"):
        ENGINES[name](policy, tree, leaves, seeds, HOWS[2])
    assert policy.causal_lm.config._attn_implementation == "tree" and threading.active_count() == threads


@pytest.mark.parametrize("name", ENGINES)
def test_refused_alike(name, tiny):
    tree, leaves, seeds = request(tiny)
    assert ENGINES[name](tiny, tree, [], [], Sampling(5)) == []
    for arguments in [(leaves, seeds[:-1], Sampling(5)), (leaves, seeds, Sampling(tiny.window)), ([], [], Sampling(tiny.window + 1))]:
        with pytest.raises(ValueError) as theirs:
            sample(tiny, tree, *arguments)
        with pytest.raises(ValueError) as ours:
            ENGINES[name](tiny, tree, *arguments)
        assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("name", RUNNABLE)
def test_the_whole_window(name):
    policy = build_tiny(max_position_embeddings=64)
    tree = PrefixTree()
    leaves = [tree.add(-1, torch.arange(3, 47)), tree.add(-1, torch.arange(3, 9))]
    assert same(ENGINES[name](policy, tree, leaves, [0, 1], Sampling(20)), sample(policy, tree, leaves, [0, 1], Sampling(20)))


@pytest.mark.parametrize("name", RUNNABLE)
def test_prompts_that_take_several_passes(name, tiny):
    tree, ids = PrefixTree(), torch.randint(3, 99, (900,), generator=torch.Generator().manual_seed(0))
    rows = tree, [tree.add(-1, ids), tree.add(-1, ids[:700]), tree.add(-1, ids[:3])], [1, 2, 3]
    assert len(ids) > engines.CONTINUOUS_STEP and same(ENGINES[name](tiny, *rows, HOWS[2], progress="rows"), sample(tiny, *rows, HOWS[2]))


@needs_continuous
def test_continuous_shares_pages_of_prompts(tiny):
    tree, read = PrefixTree(), []
    prompt = tiny.tokenizer("Numbers: 17 52 38\nLargest: 52\n" * 6, return_tensors="pt").input_ids[0]
    hook = tiny.causal_lm.base_model.register_forward_pre_hook(lambda module, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True)
    sample_continuous(tiny, tree, [tree.add(-1, prompt)] * 32, list(range(32)), Sampling(2))
    hook.remove()
    assert sum(read) < 0.4 * 32 * len(prompt)


def test_continuous_of_another_transformers(tiny, monkeypatch):
    import transformers
    monkeypatch.setattr(transformers, "ContinuousBatchingConfig", type("Old", (), {}), raising=False)
    tree, leaves, seeds = request(tiny)
    with pytest.raises(ValueError, match="pip install transformers==5.23"):
        sample_continuous(tiny, tree, leaves, seeds, Sampling(5))


def test_a_training_step_is_the_same_by_every_engine():
    "Same questions, seeds and weights: the engines that run here give the same completions, weights B and loss; with states from the samples or from a pass of their own."
    from gcpo.policy import reference_of
    from gcpo.train import Config, Optimiser, prepare, questions_of_step, train_step
    same = dict(model="tiny", shots=0, lora_r=4, device="cpu", max_completion_length=8, max_draw_length=8, max_continuation_length=8, beta=0.02, train_size=20, eval_size=2)
    runs = {"tree": {}, "generate": dict(engine="generate"), "continuous": dict(engine="continuous"), "little memory": dict(token_budget=100),
            "samples": dict(encoding="in_context"), "pass": dict(encoding="in_context", engine="generate")}
    if not has_continuous():
        del runs["continuous"]
    steps = {}
    for name, changes in runs.items():
        config = Config.checked({**same, **changes})
        recipe, policy, queries, _ = prepare(config)
        steps[name] = train_step(policy, reference_of(policy), [queries[i] for i in questions_of_step(20, 4, 0, 0)], recipe, Optimiser(policy, config), 0)
    for alike in (list(runs)[:-2], list(runs)[-2:]):
        (groups, metrics), *others = (steps[name] for name in alike)
        for theirs, numbers in others:
            assert [g.completions for g in theirs] == [g.completions for g in groups]
            assert all(torch.allclose(a.weight_G, b.weight_G, atol=1e-3) for a, b in zip(groups, theirs))
            assert abs(numbers["loss/total"] - metrics["loss/total"]) < 1e-4 and abs(numbers["kl/causal"] - metrics["kl/causal"]) < 1e-4
