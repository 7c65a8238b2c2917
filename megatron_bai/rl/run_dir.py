"""What an earlier start left in a run's directory: whether it can be read, found out before any work.

A directory that cannot be listed would look like one without checkpoints, and a run would silently begin again.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from megatron_bai import config
from megatron_bai.checkpoint import manifest
from megatron_bai.errors import UserError

_NAME = re.compile(r"step-(\d{5,})")
_FILES = (
    "config.yaml", "metrics.jsonl", "summary.json", "progress.json", "report.html", "reward.log", "environment.log",
    "server.log",
)  # fmt: skip
# What a run keeps in `run.dir` beside its results.
DIRECTORIES = ("checkpoints", "samples", "serve", "tensorboard", "tokenizer", "weights")


def require_usable_run_dir(settings: config.Config) -> None:
    """Refuse a directory of an earlier start that could not be continued or written.

    Args:
        settings: of a run with rollouts.

    Raises:
        UserError: names the file, and what is wrong with it.
    """
    directory = Path(settings.run.dir)
    if not os.path.isdir(directory):
        return
    _require_access(directory, Path.is_dir, "directory")
    for name in DIRECTORIES:
        _require_access(directory / name, Path.is_dir, "directory")
    for name in _FILES:
        _require_access(directory / name, Path.is_file, "file")
    _require_mapping(directory / "summary.json", json.loads)
    _require_mapping(directory / "config.yaml", yaml.safe_load)
    if saved := checkpoints(directory):
        _require_access(saved[-1], Path.is_dir, "directory")
        for file in saved[-1].rglob("*"):
            _require_access(file, lambda path: path.is_file() or path.is_dir(), "file", os.R_OK)
        try:
            manifest.require_info(saved[-1])
        except UserError as error:
            raise unusable_error(saved[-1], error) from None


def checkpoints(directory: Path) -> list[Path]:
    """Return a run's checkpoints, the oldest first."""
    matches = ((_NAME.fullmatch(path.name), path) for path in (directory / "checkpoints").glob("step-*"))
    return [path for _, path in sorted((int(match[1]), path) for match, path in matches if match)]


def unusable_error(path: Path, error: UserError) -> UserError:
    """Make the error of a checkpoint that cannot be resumed from.

    Args:
        path: of the checkpoint, in a run's directory.
        error: what is wrong with it.
    """
    others = [other for other in checkpoints(path.parent.parent) if other != path]
    start = f"from {others[-1].name}" if others else "at its beginning"
    return UserError(f"{error}. The run cannot go on from {path}; without that directory it begins again {start}")


def _require_access(path: Path, is_kind: Callable[[Path], bool], kind: str, mode: int = os.R_OK | os.W_OK) -> None:
    """Raise a UserError where something of this path exists that is no such file or directory, or is closed to us."""
    if not os.path.lexists(path):
        return
    if not is_kind(path):
        raise UserError(f"{path} is no {kind}: move it away, or choose another run.name")
    if not os.access(path, mode | (os.X_OK if kind == "directory" else 0)):
        raise UserError(f"{path} is closed to this user: change its owner or rights, or choose another run.name")


def _require_mapping(path: Path, parse: Callable[[str], Any]) -> None:
    """Raise a UserError unless a file, if there is one, holds a mapping."""
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read ({reason}): restore it, or choose another run.name") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not what a run wrote: restore it, or choose another run.name")
