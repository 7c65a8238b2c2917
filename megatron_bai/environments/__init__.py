"""Answer a model's turns (docs/conversations.md). Environments from outside come with `register`.

One that raises, hangs, or returns what is no reply costs its sample and not the run, as a reward does.
"""

from __future__ import annotations

import re

from megatron_bai import config
from megatron_bai.config.limits import validate_group
from megatron_bai.environments import calculator, python_tool
from megatron_bai.environments.environment import Conversation, Environment, EnvironmentKind, Reply, parse_reply
from megatron_bai.errors import UserError

__all__ = [
    "Conversation",
    "Environment",
    "EnvironmentKind",
    "Reply",
    "parse_reply",
    "register",
    "require",
    "resolve_environment",
]


def _check_user_class(settings: config.UserEnvironment) -> None:
    if not re.fullmatch(r"([\w.]+|.+\.py):[\w.]+", settings.environment):
        raise UserError(f"env.environment is {settings.environment!r}: name it as module:Class or path.py:Class")


_USER_CLASS = EnvironmentKind(
    config.UserEnvironment, lambda settings: str(settings.environment), check=_check_user_class
)
_REGISTRY: dict[str, EnvironmentKind] = {
    kind.settings.name: kind for kind in (_USER_CLASS, calculator.ENVIRONMENT, python_tool.ENVIRONMENT)
}


def register(kind: EnvironmentKind) -> None:
    """Make an environment from outside available as `env=NAME`, NAME the default `name` of its settings.

    Raises:
        UserError: the name is taken.
    """
    from hydra.core.config_store import ConfigStore

    name = kind.settings.name
    if name == config.NoEnvironment.name or _REGISTRY.setdefault(name, kind) is not kind:
        raise UserError(f"there is an environment {name!r} already: give {kind.settings.__qualname__} another name")
    ConfigStore.instance().store(group="env", name=name, node=kind.settings)


def resolve_environment(settings: config.Env) -> EnvironmentKind | None:
    """Return the environment that the settings choose, None for `env=none`, after refusing contradictions.

    Raises:
        UserError: names the settings.
    """
    name, kind = settings.name, _REGISTRY.get(settings.name)
    if kind is None and name != config.NoEnvironment.name:
        raise UserError(f"env.name is {name!r}: choose one of none, {', '.join(sorted(_REGISTRY))}")
    if type(settings) is not (config.NoEnvironment if kind is None else kind.settings):
        raise UserError(f"env.name is {name!r}, but the settings are another's: choose with env={name}")
    validate_group("env", settings)
    if kind is not None:
        kind.check(settings)
    return kind


def require(settings: config.Env) -> None:
    """Refuse an environment that this machine lacks something for.

    Raises:
        UserError: names it.
    """
    if kind := resolve_environment(settings):
        kind.require(settings)
