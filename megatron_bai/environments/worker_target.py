"""An environment as worker processes call it."""

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from megatron_bai.environments.environment import JSON, Conversation, Reply, parse_reply
from megatron_bai.workers.outcomes import Target, UnusableValueError, import_attribute


def make_target(name: str, settings: dict[str, JSON] | None) -> Target:
    """Return what a pool calls with `[Conversation.to_json()]` and whose outcome's value `parse_reply` reads.

    Args:
        name: of the class, `module:Class` or `./path.py:Class`.
        settings: that it is constructed with, as attributes, where it takes an argument; None: nothing.
    """
    opener = "megatron_bai.environments.worker_target:open_environment"
    return Target(opener, name, settings, f"the environment {name}", "env.timeout_s")


def open_environment(name: str, settings: dict[str, JSON] | None) -> Callable[[dict[str, JSON]], dict[str, JSON]]:
    """Construct the environment, and return a function of a conversation's JSON that returns its reply's.

    Args:
        name: as in `make_target`.
        settings: likewise.

    Raises:
        TypeError: it is no class with a method `respond`.
    """
    kind = import_attribute(name)
    if not isinstance(kind, type) or not callable(getattr(kind, "respond", None)):
        raise TypeError(f"{name} is a {type(kind).__name__} and no class with a method respond(conversation)")
    takes_settings = settings is not None and bool(inspect.signature(kind).parameters)
    environment: Any = kind(SimpleNamespace(**settings or {})) if takes_settings else kind()

    def respond(values: dict[str, JSON]) -> dict[str, JSON]:
        reply = environment.respond(Conversation.from_json(values))
        if not isinstance(reply, Reply):
            raise UnusableValueError(f"it returned a {type(reply).__name__}, no Reply")
        try:
            return parse_reply(reply.to_json()).to_json()
        except ValueError as error:
            raise UnusableValueError(f"it returned a Reply: {error}") from None

    return respond
