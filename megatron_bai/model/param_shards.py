"""This rank's parameters as pieces of the global tensors a checkpoint would hold.

Megatron's sharded state dict says where each local tensor lies in the global one. Filling and reading weights
through it is what makes initialisation, import and export independent of the parallel layout.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_bai.config import Model
from megatron_bai.model import hf_mapping

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

# What ranks say of a piece: key, index, offset and shape of the piece, shape of the whole, dtype.
_ShardInfo = tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class Shard:
    """A local piece of a global tensor.

    Attributes:
        key: Megatron's checkpoint key.
        data: a view of the parameter; its shape is that of the piece without the stacked axes.
        index: position along the stacked axes: `(layer,)`, `(layer, expert)` or `()`.
        offset: where the piece starts along the remaining axes, in elements.
        shape: global shape of the remaining axes.
        main: this rank holds the copy that counts; other ranks' copies are replicas.
    """

    key: str
    data: torch.Tensor
    index: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    is_main_replica: bool

    def local_part(self, full_tensor: torch.Tensor) -> torch.Tensor:
        """This piece of `whole`, which has shape `self.shape`."""
        for axis, (start, size) in enumerate(zip(self.offset, self.data.shape, strict=True)):
            full_tensor = full_tensor.narrow(axis, start, size)
        return full_tensor


def local_shards(modules: "list[GPTModel]") -> list[Shard]:
    """Every piece of a parameter on this rank."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica

    shards = []
    for module in modules:
        state = module.sharded_state_dict()
        apply_factories(state)
        for piece in nested_values(state):
            if not isinstance(piece, ShardedTensor):
                continue  # `_extra_state` objects hold no weights
            stacked = piece.prepend_axis_num
            shards.append(
                Shard(
                    piece.key,
                    piece.data,
                    tuple(piece.global_offset[:stacked]),
                    tuple(piece.global_offset[stacked:]),
                    tuple(piece.global_shape[stacked:]),
                    is_main_replica(piece.replica_id),
                )
            )
    return shards


@torch.no_grad()
def fill_parameters(modules: list[torch.nn.Module], full_tensor: Callable[[Shard], torch.Tensor]) -> None:
    """Set every local parameter to its piece of `whole(shard)`, a tensor of shape `shard.shape`."""
    for shard in local_shards(modules):
        shard.data.copy_(shard.local_part(full_tensor(shard)))


def init_random(modules: list[torch.nn.Module], model: Model, seed: int) -> None:
    """N(0, init_std²) matrices and unit norms, the same in every layout: each global slice has its own seed."""

    def whole(shard: Shard) -> torch.Tensor:
        if len(shard.shape) == 1:
            return torch.ones(shard.shape)
        name = f"{seed}/{shard.key}/{shard.index}".encode()
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name).digest()[:7], "big"))
        return torch.randn(shard.shape, generator=generator) * model.init_std

    fill_parameters(modules, whole)


def gather_slices(modules: list[torch.nn.Module]) -> Iterator[tuple[str, tuple[int, ...], torch.Tensor]]:
    """Collect the model on rank 0, one slice at a time. Every rank must consume the iterator; collective.

    Yields:
        `(key, index, tensor)` in the same order on every rank; the tensor has the slice's global shape, and its
        content is defined on rank 0 alone. At most one slice is held.

    Raises:
        RuntimeError: the main pieces do not cover a slice exactly.
    """
    rank = dist.get_rank()
    mine = [shard for shard in local_shards(modules) if shard.is_main_replica]
    described = [(s.key, s.index, s.offset, tuple(s.data.shape), s.shape, s.data.dtype) for s in mine]
    everyone: list[list[_ShardInfo]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, described)
    slices: dict[tuple[str, tuple[int, ...]], list[tuple[int, int, _ShardInfo]]] = {}
    for owner, theirs in enumerate(everyone):
        for local, piece in enumerate(theirs):
            slices.setdefault(piece[:2], []).append((owner, local, piece))
    device = next(modules[0].parameters()).device
    order = list(hf_mapping.BY_KEY)
    for key, index in sorted(slices, key=lambda s: (order.index(hf_mapping.mapping_of(s[0]).megatron), s[1])):
        pieces = slices[key, index]
        shape, dtype = pieces[0][2][4:]
        if sum(torch.Size(piece[3]).numel() for _, _, piece in pieces) != torch.Size(shape).numel():
            raise RuntimeError(f"the ranks' pieces of {key}{list(index)} do not cover its shape {shape}")
        whole = torch.empty(shape, dtype=dtype, device=device) if rank == 0 else torch.empty(0)
        for owner, local, piece in pieces:
            _gather_shard(whole, owner, mine[local].data if owner == rank else None, piece)
        yield key, index, whole


def _gather_shard(full_tensor: torch.Tensor, owner: int, data: torch.Tensor | None, piece: _ShardInfo) -> None:
    """Bring one piece from its owner into `whole` on rank 0."""
    rank, offset, shape = dist.get_rank(), piece[2], piece[3]
    if rank == owner:
        assert data is not None
        if rank == 0:
            full_tensor[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))].copy_(data.detach())
        else:
            dist.send(data.detach().contiguous(), dst=0)
    elif rank == 0:
        received = torch.empty(shape, dtype=full_tensor.dtype, device=full_tensor.device)
        dist.recv(received, src=owner)
        full_tensor[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))].copy_(received)
