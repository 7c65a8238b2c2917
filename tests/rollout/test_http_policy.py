"""One client and one policy, of requests one by one and of many at a time."""

import ast
import asyncio
import gzip
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from fake_sglang import serve

import megatron_bai
from megatron_bai.errors import UserError
from megatron_bai.rollout import http_client
from megatron_bai.rollout.http_thread import PostingThread
from megatron_bai.rollout.servers import control, http_policy

PATH = "/model_info"
LIMIT_S = 0.5


def one(url: str) -> Any:
    return control.get(url, PATH, LIMIT_S)


def many(url: str) -> Any:
    limits = http_client.RequestLimits(2, LIMIT_S, 0, "a.timeout_s")
    results = http_client.post_all([url], PATH, [http_client.HttpRequest(0, {"a": 1}, lambda reply: reply)] * 2, limits)
    for result in results:
        if isinstance(result, UserError):
            raise result
    return results[0]


WAYS: dict[str, Callable[[str], Any]] = {"one": one, "many": many}


@pytest.fixture(params=WAYS)
def ask(request: pytest.FixtureRequest) -> Callable[[str], Any]:
    return WAYS[request.param]


def test_no_proxy_is_used(ask: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with serve(lambda request, body: {"served": True}) as url:
        assert ask(url) == {"served": True}


def test_no_redirect_is_followed(ask: Callable[[str], Any]) -> None:
    paths = []

    def away(request: web.Request, body: dict[str, Any]) -> web.Response:
        paths.append(request.path)
        return web.Response(status=307, headers={"Location": "/elsewhere"})

    with serve(away) as url, pytest.raises(UserError, match="307"):
        ask(url)
    assert set(paths) == {PATH}


def test_no_cookie_is_kept(ask: Callable[[str], Any]) -> None:
    """Not in a session either: one has requests to several servers, of which a name may stand for two."""
    cookies = []

    def answer(request: web.Request, body: dict[str, Any]) -> web.Response:
        cookies.append(request.headers.get("Cookie"))
        reply = web.json_response({})
        reply.set_cookie("a", "1")
        return reply

    with serve(answer) as url:
        url = url.replace("127.0.0.1", "localhost")  # an address's cookies are kept by no client
        limits = http_client.RequestLimits(1, LIMIT_S, 0, "a.timeout_s")
        request = http_client.HttpRequest(0, {}, lambda reply: reply)
        assert http_client.post_all([url], PATH, [request] * 3, limits) == [{}] * 3
        ask(url)
    assert set(cookies) == {None}


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (lambda: web.Response(body=gzip.compress(b"{}"), headers={"Content-Encoding": "gzip"}), r"compressed \(gzip\)"),
        (lambda: web.Response(text=" " * 5000), "longer than 4096 bytes"),
    ],
)
def test_a_reply_of_unknown_or_too_large_a_size_is_not_taken(
    ask: Callable[[str], Any], reply: Callable[[], web.Response], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "_REPLY_BYTES", 4096)
    monkeypatch.setattr(http_client.RequestLimits.__init__, "__defaults__", (4096,))
    with serve(lambda request, body: reply()) as url, pytest.raises(UserError, match=f"{url} .*{PATH}: .*{reason}"):
        ask(url)


