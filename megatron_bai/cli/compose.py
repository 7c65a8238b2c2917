"""Compose the settings from `conf/` and the command line, and say in one line what is wrong with them."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import hydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_bai import config
from megatron_bai.errors import UserError


def compose(overrides: list[str]) -> config.Config:
    """Compose the settings from the defaults and a command line's overrides.

    Raises:
        UserError: they make none.
    """
    with (
        hydra_errors_as_user_errors(),
        hydra.initialize_config_dir(version_base="1.3", config_dir=str(config.conf_dir())),
    ):
        return cast(config.Config, OmegaConf.to_object(hydra.compose("config", overrides=overrides)))


@contextmanager
def hydra_errors_as_user_errors() -> Iterator[None]:
    """Raise errors of Hydra and OmegaConf as UserError."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(summarize_hydra_error(error)) from None


def summarize_hydra_error(error: BaseException) -> str:
    """Condense an error of Hydra or OmegaConf and its cause to one line, without the advice about full tracebacks."""
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    cause = error.__cause__
    detail = str(cause).splitlines()[0] if cause and str(cause) else ""
    if isinstance(error, OverrideParseException):
        first = f"cannot read the override {error.override!r}: {first}"
    reason = f"{first} ({detail})" if detail and detail not in first else first
    return reason + _suggest_choice(reason)


def _suggest_choice(reason: str) -> str:
    """Name the choices of a group that have the setting which the chosen one lacks, if that is what is wrong."""
    key, kind = (re.findall(r"Key '(\w+)' not in '(\w+)'", reason) or [("", "")])[0]
    for group, field in config.Config.__dataclass_fields__.items():
        family = config_subclasses(cast(type, field.type))
        if kind in [each.__name__ for each in family]:
            known = [each.name for each in family if key in each.__dataclass_fields__ and each.name != MISSING]
            return f"; add {' or '.join(f'{group}={name}' for name in known)}, which has it" if known else ""
    return ""


def config_subclasses(kind: type[Any]) -> list[type[Any]]:
    """Return a class of `config/` and its descendants there, not those of plugins."""
    children = [child for child in kind.__subclasses__() if child.__module__.startswith(f"{config.__name__}.")]
    return [kind, *(each for child in children for each in config_subclasses(child))]
