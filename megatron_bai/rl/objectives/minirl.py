"""MiniRL: policy gradient with training–inference correction and clipping (arXiv 2512.01374, eq. 7)."""

from megatron_bai import config
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl.batches.stages import TrainingBatch
from megatron_bai.rl.objectives.checks import refuse_unused
from megatron_bai.rl.objectives.objective import Mean, Objective, PerToken
from megatron_bai.rl.objectives.terms import (
    add_clip_fractions,
    coefficients,
    importance_log_ratio,
    outside_trust_region,
)


def loss(logprobs: PerToken, batch: TrainingBatch, settings: config.Minirl) -> tuple[PerToken, Stats]:
    """Compute −M_t · sg[min(π_θ/μ_old, is_max)] · A · log π_θ at each token.

    M_t = 0 where (A > 0 and r_t > 1 + clip_high) or (A < 0 and r_t < 1 − clip_low), r_t = π_θ/π_old in the training
    engine; 1 elsewhere. The paper sums over a response's tokens, without 1/|y|, and A is not divided by the group's
    deviation. Ablations: `clip=false` sets M_t = 1, `train_infer_is=false` puts π_θ/π_old in the weight's place, which
    leaves out the discrepancy π_old/μ_old, and `length_norm=true` takes the mean over a response's tokens.

    Args:
        logprobs: `[B, T]` log π_θ, with gradient.
        batch: `loss_mask`, `old_logprobs`, `infer_logprobs` and `advantages` are used.
        settings: of the objective.

    Returns:
        Losses `[B, T]`, and `clip_fraction`, the share of tokens with M_t = 0, also by sign of A.
    """
    mask, advantages = batch.loss_mask, batch.advantages
    detached_logprobs = logprobs.detach()
    ratio = importance_log_ratio(detached_logprobs, batch.old_logprobs, batch, settings).exp()
    weight = ratio
    if settings.train_infer_is:
        weight = importance_log_ratio(detached_logprobs, batch.infer_logprobs, batch, settings).exp()
    coefficient = coefficients(weight.clamp(max=settings.is_max), advantages)
    stats = Stats()
    if settings.clip:
        clipped = outside_trust_region(ratio, advantages, settings.clip_low, settings.clip_high)
        coefficient = coefficient.masked_fill(clipped, 0.0)
        add_clip_fractions(stats, clipped, advantages, mask)
    return -coefficient * logprobs.masked_fill(~mask, 0.0), stats


def mean(settings: config.Minirl) -> Mean:
    """Return how tokens are averaged: the paper's sum over a response's tokens, or `length_norm`'s mean."""
    return "sample_mean" if settings.length_norm else "sample_sum"


def check(settings: config.Minirl) -> None:
    """Validate the settings by name."""
    if not settings.clip:
        refuse_unused(settings, ["clip_low", "clip_high"], "objective.clip=false")


OBJECTIVE = Objective(loss, config.Minirl, mean, check)
