"""Terms that several objectives share.

The ratio of the policy to the one that sampled has two factors (arXiv 2512.01374):

    π_θ/μ_old  =  π_old/μ_old                           ×  π_θ/π_old
                  training–inference discrepancy            policy staleness
"""

import math

import torch

from megatron_bai import config
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl.batches.stages import TrainingBatch
from megatron_bai.rl.objectives.objective import PerToken


def log_ratio(new: PerToken, old: PerToken, mask: PerToken) -> PerToken:
    """Compute log(new/old) of log-probabilities.

    Args:
        new: `[B, T]`.
        old: `[B, T]`.
        mask: `[B, T]` bool; padding may hold anything.

    Returns:
        `[B, T]`, 0 outside `mask`.
    """
    return (new - old).masked_fill(~mask, 0.0)


def log_router_shift(batch: TrainingBatch, settings: config.RouterShifted) -> PerToken:
    """Return log max(γ, router_shift_min), γ = e^−Δ (RSPO, arXiv 2510.23027 v2, eq. 5 to 9).

    Args:
        batch: `loss_mask` and `router_shift`, which is Δ, are used.
        settings: of the objective.

    Returns:
        `[B, T]` without gradient, 0 outside the mask and where `router_shift=false`.
    """
    if not settings.router_shift:
        return torch.zeros_like(batch.router_shift)
    most = -math.log(settings.router_shift_min) if settings.router_shift_min else math.inf
    return -batch.router_shift.clamp(max=most).masked_fill(~batch.loss_mask, 0.0)


def importance_log_ratio(
    new: PerToken, old: PerToken, batch: TrainingBatch, settings: config.RouterShifted
) -> PerToken:
    """Compute the logarithm of an importance ratio, which γ of the routers multiplies where the settings say so.

    That is before any limit (arXiv 2510.23027 v2, eq. 11).

    Args:
        new: `[B, T]` log π_θ.
        old: `[B, T]` logarithms of the policy that it is compared with.
        batch: `loss_mask` and `router_shift` are used.
        settings: of the objective.

    Returns:
        `[B, T]`, 0 outside the mask.
    """
    logs = log_ratio(new, old, batch.loss_mask)
    return logs + log_router_shift(batch, settings) if settings.router_shift else logs


def add_router_shift(stats: Stats, batch: TrainingBatch, settings: config.RouterShifted) -> None:
    """Add `router_shift_mean`, of γ, and `router_shift_floor_fraction`, the share of tokens with γ below the minimum.

    Args:
        stats: gets the metrics.
        batch: `loss_mask` and `router_shift` are used.
        settings: of the objective.
    """
    shift = (-batch.router_shift[batch.loss_mask].double()).exp()
    stats.mean("router_shift_mean", shift)
    stats.mean("router_shift_floor_fraction", shift < settings.router_shift_min)


def sequence_log_ratio(logs: PerToken) -> PerToken:
    """Return the response's log-ratio, the sum over its tokens, at each of its tokens, `[B, T]`."""
    return logs.sum(1, keepdim=True).expand_as(logs)


def response_lengths(mask: PerToken) -> torch.Tensor:
    """Count the tokens of each response, `[B, 1]`, at least 1."""
    return mask.sum(1, keepdim=True).clamp(min=1)


def coefficients(weight: PerToken, advantages: torch.Tensor) -> PerToken:
    """Compute weight · A, `[B, T]`, in which ∞ · 0 is 0: a token without advantage has no loss, however far it went.

    With an advantage an infinite weight stays infinite, so that the engine finds the gradient not finite.

    Args:
        weight: `[B, T]`, ≥ 0, without gradient; inf beyond its type.
        advantages: `[B, T]` A.
    """
    return (weight * advantages).masked_fill(weight.isinf() & (advantages == 0), 0.0)


def outside_trust_region(ratio: PerToken, advantages: torch.Tensor, low: float, high: float) -> PerToken:
    """Return whether a ratio has left the trust region on the side that its advantage pushes to.

    That is r > 1 + high with A > 0, or r < 1 − low with A < 0.

    Args:
        ratio: `[B, T]` r.
        advantages: `[B, T]` A.
        low: limit below 1.
        high: limit above 1.

    Returns:
        `[B, T]` bool.
    """
    return ((advantages > 0) & (ratio > 1 + high)) | ((advantages < 0) & (ratio < 1 - low))


