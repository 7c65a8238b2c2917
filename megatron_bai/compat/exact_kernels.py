"""Operations of a decoder's layers in float32 whose results for a row depend on that row alone, compiled by Numba.

A row's sums run over its own elements, in an order that its length alone decides: however many rows there are, in
whichever order, and in whichever buffers, its bits are the same. Both engines call these functions with
`rollout.exact` (`exact_ops.py`); they also share `rms_norm` and `decode_attention` of `numba_kernels.py`, of which this
holds, too. It holds on one machine: another processor may get other instructions, and with them other bits.
"""

import math

import numpy as np
import numpy.typing as npt
from numba import types

from megatron_bai.utils.numba_jit import jit_compile

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
_F1, _F2, _F3 = types.float32[::1], types.float32[:, ::1], types.float32[:, :, ::1]
_I2 = types.int64[:, ::1]
_FAST = {"contract", "reassoc", "nsz"}  # Inf and NaN stay what they are


@jit_compile(types.void(_F2, _F2, _F2), fastmath=_FAST)
def linear(x: F32, weight: F32, out: F32) -> None:
    """Compute x · weightᵀ, each element as one sum.

    Args:
        x: `[rows, inputs]` float32.
        weight: `[outputs, inputs]` float32.
        out: `[rows, outputs]` float32, which is written.
    """
    for i in range(x.shape[0]):
        for j in range(weight.shape[0]):
            total = np.float32(0)
            for k in range(x.shape[1]):
                total += x[i, k] * weight[j, k]
            out[i, j] = total


@jit_compile(types.void(_F2, _F3, _F3, _I2, _F2, _F2), fastmath=_FAST)
def run_experts(x: F32, w13: F32, w2: F32, ids: I64, weights: F32, out: F32) -> None:
    """Compute Σ_k weights[t, k] · w2[e] (silu(gate) ⊙ up) with (gate, up) = w13[e] x[t] and e = ids[t, k].

    Args:
        x: `[tokens, hidden]` float32.
        w13: `[experts, 2·inner, hidden]` float32, gate then up.
        w2: `[experts, hidden, inner]` float32.
        ids: `[tokens, k]` int64, ascending: the order of the sum over k.
        weights: `[tokens, k]` float32, of the router.
        out: `[tokens, hidden]` float32, which is written.
    """
    hidden, inner = x.shape[1], w2.shape[2]
    activated = np.empty(inner, np.float32)
    for t in range(x.shape[0]):
        out[t] = 0
        for k in range(ids.shape[1]):
            expert, weight = ids[t, k], weights[t, k]
            for j in range(inner):
                gate, up = np.float32(0), np.float32(0)
                for i in range(hidden):
                    gate += w13[expert, j, i] * x[t, i]
                for i in range(hidden):
                    up += w13[expert, inner + j, i] * x[t, i]
                activated[j] = gate / (np.float32(1) + np.float32(math.exp(-gate))) * up
            for j in range(hidden):
                total = np.float32(0)
                for i in range(inner):
                    total += w2[expert, j, i] * activated[i]
                out[t, j] += weight * total


@jit_compile(types.void(_F2, _F2))
def softmax(scores: F32, out: F32) -> None:
    """Compute exp(score) / Σ exp(score) of each row, summed in the row's order.

    Args:
        scores: `[rows, k]` float32, finite.
        out: `[rows, k]` float32, which is written.
    """
    for i in range(scores.shape[0]):
        largest, total = scores[i].max(), np.float32(0)
        for j in range(scores.shape[1]):
            out[i, j] = np.float32(math.exp(scores[i, j] - largest))
            total += out[i, j]
        for j in range(scores.shape[1]):
            out[i, j] /= total


@jit_compile(types.void(_F2, _F1, _F2))
def log_normaliser(logits: F32, temperatures: F32, out: F32) -> None:
    """Compute the largest z and log Σ exp(z − largest) of each row, with z = logit / temperature.

    Args:
        logits: `[rows, vocabulary]` float32.
        temperatures: `[rows]` float32, above 0.
        out: `[rows, 2]` float32, which is written.
    """
    for i in range(logits.shape[0]):
        largest, total = logits[i].max() / temperatures[i], 0.0
        for j in range(logits.shape[1]):
            total += math.exp(logits[i, j] / temperatures[i] - largest)
        out[i, 0], out[i, 1] = largest, math.log(total)


@jit_compile(types.void(types.float64, _F2))
def rotary_angles(base: float, out: F32) -> None:
    """Compute the cosine and sine of p · base^(−2j / dim) for every position p and j < dim / 2, rounded once.

    Args:
        base: of the wavelengths, `rope_theta`.
        out: `[positions, dim]` float32, which is written: cosines, then sines.
    """
    half = out.shape[1] // 2
    for j in range(half):
        frequency = math.pow(base, -j / half)
        for p in range(out.shape[0]):
            out[p, j], out[p, half + j] = math.cos(p * frequency), math.sin(p * frequency)
