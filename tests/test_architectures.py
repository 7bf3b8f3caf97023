"""Any decoder-only transformers model: trees score like separate sequences, forked caches sample like `generate`, and what a tree cannot do is refused."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (AutoModelForCausalLM, Gemma2Config, GemmaConfig, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config)

from gcpo.core import PrefixTree
from gcpo.policy import Policy, build_tiny, for_sampling, probe, register_tree_attention
from gcpo.sample import Sampling, sample, sample_alone
from gcpo.score import logp_alone, score, tree_logp
from gcpo.tree import Packed

COMMON = dict(vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256, pad_token_id=0, eos_token_id=1, bos_token_id=None)
CONFIGS = {
    "llama": LlamaConfig(**COMMON, num_key_value_heads=4), "llama-gqa": LlamaConfig(**COMMON, num_key_value_heads=2),
    "qwen2": Qwen2Config(**COMMON, num_key_value_heads=2), "qwen3": Qwen3Config(**COMMON, num_key_value_heads=2, head_dim=16),
    "mistral": MistralConfig(**COMMON, num_key_value_heads=2, sliding_window=None), "gemma": GemmaConfig(**COMMON, num_key_value_heads=1, head_dim=16),
    "gpt2": GPT2Config(vocab_size=99, n_embd=64, n_layer=2, n_head=4, n_positions=256, pad_token_id=0, eos_token_id=1, bos_token_id=None),
}


def policy_of(config):
    register_tree_attention()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="tree").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return Policy(model, build_tiny().tokenizer, config.model_type)


@pytest.fixture(params=CONFIGS, scope="module")
def policy(request):
    return policy_of(CONFIGS[request.param])


@st.composite
def trees(draw):
    "Random trees: uneven lengths, nodes of one token, depth up to 4, several roots."
    count = draw(st.integers(2, 9))
    parents, depth = [-1], [0]
    for k in range(1, count):
        parent = draw(st.sampled_from([-1, *[j for j in range(k) if depth[j] < 4]]))
        parents.append(parent)
        depth.append(0 if parent == -1 else depth[parent] + 1)
    lengths = [draw(st.integers(1, 11)) for _ in parents]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    return parents, [torch.randint(3, 99, (n,), generator=generator) for n in lengths]


def path(parents, k):
    return [] if k == -1 else path(parents, parents[k]) + [k]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(tree=trees())
def test_tree_equals_separate(tree, policy):
    parents, segments = tree
    scored = [k for k, parent in enumerate(parents) if parent != -1]
    if not scored:
        return
    packed = tree_logp(policy, parents, segments, scored)
    separate = [logp_alone(policy, torch.cat([segments[j] for j in path(parents, k)[:-1]]), segments[k]) for k in scored]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(packed, separate))
    weights = [torch.linspace(-1, 1, len(x) + 1)[1:] for x in packed]
    gradients = []
    for logps in (packed, separate):
        policy.model.zero_grad()
        sum((w * x).sum() for w, x in zip(weights, logps)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm()


@settings(max_examples=15, deadline=None, derandomize=True)
@given(tree=trees(), which=st.integers(0, 10**6))
def test_what_was_held_scores_the_same(tree, which, policy):
    "A random upper part of the tree is read first, by sampling below it; then all is scored, with no more than the rest read again."
    parents, segments = tree
    whole, nodes = PrefixTree(), []
    for parent, ids in zip(parents, segments):
        nodes.append(whole.add(nodes[parent] if parent != -1 else -1, ids))
    first, below = PrefixTree(), [k for k in range(len(parents)) if which >> k & 1]
    leaves = [first.add(-1, *(segments[j] for j in path(parents, k))) for k in below]
    scored = [nodes[k] for k, parent in enumerate(parents) if parent != -1]
    with torch.no_grad(), for_sampling(policy) as frozen:
        sample(frozen, first, leaves, range(len(leaves)), Sampling(3))
        assert frozen.memory.tokens == first.tokens
        held, plain = score(frozen, whole, scored, states=nodes), score(policy, whole, scored, states=nodes)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(held.logp, plain.logp)) and torch.allclose(held.states, plain.states, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama-gqa", "qwen2"])
def test_adapters_on_and_off(architecture):
    "Trees under LoRA: the same log-probs and adapter gradients as separate sequences, and the base model's scores with the adapter off."
    from peft import LoraConfig, get_peft_model
    base = policy_of(CONFIGS[architecture])
    tree = [-1, 0, 0, 1], [torch.arange(3, 12), torch.arange(20, 26), torch.arange(30, 33), torch.arange(40, 45)], [1, 2, 3]
    with torch.no_grad():
        without = tree_logp(base, *tree)
    policy = Policy(get_peft_model(base.model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).eval(), base.tokenizer, "lora")
    with torch.no_grad():
        for p in policy.trainable():
            p.add_(0.03 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    packed = tree_logp(policy, *tree)
    separate = [logp_alone(policy, torch.cat([tree[1][j] for j in path(tree[0], k)[:-1]]), tree[1][k]) for k in tree[2]]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(packed, separate)) and not torch.allclose(packed[0], without[0], atol=1e-3)
    ours, theirs = (torch.cat([g.flatten() for g in torch.autograd.grad(sum(x.sum() for x in logps), policy.trainable())]) for logps in (packed, separate))
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    with policy.model.disable_adapter(), torch.no_grad():
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(tree_logp(policy, *tree), without))


def test_blocks_do_not_matter(policy):
    generator = torch.Generator().manual_seed(0)
    parents, segments = [-1, 0, 0, 1, 1, 2, -1, 6], [torch.randint(3, 99, (n,), generator=generator) for n in (9, 4, 6, 1, 5, 7, 3, 2)]
    states = []
    for dense_below in (0, 3, 10, 20, 512):
        packed = Packed(parents, segments, dense_below=dense_below)
        with torch.no_grad():
            states.append(policy.hidden(packed, packed.ids, packed.position_ids))
    assert all(torch.allclose(states[0], s, atol=1e-5) for s in states[1:])


def test_greedy_equals_generate_for_unequal_prompts(policy):
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 99, (n,), generator=generator) for n in (4, 17, 9)]
    width = max(map(len, prompts))
    ids = torch.stack([torch.cat([torch.zeros(width - len(p), dtype=torch.long), p]) for p in prompts])
    mask = torch.stack([torch.cat([torch.zeros(width - len(p), dtype=torch.long), torch.ones_like(p)]) for p in prompts])
    theirs = policy.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0)[:, width:]
    tree = PrefixTree()
    ours = sample(policy, tree, [tree.add(-1, p) for p in prompts], [0] * 3, Sampling(20, temperature=0))
    for o, t in zip(ours, theirs):
        assert o.ids.tolist() == t[:len(o.ids)].tolist()


def test_samples_equal_the_readable_version_and_do_not_depend_on_the_batch(policy):
    generator = torch.Generator().manual_seed(2)
    tree, how = PrefixTree(), Sampling(12, temperature=1.2)
    root = tree.add(-1, torch.randint(3, 99, (6,), generator=generator))
    inner = [tree.add(root, torch.randint(3, 99, (n,), generator=generator)) for n in (1, 5)]
    leaves = [root, root, *inner, tree.add(inner[0], torch.randint(3, 99, (3,), generator=generator))]
    together = sample(policy, tree, leaves, range(5), how)
    for r, leaf in enumerate(leaves):
        alone, = sample(policy, tree, [leaf], [r], how)
        assert torch.equal(alone.ids, together[r].ids) and torch.equal(sample_alone(policy, tree.ids(leaf), r, how).ids, together[r].ids)


def test_gradient_checkpointing_and_bfloat16_keep_the_scores():
    policy = policy_of(CONFIGS["llama-gqa"])
    tree = [-1, 0, 0], [torch.arange(3, 12), torch.arange(20, 26), torch.arange(30, 33)], [1, 2]
    plain = tree_logp(policy, *tree)
    sum(x.sum() for x in plain).backward()
    gradient = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    policy.model.zero_grad()
    policy.model.train()
    policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    again = tree_logp(policy, *tree)
    sum(x.sum() for x in again).backward()
    assert all(torch.equal(a, b) for a, b in zip(plain, again))
    assert torch.allclose(torch.cat([p.grad.flatten() for p in policy.model.parameters()]), gradient, atol=1e-6)
    half = Policy(policy_of(CONFIGS["llama-gqa"]).model.to(torch.bfloat16), policy.tokenizer, "half")
    assert all(torch.allclose(a, b, atol=0.1) for a, b in zip(plain, tree_logp(half, *tree)))


def test_refusals():
    windowed = policy_of(MistralConfig(**COMMON, num_key_value_heads=2, sliding_window=8))
    with pytest.raises(ValueError, match="last 8 tokens"):
        tree_logp(windowed, [-1, 0], [torch.arange(3, 10), torch.arange(3, 9)], [1])
    with torch.no_grad():
        short, = tree_logp(windowed, [-1, 0], [torch.arange(3, 6), torch.arange(3, 7)], [1])
    assert torch.allclose(short, logp_alone(windowed, torch.arange(3, 6), torch.arange(3, 7)), atol=1e-5)
    with pytest.raises(ValueError, match="softcap"):
        probe(policy_of(Gemma2Config(**COMMON, num_key_value_heads=2, head_dim=16)))
