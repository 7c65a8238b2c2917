"""Copies of earlier weights: those the run started from are the reference policy of a KL penalty."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_bai.model.build import MegatronModel


class WeightCopy:
    """A copy of the actor's current weights: one more model in each rank's memory."""

    def __init__(self, actor: MegatronModel):
        self._actor = actor
        self._weights = [parameter.detach().clone() for parameter in self._parameters()]

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for module in self._actor.modules for parameter in module.parameters()]

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the actor's current weights in place of the earlier ones."""
        for parameter, copied in zip(self._parameters(), self._weights, strict=True):
            copied.copy_(parameter)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Give the actor the copied weights within the block, and its own back after it, bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Swap in place, since Megatron's parameters are views of its buffers; one parameter's memory at a time."""
        for parameter, copied in zip(self._parameters(), self._weights, strict=True):
            current = parameter.clone()
            parameter.copy_(copied)
            copied.copy_(current)
