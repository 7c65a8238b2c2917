"""What a real server's faults cost: between it and those who ask, and its own; and who may ask it."""

import asyncio
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
import pytest
from aiohttp import web
from fake_sglang import serve
from tiny import LENGTH, ROLLOUT, SIGNATURE, STOP, VOCAB

from megatron_bai.errors import UserError
from megatron_bai.rollout.client import RolloutClient
from megatron_bai.rollout.route_format import RouteFormat
from megatron_bai.rollout.sample import Sample
from megatron_bai.rollout.servers import auth, control, fleet
from megatron_bai.rollout.servers.fleet import ServerFleet
from megatron_bai.rollout.servers.sglang_server import SGLangServer
from megatron_bai.rollout.servers.weight_sync import sync_from_disk, tensor_shapes
from megatron_bai.utils import terminal_logging

pytestmark = [pytest.mark.live, pytest.mark.long]
PROMPTS = [[5, 6, 7], [9], [11, 12, 13]]
KEY = "sesame-0123456789"
Note = Callable[[str, str, str, float | None], None]  # the fixture `fault`


def client(*urls: str, **changes: Any) -> RolloutClient:
    return RolloutClient(urls, replace(ROLLOUT, **changes), RouteFormat(SIGNATURE), VOCAB, LENGTH)


async def _late(reply: bytes) -> web.Response:
    await asyncio.sleep(60)
    return web.Response(body=reply)


async def _error(reply: bytes) -> web.Response:
    return web.Response(status=500, text="out of memory")


