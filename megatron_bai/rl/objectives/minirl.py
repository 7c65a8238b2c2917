"""MiniRL: policy gradient with training–inference correction and clipping (arXiv 2512.01374, eq. 7)."""

import torch

from megatron_bai import config
from megatron_bai.rl.batch import Batch
from megatron_bai.monitor.stats import Stats


def loss(logprobs: torch.Tensor, batch: Batch, settings: config.Objective) -> tuple[torch.Tensor, Stats]:
    """−Σ_i Σ_t M_t · sg[min(π_θ/μ_old, is_max)] · A · log π_θ, with no 1/|y| and no division by the group's std.

    M_t = 0 where (A > 0 and r_t > 1 + clip_high) or (A < 0 and r_t < 1 − clip_low), r_t = π_θ/π_old in the training
    engine; 1 elsewhere.

    Args:
        logprobs: `[B, T]` log π_θ, with gradient.
        batch: `mask`, `old_logprobs`, `infer_logprobs` `[B, T]` and `advantages` `[B]` are used.

    Returns:
        The sum over samples, and the statistics `clip_fraction`, `is_weight` (π_θ/μ_old before truncation) and
        `staleness` (log π_θ/π_old).
    """
    mask, advantage = batch.mask, batch.advantages[:, None]
    live = logprobs.detach()
    # Padding may hold anything; exponentiate only what counts.
    staleness = (live - batch.old_logprobs).masked_fill(~mask, 0.0)
    weight = (live - batch.infer_logprobs).masked_fill(~mask, 0.0).exp()
    ratio = staleness.exp()
    clipped = ((advantage > 0) & (ratio > 1 + settings.clip_high)) | ((advantage < 0) & (ratio < 1 - settings.clip_low))
    kept = mask & ~clipped
    coefficient = (weight.clamp(max=settings.is_max) * advantage).masked_fill(~kept, 0.0)
    total = -(coefficient * logprobs.masked_fill(~mask, 0.0)).sum()
    stats = Stats()
    stats.mean("clip_fraction", clipped[mask])
    stats.mean("is_weight_mean", weight[mask])
    stats.max("is_weight_max", weight[mask])
    stats.mean("staleness", staleness[mask])
    return total, stats
