"""Advantages: of samples, from their group's rewards, or of tokens, from a critic's values."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_bai.config.objectives import ADVANTAGES

SumOverRanks = Callable[[torch.Tensor], torch.Tensor]  # a tensor's sum over the data-parallel ranks


@dataclass(frozen=True)
class GroupRewards:
    """The rewards of B samples, the samples of a group side by side.

    Attributes:
        values: `[groups, group_size]` float64, 0 where there is none.
        valid: `[groups, group_size]` bool, where there is one.
    """

    values: np.ndarray
    valid: np.ndarray

    @staticmethod
    def of(rewards: Sequence[float | None], group_size: int) -> "GroupRewards":
        """Return the rewards as groups.

        Args:
            rewards: of each sample; None: it has none.
            group_size: samples of a group.
        """
        values = np.array([reward or 0.0 for reward in rewards], dtype=np.float64)
        valid = np.array([reward is not None for reward in rewards], dtype=bool)
        return GroupRewards(values.reshape(-1, group_size), valid.reshape(-1, group_size))

    def compute_advantages(self, estimator: str) -> np.ndarray:
        """Compute the advantage A of each sample from the rewards R of its group.

        Samples without a reward are in no mean and no deviation, and their A is 0; so is that of a sample without
        another to compare it with, and exactly so in a group of equal rewards, whose mean may be rounded (three times
        0.1).

        Args:
            estimator: `centred` is R − mean of the group's R, without a division by the standard deviation (arXiv
                2512.01374). `normalised` is (R − mean) / (their standard deviation + 1e-6) (GRPO, arXiv 2402.03300),
                with one less than the samples with a reward in the deviation's denominator, as in the implementations;
                the paper does not specify it. `leave_one_out` is R − mean of the *other* samples' R (RLOO, arXiv
                2402.14740), an unbiased baseline.

        Returns:
            `[B]` float64.
        """
        assert estimator in ADVANTAGES, f"no estimator {estimator!r}"
        count = self.valid.sum(axis=1, keepdims=True)
        num_others = np.maximum(count - 1, 1)
        centred = self.values - self.values.sum(axis=1, keepdims=True) / np.maximum(count, 1)
        advantages = np.where(self.valid & ~self._is_uniform[:, None], centred, 0.0)
        if estimator == "normalised":
            deviation = np.sqrt((advantages**2).sum(axis=1, keepdims=True) / num_others)
            advantages = advantages / (deviation + 1e-6)
        elif estimator == "leave_one_out":
            advantages = advantages * (count / num_others)
        compared: np.ndarray = advantages.reshape(-1) * self.has_peer
        return compared

    @property
    def has_peer(self) -> np.ndarray:
        """`[B]` bool, samples with a reward that another sample of their group has, too."""
        has_peer: np.ndarray = self.valid & (self.valid.sum(axis=1, keepdims=True) > 1)
        return has_peer.reshape(-1)

    @property
    def in_uniform_group(self) -> np.ndarray:
        """`[B]` bool, samples of a group whose rewards are all equal, so that there is nothing to learn from it."""
        return np.repeat(self._is_uniform, self.valid.shape[1])

    @property
    def in_complete_group(self) -> np.ndarray:
        """`[B]` bool, samples of a group all of which have a reward."""
        return np.repeat(self.valid.all(axis=1), self.valid.shape[1])

    @property
    def _is_uniform(self) -> np.ndarray:
        """`[groups]` bool, whether the rewards that there are do not differ."""
        lowest, highest = (np.where(self.valid, self.values, fill) for fill in (np.inf, -np.inf))
        uniform: np.ndarray = lowest.min(axis=1) >= highest.max(axis=1)
        return uniform


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


def place_rewards(rewards: torch.Tensor, mask: torch.Tensor, turn_rewards: torch.Tensor | None = None) -> torch.Tensor:
    """Put each response's reward at its last token, less what is of earlier turns, which is at theirs.

    Args:
        rewards: `[B]`, of responses, of all turns together.
        mask: `[B, T]` bool, the response's tokens.
        turn_rewards: `[B, T]`, of earlier turns; None: nothing. What is outside the mask stays with the last token.

    Returns:
        `[B, T]`, 0 elsewhere; it sums to `rewards`.
    """
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    if turn_rewards is None:
        return rewards[:, None] * last
    earlier = turn_rewards.masked_fill(~mask, 0.0)
    return (rewards - earlier.sum(1))[:, None] * last + earlier


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
