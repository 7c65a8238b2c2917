"""How far the training engine's policy is from the inference engine's, on the tokens the latter sampled."""

import torch

from megatron_bai.monitor.stats import Stats


def add_kl(stats: Stats, suffix: str, train: torch.Tensor, infer: torch.Tensor, mask: torch.Tensor) -> None:
    """Add estimates of KL(μ ‖ π) in nats, over response tokens sampled from μ.

    `kl_k1` is the mean of log μ − log π (arXiv 2512.01374): unbiased, may be negative on a batch.
    `kl_k3` is the mean of r − 1 − log r, r = π/μ (arXiv 2510.11370): never negative, less variance.

    Args:
        suffix: appended to both names.
        train, infer: `[B, T]` log π and log μ.
        mask: `[B, T]` bool.
    """
    log_ratio = (train - infer)[mask].double()
    stats.mean("kl_k1" + suffix, -log_ratio)
    stats.mean("kl_k3" + suffix, log_ratio.expm1() - log_ratio)
