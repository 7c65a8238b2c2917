"""Experts of a batch by grouped matrix products on a CPU.

Symptom: without AMX each MoE layer runs its experts in a Python loop of some eight operators, so a decoding step costs
layers × experts × 70 µs, however few tokens there are.

Upstream: srt/layers/moe/fused_moe_native.py `moe_forward_native`.

What it does: tokens are ordered by expert as upstream orders them, but both products of all experts are one
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


def run_grouped_experts(x: "Tensor", w13: "Tensor", w2: "Tensor", weights: "Tensor", ids: "Tensor") -> "Tensor":
    """Compute Σ_k weights[t, k] · w2[e] (silu(gate) ⊙ up) with (gate, up) = w13[e] x[t] and e = ids[t, k].

    Args:
        x: `[tokens, hidden]`, of the dtype of the weights.
        w13: `[experts, 2·inner, hidden]`, gate then up.
        w2: `[experts, hidden, inner]`.
        weights: `[tokens, k]`, of the router.
        ids: `[tokens, k]` integers, of experts.

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
    results = grouped_mm(silu(gate) * up, w2.transpose(1, 2), offs=ends)
    outputs = torch.empty_like(results).index_copy_(0, order, results).view(*ids.shape, -1)
    return (outputs.to(weights.dtype) * weights.unsqueeze(-1)).sum(dim=1).to(x.dtype)


def is_supported(layer: Any, x: "Tensor", runner: Any) -> bool:
    """Return whether `run_grouped_experts` computes what upstream does for this layer.

    Args:
        layer: SGLang's, with `w13_weight` `[local experts, 2·inner, hidden]` and `w2_weight`
            `[local experts, hidden, inner]`.
        x: `[tokens, hidden]`, the layer's input.
        runner: the layer's `MoeRunnerConfig`.

    Returns:
        False for an activation other than plain SiLU, router weights on the input, biases, experts on other ranks,
        dtypes that differ, no tokens, and rows of weights that are no multiple of 16 bytes.
    """
    w13, w2 = layer.w13_weight, layer.w2_weight
    simple = runner.activation == "silu" and runner.gemm1_alpha is None and not runner.apply_router_weight_on_input
    no_bias = getattr(layer, "w13_weight_bias", None) is None and getattr(layer, "w2_weight_bias", None) is None
    all_local = len(w13) == layer.num_experts and x.dtype == w13.dtype == w2.dtype and len(x) > 0
    aligned = all(w.shape[-1] * w.element_size() % 16 == 0 for w in (w13, w2))
    return simple and no_bias and all_local and aligned


def make_moe_forward(upstream: Callable[..., "Tensor"]) -> Callable[..., "Tensor"]:
    """Make `moe_forward_native`, which calls `upstream` for layers that are not supported.

    Args:
        upstream: SGLang's `moe_forward_native`.

    Returns:
        A function with upstream's parameters and result, `[tokens, hidden]` in the dtype of its input.
    """

    @functools.wraps(upstream)
    def moe_forward_native(layer: Any, x: "Tensor", topk_output: Any, moe_runner_config: Any) -> "Tensor":
        if not is_supported(layer, x, moe_runner_config):
            return upstream(layer, x, topk_output, moe_runner_config)
        weights, ids, _ = topk_output
        return run_grouped_experts(x, layer.w13_weight, layer.w2_weight, weights, ids)

    return moe_forward_native


def install() -> None:
    """Replace upstream's function, which its callers import when they call it."""

    def replace(module: Any) -> None:
        module.moe_forward_native = make_moe_forward(module.moe_forward_native)

    after_import("sglang.srt.layers.moe.fused_moe_native", replace)


PATCH = Patch(
    name="sglang_grouped_experts",
    distribution="sglang",
    versions=releases.sglang_releases(),
    scope="sglang-cpu",
    summary="experts run one by one in Python: slow decoding on a CPU",
    install=install,
)
