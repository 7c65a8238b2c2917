"""Rewards that are a Python function of one sample: it runs in processes that can be killed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_bai import config
from megatron_bai.errors import UserError
from megatron_bai.rewards.reward import Item, SampleScorer, Scorer
from megatron_bai.rewards.worker_pool import RewardPool

if TYPE_CHECKING:
    from megatron_bai.data.task import Task


def per_sample(
    function: Callable[..., float],
) -> Callable[[config.PerSample, Task, Path], AbstractContextManager[Scorer]]:
    """Make the `open` of a `Reward` whose settings are a `config.PerSample`.

    Args:
        function: `(prompt, response, answer, extra, settings) → a number`, where a module has it under its own name.
            Prompt and response are texts, `extra` is a dict of the row's other columns, and settings have those of the
            dataclass as attributes.
    """
    function_path = f"{function.__module__}:{function.__qualname__}"

    def start(settings: config.PerSample, task: Task, log: Path) -> AbstractContextManager[Scorer]:
        return worker_scorer(function_path, settings, asdict(settings), log)

    return start


@contextmanager
def worker_scorer(
    function: str, settings: config.PerSample, worker_settings: dict[str, Any] | None, log: Path
) -> Iterator[Scorer]:
    """Open a scorer that calls `module:function` in worker processes.

    Args:
        function: `module:function`.
        settings: numbers of workers and seconds.
        worker_settings: what the function takes as its last argument; None: nothing.
        log: a file for what the function prints.
    """
    with RewardPool(function, worker_settings, settings.workers, settings.timeout_s, log) as pool:
        yield SampleScorer(lambda item: pool.submit_score(_arguments(item)))


def _arguments(item: Item) -> list[Any]:
    prompt = item.prompt
    return [prompt.text, item.response, prompt.answer, prompt.extra]


def require_package(module: str, extra: str, reward: str) -> None:
    """Raise a UserError with pip's line unless a module of an optional package can be found.

    Args:
        module: a top-level module, by the name it is imported by.
        extra: the optional dependency of `megatron-bai` that brings it.
        reward: name of the reward that needs it.
    """
    if importlib.util.find_spec(module) is None:
        raise UserError(f"reward={reward} needs a package that is missing: pip install 'megatron-bai[{extra}]'")
