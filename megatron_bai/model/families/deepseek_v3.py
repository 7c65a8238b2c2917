"""DeepSeek-V3, Moonlight, Kimi-K2: latent attention, groups of experts, sigmoid routers with a bias, shared experts."""

import math
from collections.abc import Mapping
from typing import Any

from megatron_bai.compat import releases
from megatron_bai.errors import UserError
from megatron_bai.model.families import rope
from megatron_bai.model.families.architecture import Architecture
from megatron_bai.model.families.dense_first import DenseFirst
from megatron_bai.model.families.family import HF_FIELDS, shared_experts_width
from megatron_bai.model.families.layer_parts import has_experts
from megatron_bai.model.families.param_mapping import (
    HF_LAYER,
    MEGATRON_LAYER,
    ParamMapping,
    dense_mappings,
    embedding_mappings,
    expert_bias_mapping,
    expert_mappings,
    router_mappings,
    shared_expert_mappings,
)
from megatron_bai.model.families.requirements import require_size
from megatron_bai.model.families.sigmoid_router import sigmoid_router_arguments

# Hugging Face's name of a size of latent attention → Megatron-Core's.
_LATENT_SIZES = {
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_head_dim",
    "qk_rope_head_dim": "qk_pos_emb_head_dim",
    "v_head_dim": "v_head_dim",
}
# Attributes of YaRN where attention is grouped → those of MLATransformerConfig.
_YARN = {
    "yarn_rotary_scaling_factor": "rotary_scaling_factor",
    "yarn_original_max_position_embeddings": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}


class DeepseekV3(DenseFirst):
    """Moonlight is DeepSeek-V3 without latents of queries."""

    name = "deepseek_v3"
    model_types = ("deepseek_v3", "kimi_k2")
    read_as = {"kimi_k2": "deepseek_v3"}
    transformers_class = "DeepseekV3ForCausalLM"
    hf_fields = {**HF_FIELDS, "num_experts": "n_routed_experts", "head_dim": "qk_head_dim"}
    only = {
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_interleave": True,
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }
    served_by = "sglang.srt.models.deepseek_v2"
    loaded_together = ("q_a_proj.weight", "kv_a_proj_with_mqa.weight")

    def stated(self, model: Architecture) -> Mapping[str, Any]:
        """Return how the router scores, and that all layers behind the dense ones have experts.

        Args:
            model: not used.
        """
        return {key: self.only[key] for key in ("moe_layer_freq", "scoring_func", "topk_method")}

    def validate(self, model: Architecture) -> None:
        """Refuse sizes of latents and heads that are none.

        Args:
            model: the architecture.

        Raises:
            UserError: names the key.
        """
        values = model.values
        names = [*_LATENT_SIZES, *(["q_lora_rank"] if values["q_lora_rank"] is not None else [])]
        for name in names:
            require_size(name, values[name])
        if model.num_query_groups != model.num_attention_heads:
            raise UserError(
                f"num_key_value_heads ({model.num_query_groups}) is not num_attention_heads"
                f" ({model.num_attention_heads}): each head has its own keys, made of one latent"
            )

    def config_class(self) -> Any:
        """Return Megatron-Core's configuration of latent attention."""
        from megatron.core.transformer.transformer_config import MLATransformerConfig

        return MLATransformerConfig

    def transformer_arguments(self, model: Architecture) -> dict[str, Any]:
        """Return the sizes of latents and heads, shared experts, and how the router scores."""
        values = model.values
        return {
            "qk_layernorm": True,  # of the latents
            "q_lora_rank": values["q_lora_rank"],
            **{ours: values[theirs] for theirs, ours in _LATENT_SIZES.items()},
            "moe_shared_expert_intermediate_size": shared_experts_width(model),
            **sigmoid_router_arguments(model),
        }

    def rope_arguments(self, model: Architecture) -> rope.RopeArguments:
        """Return what the attention reads of positions in its configuration: GPTModel itself rotates nothing.

        Of numbers m and a Megatron-Core makes g(m)/g(a), by which cosine and sine are scaled, and g(a)², by which the
        scores are, with g(x) = 0.1·x·ln(factor) + 1. Transformers ignores one without the other in the first.

        Args:
            model: the architecture.

        Raises:
            UserError: a scaling that Megatron-Core does not compute as transformers does, or pairs that are none.
        """
        rotated = model.values["qk_rope_head_dim"]
        require_size("qk_rope_head_dim", rotated)
        if rotated % 2:
            raise UserError(f"qk_rope_head_dim ({rotated}) is odd: it is rotated in pairs")
        general = rope.rope_arguments({**model.values, "head_dim": rotated})
        found: dict[str, Any] = {"rope_type": "rope", "rotary_base": model.rope_theta, "mscale_all_dim": 0.0}
        if yarn := general.config:
            if not yarn["yarn_correction_range_round_to_int"]:
                raise UserError("truncate is false: Megatron-Core rounds YaRN's range in latent attention")
            found |= {"rope_type": "yarn", **{theirs: yarn[ours] for ours, theirs in _YARN.items()}}
            parameters, log_factor = model.values["rope_parameters"], 0.1 * math.log(found["rotary_scaling_factor"])
            all_dim = float(parameters.get("mscale_all_dim") or 0.0)
            if (mscale := yarn["yarn_mscale"]) is None:
                mscale, stated = 1.0, 0.0
            else:
                stated = yarn["yarn_mscale_all_dim"]
            if stated != all_dim:  # the same scale of cosine and sine by another a
                scale = (log_factor * mscale + 1) / (log_factor * stated + 1)
                mscale = (scale * (log_factor * all_dim + 1) - 1) / log_factor
            found |= {"mscale": float(mscale), "mscale_all_dim": all_dim}
        return rope.RopeArguments({"position_embedding_type": "rope"}, found)

    def adapt_layer(self, layer: Any, model: Architecture, transformer_engine: bool) -> None:
        """Put in latent attention for a CPU, and name norms in checkpoints as Transformer Engine's spec does.

        Args:
            layer: the spec, changed in place.
            model: the architecture.
            transformer_engine: whether the spec is Transformer Engine's, which stays.

        Raises:
            UserError: Megatron-Core builds another model than this of Transformer Engine's layers.
        """
        if transformer_engine:
            if model.values["q_lora_rank"] is None and releases.megatron_release().norms_inputs_of_queries:
                raise UserError(
                    f"megatron-core {releases.installed_megatron()} norms the input of the queries once more where a "
                    "model has no q_lora_rank, as this one, and the layers are Transformer Engine's: another model than"
                    " the checkpoint's; take an earlier release of megatron-core"
                )
            return
        from megatron_bai.model.families.latent_attention import LocalLatentAttention

        layer.submodules.self_attention.module = LocalLatentAttention
        names = {
            f"self_attention.{x}_layernorm.": f"self_attention.linear_{x}_up_proj.layer_norm_" for x in ("q", "kv")
        }
        if not has_experts(layer):
            names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
        layer.submodules.sharded_state_dict_keys_map |= names

    def cached_values_per_token(self, model: Architecture, ranks: int) -> int:
        """Return the size of a token's latent and its rotated key: each rank of a server has them whole.

        Args:
            model: the architecture.
            ranks: not used.
        """
        return int(model.values["kv_lora_rank"] + model.values["qk_rope_head_dim"])

    def attention_values_per_token(self, model: Architecture) -> int:
        """Return those of queries, keys and values of all heads, and of the latents with and without their norms.

        Args:
            model: the architecture.
        """
        values, heads = model.values, model.num_attention_heads
        latents = (values["q_lora_rank"] or 0) + values["kv_lora_rank"]
        return int(heads * (4 * model.head_dim + 3 * values["v_head_dim"]) + 2 * latents)

    def mappings(self, model: Architecture) -> tuple[ParamMapping, ...]:
        """Return the kinds of parameters as DeepSeek publishes them."""
        return (
            *embedding_mappings(model),
            *_attention_mappings(model),
            *router_mappings(),
            expert_bias_mapping(HF_LAYER + "mlp.gate.e_score_correction_bias"),
            *expert_mappings(),
            *shared_expert_mappings(shared_experts_width(model)),
            *dense_mappings(),
        )


