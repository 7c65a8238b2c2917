"""The arithmetic of a merge: a batch of items, tile by tile in the buffers of a thread.

In a weighted sum Σ coefficient · value every source's tile is multiplied and added in the order of the sources; the
sum is rounded once, to the output's dtype. It is formed in float32 for outputs of 16 bits or fewer and in float64 for
wider ones, so that its own rounding stays far below the output's. Multiplication and addition are separate operations:
fused ones would round differently at the ends of a tile, and the result would depend on the tiling. So no element
depends on tiles, layouts or ranks.

Weighted sums of bfloat16, the dtype of large checkpoints, are computed by a compiled kernel, many items at a time where
each lies in one record of every source; others by torch, with the same bits where both can compute them. Methods that
are no weighted sum have their own arithmetic (`Recipe.combine`).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_bai.checkpoint.boxes import Box
from megatron_bai.checkpoint.positional_io import OPEN_FILES
from megatron_bai.checkpoint.reader import ChunkStream, ScratchBuffers
from megatron_bai.checkpoint.writer import ItemWriter
from megatron_bai.errors import PermanentError
from megatron_bai.merge.execution.source_values import inputs_with_weight, raise_not_finite, read_inputs
from megatron_bai.merge.recipe.plan import Plan
from megatron_bai.merge.recipe.regions import Fate, Region
from megatron_bai.merge.recipe.slices import SliceBox

TILE = 1 << 17  # elements: large enough that Python's overhead does not count, small enough for the cache
SMALL_TILE = 1 << 16  # for methods that hold a tile of every source in float64, and more

Coefficients = tuple[np.ndarray, np.ndarray]
"""Number and indices of each result's inputs, int64 `[results, 1 + inputs]`; coefficients, float32 `[results, …]`."""

ItemToMerge = tuple[Region, Box, list[ItemWriter]]
"""A box to merge, and the item it is in each result."""

TileResults = Iterator[tuple[memoryview, float]]
"""For each result, a tile's bytes, valid until the next is requested, and the sum of its squares."""


class ThreadBuffers(ScratchBuffers):
    """The buffers of one thread; only what is used is backed by buffers."""

    def __init__(self, num_inputs: int, num_results: int) -> None:
        super().__init__()
        self.values = np.empty((num_inputs, TILE), np.uint16)
        self.value_bytes = [row.data.cast("B") for row in self.values]
        self.out = np.empty(TILE, np.uint16)
        self.out_bytes = self.out.data.cast("B")
        self.coefficients: dict[tuple[tuple[float, ...], ...], Coefficients] = {}  # by those of each result


def merge_items(plan: Plan, batch: Sequence[ItemToMerge], buffers: ThreadBuffers) -> list[list[float]]:
    """Merge boxes of tensors into one item of each result.

    Args:
        plan: the merge.
        batch: the boxes, each with the items, which are written.
        buffers: of this thread.

    Returns:
        For each box and each result the sum of the squares, before rounding; 0 for what is not merged.

    Raises:
        PermanentError: a source holds NaN or Inf, a value leaves the dtype's range, or a tensor that must be equal
            is not.
        UserError: a source cannot be read.
    """
    squares = np.zeros((len(batch), len(plan.input_weights)))
    bf16_merger: _Bf16Merger | None = None
    for (region, item_box, items), item_squares in zip(batch, squares, strict=True):
        if _is_bf16_sum(plan, region):
            bf16_merger = bf16_merger or _Bf16Merger(plan, buffers)
            bf16_merger.merge(region, item_box, items, item_squares)
            continue
        merge_tile, limit = _tile_merger(plan, region, buffers)
        for box in plan.tiles(region, item_box, limit):
            for k, (data, square) in enumerate(merge_tile(box)):
                items[k].write(data)
                item_squares[k] += square
    if bf16_merger is not None:
        bf16_merger.flush()
    return squares.tolist()


def _tile_merger(plan: Plan, region: Region, buffers: ThreadBuffers) -> tuple[Callable[[Box], TileResults], int]:
    """Return the function by which torch merges a tile of a region, and the largest number of elements of one."""
    if region.fate is not Fate.MERGED:
        return lambda box: _copy_tile(plan, region, box, buffers), TILE
    if plan.recipes[0].elementwise:
        return lambda box: _merge_elementwise(plan, region, box, buffers), SMALL_TILE
    return lambda box: _merge_weighted_sum(plan, region, box, buffers), TILE


def _is_bf16_sum(plan: Plan, region: Region) -> bool:
    """Return whether a region is a weighted sum of bfloat16 values."""
    if region.fate is not Fate.MERGED or plan.recipes[0].elementwise or region.dtype != torch.bfloat16:
        return False
    return all(source.tensors[region.key].dtype == torch.bfloat16 for source in plan.inputs)


