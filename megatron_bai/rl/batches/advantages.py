"""From rewards to advantages: of samples, from their group's rewards, or of tokens, from a critic's values."""

from collections.abc import Callable

import numpy as np
import torch

Total = Callable[[torch.Tensor], torch.Tensor]  # a tensor's sum over the data-parallel ranks

ESTIMATORS = ("centred", "normalised", "leave_one_out")


def group_centred(rewards: np.ndarray, group_size: int, valid: np.ndarray | None = None) -> np.ndarray:
    """A = R − mean of the group's R (arXiv 2512.01374): no division by the standard deviation.

    Args:
        rewards: `[groups · group_size]`, the samples of a group side by side.
        valid: `[groups · group_size]` bool, the samples that have a reward; None: all. The others are in no mean and no
            deviation, and their A is 0; so is that of a sample without another to compare it with.

    Returns:
        `[groups · group_size]` float64.
    """
    groups, has, count = _grouped(rewards, group_size, valid)
    advantages: np.ndarray = _centred(groups, has, count) * _compared(has, count)
    return advantages.reshape(-1)


def group_normalised(
    rewards: np.ndarray, group_size: int, valid: np.ndarray | None = None, epsilon: float = 1e-6
) -> np.ndarray:
    """A = (R − mean of the group's R) / (their standard deviation + epsilon) (GRPO, arXiv 2402.03300).

    The deviation has n − 1 in its denominator, n being the samples with a reward, as in the implementations; the paper
    does not say.
    """
    groups, has, count = _grouped(rewards, group_size, valid)
    centred = _centred(groups, has, count)
    deviation = np.sqrt((centred**2).sum(axis=1, keepdims=True) / np.maximum(count - 1, 1))
    advantages: np.ndarray = centred / (deviation + epsilon) * _compared(has, count)
    return advantages.reshape(-1)


def leave_one_out(rewards: np.ndarray, group_size: int, valid: np.ndarray | None = None) -> np.ndarray:
    """A = R − mean of the *other* samples' R in the group (RLOO, arXiv 2402.14740): the baseline is unbiased."""
    groups, has, count = _grouped(rewards, group_size, valid)
    others = count / np.maximum(count - 1, 1)
    advantages: np.ndarray = _centred(groups, has, count) * others * _compared(has, count)
    return advantages.reshape(-1)


def of_groups(rewards: np.ndarray, group_size: int, estimator: str, valid: np.ndarray | None = None) -> np.ndarray:
    """Advantages by the estimator's name, one of `ESTIMATORS`. Shapes as in `group_centred`."""
    return {"centred": group_centred, "normalised": group_normalised, "leave_one_out": leave_one_out}[estimator](
        rewards, group_size, valid
    )


def uniform(rewards: np.ndarray, group_size: int, valid: np.ndarray | None = None) -> np.ndarray:
    """`[groups · group_size]` bool: the rewards in the sample's group are all equal, from which there is nothing to
    learn."""
    groups, has, _ = _grouped(rewards, group_size, valid)
    lowest = np.where(has, groups, np.inf).min(axis=1)
    highest = np.where(has, groups, -np.inf).max(axis=1)
    return np.repeat(lowest >= highest, group_size)


def comparable(valid: np.ndarray, group_size: int) -> np.ndarray:
    """`[groups · group_size]` bool: the sample has a reward, and so has another one of its group."""
    has = valid.reshape(-1, group_size)
    return _compared(has, has.sum(axis=1, keepdims=True)).reshape(-1)


def _grouped(
    rewards: np.ndarray, group_size: int, valid: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`[groups, group_size]` rewards, 0 where there is none; which there are; `[groups, 1]` how many."""
    groups = np.asarray(rewards, dtype=np.float64).reshape(-1, group_size)
    has = np.ones(groups.shape, dtype=bool) if valid is None else np.asarray(valid, dtype=bool).reshape(groups.shape)
    return np.where(has, groups, 0.0), has, has.sum(axis=1, keepdims=True)


def _centred(groups: np.ndarray, has: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.where(has, groups - groups.sum(axis=1, keepdims=True) / np.maximum(count, 1), 0.0)


def _compared(has: np.ndarray, count: np.ndarray) -> np.ndarray:
    return has & (count > 1)


@torch.no_grad()
def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16).

    A_t = Σ_l (γλ)^l δ_{t+l} with the temporal differences δ_t = r_t + γ·V_{t+1} − V_t.

    Args:
        rewards: `[B, T]` r, of each action.
        values: `[B, T]` V of the state before each action; after a response's last token it is 0.
        mask: `[B, T]` bool, the response's tokens. What is left out between two of them takes no time: t + 1 is the
            next token in the mask.

    Returns:
        Advantages A and returns A + V, the critic's targets, `[B, T]`, 0 outside the mask.
    """
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(values)
    following = ahead = torch.zeros_like(values[:, 0])  # A and V of the next token
    for t in reversed(range(values.shape[1])):
        here = mask[:, t]
        advantage = rewards[:, t] + gamma * ahead - values[:, t] + gamma * lam * following
        following, ahead = advantage.where(here, following), values[:, t].where(here, ahead)
        advantages[:, t] = advantage * here
    return advantages, advantages + values


def at_the_end(rewards: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Rewards of responses `[B]` at the last token of each in `mask`, `[B, T]`; 0 elsewhere."""
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return rewards[:, None] * last


def whitened(values: torch.Tensor, mask: torch.Tensor, total: Total) -> torch.Tensor:
    """(x − mean) / (deviation + 1e-8) over the elements in `mask` of all ranks; 0 outside it.

    Args:
        values, mask: `[B, T]`, this rank's.
        total: as `moments` has it.
    """
    mean, variance = moments(values[mask], total)
    return ((values - mean) / (variance.sqrt() + 1e-8)).to(values.dtype).masked_fill(~mask, 0.0)


def moments(values: torch.Tensor, total: Total) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance, `[]` float64, over the elements of all ranks: 0 over none. Two passes, so that neither depends
    on how the elements lie on the ranks by more than rounding.

    Args:
        total: sums a float64 tensor over the ranks. Called twice.
    """
    values = values.double()
    count, summed = total(values.new_tensor([values.numel(), values.sum()]))
    mean = summed / count.clamp(min=1)
    return mean, total((values - mean).square().sum()) / count.clamp(min=1)


def explained_variance(values: torch.Tensor, returns: torch.Tensor, total: Total) -> float | None:
    """1 − Var(R − V)/Var(R) over the elements of all ranks: 1 for values that are the returns, 0 for a constant, below
    0 for worse. None where all returns are equal, to rounding in float32.

    Args:
        values, returns: V and R, `[n]` each.
        total: as `moments` has it.
    """
    _, left = moments(returns - values, total)
    mean, whole = moments(returns, total)
    return float(1 - left / whole) if whole > 1e-12 * mean.square() else None
