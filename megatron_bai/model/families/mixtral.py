"""Mixtral: grouped-query attention, experts under names of their own, softmax over the chosen ones."""

from typing import Any

from megatron_bai.model.families.architecture import Architecture
from megatron_bai.model.families.family import HF_FIELDS, Family
from megatron_bai.model.families.param_mapping import (
    HF_LAYER,
    ParamMapping,
    attention_mappings,
    embedding_mappings,
    expert_mappings,
    router_mappings,
)

BLOCK = HF_LAYER + "block_sparse_moe."
EXPERT = BLOCK + "experts.{expert}."


class Mixtral(Family):
    """Every layer has experts, whose projections are w1 (gate), w3 (up) and w2 (down)."""

    name = "mixtral"
    model_types = ("mixtral",)
    transformers_class = "MixtralForCausalLM"
    hf_fields = {**HF_FIELDS, "num_experts": "num_local_experts", "moe_ffn_hidden_size": "intermediate_size"}
    served_by = "sglang.srt.models.mixtral"

    def unserved(self, model: Architecture) -> str:
        """Return what SGLang's model has in its code: positions, which `get_rope` is given no scaling of, and heads.

        Args:
            model: the architecture.
        """
        code = "(srt/models/mixtral.py:{})"
        if model.values["rope_parameters"]["rope_type"] != "default":
            return "it scales no positions " + code.format(170)
        if model.rope_theta % 1:
            return f"it cuts rope_theta ({model.rope_theta}) to a whole number " + code.format(174)
        if model.head_dim * model.num_attention_heads != model.hidden_size:
            return "its heads have hidden_size / num_attention_heads elements " + code.format(148)
        return super().unserved(model)

    def transformer_arguments(self, model: Architecture) -> dict[str, Any]:
        """Return how the router's weights are normalised: over the chosen experts."""
        return {"moe_router_score_function": "softmax", "moe_router_pre_softmax": False}

    def mappings(self, model: Architecture) -> tuple[ParamMapping, ...]:
        """Return the kinds of parameters as Mistral publishes them, and as transformers 5 holds them."""
        return (
            *embedding_mappings(model),
            *attention_mappings(),
            *router_mappings(BLOCK + "gate.weight", HF_LAYER + "mlp.gate.weight"),
            *expert_mappings(EXPERT + "w1.weight", EXPERT + "w3.weight", EXPERT + "w2.weight"),
        )


FAMILY = Mixtral()
