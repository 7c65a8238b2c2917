"""Soft Adaptive Policy Optimization (arXiv 2511.20347)."""

import torch

from megatron_bai import config
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl.batches.stages import TrainingBatch
from megatron_bai.rl.objectives.checks import validate_clipping
from megatron_bai.rl.objectives.correction import Correction
from megatron_bai.rl.objectives.objective import Objective, PerToken
from megatron_bai.rl.objectives.terms import importance_log_ratio


def loss(logprobs: PerToken, batch: TrainingBatch, settings: config.Sapo) -> tuple[PerToken, Stats]:
    """Compute −4/τ · σ(τ·(r − 1)) · A at each token, r = π_θ/π_old, τ = tau_positive where A > 0, else tau_negative.

    The gradient is −g·r·A with g = 4·p·(1 − p), p = σ(τ·(r − 1)): 1 at r = 1, and falling to 0 as the ratio leaves it
    on either side. (The paper's soft gate; the number of its equation was not looked up.)

    Args:
        logprobs: `[B, T]` log π_θ, with gradient.
        batch: `loss_mask`, `old_logprobs`, `advantages` and, for a correction, `infer_logprobs` are used.
        settings: of the objective.

    Returns:
        Losses `[B, T]`, and the mean of g as `gate_mean`.
    """
    advantages = batch.advantages
    logs = importance_log_ratio(logprobs, batch.old_logprobs, batch, settings)
    stats = Stats()
    correction = Correction(batch, settings, stats)
    tau = torch.full_like(advantages, settings.tau_negative).masked_fill(advantages > 0, settings.tau_positive)
    beyond = logs.detach().exp().isinf()  # g·r is 0 there, but autograd would take 0 · ∞
    slope = tau * (logs.masked_fill(beyond | correction.dropped, 0.0).exp() - 1)
    above = slope > 0
    small = torch.where(above, -slope, slope).sigmoid()  # min(p, 1 − p): its rounding is relative to what is small
    stats.mean("gate_mean", (4 * small * (1 - small)).detach().masked_fill(beyond, 0.0)[batch.loss_mask])
    gate = torch.where(above, 1 - small, small).masked_fill(beyond, 1.0)
    return correction.apply(-4 / tau * gate * advantages), stats


OBJECTIVE = Objective(loss, config.Sapo, mean=lambda settings: "sample_mean", check=validate_clipping)
