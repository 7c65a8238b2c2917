"""Checkpoints of a run, and resuming it from them: starting the same command again is all that it takes.

    run.dir/checkpoints/step-00010    after the 10th global step: `training_state.py`, and in its manifest the state of
                                      `Stateful` objects and the settings

A run is resumed from the newest one. One that is damaged stops the run: an older one would silently undo steps that
were reported.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from os.path import relpath
from pathlib import Path
from shutil import rmtree
from typing import Any, Protocol, runtime_checkable

import torch.distributed as dist
import yaml

from megatron_bai import config
from megatron_bai.checkpoint import atomic_dir, manifest
from megatron_bai.distributed.rank_group import current_ranks
from megatron_bai.errors import UserError
from megatron_bai.model import training_state
from megatron_bai.model.async_save import CheckpointSave
from megatron_bai.model.build import MegatronModel
from megatron_bai.monitor.summary import read_summary
from megatron_bai.rl import sample_sources
from megatron_bai.rl.init_weights import weight_crcs
from megatron_bai.rl.run_dir import checkpoints, unusable_error
from megatron_bai.rl.saved_settings import complete_settings, list_changes
from megatron_bai.rl.session import Session
from megatron_bai.rl.writable_dirs import list_results
from megatron_bai.utils.flatten import flatten

_log = logging.getLogger(__name__)
# Settings that may differ when a run is resumed: those that change no number, or only its rounding, and how long the
# run is. A name that ends in a dot stands for its group.
MAY_CHANGE = (
    "run.name", "run.dir", "backend.kind", "backend.timeout_s", "backend.transformer_impl", "backend.require",
    "backend.untested", "parallel.",
    "rollout.concurrency", "rollout.request_timeout_s", "rollout.start_timeout_s", "rollout.retries", "rollout.host",
    "rollout.max_failed_fraction", "rollout.restarts", "rollout.api_key_file",
    "rollout.port", "rollout.servers", "rollout.tensor", "rollout.urls", "rollout.router", "rollout.sync",
    "rollout.sync_bucket_mib", "rollout.sync_senders", "rollout.sync_host", "rollout.sync_tolerance",
    "rollout.max_total_tokens", "rollout.max_running_requests",
    "rollout.measure_sampled", "replay.measure_live", "replay.store", "replay.store_encoding",
    "trainer.steps", "trainer.micro_batch_size", "trainer.tokens_per_micro_batch", "trainer.eval_every",
    "trainer.eval_samples", "trainer.eval_temperature", "reward.workers", "reward.concurrency", "reward.url",
    "env.workers",
    "trainer.save", "trainer.save_every", "trainer.save_async", "trainer.keep", "trainer.grace_s",
    "objective.critic_save", "monitor.", "cluster.", "init.routing_prompts", "merge.", "supervised.", "serve.",
    "convert.", "inspect.", "calibrate.", "samples.", "report.",
)  # fmt: skip


class Stateful(Protocol):
    """Something of a run that goes on where it was: what it says of itself is JSON, the same on every rank."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state, as JSON and equal on every rank."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        ...


@runtime_checkable
class StatefulWithFiles(Stateful, Protocol):
    """An object that also has arrays, each rank its own: files of the checkpoint's directory."""

    def save_files(self, directory: Path) -> None:
        """Write this rank's files. Raises an OSError."""
        ...

    def load_files(self, directory: Path) -> None:
        """Read this rank's files. Raises a UserError."""
        ...


@dataclass
class ResumePoint:
    """The state that a run starts or resumes from.

    Attributes:
        step: number of global steps that are done.
        version: of the weights, counted in syncs.
        checkpoint: to resume from; None for a new run.
        states: of each `Stateful`, by name.
        restore_rng: whether the random-number generators' states are of this layout.
        same_store: whether the records in `replay.store` are this run's.
        is_finished: whether there is nothing to do.
    """

    step: int = 0
    version: int = 0
    checkpoint: Path | None = None
    states: dict[str, dict[str, Any]] = field(default_factory=dict)
    restore_rng: bool = False
    same_store: bool = False
    is_finished: bool = False

    def load_models(self, models: dict[str, MegatronModel]) -> None:
        """Load the checkpoint's state into the models, if there is one. Collective.

        Raises:
            UserError: the checkpoint cannot be used.
        """
        if self.checkpoint is None:
            return
        try:
            training_state.load(models, self.checkpoint, self.restore_rng)
        except UserError as error:
            raise unusable_error(self.checkpoint, error) from None
        if dist.get_rank() == 0:
            _log.info("going on from %s, after step %d", self.checkpoint, self.step)
            if not self.restore_rng:
                _log.info("it was written in another layout: the random-number generators start anew")

    def load_states(self, stateful: Mapping[str, Stateful]) -> None:
        """Load the checkpoint's states, if there is one. Collective.

        Args:
            stateful: objects by name.

        Raises:
            UserError: the checkpoint has states of other names, or files cannot be read.
        """
        if self.checkpoint is None:
            return
        if stateful.keys() != self.states.keys():
            raise UserError(
                f"{self.checkpoint} has the state of {sorted(self.states)}, the run needs {sorted(stateful)}"
            )
        for name, item in stateful.items():
            item.load_state_dict(self.states[name])
            if isinstance(item, StatefulWithFiles):
                current_ranks().run_on_all(partial(item.load_files, self.checkpoint))


