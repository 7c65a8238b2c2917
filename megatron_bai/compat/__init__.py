"""Fixes to named releases of upstream packages, one module each: the symptom, where upstream, when it can go.

`apply("sglang-cpu")` installs the patches of a scope; one whose package moved to another release refuses by name.
Importing this package imports none of the patched ones.
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
    """Install every patch of `scope` in this process; a second call does nothing.

    Raises:
        UserError: a patched package is not the release its patch was written for.
    """
    apply_scope(PATCHES, scope)
