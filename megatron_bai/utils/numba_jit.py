"""Loops that Numba compiles, once for an installation."""

from collections.abc import Callable
from typing import Any

from numba import njit


def jit_compile(signature: Any, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile the decorated function for these types as its module is imported. It releases the GIL.

    The result is cached beside the function's file, or in the user's cache where Numba may not write there.

    Args:
        signature: Numba's.
        options: more of Numba's, as `fastmath`.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            fast: Callable[..., Any] = njit(signature, nogil=True, cache=True, **options)(function)
        except RuntimeError:  # Numba may write nowhere: then every process compiles for itself, in seconds
            fast = njit(signature, nogil=True, **options)(function)
        return fast

    return decorate
