"""Alarms, which detectors raise, and the actions they ask for."""

from dataclasses import asdict, dataclass
from typing import Any

ACTIONS = ("warn", "checkpoint", "stop")


@dataclass(frozen=True)
class Alarm:
    """A change of a metric for the worse (or, of a hockey stick, its end).

    Attributes:
        step: at which it was noticed.
        detector: its name in `monitor.actions`.
        metric: the metric it was seen in.
        deviations: the change over its own standard error, estimated from the run's noise.
        evidence: what changed, from what and since when, as text.
        advice: of the papers.
        since: the step from which on the metric changed.
        action: warn, checkpoint (the loop saves one) or stop (the loop saves one and ends).
        facts: numbers for programs, such as a hockey stick's depth and steps.
    """

    step: int
    detector: str
    metric: str
    deviations: float
    evidence: str
    advice: str
    since: int
    action: str
    facts: dict[str, float]

    def json(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)

    def __str__(self) -> str:
        name = self.detector.replace("_", " ")
        return f"{name}: {self.evidence}, {self.deviations:.0f} standard errors; {self.advice}"
