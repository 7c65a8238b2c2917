"""The rollout phase of a step: prompts, samples, rewards, advantages, a batch."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_bai import config
from megatron_bai.monitor.responses import add_responses
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl.advantages import of_groups, uniform
from megatron_bai.rl.batch import Batch, from_samples, padded_length
from megatron_bai.rl.inference import Inference
from megatron_bai.rl.session import Session
from megatron_bai.rollout.sample import Sample
from megatron_bai.routing.missing import settle


class Collector:
    """Takes prompts from the stream in order, each replica its own."""

    def __init__(self, session: Session, inference: Inference):
        self.session, self.inference, self.settings = session, inference, session.settings
        self.prompts = self.settings.trainer.prompts_per_step // session.data_size  # of this replica, a step
        self.taken = 0  # prompts of the stream, over all replicas: where the next step begins

    def state(self) -> dict[str, Any]:
        """Where it stands, the same on every rank: what a resumed run needs to continue, JSON."""
        return {"taken": self.taken}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.taken = state["taken"]

    def collect(self, stats: Stats) -> tuple[list[Sample], Batch]:
        """Sample this replica's groups, reward them and pad them to the length of the longest anywhere. Collective."""
        session, trainer = self.session, self.settings.trainer
        seed = self.settings.run.seed
        start = self.taken + session.data_rank * self.prompts
        self.taken += trainer.prompts_per_step
        prompts = session.task.prompts("train", seed, start, self.prompts)
        samples = self.inference.sample(prompts, trainer.group_size, seed=(seed << 40) + start)
        rewards = np.array([session.task.reward(prompts[sample.prompt], sample.response) for sample in samples])
        lengths = torch.tensor([len(sample.response) for sample in samples])
        truncated = torch.tensor([sample.finish != "stop" for sample in samples])
        width = self.settings.monitor.bucket
        add_responses(stats, lengths, truncated, torch.from_numpy(rewards), trainer.group_size, width)
        critic = isinstance(self.settings.objective, config.Ppo)  # which has an advantage for each token, later
        advantages = None if critic else of_groups(rewards, trainer.group_size, self.settings.objective.advantage)
        counted = _counted(samples, rewards, trainer.group_size, self.settings.objective, stats)
        batch = self._batch(samples, rewards, advantages, counted)
        if self.settings.replay.mode == "r3":
            batch.mask, found = settle(self.settings.replay.missing, batch.mask, batch.routed, batch.missing)
            stats.ratio("route_missing", found.rows, found.fed)
            stats.ratio("route_masked", found.masked, found.tokens)
        return samples, batch

    def _batch(
        self, samples: list[Sample], rewards: np.ndarray, advantages: np.ndarray | None, counted: np.ndarray
    ) -> Batch:
        session = self.session
        longest = torch.tensor([max(len(sample.tokens) for sample in samples)], device=session.device.device)
        dist.all_reduce(longest, op=dist.ReduceOp.MAX)
        length = padded_length(int(longest), session.engine.place.multiple)
        pad, columns = session.task.tokenizer.pad_token_id, session.engine.replay.columns
        return from_samples(samples, advantages, length, pad, session.signature, counted, columns, rewards)


def _counted(
    samples: list[Sample], rewards: np.ndarray, group_size: int, objective: config.Policy, stats: Stats
) -> np.ndarray:
    """Which samples the loss counts, `[B]` bool; adds `left_out_fraction`."""
    counted = np.ones(len(samples), dtype=bool)
    if objective.drop_uniform_groups:
        counted &= ~uniform(rewards, group_size)
    if objective.mask_overlong:
        counted &= [sample.finish == "stop" for sample in samples]
    stats.mean("left_out_fraction", torch.from_numpy(~counted))
    return counted
