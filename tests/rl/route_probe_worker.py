"""Run as a script: routes of one model beside others'. Arguments: a directory, and cases of `LAYOUTS`.

`DIRECTORY/model` and `/parent` are published checkpoints, `/saved` the parent in torch_dist, which one rank writes.
Rank 0 leaves `CASE.pt`: the routing of the model, and of each parent.
"""

import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.multiprocessing
from processes import free_port, prepare
from route_texts import SEQUENCES

from megatron_bai import config

LAYOUTS = {1: config.Parallel(), 2: config.Parallel(tensor=2, expert=2, sequence=True), 3: config.Parallel(pipeline=2)}


def rank_main(rank: int, world: int, case: int, port: int, directory: Path) -> None:
    from megatron_bai.distributed import backend
    from megatron_bai.model import build, megatron_checkpoint
    from megatron_bai.model.architecture import read_architecture
    from megatron_bai.model.load_weights import load_weights
    from megatron_bai.rl.merge_routing import compare_routing
    from megatron_bai.routing.replay.routing_replay import RoutingReplay

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device = backend.init_backend(config.Backend(kind="cpu", timeout_s=120))
    settings = config.Config(parallel=LAYOUTS[case], model=read_architecture(directory / "model"))
    build.init_parallel(settings.parallel, seed=0)
    actor = build.build_actor(settings, device, train=False)
    if case == 1:
        load_weights(actor, directory / "parent")
        megatron_checkpoint.save(actor, directory / "saved", directory / "parent", {})
    load_weights(actor, directory / "model")
    parents = [str(directory / name) for name in ("parent", "saved", "model")]
    merged, found = compare_routing(actor, RoutingReplay(actor.modules), parents, SEQUENCES)
    if rank == 0:
        routings = [[asdict(layer) for layer in layers] for layers in (merged, *(each.layers for each in found))]
        torch.save(routings, directory / f"{case}.pt")
    backend.shutdown_backend()


def main(directory: Path, cases: list[int]) -> None:
    prepare("megatron.core.models.gpt", "megatron.core.dist_checkpointing", "megatron_bai.rl.merge_routing")
    for case in cases:
        world = min(case, 2)
        arguments = (world, case, free_port(), directory)
        torch.multiprocessing.start_processes(rank_main, arguments, nprocs=world, start_method="fork")


if __name__ == "__main__":  # dist_checkpointing spawns helpers that import this module again
    main(Path(sys.argv[1]), [int(case) for case in sys.argv[2:]])
