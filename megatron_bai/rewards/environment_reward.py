"""The environment's own rewards: the sum of those of a conversation's turns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_bai import config
from megatron_bai.rewards.reward import Item, Reward, SampleScorer, Score, Scorer
from megatron_bai.workers.outcomes import make_completed_future

if TYPE_CHECKING:
    from megatron_bai.data.task import Task


def score(item: Item) -> Score:
    """Return the sum of the rewards of turns, 0 where the environment gave none."""
    return Score(item.environment_reward or 0.0, turn_weight=1.0)


@contextmanager
def _open(settings: config.EnvironmentReward, task: Task, log: Path) -> Iterator[Scorer]:
    yield SampleScorer(lambda item: make_completed_future(score(item)))


REWARD = Reward(config.EnvironmentReward, _open)
