"""A line of the doctor's table."""

from dataclasses import dataclass

OK, WITHOUT, FAULT = "ok", "without", "fault"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table.

    Attributes:
        state: `ok`, `without` (something optional is disabled) or `fault` (the main job cannot run).
        note: what it is for or what is disabled, and what to do.
    """

    piece: str
    found: str
    state: str
    note: str = ""
