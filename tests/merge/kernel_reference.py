"""The compiled sum of bfloat16 values in numpy's separate operations, which need no torch.

Run as a script in any environment with numba, numpy and zlib-ng, it compares the two bit for bit and says with which
releases: `python tests/merge/kernel_reference.py`.
"""

import hashlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.uint16]
Kernel = Callable[[Bits, npt.NDArray[np.int64], npt.NDArray[np.float32], Bits], tuple[Any, Any]]

BLOCK = 1024  # of `bf16_kernel`: sums of squares are added up in as many lanes
COEFFICIENTS = (0.1, -0.7, 1.0, 1 / 3, 2.0**-9)
# SHA-256 of what `digest_of` gives on every machine and with every numba: the bits of a merge are part of its result.
DIGEST = "c2f384dac86c01bee4883595df3aab1714f69cee5a8009978535b64b46ec69fa"


def reference(sources: Bits, coefficients: npt.NDArray[np.float32]) -> tuple[Bits, int, np.float64]:
    """Compute Σ coefficients[i] · sources[i] in float32, each operation rounded, then to bfloat16, ties to even.

    Args:
        sources: bfloat16 bits `[sources, elements]`.
        coefficients: float32 `[sources]`.

    Returns:
        bfloat16 bits `[elements]`, the bits of the largest magnitude before rounding, and the sum of squares.
    """
    values = (sources.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        sums = coefficients[0] * values[0]
        for coefficient, row in zip(coefficients[1:], values[1:], strict=True):
            sums = sums + coefficient * row
        padded = np.zeros(-(-sums.size // BLOCK) * BLOCK, np.float64)
        padded[: sums.size] = sums
        lanes = np.zeros(BLOCK)
        for block in padded.reshape(-1, BLOCK):
            lanes = lanes + block * block
        while lanes.size > 1:
            lanes = lanes[: lanes.size // 2] + lanes[lanes.size // 2 :]
    bits = sums.view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.astype(np.uint16), int((bits & 0x7FFFFFFF).max(initial=0)), lanes[0]


def make_pattern(num_sources: int, num_elements: int) -> Bits:
    """Return finite bfloat16 bits of every exponent but the largest few, subnormals too, the same on every machine."""
    index = np.arange(num_sources * num_elements, dtype=np.uint64).reshape(num_sources, num_elements)
    bits = ((index * 40503 + (index >> 5) * 977) & 0xFFFF).astype(np.uint16)
    return np.where((bits & 0x7F80) > 0x7E00, bits & 0x807F, bits).astype(np.uint16)


def digest_of(kernel: Kernel) -> str:
    """Return the SHA-256 of what a kernel computes of `make_pattern`, its three results of one to five sources."""
    digest = hashlib.sha256()
    for num_sources in range(1, len(COEFFICIENTS) + 1):
        sources, out = make_pattern(num_sources, 5000), np.zeros(5000, np.uint16)
        factors = np.array(COEFFICIENTS[:num_sources], np.float32)
        largest, squares = kernel(sources, np.arange(num_sources), factors, out)
        digest.update(out.astype("<u2").tobytes() + f"{int(largest):x} {float(squares).hex()}".encode())
    return digest.hexdigest()


def _reference_as_kernel(
    sources: Bits, rows: npt.NDArray[np.int64], coefficients: npt.NDArray[np.float32], out: Bits
) -> tuple[int, np.float64]:
    out[:], largest, squares = reference(sources[rows], coefficients)
    return largest, squares


if __name__ == "__main__":
    import numba

    from megatron_bai.merge.execution.bf16_kernel import weighted_sum

    versions = f"Python {sys.version.split()[0]}, numba {numba.__version__}, numpy {np.__version__}"
    digests = digest_of(weighted_sum), digest_of(_reference_as_kernel), DIGEST
    print(f"{versions}: {'the same bits' if len(set(digests)) == 1 else f'DIFFERENT: {digests}'}")
    sys.exit(len(set(digests)) > 1)
