"""What must hold for any group: the mathematical core under hypothesis, in float64; and parsers that answer any text with a value or a ValueError."""
import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gcpo.batch as b
from gcpo.advantage import clipped, flip_rate, group_advantage, has_signal, product, sign_aware
from gcpo.core import read_metrics, read_parameters
from gcpo.data import file_rows
from gcpo.kl import k3, phi_autoregressive, phi_ess, phi_tokenwise, reference_mean, reference_ratio, reference_sum
from gcpo.loss import dr_grpo_loss, gcpo_loss, grpo_loss, gvpo_loss
from gcpo.statistics import pass_at_k
from gcpo.train import Config
from gcpo.upsilon import cosine, euclidean, gaussian, projected, upsilon

many = settings(max_examples=60, deadline=None)
seeds, sizes = st.integers(0, 2**31 - 1), st.integers(2, 6)
rewards = st.lists(st.sampled_from([0.0, 0.5, 1.0, -1.0, 3.25, math.nan]), min_size=2, max_size=8)


def normal(seed, *shape, scale=1.0):
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def states(seed, G):
    return normal(seed, G, 5), normal(seed + 1, G, 3, 2, 5)


def distributions(seed, *shape):
    return normal(seed, *shape, scale=2.0).log_softmax(-1)


@many
@given(rewards, st.floats(-3, 3), st.floats(0.5, 4), seeds)
def test_advantages(reward, shift, scale, seed):
    reward_G = torch.tensor(reward, dtype=torch.float64)
    scored, order = ~reward_G.isnan(), torch.randperm(len(reward), generator=torch.Generator().manual_seed(seed))
    adv_G = group_advantage(reward_G)
    assert torch.isfinite(adv_G).all() and (adv_G[~scored] == 0).all() and abs(adv_G.sum()) < 1e-9
    assert torch.allclose(group_advantage(reward_G + shift), adv_G, atol=1e-9) and torch.allclose(group_advantage(reward_G[order]), adv_G[order])
    assert torch.allclose(group_advantage(scale * reward_G, eps=scale * 1e-4), adv_G, atol=1e-9)
    assert has_signal(reward_G) == bool((adv_G != 0).any())
    if has_signal(reward_G):
        assert abs(adv_G[scored].std() - 1) < 1e-3 and (adv_G[scored].argsort(stable=True) == reward_G[scored].argsort(stable=True)).all()


@many
@given(sizes, seeds)
def test_weighting_rules(G, seed):
    adv_G, upsilon_G = normal(seed, G), normal(seed + 1, G)
    right, wrong = adv_G >= 0, adv_G < 0
    assert torch.equal(product(adv_G, upsilon_G), adv_G * upsilon_G) and flip_rate(adv_G, clipped(adv_G, upsilon_G)) == 0
    assert torch.equal(clipped(adv_G, upsilon_G.abs()), product(adv_G, upsilon_G.abs()))
    B_G = sign_aware(adv_G, upsilon_G)
    assert torch.equal(B_G[right], product(adv_G, upsilon_G)[right]) and torch.allclose((B_G + product(adv_G, upsilon_G))[wrong], 2 * upsilon_G.mean() * adv_G[wrong])
    assert flip_rate(adv_G, product(adv_G, upsilon_G)) == pytest.approx(float((upsilon_G[adv_G != 0] < 0).double().mean()))


@many
@given(sizes, seeds, st.sampled_from([cosine, euclidean, gaussian]), st.floats(0.1, 4))
def test_upsilon(G, seed, similarity, alpha):
    (z, Z), order = states(seed, G), torch.randperm(G, generator=torch.Generator().manual_seed(seed))
    v, u = projected(z, Z), upsilon(z, Z, alpha, similarity)
    assert torch.allclose(v, Z[:, 0].mean(1) - Z.mean((1, 2)) + z.mean(0))                                            # Step 4
    assert torch.allclose(upsilon(z[order], Z[order], alpha, similarity), u[order]) and torch.allclose(upsilon(z, Z, 2 * alpha, similarity), 2 * u)
    assert torch.allclose(upsilon(3 * z, 3 * Z, alpha, similarity), u)                                                # the scale is the group's own
    assert (u <= alpha + 1e-9).all() and (u >= (-alpha if similarity is cosine else 0) - 1e-9).all()
    moved = upsilon(z + 7, Z + 7, alpha, similarity)
    assert torch.allclose(moved, u) or similarity is cosine, "a common shift of all states is no difference between them"
    if similarity is not cosine:
        d = (z - v).norm(dim=1)
        at_median = similarity(z, v)[d == d.median()] if G % 2 else torch.tensor([0.5])
        assert torch.allclose(at_median, torch.full_like(at_median, 0.5)) and (u.argsort(descending=True) == d.argsort()).all()


