"""`python timeless.py [--die PATTERN COUNT] VERB …`: the command line, where files have no times.

A merge knows its sources by their files' times of change, which a copy of a directory, such as a clone of the
repository, cannot have. So below the working directory every file is of one time here, when a head makes an interrupted
merge as well as when a later one goes on with it.
"""

import os
import runpy
import signal
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any


def forget_times(directory: str) -> None:
    """Give all files below a directory one time of change, for this process and its forks."""
    stat, inside = os.stat, os.path.realpath(directory) + os.sep

    def timeless(path: Any, **how: Any) -> os.stat_result:
        found = stat(path, **how)
        where = f"/proc/self/fd/{path}" if isinstance(path, int) else path
        if not os.path.realpath(where).startswith(inside):
            return found
        same = {"st_mtime": 0.0, "st_ctime": 0.0, "st_mtime_ns": 0, "st_ctime_ns": 0}
        return os.stat_result(found, {name: getattr(found, name) for name in ("st_blocks", "st_blksize")} | same)

    os.stat = os.fstat = timeless


def die_before(pattern: str, count: int) -> None:
    """Kill this process before it opens the `count`-th file to write whose path fits a pattern."""
    left = count

    def hook(event: str, about: tuple) -> None:
        nonlocal left
        if event == "open" and about[2] & (os.O_WRONLY | os.O_RDWR) and fnmatch(os.fsdecode(about[0]), pattern):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def main(words: Sequence[str]) -> None:
    forget_times(".")
    if words[0] == "--die":
        die_before(words[1], int(words[2]))
        words = words[3:]
    sys.argv = ["megatron-bai", *words]
    runpy.run_module("megatron_bai", run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
