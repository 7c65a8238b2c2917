"""A reply is taken whole or refused with a reason."""

import base64
from typing import Any

import numpy as np
import pytest
from fake_sglang import NEW_TOKENS, SIGNATURE, STOP, good_reply

from megatron_bai.rollout.parse_reply import max_reply_bytes, parse_logprobs, parse_sample
from megatron_bai.rollout.route_format import RouteFormat
from megatron_bai.rollout.sample import Sample, VersionSpan
from megatron_bai.routing.layout import ServedColumns

PROMPT = [7, 8, 9]
FORMAT, WEIGHTED = RouteFormat(SIGNATURE), RouteFormat(SIGNATURE, weight_limit=1.0)


def convert(reply: Any) -> Sample:
    return parse_sample(reply, 2, PROMPT, FORMAT, NEW_TOKENS, [STOP])


def test_good_reply() -> None:
    sample = convert(good_reply(PROMPT))
    assert sample.prompt_index == 2 and sample.prompt_length == 3 and sample.finish == "length"
    assert sample.tokens.tolist() == PROMPT + [5] * NEW_TOKENS and sample.tokens.dtype == np.int64
    assert sample.response.tolist() == [5] * NEW_TOKENS
    assert sample.logprobs.tolist() == [-1.5] * NEW_TOKENS and sample.logprobs.dtype == np.float32
    assert sample.routes.shape == (6, 2, 2) and sample.routes.dtype == np.uint8
    assert sample.spans == (VersionSpan("v0", 0, NEW_TOKENS),) and sample.route_mask is None


def test_two_weight_versions() -> None:
    reply = good_reply(PROMPT)
    reply["meta_info"]["weight_versions"] = [
        {"version": "v0", "start": 0, "end": 1},
        {"version": "v1", "start": 1, "end": 4},
    ]
    sample = convert(reply)
    assert sample.spans == (VersionSpan("v0", 0, 1), VersionSpan("v1", 1, 4))
    # Rows 0 … 2 are the new weights' routes beside the old weights' log-probabilities.
    assert sample.route_mask is not None and sample.route_mask.tolist() == [False] * 3 + [True] * 3


def test_two_spans_of_one_version_are_one() -> None:
    reply = good_reply(PROMPT)
    spans = [{"version": "v0", "start": 0, "end": 1}, {"version": "v0", "start": 1, "end": 4}]
    reply["meta_info"]["weight_versions"] = spans
    assert convert(reply).route_mask is None


def test_a_reply_without_routes_has_no_recorded_row() -> None:
    reply = good_reply(PROMPT)
    reply["meta_info"]["routed_experts"] = None
    sample = convert(reply)
    assert sample.routes.shape == (6, 2, 2) and sample.route_mask is not None and not sample.route_mask.any()


def test_columns_of_dense_layers_are_left_out_and_must_be_zeros() -> None:
    ids = np.zeros((5, 4, 2), dtype="<i4")
    ids[:, [1, 3]] = [3, 6]
    served = RouteFormat(SIGNATURE, ServedColumns(4, (1, 3)))
    assert (served.decode(_routes(ids), 5)[0] == [3, 6]).all()
    ids[4, 2] = [0, 1]
    with pytest.raises(ValueError, match="routes of layer 2, which has no experts: .*dense-layers.patch"):
        served.decode(_routes(ids), 5)


def test_stop_token_belongs_to_the_response() -> None:
    reply = good_reply(PROMPT)
    reply["output_ids"][-1] = reply["meta_info"]["output_token_logprobs"][-1][1] = STOP
    reply["meta_info"]["finish_reason"] = {"type": "stop", "matched": STOP}
    assert convert(reply).finish == "stop"


