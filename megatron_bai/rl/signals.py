"""Requests to a running run by signals: SIGUSR1 for a checkpoint; SIGTERM to end the step, save and stop.

A signal may reach one rank or all, and each at the end of another step. So a rank only records it, and at the end of a
step the ranks agree: what was requested of one, all do, after the same step.
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
STOPPED = 128 + signal.SIGTERM  # exit code of a run that SIGTERM stopped


@dataclass(frozen=True)
class SignalActions:
    """What was requested of any rank since the last step.

    Attributes:
        save: a checkpoint.
        stop: the end of the run, after a checkpoint.
    """

    save: bool
    stop: bool


class SignalRequests:
    """The requests to this rank. They are counted: one that comes while another is being handled is not lost."""

    def __init__(self, grace_s: float):
        self._grace_s = grace_s
        self._saves = self._handled = 0
        self._stop = False

    def agree(self, device: torch.device) -> SignalActions:
        """Return what was requested of any rank since the last call. Collective."""
        saves, self._handled = self._saves - self._handled, self._saves
        requested = torch.tensor([saves, int(self._stop)], device=device)
        dist.all_reduce(requested, op=dist.ReduceOp.MAX)
        stop = bool(requested[1])
        return SignalActions(save=bool(requested[0]) or stop, stop=stop)

    def _on_save_requested(self, number: int, frame: FrameType | None) -> None:
        """Record SIGUSR1."""
        self._saves += 1

    def _on_stop_requested(self, number: int, frame: FrameType | None) -> None:
        """Record SIGTERM, once: Slurm sends it to a rank and to torchrun, which sends it to the rank again."""
        if not self._stop:
            self._stop = True
            signal.setitimer(signal.ITIMER_REAL, self._grace_s)

    def _on_grace_expired(self, number: int, frame: FrameType | None) -> None:
        """End the run by an exception, so that the server is stopped and files are closed."""
        _log.error("stopped within a step, %g s after SIGTERM (trainer.grace_s): it is not saved", self._grace_s)
        raise SystemExit(STOPPED)


@contextmanager
def handle_signals(grace_s: float) -> Iterator[SignalRequests]:
    """Record SIGUSR1 and SIGTERM while the block runs, in the process's main thread.

    Args:
        grace_s: `trainer.grace_s`, seconds from SIGTERM to the end of the step; 0 leaves SIGTERM's handler unchanged.

    Yields:
        The recorded requests.
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
