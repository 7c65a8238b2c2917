"""Divergence Regularized Policy Optimization: DPPO with a smooth regulariser for its mask (arXiv 2606.09821, eq. 8)."""

import torch

from megatron_bai import config
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl.batches.stages import TrainingBatch
from megatron_bai.rl.objectives.minirl import mean
from megatron_bai.rl.objectives.objective import Objective, PerToken
from megatron_bai.rl.objectives.terms import log_ratio, log_router_shift


def loss(logprobs: PerToken, batch: TrainingBatch, settings: config.Drpo) -> tuple[PerToken, Stats]:
    """Compute −r·A + |A|/(2δ) · μ_old · (r − 1)² at each token, r = π_θ/μ_old.

    The gradient is −A·r·w with w = 1 − sign(A·(r − 1)) · |π_θ − μ_old|/δ: where A pushes a token away from μ_old, w
    falls to 0 at a shift of δ and pulls it back beyond; where A pushes it towards μ_old, w is above 1.

    With `router_shift` γ multiplies the whole: it scales the ratio, and must not move the point that the regulariser
    pulls to.

    Args:
        logprobs: `[B, T]` log π_θ, with gradient.
        batch: `loss_mask`, `infer_logprobs` and `advantages` are used.
        settings: of the objective.

    Returns:
        Losses `[B, T]`; the mean of w as `gate_mean`, and `corrective_fraction`, the share of tokens with w < 0.
    """
    advantages, delta = batch.advantages, settings.delta
    flat = ~batch.loss_mask | (advantages == 0)  # no loss, however far it went: ∞ · 0 is NaN
    logs = log_ratio(logprobs, batch.infer_logprobs, ~flat)
    sampled = batch.infer_logprobs.masked_fill(flat, 0.0).clamp(max=0).exp()  # μ_old; rounding may leave it above 1
    shift = logprobs.masked_fill(flat, 0.0).exp() - sampled
    ratio = logs.exp()
    # Where r > 1, (π_θ − μ_old)·(r − 1): it has no μ_old that is 0 in its type beside an r that is infinite.
    penalty = torch.where(ratio > 1, shift * (ratio - 1), sampled * (1 - logs.clamp(max=0).exp()).square())
    stats = Stats()
    gate = 1 - (advantages * logs.detach()).sign() * shift.detach().abs() / delta
    stats.mean("gate_mean", gate[batch.loss_mask])
    stats.mean("corrective_fraction", (gate < 0)[batch.loss_mask])
    losses = -ratio * advantages + advantages.abs() / (2 * delta) * penalty
    return losses * log_router_shift(batch, settings).exp(), stats


OBJECTIVE = Objective(loss, config.Drpo, mean)
