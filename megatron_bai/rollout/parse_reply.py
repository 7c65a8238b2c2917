"""Parsing of SGLang 0.5.21's JSON to a `Sample`. Replies that training could not rely on are refused.

The server answers `/generate` with `output_ids` and a `meta_info` that holds, for P prompt and C completion tokens:
`output_token_logprobs` (C entries of [log-probability, token id, text]), `routed_experts` (P + C − 1 rows, in the form
that `route_format.py` reads), `weight_versions` (spans over the completion) and `finish_reason`; for a truncated draw
also what `kept_ids.py` parses.
"""

from collections.abc import Collection
from typing import Any

import numpy as np

from megatron_bai.rollout.kept_ids import parse_kept
from megatron_bai.rollout.route_format import RouteFormat
from megatron_bai.rollout.sample import Sample
from megatron_bai.routing.layout import filler_routes
from megatron_bai.routing.missing import last_version_rows
from megatron_bai.routing.routes import VersionSpan

FINISHES = ("stop", "length", "abort")
_LARGEST = float(np.finfo(np.float32).max)
_ID_BYTES = 12  # of an id and what JSON puts after it


def max_reply_bytes(tokens: int, route_format: RouteFormat, kept: int = 0) -> int:
    """Compute the bytes that no reply about so many tokens exceeds: routes in base64, and log-probabilities.

    Args:
        tokens: of prompt and response.
        route_format: of the server's replies.
        kept: the most ids that a token is drawn from, where replies have them; 0: they have not.
    """
    return -(-tokens * route_format.row_bytes // 3) * 4 + (256 + _ID_BYTES * kept) * tokens + (1 << 16)


def parse_sample(
    reply: Any,
    prompt: int,
    prompt_ids: list[int],
    route_format: RouteFormat,
    max_new_tokens: int,
    stop_token_ids: Collection[int],
    start: int = 0,
    stop: Collection[str] = (),
    max_kept: int = 0,
) -> Sample:
    """Parse one reply, having checked it. A `routed_experts` of null becomes a sample without a recorded row.

    Args:
        reply: the decoded JSON.
        prompt: index of the prompt in its batch.
        prompt_ids: its tokens.
        route_format: of the server's replies.
        max_new_tokens: as requested.
        stop_token_ids: as requested.
        start: the first row of routes that was requested; those before it are not recorded.
        stop: texts that end a response, as requested.
        max_kept: the most ids that a token of a truncated draw was drawn from; 0: no draw was truncated.

    Raises:
        ValueError: names what is missing or contradicts the other fields.
    """
    try:
        output, meta = reply["output_ids"], reply["meta_info"]
        _check_output(output, max_new_tokens)
        logprobs = _convert_logprobs(meta["output_token_logprobs"], output)
        spans = _parse_spans(meta["weight_versions"], len(output))
        routes, route_mask, weights = _parse_routes(
            meta["routed_experts"], len(prompt_ids), len(output), spans, route_format, start
        )
        finish, matched = meta["finish_reason"]["type"], meta["finish_reason"].get("matched")
        kept_ids = None
        if max_kept:
            kept_ids, logprobs = parse_kept(meta, output, logprobs, max_kept)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"the reply is not SGLang's: {type(error).__name__} {error}") from error
    if not (finish == "stop" and output and isinstance(matched, str) and matched in stop):
        _check_finish(finish, output, max_new_tokens, stop_token_ids)
    tokens = np.array([*prompt_ids, *output], dtype=np.int64)
    about_response = (logprobs, routes, spans, finish, route_mask)
    return Sample(prompt, tokens, len(prompt_ids), *about_response, route_weights=weights, kept_ids=kept_ids)


