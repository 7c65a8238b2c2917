"""Parsing of SGLang 0.5.21's JSON to a `Sample`. Replies that training could not rely on are refused.

The server answers `/generate` with `output_ids` and a `meta_info` that holds, for P prompt and C completion tokens:
`output_token_logprobs` (C entries of [log-probability, token id, text]), `routed_experts` (base64 of little-endian
int32 `[P + C − 1, layers, topk]`, shape not sent; layers without experts have zeros), `weight_versions` (spans over the
completion) and `finish_reason`; for a truncated draw also what `kept_ids.py` parses. With
`compat/sglang_route_weights.py` a layer of `routed_experts` has topk more int32: the bits of the experts' float32
weights, in the order of their ids.
"""

import base64
import binascii
from collections.abc import Collection
from typing import Any

import numpy as np

from megatron_bai.rollout.kept_ids import parse_kept
from megatron_bai.rollout.sample import Sample
from megatron_bai.routing.layout import ServedColumns, filler_routes
from megatron_bai.routing.missing import last_version_rows
from megatron_bai.routing.routes import RouteSignature, VersionSpan, check_ids

FINISHES = ("stop", "length", "abort")
_LARGEST = float(np.finfo(np.float32).max)
_ID_BYTES = 12  # of an id and what JSON puts after it


def max_reply_bytes(
    tokens: int,
    signature: RouteSignature,
    served: ServedColumns | None = None,
    weighted: bool = False,
    kept: int = 0,
) -> int:
    """Compute the bytes that no reply about so many tokens exceeds: routes in base64, and log-probabilities.

    Args:
        tokens: of prompt and response.
        signature: of the served model's routes.
        served: the columns of the server's routes; None: one for each MoE layer.
        weighted: whether replies have weights of the experts, too.
        kept: the most ids that a token is drawn from, where replies have them; 0: they have not.
    """
    rows = tokens * (served.total if served else signature.moe_layers) * signature.topk * (8 if weighted else 4)
    return -(-rows // 3) * 4 + (256 + _ID_BYTES * kept) * tokens + (1 << 16)


def parse_sample(
    reply: Any,
    prompt: int,
    prompt_ids: list[int],
    signature: RouteSignature,
    max_new_tokens: int,
    stop_token_ids: Collection[int],
    start: int = 0,
    served: ServedColumns | None = None,
    weight_limit: float | None = None,
    stop: Collection[str] = (),
    max_kept: int = 0,
) -> Sample:
    """Parse one reply, having checked it. A `routed_experts` of null becomes a sample without a recorded row.

    Args:
        reply: the decoded JSON.
        prompt: index of the prompt in its batch.
        prompt_ids: its tokens.
        signature: of the served model's routes.
        max_new_tokens: as requested.
        stop_token_ids: as requested.
        start: the first row of routes that was requested; those before it are not recorded.
        served: the columns of the server's routes; None: one for each MoE layer.
        weight_limit: the reply has weights of the experts, whose sum in a layer is at most this; None: it has none.
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
        encoded = meta["routed_experts"]
        about = (len(prompt_ids), len(output), spans, signature, start, served, weight_limit)
        routes, route_mask, weights = _parse_routes(encoded, *about)
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


def decode_routes(
    encoded: str, rows: int, signature: RouteSignature, served: ServedColumns | None = None
) -> np.ndarray:
    """Decode expert ids from base64 of little-endian int32.

    Args:
        encoded: base64.
        rows: number of rows that it must hold.
        signature: of the served model's routes.
        served: the columns it has; None: one for each MoE layer.

    Returns:
        `[rows, moe_layers, topk]` in the signature's dtype.

    Raises:
        ValueError: not base64, another number of bytes, ids that no route can have, or those of a dense layer.
    """
    return check_ids(_decode_rows(encoded, rows, signature.topk, signature, served), signature, "SGLang's reply")


def decode_weighted_routes(
    encoded: str, rows: int, signature: RouteSignature, served: ServedColumns | None, limit: float
) -> tuple[np.ndarray, np.ndarray]:
    """Decode expert ids, and the weights that follow them in each layer as the bits of float32.

    Args:
        encoded: as in `decode_routes`.
        rows: likewise.
        signature: likewise.
        served: likewise.
        limit: the largest sum of a token's weights in a layer, to a hundredth.

    Returns:
        Ids as `decode_routes` returns them, and their weights, `[rows, moe_layers, topk]` float32.

    Raises:
        ValueError: as `decode_routes`, or weights that no router can have.
    """
    topk = signature.topk
    both = _decode_rows(encoded, rows, 2 * topk, signature, served)
    ids = check_ids(both[..., :topk], signature, "SGLang's reply")
    weights = np.ascontiguousarray(both[..., topk:]).view("<f4").astype(np.float32, copy=False)
    sums = weights.sum(axis=-1, dtype=np.float64)
    if not (np.isfinite(weights).all() and (weights >= 0).all() and (sums > 0).all() and (sums <= 1.01 * limit).all()):
        raise ValueError(
            f"weights of experts are not finite, negative, or sum to {sums.min():.3g} to {sums.max():.3g} in a layer,"
            f" where {limit:g} is the most"
        )
    return ids, weights


def _decode_rows(
    encoded: str, rows: int, width: int, signature: RouteSignature, served: ServedColumns | None
) -> np.ndarray:
    """Decode `[rows, moe_layers, width]` int32, having checked their number and that dense layers have zeros."""
    try:
        data = base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise ValueError(f"routes are not base64: {error}") from error
    columns = served.total if served else signature.moe_layers
    row_bytes = 4 * columns * width
    if len(data) != rows * row_bytes:
        raise ValueError(f"routes have {len(data)} bytes, {rows} tokens of {row_bytes} bytes need {rows * row_bytes}")
    values = np.frombuffer(data, dtype="<i4").reshape(rows, columns, width)
    if served and columns != len(served.moe):
        dense = sorted(set(range(columns)) - set(served.moe))
        if values[:, dense].any():
            raise ValueError(
                f"routes of layer {next(layer for layer in dense if values[:, layer].any())}, which has no experts: the"
                " server takes it for a layer that has, and lacks patches/sglang-0.5.21/dense-layers.patch"
            )
        values = values[:, list(served.moe)]
    return values


def _parse_routes(
    encoded: str | None,
    prompt: int,
    output: int,
    spans: tuple[VersionSpan, ...],
    signature: RouteSignature,
    start: int,
    served: ServedColumns | None,
    weight_limit: float | None,
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Parse routes; return them, the mask of rows that are those of the weights that sampled (None: all), and weights.

    The weights are 0 in rows that the reply lacks, and None without a limit.
    """
    rows = prompt + output - 1
    routes, weights = filler_routes(rows, signature), None
    if weight_limit is not None:
        weights = np.zeros(routes.shape, dtype=np.float32)
    if encoded is None:
        return routes, np.zeros(rows, dtype=bool), weights
    pairs = zip(spans, (None, *spans), strict=False)
    changes = [span.start for span, before in pairs if not before or span.version != before.version]
    route_mask = last_version_rows(rows, prompt, changes) & (np.arange(rows) >= start)
    if weights is None or weight_limit is None:
        routes[start:] = decode_routes(encoded, rows - start, signature, served)
    else:
        routes[start:], weights[start:] = decode_weighted_routes(encoded, rows - start, signature, served, weight_limit)
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
