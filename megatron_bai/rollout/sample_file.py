"""Files of samples: numpy archives of a few flat arrays, read without unpickling.

- `about`: uint8, JSON: for each sample its number, lengths, spans, finish, reward, failure and turns.
- `tokens`, `logprobs`, `routes`, `recorded` (the route mask): of all samples, one after the other.
- `sampled` (the sampled mask): likewise; files of older heads have none.
- `route_weights`: likewise, of samples that have them (`weighted` in `about`).
- `kept_counts`, `kept_ids`: of each response token the number of ids it was drawn from, and these, of samples that have
  them (`truncated` in `about`).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from megatron_bai.errors import UserError
from megatron_bai.rollout.kept_ids import NO_ID, pad_rows
from megatron_bai.rollout.sample import LOST, Sample
from megatron_bai.rollout.turns import Turn
from megatron_bai.routing.routes import RouteSignature, VersionSpan, check_ids

_KEPT = ("kept_counts", "kept_ids")


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
        **_kept_arrays(values),
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
            kept = {name: archive[name] for name in _KEPT if name in archive}
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
        samples = [_make_sample(entry, *values) for entry, *values in zip(about, *arrays, strict=True)]
        samples = _with_kept(samples, [bool(entry.get("truncated")) for entry in about], kept)
        return [(entry["number"], sample) for entry, sample in zip(about, samples, strict=True)]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, BadZipFile) as error:
        raise UserError(f"{path} does not hold samples ({error}): restore the checkpoint from a copy") from None


def _sample_metadata(number: int, sample: Sample) -> dict[str, Any]:
    """Return what `about` holds of one sample."""
    spans = [[span.version, span.start, span.end] for span in sample.spans]
    lengths = {"tokens": len(sample.tokens), "prompt": sample.prompt_length}
    outcome = {"finish": sample.finish, "reward": sample.reward, "failure": sample.failure}
    has = {"weighted": sample.route_weights is not None, "truncated": sample.kept_ids is not None}
    turns = {"turns": [asdict(turn) for turn in sample.turns], "turn_weight": sample.turn_weight}
    parts = {"reward_parts": sample.reward_parts}
    return {"number": number, **lengths, "spans": spans, **outcome, **has, **turns, **parts}


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


def _kept_arrays(samples: list[Sample]) -> dict[str, Any]:
    """Return the ids that tokens were drawn from as flat arrays; nothing where no sample has them."""
    kept = [sample.kept_ids for sample in samples if sample.kept_ids is not None]
    if not kept:
        return {}
    return {
        "kept_counts": np.concatenate([(ids != NO_ID).sum(axis=1) for ids in kept]),
        "kept_ids": np.concatenate([ids[ids != NO_ID] for ids in kept]),
    }


def _with_kept(samples: list[Sample], truncated: list[bool], arrays: dict[str, np.ndarray]) -> list[Sample]:
    """Return the samples with what `_kept_arrays` returned of those that were truncated."""
    responses = [len(sample.response) if has else 0 for sample, has in zip(samples, truncated, strict=True)]
    nothing = np.zeros(0, dtype=np.int64)
    all_counts, all_ids = (arrays.get(name, nothing) for name in _KEPT)
    if any(values.dtype.kind != "i" or values.min(initial=0) < 0 for values in (all_counts, all_ids)):
        raise ValueError("an id that a token was drawn from is none")
    counts = _split_rows(all_counts, responses)
    ids = _split_rows(all_ids, [int(count.sum()) for count in counts])
    return [
        replace(sample, kept_ids=pad_rows(flat, count)) if has else sample
        for sample, has, flat, count in zip(samples, truncated, ids, counts, strict=True)
    ]


def _concatenate(arrays: list[np.ndarray], dtype: type, *shape: int) -> np.ndarray:
    """Concatenate arrays, of which there may be none."""
    return np.concatenate([np.zeros((0, *shape), dtype=dtype), *arrays]).astype(dtype, copy=False)


def _split_rows(array: np.ndarray, lengths: list[int]) -> list[np.ndarray]:
    """Split an array into consecutive ranges of rows, which must cover it."""
    if sum(lengths) != len(array):
        raise ValueError(f"{len(array)} rows for {sum(lengths)}")
    ends = np.cumsum(lengths)
    return [array[end - length : end] for length, end in zip(lengths, ends, strict=True)]