@many
@given(sizes, st.integers(2, 5), seeds)
def test_causal_references_over_a_vocabulary(n, J, seed):
    "Rows of T stand for the vocabulary of one token: masses are sums over them."
    p_J, p_q = distributions(seed, n, J, 7), distributions(seed + 1, n, 7)
    mass = lambda value_G_T: value_G_T.sum(1)
    value_sum = p_J[:, 0].exp() - p_J.exp().sum(1) + p_q.exp()
    value_mean = p_J[:, 0].exp() - p_J.exp().mean(1) + p_q.exp()
    assert torch.allclose(mass(value_sum), torch.full((n,), 2.0 - J, dtype=torch.float64)) and torch.allclose(mass(value_mean), torch.ones(n, dtype=torch.float64))
    for reading, value in ((reference_sum, value_sum), (reference_mean, value_mean)):
        ref, floored = reading(p_J, p_q)
        assert torch.equal(floored, value < 1e-6) and torch.allclose(ref, value.clamp(min=1e-6).log())
    ref, floored = reference_ratio(p_J, p_q)
    assert torch.isfinite(ref).all() and not floored.any() and torch.allclose(ref, p_J[:, 0] + p_q - p_J.logsumexp(1) + math.log(J))
    same = p_q[:, None].expand(n, J, 7)
    assert torch.allclose(reference_ratio(same, p_q)[0], p_q) and torch.allclose(reference_mean(same, p_q)[0], p_q), "contexts that say nothing leave the policy as it was"


@many
@given(sizes, st.integers(2, 5), st.integers(1, 6), seeds)
def test_the_projection_by_tokens_and_by_prefixes(n, J, T, seed):
    logp = -normal(seed, n, J, T).abs()
    by_token, by_prefix, ess = phi_tokenwise(logp), phi_autoregressive(logp), phi_ess(logp)
    assert torch.allclose(by_prefix[:, 0], by_token[:, 0]) and torch.allclose(by_prefix.sum(1), logp.sum(2).logsumexp(1) - math.log(J))
    low, high = logp.amin(1) - 1e-9, logp.amax(1) + 1e-9
    assert ((low <= by_token) & (by_token <= high) & (low <= by_prefix) & (by_prefix <= high)).all()
    assert (ess >= 1 - 1e-9).all() and (ess <= J + 1e-9).all() and torch.allclose(ess[:, 0], torch.full((n,), float(J), dtype=ess.dtype))


@many
@given(st.lists(st.floats(-60, 0), min_size=1, max_size=8), seeds, st.sampled_from([2.0, 5.0, 20.0]))
def test_k3(logp, seed, clamp):
    logp = torch.tensor(logp, dtype=torch.float64)
    ref = logp + normal(seed, len(logp), scale=8)
    assert (k3(logp, ref, clamp) >= 0).all() and (k3(logp, logp, clamp) == 0).all() and torch.isfinite(k3(logp, ref, clamp)).all()
    assert torch.allclose(k3(logp, ref, clamp), k3(logp, logp + (ref - logp).clamp(-clamp, clamp), 1e3))


