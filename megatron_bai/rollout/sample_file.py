"""Samples in a file: numpy's archive of a few flat arrays, read without unpickling anything.

    about     uint8, JSON: for each sample its number, lengths, spans, finish, reward and failure
    tokens, logprobs, routes, recorded    of all samples, one after the other
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from megatron_bai.errors import UserError
from megatron_bai.rollout.sample import LOST, Sample
from megatron_bai.routing.routes import RouteSignature, VersionSpan, check_ids


def write_samples(path: Path, samples: Sequence[tuple[int, Sample]], signature: RouteSignature) -> None:
    """Keep samples, each with a number that says what it belongs to.

    Raises:
        OSError: the file cannot be written.
    """
    made = [sample for _, sample in samples]
    arrays: dict[str, Any] = {
        "about": np.frombuffer(json.dumps([_sample_metadata(*each) for each in samples]).encode(), dtype=np.uint8),
        "tokens": _concatenate([sample.tokens for sample in made], np.int64),
        "logprobs": _concatenate([sample.logprobs for sample in made], np.float32),
        "routes": _concatenate([sample.routes for sample in made], signature.dtype, signature.moe_layers, signature.topk),
        "recorded": _concatenate([sample.full_route_mask for sample in made], bool),
    }
    np.savez(path, **arrays)


def read_samples(path: Path, signature: RouteSignature) -> list[tuple[int, Sample]]:
    """What `write` kept.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            about = json.loads(archive["about"].tobytes())
            names = ("tokens", "logprobs", "routes", "recorded")
            tokens, logprobs, routes, recorded = (archive[name] for name in names)
        check_ids(routes, signature, str(path))
        totals = [each["tokens"] for each in about]
        responses = [each["tokens"] - each["prompt"] for each in about]
        rows = [0 if each["finish"] == LOST else each["tokens"] - 1 for each in about]
        parts = (_split_rows(tokens, totals), _split_rows(logprobs, responses), _split_rows(routes, rows), _split_rows(recorded, rows))
        return [(each["number"], _sample(each, *own)) for each, *own in zip(about, *parts, strict=True)]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, BadZipFile) as error:
        raise UserError(f"{path} does not hold samples ({error}): restore the checkpoint from a copy") from None


def _sample_metadata(number: int, sample: Sample) -> dict[str, Any]:
    spans = [[span.version, span.start, span.end] for span in sample.spans]
    lengths = {"tokens": len(sample.tokens), "prompt": sample.prompt_length}
    outcome = {"finish": sample.finish, "reward": sample.reward, "failure": sample.failure}
    return {"number": number, **lengths, "spans": spans, **outcome}


def _sample(
    about: dict[str, Any], tokens: np.ndarray, logprobs: np.ndarray, routes: np.ndarray, recorded: np.ndarray
) -> Sample:
    return Sample(
        prompt_index=0,
        tokens=tokens,
        prompt_length=about["prompt"],
        logprobs=logprobs,
        routes=routes,
        spans=tuple(VersionSpan(*span) for span in about["spans"]),
        finish=about["finish"],
        route_mask=None if recorded.all() else recorded,
        reward=about["reward"],
        failure=about["failure"],
    )


def _concatenate(arrays: list[np.ndarray], dtype: type, *shape: int) -> np.ndarray:
    return np.concatenate([np.zeros((0, *shape), dtype=dtype), *arrays]).astype(dtype, copy=False)


def _split_rows(array: np.ndarray, lengths: list[int]) -> list[np.ndarray]:
    """Consecutive parts, which must be all there is."""
    if sum(lengths) != len(array):
        raise ValueError(f"{len(array)} rows for {sum(lengths)}")
    ends = np.cumsum(lengths)
    return [array[end - length : end] for length, end in zip(lengths, ends, strict=True)]
