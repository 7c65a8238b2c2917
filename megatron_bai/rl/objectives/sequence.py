"""The sequence-level objective that token-level ones approximate to first order (arXiv 2512.01374)."""

from megatron_bai import config
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl.batches.stages import TrainingBatch
from megatron_bai.rl.objectives.objective import Objective, PerToken
from megatron_bai.rl.objectives.terms import (
    coefficients,
    importance_log_ratio,
    sequence_log_ratio,
)


def loss(logprobs: PerToken, batch: TrainingBatch, settings: config.Sequence) -> tuple[PerToken, Stats]:
    """Compute −min(w, is_max) · A of each response, w = π_θ(y)/μ_old(y) = Π_t π_θ/μ_old.

    The gradient is −min(w, is_max) · A · ∇ log π_θ(y): truncation bounds a response's weight, it does not drop it.

    Args:
        logprobs: `[B, T]` log π_θ, with gradient.
        batch: `loss_mask`, `infer_logprobs` and `advantages`, the same at all tokens of a sample, are used.
        settings: of the objective.

    Returns:
        Losses `[B, T]`, and the response's weight before truncation: `sequence_weight_mean` and `sequence_weight_max`,
        over tokens. Its spread grows exponentially with the length, which is why token-level objectives exist.
    """
    logs = sequence_log_ratio(importance_log_ratio(logprobs, batch.infer_logprobs, batch, settings))
    weight = logs.detach().exp()
    stats = Stats()
    stats.mean("sequence_weight_mean", weight[batch.loss_mask])
    stats.max("sequence_weight_max", weight[batch.loss_mask])
    coefficient = coefficients(weight.clamp(max=settings.is_max), batch.advantages)
    return -coefficient * (1 + logs - logs.detach()), stats


OBJECTIVE = Objective(loss, config.Sequence, mean=lambda settings: "sample_mean")
