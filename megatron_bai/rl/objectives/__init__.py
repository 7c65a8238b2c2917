"""Training objectives: pure functions from log-probabilities to a loss, one file each.

An objective returns the *sum* of its loss over the tokens given. The engine divides by the count the objective names,
taken over the whole mini-batch and all data-parallel ranks, so that the loss does not depend on how the batch was cut.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_bai import config
from megatron_bai.errors import UserError
from megatron_bai.rl.batch import Batch
from megatron_bai.monitor.stats import Stats

Loss = Callable[[torch.Tensor, Batch, config.Objective], tuple[torch.Tensor, Stats]]


@dataclass(frozen=True)
class Objective:
    """How a batch becomes a loss.

    Attributes:
        loss: `(logprobs [B, T], batch, settings) → (scalar sum to minimise, metrics)`.
        per: the sum is divided by the mini-batch's `samples` or loss `tokens`.
        rollouts: it learns from sampled responses; otherwise from given text.
    """

    loss: Loss
    per: Literal["samples", "tokens"]
    rollouts: bool


_REGISTRY: dict[str, Objective] = {}


def register(name: str, objective: Objective) -> None:
    """Make an objective available as `objective.name=NAME`."""
    _REGISTRY[name] = objective


def get(name: str) -> Objective:
    """Look an objective up.

    Raises:
        UserError: no such objective.
    """
    if name not in _REGISTRY:
        raise UserError(f"objective.name is {name!r}: choose one of {', '.join(sorted(_REGISTRY))}")
    return _REGISTRY[name]


from megatron_bai.rl.objectives import minirl, sft  # noqa: E402  (they register nothing themselves)

register("minirl", Objective(minirl.loss, per="samples", rollouts=True))
register("sft", Objective(sft.loss, per="tokens", rollouts=False))
