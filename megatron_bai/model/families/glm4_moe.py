"""GLM-4.5 and 4.6: partly rotated heads, dense layers first, sigmoid routers with an expert bias, shared experts."""

from typing import Any

from megatron_bai.model.families.architecture import Architecture
from megatron_bai.model.families.dense_first import DenseFirst
from megatron_bai.model.families.family import HF_FIELDS, shared_experts_width
from megatron_bai.model.families.param_mapping import (
    HF_LAYER,
    ParamMapping,
    attention_mappings,
    dense_mappings,
    embedding_mappings,
    expert_bias_mapping,
    expert_mappings,
    router_mappings,
    shared_expert_mappings,
)
from megatron_bai.model.families.sigmoid_router import sigmoid_router_arguments


class Glm4Moe(DenseFirst):
    """Queries and keys are normed in the large models and not in the small one (`use_qk_norm`)."""

    name = "glm4_moe"
    model_types = ("glm4_moe",)
    transformers_class = "Glm4MoeForCausalLM"
    hf_fields = {**HF_FIELDS, "num_experts": "n_routed_experts"}
    partial_rotary = True
    served_by = "sglang.srt.models.glm4_moe"

    def transformer_arguments(self, model: Architecture) -> dict[str, Any]:
        """Return biases, norms of queries and keys, shared experts, and how the router scores."""
        values = model.values
        return {
            "add_qkv_bias": bool(values["attention_bias"]),
            "qk_layernorm": bool(values["use_qk_norm"]),
            "moe_shared_expert_intermediate_size": shared_experts_width(model),
            **sigmoid_router_arguments(model),
        }

    def mappings(self, model: Architecture) -> tuple[ParamMapping, ...]:
        """Return the kinds of parameters as Z.ai publishes them."""
        values = model.values
        return (
            *embedding_mappings(model),
            *attention_mappings(qkv_bias=bool(values["attention_bias"]), head_norms=bool(values["use_qk_norm"])),
            *router_mappings(),
            expert_bias_mapping(HF_LAYER + "mlp.gate.e_score_correction_bias"),
            *expert_mappings(),
            *shared_expert_mappings(shared_experts_width(model)),
            *dense_mappings(),
        )


FAMILY = Glm4Moe()
