"""Kernels for weighted sums of bfloat16 values, from the sources' files to the results', compiled by Numba.

For the weighted sum torch needs a pass for each of converting, multiplying, adding, rounding and the norm. Here a block
of sums stays in the core's first cache from the first source to its rounding. The operations on an element, and so its
bits, are torch's: multiplication and addition in float32, each rounded (LLVM fuses them only if told to), then to the
nearest bfloat16, ties to even.

`stream` reads, verifies, sums, rounds and writes many items in one call, which releases the GIL. It reports no errors:
it stops before the tile that has one, and Python merges that tile, meets the same error and raises it. The CRC-32 is
zlib-ng's, part of that library's interface, which Python's wheel of it exports as well. Where a wheel does not, there
is no `stream`, and Python merges every tile.
"""

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import binding
from numba import types
from zlib_ng import zlib_ng

from megatron_bai.utils.numba_jit import jit_compile

BLOCK = 1024  # elements whose sums and squares stay in the first cache: 12 KiB
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
    """Compute Σ coefficients[i] · sources[rows[i]], added in this order and rounded to bfloat16.

    Args:
        sources: bfloat16 bits `[sources, at least as many elements as out]`.
        rows: int64 `[terms]`, at least one: indices of sources.
        coefficients: float32 `[terms]`.
        out: bfloat16 bits `[elements]`, which are written.

    Returns:
        The bits of the largest magnitude before rounding (over `MAX_FINITE_BITS`: `out` holds an Inf or NaN), and the
        sum of the squares before rounding, which does not depend on the machine.
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
            largest = max(largest, np.uint32(bits & np.uint32(0x7FFFFFFF)))  # Numba's & gives 64 bits: half as fast
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
    """Let compiled code call a function of zlib-ng; return whether its Python extension has it."""
    function = getattr(ctypes.CDLL(zlib_ng.__file__), name, None)
    if function is not None:
        binding.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)
    return function is not None


_FILE = types.int64(types.int32, types.uintp, types.uintp, types.int64)
_pread, _pwrite = types.ExternalFunction("pread", _FILE), types.ExternalFunction("pwrite", _FILE)
_crc32 = types.ExternalFunction("zng_crc32_z", types.uint32(types.uint32, types.uintp, types.uintp))

_STREAM_ITEM = types.int64(
    types.int64[:, ::1],
    types.uint32[::1],
    types.int64,
    types.int64[:, ::1],
    types.float32[:, ::1],
    types.float64[::1],
    types.uint16[:, ::1],
    types.uint16[::1],
)
_STREAM = types.void(
    types.int64[:, :, ::1],
    types.uint32[:, ::1],
    types.int64[::1],
    types.int64[::1],
    types.int64[:, ::1],
    types.float32[:, ::1],
    types.float64[:, ::1],
    types.uint16[:, ::1],
    types.uint16[::1],
)


def _stream_item(
    file_offsets: npt.NDArray[np.int64],
    crcs: npt.NDArray[np.uint32],
    num_bytes: int,
    rows: npt.NDArray[np.int64],
    coefficients: npt.NDArray[np.float32],
    squares: npt.NDArray[np.float64],
    values: npt.NDArray[np.uint16],
    out: npt.NDArray[np.uint16],
) -> int:
    """Merge one item; return the number of its bytes done. As `stream`, whose arrays have an axis of items before."""
    num_sources, num_results = len(values), len(rows)
    new_crcs, tile_squares = np.empty_like(crcs), np.empty(num_results)
    done = 0
    while done < num_bytes:
        count = min(out.size, (num_bytes - done) // 2)
        size = count * 2
        for i in range(num_sources):
            address = values[i].ctypes.data
            if _pread(file_offsets[i, 0], address, size, file_offsets[i, 1] + done) != size:
                return done
            new_crcs[i] = _crc32(crcs[i], address, size)
        for k in range(num_results):
            terms = rows[k, 0]
            indices, factors = rows[k, 1 : 1 + terms], coefficients[k, :terms]
            largest, tile_squares[k] = weighted_sum(values, indices, factors, out[:count])
            if largest > MAX_FINITE_BITS:
                return done
            address, file = out.ctypes.data, num_sources + k
            if _pwrite(file_offsets[file, 0], address, size, file_offsets[file, 1] + done) != size:
                return done
            new_crcs[file] = _crc32(crcs[file], address, size)
        crcs[:] = new_crcs
        squares += tile_squares
        done += size
    return done


_has_crc32 = _export("zng_crc32_z")
_stream_compiled_item: Any = jit_compile(_STREAM_ITEM)(_stream_item) if _has_crc32 else None


def _stream(
    file_offsets: npt.NDArray[np.int64],
    crcs: npt.NDArray[np.uint32],
    num_bytes: npt.NDArray[np.int64],
    done: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int64],
    coefficients: npt.NDArray[np.float32],
    squares: npt.NDArray[np.float64],
    values: npt.NDArray[np.uint16],
    out: npt.NDArray[np.uint16],
) -> None:
    """Merge bytes of every source into as many of every result, as `weighted_sum` does, up to the first error.

    Args:
        file_offsets: int64 `[items, sources + results, 2]`: for each its file descriptor and the first byte.
        crcs: uint32 `[items, sources + results]`: CRC-32s of the bytes before, which are continued.
        num_bytes: int64 `[items]`, to merge.
        done: int64 `[items]`, zeros, which become the number of bytes done: fewer than `num_bytes` for the first item
            of which a file cannot be read or written, or a value is not finite, and none of those after it.
        rows: int64 `[results, 1 + sources]`: the number of sources of each result, and their indices.
        coefficients: float32 `[results, sources]`, of those in `rows`.
        squares: float64 `[items, results]`, to which the sums of squares are added.
        values: bfloat16 bits `[sources, tile]`, scratch.
        out: bfloat16 bits `[tile]`, scratch.
    """
    for i in range(num_bytes.size):
        done[i] = _stream_compiled_item(
            file_offsets[i], crcs[i], num_bytes[i], rows, coefficients, squares[i], values, out
        )
        if done[i] < num_bytes[i]:
            return


stream = jit_compile(_STREAM)(_stream) if _has_crc32 else None
