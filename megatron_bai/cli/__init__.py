"""The command line: `entry_point` dispatches to a module a verb."""

from megatron_bai.cli.entry_point import main

__all__ = ["main"]