def batch(seed, n, T):
    "Log-probs of policy, old policy, reference, x_i and causal reference; weights; a ragged mask with at least one token a row."
    length = torch.randint(1, T + 1, (n,), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(T)[None] < length[:, None]
    logp, old, ref, x, causal = (-normal(seed + k, n, T).abs() for k in range(5))
    return logp, old + 0.9 * (logp - old), ref, x, causal, normal(seed + 9, n), mask


LOSSES = {
    "grpo": lambda t: grpo_loss(t[0], t[1], t[5], t[6], beta=0.04, ref_logp_G_T=t[2]),
    "dr_grpo": lambda t: dr_grpo_loss(t[0], t[1], t[5], t[6], beta=0.04, ref_logp_G_T=t[2], max_length=9),
    "gvpo": lambda t: gvpo_loss(t[0], t[1], t[5], t[6]),
    "gcpo": lambda t: gcpo_loss(t[0], t[1], t[5], t[6], t[3], t[4], beta=0.04, ref_logp_G_T=t[2]),
}


@many
@given(st.sampled_from(sorted(LOSSES)), sizes, st.integers(1, 6), seeds)
def test_losses(name, n, T, seed):
    loss, tensors = LOSSES[name], batch(seed, n, T)
    order, (value, told) = torch.randperm(n, generator=torch.Generator().manual_seed(seed)), loss(tensors)
    assert torch.isfinite(value) and torch.allclose(loss([t[order] for t in tensors])[0], value), "responses have no order"
    spoilt = [t.masked_fill(~tensors[6], -50.0) if t.dim() == 2 and t is not tensors[6] else t for t in tensors]
    assert torch.allclose(loss(spoilt)[0], value), "what stands behind a response's end does not count"
    wider = [torch.nn.functional.pad(t, (0, 3)) if t.dim() == 2 else t for t in tensors]
    assert torch.allclose(loss(wider)[0], value), "padding does not count"
    logp = tensors[0].clone().requires_grad_()
    grad, = torch.autograd.grad(loss([logp, *tensors[1:]])[0], logp)
    assert torch.isfinite(grad).all() and (grad[~tensors[6]] == 0).all()


@many
@given(sizes, st.integers(1, 6), seeds, st.floats(0, 1))
def test_gcpo_is_grpo_and_a_penalty(n, T, seed, kappa):
    logp, old, ref, x, causal, B, mask = batch(seed, n, T)
    plain, _ = grpo_loss(logp, old, B, mask, beta=0.04, ref_logp_G_T=ref)
    assert torch.equal(gcpo_loss(logp, old, B, mask, kappa=0.0, beta=0.04, ref_logp_G_T=ref)[0], plain)
    penalty = (k3(x, causal, 5.0) * mask).sum(1).div(mask.sum(1)).mean()
    assert torch.allclose(gcpo_loss(logp, old, B, mask, x, causal, kappa, beta=0.04, ref_logp_G_T=ref)[0], plain + kappa * penalty)


@many
@given(st.integers(1, 7), st.data())
def test_pass_at_k_is_the_share_of_subsets(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    subsets = list(combinations(range(n), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(any(i < c for i in s) for s in subsets) / len(subsets))


texts = st.one_of(st.text(max_size=200), st.lists(st.sampled_from(["notebook: train", "grid:", "  alpha: [1, 2]", "seeds: [0]", "parameters: {model: tiny}", "cases:", "  a: {", "base: x.yaml", "- 1", "\t", "alpha: !!python/object/apply:os.system [ls]",
                                                                       "*a", "&a b", "? c", '{"prompt": "1"}', '{"step": 0}', '{"step": NaN}', "[]", "null", "\u2028", "seeds: 3", "grid: {alpha: {1: 2}}", "notebook: [1]"]), max_size=8).map("\n".join))


@pytest.mark.parametrize("parse", [read_parameters, b.expand, file_rows, read_metrics, lambda path: Config.checked(read_parameters(path))], ids=["parameters", "sweep", "questions", "metrics", "config"])
def test_any_text_is_a_value_or_a_clear_error(parse, tmp_path):
    place = tmp_path / "file.yaml"

    @settings(max_examples=120, deadline=None)
    @given(texts)
    def any_text(text):
        place.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            parse(place)
        except ValueError as error:
            assert str(error) and not isinstance(error, UnicodeError), "a message of our own"

    any_text()
