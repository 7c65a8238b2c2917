"""What Megatron-LM's trainer reads of a checkpoint beside its tensors, so that `--load` takes what is written here."""

import argparse
from pathlib import Path
from typing import Any

from megatron_bai.checkpoint.iterations import iteration_of
from megatron_bai.model.families.architecture import Architecture

_VERSION = 3.0  # of the checkpoint's form: queries, keys and values by group


def megatron_lm_state(model: Architecture, target: str | Path) -> dict[str, Any]:
    """Return the entries of `common.pt` that Megatron-LM reads.

    Args:
        model: the architecture.
        target: directory of the checkpoint, whose name may be an iteration's.

    Returns:
        `args`, plain values under the names of its command line, `checkpoint_version` and `iteration`.
    """
    iteration = iteration_of(target) or 0
    return {"args": argparse.Namespace(**arguments(model)), "checkpoint_version": _VERSION, "iteration": iteration}


def arguments(model: Architecture) -> dict[str, Any]:
    """Return a model as Megatron-LM's arguments: those that `--use-checkpoint-args` takes, and those that it compares.

    Args:
        model: the architecture.
    """
    moe = set(model.moe_layers)
    extra = {**model.family.transformer_arguments(model), **model.family.rope_arguments(model).gpt}
    activation = extra.pop("activation_func", "silu")  # which their command line has a switch for
    plain = {key: value for key, value in extra.items() if isinstance(value, bool | int | float | str | list | tuple)}
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.dense_ffn_hidden_size or model.moe_ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.head_dim,
        "max_position_embeddings": model.max_position_embeddings,
        "seq_length": model.max_position_embeddings,
        "norm_epsilon": model.norm_epsilon,
        "normalization": "RMSNorm",
        "swiglu": activation == "silu",
        "quick_geglu": activation == "quick_gelu",
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": not model.tied,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method_std": model.init_std,
        "num_experts": model.num_experts,
        "moe_router_topk": model.moe_topk,
        "moe_ffn_hidden_size": model.moe_ffn_hidden_size,
        "moe_layer_freq": 1 if len(moe) == model.num_layers else [int(n in moe) for n in range(model.num_layers)],
        "rotary_percent": 1.0,
        **plain,
        "vocab_size": model.vocab_size,
        "padded_vocab_size": model.vocab_size,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "no_save_optim": True,
        "no_save_rng": True,
    }
