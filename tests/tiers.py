"""Which tier a test is in: marked `long` it is `make test-long`'s, else `make test`'s; tests/README.md says which."""

from collections.abc import Container, Iterable
from typing import Any

import pytest


def tiered(cases: Iterable[Any], quick: Container[Any]) -> list[Any]:
    """Return all cases for `parametrize`; those that are not `quick` are marked `long`."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.long) for case in cases]


def wants_long(session: pytest.Session, fixture: str) -> bool:
    """Return whether a test that was chosen is marked `long` and has the fixture, which then prepares everything."""
    return any(
        item.get_closest_marker("long") and fixture in getattr(item, "fixturenames", ()) for item in session.items
    )
