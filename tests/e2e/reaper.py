"""`python reaper.py REPORT COMMAND …`: runs a command and says which processes it left behind.

The kernel gives every orphan among the command's descendants to this process (PR_SET_CHILD_SUBREAPER), so none is
missed, whatever session or name it took, and nobody else's process is ever counted or ended. Orphans that do not end
by themselves are named in REPORT, one command line each, and killed. On SIGTERM everything is killed.
"""

import ctypes
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import psutil

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_GRACE_S = 20.0  # for what has been told to end


def main(report: Path, command: list[str]) -> int:
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # when the tests are killed
    signal.signal(signal.SIGTERM, _kill_everything)
    code = subprocess.Popen(command).wait()
    _, left = psutil.wait_procs(psutil.Process().children(recursive=True), timeout=_GRACE_S)
    lines = [f"{process.pid} {' '.join(process.cmdline()) or process.name()}" for process in left]
    report.write_text("".join(line + "\n" for line in lines))
    for process in left:
        process.kill()
    return code


def _kill_everything(*_: object) -> NoReturn:
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it ended with the one before it
            process.kill()
    os._exit(124)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
