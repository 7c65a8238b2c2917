"""Geometric-Mean Policy Optimization (arXiv 2507.20673)."""

import torch

from megatron_bai import config
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl.batches.stages import TrainingBatch
from megatron_bai.rl.objectives.checks import validate_clipping
from megatron_bai.rl.objectives.correction import Correction
from megatron_bai.rl.objectives.objective import Objective, PerToken
from megatron_bai.rl.objectives.terms import (
    add_clip_fractions,
    importance_log_ratio,
    response_lengths,
    sequence_log_ratio,
)


def loss(logprobs: PerToken, batch: TrainingBatch, settings: config.Gmpo) -> tuple[PerToken, Stats]:
    """Compute −ρ·A of each response, ρ the geometric mean of its tokens' clipped ratios.

    log ρ = (1/|y|) Σ_t min(x_t, clip_high) where A ≥ 0, and (1/|y|) Σ_t max(x_t, −clip_low) where A < 0, with
    x_t = log π_θ/π_old: the limits are those of the logarithm, token by token, and the loss of a response has gradient
    in its tokens that no limit holds. (As the authors implement it; the number of the equation was not looked up.)

    Args:
        logprobs: `[B, T]` log π_θ, with gradient.
        batch: `loss_mask`, `old_logprobs`, `advantages`, the same at all tokens of a sample, and, for a correction,
            `infer_logprobs` are used.
        settings: of the objective.

    Returns:
        Losses `[B, T]`, and `clip_fraction`, the share of tokens that a limit holds, also by sign of A.
    """
    mask, advantages = batch.loss_mask, batch.advantages
    logs = importance_log_ratio(logprobs, batch.old_logprobs, batch, settings)
    stats = Stats()
    correction = Correction(batch, settings, stats)
    clipped = ((advantages > 0) & (logs > settings.clip_high)) | ((advantages < 0) & (logs < -settings.clip_low))
    add_clip_fractions(stats, clipped, advantages, mask)
    limit = torch.full_like(advantages, -settings.clip_low).masked_fill(advantages > 0, settings.clip_high)
    means = sequence_log_ratio(torch.where(clipped, limit, logs)) / response_lengths(mask)
    flat = correction.dropped | (advantages == 0)  # no loss, however far it went: ∞ · 0 is NaN
    return correction.apply(-means.masked_fill(flat, 0.0).exp() * advantages), stats


OBJECTIVE = Objective(loss, config.Gmpo, mean=lambda settings: "sample_mean", check=validate_clipping)
