"""What a checkpoint's index says: the tensors, their chunks, and where the chunks' elements lie.

Shapes, offsets, sizes and strides are in elements; starts and lengths are in bytes.
"""

import bisect
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from megatron_bai.checkpoint.boxes import Box, intersect_boxes


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor, and its item: `length` bytes at `start` of a file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Record:
    """Where a chunk's elements lie: `length` bytes at `start` of the file, with their CRC-32 if the format has one."""

    start: int
    length: int
    first_byte: int  # byte of the record at which element [0, …, 0] begins
    strides: tuple[int, ...]
    crc32: int | None


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """The item of an object that is no tensor, such as `_extra_state`, which is never unpickled here."""

    file: str
    start: int
    length: int


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a checkpoint: its key, dtype, global shape and chunks."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    @cached_property
    def _by_offsets(self) -> dict[tuple[int, ...], Chunk]:
        return {chunk.offsets: chunk for chunk in self.chunks}

    @cached_property
    def _chunk_grid(self) -> list[list[int]] | None:
        """The starts of chunks along each dimension, or None unless the chunks are a grid that covers the tensor."""
        starts = [sorted(set(column)) for column in zip(*(c.offsets for c in self.chunks), strict=True)]
        regular = len(self._by_offsets) == len(self.chunks) == math.prod(map(len, starts))
        ends = [
            dict(zip(column, [*column[1:], end], strict=True)) for column, end in zip(starts, self.shape, strict=False)
        ]
        for chunk in self.chunks if regular else ():
            reach = tuple(end[o] for end, o in zip(ends, chunk.offsets, strict=True))
            regular = regular and reach == tuple(map(sum, zip(chunk.offsets, chunk.sizes, strict=True)))
        return starts if regular else None

    def is_covered(self) -> bool:
        """Return whether every element lies in exactly one chunk."""
        if len(self.chunks) == 1 and self.chunks[0].sizes == self.shape:
            return not any(self.chunks[0].offsets)
        inside = all(
            0 <= o and o + s <= n
            for chunk in self.chunks
            for o, s, n in zip(chunk.offsets, chunk.sizes, self.shape, strict=True)
        )
        if not inside or sum(math.prod(chunk.sizes) for chunk in self.chunks) != math.prod(self.shape):
            return False
        if self._chunk_grid is not None:
            return True
        return all(len(list(self.overlapping(chunk.offsets, chunk.sizes))) == 1 for chunk in self.chunks)

    def chunk_at(self, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Chunk | None:
        """Return the chunk that is exactly this box, or None.

        Args:
            offsets: of the box.
            sizes: of the box.
        """
        chunk = self._by_offsets.get(offsets)
        return chunk if chunk is not None and chunk.sizes == sizes else None

    def overlapping(self, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Iterator[tuple[Chunk, Box]]:
        """Find the chunks that a box touches.

        Args:
            offsets: of the box.
            sizes: of the box.

        Yields:
            A chunk, and the box in the tensor that both have in common.
        """
        candidates: Iterator[Chunk] | tuple[Chunk, ...] = self.chunks
        if (
            self._chunk_grid is not None
        ):  # a stacked expert weight has 10⁴ chunks: look up the few, do not walk them all
            cells = [
                starts[max(bisect.bisect_right(starts, low) - 1, 0) : bisect.bisect_left(starts, low + size)]
                for starts, low, size in zip(self._chunk_grid, offsets, sizes, strict=True)
            ]
            candidates = (self._by_offsets[cell] for cell in itertools.product(*cells))
        for chunk in candidates:
            common = intersect_boxes((offsets, sizes), (chunk.offsets, chunk.sizes))
            if common is not None:
                yield chunk, common
