"""Which rank collects which slices of a model, in which bucket, and what each other rank sends it for that.

A plan is a pure function of the shards that the ranks hold, so that all ranks make the same one. Slices are joined into
buckets of bounded size. The rank that collects a bucket receives one message from each other rank that holds a part of
it, however many slices that part has; a whole slice that it holds itself is not copied.

With one collector everything comes to rank 0. With several, each takes the slices of the ranks next to it: whole
experts stay where they are, and what tensor ranks split is gathered among them. The collectors' buckets alternate, so
that while one is sent on, the others are gathered.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

import torch

Index = tuple[int, ...]
SliceId = tuple[str, Index]  # key and index, as in `param_shards.Shard`
_ALIGNMENT = 16  # bytes: a message holds numbers of any size, which lie at multiples of it


class ShardInfo(NamedTuple):
    """What a rank tells the others of a shard that it holds: the fields of `param_shards.Shard`, and the dtype."""

    key: str
    index: Index
    offset: Index
    sizes: Index
    shape: Index
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """The number of bytes of the shard."""
        return torch.Size(self.sizes).numel() * self.dtype.itemsize


class PlannedShard(NamedTuple):
    """A shard's part in a bucket: the `shard_index`-th of `owner`, at byte `start` of the owner's message."""

    owner: int
    shard_index: int
    info: ShardInfo
    start: int


class PlannedSlice(NamedTuple):
    """A slice, and the shards that cover it."""

    key: str
    index: Index
    shape: Index
    dtype: torch.dtype
    shards: tuple[PlannedShard, ...]

    @property
    def num_bytes(self) -> int:
        """The number of bytes of the whole slice."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class GatherBucket:
    """Slices that one rank collects together.

    Attributes:
        collector: that rank.
        slices: in order.
        message_bytes: of the message of each other rank that holds a part.
    """

    collector: int
    slices: tuple[PlannedSlice, ...]
    message_bytes: dict[int, int]

    @property
    def num_bytes(self) -> int:
        """The number of bytes of its slices."""
        return sum(each.num_bytes for each in self.slices)

    def shards_of(self, rank: int) -> Iterator[tuple[PlannedSlice, PlannedShard]]:
        """Yield a rank's shards, in the order in which its message has them."""
        for planned in self.slices:
            for shard in planned.shards:
                if shard.owner == rank:
                    yield planned, shard


def make_gather_plan(
    of_ranks: Sequence[Sequence[ShardInfo]],
    bucket_bytes: int,
    num_collectors: int = 1,
    unit_of: Callable[[str, Index], Hashable] = lambda key, index: (key, index),
    unchanged: Collection[SliceId] = (),
) -> list[GatherBucket]:
    """Make the plan of gathering a model. Every rank calls it with the same arguments, and gets the same buckets.

    Args:
        of_ranks: the main replicas of each rank's shards.
        bucket_bytes: of slices in a bucket; a larger unit is a bucket alone.
        num_collectors: how many ranks collect, at most; one: rank 0 does.
        unit_of: of a slice's key and index; slices of one unit share a bucket.
        unchanged: slices to leave out, where all of their unit may be.

    Raises:
        RuntimeError: the shards do not cover a slice exactly.
    """
    slices: dict[SliceId, list[tuple[int, int, ShardInfo]]] = defaultdict(list)
    for owner, infos in enumerate(of_ranks):
        for shard_index, info in enumerate(infos):
            slices[info.key, info.index].append((owner, shard_index, info))
    units: dict[Hashable, list[SliceId]] = defaultdict(list)
    for slice_id in sorted(slices):
        _require_cover(slice_id, [info for _, _, info in slices[slice_id]])
        units[unit_of(*slice_id)].append(slice_id)
    collector_of = _choose_collectors([rank for rank, infos in enumerate(of_ranks) if infos], num_collectors)
    queues: dict[int, list[list[list[SliceId]]]] = {rank: [] for rank in sorted(set(collector_of.values()))}
    loads, sizes = dict.fromkeys(queues, 0), dict.fromkeys(queues, 0)  # of all of it; of its last bucket
    for members in units.values():
        if all(each in unchanged for each in members):
            continue
        owners = {owner for slice_id in members for owner, _, _ in slices[slice_id]}
        collector = min({collector_of[owner] for owner in owners}, key=lambda rank: (loads[rank], rank))
        num_bytes = sum(info.num_bytes for slice_id in members for _, _, info in slices[slice_id])
        if not queues[collector] or sizes[collector] + num_bytes > bucket_bytes:
            queues[collector].append([])
            sizes[collector] = 0
        queues[collector][-1].append(members)
        loads[collector] += num_bytes
        sizes[collector] += num_bytes
    turns = zip_longest(*([(rank, bucket) for bucket in buckets] for rank, buckets in queues.items()))
    return [_make_bucket(*entry, slices) for turn in turns for entry in turn if entry is not None]


def _require_cover(slice_id: SliceId, infos: list[ShardInfo]) -> None:
    """Raise a RuntimeError unless shards cover a slice exactly."""
    key, index = slice_id
    shape = torch.Size(infos[0].shape)
    covered = sum(torch.Size(info.sizes).numel() for info in infos)
    if covered != shape.numel() or len({info.offset for info in infos}) != len(infos):
        raise RuntimeError(f"the ranks' shards of {key}{list(index)} do not cover its shape {tuple(shape)}")


def _choose_collectors(owners: list[int], num_collectors: int) -> dict[int, int]:
    """Return the collector of each rank that holds weights: the first of its block of neighbours.

    Ranks are numbered by tensor, then expert, then data, then pipeline rank, so neighbours share the smallest groups.
    """
    num_blocks = min(max(num_collectors, 1), len(owners))
    if num_blocks == 1:
        return dict.fromkeys(owners, 0)
    firsts: dict[int, int] = {}
    return {owner: firsts.setdefault(i * num_blocks // len(owners), owner) for i, owner in enumerate(owners)}


def _make_bucket(
    collector: int, units: list[list[SliceId]], slices: dict[SliceId, list[tuple[int, int, ShardInfo]]]
) -> GatherBucket:
    """Lay the shards of a bucket out in their owners' messages."""
    ends: dict[int, int] = defaultdict(int)
    planned = []
    for slice_id in (slice_id for unit in units for slice_id in unit):
        shards = []
        for owner, shard_index, info in slices[slice_id]:
            start = -(-ends[owner] // _ALIGNMENT) * _ALIGNMENT
            ends[owner] = start + info.num_bytes
            shards.append(PlannedShard(owner, shard_index, info, start))
        planned.append(PlannedSlice(*slice_id, info.shape, info.dtype, tuple(shards)))
    return GatherBucket(collector, tuple(planned), {owner: end for owner, end in ends.items() if owner != collector})
