"""This rank's parameters as shards of the global tensors that a checkpoint would hold.

Megatron's sharded state dict says where each local tensor lies in the global one. Filling and reading weights
through it is what makes initialisation, import and export independent of the parallel layout.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megatron_bai.config import Model

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

_NUMBERED_LAYER = re.compile(r"^(decoder\.layers\.)(\d+)\.(.*)$")


@dataclass(frozen=True)
class Shard:
    """A local shard of a global tensor.

    Attributes:
        key: Megatron's checkpoint key, of stacked layers.
        data: a view of the parameter; its shape is that of the shard without the stacked axes.
        index: position along the stacked axes: `(layer,)`, `(layer, expert)` or `()`.
        offset: where the shard starts along the remaining axes, in elements.
        shape: global shape of the remaining axes.
        is_main_replica: this rank holds the copy that is saved; other ranks' copies are replicas.
    """

    key: str
    data: torch.Tensor
    index: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    is_main_replica: bool

    def local_part(self, full_tensor: torch.Tensor) -> torch.Tensor:
        """Return this shard of `full_tensor`, which has shape `self.shape`.

        Args:
            full_tensor: the global tensor without the stacked axes, of any dtype.

        Returns:
            A view with the shape of `data`.
        """
        for axis, (start, size) in enumerate(zip(self.offset, self.data.shape, strict=True)):
            full_tensor = full_tensor.narrow(axis, start, size)
        return full_tensor


def local_shards(modules: "list[GPTModel]") -> list[Shard]:
    """Return the shards of all parameters on this rank."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica

    shards = []
    for module in modules:
        state = module.sharded_state_dict()
        apply_factories(state)
        for sharded in nested_values(state):
            if not isinstance(sharded, ShardedTensor):
                continue  # `_extra_state` objects hold no weights
            num_stacked = sharded.prepend_axis_num
            key, layer = _stacked_key(sharded.key)
            shards.append(
                Shard(
                    key,
                    sharded.data,
                    layer + tuple(sharded.global_offset[:num_stacked]),
                    tuple(sharded.global_offset[num_stacked:]),
                    tuple(sharded.global_shape[num_stacked:]),
                    is_main_replica(sharded.replica_id),
                )
            )
    return shards


def _stacked_key(key: str) -> tuple[str, tuple[int, ...]]:
    """Return a key without its layer's number, and the number: where layers differ in kind, each is saved by itself."""
    match = _NUMBERED_LAYER.match(key)
    return (match[1] + match[3], (int(match[2]),)) if match else (key, ())


def named_weights(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what a model computes with and a checkpoint holds: its parameters, and its buffers that are saved.

    A router's expert bias is such a buffer.

    Args:
        module: of a model, not wrapped.
    """
    yield from module.named_parameters()
    for path, part in module.named_modules():
        for name, buffer in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer


@torch.no_grad()
def fill_parameters(modules: list[torch.nn.Module], full_tensor: Callable[[Shard], torch.Tensor]) -> None:
    """Set every local parameter to its shard of a full tensor.

    Args:
        modules: the bare model of each chunk.
        full_tensor: returns the tensor, of shape `shard.shape`, for a shard.
    """
    for shard in local_shards(modules):
        shard.data.copy_(shard.local_part(full_tensor(shard)))


def init_random(modules: list[torch.nn.Module], model: Model, seed: int) -> None:
    """Initialise with N(0, init_std²) matrices, unit norms and biases of 0: the same in every layout.

    Each slice has its own seed.

    Args:
        modules: the bare model of each chunk.
        model: the architecture, with `init_std`.
        seed: of the weights.
    """

    def sample(shard: Shard) -> torch.Tensor:
        if len(shard.shape) == 1:
            return torch.zeros(shard.shape) if shard.key.endswith("bias") else torch.ones(shard.shape)
        name = f"{seed}/{shard.key}/{shard.index}".encode()
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name).digest()[:7], "big"))
        return torch.randn(shard.shape, generator=generator) * model.init_std

    fill_parameters(modules, sample)
