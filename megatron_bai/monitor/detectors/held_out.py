"""What the evaluations on held-out prompts say of a run: whether it learns while its entropy falls."""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

METRIC_NAMES = ("eval_accuracy", "eval_accuracy_low", "eval_accuracy_high", "eval_best")


class Evaluation(NamedTuple):
    """An evaluation: `accuracy` (avg@n) with half the width of its 95 % interval, and `best` (pass@n)."""

    step: int
    accuracy: float
    half_width: float
    best: float


class HeldOutScores:
    """The last evaluations, as many as a detector may look back on.

    A policy that learns is surer of what is right: its entropy falls while it solves more of the held-out prompts, on
    average and at least once in n samples. One that collapses solves no more, or more on average only, of the prompts
    that it solved already.
    """

    def __init__(self, horizon: int):
        self._evaluations: deque[Evaluation] = deque(maxlen=2 * horizon)

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Add the evaluation of a step; one without an interval, or with a value that is not finite, is ignored.

        Args:
            step: global step.
            values: the step's metrics by name.
        """
        numbers = [values.get(name) for name in METRIC_NAMES]
        finite = [float(number) for number in numbers if number is not None and math.isfinite(number)]
        if len(finite) == len(METRIC_NAMES):
            accuracy, low, high, best = finite
            self._evaluations.append(Evaluation(step, accuracy, (high - low) / 2, best))

    def has_learned(self, since: int) -> bool:
        """Return whether accuracy and pass@n have risen since a step, and half of the gain at least is still there.

        Compares the newest evaluation with the last one up to `since`, or else the first one after it. The accuracy has
        risen where it did by more than half the width of either's 95 % interval: evaluations have the same prompts, so
        their difference varies less than that of independent means. pass@n must have risen, or still be 1.

        Args:
            since: global step at which the change began that may be one of learning.
        """
        later = [evaluation for evaluation in self._evaluations if evaluation.step > since]
        earlier = [evaluation for evaluation in self._evaluations if evaluation.step <= since][-1:]
        compared = [*earlier, *later]
        if not later or len(compared) < 2:
            return False
        first, last = compared[0], compared[-1]
        gain = last.accuracy - first.accuracy
        rose = gain > max(first.half_width, last.half_width)
        kept = gain >= (max(evaluation.accuracy for evaluation in compared) - first.accuracy) / 2
        return rose and kept and (last.best > first.best or last.best == 1)

    def state_dict(self) -> list[list[float]]:
        """Return the state that a resumed run needs, as JSON values."""
        return [list(evaluation) for evaluation in self._evaluations]

    def load_state_dict(self, state: list[list[float]]) -> None:
        """Continue from a saved state."""
        self._evaluations = deque((Evaluation(int(step), *scores) for step, *scores in state), self._evaluations.maxlen)
