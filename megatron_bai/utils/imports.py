"""Import torch and what is built on it quickly."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def gc_disabled_for_imports() -> Iterator[None]:
    """Disable garbage collection in a block that only imports: it takes a third of the time of thousands of modules.

    What the imports leave is hardly ever garbage, so later collections do not look at it again either.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
