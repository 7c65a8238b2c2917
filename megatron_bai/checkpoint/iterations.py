"""Megatron-LM's save directories: iterations, and beside them a tracker that names the latest.

    latest_checkpointed_iteration.txt    123, or release
    iter_0000123/                        a checkpoint
    release/                             likewise, of no iteration: weights to start from

Every verb takes such a directory for the checkpoint that its tracker names. What is written into a directory with
the name of an iteration has its tracker, so that Megatron-LM's `--load` takes the directory above.
"""

import dataclasses
import logging
import os
import re
from pathlib import Path
from typing import Any, TypeVar

from megatron_bai.checkpoint import not_checkpoints
from megatron_bai.checkpoint.not_checkpoints import TRACKER
from megatron_bai.config.limits import limits_of
from megatron_bai.errors import UserError
from megatron_bai.utils.atomic_file import write_text

RELEASE = "release"
_NAME = re.compile(r"iter_([0-9]{7,12})|release")
_MAX_BYTES = 64  # of a tracker
_log = logging.getLogger(__name__)
T = TypeVar("T")


def resolve_iteration(directory: str | Path) -> Path:
    """Return the checkpoint that a save directory of Megatron-LM stands for; any other path, unchanged.

    Args:
        directory: of a checkpoint, or of iterations with their tracker. Nothing needs to be there.

    Raises:
        UserError: the tracker is damaged, or names an iteration that is not there.
    """
    directory = Path(directory)
    tracker = directory / TRACKER
    if not tracker.is_file() or not_checkpoints.has_checkpoint(directory):
        return directory
    try:
        with open(tracker, "rb") as file:
            text = file.read(_MAX_BYTES + 1).decode(errors="replace").strip()
    except OSError as error:
        raise UserError(f"{tracker} cannot be read: {error.strerror}") from None
    if text != RELEASE and not re.fullmatch(r"[0-9]{1,12}", text):
        raise UserError(
            f"{tracker} holds {text[:20]!r}, which is neither an iteration's number nor {RELEASE!r}: write the one that"
            f" is meant into it, or give the directory of that{not_checkpoints.list_iterations(directory)}"
        )
    found = directory / (RELEASE if text == RELEASE else f"iter_{int(text):07d}")
    if not found.is_dir():
        raise UserError(
            f"{tracker} names {text}, and there is no {found.name} beside it: give the directory of another"
            f" iteration{not_checkpoints.list_iterations(directory)}"
        )
    return found


def resolve_settings(settings: T) -> T:
    """Return settings in which Megatron-LM's save directories are the checkpoints that they stand for.

    Args:
        settings: a dataclass; its fields that name checkpoints are looked at, and those of dataclasses in it.

    Raises:
        UserError: as `resolve_iteration`, with the setting's name.
    """
    return _resolve(settings, "")


def _resolve(settings: T, prefix: str) -> T:
    """Return a dataclass with resolved fields; itself where nothing changes."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]  # it is one
        value: Any = getattr(settings, field.name)
        name, found = f"{prefix}{field.name}", value
        if dataclasses.is_dataclass(value) and not prefix:
            found = _resolve(value, f"{name}.")
        elif limits_of(field).is_checkpoint:
            is_list = isinstance(value, list)
            found = [_resolve_named(each, name) for each in value] if is_list else _resolve_named(value, name)
        if found != value:
            changes[field.name] = found
    return dataclasses.replace(settings, **changes) if changes else settings  # type: ignore[type-var]


def _resolve_named(path: str, name: str) -> str:
    """Resolve the value of one setting, and say what it is."""
    if not path:
        return path
    try:
        found = resolve_iteration(path)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    if found == Path(path):
        return path
    if os.environ.get("RANK", "0") == "0":
        _log.info("%s: %s is at %s, by its %s", name, path, found.name, TRACKER)
    return str(found)


def iteration_of(directory: str | Path) -> int | None:
    """Return the iteration whose name a directory has, 0 for a release; None for any other name."""
    match = _NAME.fullmatch(Path(directory).name)
    return int(match[1] or 0) if match else None


def has_tracker(directory: Path) -> bool:
    """Return whether a directory is an iteration in a save directory of Megatron-LM, which has a tracker.

    Args:
        directory: of a checkpoint.
    """
    return iteration_of(directory) is not None and (directory.parent / TRACKER).is_file()


def write_tracker(directory: Path) -> None:
    """Let the tracker beside a checkpoint name it, where it has the name of an iteration.

    Args:
        directory: of the checkpoint, which is complete.

    Raises:
        OSError: the tracker cannot be written.
    """
    iteration = iteration_of(directory)
    if iteration is not None:
        write_text(directory.parent / TRACKER, RELEASE if directory.name == RELEASE else str(iteration))
