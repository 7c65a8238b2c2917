"""The arithmetic and its streaming: Σ coefficient · value over any number of checkpoints, in bounded memory.

A tensor passes through in tiles of `TILE` elements. For each, every source's region is read into the same scratch
memory, converted, multiplied and added to the accumulator; the sum is rounded once, to the output's dtype. The
accumulator is float32 for outputs of 16 bits or fewer and float64 for wider ones, so its own rounding stays far below
the output's. Multiplication and addition are separate operations: fused ones would round differently at the ends of a
tile, and the result would depend on the tiling. As it is, no element depends on tiles, layouts or ranks.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_bai.errors import UserError
from megatron_bai.merge.boxes import Box, split, within
from megatron_bai.merge.plan import Output, Plan, Unit
from megatron_bai.merge.ranks import Ranks
from megatron_bai.merge.sources import Scratch
from megatron_bai.merge.targets import Target, Written

TILE = 1 << 18  # elements: the accumulator and one converted source stay in a core's cache


class Accumulator:
    """One tile's weighted sum, in memory reused from tile to tile."""

    def __init__(self) -> None:
        self._memory = {dtype: torch.empty(2, TILE, dtype=dtype) for dtype in (torch.float32, torch.float64)}

    def weighted_sum(self, plan: Plan, output: Output, box: Box) -> torch.Tensor:
        """Σ coefficient · value of one tile, unrounded; valid until the next call."""
        wide = output.dtype.itemsize > 2
        total, term = (row[: math.prod(box[1])] for row in self._memory[torch.float64 if wide else torch.float32])
        for i, (source, coefficient) in enumerate(plan.inputs):
            values = source.read(output.key, *box).reshape(-1)
            if i == 0:
                total.copy_(values).mul_(coefficient)
            else:
                total.add_(term.copy_(values).mul_(coefficient))
        return total


def execute(plan: Plan, directory: Path, ranks: Ranks, advance: Callable[[int], None]) -> dict[str, float]:
    """Write the merged checkpoint's tensors and index into `directory`; every rank calls it.

    Args:
        advance: told the number of input bytes whenever some have been merged.

    Returns:
        the 2-norm of every merged tensor, before rounding; on every rank.

    Raises:
        UserError: a source cannot be read or holds NaN or Inf, a tensor that must be equal is not, or the disk is full.
    """

    target = plan.base.target()

    def work() -> tuple[dict[str, list[Written]], dict[str, dict[str, float]]]:
        done = {}
        with one_thread():
            for unit in share(plan.units, ranks):
                done[unit.name] = _write_unit(plan, unit, target, directory, advance)
        return {name: w for name, (w, _) in done.items()}, {name: s for name, (_, s) in done.items()}

    ranks.first(lambda: target.begin(directory))
    results = ranks.together(work)
    written = {name: items for files, _ in results for name, items in files.items()}
    squares = {name: sums for _, files in results for name, sums in files.items()}
    norms: dict[str, float] = {key: 0.0 for key, output in plan.outputs.items() if output.merged}
    for unit in plan.units:  # in the plan's order: the sums must not depend on the ranks
        for key, value in squares[unit.name].items():
            norms[key] += value
    items = [item for unit in plan.units for item in written[unit.name]]
    _assert_covered(plan, items)
    outputs = [(o.key, o.dtype, o.shape) for o in plan.outputs.values()]
    ranks.first(lambda: target.finish(directory, outputs, items))
    return {key: math.sqrt(value) for key, value in norms.items()}


def share(units: tuple[Unit, ...], ranks: Ranks) -> list[Unit]:
    """The units of this rank: the largest first, each to the rank with the fewest bytes so far."""
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


def _write_unit(plan: Plan, unit: Unit, target: Target, directory: Path, advance: Callable[[int], None]):
    """Write one file; returns its items and, for each tensor, the sum of its squares in this file."""
    accumulator, memory = Accumulator(), Scratch()
    squares: dict[str, float] = {}
    try:
        with target.unit(directory, unit.name) as writer:
            for key in unit.objects:
                blob = plan.base.objects[key]
                writer.blob(key, plan.base.read_bytes(blob.file, blob.start, blob.length))
            for output, (offsets, sizes) in unit.pieces:
                piece = memory.take("piece", math.prod(sizes) * output.dtype.itemsize).view(output.dtype).view(sizes)
                itemsize = plan.base.tensors[output.key].dtype.itemsize  # the same in all sources
                for box in split(offsets, sizes, TILE):
                    tile = piece[within(box, offsets)].view(-1)
                    if output.merged:
                        norm = _merge_tile(plan, output, box, accumulator, tile)
                        squares[output.key] = squares.get(output.key, 0.0) + norm**2
                    else:
                        _copy_equal(plan, output, box, tile)
                    advance(len(plan.inputs) * itemsize * tile.numel())
                writer.tensor(output.key, offsets, piece)
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror}") from None
    return writer.written, squares


def _merge_tile(plan: Plan, output: Output, box: Box, accumulator: Accumulator, tile: torch.Tensor) -> float:
    """Fill `tile` with the merged values of `box`; returns their 2-norm before rounding."""
    total = accumulator.weighted_sum(plan, output, box)
    tile.copy_(total)
    norm = float(torch.linalg.vector_norm(total))
    if not norm <= torch.finfo(output.dtype).max:  # NaN, Inf, a value outside the dtype, or no more than large squares
        _require_finite(plan, output, box, tile)
        norm = float(torch.linalg.vector_norm(total, dtype=torch.float64))
    return norm


def _require_finite(plan: Plan, output: Output, box: Box, tile: torch.Tensor) -> None:
    """Say which source a NaN or Inf came from."""
    for source, _ in plan.inputs:
        finite = source.read(output.key, *box).isfinite()
        if not finite.all():
            at = tuple(o + int(i) for o, i in zip(box[0], finite.logical_not().nonzero()[0]))
            raise UserError(f"{source.path}: {output.key} holds NaN or Inf at {at}: it must not be merged")
    if not tile.isfinite().all():  # negative weights can leave the sources' range
        raise UserError(f"{output.key}: the weighted sum is too large for {output.dtype}: check merge.weights")


def _copy_equal(plan: Plan, output: Output, box: Box, tile: torch.Tensor) -> None:
    tile.copy_(plan.base.read(output.key, *box).reshape(-1))
    for source, _ in plan.inputs:
        if not torch.equal(source.read(output.key, *box).reshape(-1), tile):
            raise UserError(
                f"{source.path} and {plan.base.path} differ in {output.key}, which is {output.dtype}: only floating"
                " point tensors can be merged"
            )


def _assert_covered(plan: Plan, items: list[Written]) -> None:
    """Every element of every output was written once."""
    elements = dict.fromkeys(plan.outputs, 0)
    for item in items:
        if item.sizes is not None:
            elements[item.key] += math.prod(item.sizes)
    for key, output in plan.outputs.items():
        assert elements[key] == math.prod(output.shape), f"{key}: {elements[key]} elements of {output.shape} written"
