"""Normalisation and rotation of a layer in one pass each on a CPU.

Symptom: without AMX a norm is six torch operators and the rotation of queries and keys twenty; at the batch sizes of
decoding their calls, not their arithmetic, are a quarter of a layer's time.

Upstream: srt/layers/layernorm.py `RMSNorm.forward_native` and srt/models/qwen3_moe.py
`Qwen3MoeAttention.apply_qk_norm_rope`, which use fused kernels of sgl_kernel where that has them: with AMX, or in
bfloat16.

What it does: both in float32 by a compiled loop (`numba_kernels.py`). Results are upstream's to float rounding. Other
dtypes and the variants of either layer stay upstream's.

Can go: when a CPU build of sgl_kernel has both for float32.
"""

import functools
from collections.abc import Callable
from typing import Any

from megatron_bai.compat import releases
from megatron_bai.compat.patch import Patch, after_import


def make_rms_norm(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Make `RMSNorm.forward_native`: weight · x / rms(x), of x + residual if given, which is then returned too."""
    import torch

    from megatron_bai.compat.numba_kernels import rms_norm

    @functools.wraps(upstream)
    def forward_native(self: Any, x: Any, residual: Any = None, addition: Any = None, **named: Any) -> Any:
        supported = self.variance_size_override is None and self.override_orig_dtype is None
        supported = supported and x.shape[-1] == self.hidden_size
        if not supported or addition is not None or not x.dtype == self.weight.dtype == torch.float32:
            return upstream(self, x, residual, addition, **named)
        x = x.contiguous() if residual is None else x + residual
        out, rows = torch.empty_like(x), (-1, self.hidden_size)
        weight = self.weight.detach().numpy()
        rms_norm(x.view(rows).numpy(), weight, self.variance_epsilon, out.view(rows).numpy())
        return out if residual is None else (out, x)

    return forward_native


def make_qk_norm_rope(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Make `Qwen3MoeAttention.apply_qk_norm_rope`: queries, keys and values of `qkv`, whose memory they share."""
    import torch

    from megatron_bai.compat.numba_kernels import qk_norm_rope

    @functools.wraps(upstream)
    def apply_qk_norm_rope(self: Any, qkv: Any, positions: Any, forward_batch: Any) -> Any:
        rotation, norms = self.rotary_emb, (self.q_norm, self.k_norm)
        supported = type(rotation).__name__ == "RotaryEmbedding"  # and none of its subclasses
        if not supported or not qkv.dtype == rotation.cos_sin_cache.dtype == torch.float32:
            return upstream(self, qkv, positions, forward_batch)
        weights = [norm.weight.detach().numpy() for norm in norms]
        qk_norm_rope(
            qkv.numpy(), self.num_heads, self.num_kv_heads, *weights, norms[0].variance_epsilon,
            positions.to(torch.int64).numpy(), rotation.cos_sin_cache.numpy(), rotation.is_neox_style,
        )  # fmt: skip
        self._used_fused_qk_norm_rope_last_call = True  # so that attention stores keys and values
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        return q, k, v

    return apply_qk_norm_rope


def install() -> None:
    """Replace both methods in a process that has the model."""

    def replace(module: Any) -> None:
        module.RMSNorm.forward_native = make_rms_norm(module.RMSNorm.forward_native)
        attention = module.Qwen3MoeAttention
        attention.apply_qk_norm_rope = make_qk_norm_rope(attention.apply_qk_norm_rope)

    after_import("sglang.srt.models.qwen3_moe", replace)


PATCH = Patch(
    name="sglang_fused_norms",
    distribution="sglang",
    versions=releases.sglang_releases(),
    scope="sglang-cpu",
    summary="norms and rotations are dozens of small operators a layer: slow decoding on a CPU",
    install=install,
)
