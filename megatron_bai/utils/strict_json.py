"""Parse JSON from files that may be damaged or hostile."""

import json
from typing import Any


def parse(text: str | bytes) -> Any:
    """Parse JSON as `json.loads` does, but refuse a key that stands twice in an object.

    Readers disagree about which of two equal keys counts, so another one could see other content.

    Raises:
        ValueError: whatever is wrong with the text.
    """
    try:
        return json.loads(text, object_pairs_hook=_make_dict)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _make_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object's pairs as a dict, unless a key stands twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return found
