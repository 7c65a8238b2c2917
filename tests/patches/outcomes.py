"""What the two workers print of their checks."""

from collections.abc import Callable


def outcome(check: Callable[[], None]) -> str:
    """Run a check and return what went wrong, "" if nothing did."""
    try:
        check()
        return ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"
