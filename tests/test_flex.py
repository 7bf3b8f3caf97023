"""FlexAttention over trees, on a CPU: the mask rule against brute force and against Packed's blocks, block masks against torch's, outputs against Packed.attend."""
import random
import warnings
from functools import cached_property
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from torch.nn.functional import scaled_dot_product_attention

import gcpo.tree as flex
from gcpo.policy import build_tiny, load_policy, probe
from gcpo.tree import Packed, block_mask, check_flex, flex_attend, intervals, tree_mask
from gcpo.score import tree_logp

warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
FEW = settings(max_examples=30, deadline=None, derandomize=True)
MANY = settings(max_examples=150, deadline=None, derandomize=True)


@st.composite
def shapes(draw, longest=11, most=9):
    "Parents and lengths: depth up to 4, several roots, nodes of one token."
    parents, depth = [-1], [0]
    for k in range(1, draw(st.integers(1, most))):
        parents.append(draw(st.sampled_from([-1, *[j for j in range(k) if depth[j] < 4]])))
        depth.append(0 if parents[-1] == -1 else depth[parents[-1]] + 1)
    return parents, [draw(st.sampled_from([1, 1, 2]) | st.integers(1, longest)) for _ in parents]


def packed_of(parents, lengths, **kwargs):
    return Packed(parents, [torch.arange(n) + 3 for n in lengths], **kwargs)


class Plan(SimpleNamespace):
    "The root paths of new nodes as spans of `end` keys, of which the first `base` are held."

    def __init__(self, paths, base, end, device="cpu"):
        super().__init__(base=base, end=end, ids=torch.zeros(end - base, dtype=torch.long, device=device), parents=paths, spans=lambda i: paths[i], joined=lambda layer, k, v: (k, v))

    @cached_property
    def block_mask(self):
        return block_mask(tree_mask(self), len(self.ids), self.end, self.ids.device)


def with_attention(policy, attention):
    policy.causal_lm.set_attn_implementation(attention)
    probe(policy)
    return policy


def path(parents, k):
    return [] if k == -1 else path(parents, parents[k]) + [k]


def brute(parents, lengths, slots, queries, total):
    "Dense mask [N, K], token by token: on my root path, and not after me. `slots[k]`: the keys of node k; `queries`: the keys that ask."
    owner = {slot: (k, i) for k in range(len(parents)) for i, slot in enumerate(slots[k])}
    mask = torch.zeros(len(queries), total, dtype=torch.bool)
    for row, slot in enumerate(queries):
        node, i = owner[slot]
        for j in path(parents, node):
            mask[row, slots[j] if j != node else slots[j][:i + 1]] = True
    return mask


def dense(allowed, N, K):
    return allowed(None, None, torch.arange(N)[:, None], torch.arange(K)[None])


def blocks_dense(packed):
    "The mask that Packed.blocks stand for."
    N = len(packed.ids)
    mask = torch.zeros(N, N, dtype=torch.bool)
    for (lo, hi), spans, block in packed.blocks:
        keys = torch.cat([torch.arange(a, b) for a, b in spans])
        mask[lo:hi, keys] = torch.ones(hi - lo, len(keys), dtype=torch.bool).tril() if block is None else block
    return mask


def qkv(N, K, heads=(4, 2), d=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, n, h, d, generator=generator).transpose(1, 2) for n, h in ((N, heads[0]), (K, heads[1]), (K, heads[1]))]


@st.composite
def remembered(draw, longest=11, most=9):
    "A tree of which some upper part lies in a memory: nodes in any order, in pieces, with foreign tokens between; the rest laid out depth first behind it."
    parents, lengths = draw(shapes(longest=longest, most=most))
    rng = random.Random(draw(st.integers(0, 10**6)))
    known = set()
    for k, parent in enumerate(parents):
        if (parent == -1 or parent in known) and rng.random() < 0.6:
            known.add(k)
    new = [k for k in range(len(parents)) if k not in known]
    if not new:
        known.discard(len(parents) - 1)
        new = [len(parents) - 1]
    slots, pieces = {k: [] for k in range(len(parents))}, []
    for k in known:
        cut = rng.randint(0, lengths[k]) if rng.random() < 0.3 else lengths[k]
        pieces += [(k, 0, n) for n in (cut, lengths[k] - cut) if n]
    pieces += [(None, 0, rng.randint(1, 5)) for _ in range(rng.randint(0, 3))]
    rng.shuffle(pieces)
    at, parts = 0, {k: [] for k in known}
    for k, _, n in pieces:
        if k is not None:
            parts[k].append((at, at + n))
        at += n
    memory = at
    below = {}
    for k in new:
        below.setdefault(parents[k] if parents[k] in new else ("root", parents[k]), []).append(k)
    stack = [k for key in below if isinstance(key, tuple) for k in below[key]][::-1]
    while stack:
        k = stack.pop()
        parts[k] = [(at, at + lengths[k])]
        at += lengths[k]
        stack += below.get(k, [])[::-1]
    slots = {k: [s for a, b in parts[k] for s in range(a, b)] for k in parts}
    paths = [[span for j in path(parents, k) for span in parts[j]] for k in new]
    return parents, lengths, slots, paths, memory, at


