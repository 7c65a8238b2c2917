"""Run as a script: examples/replay_in_own_loop.py in one process and in two stages, beside other ways of forcing.

Argument: a file to leave the facts in, with the number of processes behind its name.
"""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.multiprocessing
from distributed.worker import gathered, join
from moe import MODEL
from processes import TESTS, free_port, prepare
from routing.layouts_worker import leftovers

from megatron_bai import config
from megatron_bai.distributed import backend


def load_example() -> ModuleType:
    """Import the example from its file."""
    spec = importlib.util.spec_from_file_location("own_loop", TESTS.parent / "examples" / "replay_in_own_loop.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Still:
    """An optimizer that leaves the weights as they are, and the gradients where they can be read."""

    def __init__(self, model: torch.nn.Module):
        self.model = model

    def zero_grad(self) -> None:
        self.model.zero_grad()

    def step(self) -> None:
        """Nothing."""


class Forced:
    """Stands for `ForwardStepRoutes` and forces the same routes by the library's own replay."""

    def __init__(self, replay: Any, batches: list[dict[str, torch.Tensor]]):
        self.replay, self.batches = replay, batches

    def install(self, *arguments: Any) -> None:
        """Nothing: they are forced already."""

    def wrap(self, schedule: Any) -> Any:
        from megatron_bai.routing.layout import Place, assemble
        from megatron_bai.routing.replay import MicroRoutes

        def micro(batch: dict[str, torch.Tensor]) -> MicroRoutes:
            routes = [ids[kept].numpy() for ids, kept in zip(batch["routes"], batch["routed"])]
            ids, routed, missing = map(
                torch.from_numpy, assemble(routes, batch["routes"].shape[1], self.replay.signature)
            )
            rows = Place().rows
            return MicroRoutes(rows(ids[:, :, self.replay.columns]), rows(routed), rows(missing))

        def run(**named: Any) -> Any:
            with self.replay.force([micro(batch) for batch in self.batches]):
                return schedule(**named)

        return run


class Native:
    """Forces routes by Megatron-Core's own handles, forward pass by forward pass: one process, nothing recomputed."""

    def __init__(self, signature: Any):
        self.signature = signature

    def wrap(self, schedule: Any) -> Any:
        return schedule

    def install(self, model: torch.nn.Module, ids: torch.Tensor, routed: torch.Tensor) -> None:
        from megatron.core.transformer.moe.router import TopKRouter
        from megatron.core.transformer.moe.router_replay import RouterReplayAction

        from megatron_bai.routing.layout import filler_routes

        spread = torch.from_numpy(filler_routes(routed.numel(), self.signature)).view(ids.shape).long()
        ids = torch.where(routed[:, :, None, None], ids, spread).transpose(0, 1).flatten(0, 1)
        for layer, router in enumerate(each for each in model.modules() if isinstance(each, TopKRouter)):
            router.router_replay.set_target_indices(ids[:, layer].contiguous())
            router.router_replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)


