"""Servers that the runs of a study share: one of the policy, which each run gives its own weights, and one of rewards.

A run that started a server of its own would spend a fifth of its time on that.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from megatron_bai.rollout.servers import control
from megatron_bai.rollout.servers.ports import reserve_port
from megatron_bai.rollout.servers.sglang_server import _environment, last_error
from megatron_bai.utils.child_processes import die_with_parent

_HOST, _START_S = "127.0.0.1", 600.0


def _free_port() -> int:
    """A port that is free now, and released for the process that will reserve it itself."""
    reservation = reserve_port(_HOST, 0)
    reservation.release()
    return reservation.port


@contextmanager
def policy(checkpoint: Path, overrides: list[str], directory: Path) -> Iterator[str]:
    """The URL of a server for models of the checkpoint's shape, under the `rollout` settings among the overrides."""
    port = _free_port()
    words = [word for word in overrides if word.startswith("rollout.")]
    where = [f"run.dir={directory}", f"serve.checkpoint={checkpoint}", f"rollout.port={port}"]
    command = [sys.executable, "-m", "megatron_bai", "serve", *where, *words]
    with _running(command, port, directory / "policy-server.log") as url:
        yield url


@contextmanager
def rewards(model: Path, directory: Path) -> Iterator[str]:
    """The URL of a server with the reward model."""
    port = _free_port()
    options = {
        "model-path": model, "host": _HOST, "port": port, "device": "cpu", "dtype": "float32",
        "max-total-tokens": 16384, "max-running-requests": 64, "attention-backend": "torch_native",
        "sampling-backend": "pytorch", "grammar-backend": "none",
    }  # fmt: skip
    flags = ["is-embedding", "disable-radix-cache", "disable-cuda-graph", "sleep-on-idle"]
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "megatron_bai.rollout.servers.server_main", "--parent", str(os.getpid()), *words]
    with _running([*command, *(f"--{flag}" for flag in flags)], port, directory / "reward-server.log") as url:
        yield url


@contextmanager
def _running(command: list[str], port: int, log: Path) -> Iterator[str]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as out:
        server = subprocess.Popen(
            command, stdout=out, stderr=out, env=_environment("cpu"), start_new_session=True,
            preexec_fn=partial(die_with_parent, os.getpid()),
        )  # fmt: skip

    def check() -> None:
        if server.poll() is not None:
            raise SystemExit(f"a server ended with {server.returncode}: {last_error(log)} [{log}]")

    url = f"http://{_HOST}:{port}"
    try:
        if not control.wait_until_healthy(url, _START_S, check):
            raise SystemExit(f"a server did not answer within {_START_S:g} s: {last_error(log)} [{log}]")
        yield url
    finally:
        server.kill()  # what it started ends with it; asked to end, SGLang may wait for its workers for ever
        server.wait()