# ------------------------------------------------------------------------------------------------------------ the rule
@MANY
@given(shapes())
def test_rule_equals_brute_force_and_blocks(shape):
    parents, lengths = shape
    packed = packed_of(parents, lengths, dense_below=random.Random(sum(lengths)).choice([0, 3, 10, 512]))
    N, allowed = len(packed.ids), tree_mask(packed)
    slots = [list(range(packed.start[k], packed.start[k] + lengths[k])) for k in range(len(parents))]
    expected = brute(parents, lengths, slots, range(N), N)
    assert torch.equal(dense(allowed, N, N), expected) and torch.equal(blocks_dense(packed), expected)
    assert torch.equal(create_mask(allowed, None, None, N, N, device="cpu")[0, 0], expected)  # under vmap
    enter, leave = intervals([packed.spans(k) for k in range(len(parents))], N)
    assert enter.tolist() == list(range(N))  # nothing remembered: the numbering is the layout
    assert all(leave[packed.start[k]] == packed.start[k] + packed.size[k] for k in range(len(parents)))


@MANY
@given(remembered())
def test_rule_with_memory_equals_brute_force(case):
    parents, lengths, slots, paths, memory, total = case
    allowed = tree_mask(Plan(paths, memory, total))
    expected = brute(parents, lengths, slots, range(memory, total), total)
    assert torch.equal(dense(allowed, total - memory, total), expected)
    assert expected.any(1).all()  # no row without keys: every token sees itself
    padded = dense(allowed, -(-(total - memory) // 128) * 128, -(-total // 128) * 128)
    assert padded.sum() == expected.sum()  # nothing beyond the end


def test_rule_where_a_path_branches_inside_a_remembered_node():
    allowed = tree_mask(Plan([[(0, 10), (20, 23)], [(0, 4), (23, 25)], [(0, 4), (12, 15), (25, 26)]], 20, 26))
    expected = torch.zeros(6, 26, dtype=torch.bool)
    expected[:3, :10] = expected[3:, :4] = expected[5, 12:15] = True
    for row in range(6):
        expected[row, (20, 20, 20, 23, 23, 25)[row]:21 + row] = True
    assert torch.equal(dense(allowed, 6, 26), expected)


def test_rule_refusals():
    with pytest.raises(ValueError, match="key 3 is reached over two different paths"):
        intervals([[(0, 3), (3, 6)], [(3, 6), (6, 8)]], 8)
    with pytest.raises(ValueError, match="two different paths"):
        intervals([[(0, 3), (0, 3)]], 3)


# ------------------------------------------------------------------------------------------------------------ block masks
def same_blocks(ours, theirs):
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, indices = (getattr(ours, f"{name}_num_blocks"), getattr(theirs, f"{name}_num_blocks")), (getattr(ours, f"{name}_indices"), getattr(theirs, f"{name}_indices"))
        assert torch.equal(*counts) and torch.equal(*indices) and counts[0].dtype == counts[1].dtype and indices[0].dtype == indices[1].dtype
    assert torch.equal(ours.to_dense(), theirs.to_dense()) and ours.shape == theirs.shape and ours.BLOCK_SIZE == theirs.BLOCK_SIZE


@FEW
@given(remembered(longest=500, most=6), st.sampled_from([1, 128**2 * 3, 2**26]))
def test_block_mask_equals_create_block_mask(case, pairs):
    _, _, _, paths, memory, total = case
    N, allowed = total - memory, tree_mask(Plan(paths, memory, total))
    old, flex.PAIRS = flex.PAIRS, pairs
    try:
        ours = block_mask(allowed, N, total)
    finally:
        flex.PAIRS = old
    same_blocks(ours, create_block_mask(allowed, None, None, N, total, device="cpu"))
    mask = torch.nn.functional.pad(dense(allowed, N, total), (0, -total % 128, 0, -N % 128))
    rows, columns = mask.shape[0] // 128, mask.shape[1] // 128
    assert torch.equal(ours.to_dense()[0, 0].bool(), mask.view(rows, 128, columns, 128).any(3).any(1))


# ------------------------------------------------------------------------------------------------------------ outputs
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 2), (4, 1)], ids=str)
@FEW
@given(shape=shapes(longest=60), d=st.sampled_from([16, 32, 64]), scaling=st.sampled_from([None, 0.3]))
def test_outputs_equal_packed(heads, shape, d, scaling):
    packed = packed_of(*shape)
    q, k, v = qkv(len(packed.ids), len(packed.ids), heads, d, seed=len(packed.ids))
    with torch.no_grad():
        ours, theirs = flex_attend(packed, 0, q, k, v, scaling), packed.attend(0, q, k, v, scaling)
    assert ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-5)


