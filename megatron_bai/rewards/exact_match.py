"""The data's own check, in this process: it neither hangs nor runs what the model wrote."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_bai import config
from megatron_bai.rewards.reward import Item, Reward, SampleScorer, Score, Scorer

if TYPE_CHECKING:
    from megatron_bai.data.task import Task


@contextmanager
def _open(settings: config.Exact, task: Task, log: Path) -> Iterator[Scorer]:
    def submit(item: Item) -> Future[Score]:
        score: Future[Score] = Future()
        score.set_result(Score(task.reward(item.prompt, item.ids)))
        return score

    yield SampleScorer(submit)


REWARD = Reward(config.Exact, _open)
