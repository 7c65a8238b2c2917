"""The rollout phase of a step: prompts, samples, rewards, advantages, a batch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_bai import config
from megatron_bai.monitor.metrics.response_metrics import add_responses
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl.batches.advantages import group_advantages, has_peer, in_uniform_group
from megatron_bai.rl.batches.batch import Batch, from_samples, padded_length
from megatron_bai.rl.experience import staleness
from megatron_bai.rl.experience.failed_samples import count_failures, count_lost
from megatron_bai.rl.experience.inference_engine import InferenceEngine
from megatron_bai.rl.experience.rollout_buffer import RolloutBuffer
from megatron_bai.rl.objectives.objective import policy_settings
from megatron_bai.rl.session import Session
from megatron_bai.rollout.sample import Sample
from megatron_bai.routing.missing import settle


class Collector:
    """Takes prompts from the stream in order, each replica its own."""

    def __init__(self, session: Session, inference: InferenceEngine):
        self.session, self.inference, self.settings = session, inference, session.settings
        self.prompts = self.settings.trainer.prompts_per_step // session.dp_size  # of this replica, a step
        self.taken = 0  # prompts of the stream, over all replicas: where the next step begins
        rollout = self.settings.rollout
        self.ahead = RolloutBuffer(session, inference) if rollout.partial_tokens or rollout.overlap else None

    def state(self) -> dict[str, Any]:
        """Where it stands, the same on every rank: what a resumed run needs to continue, JSON."""
        return self.ahead.state() if self.ahead else {"taken": self.taken}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        if self.ahead:
            self.ahead.restore(state)
        else:
            self.taken = state["taken"]

    def write(self, directory: Path) -> None:
        """Keep the samples of later steps in a checkpoint's directory.

        Raises:
            OSError: they cannot be written.
        """
        if self.ahead:
            self.ahead.write(directory)

    def read(self, directory: Path) -> None:
        """Continue with what `write` kept.

        Raises:
            UserError: it is not there, or damaged.
        """
        if self.ahead:
            self.ahead.read(directory)

    def settle(self) -> None:
        """Return once nothing is being sampled.

        Raises:
            UserError: the server failed.
        """
        if self.ahead:
            self.ahead.settle()

    def finish(self) -> None:
        """After a sync: what failed of a rollout that was begun before it is asked again. Collective.

        Raises:
            UserError: as `InferenceEngine.recover`.
        """
        if self.ahead:
            self.ahead.finish()

    def collect(self, stats: Stats, last: bool = False) -> tuple[list[Sample], Batch]:
        """Sample this replica's groups, reward them and pad them to the length of the longest anywhere. Collective.

        Args:
            last: no step follows this one.

        Raises:
            UserError: the server failed, or no sample has a reward.
        """
        size, objective = self.settings.trainer.group_size, policy_settings(self.settings.objective)
        samples = self._taken_ahead(last, stats) if self.ahead else self._groups(stats)
        rewards, valid = rewards_of(samples)
        critic = isinstance(objective, config.Ppo)  # which has an advantage for each token, later
        advantages = None if critic else group_advantages(rewards, size, objective.advantage, valid)
        counted = _counted(samples, rewards, valid, size, self.settings, stats)
        batch = self._batch(samples, rewards, advantages, counted)
        if self.ahead:
            staleness.settle(batch, samples, self.inference.version, self.settings.rollout.max_staleness, stats)
        if self.settings.replay.mode == "r3":
            batch.mask, found = settle(self.settings.replay.missing, batch.mask, batch.routed, batch.missing)
            stats.ratio("route_missing", found.rows, found.fed)
            stats.ratio("route_masked", found.masked, found.tokens)
        return samples, batch

    def _taken_ahead(self, last: bool, stats: Stats) -> list[Sample]:
        assert self.ahead
        samples = self.ahead.take(last)
        self._add_responses(samples, stats)
        self._count_failures([(sample.lost, sample.failure) for sample in samples], stats)
        return samples

    def _groups(self, stats: Stats) -> list[Sample]:
        """This replica's groups. With refill (DAPO, arXiv 2503.14476), groups from which there is nothing to learn give
        their places to those of the next prompts, until none is left or `refill_rounds` are over.

        A round takes exactly as many prompts as there are such groups in all replicas, so none is sampled in vain, and
        where the stream stands after it does not depend on the number of replicas.
        """
        size, objective = self.settings.trainer.group_size, policy_settings(self.settings.objective)
        before, samples = self.taken, self._sample(self.prompts, stats)
        outcomes = [(sample.lost, sample.failure) for sample in samples]
        rounds = 0
        while rounds < objective.refill_rounds:
            idle = np.flatnonzero(_idle(samples, size, self.settings.rollout.incomplete_groups))
            if not sum(self._of_replicas(len(idle))):
                break
            rounds += 1
            fresh = self._sample(len(idle), stats)
            outcomes += [(sample.lost, sample.failure) for sample in fresh]
            for i, place in enumerate(idle):
                group = fresh[i * size : (i + 1) * size]
                samples[place * size : (place + 1) * size] = [replace(each, prompt=int(place)) for each in group]
        self._count_failures(outcomes, stats)
        if objective.refill_rounds:
            stats.ratio("refill_rounds", rounds, 1)
            stats.ratio("prompts_tried", self.taken - before, 1)
        return samples

    def _count_failures(self, outcomes: list[tuple[bool, str]], stats: Stats) -> None:
        """Collective.

        Args:
            outcomes: of each sample, whether it is lost, and why it is or has no reward.
        """
        count_lost(self.session, [why if lost else "" for lost, why in outcomes], stats)
        count_failures(self.session, [why for lost, why in outcomes if not lost], "reward_failed_fraction", stats)

    def _sample(self, count: int, stats: Stats) -> list[Sample]:
        """Groups for the next `count` prompts, of which every replica may want another number. Collective."""
        session, trainer, seed = self.session, self.settings.trainer, self.settings.run.seed
        wanted = self._of_replicas(count)
        start = self.taken + sum(wanted[: session.dp_rank])
        self.taken += sum(wanted)
        prompts = session.task.prompts("train", seed, start, count)
        samples = self.inference.sample(prompts, trainer.group_size, f"train/{seed}", first=start)
        self._add_responses(samples, stats)
        return samples

    def _add_responses(self, samples: list[Sample], stats: Stats) -> None:
        lengths = torch.tensor([len(sample.response) for sample in samples], dtype=torch.int64)
        truncated = torch.tensor([sample.finish != "stop" for sample in samples], dtype=torch.bool)
        sampled = torch.tensor([not sample.lost for sample in samples], dtype=torch.bool)
        rewards, valid = map(torch.from_numpy, rewards_of(samples))
        size, width = self.settings.trainer.group_size, self.settings.monitor.bucket
        add_responses(stats, lengths, truncated, rewards, size, width, valid, sampled)

    def _of_replicas(self, value: int) -> list[int]:
        """Each replica's value, by its data-parallel rank. Collective."""
        session = self.session
        values = torch.zeros(session.dp_size, dtype=torch.int64, device=session.device.device)
        values[session.dp_rank] = value if session.is_replica_leader else 0
        dist.all_reduce(values)
        return values.tolist()

    def _batch(
        self, samples: list[Sample], rewards: np.ndarray, advantages: np.ndarray | None, counted: np.ndarray
    ) -> Batch:
        session = self.session
        longest = torch.tensor([max(len(sample.tokens) for sample in samples)], device=session.device.device)
        dist.all_reduce(longest, op=dist.ReduceOp.MAX)
        length = padded_length(int(longest), session.engine.place.multiple)
        pad, columns = session.task.tokenizer.pad_token_id, session.engine.replay.columns
        return from_samples(samples, advantages, length, pad, session.signature, counted, columns, rewards)


