"""Compatibility fixes for named releases of upstream packages, one module each: symptom, upstream code, expiry.

`apply("sglang-cpu")` installs the fixes of a scope that the installed release needs, and refuses by name a release that
they were not tested with.
`releases.py` is the table of what differs between releases. Importing this package imports none that it fixes.
"""

from megatron_bai.compat import (
    megatron_cpu,
    sglang_attention_sinks,
    sglang_batched_attention,
    sglang_cpu_kernels,
    sglang_dense_layers,
    sglang_dense_stages,
    sglang_exact,
    sglang_forked_workers,
    sglang_fused_norms,
    sglang_grouped_experts,
    sglang_host_memory,
    sglang_latent_attention,
    sglang_model_kernels,
    sglang_route_weights,
    sglang_routed_scaling,
    sglang_seeded_sampling,
    sglang_tied_embeddings,
    sglang_topk_layers,
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
    sglang_routed_scaling.PATCH,
    sglang_batched_attention.PATCH,
    sglang_attention_sinks.PATCH,  # takes the class that the one before left
    sglang_grouped_experts.PATCH,
    sglang_fused_norms.PATCH,
    sglang_topk_layers.PATCH,
    sglang_model_kernels.PATCH,
    sglang_latent_attention.PATCH,
    sglang_dense_layers.PATCH,
    sglang_dense_stages.PATCH,
    sglang_tied_embeddings.PATCH,
    sglang_route_weights.PATCH,
    sglang_exact.PATCH,  # of a scope of its own, behind those that it takes classes from
)


def apply(scope: str) -> None:
    """Install every fix of `scope` in this process; a second call does nothing.

    Raises:
        UserError: an installed package is not the release its fix was written for.
    """
    apply_scope(PATCHES, scope)
