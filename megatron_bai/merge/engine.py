"""The arithmetic and its streaming: Σ coefficient · value over any number of checkpoints, in bounded memory.

(Methods that are no weighted sum bring their own arithmetic, see `combined`; the rest holds for them too.)

A tensor passes through in tiles of `TILE` elements. For each, every source's region is read into the same scratch
memory, converted, multiplied and added to the accumulator; the sum is rounded once, to the output's dtype. The
accumulator is float32 for outputs of 16 bits or fewer and float64 for wider ones, so its own rounding stays far below
the output's. Multiplication and addition are separate operations: fused ones would round differently at the ends of a
tile, and the result would depend on the tiling. As it is, no element depends on tiles, layouts or ranks.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from megatron_bai.errors import Unfit, UserError
from megatron_bai.merge import journal
from megatron_bai.merge.boxes import Box, within
from megatron_bai.merge.journal import UnitResult
from megatron_bai.merge.plan import Plan, Unit
from megatron_bai.merge.pool import Pool
from megatron_bai.merge.ranks import Ranks
from megatron_bai.merge.regions import Fate, Region
from megatron_bai.merge.slices import Part
from megatron_bai.merge.sources import Scratch
from megatron_bai.merge.targets import Target, Written
from megatron_bai.merge.values import read_all, require_finite, used

TILE = 1 << 19  # elements: large enough that Python is not what takes the time, small enough for the cache
SMALL_TILE = 1 << 16  # for methods that hold a tile of every source, and more
BATCH_BYTES = 1 << 20  # of the output, that a thread merges at a time: many small pieces, or one


class Sized(Protocol):
    """A portion of work."""

    @property
    def name(self) -> str: ...

    @property
    def nbytes(self) -> int: ...


W = TypeVar("W", bound=Sized)


class Accumulator:
    """One tile's weighted sums, in memory reused from tile to tile."""

    def __init__(self, sums: int) -> None:
        self._memory = {
            dtype: [torch.empty(TILE, dtype=dtype) for _ in range(1 + sums)] for dtype in (torch.float32, torch.float64)
        }
        self.results = Scratch()  # what is made of the sums

    def weighted_sums(self, plan: Plan, region: Region, box: Box) -> list[torch.Tensor]:
        """Σ coefficient · value of one tile for each of the plan's sums, unrounded; valid until the next call."""
        wide = region.dtype.itemsize > 2
        count = math.prod(box[1])
        term, *totals = (row[:count] for row in self._memory[torch.float64 if wide else torch.float32])
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


def combined(plan: Plan, region: Region, box: Box) -> list[torch.Tensor]:
    """The values of one tile for each of the plan's recipes, whose method is elementwise; in float64, unrounded."""
    values = read_all(plan, region, box, used(plan, {region.name})).view(len(plan.inputs), -1)
    part = Part(region.output, box)
    measure = plan.measure(part)
    return [r.combine(values, row[region.name], part, measure) for r, row in zip(plan.recipes, plan.sums)]


def execute(
    plan: Plan, directories: Sequence[Path], ranks: Ranks, advance: Callable[[int], None], threads: int = 1
) -> list[dict[str, float]]:
    """Write the tensors and the index of each of the plan's sums into its directory; every rank calls it.

    Units that the directories' journals have, and whose items are as they were written, are not written again.

    Args:
        directories: one for each sum, from `journal.stage`.
        advance: told the number of input bytes whenever some have been merged, by any thread.
        threads: of this rank, that merge.

    Returns:
        for each sum, the 2-norm of every merged tensor, before rounding; on every rank.

    Raises:
        Unfit: a source holds NaN or Inf, a sum leaves the dtype's range, or a tensor that must be equal is not.
        UserError: a source cannot be read, or the disk is full; the units finished until then count.
    """
    target = plan.base.target([(o.key, o.dtype, o.shape) for o in plan.outputs.values()], plan.form.file_bytes)

    def begin() -> None:
        for directory in directories:
            target.begin(directory)

    def found() -> dict[str, list[UnitResult]]:
        notes = [journal.finished(directory, ranks.rank, ranks.size) for directory in directories]
        return {name: [n[name] for n in notes] for name in notes[0] if all(name in n for n in notes)}

    def work() -> dict[str, list[UnitResult]]:
        units = share(tuple(unit for unit in plan.units if unit.name not in done), ranks)
        with Pool(threads, lambda: Accumulator(len(plan.sums))) as pool:
            return {unit.name: _write_unit(plan, unit, target, directories, pool, advance) for unit in units}

    ranks.first(begin, directories[0])
    done = {name: results for share in ranks.together(found) for name, results in share.items()}
    done |= {name: result for shares in ranks.together(work) for name, result in shares.items()}
    return [
        _finish(plan, target, directory, ranks, [done[unit.name][k] for unit in plan.units])
        for k, directory in enumerate(directories)
    ]


def _finish(plan: Plan, target: Target, directory: Path, ranks: Ranks, done: list[UnitResult]) -> dict[str, float]:
    """Index the units, given in the plan's order so that nothing depends on the ranks; returns the norms."""
    squares: dict[str, float] = {key: 0.0 for key, output in plan.outputs.items() if output.merged}
    for unit in done:
        for key, value in unit.squares.items():
            squares[key] += value
    items = [item for unit in done for item in unit.written]
    _assert_covered(plan, items)
    outputs = [(o.key, o.dtype, o.shape) for o in plan.outputs.values()]
    ranks.first(lambda: target.finish(directory, outputs, items), directory)
    return {key: math.sqrt(value) for key, value in squares.items()}


