"""Run as a script: what moves a router's expert bias, and what does not. Arguments: a directory, layouts, a family.

`published` in the directory is a checkpoint of a family whose routers have one. Rank 0 leaves `LAYOUT.pt`.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
from distributed.worker import gathered, join
from model.families.family_worker import LAYOUTS, Bench
from model.families.published import LENGTH
from processes import free_port, prepare

from megatron_bai import config
from megatron_bai.distributed import backend

LENGTHS = (LENGTH, LENGTH - 5, LENGTH - 11, LENGTH)
RATE = 0.03
TRAINER = config.Trainer(clip_grad=1e9, weight_decay=0.5, expert_bias_update_rate=RATE)


class BiasBench(Bench):
    """The family's model with samples of several lengths, so that there is padding."""

    def batch(self) -> Any:
        from megatron_bai.rl.batches.batch import from_samples
        from megatron_bai.rl.batches.stages import make_scored_batch, make_training_batch

        samples = [
            replace(s, tokens=s.tokens[:n], logprobs=s.logprobs[: n - 1], routes=s.routes[: n - 1])
            for s, n in zip(self.samples(), LENGTHS, strict=True)
        ]
        advantages = np.linspace(-1, 2, len(samples))
        rollouts = from_samples(samples, advantages, LENGTH, 0, self.replay.signature)
        return make_training_batch(make_scored_batch(rollouts, rollouts.infer_logprobs))

    def reload(self) -> None:
        """Back to the published weights, with the optimizer's copies."""
        from megatron_bai.model import hf_checkpoint, megatron_checkpoint

        hf_checkpoint.load_hf(self.actor.modules, self.model, self.directory / "published")
        megatron_checkpoint.reload_master_weights(self.actor)

    def biases(self) -> dict[str, torch.Tensor]:
        """On rank 0, by published names."""
        return {name: tensor for name, tensor in self.state().items() if name.endswith("_bias")}

    def steps(self) -> list[float]:
        """The step counts of all optimizers of all ranks."""
        states = [state for each in self.actor.optimizer.chained_optimizers for state in each.optimizer.state.values()]
        return sorted({step for steps in gathered({float(state["step"]) for state in states}) for step in steps})

    def update(self, forced: bool, rate: float = RATE, learning_rate: float = 0.0, mask_padding: bool = False) -> float:
        """An update of the published weights; returns the gradient's norm."""
        from megatron_bai.rl import objectives

        self.reload()
        self.actor.transformer_config.moe_router_bias_update_rate, self.replay.moves_bias = rate, rate > 0
        for group in self.actor.optimizer.param_groups:
            group["lr"] = learning_rate
        routes = [self.engine.local_routes(micro) for micro in self.micros] if forced else None
        settings = config.Grpo()
        return self.engine.update(self.micros, routes, objectives.get(settings.name), settings, mask_padding)[1]


def work(directory: Path, layout: str, device: backend.Device) -> dict[str, Any]:
    """All facts of one layout."""
    from megatron_bai.model import training_state
    from megatron_bai.model.router_losses import mend_router
    from megatron_bai.rl.policy.weight_copy import WeightCopy

    found: dict[str, Any] = {}
    for recompute in ("none", "full"):
        bench = BiasBench(directory.name, directory, replace(LAYOUTS[layout][1], recompute=recompute), device, TRAINER)
        bench.update(forced=True)
        found[f"forced, recompute {recompute}"] = bench.biases()
    found["frozen norm"] = bench.update(forced=True, rate=0.0, learning_rate=1.0)
    found["frozen"] = bench.biases()
    found["optimized"] = sum(p.numel() for g in bench.actor.optimizer.param_groups for p in g["params"])
    found["other routes"] = bench.other_routes()
    copied = WeightCopy(bench.actor)
    found["live norm"] = bench.update(forced=False)
    found["live"] = bench.biases()
    own = directory / layout
    training_state.save({"actor": bench.actor}, own / "state", directory / "published", {}).finalize()
    with copied.swapped_in():
        found["copied"] = bench.biases()
    found["swapped back"] = bench.biases()
    found["steps"] = bench.steps()
    for state in sorted(directory.glob("*/state")):  # this layout's, and those of layouts before
        bench.update(forced=True)
        bench.reload()
        training_state.load({"actor": bench.actor}, state, restore_rng=state.parent == own)
        found[f"resumed from {state.parent.name}"] = bench.biases()
        found[f"steps from {state.parent.name}"] = bench.steps()
    found |= critic_facts(bench, device)
    for router in bench.replay.routers.values():
        mend_router(router)
    found["masked norm"], found["masked"] = bench.update(forced=False, mask_padding=True), bench.biases()
    if layout == "one":
        found["bfloat16"] = bfloat16_facts(directory, device)
    return found


def critic_facts(bench: BiasBench, device: backend.Device) -> dict[str, Any]:
    """The bias of a critic that begins as the actor, by layer, of all ranks."""
    from megatron_bai.model import build
    from megatron_bai.rl.policy.critic import copy_backbone

    critic = build.build_critic(bench.settings, device)
    copy_backbone(bench.actor, critic)
    pairs = [
        {n: b.clone() for module in model.modules for n, b in module.named_buffers() if n.endswith("expert_bias")}
        for model in (bench.actor, critic)
    ]
    return {"critic": gathered(pairs), "critic's rate": critic.transformer_config.moe_router_bias_update_rate}


def bfloat16_facts(directory: Path, device: backend.Device) -> dict[str, Any]:
    """The bias of a model in bfloat16: as it was loaded, and after an update."""
    bench = BiasBench(directory.name, directory, LAYOUTS["one"][1], replace(device, dtype=torch.bfloat16), TRAINER)
    dtypes = {name: tensor.dtype for name, tensor in bench.state().items()}
    before = bench.biases()
    bench.update(forced=True)
    return {"dtypes": dtypes, "before": before, "after": bench.biases()}


def rank_main(rank: int, world: int, port: int, directory: Path, layouts: list[str]) -> None:
    """One rank of one world: every layout of this size."""
    join(rank, world, port)
    device = backend.init_backend(config.Backend(kind="cpu", timeout_s=300))
    from megatron.core import parallel_state

    from megatron_bai.model import build

    for layout in (layout for layout in layouts if LAYOUTS[layout][0] == world):
        build.init_parallel(LAYOUTS[layout][1], seed=0)
        found = work(directory, layout, device)
        if rank == 0:
            torch.save(found, directory / f"{layout}.pt")
        parallel_state.destroy_model_parallel()
    dist.barrier()
    backend.shutdown_backend()


def main() -> None:
    directory, layouts = Path(sys.argv[1]), sys.argv[2].split(",")
    prepare("megatron.core.models.gpt", "megatron.core.dist_checkpointing", "megatron_bai.rl.policy.training_engine")
    for world in sorted({LAYOUTS[layout][0] for layout in layouts}):
        arguments = (world, free_port(), directory, layouts)
        torch.multiprocessing.start_processes(rank_main, arguments, nprocs=world, start_method="fork")


if __name__ == "__main__":  # dist_checkpointing spawns helpers that import this module again
    main()
