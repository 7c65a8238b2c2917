"""Proximal Policy Optimization with a critic (arXiv 1707.06347), as BAI's paper trains (arXiv 2509.00309).

The actor's loss is GRPO's, eq. 7 of the paper, with an advantage for each token and one mean over all tokens. The
advantages come from `advantages.gae`; `rl/policy/critic.py` has the model that the critic's loss trains.
"""

import torch

from megatron_bai import config
from megatron_bai.errors import UserError
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl.objectives import grpo
from megatron_bai.rl.objectives.checks import validate_clipping
from megatron_bai.rl.objectives.objective import Objective, PerToken


def critic_loss(
    values: PerToken, old: PerToken, returns: PerToken, mask: PerToken, clip: float = 0.2
) -> tuple[PerToken, Stats]:
    """Compute ½ max((V − R)², (V_clip − R)²), V_clip = V_old + clip(V − V_old, ±clip).

    V gains nothing by leaving V_old by more than `clip` (value clipping, as the authors implement the paper).

    Args:
        values: `[B, T]` V of the states before each token, with gradient.
        old: `[B, T]` V when the batch was sampled.
        returns: `[B, T]` R, the targets, as `advantages.gae` gives them.
        mask: `[B, T]` bool, the response's tokens.
        clip: bound of V − V_old; inf switches it off.

    Returns:
        Losses `[B, T]`, 0 outside `mask`; `value_clip_fraction`, where the bounded error is the larger, and
        `value_error`, the mean of (V − R)².
    """
    values, old, returns = (tensor.masked_fill(~mask, 0.0) for tensor in (values, old, returns))
    limited = values.clamp(old - clip, old + clip)
    plain, bounded = (values - returns).square(), (limited - returns).square()
    stats = Stats()
    stats.mean("value_clip_fraction", (bounded > plain)[mask])
    stats.mean("value_error", plain.detach()[mask])
    return torch.maximum(plain, bounded) / 2, stats


def check(settings: config.Ppo) -> None:
    """Validate the settings by name."""
    validate_clipping(settings)
    if settings.critic_save and settings.critic_save == settings.critic_checkpoint:
        raise UserError(f"objective.critic_save and objective.critic_checkpoint are both {settings.critic_save}")


OBJECTIVE = Objective(grpo.loss, config.Ppo, mean=lambda settings: "token_mean", check=check)
