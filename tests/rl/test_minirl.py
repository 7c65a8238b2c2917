"""MiniRL's value and gradient against the formula of arXiv 2512.01374, eq. 7, written out token by token."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_bai.config import Objective
from megatron_bai.rl.advantages import group_centred
from megatron_bai.rl.batch import Batch
from megatron_bai.rl.objectives import minirl

LIMITS = Objective(clip_low=0.2, clip_high=0.27, is_max=5.0)


def batch_of(old: np.ndarray, infer: np.ndarray, advantages: np.ndarray, mask: np.ndarray) -> Batch:
    """A batch with what the objective reads, in float64."""
    b, length = mask.shape
    nothing = torch.zeros(b, length, dtype=torch.int64)
    return Batch(
        tokens=nothing,
        mask=torch.from_numpy(mask),
        infer_logprobs=torch.from_numpy(infer),
        old_logprobs=torch.from_numpy(old),
        advantages=torch.from_numpy(advantages),
        routes=nothing,
        routed=torch.from_numpy(mask),
    )


def closed_form(
    new: np.ndarray, old: np.ndarray, infer: np.ndarray, advantages: np.ndarray, mask: np.ndarray, limits: Objective
) -> tuple[float, np.ndarray, dict[str, list[float]]]:
    """The loss, its gradient in `new`, and per counted token: M = 0, π_θ/μ_old, log π_θ/π_old."""
    value, gradient = 0.0, np.zeros_like(new)
    tokens: dict[str, list[float]] = {"clipped": [], "weight": [], "staleness": []}
    for i, t in zip(*np.nonzero(mask)):
        a, log_p = advantages[i], new[i, t]
        r, weight = math.exp(log_p - old[i, t]), math.exp(log_p - infer[i, t])
        m = 1.0
        if a > 0 and r > 1 + limits.clip_high:
            m = 0.0
        if a < 0 and r < 1 - limits.clip_low:
            m = 0.0
        coefficient = m * min(weight, limits.is_max) * a
        value -= coefficient * log_p
        gradient[i, t] = -coefficient
        tokens["clipped"].append(1 - m)
        tokens["weight"].append(weight)
        tokens["staleness"].append(log_p - old[i, t])
    return value, gradient, tokens


def ours(
    new: np.ndarray, old: np.ndarray, infer: np.ndarray, advantages: np.ndarray, mask: np.ndarray, limits: Objective
) -> tuple[float, np.ndarray, dict[str, float]]:
    logprobs = torch.from_numpy(new.copy()).requires_grad_()
    total, stats = minirl.loss(logprobs, batch_of(old, infer, advantages, mask), limits)
    total.backward()
    return float(total.detach()), logprobs.grad.numpy(), stats.values()


def rising(b: int, length: int, seed: int, spread: float) -> tuple[np.ndarray, ...]:
    """Log-probabilities of the new, old and inference policies, advantages, and responses of 0 to `length` tokens."""
    random = np.random.default_rng(seed)
    new = -random.exponential(2.0, (b, length))
    old, infer = new + random.normal(0, spread, (b, length)), new + random.normal(0, spread, (b, length))
    lengths = random.integers(0, length + 1, b)
    lengths[:2] = 0, 1
    return new, old, infer, random.normal(0, 1, b), np.arange(length) < lengths[:, None]


@given(b=st.integers(2, 6), length=st.integers(1, 9), seed=st.integers(0, 2**31), spread=st.sampled_from([0, 0.2, 4.0]))
def test_value_gradient_and_statistics_are_the_formulas(b: int, length: int, seed: int, spread: float) -> None:
    case = rising(b, length, seed, spread)
    value, gradient, tokens = closed_form(*case, LIMITS)
    found_value, found_gradient, stats = ours(*case, LIMITS)
    assert found_value == pytest.approx(value, rel=1e-12, abs=1e-10)
    np.testing.assert_allclose(found_gradient, gradient, rtol=1e-12, atol=0)
    assert stats["clip_fraction"] == pytest.approx(np.mean(tokens["clipped"]))
    assert stats["is_weight_mean"] == pytest.approx(np.mean(tokens["weight"]))
    assert stats["is_weight_max"] == pytest.approx(max(tokens["weight"]))
    assert stats["staleness"] == pytest.approx(np.mean(tokens["staleness"]), abs=1e-12)


def one_token(ratio: float, advantage: float, limits: Objective = LIMITS, weight: float = 1.0) -> float:
    """Gradient of a one-token response with the given π_θ/π_old, A and π_θ/μ_old."""
    new = np.array([[-1.5]])
    case = (new, new - math.log(ratio), new - math.log(weight), np.array([advantage]), np.array([[True]]))
    return float(ours(*case, limits)[1][0, 0])


def test_a_token_is_dropped_just_beyond_its_limit_and_only_on_the_side_its_advantage_names() -> None:
    assert one_token(1.27 - 1e-9, 1.0) == -1.0 and one_token(1.27 + 1e-9, 1.0) == 0.0
    assert one_token(0.8 + 1e-9, -1.0) == 1.0 and one_token(0.8 - 1e-9, -1.0) == 0.0
    assert one_token(0.01, 1.0) == -1.0 and one_token(100.0, -1.0) == 1.0
    assert one_token(100.0, 0.0) == 0.0


def test_a_token_at_its_limit_is_kept() -> None:
    at = Objective(clip_low=0.0, clip_high=0.0)
    assert one_token(1.0, 1.0, at) == -1.0 and one_token(1.0, -1.0, at) == 1.0


def test_the_token_weight_is_truncated_at_its_maximum_and_not_below() -> None:
    assert one_token(1.0, 2.0, weight=4.99) == pytest.approx(-2 * 4.99, rel=1e-12)
    assert one_token(1.0, 2.0, weight=5.01) == -10.0
    assert one_token(1.0, -2.0, weight=1e6) == 10.0
    assert one_token(1.0, 2.0, weight=1e-6) == pytest.approx(-2e-6, rel=1e-9)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e4, -1e4])
def test_whatever_padding_holds_changes_nothing(garbage: float) -> None:
    new, old, infer, advantages, mask = rising(5, 7, 3, 0.5)
    clean = ours(new, old, infer, advantages, mask, LIMITS)
    padded = [np.where(mask, array, garbage) for array in (new, old, infer)]
    dirty = ours(*padded, advantages, mask, LIMITS)
    assert dirty[0] == clean[0] and dirty[2] == clean[2]
    np.testing.assert_array_equal(dirty[1], clean[1])


def test_responses_that_are_all_empty_give_nothing_to_learn() -> None:
    new, old, infer, advantages, mask = rising(4, 5, 0, 0.5)
    value, gradient, stats = ours(new, old, infer, advantages, np.zeros_like(mask), LIMITS)
    assert value == 0 and not gradient.any() and stats == {}


def test_groups_with_equal_rewards_give_no_gradient() -> None:
    new, old, infer, _, mask = rising(6, 5, 1, 0.5)
    for reward, rounding in ((0.0, 0), (1.0, 0), (0.7, 1e-14)):
        value, gradient, _ = ours(new, old, infer, group_centred(np.full(6, reward), 3), mask, LIMITS)
        assert abs(value) <= rounding and np.abs(gradient).max() <= rounding


def test_on_policy_and_without_discrepancy_it_is_the_plain_policy_gradient() -> None:
    new, _, _, advantages, mask = rising(4, 6, 2, 0.0)
    np.testing.assert_array_equal(
        ours(new, new, new, advantages, mask, LIMITS)[1], np.where(mask, -advantages[:, None], 0)
    )


def test_no_response_is_divided_by_its_length() -> None:
    new = np.full((2, 8), -1.0)
    mask = np.arange(8) < np.array([[8], [2]])
    _, gradient, _ = ours(new, new, new, np.array([1.0, 1.0]), mask, LIMITS)
    assert (gradient[mask] == -1).all()


def test_float32_log_probabilities_stay_close_to_the_formula() -> None:
    case = rising(8, 30, 4, 0.3)
    single = [np.asarray(array, dtype=np.float32) for array in case[:4]]
    value, gradient, _ = ours(*single, case[4], LIMITS)
    wanted, slope, _ = closed_form(*[array.astype(np.float64) for array in single], case[4], LIMITS)
    assert value == pytest.approx(wanted, rel=1e-5)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5)


@given(st.lists(st.floats(-1e3, 1e3), min_size=6, max_size=6), st.sampled_from([1, 2, 3, 6]))
def test_advantages_are_rewards_less_their_groups_mean(rewards: list[float], size: int) -> None:
    found = group_centred(np.array(rewards), size)
    for i, advantage in enumerate(found):
        group = rewards[i // size * size : i // size * size + size]
        assert advantage == pytest.approx(rewards[i] - sum(group) / size, abs=1e-9)
    assert found.dtype == np.float64


def test_advantages_are_not_divided_by_the_deviation() -> None:
    assert group_centred(np.array([1.0, 0, 0, 0, 10, 0]), 2).tolist() == [0.5, -0.5, 0, 0, 5, -5]
