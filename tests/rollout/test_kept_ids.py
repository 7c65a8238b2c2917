"""The ids that a truncated draw kept are asked for, checked, and joined with those of a sample's other parts."""

import base64
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from fake_sglang import NEW_TOKENS, SIGNATURE, STOP, good_reply, serve

from megatron_bai.config import Rollout
from megatron_bai.errors import UserError
from megatron_bai.rollout.client import RolloutClient, SampleRequest
from megatron_bai.rollout.kept_ids import MASK_FIELDS, NO_ID, concatenate_kept, max_kept
from megatron_bai.rollout.parse_reply import max_reply_bytes, parse_sample
from megatron_bai.rollout.route_format import RouteFormat
from megatron_bai.rollout.sample import Sample
from megatron_bai.rollout.sampling_params import validate_sampling
from megatron_bai.rollout.servers import releases

PROMPT, TOP_K, VOCAB, FORMAT = [7, 8, 9], 3, 16, RouteFormat(SIGNATURE)
MASKS = [[5, 2, 9], [9, 5], [5], [1, 2, 5]]
LOGPROBS = [-0.5, -0.7, 0.0, -1.5]


def truncated(prompt: list[int] = PROMPT, **changes: Any) -> dict[str, Any]:
    """A reply to a request with `return_sampling_mask`; its tokens are all 5."""
    reply = good_reply(prompt)
    reply["meta_info"] |= dict(zip(MASK_FIELDS, (MASKS, LOGPROBS), strict=True)) | changes
    return reply


def parse(reply: Any, stop: tuple[str, ...] = (), kept: int = TOP_K) -> Sample:
    return parse_sample(reply, 0, PROMPT, FORMAT, NEW_TOKENS, [STOP], stop=stop, max_kept=kept)