def rewards_of(samples: list[Sample]) -> tuple[np.ndarray, np.ndarray]:
    """`[B]` float64 rewards, 0 where there is none, and `[B]` bool, where there is one."""
    valid = np.array([sample.reward is not None for sample in samples], dtype=bool)
    return np.array([sample.reward or 0.0 for sample in samples]), valid


def _idle(samples: list[Sample], group_size: int, incomplete: str) -> np.ndarray:
    """`[groups]` bool: nothing can be learned from the group, its rewards are all equal or fewer than two, or it lacks
    some and is dropped for it."""
    rewards, valid = rewards_of(samples)
    counts = has_peer(valid, group_size) & ~in_uniform_group(rewards, group_size, valid) & _kept(valid, group_size, incomplete)
    idle: np.ndarray = ~counts.reshape(-1, group_size).any(axis=1)
    return idle


def _kept(valid: np.ndarray, group_size: int, incomplete: str) -> np.ndarray:
    """`[B]` bool: what `rollout.incomplete_groups` leaves of groups in which a sample has no reward."""
    whole = np.repeat(valid.reshape(-1, group_size).all(axis=1), group_size)
    return whole if incomplete == "drop" else np.ones_like(whole)


def _counted(
    samples: list[Sample],
    rewards: np.ndarray,
    valid: np.ndarray,
    group_size: int,
    settings: config.Config,
    stats: Stats,
) -> np.ndarray:
    """Which samples the loss counts, `[B]` bool; adds `left_out_fraction`."""
    objective = policy_settings(settings.objective)
    critic = isinstance(objective, config.Ppo)  # compares a sample with its value and not with others
    counted = valid.copy() if critic else has_peer(valid, group_size)
    counted &= _kept(valid, group_size, settings.rollout.incomplete_groups)
    if objective.drop_uniform_groups:
        counted &= ~in_uniform_group(rewards, group_size, valid)
    if objective.mask_overlong:
        counted &= [sample.finish == "stop" for sample in samples]
    stats.mean("left_out_fraction", torch.from_numpy(~counted))
    return counted
