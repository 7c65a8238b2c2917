"""Files of samples: numpy archives of a few flat arrays, read without unpickling.

- `about`: uint8, JSON: for each sample its number, lengths, spans, finish, reward, failure and turns.
- `tokens`, `logprobs`, `routes`, `recorded` (the route mask): of all samples, one after the other.
- `sampled` (the sampled mask): likewise; files of older heads have none.
- `route_weights`: likewise, of samples that have them (`weighted` in `about`).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from megatron_bai.errors import UserError
from megatron_bai.rollout.sample import LOST, Sample
from megatron_bai.rollout.turns import Turn
from megatron_bai.routing.routes import RouteSignature, VersionSpan, check_ids


def write_samples(path: Path, samples: Sequence[tuple[int, Sample]], signature: RouteSignature) -> None:
    """Write samples, each with a number that says what it belongs to.

    Args:
        path: of the file.
        samples: pairs of number and sample, with the routes of all layers.
        signature: of their routes.

    Raises:
        OSError: the file cannot be written.
    """
    values = [sample for _, sample in samples]
    assert all(sample.columns is None for sample in values), "a sample with the routes of some layers alone"
    about = json.dumps([_sample_metadata(number, sample) for number, sample in samples])
    layers, topk = signature.moe_layers, signature.topk
    arrays: dict[str, Any] = {
        "about": np.frombuffer(about.encode(), dtype=np.uint8),
        "tokens": _concatenate([sample.tokens for sample in values], np.int64),
        "logprobs": _concatenate([sample.logprobs for sample in values], np.float32),
        "routes": _concatenate([sample.routes for sample in values], signature.dtype, layers, topk),
        "recorded": _concatenate([sample.full_route_mask for sample in values], bool),
        "sampled": _concatenate([sample.full_sampled_mask for sample in values], bool),
        "route_weights": _concatenate(
            [sample.route_weights for sample in values if sample.route_weights is not None], np.float32, layers, topk
        ),
    }
    np.savez(path, **arrays)


def read_samples(path: Path, signature: RouteSignature) -> list[tuple[int, Sample]]:
    """Read a file that `write_samples` wrote.

    Args:
        path: of the file.
        signature: of the routes.

    Returns:
        Pairs of number and sample. `prompt_index` is not in the file, and is 0.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            about = json.loads(archive["about"].tobytes())
            names = ("tokens", "logprobs", "routes", "recorded")
            tokens, logprobs, routes, recorded = (archive[name] for name in names)
            # files of older heads have neither
            weights = archive["route_weights"] if "route_weights" in archive else np.zeros((0, *routes.shape[1:]))
            sampled = archive["sampled"] if "sampled" in archive else np.ones(len(logprobs), dtype=bool)
        check_ids(routes, signature, str(path))
        totals = [entry["tokens"] for entry in about]
        responses = [entry["tokens"] - entry["prompt"] for entry in about]
        rows = [0 if entry["finish"] == LOST else entry["tokens"] - 1 for entry in about]
        arrays = (
            _split_rows(tokens, totals),
            _split_rows(logprobs, responses),
            _split_rows(routes, rows),
            _split_rows(recorded, rows),
            _split_rows(
                weights, [count if entry.get("weighted") else 0 for entry, count in zip(about, rows, strict=True)]
            ),
            _split_rows(sampled, responses),
        )
        return [(entry["number"], _make_sample(entry, *values)) for entry, *values in zip(about, *arrays, strict=True)]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, BadZipFile) as error:
        raise UserError(f"{path} does not hold samples ({error}): restore the checkpoint from a copy") from None


def _sample_metadata(number: int, sample: Sample) -> dict[str, Any]:
    """Return what `about` holds of one sample."""
    spans = [[span.version, span.start, span.end] for span in sample.spans]
    lengths = {"tokens": len(sample.tokens), "prompt": sample.prompt_length}
    outcome = {"finish": sample.finish, "reward": sample.reward, "failure": sample.failure}
    weighted, turns = sample.route_weights is not None, [asdict(turn) for turn in sample.turns]
    about = {"number": number, **lengths, "spans": spans, **outcome, "weighted": weighted}
    return about | {"turns": turns, "turn_weight": sample.turn_weight, "reward_parts": sample.reward_parts}


def _make_sample(
    about: dict[str, Any],
    tokens: np.ndarray,
    logprobs: np.ndarray,
    routes: np.ndarray,
    route_mask: np.ndarray,
    route_weights: np.ndarray,
    sampled_mask: np.ndarray,
) -> Sample:
    """Make one sample of its metadata and arrays."""
    return Sample(
        prompt_index=0,
        tokens=tokens,
        prompt_length=about["prompt"],
        logprobs=logprobs,
        routes=routes,
        spans=tuple(VersionSpan(*span) for span in about["spans"]),
        finish=about["finish"],
        route_mask=None if route_mask.all() else route_mask,
        reward=about["reward"],
        failure=about["failure"],
        route_weights=route_weights if about.get("weighted") else None,
        sampled_mask=None if sampled_mask.all() else sampled_mask,
        turns=tuple(Turn(**turn | {"messages": tuple(turn["messages"])}) for turn in about.get("turns", ())),
        turn_weight=about.get("turn_weight", 0.0),
        reward_parts=about.get("reward_parts", {}),
    )


def _concatenate(arrays: list[np.ndarray], dtype: type, *shape: int) -> np.ndarray:
    """Concatenate arrays, of which there may be none."""
    return np.concatenate([np.zeros((0, *shape), dtype=dtype), *arrays]).astype(dtype, copy=False)


def _split_rows(array: np.ndarray, lengths: list[int]) -> list[np.ndarray]:
    """Split an array into consecutive ranges of rows, which must cover it."""
    if sum(lengths) != len(array):
        raise ValueError(f"{len(array)} rows for {sum(lengths)}")
    ends = np.cumsum(lengths)
    return [array[end - length : end] for length, end in zip(lengths, ends, strict=True)]