def _attention_mappings(model: Architecture) -> tuple[ParamMapping, ...]:
    """Return latent attention with the norm before it. What makes the latents is whole on every tensor rank."""
    values, h, heads = model.values, model.hidden_size, model.num_attention_heads
    q_latent, kv_latent = values["q_lora_rank"], values["kv_lora_rank"]
    key_and_value, rotated = values["qk_nope_head_dim"] + values["v_head_dim"], values["qk_rope_head_dim"]

    def kind(key: str, name: str, *shape: int, split: bool = False) -> ParamMapping:
        attention, hf = MEGATRON_LAYER + "self_attention.", HF_LAYER + "self_attn."
        return ParamMapping(attention + key, (f"{hf}{name}.weight",), lambda m: shape, "all", split)

    if q_latent is None:
        queries = [kind("linear_q_proj.weight", "q_proj", heads * model.head_dim, h, split=True)]
    else:
        queries = [
            kind("linear_q_down_proj.weight", "q_a_proj", q_latent, h),
            kind("linear_q_up_proj.layer_norm_weight", "q_a_layernorm", q_latent),
            kind("linear_q_up_proj.weight", "q_b_proj", heads * model.head_dim, q_latent, split=True),
        ]
    return (
        ParamMapping(MEGATRON_LAYER + "input_layernorm.weight", (HF_LAYER + "input_layernorm.weight",), lambda m: (h,)),
        *queries,
        kind("linear_kv_down_proj.weight", "kv_a_proj_with_mqa", kv_latent + rotated, h),
        kind("linear_kv_up_proj.layer_norm_weight", "kv_a_layernorm", kv_latent),
        kind("linear_kv_up_proj.weight", "kv_b_proj", heads * key_and_value, kv_latent, split=True),
        kind("linear_proj.weight", "o_proj", h, heads * values["v_head_dim"], split=True),
    )


FAMILY = DeepseekV3()
