"""The architecture of a run or a checkpoint: read from `config.json`, or made of settings; and comparing two."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from megatron_bai import config
from megatron_bai.checkpoint.common_state import find_common_state
from megatron_bai.checkpoint.hf_config import CONFIG, read_hf_config, read_raw_config
from megatron_bai.checkpoint.iterations import resolve_iteration
from megatron_bai.checkpoint.megatron_args import describe_model
from megatron_bai.errors import UserError
from megatron_bai.model.families import registry
from megatron_bai.model.families.architecture import Architecture

__all__ = ["Architecture", "architecture_of", "differences", "find_architecture", "given_settings", "read_architecture"]

_SIZES = tuple(each.name for each in fields(config.Model) if each.name != "init_std")
_ROTATION_AND_NORMS = {"rope_theta": 10000.0, "norm_epsilon": 1e-6}  # of a model that settings alone describe
_SETTINGS = {each.name: f"model.{each.name}" for each in fields(config.Model)}


def read_architecture(directory: str | Path) -> Architecture:
    """Return the architecture that a checkpoint's `config.json` describes, with transformers' defaults.

    Where there is none, Megatron-LM's arguments do (`megatron_args`).

    Args:
        directory: of the checkpoint, of either format.

    Raises:
        UserError: no such file, a model type that no family has, or an architecture that its family does not build.
    """
    directory = resolve_iteration(directory)
    path = directory / CONFIG
    if not path.is_file() and (described := describe_model(directory)) is not None:
        return _read_described(described, directory / str(find_common_state(directory)))
    raw = read_raw_config(directory)
    text = raw.get("text_config")
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise UserError(f"{path}: model_type is {model_type!r}: it must name the kind of model, such as 'mixtral'")
    family = registry.find_family(model_type, str(path))  # first: dequantising what no family builds would be in vain
    values = read_hf_config(directory, family.defaults is not None, family.read_as.get(model_type))
    if family.defaults is not None:
        values = {**family.defaults, **values}
    return family.make_architecture(values, {**raw, **(text if isinstance(text, dict) else {})}, str(path))


def _read_described(described: dict[str, Any], path: Path) -> Architecture:
    """Return the architecture of a `config.json` that is not there, described by the file `path`."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / CONFIG).write_text(json.dumps(described), encoding="utf-8")
        values = read_hf_config(directory)
    return registry.find_family(described["model_type"], str(path)).make_architecture(values, described, str(path))


def find_architecture(directory: str | Path) -> Architecture | None:
    """Return the architecture of a checkpoint as `read_architecture` does; None of one that no family describes.

    Args:
        directory: of the checkpoint, of either format.
    """
    try:
        return read_architecture(directory)
    except UserError:
        return None


def architecture_of(model: config.Model) -> Architecture:
    """Return the architecture that settings describe, which is the default family's; one that is made already, itself.

    Args:
        model: the settings of all sizes.

    Raises:
        UserError: sizes that are missing or contradict each other.
    """
    if isinstance(model, Architecture):
        return model
    left_out: dict[str, Any] = {
        name: value for name, value in _ROTATION_AND_NORMS.items() if getattr(model, name) is None
    }
    model = replace(model, **left_out)
    family = registry.all_families()[registry.DEFAULT]
    described = family.make_config(model)
    return family.make_architecture(described, described, "", _SETTINGS)


def given_settings(model: config.Model) -> dict[str, Any]:
    """Return what settings say of a model: those that do not have their defaults, which no model has."""
    return {each.name: value for each in fields(config.Model) if (value := getattr(model, each.name)) != each.default}


def differences(one: Architecture, other: Architecture) -> dict[str, tuple[Any, Any]]:
    """Return what two architectures compute differently, or how their tensors differ, by name; empty for the same.

    Args:
        one: an architecture.
        other: to compare it with.

    Returns:
        The values of both, of sizes under our names and of the rest under Megatron-Core's.
    """
    pairs = {name: (getattr(one, name), getattr(other, name)) for name in _SIZES}
    pairs["family"] = one.family.name, other.family.name
    sides = [_forward_arguments(each) for each in (one, other)]
    pairs |= {name: (sides[0].get(name), sides[1].get(name)) for name in {**sides[0], **sides[1]}}
    return {name: (a, b) for name, (a, b) in pairs.items() if a != b}


def _forward_arguments(model: Architecture) -> Mapping[str, Any]:
    """Return what determines the forward pass beside the sizes."""
    rope = model.family.rope_arguments(model)
    return {
        "moe_layers": list(model.moe_layers),
        "dense_ffn_hidden_size": model.dense_ffn_hidden_size,
        "tied": model.tied,
        **model.family.transformer_arguments(model),
        **rope.gpt,
        **rope.config,
    }


def require_same(directory: str | Path, model: Architecture) -> None:
    """Refuse a checkpoint, of either format, whose `config.json` describes another architecture.

    Args:
        directory: of the checkpoint.
        model: the run's.

    Raises:
        UserError: it names what differs; or there is no such file.
    """
    for name, (found, wanted) in differences(read_architecture(directory), model).items():
        own = f"the configured model.{name} is" if name in _SIZES else "the run's model has"
        raise UserError(f"{directory} has {name} {found}, {own} {wanted}")


def require_served(model: Architecture, ranks: int = 1) -> None:
    """Refuse a model that the inference engine would serve as another one, or on fewer ranks.

    Args:
        model: the architecture.
        ranks: tensor-parallel ranks of a server.

    Raises:
        UserError: says what in SGLang does.
    """
    if reason := model.family.unserved(model):
        raise UserError(
            f"SGLang does not serve this {model.family.name} model: {reason}; it can be merged, converted and trained"
            " with objective=sft"
        )
    if (most := model.family.served_ranks) and ranks > most:
        raise UserError(
            f"rollout.tensor is {ranks}: SGLang divides no {model.family.name} model among more than {most} ranks"
        )


def require_given(model: config.Model, found: Architecture, where: str) -> None:
    """Refuse settings that contradict the architecture of a checkpoint. Those with their defaults are not given.

    Args:
        model: the settings.
        found: the checkpoint's.
        where: the checkpoint's directory, for the message.

    Raises:
        UserError: names the setting and both values.
    """
    for name, value in given_settings(model).items():
        if name != "init_std" and getattr(found, name) != value:
            raise UserError(
                f"model.{name} is {value}, and {where} has {getattr(found, name)}: leave it out, the architecture is"
                " the checkpoint's"
            )