def parse_logprobs(reply: Any, ids: list[int], vocab_size: int) -> np.ndarray:
    """Parse log-probabilities from a reply to a request with `logprob_start_len` 0.

    Args:
        reply: the decoded JSON.
        ids: the T tokens of the request.
        vocab_size: of the served model.

    Returns:
        `[T − 1]` float32 of tokens 1…T−1 given those before; the first token has none.

    Raises:
        ValueError: the reply is malformed or about other tokens.
    """
    # SGLang masks ids of image tokens, and with them the vocabulary's last one, with 0 (not their log-probabilities):
    # managers/scheduler_components/logprob_result_processor.py.
    expected = [token if token < vocab_size - 1 else 0 for token in ids]
    try:
        entries = reply["meta_info"]["input_token_logprobs"]
        if [entry[1] for entry in entries] != expected:
            raise ValueError(f"log-probabilities of other tokens than the {len(ids)} asked for")
        return _convert_logprobs(entries[1:], expected[1:])
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"the reply is not SGLang's: {type(error).__name__} {error}") from error


def _parse_routes(
    encoded: str | None, prompt: int, output: int, spans: tuple[VersionSpan, ...], route_format: RouteFormat, start: int
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Parse routes; return them, the mask of rows that are those of the weights that sampled (None: all), and weights.

    The weights are 0 in rows that the reply lacks, and None where replies have none.
    """
    rows = prompt + output - 1
    routes, weights = filler_routes(rows, route_format.signature), None
    if route_format.weight_limit is not None:
        weights = np.zeros(routes.shape, dtype=np.float32)
    if encoded is None:
        return routes, np.zeros(rows, dtype=bool), weights
    pairs = zip(spans, (None, *spans), strict=False)
    changes = [span.start for span, before in pairs if not before or span.version != before.version]
    route_mask = last_version_rows(rows, prompt, changes) & (np.arange(rows) >= start)
    routes[start:], sent_weights = route_format.decode(encoded, rows - start)
    if weights is not None:
        weights[start:] = sent_weights
    return routes, None if route_mask.all() else route_mask, weights


def _convert_logprobs(entries: list[Any], ids: list[int]) -> np.ndarray:
    """Convert [log-probability, token id, text] entries of exactly these tokens to `[len(ids)]` float32."""
    if [entry[1] for entry in entries] != ids:
        raise ValueError(f"{len(entries)} log-probabilities do not belong to the {len(ids)} tokens returned")
    values = [entry[0] for entry in entries]
    if not all(type(value) in (int, float) and abs(value) <= _LARGEST for value in values):
        raise ValueError("a log-probability is not a finite number")  # SGLang's JSON writes NaN as null
    return np.array(values, dtype=np.float32)


def _parse_spans(entries: list[dict[str, Any]], length: int) -> tuple[VersionSpan, ...]:
    """Parse weight versions, which must cover tokens `[0, length)` in order and without a gap."""
    spans = tuple(VersionSpan(str(entry["version"]), entry["start"], entry["end"]) for entry in entries)
    ends = [0, *(span.end for span in spans)]
    if not all(type(position) is int for span in spans for position in (span.start, span.end)):
        raise ValueError(f"weight versions {entries} are not about whole tokens")
    if [span.start for span in spans] != ends[:-1] or ends != sorted(ends) or ends[-1] != length or not spans:
        raise ValueError(f"weight versions {entries} do not cover {length} tokens")
    return spans


def _check_output(output: list[int], max_new_tokens: int) -> None:
    """Check that a response is token ids, and no more than requested."""
    if len(output) > max_new_tokens:
        raise ValueError(f"{len(output)} tokens were returned, {max_new_tokens} asked for")
    if not all(type(token) is int and 0 <= token < 1 << 31 for token in output):
        raise ValueError("a token returned is no token id")


def _check_finish(finish: str, output: list[int], max_new_tokens: int, stop_token_ids: Collection[int]) -> None:
    """Check that a response ends as its finish reason says."""
    if finish not in FINISHES:
        raise ValueError(f"unknown finish reason {finish!r}")
    if finish == "stop" and (not output or output[-1] not in stop_token_ids):
        raise ValueError(
            f"stopped at token {output[-1:]} and not at one of {sorted(stop_token_ids)}: the served checkpoint's "
            "eos_token_id differs from the initial checkpoint's"
        )
    if finish == "length" and len(output) != max_new_tokens:
        raise ValueError(f"cut at {len(output)} tokens, {max_new_tokens} were asked for")
