"""Reward functions, good and bad, for worker processes."""

import ctypes
import fcntl
import importlib
import os
import signal
import stat
import subprocess
import sys
import time
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any


def length(prompt: str, response: str, answer: str, extra: dict[str, Any]) -> float:
    return len(response) + extra.get("bonus", 0)


def whole(prompt: str, response: str, answer: str, extra: dict[str, Any]) -> str:
    return f"{prompt}|{response}|{answer}"


def misbehave(prompt: str, response: str, answer: str, extra: dict[str, Any]) -> Any:
    """What the response says."""
    return {
        "fine": lambda: 1,
        "raise": lambda: 1 / 0,
        "sleep": lambda: time.sleep(600),
        "in C": lambda: ctypes.PyDLL(None).sleep(600),  # holds the interpreter's lock: no signal handler runs
        "nan": lambda: float("nan"),
        "inf": lambda: float("-inf"),
        "text": lambda: "1.0",
        "nothing": lambda: None,
        "exit": lambda: sys.exit(3),
        "crash": lambda: os.kill(os.getpid(), 11),
        "print": lambda: print("a reward's own words") or 2.0,
        "child": lambda: sleeping_child() and time.sleep(600),
        "session": lambda: sleeping_child(start_new_session=True) and time.sleep(600),
        "daemon": lambda: os.waitpid(fork_daemon(), 0) and time.sleep(600),
        "left behind": lambda: sleeping_child(start_new_session=True) and os.waitpid(fork_daemon(), 0) and 1,
        "left by a crash": lambda: sleeping_child(start_new_session=True) and os.kill(os.getpid(), 11),
        "pid": lambda: os.getpid(),
        "meet": lambda: meet() or os.getpid(),
        "closed pipes": lambda: os.closerange(3, 64) or time.sleep(600),
        "10 MB": lambda: write_reply(b'"' + b"x" * 10_000_000 + b'"\n') or time.sleep(600),
        "endless line": lambda: write_reply(b"x" * 10_000_000) or time.sleep(600),
        "latin-1": lambda: write_reply('{"id": 1, "value": "é"}\n'.encode("latin-1")) or time.sleep(600),
        "no JSON": lambda: write_reply(b"}\n") or time.sleep(600),
        "of another call": lambda: write_reply(b'{"id": 999, "value": 7.0}\n') or time.sleep(600),
        "two replies": lambda: write_reply(b'{"id": 1, "value": 7.0}\n' * 2) or time.sleep(600),
        "true": lambda: True,
        "input": lambda: len(input()),
        "program's input": lambda: subprocess.run([sys.executable, "-c", "input()"], capture_output=True).returncode,
        "ranks": lambda: sum(name.startswith(("RANK", "WORLD_SIZE", "MASTER_", "TORCHELASTIC")) for name in os.environ),
        "descriptors": lambda: int(count_descriptors()),
        "fork": lambda: os.waitpid(_fork(), 0)[1],
        "raw print": lambda: os.write(1, b'{"value": 7.0}\n') and 2.0,
        "surrogate print": lambda: print("half \ud800") or 2.0,
        "signals": lambda: (
            len(signal.pthread_sigmask(signal.SIG_BLOCK, ())) + int(signal.getsignal(signal.SIGCHLD) or 0)
        ),
        "closed stdout": lambda: sys.stdout.close() or 2.0,
        "1e39": lambda: 1e39,
        "10**400": lambda: 10**400,
        "10**5000": lambda: -(10**5000),
        "float64": lambda: numpy().float64(0.5),
        "int8": lambda: numpy().int8(3),
        "bool_": lambda: numpy().bool_(True),
        "scalar array": lambda: numpy().array(0.25, "f2"),
        "array": lambda: numpy().array([1.0]),
        "decimal": lambda: Decimal("0.5"),
        "decimal nan": lambda: Decimal("sNaN"),
        "fraction": lambda: Fraction(1, 4),
        "complex": lambda: 1j,
        "tuple": lambda: (1.0, "well\ndone"),
        "half a pair": lambda: raise_(ValueError("\ud800 is no text")),
        "long": lambda: raise_(ValueError("x\n" * 1_000_000)),
        "no message": lambda: raise_(UnreadableError()),
        "interrupt": lambda: raise_(KeyboardInterrupt()),
    }[response]()


def sleeping_child(**options: Any) -> Any:
    """A process that the test finds by its arguments."""
    return subprocess.Popen(["sleep", f"600.{os.environ['TESTER']}"], **options)


def fork_daemon() -> int:
    """A process whose parent is gone, in a session of its own."""
    child = os.fork()
    if not child:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sleeping_child()
        os._exit(0)
    return child


def meet() -> None:
    """Wait until two processes are here."""
    here = Path(os.environ["MEETING"])
    (here / str(os.getpid())).touch()
    while len(list(here.iterdir())) < 2:
        time.sleep(0.01)


def write_reply(data: bytes) -> None:
    """Write to the pipe on which this process answers, as no honest function does."""
    (replies,) = [i for i in range(3, 64) if os.path.exists(f"/proc/self/fd/{i}") and is_writable_pipe(i)]
    while data:
        data = data[os.write(replies, data) :]


def is_writable_pipe(descriptor: int) -> bool:
    return stat.S_ISFIFO(os.fstat(descriptor).st_mode) and fcntl.fcntl(descriptor, fcntl.F_GETFL) & 3 == os.O_WRONLY


def numpy() -> Any:
    """Import numpy: a worker has it only where a function asks for it."""
    return importlib.import_module("numpy")


class UnreadableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even this")


def raise_(error: BaseException) -> None:
    raise error


def _fork() -> int:
    """A child that writes what looks like a reply to every descriptor it has."""
    child = os.fork()
    if not child:
        for descriptor in range(3, 64):
            with suppress(OSError):
                os.write(descriptor, b'{"value": 7.0}\n')
        os._exit(0)
    return child


def count_descriptors() -> int:
    """Return how many descriptors beyond the standard ones a program has that this one starts."""
    code = "import os; print(sum(os.path.exists(f'/proc/self/fd/{i}') for i in range(3, 64)))"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, close_fds=False).stdout)


NUMBER = 3
