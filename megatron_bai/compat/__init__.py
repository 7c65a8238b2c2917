"""Compatibility fixes for named releases of upstream packages, one module each: symptom, upstream code, expiry.

`apply("sglang-cpu")` installs the fixes of a scope and refuses by name where another release is installed.
`releases.py` is the table of what differs between releases. Importing this package imports none that it fixes.
"""

from megatron_bai.compat import (
    megatron_cpu,
    sglang_batched_attention,
    sglang_cpu_kernels,
    sglang_forked_workers,
    sglang_fused_norms,
    sglang_grouped_experts,
    sglang_host_memory,
    sglang_seeded_sampling,
    sglang_torchvision,
)
from megatron_bai.compat.patch import Patch, apply_scope

PATCHES: tuple[Patch, ...] = (
    megatron_cpu.PATCH,
    sglang_cpu_kernels.PATCH,
    sglang_torchvision.PATCH,  # from here on sglang itself can be imported
    sglang_host_memory.PATCH,
    sglang_forked_workers.PATCH,
    sglang_seeded_sampling.PATCH,
    sglang_batched_attention.PATCH,
    sglang_grouped_experts.PATCH,
    sglang_fused_norms.PATCH,
)


def apply(scope: str) -> None:
    """Install every fix of `scope` in this process; a second call does nothing.

    Raises:
        UserError: an installed package is not the release its fix was written for.
    """
    apply_scope(PATCHES, scope)
