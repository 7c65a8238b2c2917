"""A function of the user's, named in the settings."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_bai import config
from megatron_bai.errors import UserError
from megatron_bai.rewards.reward import Reward, Scorer
from megatron_bai.rewards.sample_function import worker_scorer

if TYPE_CHECKING:
    from megatron_bai.data.task import Task


def _open(settings: config.Function, task: Task, log: Path) -> AbstractContextManager[Scorer]:
    return worker_scorer(settings.function, settings, None, log)


def _check(settings: config.Function) -> None:
    if not re.fullmatch(r"[\w.]+:[\w.]+", settings.function):
        raise UserError(f"reward.function is {settings.function!r}: name it as module:function")


REWARD = Reward(config.Function, _open, _check)
