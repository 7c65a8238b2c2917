"""Run as a script: four gloo ranks gather a model that is split over them, and send it to servers.

Argument: a directory. Rank 0 leaves `found.pt`: what the ranks saw, by case.
"""

import asyncio
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing
from aiohttp import web
from fake_sglang import serve
from model.gather_grid import Grid, infos_of, make_model, shards_of
from processes import free_port
from weight_receiver import WeightReceiver, digests

from megatron_bai.distributed.rank_group import current_ranks
from megatron_bai.errors import UserError
from megatron_bai.model.gather import drained, gather_buckets
from megatron_bai.model.gather_plan import GatherBucket, make_gather_plan
from megatron_bai.model.hf_gather import TensorInfo
from megatron_bai.rollout.servers.group_sync import GroupSync
from megatron_bai.rollout.servers.weight_buckets import Bucket

WORLD, BUCKET = 4, 200
GRIDS = {"tp2_ep4": Grid(2, 2), "ep4": Grid(1, 4), "pp4": Grid(1, 1, 4), "tp4": Grid(4)}
MODEL = make_model()
SHAPES = {f"{key}{index}": tuple(tensor.shape) for (key, index), tensor in MODEL.items()}
ROUTERS = {key for key in MODEL if key[0] == "layers.router"}


class Refusing(WeightReceiver):
    """Takes some buckets, and then no more."""

    def update_weights_from_distributed(self, body: dict[str, Any]) -> Any:
        if len(self.requests) == 3:
            return web.Response(status=400, text="out of memory")
        return super().update_weights_from_distributed(body)


class Waiting(WeightReceiver):
    """Takes no part in a broadcast, as a server does whose sender does not begin; `released` ends its waiting."""

    released, was_released = False, False

    def update_weights_from_distributed(self, body: dict[str, Any]) -> Any:
        async def wait() -> web.Response:
            while not self.released:
                await asyncio.sleep(0.01)
            return web.Response(status=400, text="released")

        return wait()


def everyone(mine: Any) -> list[Any]:
    of_ranks: list[Any] = [None] * WORLD
    dist.all_gather_object(of_ranks, mine)
    return of_ranks


def gathered(grid: Grid, size: int, collectors: int) -> dict[str, Any]:
    """Whether slices came bit for bit, and what was sent for it."""
    plan = make_gather_plan(infos_of(grid, MODEL), size, collectors)
    sent: list[int] = []
    upstream = dist.isend

    def count(tensor: torch.Tensor, dst: int) -> Any:
        sent.append(tensor.nbytes)
        return upstream(tensor, dst=dst)

    right: dict[Any, bool] = {}
    with patch.object(dist, "isend", count):
        for bucket, slices in gather_buckets(shards_of(grid, dist.get_rank(), MODEL), plan):
            assert (slices is not None) == (bucket.collector == dist.get_rank())
            for key, index, tensor in slices or ():
                (wanted,), (found,) = digests([("", MODEL[key, index])]), digests([("", tensor)])
                right[key, index] = wanted == found
    planned = [[bucket.message_bytes[rank] for bucket in plan if rank in bucket.message_bytes] for rank in range(WORLD)]
    of_ranks = everyone((right, sent))
    return {
        "right": [value for own, _ in of_ranks for value in own.values()],
        "slices": [key for own, _ in of_ranks for key in own],
        "sent": [own for _, own in of_ranks],
        "planned": planned,
    }


def named(gathering: Iterator[tuple[GatherBucket, Any]]) -> Iterator[Bucket | None]:
    for _, slices in gathering:
        yield None if slices is None else [(f"{key}{index}", tensor) for key, index, tensor in slices]


def failing(buckets: Iterator[Bucket | None]) -> Iterator[Bucket | None]:
    """Fail at the second bucket of rank 2."""
    for i, bucket in enumerate(buckets):
        if dist.get_rank() == 2 and i == 2:
            raise UserError("no memory on rank 2")
        yield bucket


def synced(server: WeightReceiver, fails: bool = False, twice: bool = False) -> dict[str, Any]:
    """Syncs of the grid of tensor and expert ranks, in which all four send."""
    grid, rank = GRIDS["tp2_ep4"], dist.get_rank()
    found: dict[str, Any] = {"error": "", "received": []}
    with serve(server) if rank == 0 else nullcontext("") as url:
        urls = everyone(url)[:1]
        group = GroupSync(urls, [2], "127.0.0.1", torch.device("cpu"), range(WORLD), 60)
        try:
            for left_out in [set(), ROUTERS][: 1 + twice]:
                plan = make_gather_plan(infos_of(grid, MODEL), BUCKET, WORLD, unchanged=left_out)
                shown = [(each.collector, [info_of(*each_slice[:4]) for each_slice in each.slices]) for each in plan]
                buckets = named(gather_buckets(shards_of(grid, rank, MODEL), plan))
                names = {f"{key}{index}" for key, index in left_out}
                group.send(shown, failing(buckets) if fails else buckets, "v1", SHAPES, names)
                found["received"].append(server.take())
        except UserError as error:
            found["error"] = str(error)
        if isinstance(server, Waiting):
            found["was_waiting"], server.released = not server.released, True
        dist.barrier()
        group.close()
    return {"errors": everyone(found["error"]), "received": found["received"]} | {"waited": found.get("was_waiting")}


def info_of(key: str, index: Any, shape: Any, dtype: torch.dtype) -> TensorInfo:
    return TensorInfo(f"{key}{index}", dtype, tuple(shape))


def stopped() -> list[str]:
    """Rank 0 fails between two buckets, all of which are its own."""
    grid = GRIDS["ep4"]
    buckets = gather_buckets(shards_of(grid, dist.get_rank(), MODEL), make_gather_plan(infos_of(grid, MODEL), BUCKET))

    def take_part() -> None:
        with drained(buckets):
            for i, _ in enumerate(buckets):
                if dist.get_rank() == 0 and i == 3:
                    raise UserError("the disk is full")

    try:
        current_ranks().run_on_all(take_part)
    except UserError as error:
        return everyone(str(error))
    return everyone("")


def rank_main(rank: int, port: int, directory: Path) -> None:
    store = dist.TCPStore("127.0.0.1", port, WORLD, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=120))
    found: dict[str, Any] = {
        f"{name}, {size} bytes, {collectors}": gathered(grid, size, collectors)
        for name, grid in GRIDS.items()
        for size in (BUCKET, 1 << 20)
        for collectors in (1, WORLD)
    }
    found["synced"] = synced(WeightReceiver(), twice=True)
    found["refused"] = synced(Refusing())
    found["failed"] = synced(Waiting(), fails=True)
    found["stopped"] = stopped()
    if rank == 0:
        torch.save(found, directory / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.start_processes(
        partial(rank_main), (free_port(), Path(sys.argv[1])), nprocs=WORLD, start_method="fork"
    )
