"""The types of a reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from megatron_bai import config

if TYPE_CHECKING:  # they bring transformers, which a worker process does not need
    from megatron_bai.data.task import Prompt, Task


@dataclass(frozen=True)
class Item:
    """One response to score.

    Attributes:
        response: text, the end token removed.
        ids: of the response, the end token included.
    """

    prompt: Prompt
    response: str
    ids: Sequence[int]


@dataclass(frozen=True)
class Score:
    """The reward, a finite number; or None, and why."""

    value: float | None
    failure: str = ""


Scorer: TypeAlias = Callable[[list[Item]], list[Score]]


def _nothing(settings: Any) -> None:
    """Refuse nothing."""


@dataclass(frozen=True)
class Reward:
    """A kind of reward.

    Attributes:
        settings: the dataclass of its settings; its `name` is what `reward=NAME` chooses.
        open: `(settings, task, log) → a context manager` whose value scores items. What it cannot score is a `Score`
            without a value; what no item can be scored without is a `UserError`. `log` is a file for what it prints.
        check: refuses its settings by name with a `UserError`.
        require: refuses, likewise, a machine that lacks what it needs: a package. `plan` does not ask for it.
    """

    settings: type[config.Reward]
    open: Callable[[Any, Task, Path], AbstractContextManager[Scorer]]
    check: Callable[[Any], None] = _nothing
    require: Callable[[Any], None] = _nothing
