"""Correction of a loss for the discrepancy between the engines: importance weights π_old/μ_old, truncated or masked.

Truncated importance sampling (TIS) multiplies a token's loss by min(π_old/μ_old, C). Its peers put 0 where the weight
is above C (masking), or take the whole response's weight, Π_t π_old/μ_old, at each of its tokens (sequence level).
"""

from megatron_bai import config
from megatron_bai.config.objectives import CORRECTIONS as CORRECTIONS
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl.batches.batch import Batch
from megatron_bai.rl.objectives.objective import PerToken
from megatron_bai.rl.objectives.terms import broadcast_advantages, log_ratio, sequence_log_ratio


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


class Correction:
    """The weights of a batch's tokens.

    Attributes:
        dropped: `[B, T]` bool, tokens outside the mask and those that masking leaves out: their loss becomes 0.
    """

    def __init__(self, batch: Batch, settings: config.Corrected, stats: Stats):
        """Compute the weights; add `corrected_fraction`, the share of tokens whose weight is above C.

        Args:
            batch: `mask`, `old_logprobs`, `infer_logprobs` and `advantages` are used.
            settings: of the objective.
            stats: gets the metric, unless there is no correction.
        """
        self.dropped, self._weight = ~batch.mask, None
        if settings.correction == "none":
            return
        weight, over = correction_weights(
            batch.old_logprobs, batch.infer_logprobs, batch.mask, settings.correction, settings.correction_max
        )
        stats.mean("corrected_fraction", over[batch.mask])
        if settings.correction.endswith("mask"):
            self.dropped = self.dropped | over
        # Without a maximum a weight may be infinite, and times the loss 0 of a token without advantage be NaN.
        self._weight = weight.masked_fill(self.dropped | (broadcast_advantages(batch.advantages) == 0), 0.0)

    def apply(self, losses: PerToken) -> PerToken:
        """Multiply losses `[B, T]` by their weights; those of dropped tokens may be anything."""
        return losses if self._weight is None else losses.masked_fill(self.dropped, 0.0) * self._weight
