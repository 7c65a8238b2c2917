"""The passes before a merge, in which a method measures whole slices: norms, angles, thresholds.

A slice is measured by one rank, in blocks that depend on its shape alone; so what is found depends neither on the
number of ranks nor on how the checkpoints are sharded. The ranks share the slices by size. Nothing is written: a merge
that was killed measures again and finds the same.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from megatron_bai.merge.engine import one_thread, share
from megatron_bai.merge.plan import Output, Plan
from megatron_bai.merge.ranks import Ranks
from megatron_bai.merge.recipe import Measure
from megatron_bai.merge.slices import Part, elements_of, parts, slices
from megatron_bai.merge.values import read_all

BLOCK = 1 << 18  # elements: sums are rounded block by block, so this is part of what a measure is


@dataclass(frozen=True)
class Slice:
    """One slice to measure; `nbytes` of one input."""

    output: Output
    part: Part
    name: str
    nbytes: int


def to_measure(plan: Plan) -> tuple[Slice, ...]:
    """The slices whose measures the plan's recipes need."""
    if not plan.recipes[0].passes:
        return ()
    needed = [
        output
        for output in plan.outputs.values()
        if output.merged and any(r.needs(row[output.key]) for r, row in zip(plan.recipes, plan.sums))
    ]
    return tuple(
        Slice(output, part, f"{part.key} {part.index}", elements_of(part) * output.dtype.itemsize)
        for output in needed
        for part in slices(output.key, output.shape)
        if elements_of(part)
    )


def measured(plan: Plan, ranks: Ranks, advance: Callable[[int], None]) -> Plan:
    """The plan with its measures; every rank calls it.

    Args:
        advance: told the number of input bytes whenever some have been read.

    Raises:
        UserError: a source cannot be read or holds NaN or Inf.
    """
    todo = to_measure(plan)
    if not todo:
        return plan

    def work() -> dict[tuple[str, tuple[int, ...]], Measure]:
        with one_thread():
            return {(s.part.key, s.part.index): _measure(plan, s, advance) for s in share(todo, ranks)}

    found = {at: measure for part in ranks.together(work) for at, measure in part.items()}
    assert len(found) == len(todo), "every slice was measured once"
    return dataclasses.replace(plan, measures=found)


def _measure(plan: Plan, which: Slice, advance: Callable[[int], None]) -> Measure:
    def blocks() -> Iterator[torch.Tensor]:
        for box in parts(which.part.key, which.part.shape, which.part.box, BLOCK):
            values = read_all(plan, which.output, box)
            yield values
            advance(values.numel() * which.output.dtype.itemsize)

    return plan.recipes[0].measure(blocks, which.part)
