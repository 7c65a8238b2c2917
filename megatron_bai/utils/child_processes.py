"""Child processes that do not outlive their parent, however it ends."""

import ctypes
import os
import signal
import threading
import time
from types import SimpleNamespace

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_POLL_S = 0.5
_forks = SimpleNamespace(hooked=False, enabled=False, parent=0)


def die_with_parent(pid: int, sign: int = signal.SIGKILL) -> None:
    """Have the kernel kill this process when its parent ends; exit now if it already has.

    Precisely: when the thread that started this process ends.

    Args:
        pid: of the parent.
        sign: signal to send.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, sign)
    if os.getppid() != pid:  # it ended before the request was made
        os._exit(1)


def stop_after_parent(grace_s: float) -> None:
    """Send this process SIGTERM once its parent has ended, and SIGKILL where it is still there `grace_s` later.

    Unlike `die_with_parent` it leaves time to stop servers and close files, and a rank that waits in a collective for
    one that is gone is ended, too.

    Args:
        grace_s: seconds, after those that SIGTERM's handler gave the process by a timer (`trainer.grace_s`).
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_S)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_POLL_S)
        while signal.getitimer(signal.ITIMER_REAL)[0]:
            time.sleep(_POLL_S)
        time.sleep(grace_s)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="stop-after-parent", daemon=True).start()


def set_forks_die_with_parent(enabled: bool) -> None:
    """Set whether the kernel kills the processes forked from now on, and those they fork, when their parent ends."""
    if enabled and not _forks.hooked:  # for good: there is no way to unregister
        os.register_at_fork(before=lambda: setattr(_forks, "parent", os.getpid()), after_in_child=_bind_child_to_parent)
        _forks.hooked = True
    _forks.enabled = enabled


def _bind_child_to_parent() -> None:
    """Apply `set_forks_die_with_parent` in a child that was just forked."""
    if _forks.enabled:
        die_with_parent(_forks.parent)
