"""Supervised training: the cross-entropy of given text."""

import torch

from megatron_bai import config
from megatron_bai.rl.batch import Batch
from megatron_bai.monitor.stats import Stats


def loss(logprobs: torch.Tensor, batch: Batch, settings: config.Objective) -> tuple[torch.Tensor, Stats]:
    """−Σ log π_θ over the target tokens.

    Args:
        logprobs: `[B, T]` log π_θ, with gradient.
        batch: only `mask` `[B, T]` is used.

    Returns:
        The sum over tokens, and its mean as `cross_entropy` in nats.
    """
    negative = -logprobs[batch.mask]
    stats = Stats()
    stats.mean("cross_entropy", negative.detach())
    return negative.sum(), stats
