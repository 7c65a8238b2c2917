"""Correction of a loss for the discrepancy between the engines: importance weights π_old/μ_old, truncated or masked.

Truncated importance sampling (TIS) multiplies a token's loss by min(π_old/μ_old, C). Its peers put 0 where the weight
is above C (masking), or take the whole response's weight, Π_t π_old/μ_old, at each of its tokens (sequence level).
IcePop (arXiv 2510.18855) masks a weight below a lower limit, too. KPop (Guo et al., 2026) masks by divergences instead
of by the weight: where KL(π_old ‖ μ_old) or KL(μ_old ‖ π_old) of the token against all others is above φ.
"""

import torch

from megatron_bai import config
from megatron_bai.config.objectives import CORRECTIONS as CORRECTIONS
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl.batches.stages import TrainingBatch
from megatron_bai.rl.objectives.divergence import binary_kl
from megatron_bai.rl.objectives.objective import PerToken
from megatron_bai.rl.objectives.terms import log_ratio, sequence_log_ratio


def correction_weights(
    old: PerToken, infer: PerToken, mask: PerToken, settings: config.Corrected
) -> tuple[PerToken, PerToken]:
    """Compute importance weights w = π_old/μ_old, limited as the settings say, without gradient.

    Args:
        old: `[B, T]` log π_old.
        infer: `[B, T]` log μ_old.
        mask: `[B, T]` bool, the response's tokens.
        settings: `correction`, which is not none, and its limits.

    Returns:
        The limited weights, and where a limit holds (bool): there w is C, or 0.
    """
    logs = log_ratio(old, infer, mask)
    weight = (sequence_log_ratio(logs) if settings.correction.startswith("sequence") else logs).exp()
    if settings.correction == "token_kpop":
        old, infer = (values.masked_fill(~mask, 0.0) for values in (old, infer))
        outside = torch.maximum(binary_kl(old, infer), binary_kl(infer, old)) > settings.correction_kl
    else:
        outside = (weight > settings.correction_max) | (weight < settings.correction_min)
    limit = settings.correction_max if settings.correction.endswith("truncate") else 0.0
    return weight.masked_fill(outside, limit), outside


class Correction:
    """The weights of a batch's tokens.

    Attributes:
        dropped: `[B, T]` bool, tokens outside the mask and those that masking leaves out: their loss becomes 0.
    """

    def __init__(self, batch: TrainingBatch, settings: config.Corrected, stats: Stats):
        """Compute the weights; add `corrected_fraction`, the share of tokens whose weight a limit holds.

        Args:
            batch: `loss_mask`, `old_logprobs`, `infer_logprobs` and `advantages` are used.
            settings: of the objective.
            stats: gets the metric, unless there is no correction.
        """
        self.dropped, self._weight = ~batch.loss_mask, None
        if settings.correction == "none":
            return
        weight, outside = correction_weights(batch.old_logprobs, batch.infer_logprobs, batch.loss_mask, settings)
        stats.mean("corrected_fraction", outside[batch.loss_mask])
        if not settings.correction.endswith("truncate"):
            self.dropped = self.dropped | outside
        # Without a maximum a weight may be infinite, and times the loss 0 of a token without advantage be NaN.
        self._weight = weight.masked_fill(self.dropped | (batch.advantages == 0), 0.0)

    def apply(self, losses: PerToken) -> PerToken:
        """Multiply losses `[B, T]` by their weights; those of dropped tokens may be anything."""
        return losses if self._weight is None else losses.masked_fill(self.dropped, 0.0) * self._weight
