"""Requests to a running run by signals: SIGUSR1 for a checkpoint; SIGTERM or SIGHUP to end the step, save and stop.

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

from megatron_bai.utils.stop_signals import drop_lost_output, stop_signals

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SignalActions:
    """What was requested of any rank since the last step.

    Attributes:
        save: a checkpoint.
        stop: the signal that asks for the end of the run, after a checkpoint; 0: none does.
    """

    save: bool
    stop: int

    @property
    def exit_code(self) -> int:
        """The exit code of a run that `stop` ends."""
        return 128 + self.stop


class SignalRequests:
    """The requests to this rank. They are counted: one that comes while another is being handled is not lost."""

    def __init__(self, grace_s: float):
        self._grace_s = grace_s
        self._saves = self._handled = 0
        self._stop = 0

    def agree(self, device: torch.device) -> SignalActions:
        """Return what was requested of any rank since the last call. Collective."""
        saves, self._handled = self._saves - self._handled, self._saves
        requested = torch.tensor([saves, self._stop], device=device)
        dist.all_reduce(requested, op=dist.ReduceOp.MAX)
        stop = int(requested[1])
        return SignalActions(save=bool(requested[0]) or bool(stop), stop=stop)

    def _on_save_requested(self, number: int, frame: FrameType | None) -> None:
        """Record SIGUSR1."""
        self._saves += 1

    def _on_stop_requested(self, number: int, frame: FrameType | None) -> None:
        """Record the signal, once: Slurm sends it to a rank and to torchrun, which sends it to the rank again."""
        if number == signal.SIGHUP:
            drop_lost_output()
        if not self._stop:
            self._stop = number
            signal.setitimer(signal.ITIMER_REAL, self._grace_s)

    def _on_grace_expired(self, number: int, frame: FrameType | None) -> None:
        """End the run by an exception, so that the server is stopped and files are closed."""
        name = signal.Signals(self._stop).name
        _log.error("stopped within a step, %g s after %s (trainer.grace_s): it is not saved", self._grace_s, name)
        raise SystemExit(128 + self._stop)


@contextmanager
def handle_signals(grace_s: float) -> Iterator[SignalRequests]:
    """Record SIGUSR1 and the signals that stop while the block runs, in the process's main thread.

    Args:
        grace_s: `trainer.grace_s`, seconds from SIGTERM or SIGHUP to the end of the step; 0 leaves their handlers
            unchanged.

    Yields:
        The recorded requests.
    """
    requests = SignalRequests(grace_s)
    handlers = {signal.SIGUSR1: requests._on_save_requested}
    if grace_s > 0:
        handlers |= dict.fromkeys(stop_signals(), requests._on_stop_requested)
        handlers[signal.SIGALRM] = requests._on_grace_expired
    previous_handlers = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield requests
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
