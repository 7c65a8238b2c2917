"""Gather a live model's weights from all ranks, bucket by bucket, as `gather_plan.make_gather_plan` has it."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from megatron_bai.model.gather_plan import GatherBucket, Index, ShardInfo, make_gather_plan
from megatron_bai.model.param_shards import Shard, local_shards

# Of an export. Larger memory is taken from the system anew for each bucket: glibc keeps none above 32 MiB.
BUCKET_BYTES = 32 << 20

T = TypeVar("T")
NamedSlice = tuple[str, Index, torch.Tensor]


class _Receipt(NamedTuple):
    """A bucket of the plan, and what comes for it where this rank collects it: messages, and what to wait for."""

    bucket: GatherBucket
    messages: dict[int, torch.Tensor]
    works: list[Any]


def main_shards(modules: list[torch.nn.Module]) -> list[Shard]:
    """Return this rank's shards that are saved, without those of which another rank has the copy that is."""
    return [shard for shard in local_shards(modules) if shard.is_main_replica]


def describe(shards: list[Shard]) -> list[ShardInfo]:
    """Return what the plan needs to know of shards."""
    return [ShardInfo(s.key, s.index, s.offset, tuple(s.data.shape), s.shape, s.data.dtype) for s in shards]


def exchange_infos(shards: list[Shard]) -> list[list[ShardInfo]]:
    """Return what every rank holds, by rank, on every rank. *Collective*.

    Args:
        shards: `main_shards` of this rank.
    """
    of_ranks: list[list[ShardInfo]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, describe(shards))
    return of_ranks


def gather_slices(
    modules: list[torch.nn.Module], bucket_bytes: int = BUCKET_BYTES
) -> Iterator[tuple[str, Index, torch.Tensor]]:
    """Gather the model on rank 0, slice after slice. *Collective*: every rank consumes the iterator.

    Args:
        modules: the bare model of each chunk.
        bucket_bytes: of slices that are gathered together.

    Yields:
        `(key, index, tensor)` in the same order on every rank. On rank 0 the tensor is the slice; it may be a view of a
        parameter or of the bucket, so what is kept is copied. On the others it is empty.

    Raises:
        RuntimeError: the main replicas do not cover a slice exactly.
    """
    shards = main_shards(modules)
    plan = make_gather_plan(exchange_infos(shards), bucket_bytes)
    for bucket, slices in gather_buckets(shards, plan):
        yield from slices if slices is not None else ((s.key, s.index, torch.empty(0)) for s in bucket.slices)


def gather_buckets(
    shards: list[Shard], plan: list[GatherBucket]
) -> Iterator[tuple[GatherBucket, list[NamedSlice] | None]]:
    """Gather every bucket of a plan on its collector. *Collective*: every rank consumes the iterator to its end.

    While the caller works on one bucket, the messages of the next are received: two buckets are held at a time. A rank
    that has a part in no more of them waits for nobody.

    Args:
        shards: `main_shards` of this rank, of which its plan was made.
        plan: the same on every rank.

    Yields:
        Each bucket, with its slices on its collector and None elsewhere. A slice may be a view of a parameter.
    """
    rank = dist.get_rank()
    sending: tuple[Any, torch.Tensor] | None = None  # the message stays in memory as long as its work is not done
    spare: torch.Tensor | None = None
    pending: deque[_Receipt] = deque()  # the frame of a generator would hold what a variable names
    for bucket in plan:
        messages: dict[int, torch.Tensor] = {}
        works: list[Any] = []
        if bucket.collector == rank:
            messages, works = _start_receiving(bucket, shards)
        elif rank in bucket.message_bytes:
            if sending is not None:
                sending[0].wait()
                spare = sending[1]
            message = _pack(bucket, shards, rank, spare)
            sending = dist.isend(message, dst=bucket.collector), message
            del message
        pending.append(_Receipt(bucket, messages, works))
        del messages
        if len(pending) > 1:
            yield _finish(pending.popleft(), shards, rank)
    if sending is not None:
        sending[0].wait()
    if pending:
        yield _finish(pending.popleft(), shards, rank)


@contextmanager
def drained(iterator: Iterator[T]) -> Iterator[Iterator[T]]:
    """Consume what the block leaves of an iterator in which other ranks take part, so that an error makes none wait.

    Args:
        iterator: such as `gather_buckets`.
    """
    try:
        yield iterator
    finally:
        for _ in iterator:
            pass


def _pack(bucket: GatherBucket, shards: list[Shard], rank: int, spare: torch.Tensor | None) -> torch.Tensor:
    """Copy a rank's shards of a bucket into its message, which is in `spare` if that is large enough.

    New memory costs a CPU as much as a copy.
    """
    num_bytes = bucket.message_bytes[rank]
    message = None if spare is None or len(spare) < num_bytes else spare[:num_bytes]
    for _, planned in bucket.shards_of(rank):
        data = shards[planned.shard_index].data.detach()
        if message is None:
            message = torch.empty(num_bytes, dtype=torch.uint8, device=data.device)
        _view_message(message, planned.start, planned.info).copy_(data)
    assert message is not None, "a message has a shard"
    return message


def _start_receiving(bucket: GatherBucket, shards: list[Shard]) -> tuple[dict[int, torch.Tensor], list[Any]]:
    """Start to receive the messages of a bucket's other owners; return those and what to wait for."""
    device = shards[0].data.device if shards else torch.device("cpu")
    messages, works = {}, []
    for owner, num_bytes in sorted(bucket.message_bytes.items()):
        messages[owner] = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        works.append(dist.irecv(messages[owner], src=owner))
    return messages, works


def _finish(receipt: _Receipt, shards: list[Shard], rank: int) -> tuple[GatherBucket, list[NamedSlice] | None]:
    """Wait for a bucket, and return it with its slices; with None where another rank collects it."""
    if receipt.bucket.collector != rank:
        return receipt.bucket, None
    for work in receipt.works:
        work.wait()
    slices = []
    for planned in receipt.bucket.slices:
        tensors = []
        for owner, shard_index, info, start in planned.shards:
            if owner in receipt.messages:
                tensors.append(_view_message(receipt.messages[owner], start, info))
            else:
                tensors.append(shards[shard_index].data.detach())
        if len(tensors) == 1:  # it covers the slice: `make_gather_plan` has counted
            whole = tensors[0]
        else:
            whole = tensors[0].new_empty(planned.shape)
            for (_, _, info, _), tensor in zip(planned.shards, tensors, strict=True):
                box = tuple(slice(o, o + n) for o, n in zip(info.offset, info.sizes, strict=True))
                whole[box].copy_(tensor)
        slices.append((planned.key, planned.index, whole))
    return receipt.bucket, slices


def _view_message(message: torch.Tensor, start: int, info: ShardInfo) -> torch.Tensor:
    """Return the shard that a message has at byte `start`, without a copy."""
    return message[start : start + info.num_bytes].view(info.dtype).view(info.sizes)
