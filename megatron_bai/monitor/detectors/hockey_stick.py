"""The reward hockey stick (arXiv 2509.00309): reward drops, bottoms out and recovers, per length bucket."""

import math
from typing import Any

from megatron_bai.monitor.detectors.alarm import Alarm
from megatron_bai.monitor.detectors.metric_track import MetricTrack
from megatron_bai.monitor.metrics.metric_names import COUNT_PREFIX, REWARD_PREFIX

DETECTOR = "reward_hockey_stick"
_DROP_ADVICE = (
    "arXiv 2509.00309 lays it to the reasoning checkpoint RL starts from and starts from a merge with the pretrained "
    "and instruction-tuned ones (BAI, balanced ratios) instead"
)
_RECOVERY_ADVICE = (
    "the final reward does not show it (arXiv 2509.00309): compare lengths and held-out accuracy with a run from a "
    "merge"
)


class HockeyStickDetector:
    """Detects the drop and the recovery of the reward of one length bucket.

    Rewards are pooled until there are `responses` of them in the bucket: the noise of a pool is then alike from pool to
    pool, and a level is the median of `smooth` pools. The *peak* is the best level so far. A level `drop` below it, and
    by `deviations` standard errors, is the first alarm. The *trough* is the worst level from there on; the *recovery*,
    and second alarm, the first level that has made up the share `recovery` of the *depth*, peak − trough. The search
    for the next drop begins there.
    """

    def __init__(
        self, low: int, bucket: int, action: str, smooth: int, horizon: int, drop: float, recovery: float,
        responses: int, deviations: float,
    ):  # fmt: skip
        self.metric, self._counts = f"{REWARD_PREFIX}{low}", f"{COUNT_PREFIX}{low}"
        self._where = f"reward of responses of {low} to {low + bucket - 1} tokens"
        self.action, self.drop, self.recovery, self.deviations = action, drop, recovery, deviations
        self.responses = responses
        self._track = MetricTrack(smooth, horizon)
        self._pool = [0.0, 0.0]  # sum of rewards, responses
        self._peak: tuple[int, float] | None = None
        self._trough: tuple[int, float] | None = None  # None: no drop is under way
        self._deviations = 0.0

    def step(self, step: int, values: dict[str, Any]) -> list[Alarm]:
        """Add a step's metrics and return an alarm, or none; a step without the bucket is ignored.

        Args:
            step: global step.
            values: the step's metrics by name, of which the bucket's mean reward and number of responses are read; with
                0 responses, or a reward that is not finite, the step is without the bucket.
        """
        reward, count = values.get(self.metric), values.get(self._counts)
        if reward is None or not math.isfinite(reward) or not count:
            return []
        self._pool[0] += reward * count
        self._pool[1] += count
        if self._pool[1] < self.responses:
            return []
        track = self._track
        track.add(step, self._pool[0] / self._pool[1])
        self._pool = [0.0, 0.0]
        if not track.levels:
            return []
        level_step, level = track.levels[-1]
        if self._trough is not None:
            return self._follow_trough(step, level_step, level)
        if self._peak is None or level > self._peak[1]:
            self._peak = level_step, level
        depth = self._peak[1] - level
        if depth < self.drop:
            return []
        self._deviations = depth / track.standard_error(floor=self.drop / 50)
        if self._deviations < self.deviations:
            return []
        self._trough = level_step, level
        evidence = (
            f"{self._where} dropped by {depth:.3g}, from {self._peak[1]:.3g} (step {self._peak[0]}) to {level:.3g}"
        )
        facts = {"depth": depth, "peak_step": self._peak[0], "peak": self._peak[1], "level": level}
        return [self._alarm(step, evidence, _DROP_ADVICE, facts)]

    def _follow_trough(self, step: int, level_step: int, level: float) -> list[Alarm]:
        """Update the trough, and return the second alarm at the recovery."""
        peak, trough = self._peak, self._trough
        assert peak is not None and trough is not None, "a drop is under way"
        if level < trough[1]:
            self._trough = trough = level_step, level
        depth = peak[1] - trough[1]
        self._deviations = max(self._deviations, depth / self._track.standard_error(floor=self.drop / 50))
        if level < trough[1] + self.recovery * depth:
            return []
        evidence = (
            f"{self._where} recovered to {level:.3g} at step {level_step}: {peak[1]:.3g} (step {peak[0]}) to a "
            f"trough of {trough[1]:.3g} (step {trough[0]}), {depth:.3g} deep"
        )
        facts = {
            "depth": depth, "peak_step": peak[0], "peak": peak[1], "trough_step": trough[0], "trough": trough[1],
            "recovery_step": level_step, "level": level,
        }  # fmt: skip
        alarm = self._alarm(step, evidence, _RECOVERY_ADVICE, facts)
        self._peak, self._trough, self._deviations = (level_step, level), None, 0.0
        return [alarm]

    def _alarm(self, step: int, evidence: str, advice: str, facts: dict[str, float]) -> Alarm:
        assert self._peak is not None
        return Alarm(step, DETECTOR, self.metric, self._deviations, evidence, advice, self._peak[0], self.action, facts)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs, as JSON values."""
        pair = {"peak": self._peak, "trough": self._trough}
        extrema = {name: None if value is None else list(value) for name, value in pair.items()}
        return {"track": self._track.state_dict(), "pool": list(self._pool), "sure": self._deviations, **extrema}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._track.load_state_dict(state["track"])
        self._pool, self._deviations = list(state["pool"]), state["sure"]
        self._peak, self._trough = (None if state[k] is None else tuple(state[k]) for k in ("peak", "trough"))
