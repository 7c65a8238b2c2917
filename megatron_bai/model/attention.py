"""Causal self-attention without Transformer Engine, by torch's `scaled_dot_product_attention`.

Megatron-Core's own local attention holds every head's scores, `[B, heads, T, T]`, for the backward pass, and refuses
packed sequences. Torch's holds none: memory grows with the tokens, and on a CPU it takes a sixth of the time.

Layers may attend to a sliding window, and have attention sinks: a number for each head that stands in the softmax
beside the scores, and for nothing in the result. Torch's operator has none. Here a sink is one more key, before the
others and with a value of 0, whose product with every query is that number: heads have one more element, 1 in queries
and 0 in the other keys.
"""

from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch.nn.functional import pad, scaled_dot_product_attention

from megatron_bai.model.families.layer_parts import SplitOverTensorRanks

_BLOCK = 256  # queries at least that are computed at once where a layer has a window


class TorchAttention(SplitOverTensorRanks, MegatronModule):  # type: ignore[misc]  # Megatron-Core has no types
    """Takes the place of Megatron-Core's `DotProductAttention` in a layer's spec, whose arguments it has.

    Attributes:
        scale: of the scores; None: 1/√head_dim.
        window: tokens that one attends to, itself among them; None: all before it.
        softmax_offset: `[heads of this rank]`, the sinks; None where there are none. The name is Megatron-Core's.
    """

    def __init__(
        self, config: Any, layer_number: int, attn_mask_type: AttnMaskType, attention_type: str, **kwargs: Any
    ) -> None:
        super().__init__(config=config)
        from megatron.core.transformer.utils import is_layer_window_attention

        self.scale: float | None = kwargs.get("softmax_scale")
        assert attn_mask_type is AttnMaskType.causal and attention_type == "self"
        assert config.context_parallel_size == 1 and config.attention_dropout == 0.0
        assert not config.apply_query_key_layer_scaling and kwargs.get("attention_dropout") is None, kwargs
        self.window: int | None = None
        if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
            before, behind = config.window_size
            assert before >= 0 and behind == 0, config.window_size
            self.window = before + 1
        self.softmax_offset: torch.nn.Parameter | None = None
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            self.softmax_offset = torch.nn.Parameter(torch.empty(heads, dtype=config.params_dtype))
            config.init_method(self.softmax_offset)
        else:
            assert config.softmax_type == "vanilla", config.softmax_type

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
            value: as `key`, of another width where the family has one.
            attention_mask: None: there is no other mask than the causal one.
            attn_mask_type: Megatron's, causal.
            attention_bias: None: there is no bias.
            packed_seq_params: Megatron's; where sequences begin in a row of them. None: a batch.

        Returns:
            `[T, B, heads · width]`, or `[T, heads · width]` where sequences are packed; the width is that of values.
        """
        assert attention_mask is None and attention_bias is None
        if packed_seq_params is None:
            return self._attend(query, key, value)
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        assert sum(lengths) == len(query), f"sequences of {sum(lengths)} tokens in a row of {len(query)}"
        rows = zip(*(tensor.unsqueeze(1).split(lengths) for tensor in (query, key, value)), strict=True)
        return torch.cat([self._attend(q, k, v) for q, k, v in rows]).squeeze(1)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Compute `[T, B, heads, head_dim]` → `[T, B, heads · width of values]`, of one sequence or a batch."""
        heads_per_kv = query.shape[2] // key.shape[2]  # queries to a key; the kernel for CPUs wants a key each
        if heads_per_kv > 1:
            key, value = (tensor.repeat_interleave(heads_per_kv, dim=2) for tensor in (key, value))
        scale, width, tokens, sinks = self.scale, value.shape[-1], len(query), self.softmax_offset
        if sinks is not None:
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            query, key, value = _add_sinks(query, key, value, sinks / scale)
        # and values as wide as keys: any other holds every head's scores
        value = pad(value, (0, key.shape[-1] - width))
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        if self.window is not None and tokens > self.window:
            context = _attend_to_windows(query, key, value, scale, self.window, sinks is not None)
        else:
            context = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
        return context.permute(2, 0, 1, 3)[context.shape[2] - tokens :, ..., :width].flatten(2)


def _add_sinks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add a key before those of a sequence, a query that is not used, and an element to heads.

    Args:
        query: `[T, B, heads, head_dim]`.
        key: likewise.
        value: `[T, B, heads, width]`.
        sinks: `[heads]`, before they are scaled as scores are.

    Returns:
        `[T + 1, B, heads, head_dim + 1]` twice, and `[T + 1, B, heads, width]`.
    """
    query, key = pad(query, (0, 1), value=1.0), pad(key, (0, 1))
    sink_key = pad(sinks.to(key.dtype)[:, None], (key.shape[-1] - 1, 0)).expand(1, *key.shape[1:])
    return pad(query, (0, 0, 0, 0, 0, 0, 1, 0)), torch.cat([sink_key, key]), pad(value, (0, 0, 0, 0, 0, 0, 1, 0))


def _attend_to_windows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, window: int, sinks: bool
) -> torch.Tensor:
    """Compute the attention of tokens to the last `window` up to themselves, some queries at a time.

    Args:
        query: `[B, heads, T, head_dim]`; with sinks as `_add_sinks` leaves it.
        key: likewise.
        value: likewise.
        scale: of the scores; None: 1/√head_dim.
        window: number of tokens.
        sinks: whether the first of each is a sink's.

    Returns:
        `[B, heads, T, width]`, without the sink's.
    """
    first, end, block = int(sinks), query.shape[2], max(window, _BLOCK)
    found = []
    for start in range(first, end, block):
        stop, low = min(start + block, end), max(first, start - window + 1)
        rows = torch.arange(start, stop, device=query.device)[:, None]
        columns = torch.arange(low, stop, device=query.device)
        seen = (columns <= rows) & (columns > rows - window)
        keys, values = key[:, :, low:stop], value[:, :, low:stop]
        if sinks:
            seen = torch.cat([seen.new_ones(len(rows), 1), seen], dim=1)
            keys, values = (torch.cat([all_[:, :, :1], part], 2) for all_, part in ((key, keys), (value, values)))
        found.append(scaled_dot_product_attention(query[:, :, start:stop], keys, values, attn_mask=seen, scale=scale))
    return torch.cat(found, dim=2)
