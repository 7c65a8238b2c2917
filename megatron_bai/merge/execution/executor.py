"""The executor: any number of checkpoints are read once and merged in bounded memory, unit by unit of the output.

Each of this rank's threads writes a unit of its own: two that write into one file wait for each other. The units that
remain when there are fewer than threads are divided instead. A thread reads, merges (`tiles`) and writes its items.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import chain
from pathlib import Path
from typing import Protocol, TypeVar

from megatron_bai.checkpoint.writer import CheckpointWriter, UnitWriter, WrittenItem
from megatron_bai.distributed.rank_group import RankGroup
from megatron_bai.errors import UserError
from megatron_bai.merge.execution import journal, tiles
from megatron_bai.merge.execution.journal import UnitResult
from megatron_bai.merge.execution.thread_pool import OrderedMap, background_writer, thread_map
from megatron_bai.merge.recipe.plan import Plan, WorkUnit
from megatron_bai.merge.recipe.regions import Fate

BATCH_BYTES = 8 << 20  # of the output, that a thread merges at a time: the interpreter lock is taken for each


class HasBytes(Protocol):
    """Work of a known size, which ranks share."""

    @property
    def name(self) -> str:
        """A name that orders work of the same size."""

    @property
    def nbytes(self) -> int:
        """The size by which it is shared."""


T = TypeVar("T", bound=HasBytes)


def execute_plan(
    plan: Plan, directories: Sequence[Path], ranks: RankGroup, on_bytes_read: Callable[[int], None], threads: int = 1
) -> list[dict[str, float]]:
    """Write the tensors and the index of each of the plan's results into its directory. Collective.

    Units that the directories' journals have, and whose items have their CRC-32s, are not written again.

    Args:
        plan: the merge.
        directories: one for each result, from `journal.open_staging_dir`.
        ranks: which share the units.
        on_bytes_read: called with the number of input bytes whenever some have been merged, by any thread.
        threads: number of threads of this rank that merge.

    Returns:
        For each result the 2-norm of every merged tensor, before rounding; on every rank.

    Raises:
        PermanentError: a source holds NaN or Inf, a value leaves the dtype's range, or a tensor that must be equal
            is not.
        UserError: a source cannot be read, or the disk is full; the units finished until then are in the journal.
    """
    outputs = [(o.key, o.dtype, o.shape) for o in plan.outputs.values()]
    checkpoint_writer = plan.base.make_writer(outputs, plan.output_spec.file_bytes)

    def prepare() -> None:
        for directory in directories:
            checkpoint_writer.prepare(directory)

    def read_journals() -> dict[str, list[UnitResult]]:
        journals = [journal.read_finished(directory, ranks.rank, ranks.num_ranks) for directory in directories]
        names = [name for name in journals[0] if all(name in units for units in journals)]
        return {name: [units[name] for units in journals] for name in names}

    def write_units() -> dict[str, list[UnitResult]]:
        units = assign_to_rank(tuple(unit for unit in plan.units if unit.name not in done), ranks)
        return _write_units(plan, units, checkpoint_writer, directories, on_bytes_read, threads)

    ranks.run_on_first(prepare, directories[0])
    done = {name: results for units in ranks.run_on_all(read_journals) for name, results in units.items()}
    done |= {name: results for units in ranks.run_on_all(write_units) for name, results in units.items()}
    norms = []
    for result_index, directory in enumerate(directories):
        # in the plan's order: nothing depends on the number of ranks
        results = [done[unit.name][result_index] for unit in plan.units]
        items = [item for result in results for item in result.written]
        _assert_covered(plan, items)
        ranks.run_on_first(functools.partial(checkpoint_writer.finalize, directory, outputs, items), directory)
        norms.append(_compute_norms(plan, results))
    return norms


def _write_units(
    plan: Plan,
    units: Sequence[WorkUnit],
    checkpoint_writer: CheckpointWriter,
    directories: Sequence[Path],
    on_bytes_read: Callable[[int], None],
    threads: int,
) -> dict[str, list[UnitResult]]:
    """Write this rank's units of every result, and record each once it is complete."""
    buffers = tiles.ThreadBuffers(len(plan.inputs), len(plan.input_weights))
    num_undivided = len(units) // threads * threads
    written = {}

    def write(run: OrderedMap, unit: WorkUnit) -> list[UnitResult]:
        return _write_unit(plan, unit, checkpoint_writer, directories, run, buffers, on_bytes_read)

    with background_writer() as in_background, thread_map(threads) as run:  # a unit is flushed during the next
        undivided = run(functools.partial(write, run.in_turn), units[:num_undivided])
        divided = (write(run, unit) for unit in units[num_undivided:])
        with closing(undivided):
            for unit, results in zip(units, chain(undivided, divided), strict=True):
                written[unit.name] = results
                in_background(functools.partial(_record_unit, directories, unit.name, results))
    return written


