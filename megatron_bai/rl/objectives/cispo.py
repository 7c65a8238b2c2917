"""Clipped importance-sampling policy optimization (arXiv 2506.13585, eq. 4 and 5)."""

from megatron_bai import config
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl.batches.stages import TrainingBatch
from megatron_bai.rl.objectives.checks import validate_clipping
from megatron_bai.rl.objectives.correction import Correction
from megatron_bai.rl.objectives.dapo import token_mean
from megatron_bai.rl.objectives.objective import Objective, PerToken
from megatron_bai.rl.objectives.terms import (
    add_clip_fractions,
    coefficients,
    importance_log_ratio,
)


def loss(logprobs: PerToken, batch: TrainingBatch, settings: config.Cispo) -> tuple[PerToken, Stats]:
    """Compute −sg[clip(r, 1 − clip_low, 1 + clip_high)] · A · log π_θ at each token, r = π_θ/π_old.

    A ratio beyond its limit is clipped and its token still learns, whatever the sign of A.

    Args:
        logprobs: `[B, T]` log π_θ, with gradient.
        batch: `loss_mask`, `old_logprobs`, `advantages` and, for a correction, `infer_logprobs` are used.
        settings: of the objective.

    Returns:
        Losses `[B, T]`, and `clip_fraction`, the share of tokens whose ratio was clipped, also by sign of A.
    """
    mask = batch.loss_mask
    ratio = importance_log_ratio(logprobs.detach(), batch.old_logprobs, batch, settings).exp()
    weight = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    stats = Stats()
    advantages = batch.advantages
    add_clip_fractions(stats, weight != ratio, advantages, mask)
    losses = -coefficients(weight, advantages) * logprobs.masked_fill(~mask, 0.0)
    return Correction(batch, settings, stats).apply(losses), stats


OBJECTIVE = Objective(loss, config.Cispo, token_mean, validate_clipping)
