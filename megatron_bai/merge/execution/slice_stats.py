"""Slice statistics: the passes before a merge in which a method measures whole slices, such as angles and thresholds.

A slice is measured by one rank, which reads it in blocks that depend on its shape alone; so the statistics depend
neither on the number of ranks nor on how the checkpoints are sharded. The ranks share the slices by size. Nothing is
written: a merge that is resumed measures again, with the same result.
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

READ_ELEMENTS = 1 << 18  # elements that are read at once; a shorter row is never split


@dataclass(frozen=True)
class SliceToMeasure:
    """One slice to measure: its boxes, of one tensor or of several; `nbytes` of one input."""

    name: str
    boxes: tuple[tuple[Region, SliceBox], ...]
    nbytes: int


def slices_to_measure(plan: Plan) -> tuple[SliceToMeasure, ...]:
    """Return the slices whose statistics the plan's recipes need."""
    boxes_of: dict[str, list[tuple[Region, SliceBox]]] = defaultdict(list)
    for region in chain(*plan.regions.values()) if plan.recipes[0].stats_passes else ():
        results = zip(plan.recipes, plan.input_weights, strict=True)
        if region.fate is Fate.MERGED and any(recipe.needs_stats(row[region.name]) for recipe, row in results):
            for slice_box in iter_slices(region):
                if slice_box.num_elements:
                    boxes_of[slice_box.slice_name].append((region, slice_box))
    return tuple(
        SliceToMeasure(name, tuple(boxes), sum(box.num_elements * region.dtype.itemsize for region, box in boxes))
        for name, boxes in boxes_of.items()
    )


def with_slice_stats(
    plan: Plan,
    slices: Sequence[SliceToMeasure],
    ranks: RankGroup,
    on_bytes_read: Callable[[int], None],
    threads: int = 1,
) -> Plan:
    """Measure slices and return the plan with their statistics. Collective.

    Args:
        plan: the merge.
        slices: to measure, from `slices_to_measure`.
        ranks: which share the slices.
        on_bytes_read: called with the number of input bytes whenever some have been read, by any thread.
        threads: number of threads of this rank.

    Raises:
        UserError: a source cannot be read or holds NaN or Inf.
    """
    if not slices:
        return plan

    def measure() -> dict[str, SliceStats]:
        assigned = assign_to_rank(slices, ranks)
        with thread_map(threads) as run:
            all_stats = run(lambda item: _measure_slice(plan, item, on_bytes_read), assigned)
            return {item.name: stats for item, stats in zip(assigned, all_stats, strict=True)}

    slice_stats = {name: stats for gathered in ranks.run_on_all(measure) for name, stats in gathered.items()}
    assert len(slice_stats) == len(slices), "every slice was measured once"
    return dataclasses.replace(plan, slice_stats=slice_stats)


def _measure_slice(plan: Plan, item: SliceToMeasure, on_bytes_read: Callable[[int], None]) -> SliceStats:
    """Measure one slice, which is read `stats_passes` times."""
    inputs = inputs_with_weight(plan, {region.name for region, _ in item.boxes})

    def read_blocks() -> Iterator[torch.Tensor]:
        for region, slice_box in item.boxes:
            for box in split_by_slice(region.output, slice_box.box, READ_ELEMENTS):
                yield read_inputs(plan, region, box, inputs)
                on_bytes_read(len(inputs) * math.prod(box[1]) * region.dtype.itemsize)

    num_elements = sum(slice_box.num_elements for _, slice_box in item.boxes)
    return plan.recipes[0].measure_slice(read_blocks, item.name, num_elements)
