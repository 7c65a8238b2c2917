"""The architecture of a run: that of the checkpoint it starts from, or else what `model.*` says."""

from dataclasses import replace
from pathlib import Path

from megatron_bai import config
from megatron_bai.checkpoint import formats
from megatron_bai.errors import UserError
from megatron_bai.model.architecture import (
    Architecture,
    architecture_of,
    read_architecture,
    require_given,
    require_same,
)
from megatron_bai.model.required_tensors import require_tensors
from megatron_bai.rl.init_weights import Source, list_merge_sources, validate_init


def resolve_architecture(settings: config.Config) -> config.Config:
    """Return the settings with the run's `Architecture` for a model, which its checkpoints' tensors are those of.

    Args:
        settings: of a run, whose sources `init_weights.require_sources` has accepted. Those that have an architecture
            already are returned unchanged.

    Raises:
        UserError: there is no checkpoint and `model.*` does not say all; the checkpoint's architecture is not
            supported; `model.*` contradicts it; or a model could not be filled from a checkpoint, as far as its index
            and headers tell.
    """
    if isinstance(settings.model, Architecture):
        return settings
    validate_init(settings)
    source = architecture_source(settings)
    model = _find_architecture(settings.model, source)
    if source is not None and source.is_dir():
        name = "init.checkpoint" if isinstance(settings.init, config.CheckpointInit) else "init=merge"
        Source(name, str(source), lambda path: require_tensors(path, model)).require()
    critic = getattr(settings.objective, "critic_checkpoint", "")
    if critic and Path(critic).is_dir():
        Source("objective.critic_checkpoint", critic, lambda path: _require_critic(path, model)).require()
    return replace(settings, model=model)


def _find_architecture(given: config.Model, source: Path | None) -> Architecture:
    """Return the architecture of the checkpoint at `source`, or else what settings say."""
    if source is None:
        return architecture_of(given)
    if not source.is_dir():
        if all(getattr(given, name) for name in ("num_layers", "hidden_size", "vocab_size")):  # such as by a preset
            return architecture_of(given)
        raise UserError(f"no checkpoint at {source}, whose architecture the run has: see init")
    found = read_architecture(source)
    require_given(given, found, str(source))
    return replace(found, init_std=given.init_std)


def _require_critic(directory: str, model: Architecture) -> None:
    """Refuse what is no checkpoint of a critic of an architecture."""
    require_same(directory, model)
    require_tensors(directory, model, critic=True)
    formats.require_complete(directory)


def plain_settings(settings: config.Config) -> config.Config:
    """Return settings with the sizes alone for a model: what is written down and compared when a run is resumed."""
    model = settings.model
    return replace(settings, model=model.settings()) if isinstance(model, Architecture) else settings


def architecture_source(settings: config.Config) -> Path | None:
    """Return the directory whose `config.json` the run's model has; None where its weights are random.

    That of a merge is its output, or else its first source.
    """
    source = config.initial_checkpoint(settings)
    if isinstance(settings.init, config.MergeInit) and not Path(source).is_dir():
        source = list_merge_sources(settings.merge)[0]
    return Path(source) if source else None