@contextmanager
def open_run(session: Session) -> Iterator[ResumePoint]:
    """Lock the run in `run.dir` until the block ends, and find the point to resume it from. Collective.

    Yields:
        The point.

    Raises:
        UserError: another process runs it; or the directory holds a run with other settings, or a damaged checkpoint.
    """
    group, directory = current_ranks(), Path(session.settings.run.dir)
    with ExitStack() as stack:
        group.run_on_first(lambda: stack.enter_context(atomic_dir.lock(directory)))
        task = session.task
        session.sources = sample_sources.gather_sample_sources(
            group,
            lambda: sample_sources.compute_sample_sources(
                session.settings, session.tokenizer_dir, task.tokenizer.chat_template, task.end_tokens
            ),
        )
        yield group.run_on_first(lambda: _find_resume_point(session, directory))


def _find_resume_point(session: Session, directory: Path) -> ResumePoint:
    """Find the point to resume from, on one rank; remove what killed saves left behind."""
    settings, saved = session.settings, checkpoints(directory)
    for path in (directory / "checkpoints").glob(".step-*"):  # what killed savings left
        rmtree(path) if path.is_dir() else path.unlink()
    complete = read_summary(directory).get("complete") is True
    if not saved:
        return _start_without_checkpoint(settings, directory, complete)
    try:
        info = manifest.require_info(saved[-1])
    except UserError as error:
        raise unusable_error(saved[-1], error) from None
    if "settings" not in info:
        raise UserError(f"{saved[-1]} was not written to go on from: move it away")
    _refuse_changes(info["settings"], settings, directory, info.get("sources", {}).keys() & session.sources.keys())
    if "sources" not in info:
        _log.info("%s does not say what data, reward and tokenizer contained: they are not compared", saved[-1])
    elif names := sample_sources.list_changed_sources(info["sources"], session.sources):
        changed = ", ".join(map(_with_value(settings), names))
        raise UserError(
            f"{directory} holds a run with other samples: the content of {changed} has changed since: put it back, or "
            "choose another run.name"
        )
    previous = complete_settings(info["settings"], settings)
    steps, step = settings.trainer.steps, info["step"]
    if step > steps:
        raise UserError(f"{directory} holds {step} steps of a run, more than trainer.steps={steps}: raise it")
    if info["init"] != initial_crcs(settings):
        source = config.initial_checkpoint(settings)
        raise UserError(f"the checkpoint {source} that init names is not what the run in {directory} started from")
    return ResumePoint(
        step=step,
        version=info["version"],
        checkpoint=saved[-1],
        states=info["parts"],
        restore_rng=asdict(config.Parallel()) | info["layout"] == _rng_layout(session),
        same_store=_same_store(previous, settings),
        is_finished=complete and step == steps and _results_exist(settings),
    )


