"""Loops that Numba compiles, once for an installation."""

import logging
import os
from collections.abc import Callable
from typing import Any

from numba import njit
from numba.core import event

_log = logging.getLogger(__name__)


class _Announcer(event.Listener):  # type: ignore[misc]
    """Says once, on the first rank, that something is compiled: it takes seconds, and not what is shown meanwhile."""

    announced = False

    def on_start(self, event: Any) -> None:
        """Take the event that Numba sends where its cache had nothing."""
        if not self.announced and os.environ.get("RANK", "0") == "0":
            self.announced = True
            _log.info("compiling loops for this machine: seconds, once for an installation")

    def on_end(self, event: Any) -> None:
        """Take the event's end."""


_announcer = _Announcer()


def jit_compile(signature: Any, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile the decorated function for these types as its module is imported. It releases the GIL.

    The result is cached beside the function's file, or in the user's cache where Numba may not write there.

    Args:
        signature: Numba's.
        options: more of Numba's, as `fastmath`.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        with event.install_listener("numba:compile", _announcer):
            try:
                fast: Callable[..., Any] = njit(signature, nogil=True, cache=True, **options)(function)
            except RuntimeError:  # Numba may write nowhere: then every process compiles for itself, in seconds
                fast = njit(signature, nogil=True, **options)(function)
        return fast

    return decorate
