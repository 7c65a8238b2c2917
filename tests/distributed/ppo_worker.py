"""Run as a script: the trainer's own loop under `objective=ppo`, on rollouts that are given. Argument: a directory.

In place of the collector and the inference engine stand the same few samples at every step: whether the critic learns
does not then depend on what was sampled. Once in one process and once with a virtual pipeline over two, each leaves
what it found in `PROCESSES.pt`.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing
from distributed.worker import join, state
from moe import MODEL, SIGNATURE, samples
from processes import free_port, prepare

from megatron_bai import config

SAMPLES, LENGTH, WARMUP, STEPS = 8, 24, 2, 8
LAYOUTS = {1: config.Parallel(), 2: config.Parallel(pipeline=2, virtual_pipeline=2)}


class Given:
    """A collector whose samples never change, and the inference engine that they need not."""

    prompts, version, sync_gap = SAMPLES, 0, 0.0

    def __init__(self, columns: list[int]):
        self.columns, self.rewards, self.synced = columns, np.zeros(SAMPLES), 0

    def collect(self, stats: Any, last: bool) -> tuple[list, Any]:
        from megatron_bai.rl.batches.batch import from_samples

        sampled = zip(samples(SAMPLES, np.random.default_rng(7)), self.rewards, strict=True)
        rollouts = [replace(sample.select_layers(self.columns), reward=reward) for sample, reward in sampled]
        return rollouts, from_samples(rollouts, None, LENGTH, 0, SIGNATURE)

    def sync(self) -> None:
        self.synced += 1


def settings(directory: Path, processes: int) -> config.Config:
    return config.Config(
        run=config.Run(dir=str(directory / f"run-{processes}")),
        backend=config.Backend(kind="cpu"),
        model=replace(MODEL, vocab_size=64, max_position_embeddings=128),  # what tokenizer and rollouts ask for
        parallel=LAYOUTS[processes],
        objective=config.Ppo(critic_warmup=WARMUP, critic_learning_rate=1e-2, value_clip=float("inf")),
        trainer=config.Trainer(
            steps=STEPS, prompts_per_step=SAMPLES, group_size=1, mini_batches=2, micro_batch_size=2, learning_rate=1e-4
        ),
    )


def work(directory: Path, processes: int) -> dict[str, Any]:
    from megatron_bai.rl.session import open_session
    from megatron_bai.rl.trainer import TrainingLoop

    found: dict[str, Any] = {"weights": [], "steps": []}
    with open_session(settings(directory, processes)) as session:
        given = Given(session.engine.replay.columns)
        loop = TrainingLoop(session, given)
        loop.collector = given

        def weights() -> None:
            found["weights"].append({"actor": state(session.actor), "critic": state(session.critic.model)})

        weights()
        found["nothing"] = loop.step(WARMUP)  # all rewards and all values are 0: there is nothing to learn
        weights()
        given.rewards = np.arange(SAMPLES) % 2.0
        for step in range(STEPS):
            found["steps"].append(loop.step(step))
            if step + 1 in (WARMUP, STEPS):
                weights()
        found["synced"] = given.synced
        if processes == 1:
            found["faults"] = faults(session, directory)
    return found


def faults(session: Any, directory: Path) -> dict[str, str]:
    """What is said about an actor's checkpoint in the place of a critic's, and the other way round."""
    from megatron_bai.errors import UserError
    from megatron_bai.model import megatron_checkpoint
    from megatron_bai.rl.policy.critic import Critic

    def said(load: Any) -> str:
        try:
            load()
        except UserError as error:
            return str(error)
        return "nothing"

    for name, model in (("actor", session.actor), ("critic", session.critic.model)):
        megatron_checkpoint.save(model, directory / name, session.tokenizer_dir, {})

    def critic(path: Path) -> str:
        objective = replace(session.settings.objective, critic_checkpoint=str(path))
        return said(lambda: Critic(session.actor, replace(session.settings, objective=objective), session.device))

    return {
        "actor as critic": critic(directory / "actor"),
        "critic as critic": critic(directory / "critic"),
        "nowhere": critic(directory / "nowhere"),
        "critic as actor": said(lambda: megatron_checkpoint.load(session.actor, directory / "critic")),
    }


def rank_main(rank: int, world: int, port: int, directory: Path) -> None:
    join(rank, world, port)
    found = work(directory, world)
    if rank == 0:
        torch.save(found, directory / f"{world}.pt")


def main() -> None:
    prepare("megatron.core.models.gpt", "megatron.core.dist_checkpointing", "megatron_bai.rl.trainer")
    for world in LAYOUTS:
        arguments = (world, free_port(), Path(sys.argv[1]))
        torch.multiprocessing.start_processes(rank_main, arguments, nprocs=world, start_method="fork")


if __name__ == "__main__":
    main()
