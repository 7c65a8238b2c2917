"""Keep off the terminal what Megatron-Core logs in every run to those who call it, and users cannot act on.

The releases' rows name these warnings (`MegatronRelease.notices`). All others are shown.
"""

import logging

from megatron_bai.compat.releases import megatron_release


def hide_notices() -> None:
    """Hide them where nothing else decides what becomes of other libraries' records. Safe to call twice."""
    shown_by_default = logging.lastResort
    if shown_by_default and _is_of_interest not in shown_by_default.filters:
        shown_by_default.addFilter(_is_of_interest)


def _is_of_interest(record: logging.LogRecord) -> bool:
    """Return whether a record is no such notice."""
    return not (record.name.startswith("megatron.") and record.getMessage().startswith(megatron_release().notices))
