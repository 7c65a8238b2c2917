"""What a run would read: refused where it is missing."""

import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path

from megatron_bai import config
from megatron_bai.checkpoint.not_checkpoints import describe_missing
from megatron_bai.config import Config
from megatron_bai.distributed.rank_group import RankGroup
from megatron_bai.errors import UserError
from megatron_bai.merge import pipeline
from megatron_bai.rewards import list_reward_settings
from megatron_bai.rl.init_weights import find_merged_tokenizer, list_sources
from megatron_bai.rl.run_architecture import architecture_source
from megatron_bai.rl.run_dir import require_usable_run_dir
from megatron_bai.rl.run_task import make_generated_task, make_task
from megatron_bai.rl.writable_dirs import list_inputs, require_results_apart
from megatron_bai.rollout.servers import auth

# What the presets for 30 billion parameters name and nobody has yet where they are planned: said, not refused.
PLACEHOLDERS = (
    "data/train.jsonl", "key", "checkpoints/actor", "checkpoints/pretrained", "checkpoints/instruct",
    "checkpoints/reasoning",
)  # fmt: skip


def read_inputs(settings: Config) -> dict[str, str]:
    """Look at what a run would read.

    Args:
        settings: that `validate_init` has accepted.

    Returns:
        What could not be known, and whose architecture the run has, as text by name.

    Raises:
        UserError: a file, checkpoint or module that is named does not exist, or cannot be used.
    """
    notes: dict[str, str] = {}
    require_results_apart(settings)
    absent = dict.fromkeys(name for name, path in _paths(settings) if not _require_path(name, path, settings.run.dir))
    if absent:
        notes["not here"] = f"{', '.join(absent)}: named by a preset or below run.dir, and not looked at"
    _require_usable(settings)
    source = architecture_source(settings)
    if source is not None and source.is_dir():
        notes["model of"] = str(source)
    return notes


def read_task(settings: Config) -> dict[str, str]:
    """Read the rows and the tokenizer that are here, as `train` does before it builds a model.

    Args:
        settings: with the run's architecture, that `validate_settings` has accepted.

    Returns:
        Which rows would be left out, as text by name.

    Raises:
        UserError: as `run_task.make_task`.
    """
    source = architecture_source(settings)
    if source is None:
        if isinstance(settings.data, config.Generated):
            make_generated_task(settings, settings.data)
        return {}
    is_result = not isinstance(settings.init, config.MergeInit) or str(source) == config.initial_checkpoint(settings)
    tokenizer_dir = source if is_result or not source.is_dir() else find_merged_tokenizer(settings.merge)
    rows = [getattr(settings.data, name, "") for name in ("train", "eval")]
    if not all(os.path.exists(path) for path in (tokenizer_dir, *filter(None, rows))):
        return {}  # `read_inputs` said so
    left_out: list[str] = []
    make_task(settings, tokenizer_dir, left_out.append)
    return {"rows": "; ".join(left_out)} if left_out else {}


def _require_usable(settings: Config) -> None:
    """Refuse what is here and could not be used: checkpoints, tokenizers, modules, keys, what an earlier start left."""
    for each in list_sources(settings):
        if os.path.exists(each.path):
            each.require()
    _require_merge(settings)
    for label, reward in list_reward_settings(settings.reward).items():
        if isinstance(reward, config.Function):
            _require_module(f"{label}.function", reward.function)
    if isinstance(settings.env, config.UserEnvironment):
        _require_module("env.environment", settings.env.environment)
    if os.path.exists(settings.rollout.api_key_file):
        auth.read_key(settings.rollout.api_key_file)
    require_usable_run_dir(settings)


def _require_merge(settings: Config) -> None:
    """Refuse sources that are here and could not be merged, by their indexes; nothing where the merge is done."""
    if not isinstance(settings.init, config.MergeInit) or Path(settings.merge.output).is_dir():
        return
    if all(os.path.exists(each.path) for each in list_sources(settings)):
        pipeline.run_merge(replace(settings.merge, dry_run=True), RankGroup())


def _paths(settings: Config) -> list[tuple[str, str]]:
    """List the settings that name something that must be there, and their paths."""
    is_merged = Path(settings.merge.output).is_dir()  # then nothing is read of its sources
    return [(name, path) for name, path in list_inputs(settings) if not (is_merged and name.startswith("merge."))]


def _require_path(name: str, path: str, run_dir: str) -> bool:
    """Return whether a path exists; refuse one that does not, unless a preset or run.dir explains it."""
    if os.path.exists(path):
        return True
    if path not in PLACEHOLDERS and not Path(path).absolute().is_relative_to(Path(run_dir).absolute()):
        hint = describe_missing(Path(path)) or "nothing could be read from there"
        raise UserError(f"{name}={path} does not exist: {hint}")
    return False


def _require_module(setting: str, name: str) -> None:
    """Refuse code whose module is not found; it is not imported, so whether it has what is named is not known.

    Args:
        setting: that names it.
        name: `module:attribute`, or `./path.py:attribute`.
    """
    module = name.rpartition(":")[0]
    if module.endswith(".py"):
        if not os.path.isfile(module):
            raise UserError(f"{setting}={name}: there is no file {module}")
        return
    top = module.partition(".")[0]
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    if importlib.util.find_spec(top) is None:
        raise UserError(f"{setting}={name}: there is no module {top} in this directory or on PYTHONPATH")
