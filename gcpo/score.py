
#| export
from dataclasses import dataclass
from typing import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gcpo.core import Group, PrefixTree, pad, row_mask
from gcpo.policy import Packed, Policy



#| export
def logp_alone(policy: Policy, context: Tensor, target: Tensor) -> Tensor:
    "Log-probs [T] of `target` after `context`, both 1-D ids, from a plain forward pass: the oracle of `score`."
    ids = torch.cat([context, target]).to(policy.device)
    logits = policy.model(ids[None], use_cache=False).logits[0, len(context) - 1:-1].float()
    return logits.log_softmax(-1).gather(-1, target.to(policy.device)[:, None]).squeeze(-1)



#| export
CHUNK_BYTES = 128 * 2**20


def _read(policy: Policy, states_R_D: Tensor, row_K: Tensor, target_K: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
    log_probs_R_V = (policy.logits(states_R_D) / temperature).log_softmax(-1)
    logp_K = log_probs_R_V[row_K, target_K]
    if not entropy:
        return logp_K, logp_K.new_zeros(len(row_K))
    with torch.no_grad():
        entropy_R = -(log_probs_R_V.exp() * log_probs_R_V).nan_to_num().sum(-1)
    return logp_K, entropy_R[row_K]


def read_logp(policy: Policy, states_N_D: Tensor, at_K: Tensor, target_K: Tensor, temperature: float = 1.0, entropy: bool = False) -> tuple[Tensor, Tensor]:
    "Log-prob [K] of token `target_K` from the state at position `at_K`, and the entropy there (zeros unless asked for, without gradient)."
    rows, row_K = torch.unique(at_K, return_inverse=True)
    per_chunk = max(1, CHUNK_BYTES // (4 * policy.causal_lm.get_output_embeddings().out_features))
    if len(rows) <= per_chunk:
        return _read(policy, states_N_D[rows], row_K, target_K, temperature, entropy)
    order = row_K.argsort(stable=True)
    parts = []
    for lo in range(0, len(rows), per_chunk):
        mine = order[(row_K[order] >= lo) & (row_K[order] < lo + per_chunk)]
        args = (policy, states_N_D[rows[lo:lo + per_chunk]], row_K[mine] - lo, target_K[mine], temperature, entropy)
        parts.append(checkpoint(_read, *args, use_reentrant=False) if torch.is_grad_enabled() else _read(*args))
    back = order.argsort()
    return tuple(torch.cat(column)[back] for column in zip(*parts))



#| export
@dataclass(frozen=True)
class Scores:
    "Per asked node: log-probs [T] and entropies [T] of its tokens; and the last-layer states [S, D] at the last token of the nodes in `states`."
    logp: list[Tensor]
    entropy: list[Tensor]
    states: Tensor


def score(policy: Policy, tree: PrefixTree, scored: Sequence[int], states: Sequence[int] = (), temperature: float = 1.0, entropy: bool = False) -> Scores:
    """Log-probs of the tokens of the nodes `scored` given their root paths, and final states of the nodes `states`, from one packed pass.

    Differentiable; run under `torch.no_grad()` for values alone. A root's first token has no context, so a root gives T-1 values.
    Raises ValueError for an empty tree or segment, a path beyond the window, or a scored root of one token."""
    packed = Packed(tree.parents, tree.segments, device=policy.device)
    states_N_D = policy.hidden(packed, packed.ids, packed.position_ids)
    at, target = zip(*(_predictors(packed, k) for k in scored)) if len(scored) else ((), ())
    last = states_N_D[[packed.last(k) for k in states]]
    if not at:
        return Scores([], [], last)
    sizes = [len(a) for a in at]
    logp_K, entropy_K = read_logp(policy, states_N_D, torch.cat(at).to(policy.device), packed.ids[torch.cat(target).to(policy.device)], temperature, entropy)
    return Scores(list(logp_K.split(sizes)), list(entropy_K.split(sizes)), last)


def _predictors(packed: Packed, k: int) -> tuple[Tensor, Tensor]:
    own = torch.arange(packed.start[k], packed.start[k] + packed.length[k])
    if packed.parents[k] != -1:
        return torch.cat([torch.tensor([packed.last(packed.parents[k])]), own[:-1]]), own
    if len(own) == 1:
        raise ValueError(f"node {k} is a root of one token: nothing comes before it, so it has no log-prob; put it under a context")
    return own[:-1], own[1:]



#| export
def tree_logp(policy: Policy, parents: Sequence[int], segments: Sequence[Tensor], scored: Sequence[int]) -> list[Tensor]:
    """Log-probs of a prefix tree: node k holds ids `segments[k]` under node `parents[k]` (-1: a root, parents before children).

    Returns, for each node in `scored`, the log-probs [T] of its tokens given its root path; differentiable. Raises as `score`."""
    tree = PrefixTree()
    nodes: list[int] = []
    for k, (parent, ids) in enumerate(zip(parents, segments, strict=True)):
        if not -1 <= parent < k:
            raise ValueError(f"node {k}: its parent {parent} must be -1 or an earlier node")
        nodes.append(tree.add(nodes[parent] if parent != -1 else -1, torch.as_tensor(ids, dtype=torch.long).cpu()))
    return score(policy, tree, [nodes[k] for k in scored]).logp



#| export
def groups_logp(policy: Policy, groups: Sequence[Group], temperature: float = 1.0, entropy: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    "log pi(y_i | q) and entropies, a padded [G, T] for each group, from one packed pass over all groups."
    tree = PrefixTree()
    nodes = [tree.add(-1, *g.query.segments, ids) for g in groups for ids in g.ids_G]
    scores = score(policy, tree, nodes, temperature=temperature, entropy=entropy)
    return split_groups(groups, scores.logp), split_groups(groups, scores.entropy)


def split_groups(groups: Sequence[Group], rows: Sequence[Tensor]) -> list[Tensor]:
    "Rows of all responses, group after group -> one padded [G, T] a group."
    rows = iter(rows)
    return [pad([next(rows) for _ in g.ids_G]) for g in groups]

