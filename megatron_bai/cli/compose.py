"""Compose the settings from `conf/` and the command line, and say in one line what is wrong with them."""

import dataclasses
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import hydra
import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import MISSING, DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException, UnsupportedInterpolationType

from megatron_bai import config
from megatron_bai.cli.overrides import for_hydra, nearest_setting, setting_types
from megatron_bai.cli.unread import refuse_unread
from megatron_bai.cli.verbs import Verb
from megatron_bai.cli.yaml_texts import validate_yaml_texts
from megatron_bai.config.limits import limits_of, unknown_name, validate_ranges
from megatron_bai.errors import UserError


def compose(words: list[str], verb: Verb | None = None) -> config.Config:
    """Compose the settings from the defaults and a command line's words.

    Args:
        words: `group.key=value` and `group=choice`, as typed.
        verb: refuses words that it would not read; None: none are refused.

    Raises:
        UserError: they make none, or one is outside its range.
    """
    bare = next((word for word in words if "=" not in word and not word.startswith(("-", "~"))), None)
    if verb is not None and bare is not None:
        raise UserError(f"{bare!r} is no setting: write group.key=value, as in `{verb.example}`")
    with hydra_errors_as_user_errors():
        composed = compose_unresolved(words)
        if verb is not None:
            refuse_unread(verb, words, composed)
        settings = cast(config.Config, OmegaConf.to_object(composed))
    _expand_home(settings)
    validate_ranges(settings)
    return settings


def compose_unresolved(words: list[str]) -> DictConfig:
    """Compose the settings as OmegaConf holds them, with their references, and nothing validated but their types.

    Args:
        words: as for `compose`.
    """
    overrides, mappings = for_hydra(words)
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(config.conf_dir())):
        composed = hydra.compose("config", overrides=overrides)
        validate_yaml_texts(overrides)
    _fill_random_model(composed)
    for setting, values in mappings:
        node = OmegaConf.select(composed, setting)
        with open_dict(node):
            for key, value in values.items():
                node[key] = value
    return composed


def _fill_random_model(composed: DictConfig) -> None:
    """Give a model of random weights the sizes of `conf/model/tiny.yaml` where nothing else is given."""
    if composed.init.name == config.RandomInit.name:
        for name, value in OmegaConf.load(config.conf_dir() / "model" / "tiny.yaml").items():
            if not composed.model[name]:
                composed.model[name] = value


def _expand_home(settings: config.Config) -> None:
    """Replace a leading `~` of paths by the home directory, as a shell does at the beginning of a word."""
    for group in dataclasses.fields(settings):
        values = getattr(settings, group.name)
        for field in dataclasses.fields(values):
            if limits_of(field).is_path:
                value = getattr(values, field.name)
                expanded = [*map(os.path.expanduser, value)] if isinstance(value, list) else os.path.expanduser(value)
                setattr(values, field.name, expanded)


@contextmanager
def hydra_errors_as_user_errors() -> Iterator[None]:
    """Raise errors of Hydra and OmegaConf as UserError."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(summarize_hydra_error(error)) from None
    except yaml.YAMLError as error:
        raise UserError(f"a file of the configuration is no YAML: {error}") from None


def summarize_hydra_error(error: BaseException) -> str:
    """Condense an error of Hydra or OmegaConf and its cause to one line, without the advice about full tracebacks."""
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        options = [option for option in error.options if option != "settings"]
        return unknown_name(f"{group}={name}: there is no {group}/{name}", name, options)
    first, *more = str(error).splitlines() or [type(error).__name__]
    if more and first.endswith("raised while composing config:"):  # what is wrong in a file is in the second line
        first = f"{first.partition(':')[0]}: {more[0]}"
    cause = error.__cause__
    detail = str(cause).splitlines()[0] if cause and str(cause) else ""
    if "Ambiguous value" in first:
        word = first.rpartition(" ")[2].strip("'")
        return f"{word} lists several values: --multirun runs each; choose one without it"
    if isinstance(error, OverrideParseException):
        first = f"cannot read the override {error.override!r}: {first}"
    if isinstance(error, InterpolationResolutionError | UnsupportedInterpolationType) and error.full_key:
        first = f"{error.full_key}: {first}; a text that has `${{` in it is written with `\\${{`"
    reason = f"{first} ({detail})" if detail and detail not in first else first
    return reason + _suggest_choice(reason)


def _suggest_choice(reason: str) -> str:
    """Name the choices of a group that have the setting which the chosen one lacks, if that is what is wrong."""
    key, kind = (re.findall(r"Key '(\w+)' not in '(\w+)'", reason) or [("", "")])[0]
    for group, field in config.Config.__dataclass_fields__.items():
        family = config_subclasses(cast(type, field.type))
        if kind in [each.__name__ for each in family]:
            known = [each.name for each in family if key in each.__dataclass_fields__ and each.name != MISSING]
            if known:
                return f"; add {' or '.join(f'{group}={name}' for name in known)}, which has it"
            near = nearest_setting(f"{group}.{key}", setting_types())
            return f"; did you mean {near}?" if near else ""
    return ""


def config_subclasses(kind: type[Any]) -> list[type[Any]]:
    """Return a class of `config/` and its descendants there, not those of plugins."""
    children = [child for child in kind.__subclasses__() if child.__module__.startswith(f"{config.__name__}.")]
    return [kind, *(each for child in children for each in config_subclasses(child))]
