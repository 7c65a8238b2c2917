"""Defaults of dataclasses, and hashes that a field with a default does not change."""

from collections.abc import Container, Mapping
from dataclasses import MISSING, fields
from typing import Any


def read_defaults(kind: type) -> dict[str, Any]:
    """Return the default of every field of a dataclass that has one."""
    factories = {field.name: field.default_factory for field in fields(kind) if field.default_factory is not MISSING}
    plain = {field.name: field.default for field in fields(kind) if field.default is not MISSING}
    return plain | {name: factory() for name, factory in factories.items()}


def drop_later_defaults(values: Mapping[str, Any], kind: type, original: Container[str]) -> dict[str, Any]:
    """Drop the fields that a dataclass got later and that have their default.

    A hash of what remains is the one that a release without these fields computes.

    Args:
        values: by the fields' names; other names stay.
        kind: the dataclass.
        original: the fields that the first hashes were computed of.
    """
    defaults = read_defaults(kind)
    return {
        name: value
        for name, value in values.items()
        if name in original or name not in defaults or value != defaults[name]
    }
