"""What a source says beside its tensors, by Hugging Face's names, and which of it changes the forward pass.

The values are those that transformers makes of `config.json` (`hf_config`), or else the arguments that Megatron-LM
saved, as far as both sources say something. The values of a section stand under its name with a dot between
(`vision_config.hidden_size`), those of a `text_config` beside those of the whole.

    FORWARD        changes the forward pass, in any section
    TOKEN_IDS      begin, end and padding tokens
    SILENT         says nothing about the weights, or the tensors show it
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_bai.checkpoint.common_state import read_arguments
from megatron_bai.checkpoint.hf_config import CONFIG, read_hf_config, read_raw_config
from megatron_bai.checkpoint.megatron_args import hf_values

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
FORWARD = frozenset(
    """
    model_type hidden_act hidden_activation activation_function mlp_hidden_act mamba_hidden_act
    activation_sparsity_pattern mlp_bias attention_bias use_bias qkv_bias use_qkv_bias attention_out_bias
    attention_k_eq_v alibi attention_type
    hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim global_head_dim
    num_global_key_value_heads num_kv_shared_layers multi_query new_decoder_architecture parallel_attn
    use_parallel_residual q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim qk_head_dim v_head_dim
    use_qk_norm qk_norm qk_layernorm index_topk index_n_heads index_head_dim
    rope_theta rope_parameters rope_scaling partial_rotary_factor rope_interleave rope_local_base_freq no_rope_layers
    no_rope_layer_interval use_nope rotary_dim original_max_position_embeddings position_embedding_type
    rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps norm_epsilon eps zero_centered_norm norm_type rms_norm
    layernorm_type use_post_norm apply_residual_connection_post_layernorm do_layer_norm_before mixer_rms_eps
    sliding_window use_sliding_window sliding_window_pattern layer_types mlp_layer_types attention_chunk_size
    attn_layer_period attn_layer_offset attn_layer_indices full_attention_interval full_attn_idxs block_types
    global_attn_every_n_layers local_attention window_size attention_types use_bidirectional_attention
    attn_logit_softcapping final_logit_softcapping logits_soft_cap query_pre_attn_scalar attn_temperature_tuning
    attn_scale floor_scale clip_qkv scale_attn_weights scale_attn_by_inverse_layer_idx
    logit_scale logits_scaling embedding_multiplier embedding_scale scale_embedding scale_emb scale_depth dim_model_base
    residual_multiplier attention_multiplier lm_head_multiplier key_multiplier mlp_multipliers ssm_multipliers
    ssm_in_multiplier ssm_out_multiplier attention_in_multiplier attention_out_multiplier mup_enabled
    num_experts num_experts_per_tok moe_intermediate_size shared_expert_intermediate_size n_shared_experts
    num_shared_experts moe_num_shared_experts moe_topk top_k_experts norm_topk_prob scoring_func topk_method n_group
    topk_group routed_scaling_factor router_scaling_factor moe_routed_scaling_factor route_scale route_norm
    expert_selection_fn moe_layer_freq moe_apply_router_weight_on_input moe_router_logit_softcapping moe_norm_min
    decoder_sparse_step mlp_only_layers first_k_dense_replace num_dense_layers interleave_moe_layer_step moe_layers
    moe_layer_interval moe_layer_start_index moe_layer_end_index expert_layer_period expert_layer_offset
    zero_expert_num use_expert_bias router_jitter_noise swiglu_limit swiglu_alpha
    linear_num_key_heads linear_num_value_heads linear_key_head_dim linear_value_head_dim linear_conv_kernel_dim
    linear_allow_neg_eigval mamba_n_groups mamba_n_heads mamba_d_head mamba_d_state mamba_expand mamba_rms_norm
    mamba_norm_before_gate time_step_limit n_groups chunk_size state_size
    normalization apply_layernorm_1p rotary_interleaved use_rope_scaling rope_scaling_factor
    swiglu squared_relu multi_latent_attention softmax_type no_rope_freq
    """.split()
)
# What the tensors show (the plan compares it, by a message of its own), and what says nothing about the weights.
SILENT = frozenset(
    """
    vocab_size tie_word_embeddings num_local_experts num_routed_experts n_routed_experts
    dtype torch_dtype transformers_version _name_or_path name_or_path architectures use_cache initializer_range
    output_router_logits output_attentions output_hidden_states return_dict quantization_config text_config
    """.split()
)


def changes_forward(key: str) -> bool:
    """Return whether a key, in whatever section, changes the forward pass."""
    return key.rpartition(".")[2] in FORWARD


def read_source_configs(paths: Sequence[Path]) -> dict[Path, dict[str, Any]]:
    """Return what each source says; sources that say nothing are left out.

    Raises:
        UserError: a `config.json` cannot be read.
    """
    raw = {path: read_raw_config(path) for path in paths if (path / CONFIG).is_file()}
    arguments = {path: hf_values(read_arguments(path)) for path in paths if path not in raw}
    arguments = {path: values for path, values in arguments.items() if values}
    # Equal files mean the same, and transformers takes seconds to import.
    spoken = [_without_silent(config) for config in raw.values()]
    if all(each == spoken[0] for each in spoken) and not arguments:
        return dict(zip(raw, spoken, strict=True))
    return {path: _flatten(read_hf_config(path, allow_unknown=True)) for path in raw} | arguments


def differing_values(values: Mapping[Path, Mapping[str, Any]], key: str) -> dict[Path, Any]:
    """Return what sources say of a key where they differ; empty where they do not.

    Null is what a file means that lacks the key, if another file has it. Megatron-LM's arguments that lack it say
    nothing, and to them a file says nothing that has none.

    Args:
        values: of `read_source_configs`.
        key: of one of them.
    """
    if key.rpartition(".")[2] in SILENT:
        return {}
    said = {path: each.get(key) for path, each in values.items() if (path / CONFIG).is_file()}
    if all(value is None for value in said.values()):
        said = {}
    said |= {path: each[key] for path, each in values.items() if key in each and not (path / CONFIG).is_file()}
    if key.rpartition(".")[2] in ("rope_parameters", "rope_scaling"):  # their base is compared as rope_theta
        said = {path: _without_theta(value) for path, value in said.items()}
    distinct = list(said.values())
    return said if any(value != distinct[0] for value in distinct) else {}


def _without_silent(config: dict[str, Any]) -> dict[str, Any]:
    """Return what a file says without what says nothing about the weights, sections included."""
    text = config.get("text_config")
    merged = {**config, **(text if isinstance(text, dict) else {})}
    return {key: value for key, value in _flatten(merged).items() if key.rpartition(".")[2] not in SILENT}


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return values with those of each section under its name; `text_config` stands beside the whole already."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and key.endswith("_config") and (prefix or key not in SILENT):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _without_theta(value: Any) -> Any:
    """Return rotary parameters without the base, which is a key of its own; None where nothing is scaled."""
    if not isinstance(value, dict):
        return value
    kept = {name: entry for name, entry in value.items() if name not in ("rope_theta", "type")}
    return None if kept.get("rope_type", "default") == "default" and len(kept) <= 1 else kept
