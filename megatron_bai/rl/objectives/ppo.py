"""Proximal Policy Optimization with a critic (arXiv 1707.06347), as BAI's paper trains (arXiv 2509.00309).

The losses of actor and critic; `advantages.gae` goes with them. The trainer has no critic: there is no `objective=ppo`.
"""

import torch

from megatron_bai.monitor.stats import Stats
from megatron_bai.rl.objectives.objective import PerToken
from megatron_bai.rl.objectives.terms import clipped_surrogate, log_ratio


def actor_loss(
    logprobs: PerToken, old: PerToken, advantages: PerToken, mask: PerToken, low: float = 0.2, high: float = 0.2
) -> tuple[PerToken, Stats]:
    """−min(r·A_t, clip(r, 1 − low, 1 + high)·A_t), r = π_θ/π_old (eq. 7), with an advantage for each token.

    Args:
        logprobs, old: log π_θ, with gradient, and log π_old.

    Returns:
        Losses, 0 outside `mask`, and `clip_fraction`.
    """
    losses, clipped = clipped_surrogate(log_ratio(logprobs, old, mask), advantages, low, high)
    stats = Stats()
    stats.mean("clip_fraction", clipped[mask])
    return losses.masked_fill(~mask, 0.0), stats


def critic_loss(
    values: PerToken, old: PerToken, returns: PerToken, mask: PerToken, clip: float = 0.2
) -> tuple[PerToken, Stats]:
    """½ max((V − R)², (V_clip − R)²), V_clip = V_old + clip(V − V_old, ±clip): V gains nothing by leaving V_old by more
    than `clip` (value clipping, from the authors' implementation of the paper; inf switches it off).

    Args:
        values: V of the states before each token, with gradient.
        old: V when the batch was sampled.
        returns: R, the targets, as `advantages.gae` gives them.

    Returns:
        Losses, 0 outside `mask`; `value_clip_fraction`, where the bounded error is the larger, and `value_error`, the
        mean of (V − R)².
    """
    values, old, returns = (each.masked_fill(~mask, 0.0) for each in (values, old, returns))
    limited = values.clamp(old - clip, old + clip)
    plain, bounded = (values - returns).square(), (limited - returns).square()
    stats = Stats()
    stats.mean("value_clip_fraction", (bounded > plain)[mask])
    stats.mean("value_error", plain.detach()[mask])
    return torch.maximum(plain, bounded) / 2, stats
