"""gpt-oss: attention sinks, windows in some layers, biases everywhere, and experts with a clamped activation."""

from collections.abc import Mapping
from typing import Any

import torch

from megatron_bai.errors import UserError
from megatron_bai.model.families.architecture import Architecture
from megatron_bai.model.families.family import HF_FIELDS, Family
from megatron_bai.model.families.layer_parts import submodules_of, with_bias, without_reduction
from megatron_bai.model.families.param_mapping import (
    HF_LAYER,
    MEGATRON_LAYER,
    ParamMapping,
    attention_mappings,
    embedding_mappings,
    router_mappings,
)
from megatron_bai.model.families.requirements import require_size
from megatron_bai.model.families.row_orders import Tensors

_LIMIT = 7.0  # of gate and up projection, which transformers has in its code
_SLIDING, _FULL = "sliding_attention", "full_attention"


class GptOss(Family):
    """A layer's experts are published in one tensor, transposed, with gate and up projection in alternating columns."""

    name = "gpt_oss"
    model_types = ("gpt_oss",)
    transformers_class = "GptOssForCausalLM"
    hf_fields = {**HF_FIELDS, "num_experts": "num_local_experts", "moe_ffn_hidden_size": "intermediate_size"}
    windows = True
    only = {"hidden_act": "silu", "swiglu_limit": _LIMIT, "hidden_act_alpha": 1.702}
    served_by = "sglang.srt.models.gpt_oss"

    def unserved(self, model: Architecture) -> str:
        """Return that there is no number where SGLang asks every model for one.

        Args:
            model: the architecture.
        """
        if model.values["sliding_window"] is None:
            return "sliding_window is null (srt/models/gpt_oss.py:131): give it a number, which no layer need have"
        return super().unserved(model)

    def stated(self, model: Architecture) -> Mapping[str, Any]:
        """Return what SGLang reads, and transformers has in its code.

        Args:
            model: the architecture.
        """
        return {"swiglu_limit": _LIMIT}

    def transformer_arguments(self, model: Architecture) -> dict[str, Any]:
        """Return biases, the experts' activation, sinks, windows, and how the router's weights are normalised.

        Args:
            model: the architecture.

        Raises:
            UserError: names a kind of layers that there is not, or a window that is none.
        """
        return {
            "add_bias_linear": True,
            "activation_func": "quick_gelu",
            "activation_func_clamp_value": _LIMIT,
            "glu_linear_offset": 1.0,
            "softmax_type": "learnable",
            "moe_router_score_function": "softmax",
            "moe_router_pre_softmax": False,
            **_window_arguments(model),
        }

    def adapt_layer(self, layer: Any, model: Architecture, transformer_engine: bool) -> None:
        """Give attention no biases where the configuration says so: those of router and experts stay.

        Args:
            layer: the spec, changed in place.
            model: the architecture.
            transformer_engine: whether it is Transformer Engine's, whose experts are one module.
        """
        if not transformer_engine:
            experts = submodules_of(submodules_of(layer.submodules.mlp).experts)
            experts.linear_fc2 = without_reduction(experts.linear_fc2)
        if not model.values["attention_bias"]:
            attention = layer.submodules.self_attention.submodules
            attention.linear_qkv = with_bias(attention.linear_qkv, False)
            attention.linear_proj = with_bias(attention.linear_proj, False)

    def mappings(self, model: Architecture) -> tuple[ParamMapping, ...]:
        """Return the kinds of parameters as OpenAI's bfloat16 checkpoints have them, and transformers."""
        biased, router = bool(model.values["attention_bias"]), "mlp.router."
        return (
            *embedding_mappings(model),
            *attention_mappings(qkv_bias=biased, output_bias=biased),
            ParamMapping(
                MEGATRON_LAYER + "self_attention.core_attention.softmax_offset", (HF_LAYER + "self_attn.sinks",),
                lambda m: (m.num_attention_heads,), "all", True,
            ),
            *router_mappings(HF_LAYER + router + "weight"),
            ParamMapping(
                MEGATRON_LAYER + router + "bias", (HF_LAYER + router + "bias",), lambda m: (m.num_experts,), "moe"
            ),
            *_expert_mappings(),
        )  # fmt: skip


def _window_arguments(model: Architecture) -> dict[str, Any]:
    """Return which layers have a window, and of how many tokens before and behind one; nothing where none has."""
    types = model.values["layer_types"]
    if len(types) != model.num_layers:
        raise UserError(f"layer_types has {len(types)} entries, num_hidden_layers is {model.num_layers}")
    if others := set(types) - {_SLIDING, _FULL}:
        raise UserError(f"layer_types has {min(others)!r}, only {_FULL} and {_SLIDING} are supported")
    if _SLIDING not in types:
        return {}
    require_size("sliding_window", model.values["sliding_window"])
    return {
        "window_size": (model.values["sliding_window"] - 1, 0),
        "window_attn_skip_freq": [int(each == _SLIDING) for each in types],
    }


def _expert_mappings() -> tuple[ParamMapping, ...]:
    """Return the experts with their biases."""
    experts, hf = MEGATRON_LAYER + "mlp.experts.experts.", HF_LAYER + "mlp.experts."
    return (
        ParamMapping(
            experts + "linear_fc1.weight", (hf + "gate_up_proj",), lambda m: (2 * m.moe_ffn_hidden_size, m.hidden_size),
            "moe", False, _merge_columns, _split_columns, experts_together=True,
        ),
        ParamMapping(
            experts + "linear_fc1.bias", (hf + "gate_up_proj_bias",), lambda m: (2 * m.moe_ffn_hidden_size,),
            "moe", False, _merge_alternating, _split_alternating, experts_together=True,
        ),
        ParamMapping(
            experts + "linear_fc2.weight", (hf + "down_proj",), lambda m: (m.hidden_size, m.moe_ffn_hidden_size),
            "moe", False, _transpose_one, lambda tensor, model: (tensor.T,), experts_together=True,
        ),
        ParamMapping(
            experts + "linear_fc2.bias", (hf + "down_proj_bias",), lambda m: (m.hidden_size,), "moe",
            experts_together=True,
        ),
    )  # fmt: skip


def _merge_alternating(tensors: Tensors, model: Architecture) -> torch.Tensor:
    """Put the even rows of `[2·I, …]`, those of the gate, before the odd ones."""
    return torch.cat([tensors[0][::2], tensors[0][1::2]])


def _split_alternating(tensor: torch.Tensor, model: Architecture) -> Tensors:
    """Take the rows of both halves in turn: the inverse of `_merge_alternating`."""
    return (torch.stack(tensor.chunk(2), dim=1).flatten(0, 1),)


def _merge_columns(tensors: Tensors, model: Architecture) -> torch.Tensor:
    """Return `[2·I, H]` of `[H, 2·I]` with alternating columns."""
    return _merge_alternating([tensors[0].T], model)


def _split_columns(tensor: torch.Tensor, model: Architecture) -> Tensors:
    """Return `[H, 2·I]`: the inverse of `_merge_columns`."""
    return (_split_alternating(tensor, model)[0].T,)


def _transpose_one(tensors: Tensors, model: Architecture) -> torch.Tensor:
    """Return `[H, I]` of `[I, H]`."""
    return tensors[0].T


FAMILY = GptOss()
