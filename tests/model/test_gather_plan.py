"""A plan of gathering has every slice once, in buckets of bounded size, with one message a rank and bucket."""

import itertools
from collections import Counter
from typing import Any

import pytest
from model.gather_grid import EXPERTS, LAYERS, Grid, infos_of, make_model, shards_of

from megatron_bai.model.gather import describe
from megatron_bai.model.gather_plan import make_gather_plan

MODEL = make_model()
GRIDS = [Grid(), Grid(2), Grid(1, 4), Grid(2, 2), Grid(2, 2, 2), Grid(1, 1, 4), Grid(2, 4, 2)]
SIZES = [1, 100, 1 << 10, 1 << 30]
MODEL_BYTES = sum(tensor.nbytes for tensor in MODEL.values())


@pytest.mark.parametrize(("grid", "size", "collectors"), itertools.product(GRIDS, SIZES, [1, 2, 64]))
def test_every_slice_is_in_one_bucket_and_covered_once(grid: Grid, size: int, collectors: int) -> None:
    of_ranks = infos_of(grid, MODEL)
    plan = make_gather_plan(of_ranks, size, collectors)
    planned = [each for bucket in plan for each in bucket.slices]
    assert Counter((each.key, each.index) for each in planned) == Counter(MODEL.keys())
    assert sum(each.num_bytes for each in planned) == MODEL_BYTES
    used = Counter((shard.owner, shard.shard_index) for each in planned for shard in each.shards)
    held = [(rank, i) for rank, infos in enumerate(of_ranks) for i in range(len(infos))]
    assert used == Counter(held)
    assert all(of_ranks[p.owner][p.shard_index] == p.info for each in planned for p in each.shards)
    assert all(bucket.num_bytes <= size or len(bucket.slices) == 1 for bucket in plan)
    owners = {rank for rank, _ in held}
    chosen = {bucket.collector for bucket in plan}
    assert chosen <= owners and len(chosen) <= collectors and (collectors > 1 or chosen == {0})


@pytest.mark.parametrize(("grid", "size"), itertools.product(GRIDS, [300, 1 << 30]))
def test_shards_lie_apart_in_messages_where_numbers_may_lie(grid: Grid, size: int) -> None:
    for bucket in make_gather_plan(infos_of(grid, MODEL), size):
        for rank, num_bytes in bucket.message_bytes.items():
            end = 0
            for planned, shard in bucket.shards_of(rank):
                assert shard.start >= end and shard.start % planned.dtype.itemsize == 0
                end = shard.start + shard.info.num_bytes
            assert end == num_bytes > 0
        assert bucket.collector not in bucket.message_bytes


def test_whole_experts_do_not_move_where_their_ranks_collect() -> None:
    grid = Grid(2, 4, 2)
    plan = make_gather_plan(infos_of(grid, MODEL), 1 << 30, num_collectors=grid.world)
    assert {bucket.collector for bucket in plan} == set(range(grid.world))
    for bucket in plan:
        moved = {each.key for each in bucket.slices for shard in each.shards if shard.owner != bucket.collector}
        assert moved <= {"embedding", "layers.proj"}, "what tensor ranks split"
    messages = sum(len(bucket.message_bytes) for bucket in plan)
    assert messages == 4, "of the two tensor ranks of two stages, each to the other"
    assert messages < sum(len(bucket.message_bytes) for bucket in make_gather_plan(infos_of(grid, MODEL), 1 << 30))


def test_collectors_are_spread_over_the_stages_and_take_turns() -> None:
    grid = Grid(2, 2, 2)
    plan = make_gather_plan(infos_of(grid, MODEL), 200, num_collectors=2)
    assert [bucket.collector for bucket in plan[:6]] == [0, 4, 0, 4, 0, 4]
    for bucket in plan:
        assert {rank // 4 for rank in bucket.message_bytes} <= {bucket.collector // 4}, "a message left its stage"


def test_slices_of_a_unit_share_a_bucket_whatever_its_size() -> None:
    def unit(key: str, index: tuple[int, ...]) -> Any:
        if key == "layers.experts":
            return key, index[:1]
        return "together" if key in ("layers.norm", "embedding") else (key, index)

    for collectors in (1, 64):
        plan = make_gather_plan(infos_of(Grid(2, 2, 2), MODEL), 1, collectors, unit)
        keys = [sorted({each.key for each in bucket.slices}) for bucket in plan]
        assert keys.count(["embedding", "layers.norm"]) == 1
        experts = [bucket for bucket in plan if bucket.slices[0].key == "layers.experts"]
        assert [[each.index[1] for each in bucket.slices] for bucket in experts] == [list(range(EXPERTS))] * LAYERS


def test_what_did_not_change_is_left_out_and_nothing_else() -> None:
    routers = {("layers.router", (layer,)) for layer in range(LAYERS)}
    plan = make_gather_plan(infos_of(Grid(2, 2), MODEL), 300, 4, unchanged=routers)
    assert {(each.key, each.index) for bucket in plan for each in bucket.slices} == MODEL.keys() - routers

    def unit(key: str, index: tuple[int, ...]) -> Any:
        return index if key in ("layers.router", "layers.norm") else (key, index)

    plan = make_gather_plan(infos_of(Grid(2, 2), MODEL), 300, 4, unit, routers)
    assert sum(len(bucket.slices) for bucket in plan) == len(MODEL), "half of a unit cannot stay out"


def test_shards_that_do_not_cover_a_slice_are_refused() -> None:
    grid = Grid(2)
    of_ranks = [describe(shards_of(grid, rank, MODEL)) for rank in range(2)]
    with pytest.raises(RuntimeError, match=r"shards of embedding\[\] do not cover its shape \(24, 6\)"):
        make_gather_plan([of_ranks[0], [info for info in of_ranks[1] if info.key != "embedding"]], 300)
    twice = [info._replace(offset=(0, 0)) if info.key == "embedding" else info for info in of_ranks[1]]
    with pytest.raises(RuntimeError, match="do not cover"):
        make_gather_plan([of_ranks[0], twice], 300)
