"""What this package says to SGLang, held against what SGLang itself says that it understands.

FastAPI drops a field it does not know without a word, so a renamed one would change nothing but the results. Here all
that is sent passes through a recorder on its way to a real server, and is compared with that server's OpenAPI schema,
which it makes of its own request classes.
"""

import re
from contextlib import closing
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
import fake_sglang
import pytest
import torch
from aiohttp import web
from jsonschema import Draft202012Validator
from safetensors.torch import load_file
from tiny import LENGTH, ROLLOUT, SIGNATURE, STOP, VOCAB

import megatron_bai
from megatron_bai.config import RewardModel
from megatron_bai.data.task import Prompt
from megatron_bai.errors import UserError
from megatron_bai.rewards.reward import Item
from megatron_bai.rewards.reward_model import _make_body
from megatron_bai.rollout.client import RolloutClient
from megatron_bai.rollout.route_format import RouteFormat
from megatron_bai.rollout.servers import control, fleet, releases, weight_sync
from megatron_bai.rollout.servers.broadcast_transport import BroadcastTransport
from megatron_bai.rollout.servers.sglang_server import SGLangServer

pytestmark = pytest.mark.live
# Asked of a reward model's server, which the tests of rewards start.
ELSEWHERE = {"/classify"}


@dataclass(frozen=True)
class Said:
    """One request and its reply."""

    method: str
    path: str
    query: dict[str, str]
    body: dict[str, Any]
    status: int
    reply: Any


@pytest.fixture(scope="module")
def spec(server: SGLangServer) -> dict[str, Any]:
    return control.get(server.url, "/openapi.json")


@pytest.fixture(scope="module")
def said(server: SGLangServer, checkpoints: dict[str, Path]) -> list[Said]:
    """Everything there is to say, once."""
    heard: list[Said] = []

    async def pass_on(request: web.Request, body: dict[str, Any]) -> web.Response:
        timeout = aiohttp.ClientTimeout(total=120)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            sent = {"json": body} if request.method == "POST" else {}
            async with session.request(request.method, server.url + str(request.rel_url), **sent) as reply:
                text, kind = await reply.text(), reply.content_type
                content = await reply.json() if kind == "application/json" else text
                heard.append(Said(request.method, request.path, dict(request.query), body, reply.status, content))
                return web.Response(text=text, status=reply.status, content_type=kind)

    with fake_sglang.serve(pass_on) as url:
        assert control.is_healthy(url)
        servers = fleet.connect_servers(replace(ROLLOUT, urls=[url])).fleet
        client = RolloutClient(
            servers.sampling_urls, replace(ROLLOUT, max_new_tokens=4), RouteFormat(SIGNATURE), VOCAB, LENGTH
        )
        client.generate([[5, 6, 7]], 2, 0, [STOP])
        truncated = replace(ROLLOUT, max_new_tokens=4, top_k=3, top_p=0.9)
        RolloutClient(servers.sampling_urls, truncated, RouteFormat(SIGNATURE), VOCAB, LENGTH).generate(
            [[5, 6, 7]], 1, 0, [STOP]
        )
        client.score([[5, 6, 7]])
        shapes, weights = (
            weight_sync.tensor_shapes(checkpoints["v0"]),
            load_file(checkpoints["v0"] / "model.safetensors"),
        )
        weight_sync.sync_from_disk(servers.urls, checkpoints["v0"], "by-disk", shapes)
        over_http = weight_sync.HttpTransport(servers.urls, servers.tp_sizes)
        weight_sync.sync_from_tensors(servers.urls, weights.items(), "by-http", shapes, over_http, 1 << 17)
        with closing(BroadcastTransport(servers.urls, servers.tp_sizes, "127.0.0.1", torch.device("cpu"), 60)) as group:
            weight_sync.sync_from_tensors(servers.urls, weights.items(), "by-group", shapes, group, 1 << 17)
    return heard


def schema_of(spec: dict[str, Any], said: Said) -> dict[str, Any]:
    operation = spec["paths"][said.path][said.method.lower()]
    return operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})


