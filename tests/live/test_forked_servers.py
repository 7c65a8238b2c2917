"""Forks that stand in for servers in other tests: they serve, they end as servers do, and threads are refused."""

import json
import socket
import threading
import time

import psutil
import pytest
from forked_servers import fork_server
from tiny import LENGTH, ROLLOUT, SIGNATURE, STOP, VOCAB

from megatron_bai.rollout.client import RolloutClient
from megatron_bai.rollout.servers import control
from megatron_bai.rollout.servers.sglang_server import SGLangServer

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("forked_servers")]


def forks() -> list[psutil.Process]:
    """All processes of all forks."""
    (parent,) = [p for p in psutil.Process().children() if any(w.endswith("fork_server.py") for w in p.cmdline())]
    return parent.children(recursive=True)


@pytest.mark.parametrize("politely", [True, False])
def test_a_fork_serves_and_ends_with_the_process_that_stands_for_it(checkpoints, tmp_path, politely) -> None:
    before = set(forks())
    with SGLangServer(checkpoints["v0"], ROLLOUT, tmp_path / "log") as server:
        assert len(set(forks()) - before) >= 3, "server, scheduler, detokenizer"
        assert psutil.Process(server.pid).children() == []
        client = RolloutClient([server.url], ROLLOUT, SIGNATURE, VOCAB, LENGTH)
        assert len(client.generate([[5, 6]], 2, 0, STOP)) == 2
        server.stop(politely)
    gone_by = time.monotonic() + 60
    while set(forks()) - before and time.monotonic() < gone_by:
        time.sleep(0.05)
    assert not set(forks()) - before and not control.healthy(server.url)


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
            fork_server.fork(asked, [])
    finally:
        done.set()
        thread.join()
        asking.close()
        asked.close()
