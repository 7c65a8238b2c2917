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
from megatron_bai.checkpoint.writer import CheckpointWriter, ItemWriter, UnitWriter, WrittenItem
from megatron_bai.distributed.rank_group import RankGroup
from megatron_bai.errors import UserError
from megatron_bai.merge.execution import journal, tiles
from megatron_bai.merge.execution.journal import UnitResult
from megatron_bai.merge.execution.thread_pool import OrderedMap, background_writer, thread_map
from megatron_bai.merge.recipe.plan import Plan, WorkUnit
from megatron_bai.merge.recipe.regions import Fate, Region

BATCH_BYTES = 8 << 20  # of the output, that a thread merges at a time: each is a turn of the lock for three threads


class HasBytes(Protocol):
    """A portion of work."""

    @property
    def name(self) -> str: ...

    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=HasBytes)


def execute_plan(
    plan: Plan, directories: Sequence[Path], ranks: RankGroup, on_bytes_read: Callable[[int], None], threads: int = 1
) -> list[dict[str, float]]:
    """Write the tensors and the index of each of the plan's sums into its directory; every rank calls it.

    Units that the directories' journals have, and whose items are as they were written, are not written again.

    Args:
        directories: one for each sum, from `journal.open_staging_dir`.
        on_bytes_read: told the number of input bytes whenever some have been merged, by any thread.
        threads: of this rank, that merge.

    Returns:
        for each sum, the 2-norm of every merged tensor, before rounding; on every rank.

    Raises:
        PermanentError: a source holds NaN or Inf, a sum leaves the dtype's range, or a tensor that must be equal
            is not.
        UserError: a source cannot be read, or the disk is full; the units finished until then count.
    """
    outputs = [(o.key, o.dtype, o.shape) for o in plan.outputs.values()]
    target = plan.base.make_writer(outputs, plan.output_spec.file_bytes)

    def begin() -> None:
        for directory in directories:
            target.prepare(directory)

    def found() -> dict[str, list[UnitResult]]:
        notes = [journal.read_finished(directory, ranks.rank, ranks.num_ranks) for directory in directories]
        return {name: [n[name] for n in notes] for name in notes[0] if all(name in n for n in notes)}

    def work() -> dict[str, list[UnitResult]]:
        units = assign_to_rank(tuple(unit for unit in plan.units if unit.name not in done), ranks)
        buffers = tiles.ThreadBuffers(len(plan.inputs), len(plan.input_weights))
        found = {}
        with background_writer() as note, thread_map(threads) as run:  # the disk takes in one unit while the next is made
            for unit in units:
                found[unit.name] = results = _write_unit(plan, unit, target, directories, run, buffers, on_bytes_read)
                note(functools.partial(_record_unit, directories, unit.name, results))
        return found

    ranks.run_on_first(begin, directories[0])
    done = {name: results for share in ranks.run_on_all(found) for name, results in share.items()}
    done |= {name: result for shares in ranks.run_on_all(work) for name, result in shares.items()}
    norms = []
    for k, directory in enumerate(directories):
        results = [done[unit.name][k] for unit in plan.units]  # in the plan's order: nothing depends on the ranks
        items = [item for result in results for item in result.written]
        _assert_covered(plan, items)
        ranks.run_on_first(functools.partial(target.finalize, directory, outputs, items), directory)
        norms.append(_norms(plan, results))
    return norms


def _norms(plan: Plan, results: Sequence[UnitResult]) -> dict[str, float]:
    """The 2-norm of every merged tensor."""
    squares = {key: 0.0 for key, output in plan.outputs.items() if output.merged}
    for result in results:
        for key, value in result.squares.items():
            squares[key] += value
    return {key: math.sqrt(value) for key, value in squares.items()}


def assign_to_rank(units: Sequence[T], ranks: RankGroup) -> list[T]:
    """This rank's portions of the work: the largest first, each to the rank with the fewest bytes so far."""
    loads = [0] * ranks.num_ranks
    mine = []
    for unit in sorted(units, key=lambda u: (-u.nbytes, u.name)):
        rank = loads.index(min(loads))
        loads[rank] += unit.nbytes
        if rank == ranks.rank:
            mine.append(unit)
    return mine


def _write_unit(
    plan: Plan,
    unit: WorkUnit,
    target: CheckpointWriter,
    directories: Sequence[Path],
    run: OrderedMap,
    buffers: tiles.ThreadBuffers,
    on_bytes_read: Callable[[int], None],
) -> list[UnitResult]:
    """Write one unit of every sum: this thread says where its pieces go, those of `run` merge and write them."""
    done = [UnitResult() for _ in plan.input_weights]
    try:
        with ExitStack() as stack:
            writers = [stack.enter_context(target.open_unit(directory, unit.name)) for directory in directories]
            for key in unit.objects:
                data = plan.base.read_object(key)
                for writer in writers:
                    writer.write_object(key, data)
            work = functools.partial(_merge_batch, plan, buffers, on_bytes_read)
            for squares in stack.enter_context(closing(run(work, _batch_items(unit, writers)))):
                for key, found in squares:
                    for result, square in zip(done, found, strict=True):
                        result.squares[key] = result.squares.get(key, 0.0) + square
            for result, writer in zip(done, writers, strict=True):
                result.written = writer.written_items
    except OSError as error:
        raise _write_error(directories, error) from None
    return done


def _record_unit(directories: Sequence[Path], unit: str, results: Sequence[UnitResult]) -> None:
    """Have a unit of every sum on disk, and remember that it is."""
    try:
        for directory, result in zip(directories, results, strict=True):
            journal.record_unit(directory, unit, result)
    except OSError as error:
        raise _write_error(directories, error) from None


def _write_error(directories: Sequence[Path], error: OSError) -> UserError:
    return UserError(f"{directories[0]} cannot be written: {error.strerror}")


ItemToMerge = tuple[Region, Box, list[ItemWriter]]
"""A box to merge, and where it goes for each sum."""


def _batch_items(unit: WorkUnit, writers: Sequence[UnitWriter]) -> Iterator[list[ItemToMerge]]:
    """A unit's pieces in order, many small ones together: a thread has no time for one expert's bias."""
    batch: list[ItemToMerge] = []
    size = 0
    for region, box in unit.items:
        nbytes = math.prod(box[1]) * region.dtype.itemsize
        if batch and size + nbytes > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append((region, box, [writer.add_item(region.key, box[0], region.dtype, box[1]) for writer in writers]))
        size += nbytes
    if batch:
        yield batch


def _merge_batch(
    plan: Plan, buffers: tiles.ThreadBuffers, on_bytes_read: Callable[[int], None], batch: list[ItemToMerge]
) -> list[tuple[str, list[float]]]:
    """Merge and write some pieces; returns, of those that are merged, the key and each sum's sum of squares."""
    squares = []
    read = 0
    for region, box, items in batch:
        found = tiles.merge_item(plan, region, box, items, buffers)
        if region.fate is Fate.MERGED:
            squares.append((region.key, found))
        read += math.prod(box[1]) * sum(source.tensors[region.key].dtype.itemsize for source in plan.inputs)
    on_bytes_read(read)
    return squares


def _assert_covered(plan: Plan, items: list[WrittenItem]) -> None:
    """Every element of every output was written once."""
    elements = dict.fromkeys(plan.outputs, 0)
    for item in items:
        if item.sizes is not None:
            elements[item.key] += math.prod(item.sizes)
    for key, output in plan.outputs.items():
        assert elements[key] == math.prod(output.shape), f"{key}: {elements[key]} elements of {output.shape} written"
