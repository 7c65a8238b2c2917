"""Run as a script: one supervised update with the losses of routers, in several layouts. Arguments: directory, cases.

Rank 0 leaves in `NAME.pt`, for each of `LOSSES`, what was measured, the gradient, and in `one/hf` the weights of all.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing
from distributed.worker import Case, _layout, join, measured
from moe import MODEL
from processes import free_port, prepare

from megatron_bai import config
from megatron_bai.distributed import backend

ROWS, LENGTH = 8, 24
TEXT = (24, 9, 17, 5, 24, 20, 3, 12)  # tokens of each row, the rest is padding: of the last tensor rank most of it
BALANCED, Z = 0.8, 0.05  # coefficients: the gradients of these losses are as large as the text's
LOSSES = {
    name: config.Supervised(load_balancing=name, aux_loss_coeff=BALANCED, z_loss_coeff=Z)
    for name in ("aux_loss", "seq_aux_loss", "global_aux_loss")
}
_RECOMPUTED = config.Parallel(recompute="full")
# Micro-batches are of the same rows in all layouts. Where there are two replicas, each has four rows of the eight.
CASES = {
    "one": Case(1, _layout(), micro=2),
    "one_micro8": Case(1, _layout(), micro=8),
    "one_full": Case(1, _RECOMPUTED, micro=2),
    "one_moe": Case(1, replace(_RECOMPUTED, recompute="moe"), micro=2),
    "tp2_ep2": Case(2, _layout(tensor=2, expert=2), micro=2),
    "dp2_full": Case(2, _RECOMPUTED, micro=2),
    "pp2_vpp2": Case(2, _layout(pipeline=2, virtual_pipeline=2), micro=2),
    "tp2_pp2_full": Case(4, replace(_layout(tensor=2, pipeline=2), recompute="full"), micro=2),
    "ep2_pp2": Case(4, _layout(expert=2, pipeline=2), micro=2),
}
QUICK = ("one", "tp2_ep2", "dp2_full")


def text() -> tuple[np.ndarray, np.ndarray]:
    """`[ROWS, LENGTH]` tokens, and which of them are learned: all but the first three of a row, and its padding."""
    tokens = np.random.default_rng(11).integers(0, MODEL.vocab_size, (ROWS, LENGTH))
    places, ends = np.arange(LENGTH)[None], np.array(TEXT)[:, None]
    return tokens, (places >= np.minimum(3, ends - 1)) & (places < ends)


def update(case: Case, device: backend.Device, supervised: config.Supervised, weights: Path | None) -> dict[str, Any]:
    """One update: statistics of the text's loss and of the routers, and the gradient."""
    from megatron.core import parallel_state

    from megatron_bai.model import build, hf_checkpoint, megatron_checkpoint, param_shards
    from megatron_bai.model.router_losses import mend_router
    from megatron_bai.rl import objectives
    from megatron_bai.rl.batches.batch import from_sft
    from megatron_bai.rl.policy.router_measurement import measure_routers
    from megatron_bai.rl.policy.training_engine import TrainingEngine
    from megatron_bai.routing.replay.routing_replay import RoutingReplay

    settings = config.Config(
        model=MODEL, parallel=case.parallel, objective=config.Sft(), supervised=supervised,
        trainer=config.Trainer(clip_grad=1e9, micro_batch_size=case.micro),
    )  # fmt: skip
    actor = build.build_actor(settings, device)
    param_shards.init_random(actor.modules, MODEL, seed=0)
    megatron_checkpoint.reload_master_weights(actor)
    if weights:
        hf_checkpoint.save_hf(actor.modules, MODEL, weights, Path("none"), {})
    replay = RoutingReplay(actor.chunks)
    engine = TrainingEngine(actor, replay, device.device, 1.0)
    for router in replay.routers.values():
        mend_router(router)
    size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    tokens, target = (each[rank * ROWS // size : (rank + 1) * ROWS // size] for each in text())
    micros = from_sft(tokens, target).split(case.micro)
    with measure_routers(replay.routers, replay.columns) as of_routers:
        run = partial(engine.update, micros, None, objectives.get("sft"), settings.objective, mask_padding=True)
        (stats, norm), gradient = measured(actor, run)
    reports = engine.last_stage and engine.tensor_rank == 0
    of_routers = of_routers.gather_sum(True)
    return {
        "text": stats.gather_sum(reports).values() | {"grad_norm": norm},
        "routers": of_routers.values(),
        "load": {name: dict(counts) for name, counts in of_routers.tallies.items()},
        "gradient": gradient,
    }


def rank_main(rank: int, world: int, port: int, directory: Path, chosen: dict[str, Case]) -> None:
    """One rank of one world: every chosen case of this size."""
    join(rank, world, port)
    device = backend.init_backend(config.Backend(kind="cpu", timeout_s=300))
    from megatron.core import parallel_state

    from megatron_bai.model import build

    for name, case in chosen.items():
        if case.processes != world:
            continue
        build.init_parallel(case.parallel, seed=0)
        found: dict[str, Any] = {}
        for loss, supervised in LOSSES.items():
            weights = directory / "one" / "hf" if name == "one" and not found else None
            found[loss] = update(case, device, supervised, weights)
        if name == "one":
            found["none"] = update(case, device, config.Supervised(), None)
        if rank == 0:
            torch.save(found, directory / f"{name}.pt")
        parallel_state.destroy_model_parallel()
    backend.shutdown_backend()


def main() -> None:
    prepare("megatron.core.models.gpt", "megatron.core.dist_checkpointing", "megatron_bai.rl.policy.training_engine")
    chosen = {name: case for name, case in CASES.items() if name in sys.argv[2:]}
    for world in sorted({case.processes for case in chosen.values()}):
        arguments = (world, free_port(), Path(sys.argv[1]), chosen)
        torch.multiprocessing.start_processes(rank_main, arguments, nprocs=world, start_method="fork")


if __name__ == "__main__":  # dist_checkpointing spawns helpers that import this module again
    main()