@dataclass(slots=True)
class _Bf16Box:
    """A box to merge, whose elements are contiguous in each result's item; in a source, where it has a stream of it."""

    region: Region
    box: Box
    streams: list[ChunkStream | None]
    items: list[ItemWriter]
    squares: np.ndarray  # float64 `[results]`, to which those of the elements are added
    remaining: int  # elements yet to be merged


class _Bf16Merger:
    """Weighted sums of bfloat16 values, by `bf16_kernel`, which streams many boxes at a time: `flush` does the last.

    Between two boxes Python would run with cold caches, and wait for the lock that the other threads take for theirs.
    """

    def __init__(self, plan: Plan, buffers: ThreadBuffers):
        from megatron_bai.merge.execution import bf16_kernel  # its import takes half a second, and is not always needed

        self._kernel, self._plan, self._buffers = bf16_kernel, plan, buffers
        self._waiting: list[_Bf16Box] = []  # of different items, all with these:
        self._coefficients: Coefficients | None = None

    def merge(self, region: Region, item_box: Box, items: list[ItemWriter], squares: np.ndarray) -> None:
        """Merge an item as `merge_items` does, at once or with the next `flush`."""
        streams = [source.stream(region.key, *item_box) for source in self._plan.inputs]
        count = math.prod(item_box[1])
        can_stream = self._kernel.stream is not None and count > 0 and None not in streams
        for box in self._plan.tiles(region, item_box, count if can_stream else TILE):
            coefficients = self._choose_coefficients(region, box)
            bf16_box = _Bf16Box(region, box, streams, items, squares, math.prod(box[1]))
            if not can_stream:
                self._merge_tile(bf16_box, bf16_box.remaining, coefficients)
                continue
            waiting = self._waiting
            if waiting and (coefficients is not self._coefficients or waiting[-1].items is items):
                self.flush()
            self._coefficients = coefficients
            self._waiting.append(bf16_box)
            if len(self._waiting) == OPEN_FILES:  # each may be in another file, and all are open at once
                self.flush()

    def flush(self) -> None:
        """Merge what waits; where the kernel stops, Python merges a tile, which raises the error if there is one."""
        waiting, self._waiting = self._waiting, []
        while waiting:
            assert self._coefficients is not None
            self._stream(waiting, self._coefficients)
            waiting = [each for each in waiting if each.remaining]
            if waiting:
                self._merge_tile(waiting[0], min(waiting[0].remaining, TILE), self._coefficients)
                waiting = waiting[not waiting[0].remaining :]

    def _choose_coefficients(self, region: Region, box: Box) -> Coefficients:
        """Return the coefficients in a box, which are the same for all of its elements; equal ones are one object."""
        all_coefficients = tuple(self._plan.coefficients(region, box))
        cache = self._buffers.coefficients
        if all_coefficients not in cache:
            rows = np.zeros((len(all_coefficients), 1 + len(self._plan.inputs)), np.int64)
            numbers = np.zeros((len(all_coefficients), len(self._plan.inputs)), np.float32)
            for k, row in enumerate(all_coefficients):
                used = [i for i, c in enumerate(row) if c != 0]  # adding 0 · x would turn -0 into 0
                rows[k, : 1 + len(used)] = len(used), *used
                numbers[k, : len(used)] = [row[i] for i in used]
            if self._plan.slice_stats:
                return rows, numbers  # of one slice: the next has others
            cache[all_coefficients] = rows, numbers
        return cache[all_coefficients]

    def _stream(self, boxes: Sequence[_Bf16Box], coefficients: Coefficients) -> None:
        """Merge boxes of different items up to the first error, and count what is done of each."""
        for box in boxes:
            for item in box.items:
                if item.offset == item.start:
                    item.write(b"")  # its head
        files: list[list[ChunkStream | ItemWriter]] = [[*filter(None, box.streams), *box.items] for box in boxes]
        file_offsets = np.array([[(file.fd, file.offset) for file in row] for row in files], np.int64)
        crcs = np.array([[file.crc for file in row] for row in files], np.uint32)
        num_bytes = np.array([2 * box.remaining for box in boxes], np.int64)
        done, squares = np.zeros_like(num_bytes), np.array([box.squares for box in boxes])
        assert self._kernel.stream is not None
        in_files, scratch = (file_offsets, crcs, num_bytes, done), (self._buffers.values, self._buffers.out)
        self._kernel.stream(*in_files, *coefficients, squares, *scratch)
        for box, row, box_squares, count, box_crcs in zip(
            boxes, files, squares, done.tolist(), crcs.tolist(), strict=True
        ):
            box.squares[:] = box_squares
            box.remaining -= count // 2
            for file, crc in zip(row, box_crcs, strict=True):
                file.advance(count, crc)
            for item in box.items:
                if item.remaining == 0:
                    item.write(b"")  # its tail

    def _merge_tile(self, box: _Bf16Box, count: int, coefficients: Coefficients) -> None:
        """Merge the next `count` elements of a box, or all of it where a source has no stream."""
        buffers, (rows, numbers) = self._buffers, coefficients
        for i, (source, stream) in enumerate(zip(self._plan.inputs, box.streams, strict=True)):
            if stream is not None:
                stream.read_into(buffers.value_bytes[i][: count * 2])
            else:
                values = torch.from_numpy(buffers.values[i, :count]).view(torch.bfloat16).view(box.box[1])
                values.copy_(source.read(box.region.key, *box.box))
        for k, item in enumerate(box.items):
            terms = rows[k, 0]
            largest, squares = self._kernel.weighted_sum(
                buffers.values, rows[k, 1 : 1 + terms], numbers[k, :terms], buffers.out[:count]
            )
            if largest > self._kernel.MAX_FINITE_BITS:
                raise_not_finite(self._plan, box.region, box.box)
            item.write(buffers.out_bytes[: count * 2])
            box.squares[k] += squares
        box.remaining -= count


