
#| export
from dataclasses import dataclass
from typing import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from gcpo.core import Group, PrefixTree, Query, derive_seed
from gcpo.policy import Packed, Policy



#| export
@dataclass(frozen=True)
class Sampling:
    "How completions are drawn. `max_new_tokens`: tokens; `top_k=0`, `top_p=1`, `min_p=0`: off; `stop`: strings that end a completion (they stay in it)."
    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()


def probabilities(logits_R_V: Tensor, how: Sampling) -> Tensor:
    "Distribution [R, V] after temperature, top-k, top-p and min-p, in this order (as transformers applies them)."
    logits = logits_R_V / how.temperature
    if how.top_k:
        kth = logits.topk(min(how.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if how.top_p < 1:
        ordered, index = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, index, before >= how.top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    probs = logits.softmax(-1)
    if how.min_p:
        probs = probs * (probs >= how.min_p * probs.max(-1, keepdim=True).values)
    return probs / probs.sum(-1, keepdim=True)



#| export
def uniforms(seeds: Sequence[int], count: int) -> Tensor:
    "One row of `count` uniform numbers per seed, [R, count], the same whatever the other seeds are."
    return torch.stack([torch.rand(count, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds])


def pick(logits_R_V: Tensor, uniform_R: Tensor, how: Sampling) -> Tensor:
    """Next token [R]: the arg max if `temperature` is 0, else the inverse of the cumulative distribution at `uniform_R`.

    Raises FloatingPointError when logits are not finite: a policy that has diverged must not go on talking."""
    if not torch.isfinite(logits_R_V.amax(-1)).all():
        raise FloatingPointError("logits of the policy")
    if how.temperature == 0:
        return logits_R_V.argmax(-1)
    cumulative = probabilities(logits_R_V, how).double().cumsum(-1)
    return torch.searchsorted(cumulative, (uniform_R * cumulative[:, -1])[:, None], right=True).squeeze(-1).clamp(max=logits_R_V.shape[-1] - 1)



#| export
@dataclass(frozen=True)
class Sample:
    "Generated ids (the end token included where reached) and whether `max_new_tokens` cut them off."
    ids: Tensor
    truncated: bool


def has_ended(policy: Policy, ids: list[int], how: Sampling) -> bool:
    "Whether generated ids end with an end token, or contain a stop string in their last tokens."
    if ids[-1] in policy.end_ids:
        return True
    tail = policy.tokenizer.decode(ids[-16:]) if how.stop else ""
    return any(s in tail for s in how.stop)


@torch.no_grad()
def sample_alone(policy: Policy, prompt: Tensor, seed: int, how: Sampling) -> Sample:
    "One completion by running the model afresh for each token: slow, and the oracle of `sample`."
    generated: list[int] = []
    for uniform in uniforms([seed], how.max_new_tokens)[0]:
        ids = torch.cat([prompt, torch.tensor(generated, dtype=torch.long)]).to(policy.device)
        logits = policy.model(ids[None], use_cache=False).logits[0, -1:].float().cpu()
        generated.append(int(pick(logits, uniform[None], how)))
        if has_ended(policy, generated, how):
            return Sample(torch.tensor(generated), False)
    return Sample(torch.tensor(generated), True)



#| export
class _Level:
    "The nodes of one depth: their positions in the packed prefix, padded [K, L], and which rows lie below each, padded [K, C]."

    def __init__(self, spans: list[list[int]], node_of_row: list[int], device):
        longest, count = max(map(len, spans)), [node_of_row.count(k) for k in range(len(spans))]
        self.at = torch.tensor([s + [0] * (longest - len(s)) for s in spans], device=device)
        self.real = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in spans], dtype=torch.bool, device=device)
        members = [[r for r, k in enumerate(node_of_row) if k == node] for node in range(len(spans))]
        self.rows = torch.tensor([m + [0] * (max(count) - len(m)) for m in members], device=device)
        self.has_rows = torch.tensor([r for r, k in enumerate(node_of_row) if k >= 0], device=device)
        place = {r: (k, c) for k, m in enumerate(members) for c, r in enumerate(m)}
        self.slot = torch.tensor([place[r][0] * max(count) + place[r][1] for r in self.has_rows.tolist()], device=device)
        self.everyone = len(self.has_rows) == len(node_of_row)
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}

    def load(self, prefix_kv: dict[int, tuple[Tensor, Tensor]]) -> None:
        "Keys and values [K, Hkv, L, d] of every layer, taken from the packed prefix."
        self.kv = {layer: tuple(x[0][:, self.at].transpose(0, 1) for x in kv) for layer, kv in prefix_kv.items()}

    def gather(self, x_R: Tensor) -> Tensor:
        "[R, Hkv, P, *] of rows -> [K, Hkv, C*P, *] of nodes."
        K, C = self.rows.shape
        return x_R[self.rows].transpose(1, 2).reshape(K, x_R.shape[1], C * x_R.shape[2], x_R.shape[3])

    def scatter(self, x_K: Tensor, rows: int, fill: float) -> Tensor:
        "[K, Hkv, C*P, *] of nodes -> [R, Hkv, P, *] of rows; rows without a node at this depth get `fill`."
        K, C = self.rows.shape
        flat = x_K.view(K, x_K.shape[1], C, -1, x_K.shape[3]).transpose(1, 2).flatten(0, 1)[self.slot]
        if self.everyone:
            return flat
        return flat.new_full((rows, *flat.shape[1:]), fill).index_copy(0, self.has_rows, flat)



