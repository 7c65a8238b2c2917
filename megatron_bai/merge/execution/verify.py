"""Verify a merge against its formula, by reading the written checkpoint again."""

import math
from collections import defaultdict
from collections.abc import Iterator

import torch

from megatron_bai.checkpoint import crc32
from megatron_bai.checkpoint.boxes import Box, split_box
from megatron_bai.checkpoint.reader import CheckpointReader
from megatron_bai.distributed.rank_group import RankGroup
from megatron_bai.errors import PermanentError
from megatron_bai.merge.execution.source_values import read_inputs
from megatron_bai.merge.execution.thread_pool import single_torch_thread
from megatron_bai.merge.execution.tiles import TILE
from megatron_bai.merge.recipe.plan import Plan
from megatron_bai.merge.recipe.regions import Fate, Region
from megatron_bai.merge.recipe.slices import SliceBox

SAMPLE_EVERY = 50  # one in this many of a tensor's tiles is sampled, and at least one
SAMPLE = 1 << 12  # elements that are compared of a sampled tile


def verify_result(plan: Plan, result_index: int, output: CheckpointReader, ranks: RankGroup, check_all: bool) -> int:
    """Compare `output` with the method's formula in float64. Collective.

    Let x be the exact value. The written one may differ from x by one rounding to the output's dtype, |x|·ε/2, and by
    that of the accumulation, (n + 1)·ε_acc·Σ|summand| for n sources. (ε is `torch.finfo(…).eps`.)

    Args:
        plan: the merge.
        result_index: of the result among the plan's.
        output: the written checkpoint.
        ranks: which share the tiles.
        check_all: compare every element; else a sample, the same on every run.

    Returns:
        The number of elements compared, over all ranks.

    Raises:
        PermanentError: the output lacks a tensor, or an element is outside the bound.
    """

    def compare() -> int:
        num_compared = 0
        with single_torch_thread():
            for region, box in list(_tiles_to_check(plan, check_all))[ranks.rank :: ranks.num_ranks]:
                _compare_tile(plan, result_index, output, region, box)
                num_compared += math.prod(box[1])
        return num_compared

    return sum(ranks.run_on_all(compare))


def _tiles_to_check(plan: Plan, check_all: bool) -> Iterator[tuple[Region, Box]]:
    """Yield the tiles of the items that were written, or a sample that has some of every region."""
    tiles_of: dict[str, list[tuple[Region, Box]]] = defaultdict(list)
    for unit in plan.units:
        for region, box in unit.items:
            tiles_of[region.name] += ((region, tile) for tile in plan.tiles(region, box, TILE))
    for name, tiles in tiles_of.items():
        if not check_all:  # a different position in each region, by the name's hash
            position = crc32.compute(name.encode())
            boxes_of = [
                (region, list(split_box(*box, SAMPLE)))
                for region, box in tiles[position % min(SAMPLE_EVERY, len(tiles)) :: SAMPLE_EVERY]
            ]
            tiles = [(region, boxes[position % len(boxes)]) for region, boxes in boxes_of]
        yield from tiles


def _compare_tile(plan: Plan, result_index: int, output: CheckpointReader, region: Region, box: Box) -> None:
    """Compare one tile with the base's values or with the method's formula."""
    key, entry, recipe = region.key, output.tensors.get(region.key), plan.recipes[result_index]
    if entry is None or (entry.dtype, entry.shape) != (region.dtype, region.output.shape):
        raise PermanentError(f"{output.path} lacks {key} as {region.dtype} {region.output.shape}: merge again")
    written = output.read(key, *box).clone()
    if region.fate is not Fate.MERGED:
        expected = plan.base.read(key, *box).to(region.dtype)
        wrong = (written != expected) & ~(written.isnan() & expected.isnan())  # padding may hold anything
    else:
        slice_box = SliceBox(region.output, box)
        weights = plan.input_weights[result_index][region.name]
        values = read_inputs(plan, region, box, [i for i, weight in enumerate(weights) if weight != 0])
        stats = plan.stats_of(slice_box)
        reference = recipe.reference_values(values.view(len(weights), -1), weights, slice_box, stats)
        exact, magnitude = (tensor.view(box[1]) for tensor in reference)
        out_info = torch.finfo(region.dtype)
        accumulator = torch.finfo(torch.float64 if region.dtype.itemsize > 2 else torch.float32)
        subnormal = out_info.smallest_normal * out_info.eps
        bound = exact.abs() * out_info.eps / 2 + magnitude * (len(plan.inputs) + 1) * accumulator.eps + subnormal
        wrong = ~((written.double() - exact).abs() <= bound)  # so that a NaN is wrong
    if wrong.any():
        position = tuple(o + int(i) for o, i in zip(box[0], wrong.nonzero()[0], strict=True))
        message = f"is not what merge.method={recipe.method} makes of its sources"
        raise PermanentError(f"{output.path}: {key} at {position} {message}: merge again")
