"""Routes: the experts that a sequence of tokens was sent to.

Row t holds the experts of input token t in every MoE layer. A sequence of T tokens has T − 1 rows: its last token
is sampled but never fed to the model. Order inside the top-k set carries no meaning.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class VersionSpan:
    """A range `[start, end)` of a sequence that was computed with weights of one version."""

    version: str
    start: int
    end: int


_CHUNK_SETS = 1 << 16  # (row, layer) sets that are sorted at a time


@dataclass(frozen=True)
class RouteSignature:
    """What routes must agree on to be replayed in a model.

    Attributes:
        moe_layers: number of the model's MoE layers.
        num_experts: of each layer.
        topk: experts that a token is sent to in each layer.
    """

    moe_layers: int
    num_experts: int
    topk: int

    @property
    def dtype(self) -> type[np.generic]:
        """The dtype of expert ids: uint8 for up to 256 experts, int16 for more (torch lacks kernels for uint16)."""
        return np.uint8 if self.num_experts <= 256 else np.int16


def check_ids(ids: np.ndarray, signature: RouteSignature, where: str) -> np.ndarray:
    """Check that ids are routes of a model, and return them in its dtype.

    Args:
        ids: `[rows, moe_layers, topk]`, any integer dtype.
        signature: of the model's routes.
        where: names the source in an error.

    Returns:
        `[rows, moe_layers, topk]` in the signature's dtype; `ids` itself where it has that dtype.

    Raises:
        ValueError: another shape, an id outside `[0, num_experts)`, or an expert chosen twice for one token.
    """
    ids = check_range(ids, signature, where)
    for layers in layer_chunks(len(ids), signature.moe_layers):
        check_distinct(sorted_sets(ids[:, layers]), where)
    return ids


def check_range(ids: np.ndarray, signature: RouteSignature, where: str, layers: int | None = None) -> np.ndarray:
    """Check ids as `check_ids` does, but for experts chosen twice.

    Args:
        ids: `[rows, layers, topk]`, any integer dtype.
        signature: of the model's routes.
        where: names the source in an error.
        layers: number of MoE layers that `ids` holds; None: all of the model's.

    Returns:
        `[rows, layers, topk]` in the signature's dtype; `ids` itself where it has that dtype.

    Raises:
        ValueError: another shape, or an id outside `[0, num_experts)`.
    """
    shape = (signature.moe_layers if layers is None else layers, signature.topk)
    if ids.ndim != 3 or ids.shape[1:] != shape:
        raise ValueError(f"{where}: routes have shape {ids.shape}, the model needs [rows, {shape[0]}, {shape[1]}]")
    if ids.size:
        check_bounds(int(ids.min()), int(ids.max()), signature, where)
    return ids.astype(signature.dtype, copy=False)


def check_bounds(lowest: int, highest: int, signature: RouteSignature, where: str) -> None:
    """Check the bounds of expert ids, on whatever device these are.

    Args:
        lowest: of the ids.
        highest: likewise.
        signature: of the model's routes.
        where: names the source in an error.

    Raises:
        ValueError: one is outside `[0, num_experts)`.
    """
    if lowest < 0 or highest >= signature.num_experts:
        raise ValueError(f"{where}: expert ids from {lowest} to {highest}, the model has {signature.num_experts}")


def check_distinct(columns: "np.ndarray | Tensor", where: str) -> None:
    """Check that no set holds an expert twice.

    Args:
        columns: `[topk, …]` of any integer dtype, ascending along the first axis, as `sorted_sets` returns them.
        where: names the source in an error.

    Raises:
        ValueError: a set holds an expert twice.
    """
    repeated: Any = columns[1:] == columns[:-1]
    if bool(repeated.any()):
        raise ValueError(f"{where}: a token has the same expert twice in one layer")


def sorted_sets(ids: np.ndarray) -> np.ndarray:
    """Sort every set in ascending order.

    A sorting network of minima and maxima over columns takes a twentieth of the time of `np.sort` over short rows.

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
    """Split layers into ranges that are sorted or encoded at a time, small enough for a core's cache.

    Args:
        rows: number of rows of each layer.
        layers: number of layers.
    """
    step = max(1, _CHUNK_SETS // max(rows, 1))
    return [slice(start, min(start + step, layers)) for start in range(0, layers, step)]


@lru_cache
def _sorting_network(n: int) -> list[tuple[int, int]]:
    """Return the comparisons that sort n values: Batcher's merge exchange.

    Source: Knuth, The Art of Computer Programming 3, 5.2.2, algorithm M.
    """
    comparisons = []
    top = 1 << max(n - 1, 0).bit_length() >> 1
    p = top
    while p:
        q, r, d = top, 0, p
        while True:
            comparisons += [(i, i + d) for i in range(n - d) if i & p == r]
            if q == p:
                break
            q, r, d = q // 2, p, q - p
        p //= 2
    return comparisons
