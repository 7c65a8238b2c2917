"""The interface of an objective."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch

from megatron_bai import config
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl.batches.stages import TrainingBatch

# Shapes: B samples, T positions; position t belongs to token t + 1.
PerToken = Annotated[torch.Tensor, "[B, T]"]
PerSample = Annotated[torch.Tensor, "[B]"]
Scalar = Annotated[torch.Tensor, "[]"]

# How tokens' losses are averaged over a mini-batch; `aggregate.py` defines each.
Mean = Literal["sample_sum", "sample_mean", "token_mean", "prompt_mean"]


def _accept_all(settings: Any) -> None:
    """Accept all settings."""


def policy_settings(settings: config.Objective) -> config.Policy:
    """Narrow an objective's settings to those of one that learns from rollouts; `check` has refused any other."""
    assert isinstance(settings, config.Policy)
    return settings


@dataclass(frozen=True)
class Objective:
    """How a batch becomes a loss to minimise.

    Attributes:
        loss: `(log π_θ [B, T] with gradient, batch, settings) → (losses [B, T], metrics)`. Losses outside
            `batch.loss_mask` are ignored. A loss of whole responses is given at every token of its response, with
            `sample_mean`.
        settings: the dataclass of its settings; its `name` is what `objective=NAME` chooses.
        mean: of its settings, how the tokens' losses are averaged.
        check: refuses its settings by name with a `UserError`.
        rollouts: whether it learns from sampled responses; otherwise from given text.
    """

    loss: Callable[[PerToken, TrainingBatch, Any], tuple[PerToken, Stats]]
    settings: type[config.Objective]
    mean: Callable[[Any], Mean]
    check: Callable[[Any], None] = _accept_all
    rollouts: bool = True