def test_aborted_before_its_first_token() -> None:
    reply = good_reply(PROMPT)
    routes = np.tile(np.array([3, 6], dtype="<i4"), (2, 2, 1))
    reply["output_ids"] = []
    reply["meta_info"] |= {
        "finish_reason": {"type": "abort", "message": "Abort"},
        "output_token_logprobs": [],
        "weight_versions": [{"version": "v0", "start": 0, "end": 0}],
        "routed_experts": base64.b64encode(routes.tobytes()).decode(),
    }
    sample = convert(reply)
    assert len(sample.response) == 0 and sample.routes.shape == (2, 2, 2) and sample.finish == "abort"


def _routes(ids: Any) -> str:
    return base64.b64encode(np.asarray(ids, dtype="<i4").tobytes()).decode()


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "a row too few": ({"routed_experts": _routes(np.tile([3, 6], (5, 2, 1)))}, "80 bytes, 6 tokens .* need 96"),
    "a row too many": ({"routed_experts": _routes(np.tile([3, 6], (7, 2, 1)))}, "112 bytes"),
    "not base64": ({"routed_experts": "a$b="}, "not base64"),
    "unpadded base64": ({"routed_experts": "abc"}, "not base64"),
    "expert twice": ({"routed_experts": _routes(np.tile([3, 3], (6, 2, 1)))}, "same expert twice"),
    "expert out of range": ({"routed_experts": _routes(np.tile([3, 8], (6, 2, 1)))}, "from 3 to 8"),
    "negative expert": ({"routed_experts": _routes(np.tile([-1, 3], (6, 2, 1)))}, "from -1 to 3"),
    "NaN as SGLang writes it": ({"output_token_logprobs": [[None, 5, None]] * 4}, "not a finite number"),
    "NaN as Python reads it": ({"output_token_logprobs": [[float("nan"), 5, None]] * 4}, "not a finite number"),
    "infinite log-probability": ({"output_token_logprobs": [[float("-inf"), 5, None]] * 4}, "not a finite number"),
    "other tokens": ({"output_token_logprobs": [[-1.0, 6, None]] * 4}, "do not belong"),
    "a log-probability too few": ({"output_token_logprobs": [[-1.0, 5, None]] * 3}, "do not belong"),
    "gap in versions": (
        {"weight_versions": [{"version": "a", "start": 0, "end": 1}, {"version": "b", "start": 2, "end": 4}]},
        "do not cover 4",
    ),
    "versions end early": ({"weight_versions": [{"version": "a", "start": 0, "end": 3}]}, "do not cover 4"),
    "versions go backwards": (
        {"weight_versions": [{"version": "a", "start": 0, "end": 5}, {"version": "b", "start": 5, "end": 4}]},
        "do not cover 4",
    ),
    "no versions": ({"weight_versions": []}, "do not cover 4"),
    "unknown finish": ({"finish_reason": {"type": "tired"}}, "unknown finish reason 'tired'"),
    "no finish": ({"finish_reason": None}, "not SGLang's"),
    "stopped elsewhere": ({"finish_reason": {"type": "stop", "matched": 5}}, r"at token \[5\] and not at one of \[1\]"),
}


def hostile(change: Any) -> dict[str, Any]:
    reply = good_reply(PROMPT)
    change(reply, reply["meta_info"])
    return reply


def _tokens(reply: dict[str, Any], *ids: Any) -> None:
    reply["output_ids"] = list(ids)
    reply["meta_info"]["output_token_logprobs"] = [[-1.0, token, None] for token in ids]
    reply["meta_info"]["weight_versions"] = [{"version": "v0", "start": 0, "end": len(ids)}]


