"""Copies of earlier weights: those the run started from are the reference policy of a KL penalty."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_bai.model.build import MegatronModel
from megatron_bai.model.param_shards import named_weights


class WeightCopy:
    """A copy of the actor's current weights: one more model in each rank's memory."""

    def __init__(self, actor: MegatronModel):
        self._actor = actor
        self._weights = [tensor.detach().clone() for tensor in self._tensors()]

    def _tensors(self) -> list[torch.Tensor]:
        return [tensor for module in self._actor.modules for _, tensor in named_weights(module)]

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the actor's current weights in place of the earlier ones."""
        for tensor, copied in zip(self._tensors(), self._weights, strict=True):
            copied.copy_(tensor)

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
        """Swap in place, since Megatron's parameters are views of its buffers; one tensor's memory at a time."""
        for tensor, copied in zip(self._tensors(), self._weights, strict=True):
            current = tensor.clone()
            tensor.copy_(copied)
            copied.copy_(current)
