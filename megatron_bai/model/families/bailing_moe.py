"""Ling and Ring of Ant Group, 1.x and 2.0: one projection for queries, keys and values; softmax or sigmoid routers.

Their code is in their checkpoints, and is not run: what `config.json` leaves out means what is said here.
"""

from collections.abc import Mapping
from typing import Any

import torch

from megatron_bai.errors import UserError
from megatron_bai.model.families import rope
from megatron_bai.model.families.architecture import Architecture, Values
from megatron_bai.model.families.dense_first import DenseFirst
from megatron_bai.model.families.family import shared_experts_width
from megatron_bai.model.families.param_mapping import (
    HF_LAYER,
    MEGATRON_LAYER,
    ParamMapping,
    dense_mappings,
    embedding_mappings,
    expert_bias_mapping,
    expert_mappings,
    qkv_rows,
    router_mappings,
    shared_expert_mappings,
)
from megatron_bai.model.families.row_orders import Tensors, merge_qkv, split_qkv
from megatron_bai.model.families.sigmoid_router import router_group_arguments, sigmoid_router_arguments

# Of 2.0, where they are others than those of 1.x. Both take whole heads for rotated.
_DEFAULTS_2 = {
    "first_k_dense_replace": 1,
    "num_shared_experts": 1,
    "use_bias": False,
    "use_qk_norm": True,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "n_group": 8,
    "topk_group": 4,
    "rope_theta": 600000.0,
    "rms_norm_eps": 1e-6,
    "head_dim": 128,
}


_ROPE = ("rope_theta", "partial_rotary_factor")  # said by themselves, or among `rope_parameters`


class BailingMoe(DenseFirst):
    """Queries and keys are normed, and half of each head rotated, in 2.0 and not in 1.x."""

    name = "bailing_moe"
    model_types = ("bailing_moe", "bailing_moe_v2")
    transformers_class = "BailingMoeV2ForCausalLM"
    partial_rotary = True
    only = {"hidden_act": "silu", "norm_head": False, "use_bias": False, "multi_gate": False, "router_type": "topN"}
    defaults = {
        "first_k_dense_replace": 0,
        "num_shared_experts": 0,
        "norm_topk_prob": True,
        "use_qkv_bias": False,
        "use_bias": True,
        "use_qk_norm": False,
        "tie_word_embeddings": False,
        "partial_rotary_factor": 1.0,
        "score_function": "softmax",
        "moe_router_enable_expert_bias": False,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "head_dim": None,  # hidden_size / num_attention_heads
        "embedding_dropout": 0.0,
    }
    served_by = "sglang.srt.models.bailing_moe"

    def make_architecture(
        self, values: Values, raw: Values, where: str, names: Mapping[str, str] | None = None
    ) -> Architecture:
        """Make an architecture as every family does, with the values that follow from others.

        Args:
            values: of the file, with `defaults`.
            raw: the file's own.
            where: as in `Family`.
            names: likewise.

        Raises:
            UserError: as in `Family`.
        """
        made = dict(values)
        if _is_2(raw):
            made |= {key: value for key, value in _DEFAULTS_2.items() if key not in raw}
        hidden, heads = made.get("hidden_size"), made.get("num_attention_heads")
        if not made.get("head_dim") and type(hidden) is int and type(heads) is int and heads > 0:
            made["head_dim"] = hidden // heads
        rope_parameters = made.get("rope_parameters") or made.get("rope_scaling") or {}
        if isinstance(rope_parameters, dict):
            made["rope_parameters"] = {
                "rope_type": rope_parameters.get("type", "default"),
                **{name: made[name] for name in _ROPE},
                **rope_parameters,
            }
            made |= {name: made["rope_parameters"][name] for name in _ROPE}
        if not made.get("use_sliding_window"):
            made["sliding_window"] = None
        return super().make_architecture(made, raw, where, names)

    def rope_arguments(self, model: Architecture) -> rope.RopeArguments:
        """Return what Megatron-Core is told of positions.

        Args:
            model: the architecture.

        Raises:
            UserError: a scaling that is no object or none that is built, or a value that is said twice, differently.
        """
        values, raw = model.values, model.raw
        if not isinstance(values.get("rope_parameters"), dict):
            name = "rope_parameters" if values.get("rope_parameters") else "rope_scaling"
            raise UserError(f"{name} is {values[name]!r}, which is no object")
        for name in _ROPE:
            if raw.get(name, values[name]) != values[name]:
                raise UserError(f"{name} is {raw[name]!r}, and in rope_parameters or rope_scaling {values[name]!r}")
        found, rotated = super().rope_arguments(model), values["partial_rotary_factor"] * model.head_dim
        if raw.get("rotary_dim", rotated) != rotated:
            factor = values["partial_rotary_factor"]
            raise UserError(
                f"rotary_dim is {raw['rotary_dim']!r} of {model.head_dim}, and partial_rotary_factor is {factor!r}"
            )
        return found

    def stated(self, model: Architecture) -> Mapping[str, Any]:
        """Return what 2.0's file may leave out, which a server would take for 1.x's, and the rotated part of a head.

        Args:
            model: the architecture.
        """
        names = [*_DEFAULTS_2] if _is_2(model.raw) else []
        names += ["partial_rotary_factor"] if model.values["partial_rotary_factor"] != 1.0 else []
        return {name: model.values[name] for name in names}

    def validate(self, model: Architecture) -> None:
        """Refuse routers and shared experts of which the model's code and SGLang make different things.

        Raises:
            UserError: names the keys.
        """
        values = model.values
        score, bias = values["score_function"], bool(values["moe_router_enable_expert_bias"])
        if (score, bias) not in (("softmax", False), ("sigmoid", True)):
            raise UserError(
                f"score_function is {score!r} and moe_router_enable_expert_bias {bias}: supported are softmax without"
                " and sigmoid with an expert bias"
            )
        width = values.get("moe_shared_expert_intermediate_size")
        if width is not None and values["num_shared_experts"] and width != model.moe_ffn_hidden_size:
            raise UserError(
                f"moe_shared_expert_intermediate_size is {width!r}, only moe_intermediate_size"
                f" ({model.moe_ffn_hidden_size}) is supported"
            )

    def transformer_arguments(self, model: Architecture) -> dict[str, Any]:
        """Return biases, norms of queries and keys, shared experts, and how the router scores."""
        values = model.values
        if values["score_function"] == "sigmoid":
            router = sigmoid_router_arguments(model)
        else:
            router = {
                "moe_router_score_function": "softmax",
                "moe_router_pre_softmax": not values["norm_topk_prob"],
                **router_group_arguments(model),
            }
        return {
            "add_qkv_bias": bool(values["use_qkv_bias"]),
            "qk_layernorm": bool(values["use_qk_norm"]),
            "moe_shared_expert_intermediate_size": _shared_width(model) or None,
            **router,
        }

    def mappings(self, model: Architecture) -> tuple[ParamMapping, ...]:
        """Return the kinds of parameters as inclusionAI publishes them."""
        values, width = model.values, _shared_width(model)
        kinds = [
            *embedding_mappings(model, "model.word_embeddings.weight"),
            *_attention_mappings(bool(values["use_qkv_bias"]), bool(values["use_qk_norm"])),
            *router_mappings(),
            *expert_mappings(),
            *dense_mappings(),
        ]
        if values["score_function"] == "sigmoid":
            kinds.append(expert_bias_mapping(HF_LAYER + "mlp.gate.expert_bias"))
        return (*kinds, *(shared_expert_mappings(width) if width else ()))