def clipped_surrogate(
    logs: PerToken,
    advantages: torch.Tensor,
    low: float,
    high: float,
    dual: float = float("inf"),
    dropped: PerToken | None = None,
) -> tuple[PerToken, PerToken]:
    """Compute −min(r·A, clip(r, 1 − low, 1 + high)·A), r = exp(logs) (PPO, arXiv 1707.06347, eq. 7).

    With a dual clip c, the larger of that minimum and c·A where A < 0 (arXiv 1912.09729, eq. 5).

    Where the gradient is 0, autograd takes no ratio: that of one beyond its type is infinite, and 0 · ∞ is NaN. Where
    the gradient is not 0, a ratio beyond its type gives an infinite loss and no finite gradient.

    Args:
        logs: `[B, T]` log r, with gradient.
        advantages: `[B, T]` A.
        low: limit below 1.
        high: limit above 1.
        dual: c, above 1; inf: none.
        dropped: `[B, T]` bool, tokens whose loss the caller multiplies by 0; their loss here is arbitrary but finite.

    Returns:
        The loss `[B, T]`, and `[B, T]` bool, where a limit holds: there the gradient is 0.
    """
    ratio = logs.detach().exp()
    capped = (advantages < 0) & (ratio > dual)
    clipped = outside_trust_region(ratio, advantages, low, high) | capped
    limit = ratio.clamp(1 - low, 1 + high).masked_fill(capped, dual)
    constant = clipped | ((advantages == 0) & ~logs.isnan())
    constant = constant if dropped is None else constant | dropped
    return -torch.where(clipped, limit, logs.masked_fill(constant, 0.0).exp()) * advantages, clipped


def add_clip_fractions(stats: Stats, clipped: PerToken, advantages: torch.Tensor, mask: PerToken) -> None:
    """Add `clip_fraction`, the share of response tokens in `clipped`.

    Its two parts by the sign of the advantage, `clip_fraction_positive` and `clip_fraction_negative`, are shares of all
    response tokens, too.

    Args:
        stats: gets the metrics.
        clipped: `[B, T]` bool.
        advantages: `[B, T]`.
        mask: `[B, T]` bool, the response's tokens.
    """
    stats.mean("clip_fraction", clipped[mask])
    stats.mean("clip_fraction_positive", (clipped & (advantages > 0))[mask])
    stats.mean("clip_fraction_negative", (clipped & (advantages < 0))[mask])


def ratio_metrics(logprobs: PerToken, batch: TrainingBatch) -> Stats:
    """Measure both factors of π_θ/μ_old and their product, over response tokens.

    The policy between the two is the training engine's with the weights that sampled the token: π_old, unless rollouts
    are stale (`rl/experience/staleness.py`). Tokens for which that is not known are in the product alone.

    Args:
        logprobs: `[B, T]` log π_θ.
        batch: `loss_mask`, `sampled_logprobs` and `infer_logprobs` are used.

    Returns:
        Means of the logarithms, `discrepancy` (log π_old/μ_old) and `staleness` (log π_θ/π_old), in nats; mean and
        largest ratio of each factor and of the product, `discrepancy_ratio_mean`, `staleness_ratio_mean`,
        `is_weight_mean` and so on with `_max`; `ess`, the effective sample size of the token weights π_θ/μ_old, as a
        share of the tokens (`Stats.sample_size`).
    """
    new, sampled = logprobs.detach(), batch.sampled_logprobs
    known = batch.loss_mask & ~sampled.isnan()
    discrepancy = (sampled - batch.infer_logprobs)[known].double()
    staleness = (new - sampled)[known].double()
    stats = Stats()
    stats.mean("discrepancy", discrepancy)
    stats.mean("staleness", staleness)
    weights = (new - batch.infer_logprobs)[batch.loss_mask].double()
    ratios = {"discrepancy_ratio": discrepancy, "staleness_ratio": staleness, "is_weight": weights}
    for name, logs in ratios.items():
        stats.mean(f"{name}_mean", logs.exp())
        stats.max(f"{name}_max", logs.exp())
    stats.sample_size("ess", ratios["is_weight"].exp())
    return stats
