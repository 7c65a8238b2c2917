"""How fast the weights of several ranks reach a server through gloo, beside one broadcast of the same bytes.

    python benchmarks/sync_ranks.py --mib 1024 --ranks 4 --repeat 5

Trainer ranks hold what ranks of `TP 2 · EP ranks` do of a model with Qwen3-30B-A3B's shapes and fewer layers: whole
experts, halves of projections and of the vocabulary. A stand-in for a server of one rank answers SGLang's requests,
receives as SGLang does and, with `--load`, copies into parameters. In turns:

    broadcast  rank 0 sends one tensor of so many bytes to the server, in one call
    gather     the ranks bring everything to rank 0 (`tensors`, `disk`), and nothing is sent
    slices     likewise with one message a shard: how it was before buckets
    sync N     a whole `rollout.sync=group` with N senders: pause, gathering, sending, the check of the version

The best of `--repeat` counts. After each sync the server's parameters are compared with those of the ranks.
"""

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import timedelta
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from aiohttp import web

from megatron_bai.compat.releases import SGLANG
from megatron_bai.config import Rollout
from megatron_bai.model.gather import describe, gather_buckets
from megatron_bai.model.gather_plan import GatherBucket, ShardInfo, make_gather_plan
from megatron_bai.model.hf_gather import TensorInfo
from megatron_bai.model.param_shards import Shard
from megatron_bai.rollout.servers.group_sync import GroupSync
from megatron_bai.rollout.servers.weight_buckets import Bucket

HIDDEN, WIDTH, QKV, EXPERTS, VOCABULARY, TP = 2048, 768, 5120, 128, 151936, 2
LIMIT = timedelta(seconds=600)