def _compute_norms(plan: Plan, results: Sequence[UnitResult]) -> dict[str, float]:
    """Compute the 2-norm of every merged tensor from the sums of squares of its items."""
    squares = {key: 0.0 for key, output in plan.outputs.items() if output.merged}
    for result in results:
        for key, value in result.squares.items():
            squares[key] += value
    return {key: math.sqrt(value) for key, value in squares.items()}


def assign_to_rank(units: Sequence[T], ranks: RankGroup) -> list[T]:
    """Return this rank's units: the largest first, each assigned to the rank with the fewest bytes so far.

    Args:
        units: of all ranks, the same on each.
        ranks: which share them.

    Returns:
        This rank's, the largest first. With the other ranks' they are all units, each once.
    """
    loads = [0] * ranks.num_ranks
    assigned = []
    for unit in sorted(units, key=lambda u: (-u.nbytes, u.name)):
        rank = loads.index(min(loads))
        loads[rank] += unit.nbytes
        if rank == ranks.rank:
            assigned.append(unit)
    return assigned


def _write_unit(
    plan: Plan,
    unit: WorkUnit,
    checkpoint_writer: CheckpointWriter,
    directories: Sequence[Path],
    run: OrderedMap,
    buffers: tiles.ThreadBuffers,
    on_bytes_read: Callable[[int], None],
) -> list[UnitResult]:
    """Write one unit of every result: this thread allocates its items, which `run` has merged and written."""
    results = [UnitResult() for _ in plan.input_weights]
    try:
        with ExitStack() as stack:
            units = [checkpoint_writer.open_unit(directory, unit.name) for directory in directories]
            writers = [stack.enter_context(writer) for writer in units]
            for key in unit.objects:
                data = plan.base.read_object(key)
                for writer in writers:
                    writer.write_object(key, data)
            merge_batch = functools.partial(_merge_batch, plan, buffers, on_bytes_read)
            for squares in stack.enter_context(closing(run(merge_batch, _batch_items(unit, writers)))):
                for key, squares_of_results in squares:
                    for result, square in zip(results, squares_of_results, strict=True):
                        result.squares[key] = result.squares.get(key, 0.0) + square
            for result, writer in zip(results, writers, strict=True):
                result.written = writer.written_items
    except OSError as error:
        raise _write_error(directories, error) from None
    return results


def _record_unit(directories: Sequence[Path], unit: str, results: Sequence[UnitResult]) -> None:
    """Flush a unit of every result to disk, and record it in the journal."""
    try:
        for directory, result in zip(directories, results, strict=True):
            journal.record_unit(directory, unit, result)
    except OSError as error:
        raise _write_error(directories, error) from None


def _write_error(directories: Sequence[Path], error: OSError) -> UserError:
    """Make the error of a write that failed."""
    return UserError(f"{directories[0]} cannot be written: {error.strerror}")


def _batch_items(unit: WorkUnit, writers: Sequence[UnitWriter]) -> Iterator[list[tiles.ItemToMerge]]:
    """Yield a unit's items in order, many small ones together: a call for one expert's bias would cost more than it."""
    batch: list[tiles.ItemToMerge] = []
    batch_nbytes = 0
    for region, box in unit.items:
        nbytes = math.prod(box[1]) * region.dtype.itemsize
        if batch and batch_nbytes + nbytes > BATCH_BYTES:
            yield batch
            batch, batch_nbytes = [], 0
        batch.append((region, box, [writer.add_item(region.key, box[0], region.dtype, box[1]) for writer in writers]))
        batch_nbytes += nbytes
    if batch:
        yield batch


def _merge_batch(
    plan: Plan, buffers: tiles.ThreadBuffers, on_bytes_read: Callable[[int], None], batch: list[tiles.ItemToMerge]
) -> list[tuple[str, list[float]]]:
    """Merge and write a batch; return the key and each result's sum of squares for the items that are merged."""
    squares = []
    bytes_read = 0
    for (region, box, _), item_squares in zip(batch, tiles.merge_items(plan, batch, buffers), strict=True):
        if region.fate is Fate.MERGED:
            squares.append((region.key, item_squares))
        entries = [source.tensors.get(region.key) for source in plan.inputs]  # what is kept is the base's alone
        bytes_read += math.prod(box[1]) * sum(entry.dtype.itemsize for entry in entries if entry is not None)
    on_bytes_read(bytes_read)
    return squares


def _assert_covered(plan: Plan, items: list[WrittenItem]) -> None:
    """Assert that every element of every output was written once."""
    num_elements = dict.fromkeys(plan.outputs, 0)
    for item in items:
        if item.sizes is not None:
            num_elements[item.key] += math.prod(item.sizes)
    for key, output in plan.outputs.items():
        message = f"{key}: {num_elements[key]} elements of {output.shape} written"
        assert num_elements[key] == math.prod(output.shape), message
