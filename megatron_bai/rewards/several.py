"""A weighted sum of other rewards, each of which is logged apart."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_bai import config
from megatron_bai.config.limits import unknown_name, validate_group
from megatron_bai.errors import UserError
from megatron_bai.rewards.reward import Item, Reward, SampleScorer, Score, Scorer, convert_reward
from megatron_bai.utils.json_numbers import is_finite_number
from megatron_bai.workers.outcomes import join_futures

if TYPE_CHECKING:
    from megatron_bai.data.task import Task

_LARGEST_WEIGHT = 1e6


@dataclass(frozen=True)
class Part:
    """One reward of the sum.

    Attributes:
        settings: of the reward.
        weight: that its score is multiplied by.
    """

    settings: config.Reward
    weight: float


def make_parts(settings: config.Several) -> dict[str, Part]:
    """Return the parts, by name, in the order of the settings.

    Raises:
        UserError: names the setting that is wrong.
    """
    if not settings.parts:
        raise UserError("reward.parts is empty: name rewards, as in reward.parts.right.reward=exact")
    return {name: _make_part(name, values) for name, values in settings.parts.items()}


def list_reward_settings(settings: config.Reward) -> dict[str, config.Reward]:
    """Return the settings of a reward, or of each part of one that is a sum, by what names them: `reward`, or a part's.

    Raises:
        UserError: as `make_parts`.
    """
    if not isinstance(settings, config.Several):
        return {"reward": settings}
    return {f"reward.parts.{name}": part.settings for name, part in make_parts(settings).items()}


def _make_part(name: str, values: Any) -> Part:
    from megatron_bai.rewards import list_rewards

    label = f"reward.parts.{name}"
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(f"{label}: the name of a part, as its metric has it, is small letters, digits and _")
    if not isinstance(values, Mapping) or not isinstance(values.get("reward"), str):
        raise UserError(f"{label} has no reward: set {label}.reward to the name of one")
    own = {key: value for key, value in values.items() if key not in ("reward", "weight")}
    known, weight = list_rewards(), values.get("weight", 1.0)
    known.pop(config.Several.name)
    if values["reward"] not in known:
        raise UserError(unknown_name(f"{label}.reward is {values['reward']!r}", values["reward"], sorted(known)))
    if not is_finite_number(weight) or not 0 < abs(weight) <= _LARGEST_WEIGHT:
        raise UserError(f"{label}.weight is {weight!r}: it must be a number but 0, from -1e6 to 1e6")
    return Part(_read_settings(label, known[values["reward"]].settings, own), float(weight))


def _read_settings(label: str, kind: type[config.Reward], values: dict[str, Any]) -> config.Reward:
    """Return the settings of a part's reward, of their declared types."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    node = OmegaConf.structured(kind)
    for key, value in values.items():
        if key not in node or key == "name":
            names = sorted(set(map(str, node)) - {"name"} | {"reward", "weight"})
            raise UserError(unknown_name(f"{label} has no setting {key!r}", str(key), names))
        try:
            node[key] = value
        except OmegaConfBaseException:
            raise UserError(f"{label}.{key} is {value!r}, which is none of its values") from None
    settings = OmegaConf.to_object(node)
    assert isinstance(settings, config.Reward)
    validate_group(label, settings)
    return settings


@contextmanager
def _open(settings: config.Several, task: Task, log: Path) -> Iterator[Scorer]:
    from megatron_bai.rewards import open_scorer

    parts = make_parts(settings)
    with ExitStack() as stack:
        scorers = [stack.enter_context(open_scorer(part.settings, task, log)) for part in parts.values()]
        if all(isinstance(scorer, SampleScorer) for scorer in scorers):
            yield SampleScorer(lambda item: _submit(parts, scorers, item))
        else:  # one of lists alone scores them when all have ended, and so do all

            def score(items: list[Item]) -> list[Score]:
                of_parts = [scorer(items) for scorer in scorers]
                assert all(len(scores) == len(items) for scores in of_parts), "a score for each item"
                return [combine(parts, list(scores)) for scores in zip(*of_parts, strict=True)]

            yield score


def _submit(parts: Mapping[str, Part], scorers: list[Any], item: Item) -> Future[Score]:
    return join_futures([scorer.submit(item) for scorer in scorers], lambda scores: combine(parts, scores))


def combine(parts: Mapping[str, Part], scores: list[Score]) -> Score:
    """Return Σ weight · score with each part's own score; of parts of which one failed, its failure.

    Args:
        parts: by name.
        scores: of one response, in their order.
    """
    values: dict[str, float] = {}
    total = turn_weight = 0.0
    for (name, part), score in zip(parts.items(), scores, strict=True):
        if score.value is None:
            return Score(None, f"part {name}: {score.failure}")
        try:
            values[name] = convert_reward(score.value)
        except ValueError as error:
            return Score(None, f"part {name}: it is {error}")
        total += part.weight * values[name]
        turn_weight += part.weight * score.turn_weight
    return Score(total, turn_weight=turn_weight, parts=values)


def _check(settings: config.Several) -> None:
    from megatron_bai.rewards import resolve_reward

    for part in make_parts(settings).values():
        resolve_reward(part.settings)


def _require(settings: config.Several) -> None:
    from megatron_bai.rewards import require

    for part in make_parts(settings).values():
        require(part.settings)


REWARD = Reward(config.Several, _open, _check, _require)
