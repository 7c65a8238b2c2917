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
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeAlias

from megatron_bai import config
from megatron_bai.data import Prompt
from megatron_bai.errors import UserError
from megatron_bai.rl.inference import Inference
from megatron_bai.rl.session import Session
from megatron_bai.rollout import archive
from megatron_bai.rollout.client import Wanted, sampling_seed
from megatron_bai.rollout.sample import Sample

_FILES = "rollouts"  # the directory of a checkpoint that holds them


@dataclass
class Group:
    """The samples of one prompt.

    Attributes:
        number: of the prompt in the stream.
        samples: by member; None: not begun.
    """

    number: int
    prompt: Prompt
    samples: list[Sample | None]

    @property
    def complete(self) -> bool:
        return all(sample is not None and sample.complete for sample in self.samples)


class Ahead:
    """The groups of a replica that its next steps train. Its leader has them; every rank knows where the stream stands.

    Attributes:
        taken: prompts of the stream that have been begun, over all replicas.
        begun: the next step's rollout is.
    """

    def __init__(self, session: Session, inference: Inference):
        trainer, self.rollout = session.settings.trainer, session.settings.rollout
        self.session, self.inference = session, inference
        self.trained, self.worked_on = trainer.prompts_per_step, in_progress(session.settings)
        self.taken, self.begun = 0, False
        self._groups: list[Group] = []  # in progress, the oldest first
        self._ready: list[Group] = []  # of the next step
        self._thread = _Thread() if self.rollout.overlap and session.leader else None
        self._work: Future[None] | None = None

    def take(self, last: bool) -> list[Sample]:
        """The groups of a step, rewarded; those of the next are begun where it overlaps. Collective over the replica.

        Args:
            last: no step follows.

        Raises:
            UserError: as `Inference.sample`.
        """
        if not self.begun:
            self._begin()
        self.settle()
        samples = [
            replace(sample, prompt=place) for place, group in enumerate(self._ready) for sample in group.samples
        ]
        self.begun, self._ready = False, []
        delivered = self.session.deliver(samples if self.session.leader else None)
        if self.rollout.overlap and not last:
            self._begin()
        return delivered

    def settle(self) -> None:
        """Return once nothing is being sampled.

        Raises:
            UserError: it failed.
        """
        if self._work:
            self._work.result()
            self._work = None

    def _begin(self) -> None:
        """Take prompts, and have the next step's groups sampled."""
        session, settings = self.session, self.session.settings
        fresh = (self.trained if self.taken else self.worked_on) // session.data_size
        start = self.taken + session.data_rank * fresh
        self.taken, self.begun = self.taken + session.data_size * fresh, True
        if not session.leader:
            return
        prompts = session.task.prompts("train", settings.run.seed, start, fresh)
        blank: list[Sample | None] = [None] * settings.trainer.group_size
        self._groups += [Group(start + i, prompt, list(blank)) for i, prompt in enumerate(prompts)]
        if self._thread:
            self._work = self._thread.run(self._sample)
        else:
            self._sample()

    def _sample(self) -> None:
        """Rounds until enough groups are complete. Runs in the thread where it overlaps."""
        wanted = self.trained // self.session.data_size
        self._round()
        while sum(group.complete for group in self._groups) < wanted:
            self._round()
        complete = [group for group in self._groups if group.complete][:wanted]
        chosen = {group.number for group in complete}
        self._groups = [group for group in self._groups if group.number not in chosen]
        self._reward(complete)
        self._ready = complete

    def _round(self) -> None:
        seed, wanted, places = f"train/{self.session.settings.run.seed}", [], []
        for index, group in enumerate(self._groups):
            for member, sample in enumerate(group.samples):
                if sample is None or not sample.complete:
                    of = sampling_seed(seed, group.number, member)
                    wanted.append(Wanted(index, list(group.prompt.ids), of, sample))
                    places.append((group, member))
        for (group, member), sample in zip(places, self.inference.advance(wanted), strict=True):
            group.samples[member] = sample

    def _reward(self, groups: list[Group]) -> None:
        samples = [replace(sample, prompt=i) for i, group in enumerate(groups) for sample in group.samples]
        rewarded = iter(self.inference.reward([group.prompt for group in groups], samples))
        for group in groups:
            group.samples = [next(rewarded) for _ in group.samples]

    def state(self) -> dict[str, Any]:
        """Where it stands, the same on every rank, JSON; what it holds is `write`'s. Nothing is being sampled then."""
        return {"taken": self.taken, "begun": self.begun}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.taken, self.begun = state["taken"], state["begun"]

    def write(self, directory: Path) -> None:
        """Keep what this replica holds in a file of a checkpoint's directory.

        Raises:
            OSError: it cannot be written.
        """
        if not self.session.leader:
            return
        assert self._work is None, "a rollout is being sampled while it is saved"
        path = _file(directory, self.session.data_rank, self.session.data_size)
        path.parent.mkdir(exist_ok=True)
        groups = [*self._ready, *self._groups]  # all begun, since a step samples before it ends
        samples = [(group.number, sample) for group in groups for sample in group.samples]
        archive.write(path, samples, self.session.signature)

    def read(self, directory: Path) -> None:
        """Continue with what `write` kept; after another number of replicas wrote it, with a share of all there is.

        Raises:
            UserError: it is not there, or damaged.
        """
        session, size = self.session, self.session.settings.trainer.group_size
        if not session.leader:
            return
        own = _file(directory, session.data_rank, session.data_size)
        files = [own] if own.is_file() else sorted((directory / _FILES).glob("*.npz"))
        samples = [each for file in files for each in archive.read(file, session.signature)]
        found = [samples[i : i + size] for i in range(0, len(samples), size)]
        groups = []
        for members in found:
            number = members[0][0]
            (prompt,) = session.task.prompts("train", session.settings.run.seed, number, 1)
            groups.append(Group(number, prompt, [sample for _, sample in members]))
        step = self.trained // session.data_size if self.begun else 0
        ready, rest = ([g for g in groups if _rewarded(g) == which] for which in (True, False))
        if files != [own]:
            ready, rest = (sorted(each, key=lambda group: group.number) for each in (ready, rest))
            ready, rest = (each[session.data_rank :: session.data_size] for each in (ready, rest))
        if len(ready) != step or len(ready) + len(rest) != self._held():
            raise UserError(f"{directory / _FILES} holds {len(ready)} groups, the next step needs {step}: restore it")
        self._ready, self._groups = ready, rest

    def _held(self) -> int:
        """Groups a replica has between two steps."""
        waiting = self.worked_on - self.trained + (self.trained if self.begun else 0)
        return waiting // self.session.data_size if self.taken else 0


def _rewarded(group: Group) -> bool:
    """Whether it was chosen for a step: a reward, or the reason why there is none, comes with that."""
    return all(sample.reward is not None or sample.failure for sample in group.samples)


def _file(directory: Path, rank: int, size: int) -> Path:
    return directory / _FILES / f"replica-{rank:05}-of-{size:05}.npz"


def in_progress(settings: config.Config) -> int:
    """Groups that a step works on, over all replicas."""
    trained, rollout = settings.trainer.prompts_per_step, settings.rollout
    if not rollout.partial_tokens:
        return trained
    return rollout.prompts_in_progress or 2 * trained


Call: TypeAlias = Callable[[], None]


class _Thread:
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
