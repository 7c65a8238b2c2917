"""Megatron-LM's arguments in a checkpoint: what they say of a model, by Hugging Face's names, and how ours are written.

A checkpoint that Megatron-LM saved has no `config.json`: its arguments are all that tells what the weights mean. They
are read without running what their pickle names (`common_state`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_bai.checkpoint.common_state import find_common_state, read_arguments
from megatron_bai.errors import UserError

# Their names → those of Hugging Face; those that it does not have keep their own.
_ARGS = {
    "rotary_base": "rope_theta", "rotary_percent": "partial_rotary_factor", "norm_epsilon": "rms_norm_eps",
    "hidden_size": "hidden_size", "num_layers": "num_hidden_layers", "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads", "kv_channels": "head_dim", "qk_layernorm": "qk_layernorm",
    "position_embedding_type": "position_embedding_type", "normalization": "normalization",
    "apply_layernorm_1p": "apply_layernorm_1p", "rotary_interleaved": "rotary_interleaved",
    "use_rope_scaling": "use_rope_scaling", "rope_scaling_factor": "rope_scaling_factor", "swiglu": "swiglu",
    "squared_relu": "squared_relu", "multi_latent_attention": "multi_latent_attention", "window_size": "window_size",
    "softmax_type": "softmax_type", "no_rope_freq": "no_rope_freq",
}  # fmt: skip
_DENSE_ARGS = {"ffn_hidden_size": "intermediate_size"}  # where all layers have experts it means nothing
_EXPERT_ARGS = {
    "num_experts": "num_experts", "moe_router_topk": "num_experts_per_tok", "moe_ffn_hidden_size":
    "moe_intermediate_size", "moe_router_num_groups": "n_group", "moe_router_group_topk": "topk_group",
    "moe_router_topk_scaling_factor": "routed_scaling_factor", "moe_router_score_function": "scoring_func",
}  # fmt: skip
_LATENT_ARGS = {
    "q_lora_rank": "q_lora_rank", "kv_lora_rank": "kv_lora_rank", "qk_head_dim": "qk_nope_head_dim",
    "qk_pos_emb_head_dim": "qk_rope_head_dim", "v_head_dim": "v_head_dim",
}  # fmt: skip

# What a Qwen3-MoE has, by argument: the value, and what one means that is not there (None: it must be said).
_QWEN3_MOE: dict[str, tuple[Any, Any]] = {
    "qk_layernorm": (True, None), "normalization": ("RMSNorm", None), "position_embedding_type": ("rope", None),
    "swiglu": (True, None), "add_bias_linear": (False, None), "add_qkv_bias": (False, False),
    "rotary_percent": (1.0, 1.0), "rotary_interleaved": (False, False), "use_rope_scaling": (False, False),
    "apply_layernorm_1p": (False, False), "layernorm_zero_centered_gamma": (False, False),
    "multi_latent_attention": (False, False), "moe_router_score_function": ("softmax", "softmax"),
    "moe_router_enable_expert_bias": (False, False), "softmax_type": ("vanilla", "vanilla"),
    "squared_relu": (False, False),
}  # fmt: skip
# What it has not: arguments that are missing, None, 0 or false.
_QWEN3_MOE_HAS_NO = (
    "moe_shared_expert_intermediate_size", "moe_router_topk_scaling_factor", "moe_router_num_groups", "mtp_num_layers",
    "window_size", "no_rope_freq", "moe_latent_size", "moe_apply_probs_on_input",
)  # fmt: skip
_SIZES = {
    "hidden_size": "hidden_size", "num_layers": "num_hidden_layers", "num_attention_heads": "num_attention_heads",
    "num_experts": "num_experts", "moe_router_topk": "num_experts_per_tok", "moe_ffn_hidden_size":
    "moe_intermediate_size", "ffn_hidden_size": "intermediate_size", "norm_epsilon": "rms_norm_eps",
    "rotary_base": "rope_theta", "max_position_embeddings": "max_position_embeddings",
}  # fmt: skip


def hf_values(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return Megatron-LM's arguments by Hugging Face's names, without those that a model like this does not use.

    Args:
        arguments: of `read_arguments`.
    """
    names, has_experts = dict(_ARGS), bool(arguments.get("num_experts", True))
    names |= _EXPERT_ARGS if has_experts else _DENSE_ARGS
    names |= _LATENT_ARGS if arguments.get("multi_latent_attention", True) else {}
    values = {name: arguments.get(key) for key, name in names.items()}
    if arguments.get("group_query_attention") is False:
        values["num_key_value_heads"] = values["num_attention_heads"]
    if has_experts and "moe_router_pre_softmax" in arguments:
        softmax = arguments.get("moe_router_score_function", "softmax") == "softmax"
        values["norm_topk_prob"] = not (softmax and arguments["moe_router_pre_softmax"])
    return {name: value for name, value in values.items() if value is not None}


