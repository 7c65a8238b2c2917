"""Parse JSON from files that may be damaged or hostile."""

import json
from pathlib import Path
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


def read_bounded(file: Path, max_bytes: int) -> bytes:
    """Return the bytes of a file that another tool may have written, if they are not too many.

    Args:
        file: to read.
        max_bytes: it may have.

    Raises:
        OSError: there is no file, or it cannot be read.
        ValueError: it is larger.
    """
    with open(file, "rb") as stream:
        data = stream.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"it has more than {max_bytes:,} bytes")
    return data


def _make_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object's pairs as a dict, unless a key stands twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return found
