"""Run as a script: families' checkpoints in Megatron-Core. Arguments: a directory, a list of layouts, and names.

`NAME/published` is the checkpoint of a family. For each layout, in a world of its size: import it, log-probabilities
and routes; replay of recorded and of other routes; a gradient; the export as `NAME/LAYOUT/hf` and
`NAME/LAYOUT/megatron`, and the export of what was loaded from `NAME/one/megatron`; what servers receive in weight
syncs. Rank 0 leaves `NAME/LAYOUT.pt`.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
from distributed.worker import EPSILON, SCALE, gathered, join
from model.families.family_sync import SYNCED, receive
from model.families.published import BATCH, LENGTH, tokens_of
from processes import free_port, prepare

from megatron_bai import config
from megatron_bai.distributed import backend

LAYOUTS = {
    "one": (1, config.Parallel()),
    "tp1_ep2": (2, config.Parallel(expert=2)),
    "tp2_ep1": (2, config.Parallel(tensor=2, sequence=True)),
    "tp2_ep2": (2, config.Parallel(tensor=2, expert=2, sequence=True)),
    "pp2_uneven": (2, config.Parallel(pipeline=2, stage_layers=[1, 3])),
    "recompute_selective": (1, config.Parallel(recompute="selective")),
    "recompute_full": (1, config.Parallel(recompute="full")),
    "packed": (1, config.Parallel()),
}

TRAINER = config.Trainer(clip_grad=1e9)


class Bench:
    """A family's model in a layout, filled from its published checkpoint."""

    def __init__(
        self,
        name: str,
        directory: Path,
        parallel: config.Parallel,
        device: backend.Device,
        trainer: config.Trainer = TRAINER,
    ):
        from megatron_bai.model import build, hf_checkpoint, megatron_checkpoint
        from megatron_bai.model.architecture import read_architecture
        from megatron_bai.rl.policy.training_engine import TrainingEngine
        from megatron_bai.routing.replay.routing_replay import RoutingReplay

        self.name, self.directory = name, directory
        self.model = read_architecture(directory / "published")
        self.settings = config.Config(model=self.model, parallel=parallel, trainer=trainer)
        self.actor = build.build_actor(self.settings, device)
        hf_checkpoint.load_hf(self.actor.modules, self.model, directory / "published")
        megatron_checkpoint.reload_master_weights(self.actor)
        self.replay = RoutingReplay(self.actor.chunks)
        self.engine = TrainingEngine(self.actor, self.replay, device.device, 1.0)
        self.micros = self.batch().split(2)

    def pack(self) -> None:
        """Feed the model rows of two samples and a rest, one after another."""
        from megatron_bai.rl.batches.micro_batches import pack_rows

        self.micros = pack_rows(self.batch(), [2, 2], 2 * LENGTH + 8)

    def other_routes(self) -> np.ndarray:
        """Routes that no router would choose: `[B, T - 1, MoE layers, topk]`."""
        signature = self.replay.signature
        scores = np.random.default_rng(3).random((BATCH, LENGTH - 1, signature.moe_layers, signature.num_experts))
        return scores.argsort(axis=-1)[..., : signature.topk].astype(signature.dtype)

    def samples(self) -> list[Any]:
        """Every token but the first is a response's."""
        from megatron_bai.rollout.sample import Sample

        logprobs = np.random.default_rng(4).normal(-4, 0.3, (BATCH, LENGTH - 1)).astype(np.float32)
        return [
            Sample(i, tokens.numpy(), 1, logprobs[i], routes, (), "stop").select_layers(self.replay.columns)
            for i, (tokens, routes) in enumerate(zip(tokens_of(self.name), self.other_routes(), strict=True))
        ]

    def batch(self) -> Any:
        """The samples, of one length; the policy before an update is the inference engine's."""
        from megatron_bai.rl.batches.batch import from_samples
        from megatron_bai.rl.batches.stages import make_scored_batch, make_training_batch

        advantages = np.linspace(-1, 2, BATCH)
        rollouts = from_samples(self.samples(), advantages, LENGTH, 0, self.replay.signature)
        return make_training_batch(make_scored_batch(rollouts, rollouts.infer_logprobs))

    def on_rank_0(self, value: torch.Tensor | None) -> torch.Tensor | None:
        """What a rank of the last stage has."""
        return next((each for each in gathered(value) if each is not None), None)

    def score(self) -> dict[str, Any]:
        """Log-probabilities with live, recorded and other routes."""
        engine = self.engine
        live = engine.score(self.micros, record=True)
        again = engine.score(self.micros, live.routes)
        other = engine.score(self.micros, [engine.local_routes(micro) for micro in self.micros])
        found = {"logprobs": live.logprobs, "replayed": again.logprobs, "other": other.logprobs}
        found = {key: self.on_rank_0(value) for key, value in found.items()}
        return found | {"routes": [routes.ids for routes in live.routes], "rows": sum(gathered(self.replay.rows))}

    def state(self) -> dict[str, torch.Tensor]:
        """Every tensor by its published name, on rank 0."""
        from megatron_bai.model import hf_checkpoint

        tensors = hf_checkpoint.iter_hf_tensors(self.actor.modules, self.model)
        return {name: tensor.clone() for name, tensor in tensors if dist.get_rank() == 0}

    def gradient(self) -> tuple[dict[str, torch.Tensor], float]:
        """The gradient that an update with other routes applies, by published names, on rank 0; and its norm."""
        from megatron_bai.rl import objectives

        for group in self.actor.optimizer.param_groups:
            group["eps"], group["lr"] = EPSILON, EPSILON * SCALE
        before = self.state()
        routes = [self.engine.local_routes(micro) for micro in self.micros]
        settings = config.Grpo()
        _, norm = self.engine.update(self.micros, routes, objectives.get(settings.name), settings)
        after = self.state()
        return {name: (before[name].double() - after[name].double()) / SCALE for name in after}, norm