@FEW
@given(remembered(longest=60))
def test_outputs_with_memory_equal_sdpa(case):
    parents, lengths, slots, paths, memory, total = case
    N = total - memory
    q, k, v = qkv(N, total)
    plan = Plan(paths, memory, total)
    mask = brute(parents, lengths, slots, range(memory, total), total)
    with torch.no_grad():
        ours = flex_attend(plan, 0, q, k, v, None)
    theirs = scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), attn_mask=mask)
    assert torch.allclose(ours, theirs, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ the compiled path
def plan_of(memory, new, device="cpu", seed=0):
    "Nodes of a memory and new nodes under some of them, lengths 1 to 150."
    rng, at, parts, paths = random.Random(seed), 0, [], []
    for _ in range(memory):
        n = rng.randint(1, 150)
        parts, at = [*parts, (at, at + n)], at + n
    M = at
    for _ in range(new):
        n = rng.randint(1, 150)
        paths, at = [*paths, [*rng.sample(parts, min(len(parts), 1)), (at, at + n)]], at + n
    return Plan(paths, M, at, device)


def check_gradients(device, dtype, atol, heads=(9, 3), d=64):
    "Outputs and gradients of `flex_attend` against sdpa under the dense mask, with and without memory, below and above one block."
    for seed, (memory, new) in enumerate([(0, 6), (0, 1), (3, 5), (6, 1), (0, 9), (5, 12)]):
        plan = plan_of(memory, new, device, seed)
        N, K = len(plan.ids), plan.end
        q, k, v = (x.to(device, dtype).requires_grad_() for x in qkv(N, K, heads, d, seed))
        mask = create_mask(plan.block_mask.mask_mod, None, None, N, K, device=device)[0, 0]
        ours = flex_attend(plan, 0, q, k, v, 0.2)
        theirs = scaled_dot_product_attention(q, *(x.repeat_interleave(heads[0] // heads[1], 1) for x in (k, v)), attn_mask=mask, scale=0.2)
        weight = torch.randn_like(ours)
        gradients = [torch.autograd.grad((weight * out).sum(), (q, k, v)) for out in (ours, theirs)]
        assert all(torch.allclose(a, b, atol=atol, rtol=atol) for a, b in zip((ours, *gradients[0]), (theirs, *gradients[1])))
        with torch.no_grad():
            assert torch.allclose(flex_attend(plan, 0, q, k, v, 0.2), theirs, atol=atol, rtol=atol)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("dtype,atol", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)], ids=str)
@pytest.mark.parametrize("heads,d", [((9, 3), 64), ((4, 4), 16), ((8, 2), 128)], ids=str)
def test_cuda(dtype, atol, heads, d):
    check_gradients("cuda", dtype, atol, heads, d)


def test_compiled_path_traced(monkeypatch):
    "What runs on CUDA up to the kernels themselves: torch's decompositions in their place, its refusal of CPUs lifted. Few graphs for trees of all sizes."
    import torch.nn.attention.flex_attention as torch_flex
    from torch._dynamo.testing import CompileCounterWithBackend
    counter, real = CompileCounterWithBackend("aot_eager"), torch_flex.flex_attention
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "check_flex", lambda *args: None)
    monkeypatch.setattr(flex, "_compiled", flex.cache(lambda: torch.compile(real, dynamic=True, fullgraph=True, backend=counter)))
    monkeypatch.setattr(torch_flex, "flex_attention", flex._fused)
    check_gradients("cpu", torch.float32, 1e-4, d=16)
    assert counter.frame_count <= 12  # 6 trees, each with and without gradients
    monkeypatch.setattr(flex, "GRAPHS", 1)
    plan = plan_of(2, 3)
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):  # an error, not the whole score matrix
        flex_attend(plan, 0, *qkv(len(plan.ids), plan.end, (4, 2), 32), 0.7)


