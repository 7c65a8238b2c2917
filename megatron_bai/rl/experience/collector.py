"""The rollout phase of a step: prompts, samples, rewards, the first stage of a batch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_bai import config
from megatron_bai.monitor.metrics.response_metrics import (
    add_conversation_metrics,
    add_response_metrics,
    add_reward_parts,
)
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl.batches.advantages import GroupRewards
from megatron_bai.rl.batches.batch import from_samples
from megatron_bai.rl.batches.stages import RolloutBatch
from megatron_bai.rl.batches.token_batch import padded_length
from megatron_bai.rl.experience.failed_samples import count_failures, count_lost
from megatron_bai.rl.experience.inference_engine import InferenceEngine
from megatron_bai.rl.experience.rollout_buffer import RolloutBuffer
from megatron_bai.rl.experience.staleness import find_fresh_tokens
from megatron_bai.rl.objectives.objective import policy_settings
from megatron_bai.rl.session import Session
from megatron_bai.rollout.sample import Sample
from megatron_bai.routing.missing import apply_missing_policy


class Collector:
    """The rollouts of a run: each replica takes its own prompts from the stream, in order.

    Attributes:
        prompts_per_replica: prompts that a step takes of the stream, of this replica.
        num_prompts_taken: prompts of the stream, over all replicas: the first of the next step.
        buffer: of partial or overlapping rollouts; None for others.
    """

    def __init__(self, session: Session, inference: InferenceEngine):
        self.session, self.inference, self.settings = session, inference, session.settings
        self.prompts_per_replica = self.settings.trainer.prompts_per_step // session.dp_size
        self.num_prompts_taken = 0
        rollout = self.settings.rollout
        self.buffer = RolloutBuffer(session, inference) if rollout.partial_tokens or rollout.overlap else None

    def state_dict(self) -> dict[str, Any]:
        """Return the stream's position, as JSON and equal on every rank: what a resumed run needs."""
        return self.buffer.state_dict() if self.buffer else {"taken": self.num_prompts_taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the stream's position in `state`."""
        if self.buffer:
            self.buffer.load_state_dict(state)
        else:
            self.num_prompts_taken = state["taken"]

    def save_files(self, directory: Path) -> None:
        """Write the samples of later steps to a checkpoint's directory.

        Raises:
            OSError: they cannot be written.
        """
        if self.buffer:
            self.buffer.save_files(directory)

    def load_files(self, directory: Path) -> None:
        """Read the samples that `save_files` wrote.

        Raises:
            UserError: files are missing or damaged.
        """
        if self.buffer:
            self.buffer.load_files(directory)

    def wait(self) -> None:
        """Wait until nothing is being sampled.

        Raises:
            UserError: the server failed.
        """
        if self.buffer:
            self.buffer.wait()

    def finish_next(self) -> None:
        """Complete a rollout that was started before a sync: retry its failed requests. Collective.

        Raises:
            UserError: as `InferenceEngine.recover`.
        """
        if self.buffer:
            self.buffer.finish_next()

    def collect(self, stats: Stats, last: bool = False) -> tuple[list[Sample], RolloutBatch]:
        """Sample this replica's groups, reward them and pad them to the length of the longest anywhere. Collective.

        Args:
            stats: gets metrics of responses, failures and staleness.
            last: no step follows this one.

        Returns:
            This replica's samples, on every rank of it, and their batch.

        Raises:
            UserError: the server failed, or no sample has a reward.
        """
        objective = policy_settings(self.settings.objective)
        samples = self._from_buffer(last, stats) if self.buffer else self._sample_groups(stats)
        rewards = GroupRewards.of([sample.reward for sample in samples], self.settings.trainer.group_size)
        has_critic = isinstance(objective, config.Ppo)  # which computes an advantage for each token, later
        advantages = None if has_critic else rewards.compute_advantages(objective.advantage)
        in_loss = _samples_in_loss(samples, rewards, self.settings, stats)
        version = self.inference.version if self.buffer else None
        rollouts = self.make_batch(samples, advantages, in_loss, version)
        return samples, replace(rollouts, usable_mask=self._find_usable_tokens(rollouts, stats))

    def _find_usable_tokens(self, rollouts: RolloutBatch, stats: Stats) -> torch.Tensor:
        """Return the response tokens that may be learned from, `[B, T]` bool; add what is left out and why.

        Raises:
            UserError: a route is missing, and `replay.missing=strict`.
        """
        usable_mask = rollouts.response_mask
        if self.buffer:
            usable_mask = usable_mask & find_fresh_tokens(rollouts, self.settings.rollout.max_staleness, stats)
        if self.settings.replay.mode == "r3":
            usable_mask, counts = apply_missing_policy(
                self.settings.replay.missing, usable_mask, rollouts.routed, rollouts.missing
            )
            stats.ratio("route_missing", counts.num_missing, counts.num_fed)
            stats.ratio("route_masked", counts.num_masked, counts.num_loss_tokens)
        return usable_mask

    def _from_buffer(self, last: bool, stats: Stats) -> list[Sample]:
        """Take this replica's groups from the buffer. Collective."""
        assert self.buffer
        samples = self.buffer.next_samples(last)
        self._add_responses(samples, stats)
        self._count_failures([(sample.lost, sample.failure) for sample in samples], stats)
        return samples

    def _sample_groups(self, stats: Stats) -> list[Sample]:
        """Sample this replica's groups. Collective.

        With refill (DAPO, arXiv 2503.14476), groups from which there is nothing to learn are replaced by those of the
        next prompts, until none remains or `refill_rounds` are over. A round takes exactly as many prompts as there are
        such groups in all replicas: no sample is wasted, and the stream's position after it does not depend on the
        number of replicas.
        """
        size, objective = self.settings.trainer.group_size, policy_settings(self.settings.objective)
        first, samples = self.num_prompts_taken, self._sample(self.prompts_per_replica, stats)
        outcomes = [(sample.lost, sample.failure) for sample in samples]
        rounds = 0
        while rounds < objective.refill_rounds:
            to_replace = np.flatnonzero(_uninformative_groups(samples, size, self.settings.rollout.incomplete_groups))
            if not sum(self._gather_per_replica(len(to_replace))):
                break
            rounds += 1
            fresh = self._sample(len(to_replace), stats)
            outcomes += [(sample.lost, sample.failure) for sample in fresh]
            for i, index in enumerate(to_replace):
                group = fresh[i * size : (i + 1) * size]
                samples[index * size : (index + 1) * size] = [
                    replace(sample, prompt_index=int(index)) for sample in group
                ]
        self._count_failures(outcomes, stats)
        if objective.refill_rounds:
            stats.ratio("refill_rounds", rounds, 1)
            stats.ratio("prompts_tried", self.num_prompts_taken - first, 1)
        return samples

    def _count_failures(self, outcomes: list[tuple[bool, str]], stats: Stats) -> None:
        """Count lost samples and failed rewards. Collective.

        Args:
            outcomes: of each sample, whether it is lost, and the reason for that or for having no reward.
            stats: gets the metrics.
        """
        count_lost(self.session, [reason if lost else "" for lost, reason in outcomes], stats)
        failures = [reason for lost, reason in outcomes if not lost]
        count_failures(self.session, failures, "reward_failed_fraction", stats)

    def _sample(self, count: int, stats: Stats) -> list[Sample]:
        """Sample groups of the next `count` prompts, a number that may differ between replicas. Collective."""
        session, trainer, seed = self.session, self.settings.trainer, self.settings.run.seed
        counts = self._gather_per_replica(count)
        start = self.num_prompts_taken + sum(counts[: session.dp_rank])
        self.num_prompts_taken += sum(counts)
        prompts = session.task.prompts("train", seed, start, count)
        samples = self.inference.sample(prompts, trainer.group_size, f"train/{seed}", first=start)
        samples = [replace(sample, stream_index=start + sample.prompt_index) for sample in samples]
        self._add_responses(samples, stats)
        return samples

    def _add_responses(self, samples: list[Sample], stats: Stats) -> None:
        """Add metrics of responses."""
        lengths = torch.tensor([sample.num_sampled for sample in samples], dtype=torch.int64)
        truncated = torch.tensor([sample.finish != "stop" for sample in samples], dtype=torch.bool)
        sampled = torch.tensor([not sample.lost for sample in samples], dtype=torch.bool)
        size, width = self.settings.trainer.group_size, self.settings.monitor.bucket
        groups = GroupRewards.of([sample.reward for sample in samples], size)
        rewards, valid = (torch.from_numpy(array).flatten() for array in (groups.values, groups.valid))
        add_response_metrics(stats, lengths, truncated, rewards, size, width, valid, sampled)
        add_reward_parts(stats, [sample.reward_parts for sample in samples])
        if isinstance(self.settings.env, config.PerTurn):
            conversations = [sample for sample in samples if not sample.lost]
            num_sampled = [sample.num_sampled for sample in conversations]
            num_given = [len(sample.response) - sample.num_sampled for sample in conversations]
            num_failed = sum(bool(sample.turns and sample.turns[-1].failed) for sample in conversations)
            num_turns = [len(sample.turns) for sample in conversations]
            add_conversation_metrics(stats, num_turns, num_sampled, num_given, num_failed)

    def _gather_per_replica(self, value: int) -> list[int]:
        """Gather a value of each replica, by data-parallel rank. Collective."""
        session = self.session
        values = torch.zeros(session.dp_size, dtype=torch.int64, device=session.device.device)
        values[session.dp_rank] = value if session.is_replica_leader else 0
        dist.all_reduce(values)
        return values.tolist()

    def make_batch(
        self,
        samples: list[Sample],
        advantages: np.ndarray | None = None,
        in_loss: np.ndarray | None = None,
        version: int | None = None,
    ) -> RolloutBatch:
        """Pad the samples to the length of the longest on any rank. Collective.

        Args:
            samples: of this replica.
            advantages: as in `from_samples`.
            in_loss: likewise.
            version: likewise.
        """
        session = self.session
        longest = torch.tensor([max(len(sample.tokens) for sample in samples)], device=session.device.device)
        dist.all_reduce(longest, op=dist.ReduceOp.MAX)
        length = padded_length(int(longest), session.engine.place.multiple)
        pad, weighted = session.task.tokenizer.pad_token_id, self.settings.replay.weights == "server"
        return from_samples(samples, advantages, length, pad, session.signature, in_loss, weighted, version)


def _uninformative_groups(samples: list[Sample], group_size: int, incomplete: str) -> np.ndarray:
    """Return whether nothing can be learned from a group, `[groups]` bool.

    Its rewards are all equal or fewer than two, or it lacks some and is dropped for it.
    """
    rewards = GroupRewards.of([sample.reward for sample in samples], group_size)
    informative = rewards.has_peer & ~rewards.in_uniform_group
    if incomplete == "drop":
        informative &= rewards.in_complete_group
    uninformative: np.ndarray = ~informative.reshape(-1, group_size).any(axis=1)
    return uninformative


def _samples_in_loss(samples: list[Sample], rewards: GroupRewards, settings: config.Config, stats: Stats) -> np.ndarray:
    """Return the samples that the loss counts, `[B]` bool; add `left_out_fraction`."""
    objective = policy_settings(settings.objective)
    has_critic = isinstance(objective, config.Ppo)  # it compares a sample with its value and not with others
    in_loss = rewards.valid.flatten() if has_critic else rewards.has_peer
    if settings.rollout.incomplete_groups == "drop":
        in_loss &= rewards.in_complete_group
    if objective.drop_uniform_groups:
        in_loss &= ~rewards.in_uniform_group
    if objective.mask_overlong:
        in_loss &= [sample.finish == "stop" for sample in samples]
    stats.mean("left_out_fraction", torch.from_numpy(~in_loss))
    return in_loss
