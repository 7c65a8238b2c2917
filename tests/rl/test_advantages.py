"""Advantages of samples from their group's rewards, and of tokens from a critic's values."""

import statistics
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_bai.rl.batches.advantages import (
    GroupRewards,
    explained_variance,
    gae,
    place_rewards,
    whiten,
)

rewards_of_6 = st.lists(st.floats(-1e3, 1e3), min_size=6, max_size=6)


def groups(rewards: list[float], size: int) -> list[list[float]]:
    """The group of each sample."""
    return [rewards[i // size * size : i // size * size + size] for i in range(len(rewards))]


@given(rewards_of_6, st.sampled_from([1, 2, 3, 6]))
def test_centred_is_the_reward_less_its_groups_mean(rewards: list[float], size: int) -> None:
    found = GroupRewards.of(rewards, size).compute_advantages("centred")
    wanted = [reward - sum(group) / size for reward, group in zip(rewards, groups(rewards, size))]
    assert found == pytest.approx(wanted, abs=1e-9) and found.dtype == np.float64


def test_centred_is_not_divided_by_the_deviation() -> None:
    rewards = GroupRewards.of([1.0, 0, 0, 0, 10, 0], 2)
    assert rewards.compute_advantages("centred").tolist() == [0.5, -0.5, 0, 0, 5, -5]


@pytest.mark.parametrize("estimator", ["centred", "normalised", "leave_one_out"])
@pytest.mark.parametrize("reward", [0.1, -1e30, 1e9 + 0.1, 3e38])
def test_equal_rewards_have_no_advantage_at_all(reward: float, estimator: str) -> None:
    """Their mean is rounded; a deviation of that rounding would make advantages of 1."""
    rewards = GroupRewards.of([reward] * 7 + [None] + [reward, reward, None] + [None] * 5, 8)
    assert not rewards.compute_advantages(estimator).any()


@given(rewards_of_6, st.sampled_from([2, 3, 6]))
def test_normalised_is_also_divided_by_the_groups_deviation(rewards: list[float], size: int) -> None:
    wanted = [
        (reward - statistics.fmean(group)) / (statistics.stdev(group) + 1e-6)
        for reward, group in zip(rewards, groups(rewards, size))
    ]
    found = GroupRewards.of(rewards, size).compute_advantages("normalised")
    assert found == pytest.approx(wanted, rel=1e-6, abs=1e-6)


@given(rewards_of_6, st.sampled_from([2, 3, 6]))
def test_leave_one_out_compares_with_the_others(rewards: list[float], size: int) -> None:
    wanted = [reward - (sum(group) - reward) / (size - 1) for reward, group in zip(rewards, groups(rewards, size))]
    assert GroupRewards.of(rewards, size).compute_advantages("leave_one_out") == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.7, 1e6 / 3])
def test_equal_rewards_give_no_advantage(reward: float) -> None:
    for name in ("centred", "normalised", "leave_one_out"):
        found = GroupRewards.of([reward] * 6, 3).compute_advantages(name)
        assert np.abs(found).max() <= 1e-3 * 1e-6 * max(1.0, reward)


def test_each_name_is_its_estimator() -> None:
    rewards = GroupRewards.of([1.0, 0, 0, 1, 1, 0], 3)
    found = {name: rewards.compute_advantages(name) for name in ("centred", "normalised", "leave_one_out")}
    assert found["centred"][0] == pytest.approx(2 / 3) and found["leave_one_out"][0] == pytest.approx(1)
    assert found["normalised"][0] == pytest.approx(2 / 3 / 3**-0.5, rel=1e-5)


def test_uniform_groups_are_those_whose_rewards_are_all_equal() -> None:
    rewards = GroupRewards.of([0.7, 0.7, 0, 1, 1, 1], 2)
    assert rewards.in_uniform_group.tolist() == [True, True, False, False, True, True]


