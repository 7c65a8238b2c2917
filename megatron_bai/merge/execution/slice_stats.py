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

from megatron_bai.distributed.rank_group import Ranks
from megatron_bai.merge.execution.executor import share
from megatron_bai.merge.execution.source_values import read_all, used
from megatron_bai.merge.execution.thread_pool import pool
from megatron_bai.merge.recipe.plan import Plan
from megatron_bai.merge.recipe.recipe import Measure
from megatron_bai.merge.recipe.regions import Fate, Region
from megatron_bai.merge.recipe.slices import Part, parts, slices

BLOCK = 1 << 18  # elements that are read at once; a shorter row is never cut


@dataclass(frozen=True)
class Slice:
    """One slice to measure: its parts, of one tensor or of several; `nbytes` of one input."""

    name: str
    parts: tuple[tuple[Region, Part], ...]
    nbytes: int


def to_measure(plan: Plan) -> tuple[Slice, ...]:
    """The slices whose measures the plan's recipes need."""
    found: dict[str, list[tuple[Region, Part]]] = defaultdict(list)
    for region in chain(*plan.regions.values()) if plan.recipes[0].passes else ():
        if region.fate is Fate.MERGED and any(r.needs(row[region.name]) for r, row in zip(plan.recipes, plan.sums, strict=True)):
            for part in slices(region):
                if part.count:
                    found[part.name].append((region, part))
    return tuple(
        Slice(name, tuple(held), sum(part.count * region.dtype.itemsize for region, part in held))
        for name, held in found.items()
    )


def measured(
    plan: Plan, todo: Sequence[Slice], ranks: Ranks, advance: Callable[[int], None], threads: int = 1
) -> Plan:
    """The plan with the measures of `todo`; every rank calls it.

    Args:
        advance: told the number of input bytes whenever some have been read, by any thread.
        threads: of this rank.

    Raises:
        UserError: a source cannot be read or holds NaN or Inf.
    """
    if not todo:
        return plan

    def work() -> dict[str, Measure]:
        mine = share(todo, ranks)
        with pool(threads) as run:
            measures = run(lambda each: _measure(plan, each, advance), mine)
            return {each.name: measure for each, measure in zip(mine, measures, strict=True)}

    found = {name: measure for part in ranks.together(work) for name, measure in part.items()}
    assert len(found) == len(todo), "every slice was measured once"
    return dataclasses.replace(plan, measures=found)


def _measure(plan: Plan, which: Slice, advance: Callable[[int], None]) -> Measure:
    inputs = used(plan, {region.name for region, _ in which.parts})

    def blocks() -> Iterator[torch.Tensor]:
        for region, part in which.parts:
            for box in parts(region.output, part.box, BLOCK):
                yield read_all(plan, region, box, inputs)
                advance(len(inputs) * math.prod(box[1]) * region.dtype.itemsize)

    return plan.recipes[0].measure(blocks, which.name, sum(part.count for _, part in which.parts))
