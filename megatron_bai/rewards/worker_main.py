"""Run `python -m megatron_bai.rewards.worker_main PARENT FUNCTION SETTINGS`: call a reward function, sample by sample.

Reads a JSON list of arguments a line, answers each with a line `{"value": …}` or `{"failure": …}`, after a first line
that says whether the function was found. What the function prints goes to the log.
"""

import importlib
import json
import math
import os
import sys
from collections.abc import Callable
from numbers import Real
from types import SimpleNamespace
from typing import Any

from megatron_bai.utils.child_processes import die_with_parent


def import_function(name: str) -> Callable[..., Any]:
    """Import `module:function`."""
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"{name} is a {type(found).__name__} and no function")
    function: Callable[..., Any] = found
    return function


def call_function(function: Callable[..., Any], arguments: list[Any]) -> dict[str, Any]:
    """Return the reward of one sample, or what is wrong with it.

    Args:
        function: of the user; it should return a finite real number.
        arguments: positional: prompt, response, answer, extra, and settings where the reward has them.

    Returns:
        `{"value": float}`; or `{"failure": reason}` where it raised, or returned something else.
    """
    try:
        value = function(*arguments)
    except (Exception, SystemExit) as error:
        return {"failure": f"{type(error).__name__}: {error}"[:300]}
    if not isinstance(value, Real):  # a text that looks like a number is a mistake, too
        return {"failure": f"it returned {value!r}, a {type(value).__name__}"[:300]}
    if not math.isfinite(value):
        return {"failure": f"it returned {value}"}
    return {"value": float(value)}


def main() -> None:
    """Answer samples from standard input until it ends."""
    parent, name, settings = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    die_with_parent(parent)
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def reply(content: dict[str, Any]) -> None:
        sys.stdout.flush()  # what the function printed: this process may be killed at any time after
        replies.write(json.dumps(content) + "\n")
        replies.flush()

    try:
        function = import_function(name)
    except (Exception, SystemExit) as error:
        reply({"failure": f"{type(error).__name__}: {error}"[:300]})
        return
    reply({"value": 0.0})
    last = [] if settings is None else [SimpleNamespace(**settings)]
    for line in sys.stdin:
        reply(call_function(function, [*json.loads(line), *last]))


if __name__ == "__main__":
    main()
