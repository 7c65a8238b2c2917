"""Advantages: of samples, from their group's rewards, or of tokens, from a critic's values."""

from collections.abc import Callable

import numpy as np
import torch

SumOverRanks = Callable[[torch.Tensor], torch.Tensor]  # a tensor's sum over the data-parallel ranks


def group_centred(rewards: np.ndarray, group_size: int, valid: np.ndarray | None = None) -> np.ndarray:
    """Compute A = R − mean of the group's R, without a division by the standard deviation (arXiv 2512.01374).

    Args:
        rewards: `[groups · group_size]`, the samples of a group side by side.
        group_size: samples of a group.
        valid: `[groups · group_size]` bool, the samples that have a reward; None: all. The others are in no mean and no
            deviation, and their A is 0; so is that of a sample without another to compare it with.

    Returns:
        `[groups · group_size]` float64.
    """
    groups, valid, count = _grouped(rewards, group_size, valid)
    advantages: np.ndarray = _centred(groups, valid, count) * _compared(valid, count)
    return advantages.reshape(-1)


def group_normalised(
    rewards: np.ndarray, group_size: int, valid: np.ndarray | None = None, epsilon: float = 1e-6
) -> np.ndarray:
    """Compute A = (R − mean of the group's R) / (their standard deviation + epsilon) (GRPO, arXiv 2402.03300).

    The deviation has n − 1 in its denominator, n being the samples with a reward, as in the implementations; the paper
    does not specify it.

    Args:
        rewards: as in `group_centred`.
        group_size: samples of a group.
        valid: as in `group_centred`.
        epsilon: added to the deviation.

    Returns:
        `[groups · group_size]` float64.
    """
    groups, valid, count = _grouped(rewards, group_size, valid)
    centred = _centred(groups, valid, count)
    deviation = np.sqrt((centred**2).sum(axis=1, keepdims=True) / np.maximum(count - 1, 1))
    advantages: np.ndarray = centred / (deviation + epsilon) * _compared(valid, count)
    return advantages.reshape(-1)


def leave_one_out(rewards: np.ndarray, group_size: int, valid: np.ndarray | None = None) -> np.ndarray:
    """Compute A = R − mean of the *other* samples' R in the group (RLOO, arXiv 2402.14740): an unbiased baseline.

    Args:
        rewards: as in `group_centred`.
        group_size: samples of a group.
        valid: as in `group_centred`.

    Returns:
        `[groups · group_size]` float64.
    """
    groups, valid, count = _grouped(rewards, group_size, valid)
    others = count / np.maximum(count - 1, 1)
    advantages: np.ndarray = _centred(groups, valid, count) * others * _compared(valid, count)
    return advantages.reshape(-1)


def group_advantages(
    rewards: np.ndarray, group_size: int, estimator: str, valid: np.ndarray | None = None
) -> np.ndarray:
    """Compute advantages by the estimator's name.

    Args:
        rewards: as in `group_centred`.
        group_size: samples of a group.
        estimator: one of `ESTIMATORS`.
        valid: as in `group_centred`.

    Returns:
        `[groups · group_size]` float64.
    """
    return {"centred": group_centred, "normalised": group_normalised, "leave_one_out": leave_one_out}[estimator](
        rewards, group_size, valid
    )


def in_uniform_group(rewards: np.ndarray, group_size: int, valid: np.ndarray | None = None) -> np.ndarray:
    """Return whether all rewards in the sample's group are equal, so that there is nothing to learn from it.

    Args:
        rewards: as in `group_centred`.
        group_size: samples of a group.
        valid: as in `group_centred`.

    Returns:
        `[groups · group_size]` bool, of every sample.
    """
    groups, valid, _ = _grouped(rewards, group_size, valid)
    return np.repeat(_all_equal(groups, valid), group_size)


def has_peer(valid: np.ndarray, group_size: int) -> np.ndarray:
    """Return whether the sample has a reward and another sample of its group has one, too.

    Args:
        valid: `[groups · group_size]` bool, the samples that have a reward.
        group_size: samples of a group.

    Returns:
        `[groups · group_size]` bool, of every sample.
    """
    valid = valid.reshape(-1, group_size)
    return _compared(valid, valid.sum(axis=1, keepdims=True)).reshape(-1)