def _merge_weighted_sum(plan: Plan, region: Region, box: Box, scratch: ScratchBuffers) -> TileResults:
    """Compute weighted sums of any values by torch."""
    for total in weighted_sums(plan, region, box, scratch):
        yield _round_tile(plan, region, box, total, scratch)


def weighted_sums(plan: Plan, region: Region, box: Box, scratch: ScratchBuffers) -> list[torch.Tensor]:
    """Compute Σ coefficient · value of one tile for each result, unrounded; valid until the next call.

    Args:
        plan: the merge.
        region: which the tile lies in.
        box: of the tile.
        scratch: buffers of this thread.

    Returns:
        For each result float32 `[elements]`, or float64 where the output is wider than 16 bits.
    """
    dtype = torch.float64 if region.dtype.itemsize > 2 else torch.float32
    nbytes = math.prod(box[1]) * dtype.itemsize
    term, *totals = (scratch.get(f"sum {k}", nbytes).view(dtype) for k in range(1 + len(plan.input_weights)))
    started = [False] * len(totals)
    coefficients = plan.coefficients(region, box)
    for i, source in enumerate(plan.inputs):
        values = source.read(region.key, *box).reshape(-1)
        for k, total in enumerate(totals):
            coefficient = coefficients[k][i]
            if coefficient == 0:
                continue  # as if this result did not have the source: adding 0 would turn -0 into 0
            if started[k]:
                total.add_(term.copy_(values).mul_(coefficient))
            else:
                total.copy_(values).mul_(coefficient)
                started[k] = True
    return totals


def _merge_elementwise(plan: Plan, region: Region, box: Box, scratch: ScratchBuffers) -> TileResults:
    """Compute the values of an elementwise method, in float64 until they are rounded."""
    values = read_inputs(plan, region, box, inputs_with_weight(plan, {region.name})).view(len(plan.inputs), -1)
    slice_box = SliceBox(region.output, box)
    stats = plan.stats_of(slice_box)
    for recipe, row in zip(plan.recipes, plan.input_weights, strict=True):
        total = recipe.combine(values, row[region.name], slice_box, stats)
        yield _round_tile(plan, region, box, total, scratch)


def _round_tile(
    plan: Plan, region: Region, box: Box, total: torch.Tensor, scratch: ScratchBuffers
) -> tuple[memoryview, float]:
    """Round a tile to the output's dtype; return its bytes and the sum of squares before rounding."""
    tile = _tile_buffer(region, total.numel(), scratch).copy_(total)
    norm = float(torch.linalg.vector_norm(total))
    if not norm <= torch.finfo(region.dtype).max:  # NaN, Inf, a value outside the dtype, or no more than large squares
        if not tile.isfinite().all():
            raise_not_finite(plan, region, box)
        norm = float(torch.linalg.vector_norm(total, dtype=torch.float64))
    return _bytes(tile), norm**2


def _copy_tile(plan: Plan, region: Region, box: Box, scratch: ScratchBuffers) -> TileResults:
    """Copy a tile of the base; where it must be equal in all sources, compare them."""
    tile = _tile_buffer(region, math.prod(box[1]), scratch)
    tile.copy_(plan.base.read(region.key, *box).reshape(-1))
    for source in plan.inputs if region.fate is Fate.EQUAL else ():
        if not torch.equal(source.read(region.key, *box).reshape(-1), tile):
            raise PermanentError(
                f"{source.path} and {plan.base.path} differ in {region.key}, which is {region.dtype}: only floating"
                " point tensors can be merged"
            )
    for _ in plan.input_weights:
        yield _bytes(tile), 0.0


def _tile_buffer(region: Region, count: int, scratch: ScratchBuffers) -> torch.Tensor:
    """Return a buffer for `count` elements of the output."""
    return scratch.get("tile", count * region.dtype.itemsize).view(region.dtype)


def _bytes(tile: torch.Tensor) -> memoryview:
    """Return a tile's bytes, without a copy."""
    return tile.view(torch.uint8).numpy().data