def describe_model(directory: Path) -> dict[str, Any] | None:
    """Return the content of the `config.json` that a checkpoint without one would have; None where nothing says.

    The vocabulary has `vocab_size` rows, and what Megatron-LM padded it with is left out; where the arguments have the
    padded size alone, all rows are tokens.

    Args:
        directory: of the checkpoint.

    Raises:
        UserError: the arguments are not those of a Qwen3-MoE, or do not say all of one: the first of them is named.
    """
    arguments = read_arguments(directory)
    if not arguments.get("num_layers"):
        return None
    where = f"{directory} has no config.json, and the arguments in its {find_common_state(directory)}"
    advice = "give it the config.json of the model"
    for name, (wanted, default) in _QWEN3_MOE.items():
        if (value := arguments.get(name, default)) != wanted:
            raise UserError(f"{where} are not a Qwen3-MoE's ({name} is {value!r}, not {wanted!r}): {advice}")
    for name in _QWEN3_MOE_HAS_NO:
        if arguments.get(name):
            raise UserError(f"{where} are not a Qwen3-MoE's ({name} is {arguments[name]!r}): {advice}")
    groups = "num_query_groups" if arguments.get("group_query_attention") else "num_attention_heads"
    values = {theirs: arguments.get(name) for name, theirs in _SIZES.items()}
    values["num_key_value_heads"] = arguments.get(groups)
    values["head_dim"] = arguments.get("kv_channels")
    values["vocab_size"] = arguments.get("vocab_size") or arguments.get("padded_vocab_size")
    names = {theirs: name for name, theirs in _SIZES.items()} | {
        "num_key_value_heads": groups, "head_dim": "kv_channels", "vocab_size": "padded_vocab_size",
    }  # fmt: skip
    if missing := [names[theirs] for theirs, value in values.items() if value is None]:
        raise UserError(f"{where} do not say {missing[0]}: {advice}")
    untied = arguments.get("untie_embeddings_and_output_weights")
    if not isinstance(untied, bool):
        raise UserError(f"{where} do not say untie_embeddings_and_output_weights: {advice}")
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
        "norm_topk_prob": not arguments.get("moe_router_pre_softmax", False),
        "decoder_sparse_step": 1,
        "mlp_only_layers": _dense_layers(arguments, where, advice),
        "tie_word_embeddings": not untied,
        "initializer_range": arguments.get("init_method_std", 0.02),
        **values,
    }


def _dense_layers(arguments: Mapping[str, Any], where: str, advice: str) -> list[int]:
    """Return the layers without experts, counted from 0."""
    count, pattern = arguments["num_layers"], arguments.get("moe_layer_freq", 1)
    if isinstance(pattern, int) and pattern > 0:  # such as 2: layers 0, 2, 4 … have experts
        pattern = [int(layer % pattern == 0) for layer in range(count)]
    if not isinstance(pattern, list) or len(pattern) != count:
        raise UserError(f"{where} have moe_layer_freq {pattern!r} for {count} layers: {advice}")
    return [layer for layer, has_experts in enumerate(pattern) if not has_experts]
