"""Correction of a loss for the discrepancy between the engines: importance weights π_old/μ_old, truncated or masked.

Truncated importance sampling (TIS) multiplies a token's loss by min(π_old/μ_old, C). Its peers put 0 where the weight
is above C (masking), or take the whole response's weight, Π_t π_old/μ_old, at each of its tokens (sequence level).
"""

from megatron_bai import config
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl.batches.batch import Batch
from megatron_bai.rl.objectives.objective import PerToken
from megatron_bai.rl.objectives.terms import log_ratio, sequence_log_ratio

CORRECTIONS = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def correction_weights(
    old: PerToken, infer: PerToken, mask: PerToken, correction: str, limit: float
) -> tuple[PerToken, PerToken]:
    """Compute importance weights w = π_old/μ_old, without gradient.

    Args:
        old: `[B, T]` log π_old.
        infer: `[B, T]` log μ_old.
        mask: `[B, T]` bool, the response's tokens.
        correction: one of `CORRECTIONS` but none.
        limit: C.

    Returns:
        min(w, C), or w where w ≤ C and else 0; and where w > C (bool).
    """
    logs = log_ratio(old, infer, mask)
    weight = (sequence_log_ratio(logs) if correction.startswith("sequence") else logs).exp()
    over = weight > limit
    return weight.masked_fill(over, limit if correction.endswith("truncate") else 0.0), over


def apply_correction(losses: PerToken, batch: Batch, settings: config.Corrected, stats: Stats) -> PerToken:
    """Multiply losses by their weights; add `corrected_fraction`, the share of tokens whose weight is above C.

    Args:
        losses: `[B, T]`.
        batch: `mask`, `old_logprobs` and `infer_logprobs` are used.
        settings: of the objective.
        stats: gets the metric.
    """
    if settings.correction == "none":
        return losses
    weight, over = correction_weights(
        batch.old_logprobs, batch.infer_logprobs, batch.mask, settings.correction, settings.correction_max
    )
    stats.mean("corrected_fraction", over[batch.mask])
    return losses * weight