def _is_2(raw: Values) -> bool:
    """Return whether a configuration is of 2.0, whose model type may be 1.x's."""
    return "BailingMoeV2" in str(raw.get("architectures")) or raw.get("model_type") == "bailing_moe_v2"


def _shared_width(model: Architecture) -> int:
    """Return the width of the shared experts; 0 where there are none."""
    return shared_experts_width(model, "num_shared_experts", may_be_0=True)


def _attention_mappings(qkv_bias: bool, head_norms: bool) -> tuple[ParamMapping, ...]:
    """Return attention: queries, keys and values are published in one tensor, one after the other."""
    attention, hf = MEGATRON_LAYER + "self_attention.", HF_LAYER + "attention."
    kinds = [
        ParamMapping(
            attention + "linear_qkv.layer_norm_weight", (HF_LAYER + "input_layernorm.weight",),
            lambda m: (m.hidden_size,),
        ),
        ParamMapping(
            attention + "linear_qkv.weight", (hf + "query_key_value.weight",),
            lambda m: (qkv_rows(m), m.hidden_size), "all", True, _merge, _split,
        ),
        ParamMapping(
            attention + "linear_proj.weight", (hf + "dense.weight",),
            lambda m: (m.hidden_size, m.num_attention_heads * m.head_dim), "all", True,
        ),
    ]  # fmt: skip
    if qkv_bias:
        key = attention + "linear_qkv.bias"
        names = (hf + "query_key_value.bias",)
        kinds.append(ParamMapping(key, names, lambda m: (qkv_rows(m),), "all", True, _merge, _split))
    if head_norms:
        for ours, theirs in (("q", "query"), ("k", "key")):
            names = (f"{hf}{theirs}_layernorm.weight",)
            kinds.append(ParamMapping(f"{attention}{ours}_layernorm.weight", names, lambda m: (m.head_dim,)))
    return tuple(kinds)


def _merge(tensors: Tensors, model: Architecture) -> torch.Tensor:
    """Bring the rows of queries, keys and values into Megatron's order."""
    keys = model.num_query_groups * model.head_dim
    return merge_qkv(tensors[0].split([model.num_attention_heads * model.head_dim, keys, keys]), model)


def _split(tensor: torch.Tensor, model: Architecture) -> Tensors:
    """Bring them back, the inverse of `_merge`."""
    return (torch.cat(list(split_qkv(tensor, model))),)


FAMILY = BailingMoe()
