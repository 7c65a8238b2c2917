"""Tell numbers apart in what was read from JSON, whose integers may have any number of digits."""

import math
import sys
from typing import Any


def is_number(value: Any) -> bool:
    """Return whether a value is a float, or an int that one holds, and no bool."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return isinstance(value, float)


def is_finite_number(value: Any) -> bool:
    """Return whether a value is a number as `is_number` has it, and neither infinite nor NaN."""
    return is_number(value) and math.isfinite(value)
