"""Divergence Proximal Policy Optimization (arXiv 2602.04879, eq. 11 to 14)."""

from megatron_bai import config
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl.batches.stages import TrainingBatch
from megatron_bai.rl.objectives.divergence import binary_kl, binary_tv
from megatron_bai.rl.objectives.minirl import mean
from megatron_bai.rl.objectives.objective import Objective, PerToken
from megatron_bai.rl.objectives.terms import (
    add_clip_fractions,
    coefficients,
    importance_log_ratio,
)

_DELTA = {"tv": 0.15, "kl": 0.05}  # of the authors' recipes, in verl's examples/dppo_trainer


def loss(logprobs: PerToken, batch: TrainingBatch, settings: config.Dppo) -> tuple[PerToken, Stats]:
    """Compute −M_t · sg[min(π_θ/μ_old, is_max)] · A · log π_θ at each token: the gradient of −M_t · π_θ/μ_old · A.

    M_t = 0 where the token has left the trust region on the side that A pushes to (eq. 12): D > δ with A > 0 and
    π_θ > μ_old, or with A < 0 and π_θ < μ_old. D is the binary total variation |π_θ − μ_old|, or the binary
    KL(μ_old ‖ π_θ). `anchor=training` puts π_old in μ_old's place in M_t, the authors' ablation.

    Args:
        logprobs: `[B, T]` log π_θ, with gradient.
        batch: `loss_mask`, `infer_logprobs`, `old_logprobs` and `advantages` are used.
        settings: of the objective.

    Returns:
        Losses `[B, T]`; `clip_fraction`, the share of tokens with M_t = 0, also by sign of A, and the mean of D as
        `divergence_mean`.
    """
    mask, advantages = batch.loss_mask, batch.advantages
    new = logprobs.detach().masked_fill(~mask, 0.0)
    anchor = batch.infer_logprobs if settings.anchor == "inference" else batch.old_logprobs
    anchor = anchor.masked_fill(~mask, 0.0)
    divergence = binary_tv(anchor, new) if settings.divergence == "tv" else binary_kl(anchor, new)
    limit = _DELTA[settings.divergence] if settings.delta is None else settings.delta
    away = ((advantages > 0) & (new > anchor)) | ((advantages < 0) & (new < anchor))
    clipped = away & (divergence > limit)
    weight = importance_log_ratio(logprobs.detach(), batch.infer_logprobs, batch, settings).exp()
    weight = weight.clamp(max=settings.is_max)
    stats = Stats()
    add_clip_fractions(stats, clipped, advantages, mask)
    stats.mean("divergence_mean", divergence[mask])
    coefficient = coefficients(weight, advantages).masked_fill(clipped, 0.0)
    return -coefficient * logprobs.masked_fill(~mask, 0.0), stats


OBJECTIVE = Objective(loss, config.Dppo, mean)
