"""Processes for tests that are not about starting them: forks of one that has imported SGLang, or Megatron-Core.

Importing takes five seconds of a core, which is more than most of these processes compute (`forked_servers`).
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

import pytest

from megatron_bai.rollout.servers.sglang_server import _environment

HERE = Path(__file__).with_name("forked_servers")
SCRIPT_VARIABLES = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}  # what Python and torch read at their start


@contextmanager
def fork_server(kind: str) -> Iterator[None]:
    """Have a fork server, for this process and those it starts; its forks end with the block.

    `kind` is `server` or `script`. Where it listens is in the environment, as `FORK_SERVER` or `FORK_SCRIPT`.
    """
    with TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as listener:
        address = Path(directory) / "forks"
        listener.bind(str(address))
        listener.listen(16)
        command = [sys.executable, str(HERE / "fork_server.py"), kind, str(os.getpid()), str(listener.fileno())]
        environment = _environment("cpu") if kind == "server" else os.environ | SCRIPT_VARIABLES
        with open(address.with_suffix(".log"), "wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, pass_fds=[listener.fileno()])
        listener.close()  # the server's alone: when it ends nobody waits for it
        try:
            name = f"FORK_{kind.upper()}"
            with in_environment({name: str(address), f"{name}_PID": str(process.pid)}):
                yield
        finally:
            process.kill()
            process.wait()


def variables() -> dict[str, str]:
    """Those with which commands get forks in place of servers."""
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "FORKED_SERVERS": os.environ["FORK_SERVER"]}


@contextmanager
def in_environment(variables: dict[str, str]) -> Iterator[None]:
    """Processes started in the block have these variables."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


def run_script(
    arguments: list[str], environment: dict[str, str], timeout_s: float
) -> "subprocess.CompletedProcess[str]":
    """Run a script, or `-m MODULE`, in a fork that has imported Megatron-Core, as `subprocess.run` would.

    Raises:
        TimeoutError: it takes longer; it is killed.
    """
    with TemporaryFile() as out, TemporaryFile() as err, socket.socket(socket.AF_UNIX) as fork:
        fork.settimeout(timeout_s)
        fork.connect(os.environ["FORK_SCRIPT"])
        socket.send_fds(fork, [b"\n"], [out.fileno(), err.fileno()])
        request = {"arguments": arguments, "environment": environment, "directory": os.getcwd()}
        fork.sendall(json.dumps(request).encode() + b"\n")
        code = fork.makefile().readline().strip()
        for stream in (out, err):
            stream.seek(0)
        said, complaints = out.read().decode(errors="replace"), err.read().decode(errors="replace")
    complaints += "" if code else "RuntimeError: the fork server ended\n"
    return subprocess.CompletedProcess(arguments, int(code or 1), said, complaints)
