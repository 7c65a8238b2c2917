"""Experts of a batch by grouped matrix products on a CPU.

Symptom: without AMX each MoE layer runs its experts in a Python loop of some eight operators, so a decoding step costs
layers × experts × 70 µs, however few tokens there are.

Upstream: srt/layers/moe/fused_moe_native.py `moe_forward_native`.

What it does: tokens stand in the order of their experts as upstream has them, but both products of all experts are one
call each of torch's grouped_mm, with the activation between them. Results are upstream's bit for bit. Other
activations, biases, and rows that are no multiple of 16 bytes, which grouped_mm refuses, stay upstream's.

Can go: when upstream uses grouped_mm there.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron_bai.compat import releases
from megatron_bai.compat.patch import Patch, after_import

if TYPE_CHECKING:
    from torch import Tensor


def experts(x: "Tensor", w13: "Tensor", w2: "Tensor", weights: "Tensor", ids: "Tensor") -> "Tensor":
    """Σ_k weights[t, k] · w2[e] (silu(gate) ⊙ up) with (gate, up) = w13[e] x[t] and e = ids[t, k].

    Args:
        x: `[tokens, hidden]`.
        w13: `[experts, 2·inner, hidden]`, gate then up.
        w2: `[experts, hidden, inner]`.
        weights: `[tokens, k]`.
        ids: `[tokens, k]`, integers.

    Returns:
        `[tokens, hidden]`, in the dtype of `x`.
    """
    import torch
    from torch.nn.functional import grouped_mm, silu

    flat = ids.flatten()
    order = flat.argsort()
    ends = torch.bincount(flat, minlength=len(w13)).cumsum(0).to(torch.int32)
    both = grouped_mm(x.index_select(0, order // ids.shape[1]), w13.transpose(1, 2), offs=ends)
    gate, up = both.chunk(2, dim=-1)
    found = grouped_mm(silu(gate) * up, w2.transpose(1, 2), offs=ends)
    outputs = torch.empty_like(found).index_copy_(0, order, found).view(*ids.shape, -1)
    return (outputs.to(weights.dtype) * weights.unsqueeze(-1)).sum(dim=1).to(x.dtype)


def fits(layer: Any, x: "Tensor", runner: Any) -> bool:
    """Whether `experts` computes what upstream would for this layer."""
    w13, w2 = layer.w13_weight, layer.w2_weight
    plain = runner.activation == "silu" and runner.gemm1_alpha is None and not runner.apply_router_weight_on_input
    bare = getattr(layer, "w13_weight_bias", None) is None and getattr(layer, "w2_weight_bias", None) is None
    whole = len(w13) == layer.num_experts and x.dtype == w13.dtype == w2.dtype and len(x) > 0
    aligned = all(each.shape[-1] * each.element_size() % 16 == 0 for each in (w13, w2))
    return plain and bare and whole and aligned


def grouped(upstream: Callable[..., "Tensor"]) -> Callable[..., "Tensor"]:
    """`moe_forward_native`, with `upstream` for what does not fit."""

    @functools.wraps(upstream)
    def moe_forward_native(layer: Any, x: "Tensor", topk_output: Any, moe_runner_config: Any) -> "Tensor":
        if not fits(layer, x, moe_runner_config):
            return upstream(layer, x, topk_output, moe_runner_config)
        weights, ids, _ = topk_output
        return experts(x, layer.w13_weight, layer.w2_weight, weights, ids)

    return moe_forward_native


def install() -> None:
    """In the place of upstream's, which its callers import when they call it."""

    def replace(module: Any) -> None:
        module.moe_forward_native = grouped(module.moe_forward_native)

    after_import("sglang.srt.layers.moe.fused_moe_native", replace)


PATCH = Patch(
    name="sglang_grouped_experts",
    distribution="sglang",
    version=releases.SGLANG,
    scope="sglang-cpu",
    summary="experts run one by one in Python: slow decoding on a CPU",
    install=install,
)
