"""Parts that families put into Megatron-Core's layers."""

import functools
from typing import Any

import torch


def has_experts(layer: Any) -> bool:
    """Return whether the spec of a layer has experts, in either form that Megatron-Core's releases give it.

    Args:
        layer: ModuleSpec of a TransformerLayer, whose `mlp` is a ModuleSpec or, from 0.18, a `functools.partial`.
    """
    from megatron.core.transformer.moe.moe_layer import MoELayer

    mlp = layer.submodules.mlp
    return (mlp.func if isinstance(mlp, functools.partial) else mlp.module) is MoELayer


def submodules_of(spec: Any) -> Any:
    """Return the submodules of a spec, in either form that Megatron-Core's releases give it.

    Args:
        spec: a ModuleSpec or, from 0.18 for what a layer has below it, a `functools.partial`.
    """
    return spec.keywords["submodules"] if isinstance(spec, functools.partial) else spec.submodules


def with_bias(linear: Any, biased: bool = True) -> Any:
    """Return a linear layer's class with a bias, or without, whatever the configuration says of the whole model's.

    Args:
        linear: Megatron-Core's class of a parallel linear layer.
        biased: whether it has one.
    """

    class BiasedLinear(linear):  # type: ignore[misc]  # a class that is chosen at run time
        """The layer with the bias that was chosen, or none; the caller adds it as it adds any other."""

        def __init__(self, *args: Any, bias: bool = True, **named: Any) -> None:
            super().__init__(*args, bias=biased, **named)

    return BiasedLinear


def without_reduction(linear: Any) -> Any:
    """Return the class of the layer behind an expert without communication: an expert is on one tensor rank.

    Megatron-Core 0.16.1 passes the output through a function that returns it as it is where experts are whole, and then
    adds a bias in place, which autograd refuses.

    Args:
        linear: Megatron-Core's class of a row-parallel linear layer.
    """

    class UnreducedLinear(linear):  # type: ignore[misc]  # a class that is chosen at run time
        """The layer as it is where experts are distributed."""

        def __init__(self, *args: Any, **named: Any) -> None:
            super().__init__(*args, **named)
            assert self.input_size_per_partition == self.input_size, "experts are divided among tensor ranks"
            self.explicit_expert_comm = True

    return UnreducedLinear


class SplitOverTensorRanks:
    """Each tensor rank has a part of the parameters of a module, along their first axis: how checkpoints hold them."""

    def sharded_state_dict(
        self: Any, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> Any:
        """Return the parameters as parts of the tensor ranks' whole.

        Args:
            prefix: of their keys.
            sharded_offsets: of the layer.
            metadata: Megatron-Core's, not used: the groups are those of all parameters but the experts'.
        """
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, dict.fromkeys(state, 0), sharded_offsets)


class FullWidthNorm(SplitOverTensorRanks, torch.nn.Module):
    """RMSNorm over all heads of a token at once, which tensor ranks split.

    Megatron-Core builds a norm of one head, `[…, heads, head_dim]` each by itself. This one sums squares over the heads
    of all ranks; its weight has a part on each of them, as the rows of the projection before it.
    """

    heads: str  # Megatron-Core's name of their number

    def __init__(self, config: Any, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__()
        from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

        heads, ranks = getattr(config, self.heads), config.tensor_model_parallel_size
        self.eps, self.width = eps, heads * hidden_size
        self.weight = torch.nn.Parameter(torch.ones(self.width // ranks, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Norm the queries or keys of tokens, in float32.

        Args:
            x: `[T, B, this rank's heads, head_dim]`.

        Returns:
            The same shape and dtype.
        """
        from megatron.core.tensor_parallel import mappings

        values = x.float().flatten(-2)
        squares = mappings.reduce_from_tensor_model_parallel_region(values.square().sum(-1, keepdim=True))
        squares = mappings.copy_to_tensor_model_parallel_region(squares)  # each rank's heads have a gradient for it
        normed = (values * torch.rsqrt(squares / self.width + self.eps)).to(x.dtype)
        return (normed * self.weight).view_as(x)


class QueryNorm(FullWidthNorm):
    """Of the queries."""

    heads = "num_attention_heads"


class KeyNorm(FullWidthNorm):
    """Of the keys."""

    heads = "num_query_groups"


def norm_full_width(layer: Any) -> None:
    """Put norms over the full width of queries and keys into the spec of a layer, in place.

    The configuration must leave `qk_layernorm` out: with it Megatron-Core sums the gradients of such norms over tensor
    ranks, as of weights that all of them have. From 0.19 it builds no norms without it, so it is set for that time.

    Args:
        layer: Megatron-Core's ModuleSpec of a TransformerLayer.
    """
    attention = layer.submodules.self_attention
    attention.submodules.q_layernorm, attention.submodules.k_layernorm = QueryNorm, KeyNorm
    built = attention.module

    class FullWidthNormAttention(built):  # type: ignore[misc, valid-type]  # a class that is chosen at run time
        """Megatron-Core's attention with the norms of its spec, and a configuration that does not mention them."""

        def __init__(self, config: Any, *args: Any, **named: Any) -> None:
            assert not config.qk_layernorm
            config.qk_layernorm = True
            try:
                super().__init__(config, *args, **named)
            finally:
                config.qk_layernorm = False
            assert isinstance(self.q_layernorm, QueryNorm) and isinstance(self.k_layernorm, KeyNorm)

    attention.module = FullWidthNormAttention