def _grouped(
    rewards: np.ndarray, group_size: int, valid: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return `[groups, group_size]` rewards (0 where none), where there is one, and `[groups, 1]` their number."""
    groups = np.asarray(rewards, dtype=np.float64).reshape(-1, group_size)
    valid = np.ones(groups.shape, dtype=bool) if valid is None else np.asarray(valid, dtype=bool).reshape(groups.shape)
    return np.where(valid, groups, 0.0), valid, valid.sum(axis=1, keepdims=True)


def _centred(groups: np.ndarray, valid: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Return R − mean, exactly 0 in a group of equal rewards, whose mean may be rounded (three times 0.1)."""
    centred = groups - groups.sum(axis=1, keepdims=True) / np.maximum(count, 1)
    return np.where(valid & ~_all_equal(groups, valid)[:, None], centred, 0.0)


def _all_equal(groups: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Return `[groups]` bool, whether the rewards that there are do not differ."""
    lowest, highest = (np.where(valid, groups, fill) for fill in (np.inf, -np.inf))
    equal: np.ndarray = lowest.min(axis=1) >= highest.max(axis=1)
    return equal


def _compared(valid: np.ndarray, count: np.ndarray) -> np.ndarray:
    return valid & (count > 1)


@torch.no_grad()
def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute advantages and returns by generalised advantage estimation (arXiv 1506.02438, eq. 16).

    A_t = Σ_l (γλ)^l δ_{t+l} with the temporal differences δ_t = r_t + γ·V_{t+1} − V_t.

    Args:
        rewards: `[B, T]` r, of each action.
        values: `[B, T]` V of the state before each action; after a response's last token it is 0.
        mask: `[B, T]` bool, the response's tokens. What is left out between two of them takes no time: t + 1 is the
            next token in the mask.
        gamma: γ, the discount.
        lam: λ, 1 for Monte Carlo returns, 0 for one-step differences.

    Returns:
        Advantages A and returns A + V, the critic's targets, `[B, T]`, 0 outside the mask.
    """
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(values)
    next_advantage = next_value = torch.zeros_like(values[:, 0])  # A and V of the next token
    for t in reversed(range(values.shape[1])):
        here = mask[:, t]
        advantage = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * next_advantage
        next_advantage, next_value = advantage.where(here, next_advantage), values[:, t].where(here, next_value)
        advantages[:, t] = advantage * here
    return advantages, advantages + values


def at_last_token(rewards: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Put each response's reward at its last token.

    Args:
        rewards: `[B]`, of responses.
        mask: `[B, T]` bool, the response's tokens.

    Returns:
        `[B, T]`, 0 elsewhere.
    """
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return rewards[:, None] * last


def whiten(values: torch.Tensor, mask: torch.Tensor, sum_over_ranks: SumOverRanks) -> torch.Tensor:
    """Compute (x − mean) / (deviation + 1e-8) over the elements in `mask` of all ranks. Collective.

    Args:
        values: `[B, T]` x, this rank's.
        mask: `[B, T]` bool.
        sum_over_ranks: as in `moments`.

    Returns:
        `[B, T]`, 0 outside `mask`.
    """
    mean, variance = moments(values[mask], sum_over_ranks)
    return ((values - mean) / (variance.sqrt() + 1e-8)).to(values.dtype).masked_fill(~mask, 0.0)


def moments(values: torch.Tensor, sum_over_ranks: SumOverRanks) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute mean and variance over the elements of all ranks. Collective.

    Two passes, so that neither depends on the elements' distribution over ranks by more than rounding.

    Args:
        values: `[n]`, this rank's.
        sum_over_ranks: sums a float64 tensor over the ranks. Called twice.

    Returns:
        Mean and variance, `[]` float64: 0 over no elements.
    """
    values = values.double()
    count, total = sum_over_ranks(values.new_tensor([values.numel(), values.sum()]))
    mean = total / count.clamp(min=1)
    return mean, sum_over_ranks((values - mean).square().sum()) / count.clamp(min=1)


def explained_variance(values: torch.Tensor, returns: torch.Tensor, sum_over_ranks: SumOverRanks) -> float | None:
    """Compute 1 − Var(R − V)/Var(R) over the elements of all ranks. Collective.

    Args:
        values: `[n]` V.
        returns: `[n]` R.
        sum_over_ranks: as in `moments`.

    Returns:
        1 for values that are the returns, 0 for a constant, below 0 for worse. None where all returns are equal, to
        rounding in float32.
    """
    _, residual_variance = moments(returns - values, sum_over_ranks)
    mean, variance = moments(returns, sum_over_ranks)
    return float(1 - residual_variance / variance) if variance > 1e-12 * mean.square() else None