def shapes_of(mib: int) -> dict[tuple[str, tuple[int, ...]], tuple[tuple[int, ...], int | None]]:
    """Return the shape of each slice, and the axis that tensor ranks split; about 95 % of the bytes are experts'."""
    layer = 2 * (EXPERTS * 3 * WIDTH * HIDDEN + QKV * HIDDEN * 2)
    layers = max(1, round((mib << 20) / layer))
    num_experts = min(EXPERTS, max(8, round(EXPERTS * (mib << 20) / layer / layers) // 8 * 8))
    shapes: dict[Any, Any] = {("embedding", ()): ((VOCABULARY * layers // 48 // TP * TP, HIDDEN), 0)}
    for index in range(layers):
        shapes["qkv", (index,)] = ((QKV, HIDDEN), 0)
        shapes["proj", (index,)] = ((HIDDEN, QKV - 1024), 1)
        shapes["norm", (index,)] = ((HIDDEN,), None)
    for index in product(range(layers), range(num_experts)):
        shapes["fc1", index], shapes["fc2", index] = ((2 * WIDTH, HIDDEN), None), ((HIDDEN, WIDTH), None)
    return shapes


def make_shards(rank: int, ranks: int, shapes: Any) -> list[Shard]:
    """Return what a rank holds, filled with its own numbers."""
    shards = []
    num_experts = 1 + max(index[1] for key, index in shapes if key == "fc1")
    for (key, index), (shape, axis) in shapes.items():
        data_shape, offset = list(shape), [0] * len(shape)
        if key in ("fc1", "fc2"):
            if index[1] * ranks // num_experts != rank:
                continue
        elif rank >= TP or (axis is None and rank):
            continue
        elif axis is not None and ranks > 1:
            data_shape[axis] //= TP
            offset[axis] = rank * data_shape[axis]
        data = torch.full(data_shape, 1.0 + rank, dtype=torch.bfloat16)
        shards.append(Shard(key, data, index, tuple(offset), tuple(shape), True))
    return shards


class StandIn:
    """Answers what a weight sync asks of a server; `parameters` are what it has loaded."""

    def __init__(self, load: bool):
        self.load, self.version = load, ""
        self.groups: dict[str, Any] = {}
        self.parameters: dict[str, torch.Tensor] = {}

    def update_weights_from_distributed(self, body: dict[str, Any]) -> None:
        empty = [
            torch.empty(shape, dtype=getattr(torch, dtype))
            for shape, dtype in zip(body["shapes"], body["dtypes"], strict=True)
        ]
        flat = torch.cat([each.flatten().view(torch.uint8) for each in empty])  # as SGLang makes its bucket
        self.groups[body["group_name"]].broadcast(flat, 0).wait()
        for name, like, part in zip(body["names"], empty, flat.split([each.nbytes for each in empty]), strict=True):
            tensor = part.view(like.dtype).view(like.shape)
            if self.load and name in self.parameters:
                self.parameters[name].copy_(tensor)
            else:
                self.parameters[name] = tensor.clone() if self.load else tensor

    def init_weights_update_group(self, body: dict[str, Any]) -> None:
        name, world = body["group_name"], body["world_size"]
        store: dist.Store = dist.TCPStore(body["master_address"], body["master_port"], world, False, LIMIT)
        for prefix in (name, f"{name}/", "cpu/"):
            store = dist.PrefixStore(prefix, store)
        self.groups[name] = dist.ProcessGroupGloo(store, body["rank_offset"], world, LIMIT)

    def destroy_weights_update_group(self, body: dict[str, Any]) -> None:
        del self.groups[body["group_name"]]

    def update_weight_version(self, body: dict[str, Any]) -> None:
        self.version = body["new_version"]

    def receive_whole(self, body: dict[str, Any]) -> None:
        """Receive the broadcast that syncs are compared with."""
        flat = torch.empty(body["bytes"], dtype=torch.uint8)
        self.groups[body["group_name"]].broadcast(flat, 0).wait()

    def sums(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the sums of what was loaded, by name."""
        return {name: float(each.view(-1)[0] + each.view(-1)[-1]) for name, each in self.parameters.items()}

    async def __call__(self, request: web.Request) -> web.Response:
        body = await request.json() if request.can_read_body else {}
        handle = getattr(self, request.path.strip("/"), lambda _: None)
        reply = handle(body) or {"version": SGLANG, "weight_version": self.version}
        return web.json_response(reply)


def serve(port: int, load: bool) -> None:
    torch.set_num_threads(1)
    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{path:.*}", StandIn(load))
    web.run_app(app, host="127.0.0.1", port=port, print=None, handle_signals=False)


def named(gathering: Iterator[tuple[GatherBucket, Any]]) -> Iterator[Bucket | None]:
    for _, slices in gathering:
        yield None if slices is None else [(f"{key}{index}", tensor) for key, index, tensor in slices]


class Bench:
    """One rank of the trainer."""

    def __init__(self, asked: argparse.Namespace, port: int):
        self.asked, self.url, self.rank = asked, f"http://127.0.0.1:{port}", dist.get_rank()
        self.shapes = shapes_of(asked.mib)
        self.shards = make_shards(self.rank, asked.ranks, self.shapes)
        of_ranks: list[list[ShardInfo]] = [[] for _ in range(asked.ranks)]
        dist.all_gather_object(of_ranks, describe(self.shards))
        self.of_ranks, self.version = of_ranks, 0
        self.total = sum(info.num_bytes for infos in of_ranks for info in infos)
        self.whole = torch.ones(self.total, dtype=torch.uint8) if self.rank == 0 else None

    def sync(self, group: GroupSync, plan: list[GatherBucket]) -> None:
        self.version += 1
        shown = [
            (each.collector, [TensorInfo(f"{s.key}{s.index}", s.dtype, s.shape) for s in each.slices]) for each in plan
        ]
        expected = {f"{key}{index}": shape for (key, index), (shape, _) in self.shapes.items()}
        group.send(shown, named(gather_buckets(self.shards, plan)), str(self.version), expected)

    def gather(self, plan: list[GatherBucket]) -> None:
        for _ in gather_buckets(self.shards, plan):
            pass

    def gather_by_slices(self, plan: list[GatherBucket]) -> None:
        """Send each shard by itself, and wait for it."""
        for planned in plan[0].slices:
            for shard in planned.shards:
                if shard.owner == self.rank != 0:
                    dist.send(self.shards[shard.shard_index].data.contiguous(), dst=0)
                elif self.rank == 0 and shard.owner:
                    dist.recv(torch.empty(shard.info.sizes, dtype=shard.info.dtype), src=shard.owner)

    def broadcast(self, group: GroupSync) -> None:
        """Send one tensor from rank 0's group, which the servers of a sync are members of."""
        from megatron_bai.rollout.servers import control

        if self.rank == 0:
            assert group._groups and group._own and self.whole is not None
            body = {"bytes": self.total, "group_name": "megatron_bai_weights"}
            waiting = group._groups._thread.submit(control.post, self.url, "/receive_whole", body, 600.0)
            group._own.finish(group._own.broadcast(self.whole))
            waiting.result()

    def compare(self) -> None:
        from megatron_bai.rollout.servers import control

        if self.rank:
            return
        wanted = {}
        for key, index in self.shapes:
            owners = [r for r, infos in enumerate(self.of_ranks) for i in infos if (i.key, i.index) == (key, index)]
            wanted[f"{key}{index}"] = 2.0 + owners[0] + owners[-1]
        assert control.post(self.url, "/sums", {}) == wanted, "the server has other weights"


def rank_main(rank: int, asked: argparse.Namespace, store_port: int, port: int, found: Any) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", store_port, asked.ranks, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=asked.ranks, timeout=LIMIT)
    bench, size = Bench(asked, port), asked.bucket_mib << 20
    alone, spread = make_gather_plan(bench.of_ranks, size), make_gather_plan(bench.of_ranks, size, asked.ranks)
    url, device = [bench.url], torch.device("cpu")
    senders = sorted({bucket.collector for bucket in spread})
    every = make_gather_plan(bench.of_ranks, 1 << 60)
    with closing(GroupSync(url, [1], "127.0.0.1", device, senders)) as group:
        ways: dict[str, Callable[[], None]] = {
            "broadcast": lambda: bench.broadcast(group),
            "gather": lambda: bench.gather(alone),
            "slices": lambda: bench.gather_by_slices(every),
            "sync 1": lambda: bench.sync(group, alone),
            f"sync {asked.ranks}": lambda: bench.sync(group, spread),
        }
        best = dict.fromkeys(ways, float("inf"))
        for name in [name for _ in range(asked.repeat) for name in ways]:
            dist.barrier()
            began = time.perf_counter()
            ways[name]()
            dist.barrier()
            best[name] = min(best[name], time.perf_counter() - began)
            if name.startswith("sync"):
                bench.compare()
    if rank == 0:
        found.put((bench.total, len(bench.shapes), best))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--bucket-mib", type=int, default=Rollout().sync_bucket_mib)
    parser.add_argument("--load", action="store_true", help="the server copies into its parameters, as SGLang does")
    asked = parser.parse_args()
    store_port, port = _free_port(), _free_port()
    context = multiprocessing.get_context("fork")
    server = context.Process(target=serve, args=(port, asked.load), daemon=True)
    server.start()
    found = context.SimpleQueue()
    arguments = (asked, store_port, port, found)
    torch.multiprocessing.start_processes(rank_main, arguments, nprocs=asked.ranks, start_method="fork", join=True)
    total, slices, best = found.get()
    server.terminate()
    print(f"{total / 2**20:.0f} MiB in {slices} slices on {asked.ranks} ranks, buckets of {asked.bucket_mib} MiB, best "
          f"of {asked.repeat}; load {os.getloadavg()[0]:.1f}")  # fmt: skip
    for name, seconds in best.items():
        print(f"{name:10} {seconds:7.3f} s {total / seconds / 1e9:6.2f} GB/s {best['broadcast'] / seconds:5.2f} of it")


def _free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    main()
