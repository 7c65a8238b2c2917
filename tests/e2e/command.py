"""Runs the project's commands as a user does, and knows what each of them said and left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent
SERVER = "megatron_bai.rollout.servers.server_main"
_TIMEOUT_S = 500  # of one command, on a machine that does something else as well


@dataclass(frozen=True)
class Result:
    """What a command did. `code` is negative for a signal; `orphans` are command lines."""

    code: int
    out: str
    err: str
    orphans: list[str]

    @property
    def complaints(self) -> list[str]:
        """Our error lines, without the ranks' own."""
        return re.findall(r"^megatron-bai: error: (.*)$", self.err, re.M)

    @property
    def tracebacks(self) -> list[str]:
        """Lines of a Python traceback through our code, on any rank. (torchrun always shows one of its own.)"""
        return re.findall(r"^.*File .*/megatron_bai/.*$", self.err, re.M)


class Command:
    """A command that was started. `wait` must be called."""

    def __init__(self, directory: Path, *words: str | Path, cwd: Path | None = None):
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._words = [str(word) for word in words]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
        reaper = [sys.executable, str(Path(__file__).with_name("reaper.py")), str(directory / "orphans")]
        with open(directory / "out", "wb") as out, open(directory / "err", "wb") as err:
            self._process = subprocess.Popen(
                reaper + self._words, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=cwd, env=environment
            )

    def wait(self) -> Result:
        """Until the command has ended and everything it left behind is known."""
        try:
            code = self._process.wait(_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait()
            raise AssertionError(f"{self} did not end: {self._said()}") from None
        code = code - 256 if code > 128 + 64 else code  # the reaper's exit code of a command ended by a signal
        return Result(code, self._read("out"), self._read("err"), self._read("orphans").splitlines())

    def until(self, happened: Callable[[], bool]) -> "Command":
        """Wait for something that the command brings about; fail when it ends without."""
        deadline = time.monotonic() + _TIMEOUT_S
        while not happened():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._process.terminate()
                raise AssertionError(f"{self} never came so far: {self._said()}")
            time.sleep(0.05)
        return self

    def until_sampling(self, log: Path) -> "Command":
        """Wait until its server works on a rollout: it has answered more requests than a weight sync makes."""
        return self.until(lambda: log.is_file() and log.read_text(errors="replace").count("POST /generate") > 16)

    def processes(self, part: str = "") -> list[psutil.Process]:
        """Of this command, the command itself first: those whose command line has `part`."""
        found = []
        for process in psutil.Process(self._process.pid).children(recursive=True):
            try:
                if part in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def send(self, sign: signal.Signals) -> "Command":
        """Signal the command itself."""
        self.processes()[0].send_signal(sign)
        return self

    def said(self) -> str:
        """On stdout, so far."""
        return self._read("out")

    def _read(self, name: str) -> str:
        path = self._directory / name
        return path.read_text(errors="replace") if path.exists() else ""

    def _said(self) -> str:
        return f"{self._read('out')[-2000:]}\n{self._read('err')[-4000:]}"

    def __str__(self) -> str:
        return " ".join(self._words)


def megatron_bai(directory: Path, *words: str | Path) -> Command:
    """The command line in one process."""
    return Command(directory, BIN / "megatron-bai", *words)


def torchrun(directory: Path, processes: int, *words: str | Path) -> Command:
    """A Python program in several processes."""
    return Command(directory, BIN / "torchrun", "--standalone", "--nproc-per-node", str(processes), *words)


def forked(directory: Path, cases: Mapping[str, Sequence[str | Path]]) -> dict[str, Result]:
    """The command line with each of the words, one after the other, in forks of a process that has imported everything.

    A process of its own spends more on that than on most of the tests' commands.
    """
    words = {name: [str(word) for word in case] for name, case in cases.items()}
    forks = Path(__file__).with_name("forks.py")
    orphans = succeeded(Command(directory, sys.executable, forks, directory, json.dumps(words))).orphans
    codes = json.loads((directory / "codes.json").read_text())
    said = {name: [(directory / f"{name}.{stream}").read_text() for stream in ("out", "err")] for name in cases}
    return {name: Result(code, said[name][0], said[name][1], orphans) for name, code in codes.items()}


def succeeded(command: Command) -> Result:
    """Wait for a command that must end well and leave nothing."""
    return _well(str(command), command.wait())


def all_succeeded(directory: Path, cases: Mapping[str, Sequence[str | Path]]) -> dict[str, Result]:
    """The same of the command line in forks."""
    return {name: _well(name, result) for name, result in forked(directory, cases).items()}


def _well(name: str, result: Result) -> Result:
    assert result.code == 0, f"{name}: {result.code}\n{result.out[-2000:]}\n{result.err[-4000:]}"
    assert result.orphans == [], f"{name}: {result.orphans}"
    return result
