"""The arithmetic: one box of a tensor, merged tile by tile in the memory of a thread.

Of a weighted sum Σ coefficient · value, every source's tile is multiplied and added in the order of the sources; the
sum is rounded once, to the output's dtype. It is formed in float32 for outputs of 16 bits or fewer and in float64 for wider
ones, so that its own rounding stays far below the output's. Multiplication and addition are separate operations: fused
ones would round differently at the ends of a tile, and the result would depend on the tiling. As it is, no element
depends on tiles, layouts or ranks.

bfloat16, which large checkpoints are in, goes through a compiled kernel, whatever else through torch; where both can,
their bits are the same. Methods that are no weighted sum bring their own arithmetic (`Recipe.combine`).
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from megatron_bai.errors import Unfit
from megatron_bai.merge.boxes import Box
from megatron_bai.merge.plan import Plan
from megatron_bai.merge.regions import Fate, Region
from megatron_bai.merge.slices import Part
from megatron_bai.merge.sources import Scratch
from megatron_bai.merge.targets import Item
from megatron_bai.merge.values import read_all, require_finite, used

TILE = 1 << 17  # elements: large enough that Python is not what takes the time, small enough for the cache
SMALL_TILE = 1 << 16  # for methods that hold a tile of every source in float64, and more

Merged = Iterator[tuple[memoryview, float]]
"""For each of the plan's sums, a tile's bytes, valid until the next is asked for, and the sum of its squares."""


class Memory(Scratch):
    """What a thread merges in. Of this, only what is used is ever backed by memory."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.values = np.empty((inputs, TILE), np.uint16)
        self.rows = [memoryview(row).cast("B") for row in self.values]
        self.out = np.empty(TILE, np.uint16)
        self.out_bytes = memoryview(self.out).cast("B")


def merge(plan: Plan, region: Region, piece: Box, items: Sequence[Item], memory: Memory) -> list[float]:
    """Merge a box of a tensor into one item for each of the plan's sums.

    Returns:
        for each sum the sum of the squares, before rounding; 0 for what is not merged.

    Raises:
        Unfit: a source holds NaN or Inf, a sum leaves the dtype's range, or a tensor that must be equal is not.
        UserError: a source cannot be read.
    """
    squares = [0.0] * len(items)
    way, limit = _way(plan, region, piece, memory)
    for box in plan.tiles(region, piece, limit):
        for k, (data, square) in enumerate(way(box)):
            items[k].write(data)
            squares[k] += square
    return squares


def _way(plan: Plan, region: Region, piece: Box, memory: Memory) -> tuple[Callable[[Box], Merged], int]:
    """How to merge the tiles of a piece, in order, and how many elements one may have."""
    if region.fate is not Fate.MERGED:
        return lambda box: _copied(plan, region, box, memory), TILE
    if plan.recipes[0].elementwise:
        return lambda box: _combined(plan, region, box, memory), SMALL_TILE
    dtypes = {region.dtype, *(source.tensors[region.key].dtype for source in plan.inputs)}
    if dtypes == {torch.bfloat16}:
        return _Compiled(plan, region, piece, memory), TILE
    return lambda box: _summed(plan, region, box, memory), TILE


