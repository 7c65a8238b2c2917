"""Run as a script: route predictors in several layouts, in a drift, and in the trainer's loop. Argument: a directory.

Each layout leaves what it found in `NAME.pt`, and the predictors of `one` in `one/`.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from distributed.worker import LENGTH, Case, Run, gathered, join, problem, state
from moe import MODEL, SIGNATURE
from processes import free_port, prepare

from megatron_bai import config
from megatron_bai.distributed import backend

CASES = {
    "one": Case(1, config.Parallel(), micro=8),
    "recomputed": Case(1, config.Parallel(recompute="full")),
    "tp2": Case(2, config.Parallel(tensor=2, sequence=True), micro=2),
    "tp2_ep2_packed": Case(2, config.Parallel(tensor=2, expert=2, sequence=True), row=42),
    "dp2": Case(2, config.Parallel(), micro=2),
    "pp2_vpp2_packed": Case(2, config.Parallel(pipeline=2, virtual_pipeline=2), row=24),
}
EVERY, ROUNDS = 3, 3
# As in `distributed/worker.py`: with an epsilon far above any gradient Adam's first step is −SCALE · gradient.
EPSILON, SCALE = 1e6, 5.0
MOVED = 0.1  # of the way to other weights
DRIFTS, SHIFT = 12, 0.01


def predicting(run: Run, **changes: Any) -> Any:
    """The predictors of a run's routers; `changes` are of the settings of replay."""
    from megatron_bai.rl.policy.route_prediction import RoutePrediction

    run.settings.replay = config.Replay(mode="r2", predict=True, **changes)
    return RoutePrediction(run.engine, run.settings)


def measured(run: Run) -> Any:
    """Predictors whose steps show their gradients."""
    prediction = predicting(run, predict_every=EVERY, predict_learning_rate=EPSILON * SCALE)
    prediction.optimizer.param_groups[0]["eps"] = EPSILON
    return prediction


def record(run: Run, prediction: Any, step: int) -> dict[str, torch.Tensor]:
    """The scores of the pass that records, in the order of the problem; there is no first mini-batch."""
    with prediction.record(step, [[], run.micros]):
        found = run.engine.score(run.micros, record=True, shift=prediction.shift)
        run.engine.score(run.micros, run.routes("r3"))  # another pass is not recorded
    run.recorded, mine = found.routes, None
    if found.logprobs is not None:
        run.become(old_logprobs=found.logprobs)
        mine = (run.dp_rank, found.logprobs[run.batch.sample_index.argsort()]) if run.reports_stats else None
    parts = sorted((part for part in gathered(mine) if part), key=lambda part: part[0])
    return torch.cat([part[1] for part in parts])


def learn(run: Run, prediction: Any) -> dict[str, float]:
    """The metrics of one step of the predictors, in an update that leaves the actor unchanged."""
    from megatron_bai.monitor.stats import Stats

    stats = Stats()
    for group in run.actor.optimizer.param_groups:
        group["lr"] = 0.0
    with prediction.learn(1, run.settings.trainer.learning_rate, stats):
        run.update("r2")
    return stats.gather_sum(True).values()


def move(run: Run, seed: int) -> None:
    """Move all weights of the actor, alike in every layout."""
    from megatron_bai.model import megatron_checkpoint, param_shards

    parameters = [parameter for module in run.actor.modules for parameter in module.parameters()]
    before = [parameter.detach().clone() for parameter in parameters]
    param_shards.init_random(run.actor.modules, MODEL, seed=seed)
    with torch.no_grad():
        for parameter, old in zip(parameters, before, strict=True):
            parameter.copy_(old.lerp(parameter, MOVED))
    megatron_checkpoint.reload_master_weights(run.actor)


def by_layer(run: Run, prediction: Any) -> dict[int, list[torch.Tensor]]:
    """Every rank's predictors, by layer."""
    mine = dict(zip(run.replay.layers, prediction.weights.detach().clone(), strict=True))
    found: dict[int, list[torch.Tensor]] = {}
    for weights in gathered(mine):
        for layer, weight in weights.items():
            found.setdefault(layer, []).append(weight)
    return found


def work(name: str, directory: Path, device: backend.Device) -> dict[str, Any]:
    """`ROUNDS` rounds of a pass that records, moved weights, and a pass that is learned from."""
    run = Run(CASES[name], device)
    prediction = measured(run)
    found: dict[str, Any] = {"scores": [], "metrics": [], "weights": []}
    for step in range(ROUNDS):
        found["scores"].append(record(run, prediction, step))
        move(run, step + 1)
        found["metrics"].append(learn(run, prediction))
        found["weights"].append(by_layer(run, prediction))
    own = directory / name
    own.mkdir(exist_ok=True)
    prediction.save_files(own)
    torch.distributed.barrier()
    found["resumed"] = resumed(run, prediction, own)
    elsewhere = measured(run)
    elsewhere.load_state_dict(prediction.state_dict())
    elsewhere.load_files(directory / "one")
    found["from one"] = by_layer(run, elsewhere)
    if name == "one":
        found["zero"], found["wiring"], found["drift"] = zero(device), wiring(device), drift(device)
    return found


def resumed(run: Run, prediction: Any, directory: Path) -> list[bool]:
    """Whether each rank's next round has the same bits with predictors that were saved and loaded."""
    again = measured(run)
    again.load_state_dict(prediction.state_dict())
    again.load_files(directory)
    found = []
    for each in (prediction, again):
        scores = record(run, each, ROUNDS)
        found.append([scores, learn(run, each), each.weights.detach().clone()])
    return gathered(all([torch.equal(found[0][i], found[1][i]) for i in (0, 2)]) and found[0][1] == found[1][1])