@given(
    length=st.integers(1, 8),
    seed=st.integers(0, 2**31),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
)
def test_gae_is_the_discounted_sum_of_temporal_differences(length: int, seed: int, gamma: float, lam: float) -> None:
    """Eq. 16 of arXiv 1506.02438 as a sum over a response's tokens; what stands outside or between them is garbage."""
    random = np.random.default_rng(seed)
    rewards, values = random.normal(size=(2, 4, length))
    mask = random.random((4, length)) < 0.7  # with gaps, and some of them empty
    mask[0] = True
    garbled = [torch.from_numpy(np.where(mask, each, np.nan)) for each in (rewards, values)]
    found, returns = gae(garbled[0], garbled[1], torch.from_numpy(mask), gamma, lam)
    for i, tokens in enumerate(map(np.flatnonzero, mask)):
        v = [*values[i, tokens], 0.0]
        delta = [rewards[i, t] + gamma * v[k + 1] - v[k] for k, t in enumerate(tokens)]
        for k, t in enumerate(tokens):
            wanted = sum((gamma * lam) ** step * delta[k + step] for step in range(len(tokens) - k))
            assert float(found[i, t]) == pytest.approx(wanted, abs=1e-12)
            assert float(returns[i, t]) == pytest.approx(wanted + v[k], abs=1e-12)
    assert not found[torch.from_numpy(~mask)].any() and not returns[torch.from_numpy(~mask)].any()


def test_gae_without_decay_is_the_return_less_the_value() -> None:
    """γ = λ = 1, one reward at the end, as in PPO on language: A_t = R − V_t."""
    rewards, values = torch.tensor([[0.0, 0, 0, 1, 9]]), torch.tensor([[0.3, 0.1, 0.6, 0.2, 9]])
    mask = torch.tensor([[True, True, True, True, False]])
    found, returns = gae(rewards, values, mask, 1.0, 1.0)
    torch.testing.assert_close(found, torch.tensor([[0.7, 0.9, 0.4, 0.8, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[1.0, 1, 1, 1, 0]]))


def test_a_reward_belongs_to_the_last_token_of_its_response() -> None:
    mask = torch.tensor([[0, 1, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    found = place_rewards(torch.tensor([1.0, 2.0, 3.0, 4.0]), mask)
    assert found.tolist() == [[0, 0, 1, 0, 0], [0, 0, 0, 2, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 4]]


def test_rewards_of_turns_lie_at_their_ends_and_sum_to_the_rewards() -> None:
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 1], [1, 0, 0, 1, 1, 1, 0]]).bool()
    turns = torch.zeros(2, 7)
    turns[0, 2], turns[1, 1] = 0.25, 5.0  # the second is of a token that may not be learned from
    found = place_rewards(torch.tensor([1.0, 2.0]), mask, turns)
    assert found.tolist() == [[0, 0, 0.25, 0, 0, 0, 0.75], [0, 0, 0, 0, 0, 2.0, 0]]


def test_gae_of_turns_is_the_closed_form_over_sampled_tokens() -> None:
    """A_t = Σ_l (γλ)^l δ_{t+l} over the tokens that were sampled, with the turns' rewards at their ends."""
    gamma, lam, generator = 0.9, 0.8, torch.Generator().manual_seed(0)
    mask = torch.tensor([[0, 1, 1, 0, 0, 0, 1, 1, 1, 0, 1, 0]]).bool()
    values, turns = torch.randn(1, 12, generator=generator), torch.zeros(1, 12)
    turns[0, 2], turns[0, 8] = 0.5, -2.0
    found, returns = gae(place_rewards(torch.tensor([3.0]), mask, turns), values, mask, gamma, lam)
    positions = mask[0].nonzero().flatten().tolist()
    rewards = {2: 0.5, 8: -2.0, 10: 3.0 - 0.5 + 2.0}
    v = [float(values[0, t]) for t in positions] + [0.0]
    deltas = [rewards.get(t, 0.0) + gamma * v[i + 1] - v[i] for i, t in enumerate(positions)]
    for i, t in enumerate(positions):
        wanted = sum((gamma * lam) ** (j - i) * deltas[j] for j in range(i, len(positions)))
        assert float(found[0, t]) == pytest.approx(wanted, abs=1e-5)
        assert float(returns[0, t]) == pytest.approx(wanted + v[i], abs=1e-5)
    assert not found[~mask].any() and not returns[~mask].any()


def over_ranks(function: Callable, *parts: tuple) -> list:
    """The function's result on each of several ranks, its collectives played by threads that wait for one another."""
    barrier, given_ = threading.Barrier(len(parts)), [None] * len(parts)

    def rank(number: int) -> object:
        def total(value: torch.Tensor) -> torch.Tensor:
            barrier.wait()
            given_[number] = value
            barrier.wait()
            return torch.stack(given_).sum(0)

        return function(*parts[number], total)

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(rank, range(len(parts))))