# ------------------------------------------------------------------------------------------------------------ choice and refusals
TREE = [-1, 0, 0, 1], [torch.arange(3, 12), torch.arange(20, 26), torch.arange(30, 33), torch.arange(40, 41)], [1, 2, 3]


def test_policy_scores_alike_and_keeps_keys():
    policy = build_tiny()
    with torch.no_grad():
        tree = tree_logp(policy, *TREE)
        flexed = tree_logp(with_attention(policy, "flex"), *TREE)
    assert policy.causal_lm.config._attn_implementation == "flex"
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(tree, flexed))
    kept = Packed(*TREE[:2], keep_kv=True)
    with torch.no_grad():
        policy.hidden(kept, kept.ids, kept.position_ids)
    assert len(kept.kv) == 4 and kept.kv[0][0].shape[2] == len(kept.ids)
    mask = kept.block_mask
    with torch.no_grad():
        policy.hidden(kept, kept.ids, kept.position_ids)
    assert kept.block_mask is mask  # once per plan


def test_memory_of_a_policy():
    "Trees read one after the other by `Policy.read` with a memory: states under flex equal those under tree, nodes read `anew` included."
    from gcpo.policy import for_sampling
    generator, states = torch.Generator().manual_seed(0), {"tree": [], "flex": []}
    a, b, c, d, e = (torch.randint(3, 99, (n,), generator=generator) for n in (40, 7, 1, 150, 30))
    policy = build_tiny()
    for attention in states:
        with_attention(policy, attention)
        with for_sampling(policy) as frozen, torch.no_grad():
            for parents, segments, anew in (([-1, 0], [a, b], ()), ([-1, 0, 0, 1], [a, c, b, d], ()), ([-1, 0, 0, 2, -1], [a, b, c, e, d], ()), ([-1, 0, 0], [a, c, e], (1,))):
                packed = Packed(parents, segments, memory=frozen.memory, anew=frozenset(anew), keep_kv=True)
                read = frozen.read(packed)
                states[attention].append(read[packed.base:])
                frozen.memory.add(packed, read)
                assert attention == "tree" or packed.base == 0 or packed.block_mask.shape[-2:] == (len(packed.ids), packed.end)
    assert all(len(x) and torch.allclose(x, y, atol=1e-5) for x, y in zip(*states.values()))


def test_sampling_under_flex():
    from gcpo.core import PrefixTree
    from gcpo.sample import Sampling, sample
    policy, draws = build_tiny(), []
    for attention in ("tree", "flex"):
        with_attention(policy, attention)
        tree = PrefixTree()
        nodes = [tree.add(-1, torch.arange(3, 9), torch.arange(10, 10 + n)) for n in (1, 4)]
        draws.append([s.ids.tolist() for s in sample(policy, tree, nodes, [0, 1], Sampling(6))])
    assert draws[0] == draws[1]


def test_refusals():
    policy = build_tiny()
    with pytest.raises(ValueError, match="unknown attention 'flexx'; did you mean 'flex'"):
        load_policy("tiny", attention="flexx")
    with pytest.raises(ValueError, match="cannot train on a CPU.*attention='tree'"):
        tree_logp(with_attention(policy, "flex"), *TREE)
    packed = packed_of([-1, 0], [3, 2])
    q, k, v = qkv(5, 5)
    with pytest.raises(ValueError, match="float64.*attention='tree'"):
        flex_attend(packed, 0, q.double(), k.double(), v.double(), None)
    with pytest.raises(ValueError, match="at least 16 dimensions, this model has 8.*attention='tree'"):
        flex_attend(packed, 0, q[..., :8], k[..., :8], v[..., :8], None)
    with pytest.raises(ValueError, match="'mps'.*attention='tree'"):
        check_flex(torch.device("mps"), torch.float32, 64)
    with pytest.raises(ValueError, match="heads of at least 16"):
        with_attention(build_tiny(hidden_size=32), "flex")


def test_cuda_without_triton_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: "Old GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: (6, 1))
    with pytest.raises(ValueError, match="Triton.*Old GPU.*attention='tree'"):
        check_flex(torch.device("cuda"), torch.bfloat16, 64)
