"""Causal self-attention without Transformer Engine, by torch's `scaled_dot_product_attention`.

Megatron-Core's own local attention holds every head's scores, `[B, heads, T, T]`, for the backward pass, and refuses
packed sequences. Torch's holds none: memory grows with the tokens, and on a CPU it takes a sixth of the time.
"""

from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch.nn.functional import scaled_dot_product_attention


class TorchAttention(MegatronModule):  # type: ignore[misc]  # Megatron-Core has no types
    """Takes the place of Megatron-Core's `DotProductAttention` in a layer's spec, whose arguments it has."""

    def __init__(
        self, config: Any, layer_number: int, attn_mask_type: AttnMaskType, attention_type: str, **kwargs: Any
    ) -> None:
        super().__init__(config=config)
        assert attn_mask_type is AttnMaskType.causal and attention_type == "self"
        assert config.context_parallel_size == 1 and config.window_size is None and config.attention_dropout == 0.0
        assert config.softmax_type == "vanilla" and not config.apply_query_key_layer_scaling
        assert kwargs.get("softmax_scale") is None and kwargs.get("attention_dropout") is None, kwargs

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Compute the attention of this rank's heads; every token attends to itself and those before it.

        Args:
            query: `[T, B, heads, head_dim]`, or `[T, heads, head_dim]` where sequences are packed.
            key: the same with the rank's query groups for heads.
            value: as `key`.
            attention_mask: None: there is no other mask than the causal one.
            attn_mask_type: Megatron's, causal.
            attention_bias: None: there is no bias.
            packed_seq_params: Megatron's; where sequences begin in a row of them. None: a batch.

        Returns:
            `[T, B, heads · head_dim]`, or `[T, heads · head_dim]` where sequences are packed.
        """
        assert attention_mask is None and attention_bias is None
        if packed_seq_params is None:
            return _causal_sdpa(query, key, value)
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        assert sum(lengths) == len(query), f"sequences of {sum(lengths)} tokens in a row of {len(query)}"
        rows = zip(*(tensor.unsqueeze(1).split(lengths) for tensor in (query, key, value)), strict=True)
        return torch.cat([_causal_sdpa(*row) for row in rows]).squeeze(1)


def _causal_sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Compute `[T, B, heads, head_dim]` → `[T, B, heads · head_dim]`."""
    heads_per_kv = query.shape[2] // key.shape[2]  # queries to a key; the kernel for CPUs wants a key each
    if heads_per_kv > 1:
        key, value = (tensor.repeat_interleave(heads_per_kv, dim=2) for tensor in (key, value))
    query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    context = scaled_dot_product_attention(query, key, value, is_causal=True)
    return context.permute(2, 0, 1, 3).flatten(2)