def test_whitening_is_over_all_elements_that_count_on_all_ranks() -> None:
    random = np.random.default_rng(3)
    values, mask = random.normal(5.0, 3.0, (6, 9)), random.random((6, 9)) < 0.6
    mask[4:] = False  # a rank on which nothing counts
    wanted = np.where(mask, (values - values[mask].mean()) / (values[mask].std() + 1e-8), 0)
    tensors = torch.from_numpy(np.where(mask, values, np.nan)), torch.from_numpy(mask)
    found = over_ranks(whiten, *zip(*(each.split([3, 1, 2]) for each in tensors)))
    np.testing.assert_allclose(torch.cat(found), wanted, rtol=1e-12, atol=1e-14)
    same = over_ranks(whiten, (torch.full((1, 4), 0.7), torch.ones(1, 4, dtype=torch.bool)))
    assert not same[0].any()  # nothing to prefer, and no 0/0


def test_explained_variance_is_that_of_all_ranks() -> None:
    random = np.random.default_rng(4)
    returns = random.normal(2.0, 1.0, 30)
    for values in (returns, returns * 0 + 5, returns + random.normal(size=30), -returns):
        wanted = 1 - np.var(returns - values) / np.var(returns)
        parts = [torch.from_numpy(each).split([10, 1, 19]) for each in (values, returns)]
        assert over_ranks(explained_variance, *zip(*parts)) == [pytest.approx(wanted, abs=1e-12)] * 3
    values = torch.rand(50)
    for equal in (torch.ones(50), (0.7 - values) + values):  # R = A + V in float32: equal but for rounding
        assert over_ranks(explained_variance, (values, equal)) == [None]
    assert over_ranks(explained_variance, (torch.zeros(0), torch.zeros(0))) == [None]


def test_a_sample_without_reward_is_in_no_mean_and_no_deviation() -> None:
    """Two groups of four; the second has a single reward, which has nothing to be compared with."""
    rewards = GroupRewards.of([1.0, None, 0.0, 0.5, None, 3.0, None, None], 4)
    nothing = [0.0] * 4
    assert rewards.compute_advantages("centred").tolist() == [0.5, 0, -0.5, 0, *nothing]
    assert rewards.compute_advantages("leave_one_out").tolist() == [0.75, 0, -0.75, 0, *nothing]
    wanted = [0.5 / (0.5 + 1e-6), 0, -0.5 / (0.5 + 1e-6), 0, *nothing]  # the deviation of 1, 0 and 0.5 is 0.5
    assert rewards.compute_advantages("normalised").tolist() == pytest.approx(wanted, abs=1e-15)
    assert rewards.has_peer.tolist() == [True, False, True, True, False, False, False, False]
    assert not rewards.in_complete_group.any()
    assert GroupRewards.of([1.0, None, 0.0, 0.5], 2).in_complete_group.tolist() == [False, False, True, True]


@given(
    st.lists(st.tuples(st.floats(-1e3, 1e3), st.booleans()), min_size=6, max_size=6),
    st.sampled_from([1, 2, 3, 6]),
    st.sampled_from(["centred", "normalised", "leave_one_out"]),
)
def test_advantages_are_those_of_the_group_without_what_has_no_reward(
    samples: list[tuple[float, bool]], size: int, estimator: str
) -> None:
    rewards, valid = np.array([reward for reward, _ in samples]), np.array([has for _, has in samples])
    found = GroupRewards.of([r if has else None for r, has in samples], size).compute_advantages(estimator)
    for start in range(0, 6, size):
        inside = np.arange(start, start + size)
        known = inside[valid[inside]]
        assert not found[np.setdiff1d(inside, known)].any()
        if len(known) > 1:
            alone = GroupRewards.of(list(rewards[known]), len(known)).compute_advantages(estimator)
            assert found[known] == pytest.approx(alone, rel=1e-9, abs=1e-9)
        else:
            assert not found[known].any()


def test_a_group_is_uniform_when_the_rewards_it_has_are_equal() -> None:
    rewards = GroupRewards.of([1.0, None, 1.0, 1.0, None, 0.0, None, None, None], 3)
    assert rewards.in_uniform_group.tolist() == [True] * 3 + [False] * 3 + [True] * 3