async def _cut(reply: bytes) -> web.Response:
    return web.Response(body=reply[: len(reply) // 2], content_type="application/json")


# Nothing makes SGLang itself do these when a test wants it, so they are done to its replies on their way.
ON_THE_WAY = {
    "a server slower than the time limit": (_late, "no answer within rollout.request_timeout_s=5 s"),
    "a server answers 500": (_error, "status 500: out of memory"),
    "a server answers truncated JSON": (_cut, r"(Expecting|Unterminated).*char \d+"),
}


def proxy(server: SGLangServer, spoil: Any, times: float) -> Any:
    """In front of the server: its first replies, so many, are spoiled."""
    left = [times]

    async def handle(request: web.Request, body: dict[str, Any]) -> web.Response:
        async with aiohttp.ClientSession() as session, session.post(server.url + request.path, json=body) as reply:
            data = await reply.read()
        left[0] -= 1
        return await spoil(data) if left[0] >= 0 else web.Response(body=data, content_type="application/json")

    return serve(handle)


@pytest.mark.parametrize("name", ON_THE_WAY)
def test_a_fault_on_the_way_costs_a_repetition_and_a_lasting_one_the_sample(
    name: str, server: SGLangServer, serving: Callable[[str], None], fault: Note
) -> None:
    serving("v0")
    (spoil, why), limits = ON_THE_WAY[name], {"request_timeout_s": 5.0, "max_new_tokens": 8}
    plain = client(server.url, **limits).generate(PROMPTS, 2, 3, [STOP])
    with proxy(server, spoil, times=2) as url:
        start = time.monotonic()
        found = client(url, **limits).generate(PROMPTS, 2, 3, [STOP], version="v0", max_failures=0)
        seconds = time.monotonic() - start
    for sample, undisturbed in zip(found, plain, strict=True):
        np.testing.assert_array_equal(sample.tokens, undisturbed.tokens)
        np.testing.assert_allclose(sample.logprobs, undisturbed.logprobs, atol=1e-4, rtol=0)
    with proxy(server, spoil, times=float("inf")) as url:
        (lost,) = client(url, retries=0, **limits).generate([[5]], 1, 0, [STOP], max_failures=1)
        (other,) = client(url, server.url, **limits).generate([[5]], 1, 0, [STOP], max_failures=1)
    assert isinstance(lost, UserError) and re.search(f"failed 1 times at /generate: {why}", str(lost))
    assert isinstance(other, Sample)
    cost = "nothing: the request is retried, at the next server first; the sample if all retries fail (the line)"
    if name == "a server slower than the time limit":
        fault("a server slower than the time limit", cost, str(lost), seconds)
    elif name == "a server answers 500":
        fault("a server answers 500", cost, str(lost), seconds)
    else:
        fault("a server answers truncated JSON", cost, str(lost), seconds)


@pytest.fixture(scope="module")
def servers(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerFleet]:
    """One that other machines could reach, and that may be started anew once."""
    directory = tmp_path_factory.mktemp("own")
    key = directory / "key"
    key.touch(mode=0o600)
    key.write_text(KEY)
    rollout = replace(ROLLOUT, host="0.0.0.0", api_key_file=str(key), restarts=1, request_timeout_s=5.0, sync="disk")
    with fleet.start_servers(checkpoints["v0"], rollout, directory, "cpu") as own:
        yield own


def processes(server: SGLangServer) -> list[psutil.Process]:
    first = psutil.Process(server.pid)
    return [first, *first.children(recursive=True)]


def listening(server: SGLangServer) -> set[tuple[str, int]]:
    """Addresses that its processes accept connections at."""
    sockets = (each for process in processes(server) for each in process.net_connections("inet"))
    return {tuple(each.laddr) for each in sockets if each.status == psutil.CONN_LISTEN}


def test_a_server_is_on_loopback(server: SGLangServer) -> None:
    found = listening(server)
    assert ("127.0.0.1", server.port) in found and {address for address, _ in found} == {"127.0.0.1"}


def test_a_server_elsewhere_serves_nobody_without_the_key(servers: ServerFleet) -> None:
    (url,) = servers.fleet.urls
    server = servers.owned[url]
    path = server.rollout.api_key_file
    assert {place for place in listening(server) if place[0] in ("0.0.0.0", "::")} == {("0.0.0.0", server.port)}
    assert client(url, api_key_file=path).generate([[5]], 1, 0, [STOP])
    for pickled in ("/update_weights_from_tensor", "/update_weights_from_ipc", "/load_lora_adapter_from_tensors"):
        with pytest.raises(UserError, match=f"refused {pickled} with 404"):
            control.post(url, pickled, {"serialized_named_tensors": []})
    auth.register_key([url], "")
    for asking in ("/model_info", "/server_info", "/flush_cache", "/get_weights_by_name"):
        with pytest.raises(UserError, match=f"refused {asking} with 401"):
            control.get(url, asking)
    with pytest.raises(UserError, match="refused a request with 401"):
        client(url).generate([[5]], 1, 0, [STOP])
    auth.register_key([url], path)
    assert control.weight_version(url) == "default"
    for process in processes(server):
        assert KEY not in " ".join(process.cmdline()) and KEY not in str(process.environ())
    log = server.log_path.read_text()
    assert "api_key" in log and KEY not in log


def test_a_hung_server_is_started_anew_and_asked_for_what_it_owes(
    servers: ServerFleet, checkpoints: dict[str, Path], capsys: pytest.CaptureFixture, fault: Note
) -> None:
    (url,) = servers.fleet.urls
    path = servers.owned[url].rollout.api_key_file
    sync_from_disk([url], checkpoints["v1"], "v1", tensor_shapes(checkpoints["v1"]))
    asked: dict[str, Any] = {"version": "v1", "max_failures": 6}
    wanted = client(url, api_key_file=path).generate(PROMPTS, 2, 3, [STOP], **asked)
    assert servers.recover(checkpoints["v0"], "v1") == []  # nothing is wrong
    before = processes(servers.owned[url])
    next(process for process in before if "scheduler" in " ".join(process.cmdline())).suspend()
    start = time.monotonic()
    hurried = client(url, api_key_file=path, request_timeout_s=1.0, retries=0)
    failed = hurried.generate(PROMPTS, 2, 3, [STOP], **asked)
    assert all("no answer within rollout.request_timeout_s=1 s" in str(each) for each in failed)
    capsys.readouterr()
    terminal_logging.setup()
    assert len(servers.recover(checkpoints["v0"], "v1")) == 1
    line = capsys.readouterr().err.strip()
    assert line == f"[rank 0] SGLang at {url} does not answer /server_info: timed out: it is started anew (1 of 1)"
    assert not psutil.wait_procs(before, timeout=10)[1]
    with pytest.raises(UserError, match=r"sampled with weights \['default'\], the trainer is at v1"):
        client(url, api_key_file=path, retries=0).generate([[5]], 1, 3, [STOP], version="v1")
    sync_from_disk([url], checkpoints["v1"], "v1", tensor_shapes(checkpoints["v1"]))
    found = client(url, api_key_file=path).generate(PROMPTS, 2, 3, [STOP], **asked, previous=failed)
    seconds = time.monotonic() - start
    for sample, owed in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(sample.tokens, owed.tokens)
    fault("a server hangs (SIGSTOP)", "nothing: outstanding requests are retried after the time limit", line, seconds)


def test_a_server_that_fails_too_often_is_one_clear_error(servers: ServerFleet, checkpoints: dict[str, Path]) -> None:
    (url,) = servers.fleet.urls
    server = servers.owned[url]
    server.check_alive()
    family = processes(server)
    os.kill(server.pid, signal.SIGKILL)
    with pytest.raises(UserError, match=rf"SGLang at {url} failed 3 times at /generate: Client\w+Error"):
        client(url, api_key_file=server.rollout.api_key_file).generate([[5]], 1, 0, [STOP])
    ended = r"the SGLang server ended \(exit code -9\): .*log\]"
    with pytest.raises(UserError, match=rf"{ended}: the server failed more than rollout.restarts=1 times"):
        servers.recover(checkpoints["v0"], "v1")
    with pytest.raises(UserError, match=ended):
        server.check_alive()
    assert not control.is_healthy(url)
    with pytest.raises(UserError, match="does not answer /model_info"):
        control.weight_version(url)
    assert not psutil.wait_procs(family[1:], timeout=30)[1]
    server.stop()
    server.stop()
