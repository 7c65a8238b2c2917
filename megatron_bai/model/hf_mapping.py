"""Hugging Face Qwen3-MoE names ↔ Megatron's checkpoint keys, one table entry for each kind of parameter.

The Megatron side is its *sharded* state dict: global tensors under keys that are the same in every parallel layout
and with or without Transformer Engine. So the mapping knows nothing of ranks. Layers are stacked on a leading axis
in Megatron and experts on the next one; an entry maps one slice of that, `[layer]` or `[layer, expert]`.

mbridge maps live modules by Transformer Engine's parameter names and cannot load local-spec experts at TP > 1; this
table also serves checkpoints for which no model is built.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from megatron_bai.config import Model
from megatron_bai.errors import UserError

Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True)
class ParamMapping:
    """The mapping of one kind of parameter.

    Attributes:
        megatron: key in the sharded state dict.
        hf: Hugging Face names it is made of, with `{layer}` and `{expert}` where they are indexed.
        merge: Hugging Face tensors → one Megatron slice.
        split: one Megatron slice → Hugging Face tensors, the exact inverse of `merge`.
    """

    megatron: str
    hf: tuple[str, ...]
    merge: Callable[[Tensors, Model], torch.Tensor] = lambda tensors, model: tensors[0]
    split: Callable[[torch.Tensor, Model], Tensors] = lambda tensor, model: (tensor,)

    @property
    def num_stacked_axes(self) -> int:
        """The number of leading axes that are stacked: 0, 1 (layer) or 2 (layer, expert)."""
        return ("{layer}" in self.hf[0]) + ("{expert}" in self.hf[0])

    def names(self, index: tuple[int, ...]) -> list[str]:
        """Return the Hugging Face names of the slice at `index`."""
        return [name.format(**dict(zip(("layer", "expert"), index, strict=False))) for name in self.hf]


def _merge_qkv(tensors: Tensors, model: Model) -> torch.Tensor:
    """Merge q `[heads·d, H]`, k and v `[groups·d, H]` to `[groups·(heads/groups + 2)·d, H]`: each group's q, k, v."""
    blocks = [t.reshape(model.num_query_groups, -1, t.shape[-1]) for t in tensors]
    return torch.cat(blocks, dim=1).reshape(-1, tensors[0].shape[-1])


def _split_qkv(tensor: torch.Tensor, model: Model) -> Tensors:
    """Split what `_merge_qkv` merged."""
    d, groups = model.head_dim, model.num_query_groups
    sizes = [model.num_attention_heads // groups * d, d, d]
    blocks = tensor.reshape(groups, sum(sizes), -1).split(sizes, dim=1)
    return [block.reshape(-1, tensor.shape[-1]) for block in blocks]


_LAYER = "model.layers.{layer}."
_EXPERT = _LAYER + "mlp.experts.{expert}."
_M = "decoder.layers."

PARAM_MAPPINGS = (
    ParamMapping("embedding.word_embeddings.weight", ("model.embed_tokens.weight",)),
    ParamMapping("decoder.final_layernorm.weight", ("model.norm.weight",)),
    ParamMapping("output_layer.weight", ("lm_head.weight",)),
    ParamMapping(_M + "self_attention.linear_qkv.layer_norm_weight", (_LAYER + "input_layernorm.weight",)),
    ParamMapping(
        _M + "self_attention.linear_qkv.weight",
        tuple(f"{_LAYER}self_attn.{x}_proj.weight" for x in "qkv"),
        _merge_qkv,
        _split_qkv,
    ),
    ParamMapping(_M + "self_attention.q_layernorm.weight", (_LAYER + "self_attn.q_norm.weight",)),
    ParamMapping(_M + "self_attention.k_layernorm.weight", (_LAYER + "self_attn.k_norm.weight",)),
    ParamMapping(_M + "self_attention.linear_proj.weight", (_LAYER + "self_attn.o_proj.weight",)),
    ParamMapping(_M + "pre_mlp_layernorm.weight", (_LAYER + "post_attention_layernorm.weight",)),
    ParamMapping(_M + "mlp.router.weight", (_LAYER + "mlp.gate.weight",)),
    ParamMapping(
        _M + "mlp.experts.experts.linear_fc1.weight",
        (_EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight"),
        lambda tensors, model: torch.cat(list(tensors)),
        lambda tensor, model: tensor.chunk(2),
    ),
    ParamMapping(_M + "mlp.experts.experts.linear_fc2.weight", (_EXPERT + "down_proj.weight",)),
)
# A critic has this in place of `output_layer.weight`. The name is its own since Megatron loads an output layer with
# another number of rows without a word: a critic could be taken for an actor. Hugging Face's is that of classifiers.
VALUE_HEAD = ParamMapping("value_head.weight", ("score.weight",))
BY_KEY = {kind.megatron: kind for kind in (*PARAM_MAPPINGS, VALUE_HEAD)}


def mapping_of(key: str) -> ParamMapping:
    """Return the table's entry for a Megatron key.

    Raises:
        UserError: the table has none, so the tensor cannot be converted.
    """
    if key not in BY_KEY:
        raise UserError(f"Megatron tensor {key!r} has no Hugging Face name in model/hf_mapping.py: add an entry there")
    return BY_KEY[key]


def slice_indices(mapping: ParamMapping, model: Model) -> Iterator[tuple[int, ...]]:
    """Return the indices of all stacked slices of a kind of parameter, in order.

    Args:
        mapping: of the kind.
        model: the architecture.
    """
    return product(*(range(size) for size in (model.num_layers, model.num_experts)[: mapping.num_stacked_axes]))


def hf_names(model: Model) -> list[str]:
    """Return the names of all tensors of the Hugging Face checkpoint, in the table's order."""
    return [name for kind in PARAM_MAPPINGS for index in slice_indices(kind, model) for name in kind.names(index)]
