"""Merge methods, one a file. `merge.method` chooses one, and its fields are the settings it uses."""

import dataclasses
from typing import Any

from megatron_bai.config import Merge
from megatron_bai.errors import UserError
from megatron_bai.merge.methods.average import Average, Ema
from megatron_bai.merge.methods.bai import Bai
from megatron_bai.merge.methods.dare import Dare
from megatron_bai.merge.methods.dare_ties import DareTies
from megatron_bai.merge.methods.linear import Linear
from megatron_bai.merge.methods.slerp import Slerp
from megatron_bai.merge.methods.task_arithmetic import TaskArithmetic
from megatron_bai.merge.methods.ties import Ties
from megatron_bai.merge.recipe.recipe import Recipe

METHODS: dict[str, type[Recipe]] = {
    m.method: m for m in (Bai, Linear, TaskArithmetic, Slerp, Ties, Dare, DareTies, Average, Ema)
}


UNSET: tuple[Any, ...] = (None, "", [], {})  # with False: that is, not 0


def make_recipes(settings: Merge) -> dict[str, Recipe]:
    """Build the recipe, under the name "", or one for each value of `merge.sweep`, such as `alpha-0.1`.

    Raises:
        UserError: there is no such method, it does not use a setting that is given, or it lacks one.
    """
    method = METHODS[settings.method]
    sweep, given = list(settings.sweep), _given_settings(settings, method)
    if sweep and not method.sweep_setting:
        raise UserError(f"merge.method={method.method} does not use merge.sweep: leave it out")
    if sweep and method.sweep_setting in given:
        swept = f"merge.{method.sweep_setting}"
        raise UserError(f"{swept} and merge.sweep are both given: leave one out ({swept}=null), the sweep gives values")
    if len(set(sweep)) != len(sweep):
        raise UserError(f"merge.sweep {sweep} names a value twice: give each once")
    name = method.sweep_setting
    all_values = {f"{name}-{value!r}": given | {name: value} for value in sweep} or {"": given}
    return {label: _build_recipe(method, values) for label, values in all_values.items()}


def _given_settings(settings: Merge, method: type[Recipe]) -> dict[str, Any]:
    """Return the settings of methods that are given; None and what is empty count as not given."""
    known = {field.name for cls in METHODS.values() for field in dataclasses.fields(cls)}
    values = {name: getattr(settings, name) for name in sorted(known)}
    given = {name: _freeze(value) for name, value in values.items() if value is not False and value not in UNSET}
    used = {field.name for field in dataclasses.fields(method)}
    unused = [f"merge.{name}" for name in given if name not in used]
    if unused:
        raise UserError(f"merge.method={method.method} does not use {', '.join(unused)}: leave it out")
    return given


def _freeze(value: Any) -> Any:
    """Convert lists to tuples, and mappings to pairs."""
    if isinstance(value, dict):
        return tuple((key, _freeze(item)) for key, item in value.items())
    return tuple(value) if isinstance(value, list) else value


def _build_recipe(method: type[Recipe], values: dict[str, Any]) -> Recipe:
    """Make a method's recipe; refuse one that lacks a setting without a default."""
    missing = [
        field.name
        for field in dataclasses.fields(method)
        if field.name not in values and field.default is dataclasses.MISSING
        if field.name not in ("pretrained", "members")
    ]
    if missing:
        raise UserError(f"merge.{missing[0]} is not given: merge.method={method.method} needs it")
    return method(**{"pretrained": "", "members": (), **values})
