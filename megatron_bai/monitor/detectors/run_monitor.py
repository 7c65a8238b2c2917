"""`Monitor`, all detectors of a run: it takes every step's metrics and returns alarms."""

from typing import Any

from megatron_bai import config
from megatron_bai.config.limits import validate_group
from megatron_bai.errors import UserError
from megatron_bai.monitor.detectors import hockey_stick
from megatron_bai.monitor.detectors.alarm import ACTIONS, Alarm
from megatron_bai.monitor.detectors.drift_detector import DriftDetector, DriftRule
from megatron_bai.monitor.detectors.held_out import HeldOutScores
from megatron_bai.monitor.detectors.hockey_stick import HockeyStickDetector
from megatron_bai.monitor.metrics.metric_names import REWARD_PREFIX, TOKENS_METRIC

_ADVICE = {
    "length_collapse": (
        "arXiv 2509.00309 saw it in RL from a reasoning checkpoint alone, without recovery, and removes it by starting "
        "from a merge (BAI, α about 0.5): go back to a checkpoint before the fall, or start from a merge"
    ),
    "discrepancy_divergence": (
        "the engines drift apart: replay routes, R2 at 2 updates a step and R3 at more (arXiv 2512.01374; R3: arXiv "
        "2510.11370), keep objective.train_infer_is and clipping on, or serve in the training precision"
    ),
    "entropy_collapse": (
        "in arXiv 2512.01374 it goes with a missing training–inference correction: keep objective.train_infer_is on, "
        "and clipping with replay where a step has several updates"
    ),
    "router_drift": (
        "routing changes faster than before: replay routes, R3 where a step has more than 2 updates (arXiv "
        "2512.01374), or make fewer updates a step"
    ),
}
DETECTORS = (*_ADVICE, hockey_stick.DETECTOR)
# A KL of 1e-4 nats is well below that of any engine pair in arXiv 2510.11370 (6.4e-4 and more), an F(2) of 1e-3 a
# hundredth of what it calls failing, and a route mismatch of 0.01 a tenth of what it finds: floors of what can rise.
_KL_FLOOR, _F_FLOOR, _MISMATCH_FLOOR = 1e-4, 1e-3, 1e-2


class Monitor:
    """All detectors of a run.

    Its state is the same on every rank, as the metrics are, so that all ranks act alike.
    """

    def __init__(self, settings: config.Monitor):
        self.settings = settings
        shape = settings.smooth, settings.horizon, settings.deviations
        self._held_out = HeldOutScores(settings.horizon)
        harmless = {"entropy_collapse": self._held_out.has_learned}  # entropy falls in every run that learns
        rules = _drift_rules(settings)
        self._drifts = [DriftDetector(rule, *shape, is_harmless=harmless.get(rule.detector)) for rule in rules]
        self._hockey_sticks: dict[str, HockeyStickDetector] = {}  # by low end of the bucket, as text: JSON's only keys

    def step(self, values: dict[str, Any]) -> list[Alarm]:
        """Return the alarms of a step, the most drastic action first.

        Args:
            values: the step's metrics by name, with `step`. A detector whose metric is missing or not finite
                ignores the step.
        """
        step = int(values["step"])
        self._held_out.add(step, values)
        for name in values:
            if name.startswith(REWARD_PREFIX):
                self._detector_of_bucket(name.removeprefix(REWARD_PREFIX))
        detectors: list[DriftDetector | HockeyStickDetector] = [*self._drifts, *self._hockey_sticks.values()]
        alarms = [alarm for detector in detectors for alarm in detector.step(step, values)]
        return sorted(alarms, key=lambda alarm: -ACTIONS.index(alarm.action))

    def _detector_of_bucket(self, low: str) -> HockeyStickDetector:
        if low not in self._hockey_sticks:
            s = self.settings
            self._hockey_sticks[low] = HockeyStickDetector(
                low=int(low), bucket=s.bucket, action=_action(s, hockey_stick.DETECTOR), smooth=s.reward_smooth,
                horizon=s.horizon, drop=s.reward_drop, recovery=s.reward_recovery, responses=s.reward_responses,
                deviations=s.deviations,
            )  # fmt: skip
        return self._hockey_sticks[low]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all detectors, the same on every rank, as JSON values."""
        drifts = {f"{d.rule.detector} {d.rule.metric}": d.state_dict() for d in self._drifts}
        sticks = {low: stick.state_dict() for low, stick in self._hockey_sticks.items()}
        held_out = self._held_out.state_dict()
        return {"drifts": drifts, "held_out": held_out, "bucket": self.settings.bucket, "sticks": sticks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state. What it lacks, and buckets of another width, start from none."""
        self._held_out.load_state_dict(state.get("held_out", []))
        for drift in self._drifts:
            if saved := state["drifts"].get(f"{drift.rule.detector} {drift.rule.metric}"):
                drift.load_state_dict(saved)
        for low, saved in state["sticks"].items() if state["bucket"] == self.settings.bucket else ():
            self._detector_of_bucket(low).load_state_dict(saved)

    state, restore = state_dict, load_state_dict  # the names that earlier releases documented


def required_action(values: dict[str, Any]) -> str:
    """Return the most drastic action that the alarms of a step's record ask for; warn for none."""
    actions = [alarm["action"] for alarm in values.get("alarms", ())]
    return max(actions, key=ACTIONS.index, default="warn")


def _drift_rules(s: config.Monitor) -> list[DriftRule]:
    rows = [
        ("length_collapse", "response_length_mean", 1 - s.length_fall, 0.0, ""),
        ("discrepancy_divergence", "kl_k3", s.discrepancy_rise, _KL_FLOOR, ""),
        ("discrepancy_divergence", "f_2", s.discrepancy_rise, _F_FLOOR, TOKENS_METRIC),
        ("entropy_collapse", "entropy", 1 - s.entropy_fall, 0.0, ""),
        ("router_drift", "route_mismatch", s.router_rise, _MISMATCH_FLOOR, TOKENS_METRIC),
        ("router_drift", "experts_effective", 1 - s.experts_fall, 0.0, ""),
    ]
    return [
        DriftRule(detector, metric, factor, _ADVICE[detector], _action(s, detector), floor, count_metric)
        for detector, metric, factor, floor, count_metric in rows
    ]


def _action(settings: config.Monitor, detector: str) -> str:
    return settings.actions.get(detector, "warn")


def validate(settings: config.Monitor) -> None:
    """Refuse settings that no detector can work with.

    Raises:
        UserError: names the setting.
    """
    validate_group("monitor", settings)
    if settings.horizon <= max(settings.smooth, settings.reward_smooth):
        raise UserError(f"monitor.horizon is {settings.horizon}: it must be above monitor.smooth and reward_smooth")
