"""JSON from files that may be damaged or hostile."""

import json
from typing import Any


def parse(text: str | bytes) -> Any:
    """As `json.loads`, but whatever is wrong is a ValueError, and a key that stands twice is wrong.

    Readers disagree about which of two equal keys counts, so one of them would see another file than we do.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return found
