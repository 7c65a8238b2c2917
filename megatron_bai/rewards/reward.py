"""The types of a reward."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from decimal import Decimal
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from megatron_bai import config
from megatron_bai.workers.outcomes import wait_for_all

if TYPE_CHECKING:  # they bring transformers, which a worker process does not need
    from megatron_bai.data.task import Prompt, Task


@dataclass(frozen=True)
class Item:
    """One response to score.

    Attributes:
        response: text, the end token removed; of a conversation that of the model's last turn.
        ids: of the response, or of the last turn, the end token included.
        messages: the whole conversation, `{"role", "content"}` each, the prompt's messages first.
        environment_reward: sum of the environment's rewards of turns; None where it gave none.
    """

    prompt: Prompt
    response: str
    ids: Sequence[int]
    messages: tuple[dict[str, str], ...] = ()
    environment_reward: float | None = None


@dataclass(frozen=True)
class Score:
    """The reward, a finite number; or None, and why.

    Attributes:
        turn_weight: by which `Item.environment_reward` is in the value: a critic has the share of each turn at its end.
        parts: of a sum, the score of each reward by name, without its weight.
    """

    value: float | None
    failure: str = ""
    turn_weight: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)


def convert_reward(value: Any) -> float:
    """Return a reward as a float: of a real number, also a `Decimal`, or a numpy or torch scalar, that float32 holds.

    Args:
        value: what a reward returned. A text that looks like a number is a mistake, too.

    Raises:
        ValueError: it is no such number; the message begins with the value.
    """
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, Real | Decimal):
        raise ValueError(f"{_shorten(value)}, a {type(value).__name__}")
    try:
        number = float(value)
        if math.isfinite(number):
            struct.pack("<f", number)
    except OverflowError:
        raise ValueError(f"{_shorten(value)}, which is too large for a reward, a float32 (up to 3.4e38)") from None
    except ValueError:  # a signalling NaN
        raise ValueError(_shorten(value)) from None
    if not math.isfinite(number):
        raise ValueError(_shorten(number))
    return number


def _shorten(value: Any) -> str:
    """Return the `repr` of a value in one line of at most 120 characters that any file can hold."""
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python writes
        text = f"a number of {value.bit_length()} bits" if isinstance(value, int) else "a value without a repr"
    text = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
    return text if len(text) <= 120 else f"{text[:100]}…"


Scorer: TypeAlias = Callable[[list[Item]], list[Score]]


class SampleScorer:
    """A `Scorer` that also scores a response by itself, as soon as it ends and while others are sampled.

    One of lists alone is called once they have all ended: it may compare them.

    Args:
        submit: starts the score of one item. It returns at once, and may be called where an event loop runs.
    """

    def __init__(self, submit: Callable[[Item], Future[Score]]):
        self.submit = submit

    def __call__(self, items: list[Item]) -> list[Score]:
        """Return the score of each item, in their order."""
        return wait_for_all([self.submit(item) for item in items])


def _nothing(settings: Any) -> None:
    """Refuse nothing."""


@dataclass(frozen=True)
class Reward:
    """A kind of reward.

    Attributes:
        settings: the dataclass of its settings; its `name` is what `reward=NAME` chooses.
        open: `(settings, task, log) → a context manager` whose value scores items, a `SampleScorer` each as it ends.
            What it cannot score is a `Score` without a value; what no item can be scored without is a `UserError`.
            `log` is a file for what it prints.
        check: refuses its settings by name with a `UserError`.
        require: refuses, likewise, a machine that lacks what it needs: a package. `plan` does not ask for it.
    """

    settings: type[config.Reward]
    open: Callable[[Any, Task, Path], AbstractContextManager[Scorer]]
    check: Callable[[Any], None] = _nothing
    require: Callable[[Any], None] = _nothing
