"""REINFORCE in which samples above their group's mean weigh other than those below (arXiv 2506.01347).

megatron-bai train … objective=weighted_reinforce objective.positive=0.1
"""

from dataclasses import dataclass

import torch

from megatron_bai import config
from megatron_bai.config.limits import number
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl import objectives
from megatron_bai.rl.batches.batch import Batch


@dataclass
class WeightedReinforce(config.Policy):
    """Settings of the objective."""

    name: str = "weighted_reinforce"
    positive: float = number(0.1, at_least=0)  # weight of samples with a positive advantage; the others' is 1


def loss(logprobs: torch.Tensor, batch: Batch, settings: WeightedReinforce) -> tuple[torch.Tensor, Stats]:
    """Return `[B, T]` losses, minus weight · advantage · log π_θ, and a metric."""
    stats = Stats()
    stats.mean("positive_fraction", (batch.advantages > 0).float()[batch.loss_mask])
    weights = torch.where(batch.advantages > 0, settings.positive, 1.0)
    return -weights * batch.advantages * logprobs, stats


objectives.register(objectives.Objective(loss, WeightedReinforce, mean=lambda settings: "token_mean"))
