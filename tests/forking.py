"""Servers for tests that are not about starting them: forks of a process that has imported SGLang (forked_servers)."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_bai.rollout.servers.sglang_server import _environment

HERE = Path(__file__).with_name("forked_servers")


@contextmanager
def fork_server(directory: Path) -> Iterator[dict[str, str]]:
    """The variables with which commands get forks in place of servers; the forks end with the block."""
    address = directory / "forks"
    with socket.socket(socket.AF_UNIX) as listener, open(directory / "fork_server.log", "wb") as log:
        listener.bind(str(address))
        listener.listen(16)  # who asks before SGLang is imported waits
        command = [sys.executable, str(HERE / "fork_server.py"), str(listener.fileno())]
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=_environment("cpu"), pass_fds=[listener.fileno()]
        )
    try:
        path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
        yield {"PYTHONPATH": path, "FORKED_SERVERS": str(address)}
    finally:
        process.kill()
        process.wait()


@contextmanager
def in_environment(variables: dict[str, str]) -> Iterator[None]:
    """Processes started in the block have these variables."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield
