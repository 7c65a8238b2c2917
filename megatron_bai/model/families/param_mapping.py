"""One kind of parameter: its published Hugging Face names ↔ its Megatron key, and the kinds that families share.

The Megatron side is its *sharded* state dict: global tensors under keys that are the same in every parallel layout and
with or without Transformer Engine. So a mapping knows nothing of ranks. Layers are stacked on a leading axis and
experts on the next one; a mapping is of one *slice* of that, `[layer]` or `[layer, expert]`. (Where layers differ in
kind Megatron-Core writes each under its number; `param_shards.py` gives those the same keys and slices.)
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_bai.model.families.architecture import Architecture
from megatron_bai.model.families.row_orders import Tensors, merge_halves, merge_qkv, split_halves, split_qkv

Shape = tuple[int, ...]

HF_LAYER = "model.layers.{layer}."
HF_EXPERT = HF_LAYER + "mlp.experts.{expert}."
MEGATRON_LAYER = "decoder.layers."
EMBEDDING, OUTPUT_LAYER = "embedding.word_embeddings.weight", "output_layer.weight"
EXPERT_BIAS = MEGATRON_LAYER + "mlp.router.expert_bias"


@dataclass(frozen=True)
class ParamMapping:
    """The mapping of one kind of parameter.

    Attributes:
        megatron: key in the sharded state dict.
        hf: published names it is made of, with `{layer}` and `{expert}` where they are indexed.
        shape: of the Megatron slice.
        layers: which layers have it: `all`, `moe` or `dense`.
        tensor_parallel: whether tensor ranks split it (experts are never split).
        merge: Hugging Face tensors → one Megatron slice.
        split: one Megatron slice → Hugging Face tensors, the exact inverse of `merge`.
        fused: name of one tensor `[experts, …]` that holds the Megatron slices of a layer, as transformers 5 holds
            experts in memory; read where the published names are missing.
        trained: whether an optimizer moves it; else it is a buffer, and float32 whatever the model is.
        other: names that transformers 5 has for them in memory; read where the published ones are missing.
        experts_together: whether the published tensors are `[experts, …]`, of all experts of a layer; `merge` and
            `split` have those of one.
    """

    megatron: str
    hf: tuple[str, ...]
    shape: Callable[[Architecture], Shape]
    layers: str = "all"
    tensor_parallel: bool = False
    merge: Callable[[Tensors, Architecture], torch.Tensor] = lambda tensors, model: tensors[0]
    split: Callable[[torch.Tensor, Architecture], Tensors] = lambda tensor, model: (tensor,)
    fused: str = ""
    trained: bool = True
    other: tuple[str, ...] = ()
    experts_together: bool = False

    @property
    def num_stacked_axes(self) -> int:
        """The number of leading axes that are stacked: 0, 1 (layer) or 2 (layer, expert)."""
        return ("{layer}" in self.hf[0]) + ("{expert}" in self.hf[0] or self.experts_together)

    def names(self, index: tuple[int, ...], other: bool = False) -> list[str]:
        """Return the Hugging Face names of a slice.

        Args:
            index: of the slice.
            other: give those of transformers 5 in memory, not the published ones.
        """
        names = self.other if other else self.hf
        return [name.format(**dict(zip(("layer", "expert"), index, strict=False))) for name in names]

    def published_shapes(self, model: Architecture) -> list[Shape]:
        """Return the shapes of the tensors that a slice is made of, or that have it beside those of other experts.

        Args:
            model: the architecture.
        """
        parts = self.split(torch.empty(self.shape(model), device="meta"), model)
        return [(*(model.num_experts,) * self.experts_together, *part.shape) for part in parts]

    def fused_name(self, index: tuple[int, ...]) -> str:
        """Return the name of the tensor that holds the slice at `index` beside those of other experts, or nothing."""
        return self.fused.format(layer=index[0]) if self.fused else ""


def _vocabulary(model: Architecture) -> Shape:
    return model.vocab_size, model.hidden_size


def qkv_rows(model: Architecture) -> int:
    """Return the number of rows of queries, keys and values together."""
    return (model.num_attention_heads + 2 * model.num_query_groups) * model.head_dim


def embedding_mappings(model: Architecture, hf: str = "model.embed_tokens.weight") -> tuple[ParamMapping, ...]:
    """Return the embedding, the last norm and the output layer, which a tied model has not.

    Args:
        model: the architecture.
        hf: published name of the embedding.
    """
    kinds = (
        ParamMapping(EMBEDDING, (hf,), _vocabulary, tensor_parallel=True),
        ParamMapping("decoder.final_layernorm.weight", ("model.norm.weight",), lambda m: (m.hidden_size,)),
        ParamMapping(OUTPUT_LAYER, ("lm_head.weight",), _vocabulary, tensor_parallel=True),
    )
    return kinds[:2] if model.tied else kinds


def attention_mappings(
    qkv_bias: bool = False, output_bias: bool = False, head_norms: bool = False, full_width_norms: bool = False
) -> tuple[ParamMapping, ...]:
    """Return grouped-query attention with the norm before it.

    Args:
        qkv_bias: whether queries, keys and values have a bias.
        output_bias: whether the projection behind attention has one.
        head_norms: whether queries and keys are normed, each head by itself.
        full_width_norms: whether they are normed over all heads at once (`layer_parts.norm_full_width`).
    """
    attention, hf = MEGATRON_LAYER + "self_attention.", HF_LAYER + "self_attn."
    kinds = [
        ParamMapping(
            attention + "linear_qkv.layer_norm_weight",
            (HF_LAYER + "input_layernorm.weight",),
            lambda m: (m.hidden_size,),
        ),
        ParamMapping(
            attention + "linear_qkv.weight", tuple(f"{hf}{x}_proj.weight" for x in "qkv"),
            lambda m: (qkv_rows(m), m.hidden_size), "all", True, merge_qkv, split_qkv,
        ),
        ParamMapping(
            attention + "linear_proj.weight", (hf + "o_proj.weight",),
            lambda m: (m.hidden_size, m.num_attention_heads * m.head_dim), "all", True,
        ),
    ]  # fmt: skip
    if qkv_bias:
        key, names = attention + "linear_qkv.bias", tuple(f"{hf}{x}_proj.bias" for x in "qkv")
        kinds.append(ParamMapping(key, names, lambda m: (qkv_rows(m),), "all", True, merge_qkv, split_qkv))
    if output_bias:
        kinds.append(ParamMapping(attention + "linear_proj.bias", (hf + "o_proj.bias",), lambda m: (m.hidden_size,)))
    if head_norms:
        for x in "qk":
            name = f"{attention}{x}_layernorm.weight"
            kinds.append(ParamMapping(name, (f"{hf}{x}_norm.weight",), lambda m: (m.head_dim,)))
    if full_width_norms:
        widths = {
            "q": lambda m: (m.num_attention_heads * m.head_dim,),
            "k": lambda m: (m.num_query_groups * m.head_dim,),
        }
        for x, width in widths.items():
            name = f"{attention}{x}_layernorm.weight"
            kinds.append(ParamMapping(name, (f"{hf}{x}_norm.weight",), width, "all", True))
    return tuple(kinds)


def dense_mappings() -> tuple[ParamMapping, ...]:
    """Return the SwiGLU of layers without experts, with the norm before it."""
    mlp, hf = MEGATRON_LAYER + "mlp.", HF_LAYER + "mlp."
    return (
        ParamMapping(
            mlp + "linear_fc1.layer_norm_weight", (HF_LAYER + "post_attention_layernorm.weight",),
            lambda m: (m.hidden_size,), "dense",
        ),
        ParamMapping(
            mlp + "linear_fc1.weight", (hf + "gate_proj.weight", hf + "up_proj.weight"),
            lambda m: (2 * m.dense_ffn_hidden_size, m.hidden_size), "dense", True, merge_halves, split_halves,
        ),
        ParamMapping(
            mlp + "linear_fc2.weight", (hf + "down_proj.weight",),
            lambda m: (m.hidden_size, m.dense_ffn_hidden_size), "dense", True,
        ),
    )  # fmt: skip


def router_mappings(hf: str = HF_LAYER + "mlp.gate.weight", other: str = "") -> tuple[ParamMapping, ...]:
    """Return the router with the norm before the MoE layer.

    Args:
        hf: published name of the router's weight.
        other: its name where transformers 5 holds it under another one.
    """
    return (
        ParamMapping(
            MEGATRON_LAYER + "pre_mlp_layernorm.weight", (HF_LAYER + "post_attention_layernorm.weight",),
            lambda m: (m.hidden_size,), "moe",
        ),
        ParamMapping(
            MEGATRON_LAYER + "mlp.router.weight", (hf,), lambda m: (m.num_experts, m.hidden_size), "moe",
            other=(other,) if other else (),
        ),
    )  # fmt: skip


def expert_mappings(
    gate: str = HF_EXPERT + "gate_proj.weight",
    up: str = HF_EXPERT + "up_proj.weight",
    down: str = HF_EXPERT + "down_proj.weight",
    fused: str = HF_LAYER + "mlp.experts.",
) -> tuple[ParamMapping, ...]:
    """Return SwiGLU experts.

    Args:
        gate: published name of the projection that is activated.
        up: of the other.
        down: of the one behind their product.
        fused: what precedes `gate_up_proj` and `down_proj`, as transformers 5 holds all experts of a layer.
    """
    experts = MEGATRON_LAYER + "mlp.experts.experts."
    return (
        ParamMapping(
            experts + "linear_fc1.weight", (gate, up), lambda m: (2 * m.moe_ffn_hidden_size, m.hidden_size), "moe",
            False, merge_halves, split_halves, fused + "gate_up_proj",
        ),
        ParamMapping(
            experts + "linear_fc2.weight", (down,), lambda m: (m.hidden_size, m.moe_ffn_hidden_size), "moe",
            fused=fused + "down_proj",
        ),
    )  # fmt: skip


def expert_bias_mapping(hf: str, other: str = "") -> ParamMapping:
    """Return the bias that a router adds to the experts' scores where it chooses, and not to their weights.

    Args:
        hf: published name.
        other: its name where transformers 5 holds it under another one.
    """
    others = (other,) if other else ()
    return ParamMapping(EXPERT_BIAS, (hf,), lambda m: (m.num_experts,), "moe", trained=False, other=others)


def shared_expert_mappings(
    width: int, hf: str = HF_LAYER + "mlp.shared_experts.", gate: str = ""
) -> tuple[ParamMapping, ...]:
    """Return the SwiGLU that all tokens pass beside their experts.

    Args:
        width: of all shared experts together, which are one.
        hf: what precedes the published names of its projections.
        gate: published name of the weight of the gate that scales its output; empty where there is none.
    """
    shared = MEGATRON_LAYER + "mlp.shared_experts."
    kinds = (
        ParamMapping(
            shared + "linear_fc1.weight", (hf + "gate_proj.weight", hf + "up_proj.weight"),
            lambda m: (2 * width, m.hidden_size), "moe", True, merge_halves, split_halves,
        ),
        ParamMapping(
            shared + "linear_fc2.weight", (hf + "down_proj.weight",), lambda m: (m.hidden_size, width), "moe", True
        ),
        ParamMapping(shared + "gate_weight", (gate,), lambda m: (1, m.hidden_size), "moe"),
    )  # fmt: skip
    return kinds if gate else kinds[:2]
