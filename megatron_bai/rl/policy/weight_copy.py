"""Weights the actor had: those the run started from are the reference policy of a KL penalty."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_bai.model.build import Actor


class WeightCopy:
    """A copy of the actor's weights as they are now, one more model in memory on each rank."""

    def __init__(self, actor: Actor):
        self._actor = actor
        self._weights = [parameter.detach().clone() for parameter in self._parameters()]

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for module in self._actor.modules for parameter in module.parameters()]

    @torch.no_grad()
    def refresh(self) -> None:
        """Be a copy of the weights as they are now."""
        for parameter, copied in zip(self._parameters(), self._weights, strict=True):
            copied.copy_(parameter)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within the block the actor has the reference's weights; after it its own, bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """In place, since Megatron's parameters are views of its buffers; one parameter's memory at a time."""
        for parameter, copied in zip(self._parameters(), self._weights, strict=True):
            current = parameter.clone()
            parameter.copy_(copied)
            copied.copy_(current)