# What no SGLang sends: each would be an exception of another kind, or memory, or a wrong number.
HOSTILE: dict[str, tuple[Any, str]] = {
    "endless": (lambda reply, meta: _tokens(reply, *[5] * 1000), "1000 tokens were returned, 4 asked for"),
    "huge id": (lambda reply, meta: _tokens(reply, 10**400, 5, 5, 5), "no token id"),
    "negative id": (lambda reply, meta: _tokens(reply, -1, 5, 5, 5), "no token id"),
    "id that is no whole number": (lambda reply, meta: _tokens(reply, 5.0, 5, 5, 5), "no token id"),
    "id that is true": (lambda reply, meta: _tokens(reply, True, 5, 5, 5), "no token id"),
    "huge log-probability": (
        lambda reply, meta: meta["output_token_logprobs"].__setitem__(0, [-(10**400), 5, None]), "not a finite number"
    ),
    "infinite in float32": (
        lambda reply, meta: meta["output_token_logprobs"].__setitem__(0, [-1e39, 5, None]), "not a finite number"
    ),
    "NaN flood": (
        lambda reply, meta: meta.update(output_token_logprobs=[[float("nan"), 5, None]] * 4), "not a finite number"
    ),
    "giant routes": (lambda reply, meta: meta.update(routed_experts="A" * (1 << 22)), "routes have 3145728 bytes"),
    "span of half a token": (
        lambda reply, meta: meta.update(weight_versions=[{"version": "v0", "start": 0.0, "end": 4.0}]), "whole tokens"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_refuses_what_is_hostile(name: str) -> None:
    change, message = HOSTILE[name]
    with pytest.raises(ValueError, match=message):
        convert(hostile(change))


@pytest.mark.parametrize("fault", FAULTS)
def test_refuses(fault: str) -> None:
    change, message = FAULTS[fault]
    reply = good_reply(PROMPT)
    reply["meta_info"] |= change
    with pytest.raises(ValueError, match=message):
        convert(reply)


def test_refuses_a_response_cut_short() -> None:
    with pytest.raises(ValueError, match="cut at 4 tokens, 5 were asked for"):
        parse_sample(good_reply(PROMPT), 0, PROMPT, FORMAT, NEW_TOKENS + 1, [STOP])


@pytest.mark.parametrize("reply", [None, [], {}, "text", {"output_ids": [1]}, {"output_ids": 3, "meta_info": {}}])
def test_refuses_what_is_no_reply(reply: Any) -> None:
    with pytest.raises(ValueError, match="not SGLang's"):
        convert(reply)


def test_routes_are_little_endian_int32_in_row_order() -> None:
    encoded = base64.b64encode(bytes([i for e in range(8) for i in (e, 0, 0, 0)])).decode()
    assert FORMAT.decode(encoded, 2)[0].tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    assert FORMAT.decode("", 0)[0].shape == (0, 2, 2)  # of a continuation without a token


def weighted_reply(weights: Any, rows: int = 6) -> dict[str, Any]:
    """A reply of a server that keeps weights: `[ids, bits of weights]` of each layer."""
    bits = np.broadcast_to(np.asarray(weights, dtype="<f4"), (rows, 2, 2)).copy().view("<i4")
    ids = np.tile(np.array([6, 3], dtype="<i4"), (rows, 2, 1))
    reply = good_reply(PROMPT)
    reply["meta_info"]["routed_experts"] = _routes(np.concatenate([ids, bits], axis=2))
    return reply


def test_weights_are_taken_apart_from_ids_and_keep_their_order() -> None:
    weights = np.random.default_rng(0).dirichlet([1, 1], (6, 2)).astype(np.float32)
    sample = parse_sample(
        weighted_reply(weights),
        2,
        PROMPT,
        RouteFormat(SIGNATURE, ServedColumns(2, (0, 1)), weight_limit=1.0),
        NEW_TOKENS,
        [STOP],
    )
    assert (sample.routes == [6, 3]).all() and sample.routes.dtype == np.uint8
    assert sample.route_weights is not None and sample.route_weights.dtype == np.float32
    np.testing.assert_array_equal(sample.route_weights, weights)
    later = parse_sample(weighted_reply(weights[2:], 4), 2, PROMPT, WEIGHTED, NEW_TOKENS, [STOP], start=2)
    assert later.route_weights is not None and not later.route_weights[:2].any()
    np.testing.assert_array_equal(later.route_weights[2:], weights[2:])
    encoded = weighted_reply(weights)["meta_info"]["routed_experts"]
    assert len(encoded) <= max_reply_bytes(7, WEIGHTED)
    assert max_reply_bytes(1 << 20, WEIGHTED) > max_reply_bytes(1 << 20, FORMAT) + (1 << 20) * 16


def test_weights_are_appended_and_selected_as_routes_are() -> None:
    weights = np.random.default_rng(0).dirichlet([1, 1], (10, 2)).astype(np.float32)
    first = parse_sample(weighted_reply(weights[:6]), 2, PROMPT, WEIGHTED, NEW_TOKENS, [STOP])
    start, ids = 6, first.tokens.tolist()
    rest = parse_sample(weighted_reply(weights[6:], 4), 2, ids, WEIGHTED, NEW_TOKENS, [STOP], start=start)
    whole = first.append(rest)
    assert whole.route_weights is not None and whole.routes.shape == whole.route_weights.shape
    np.testing.assert_array_equal(whole.route_weights, weights)
    selected = whole.select_layers([1]).route_weights
    assert selected is not None
    np.testing.assert_array_equal(selected, weights[:, 1:])
    assert first.append(convert_rest(ids)).route_weights is None


def convert_rest(ids: list[int]) -> Sample:
    """What follows `ids`, from a server that keeps no weights."""
    return parse_sample(good_reply(ids), 2, ids, FORMAT, NEW_TOKENS, [STOP])


@pytest.mark.parametrize(
    ("weights", "limit", "message"),
    [
        ([0.5, float("nan")], 1.0, "not finite"),
        ([0.5, float("inf")], 1.0, "not finite"),
        ([1.5, -0.5], 1.0, "negative"),
        ([0.0, 0.0], 1.0, "sum to 0 to 0"),
        ([0.9, 0.3], 1.0, "sum to 1.2 to 1.2 in a layer, where 1 is the most"),
        ([2.0, 0.6], 2.5, "sum to 2.6 to 2.6 in a layer, where 2.5 is the most"),
    ],
)
def test_weights_that_no_router_has_are_refused(weights: list[float], limit: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_sample(weighted_reply(weights), 2, PROMPT, RouteFormat(SIGNATURE, weight_limit=limit), NEW_TOKENS, [STOP])


def test_a_server_that_keeps_no_weights_is_refused_and_one_that_should_not() -> None:
    with pytest.raises(ValueError, match="routes have 96 bytes, 6 tokens of 32 bytes need 192"):
        parse_sample(good_reply(PROMPT), 2, PROMPT, WEIGHTED, NEW_TOKENS, [STOP])
    with pytest.raises(ValueError, match="routes have 192 bytes, 6 tokens of 16 bytes need 96"):
        convert(weighted_reply([0.5, 0.5]))


def test_scores_leave_out_the_first_token() -> None:
    reply = {"meta_info": {"input_token_logprobs": [[None, 7, None], [-0.5, 8, None], [-2.0, 9, None]]}}
    assert parse_logprobs(reply, PROMPT, 64).tolist() == [-0.5, -2.0]
    with pytest.raises(ValueError, match="other tokens"):
        parse_logprobs(reply, [7, 8, 8], 64)
    reply["meta_info"]["input_token_logprobs"][1][0] = None
    with pytest.raises(ValueError, match="not a finite number"):
        parse_logprobs(reply, PROMPT, 64)


def test_the_last_of_the_vocabulary_is_named_zero_by_sglang() -> None:
    reply = {"meta_info": {"input_token_logprobs": [[None, 7, None], [-0.5, 0, None]]}}
    assert parse_logprobs(reply, [7, 63], 64).tolist() == [-0.5]
    with pytest.raises(ValueError, match="other tokens"):
        parse_logprobs(reply, [7, 62], 64)
