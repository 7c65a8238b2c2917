"""Regularisation of any policy objective: a penalty on the KL divergence from a reference, an entropy bonus."""

from megatron_bai import config
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl.batches.stages import TrainingBatch
from megatron_bai.rl.objectives.objective import PerToken
from megatron_bai.rl.objectives.terms import log_ratio


def kl_estimate(new: PerToken, reference: PerToken, mask: PerToken, kind: str) -> PerToken:
    """Estimate KL(π_θ ‖ π_ref) at sampled tokens.

    With x = log π_ref/π_θ:

        k1 = −x             unbiased; its gradient in a loss is 1, in expectation 0 over tokens: it restrains nothing
        k2 = x²/2           its gradient −x is, in expectation, that of KL(π_θ ‖ π_ref)
        k3 = eˣ − 1 − x     unbiased, never negative; its gradient 1 − eˣ is, in expectation, that of KL(π_ref ‖ π_θ)

    (John Schulman's names, 2020.) The statements hold on-policy, where the tokens come from π_θ.

    Args:
        new: `[B, T]` log π_θ, with gradient.
        reference: `[B, T]` log π_ref.
        mask: `[B, T]` bool.
        kind: `objective.kl_estimator`.

    Returns:
        `[B, T]` nats, 0 outside `mask`.
    """
    x = log_ratio(reference, new, mask)
    if kind == "k1":
        return -x
    return x.square() / 2 if kind == "k2" else x.expm1() - x


def add_regularisation(
    losses: PerToken,
    settings: config.Policy,
    logprobs: PerToken,
    batch: TrainingBatch,
    entropy: PerToken | None,
    stats: Stats,
) -> PerToken:
    """Compute ℓ + kl_penalty · KL − entropy_bonus · H at every token.

    Adds `kl_reference` and `entropy_update`, the means of KL and H.

    Args:
        losses: `[B, T]` ℓ.
        settings: of the objective.
        logprobs: `[B, T]` log π_θ, with gradient.
        batch: `loss_mask` and `reference_logprobs` are used.
        entropy: `[B, T]` H in nats, with gradient.
        stats: gets the metrics.
    """
    if settings.kl_penalty:
        kl = kl_estimate(logprobs, batch.reference_logprobs, batch.loss_mask, settings.kl_estimator)
        losses = losses + settings.kl_penalty * kl
        stats.mean("kl_reference", kl.detach()[batch.loss_mask])
    if settings.entropy_bonus:
        assert entropy is not None, "an entropy bonus needs the entropy"
        losses = losses - settings.entropy_bonus * entropy
        stats.mean("entropy_update", entropy.detach()[batch.loss_mask])
    return losses