def test_log_probabilities_are_those_over_the_kept_ids() -> None:
    sample = parse(truncated())
    assert sample.kept_ids is not None and sample.kept_ids.dtype == np.int32
    assert sample.kept_ids.tolist() == [[5, 2, 9], [9, 5, NO_ID], [5, NO_ID, NO_ID], [1, 2, 5]]
    np.testing.assert_array_equal(sample.logprobs, np.float32(LOGPROBS))
    assert parse(truncated(), kept=0).kept_ids is None and parse(truncated(), kept=0).logprobs.tolist() == [-1.5] * 4


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no ids": ({MASK_FIELDS[0]: None}, "does not have the ids that each of its 4 tokens"),
    "no log-probabilities": ({MASK_FIELDS[1]: None}, "does not have the ids"),
    "a token too few": ({MASK_FIELDS[0]: MASKS[:3]}, "does not have the ids"),
    "a log-probability too few": ({MASK_FIELDS[1]: LOGPROBS[:3]}, "does not have the ids"),
    "from nothing": ({MASK_FIELDS[0]: [*MASKS[:3], []]}, "from no ids, or from more than 3"),
    "from too many": ({MASK_FIELDS[0]: [*MASKS[:3], [5, 1, 2, 3]]}, "from no ids, or from more than 3"),
    "no list": ({MASK_FIELDS[0]: [*MASKS[:3], "5"]}, "from no ids, or from more than 3"),
    "twice": ({MASK_FIELDS[0]: [*MASKS[:3], [5, 2, 5]]}, "from one id twice"),
    "another token": ({MASK_FIELDS[0]: [*MASKS[:3], [1, 2]]}, "none of those that it was drawn from"),
    "of the token before": ({MASK_FIELDS[0]: [[1, 2, 9], *MASKS[:3]]}, "none of those that it was drawn from"),
    "negative id": ({MASK_FIELDS[0]: [*MASKS[:3], [5, -1]]}, "is no token id"),
    "huge id": ({MASK_FIELDS[0]: [*MASKS[:3], [5, 10**40]]}, "is no token id"),
    "no whole number": ({MASK_FIELDS[0]: [*MASKS[:3], [5, 1.5]]}, "is no token id"),
    "text": ({MASK_FIELDS[0]: [*MASKS[:3], [5, "6"]]}, "is no token id"),
    "NaN": ({MASK_FIELDS[1]: [*LOGPROBS[:3], None]}, "over the ids that a token was drawn from is none"),
    "infinite": ({MASK_FIELDS[1]: [*LOGPROBS[:3], -1e400]}, "over the ids that a token was drawn from is none"),
    "above 0": ({MASK_FIELDS[1]: [*LOGPROBS[:3], 0.5]}, "over the ids that a token was drawn from is none"),
    "of the whole vocabulary": ({MASK_FIELDS[1]: [*LOGPROBS[:3], -1.6]}, "less likely among the ids"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_ids_that_cannot_be_those_of_the_draw_are_refused(fault: str) -> None:
    changes, message = FAULTS[fault]
    with pytest.raises(ValueError, match=message):
        parse(truncated(**changes))


def test_a_response_ends_at_a_text_that_was_asked_for_and_at_no_other() -> None:
    reply = good_reply(PROMPT)
    reply["meta_info"]["finish_reason"] = {"type": "stop", "matched": "END"}
    sample = parse(reply, ("END",), kept=0)
    assert sample.finish == "stop" and sample.response.tolist() == [5] * NEW_TOKENS
    with pytest.raises(ValueError, match=r"stopped at token \[5\]"):
        parse(reply, ("other",), kept=0)


class Server:
    """A server that keeps the bodies it gets and answers each with as many tokens as are asked for."""

    def __init__(self, **changes: Any):
        self.bodies: list[dict[str, Any]] = []
        self.changes = changes

    def __call__(self, request: web.Request, body: dict[str, Any]) -> dict[str, Any]:
        self.bodies.append(body)
        ids, start = body["input_ids"], body.get("routed_experts_start_len", 0)
        reply = truncated(ids, **self.changes) if body.get("return_sampling_mask") else good_reply(ids)
        rows = base64.b64decode(reply["meta_info"]["routed_experts"])[
            start * 4 * SIGNATURE.moe_layers * SIGNATURE.topk :
        ]
        reply["meta_info"]["routed_experts"] = base64.b64encode(rows).decode()
        return reply


def client(url: str, **settings: Any) -> RolloutClient:
    rollout = Rollout(**({"max_new_tokens": NEW_TOKENS, "retries": 0} | settings))
    return RolloutClient([url], rollout, FORMAT, VOCAB, max_length=64)


def test_a_request_has_the_settings_and_no_default_adds_anything() -> None:
    settings: dict[str, Any] = {"top_k": 3, "top_p": 0.9, "min_p": 0.1, "stop": ["END"], "min_new_tokens": 2}
    with serve(server := Server()) as url:
        (sample,) = client(url, **settings).generate([PROMPT], 1, 0, [STOP])
        (plain,) = client(url).generate([PROMPT], 1, 0, [STOP])
        client(url, **settings).generate([PROMPT], 1, 0, [STOP], temperature=0.5)  # as an evaluation does
    assert sample.kept_ids is not None and plain.kept_ids is None
    asked, default, other = server.bodies
    assert asked.pop("return_sampling_mask") is True and set(asked) == set(default)
    changed = {name for name, value in asked["sampling_params"].items() if default["sampling_params"][name] != value}
    assert changed == set(settings) and {name: asked["sampling_params"][name] for name in changed} == settings
    assert other["sampling_params"] == asked["sampling_params"] | {"temperature": 0.5}


def test_a_continuation_asks_for_what_is_left_of_the_minimum_and_joins_the_ids() -> None:
    settings = {"top_k": 3, "min_new_tokens": 6, "max_new_tokens": 2 * NEW_TOKENS}
    with serve(server := Server()) as url:
        begun = client(url, **settings)
        (first,) = begun.sample([SampleRequest(0, PROMPT, 1)], [STOP], budget=NEW_TOKENS)
        assert isinstance(first, Sample)
        (whole,) = begun.sample([SampleRequest(0, PROMPT, 1, partial=first)], [STOP], budget=NEW_TOKENS)
    assert [body["sampling_params"]["min_new_tokens"] for body in server.bodies] == [4, 2]
    assert isinstance(whole, Sample) and whole.kept_ids is not None and first.kept_ids is not None
    assert whole.kept_ids.tolist() == 2 * first.kept_ids.tolist() and len(whole.response) == 2 * NEW_TOKENS
    begun_only = replace(first, kept_ids=None)
    continuation = parse_sample(truncated(first.tokens.tolist()), 0, first.tokens.tolist(), FORMAT, NEW_TOKENS, [STOP])
    with pytest.raises(AssertionError, match="one part of a sample was truncated"):
        begun_only.append(replace(continuation, kept_ids=first.kept_ids))


def test_rows_of_other_widths_are_filled() -> None:
    joined = concatenate_kept([np.array([[1, 2]], dtype=np.int32), np.zeros((0, 0), np.int32), np.int32([[3]])])
    assert joined.tolist() == [[1, 2], [3, NO_ID]] and joined.dtype == np.int32


def test_an_id_outside_the_vocabulary_is_refused() -> None:
    with serve(Server(**{MASK_FIELDS[0]: [*MASKS[:3], [5, VOCAB]]})) as url:
        with pytest.raises(UserError, match=f"token {VOCAB} is outside the vocabulary"):
            client(url, top_k=3).generate([PROMPT], 1, 0, [STOP])


def test_an_end_token_before_the_minimum_is_refused() -> None:
    def answer(request: web.Request, body: dict[str, Any]) -> dict[str, Any]:
        reply = good_reply(body["input_ids"])
        reply["output_ids"][-1] = reply["meta_info"]["output_token_logprobs"][-1][1] = STOP
        reply["meta_info"]["finish_reason"] = {"type": "stop", "matched": STOP}
        return reply

    with serve(answer) as url:
        assert client(url, min_new_tokens=3).generate([PROMPT], 1, 0, [STOP])
        with pytest.raises(UserError, match="token 4 ends the response, before rollout.min_new_tokens"):
            client(url, min_new_tokens=4).generate([PROMPT], 1, 0, [STOP])


def test_a_reply_may_be_as_long_as_its_ids() -> None:
    plain, kept = (max_reply_bytes(100, FORMAT, kept=count) for count in (0, max_kept(20)))
    assert kept - plain == 100 * 40 * len("123456789, 1") and plain == max_reply_bytes(100, FORMAT)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "greedy": ({"top_k": 1}, "rollout.top_k is 1"),
    "more than there are": ({"top_k": 17}, r"rollout.top_k \(17\) is more than model.vocab_size \(16\)"),
    "top_p alone": ({"top_p": 0.9}, "rollout.top_p=0.9 without rollout.top_k"),
    "min_p alone": ({"min_p": 0.1, "deterministic": False}, "rollout.min_p=0.1 without rollout.top_k"),
    "min_p with seeds": ({"min_p": 0.1, "top_k": 4}, "rollout.min_p with rollout.deterministic=true"),
    "exact": ({"exact": True, "top_k": 4}, "rollout.exact with rollout.top_k=4"),
    "exact minimum": ({"exact": True, "min_new_tokens": 4}, "rollout.exact with rollout.min_new_tokens=4"),
    "minimum": ({"min_new_tokens": 65}, r"rollout.min_new_tokens=65 is more than rollout.max_new_tokens \(64\)"),
    "empty text": ({"stop": ["a", ""]}, "rollout.stop has an empty text"),
    "texts": ({"stop": ["a"] * 33}, "rollout.stop has 33 texts: SGLang takes 32"),
    "stop and rounds": ({"stop": ["a"], "partial_tokens": 8}, "rollout.stop with rollout.partial_tokens"),
    "unknown id": ({"stop_token_ids": [3, 16]}, r"rollout.stop_token_ids \[3, 16\] has an id outside"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_contradict_each_other_are_refused(name: str) -> None:
    settings, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        validate_sampling(Rollout(**settings), VOCAB)


def test_settings_that_go_together_are_taken() -> None:
    validate_sampling(Rollout(), VOCAB)
    validate_sampling(Rollout(top_k=16, top_p=0.9, stop_token_ids=[15], partial_tokens=8, min_new_tokens=64), VOCAB)
    validate_sampling(Rollout(top_k=4, min_p=0.1, deterministic=False, stop=["a"]), VOCAB)


SERVERS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "old": ({"top_k": 4}, {"version": "0.5.20"}, "rollout.top_k=4: SGLang 0.5.20 at .* does not say which tokens"),
    "few": ({"top_k": 40}, {"sampling_mask_max_tokens": 79}, "--sampling-mask-max-tokens 79, and ties may keep 80"),
    "no tokenizer": ({"stop": ["a"]}, {"skip_tokenizer_init": True}, "without --skip-tokenizer-init"),
    "no tokenizer for a minimum": ({"min_new_tokens": 1}, {"skip_tokenizer_init": True}, "without --skip-tokenizer"),
}


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_that_cannot_is_refused(name: str) -> None:
    settings, info, message = SERVERS[name]
    info = {"version": "0.5.21", "sampling_mask_max_tokens": 4096, "skip_tokenizer_init": False} | info
    releases.check_sampling("http://there", info, Rollout())
    with pytest.raises(UserError, match=message):
        releases.check_sampling("http://there", info, Rollout(**settings))
