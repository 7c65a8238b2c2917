"""Buckets of tensors as servers take them, and the count that each tensor is in one of them."""

import pickle
from collections.abc import Collection, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from megatron_bai.errors import UserError
from megatron_bai.model.hf_gather import TensorInfo

Shapes = dict[str, tuple[int, ...]]
Bucket = list[tuple[str, torch.Tensor]]


def flatten_bucket(bucket: Bucket, buffer: torch.Tensor | None = None) -> tuple[torch.Tensor, list[TensorInfo]]:
    """Return a bucket's bytes one after another, `[bytes] uint8`, and what lies there, as `order_infos` has it.

    Args:
        bucket: the tensors.
        buffer: `[any] uint8`, in which the bytes are if it is large enough: new memory costs a CPU as much as a copy.
    """
    tensors = dict(bucket)
    infos = order_infos([TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in bucket])
    parts = [tensors[info.name].detach().flatten().view(torch.uint8) for info in infos]
    num_bytes = sum(map(len, parts))
    if buffer is None or len(buffer) < num_bytes:
        return torch.cat(parts), infos
    return torch.cat(parts, out=buffer[:num_bytes]), infos


def order_infos(infos: Sequence[TensorInfo]) -> list[TensorInfo]:
    """Return the tensors of a bucket in the order in which their bytes follow each other.

    SGLang views parts of one tensor of bytes as numbers, which must lie at multiples of their size: of two dtypes the
    wider comes first, whatever number of elements the other has.

    Args:
        infos: of the bucket's tensors.
    """
    return sorted(infos, key=lambda info: -info.dtype.itemsize)


def pickle_bucket(bucket: Bucket) -> bytes:
    """Pickle a bucket as SGLang's `flattened_bucket`: a tensor of bytes on the host, and what lies where in it.

    Plain pickle carries the values; torch's own for processes would carry names of shared memory. Megatron-Core (from
    0.17.1, where it is imported) puts a function of its own, a stricter one, in the place of torch's that loads
    storages, and a pickle would name that: SGLang's scheduler ends on names that it does not know. It knows
    `SimpleNamespace`, and reads attributes alone.
    """
    load_storage: Any = torch.storage._load_from_bytes
    load_storage.__module__, load_storage.__qualname__ = "torch.storage", "_load_from_bytes"  # where it is found
    flat, infos = flatten_bucket(bucket)
    metadata, start = [], 0
    for name, dtype, shape in infos:
        length = torch.Size(shape).numel() * dtype.itemsize
        place = {"start_idx": start, "end_idx": start + length, "numel": length}
        metadata.append(SimpleNamespace(name=name, shape=shape, dtype=dtype, **place))
        start += length
    return pickle.dumps({"flattened_tensor": flat.cpu(), "metadata": metadata})


class Coverage:
    """Counts that a sync sends each tensor of the model served once, or leaves it out since the servers have it.

    Args:
        version: names the sync in errors.
        expected: names and shapes of the model served.
        unchanged: names of what is left out.
    """

    def __init__(self, version: str, expected: Shapes, unchanged: Collection[str] = ()):
        self._version, self._expected = version, expected
        if unknown := set(unchanged) - expected.keys():
            raise UserError(f"weight sync {version}: {min(unknown)} is left out, and the servers have none")
        self._missing = {name: shape for name, shape in expected.items() if name not in unchanged}

    def add(self, name: str, shape: tuple[int, ...]) -> None:
        """Count a tensor.

        Args:
            name: of the tensor.
            shape: of the tensor.

        Raises:
            UserError: it is unknown, of another shape, left out, or was counted before.
        """
        if self._missing.pop(name, None) != shape:
            served = self._expected.get(name, "none, or sent before")
            raise UserError(f"weight sync {self._version}: {name} has shape {shape}, the servers' has {served}")

    def require_complete(self) -> None:
        """Raise a UserError unless every tensor was counted."""
        if self._missing:
            first = min(self._missing)
            raise UserError(f"weight sync {self._version}: {len(self._missing)} tensors were not sent, first {first}")


def group_together(named: Iterable[tuple[str, torch.Tensor]], together: Sequence[str]) -> Iterator[Bucket]:
    """Yield tensors alone, but those that belong together when the last of them has come.

    Args:
        named: tensors by name.
        together: endings of names that belong together where what is before them is equal.
    """
    waiting: dict[str, Bucket] = {}
    for name, tensor in named:
        ending = next((each for each in together if name.endswith(each)), None)
        if ending is None:
            yield [(name, tensor)]
            continue
        stem = name.removesuffix(ending)
        waiting.setdefault(stem, []).append((name, tensor))
        if len(waiting[stem]) == len(together):
            yield waiting.pop(stem)
    yield from waiting.values()  # a layer that has not all of them


def make_buckets(groups: Iterable[Bucket], limit: int) -> Iterator[Bucket]:
    """Join groups of tensors into buckets; a group larger than the limit is a bucket alone.

    Args:
        groups: of tensors that stay together.
        limit: bytes of a bucket.
    """
    bucket: Bucket = []
    size = 0
    for group in groups:
        num_bytes = sum(tensor.nbytes for _, tensor in group)
        if bucket and size + num_bytes > limit:
            yield bucket
            bucket, size = [], 0
        bucket += group
        size += num_bytes
    if bucket:
        yield bucket
