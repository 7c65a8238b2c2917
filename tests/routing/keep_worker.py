"""Run as a script: steps of the trainer's loop that keep routes, in several layouts. Argument: a directory.

The rollouts are random, with routes that no router would choose; everything else is the trainer's own. Each rank leaves
what its routers did in the updates, and the rollouts of its replica, in `LAYOUT-MODE-RANK.pt`; the store is
`LAYOUT-MODE`. Layouts of `PACKED` do the same steps with packed samples.
"""

import os
import sys
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing
from moe import MODEL, samples
from processes import free_port, prepare

from megatron_bai import config
from megatron_bai.rollout.sample import Sample
from megatron_bai.routing.routes import VersionSpan

LAYOUTS = {
    "tp2_ep2": config.Parallel(tensor=2, expert=2, sequence=True),
    "pp2": config.Parallel(pipeline=2),
    "dp2": config.Parallel(),
}
PACKED = {"tp2_ep2_packed": "r2", "dp2_packed": "r3"}
CASES = [*product(LAYOUTS, ("r2", "r3")), *PACKED.items()]
STEPS, ROW = 2, 40


class Rollouts:
    """In place of SGLang: random samples of the current version."""

    def __init__(self, session: Any):
        self.session, self.version, self.sync_gap = session, 0, 0.0
        self.sampled: list[list[Sample]] = []

    def sample(self, prompts: list, group_size: int, seed: str, first: int) -> list[Sample]:
        found = []
        for number, sample in enumerate(samples(len(prompts) * group_size, np.random.default_rng(first))):
            span = VersionSpan(str(self.version), 0, len(sample.response))
            found.append(replace(sample, prompt_index=number // group_size, spans=(span,), reward=number % 3 / 2))
        self.sampled.append(found)
        return [sample.select_layers(self.session.engine.replay.columns) for sample in found]  # as it is delivered

    def sync(self) -> None:
        self.version += 1


def run(layout: str, mode: str, rank: int, directory: Path) -> None:
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_bai.rl.experience.route_recorder import open_route_recorder
    from megatron_bai.rl.session import open_session
    from megatron_bai.rl.trainer import TrainingLoop

    name = f"{layout}-{mode}"
    settings = config.Config(
        run=config.Run(dir=str(directory / "run")),
        backend=config.Backend(kind="cpu", timeout_s=300),
        model=MODEL,
        parallel=LAYOUTS[layout.removesuffix("_packed")],
        objective=config.Minirl(router_shift=True),
        replay=config.Replay(mode=mode, measure_live=False, store=str(directory / name)),
        rollout=config.Rollout(max_new_tokens=16),
        trainer=config.Trainer(
            prompts_per_step=4,
            group_size=4,
            mini_batches=2,
            micro_batch_size=2,
            tokens_per_micro_batch=ROW if layout in PACKED else 0,
        ),
    )
    with open_session(settings) as session, open_route_recorder(session) as keeper:
        rollouts = Rollouts(session)
        loop = TrainingLoop(session, rollouts, keeper)
        maps: dict[int, list[torch.Tensor]] = {}

        def kept(router: TopKRouter, inputs: Any, output: tuple) -> None:
            if torch.is_grad_enabled():  # in the updates
                maps.setdefault(router.layer_number - 1, []).append(output[1].clone())

        for module in session.actor.modules:
            for child in module.modules():
                if isinstance(child, TopKRouter):
                    child.register_forward_hook(kept)
        steps, read = [], []
        for step in range(STEPS):
            steps.append(loop.step(step))
            read.append([asdict(sample) for sample in loop.sample_recorder.take()])
        facts = {
            "maps": maps,
            "tensor_rank": session.engine.tensor_rank,
            "dp_rank": session.dp_rank,
            "coverage": [values["route_coverage"] for values in steps],
            "values": steps,
            "read": read,
            "sampled": [
                [(torch.from_numpy(s.tokens), torch.from_numpy(s.routes)) for s in step] for step in rollouts.sampled
            ],
        }
        torch.save(facts, directory / f"{name}-{rank}.pt")


def rank_main(rank: int, world: int, directory: Path, ports: list[int]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    from megatron.core import parallel_state

    for port, case in zip(ports, CASES):
        os.environ["MASTER_PORT"] = str(port)
        run(*case, rank, directory)
        parallel_state.destroy_model_parallel()


def main() -> None:
    prepare("megatron.core.models.gpt", "megatron.core.distributed", "megatron_bai.rl.trainer")
    ports = [free_port() for _ in CASES]
    torch.multiprocessing.start_processes(rank_main, (2, Path(sys.argv[1]), ports), nprocs=2, start_method="fork")


if __name__ == "__main__":
    main()