def test_every_path_and_field_is_one_that_sglang_has(spec: dict[str, Any], said: list[Said]) -> None:
    for each in said:
        assert each.status == 200, each
        assert each.path in spec["paths"] and each.method.lower() in spec["paths"][each.path], each.path
        asked = {parameter["name"] for parameter in spec["paths"][each.path][each.method.lower()].get("parameters", ())}
        assert set(each.query) <= asked, (each.path, each.query)
        schema = schema_of(spec, each)
        if "$ref" in schema:
            named = spec["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
            assert set(each.body) <= set(named["properties"]), each.path
            Draft202012Validator(schema | {"components": spec["components"]}).validate(each.body)
        else:
            assert each.body == {}, f"{each.path} reads no body"


def test_no_path_is_left_unsaid(said: list[Said], spec: dict[str, Any]) -> None:
    """A new endpoint in the source must pass through this test, too."""
    source = Path(megatron_bai.__file__).parent
    texts = [path.read_text() for part in ("rollout", "rewards", "rl") for path in (source / part).rglob("*.py")]
    call = r"""(?:\b(?:get|post|request)\(url, |\b(?:(?:post|run)_all|PostingThread)\([^"]*)"""
    asks = re.compile(call + r"""f?"(/[a-z_0-9]+)""")
    written = {path for text in texts for path in asks.findall(text)}
    assert written >= ELSEWHERE and written - ELSEWHERE == {each.path for each in said}


def test_sampling_parameters_are_checked_by_sglang_itself(server: SGLangServer, said: list[Said]) -> None:
    """They are no part of the schema; but an unknown one is refused, and ours were not."""
    assert {"temperature", "sampling_seed", "stop_token_ids"} <= {
        name for each in said for name in each.body.get("sampling_params", ())
    }
    body = {"input_ids": [5], "sampling_params": {"max_new_tokens": 1, "temprature": 1.0}}
    with pytest.raises(UserError, match="refused /generate with (400|500)"):
        control.post(server.url, "/generate", body)


def test_what_is_read_of_a_server_is_what_it_says(said: list[Said]) -> None:
    """All that is looked up with a default: its absence would pass for an answer."""
    (info, *_) = [each.reply for each in said if each.path == "/server_info"]
    assert {
        "version",
        "tp_size",
        "dp_size",
        *releases._REQUIRED_FLAGS,
        *releases._SEED_FLAGS,
        *releases._FORBIDDEN_FLAGS,
        releases._DEFAULTS,
        releases._MASK_TOKENS,
        releases._NO_TOKENIZER,
    } <= set(info)
    assert info["version"] == version("sglang")
    (model, *_) = [each.reply for each in said if each.path == "/model_info"]
    assert {"weight_version", "is_generation"} <= set(model)


def test_the_fake_of_other_tests_answers_as_the_real_one(said: list[Said]) -> None:
    def shape(value: Any, of: Any) -> Any:
        """Types, by the keys of `of`."""
        if isinstance(of, dict):
            return {key: shape(value[key], of[key]) for key in of}
        return [shape(value[0], of[0])] if isinstance(of, list) and of else type(value)

    real = next(each.reply for each in said if each.body.get("return_routed_experts"))
    fake = fake_sglang.good_reply([5, 6, 7])
    fake["meta_info"]["finish_reason"] = {"type": "length"}  # "stop" has other details
    assert shape(real, fake) == shape(fake, fake)


@pytest.mark.parametrize("send", ["text", "ids"])
def test_a_reward_models_request_is_in_the_schema(spec: dict[str, Any], send: str) -> None:
    item = Item(Prompt([5, 6], "5 6", ""), "7", [7])
    body = _make_body(RewardModel(url="http://127.0.0.1:1", send=send))(item)
    said = Said("POST", "/classify", {}, body, 200, None)
    Draft202012Validator(schema_of(spec, said) | {"components": spec["components"]}).validate(body)
    assert set(body) <= set(spec["components"]["schemas"]["EmbeddingReqInput"]["properties"])
