"""A server or a Megatron-Core of a release without a row of the table: taken with `backend.untested`, if the server's
rows are the trainer's.
"""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import fake_sglang
import numpy as np
import pytest
from aiohttp import web
from family_runs import make_checkpoint, two_steps

from megatron_bai.compat.releases import SGLANG, installed_megatron
from megatron_bai.config import Rollout
from megatron_bai.rollout.servers.sglang_server import SGLangServer

RELEASE = "0.9.0"
# In a directory on the path: the installed Megatron-Core is taken out of the table; the fix for a CPU still names it.
UNTABLED = """
from megatron_bai import compat
from megatron_bai.compat import releases

del releases.MEGATRON[releases.installed_megatron()]
"""
ROLLOUT = Rollout(max_new_tokens=12, max_total_tokens=1024, sync="disk")

pytestmark = [pytest.mark.live, pytest.mark.long, pytest.mark.usefixtures("forked_servers")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("mixtral", tmp_path_factory.mktemp("untested") / "published")


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[SGLangServer]:
    with SGLangServer(checkpoint, ROLLOUT, checkpoint.parent / "server.log") as running:
        yield running


def shift(reply: dict[str, Any]) -> None:
    """Give every token the routes of the token before: right in shape and range."""
    meta = reply["meta_info"]
    rows = len(meta["output_token_logprobs"]) + meta["prompt_tokens"] - 1
    routes = np.frombuffer(base64.b64decode(meta["routed_experts"]), np.int32).reshape(rows, -1)
    meta["routed_experts"] = base64.b64encode(np.roll(routes, 1, axis=0).tobytes()).decode()


def lower(reply: dict[str, Any]) -> None:
    """Give every sampled token another log-probability."""
    pairs = reply["meta_info"]["output_token_logprobs"]
    reply["meta_info"]["output_token_logprobs"] = [[value - 0.05, *rest] for value, *rest in pairs]


@pytest.fixture
def untabled(tmp_path: Path) -> Path:
    """A directory for the path of a run whose Megatron-Core no one has tried."""
    directory = tmp_path / "untabled"
    directory.mkdir()
    (directory / "sitecustomize.py").write_text(UNTABLED)
    return directory


@contextmanager
def behind_proxy(server: SGLangServer, change: Any, release: str = RELEASE) -> Iterator[str]:
    """The server as one of another release, whose samples are changed."""

    async def pass_on(request: web.Request, body: dict[str, Any]) -> web.Response:
        async with aiohttp.ClientSession() as session:
            sent = {"json": body} if request.method == "POST" else {}
            async with session.request(request.method, server.url + str(request.rel_url), **sent) as reply:
                if reply.content_type != "application/json":
                    return web.Response(body=await reply.read(), status=reply.status, content_type=reply.content_type)
                content = await reply.json()
        if request.path == "/server_info":
            content["version"] = release
        elif request.path == "/generate" and body.get("return_routed_experts") and change:
            change(content)
        return web.json_response(content, status=reply.status)

    with fake_sglang.serve(pass_on) as url:
        yield url


def test_both_are_verified_and_trained_with(
    checkpoint: Path, server: SGLangServer, untabled: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with behind_proxy(server, None) as url:
        settings = ["rollout.sync=disk", f"rollout.urls=[{url}]", "backend.untested=true"]
        done = two_steps(checkpoint, run, *settings, first=(untabled,))
    said, engine = done.stderr + done.stdout, f"megatron-core {installed_megatron()}"
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"{engine} was not tried with this package; the probe verified: a model of one MoE layer is built" in said
    assert f"SGLang {RELEASE} and {engine}, which no one has tried, is verified: of a first rollout" in said
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [step["route_coverage"] for step in steps] == [1.0, 1.0]


@pytest.mark.parametrize("change", [shift, lower], ids=lambda change: change.__name__)
def test_rows_that_differ_are_refused_before_any_update(
    change: Any, checkpoint: Path, server: SGLangServer, untabled: Path, tmp_path: Path
) -> None:
    """`shift` of an unknown server, `lower` of a known one beside an unknown Megatron-Core."""
    release, first = (RELEASE, ()) if change is shift else (SGLANG, (untabled,))
    with behind_proxy(server, change, release) as url:
        settings = ["rollout.sync=disk", f"rollout.urls=[{url}]", "backend.untested=true"]
        done = two_steps(checkpoint, tmp_path / "run", *settings, first=first)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    engine = f"SGLang {RELEASE}" if change is shift else f"megatron-core {installed_megatron()}"
    assert f"error: {engine}, which no one has tried, is refused: of a first rollout" in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not (tmp_path / "run" / "metrics.jsonl").read_text()