class _Compiled:
    """Weighted sums of bfloat16 values, by `kernel`. The tiles of a piece must come in order."""

    def __init__(self, plan: Plan, region: Region, piece: Box, memory: Memory):
        from megatron_bai.merge import kernel  # which takes half a second where nothing of this kind is merged

        self._kernel, self._plan, self._region, self._memory = kernel, plan, region, memory
        self._streams = [source.stream(region.key, *piece) for source in plan.inputs]
        self._sums = None if plan.measures else self._coefficients(piece)

    def _coefficients(self, box: Box) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each sum, which inputs have a part in it, and their coefficients."""
        found = []
        for row in self._plan.coefficients(self._region, box):
            used = [i for i, c in enumerate(row) if c != 0]  # adding 0 · x would turn -0 into 0
            found.append((np.array(used), np.array([row[i] for i in used], np.float32)))
        return found

    def __call__(self, box: Box) -> Merged:
        memory, count = self._memory, math.prod(box[1])
        for i, stream in enumerate(self._streams):
            if stream is not None:
                stream.readinto(memory.rows[i][: count * 2])
            else:
                values = torch.from_numpy(memory.values[i, :count]).view(torch.bfloat16).view(box[1])
                values.copy_(self._plan.inputs[i].read(self._region.key, *box))
        out, data = memory.out[:count], memory.out_bytes[: count * 2]
        for used, coefficients in self._sums or self._coefficients(box):
            largest, squares = self._kernel.weighted_sum(memory.values, used, coefficients, out)
            if largest > self._kernel.LARGEST:
                _refuse(self._plan, self._region, box)
            yield data, squares


def _summed(plan: Plan, region: Region, box: Box, scratch: Scratch) -> Merged:
    """Weighted sums of any values, by torch."""
    for total in weighted_sums(plan, region, box, scratch):
        yield _round(plan, region, box, total, scratch)


def weighted_sums(plan: Plan, region: Region, box: Box, scratch: Scratch) -> list[torch.Tensor]:
    """Σ coefficient · value of one tile for each of the plan's sums, unrounded; valid until the next call."""
    dtype = torch.float64 if region.dtype.itemsize > 2 else torch.float32
    size = math.prod(box[1]) * dtype.itemsize
    term, *totals = (scratch.take(f"sum {k}", size).view(dtype) for k in range(1 + len(plan.sums)))
    begun = [False] * len(totals)
    coefficients = plan.coefficients(region, box)
    for i, source in enumerate(plan.inputs):
        values = source.read(region.key, *box).reshape(-1)
        for k, total in enumerate(totals):
            coefficient = coefficients[k][i]
            if coefficient == 0:
                continue  # as if this sum did not know the source: adding 0 would turn -0 into 0
            if begun[k]:
                total.add_(term.copy_(values).mul_(coefficient))
            else:
                total.copy_(values).mul_(coefficient)
                begun[k] = True
    return totals


def _combined(plan: Plan, region: Region, box: Box, scratch: Scratch) -> Merged:
    """The values of an elementwise method, in float64 until they are rounded."""
    values = read_all(plan, region, box, used(plan, {region.name})).view(len(plan.inputs), -1)
    part = Part(region.output, box)
    measure = plan.measure(part)
    for recipe, row in zip(plan.recipes, plan.sums):
        yield _round(plan, region, box, recipe.combine(values, row[region.name], part, measure), scratch)


def _round(plan: Plan, region: Region, box: Box, total: torch.Tensor, scratch: Scratch) -> tuple[memoryview, float]:
    """Round finished sums."""
    tile = _take(region, total.numel(), scratch).copy_(total)
    norm = float(torch.linalg.vector_norm(total))
    if not norm <= torch.finfo(region.dtype).max:  # NaN, Inf, a value outside the dtype, or no more than large squares
        if not tile.isfinite().all():
            _refuse(plan, region, box)
        norm = float(torch.linalg.vector_norm(total, dtype=torch.float64))
    return _bytes(tile), norm**2


def _copied(plan: Plan, region: Region, box: Box, scratch: Scratch) -> Merged:
    tile = _take(region, math.prod(box[1]), scratch)
    tile.copy_(plan.base.read(region.key, *box).reshape(-1))
    for source in plan.inputs if region.fate is Fate.EQUAL else ():
        if not torch.equal(source.read(region.key, *box).reshape(-1), tile):
            raise Unfit(
                f"{source.path} and {plan.base.path} differ in {region.key}, which is {region.dtype}: only floating"
                " point tensors can be merged"
            )
    for _ in plan.sums:
        yield _bytes(tile), 0.0


def _take(region: Region, count: int, scratch: Scratch) -> torch.Tensor:
    return scratch.take("tile", count * region.dtype.itemsize).view(region.dtype)


def _bytes(tile: torch.Tensor) -> memoryview:
    return memoryview(tile.view(torch.uint8).numpy())


def _refuse(plan: Plan, region: Region, box: Box) -> None:
    """Say why a tile is not finite."""
    require_finite(plan, region, box)
    raise Unfit(  # negative weights can leave the sources' range
        f"{region.key}: the merged values are too large for {region.dtype}: check the weights and merge.dtype"
    )