def test_a_reply_that_comes_byte_by_byte_ends_at_the_time_limit(ask: Callable[[str], Any]) -> None:
    async def drip(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        reply = web.StreamResponse()
        await reply.prepare(request)
        for _ in range(600):
            try:
                await reply.write(b" ")
            except ConnectionError:  # the client has gone
                break
            await asyncio.sleep(LIMIT_S / 5)
        return reply

    with serve(drip) as url, pytest.raises(UserError, match=r"timed out|no answer within a\.timeout_s=0\.5 s"):
        ask(url)


def test_a_server_that_is_not_there_is_named_with_the_reason(ask: Callable[[str], Any]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"  # bound, and nobody listens
        with pytest.raises(UserError, match=f"SGLang at {url} .*{PATH}: ClientConnectorError Connection refused$"):
            ask(url)


def test_a_connection_that_breaks_and_an_address_that_is_none_are_user_errors(ask: Callable[[str], Any]) -> None:
    def drop(request: web.Request, body: dict[str, Any]) -> dict[str, Any]:
        assert request.transport is not None
        request.transport.abort()
        return {}

    with serve(drop) as url, pytest.raises(UserError, match=f"{PATH}: ServerDisconnectedError"):
        ask(url)
    with pytest.raises(UserError, match=f"{PATH}: InvalidUrl"):
        ask("http://")


def test_a_failure_of_tls_says_that_it_is_one(ask: Callable[[str], Any]) -> None:
    """Its number is 1, which is EPERM among errors of the system."""
    with serve(lambda request, body: {}) as url, pytest.raises(UserError) as raised:
        ask(url.replace("http:", "https:"))
    assert "SSL" in str(raised.value) and "not permitted" not in str(raised.value)


def test_requests_that_come_one_by_one_share_a_connection() -> None:
    peers: set[Any] = set()

    def answer(request: web.Request, body: dict[str, Any]) -> web.Response:
        assert request.transport is not None
        peers.add(request.transport.get_extra_info("peername"))
        return web.json_response({})

    limits = http_client.RequestLimits(1, LIMIT_S, 0, "a.timeout_s")
    request = http_client.HttpRequest(0, {}, lambda reply: reply)
    with serve(answer) as url, PostingThread([url], PATH, limits) as thread:
        assert [thread.submit(request).result() for _ in range(3)] == [{}] * 3
    assert len(peers) == 1


def fails_of_two(url: str) -> str:
    """What is said of two servers, of which the second has failed last."""
    limits = http_client.RequestLimits(2, LIMIT_S, 0, "a.timeout_s")
    request = http_client.HttpRequest(1, {}, lambda reply: reply)
    (result,) = http_client.post_all(["http://127.0.0.1:9", url], PATH, [request], limits)
    assert isinstance(result, UserError)
    return str(result)


def test_of_several_servers_the_one_that_failed_is_named() -> None:
    """Whether it refuses the connection, answers with an error or with no JSON, or not at all."""
    assert fails_of_two("http://127.0.0.1:10").endswith("Connection refused (http://127.0.0.1:10)")

    async def wait(request: web.Request, body: dict[str, Any]) -> dict[str, Any]:
        await asyncio.sleep(2 * LIMIT_S)
        return {}

    answers = {
        "status 500": web.Response(status=500),
        "Expecting property name": web.Response(text="{"),
        "no answer within": wait,
    }
    for said, answer in answers.items():
        with serve(answer if callable(answer) else lambda request, body, answer=answer: answer) as url:
            text = fails_of_two(url)
            assert said in text and text.endswith(f" ({url})"), text


def test_a_reply_may_say_that_it_is_not_compressed(ask: Callable[[str], Any]) -> None:
    answer = b'{"served": true}'
    with serve(lambda request, body: web.Response(body=answer, headers={"Content-Encoding": "identity"})) as url:
        assert ask(url) == {"served": True}


@pytest.mark.parametrize("length", [1, http_policy._LARGE_BYTES + 12345])
def test_a_body_arrives_whole_with_its_length(length: int) -> None:
    def answer(request: web.Request, body: dict[str, Any]) -> dict[str, Any]:
        return {"got": body["text"] == "x" * length, "length": request.content_length}

    with serve(answer) as url:
        assert control.post(url, PATH, {"text": "x" * length}) == {"got": True, "length": length + len('{"text": ""}')}


def test_no_other_client_is_imported() -> None:
    package = Path(megatron_bai.__file__).parent
    clients = {"aiohttp", "httpx", "requests", "urllib3", "http.client", "urllib.request"}
    users = {}
    for path in package.rglob("*.py"):
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        if found := names & clients:
            users[path.relative_to(package).as_posix()] = found
    assert users == dict.fromkeys(("rollout/http_client.py", "rollout/servers/http_policy.py"), {"aiohttp"})
