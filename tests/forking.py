"""Servers for tests that are not about starting them: forks of a process that has imported SGLang (forked_servers)."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from megatron_bai.rollout.servers.sglang_server import _environment

HERE = Path(__file__).with_name("forked_servers")


@contextmanager
def fork_server() -> Iterator[None]:
    """Have a fork server, for this process and those it starts; its forks end with the block."""
    with TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as listener:
        address = Path(directory) / "forks"
        listener.bind(str(address))
        listener.listen(16)
        command = [sys.executable, str(HERE / "fork_server.py"), str(os.getpid()), str(listener.fileno())]
        with open(address.with_suffix(".log"), "wb") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=_environment("cpu"), pass_fds=[listener.fileno()]
            )
        listener.close()  # the server's alone: when it ends nobody waits for it
        try:
            with in_environment({"FORK_SERVER": str(address), "FORK_SERVER_PID": str(process.pid)}):
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
