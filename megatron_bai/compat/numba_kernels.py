"""What a decoding step does between its matrix products, in float32 on one core, compiled by Numba.

torch needs ten small operators for what is one loop here, each of which costs more than its arithmetic as long as a
batch has some hundred rows. A row's result does not depend on the others. ArithmeticTask are in any order, so they differ from
torch's in rounding.
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
def attend(
    query: F32, keys: F32, values: F32, table: npt.NDArray[np.int32], rows: I64, lengths: I64, scale: float, out: F32
) -> None:
    """softmax(scale · q Kᵀ) V for one query a sequence, reading keys and values where they lie.

    Args:
        query: `[sequences, heads, dim]`.
        keys: `[slots, shared heads, dim]`; heads that share keys stand side by side.
        values: `[slots, shared heads, dim of values]`.
        table: `[·, positions]`, the slot of each position of a sequence.
        rows: `[sequences]`, which row of the table.
        lengths: `[sequences]`, at least 1.
        out: `[sequences, heads, dim of values]`, which is written.
    """
    heads, dim, width = query.shape[1], query.shape[2], values.shape[2]
    shared = heads // keys.shape[1]
    scores, total = np.empty(table.shape[1], np.float32), np.empty(width, np.float32)
    for i in range(rows.size):
        slots, length = table[rows[i]], lengths[i]
        for head in range(heads):
            asked, own = query[i, head], head // shared
            largest = np.float32(-np.inf)
            for j in range(length):
                key, score = keys[slots[j], own], np.float32(0)
                for d in range(dim):
                    score += asked[d] * key[d]
                scores[j] = score * scale
                largest = max(largest, scores[j])
            total[:] = 0
            weights = np.float32(0)
            for j in range(length):
                value, weight = values[slots[j], own], np.float32(math.exp(scores[j] - largest))
                weights += weight
                for d in range(width):
                    total[d] += weight * value[d]
            for d in range(width):
                out[i, head, d] = total[d] / weights


@jit_compile(types.void(_F2, _F1, types.float32, _F2), fastmath=_FAST)
def normalise(x: F32, weight: F32, epsilon: float, out: F32) -> None:
    """weight · x / √(mean x² + epsilon) of each row of `x`, `[rows, dim]`, into `out`, which may be `x`."""
    dim = x.shape[1]
    for i in range(x.shape[0]):
        square = np.float32(0)
        for d in range(dim):
            square += x[i, d] * x[i, d]
        factor = np.float32(1) / np.float32(math.sqrt(square / np.float32(dim) + epsilon))
        for d in range(dim):
            out[i, d] = x[i, d] * factor * weight[d]


@jit_compile(types.void(_F2, types.int64, types.int64, _F1, _F1, types.float32, _I1, _F2, types.boolean), fastmath=_FAST)
def normalise_and_rotate(
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
    """Normalise each row's heads as `normalise` does, then rotate them by the row's position; in place.

    Args:
        rows: `[rows, (queries + keys) · dim + …]`: heads of queries, of keys, and what is left alone.
        query_weight, key_weight: `[dim]`.
        positions: `[rows]`.
        angles: `[positions, rotated]`, cosines then sines; the first `rotated` elements of a head are.
        halves: element i turns with i + rotated / 2 (NeoX), else each even one with the next (GPT-J).
    """
    dim, half = query_weight.size, angles.shape[1] // 2
    apart, step = (half, 1) if halves else (1, 2)
    for i in range(rows.shape[0]):
        turn = angles[positions[i]]
        for head in range(queries + keys):
            own = rows[i, head * dim : (head + 1) * dim]
            weight = query_weight if head < queries else key_weight
            square = np.float32(0)
            for d in range(dim):
                square += own[d] * own[d]
            factor = np.float32(1) / np.float32(math.sqrt(square / np.float32(dim) + epsilon))
            for d in range(dim):
                own[d] *= factor * weight[d]
            for j in range(half):
                x, y, cosine, sine = own[j * step], own[j * step + apart], turn[j], turn[half + j]
                own[j * step] = x * cosine - y * sine
                own[j * step + apart] = y * cosine + x * sine
