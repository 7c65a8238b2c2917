"""Validation of settings of objectives, by name."""

from collections.abc import Iterable
from typing import Any

from megatron_bai import config
from megatron_bai.errors import UserError
from megatron_bai.rl.batches.advantages import ESTIMATORS as ADVANTAGE_ESTIMATORS
from megatron_bai.rl.objectives.correction import CORRECTIONS
from megatron_bai.rl.objectives.regularise import KL_ESTIMATORS


def require_choice(settings: Any, name: str, choices: Iterable[str]) -> None:
    """Raise a UserError unless `settings.name` is one of `choices`.

    Args:
        settings: of the objective.
        name: of the setting, without `objective.`.
        choices: values that are allowed.
    """
    if getattr(settings, name) not in choices:
        raise UserError(f"objective.{name} is {getattr(settings, name)!r}: choose one of {', '.join(choices)}")


def require_range(settings: Any, name: str, low: float, high: float = float("inf")) -> None:
    """Raise a UserError unless low ≤ `settings.name` ≤ high; NaN never is.

    Args:
        settings: of the objective.
        name: of the setting, without `objective.`.
        low: least value.
        high: largest value; infinity: no limit.
    """
    value = getattr(settings, name)
    if not low <= value <= high:
        limits = f"at least {low:g}" if high == float("inf") else f"from {low:g} to {high:g}"
        raise UserError(f"objective.{name} is {value:g}: it must be {limits}")


def require_positive(settings: Any, name: str) -> None:
    """Raise a UserError unless `settings.name` is above 0.

    Args:
        settings: of the objective.
        name: of the setting, without `objective.`; NaN is refused.
    """
    if not getattr(settings, name) > 0:
        raise UserError(f"objective.{name} is {getattr(settings, name):g}: it must be above 0")


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
    """Validate the settings that all objectives on rollouts have."""
    require_choice(settings, "advantage", ("gae",) if isinstance(settings, config.Ppo) else ADVANTAGE_ESTIMATORS)
    require_choice(settings, "kl_estimator", KL_ESTIMATORS)
    require_range(settings, "entropy_bonus", 0)
    require_range(settings, "kl_penalty", 0)
    require_range(settings, "refill_rounds", 0)
    if not settings.drop_uniform_groups:
        refuse_unused(settings, ["refill_rounds"], "objective.drop_uniform_groups=false")
    if not settings.kl_penalty:
        refuse_unused(settings, ["kl_estimator"], "objective.kl_penalty=0")


def validate_clipping(settings: Any) -> None:
    """Validate limits of a ratio, the correction and, if there is one, the kind of token mean."""
    require_range(settings, "clip_low", 0, 1)
    require_range(settings, "clip_high", 0)
    require_choice(settings, "correction", CORRECTIONS)
    require_positive(settings, "correction_max")
    if settings.correction == "none":
        refuse_unused(settings, ["correction_max"], "objective.correction=none")
    if hasattr(settings, "token_mean"):
        require_choice(settings, "token_mean", ("batch", "prompt"))
