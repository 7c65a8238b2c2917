"""Time the phases of a step."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class StepTimer:
    """Seconds of a step by phase."""

    def __init__(self, on_phase: Callable[[str], None] | None = None) -> None:
        """Begin a step.

        Args:
            on_phase: called with each phase's name as it begins.
        """
        self._on_phase = on_phase
        self._began = time.monotonic()
        self._phases: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time the block as `phase`."""
        if self._on_phase:
            self._on_phase(phase)
        began = time.monotonic()
        yield
        self._phases[phase] = time.monotonic() - began

    def metrics(self, tokens: int) -> dict[str, float]:
        """Return `seconds_PHASE`, `seconds_step`, and `tokens_per_second` of the whole step."""
        total = time.monotonic() - self._began
        phases = {f"seconds_{phase}": seconds for phase, seconds in self._phases.items()}
        return {**phases, "seconds_step": total, "tokens_per_second": tokens / total}
