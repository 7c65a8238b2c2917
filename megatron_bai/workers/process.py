"""One worker process as its pool sees it. Nothing that it writes, or fails to read, blocks the pool."""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bai.workers.outcomes import Outcome, Target

_START_S = 300.0  # to import the target's module, on a busy machine
_KILL_S = 10.0  # from SIGTERM to SIGKILL
# What launchers tell a rank. A library that the target uses would take it for a rank and wait for the others.
_RANK_VARIABLES = frozenset(
    "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK ROLE_WORLD_SIZE ROLE_NAME "
    "NODE_RANK MASTER_ADDR MASTER_PORT SLURM_PROCID SLURM_LOCALID SLURM_NODEID".split()
)
_RANK_PREFIXES = ("TORCHELASTIC_", "TORCH_NCCL_", "OMPI_COMM_WORLD_", "PMI_", "PMIX_")


def worker_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables of a worker: those of the trainer without what makes it a rank."""
    kept = {
        name: value
        for name, value in environment.items()
        if name not in _RANK_VARIABLES and not name.startswith(_RANK_PREFIXES)
    }
    return kept | {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Call:
    """One call: its number, from 1, its arguments, and where its outcome goes."""

    number: int
    arguments: list[Any]
    outcome: "Future[Outcome]"


class BadReplyError(Exception):
    """What a worker sent is no reply to its call; the message says what it is."""


class WorkerProcess:
    """One process.

    Attributes:
        ready: it has opened the target.
        call: that it works on; None while it starts or is idle.
        deadline: on the monotonic clock, of its start or call; None while it is idle.
        has_exited: it closed its end of the pipe.
    """

    def __init__(self, target: Target, log: Path, max_reply_bytes: int):
        log.parent.mkdir(parents=True, exist_ok=True)
        its_requests, requests = os.pipe()
        replies, its_replies = os.pipe()
        what = json.dumps({"opener": target.opener, "name": target.name, "settings": target.settings})
        numbers = map(str, (os.getpid(), its_requests, its_replies))
        command = [sys.executable, "-m", "megatron_bai.workers.main", *numbers, what, str(max_reply_bytes)]
        try:
            with open(log, "ab") as output:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=(its_requests, its_replies),
                    env=worker_environment(os.environ),
                    start_new_session=True,  # a Ctrl-C is the trainer's
                )
        except BaseException:
            os.close(requests)
            os.close(replies)
            raise
        finally:
            os.close(its_requests)
            os.close(its_replies)
        os.set_blocking(requests, False)
        os.set_blocking(replies, False)
        self._requests, self._replies, self._max_reply_bytes = requests, replies, max_reply_bytes
        self.ready, self.has_exited = False, False
        self.call: Call | None = None
        self.deadline: float | None = time.monotonic() + _START_S
        self._unsent, self._read = memoryview(b""), b""

    def register(self, selector: selectors.BaseSelector) -> None:
        """Have a selector wait for what it writes, and for its readiness to read what is not sent yet."""
        selector.register(self._replies, selectors.EVENT_READ, self)
        if self._unsent:
            selector.register(self._requests, selectors.EVENT_WRITE, self)

    def send(self, call: Call, line: bytes, timeout_s: float) -> None:
        """Give an idle worker a call.

        Args:
            call: to work on.
            line: its JSON.
            timeout_s: until it is late.
        """
        assert self.ready and self.call is None, "one call at a time"
        self.call, self.deadline = call, time.monotonic() + timeout_s
        self._unsent = memoryview(line)
        self.write_some()

    def write_some(self) -> None:
        """Write as much of a call as the pipe takes."""
        with suppress(BlockingIOError):
            try:
                while self._unsent:
                    self._unsent = self._unsent[os.write(self._requests, self._unsent) :]
            except BrokenPipeError:  # it has ended, or closed it, which reading or the deadline finds
                self._unsent = memoryview(b"")

    def read_outcome(self) -> Outcome | None:
        """Return the outcome of its start or call, of which the worker is then free; None until it is complete.

        Raises:
            BadReplyError: it wrote something else.
        """
        with suppress(BlockingIOError):
            while len(self._read) <= self._max_reply_bytes and not self.has_exited:
                read = os.read(self._replies, 1 << 16)
                self.has_exited = not read
                self._read += read
        line, newline, rest = self._read.partition(b"\n")
        if len(line) > self._max_reply_bytes:
            raise BadReplyError(f"it answered more than {self._max_reply_bytes:,} bytes")
        if not newline:
            return None
        if self.deadline is None or rest:
            raise BadReplyError("it answered what it was not asked")
        outcome = _parse_line(line, self.call.number if self.call else 0)
        self._read, self.call, self.deadline = b"", None, None
        return outcome

    def kill(self) -> None:
        """Kill the process and all that it started, which its guard does at SIGTERM."""
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_KILL_S)
        with suppress(ProcessLookupError):  # the guard was killed itself, or hangs
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._requests)
        os.close(self._replies)

    def describe_end(self) -> str:
        """Return how it ended, once it was killed."""
        code = self.process.returncode
        closed = ": killed, or it closed its pipes" if code in (-signal.SIGKILL, 1) else ""
        return f"it ended its process ({code}{closed})"


def _parse_line(line: bytes, number: int) -> Outcome:
    """Return the outcome in a worker's line.

    Args:
        line: JSON, without its end.
        number: of the call, 0 for its start.

    Raises:
        BadReplyError: it is not such a line.
    """
    try:
        reply = json.loads(line.decode(), parse_constant=_refuse_constant)
        json.dumps(reply, ensure_ascii=False).encode()  # JSON also writes halves of surrogate pairs
        found, failure = reply["id"], reply.get("failure", "")
        outcome = Outcome(None if failure else reply["value"], failure)
    except UnicodeError:
        raise BadReplyError("it answered what is no UTF-8") from None
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise BadReplyError("it answered what is no reply") from None
    if found != number or not isinstance(failure, str):
        raise BadReplyError("it answered another call than its own")
    return outcome


def _refuse_constant(name: str) -> None:
    """Refuse NaN and infinities, which `json` takes and JSON has not."""
    raise ValueError(f"{name} is no JSON")