def unmarked(modules: list[Any]) -> list[str]:
    """The parameters that ranks split and that are not marked so: a gradient's norm has the first rank's alone."""
    from megatron_bai.model.param_shards import local_shards

    starts = [shard.data.data_ptr() for shard in local_shards(modules) if tuple(shard.data.shape) != shard.shape]
    return [
        name
        for module in modules
        for name, each in module.named_parameters()
        if any(0 <= start - each.data_ptr() < each.nbytes for start in starts)
        and not getattr(each, "tensor_model_parallel", False)
    ]


def work(name: str, directory: Path, layout: str, device: backend.Device) -> dict[str, Any]:
    """All that is asked of a family in a layout."""
    from megatron_bai.model import hf_checkpoint, megatron_checkpoint, param_shards

    own = directory / layout
    bench = Bench(name, directory, LAYOUTS[layout][1], device)
    if layout == "packed":
        bench.pack()
    found = bench.score()
    modules, published = bench.actor.modules, directory / "published"
    hf_checkpoint.save_hf(modules, bench.model, own / "hf", published, {})
    megatron_checkpoint.save(bench.actor, own / "megatron", published, {})
    if layout in SYNCED:
        found["received"] = receive(bench, device, own / "run", SYNCED[layout])
    param_shards.init_random(modules, bench.model, seed=1)
    megatron_checkpoint.load(bench.actor, directory / "one" / "megatron")
    hf_checkpoint.save_hf(modules, bench.model, own / "loaded", published, {})
    found["gradient"], found["grad_norm"] = bench.gradient()
    return found | {"other_routes": bench.other_routes(), "unmarked": unmarked(modules)}


def rank_main(rank: int, world: int, port: int, directory: Path, layouts: list[str], names: list[str]) -> None:
    """One rank of one world: every layout of this size."""
    join(rank, world, port)
    device = backend.init_backend(config.Backend(kind="cpu", timeout_s=300))
    from megatron.core import parallel_state

    from megatron_bai.model import build
    from megatron_bai.model.architecture import read_architecture

    for name in names:
        for layout in (layout for layout in layouts if LAYOUTS[layout][0] == world):
            parallel = LAYOUTS[layout][1]
            model = read_architecture(directory / name / "published")
            if parallel.stage_layers:
                parallel = replace(parallel, stage_layers=[1, model.num_layers - 1])
            build.validate_layout(model, parallel, world)
            build.init_parallel(parallel, seed=0)
            found = work(name, directory / name, layout, device)
            if rank == 0:
                torch.save(found, directory / name / f"{layout}.pt")
            parallel_state.destroy_model_parallel()
    backend.shutdown_backend()


def main() -> None:
    directory, layouts, names = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:]
    prepare(
        "megatron.core.models.gpt", "megatron.core.dist_checkpointing", "megatron_bai.rl.experience.inference_engine"
    )
    for world in sorted({LAYOUTS[layout][0] for layout in layouts}):
        arguments = (world, free_port(), directory, layouts, names)
        torch.multiprocessing.start_processes(rank_main, arguments, nprocs=world, start_method="fork")


if __name__ == "__main__":  # dist_checkpointing spawns helpers that import this module again
    main()
