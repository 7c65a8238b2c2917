"""Group Sequence Policy Optimization (arXiv 2507.18071, eq. 5 to 7)."""

from megatron_bai import config
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl.batches.stages import TrainingBatch
from megatron_bai.rl.objectives.checks import validate_clipping
from megatron_bai.rl.objectives.correction import Correction
from megatron_bai.rl.objectives.objective import Objective, PerToken
from megatron_bai.rl.objectives.terms import (
    add_clip_fractions,
    clipped_surrogate,
    importance_log_ratio,
    response_lengths,
    sequence_log_ratio,
)


def loss(logprobs: PerToken, batch: TrainingBatch, settings: config.Gspo) -> tuple[PerToken, Stats]:
    """Compute −min(s·A, clip(s, 1 − clip_low, 1 + clip_high)·A) of each response, s = (π_θ(y)/π_old(y))^(1/|y|).

    Args:
        logprobs: `[B, T]` log π_θ, with gradient.
        batch: `loss_mask`, `old_logprobs`, `advantages`, the same at all tokens of a sample, and, for a correction,
            `infer_logprobs` are used.
        settings: of the objective.

    Returns:
        Losses `[B, T]`, and `clip_fraction`, the share of tokens in responses whose gradient the limit removes, also by
        sign of A.
    """
    mask = batch.loss_mask
    ratios = importance_log_ratio(logprobs, batch.old_logprobs, batch, settings)
    logs = sequence_log_ratio(ratios) / response_lengths(mask)
    advantages = batch.advantages
    stats = Stats()
    correction = Correction(batch, settings, stats)
    losses, clipped = clipped_surrogate(
        logs, advantages, settings.clip_low, settings.clip_high, dropped=correction.dropped
    )
    add_clip_fractions(stats, clipped, advantages, mask)
    return correction.apply(losses), stats


OBJECTIVE = Objective(loss, config.Gspo, mean=lambda settings: "sample_mean", check=validate_clipping)
