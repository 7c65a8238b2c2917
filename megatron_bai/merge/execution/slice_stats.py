"""The passes before a merge, in which a method measures whole slices: angles, thresholds.

A slice is measured by one rank, which reads it in blocks that depend on its shape alone; so what is found depends
neither on the number of ranks nor on how the checkpoints are sharded. The ranks share the slices by size. Nothing is
written: a merge that was killed measures again and finds the same.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from megatron_bai.distributed.rank_group import RankGroup
from megatron_bai.merge.execution.executor import assign_to_rank
from megatron_bai.merge.execution.source_values import inputs_with_weight, read_inputs
from megatron_bai.merge.execution.thread_pool import thread_map
from megatron_bai.merge.recipe.plan import Plan
from megatron_bai.merge.recipe.recipe import SliceStats
from megatron_bai.merge.recipe.regions import Fate, Region
from megatron_bai.merge.recipe.slices import SliceBox, iter_slices, split_by_slice

READ_ELEMENTS = 1 << 18  # elements that are read at once; a shorter row is never cut


@dataclass(frozen=True)
class SliceToMeasure:
    """One slice to measure: its parts, of one tensor or of several; `nbytes` of one input."""

    name: str
    parts: tuple[tuple[Region, SliceBox], ...]
    nbytes: int


def slices_to_measure(plan: Plan) -> tuple[SliceToMeasure, ...]:
    """The slices whose measures the plan's recipes need."""
    found: dict[str, list[tuple[Region, SliceBox]]] = defaultdict(list)
    for region in chain(*plan.regions.values()) if plan.recipes[0].stats_passes else ():
        if region.fate is Fate.MERGED and any(r.needs_stats(row[region.name]) for r, row in zip(plan.recipes, plan.input_weights, strict=True)):
            for part in iter_slices(region):
                if part.num_elements:
                    found[part.slice_name].append((region, part))
    return tuple(
        SliceToMeasure(name, tuple(held), sum(part.num_elements * region.dtype.itemsize for region, part in held))
        for name, held in found.items()
    )


def with_slice_stats(
    plan: Plan, todo: Sequence[SliceToMeasure], ranks: RankGroup, on_bytes_read: Callable[[int], None], threads: int = 1
) -> Plan:
    """The plan with the measures of `todo`; every rank calls it.

    Args:
        on_bytes_read: told the number of input bytes whenever some have been read, by any thread.
        threads: of this rank.

    Raises:
        UserError: a source cannot be read or holds NaN or Inf.
    """
    if not todo:
        return plan

    def work() -> dict[str, SliceStats]:
        mine = assign_to_rank(todo, ranks)
        with thread_map(threads) as run:
            measures = run(lambda each: _measure(plan, each, on_bytes_read), mine)
            return {each.name: measure for each, measure in zip(mine, measures, strict=True)}

    found = {name: measure for part in ranks.run_on_all(work) for name, measure in part.items()}
    assert len(found) == len(todo), "every slice was measured once"
    return dataclasses.replace(plan, slice_stats=found)


def _measure(plan: Plan, which: SliceToMeasure, on_bytes_read: Callable[[int], None]) -> SliceStats:
    inputs = inputs_with_weight(plan, {region.name for region, _ in which.parts})

    def blocks() -> Iterator[torch.Tensor]:
        for region, part in which.parts:
            for box in split_by_slice(region.output, part.box, READ_ELEMENTS):
                yield read_inputs(plan, region, box, inputs)
                on_bytes_read(len(inputs) * math.prod(box[1]) * region.dtype.itemsize)

    return plan.recipes[0].measure_slice(blocks, which.name, sum(part.num_elements for _, part in which.parts))
