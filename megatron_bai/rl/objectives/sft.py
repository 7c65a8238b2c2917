"""Supervised training: the cross-entropy of given text."""

from megatron_bai import config
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl.batches.stages import TrainingBatch
from megatron_bai.rl.objectives.objective import Objective, PerToken


def loss(logprobs: PerToken, batch: TrainingBatch, settings: config.Sft) -> tuple[PerToken, Stats]:
    """Compute −log π_θ of each target token.

    Args:
        logprobs: `[B, T]` log π_θ, with gradient.
        batch: `loss_mask` is used.
        settings: of the objective.

    Returns:
        Losses `[B, T]`, and their mean as `cross_entropy` in nats.
    """
    stats = Stats()
    stats.mean("cross_entropy", -logprobs.detach()[batch.loss_mask])
    return -logprobs, stats


OBJECTIVE = Objective(loss, config.Sft, mean=lambda settings: "token_mean", rollouts=False)
