"""A plain-torch stub of `sgl_kernel` on a CPU.

Symptom: `ModuleNotFoundError: No module named 'sgl_kernel'` while SGLang starts with `--device cpu`.

Upstream: PyPI has sglang-kernel for CUDA only; the CPU kernels are built from source and need AMX. On a CPU without
AMX (`cpu_has_amx_support()`, srt/utils/common.py) SGLang 0.5.21 takes `forward_native` in every layer. What it
still takes from `sgl_kernel` it imports by name at load time, for speculative decoding
(kernels/ops/kvcache/cache_move.py, srt/mem_cache/allocation.py, srt/speculative/*.py), plus the hash behind seeded
sampling (kernels/ops/sampling/murmur_hash.py).

Can go: when a CPU build of sgl_kernel is on PyPI, or upstream imports these names only where they are used.
"""

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from megatron_bai.compat import releases
from megatron_bai.compat.patch import Patch

if TYPE_CHECKING:
    from torch import Tensor

_MASK = 0xFFFFFFFF


def install() -> None:
    """Tell SGLang that it runs on a CPU; put the stub in place of an absent package."""
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"  # what srt/utils/common.py:is_cpu() reads
    if importlib.util.find_spec("sgl_kernel") is None:
        _define_murmur_hash()
        sys.modules["sgl_kernel"] = _SglKernelStub()


class _SglKernelStub(ModuleType):
    """Offers every `*_cpu` name that SGLang imports; none is called without speculative decoding."""

    def __init__(self) -> None:
        super().__init__("sgl_kernel")
        self.__spec__ = ModuleSpec("sgl_kernel", None)

    def __getattr__(self, name: str) -> Any:
        if not name.endswith("_cpu"):
            raise AttributeError(f"the CPU stand-in for sgl_kernel has no {name}")

        def absent(*args: Any, **kwargs: Any) -> None:
            raise NotImplementedError(f"sgl_kernel.{name} has no CPU version here: speculative decoding needs a GPU")

        return absent


def murmur_hash32(seed: "Tensor", positions: "Tensor", columns: "Tensor") -> "Tensor":
    """Compute the 32-bit MurmurHash3 of (seed low, seed high, position, column), as the CUDA kernel computes it.

    Args:
        seed: `[n]` uint64, one a row.
        positions: `[n]` any integer type; its low 32 bits count.
        columns: `[m]` any integer type.

    Returns:
        `[n, m]` uint32.
    """
    import torch

    seeds = seed.view(torch.int64)
    rows = torch.zeros_like(seeds)
    for key in (seeds, seeds >> 32, positions.to(torch.int64)):
        rows = _mix(rows, key & _MASK)
    h = _mix(rows[:, None], columns.to(torch.int64)[None, :] & _MASK)
    h = h ^ 16  # bytes hashed
    h = _multiply(h ^ (h >> 16), 0x85EBCA6B)
    h = _multiply(h ^ (h >> 13), 0xC2B2AE35)
    hashed: torch.Tensor = (h ^ (h >> 16)).to(torch.uint32)
    return hashed


def _mix(h: Any, key: Any) -> Any:
    """Apply one round of MurmurHash3 to 32-bit values held in int64."""
    h = h ^ _multiply(_rotate(_multiply(key, 0xCC9E2D51), 15), 0x1B873593)
    return (_rotate(h, 13) * 5 + 0xE6546B64) & _MASK


def _rotate(h: Any, bits: int) -> Any:
    return ((h << bits) | (h >> (32 - bits))) & _MASK


def _multiply(a: Any, b: int) -> Any:
    """Compute `a·b mod 2³²`, in halves: the full product would overflow int64."""
    return ((a & 0xFFFF) * b + ((((a >> 16) * b) & 0xFFFF) << 16)) & _MASK


_library: Any = None  # the operator lives as long as this object


def _define_murmur_hash() -> None:
    import torch

    global _library
    _library = torch.library.Library("sgl_kernel", "FRAGMENT")
    _library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor col_indices) -> Tensor")
    _library.impl("murmur_hash32_cpu", murmur_hash32, "CPU")


PATCH = Patch(
    name="sglang_cpu_kernels",
    distribution="sglang",
    versions=releases.sglang_releases(),
    scope="sglang-cpu",
    summary="sgl_kernel has no CPU build on PyPI: SGLang does not start",
    install=install,
)