#| export
class Forked:
    "Attention plan of decoding: row r continues node `leaves[r]` of a packed prefix; own keys and values grow with each step."

    def __init__(self, prefix: Packed, leaves: Sequence[int], device):
        self.leaves, self.step, self.own = list(leaves), 0, {}
        self.offset = torch.tensor([prefix.offset[k] + prefix.length[k] for k in leaves], device=device)
        self.longest = int(self.offset.max())
        chains = _chains(prefix, leaves)
        self.levels = []
        for depth in range(max(map(len, chains.values()))):
            nodes = list(dict.fromkeys(chains[k][depth] for k in leaves if depth < len(chains[k])))
            index = {node: i for i, node in enumerate(nodes)}
            level = _Level([list(node) for node in nodes], [index[chains[k][depth]] if depth < len(chains[k]) else -1 for k in leaves], device)
            level.load(prefix.kv)
            self.levels.append(level)

    def begin_step(self) -> Tensor:
        "Positions [R] of the tokens that the coming forward pass reads."
        self.longest = int(self.offset.max()) + self.step + 1
        return self.offset + self.step

    def _remember(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        held = self.own.get(layer)
        if held is None or held[0].shape[2] == self.step:
            room = key.new_zeros(key.shape[0], key.shape[1], max(16, self.step), key.shape[3])
            held = tuple(torch.cat([h, room], 2) for h in held) if held else (room, room.clone())
            self.own[layer] = held
        for h, x in zip(held, (key, value)):
            h[:, :, self.step] = x[:, :, 0]
        return tuple(h[:, :, :self.step + 1] for h in held)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        "query [1, Hq, R, d], key and value [1, Hkv, R, d] -> [1, Hq, R, d]; one query a row."
        _, Hq, R, d = query.shape
        own_k, own_v = self._remember(layer, *(x[0].transpose(0, 1)[:, :, None] for x in (key, value)))
        q = (query[0] * (scaling if scaling is not None else d**-0.5)).transpose(0, 1).reshape(R, key.shape[1], -1, d)
        scores = [level.scatter((level.gather(q) @ level.kv[layer][0].mT).masked_fill(~level.real[:, None, None], -torch.inf), R, -torch.inf) for level in self.levels]
        widths = [s.shape[-1] for s in scores]
        weights = torch.cat([*scores, q @ own_k.mT], -1).softmax(-1, dtype=torch.float32).to(q.dtype).split([*widths, self.step + 1], -1)
        out = weights[-1] @ own_v
        for level, w in zip(self.levels, weights):
            out = out + level.scatter(level.gather(w) @ level.kv[layer][1], R, 0.0)
        return out.reshape(R, Hq, d).transpose(0, 1)[None]

    def keep(self, rows: Tensor, prefix: Packed) -> "Forked":
        "The plan of the remaining rows."
        kept = Forked(prefix, [self.leaves[r] for r in rows.tolist()], rows.device)
        kept.step, kept.own = self.step, {layer: tuple(x[rows] for x in kv) for layer, kv in self.own.items()}
        return kept



#| export
def _chains(prefix: Packed, leaves: Sequence[int]) -> dict[int, list[tuple[int, ...]]]:
    "For each leaf its path as runs of packed positions, cut only where paths of different leaves part."
    paths = {k: prefix.path(k) for k in set(leaves)}
    through = {}
    for k, path in paths.items():
        for node in path:
            through.setdefault(node, set()).add(k)
    chains = {}
    for k, path in paths.items():
        runs: list[list[int]] = []
        for above, node in zip([None, *path], path):
            positions = range(prefix.start[node], prefix.start[node] + prefix.length[node])
            if above is not None and through[above] == through[node]:
                runs[-1].extend(positions)
            else:
                runs.append(list(positions))
        chains[k] = [tuple(r) for r in runs]
    return chains



#| export
@torch.no_grad()
def sample(policy: Policy, tree: PrefixTree, leaves: Sequence[int], seeds: Sequence[int], how: Sampling, token_budget: int = 131_072, progress: str = "") -> list[Sample]:
    """Continue node `leaves[r]` of `tree` with seed `seeds[r]`, for every row r; a node may stand in `leaves` many times.

    Deterministic given seeds, up to rounding that depends on batch shapes. `progress`: label of a progress bar over decoding steps.
    Raises ValueError when prompt and completion do not fit the policy's window, before anything is computed."""
    if len(leaves) != len(seeds):
        raise ValueError(f"{len(leaves)} rows but {len(seeds)} seeds: sample needs one seed a row")
    longest = max(len(tree.ids(k)) for k in set(leaves)) if leaves else 0
    if longest + how.max_new_tokens > policy.window:
        raise ValueError(f"a prompt or context of {longest} tokens and up to {how.max_new_tokens} new ones do not fit the window of {policy.window} of '{policy.name}': "
                         "shorten the prompt, max_completion_length, or the responses inside contexts (context_budget)")
    samples: list[Sample] = []
    for rows in _batches(tree, leaves, how.max_new_tokens, token_budget):
        part = PrefixTree()
        nodes = [part.add(-1, *(tree.segments[j] for j in tree.path(leaves[r]))) for r in rows]
        samples += _decode(policy, part, nodes, [seeds[r] for r in rows], how, progress)
    return samples


def _batches(tree: PrefixTree, leaves: Sequence[int], new_tokens: int, token_budget: int) -> list[list[int]]:
    batches, seen, cost = [[]], set(), 0
    for r, leaf in enumerate(leaves):
        fresh = sum(len(tree.segments[k]) for k in tree.path(leaf) if k not in seen) + new_tokens
        if batches[-1] and cost + fresh > token_budget:
            batches, seen, cost = [*batches, []], set(), 0
            fresh = len(tree.ids(leaf)) + new_tokens
        batches[-1].append(r)
        seen, cost = seen | set(tree.path(leaf)), cost + fresh
    return [b for b in batches if b]



#| export
def _decode(policy: Policy, tree: PrefixTree, leaves: list[int], seeds: list[int], how: Sampling, progress: str) -> list[Sample]:
    device = policy.device
    prefix = Packed(tree.parents, tree.segments, device=device, keep_kv=True)
    states = policy.hidden(prefix, prefix.ids, prefix.position_ids)
    logits = policy.logits(states[[prefix.last(k) for k in leaves]])
    plan, active = Forked(prefix, leaves, device), list(range(len(leaves)))
    generated: list[list[int]] = [[] for _ in leaves]
    ended = [False] * len(leaves)
    noise = uniforms(seeds, how.max_new_tokens).to(device)
    for t in tqdm(range(how.max_new_tokens), desc=progress, disable=not progress, leave=False, mininterval=1):
        tokens = pick(logits, noise[active, t], how)
        for r, token in zip(active, tokens.tolist()):
            if not ended[r]:
                generated[r].append(token)
                ended[r] = has_ended(policy, generated[r], how)
        alive = [i for i, r in enumerate(active) if not ended[r]]
        if not alive or t + 1 == how.max_new_tokens:
            break
        if len(alive) <= 0.75 * len(active):
            rows = torch.tensor(alive, device=device)
            plan, tokens, active = plan.keep(rows, prefix), tokens[rows], [active[i] for i in alive]
        logits = policy.logits(policy.hidden(plan, tokens, plan.begin_step()))
        plan.step += 1
    return [Sample(torch.tensor(ids), not done) for ids, done in zip(generated, ended)]



#| export
def rollout(policy: Policy, queries: Sequence[Query], count: int, how: Sampling, seed: tuple = (0,), progress: str = "") -> list[Group]:
    "`count` responses y_i ~ pi(.|q) for each query, all in one batch. `seed`: the address that all sequence seeds derive from."
    tree = PrefixTree()
    leaves = [tree.add(-1, *q.segments) for q in queries for _ in range(count)]
    seeds = [derive_seed(*seed, "rollout", q.id, i) for q in queries for i in range(count)]
    samples = sample(policy, tree, leaves, seeds, how, progress=progress)
    return [_group(policy, q, samples[g * count:(g + 1) * count]) for g, q in enumerate(queries)]


def sample_groups(policy: Policy, queries: Sequence[Query], num_generations: int, how: Sampling, seed: tuple = (0,), progress: str = "") -> list[Group]:
    "`rollout` for training. Raises ValueError for fewer than two responses a group: no advantage exists."
    if num_generations < 2:
        raise ValueError(f"num_generations={num_generations}: a group needs at least 2 responses, or every advantage is zero")
    return rollout(policy, queries, num_generations, how, seed, progress)


def sample_group(policy: Policy, query: Query, num_generations: int, how: Sampling, seed: tuple = (0,)) -> Group:
    "The rollout of one query: see `sample_groups`."
    return sample_groups(policy, [query], num_generations, how, seed)[0]


def _group(policy: Policy, query: Query, samples: list[Sample]) -> Group:
    texts = tuple(policy.tokenizer.decode(content(policy, s.ids), skip_special_tokens=True) for s in samples)
    return Group(query, tuple(s.ids for s in samples), texts, torch.tensor([s.truncated for s in samples]))


def content(policy: Policy, ids: Tensor) -> Tensor:
    "Generated ids without a final end token."
    return ids[:-1] if len(ids) and ids[-1].item() in policy.end_ids else ids

