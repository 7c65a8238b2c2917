"""Solar-Open (upstage/Solar-Open-100B): sigmoid routers with a bias, shared experts, every layer with experts."""

from typing import Any

from megatron_bai.model.families.architecture import Architecture
from megatron_bai.model.families.family import HF_FIELDS, Family, shared_experts_width
from megatron_bai.model.families.param_mapping import (
    HF_LAYER,
    ParamMapping,
    attention_mappings,
    embedding_mappings,
    expert_bias_mapping,
    expert_mappings,
    router_mappings,
    shared_expert_mappings,
)
from megatron_bai.model.families.sigmoid_router import sigmoid_router_arguments


class SolarOpen(Family):
    """Attention is Llama's, the MoE layers are GLM-4.5's."""

    name = "solar_open"
    model_types = ("solar_open",)
    transformers_class = "SolarOpenForCausalLM"
    hf_fields = {**HF_FIELDS, "num_experts": "n_routed_experts"}
    only = {"hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False}

    def transformer_arguments(self, model: Architecture) -> dict[str, Any]:
        """Return the shared experts, and how the router scores."""
        return {"moe_shared_expert_intermediate_size": shared_experts_width(model), **sigmoid_router_arguments(model)}

    def mappings(self, model: Architecture) -> tuple[ParamMapping, ...]:
        """Return the kinds of parameters as Upstage publishes them."""
        return (
            *embedding_mappings(model),
            *attention_mappings(),
            *router_mappings(),
            expert_bias_mapping(HF_LAYER + "mlp.gate.e_score_correction_bias"),
            *expert_mappings(),
            *shared_expert_mappings(shared_experts_width(model)),
        )


FAMILY = SolarOpen()
