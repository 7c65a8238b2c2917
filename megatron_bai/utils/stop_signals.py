"""Signals that ask a process to stop: SIGTERM, and SIGHUP, which a closed terminal or a lost ssh connection sends."""

import atexit
import io
import math
import os
import signal
import stat
import sys
import time
from contextlib import suppress
from types import FrameType
from typing import Any

_ECHO_S = 2.0  # within which a second signal is taken for the first one's echo


def stop_signals() -> list[signal.Signals]:
    """Return the signals that stop this process; SIGHUP is none where it is ignored, as under `nohup`."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM] if ignored else [signal.SIGTERM, signal.SIGHUP]


def unwind_at_stop_signals() -> None:
    """Have the signals raise SystemExit(128 + number), so that servers are stopped and files are closed.

    To be called in the main thread. One that comes twice counts once, so that it does not interrupt the clean-up: a
    closed terminal's comes from the kernel and from the shell, Slurm's from it and from torchrun. Once the clean-up is
    done the signals are ignored: Python's last act but one is to give them back their default effect, with which the
    second would replace the exit status.
    """
    last = -math.inf

    def unwind(number: int, frame: FrameType | None) -> None:
        nonlocal last
        if number == signal.SIGHUP:
            drop_lost_output()
        now = time.monotonic()
        if now - last > _ECHO_S:
            last = now
            raise SystemExit(128 + number)

    for number in stop_signals():
        signal.signal(number, unwind)
        atexit.register(signal.signal, number, signal.SIG_IGN)


class _LossyFile(io.FileIO):
    """A file in which what cannot be written is dropped, as if it had been."""

    def write(self, data: "bytes | bytearray | memoryview") -> int:  # type: ignore[override]
        """Write to the descriptor; return the number of bytes given."""
        with suppress(OSError):
            super().write(data)
        return len(data)


def drop_lost_output() -> None:
    """Have this process's output end in nothing where it can no longer be written.

    With a terminal go those that read its pipes: the next line that is printed would raise, and a run that has a grace
    period to save would end unsaved.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        with suppress(OSError, ValueError, AttributeError):  # not a file of this process, such as a test's
            descriptor = stream.fileno()
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                continue
            lossy: Any = _LossyFile(descriptor, "wb", closefd=False)
            text = io.TextIOWrapper(
                io.BufferedWriter(lossy), stream.encoding, stream.errors, line_buffering=True, write_through=True
            )
            setattr(sys, name, text)
