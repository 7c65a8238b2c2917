"""`replay.py step`: what recording and forcing routes costs a training step, in one process.

A step is an old-policy forward and one update (forward, backward, Adam) over the same micro-batches, by the trainer's
own engine:

    none    live routing in both
    r2      recorded in the first, forced in the second
    r3      the rollout's routes, cut to this rank, forced in both
    shift   live routing in both, with RSPO's router shift (`objective.router_shift`): the routers' scores are kept in
            the first, and compared with those of the update's weights in a forward pass of its own before it. A
            step's first update needs none: this is what each later one costs
    exact   live routing in both, the forward passes by the server's own operations (`rollout.exact`); on a CPU only

All modes but the last do the same arithmetic, but for the shift's factor of 1: the learning rate is 0 and R3's routes
are those that the router chooses. Rounds of all modes follow each other in alternating order; a mode's ratio is the
median over rounds of its seconds by those of none in the same round. On a shared machine the seconds of the processor
say more than those of the clock: both are given.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch

from megatron_bai import config
from megatron_bai.distributed import backend

if TYPE_CHECKING:
    from megatron_bai.rl.batches.stages import RolloutBatch
    from megatron_bai.rl.policy.training_engine import TrainingEngine

MODES = ("none", "r2", "r3", "shift", "exact")
MODEL = config.Model(
    num_layers=8, hidden_size=256, num_attention_heads=4, num_query_groups=2, head_dim=64, num_experts=32, moe_topk=4,
    moe_ffn_hidden_size=128, vocab_size=1024, max_position_embeddings=1024, init_std=0.05,
)  # fmt: skip


def main(words: list[str]) -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--micro", type=int, default=4, help="samples in a micro-batch")
    parser.add_argument("--recompute", default="none", help="none, selective, moe or full")
    run(parser.parse_args(words))


def build_engine(settings: config.Config, device: backend.Device, exact: bool) -> "TrainingEngine":
    """A training engine with weights that depend on the settings alone."""
    from megatron_bai.model import build, megatron_checkpoint, param_shards
    from megatron_bai.model.exact_layers import make_exact
    from megatron_bai.rl.policy.training_engine import TrainingEngine
    from megatron_bai.routing.replay.routing_replay import RoutingReplay

    actor = build.build_actor(settings, device)
    if exact:
        make_exact(actor.modules, actor.architecture)
    param_shards.init_random(actor.modules, settings.model, seed=0)
    megatron_checkpoint.reload_master_weights(actor)
    return TrainingEngine(actor, RoutingReplay(actor.modules), device.device, temperature=1.0, exact=exact)


def draw_batch(arguments: argparse.Namespace, engine: "TrainingEngine") -> "RolloutBatch":
    """Samples of random tokens, with the routes that the engine's routers choose for them."""
    from megatron_bai.rl.batches.batch import from_samples
    from megatron_bai.rollout.sample import Sample

    random, signature = np.random.default_rng(0), engine.replay.signature
    rows = arguments.tokens - 1
    samples = [
        Sample(
            prompt_index=0,
            tokens=random.integers(0, MODEL.vocab_size, arguments.tokens),
            prompt_length=16,
            logprobs=np.full(arguments.tokens - 16, -7, dtype=np.float32),
            routes=np.zeros((rows, signature.moe_layers, signature.topk), dtype=signature.dtype),
            spans=(),
            finish="length",
        )
        for _ in range(arguments.samples)
    ]
    batch = from_samples(samples, random.normal(size=arguments.samples), arguments.tokens, 0, signature)
    micros = batch.split(arguments.micro)
    for micro, own in zip(micros, engine.score(micros, record=True).routes):
        micro.routes.copy_(own.ids.unflatten(0, (arguments.tokens, -1)).transpose(0, 1))  # a view of the batch's
    return batch


def stepper(arguments: argparse.Namespace, modes: Sequence[str]) -> Callable[[str], tuple[float, float]]:
    """A function that runs one step in a mode and returns its seconds, by the clock and by the processor."""
    device = backend.init_backend(config.Backend(kind="auto"))
    from megatron_bai.model import build
    from megatron_bai.rl import objectives
    from megatron_bai.rl.batches.stages import make_scored_batch, make_training_batch
    from megatron_bai.rl.policy.router_shift import RouterShift

    parallel = config.Parallel(recompute=arguments.recompute)
    settings = config.Config(model=MODEL, parallel=parallel, trainer=config.Trainer(learning_rate=0.0))
    build.init_parallel(parallel, seed=0)
    ordinary = build_engine(settings, device, exact=False)
    engines = {mode: build_engine(settings, device, exact=True) if mode == "exact" else ordinary for mode in modes}
    batch = draw_batch(arguments, ordinary)
    micros = batch.split(arguments.micro)
    for engine in set(engines.values()):
        expected, found = ordinary.score(micros).logprobs, engine.score(micros).logprobs
        assert expected is not None and found is not None, "one stage has the logits"
        assert torch.allclose(found, expected, atol=1e-4), "the modes differ in more than their cost"
    objective, shifted = objectives.get("minirl"), config.Minirl(router_shift=True)
    shift = RouterShift(ordinary, shifted)

    def step(mode: str) -> tuple[float, float]:
        engine = engines[mode]
        began = time.perf_counter(), time.process_time()
        routes = [engine.local_routes(micro) for micro in micros] if mode == "r3" else None
        with shift.record(len(micros)) if mode == "shift" else nullcontext():
            scores = engine.score(micros, routes, record=mode == "r2")
        assert scores.logprobs is not None, "one stage has the logits"
        training = make_training_batch(make_scored_batch(batch, scores.logprobs)).split(arguments.micro)
        if mode == "shift":
            training = shift.measure(training, None, 0)
        own = shifted if mode == "shift" else settings.objective
        engine.update(training, scores.routes if mode == "r2" else routes, objective, own)
        if device.kind == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began[0], time.process_time() - began[1]

    return step


def run(arguments: argparse.Namespace) -> None:
    """Steps of all modes in rounds, then medians and ratios."""
    modes = MODES if not torch.cuda.is_available() else [mode for mode in MODES if mode != "exact"]
    step = stepper(arguments, modes)
    for mode in modes:
        step(mode)
    seconds: dict[str, list[tuple[float, float]]] = {mode: [] for mode in modes}
    for number in range(arguments.rounds):
        for mode in modes if number % 2 else reversed(modes):
            seconds[mode].append(step(mode))
        done = {mode: round(values[-1][1], 3) for mode, values in seconds.items()}
        print(f"round {number + 1}, seconds of the processor: {done}", file=sys.stderr, flush=True)
    found: dict[str, object] = {
        "rounds": arguments.rounds,
        "recompute": arguments.recompute,
        "load": os.getloadavg()[0],
    }
    for which, clock in enumerate(("clock", "processor")):
        for mode in modes:
            own = [pair[which] for pair in seconds[mode]]
            ratios = [a / pair[which] for a, pair in zip(own, seconds["none"])]
            found[f"{mode}_{clock}"] = {
                "seconds": round(statistics.median(own), 4),
                "ratio": round(statistics.median(ratios), 4),
                "quartiles": [round(q, 4) for q in statistics.quantiles(ratios, n=4)[::2]],
            }
    print(json.dumps(found, indent=1))
    backend.shutdown_backend()
