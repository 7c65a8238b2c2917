"""`replay.py step`: what recording and forcing routes costs a training step, in one process.

A step is an old-policy forward and one update (forward, backward, Adam) over the same micro-batches, by the trainer's
own engine:

    none    live routing in both
    r2      recorded in the first, forced in the second
    r3      the rollout's routes, cut to this rank, forced in both
    shift   live routing in both, with RSPO's router shift (`objective.router_shift`): the routers' scores are kept in
            the first, and compared with those of the update's weights in a forward pass of its own before it. A
            step's first update needs none: this is what each later one costs

All modes do the same arithmetic, but for the shift's factor of 1: the learning rate is 0 and R3's routes are those that
the router chooses. Rounds of all modes follow each other in alternating order; a mode's ratio is the median over rounds
of its seconds by those of none in the same round. On a shared machine the seconds of the processor say more than those
of the clock: both are given.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch

from megatron_bai import config
from megatron_bai.distributed import backend

MODES = ("none", "r2", "r3", "shift")
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


def stepper(arguments: argparse.Namespace) -> Callable[[str], tuple[float, float]]:
    """A function that runs one step in a mode and returns its seconds, by the clock and by the processor."""
    device = backend.init_backend(config.Backend(kind="auto"))
    from megatron_bai.model import build, megatron_checkpoint, param_shards
    from megatron_bai.rl import objectives
    from megatron_bai.rl.batches.batch import from_samples
    from megatron_bai.rl.batches.stages import make_scored_batch, make_training_batch
    from megatron_bai.rl.policy.router_shift import RouterShift
    from megatron_bai.rl.policy.training_engine import TrainingEngine
    from megatron_bai.rollout.sample import Sample
    from megatron_bai.routing.replay.routing_replay import RoutingReplay

    parallel = config.Parallel(recompute=arguments.recompute)
    settings = config.Config(model=MODEL, parallel=parallel, trainer=config.Trainer(learning_rate=0.0))
    build.init_parallel(parallel, seed=0)
    actor = build.build_actor(settings, device)
    param_shards.init_random(actor.modules, MODEL, seed=0)
    megatron_checkpoint.reload_master_weights(actor)
    replay = RoutingReplay(actor.chunks)
    engine = TrainingEngine(actor, replay, device.device, temperature=1.0)
    random, signature = np.random.default_rng(0), replay.signature
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
    advantages = random.normal(size=arguments.samples)
    batch = from_samples(samples, advantages, arguments.tokens, 0, signature)
    micros = batch.split(arguments.micro)
    for micro, own in zip(micros, engine.score(micros, record=True).routes):
        micro.routes.copy_(own.ids.unflatten(0, (arguments.tokens, -1)).transpose(0, 1))
    objective, shifted = objectives.get("minirl"), config.Minirl(router_shift=True)
    shift = RouterShift(engine, shifted)

    def step(mode: str) -> tuple[float, float]:
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
    step = stepper(arguments)
    for mode in MODES:
        step(mode)
    seconds: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
    for number in range(arguments.rounds):
        for mode in MODES if number % 2 else reversed(MODES):
            seconds[mode].append(step(mode))
    found: dict[str, object] = {"rounds": arguments.rounds, "recompute": arguments.recompute}
    for which, clock in enumerate(("clock", "processor")):
        for mode in MODES:
            own = [pair[which] for pair in seconds[mode]]
            ratios = [a / pair[which] for a, pair in zip(own, seconds["none"])]
            found[f"{mode}_{clock}"] = {
                "seconds": round(statistics.median(own), 4),
                "ratio": round(statistics.median(ratios), 4),
                "quartiles": [round(q, 4) for q in statistics.quantiles(ratios, n=4)[::2]],
            }
    print(json.dumps(found, indent=1))
    backend.shutdown_backend()
