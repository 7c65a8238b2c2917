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


def write(path: Path, samples: Sequence[tuple[int, Sample]], signature: RouteSignature) -> None:
    """Keep samples, each with a number that says what it belongs to.

    Raises:
        OSError: the file cannot be written.
    """
    made = [sample for _, sample in samples]
    arrays: dict[str, Any] = {
        "about": np.frombuffer(json.dumps([_about(*each) for each in samples]).encode(), dtype=np.uint8),
        "tokens": _joined([sample.tokens for sample in made], np.int64),
        "logprobs": _joined([sample.logprobs for sample in made], np.float32),
        "routes": _joined([sample.routes for sample in made], signature.dtype, signature.moe_layers, signature.topk),
        "recorded": _joined([sample.rows_recorded for sample in made], bool),
    }
    np.savez(path, **arrays)


def read(path: Path, signature: RouteSignature) -> list[tuple[int, Sample]]:
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
        parts = (_parts(tokens, totals), _parts(logprobs, responses), _parts(routes, rows), _parts(recorded, rows))
        return [(each["number"], _sample(each, *own)) for each, *own in zip(about, *parts, strict=True)]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, BadZipFile) as error:
        raise UserError(f"{path} does not hold samples ({error}): restore the checkpoint from a copy") from None


def _about(number: int, sample: Sample) -> dict[str, Any]:
    spans = [[span.version, span.start, span.end] for span in sample.spans]
    lengths = {"tokens": len(sample.tokens), "prompt": sample.prompt_length}
    outcome = {"finish": sample.finish, "reward": sample.reward, "failure": sample.failure}
    return {"number": number, **lengths, "spans": spans, **outcome}


def _sample(
    about: dict[str, Any], tokens: np.ndarray, logprobs: np.ndarray, routes: np.ndarray, recorded: np.ndarray
) -> Sample:
    return Sample(
        prompt=0,
        tokens=tokens,
        prompt_length=about["prompt"],
        logprobs=logprobs,
        routes=routes,
        spans=tuple(VersionSpan(*span) for span in about["spans"]),
        finish=about["finish"],
        recorded=None if recorded.all() else recorded,
        reward=about["reward"],
        failure=about["failure"],
    )


def _joined(arrays: list[np.ndarray], dtype: type, *shape: int) -> np.ndarray:
    return np.concatenate([np.zeros((0, *shape), dtype=dtype), *arrays]).astype(dtype, copy=False)


def _parts(array: np.ndarray, lengths: list[int]) -> list[np.ndarray]:
    """Consecutive parts, which must be all there is."""
    if sum(lengths) != len(array):
        raise ValueError(f"{len(array)} rows for {sum(lengths)}")
    ends = np.cumsum(lengths)
    return [array[end - length : end] for length, end in zip(lengths, ends, strict=True)]
