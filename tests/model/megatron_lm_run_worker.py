"""Run as a script: PPO from Megatron-LM's save directories, an actor's and a critic's. Argument: a directory.

`actor` there is a save directory. Two steps on samples that are given start from it, and leave their critic in `first`
as Megatron-LM would; two more start from both. `first.pt` and `second.pt`: the weights at the start, what the steps
said, and the critic's weights at the end.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing
from distributed.ppo_worker import SAMPLES, Given
from distributed.worker import join, state
from processes import free_port, prepare

from megatron_bai import config

STEPS = 2


def settings(directory: Path, run: str, critic: str) -> config.Config:
    return config.Config(
        run=config.Run(dir=str(directory / run)),
        backend=config.Backend(kind="cpu"),
        init=config.CheckpointInit(checkpoint=str(directory / "actor")),
        objective=config.Ppo(critic_checkpoint=critic),
        rollout=config.Rollout(max_new_tokens=16),
        trainer=config.Trainer(
            steps=STEPS, prompts_per_step=SAMPLES, group_size=1, mini_batches=2, micro_batch_size=2, learning_rate=1e-3
        ),
    )


def work(_: int, directory: Path, run: str, critic: str, port: int) -> None:
    from megatron_bai.checkpoint.iterations import resolve_settings
    from megatron_bai.model import megatron_checkpoint
    from megatron_bai.rl.session import open_session
    from megatron_bai.rl.trainer import TrainingLoop

    join(0, 1, port)
    with open_session(resolve_settings(settings(directory, run, critic))) as session:
        found: dict[str, Any] = {"actor": state(session.actor), "critic": state(session.critic.model)}
        given = Given(session.engine.replay.columns)
        loop = TrainingLoop(session, given)
        loop.collector = given
        given.rewards = np.arange(SAMPLES) % 2.0
        found["steps"] = [loop.step(step) for step in range(STEPS)]
        found["trained"] = state(session.critic.model)
        megatron_checkpoint.save(session.critic.model, directory / run / "iter_0000002", session.tokenizer_dir, {})
    torch.save(found, directory / f"{run}.pt")


def main() -> None:
    directory = Path(sys.argv[1])
    prepare("megatron.core.models.gpt", "megatron.core.dist_checkpointing", "megatron_bai.rl.trainer")
    for run, critic in (("first", ""), ("second", str(directory / "first"))):
        arguments = (directory, run, critic, free_port())
        torch.multiprocessing.start_processes(work, arguments, nprocs=1, start_method="fork")
        for name in ("config.json", "manifest.json", "tokenizer.json", "tokenizer_config.json"):
            (directory / run / "iter_0000002" / name).unlink()


if __name__ == "__main__":
    main()