def share(units: Sequence[W], ranks: Ranks) -> list[W]:
    """This rank's portions of the work: the largest first, each to the rank with the fewest bytes so far."""
    loads = [0] * ranks.size
    mine = []
    for unit in sorted(units, key=lambda u: (-u.nbytes, u.name)):
        rank = loads.index(min(loads))
        loads[rank] += unit.nbytes
        if rank == ranks.rank:
            mine.append(unit)
    return mine


@contextmanager
def one_thread() -> Iterator[None]:
    """Tiles are too small for OpenMP, which is slower than one thread as soon as another process wants the core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _write_unit(
    plan: Plan,
    unit: Unit,
    target: Target,
    directories: Sequence[Path],
    pool: Pool[Accumulator],
    advance: Callable[[int], None],
) -> list[UnitResult]:
    """Write one unit of every sum: the pool's threads merge its pieces, this one writes them, in order."""
    done = [UnitResult() for _ in plan.sums]
    try:
        with ExitStack() as stack:
            writers = [stack.enter_context(target.unit(directory, unit.name)) for directory in directories]
            for key in unit.objects:
                data = plan.base.read_object(key)
                for writer in writers:
                    writer.blob(key, data)
            for pieces in pool.map(functools.partial(_merge_pieces, plan, advance), _batches(unit)):
                for region, box, values, squares in pieces:
                    for writer, value, square, result in zip(writers, values, squares, done):
                        writer.tensor(region.key, box[0], value)
                        if region.fate is Fate.MERGED:
                            result.squares[region.key] = result.squares.get(region.key, 0.0) + square
        for directory, result, writer in zip(directories, done, writers):
            result.written = writer.written
            journal.note(directory, unit.name, result)
    except OSError as error:
        raise UserError(f"{directories[0]} cannot be written: {error.strerror}") from None
    return done


def _batches(unit: Unit) -> Iterator[list[tuple[Region, Box]]]:
    """A unit's pieces in order, many small ones together: a thread has no time for one expert's bias."""
    batch: list[tuple[Region, Box]] = []
    size = 0
    for region, box in unit.pieces:
        nbytes = math.prod(box[1]) * region.dtype.itemsize
        if batch and size + nbytes > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append((region, box))
        size += nbytes
    if batch:
        yield batch


Piece = tuple[Region, Box, torch.Tensor, list[float]]
"""A merged box: its tensor, the values `[sums, *sizes]`, and for each sum the sum of its squares."""


def _merge_pieces(
    plan: Plan, advance: Callable[[int], None], batch: list[tuple[Region, Box]], accumulator: Accumulator
) -> list[Piece]:
    """Merge the boxes of a batch, in the accumulator's memory."""
    sums = len(plan.sums)
    sizes = [math.prod(box[1]) * region.dtype.itemsize for region, box in batch]
    starts = list(itertools.accumulate((-(-sums * size // 64) * 64 for size in sizes), initial=0))  # 64: a cache line
    memory = accumulator.results.take("pieces", starts[-1])
    pieces = []
    for (region, box), size, start in zip(batch, sizes, starts):
        values = memory[start : start + sums * size].view(region.dtype).view(sums, *box[1])
        pieces.append((region, box, values, _fill(plan, region, box, accumulator, values, advance)))
    return pieces


def _fill(
    plan: Plan,
    region: Region,
    piece: Box,
    accumulator: Accumulator,
    values: torch.Tensor,
    advance: Callable[[int], None],
) -> list[float]:
    """Merge one box of a tensor, tile by tile, into `values` [sums, *sizes]; returns the sums of squares."""
    itemsize = sum(source.tensors[region.key].dtype.itemsize for source in plan.inputs)
    squares = [0.0] * len(values)
    merge, tile = (combined, SMALL_TILE) if plan.recipes[0].elementwise else (accumulator.weighted_sums, TILE)
    for box in plan.tiles(region, piece, tile):
        tiles = [value[within(box, piece[0])].view(-1) for value in values]
        if region.fate is Fate.MERGED:
            for k, total in enumerate(merge(plan, region, box)):
                squares[k] += _round(plan, region, box, total, tiles[k]) ** 2
        else:
            _copy(plan, region, box, tiles)
        advance(itemsize * math.prod(box[1]))
    return squares


def _round(plan: Plan, region: Region, box: Box, total: torch.Tensor, tile: torch.Tensor) -> float:
    """Round a finished sum into `tile`; returns its 2-norm before that."""
    tile.copy_(total)
    norm = float(torch.linalg.vector_norm(total))
    if not norm <= torch.finfo(region.dtype).max:  # NaN, Inf, a value outside the dtype, or no more than large squares
        require_finite(plan, region, box)
        if not tile.isfinite().all():  # negative weights can leave the sources' range
            raise Unfit(
                f"{region.key}: the merged values are too large for {region.dtype}: check the weights and merge.dtype"
            )
        norm = float(torch.linalg.vector_norm(total, dtype=torch.float64))
    return norm


def _copy(plan: Plan, region: Region, box: Box, tiles: list[torch.Tensor]) -> None:
    tiles[0].copy_(plan.base.read(region.key, *box).reshape(-1))
    for source in plan.inputs if region.fate is Fate.EQUAL else ():
        if not torch.equal(source.read(region.key, *box).reshape(-1), tiles[0]):
            raise Unfit(
                f"{source.path} and {plan.base.path} differ in {region.key}, which is {region.dtype}: only floating"
                " point tensors can be merged"
            )
    for tile in tiles[1:]:
        tile.copy_(tiles[0])


def _assert_covered(plan: Plan, items: list[Written]) -> None:
    """Every element of every output was written once."""
    elements = dict.fromkeys(plan.outputs, 0)
    for item in items:
        if item.sizes is not None:
            elements[item.key] += math.prod(item.sizes)
    for key, output in plan.outputs.items():
        assert elements[key] == math.prod(output.shape), f"{key}: {elements[key]} elements of {output.shape} written"
