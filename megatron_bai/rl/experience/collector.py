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
        self.prompts_per_replica = self.settings.trainer.prompts_per_step // session.dp_size  # of this replica, a step
        self.num_prompts_taken = 0  # prompts of the stream, over all replicas: where the next step begins
        rollout = self.settings.rollout
        self.buffer = RolloutBuffer(session, inference) if rollout.partial_tokens or rollout.overlap else None

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, the same on every rank: what a resumed run needs to continue, JSON."""
        return self.buffer.state_dict() if self.buffer else {"taken": self.num_prompts_taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        if self.buffer:
            self.buffer.load_state_dict(state)
        else:
            self.num_prompts_taken = state["taken"]

    def save_files(self, directory: Path) -> None:
        """Keep the samples of later steps in a checkpoint's directory.

        Raises:
            OSError: they cannot be written.
        """
        if self.buffer:
            self.buffer.save_files(directory)

    def load_files(self, directory: Path) -> None:
        """Continue with what `save_files` kept.

        Raises:
            UserError: it is not there, or damaged.
        """
        if self.buffer:
            self.buffer.load_files(directory)

    def wait(self) -> None:
        """Return once nothing is being sampled.

        Raises:
            UserError: the server failed.
        """
        if self.buffer:
            self.buffer.wait()

    def finish_next(self) -> None:
        """After a sync: what failed of a rollout that was begun before it is asked again. Collective.

        Raises:
            UserError: as `InferenceEngine.recover`.
        """
        if self.buffer:
            self.buffer.finish_next()

    def collect(self, stats: Stats, last: bool = False) -> tuple[list[Sample], Batch]:
        """Sample this replica's groups, reward them and pad them to the length of the longest anywhere. Collective.

        Args:
            last: no step follows this one.

        Raises:
            UserError: the server failed, or no sample has a reward.
        """
        size, objective = self.settings.trainer.group_size, policy_settings(self.settings.objective)
        samples = self._from_buffer(last, stats) if self.buffer else self._sample_groups(stats)
        rewards, valid = rewards_and_mask(samples)
        critic = isinstance(objective, config.Ppo)  # which has an advantage for each token, later
        advantages = None if critic else group_advantages(rewards, size, objective.advantage, valid)
        counted = _samples_in_loss(samples, rewards, valid, size, self.settings, stats)
        batch = self._make_batch(samples, rewards, advantages, counted)
        if self.buffer:
            staleness.apply_max_staleness(
                batch, samples, self.inference.version, self.settings.rollout.max_staleness, stats
            )
        if self.settings.replay.mode == "r3":
            batch.mask, found = settle(self.settings.replay.missing, batch.mask, batch.routed, batch.missing)
            stats.ratio("route_missing", found.rows, found.fed)
            stats.ratio("route_masked", found.masked, found.tokens)
        return samples, batch

    def _from_buffer(self, last: bool, stats: Stats) -> list[Sample]:
        assert self.buffer
        samples = self.buffer.next_samples(last)
        self._add_responses(samples, stats)
        self._count_failures([(sample.lost, sample.failure) for sample in samples], stats)
        return samples

    def _sample_groups(self, stats: Stats) -> list[Sample]:
        """This replica's groups. With refill (DAPO, arXiv 2503.14476), groups from which there is nothing to learn give
        their places to those of the next prompts, until none is left or `refill_rounds` are over.

        A round takes exactly as many prompts as there are such groups in all replicas, so none is sampled in vain, and
        where the stream stands after it does not depend on the number of replicas.
        """
        size, objective = self.settings.trainer.group_size, policy_settings(self.settings.objective)
        before, samples = self.num_prompts_taken, self._sample(self.prompts_per_replica, stats)
        outcomes = [(sample.lost, sample.failure) for sample in samples]
        rounds = 0
        while rounds < objective.refill_rounds:
            idle = np.flatnonzero(_uninformative_groups(samples, size, self.settings.rollout.incomplete_groups))
            if not sum(self._gather_per_replica(len(idle))):
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
            stats.ratio("prompts_tried", self.num_prompts_taken - before, 1)
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
        wanted = self._gather_per_replica(count)
        start = self.num_prompts_taken + sum(wanted[: session.dp_rank])
        self.num_prompts_taken += sum(wanted)
        prompts = session.task.prompts("train", seed, start, count)
        samples = self.inference.sample(prompts, trainer.group_size, f"train/{seed}", first=start)
        self._add_responses(samples, stats)
        return samples

    def _add_responses(self, samples: list[Sample], stats: Stats) -> None:
        lengths = torch.tensor([len(sample.response) for sample in samples], dtype=torch.int64)
        truncated = torch.tensor([sample.finish != "stop" for sample in samples], dtype=torch.bool)
        sampled = torch.tensor([not sample.lost for sample in samples], dtype=torch.bool)
        rewards, valid = map(torch.from_numpy, rewards_and_mask(samples))
        size, width = self.settings.trainer.group_size, self.settings.monitor.bucket
        add_responses(stats, lengths, truncated, rewards, size, width, valid, sampled)

    def _gather_per_replica(self, value: int) -> list[int]:
        """Each replica's value, by its data-parallel rank. Collective."""
        session = self.session
        values = torch.zeros(session.dp_size, dtype=torch.int64, device=session.device.device)
        values[session.dp_rank] = value if session.is_replica_leader else 0
        dist.all_reduce(values)
        return values.tolist()

    def _make_batch(
        self, samples: list[Sample], rewards: np.ndarray, advantages: np.ndarray | None, counted: np.ndarray
    ) -> Batch:
        session = self.session
        longest = torch.tensor([max(len(sample.tokens) for sample in samples)], device=session.device.device)
        dist.all_reduce(longest, op=dist.ReduceOp.MAX)
        length = padded_length(int(longest), session.engine.place.multiple)
        pad, columns = session.task.tokenizer.pad_token_id, session.engine.replay.columns
        return from_samples(samples, advantages, length, pad, session.signature, counted, columns, rewards)


def rewards_and_mask(samples: list[Sample]) -> tuple[np.ndarray, np.ndarray]:
    """`[B]` float64 rewards, 0 where there is none, and `[B]` bool, where there is one."""
    valid = np.array([sample.reward is not None for sample in samples], dtype=bool)
    return np.array([sample.reward or 0.0 for sample in samples]), valid


def _uninformative_groups(samples: list[Sample], group_size: int, incomplete: str) -> np.ndarray:
    """`[groups]` bool: nothing can be learned from the group, its rewards are all equal or fewer than two, or it lacks
    some and is dropped for it."""
    rewards, valid = rewards_and_mask(samples)
    counts = (
        has_peer(valid, group_size)
        & ~in_uniform_group(rewards, group_size, valid)
        & _in_complete_group(valid, group_size, incomplete)
    )
    idle: np.ndarray = ~counts.reshape(-1, group_size).any(axis=1)
    return idle


def _in_complete_group(valid: np.ndarray, group_size: int, incomplete: str) -> np.ndarray:
    """`[B]` bool: what `rollout.incomplete_groups` leaves of groups in which a sample has no reward."""
    whole = np.repeat(valid.reshape(-1, group_size).all(axis=1), group_size)
    return whole if incomplete == "drop" else np.ones_like(whole)


def _samples_in_loss(
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
    counted &= _in_complete_group(valid, group_size, settings.rollout.incomplete_groups)
    if objective.drop_uniform_groups:
        counted &= ~in_uniform_group(rewards, group_size, valid)
    if objective.mask_overlong:
        counted &= [sample.finish == "stop" for sample in samples]
    stats.mean("left_out_fraction", torch.from_numpy(~counted))
    return counted
