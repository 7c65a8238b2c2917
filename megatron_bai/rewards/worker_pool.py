"""Worker processes for reward functions. One that hangs is killed and replaced.

A thread could not be stopped, least of all in code in C. Processes are started anew and not forked: the trainer has
threads, collectives and perhaps a GPU. Nothing is pickled; one sample a line goes each way as JSON, on pipes of their
own: a function that reads standard input finds its end, and one that prints writes to the log.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_bai.errors import UserError
from megatron_bai.rewards.reward import Score

_START_S = 300.0  # to import the function's module, on a busy machine
_KILL_S = 10.0  # from SIGTERM to SIGKILL
# What launchers tell a rank. A library that a reward uses would take it for a rank and wait for the others.
_RANK_VARIABLES = frozenset(
    "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK ROLE_WORLD_SIZE ROLE_NAME "
    "NODE_RANK MASTER_ADDR MASTER_PORT SLURM_PROCID SLURM_LOCALID SLURM_NODEID".split()
)
_RANK_PREFIXES = ("TORCHELASTIC_", "TORCH_NCCL_", "OMPI_COMM_WORLD_", "PMI_", "PMIX_")


def worker_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a reward's process: that of the trainer without what makes it a rank."""
    kept = {
        name: value
        for name, value in environment.items()
        if name not in _RANK_VARIABLES and not name.startswith(_RANK_PREFIXES)
    }
    return kept | {"OMP_NUM_THREADS": "1"}


class WorkerPool:
    """Calls one function on many samples, in up to `workers` processes.

    Args:
        function: `module:function`.
        settings: what it takes as its last argument; None: nothing.
        timeout_s: of one sample.
        log: where what it prints is appended.
    """

    def __init__(self, function: str, settings: dict[str, Any] | None, workers: int, timeout_s: float, log: Path):
        self.function, self.settings, self.timeout_s, self.log = function, settings, timeout_s, log
        self._limit = workers
        self._workers: list[_Worker] = []

    def __enter__(self) -> "WorkerPool":
        """Start one worker.

        Raises:
            UserError: the function cannot be imported.
        """
        try:
            self._start_workers(1)
            self._wait_until_ready()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    def scores(self, arguments: list[list[Any]]) -> list[Score]:
        """Return one score for each list of arguments, in their order.

        Raises:
            UserError: a worker could not be started again.
        """
        scores: dict[int, Score] = {}
        waiting = deque(range(len(arguments)))
        self._start_workers(min(self._limit, len(arguments)))
        while waiting or any(worker.sample_index is not None for worker in self._workers):
            for worker in self._workers:
                if waiting and worker.ready and worker.sample_index is None:
                    worker.send(waiting[0], arguments[waiting[0]], self.timeout_s)
                    waiting.popleft()
            for worker in self._wait_for_workers():
                item, score = worker.sample_index, self._read_outcome(worker)
                if item is not None and score is not None:
                    scores[item] = score
            self._start_workers(
                min(self._limit, len(waiting) + sum(worker.sample_index is not None for worker in self._workers))
            )
        return [scores[item] for item in range(len(arguments))]

    def _wait_until_ready(self) -> None:
        while not all(worker.ready for worker in self._workers):
            for worker in self._wait_for_workers():
                self._read_outcome(worker)

    def _start_workers(self, count: int) -> None:
        while len(self._workers) < count:
            self._workers.append(_Worker(self.function, self.settings, self.log))

    def _wait_for_workers(self) -> "list[_Worker]":
        """Wait for workers that wrote a line, exited or exceeded their time."""
        busy = [(worker, worker.deadline) for worker in self._workers if worker.deadline is not None]
        with selectors.DefaultSelector() as selector:
            for worker, _ in busy:
                selector.register(worker.replies, selectors.EVENT_READ, worker)
            until = min(deadline for _, deadline in busy) - time.monotonic()
            heard = [key.data for key, _ in selector.select(max(0.0, until))]
        return heard + [worker for worker, end in busy if worker not in heard and time.monotonic() >= end]

    def _read_outcome(self, worker: "_Worker") -> Score | None:
        """Return the score of the worker's sample; None while it works. A worker that exited or is late is removed."""
        assert worker.deadline is not None, "the worker is busy"
        started, late = worker.ready, time.monotonic() >= worker.deadline
        reply = worker.read_reply()
        if reply is None and not worker.has_exited and not late:
            return None
        if reply is not None and "value" in reply:
            return Score(reply["value"])
        if reply is None:
            worker.kill()
            self._workers.remove(worker)
            took = f"it took longer than reward.timeout_s={self.timeout_s:g} s" if started else "it does not start"
            reply = {"failure": f"it ended its process ({worker.process.returncode})" if worker.has_exited else took}
        if not started:
            raise UserError(f"the reward {self.function} cannot be started: {reply['failure']} [{self.log}]")
        return Score(None, reply["failure"])


class _Worker:
    """One process.

    Attributes:
        ready: it has imported the function.
        sample_index: index of the sample that it works on; None while it is idle.
        deadline: on the monotonic clock, of its sample; None while it is idle.
        has_exited: it closed its end of the pipe.
    """

    def __init__(self, function: str, settings: dict[str, Any] | None, log: Path):
        log.parent.mkdir(parents=True, exist_ok=True)
        samples, requests = os.pipe()
        replies, answers = os.pipe()
        command = [
            sys.executable,
            "-m",
            "megatron_bai.rewards.worker_main",
            *map(str, (os.getpid(), samples, answers)),
            function,
            json.dumps(settings),
        ]
        try:
            with open(log, "ab") as output:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=(samples, answers),
                    env=worker_environment(os.environ),
                    start_new_session=True,  # a Ctrl-C is the trainer's
                )
        except BaseException:
            os.close(requests)
            os.close(replies)
            raise
        finally:
            os.close(samples)
            os.close(answers)
        self.requests, self.replies = os.fdopen(requests, "wb", buffering=0), os.fdopen(replies, "rb", buffering=0)
        self.ready, self.has_exited = False, False
        self.sample_index: int | None = None
        self.deadline: float | None = time.monotonic() + _START_S
        self._buffer = b""

    def send(self, sample_index: int, arguments: list[Any], timeout_s: float) -> None:
        self.sample_index, self.deadline = sample_index, time.monotonic() + timeout_s
        line = json.dumps(arguments, default=str) + "\n"  # of columns that JSON does not have, such as dates
        with suppress(BrokenPipeError):  # it has ended, which reading finds
            self._write(line.encode())

    def _write(self, data: bytes) -> None:
        while data:
            data = data[self.requests.write(data) :]

    def read_reply(self) -> dict[str, Any] | None:
        """Return the line that the worker wrote; None until it is complete."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.replies, selectors.EVENT_READ)
            if selector.select(0):
                read = os.read(self.replies.fileno(), 1 << 16)
                self.has_exited = not read
                self._buffer += read
        line, newline, rest = self._buffer.partition(b"\n")
        if not newline:
            return None
        self._buffer = rest
        self.ready, self.sample_index, self.deadline = True, None, None
        reply: dict[str, Any] = json.loads(line)
        return reply

    def kill(self) -> None:
        """Kill the process and all that it started, which its guard does at SIGTERM."""
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_KILL_S)
        with suppress(ProcessLookupError):  # the guard was killed itself, or hangs
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.requests, self.replies):
            with suppress(BrokenPipeError):
                pipe.close()