def fill(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Give every parameter values that follow from its name, whichever stage it is on; return them by that name."""
    from megatron.core import parallel_state

    stages = parallel_state.get_pipeline_model_parallel_world_size()
    first = parallel_state.get_pipeline_model_parallel_rank() * 4 // stages
    named = {}
    for name, parameter in model.named_parameters():
        name = re.sub(r"(?<=layers\.)\d+", lambda match: str(int(match[0]) + first), name)
        generator = torch.Generator().manual_seed(int.from_bytes(name.encode(), "little") % 2**31)
        values = 0.2 * torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(values + 1 if "norm" in name else values)
        named[name] = parameter
    return named


def example_facts() -> dict[str, Any]:
    """Losses and gradients of the example's step, by each way, recomputed or not."""
    from megatron.core import parallel_state

    example = load_example()
    facts: dict[str, Any] = {}
    for recompute in (False, True):
        model, replay = example.build_model(recompute)
        parameters = fill(model)
        batches = list(example.rollouts(0))
        ways: dict[str, Any] = {"own": replay, "forced": Forced(replay.replay, batches)}
        if not recompute and parallel_state.get_pipeline_model_parallel_world_size() == 1:
            ways["native"] = Native(replay.replay.signature)
        for name, way in ways.items():
            losses = example.train_step(model, Still(model), way, iter(batches))
            gradients = {key: parameter.grad.clone() for key, parameter in parameters.items()}
            facts[name, recompute] = {
                "losses": next(each for each in gathered([float(loss["loss"]) for loss in losses]) if each),
                "gradients": {key: value for part in gathered(gradients) for key, value in part.items()},
            }
            if name == "own":
                facts[name, recompute]["rows"] = sum(gathered(replay.replay.rows))
                facts[name, recompute]["recomputed"] = sum(gathered(replay.replay.recomputed))
                facts[name, recompute]["held"] = sum(gathered(leftovers([model])), [])
        facts["plain", recompute] = sum(int(batch["routed"].sum()) for batch in batches) * example.LAYERS
    return facts


def refusals() -> dict[str, str]:
    """What is said to a forward step that installs nothing, the wrong shape, or outside of the schedule."""
    example = load_example()
    model, replay = example.build_model()
    batch = next(example.rollouts(0))

    class Without(Forced):
        def wrap(self, schedule: Any) -> Any:
            return replay.wrap(schedule)

    class Narrow(Without):
        def install(self, model: torch.nn.Module, ids: torch.Tensor, routed: torch.Tensor) -> None:
            replay.install(model, ids[..., :1], routed)

    said = {}
    for name, way in (("without", Without(None, [])), ("narrow", Narrow(None, []))):
        try:
            example.train_step(model, Still(model), way, example.rollouts(0))
        except (RuntimeError, ValueError) as error:
            said[name] = str(error)
    try:
        replay.install(model, batch["routes"], batch["routed"])
    except RuntimeError as error:
        said["outside"] = str(error)
    assert not leftovers([model])
    return said


def interleaved_facts(device: backend.Device) -> dict[str, Any]:
    """Gradients of two stages of two chunks each, by both ways; rows whose route is missing are live."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_bai.model import build, param_shards
    from megatron_bai.routing.layout import Place
    from megatron_bai.routing.replay import ForwardStepRoutes, MicroRoutes

    parallel = config.Parallel(pipeline=2, virtual_pipeline=2, recompute="full")
    build.init_parallel(parallel, seed=0)
    actor = build.build_actor(config.Config(model=MODEL, parallel=parallel), device)
    param_shards.init_random(actor.modules, MODEL, seed=0)
    routes = ForwardStepRoutes(actor.chunks)
    random = torch.Generator().manual_seed(0)
    shape = (2, 16, MODEL.num_layers, MODEL.num_experts)
    batches = [
        {
            "tokens": torch.randint(MODEL.vocab_size, shape[:2], generator=random),
            "ids": torch.rand(shape, generator=random).topk(MODEL.moe_topk).indices,
            "missing": torch.rand(shape[:2], generator=random) < 0.2,
        }
        for _ in range(4)
    ]

    def forward_step(batches: Any, model: torch.nn.Module) -> Any:
        batch = next(batches)
        if routes._add is not None:
            routes.install(model, batch["ids"].numpy(), missing=batch["missing"])
        tokens = batch["tokens"]
        output = model(tokens, torch.arange(16).expand_as(tokens), None, labels=tokens.roll(-1, dims=1))
        return output, lambda output: (output.float().mean(), {"loss": output.detach().mean()})

    def run(schedule: Any) -> dict[str, Any]:
        for chunk in actor.chunks:
            chunk.zero_grad_buffer()
        losses = schedule(
            forward_step_func=forward_step, data_iterator=[iter(batches) for _ in actor.chunks], model=actor.chunks,
            num_microbatches=4, seq_length=16, micro_batch_size=2, forward_only=False,
        )  # fmt: skip
        gradients = [each.main_grad.clone() for chunk in actor.chunks for each in chunk.parameters()]
        return {"losses": [float(loss["loss"]) for loss in losses], "gradients": gradients}

    rows, schedule = Place().rows, get_forward_backward_func()
    own = run(routes.wrap(schedule))
    counted = routes.replay.rows
    columns = routes.replay.columns
    forced = [MicroRoutes(rows(b["ids"][:, :, columns]), rows(~b["missing"]), rows(b["missing"])) for b in batches]
    with routes.replay.force(forced):
        library = run(schedule)
    known = sum(int((~batch["missing"]).sum()) for batch in batches) * len(columns)
    return {"own": gathered(own), "forced": gathered(library), "rows": gathered((counted, known))}


def rank_main(rank: int, world: int, port: int, target: Path) -> None:
    """One rank of one world."""
    join(rank, world, port)
    device = backend.init_backend(config.Backend(kind="cpu", timeout_s=120))
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=world)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    facts = example_facts()
    if world == 1:
        facts["refusals"] = refusals()
    else:
        parallel_state.destroy_model_parallel()
        facts["interleaved"] = interleaved_facts(device)
    if rank == 0:
        torch.save(facts, target.with_name(f"{target.name}.{world}"))
    backend.shutdown_backend()


def main() -> None:
    prepare("megatron.core.models.gpt", "megatron_bai.model.build")
    for world in (1, 2):
        arguments = (world, free_port(), Path(sys.argv[1]))
        torch.multiprocessing.start_processes(rank_main, arguments, nprocs=world, start_method="fork")


if __name__ == "__main__":
    main()
