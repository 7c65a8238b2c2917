"""Nested mappings as one level of dotted names, as settings are compared, recorded and shown."""

from collections.abc import Mapping
from typing import Any


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the leaves of nested mappings by dotted key, as text.

    Files of runs hold what this returns (`settings` of a checkpoint's manifest): a change makes every earlier run
    another one.

    Args:
        tree: settings as `dataclasses.asdict` or YAML gives them.
        prefix: goes before each key.

    Returns:
        Text of each leaf; "" for None. An empty mapping is a leaf, `{}`.
    """
    leaves: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = "" if value is None else str(value)
    return leaves
