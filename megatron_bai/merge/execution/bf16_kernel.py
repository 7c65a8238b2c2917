"""What is done to bfloat16 values from their files to the output's, compiled by Numba.

For the weighted sum torch needs a pass for each of converting, multiplying, adding, rounding and the norm. Here a block
of sums stays in the core's first cache from the first source to its rounding. The operations on an element, and so its
bits, are torch's: multiplication and addition in float32, each rounded (LLVM fuses them only if told to), then to the
nearest bfloat16, ties to even.

`stream` does all of it for many tiles in one call, which lets go of Python's lock: it reads, checks, sums, rounds and
writes. What goes wrong is not its business: it stops before such a tile, and Python does that one, finds the same and
says what it is. Its CRC-32 is zlib-ng's, part of that library's interface, which Python's wheel of it exports as well.
Where one does not, there is no `stream`, and Python does every tile.
"""

import ctypes

import numpy as np
import numpy.typing as npt
from llvmlite import binding
from numba import types
from zlib_ng import zlib_ng

from megatron_bai.utils.numba_jit import jit_compile

BLOCK = 1024  # elements whose sums and squares are in the first cache: 12 KiB
MAX_FINITE_BITS = 0x7F7F7FFF  # bits of the largest float32 that is rounded to a finite bfloat16

_SIGNATURE = types.Tuple((types.uint32, types.float64))(
    types.uint16[:, ::1], types.int64[::1], types.float32[::1], types.uint16[::1]
)


def _weighted_sum(
    sources: npt.NDArray[np.uint16],
    rows: npt.NDArray[np.int64],
    coefficients: npt.NDArray[np.float32],
    out: npt.NDArray[np.uint16],
) -> tuple[np.uint32, np.float64]:
    """Σ coefficients[i] · sources[rows[i]], added in this order and rounded to bfloat16.

    Args:
        sources: bfloat16 bits [sources, at least as many elements as `out`].
        rows: int64 [terms], at least one.
        coefficients: float32 [terms].
        out: bfloat16 bits [elements], which are written.

    Returns:
        the bits of the largest magnitude before rounding (over `MAX_FINITE_BITS`: `out` holds an Inf or NaN), and the sum of
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


weighted_sum = jit_compile(_SIGNATURE)(_weighted_sum)


def _export(name: str) -> bool:
    """Let compiled code call a function of zlib-ng; returns whether its Python extension has it."""
    function = getattr(ctypes.CDLL(zlib_ng.__file__), name, None)
    if function is not None:
        binding.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)
    return function is not None


_FILE = types.int64(types.int32, types.uintp, types.uintp, types.int64)
_pread, _pwrite = types.ExternalFunction("pread", _FILE), types.ExternalFunction("pwrite", _FILE)
_crc32 = types.ExternalFunction("zng_crc32_z", types.uint32(types.uint32, types.uintp, types.uintp))

_STREAM = types.int64(
    types.int64[:, ::1],
    types.uint32[::1],
    types.int64,
    types.int64[:, ::1],
    types.float32[:, ::1],
    types.float64[::1],
    types.uint16[:, ::1],
    types.uint16[::1],
)


def _stream(
    file_offsets: npt.NDArray[np.int64],
    crcs: npt.NDArray[np.uint32],
    num_bytes: int,
    rows: npt.NDArray[np.int64],
    coefficients: npt.NDArray[np.float32],
    squares: npt.NDArray[np.float64],
    values: npt.NDArray[np.uint16],
    out: npt.NDArray[np.uint16],
) -> int:
    """Merge `num_bytes` bytes of every source into as many of every sum, as `weighted_sum` does, until something is wrong.

    Args:
        file_offsets: int64 [sources + sums, 2], of each the descriptor of its file and the byte to begin at.
        crcs: uint32 [sources + sums], the CRC-32s of what came before in each, which become those with these bytes.
        rows: int64 [sums, 1 + sources], how many sources each sum has, and which.
        coefficients: float32 [sums, sources], of those in `rows`.
        squares: float64 [sums], to which the sums of squares are added.
        values: bfloat16 bits [sources, tile], to work in.
        out: bfloat16 bits [tile], likewise.

    Returns:
        how many bytes are done: fewer than `num_bytes` where a file could not be read or written, or a sum is not finite.
    """
    sources, sums = len(values), len(rows)
    new_crcs, tile_squares = np.empty_like(crcs), np.empty(sums)
    done = 0
    while done < num_bytes:
        count = min(out.size, (num_bytes - done) // 2)
        size = count * 2
        for i in range(sources):
            at = values[i].ctypes.data
            if _pread(file_offsets[i, 0], at, size, file_offsets[i, 1] + done) != size:
                return done
            new_crcs[i] = _crc32(crcs[i], at, size)
        for k in range(sums):
            terms = rows[k, 0]
            largest, tile_squares[k] = weighted_sum(values, rows[k, 1 : 1 + terms], coefficients[k, :terms], out[:count])
            at, file = out.ctypes.data, sources + k
            if largest > MAX_FINITE_BITS or _pwrite(file_offsets[file, 0], at, size, file_offsets[file, 1] + done) != size:
                return done
            new_crcs[file] = _crc32(crcs[file], at, size)
        crcs[:] = new_crcs
        squares += tile_squares
        done += size
    return done


stream = jit_compile(_STREAM)(_stream) if _export("zng_crc32_z") else None
