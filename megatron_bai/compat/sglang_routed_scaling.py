"""The scale of Ling's and Ring's experts on a CPU.

Symptom: log-probabilities of Ling 2.0 are off, the more the larger the experts' weights.

Upstream: srt/models/bailing_moe.py leaves `routed_scaling_factor` to the runner of the experts. Triton's applies it;
that of a CPU (srt/layers/moe/fused_moe_native.py) does not; other models multiply by themselves where there is no CUDA.

What it does: the model multiplies the output of its experts.

Can go: when upstream's model or its runner on a CPU does.
"""

from typing import TYPE_CHECKING, Any

from megatron_bai.compat import releases
from megatron_bai.compat.patch import Patch, after_import

if TYPE_CHECKING:
    from torch import Tensor


def forward_scaled_experts(block: Any, hidden_states: "Tensor", forward_batch: Any) -> "Tensor":
    """Compute the scaled output of a block's experts, in place of `BailingMoESparseMoeBlock._forward_router_experts`.

    Args:
        block: the layer's.
        hidden_states: `[tokens, hidden]`.
        forward_batch: SGLang's, for the gate.
    """
    logits, expert_bias = block._forward_gate(hidden_states, forward_batch)
    chosen = block.topk(hidden_states, logits, dynamic_expert_bias=expert_bias)
    scaled: Tensor = block.experts(hidden_states, chosen) * block.routed_scaling_factor
    return scaled


def install() -> None:
    """Replace the method that calls the experts."""

    def replace(module: Any) -> None:
        assert callable(module.BailingMoESparseMoeBlock._forward_router_experts)
        module.BailingMoESparseMoeBlock._forward_router_experts = forward_scaled_experts

    after_import("sglang.srt.models.bailing_moe", replace)


PATCH = Patch(
    name="sglang_routed_scaling",
    distribution="sglang",
    versions=releases.sglang_releases(),
    scope="sglang-cpu",
    summary="Ling and Ring 2.0: routed_scaling_factor is not applied on a CPU",
    install=install,
)
