"""The ids that a truncated draw of a token kept (`rollout.top_k`, `top_p`, `min_p`): parsed, and as arrays.

A truncated draw is from the kept tokens alone, and the policy that sampled is the model's distribution over them,
brought to a sum of 1. A server says which they were (`return_sampling_mask`), since no one else can: of two tokens with
one probability its sort keeps either, and devices apply the three limits in another order. The log-probabilities of
`return_logprob` are those before the truncation; those over the kept tokens come beside the ids.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

MASK_FIELDS = ("output_token_sampling_mask", "output_token_sampling_logprobs")  # of a reply's `meta_info`
NO_ID = -1  # fills the rows of tokens that kept fewer ids than others
_LEAST = float(np.finfo(np.float32).min)
_SLACK = 0.01  # nats by which a token may be less likely among the kept than among all: rounding


def max_kept(top_k: int) -> int:
    """Return the most ids that a token may have kept: kernels that draw by a threshold keep all that tie with the last.

    Args:
        top_k: of the request.
    """
    return 2 * top_k


def parse_kept(
    meta: dict[str, Any], output: Sequence[int], logprobs: np.ndarray, limit: int
) -> tuple[np.ndarray, np.ndarray]:
    """Parse what a reply to a request with `return_sampling_mask` has of its tokens.

    Args:
        meta: the reply's `meta_info`.
        output: the tokens that were sampled.
        logprobs: `[len(output)]` float32 of them, before the truncation.
        limit: the most ids of a token.

    Returns:
        `[len(output), K]` int32, the ids that each token was drawn from, K of the one that has most, `NO_ID` behind
        those of the others; and `[len(output)]` float32, log-probabilities over them.

    Raises:
        ValueError: they are missing or not those of a draw of these tokens.
    """
    if not output:
        return np.zeros((0, 0), dtype=np.int32), logprobs
    masks, values = (meta.get(name) for name in MASK_FIELDS)
    if not (isinstance(masks, list) and isinstance(values, list) and len(masks) == len(values) == len(output)):
        raise ValueError(f"the reply does not have the ids that each of its {len(output)} tokens was drawn from")
    if not all(isinstance(ids, list) and 0 < len(ids) <= limit for ids in masks):
        raise ValueError(f"a token was drawn from no ids, or from more than {limit}")
    flat = np.array(list(chain.from_iterable(masks)))
    if flat.dtype.kind != "i" or flat.min() < 0 or flat.max() >= 1 << 31:
        raise ValueError("an id that a token was drawn from is no token id")
    kept = pad_rows(flat.astype(np.int32), np.array([len(ids) for ids in masks]))
    ordered = np.sort(kept, axis=1)
    if (ordered[:, 1:] == ordered[:, :-1])[ordered[:, 1:] != NO_ID].any():
        raise ValueError("a token was drawn from one id twice")
    if not (kept == np.asarray(output, dtype=np.int64)[:, None]).any(axis=1).all():
        raise ValueError("a token is none of those that it was drawn from")
    if not all(type(value) in (int, float) and _LEAST <= value <= _SLACK for value in values):
        raise ValueError("a log-probability over the ids that a token was drawn from is none")
    over_kept = np.array(values, dtype=np.float32)
    if not (over_kept >= logprobs - _SLACK).all():
        raise ValueError("a token is less likely among the ids that it was drawn from than among all")
    return kept, over_kept


def pad_rows(flat: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return `[len(counts), largest count]` int32 rows, `NO_ID` behind each.

    Args:
        flat: `[sum(counts)]` ids, row after row.
        counts: `[rows]` int64.
    """
    kept = np.full((len(counts), int(counts.max(initial=0))), NO_ID, dtype=np.int32)
    kept[np.arange(kept.shape[1]) < counts[:, None]] = flat
    return kept


def concatenate_kept(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Concatenate rows of ids of different width, `[rows_i, K_i]`, to `[Σ rows_i, max K_i]`."""
    width = max(part.shape[1] for part in parts)
    return np.concatenate([np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=NO_ID) for part in parts])
