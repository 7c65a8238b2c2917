"""OLMoE: norms over the full width of queries and keys, and router weights that are not normalised."""

from typing import Any

from megatron_bai.model.families.architecture import Architecture
from megatron_bai.model.families.family import HF_FIELDS, Family
from megatron_bai.model.families.param_mapping import (
    ParamMapping,
    attention_mappings,
    embedding_mappings,
    expert_mappings,
    router_mappings,
)

_SERVED_EPSILON = 1e-5


class Olmoe(Family):
    """Every layer has experts."""

    name = "olmoe"
    model_types = ("olmoe",)
    transformers_class = "OlmoeForCausalLM"
    hf_fields = {**HF_FIELDS, "moe_ffn_hidden_size": "intermediate_size"}
    full_width_norms = True
    only = {"hidden_act": "silu", "attention_bias": False, "clip_qkv": None}
    served_by = "sglang.srt.models.olmoe"
    served_ranks = 1  # its norms have the width of the model on every rank (srt/models/olmoe.py:154)

    def unserved(self, model: Architecture) -> str:
        """Return which value SGLang's model has another one of in its code.

        Args:
            model: the architecture.
        """
        code = "(srt/models/olmoe.py:{})"
        if model.head_dim * model.num_attention_heads != model.hidden_size:
            return "its heads have hidden_size / num_attention_heads elements " + code.format(138)
        if model.num_query_groups != model.num_attention_heads:
            return "it norms as many keys as queries " + code.format(155)
        if model.norm_epsilon != _SERVED_EPSILON:
            return f"its norms have an epsilon of {_SERVED_EPSILON} " + code.format(154)
        if model.values["norm_topk_prob"]:
            return "it normalises no router's weights " + code.format(85)
        return super().unserved(model)

    def transformer_arguments(self, model: Architecture) -> dict[str, Any]:
        """Return how the router's weights are normalised."""
        return {
            "moe_router_score_function": "softmax",
            "moe_router_pre_softmax": not model.values["norm_topk_prob"],
        }

    def mappings(self, model: Architecture) -> tuple[ParamMapping, ...]:
        """Return the kinds of parameters as AllenAI publishes them."""
        return (
            *embedding_mappings(model),
            *attention_mappings(full_width_norms=self.full_width_norms),
            *router_mappings(),
            *expert_mappings(),
        )


FAMILY = Olmoe()
