"""Whoever can be reached from other machines asks for a key, which is shown to nobody else."""

import logging
import os
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from fake_sglang import SIGNATURE, STOP, good_reply, serve

from megatron_bai.config import Rollout
from megatron_bai.errors import UserError
from megatron_bai.rollout.client import RolloutClient
from megatron_bai.rollout.route_format import RouteFormat
from megatron_bai.rollout.servers import auth, control, fleet
from megatron_bai.rollout.servers.server_main import keep_out_of_logs, parse_args
from megatron_bai.rollout.servers.sglang_server import SGLangServer

KEY = "sesame-0123456789"


@pytest.fixture
def key_file(tmp_path: Path) -> str:
    path = tmp_path / "key"
    path.write_text(f"{KEY}\n")
    path.chmod(0o600)
    return str(path)


def client(url: str, **settings: Any) -> RolloutClient:
    return RolloutClient([url], Rollout(max_new_tokens=4, retries=0, **settings), RouteFormat(SIGNATURE), 16, 64)


def locked(request: web.Request, body: dict[str, Any]) -> Any:
    """As SGLang's middleware (srt/utils/auth.py) does."""
    if request.headers.get("Authorization") != f"Bearer {KEY}" and not request.path.startswith("/health"):
        return web.json_response({"error": "Unauthorized"}, status=401)
    return good_reply(body["input_ids"]) if request.path == "/generate" else {"weight_version": "v0"}


def test_every_request_carries_the_key_and_none_without_it_is_served(key_file: str) -> None:
    with serve(locked) as url:
        with pytest.raises(UserError, match=f"{url} refused a request with 401"):
            client(url).generate([[2]], 1, 0, [STOP])
        with pytest.raises(UserError, match=f"{url} refused /model_info with 401"):
            control.weight_version(url)
        assert client(url, api_key_file=key_file).generate([[2]], 1, 0, [STOP])
        assert control.weight_version(url) == "v0"
        client(url)
        assert auth.request_headers(url) == {"Accept-Encoding": "identity"}


def test_the_key_goes_to_its_server_alone(key_file: str) -> None:
    seen: list[Any] = []

    def note(request: web.Request, body: dict[str, Any]) -> dict[str, Any]:
        seen.append(request.headers.get("Authorization"))
        return {}

    with serve(note) as other:

        def send_away(request: web.Request, body: dict[str, Any]) -> web.Response:
            return web.Response(status=302, headers={"Location": f"{other}/generate"})

        with serve(send_away) as url:
            asker = client(url, api_key_file=key_file)
            with pytest.raises(UserError, match="status 302"):
                asker.generate([[2]], 1, 0, [STOP])
            with pytest.raises(UserError, match="refused /model_info with 302"):
                control.weight_version(url)
        control.get(other, "/model_info")
    assert seen == [None]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"host": "0.0.0.0"}, "rollout.host=0.0.0.0 is reached from other machines: name a file"),
        ({"host": "10.0.0.1"}, "rollout.host=10.0.0.1 is reached"),
        ({"urls": ["http://10.0.0.1:30000"]}, "the server http://10.0.0.1:30000 is reached"),
        ({"urls": ["http://127.0.0.1:1"], "router": "http://gpu7:2"}, "the server http://gpu7:2 is reached"),
    ],
)
def test_a_server_that_others_reach_needs_a_key(settings: dict[str, Any], named: str, key_file: str) -> None:
    with pytest.raises(UserError, match=named):
        fleet.validate(Rollout(**settings))
    fleet.validate(Rollout(**settings, api_key_file=key_file))


def test_no_server_is_started_where_others_reach_it_without_a_key(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    server = SGLangServer(tmp_path, Rollout(host="0.0.0.0"), tmp_path / "log")
    with pytest.raises(UserError, match="rollout.host=0.0.0.0 is reached from other machines"):
        server.start()
    assert server.pid is None


@pytest.mark.parametrize(
    ("content", "mode", "named"),
    [
        (None, 0, "cannot be read: No such file"),
        (b"\xff\xfe", 0o600, "cannot be read: it is no text"),
        (b"sesame", 0o640, "is open to other users: chmod 600"),
        (b"sesame", 0o604, "is open to other users: chmod 600"),
        (b"\n", 0o600, "holds no key"),
        (b"one\ntwo", 0o600, "holds no key"),
        (b"one two", 0o600, "holds no key"),
    ],
)
def test_a_file_without_a_usable_key_is_named(content: bytes | None, mode: int, named: str, tmp_path: Path) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
        path.chmod(mode)
    with pytest.raises(UserError, match=f"rollout.api_key_file={path} {named}") as caught:
        auth.read_key(str(path))
    assert "sesame" not in str(caught.value)


def test_the_command_line_names_the_file_and_the_log_shows_stars(
    key_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.json").write_text("{}")
    started: list[list[str]] = []
    monkeypatch.setattr("subprocess.Popen", lambda command, **_: started.append(command))
    SGLangServer(tmp_path, Rollout(host="0.0.0.0", api_key_file=key_file), tmp_path / "log").launch()
    words = started[0][3:]
    assert KEY not in " ".join(words)
    found = parse_args(words)
    assert (found.parent, found.key, found.take_tensors) == (os.getpid(), KEY, False)
    assert found.rest[0] == "--model-path" and found.words[2:] == ("--key-file", key_file)
    assert found.words[:2] == ("--instance", found.instance) and len(found.instance) == 32
    former = logging.getLogRecordFactory()
    try:
        keep_out_of_logs(KEY)
        logging.getLogger("sglang").warning("server_args=%s", {"api_key": KEY})
    finally:
        logging.setLogRecordFactory(former)
    assert "server_args={'api_key': '***'}" in caplog.text and KEY not in caplog.text
