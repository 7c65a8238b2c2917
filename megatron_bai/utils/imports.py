"""Importing torch and what is built on it, quickly."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collections() -> Iterator[None]:
    """Collect no garbage in the block, which only imports: a third of the time of thousands of modules otherwise.

    What they leave is hardly ever garbage, so later collections do not look at it again either.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
