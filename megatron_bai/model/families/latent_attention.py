"""Multi-head latent attention without Transformer Engine (DeepSeek-V2, arXiv 2405.04434)."""

from typing import Any

import torch
from megatron.core.transformer.multi_latent_attention import MLASelfAttention


class ReplicatedLinear(torch.nn.Linear):
    """A projection that every tensor rank has whole, as Transformer Engine's spec has those into the latents.

    Each rank projects its part of the sequence, so that gradients are summed over the ranks.
    """

    def __init__(self, inputs: int, outputs: int, config: Any) -> None:
        super().__init__(inputs, outputs, bias=False, dtype=config.params_dtype)
        weight: Any = self.weight  # torch's type has no such attribute
        weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]  # Megatron's form
        """Project.

        Args:
            hidden: `[T, B, inputs]`.

        Returns:
            `[T, B, outputs]`, and no bias.
        """
        return super().forward(hidden), None


class LocalLatentAttention(MLASelfAttention):  # type: ignore[misc]  # Megatron-Core has no types
    """Megatron-Core's, with whole projections into the latents.

    The local spec splits these by columns. Where they are gathered, Megatron-Core 0.16.1 takes each rank's gradient of
    the rotated key for the whole, though it is that of the rank's heads alone.
    """

    def __init__(self, config: Any, *args: Any, **named: Any) -> None:
        super().__init__(config, *args, **named)
        rotated = config.kv_lora_rank + config.qk_pos_emb_head_dim
        self.linear_kv_down_proj = ReplicatedLinear(config.hidden_size, rotated, config)
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = ReplicatedLinear(config.hidden_size, config.q_lora_rank, config)

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        """Return the classes of the spec: Megatron-Core 0.19, which asks here, would have Transformer Engine's."""
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}
