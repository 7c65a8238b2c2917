"""A metric's level and noise, estimated from the run alone and robust against single outliers."""

from collections import deque
from itertools import pairwise
from statistics import median
from typing import Any

_TRIM = 0.9  # the noise is estimated from this share of the differences, the smallest
_TRIMMED_MEAN = 0.6574  # mean of the smallest 0.9 of |z|, z standard normal: (φ(0) − φ(1.6449)) · 2 / 0.9
_NORMAL = 1.4826  # standard deviation of normal values over the median of their absolute values
_MEDIAN_ERROR = 1.2533  # standard error of a median over that of a mean, of normal noise: √(π/2)


class MetricTrack:
    """The last values of a metric, and its levels.

    A *level* is the median of `window` consecutive values, and its step is that of the middle one.

    Attributes:
        levels: (step, level), at most `horizon` of them, the last one newest.
    """

    def __init__(self, window: int, horizon: int):
        self.window = window
        self._values: deque[tuple[int, float]] = deque(maxlen=horizon + window)
        self.levels: deque[tuple[int, float]] = deque(maxlen=horizon)

    def add(self, step: int, value: float) -> None:
        """Add the metric's value of a step, and a level once there are enough values.

        Args:
            step: global step.
            value: finite; levels are in its unit.
        """
        self._values.append((step, value))
        if len(self._values) >= self.window:
            last = list(self._values)[-self.window :]
            self.levels.append((last[self.window // 2][0], median(value for _, value in last)))

    def standard_error(self, floor: float) -> float:
        """Estimate the standard error of the difference of two levels that share no value.

        It is the larger of two estimates. The first takes noise as independent from step to step, from the
        differences of neighbouring values, which exclude the trend, without the largest tenth, which are outliers; it
        is at least `floor` a value. The second is the median deviation of the change between neighbouring levels that
        share no value from its own median, which is the trend: it includes correlated noise, but needs more steps.
        """
        steps = sorted(abs(after - before) for (_, before), (_, after) in pairwise(self._values))
        smallest = steps[: max(1, int(len(steps) * _TRIM))]
        noise = sum(smallest) / len(smallest) / _TRIMMED_MEAN / 2**0.5 if smallest else 0.0
        independent: float = max(noise, floor) * _MEDIAN_ERROR * (2 / self.window) ** 0.5
        levels = [level for _, level in self.levels]
        changes = [after - before for before, after in zip(levels, levels[self.window :], strict=False)]
        if not changes:
            return independent
        trend = median(changes)
        correlated: float = _NORMAL * median(abs(change - trend) for change in changes)
        return max(independent, correlated)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs, as JSON values."""
        return {"values": [list(pair) for pair in self._values], "levels": [list(pair) for pair in self.levels]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._values.clear()
        self._values.extend((step, value) for step, value in state["values"])
        self.levels.clear()
        self.levels.extend((step, level) for step, level in state["levels"])
