"""Gather a live model in buckets of tensors in Hugging Face's form, and find those that did not change."""

import hashlib
import sys
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_bai.config import Model
from megatron_bai.model import hf_mapping
from megatron_bai.model.architecture import architecture_of
from megatron_bai.model.families.architecture import Architecture
from megatron_bai.model.gather import (
    BUCKET_BYTES,
    NamedSlice,
    describe,
    drained,
    exchange_infos,
    gather_buckets,
    main_shards,
)
from megatron_bai.model.gather_plan import GatherBucket, Index, SliceId, make_gather_plan
from megatron_bai.model.param_shards import Shard

Named = list[tuple[str, torch.Tensor]]


class TensorInfo(NamedTuple):
    """A tensor as it is published."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class HFBucket:
    """Tensors that one rank has together, in Hugging Face's form.

    Attributes:
        gather: their slices.
        tensors: their names, dtypes and shapes, in order.
    """

    gather: GatherBucket
    tensors: tuple[TensorInfo, ...]


class HFGather:
    """The tensors of a live model in buckets, by a plan that is made once. Its methods are *collective*.

    Args:
        modules: the bare model of each chunk.
        model: the architecture.
        bucket_bytes: of tensors that are gathered together; a tensor that is larger comes alone.
        num_collectors: how many ranks have buckets, at most; one: rank 0 has all.
    """

    def __init__(
        self,
        modules: list[torch.nn.Module],
        model: Model,
        bucket_bytes: int = BUCKET_BYTES,
        num_collectors: int = 1,
    ):
        self._modules, self._architecture = modules, architecture_of(model)
        self._bucket_bytes, self._num_collectors = bucket_bytes, num_collectors
        shards = main_shards(modules)
        self._infos, self._of_ranks = describe(shards), exchange_infos(shards)
        self._digests: dict[tuple[str, Index, Index], bytes] = {}
        self._plans: dict[frozenset[SliceId], list[HFBucket]] = {}

    def plan(self, unchanged: Collection[SliceId] = ()) -> list[HFBucket]:
        """Return the buckets, equal on every rank.

        Args:
            unchanged: slices to leave out, from `find_unchanged`.
        """
        left_out = frozenset(unchanged)
        if left_out not in self._plans:
            buckets = make_gather_plan(
                self._of_ranks, self._bucket_bytes, self._num_collectors, unit_of(self._architecture), left_out
            )
            plan = [HFBucket(bucket, self._describe(bucket)) for bucket in buckets]
            self._plans = {frozenset(): self._plans.get(frozenset(), plan), left_out: plan}
        return self._plans[left_out]

    def _describe(self, bucket: GatherBucket) -> tuple[TensorInfo, ...]:
        """Return what a bucket's slices are published as, by publishing slices without memory."""
        slices = ((s.key, s.index, torch.empty(s.shape, dtype=s.dtype, device="meta")) for s in bucket.slices)
        return tuple(
            TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in publish(slices, self._architecture)
        )

    def iter_buckets(self, plan: list[HFBucket]) -> Iterator[tuple[HFBucket, Named | None]]:
        """Gather the buckets of a plan. *Collective*: every rank consumes the iterator to its end.

        Yields:
            Each bucket, with its tensors on the rank that has it and None elsewhere. A tensor may be a view of a
            parameter, so what is kept is copied.

        Raises:
            RuntimeError: the model has other shards than the plan was made of.
        """
        with drained(gather_buckets(self._current_shards(), [bucket.gather for bucket in plan])) as slices:
            for bucket in plan:  # no variable holds the last bucket while the next one is gathered
                yield bucket, self._publish(next(slices)[1])
            assert next(slices, None) is None, "more buckets than planned"

    def _publish(self, gathered: list[NamedSlice] | None) -> Named | None:
        """Return a bucket's slices as they are published, where this rank has them."""
        return None if gathered is None else list(publish(gathered, self._architecture))

    def _current_shards(self) -> list[Shard]:
        """Return this rank's shards, where they are now: parameters may have moved since the plan was made."""
        shards = main_shards(self._modules)
        if describe(shards) != self._infos:
            raise RuntimeError("the model has other shards than when its gathering was planned")
        return shards

    def find_unchanged(self) -> set[SliceId]:
        """Return the slices that are not trained and have the bits that they had at the last call, on every rank.

        What the optimizer does not move is compared by its digest, so what else moves it (an expert bias) is seen.
        """
        parameters = [each for module in self._modules for each in module.parameters() if each.requires_grad]
        trained = sorted((each.data_ptr(), each.data_ptr() + each.nbytes) for each in parameters)
        digests = {}
        for shard in self._current_shards():
            before = bisect(trained, (shard.data.data_ptr(), sys.maxsize)) - 1  # the last that starts up to there
            if before < 0 or shard.data.data_ptr() >= trained[before][1]:
                digests[shard.key, shard.index, shard.offset] = _digest(shard.data)
        same = [shard_id[:2] for shard_id, digest in digests.items() if self._digests.get(shard_id) == digest]
        self._digests = digests
        of_ranks: list[list[SliceId]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(of_ranks, same)
        counts = Counter(slice_id for slices in of_ranks for slice_id in slices)
        if not counts:
            return set()
        needed = Counter((info.key, info.index) for infos in self._of_ranks for info in infos)
        return {slice_id for slice_id, count in counts.items() if count == needed[slice_id]}


def publish(
    slices: Iterable[tuple[str, Index, torch.Tensor]], architecture: Architecture
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield slices as the tensors that are published.

    Args:
        slices: keys, indices and tensors; experts that are published together follow each other, first to last.
        architecture: of the model.
    """
    whole: list[torch.Tensor] = []  # of a layer whose experts are published together
    for key, index, tensor in slices:
        mapping = hf_mapping.mapping_of(key, architecture)
        parts = mapping.split(tensor, architecture)
        if mapping.experts_together:
            expert, count = index[-1], architecture.num_experts
            whole = whole or [part.new_empty(count, *part.shape) for part in parts]
            for experts, part in zip(whole, parts, strict=True):
                experts[expert].copy_(part)
            if expert < count - 1:
                continue
            parts, whole = whole, []
        yield from zip(mapping.names(index), parts, strict=True)


def unit_of(architecture: Architecture) -> Callable[[str, Index], Hashable]:
    """Return the function that gives slices the same unit where they must be in one bucket.

    These are the experts of a layer that are published together, and what a server merges as it comes
    (`Family.loaded_together`).
    """

    def unit(key: str, index: Index) -> Hashable:
        mapping = hf_mapping.mapping_of(key, architecture)
        if mapping.experts_together:
            return key, index[:-1]
        for name in mapping.names(index):
            for ending in architecture.family.loaded_together:
                if name.endswith(ending):
                    return name.removesuffix(ending)
        return key, index

    return unit


def _digest(tensor: torch.Tensor) -> bytes:
    """Return what two tensors have in common only if their bits are the same."""
    data = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8)
    return hashlib.blake2b(data.numpy().data, digest_size=16).digest()
