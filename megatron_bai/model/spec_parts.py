"""Layers of the decoder as Megatron-Core's specs, with what this library puts into them."""

from collections.abc import Callable
from typing import Any

import torch

from megatron_bai.model.families.architecture import Architecture
from megatron_bai.model.families.layer_parts import has_experts


class LocalNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, marked so that Megatron sums its gradient over the sequence-parallel ranks.

    Megatron-Core's own wrapper refuses sequence parallelism. A class, since Megatron builds no plain functions.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        weight: Any = self.weight  # torch's type has no such attribute
        weight.sequence_parallel = config.sequence_parallel


def activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what activates the gates of experts and dense layers: `silu`, or `quick_gelu`, x σ(1.702 x)."""
    from megatron.core.activations import quick_gelu

    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]]
    functions = {"silu": torch.nn.functional.silu, "quick_gelu": quick_gelu}
    return functions[name]


def decoder_spec(
    config: Any, transformer_engine: bool, vp_stage: int | None, architecture: Architecture | None = None
) -> Any:
    """Return the layers of one chunk of the decoder on this rank.

    Without Transformer Engine they are Megatron's local ones with this library's norm and attention.

    Args:
        config: Megatron's TransformerConfig.
        transformer_engine: whether its layers are taken.
        vp_stage: index of the chunk among the stage's; None where there is one.
        architecture: whose family changes the layers; None: no family does.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=transformer_engine, normalization="RMSNorm", vp_stage=vp_stage
    )
    if not transformer_engine:
        block.layer_norm = LocalNorm
    for layer in {id(layer): layer for layer in block.layer_specs}.values():  # layers of a kind share one
        if not transformer_engine:
            _use_local_parts(layer)
        if architecture is not None:
            architecture.family.adapt_layer(layer, architecture, transformer_engine)
    return block


def _use_local_parts(layer: Any) -> None:
    """Put this library's norm and attention into a layer's spec, in place."""
    from megatron.core.transformer.identity_op import IdentityOp

    from megatron_bai.model.attention import TorchAttention

    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = LocalNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = TorchAttention
    for norm in ("q_layernorm", "k_layernorm", "kv_layernorm"):
        if getattr(attention, norm, None) not in (None, IdentityOp):
            setattr(attention, norm, LocalNorm)
    if has_experts(layer):
        # The local spec saves this norm under the name of a dense layer's; keep the one Transformer Engine's spec uses.
        layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
