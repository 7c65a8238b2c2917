"""Group Relative Policy Optimization (arXiv 2402.03300, eq. 3), with separate limits (arXiv 2503.14476)."""

from megatron_bai import config
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl.batches.stages import TrainingBatch
from megatron_bai.rl.objectives.checks import validate_clipping
from megatron_bai.rl.objectives.correction import Correction
from megatron_bai.rl.objectives.objective import Objective, PerToken
from megatron_bai.rl.objectives.terms import (
    add_clip_fractions,
    clipped_surrogate,
    importance_log_ratio,
)


def loss(
    logprobs: PerToken, batch: TrainingBatch, settings: config.Grpo | config.Dapo | config.Ppo
) -> tuple[PerToken, Stats]:
    """Compute −min(r·A, clip(r, 1 − clip_low, 1 + clip_high)·A) at each token, r = π_θ/π_old.

    A response's tokens are averaged, then the responses. A is divided by the group's deviation. The paper's KL penalty
    is an option (`kl_penalty`, k3), and so are the weight π_old/μ_old (`correction`) and a limit of the loss of a token
    with A < 0 whose ratio grows (`dual_clip`).

    Args:
        logprobs: `[B, T]` log π_θ, with gradient.
        batch: `loss_mask`, `old_logprobs`, `advantages` and, for a correction, `infer_logprobs` are used.
        settings: of the objective.

    Returns:
        Losses `[B, T]`, and `clip_fraction`, the share of tokens whose gradient a limit removes, also by sign of A.
    """
    logs = importance_log_ratio(logprobs, batch.old_logprobs, batch, settings)
    advantages = batch.advantages
    stats = Stats()
    correction = Correction(batch, settings, stats)
    losses, clipped = clipped_surrogate(
        logs, advantages, settings.clip_low, settings.clip_high, settings.dual_clip, correction.dropped
    )
    add_clip_fractions(stats, clipped, advantages, batch.loss_mask)
    return correction.apply(losses), stats


OBJECTIVE = Objective(loss, config.Grpo, mean=lambda settings: "sample_mean", check=validate_clipping)
