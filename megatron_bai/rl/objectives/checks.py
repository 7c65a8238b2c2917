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
    if isinstance(settings, config.RouterShifted) and not settings.router_shift:
        refuse_unused(settings, ["router_shift_min"], "objective.router_shift=false")


def validate_clipping(settings: Any) -> None:
    """Refuse settings of the correction that are never read."""
    kind = settings.correction
    read = {"none": set[str](), "token_kpop": {"correction_kl"}}.get(kind, {"correction_max"})
    if kind.endswith("mask"):
        read |= {"correction_min"}
    unused = [name for name in ("correction_max", "correction_min", "correction_kl") if name not in read]
    refuse_unused(settings, unused, f"objective.correction={kind}")
    if kind.endswith("mask") and settings.correction_min > settings.correction_max:
        raise UserError(
            f"objective.correction_min ({settings.correction_min}) is above objective.correction_max "
            f"({settings.correction_max}): no weight would remain"
        )
