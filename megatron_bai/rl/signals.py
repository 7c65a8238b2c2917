"""What a run is asked from outside while it works: SIGUSR1, a checkpoint; SIGTERM, to end its step, save and stop.

A signal may reach one rank or all, each in another step's last moment. So a rank only notes it, and at the end of a step
the ranks tell each other: what one was asked, all do, after the same step.
"""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch
import torch.distributed as dist

_log = logging.getLogger(__name__)
STOPPED = 128 + signal.SIGTERM  # exit code of a run that was asked to stop


@dataclass(frozen=True)
class SignalActions:
    """What all ranks have been asked since the last step: a checkpoint, and then an end."""

    save: bool
    stop: bool


class SignalRequests:
    """What this rank was asked. Counts rather than flags: one that comes while another is answered is not lost."""

    def __init__(self, grace_s: float):
        self._grace_s = grace_s
        self._saves = self._answered = 0
        self._stop = False

    def agree(self, device: torch.device) -> SignalActions:
        """What any rank was asked since the last call. Collective over the world."""
        saves, self._answered = self._saves - self._answered, self._saves
        asked = torch.tensor([saves, int(self._stop)], device=device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        stop = bool(asked[1])
        return SignalActions(save=bool(asked[0]) or stop, stop=stop)

    def _on_save_requested(self, number: int, frame: FrameType | None) -> None:
        self._saves += 1

    def _on_stop_requested(self, number: int, frame: FrameType | None) -> None:
        """Once: Slurm tells a rank and torchrun, which tells the rank again."""
        if not self._stop:
            self._stop = True
            signal.setitimer(signal.ITIMER_REAL, self._grace_s)

    def _on_grace_expired(self, number: int, frame: FrameType | None) -> None:
        """Unwinds like an exception, so that the server is stopped and files are closed."""
        _log.error("stopped within a step, %g s after SIGTERM (trainer.grace_s): it is not saved", self._grace_s)
        raise SystemExit(STOPPED)


@contextmanager
def handle_signals(grace_s: float) -> Iterator[SignalRequests]:
    """Note SIGUSR1 and SIGTERM while the block runs, in the process's main thread.

    Args:
        grace_s: `trainer.grace_s`. With 0, SIGTERM does what it did before.
    """
    requests = SignalRequests(grace_s)
    handlers = {signal.SIGUSR1: requests._on_save_requested}
    if grace_s > 0:
        handlers |= {signal.SIGTERM: requests._on_stop_requested, signal.SIGALRM: requests._on_grace_expired}
    previous_handlers = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield requests
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
