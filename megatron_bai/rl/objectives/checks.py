"""Refusing settings of objectives by name."""

from collections.abc import Iterable
from typing import Any

from megatron_bai import config
from megatron_bai.errors import UserError
from megatron_bai.rl.batches.advantages import ESTIMATORS as ADVANTAGES
from megatron_bai.rl.objectives.correction import KINDS
from megatron_bai.rl.objectives.regularise import ESTIMATORS


def one_of(settings: Any, name: str, choices: Iterable[str]) -> None:
    """Raises UserError unless the setting is one of `choices`."""
    if getattr(settings, name) not in choices:
        raise UserError(f"objective.{name} is {getattr(settings, name)!r}: choose one of {', '.join(choices)}")


def within(settings: Any, name: str, low: float, high: float = float("inf")) -> None:
    """Raises UserError unless low ≤ the setting ≤ high; NaN never is."""
    value = getattr(settings, name)
    if not low <= value <= high:
        limits = f"at least {low:g}" if high == float("inf") else f"from {low:g} to {high:g}"
        raise UserError(f"objective.{name} is {value:g}: it must be {limits}")


def positive(settings: Any, name: str) -> None:
    """Raises UserError unless the setting is above 0."""
    if not getattr(settings, name) > 0:
        raise UserError(f"objective.{name} is {getattr(settings, name):g}: it must be above 0")


def unread(settings: Any, names: Iterable[str], because: str) -> None:
    """Raises UserError when a setting that is never read, given `because`, was changed from its default."""
    for name in names:
        value, default = getattr(settings, name), getattr(type(settings), name)
        if value != default:
            raise UserError(f"objective.{name} is {value} but is never read with {because}: remove one of the two")


def check_policy(settings: config.Policy) -> None:
    """What all objectives on rollouts share."""
    one_of(settings, "advantage", ("gae",) if isinstance(settings, config.Ppo) else ADVANTAGES)
    one_of(settings, "kl_estimator", ESTIMATORS)
    within(settings, "entropy_bonus", 0)
    within(settings, "kl_penalty", 0)
    within(settings, "refill_rounds", 0)
    if not settings.drop_uniform_groups:
        unread(settings, ["refill_rounds"], "objective.drop_uniform_groups=false")
    if not settings.kl_penalty:
        unread(settings, ["kl_estimator"], "objective.kl_penalty=0")


def check_clipped(settings: Any) -> None:
    """Limits of a ratio, the correction, and the kind of token mean where there is one."""
    within(settings, "clip_low", 0, 1)
    within(settings, "clip_high", 0)
    one_of(settings, "correction", KINDS)
    positive(settings, "correction_max")
    if settings.correction == "none":
        unread(settings, ["correction_max"], "objective.correction=none")
    if hasattr(settings, "token_mean"):
        one_of(settings, "token_mean", ("batch", "prompt"))
