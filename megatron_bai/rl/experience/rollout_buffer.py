"""Rollouts that do not begin and end within their step: partial ones, and those a step ahead of the training.

Partial (`rollout.partial_tokens`): a replica works on more groups than it trains. Sampling goes in rounds; in each,
every sample in progress gets at most so many new tokens. Once as many groups are complete as a step needs, the oldest of
them are trained; the others wait, or go on in the next step with the weights there are then. A step has one round at
least, and more where too few groups are complete after it: it always trains `trainer.prompts_per_step` groups. The first
step begins `rollout.prompts_in_progress` groups, each later one as many as a step trains. What was sampled depends on
the weights, the seeds and the number of replicas, never on time.

Ahead (`rollout.overlap`): the next step's groups are sampled in a thread while this one trains, with the weights as
they were when it began. The thread speaks to servers and rewards and to no other rank; its work is done before the
servers get new weights, and so before anything is saved.

A request that fails for good ends its round, and the rollout waits for all ranks, who look after the servers together
(`InferenceEngine.recover`): at once, or, where it runs ahead, after the next sync, since the actor's weights are newer than the
servers' until then. What failed is asked again of servers that came back; otherwise it is lost, and its group goes on.
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
from megatron_bai.rollout.client import Wanted, sampling_seed
from megatron_bai.rollout.sample import Sample, lost_sample

_FILES = "rollouts"  # the directory of a checkpoint that holds them


@dataclass
class SampleGroup:
    """The samples of one prompt.

    Attributes:
        prompt_index: of the prompt in the stream.
        samples: by member; None: not begun.
    """

    prompt_index: int
    prompt: Prompt
    samples: list[Sample | None]

    @property
    def complete(self) -> bool:
        return all(sample is not None and sample.complete for sample in self.samples)

    def started_samples(self) -> list[Sample]:
        """Return the samples, all of which must be begun."""
        samples = [sample for sample in self.samples if sample is not None]
        assert len(samples) == len(self.samples), "a sample of the group is not begun"
        return samples


SampleSlot: TypeAlias = tuple[SampleGroup, int]  # a group and a member


class RolloutBuffer:
    """The groups of a replica that its next steps train. Its leader has them; every rank knows where the stream stands.

    Attributes:
        num_prompts_taken: prompts of the stream that have been begun, over all replicas.
        next_started: the next step's rollout is.
    """

    def __init__(self, session: Session, inference: InferenceEngine):
        trainer, self.rollout = session.settings.trainer, session.settings.rollout
        self.session, self.inference = session, inference
        self.groups_per_step, self.groups_in_progress = trainer.prompts_per_step, groups_in_progress(session.settings)
        self.num_prompts_taken, self.next_started = 0, False
        self._groups: list[SampleGroup] = []  # in progress, the oldest first
        self._next_groups: list[SampleGroup] = []  # of the next step
        self._failed: list[tuple[SampleSlot, UserError]] = []  # of the rollout that was begun
        self._max_failures = 0  # how many more samples of it may be lost
        self._thread = _WorkerThread() if self.rollout.overlap and session.is_replica_leader else None
        self._work: Future[None] | None = None

    def next_samples(self, last: bool) -> list[Sample]:
        """The groups of a step, rewarded; those of the next are begun where it overlaps. Collective over the world.

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
            replace(sample, prompt=place)
            for place, group in enumerate(self._next_groups)
            for sample in group.started_samples()
        ]
        self.next_started, self._next_groups = False, []
        delivered = self.session.send_to_replica(samples if self.session.is_replica_leader else None)
        if self.rollout.overlap and not last:
            self._start_next()
        return delivered

    def wait(self) -> None:
        """Return once nothing is being sampled.

        Raises:
            UserError: it failed.
        """
        if self._work:
            self._work.result()
            self._work = None

    def finish_next(self) -> None:
        """Have the rollout whole that was begun before a sync, which brought servers that failed back. Collective.

        Raises:
            UserError: as `InferenceEngine.recover`.
        """
        if self.next_started:
            if self._failed:
                self._start_sampling(self._failed_slots())
            self._complete_next()

    def _complete_next(self) -> None:
        """Until nothing of the rollout failed. Collective over the world, while the actor has the servers' weights."""
        self.wait()
        while self.inference.any_failed(self._failures()):
            back = self.inference.recover(self._failures(), self._max_failures)
            if self._failed:
                if not back:
                    self._give_up_failed()
                self._start_sampling(self._failed_slots())
                self.wait()

    def _failures(self) -> list[UserError]:
        return [error for _, error in self._failed]

    def _failed_slots(self) -> list[SampleSlot]:
        """What failed and has not been given up."""
        return [place for place, _ in self._failed]

    def _give_up_failed(self) -> None:
        """Give up what failed."""
        for (group, member), error in self._failed:
            group.samples[member] = lost_sample(0, group.prompt.ids, self.session.signature, str(error))
        self._max_failures -= len(self._failed)
        self._failed = []

    def _start_next(self) -> None:
        """Take prompts, and have the next step's groups sampled."""
        session, settings = self.session, self.session.settings
        fresh = (self.groups_per_step if self.num_prompts_taken else self.groups_in_progress) // session.dp_size
        start = self.num_prompts_taken + session.dp_rank * fresh
        self.num_prompts_taken, self.next_started = self.num_prompts_taken + session.dp_size * fresh, True
        if not session.is_replica_leader:
            return
        prompts = session.task.prompts("train", settings.run.seed, start, fresh)
        blank: list[Sample | None] = [None] * settings.trainer.group_size
        self._groups += [SampleGroup(start + i, prompt, list(blank)) for i, prompt in enumerate(prompts)]
        self._max_failures = self.inference.max_failures(
            self.groups_per_step // session.dp_size * settings.trainer.group_size
        )
        self._start_sampling(self._incomplete_slots())

    def _start_sampling(self, places: list[SampleSlot]) -> None:
        """Sample what is named, and what is needed besides."""
        self._failed = []
        if self._thread:
            self._work = self._thread.run(partial(self._sample, places))
        else:
            self._sample(places)

    def _sample(self, places: list[SampleSlot]) -> None:
        """Rounds until enough groups are complete or a request failed. Runs in the thread where it overlaps."""
        wanted = self.groups_per_step // self.session.dp_size
        if places:
            self._sample_round(places)
        while not self._failed and sum(group.complete for group in self._groups) < wanted:
            self._sample_round(self._incomplete_slots())
        if self._failed:
            return
        complete = [group for group in self._groups if group.complete][:wanted]
        chosen = {group.prompt_index for group in complete}
        self._groups = [group for group in self._groups if group.prompt_index not in chosen]
        self._reward(complete)
        self._next_groups = complete

    def _incomplete_slots(self) -> list[SampleSlot]:
        """The samples that are not complete."""
        samples = [(group, member, each) for group in self._groups for member, each in enumerate(group.samples)]
        return [(group, member) for group, member, each in samples if each is None or not each.complete]

    def _sample_round(self, places: list[SampleSlot]) -> None:
        seed, turns = f"train/{self.session.settings.run.seed}", {g.prompt_index: i for i, g in enumerate(self._groups)}
        wanted = []
        for group, member in places:
            of = sampling_seed(seed, group.prompt_index, member)
            wanted.append(Wanted(turns[group.prompt_index], list(group.prompt.ids), of, group.samples[member]))
        for place, found in zip(places, self.inference.sample_partial(wanted, self._max_failures), strict=True):
            if isinstance(found, UserError):  # what there was of the sample stays
                self._failed.append((place, found))
            else:
                group, member = place
                group.samples[member] = found

    def _reward(self, groups: list[SampleGroup]) -> None:
        samples = [replace(sample, prompt=i) for i, group in enumerate(groups) for sample in group.started_samples()]
        rewarded = iter(self.inference.add_rewards([group.prompt for group in groups], samples))
        for group in groups:
            group.samples = [next(rewarded) for _ in group.samples]

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, the same on every rank, JSON; what it holds is `save_files`'s. Nothing is being sampled then."""
        return {"taken": self.num_prompts_taken, "begun": self.next_started}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.num_prompts_taken, self.next_started = state["taken"], state["begun"]

    def save_files(self, directory: Path) -> None:
        """Keep what this replica holds in a file of a checkpoint's directory.

        Raises:
            OSError: it cannot be written.
        """
        if not self.session.is_replica_leader:
            return
        assert self._work is None and not self._failed, "a rollout is being sampled while it is saved"
        path = _file(directory, self.session.dp_rank, self.session.dp_size)
        path.parent.mkdir(exist_ok=True)
        groups = [
            *self._next_groups,
            *self._groups,
        ]  # all begun, since a step samples before it ends; `load_files` counts on it
        samples = [(group.prompt_index, sample) for group in groups for sample in group.started_samples()]
        sample_file.write(path, samples, self.session.signature)

    def load_files(self, directory: Path) -> None:
        """Continue with what `save_files` kept; after another number of replicas wrote it, with a share of all there is.

        Raises:
            UserError: it is not there, or damaged.
        """
        session, size = self.session, self.session.settings.trainer.group_size
        if not session.is_replica_leader:
            return
        own = _file(directory, session.dp_rank, session.dp_size)
        files = [own] if own.is_file() else sorted((directory / _FILES).glob("*.npz"))
        writers = session.dp_size if files == [own] else len(files)
        ready, rest = [], []
        for file in files:
            samples, chosen = (
                sample_file.read(file, session.signature),
                self.groups_per_step // writers if self.next_started else 0,
            )
            groups = [self._group(samples[i : i + size]) for i in range(0, len(samples), size)]
            ready += groups[:chosen]
            rest += groups[chosen:]
        step = self.groups_per_step // session.dp_size if self.next_started else 0
        if files != [own]:
            ready, rest = (sorted(each, key=lambda group: group.prompt_index) for each in (ready, rest))
            ready, rest = (each[session.dp_rank :: session.dp_size] for each in (ready, rest))
        if len(ready) != step or len(ready) + len(rest) != self._num_groups_held():
            raise UserError(f"{directory / _FILES} holds {len(ready)} groups, the next step needs {step}: restore it")
        self._next_groups, self._groups = ready, rest

    def _group(self, members: list[tuple[int, Sample]]) -> SampleGroup:
        number = members[0][0]
        (prompt,) = self.session.task.prompts("train", self.session.settings.run.seed, number, 1)
        return SampleGroup(number, prompt, [sample for _, sample in members])

    def _num_groups_held(self) -> int:
        """Groups a replica has between two steps."""
        waiting = self.groups_in_progress - self.groups_per_step + (self.groups_per_step if self.next_started else 0)
        return waiting // self.session.dp_size if self.num_prompts_taken else 0


def _file(directory: Path, rank: int, size: int) -> Path:
    return directory / _FILES / f"replica-{rank:05}-of-{size:05}.npz"


def groups_in_progress(settings: config.Config) -> int:
    """Groups that a step works on, over all replicas."""
    trained, rollout = settings.trainer.prompts_per_step, settings.rollout
    if not rollout.partial_tokens:
        return trained
    return rollout.prompts_in_progress or 2 * trained


Call: TypeAlias = Callable[[], None]


class _WorkerThread:
    """Runs calls one after another, in one thread that lasts: the kernel ends the processes of a reward with the thread
    that started them. A run that fails does not wait for it."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Call, Future[None]]] = SimpleQueue()
        Thread(target=self._loop, name="rollout", daemon=True).start()

    def run(self, call: Call) -> Future[None]:
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
