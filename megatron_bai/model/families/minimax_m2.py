"""MiniMax-M2: norms over the full width of queries and keys, partly rotated heads, sigmoid routers with a bias."""

from collections.abc import Mapping
from typing import Any

from megatron_bai.errors import UserError
from megatron_bai.model.families import rope
from megatron_bai.model.families.architecture import Architecture
from megatron_bai.model.families.family import HF_FIELDS, Family
from megatron_bai.model.families.param_mapping import (
    HF_LAYER,
    ParamMapping,
    attention_mappings,
    embedding_mappings,
    expert_bias_mapping,
    expert_mappings,
    router_mappings,
)
from megatron_bai.model.families.sigmoid_router import sigmoid_router_arguments

BLOCK = HF_LAYER + "block_sparse_moe."
EXPERT = BLOCK + "experts.{expert}."


class MiniMaxM2(Family):
    """Every layer has experts, under Mixtral's names."""

    name = "minimax_m2"
    model_types = ("minimax_m2",)
    transformers_class = "MiniMaxM2ForCausalLM"
    hf_fields = {**HF_FIELDS, "num_experts": "num_local_experts", "moe_ffn_hidden_size": "intermediate_size"}
    partial_rotary = True
    full_width_norms = True
    only = {
        "hidden_act": "silu",
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "shared_intermediate_size": 0,
    }
    served_by = "sglang.srt.models.minimax_m2"

    def stated(self, model: Architecture) -> Mapping[str, Any]:
        """Return what SGLang leaves out where nothing is said of it, and the rotated part of a head under its name.

        Args:
            model: the architecture.
        """
        rotated = round(self.rope_arguments(model).gpt.get("rotary_percent", 1.0) * model.head_dim)
        norms_and_router = {key: self.only[key] for key in ("use_qk_norm", "scoring_func", "use_routing_bias")}
        return {**norms_and_router, "rotary_dim": rotated}

    def validate(self, model: Architecture) -> None:
        """Refuse layers with linear attention, which earlier models of MiniMax have.

        Args:
            model: the architecture.

        Raises:
            UserError: names the key.
        """
        if others := set(model.values.get("attn_type_list") or ()) - {1}:
            raise UserError(f"attn_type_list has {min(others)!r}, only 1 (softmax attention) is supported")

    def transformer_arguments(self, model: Architecture) -> dict[str, Any]:
        """Return how the router scores and chooses."""
        return sigmoid_router_arguments(model)

    def rope_arguments(self, model: Architecture) -> rope.RopeArguments:
        """Return what Megatron-Core is told of positions: `rotary_dim` elements of a head are rotated.

        transformers 5.12 reads `partial_rotary_factor` in its place, which published configurations do not have.

        Args:
            model: the architecture.

        Raises:
            UserError: both keys are there and contradict each other, or a number that is none.
        """
        stated = model.values.get("rope_parameters") or {}
        rotated = model.values.get("rotary_dim")
        if rotated is None:
            return super().rope_arguments(model)
        if type(rotated) is not int:
            raise UserError(f"rotary_dim is {rotated!r}, which is no size")
        fraction = rotated / model.head_dim
        if (other := stated.get("partial_rotary_factor", fraction)) != fraction:
            raise UserError(f"rotary_dim is {rotated} of {model.head_dim}, and partial_rotary_factor is {other!r}")
        values = {**model.values, "rope_parameters": {**stated, "partial_rotary_factor": fraction}}
        return rope.rope_arguments(values, self.partial_rotary)

    def mappings(self, model: Architecture) -> tuple[ParamMapping, ...]:
        """Return the kinds of parameters as MiniMax publishes them, and as transformers 5 holds them."""
        return (
            *embedding_mappings(model),
            *attention_mappings(full_width_norms=self.full_width_norms),
            *router_mappings(BLOCK + "gate.weight", HF_LAYER + "mlp.gate.weight"),
            expert_bias_mapping(BLOCK + "e_score_correction_bias", HF_LAYER + "mlp.e_score_correction_bias"),
            *expert_mappings(EXPERT + "w1.weight", EXPERT + "w3.weight", EXPERT + "w2.weight"),
        )


FAMILY = MiniMaxM2()
