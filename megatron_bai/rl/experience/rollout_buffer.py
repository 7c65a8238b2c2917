"""Rollouts that do not start and end within their step: partial ones, and those that overlap the training.

Partial (`rollout.partial_tokens`): a replica samples more groups than it trains. Sampling is done in rounds; in each,
every incomplete sample gets at most that many new tokens. Once as many groups are complete as a step needs, the oldest
of them are trained; the others wait, or are continued in the next step with its weights. A step has at least one round,
and more if too few groups are complete after it: it always trains `trainer.prompts_per_step` groups. The first step
starts `rollout.prompts_in_progress` groups, each later one as many as a step trains. What is sampled depends on the
weights, the seeds and the number of replicas, never on time.

Overlapping (`rollout.overlap`): the next step's groups are sampled in a thread while this one trains, with the weights
from before its updates. The thread sends requests to servers and rewards and uses no collectives; it has ended before
the servers get new weights, and so before anything is saved.

A request that fails for good ends its round; then all ranks recover the servers together (`InferenceEngine.recover`):
at once, or, of an overlapping rollout, after the next sync, since until then the actor's weights are newer than the
servers'. Failed requests are retried if servers were recovered; otherwise their samples are lost, and their groups are
completed without them.
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeAlias

from megatron_bai import config
from megatron_bai.data.task import Prompt
from megatron_bai.errors import UserError
from megatron_bai.rl.experience.inference_engine import InferenceEngine
from megatron_bai.rl.session import Session
from megatron_bai.rollout import sample_file
from megatron_bai.rollout.client import SampleRequest, sampling_seed
from megatron_bai.rollout.sample import Sample, lost_sample

_FILES = "rollouts"  # directory in a checkpoint


@dataclass
class SampleGroup:
    """The samples of one prompt.

    Attributes:
        prompt_index: of the prompt in the stream.
        prompt: the prompt.
        samples: by member; None: not started.
    """

    prompt_index: int
    prompt: Prompt
    samples: list[Sample | None]

    @property
    def complete(self) -> bool:
        """Whether all samples are complete."""
        return all(sample is not None and sample.complete for sample in self.samples)

    def started_samples(self) -> list[Sample]:
        """Return the samples, all of which must have been started."""
        samples = [sample for sample in self.samples if sample is not None]
        assert len(samples) == len(self.samples), "a sample of the group is not started"
        return samples


SampleSlot: TypeAlias = tuple[SampleGroup, int]  # a group and a member


class RolloutBuffer:
    """The groups of a replica that its next steps train. Its leader has them; every rank knows the stream's position.

    Attributes:
        num_prompts_taken: prompts of the stream that have been started, over all replicas.
        next_started: whether the next step's rollout is started.
        groups_per_step: groups that a step trains, over all replicas.
        groups_in_progress: groups that a step samples, over all replicas.
    """

    def __init__(self, session: Session, inference: InferenceEngine):
        trainer, self.rollout = session.settings.trainer, session.settings.rollout
        self.session, self.inference = session, inference
        self.groups_per_step, self.groups_in_progress = trainer.prompts_per_step, groups_in_progress(session.settings)
        self.num_prompts_taken, self.next_started = 0, False
        self._groups: list[SampleGroup] = []  # in progress, the oldest first
        self._next_groups: list[SampleGroup] = []  # complete and rewarded, of the next step
        self._failed: list[tuple[SampleSlot, UserError]] = []  # of the started rollout
        self._max_failures = 0  # how many more of its samples may be lost
        self._thread = _WorkerThread() if self.rollout.overlap and session.is_replica_leader else None
        self._work: Future[None] | None = None

    def next_samples(self, last: bool) -> list[Sample]:
        """Return the rewarded samples of a step, and start the next step's rollout if it overlaps. Collective.

        Args:
            last: no step follows.

        Raises:
            UserError: as `InferenceEngine.sample`.
        """
        if not self.next_started:
            self._start_next()
            self._complete_next()
        assert self._work is None and not self._failed, "`finish_next` comes after a sync, and before this"
        samples = [
            replace(sample, prompt_index=index, stream_index=group.prompt_index)
            for index, group in enumerate(self._next_groups)
            for sample in group.started_samples()
        ]
        self.next_started, self._next_groups = False, []
        delivered = self.session.send_to_replica(samples if self.session.is_replica_leader else None)
        if self.rollout.overlap and not last:
            self._start_next()
        return delivered

    def wait(self) -> None:
        """Wait until nothing is being sampled.

        Raises:
            UserError: sampling failed.
        """
        if self._work:
            self._work.result()
            self._work = None

    def finish_next(self) -> None:
        """Complete the rollout that was started before a sync, which recovered failed servers. Collective.

        Raises:
            UserError: as `InferenceEngine.recover`.
        """
        if self.next_started:
            if self._failed:
                self._start_sampling(self._failed_slots())
            self._complete_next()

    def _complete_next(self) -> None:
        """Sample until nothing of the rollout has failed. Collective, while the actor has the servers' weights."""
        self.wait()
        while self.inference.any_failed(self._failures()):
            recovered = self.inference.recover(self._failures(), self._max_failures)
            if self._failed:
                if not recovered:
                    self._give_up_failed()
                self._start_sampling(self._failed_slots())
                self.wait()

    def _failures(self) -> list[UserError]:
        return [error for _, error in self._failed]

    def _failed_slots(self) -> list[SampleSlot]:
        """Return the slots that failed and have not been given up."""
        return [slot for slot, _ in self._failed]

    def _give_up_failed(self) -> None:
        """Mark the samples that failed as lost."""
        for (group, member), error in self._failed:
            group.samples[member] = lost_sample(0, group.prompt.ids, self.session.signature, str(error))
        self._max_failures -= len(self._failed)
        self._failed = []

    def _start_next(self) -> None:
        """Take prompts and start to sample the next step's groups."""
        session, settings = self.session, self.session.settings
        fresh = (self.groups_per_step if self.num_prompts_taken else self.groups_in_progress) // session.dp_size
        start = self.num_prompts_taken + session.dp_rank * fresh
        self.num_prompts_taken, self.next_started = self.num_prompts_taken + session.dp_size * fresh, True
        if not session.is_replica_leader:
            return
        prompts = session.task.prompts("train", settings.run.seed, start, fresh)
        not_started: list[Sample | None] = [None] * settings.trainer.group_size
        self._groups += [SampleGroup(start + i, prompt, list(not_started)) for i, prompt in enumerate(prompts)]
        self._max_failures = self.inference.max_failures(
            self.groups_per_step // session.dp_size * settings.trainer.group_size
        )
        self._start_sampling(self._incomplete_slots())

    def _start_sampling(self, slots: list[SampleSlot]) -> None:
        """Sample these slots and what the step needs besides, in the thread if rollouts overlap."""
        self._failed = []
        if self._thread:
            self._work = self._thread.run(partial(self._sample, slots))
        else:
            self._sample(slots)

    def _sample(self, slots: list[SampleSlot]) -> None:
        """Sample in rounds until enough groups are complete or a request failed."""
        num_needed = self.groups_per_step // self.session.dp_size
        if slots:
            self._sample_round(slots)
        while not self._failed and sum(group.complete for group in self._groups) < num_needed:
            self._sample_round(self._incomplete_slots())
        if self._failed:
            return
        complete = [group for group in self._groups if group.complete][:num_needed]
        chosen = {group.prompt_index for group in complete}
        self._groups = [group for group in self._groups if group.prompt_index not in chosen]
        self._reward(complete)
        self._next_groups = complete

    def _incomplete_slots(self) -> list[SampleSlot]:
        """Return the slots whose samples are not complete."""
        slots = [(group, member, sample) for group in self._groups for member, sample in enumerate(group.samples)]
        return [(group, member) for group, member, sample in slots if sample is None or not sample.complete]

    def _sample_round(self, slots: list[SampleSlot]) -> None:
        """Sample each slot's next tokens, at most `rollout.partial_tokens`."""
        seed = f"train/{self.session.settings.run.seed}"
        positions = {group.prompt_index: i for i, group in enumerate(self._groups)}
        requests = []
        for group, member in slots:
            sample_seed = sampling_seed(seed, group.prompt_index, member)
            position, prompt_ids = positions[group.prompt_index], list(group.prompt.ids)
            requests.append(SampleRequest(position, prompt_ids, sample_seed, group.samples[member]))
        prompts = [group.prompt for group in self._groups]
        results = self.inference.sample_partial(requests, self._max_failures, prompts)
        for slot, result in zip(slots, results, strict=True):
            group, member = slot
            if isinstance(result, UserError):  # the tokens that the sample has already stay
                self._failed.append((slot, result))
                group.samples[member] = getattr(result, "partial", group.samples[member])
            else:
                group.samples[member] = result

    def _reward(self, groups: list[SampleGroup]) -> None:
        """Add rewards to complete groups, in place: those that samples did not get as they ended."""
        samples = [
            replace(sample, prompt_index=i) for i, group in enumerate(groups) for sample in group.started_samples()
        ]
        rewarded = iter(self.inference.add_rewards([group.prompt for group in groups], samples))
        for group in groups:
            group.samples = [next(rewarded) for _ in group.samples]

    def state_dict(self) -> dict[str, Any]:
        """Return the stream's position, as JSON and equal on every rank; `save_files` has the samples.

        Nothing is being sampled then.
        """
        return {"taken": self.num_prompts_taken, "begun": self.next_started}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the stream's position in `state`."""
        self.num_prompts_taken, self.next_started = state["taken"], state["begun"]

    def save_files(self, directory: Path) -> None:
        """Write this replica's samples to a file of a checkpoint's directory.

        Raises:
            OSError: the file cannot be written.
        """
        if not self.session.is_replica_leader:
            return
        assert self._work is None and not self._failed, "a rollout is being sampled while it is saved"
        path = _file(directory, self.session.dp_rank, self.session.dp_size)
        path.parent.mkdir(exist_ok=True)
        # All are started, since a step samples before it ends; `load_files` relies on it.
        groups = [*self._next_groups, *self._groups]
        samples = [(group.prompt_index, sample) for group in groups for sample in group.started_samples()]
        sample_file.write_samples(path, samples, self.session.signature)

    def load_files(self, directory: Path) -> None:
        """Read the samples that `save_files` wrote; those of another number of replicas are distributed anew.

        Raises:
            UserError: files are missing or damaged.
        """
        session, size = self.session, self.session.settings.trainer.group_size
        if not session.is_replica_leader:
            return
        replica_file = _file(directory, session.dp_rank, session.dp_size)
        files = [replica_file] if replica_file.is_file() else sorted((directory / _FILES).glob("*.npz"))
        num_writers = session.dp_size if files == [replica_file] else len(files)
        num_ready = self.groups_per_step // num_writers if self.next_started else 0  # of each file
        ready, waiting = [], []
        for file in files:
            samples = sample_file.read_samples(file, session.signature)
            groups = [self._make_group(samples[i : i + size]) for i in range(0, len(samples), size)]
            ready += groups[:num_ready]
            waiting += groups[num_ready:]
        if files != [replica_file]:
            ready, waiting = (sorted(groups, key=lambda group: group.prompt_index) for groups in (ready, waiting))
            ready, waiting = (groups[session.dp_rank :: session.dp_size] for groups in (ready, waiting))
        num_needed = self.groups_per_step // session.dp_size if self.next_started else 0
        if len(ready) != num_needed or len(ready) + len(waiting) != self._num_groups_held():
            raise UserError(
                f"{directory / _FILES} holds {len(ready)} groups, the next step needs {num_needed}: restore it"
            )
        self._next_groups, self._groups = ready, waiting

    def _make_group(self, members: list[tuple[int, Sample]]) -> SampleGroup:
        """Make a group of the samples of a file, each with its prompt's index."""
        prompt_index = members[0][0]
        (prompt,) = self.session.task.prompts("train", self.session.settings.run.seed, prompt_index, 1)
        return SampleGroup(prompt_index, prompt, [sample for _, sample in members])

    def _num_groups_held(self) -> int:
        """Return the number of groups that a replica holds between two steps."""
        waiting = self.groups_in_progress - self.groups_per_step + (self.groups_per_step if self.next_started else 0)
        return waiting // self.session.dp_size if self.num_prompts_taken else 0


def _file(directory: Path, rank: int, size: int) -> Path:
    return directory / _FILES / f"replica-{rank:05}-of-{size:05}.npz"


def groups_in_progress(settings: config.Config) -> int:
    """Return the number of groups that a step samples, over all replicas."""
    groups_per_step, rollout = settings.trainer.prompts_per_step, settings.rollout
    if not rollout.partial_tokens:
        return groups_per_step
    return rollout.prompts_in_progress or 2 * groups_per_step


Call: TypeAlias = Callable[[], None]


class _WorkerThread:
    """One thread that runs calls in order and lasts as long as the process.

    It lasts, since the kernel ends the processes of a reward with the thread that started them. A run that fails does
    not wait for it.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Call, Future[None]]] = SimpleQueue()
        Thread(target=self._loop, name="rollout", daemon=True).start()

    def run(self, call: Call) -> Future[None]:
        """Run a call in the thread."""
        future: Future[None] = Future()
        self._calls.put((call, future))
        return future

    def _loop(self) -> None:
        while True:
            call, future = self._calls.get()
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
