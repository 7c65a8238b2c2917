"""The streaming: any number of checkpoints are read once and merged in bounded memory, a unit of output after another.

A unit's pieces are shared by this rank's threads, each of which reads, merges (`tiles`) and writes its own.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Protocol, TypeVar

from megatron_bai.checkpoint.boxes import Box
from megatron_bai.checkpoint.writer import Item, Target, Writer, Written
from megatron_bai.distributed.rank_group import Ranks
from megatron_bai.errors import UserError
from megatron_bai.merge.execution import journal, tiles
from megatron_bai.merge.execution.journal import UnitResult
from megatron_bai.merge.execution.thread_pool import Map, one_behind, pool
from megatron_bai.merge.recipe.plan import Plan, Unit
from megatron_bai.merge.recipe.regions import Fate, Region

BATCH_BYTES = 8 << 20  # of the output, that a thread merges at a time: each is a turn of the lock for three threads


class Sized(Protocol):
    """A portion of work."""

    @property
    def name(self) -> str: ...

    @property
    def nbytes(self) -> int: ...


W = TypeVar("W", bound=Sized)


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
    outputs = [(o.key, o.dtype, o.shape) for o in plan.outputs.values()]
    target = plan.base.target(outputs, plan.form.file_bytes)

    def begin() -> None:
        for directory in directories:
            target.begin(directory)

    def found() -> dict[str, list[UnitResult]]:
        notes = [journal.finished(directory, ranks.rank, ranks.size) for directory in directories]
        return {name: [n[name] for n in notes] for name in notes[0] if all(name in n for n in notes)}

    def work() -> dict[str, list[UnitResult]]:
        units = share(tuple(unit for unit in plan.units if unit.name not in done), ranks)
        memory = tiles.Memory(len(plan.inputs), len(plan.sums))
        found = {}
        with one_behind() as note, pool(threads) as run:  # the disk takes in one unit while the next is made
            for unit in units:
                found[unit.name] = results = _write_unit(plan, unit, target, directories, run, memory, advance)
                note(functools.partial(_note, directories, unit.name, results))
        return found

    ranks.first(begin, directories[0])
    done = {name: results for share in ranks.together(found) for name, results in share.items()}
    done |= {name: result for shares in ranks.together(work) for name, result in shares.items()}
    norms = []
    for k, directory in enumerate(directories):
        results = [done[unit.name][k] for unit in plan.units]  # in the plan's order: nothing depends on the ranks
        items = [item for result in results for item in result.written]
        _assert_covered(plan, items)
        ranks.first(functools.partial(target.finish, directory, outputs, items), directory)
        norms.append(_norms(plan, results))
    return norms


def _norms(plan: Plan, results: Sequence[UnitResult]) -> dict[str, float]:
    """The 2-norm of every merged tensor."""
    squares = {key: 0.0 for key, output in plan.outputs.items() if output.merged}
    for result in results:
        for key, value in result.squares.items():
            squares[key] += value
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


def _write_unit(
    plan: Plan,
    unit: Unit,
    target: Target,
    directories: Sequence[Path],
    run: Map,
    memory: tiles.Memory,
    advance: Callable[[int], None],
) -> list[UnitResult]:
    """Write one unit of every sum: this thread says where its pieces go, those of `run` merge and write them."""
    done = [UnitResult() for _ in plan.sums]
    try:
        with ExitStack() as stack:
            writers = [stack.enter_context(target.unit(directory, unit.name)) for directory in directories]
            for key in unit.objects:
                data = plan.base.read_object(key)
                for writer in writers:
                    writer.blob(key, data)
            work = functools.partial(_merge_batch, plan, memory, advance)
            for squares in stack.enter_context(closing(run(work, _batches(unit, writers)))):
                for key, found in squares:
                    for result, square in zip(done, found, strict=True):
                        result.squares[key] = result.squares.get(key, 0.0) + square
            for result, writer in zip(done, writers, strict=True):
                result.written = writer.written
    except OSError as error:
        raise _unwritable(directories, error) from None
    return done


def _note(directories: Sequence[Path], unit: str, results: Sequence[UnitResult]) -> None:
    """Have a unit of every sum on disk, and remember that it is."""
    try:
        for directory, result in zip(directories, results, strict=True):
            journal.note(directory, unit, result)
    except OSError as error:
        raise _unwritable(directories, error) from None


def _unwritable(directories: Sequence[Path], error: OSError) -> UserError:
    return UserError(f"{directories[0]} cannot be written: {error.strerror}")


Piece = tuple[Region, Box, list[Item]]
"""A box to merge, and where it goes for each sum."""


def _batches(unit: Unit, writers: Sequence[Writer]) -> Iterator[list[Piece]]:
    """A unit's pieces in order, many small ones together: a thread has no time for one expert's bias."""
    batch: list[Piece] = []
    size = 0
    for region, box in unit.pieces:
        nbytes = math.prod(box[1]) * region.dtype.itemsize
        if batch and size + nbytes > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append((region, box, [writer.item(region.key, box[0], region.dtype, box[1]) for writer in writers]))
        size += nbytes
    if batch:
        yield batch


def _merge_batch(
    plan: Plan, memory: tiles.Memory, advance: Callable[[int], None], batch: list[Piece]
) -> list[tuple[str, list[float]]]:
    """Merge and write some pieces; returns, of those that are merged, the key and each sum's sum of squares."""
    squares = []
    read = 0
    for region, box, items in batch:
        found = tiles.merge(plan, region, box, items, memory)
        if region.fate is Fate.MERGED:
            squares.append((region.key, found))
        read += math.prod(box[1]) * sum(source.tensors[region.key].dtype.itemsize for source in plan.inputs)
    advance(read)
    return squares


def _assert_covered(plan: Plan, items: list[Written]) -> None:
    """Every element of every output was written once."""
    elements = dict.fromkeys(plan.outputs, 0)
    for item in items:
        if item.sizes is not None:
            elements[item.key] += math.prod(item.sizes)
    for key, output in plan.outputs.items():
        assert elements[key] == math.prod(output.shape), f"{key}: {elements[key]} elements of {output.shape} written"
