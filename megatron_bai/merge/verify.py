"""Checking a merge against its formula, by reading the written checkpoint again."""

import math
import zlib
from collections.abc import Iterator

import torch

from megatron_bai.errors import Unfit
from megatron_bai.merge.boxes import Box, split
from megatron_bai.merge.engine import TILE, one_thread
from megatron_bai.merge.plan import Output, Plan
from megatron_bai.merge.ranks import Ranks
from megatron_bai.merge.slices import Part
from megatron_bai.merge.sources import Source
from megatron_bai.merge.values import read_all

SAMPLE_EVERY = 50  # of a tensor's tiles one in this many is sampled, and at least one
SAMPLE = 1 << 12  # elements that are compared of a sampled tile


def verify(plan: Plan, which: int, output: Source, ranks: Ranks, everything: bool) -> int:
    """Compare `output` with the method's formula in float64; every rank calls it.

    Let x be the exact value. The written one may differ from x by one rounding to the output's dtype, |x|·ε/2, and by
    that of the accumulation, (n + 1)·ε_acc·Σ|summand| for n sources. (ε is `torch.finfo(…).eps`.)

    Args:
        which: the number of the plan's sum.
        output: the written checkpoint.
        everything: compare every element; else a sample, the same on every run.

    Returns:
        how many elements were compared, over all ranks.

    Raises:
        Unfit: the output lacks a tensor, or an element is outside the bound.
    """

    def work() -> int:
        compared = 0
        with one_thread():
            for tensor, box in list(_tiles(plan, everything))[ranks.rank :: ranks.size]:
                _compare(plan, which, output, tensor, box)
                compared += math.prod(box[1])
        return compared

    return sum(ranks.together(work))


def _tiles(plan: Plan, everything: bool) -> Iterator[tuple[Output, Box]]:
    for tensor in plan.outputs.values():
        chunks = plan.base.tensors[tensor.key].chunks
        boxes = [box for chunk in chunks for box in plan.tiles(tensor, (chunk.offsets, chunk.sizes), TILE)]
        if not everything:  # a different place in each tensor: the key's hash says where
            place = zlib.crc32(tensor.key.encode())
            parts = [list(split(*box, SAMPLE)) for box in boxes[place % min(SAMPLE_EVERY, len(boxes)) :: SAMPLE_EVERY]]
            boxes = [part[place % len(part)] for part in parts]
        yield from ((tensor, box) for box in boxes)


def _compare(plan: Plan, which: int, output: Source, tensor: Output, box: Box) -> None:
    found = output.tensors.get(tensor.key)
    if found is None or (found.dtype, found.shape) != (tensor.dtype, tensor.shape):
        raise Unfit(f"{output.path} lacks {tensor.key} as {tensor.dtype} {tensor.shape}: merge again")
    written, recipe = output.read(tensor.key, *box).clone(), plan.recipes[which]
    if not tensor.merged:
        wrong = written != plan.base.read(tensor.key, *box)
    else:
        part = Part(tensor.key, tensor.shape, box)
        weights = plan.sums[which][tensor.key]
        values = read_all(plan, tensor, box, [i for i, weight in enumerate(weights) if weight != 0])
        checked = recipe.check(values.view(len(weights), -1), weights, part, plan.measure(part))
        exact, magnitude = (each.view(box[1]) for each in checked)
        kind = torch.finfo(tensor.dtype)
        accumulator = torch.finfo(torch.float64 if tensor.dtype.itemsize > 2 else torch.float32)
        subnormal = kind.smallest_normal * kind.eps
        bound = exact.abs() * kind.eps / 2 + magnitude * (len(plan.inputs) + 1) * accumulator.eps + subnormal
        wrong = ~((written.double() - exact).abs() <= bound)  # so that a NaN is wrong
    if wrong.any():
        at = tuple(o + int(i) for o, i in zip(box[0], wrong.nonzero()[0]))
        what = f"is not what merge.method={recipe.method} makes of its sources"
        raise Unfit(f"{output.path}: {tensor.key} at {at} {what}: merge again")
