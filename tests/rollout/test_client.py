"""What the client does when the server misbehaves, and what it asks for when it does not."""

import asyncio
import base64
import gzip
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from fake_sglang import NEW_TOKENS, SIGNATURE, STOP, good_reply, serve

from megatron_bai.config import Rollout
from megatron_bai.errors import UserError
from megatron_bai.rollout import http_client
from megatron_bai.rollout.client import RolloutClient, SampleRequest, sampling_seed
from megatron_bai.rollout.route_format import RouteFormat
from megatron_bai.routing.routes import VersionSpan


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "_BACKOFF_S", 0.001)


def client(*urls: str, first_server: int = 0, **settings: Any) -> RolloutClient:
    rollout = Rollout(**({"max_new_tokens": NEW_TOKENS, "retries": 1} | settings))
    return RolloutClient(urls, rollout, RouteFormat(SIGNATURE), vocab_size=16, max_length=64, first_server=first_server)


def test_samples_come_by_prompt_then_member_whatever_answers_first() -> None:
    bodies = []

    async def answer(request: web.Request, body: dict[str, Any]) -> dict[str, Any]:
        bodies.append(body)
        await asyncio.sleep(0.05 if body["input_ids"][0] == 2 else 0)
        return good_reply(body["input_ids"])

    with serve(answer) as url:
        samples = client(url, temperature=0.7).generate([[2, 3], [4]], 2, seed=5, stop_token_ids=[STOP])
    assert [(s.prompt_index, s.tokens[0]) for s in samples] == [(0, 2), (0, 2), (1, 4), (1, 4)]
    asked = {(tuple(b["input_ids"]), b["sampling_params"]["sampling_seed"]) for b in bodies}
    prompts = {0: (2, 3), 1: (4,)}
    assert asked == {(ids, sampling_seed(5, index, m)) for index, ids in prompts.items() for m in (0, 1)}
    params = bodies[0]["sampling_params"]
    assert (params["temperature"], params["top_p"], params["top_k"]) == (0.7, 1.0, -1)
    assert params["stop_token_ids"] == [STOP] and params["max_new_tokens"] == NEW_TOKENS


def _continued(versions: list[str]) -> tuple[Any, list[dict[str, Any]]]:
    """Answers with tokens, log-probabilities and routes that tell their place and the call, as SGLang cuts them."""
    bodies: list[dict[str, Any]] = []

    def answer(request: web.Request, body: dict[str, Any]) -> dict[str, Any]:
        call, start, count = len(bodies), len(body["input_ids"]), body["sampling_params"]["max_new_tokens"]
        bodies.append(body)
        output = [2 + place % 8 for place in range(start, start + count)]
        first = body.get("routed_experts_start_len", 0)
        routes = [[[call, call + 1]] * SIGNATURE.moe_layers] * (start + count - 1 - first)
        return {
            "output_ids": output,
            "meta_info": {
                "finish_reason": {"type": "length", "length": count},
                "weight_versions": [{"version": versions[call], "start": 0, "end": count}],
                "output_token_logprobs": [[-1.0 - call, token, None] for token in output],
                "routed_experts": base64.b64encode(np.array(routes, dtype="<i4").tobytes()).decode(),
            },
        }

    return answer, bodies


def test_a_sample_in_parts_keeps_what_each_was_sampled_with() -> None:
    answer, bodies = _continued(["3", "4", "4"])
    with serve(answer) as url:
        asking, sample = client(url, max_new_tokens=9), None
        for _ in range(3):
            (sample,) = asking.sample([SampleRequest(0, [3, 4, 5], 77, sample)], [STOP], budget=4)
            assert sample.complete == (len(bodies) == 3)
    assert [body["input_ids"] for body in bodies] == [sample.tokens[:n].tolist() for n in (3, 7, 11)]
    assert [body["sampling_params"]["max_new_tokens"] for body in bodies] == [4, 4, 1]
    assert {body["sampling_params"]["sampling_seed"] for body in bodies} == {77}
    assert [body.get("routed_experts_start_len") for body in bodies] == [None, 6, 10]
    assert sample.finish == "length" and sample.prompt_length == 3 and len(sample.tokens) == 12
    assert sample.response.tolist() == [2 + place % 8 for place in range(3, 12)]
    assert sample.logprobs.tolist() == [-1.0] * 4 + [-2.0] * 4 + [-3.0]
    # 11 rows: the last token sampled in a call has its row from the next one, which was fed it.
    assert sample.routes[:, 0, 0].tolist() == [0] * 6 + [1] * 4 + [2] and sample.route_mask is None
    assert sample.spans == (VersionSpan("3", 0, 4), VersionSpan("4", 4, 9))
    assert sample.row_spans == (VersionSpan("3", 0, 6), VersionSpan("4", 6, 11))


