"""Forks that stand in for servers in other tests: they serve, they end as servers do, and threads are refused."""

import json
import os
import socket
import threading
import time
from contextlib import suppress

import psutil
import pytest
from forked_servers import fork_server
from tiny import LENGTH, ROLLOUT, SIGNATURE, STOP, VOCAB

from megatron_bai.rollout.client import RolloutClient
from megatron_bai.rollout.route_format import RouteFormat
from megatron_bai.rollout.servers import control
from megatron_bai.rollout.servers.sglang_server import SGLangServer


def fork_of(server: SGLangServer) -> list[psutil.Process]:
    """All processes of a fork, the one that listens first."""
    for process in psutil.Process(int(os.environ["FORK_SERVER_PID"])).children():
        if server.port in [each.laddr.port for each in process.net_connections() if each.status == "LISTEN"]:
            return [process, *process.children(recursive=True)]
    return []


def left(fork: list[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended; a zombie has, and waits for this machine's init."""
    with suppress(psutil.NoSuchProcess):
        return [each for each in fork if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
    return fork  # one ended meanwhile: look again


@pytest.mark.live
@pytest.mark.long
@pytest.mark.usefixtures("forked_servers")
@pytest.mark.parametrize("graceful", [True, False])
def test_a_fork_serves_and_ends_with_the_process_that_stands_for_it(checkpoints, tmp_path, graceful) -> None:
    with SGLangServer(checkpoints["v0"], ROLLOUT, tmp_path / "log") as server:
        fork = fork_of(server)
        assert len(fork) >= 3, "server, scheduler, detokenizer"
        assert psutil.Process(server.pid).children() == []
        client = RolloutClient([server.url], ROLLOUT, RouteFormat(SIGNATURE), VOCAB, LENGTH)
        assert len(client.generate([[5, 6]], 2, 0, [STOP])) == 2
        server.stop(graceful)
    gone_by = time.monotonic() + 60
    while left(fork) and time.monotonic() < gone_by:
        time.sleep(0.05)
    assert not left(fork) and not control.is_healthy(server.url)


def test_a_process_with_threads_is_not_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork_server.os, "fork", lambda: pytest.fail("it was forked"))
    asking, asked = socket.socketpair()
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        socket.send_fds(asking, [b"\n"], [1, 2])
        asking.sendall(json.dumps({}).encode() + b"\n")
        with pytest.raises(AssertionError, match=r"a fork of a process with \d+ threads would lose all but one"):
            fork_server.fork(asked, [], fork_server.run_server)
    finally:
        done.set()
        thread.join()
        asking.close()
        asked.close()