def _start_without_checkpoint(settings: config.Config, directory: Path, complete: bool) -> ResumePoint:
    """Return the point of a run without a checkpoint: its beginning, unless the run was finished."""
    path = directory / "config.yaml"
    saved = flatten(yaml.safe_load(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    previous = complete_settings(saved, settings)
    if not complete:
        same = not list_changes(saved, settings, _may_change)
        return ResumePoint(same_store=same and _same_store(previous, settings))
    _refuse_changes(saved, settings, directory)
    if previous["trainer.steps"] != str(settings.trainer.steps) or not _results_exist(settings):
        raise UserError(
            f"{directory} holds a finished run of {previous['trainer.steps']} steps and no checkpoint to go on from "
            "(trainer.save_every was 0): choose another run.name"
        )
    return ResumePoint(is_finished=True)


def _same_store(previous: dict[str, str], settings: config.Config) -> bool:
    """Return whether the store of routes is the run's own, which may have moved with the run's directory."""
    store, run_dir = previous.get("replay.store"), previous.get("run.dir")
    if not store or not run_dir:
        return False
    return settings.replay.store == store or relpath(settings.replay.store, settings.run.dir) == relpath(store, run_dir)


def result_paths(settings: config.Config) -> dict[str, str]:
    """Return the paths of the run's results, by model."""
    names = {"trainer.save": "actor", "objective.critic_save": "critic"}
    return {names[setting]: path for setting, path in list_results(settings)}


def _results_exist(settings: config.Config) -> bool:
    """Return whether the run's results are complete at their paths."""
    return all(manifest.read_info(path) is not None for path in result_paths(settings).values())


def _may_change(name: str) -> bool:
    """Return whether a setting may differ when a run is resumed."""
    return any(name == free or free.endswith(".") and name.startswith(free) for free in MAY_CHANGE)


def _with_value(settings: config.Config) -> Callable[[str], str]:
    """Return a function that writes a setting with its value, and another name alone."""
    texts = flatten(asdict(settings))
    return lambda name: f"{name}={texts[name]}" if name in texts else name


def _refuse_changes(
    saved: dict[str, str], settings: config.Config, directory: Path, compared: AbstractSet[str] = frozenset()
) -> None:
    """Raise a UserError if settings differ that may not; a path may whose content is `compared`."""
    moved = compared & {"data.train", "data.eval", "reward.tokenizer"}
    if changes := list_changes(saved, settings, lambda name: _may_change(name) or name in moved):
        raise UserError(
            f"{directory} holds a run with other settings ({'; '.join(changes)}): set them back, or choose another "
            "run.name"
        )


def initial_crcs(settings: config.Config) -> dict[str, int]:
    """Return the CRCs of the initial checkpoint: the reference policy must be the same after a restart."""
    source = config.initial_checkpoint(settings)
    return weight_crcs(source) if source else {}


def _rng_layout(session: Session) -> dict[str, Any]:
    """Return the layout that states of random-number generators belong to."""
    return asdict(session.settings.parallel) | {"processes": dist.get_world_size(), "device": session.device.kind}


class RunCheckpoints:
    """The checkpoints that a run writes: all but the last `trainer.keep` are deleted."""

    def __init__(self, session: Session, models: dict[str, MegatronModel], stateful: Mapping[str, Stateful]):
        """Write nothing yet.

        Args:
            session: of the run.
            models: by name; one is the `actor`.
            stateful: objects whose states are saved, by name.
        """
        self._session, self._models, self._stateful = session, models, stateful
        self._directory = Path(session.settings.run.dir)
        self._saving: CheckpointSave | None = None

    def save_if_due(self, step: int, version: int, requested: bool = False) -> None:
        """Save if a checkpoint is due or requested; called after every step. Collective.

        Args:
            step: of the run, from 1.
            version: of the weights.
            requested: by a signal or an alarm.

        Raises:
            UserError: the checkpoint cannot be written; earlier ones are unchanged.
        """
        trainer = self._session.settings.trainer
        self._finalize_pending(wait=False)
        due = trainer.save_every and (step % trainer.save_every == 0 or step == trainer.steps)
        if due or requested:
            self.save(step, version)

    def save(self, step: int, version: int) -> None:
        """Save now; with `trainer.save_async` a later `save_if_due` or `wait` completes the checkpoint. Collective.

        While a critic warms up nothing is saved: the actor's optimizer, which has taken no step, has no state.

        Args:
            step: of the run, from 1.
            version: of the weights.
        """
        self.wait()
        session, settings = self._session, self._session.settings
        if isinstance(settings.objective, config.Ppo) and step <= settings.objective.critic_warmup:
            return
        info = {
            "step": step,
            "version": version,
            "parts": {name: item.state_dict() for name, item in self._stateful.items()},
            "settings": flatten(asdict(settings)),
            "layout": _rng_layout(session),
            "init": initial_crcs(settings),
            "sources": session.sources,
        }
        target = self._directory / "checkpoints" / f"step-{step:05}"
        background = settings.trainer.save_async
        self._saving = training_state.save(
            self._models, target, session.tokenizer_dir, info, background, self._save_files
        )
        if not background:
            self.wait()

    def _save_files(self, directory: Path) -> None:
        """Write this rank's files of the stateful objects."""
        for item in self._stateful.values():
            if isinstance(item, StatefulWithFiles):
                item.save_files(directory)

    def wait(self) -> None:
        """Wait until the last checkpoint is complete. Collective."""
        self._finalize_pending(wait=True)

    def _finalize_pending(self, wait: bool) -> None:
        """Complete a checkpoint whose files are written, and delete old ones. Collective."""
        if self._saving and self._saving.finalize(wait):
            self._saving = None
            current_ranks().run_on_first(self._delete_old, self._directory)

    def _delete_old(self) -> None:
        """Delete old checkpoints, each under a name that is not read."""
        for path in checkpoints(self._directory)[: -self._session.settings.trainer.keep]:
            path.rename(atomic_dir.staging_path(path))
            atomic_dir.remove_leftovers(path)

    def __enter__(self) -> "RunCheckpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif self._saving:
            self._saving.abort()