def test_a_part_with_routes_of_all_its_tokens_is_refused() -> None:
    """A server that does not know where to start would send rows of other tokens."""
    answer, bodies = _continued(["3"] * 4)

    def whole(request: web.Request, body: dict[str, Any]) -> dict[str, Any]:
        return answer(request, {name: value for name, value in body.items() if name != "routed_experts_start_len"})

    with serve(whole) as url:
        asking = client(url, max_new_tokens=9)
        former = asking.sample([SampleRequest(0, [3, 4, 5], 77)], [STOP], budget=4)[0]
        with pytest.raises(UserError, match="routes have .* bytes, 4 tokens of 16 bytes need 64"):
            asking.sample([SampleRequest(0, [3, 4, 5], 77, former)], [STOP], budget=4)


def test_a_seed_is_sent_to_a_server_that_may_ignore_it() -> None:
    """SGLang ignores it without --enable-deterministic-inference, with it and without a seed it draws alike."""
    bodies = []

    def answer(request: web.Request, body: dict[str, Any]) -> dict[str, Any]:
        bodies.append(body)
        return good_reply(body["input_ids"])

    with serve(answer) as url:
        client(url, deterministic=False).generate([[2]], 2, 0, [STOP])
    seeds = {body["sampling_params"]["sampling_seed"] for body in bodies}
    assert seeds == {sampling_seed(0, 0, 0), sampling_seed(0, 0, 1)}


def test_seeds_differ_between_samples_and_fit_int64() -> None:
    seeds = {sampling_seed(s, p, m) for s in (-1, 0, 1) for p in range(30) for m in range(30)}
    assert len(seeds) == 3 * 30 * 30 and 0 <= min(seeds) and max(seeds) < 2**63
    assert sampling_seed(1, 23, 4) != sampling_seed(1, 2, 34)


def test_at_most_concurrency_requests_are_in_flight() -> None:
    flying, most = 0, 0

    async def answer(request: web.Request, body: dict[str, Any]) -> dict[str, Any]:
        nonlocal flying, most
        flying += 1
        most = max(most, flying)
        await asyncio.sleep(0.01)
        flying -= 1
        return good_reply(body["input_ids"])

    with serve(answer) as url:
        assert len(client(url, concurrency=3).generate([[2]], 12, 0, [STOP])) == 12
    assert most == 3


def _nan(body: dict[str, Any]) -> dict[str, Any]:
    reply = good_reply(body["input_ids"])
    reply["meta_info"]["output_token_logprobs"][1][0] = None
    return reply


def _drop(request: web.Request) -> dict[str, Any]:
    assert request.transport is not None
    request.transport.abort()
    return {}


