"""Advantages of samples from their group's rewards, and of tokens from a critic's values."""

import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_bai.rl.advantages import gae, group_centred, group_normalised, leave_one_out, of_groups, uniform

rewards_of_6 = st.lists(st.floats(-1e3, 1e3), min_size=6, max_size=6)


def groups(rewards: list[float], size: int) -> list[list[float]]:
    """The group of each sample."""
    return [rewards[i // size * size : i // size * size + size] for i in range(len(rewards))]


@given(rewards_of_6, st.sampled_from([1, 2, 3, 6]))
def test_centred_is_the_reward_less_its_groups_mean(rewards: list[float], size: int) -> None:
    found = group_centred(np.array(rewards), size)
    wanted = [reward - sum(group) / size for reward, group in zip(rewards, groups(rewards, size))]
    assert found == pytest.approx(wanted, abs=1e-9) and found.dtype == np.float64


def test_centred_is_not_divided_by_the_deviation() -> None:
    assert group_centred(np.array([1.0, 0, 0, 0, 10, 0]), 2).tolist() == [0.5, -0.5, 0, 0, 5, -5]


@given(rewards_of_6, st.sampled_from([2, 3, 6]))
def test_normalised_is_also_divided_by_the_groups_deviation(rewards: list[float], size: int) -> None:
    wanted = [
        (reward - statistics.fmean(group)) / (statistics.stdev(group) + 1e-6)
        for reward, group in zip(rewards, groups(rewards, size))
    ]
    assert group_normalised(np.array(rewards), size) == pytest.approx(wanted, rel=1e-6, abs=1e-6)


@given(rewards_of_6, st.sampled_from([2, 3, 6]))
def test_leave_one_out_compares_with_the_others(rewards: list[float], size: int) -> None:
    wanted = [reward - (sum(group) - reward) / (size - 1) for reward, group in zip(rewards, groups(rewards, size))]
    assert leave_one_out(np.array(rewards), size) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.7, 1e6 / 3])
def test_equal_rewards_give_no_advantage(reward: float) -> None:
    for name in ("centred", "normalised", "leave_one_out"):
        assert np.abs(of_groups(np.full(6, reward), 3, name)).max() <= 1e-3 * 1e-6 * max(1.0, reward)


def test_each_name_is_its_estimator() -> None:
    rewards = np.array([1.0, 0, 0, 1, 1, 0])
    found = {name: of_groups(rewards, 3, name) for name in ("centred", "normalised", "leave_one_out")}
    assert found["centred"][0] == pytest.approx(2 / 3) and found["leave_one_out"][0] == pytest.approx(1)
    assert found["normalised"][0] == pytest.approx(2 / 3 / 3**-0.5, rel=1e-5)


def test_uniform_groups_are_those_whose_rewards_are_all_equal() -> None:
    assert uniform(np.array([0.7, 0.7, 0, 1, 1, 1]), 2).tolist() == [True, True, False, False, True, True]


@given(
    length=st.integers(1, 8),
    seed=st.integers(0, 2**31),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
)
def test_gae_is_the_discounted_sum_of_temporal_differences(length: int, seed: int, gamma: float, lam: float) -> None:
    """Eq. 16 of arXiv 1506.02438 as a sum, response by response; what stands outside a response is garbage."""
    random = np.random.default_rng(seed)
    rewards, values = random.normal(size=(2, 4, length))
    starts = random.integers(0, length, 4)
    ends = [int(random.integers(start, length + 1)) for start in starts]  # some are empty
    mask = np.array([[start <= t < end for t in range(length)] for start, end in zip(starts, ends)])
    garbled = [torch.from_numpy(np.where(mask, each, np.nan)) for each in (rewards, values)]
    found, returns = gae(*garbled, torch.from_numpy(mask), gamma, lam)
    for i, (start, end) in enumerate(zip(starts, ends)):
        v = [*values[i, start:end], 0.0]
        delta = [rewards[i, start + k] + gamma * v[k + 1] - v[k] for k in range(end - start)]
        for k in range(end - start):
            wanted = sum((gamma * lam) ** step * delta[k + step] for step in range(end - start - k))
            assert float(found[i, start + k]) == pytest.approx(wanted, abs=1e-12)
            assert float(returns[i, start + k]) == pytest.approx(wanted + v[k], abs=1e-12)
    assert not found[torch.from_numpy(~mask)].any() and not returns[torch.from_numpy(~mask)].any()


def test_gae_without_decay_is_the_return_less_the_value() -> None:
    """γ = λ = 1, one reward at the end, as in PPO on language: A_t = R − V_t."""
    rewards, values = torch.tensor([[0.0, 0, 0, 1, 9]]), torch.tensor([[0.3, 0.1, 0.6, 0.2, 9]])
    mask = torch.tensor([[True, True, True, True, False]])
    found, returns = gae(rewards, values, mask, 1.0, 1.0)
    torch.testing.assert_close(found, torch.tensor([[0.7, 0.9, 0.4, 0.8, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[1.0, 1, 1, 1, 0]]))
