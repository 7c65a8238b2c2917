"""Trust regions in probabilities, gates and masks at their limits. The formulas are in `test_objectives.py`."""

from typing import Any

import numpy as np
import pytest
import torch
from policies import Case, loss

from megatron_bai.config import Dppo, Drpo, Gmpo, Grpo, Sapo
from megatron_bai.rl.objectives.divergence import binary_kl


def one(new: float, old: float, infer: float, advantage: float) -> Case:
    """A response of one token with the given probabilities under π_θ, π_old and μ_old."""
    pi, pi_old, mu = (np.log([[p]]) for p in (new, old, infer))
    return Case(pi, pi_old, mu, pi, np.array([advantage]), np.array([[True]]), np.array([0]), np.array([True]))


def gradient(settings: Any, *case: float) -> float:
    return float(loss(settings, one(*case))[1][0, 0])


@pytest.mark.parametrize(("new", "advantage"), [(0.7, 1.0), (0.3, -1.0)])
def test_dppo_drops_a_token_beyond_its_shift_and_only_on_the_side_its_advantage_names(
    new: float, advantage: float
) -> None:
    weight = -advantage * new / 0.5
    assert gradient(Dppo(delta=0.2 + 1e-9), new, 0.5, 0.5, advantage) == pytest.approx(weight)
    assert gradient(Dppo(delta=0.2 - 1e-9), new, 0.5, 0.5, advantage) == 0
    assert gradient(Dppo(delta=0.2 - 1e-9), new, 0.5, 0.5, -advantage) == pytest.approx(-weight)


def test_dppos_region_is_one_of_probabilities_around_the_policy_that_sampled() -> None:
    """A rare token a hundred times likelier stays, a common one a third likelier does not; MiniRL does the reverse."""
    assert gradient(Dppo(), 1e-3, 1e-5, 1e-5, 1.0) == pytest.approx(-100)
    assert gradient(Dppo(), 0.8, 0.6, 0.6, 1.0) == 0
    assert gradient(Dppo(), 0.8, 0.79, 0.6, 1.0) == 0
    assert gradient(Dppo(anchor="training"), 0.8, 0.79, 0.6, 1.0) == pytest.approx(-0.8 / 0.6)


def test_drpo_pulls_a_token_back_beyond_its_shift() -> None:
    settings = Drpo(delta=0.2)
    assert gradient(settings, 0.5, 0.5, 0.5, 1.0) == pytest.approx(-1)
    assert gradient(settings, 0.7, 0.5, 0.5, 1.0) == pytest.approx(0, abs=1e-12)
    assert gradient(settings, 0.8, 0.5, 0.5, 1.0) == pytest.approx(1.6 * 0.5)  # a step makes it less likely again
    assert gradient(settings, 0.4, 0.5, 0.5, 1.0) == pytest.approx(-0.8 * 1.5)  # on its way back
    found = loss(settings, one(0.8, 0.5, 0.5, 1.0))[2]
    assert found["gate_mean"] == pytest.approx(-0.5) and found["corrective_fraction"] == 1


def test_sapos_gate_is_open_at_1_and_closes_on_both_sides() -> None:
    for ratio, advantage, tau in ((1.0, 1.0, 1.0), (1.5, 1.0, 1.0), (0.5, -2.0, 1.05), (3.0, -1.0, 1.05)):
        found = loss(Sapo(), one(0.2 * ratio, 0.2, 0.2, advantage))
        gate = 1 / np.cosh(tau * (ratio - 1) / 2) ** 2
        assert found[2]["gate_mean"] == pytest.approx(gate)
        assert found[1][0, 0] == pytest.approx(-advantage * ratio * gate)


def test_gmpo_limits_the_logarithm_of_a_tokens_ratio() -> None:
    settings = Gmpo(clip_low=0.1, clip_high=0.3)
    assert gradient(settings, 0.2 * np.exp(0.3 - 1e-9), 0.2, 0.2, 1.0) == pytest.approx(-np.exp(0.3))
    assert gradient(settings, 0.2 * np.exp(0.3 + 1e-9), 0.2, 0.2, 1.0) == 0
    assert gradient(settings, 0.2 * np.exp(-0.1 + 1e-9), 0.2, 0.2, -1.0) == pytest.approx(np.exp(-0.1))
    assert gradient(settings, 0.2 * np.exp(-0.1 - 1e-9), 0.2, 0.2, -1.0) == 0
    assert gradient(settings, 0.01, 0.2, 0.2, 1.0) == pytest.approx(-0.05)


def test_icepop_counts_a_token_between_its_limits_alone() -> None:
    settings = Grpo(correction="token_mask", correction_min=0.5, correction_max=5.0)
    for weight, kept in ((0.5 - 1e-9, 0), (0.5 + 1e-9, 1), (5 - 1e-9, 1), (5 + 1e-9, 0)):
        found = loss(settings, one(0.1, 0.1, 0.1 / weight, -1.0))
        assert found[1][0, 0] == pytest.approx(kept * weight) and found[2]["corrected_fraction"] == 1 - kept


def test_kpop_takes_the_larger_of_two_divergences_between_the_engines() -> None:
    forward = 0.9 * np.log(0.9 / 0.99) + 0.1 * np.log(0.1 / 0.01)
    backward = 0.99 * np.log(0.99 / 0.9) + 0.01 * np.log(0.01 / 0.1)
    assert forward > 2 * backward
    for old, infer in ((0.9, 0.99), (0.99, 0.9)):
        for limit, kept in ((forward + 1e-9, 1), (forward - 1e-9, 0)):
            settings = Grpo(correction="token_kpop", correction_kl=limit)
            assert gradient(settings, old, old, infer, -1.0) == pytest.approx(kept * old / infer)


def test_binary_divergences_hold_where_a_probability_rounds_to_1() -> None:
    p, q = torch.tensor([-1e-9, 0.0, 0.0, -1e-9, 1e-7]), torch.tensor([-1e-8, 0.0, -1e-9, 0.0, -200.0])
    wide = [values.double().clamp(max=0) for values in (p, q)]
    others = [-values.expm1() for values in wide]
    exact = wide[0].exp() * (wide[0] - wide[1]) + torch.special.xlogy(others[0], others[0] / others[1]).nan_to_num(0.0)
    found = binary_kl(p, q)
    torch.testing.assert_close(found[[0, 2, 4]].double(), exact[[0, 2, 4]], rtol=1e-5, atol=0)
    assert found[1] == 0 and found[3] == float("inf")
