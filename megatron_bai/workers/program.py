"""Run a Python program that a model wrote, in a process without network, files and processes of the machine's.

It is held by namespaces of Linux (`program_main.py`), limits and time. That keeps a program from harm that it does by
mistake; it is no security boundary: the kernel's own faults are open to it. Where the kernel gives no such namespaces
nothing is run.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from megatron_bai.errors import UserError
from megatron_bai.workers import program_main

_SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache")  # to read: libraries, and what they are found by
_END_S = 5.0  # from its kill until its pipes are closed
_START_S = 30.0  # of the interpreters and namespaces, not counted as the program's


@dataclass(frozen=True)
class ProgramLimits:
    """The limits of a program.

    Attributes:
        time_s: on the clock, from its start, and of its processor time.
        memory_mib: of each of its processes.
        output_bytes: of what it writes to standard output, and of what it writes to standard error.
        disk_mib: of the files that it writes, which are in memory.
        processes: that it may have, itself among them.
        open_files: that each may have open.
    """

    time_s: float = 5.0
    memory_mib: int = 512
    output_bytes: int = 1 << 16
    disk_mib: int = 16
    processes: int = 8
    open_files: int = 64


@dataclass(frozen=True)
class ProgramResult:
    """What a program wrote, and how it ended.

    Attributes:
        output: of standard output; bytes that are no UTF-8 are replaced.
        errors: of standard error, likewise.
        failure: why it did not end by itself with code 0, in a few words; empty where it did.
    """

    output: str
    errors: str
    failure: str = ""


class IsolationError(UserError):
    """This machine gives a program no namespaces of its own; nothing was run."""


@dataclass
class _Pipe:
    """What was read of one of a program's pipes."""

    limit: int
    data: bytearray = field(default_factory=bytearray)

    @property
    def full(self) -> bool:
        return len(self.data) > self.limit

    def text(self) -> str:
        return bytes(self.data[: self.limit]).decode("utf-8", "replace")


def run_program(
    source: str, stdin: str = "", limits: ProgramLimits | None = None, files: Mapping[str, str] | None = None
) -> ProgramResult:
    """Run a program to its end or its limits, with the standard library alone.

    Args:
        source: Python.
        stdin: what it reads.
        limits: see `ProgramLimits`.
        files: others in its directory, by name.

    Raises:
        IsolationError: the kernel gives no namespaces. The program was not run.
    """
    limits = limits or ProgramLimits()
    files = {"program.py": source.encode("utf-8", "replace").decode()} | dict(files or {})
    with ExitStack() as stack:
        read_job, job = os.pipe()
        status, write_status = os.pipe()
        stack.callback(os.close, status)
        command = [sys.executable, "-I", "-S", program_main.__file__, str(read_job), str(write_status)]
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(read_job, write_status),
                env={},
                cwd="/",
                start_new_session=True,
            )
        except BaseException:
            os.close(job)
            raise
        finally:
            os.close(read_job)
            os.close(write_status)
        stack.enter_context(process)
        stack.callback(process.kill)
        with suppress(BrokenPipeError), open(job, "w", encoding="utf-8") as file:
            json.dump(_make_job(files, limits), file)
        return _wait(process, status, stdin.encode("utf-8", "replace"), limits)


def require_isolation() -> None:
    """Raise an IsolationError, in one line, where a program cannot be run as `run_program` runs it."""
    result = run_program("print(6 * 7)", limits=ProgramLimits(time_s=_START_S))
    if result.output != "42\n":
        reason = result.errors.strip().rpartition("\n")[2] or result.failure
        raise IsolationError(f"a program cannot be run in namespaces of its own: {reason}")


def _make_job(files: Mapping[str, str], limits: ProgramLimits) -> dict[str, object]:
    """Return what `program_main` reads."""
    executable = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    prefixes = {sys.base_prefix, str(Path(executable).parent)}
    own = sorted(each for each in map(os.path.realpath, prefixes) if not Path(each).is_relative_to("/usr"))
    nested = {each for each in own for outer in own if each != outer and Path(each).is_relative_to(outer)}
    return {
        "paths": [*(each for each in own if each not in nested), *_SYSTEM],
        "command": [executable, "-I", "-S", "-B", "-X", "utf8", "program.py"],
        "files": dict(files),
        "memory_bytes": limits.memory_mib << 20,
        "cpu_s": int(limits.time_s) + 1,
        "processes": limits.processes,
        "open_files": limits.open_files,
        "disk_bytes": limits.disk_mib << 20,
    }


def _wait(process: "subprocess.Popen[bytes]", status: int, stdin: bytes, limits: ProgramLimits) -> ProgramResult:
    """Feed the program and read it until it ends, or kill it."""
    assert process.stdin and process.stdout and process.stderr
    output, errors, said = _Pipe(limits.output_bytes), _Pipe(limits.output_bytes), _Pipe(1000)
    unsent, failure, deadline = memoryview(stdin), "", time.monotonic() + limits.time_s + _START_S
    with selectors.DefaultSelector() as selector:
        for stream, pipe in ((process.stdout, output), (process.stderr, errors), (status, said)):
            selector.register(stream, selectors.EVENT_READ, pipe)
        os.set_blocking(process.stdin.fileno(), False)
        selector.register(process.stdin, selectors.EVENT_WRITE)
        while selector.get_map():
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            for key, _ in ready:
                if key.data is None:
                    unsent = _feed(key.fd, unsent)
                    if not unsent:
                        selector.unregister(key.fileobj)
                        with suppress(BrokenPipeError):
                            process.stdin.close()
                elif not (data := os.read(key.fd, 1 << 16)):
                    selector.unregister(key.fileobj)
                    if key.data is said and not said.data:  # the program itself runs
                        deadline = min(deadline, time.monotonic() + limits.time_s)
                elif not key.data.full:
                    key.data.data += data
            if failure and (not ready or time.monotonic() >= deadline):
                break
            if not failure and (output.full or errors.full or not ready):
                too_much = f"it wrote more than {limits.output_bytes:,} bytes"
                failure = too_much if output.full or errors.full else f"it took longer than {limits.time_s:g} s"
                process.kill()
                deadline = time.monotonic() + _END_S
    code = _wait_for_end(process, deadline)
    if code is None:  # it closed its pipes and went on
        failure = failure or f"it took longer than {limits.time_s:g} s"
    if said.data:
        raise IsolationError(f"a program cannot be run in namespaces of its own: {said.text()}")
    return ProgramResult(output.text(), errors.text(), failure or _describe_end(code or 0))


def _wait_for_end(process: "subprocess.Popen[bytes]", deadline: float) -> int | None:
    """Return the exit code; None where the process had to be killed."""
    try:
        return process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def _feed(descriptor: int, data: memoryview) -> memoryview:
    """Write some of a program's input; return the rest, nothing where it reads no more."""
    try:
        return data[os.write(descriptor, data[: 1 << 16]) :]
    except BlockingIOError:
        return data
    except BrokenPipeError:
        return data[:0]


def _describe_end(code: int) -> str:
    if code > 128 and code - 128 in set(signal.Signals):
        return f"it was ended by {signal.Signals(code - 128).name}"
    return f"it ended with code {code}" if code else ""
