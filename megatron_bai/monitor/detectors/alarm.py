"""What a detector says."""

from dataclasses import asdict, dataclass
from typing import Any

ACTIONS = ("warn", "checkpoint", "stop")


@dataclass(frozen=True)
class Alarm:
    """One thing that went wrong (or, of a hockey stick, that ended).

    Attributes:
        step: at which it was noticed.
        detector: its name in `monitor.actions`.
        metric: the metric it was seen in.
        deviations: how sure: the change over its own standard error, estimated from the run's noise.
        evidence: what changed, from what, since when, in words.
        advice: what the papers advise.
        since: the step from which the metric changed.
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
        return asdict(self)

    def __str__(self) -> str:
        words = self.detector.replace("_", " ")
        return f"{words}: {self.evidence}, {self.deviations:.0f} standard errors; {self.advice}"
