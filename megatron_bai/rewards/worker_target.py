"""A reward function as worker processes call it."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from megatron_bai.rewards.reward import convert_reward
from megatron_bai.workers.outcomes import UnusableValueError, describe_error, import_attribute


def open_function(name: str, settings: dict[str, Any] | None) -> Callable[..., float]:
    """Return the function `module:function`, with a check of what it returns.

    Args:
        name: of the user's function; it should return a number that `convert_reward` takes.
        settings: what it takes as its last argument, as attributes; None: nothing.

    Raises:
        TypeError: it is no function.
    """
    function = import_attribute(name)
    if not callable(function):
        raise TypeError(f"{name} is a {type(function).__name__} and no function")
    last = [] if settings is None else [SimpleNamespace(**settings)]

    def score(*arguments: Any) -> float:
        value = function(*arguments, *last)
        try:
            return convert_reward(value)
        except ValueError as error:
            raise UnusableValueError(f"it returned {error}") from None
        except BaseException as error:  # of a value that raises when it is looked at
            kind = type(value).__name__
            raise UnusableValueError(f"it returned a {kind} that cannot be read: {describe_error(error)}") from None

    return score
