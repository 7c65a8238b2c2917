"""From SGLang 0.5.21's JSON to a `Sample`, refusing whatever training could not trust.

The server answers `/generate` with `output_ids` and a `meta_info` that holds, for P prompt and C completion tokens:
`output_token_logprobs` (C entries of [log-probability, token id, text]), `routed_experts` (base64 of little-endian
int32 `[P + C − 1, layers, topk]`, shape not sent), `weight_versions` (spans over the completion) and `finish_reason`.
"""

import base64
import binascii
from typing import Any

import numpy as np

from megatron_bai.rollout.sample import Sample
from megatron_bai.routing.layout import filler_routes
from megatron_bai.routing.missing import last_version_rows
from megatron_bai.routing.routes import RouteSignature, VersionSpan, check_ids

FINISHES = ("stop", "length", "abort")
_LARGEST = float(np.finfo(np.float32).max)


def max_reply_bytes(tokens: int, signature: RouteSignature) -> int:
    """Bytes that no true reply about so many tokens exceeds: routes in base64, and what is said of each besides."""
    rows = tokens * signature.moe_layers * signature.topk * 4
    return -(-rows // 3) * 4 + 256 * tokens + (1 << 16)


def parse_sample(
    reply: Any,
    prompt: int,
    prompt_ids: list[int],
    signature: RouteSignature,
    max_new_tokens: int,
    stop_token_id: int,
    start: int = 0,
) -> Sample:
    """Check one reply and convert it. A `routed_experts` of null becomes a sample without a recorded row.

    Args:
        reply: the decoded JSON.
        prompt: index of the prompt in its batch.
        prompt_ids: its tokens.
        signature: of the served model.
        max_new_tokens, stop_token_id: as asked for.
        start: the first row of routes that was asked for; those before it are not recorded.

    Raises:
        ValueError: naming what is missing or contradicts the rest.
    """
    try:
        output, meta = reply["output_ids"], reply["meta_info"]
        _check_output(output, max_new_tokens)
        logprobs = _convert_logprobs(meta["output_token_logprobs"], output)
        spans = _parse_spans(meta["weight_versions"], len(output))
        routes, recorded = _parse_routes(meta["routed_experts"], len(prompt_ids), len(output), spans, signature, start)
        finish = meta["finish_reason"]["type"]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"the reply is not SGLang's: {type(error).__name__} {error}") from error
    _check_finish(finish, output, max_new_tokens, stop_token_id)
    tokens = np.array([*prompt_ids, *output], dtype=np.int64)
    return Sample(prompt, tokens, len(prompt_ids), logprobs, routes, spans, finish, recorded)


def parse_logprobs(reply: Any, ids: list[int], vocab_size: int) -> np.ndarray:
    """Log-probabilities `[T − 1]` float32 of tokens 1…T−1 of `ids` given those before, from a reply with
    `logprob_start_len` 0. The first token has none.

    Raises:
        ValueError: the reply is malformed or about other tokens.
    """
    # SGLang masks ids of image tokens, and with them the vocabulary's last one, with 0 (not their log-probabilities):
    # managers/scheduler_components/logprob_result_processor.py.
    named = [token if token < vocab_size - 1 else 0 for token in ids]
    try:
        entries = reply["meta_info"]["input_token_logprobs"]
        if [entry[1] for entry in entries] != named:
            raise ValueError(f"log-probabilities of other tokens than the {len(ids)} asked for")
        return _convert_logprobs(entries[1:], named[1:])
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"the reply is not SGLang's: {type(error).__name__} {error}") from error


def decode_routes(encoded: str, rows: int, signature: RouteSignature) -> np.ndarray:
    """`[rows, moe_layers, topk]` expert ids from base64 of little-endian int32.

    Raises:
        ValueError: not base64, another number of bytes, or ids no route can have.
    """
    try:
        data = base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise ValueError(f"routes are not base64: {error}") from error
    row_bytes = 4 * signature.moe_layers * signature.topk
    if len(data) != rows * row_bytes:
        raise ValueError(f"routes have {len(data)} bytes, {rows} tokens of {row_bytes} bytes need {rows * row_bytes}")
    ids = np.frombuffer(data, dtype="<i4").reshape(rows, signature.moe_layers, signature.topk)
    return check_ids(ids, signature, "SGLang's reply")


def _parse_routes(
    encoded: str | None, prompt: int, output: int, spans: tuple[VersionSpan, ...], signature: RouteSignature, start: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Routes, and which rows can be believed (None: all)."""
    rows = prompt + output - 1
    if encoded is None:
        return filler_routes(rows, signature), np.zeros(rows, dtype=bool)
    changes = [span.start for span, before in zip(spans, (None, *spans), strict=False) if not before or span.version != before.version]
    recorded = last_version_rows(rows, prompt, changes) & (np.arange(rows) >= start)
    routes = decode_routes(encoded, rows - start, signature)
    if start:
        routes = np.concatenate([filler_routes(start, signature), routes])
    return routes, None if recorded.all() else recorded


def _convert_logprobs(entries: list[Any], ids: list[int]) -> np.ndarray:
    """`[len(ids)]` float32 from [log-probability, token id, text] entries of exactly these tokens."""
    if [entry[1] for entry in entries] != ids:
        raise ValueError(f"{len(entries)} log-probabilities do not belong to the {len(ids)} tokens returned")
    values = [entry[0] for entry in entries]
    if not all(type(value) in (int, float) and abs(value) <= _LARGEST for value in values):
        raise ValueError("a log-probability is not a finite number")  # SGLang's JSON writes NaN as null
    return np.array(values, dtype=np.float32)


def _parse_spans(entries: list[dict[str, Any]], length: int) -> tuple[VersionSpan, ...]:
    """Weight versions covering tokens `[0, length)` in order and without a gap."""
    spans = tuple(VersionSpan(str(entry["version"]), entry["start"], entry["end"]) for entry in entries)
    ends = [0, *(span.end for span in spans)]
    if not all(type(place) is int for span in spans for place in (span.start, span.end)):
        raise ValueError(f"weight versions {entries} are not about whole tokens")
    if [span.start for span in spans] != ends[:-1] or ends != sorted(ends) or ends[-1] != length or not spans:
        raise ValueError(f"weight versions {entries} do not cover {length} tokens")
    return spans


def _check_output(output: list[int], max_new_tokens: int) -> None:
    if len(output) > max_new_tokens:
        raise ValueError(f"{len(output)} tokens were returned, {max_new_tokens} asked for")
    if not all(type(token) is int and 0 <= token < 1 << 31 for token in output):
        raise ValueError("a token returned is no token id")


def _check_finish(finish: str, output: list[int], max_new_tokens: int, stop_token_id: int) -> None:
    if finish not in FINISHES:
        raise ValueError(f"unknown finish reason {finish!r}")
    if finish == "stop" and output[-1:] != [stop_token_id]:
        raise ValueError(
            f"stopped at token {output[-1:]} and not at {stop_token_id}: the served checkpoint's eos_token_id differs "
            "from the tokenizer's"
        )
    if finish == "length" and len(output) != max_new_tokens:
        raise ValueError(f"cut at {len(output)} tokens, {max_new_tokens} were asked for")
