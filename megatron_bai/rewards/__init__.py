"""Score responses (docs/data.md). One file a kind of reward; others come from outside with `register`.

A reward that raises, hangs or is no finite number costs its sample and not the run: the sample has none, and
`rl/experience/collector.py` leaves it out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_bai import config
from megatron_bai.config.limits import validate_group
from megatron_bai.environments.messages import conversation_messages
from megatron_bai.errors import UserError
from megatron_bai.rewards import (
    code_reward,
    environment_reward,
    exact_match,
    math_verify_reward,
    reward_model,
    several,
    user_function,
)
from megatron_bai.rewards.reward import Item, Reward, Score, Scorer, convert_reward
from megatron_bai.rewards.sample_function import per_sample
from megatron_bai.rewards.several import list_reward_settings

if TYPE_CHECKING:
    from megatron_bai.data.task import Prompt, Task
    from megatron_bai.rollout.conversation import OnComplete
    from megatron_bai.rollout.sample import Sample

__all__ = [
    "Item",
    "Reward",
    "Score",
    "Scorer",
    "list_reward_settings",
    "list_rewards",
    "make_item",
    "make_scoring",
    "open_scorer",
    "per_sample",
    "register",
    "require",
    "resolve_reward",
    "score_samples",
]

_BUILT_IN = (
    exact_match,
    math_verify_reward,
    user_function,
    reward_model,
    environment_reward,
    code_reward,
    several,
)
_REGISTRY: dict[str, Reward] = {module.REWARD.settings.name: module.REWARD for module in _BUILT_IN}


def register(reward: Reward) -> None:
    """Make a reward from outside available as `reward=NAME`, NAME the default `name` of its settings.

    Raises:
        UserError: the name is taken.
    """
    from hydra.core.config_store import ConfigStore

    name = reward.settings.name
    if _REGISTRY.setdefault(name, reward) is not reward:
        raise UserError(f"there is a reward {name!r} already: give {reward.settings.__qualname__} another name")
    ConfigStore.instance().store(group="reward", name=name, node=reward.settings)


def list_rewards() -> dict[str, Reward]:
    """Return the rewards that there are, by name."""
    return dict(_REGISTRY)


def resolve_reward(settings: config.Reward) -> Reward:
    """Return the reward that the settings choose, after refusing settings that contradict each other.

    Raises:
        UserError: names the settings.
    """
    reward = _REGISTRY.get(settings.name)
    if reward is None:
        raise UserError(f"reward.name is {settings.name!r}: choose one of {', '.join(sorted(_REGISTRY))}")
    if type(settings) is not reward.settings:
        name = settings.name
        raise UserError(f"reward.name is {name!r}, but the settings are another's: choose with reward={name}")
    validate_group("reward", settings)
    reward.check(settings)
    return reward


def require(settings: config.Reward) -> None:
    """Refuse a reward that this machine has no package for.

    Raises:
        UserError: names the package.
    """
    resolve_reward(settings).require(settings)


@contextmanager
def open_scorer(settings: config.Reward, task: Task, log: Path) -> Iterator[Scorer]:
    """Open a scorer for the time of the block.

    Args:
        settings: of the reward.
        task: the source of the prompts.
        log: a file for what rewards print.

    Raises:
        UserError: it cannot be started: a package, a function or a server is missing.
    """
    require(settings)
    with resolve_reward(settings).open(settings, task, log) as scorer:
        yield scorer


def score_samples(scorer: Scorer, task: Task, prompts: list[Prompt], samples: list[Sample]) -> list[Sample]:
    """Return the samples with their rewards, or why they have none. Those that have one of both stay as they are.

    Args:
        scorer: of `open_scorer`.
        task: whose tokenizer decodes responses.
        prompts: indexed by `Sample.prompt_index`.
        samples: of these prompts, in any order, which the result keeps.
    """
    positions = [i for i, sample in enumerate(samples) if _lacks_score(sample)]
    items = [make_item(task, prompts[samples[i].prompt_index], samples[i]) for i in positions]
    scores = scorer(items) if items else []
    assert len(scores) == len(items), f"{len(scores)} rewards for {len(items)} samples"
    scored = list(samples)
    for i, score in zip(positions, scores, strict=True):
        scored[i] = _with_score(samples[i], prompts[samples[i].prompt_index], score)
    return scored


def make_scoring(scorer: Scorer, task: Task, prompts: Sequence[Prompt]) -> OnComplete | None:
    """Return what scores a sample while others are sampled; None where the scorer takes lists alone.

    Args:
        scorer: of `open_scorer`. With a method `submit`, `Item → Future[Score]`, it scores one sample.
        task: as in `score_samples`.
        prompts: likewise.
    """
    submit = getattr(scorer, "submit", None)
    if submit is None:
        return None

    async def score(sample: Sample) -> Sample:
        if not _lacks_score(sample):
            return sample
        prompt = prompts[sample.prompt_index]
        return _with_score(sample, prompt, await asyncio.wrap_future(submit(make_item(task, prompt, sample))))

    return score


def make_item(task: Task, prompt: Prompt, sample: Sample) -> Item:
    """Return what a scorer gets of a sample.

    Args:
        task: whose tokenizer decodes turns.
        prompt: the sample's.
        sample: complete.
    """
    messages = conversation_messages(task, prompt, sample)
    last_turn = next(message["content"] for message in reversed(messages) if message["role"] == "assistant")
    return Item(prompt, last_turn, sample.last_turn.tolist(), messages, sample.environment_reward)


def _lacks_score(sample: Sample) -> bool:
    """Return whether a sample has neither a reward yet nor a failure: lost ones and those of an environment's."""
    return sample.reward is None and not sample.failure and not sample.lost


def _with_score(sample: Sample, prompt: Prompt, score: Score) -> Sample:
    """Return the sample with its reward, or with why it has none, and whose it is."""
    value, failure = score.value, score.failure
    if value is not None:
        try:
            value = convert_reward(value)
        except ValueError as error:  # of a reward from outside, or of a sum
            value, failure = None, f"it is {error}"
    if value is None:
        failure = f"{failure} (prompt {ascii(prompt.text[-60:])})"
    return replace(sample, reward=value, failure=failure, turn_weight=score.turn_weight, reward_parts=dict(score.parts))
