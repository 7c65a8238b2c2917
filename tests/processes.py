"""Running Megatron-Core in processes of its own: on a CPU it changes what `torch.cuda` means in a process."""

import functools
import gc
import importlib
import os
import random
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_bai import compat

TESTS = Path(__file__).parent
_TIMEOUT_S = 1800  # of a script, which may have minutes of work, on a machine that does something else as well


def launch(script: Path, *arguments: object, fresh: bool = False) -> str:
    """Run a script in a process of its own, with this directory importable, and return what it printed.

    The process is a fork of one that has imported Megatron-Core, unless it is to be `fresh`: where the script is about
    what happens on import, or about memory.

    Raises:
        AssertionError: it failed; shows the end of what it said.
    """
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [str(script), *map(str, arguments)]
    if fresh:
        command.insert(0, sys.executable)
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, env=environment)
    else:
        import forking  # scripts import this module, and have no need of pytest

        done = forking.run_script(command, environment, _TIMEOUT_S)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


def prepare(*modules: str) -> None:
    """Import what ranks forked from this process need, once for all; their collector does not look at it again."""
    compat.apply("megatron-cpu")
    for module in modules:
        importlib.import_module(module)
    gc.freeze()


def fork_ranks(work: Callable[[int], None], count: int) -> None:
    """Call `work(rank)` for each rank in a fork of its own, and wait for all.

    Raises:
        AssertionError: one failed; its traceback is on standard error.
    """
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            try:
                work(rank)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    assert not any([os.waitpid(child, 0)[1] for child in children])


def free_port() -> int:
    """A port for a process that will listen on it later.

    Not one the system gives to connections (from 32768), nor to a server (from 20000): until somebody listens, any
    other process of the machine may get such a port, and tests run side by side.
    """
    for port in random.SystemRandom().sample(range(10000, 20000), 100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise OSError("no port of a hundred is free")


@dataclass(frozen=True)
class Layouts:
    """What `distributed/worker.py` left: the facts of each case, and the directory of their checkpoints."""

    directory: Path

    @functools.cache  # noqa: B019, there is one for a whole session of tests
    def __getitem__(self, case: str) -> dict[str, Any]:
        return torch.load(self.directory / f"{case}.pt")
