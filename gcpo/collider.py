
#| export
import random
from dataclasses import dataclass, replace
from typing import Callable, Sequence

import torch
from torch import Tensor

from gcpo.core import Group, PrefixTree, derive_seed
from gcpo.policy import Policy
from gcpo.sample import Sampling, content, sample
from gcpo.score import score, split_groups



#| export
@dataclass(frozen=True)
class Template:
    "Text pieces of a causal context: `head intro (open y_k close)* integrate cue` asks for y_n; `... integrated_open y_n integrated_close cue` asks for y_i again."
    intro: str
    open: str
    close: str
    integrate: str
    integrated_open: str
    integrated_close: str


SHORT = Template("Proposed answers:", "", "", "\n", "\nCombined answer:", "\n")
LONG = Template("\n\nCandidate answers:", "\n\n- ", "", "\n\nWeigh the candidate answers and give the best answer.", "\n\nIntegrated answer:\n\n", "\n\nGive your own answer.")
TEMPLATES = {"short": SHORT, "long": LONG}



#| export
def fixed_order(n: int, seed: int = 0) -> tuple[tuple[int, ...], ...]:
    "For each i the others in index order: the paper's wording, little sharing."
    return tuple(tuple(k for k in range(n) if k != i) for i in range(n))


def divide_and_conquer(n: int, seed: int = 0) -> tuple[tuple[int, ...], ...]:
    "For each i the others in an order that shares prefixes: n log2(n) response encodings in all instead of n(n-1)."
    shuffled = list(range(n))
    random.Random(seed).shuffle(shuffled)
    paths: dict[int, tuple[int, ...]] = {}

    def leave_out(left: list[int], path: tuple[int, ...]) -> None:
        if len(left) == 1:
            paths[left[0]] = path
            return
        a, b = left[:len(left) // 2], left[len(left) // 2:]
        leave_out(a, (*path, *b))
        leave_out(b, (*path, *a))

    leave_out(shuffled, ())
    return tuple(paths[i] for i in range(n))


ORDERS = {"divide_and_conquer": divide_and_conquer, "fixed": fixed_order}



#| export
def shorten(tokenizer, ids: Tensor, budget: int) -> tuple[Tensor, bool]:
    "The part of a response that contexts show, at most `budget` tokens, and whether something but trailing white space was left out."
    encode = lambda text: torch.tensor(tokenizer.encode(text, add_special_tokens=False), dtype=torch.long)
    while len(ids) and not tokenizer.decode(ids[-1:]).strip():
        ids = ids[:-1]
    if len(ids) == 0:
        return encode(" none"), False
    if len(ids) <= budget:
        return ids, False
    text = tokenizer.decode(ids)
    if "</think>" in text:
        ids = encode(text.rsplit("</think>", 1)[1].strip())
        text = tokenizer.decode(ids)
    if len(ids) > budget and "\\boxed" in text:
        ids = encode(text[:_end_of_box(text)])
    return ids[-budget:], True


def _end_of_box(text: str) -> int:
    at, depth = text.rindex("\\boxed") + len("\\boxed"), 0
    for end in range(at, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0 and text[end] == "}":
            return end + 1
    return len(text)



#| export
@dataclass(frozen=True)
class Collider:
    """The collider's choices. `J`: draws of y_n a group (>= 2), `m`: continuations a context (>= 1), `draw_how`, `continue_how`: sampling of y_n and of continuations,
    `budget`: tokens that a context shows of a response, `draw`: a function such as `loo`, `order`: a function such as `divide_and_conquer`."""
    draw: Callable
    J: int
    m: int
    draw_how: Sampling
    continue_how: Sampling
    budget: int = 256
    template: Template = SHORT
    order: Callable = divide_and_conquer

    def __post_init__(self):
        if self.J < 2:
            raise ValueError(f"num_draws={self.J} is degenerate: with one draw the mean over draws is the draw itself and the projection vanishes; use 2 or more")
        if self.m < 1:
            raise ValueError(f"num_continuations={self.m}: each context needs at least 1 continuation")


def show(policy: Policy, group: Group, collider: Collider, seed: tuple = (0,)) -> Group:
    "The group with the responses as contexts will show them, and the order in which each context names the others."
    shown, cut = zip(*(shorten(policy.tokenizer, content(policy, ids), collider.budget) for ids in group.ids_G))
    paths = collider.order(len(group), derive_seed(*seed, "order", group.query.id))
    return replace(group, shown_G=shown, shortened_G=torch.tensor(cut), paths_G=paths)



#| export
class Contexts:
    "Adds the causal contexts of one shown group to a prefix tree; every method returns the node after which the policy speaks."

    def __init__(self, policy: Policy, group: Group, template: Template, tree: PrefixTree):
        encode = lambda text: torch.tensor(policy.tokenizer.encode(text, add_special_tokens=False), dtype=torch.long)
        self.tree, self.group = tree, group.need("shown_G", "paths_G")
        self.before, self.after = encode(template.open), encode(template.close)
        self.intro = [*group.query.head_segments, encode(template.intro)]
        self.integrate = [t for t in (encode(template.integrate), group.query.cue) if len(t)]
        self.integrated_open = encode(template.integrated_open)
        self.integrated_close = [t for t in (encode(template.integrated_close), group.query.cue) if len(t)]

    def _candidates(self, shown: Sequence[Tensor]) -> int:
        return self.tree.add(-1, *self.intro, *(torch.cat([self.before, y, self.after]) for y in shown))

    def _others(self, i: int) -> list[Tensor]:
        return [self.group.shown_G[k] for k in self.group.paths_G[i]]

    def all(self) -> int:
        "(q, y_0..y_{n-1}): asks for the integrated answer; shares the path of one left-out response."
        return self.tree.add(self._candidates([*self._others(0), self.group.shown_G[0]]), *self.integrate)

    def without(self, i: int) -> int:
        "(q, y_{-i}): asks for an integrated answer that has not seen y_i."
        return self.tree.add(self._candidates(self._others(i)), *self.integrate)

    def instead(self, i: int, other: Tensor) -> int:
        "(q, y_{-i}, another response in slot i): asks for an integrated answer."
        return self.tree.add(self._candidates([*self._others(i), other]), *self.integrate)

    def context(self, i: int, draw: Tensor) -> int:
        "c_{i,j} = (q, y_{-i}, y_{n,j}): asks for response i."
        return self.tree.add(self._candidates(self._others(i)), torch.cat([self.integrated_open, draw]), *self.integrated_close)



#| export
def _draw(policy: Policy, tree: PrefixTree, rows: list[tuple[int, tuple]], how: Sampling, seed: tuple, what: str) -> list[Tensor]:
    "Sample one completion for each (node, address); returns ids as contexts show them."
    samples = sample(policy, tree, [node for node, _ in rows], [derive_seed(*seed, what, *address) for _, address in rows], how)
    return [shorten(policy.tokenizer, content(policy, s.ids), how.max_new_tokens)[0] for s in samples]


def paper(policy: Policy, groups: Sequence[Group], collider: Collider, seed: tuple) -> list[list[list[Tensor]]]:
    "y_{n,j} ~ pi(.|q, y_0..y_{n-1}), the same J draws for every i (Step 2 as printed). Returns [group][i][j] ids."
    tree = PrefixTree()
    rows = [(Contexts(policy, g, collider.template, tree).all(), (g.query.id, j)) for g in groups for j in range(collider.J)]
    drawn = iter(_draw(policy, tree, rows, collider.draw_how, seed, "draw"))
    return [[[*shared]] * len(g) for g in groups for shared in [[next(drawn) for _ in range(collider.J)]]]


def loo(policy: Policy, groups: Sequence[Group], collider: Collider, seed: tuple) -> list[list[list[Tensor]]]:
    "y_{n,0} from all responses; y_{n,j}^{(i)} ~ pi(.|q, y_{-i}) for j >= 1. Returns [group][i][j] ids."
    tree = PrefixTree()
    rows = []
    for g in groups:
        contexts = Contexts(policy, g, collider.template, tree)
        rows += [(contexts.all(), (g.query.id, 0))]
        rows += [(contexts.without(i), (g.query.id, i, j)) for i in range(len(g)) for j in range(1, collider.J)]
    return _one_and_rest(groups, collider.J, _draw(policy, tree, rows, collider.draw_how, seed, "draw"))


def _one_and_rest(groups: Sequence[Group], J: int, drawn: Sequence[Tensor]) -> list[list[list[Tensor]]]:
    drawn, out = iter(drawn), []
    for g in groups:
        y_n = next(drawn)
        out.append([[y_n, *(next(drawn) for _ in range(J - 1))] for _ in g.ids_G])
    return out



#| export
def fresh(policy: Policy, groups: Sequence[Group], collider: Collider, seed: tuple) -> list[list[list[Tensor]]]:
    "y_{n,0} from all responses; y_{n,j}^{(i)} with slot i filled by a new response y~ ~ pi(.|q) for j >= 1. Returns [group][i][j] ids."
    slots = [(g, i, j) for g in groups for i in range(len(g)) for j in range(1, collider.J)]
    tree = PrefixTree()
    prompts = [(tree.add(-1, *g.query.segments), (g.query.id, i, j)) for g, i, j in slots]
    substitutes = iter(_draw(policy, tree, prompts, collider.draw_how, seed, "fresh"))
    tree, rows = PrefixTree(), []
    for g in groups:
        contexts = Contexts(policy, g, collider.template, tree)
        rows += [(contexts.all(), (g.query.id, 0))]
        rows += [(contexts.instead(i, next(substitutes)), (g.query.id, i, j)) for i in range(len(g)) for j in range(1, collider.J)]
    return _one_and_rest(groups, collider.J, _draw(policy, tree, rows, collider.draw_how, seed, "draw"))


DRAWS = {"paper": paper, "loo": loo, "fresh": fresh}


def integrate(policy: Policy, groups: Sequence[Group], collider: Collider, seed: tuple = (0,)) -> list[Group]:
    "Steps 1-2: the groups with their integrated answers `draws_G_J` ([i][0] is y_n), all groups in one batch."
    shown = [show(policy, g, collider, seed) for g in groups]
    draws = collider.draw(policy, shown, collider, seed) if shown else []
    return [replace(g, draws_G_J=tuple(map(tuple, d))) for g, d in zip(shown, draws)]



#| export
def continue_contexts(policy: Policy, groups: Sequence[Group], collider: Collider, seed: tuple = (0,)) -> list[Group]:
    "Step 3: the groups with m continuations O_{i,j,k} ~ pi(.|c_{i,j}) of every context, all in one batch."
    tree, rows = PrefixTree(), []
    for g in groups:
        contexts = Contexts(policy, g.need("draws_G_J"), collider.template, tree)
        rows += [(contexts.context(i, draw), (g.query.id, i, j, k)) for i, draws in enumerate(g.draws_G_J) for j, draw in enumerate(draws) for k in range(collider.m)]
    samples = iter(sample(policy, tree, [node for node, _ in rows], [derive_seed(*seed, "continue", *address) for _, address in rows], collider.continue_how))
    answers = lambda g: tuple(tuple(tuple(next(samples).ids for _ in range(collider.m)) for _ in draws) for draws in g.draws_G_J)
    return [replace(g, continuations_G_J_M=answers(g)) for g in groups]



#| export
def _kept(policy: Policy, ids: Tensor) -> Tensor:
    "Ids up to the final token that says something: without the end token, unless it is all there is."
    return content(policy, ids) if len(content(policy, ids)) else ids


def alone(policy: Policy, groups: Sequence[Group], collider: Collider, tree: PrefixTree) -> list[list[int]]:
    "Nodes of every response and continuation fed back by themselves. Returns, per group, n + n*J*m nodes."
    node = lambda ids: tree.add(-1, _kept(policy, ids))
    return [[*map(node, g.ids_G), *(node(o) for per_i in g.continuations_G_J_M for per_j in per_i for o in per_j)] for g in groups]


def in_context(policy: Policy, groups: Sequence[Group], collider: Collider, tree: PrefixTree) -> list[list[int]]:
    "Nodes of every response under its query and every continuation under its context. Returns, per group, n + n*J*m nodes."
    nodes = []
    for g in groups:
        nodes.append([tree.add(-1, *g.query.segments, _kept(policy, ids)) for ids in g.ids_G])
        for i, (draws, per_i) in enumerate(zip(g.draws_G_J, g.continuations_G_J_M)):
            contexts = Contexts(policy, g, collider.template, tree)
            nodes[-1] += [tree.add(contexts.context(i, draw), _kept(policy, o)) for draw, per_j in zip(draws, per_i) for o in per_j]
    return nodes


ENCODINGS = {"alone": alone, "in_context": in_context}



#| export
@torch.no_grad()
def encode(policy: Policy, groups: Sequence[Group], collider: Collider, encoding: Callable = alone) -> list[Group]:
    "The groups with final-token states z_G_D of the responses and Z_G_J_M_D of the continuations (empty where there are none), float32 on the CPU, from one packed pass."
    if not groups:
        return []
    tree = PrefixTree()
    nodes = encoding(policy, groups, collider, tree)
    states = score(policy, tree, [], states=[k for per_group in nodes for k in per_group]).states.float().cpu()
    out = []
    for g, s in zip(groups, states.split([len(n) for n in nodes])):
        shape = (len(g), collider.J, collider.m, s.shape[-1]) if g.continuations_G_J_M else (0,)
        out.append(replace(g, z_G_D=s[:len(g)], Z_G_J_M_D=s[len(g):].reshape(shape)))
    return out



#| export
def contexts_logp(policy: Policy, groups: Sequence[Group], collider: Collider, draws: int, temperature: float = 1.0) -> list[Tensor]:
    "log pi(y_i | c_{i,l}) for l < draws: a padded [G, draws, T] per group, from one packed pass; [:, 0] is x_i."
    if not groups:
        return []
    tree, nodes = PrefixTree(), []
    for g in groups:
        contexts = Contexts(policy, g.need("draws_G_J"), collider.template, tree)
        nodes += [tree.add(contexts.context(i, g.draws_G_J[i][l]), g.ids_G[i]) for l in range(draws) for i in range(len(g))]
    logp = iter(score(policy, tree, nodes, temperature=temperature).logp)
    per_group = [[split_groups([g], [next(logp) for _ in g.ids_G])[0] for _ in range(draws)] for g in groups]
    return [torch.stack(per_draw, dim=1) for per_draw in per_group]

