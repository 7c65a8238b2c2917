"""A metric that leaves its own baseline: falls or rises by more than a factor within a horizon."""

import math
from dataclasses import dataclass
from typing import Any

from megatron_bai.monitor.detectors.alarm import Alarm
from megatron_bai.monitor.detectors.metric_track import MetricTrack


@dataclass(frozen=True)
class DriftRule:
    """What to watch.

    Attributes:
        factor: the level over its baseline that is too much: below 1 a fall, above 1 a rise.
        floor: of the metric: a value x counts as x + floor, so that a rise from next to nothing is none.
        count_metric: for a metric that is a share, the metric with the number of which it is one: its noise is at least that
            of counting, which a run in which hardly any were seen does not show.
    """

    detector: str
    metric: str
    factor: float
    advice: str
    action: str
    floor: float = 0.0
    count_metric: str = ""


class DriftDetector:
    """Compares the newest level with the baseline: the best level among those of the horizon that share no value with it.

    An alarm needs a change by `rule.factor` and by `deviations` of its standard errors (on a logarithmic scale). The
    next one needs the change to shrink below half of it (in logarithms) first: by recovery, or because the horizon has
    passed and the new level is the baseline.
    """

    def __init__(self, rule: DriftRule, smooth: int, horizon: int, deviations: float):
        self.rule, self.deviations = rule, deviations
        self._sign = 1.0 if rule.factor > 1 else -1.0
        self._needed = abs(math.log(rule.factor))
        self._track = MetricTrack(smooth, horizon)
        self._alarmed = False

    def step(self, step: int, values: dict[str, Any]) -> list[Alarm]:
        """The step's metrics in, an alarm or none out; a step without the metric is passed over."""
        value = values.get(self.rule.metric)
        if value is None or not math.isfinite(value) or value + self.rule.floor <= 0:
            return []
        track = self._track
        track.add(step, self._sign * math.log(value + self.rule.floor))
        if len(track.levels) <= track.smooth:
            return []
        since, base = min(list(track.levels)[: -track.smooth], key=lambda pair: pair[1])
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
        self._alarmed = True
        return [self._alarm(step, since, self._metric(base), self._metric(level), deviations_seen)]

    def _counting_noise(self, share: float, values: dict[str, Any]) -> float:
        """Standard deviation of log(share + floor), binomial, of at least one in the step."""
        count = values.get(self.rule.count_metric)
        if not count:
            return 0.0
        share = max(share, 1 / count)
        return math.sqrt(share / count) / (share + self.rule.floor)

    def _metric(self, level: float) -> float:
        value = math.exp(self._sign * level) - self.rule.floor
        return value if value > 1e-9 * self.rule.floor else 0.0  # what is left of the floor is rounding

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
        """All it knows, JSON."""
        return {"track": self._track.state_dict(), "alarmed": self._alarmed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._track.load_state_dict(state["track"])
        self._alarmed = state["alarmed"]