def zero(device: backend.Device) -> dict[str, Any]:
    """R2 as it is, and with predictors that are all 0: routes and log-probabilities."""
    run = Run(CASES["one"], device)
    prediction = predicting(run)
    plain, shifted = (run.engine.score(run.micros, record=True, shift=s) for s in (None, prediction._compute_shift))
    pairs = zip(plain.routes, shifted.routes, strict=True)
    assert prediction.shift is None and plain.logprobs is not None and shifted.logprobs is not None
    return {
        "same": torch.equal(plain.logprobs, shifted.logprobs) and all(torch.equal(a.ids, b.ids) for a, b in pairs),
    }


def wiring(device: backend.Device) -> dict[str, Any]:
    """What the routers saw, by hooks of their own: inputs and logits of the recorded pass, logits of the update."""
    run = Run(CASES["one"], device)
    prediction, seen = measured(run), {layer: [] for layer in run.replay.layers}

    def see(router: Any, inputs: tuple, output: Any) -> None:
        hidden = inputs[0].detach().flatten(0, 1).double()
        seen[router.layer_number - 1].append((hidden, hidden @ router.weight.detach().double().T))

    with prediction.record(1, [[], run.micros]):
        handles = [router.register_forward_hook(see) for router in run.replay.routers.values()]
        run.recorded = run.engine.score(run.micros, record=True).routes
        for handle in handles:
            handle.remove()
    move(run, 1)
    handles = [router.register_forward_hook(see) for router in run.replay.routers.values()]
    metrics = learn(run, prediction)
    fed = (run.batch.routed | run.batch.missing).T  # [T, B], the order of the routers' rows
    kept = fed & ((torch.arange(len(fed)) + 1) % EVERY == 0)[:, None]
    return {
        "seen": seen,
        "kept": kept.flatten(),
        "metrics": metrics,
        "weights": {layer: weights[0] for layer, weights in by_layer(run, prediction).items()},
    }


def drift(device: backend.Device) -> list[dict[str, float]]:
    """The metrics of steps in which every router's weights move by the same shift, after routes are recorded."""
    from megatron_bai.model import megatron_checkpoint

    run = Run(CASES["one"], device)
    prediction = predicting(run, predict_every=1, predict_learning_rate=3e-3)
    generator, found = torch.Generator().manual_seed(0), []
    routers = list(run.replay.routers.values())
    shifts = [SHIFT * torch.randn(router.weight.shape, generator=generator) for router in routers]
    for step in range(DRIFTS):
        record(run, prediction, step)
        with torch.no_grad():
            for router, shift in zip(routers, shifts, strict=True):
                router.weight.add_(shift)
        megatron_checkpoint.reload_master_weights(run.actor)
        found.append(learn(run, prediction))
    return found


class Given:
    """A collector whose samples never change, and the inference engine that they need not."""

    version, sync_gap = 0, 0.0

    def __init__(self, columns: list[int]):
        self.columns = columns

    def collect(self, stats: Any, last: bool) -> tuple[list, Any]:
        from megatron_bai.rl.batches.batch import from_samples

        rollouts, advantages, _ = problem()
        rollouts = [sample.select_layers(self.columns) for sample in rollouts]
        return rollouts, from_samples(rollouts, advantages, LENGTH, 0, SIGNATURE)

    def sync(self) -> None:
        pass


def loop(directory: Path, predict: bool) -> dict[str, Any]:
    """The trainer's steps on rollouts that are given, with R2 or with predicted routes."""
    from megatron_bai.rl.session import open_session
    from megatron_bai.rl.trainer import TrainingLoop

    learned = {"predict": True, "predict_every": 1, "predict_learning_rate": 0.1} if predict else {}
    settings = config.Config(
        run=config.Run(dir=str(directory / f"run-{predict}")),
        backend=config.Backend(kind="cpu"),
        model=replace(MODEL, vocab_size=64, max_position_embeddings=128),  # what tokenizer and rollouts ask for
        objective=config.Grpo(router_shift=True),
        replay=config.Replay(mode="r2", **learned),
        trainer=config.Trainer(prompts_per_step=2, group_size=4, mini_batches=2, micro_batch_size=2),
    )
    with open_session(settings) as session:
        given = Given(session.engine.replay.columns)
        training = TrainingLoop(session, given)
        training.collector = given
        steps, weights = [], []
        for step in range(3):
            steps.append(training.step(step))
            weights.append(state(session.actor))
        return {"steps": steps, "weights": weights, "stateful": sorted(training.stateful)}


def rank_main(rank: int, world: int, port: int, directory: Path) -> None:
    join(rank, world, port)
    device = backend.init_backend(config.Backend(kind="cpu", timeout_s=300))
    from megatron.core import parallel_state

    from megatron_bai.model import build

    for name, case in CASES.items():
        if case.processes != world:
            continue
        build.init_parallel(case.parallel, seed=0)
        found = work(name, directory, device)
        if rank == 0:
            torch.save(found, directory / f"{name}.pt")
        parallel_state.destroy_model_parallel()
    backend.shutdown_backend()


def loop_main(rank: int, port: int, directory: Path, predict: bool) -> None:
    join(rank, 1, port)
    torch.save(loop(directory, predict), directory / f"loop-{predict}.pt")


def main() -> None:
    prepare("megatron.core.models.gpt", "megatron.core.distributed", "megatron_bai.rl.trainer")
    directory = Path(sys.argv[1])
    jobs: list[tuple[Any, int, tuple]] = [(rank_main, world, (world, free_port(), directory)) for world in (1, 2)]
    jobs += [(loop_main, 1, (free_port(), directory, predict)) for predict in (False, True)]
    for function, world, arguments in jobs:
        torch.multiprocessing.start_processes(function, arguments, nprocs=world, start_method="fork")


if __name__ == "__main__":
    main()
