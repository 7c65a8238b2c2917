"""A pool of worker processes with a queue of calls. A worker that hangs is killed and replaced."""

import json
import os
import selectors
import threading
import time
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_bai.errors import UserError
from megatron_bai.workers.outcomes import Outcome, Target
from megatron_bai.workers.process import BadReplyError, Call, WorkerProcess

MAX_REPLY_BYTES = 1 << 20  # of the JSON that one call returns


class WorkerPool:
    """Calls one target with many lists of arguments, in up to `workers` processes.

    One thread starts and serves the processes, from the block's begin to its end: the kernel ends a process with the
    thread that started it (`utils/child_processes.py`). Futures are set in that thread.

    Args:
        target: what to call.
        workers: processes; more than one are started as calls wait.
        timeout_s: of one call.
        log: where what the target prints is appended.
        max_reply_bytes: of one reply's JSON; more fail the call.
    """

    def __init__(
        self, target: Target, workers: int, timeout_s: float, log: Path, max_reply_bytes: int = MAX_REPLY_BYTES
    ):
        self.target, self.timeout_s, self.log = target, timeout_s, log
        self._max_reply_bytes, self._limit = max_reply_bytes, workers
        self._workers: list[WorkerProcess] = []
        self._waiting: deque[Call] = deque()
        self._numbers = count(1)
        self._lock = threading.Lock()  # of what follows and of `_waiting`'s end
        self._ended = True
        self._stop = False
        self._started: Future[None] = Future()

    def __enter__(self) -> Self:
        """Start one worker.

        Raises:
            UserError: it cannot open the target.
        """
        self._woken, self._wake_end = os.pipe()
        os.set_blocking(self._woken, False)
        os.set_blocking(self._wake_end, False)
        self._ended, self._stop, self._started = False, False, Future()
        self._thread = threading.Thread(target=self._serve, name="worker-pool", daemon=True)
        self._thread.start()
        try:
            self._started.result()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the workers. Calls that wait are cancelled, those in work fail."""
        self._stop = True
        self._wake()
        self._thread.join()
        os.close(self._woken)
        os.close(self._wake_end)

    def submit(self, arguments: list[Any]) -> "Future[Outcome]":
        """Call the target once a worker is free, in the order of submission. Any thread may ask.

        A call that is cancelled before it starts is not made.

        Args:
            arguments: JSON; what JSON does not have, such as dates, is sent as its text.

        Returns:
            A future of the outcome. It raises a UserError where no worker can be started again.
        """
        call = Call(next(self._numbers), arguments, Future())
        with self._lock:
            if self._ended:
                raise RuntimeError("the pool has ended")
            self._waiting.append(call)
        self._wake()
        return call.outcome

    def _wake(self) -> None:
        with suppress(BlockingIOError):  # full of wakes
            os.write(self._wake_end, b"\0")

    def _serve(self) -> None:
        """Serve calls until the block ends: the thread's function."""
        failure: BaseException = RuntimeError("the pool has ended")
        try:
            while not self._stop:
                self._start_workers()
                self._send_calls()
                for worker in self._wait():
                    self._look_at(worker)
        except BaseException as error:  # no process can be started, or a fault of the pool: nobody may wait for ever
            failure = error
        finally:
            with self._lock:
                self._ended = True
            for worker in self._workers:
                worker.kill()
                if worker.call:
                    worker.call.outcome.set_result(Outcome(failure=f"its process was ended: {failure}"))
            self._workers.clear()
            self._fail_waiting(None if self._stop else failure)

    def _start_workers(self) -> None:
        """Start the first worker, and others for calls that wait: one that fails at once is not tried for ever."""
        wanted = len(self._waiting) + sum(worker.call is not None for worker in self._workers)
        while len(self._workers) < min(self._limit, wanted or int(not self._started.done())):
            self._workers.append(WorkerProcess(self.target, self.log, self._max_reply_bytes))

    def _send_calls(self) -> None:
        """Give idle workers the calls that wait."""
        for worker in self._workers:
            while self._waiting and worker.ready and worker.call is None:
                call = self._waiting.popleft()
                if not call.outcome.set_running_or_notify_cancel():
                    continue
                try:
                    line = json.dumps([call.number, call.arguments], default=str).encode() + b"\n"
                except Exception as error:
                    call.outcome.set_exception(error)
                    continue
                worker.send(call, line, self.timeout_s)

    def _wait(self) -> list[WorkerProcess]:
        """Wait for a call, and return the workers that wrote, read, exited or exceeded their time."""
        deadlines = [worker.deadline for worker in self._workers if worker.deadline is not None]
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            for worker in self._workers:
                worker.register(selector)
            timeout = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
            active = {key.data for key, _ in selector.select(timeout)}
        with suppress(BlockingIOError):
            os.read(self._woken, 1 << 16)
        now = time.monotonic()
        return [
            worker
            for worker in self._workers
            if worker in active or worker.deadline is not None and now >= worker.deadline
        ]

    def _look_at(self, worker: WorkerProcess) -> None:
        """Set the outcome of a worker's call. A worker that exited, is late or sent something else is removed."""
        call, started, deadline = worker.call, worker.ready, worker.deadline
        worker.write_some()
        try:
            outcome, bad = worker.read_outcome(), ""
        except BadReplyError as error:
            outcome, bad = None, str(error)
        if outcome is None:
            late = deadline is not None and time.monotonic() >= deadline
            if not (bad or late or worker.has_exited):
                return
            self._workers.remove(worker)
            worker.kill()
            exceeded = f"it took longer than {self.target.timeout_setting}={self.timeout_s:g} s"
            outcome = Outcome(
                failure=bad
                or (worker.describe_end() if worker.has_exited else exceeded if started else "it does not start")
            )
        if started:
            if call:  # an idle worker's end costs nothing
                call.outcome.set_result(outcome)
        elif outcome.failure:
            failure = UserError(f"{self.target.title} cannot be started: {outcome.failure} [{self.log}]")
            if not self._started.done():
                self._started.set_exception(failure)
                self._stop = True
            self._fail_waiting(failure)
        else:
            worker.ready = True
            if not self._started.done():
                self._started.set_result(None)

    def _fail_waiting(self, error: BaseException | None) -> None:
        """Fail what waits for a worker, or cancel it."""
        if not self._started.done():
            self._started.set_exception(error or RuntimeError("the pool has ended"))
        while self._waiting:
            outcome = self._waiting.popleft().outcome
            if error is None:
                outcome.cancel()
            elif outcome.set_running_or_notify_cancel():
                outcome.set_exception(error)
