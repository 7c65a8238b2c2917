"""Run as a script: R2 and R3 in every layout, with and without recomputation.

Arguments: a file to leave the facts in, layouts (else all).

Each run scores a batch with one set of weights and takes one gradient with another, so that recorded routes are not
those the router would choose. Ranks are forked from one process that has imported Megatron-Core.
"""

import os
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
from distributed.worker import EPSILON, SCALE, gathered
from moe import MODEL, samples
from processes import free_port, prepare

from megatron_bai import config
from megatron_bai.distributed import backend

SAMPLES, LENGTH = 16, 24
MODES = ("none", "r2", "r3")
# What a layout is crossed with: every recomputation, both dispatchers.
VARIANTS = (("none", "alltoall"), ("full", "alltoall"), ("none", "allgather"), ("moe", "allgather"))
FEWER = (("none", "alltoall"), ("full", "alltoall"), ("moe", "allgather"))


@dataclass(frozen=True)
class Layout:
    processes: int
    sizes: dict[str, int]
    micros: tuple[int, ...] = (1, 4)  # micro-batches of a rank
    variants: tuple[tuple[str, str], ...] = VARIANTS


LAYOUTS = {
    "one": Layout(1, {}, variants=(*VARIANTS, ("selective", "alltoall"))),
    "tp2": Layout(2, {"tensor": 2}, variants=FEWER),
    "ep2": Layout(2, {"expert": 2}, variants=FEWER),
    "tp2_ep2": Layout(2, {"tensor": 2, "expert": 2}),
    "pp2": Layout(2, {"pipeline": 2}, variants=FEWER),
    "pp2_vpp2": Layout(2, {"pipeline": 2, "virtual_pipeline": 2}, micros=(2, 4), variants=FEWER),  # one a stage
    "ep4": Layout(4, {"expert": 4}, variants=FEWER),
    "pp2_ep2": Layout(4, {"pipeline": 2, "expert": 2}, variants=FEWER),
}

QUICK = ("one", "tp2_ep2")  # those of `make test`; all of them are `make test-long`'s

BEFORE: list[dict[tuple, torch.Tensor]] = []  # the weights that the gradient is taken at: the same in every run

Name = tuple[str, str, str, int, str]  # layout, recomputation, dispatcher, micro-batches, mode


def runs(layout: str) -> list[Name]:
    """Everything asked of a layout: each mode of replay everywhere, live routing once."""
    chosen = LAYOUTS[layout]
    found = []
    for (recompute, dispatcher), micros, mode in product(chosen.variants, chosen.micros, MODES):
        if mode != "none" or recompute == "full" and micros > 1:
            found.append((layout, recompute, dispatcher, micros, mode))
    return found


REFERENCE = {mode: ("one", "none", "alltoall", 1, mode) for mode in ("r2", "r3")}
REFERENCE["none"] = ("one", "full", "alltoall", 4, "none")


