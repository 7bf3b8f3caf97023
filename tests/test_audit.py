"""Step 3 with a real policy, repeated: the paper's draw carries nothing on average, one that has not seen the response does."""
from dataclasses import replace

import pytest
import torch

from gcpo.collider import Collider, alone, continue_contexts, encode, fresh, integrate, loo, paper
from gcpo.data import Row, to_query
from gcpo.policy import for_sampling, load_policy
from gcpo.sample import Sampling, group_of
from gcpo.upsilon import projected

REPEATS, STOP = 1500, ("\n",)


@pytest.fixture(scope="module")
def policy():
    with for_sampling(load_policy("tiny", device="cpu")) as policy:
        yield policy


def differences(policy, draw) -> torch.Tensor:
    "Z̄_i - Z̄'_i of each response [REPEATS, 2], along the line from one answer's state to the other's; every repetition draws anew, the responses stay."
    query = to_query(Row("q", "Numbers: 17 52 38\n", "Largest:"), policy.tokenizer)
    one = group_of(policy, query, [" 52", " 17"])
    copies = [replace(one, query=replace(query, id=f"q{r}")) for r in range(REPEATS)]
    collider = Collider(draw, 2, 1, Sampling(4, stop=STOP), max_draw_length=4, max_continuation_length=4)
    groups = encode(policy, continue_contexts(policy, integrate(policy, copies, collider), collider), collider, alone)
    line = torch.nn.functional.normalize(groups[0].z_G_D[0] - groups[0].z_G_D[1], dim=0)
    zero = torch.zeros_like(groups[0].z_G_D)
    return torch.stack([projected(zero, g.Z_G_J_M_D) @ line for g in groups])


def standard_errors_from_zero(d_R_G: torch.Tensor) -> torch.Tensor:
    return d_R_G.mean(0).abs() / (d_R_G.std(0) / REPEATS**.5)


def test_the_papers_step_3_averages_to_zero(policy):
    away = standard_errors_from_zero(differences(policy, paper))
    assert (away < 3).all(), away


@pytest.mark.parametrize("draw", [loo, fresh])
def test_a_draw_that_has_not_seen_the_response_carries_its_influence(policy, draw):
    away = standard_errors_from_zero(differences(policy, draw))
    assert away.max() > 10, away
