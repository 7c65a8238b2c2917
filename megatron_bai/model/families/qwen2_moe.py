"""Qwen2-MoE: biases of queries, keys and values, and a shared expert beside the others whose output a gate scales."""

from typing import Any

from megatron_bai.model.families.architecture import Architecture
from megatron_bai.model.families.param_mapping import (
    HF_LAYER,
    ParamMapping,
    attention_mappings,
    dense_mappings,
    embedding_mappings,
    expert_mappings,
    router_mappings,
    shared_expert_mappings,
)
from megatron_bai.model.families.qwen3_moe import QwenMoe
from megatron_bai.model.families.requirements import require_size


class Qwen2Moe(QwenMoe):
    """Every MoE layer has a shared expert, and no queries or keys are normed."""

    name = "qwen2_moe"
    model_types = ("qwen2_moe",)
    transformers_class = "Qwen2MoeForCausalLM"
    served_by = "sglang.srt.models.qwen2_moe"

    def validate(self, model: Architecture) -> None:
        """Refuse a shared expert without a width.

        Args:
            model: the architecture.

        Raises:
            UserError: names the key.
        """
        require_size("shared_expert_intermediate_size", model.values["shared_expert_intermediate_size"])

    def transformer_arguments(self, model: Architecture) -> dict[str, Any]:
        """Return the biases, the shared expert, and how the router's weights are normalised."""
        return {
            "add_qkv_bias": bool(model.values["qkv_bias"]),
            "moe_router_score_function": "softmax",
            "moe_router_pre_softmax": not model.values["norm_topk_prob"],
            "moe_shared_expert_intermediate_size": model.values["shared_expert_intermediate_size"],
            "moe_shared_expert_gate": True,
        }

    def mappings(self, model: Architecture) -> tuple[ParamMapping, ...]:
        """Return the kinds of parameters as Qwen publishes them."""
        return (
            *embedding_mappings(model),
            *attention_mappings(qkv_bias=bool(model.values["qkv_bias"])),
            *router_mappings(),
            *expert_mappings(),
            *shared_expert_mappings(
                model.values["shared_expert_intermediate_size"],
                HF_LAYER + "mlp.shared_expert.",
                HF_LAYER + "mlp.shared_expert_gate.weight",
            ),
            *dense_mappings(),
        )


FAMILY = Qwen2Moe()