def run(name: Name, device: backend.Device) -> dict[str, Any]:
    """Scores under one set of weights, loss and gradient under another."""
    from megatron.core import parallel_state

    from megatron_bai.model import build, megatron_checkpoint, param_shards
    from megatron_bai.rl import objectives
    from megatron_bai.rl.batches.batch import from_samples
    from megatron_bai.rl.batches.stages import make_scored_batch, make_training_batch
    from megatron_bai.rl.policy.training_engine import TrainingEngine
    from megatron_bai.routing.replay.routing_replay import RoutingReplay

    layout, recompute, dispatcher, micros, mode = name
    sizes = LAYOUTS[layout].sizes
    parallel = config.Parallel(**sizes, sequence=sizes.get("tensor", 1) > 1, dispatcher=dispatcher, recompute=recompute)
    settings = config.Config(model=MODEL, parallel=parallel, trainer=config.Trainer(clip_grad=1e9))
    actor = build.build_actor(settings, device)
    replay = RoutingReplay(actor.chunks)
    engine = TrainingEngine(actor, replay, device.device, temperature=1.0)
    size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    rollouts = samples(SAMPLES, np.random.default_rng(3))[rank * SAMPLES // size : (rank + 1) * SAMPLES // size]
    rollouts = [sample.select_layers(replay.columns) for sample in rollouts]
    scored = make_scored_batch(from_samples(rollouts, np.zeros(len(rollouts)), LENGTH, 0, replay.signature))
    batch = make_training_batch(scored)
    parts = batch.split(len(batch) // micros)

    param_shards.init_random(actor.modules, MODEL, seed=0)
    inference = [engine.local_routes(part) for part in parts]
    scores = engine.score(parts, inference if mode == "r3" else None, record=mode == "r2")
    routes = {"none": None, "r2": scores.routes, "r3": inference}[mode]
    scored = replay.rows

    param_shards.init_random(actor.modules, MODEL, seed=1)
    megatron_checkpoint.reload_master_weights(actor)
    for group in actor.optimizer.param_groups:
        group["eps"], group["lr"] = EPSILON, EPSILON * SCALE
    if not BEFORE:
        BEFORE.append(state(actor.modules))
    stats, _ = engine.update(parts, routes, objectives.get("sft"), settings.objective)
    after = state(actor.modules)
    reports_stats = engine.last_stage and engine.tensor_rank == 0
    everyone = sorted(
        (part for part in gathered((rank, scores.logprobs) if reports_stats else None) if part),
        key=lambda part: part[0],
    )
    return {
        "loss": stats.gather_sum(reports_stats).values()["loss"],
        "logprobs": torch.cat([part[1] for part in everyone]),
        "gradient": {key: (BEFORE[0][key].double() - after[key].double()) / SCALE for key in after},
        "scored": sum(gathered(scored)),
        "rows": sum(gathered(replay.rows - scored)),
        "recomputed": sum(gathered(replay.recomputed)),
        "real": sum(gathered(int(batch.routed.sum()) if reports_stats else 0)),
        "held": sum(gathered(leftovers(actor.modules)), []),
    }


def delivery(device: backend.Device, parallel: config.Parallel) -> dict[str, Any]:
    """What reaches each rank of what a replica's leader sampled."""
    from megatron.core import parallel_state

    from megatron_bai.model import build
    from megatron_bai.rl.session import Session
    from megatron_bai.routing.replay.routing_replay import RoutingReplay

    replay = RoutingReplay(build.build_actor(config.Config(model=MODEL, parallel=parallel), device, train=False).chunks)
    group = parallel_state.get_model_parallel_group()
    columns: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(columns, replay.columns, group=group)
    leader = dist.get_rank(group) == 0
    rollouts = samples(4, np.random.default_rng(parallel_state.get_data_parallel_rank()))
    session = SimpleNamespace(is_replica_leader=leader, replica_moe_layers=columns, model_group=group)
    found = Session.send_to_replica(session, rollouts if leader else None)  # others have nothing to begin with
    right = [
        np.array_equal(own.tokens, whole.tokens) and np.array_equal(own.routes, whole.routes[:, replay.columns])
        for own, whole in zip(found, rollouts, strict=True)
    ]
    return {
        "right": gathered(all(right)),
        "layers": gathered({own.routes.shape[1] for own in found}),
        "bound": gathered(replay.layers),
    }


def state(modules: list[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """Every tensor, on rank 0."""
    from megatron_bai.model import gather

    found = {(key, index): whole.clone() for key, index, whole in gather.gather_slices(modules)}
    return found if dist.get_rank() == 0 else {}


def leftovers(modules: list[torch.nn.Module]) -> list[str]:
    """What Megatron's handles and the routers' hooks still hold."""
    from megatron.core.transformer.moe.router import TopKRouter

    held = []
    for router in (child for module in modules for child in module.modules() if isinstance(child, TopKRouter)):
        handle = router.router_replay
        items = (handle.router_replay_action, handle.target_topk_idx, handle.recorded_topk_idx)
        extra = [*handle.replay_backward_list, *router._forward_hooks, *router._forward_pre_hooks]
        if any(item is not None for item in items) or extra or "get_replay_topk" in vars(handle):
            held.append(f"layer {router.layer_number - 1}: {items}, {extra}")
    return held


def rank_main(rank: int, world: int, port: int, target: Path, layouts: dict[str, Layout]) -> None:
    """One rank of one world, through its layouts of this size."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device = backend.init_backend(config.Backend(kind="cpu", timeout_s=120))
    from megatron.core import parallel_state

    from megatron_bai.model import build

    facts = {}
    for layout, chosen in layouts.items():
        if chosen.processes == world:
            parallel = config.Parallel(**chosen.sizes, sequence="tensor" in chosen.sizes)
            build.init_parallel(parallel, seed=0)
            facts |= {name: run(name, device) for name in runs(layout)}
            facts[layout] = delivery(device, parallel)
            parallel_state.destroy_model_parallel()
    if rank == 0:
        torch.save(facts, target.with_name(f"{target.name}.{world}"))
    backend.shutdown_backend()


def main() -> None:
    prepare("megatron.core.models.gpt", "megatron.core.dist_checkpointing", "megatron_bai.rl.policy.training_engine")
    names = sys.argv[2:] or LAYOUTS
    chosen = {name: layout for name, layout in LAYOUTS.items() if name in names}
    for world in sorted({layout.processes for layout in chosen.values()}):
        arguments = (world, free_port(), Path(sys.argv[1]), chosen)
        torch.multiprocessing.start_processes(rank_main, arguments, nprocs=world, start_method="fork")


if __name__ == "__main__":
    main()
