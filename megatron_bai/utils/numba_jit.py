"""Loops compiled by Numba, once for an installation."""

from collections.abc import Callable
from typing import Any

from numba import njit


def jit_compile(signature: Any, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: compile a function for these types as its module is imported. It lets go of Python's lock.

    The result is kept beside the function's file, or where Numba may not write there in the user's cache.

    Args:
        signature: Numba's.
        options: more of Numba's, as `fastmath`.
    """

    def compile_(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            fast: Callable[..., Any] = njit(signature, nogil=True, cache=True, **options)(function)
        except RuntimeError:  # Numba may write nowhere: then every process compiles for itself, in seconds
            fast = njit(signature, nogil=True, **options)(function)
        return fast

    return compile_
