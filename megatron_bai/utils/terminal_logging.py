"""Logging of what a run says while it works: one line a record, behind the rank of the process that says it."""

import logging
import os
import sys

from megatron_bai.utils.terminal_text import replace_unprintable


class _TerminalHandler(logging.Handler):
    """Writes information to stdout and warnings to stderr, whatever these are at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record at once. A closed pipe raises, as it does for `print`: the command line ends then."""
        warning = record.levelno >= logging.WARNING
        stream = sys.stderr if warning else sys.stdout
        line = f"[rank {os.environ.get('RANK', 0)}] {self.format(record)}"
        stream.write(f"\033[33m{line}\033[0m\n" if warning and stream.isatty() else f"{line}\n")
        stream.flush()


def setup() -> None:
    """Show what the package logs, from INFO on, on this process's terminal. Safe to call twice.

    What a terminal or file that is not UTF-8 cannot hold is replaced from now on (`replace_unprintable`).

    A program that uses the library without its command line decides for itself where records of the logger
    `megatron_bai` go.
    """
    replace_unprintable()
    logger = logging.getLogger("megatron_bai")
    if not any(isinstance(handler, _TerminalHandler) for handler in logger.handlers):
        logger.addHandler(_TerminalHandler())
    logger.setLevel(logging.INFO)
    logger.propagate = False  # libraries that configure the root logger would say it twice
