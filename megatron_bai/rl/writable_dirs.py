"""Whether the directories of a run can be made and written, found out before the work whose results they get.

A result replaces its whole directory, so that must be nothing else: no input of the run, nor `run.dir`.
"""

import errno
import os
import tempfile
from pathlib import Path

from megatron_bai import config
from megatron_bai.checkpoint import manifest
from megatron_bai.checkpoint.output_paths import is_inside, require_apart, resolve_output
from megatron_bai.errors import UserError
from megatron_bai.merge.recipe.recipe import expand_members
from megatron_bai.rl.run_dir import DIRECTORIES

_PROBE = b"\0" * 4096  # a block: an empty file fits on a full disk


def require_writable_dirs(settings: config.Config) -> None:
    """Refuse directories that could not be written at the end of a run, or once its server is up.

    Raises:
        UserError: names the setting.
    """
    results = list_results(settings)
    for name, path in [("run.dir", settings.run.dir), *results, ("replay.store", settings.replay.store)]:
        if path:
            require_writable(name, path)
    require_results_apart(settings)
    for name, path in results:
        target = resolve_output(path, name)
        if target.is_dir() and any(target.iterdir()) and not manifest.has_manifest(target):
            raise UserError(f"{name} {path} exists and is no checkpoint of megatron_bai's: choose another directory")


def list_results(settings: config.Config) -> list[tuple[str, str]]:
    """Return the settings that name a model to write, and their paths; those that are empty are left out."""
    critic = settings.objective.critic_save if isinstance(settings.objective, config.Ppo) else ""
    return [
        (name, path)
        for name, path in (("trainer.save", settings.trainer.save), ("objective.critic_save", critic))
        if path
    ]


def list_inputs(settings: config.Config) -> list[tuple[str, str]]:
    """Return the settings that name something to read, and their paths; those that are empty are left out."""
    init, merge = settings.init, settings.merge
    named = [(f"data.{key}", getattr(settings.data, key, "")) for key in ("train", "eval")]
    if isinstance(init, config.CheckpointInit):
        named.append(("init.checkpoint", init.checkpoint))
    if isinstance(init, config.MergeInit):
        named += [
            ("merge.pretrained", merge.pretrained),
            *(("merge.members", path) for path in expand_members(merge.members)),
        ]
    named += [
        ("reward.tokenizer", getattr(settings.reward, "tokenizer", "")),
        ("objective.critic_checkpoint", getattr(settings.objective, "critic_checkpoint", "")),
        ("rollout.api_key_file", settings.rollout.api_key_file),
    ]
    return [(name, path) for name, path in named if path]


def require_results_apart(settings: config.Config) -> None:
    """Refuse results that would replace what the run reads, its own directory, or each other.

    Raises:
        UserError: names the two settings.
    """
    results, inputs, run_dir = list_results(settings), list_inputs(settings), Path(settings.run.dir)
    if isinstance(settings.init, config.MergeInit) and settings.merge.output:
        inputs.append(("merge.output", settings.merge.output))
    for index, (name, path) in enumerate(results):
        require_apart(path, name, [*inputs, *results[:index]])
        if is_inside(run_dir, Path(path)):
            raise UserError(f"{name} {path} is run.dir or holds it, and would replace it: choose a directory in it")
        replaced = any(is_inside(run_dir / each, Path(path)) for each in DIRECTORIES)
        if replaced or is_inside(Path(path), run_dir / "weights"):
            raise UserError(f"{name} {path} is where the run keeps its own files: choose another name in run.dir")


def require_writable(setting: str, directory: str | Path) -> None:
    """Refuse a directory in which no file can be written; nothing is made, nor does anything stay.

    Args:
        setting: names it in the error.
        directory: it need not exist, nor need those above it.

    Raises:
        UserError: it, or the first above it that exists, is no directory, is closed to us, full or read-only; or a
            name is too long.
    """
    path = Path(os.path.abspath(directory))
    try:
        existing = next(each for each in (path, *path.parents) if os.path.lexists(each))
        if not existing.is_dir():
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if any(
            len(os.fsencode(name)) > os.pathconf(existing, "PC_NAME_MAX") for name in path.relative_to(existing).parts
        ):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(_PROBE)
    except OSError as error:
        raise UserError(f"{setting}={directory} cannot be written: {error.strerror}") from None
