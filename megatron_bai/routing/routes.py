"""The experts a sequence of tokens was sent to.

Row t holds the experts of input token t in every MoE layer. A sequence of T tokens has T − 1 rows: its last token
is sampled but never fed to the model. Order inside the top-k set carries no meaning.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class VersionSpan:
    """Items `[start, end)` of a sequence were computed with weights of this version."""

    version: str
    start: int
    end: int


_CHUNK_SETS = 1 << 16  # sets


@dataclass(frozen=True)
class RouteSignature:
    """What routes must agree on to be replayed in a model."""

    moe_layers: int
    num_experts: int
    topk: int

    @property
    def dtype(self) -> type[np.generic]:
        """uint8 holds the ids of up to 256 experts, int16 more (torch lacks kernels for uint16)."""
        return np.uint8 if self.num_experts <= 256 else np.int16


def check_ids(ids: np.ndarray, signature: RouteSignature, where: str) -> np.ndarray:
    """Return `ids` compactly stored, having proved that they are routes of this model.

    Args:
        ids: `[rows, moe_layers, topk]`, any integer dtype.
        signature: the model's.
        where: names the source in an error.

    Raises:
        ValueError: another shape, an id outside `[0, num_experts)`, or an expert chosen twice for one token.
    """
    ids = check_range(ids, signature, where)
    for layers in layer_chunks(len(ids), signature.moe_layers):
        check_distinct(sorted_sets(ids[:, layers]), where)
    return ids


def check_range(ids: np.ndarray, signature: RouteSignature, where: str, layers: int | None = None) -> np.ndarray:
    """`check_ids` but for experts chosen twice, of `layers` of the model's layers (None: of all)."""
    shape = (signature.moe_layers if layers is None else layers, signature.topk)
    if ids.ndim != 3 or ids.shape[1:] != shape:
        raise ValueError(f"{where}: routes have shape {ids.shape}, the model needs [rows, {shape[0]}, {shape[1]}]")
    if ids.size and (ids.min() < 0 or ids.max() >= signature.num_experts):
        raise ValueError(f"{where}: expert ids from {ids.min()} to {ids.max()}, the model has {signature.num_experts}")
    return ids.astype(signature.dtype, copy=False)


def check_distinct(columns: np.ndarray, where: str) -> None:
    """Prove that no set, as `sorted_sets` returns them, holds an expert twice.

    Raises:
        ValueError: one does.
    """
    if (columns[1:] == columns[:-1]).any():
        raise ValueError(f"{where}: a token has the same expert twice in one layer")


def sorted_sets(ids: np.ndarray) -> np.ndarray:
    """Every set in ascending order, as columns: a sorting network of minima and maxima over whole columns takes a
    twentieth of the time of `np.sort` over short rows.

    Args:
        ids: `[rows, layers, topk]`.

    Returns:
        `[topk, layers, rows]`, a copy.
    """
    rows, layers, topk = ids.shape
    columns = np.empty((topk, layers, rows), dtype=ids.dtype)
    for layer in range(layers):  # numpy transposes three axes at once at half the speed
        columns[:, layer] = ids[:, layer].T
    smaller = np.empty_like(columns[0])
    for i, j in _sorting_network(topk):
        np.minimum(columns[i], columns[j], out=smaller)
        np.maximum(columns[i], columns[j], out=columns[j])
        columns[i] = smaller
    return columns


def layer_chunks(rows: int, layers: int) -> list[slice]:
    """Consecutive layers, as many at a time as keeps the sets in work within a core's cache."""
    step = max(1, _CHUNK_SETS // max(rows, 1))
    return [slice(start, min(start + step, layers)) for start in range(0, layers, step)]


@lru_cache
def _sorting_network(n: int) -> list[tuple[int, int]]:
    """Comparisons that sort n values: Batcher's merge exchange (Knuth, TAOCP 3, 5.2.2, algorithm M)."""
    found = []
    top = 1 << max(n - 1, 0).bit_length() >> 1
    p = top
    while p:
        q, r, d = top, 0, p
        while True:
            found += [(i, i + d) for i in range(n - d) if i & p == r]
            if q == p:
                break
            q, r, d = q // 2, p, q - p
        p //= 2
    return found
