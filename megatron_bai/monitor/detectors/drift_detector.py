"""Detection of drift: a metric falls or rises from its own baseline by more than a factor within a horizon."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_bai.monitor.detectors.alarm import Alarm
from megatron_bai.monitor.detectors.metric_track import MetricTrack

_BEGUN = 0.25  # the share of the change that raises an alarm (in logarithms) from which on it has begun: beyond noise


@dataclass(frozen=True)
class DriftRule:
    """The metric and the thresholds of a drift detector.

    Attributes:
        detector: its name in `monitor.actions`.
        metric: the metric it reads.
        factor: level over baseline that raises the alarm: below 1 a fall, above 1 a rise.
        advice: printed with the alarm.
        action: warn, checkpoint or stop.
        floor: added to the metric, so that a rise from almost 0 raises no alarm.
        count_metric: of a metric that is a share, the metric that holds the number it is a share of. Its noise is at
            least that of counting, which is invisible in a run that has seen hardly any.
    """

    detector: str
    metric: str
    factor: float
    advice: str
    action: str
    floor: float = 0.0
    count_metric: str = ""


class DriftDetector:
    """Compares the newest level with the baseline: the best level of the horizon that shares no value with it.

    An alarm needs a change by `rule.factor` and by `deviations` of its standard errors (on a logarithmic scale), and
    that `is_harmless`, if given, is false of the step at which the change began. The next one needs the change to
    shrink below half of it (in logarithms) first: by recovery, or because the horizon has passed and the new level is
    the baseline.
    """

    def __init__(
        self,
        rule: DriftRule,
        smooth: int,
        horizon: int,
        deviations: float,
        is_harmless: Callable[[int], bool] | None = None,
    ):
        self.rule, self.deviations, self._is_harmless = rule, deviations, is_harmless
        self._sign = 1.0 if rule.factor > 1 else -1.0
        self._needed = abs(math.log(rule.factor))
        self._track = MetricTrack(smooth, horizon)
        self._alarmed = False

    def step(self, step: int, values: dict[str, Any]) -> list[Alarm]:
        """Add a step's metrics and return an alarm, or none; a step without the metric is ignored.

        Args:
            step: global step.
            values: the step's metrics by name; a value of `rule.metric` that is None, not finite, or at most
                −`rule.floor` is ignored, too.
        """
        value = values.get(self.rule.metric)
        if value is None or not math.isfinite(value) or value + self.rule.floor <= 0:
            return []
        track = self._track
        track.add(step, self._sign * math.log(value + self.rule.floor))
        if len(track.levels) <= track.window:
            return []
        since, base = min(list(track.levels)[: -track.window], key=lambda pair: pair[1])
        level = track.levels[-1][1]
        change = level - base
        if self._alarmed or change < self._needed:
            self._alarmed = self._alarmed and change >= self._needed / 2
            return []
        deviations_seen = change / track.standard_error(
            floor=max(self._needed / 50, self._counting_noise(self._metric(level), values))
        )
        if deviations_seen < self.deviations:
            return []
        if self._is_harmless is not None and self._is_harmless(self._find_begin(base)):
            return []
        self._alarmed = True
        return [self._alarm(step, since, self._metric(base), self._metric(level), deviations_seen)]

    def _find_begin(self, base: float) -> int:
        """Return the step at which the change began: the last with less than a quarter of what raises an alarm."""
        return next(s for s, level in reversed(self._track.levels) if level - base < self._needed * _BEGUN)

    def _counting_noise(self, share: float, values: dict[str, Any]) -> float:
        """Compute the binomial standard deviation of log(share + floor), with at least one count in the step."""
        count = values.get(self.rule.count_metric)
        if not count:
            return 0.0
        share = max(share, 1 / count)
        return math.sqrt(share / count) / (share + self.rule.floor)

    def _metric(self, level: float) -> float:
        value = math.exp(self._sign * level) - self.rule.floor
        return value if value > 1e-9 * self.rule.floor else 0.0  # the remainder of the floor is rounding

    def _alarm(self, step: int, since: int, base: float, level: float, deviations_seen: float) -> Alarm:
        rule = self.rule
        if rule.factor < 1:
            change = f"fell by {1 - level / base:.0%}"
        else:
            change = f"rose to {level / base:.1f} times" if base > rule.floor else "rose"
        evidence = f"{rule.metric} {change}, from {base:.3g} (step {since}) to {level:.3g}"
        facts = {"baseline": base, "level": level}
        return Alarm(
            step, rule.detector, rule.metric, deviations_seen, evidence, rule.advice, since, rule.action, facts
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs, as JSON values."""
        return {"track": self._track.state_dict(), "alarmed": self._alarmed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._track.load_state_dict(state["track"])
        self._alarmed = state["alarmed"]
