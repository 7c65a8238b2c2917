"""The weighted sum of bfloat16 values in one pass over the cache, compiled by Numba.

torch needs a pass for each of converting, multiplying, adding, rounding and the norm. Here a block of sums stays in the
core's first cache from the first source to its rounding. The operations on an element, and so its bits, are torch's:
multiplication and addition in float32, each rounded (LLVM fuses them only if told to), then to the nearest bfloat16,
ties to even.

Numba compiles once and keeps the result beside this file, or where it may not write there in the user's cache.
"""

import numpy as np
import numpy.typing as npt
from numba import njit, types

BLOCK = 1024  # elements whose sums and squares are in the first cache: 12 KiB
LARGEST = 0x7F7F7FFF  # bits of the largest float32 that is rounded to a finite bfloat16

_SIGNATURE = types.Tuple((types.uint32, types.float64))(
    types.uint16[:, ::1], types.int64[::1], types.float32[::1], types.uint16[::1]
)


def _weighted_sum(
    sources: npt.NDArray[np.uint16],
    rows: npt.NDArray[np.int64],
    coefficients: npt.NDArray[np.float32],
    out: npt.NDArray[np.uint16],
) -> tuple[int, float]:
    """Σ coefficients[i] · sources[rows[i]], added in this order and rounded to bfloat16.

    Args:
        sources: bfloat16 bits [sources, at least as many elements as `out`].
        rows: int64 [terms], at least one.
        coefficients: float32 [terms].
        out: bfloat16 bits [elements], which are written.

    Returns:
        the bits of the largest magnitude before rounding (over `LARGEST`: `out` holds an Inf or NaN), and the sum of
        the squares before rounding, which does not depend on the machine.
    """
    sums = np.empty(BLOCK, np.float32)
    squares = np.zeros(BLOCK, np.float64)  # each of every BLOCK-th element: a single sum could not be vectorised
    largest = np.uint32(0)
    for start in range(0, out.size, BLOCK):
        size = min(BLOCK, out.size - start)
        for i in range(rows.size):
            row, coefficient = sources[rows[i], start : start + size], coefficients[i]
            if i == 0:
                for j in range(size):
                    sums[j] = coefficient * np.uint32(np.uint32(row[j]) << np.uint32(16)).view(np.float32)
            else:
                for j in range(size):
                    sums[j] += coefficient * np.uint32(np.uint32(row[j]) << np.uint32(16)).view(np.float32)
        rounded = out[start : start + size]
        for j in range(size):
            bits = np.float32(sums[j]).view(np.uint32)
            even = (bits >> np.uint32(16)) & np.uint32(1)
            rounded[j] = np.uint16((bits + np.uint32(0x7FFF) + even) >> np.uint32(16))
            largest = max(largest, bits & np.uint32(0x7FFFFFFF))
        for j in range(size):
            squares[j] += np.float64(sums[j]) * np.float64(sums[j])
    width = BLOCK
    while width > 1:
        width //= 2
        for j in range(width):
            squares[j] += squares[j + width]
    return largest, squares[0]


try:
    weighted_sum = njit(_SIGNATURE, nogil=True, cache=True)(_weighted_sum)
except RuntimeError:  # Numba may write nowhere: then every process compiles for itself, in seconds
    weighted_sum = njit(_SIGNATURE, nogil=True)(_weighted_sum)
