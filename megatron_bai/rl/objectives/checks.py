"""Validation of settings of objectives against each other, by name; ranges are those of `config/`."""

from collections.abc import Iterable
from typing import Any

from megatron_bai import config
from megatron_bai.errors import UserError


def refuse_unused(settings: Any, names: Iterable[str], because: str) -> None:
    """Raise a UserError if one of the settings `names`, never read because of `because`, is not at its default.

    Args:
        settings: of the objective; its class has the defaults.
        names: of the settings, without `objective.`.
        because: the setting and value that keep them from being read, such as `objective.clip=false`, for the error.
    """
    for name in names:
        value, default = getattr(settings, name), getattr(type(settings), name)
        if value != default:
            raise UserError(f"objective.{name} is {value} but is never read with {because}: remove one of the two")


def validate_policy(settings: config.Policy) -> None:
    """Refuse settings of objectives on rollouts that are never read."""
    if not settings.drop_uniform_groups:
        refuse_unused(settings, ["refill_rounds"], "objective.drop_uniform_groups=false")
    if not settings.kl_penalty:
        refuse_unused(settings, ["kl_estimator"], "objective.kl_penalty=0")


def validate_clipping(settings: Any) -> None:
    """Refuse settings of the correction that are never read."""
    if settings.correction == "none":
        refuse_unused(settings, ["correction_max"], "objective.correction=none")