FAULTS: dict[str, tuple[Any, str]] = {
    "truncated JSON": (lambda r, b: web.Response(text='{"output_ids": [1', content_type="application/json"), "char"),
    "not JSON": (lambda r, b: web.Response(text="<html>"), "Expecting value"),
    "status 500": (lambda r, b: web.Response(status=500, text="boom"), "status 500: boom"),
    "status 503": (lambda r, b: web.Response(status=503), "status 503"),
    "NaN": (lambda r, b: _nan(b), "not a finite number"),
    "broken connection": (lambda r, b: _drop(r), "ServerDisconnectedError"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_passing_fault_is_retried(fault: str) -> None:
    calls = 0

    def answer(request: web.Request, body: dict[str, Any]) -> Any:
        nonlocal calls
        calls += 1
        return FAULTS[fault][0](request, body) if calls == 1 else good_reply(body["input_ids"])

    with serve(answer) as url:
        assert len(client(url).generate([[2, 3]], 1, 0, [STOP])) == 1
    assert calls == 2


@pytest.mark.parametrize("fault", FAULTS)
def test_a_lasting_fault_is_one_clear_error(fault: str) -> None:
    calls = 0

    def answer(request: web.Request, body: dict[str, Any]) -> Any:
        nonlocal calls
        calls += 1
        return FAULTS[fault][0](request, body)

    with serve(answer) as url, pytest.raises(UserError) as caught:
        client(url).generate([[2, 3]], 1, 0, [STOP])
    assert url in str(caught.value) and "failed 2 times" in str(caught.value) and FAULTS[fault][1] in str(caught.value)
    assert calls == 2


def _compressed(data: bytes) -> web.Response:
    """A bomb: a thousandth of what it would become."""
    return web.Response(body=gzip.compress(data), headers={"Content-Encoding": "gzip"}, content_type="application/json")


BOMBS: dict[str, tuple[Any, str]] = {
    "compressed": (lambda: _compressed(b" " * (64 << 20)), r"the reply is compressed \(gzip\), which was not asked"),
    "long": (lambda: web.Response(text=" " * (4 << 20)), "the reply is longer than "),
    "deep": (lambda: web.Response(text="[" * 50_000), "it is nested too deeply"),
    "long number": (lambda: web.Response(text='{"output_ids": [' + "9" * 50_000 + "]}"), "Exceeds the limit"),
    "ambiguous": (lambda: web.Response(text='{"a": [1], "a": [2]}'), "the key 'a' stands twice"),
    "elsewhere": (lambda: web.Response(status=307, headers={"Location": "http://192.0.2.1/generate"}), "status 307"),
    "unknown token": (lambda: web.json_response(_renamed(16)), "token 16 is outside the vocabulary of 16"),
}


def _renamed(token: int) -> dict[str, Any]:
    reply = good_reply([2])
    reply["output_ids"][0] = reply["meta_info"]["output_token_logprobs"][0][1] = token
    return reply


@pytest.mark.parametrize("name", BOMBS)
def test_a_hostile_reply_costs_no_more_than_its_request(name: str) -> None:
    with serve(lambda request, body: BOMBS[name][0]()) as url:
        with pytest.raises(UserError, match=f"failed 2 times at /generate: {BOMBS[name][1]}"):
            client(url).generate([[2]], 1, 0, [STOP])


def test_samples_that_fail_leave_the_reason_in_their_place_and_are_asked_again() -> None:
    failing = {3}

    def answer(request: web.Request, body: dict[str, Any]) -> Any:
        asked.append(body["input_ids"][0])
        return web.Response(status=500) if asked[-1] in failing else good_reply(body["input_ids"])

    asked: list[int] = []
    with serve(answer) as url:
        first = client(url).generate([[2], [3], [4]], 2, 0, [STOP], max_failures=2)
        assert [isinstance(each, UserError) for each in first] == [False, False, True, True, False, False]
        assert "failed 2 times at /generate: status 500" in str(first[2])
        failing.clear()
        asked.clear()
        again = client(url).generate([[2], [3], [4]], 2, 0, [STOP], max_failures=2, previous=first)
    assert asked == [3, 3] and [sample.tokens[0] for sample in again] == [2, 2, 3, 3, 4, 4]
    assert all(after is before for before, after in zip(first, again) if not isinstance(before, UserError))


def test_nobody_waits_for_the_rest_of_too_many_failures() -> None:
    async def answer(request: web.Request, body: dict[str, Any]) -> Any:
        asked.append(body["input_ids"][0])
        if len(asked) > 2:
            await asyncio.sleep(0.2)
        return web.Response(status=500)

    asked: list[int] = []
    with serve(answer) as url:
        found = client(url, retries=0, concurrency=2).generate([[2], [3], [4], [5]], 5, 0, [STOP], max_failures=1)
    assert len(found) == 20 and all(isinstance(each, UserError) and "status 500" in str(each) for each in found)
    assert len(asked) < 20


def test_samples_of_other_weights_are_refused_and_asked_of_the_next_server() -> None:
    def answer(version: str) -> Any:
        def handle(request: web.Request, body: dict[str, Any]) -> dict[str, Any]:
            reply = good_reply(body["input_ids"])
            reply["meta_info"]["weight_versions"][0]["version"] = version
            return reply

        return handle

    with serve(answer("default")) as old, serve(answer("7")) as new:
        (sample,) = client(old, new).generate([[2]], 1, 0, [STOP], version="7")
        assert {span.version for span in sample.spans} == {"7"}
        with pytest.raises(UserError, match=r"sampled with weights \['default'\], the trainer is at 7"):
            client(old).generate([[2]], 1, 0, [STOP], version="7")


def test_a_hang_ends_after_the_time_out() -> None:
    async def answer(request: web.Request, body: dict[str, Any]) -> None:
        await asyncio.sleep(60)

    with serve(answer) as url, pytest.raises(UserError, match=r"no answer within rollout\.request_timeout_s=0\.1 s"):
        client(url, request_timeout_s=0.1).generate([[2]], 1, 0, [STOP])


def test_a_refusal_is_not_repeated() -> None:
    calls = 0

    def answer(request: web.Request, body: dict[str, Any]) -> web.Response:
        nonlocal calls
        calls += 1
        return web.Response(status=400, text="bad parameter")

    with serve(answer) as url, pytest.raises(UserError, match="refused a request with 400: bad parameter"):
        client(url).generate([[2]], 1, 0, [STOP])
    assert calls == 1


def test_nobody_there() -> None:
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9 failed 2 times"):
        client("http://127.0.0.1:9").generate([[2]], 1, 0, [STOP])


@pytest.mark.parametrize("ids", [[], [16], [-1], [0, 3, 99], [2] * 54])
def test_an_impossible_prompt_is_refused_before_anything_is_sent(ids: list[int]) -> None:
    calls: list[str] = []
    with serve(lambda request, body: calls.append(request.path)) as url, pytest.raises(UserError, match="prompt 1"):
        client(url).generate([[2], ids], 1, 0, [STOP])
    assert not calls


def test_an_impossible_sequence_is_not_scored() -> None:
    calls: list[str] = []
    with serve(lambda request, body: calls.append(request.path)) as url, pytest.raises(UserError, match="sequence 0"):
        client(url).score([[2, 16]])
    assert not calls


def test_prompts_go_to_the_servers_in_turn_and_failures_to_the_next() -> None:
    asked: dict[str, list[int]] = {"a": [], "b": []}

    def answer(name: str) -> Any:
        def handle(request: web.Request, body: dict[str, Any]) -> Any:
            asked[name].append(body["input_ids"][0])
            return (
                web.Response(status=500) if name == "b" and body["input_ids"][0] == 3 else good_reply(body["input_ids"])
            )

        return handle

    with serve(answer("a")) as a, serve(answer("b")) as b:
        samples = client(a, b).generate([[2], [3], [4]], 2, seed=0, stop_token_ids=[STOP])
        assert [s.prompt_index for s in samples] == [0, 0, 1, 1, 2, 2]
        assert (sorted(asked["a"]), asked["b"]) == ([2, 2, 3, 3, 4, 4], [3, 3])
        for name in asked:
            asked[name].clear()
        client(a, b, first_server=1).generate([[2], [4]], 1, seed=0, stop_token_ids=[STOP])
        assert asked == {"a": [4], "b": [2]}
        with pytest.raises(UserError, match=f"SGLang at {b} failed 2 times at /generate: status 500"):
            client(b).generate([[3]], 1, seed=0, stop_token_ids=[STOP])
