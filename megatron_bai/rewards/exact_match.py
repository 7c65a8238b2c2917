"""The data's own check, in this process: it neither hangs nor runs what the model wrote."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_bai import config
from megatron_bai.rewards.reward import Reward, SampleScorer, Score, Scorer
from megatron_bai.workers.outcomes import make_completed_future

if TYPE_CHECKING:
    from megatron_bai.data.task import Task


@contextmanager
def _open(settings: config.Exact, task: Task, log: Path) -> Iterator[Scorer]:
    yield SampleScorer(lambda item: make_completed_future(Score(task.reward(item.prompt, item.ids))))


REWARD = Reward(config.Exact, _open)
