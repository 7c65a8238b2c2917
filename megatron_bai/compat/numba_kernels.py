"""The operations between the matrix products of a decoding step, in float32 on one core, compiled by Numba.

torch needs ten small operators for what is one loop here, and up to some hundred rows each costs more than its
arithmetic. A row's result does not depend on the others. Sums are in any order, and so differ from torch's in
rounding.
"""

import math

import numpy as np
import numpy.typing as npt
from numba import types

from megatron_bai.utils.numba_jit import jit_compile

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
_F1, _F2, _F3 = types.float32[::1], types.float32[:, ::1], types.float32[:, :, ::1]
_I1, _I2 = types.int64[::1], types.int32[:, ::1]
_FAST = {"contract", "reassoc", "nsz"}  # Inf and NaN stay what they are


@jit_compile(types.void(_F3, _F3, _F3, _I2, _I1, _I1, types.float32, _F3), fastmath=_FAST)
def decode_attention(
    query: F32, keys: F32, values: F32, table: npt.NDArray[np.int32], rows: I64, lengths: I64, scale: float, out: F32
) -> None:
    """Compute softmax(scale · q Kᵀ) V for one query a sequence, reading keys and values in the cache.

    Args:
        query: `[sequences, heads, dim]` float32.
        keys: `[slots, kv heads, dim]` float32; query heads that share keys are adjacent.
        values: `[slots, kv heads, dim of values or more]` float32, of which the first are read.
        table: `[·, positions]` int32, the slot of each position of a sequence.
        rows: `[sequences]` int64, rows of the table.
        lengths: `[sequences]` int64, at least 1.
        scale: of the scores.
        out: `[sequences, heads, dim of values]` float32, which is written.
    """
    heads, dim, width = query.shape[1], query.shape[2], out.shape[2]
    group_size = heads // keys.shape[1]
    scores, total = np.empty(table.shape[1], np.float32), np.empty(width, np.float32)
    for i in range(rows.size):
        slots, length = table[rows[i]], lengths[i]
        for head in range(heads):
            query_vector, kv_head = query[i, head], head // group_size
            largest = np.float32(-np.inf)
            for j in range(length):
                key, score = keys[slots[j], kv_head], np.float32(0)
                for d in range(dim):
                    score += query_vector[d] * key[d]
                scores[j] = score * scale
                largest = max(largest, scores[j])
            total[:] = 0
            weights = np.float32(0)
            for j in range(length):
                value, weight = values[slots[j], kv_head], np.float32(math.exp(scores[j] - largest))
                weights += weight
                for d in range(width):
                    total[d] += weight * value[d]
            for d in range(width):
                out[i, head, d] = total[d] / weights


@jit_compile(types.void(_F2, _F1, types.float32, _F2), fastmath=_FAST)
def rms_norm(x: F32, weight: F32, epsilon: float, out: F32) -> None:
    """Compute weight · x / √(mean x² + epsilon) of each row.

    Args:
        x: `[rows, dim]` float32.
        weight: `[dim]` float32.
        epsilon: added to the mean square.
        out: `[rows, dim]` float32, which is written; may be `x`.
    """
    dim = x.shape[1]
    for i in range(x.shape[0]):
        square = np.float32(0)
        for d in range(dim):
            square += x[i, d] * x[i, d]
        factor = np.float32(1) / np.float32(math.sqrt(square / np.float32(dim) + epsilon))
        for d in range(dim):
            out[i, d] = x[i, d] * factor * weight[d]


@jit_compile(
    types.void(_F2, types.int64, types.int64, _F1, _F1, types.float32, _I1, _F2, types.boolean), fastmath=_FAST
)
def qk_norm_rope(
    rows: F32,
    queries: int,
    keys: int,
    query_weight: F32,
    key_weight: F32,
    epsilon: float,
    positions: I64,
    angles: F32,
    halves: bool,
) -> None:
    """Normalise each row's heads as `rms_norm` does, then rotate them by the row's position; in place.

    Args:
        rows: `[rows, (queries + keys) · dim + …]` float32: heads of queries, of keys, and the rest, left alone.
        queries: number of query heads.
        keys: number of key heads.
        query_weight: `[dim]` float32, of the queries' norm.
        key_weight: `[dim]` float32, of the keys' norm.
        epsilon: of both norms.
        positions: `[rows]` int64.
        angles: `[positions, rotated]` float32, cosines then sines; the first `rotated` elements of a head are rotated.
        halves: whether element i is paired with i + rotated / 2 (NeoX), else each even one with the next (GPT-J).
    """
    dim, half = query_weight.size, angles.shape[1] // 2
    pair_stride, step = (half, 1) if halves else (1, 2)
    for i in range(rows.shape[0]):
        rotation = angles[positions[i]]
        for head in range(queries + keys):
            x_head = rows[i, head * dim : (head + 1) * dim]
            weight = query_weight if head < queries else key_weight
            square = np.float32(0)
            for d in range(dim):
                square += x_head[d] * x_head[d]
            factor = np.float32(1) / np.float32(math.sqrt(square / np.float32(dim) + epsilon))
            for d in range(dim):
                x_head[d] *= factor * weight[d]
            for j in range(half):
                x, y = x_head[j * step], x_head[j * step + pair_stride]
                cosine, sine = rotation[j], rotation[half + j]
                x_head[j * step] = x * cosine - y * sine
                x_head[j * step + pair_stride] = y * cosine + x * sine
