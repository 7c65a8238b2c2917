"""The output layer of a critic: one value a token."""

from typing import Any

import torch

from megatron_bai.model.hf_mapping import VALUE_HEAD


class ValueHead(torch.nn.Module):
    """V = w · h of each token's last hidden state h, in place of GPTModel's output layer.

    Every tensor rank holds all of w. With sequence parallelism each computes the values of its part of the sequence and
    they are gathered, one number a token in place of its hidden state. Each rank's gradient of w is then a part of the
    sum, so w is marked for Megatron to sum it.

    Computed in float32 whatever the model's dtype: bfloat16 would round values near 1 to steps of 1/128.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype))
        weight: Any = self.weight  # torch's type has no such attribute
        self.sequence_parallel = weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """Compute the values.

        Args:
            hidden: `[T, B, H]`, under sequence parallelism this rank's part of T.

        Returns:
            `[T, B, 1]` float32 of the whole sequence, and None in place of a bias.
        """
        from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

        values = torch.nn.functional.linear(hidden.float(), self.weight.float())
        if self.sequence_parallel:
            # Every rank goes on to compute the same loss, so each takes its own part of the gradient: no sum.
            values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False)
        return values, None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Return the weight where GPTModel looks for its output layer's, under a key of its own.

        Args:
            prefix: of the name in the result; the checkpoint's key has none.
            sharded_offsets: not used: the head is in no stack of layers.
            metadata: not used.

        Returns:
            Megatron's `ShardedTensor` of the weight, by its name.
        """
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        saved = make_sharded_tensors_for_checkpoint({VALUE_HEAD.megatron: self.weight}, "")
        return {f"{prefix}weight": saved[VALUE_HEAD.megatron]}
