"""Forward passes of the training engine by the functions that the inference engine calls (`rollout.exact`).

`make_exact` changes a model that is built: its layers compute their forward passes by `compat/exact_ops.py`, in
training and scoring alike. Gradients are those of the ordinary formulas, which the backward pass computes again from
what went into a layer. Nothing is replaced in Megatron-Core's modules, only methods of this model's own layers.

A token's bits then depend on the tokens of its own sample: micro-batches, packing, padding and recomputation change
none.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn.functional import linear, rms_norm, silu

from megatron_bai.compat import exact_ops
from megatron_bai.model.attention import TorchAttention
from megatron_bai.model.families.architecture import Architecture
from megatron_bai.model.spec_parts import LocalNorm


class _Exact(torch.autograd.Function):
    """One function's value with another one's gradient: the two differ in rounding alone."""

    @staticmethod
    def forward(
        ctx: Any, exact: Callable[..., torch.Tensor], ordinary: Callable[..., torch.Tensor], *inputs: torch.Tensor
    ) -> torch.Tensor:
        ctx.ordinary = ordinary
        ctx.save_for_backward(*inputs)
        return exact(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[2:]
        inputs = [
            tensor.detach().requires_grad_(is_needed)
            for tensor, is_needed in zip(ctx.saved_tensors, needed, strict=True)
        ]
        with torch.enable_grad():
            output = ctx.ordinary(*inputs)
        grads = iter(torch.autograd.grad(output, [tensor for tensor in inputs if tensor.requires_grad], grad))
        return None, None, *(next(grads) if is_needed else None for is_needed in needed)


def apply_exact(
    exact: Callable[..., torch.Tensor], ordinary: Callable[..., torch.Tensor], *inputs: torch.Tensor
) -> torch.Tensor:
    """Compute `exact(*inputs)` with the gradient of `ordinary(*inputs)`.

    Args:
        exact: of the inputs, without a gradient.
        ordinary: the same function to rounding, differentiable.
        inputs: float32.
    """
    apply: Any = _Exact.apply  # torch gives it no type
    result: torch.Tensor = apply(exact, ordinary, *inputs)
    return result


def exact_logprobs(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    """Compute the log-probability of each target as the server computes it. Not differentiable.

    Args:
        logits: `[…, V]` float32, of the whole vocabulary.
        targets: `[…]` int64; where one is negative the result is 0.
        temperature: of sampling, above 0.

    Returns:
        `[…]` float32.
    """
    rows, ids = logits.detach().flatten(0, -2), targets.flatten()
    found = exact_ops.log_softmax(rows, torch.full((len(rows), 1), temperature), ids.clamp(min=0)[:, None])
    return found[:, 0].masked_fill(ids < 0, 0).view(targets.shape)


def make_exact(chunks: Sequence[torch.nn.Module], architecture: Architecture) -> None:
    """Change the layers of a model in place.

    Args:
        chunks: bare GPTModels on a CPU, in float32, one tensor- and one expert-parallel rank each.
        architecture: of a family for which `validate_exact` lets the setting pass.

    Raises:
        RuntimeError: a layer with parameters that this does not know: its bits would be others.
    """
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.moe.router import TopKRouter

    for chunk in chunks:
        for name, module in chunk.named_modules():
            layer: Any = module
            if isinstance(layer, (ColumnParallelLinear, RowParallelLinear)):
                layer._forward_impl = _linear
            elif isinstance(layer, LocalNorm):
                layer.forward = partial(_norm, layer)  # type: ignore[method-assign]
            elif isinstance(layer, TopKRouter):
                layer.gating = partial(_gate, layer)
                layer.routing = partial(_route, layer, layer.routing)
            elif isinstance(layer, TorchAttention):
                layer.forward = partial(  # type: ignore[method-assign]
                    _attend, layer, layer.forward, architecture
                )
            elif isinstance(layer, MoELayer):
                layer.token_dispatcher = _LocalDispatcher()
                layer.experts.forward = partial(_run_experts, layer)
            elif (
                not isinstance(layer, VocabParallelEmbedding)
                and next(layer.parameters(recurse=False), None) is not None
            ):
                raise RuntimeError(f"rollout.exact does not know the layer {name}, a {type(layer).__name__}")
        rotary: Any = chunk
        rotary.rotary_pos_emb.forward = lambda *positions, **named: None  # `_attend` rotates


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, **_: Any) -> torch.Tensor:
    """Stand for the matrix product of Megatron-Core's linear layers, with its parameters' names."""
    assert bias is None
    return apply_exact(exact_ops.linear, linear, input, weight)


def _norm(layer: LocalNorm, x: torch.Tensor) -> torch.Tensor:
    epsilon = layer.eps
    assert epsilon is not None
    return apply_exact(
        partial(exact_ops.rms_norm, epsilon=epsilon),
        lambda x, weight: rms_norm(x, weight.shape, weight, epsilon),
        x,
        layer.weight,
    )


def _gate(router: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Compute a router's logits, `[T, B, experts]`."""
    return apply_exact(exact_ops.linear, linear, hidden, router.weight)


def _route(
    router: Any, upstream: Callable[..., tuple[torch.Tensor, torch.Tensor]], logits: torch.Tensor, **named: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weigh the experts that Megatron-Core chose, or was given: `[tokens, experts]` weights and their map."""
    probs, routing_map = upstream(logits, **named)
    rows = logits.view(probs.shape)
    ids = _list_experts(routing_map, router.topk)
    weights = apply_exact(
        partial(exact_ops.weigh_experts, ids=ids), lambda rows: rows.gather(1, ids).softmax(dim=1), rows
    )
    return torch.zeros_like(probs).scatter(1, ids, weights), routing_map


def _list_experts(routing_map: torch.Tensor, topk: int) -> torch.Tensor:
    """Return `[tokens, k]` int64, ascending, of a map `[tokens, experts]`."""
    return routing_map.nonzero()[:, 1].view(-1, topk)


class _LocalDispatcher:
    """Stands for Megatron-Core's token dispatcher where every expert is on this rank: moves nothing."""

    def __init__(self) -> None:
        self.shape = torch.Size()  # of the layer's input
        self.ids = torch.empty(0)  # `[tokens, k]`

    def dispatch_preprocess(self, hidden: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor) -> Any:
        """Take a layer's input, `[T, B, hidden]`, and what its router chose."""
        self.shape, self.ids = hidden.shape, _list_experts(routing_map, int(routing_map[0].sum()))
        return hidden.view(-1, hidden.shape[-1]), probs

    def token_dispatch(self, hidden: torch.Tensor, probs: torch.Tensor) -> Any:
        """Return both unchanged."""
        return hidden, probs

    def dispatch_postprocess(self, hidden: torch.Tensor, probs: torch.Tensor) -> Any:
        """Return what the experts take: hidden states, the tokens of each expert, which none needs, and weights."""
        return hidden, None, probs

    def combine_preprocess(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of the experts, which `_run_experts` computed."""
        return hidden

    token_combine = combine_preprocess

    def combine_postprocess(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the layer's output, `[T, B, hidden]`."""
        return hidden.view(self.shape)


def _run_experts(layer: Any, hidden: torch.Tensor, _: Any, probs: torch.Tensor) -> tuple[torch.Tensor, None]:
    """Stand for Megatron-Core's experts and the sum over them, of `[tokens, hidden]`."""
    experts, ids = layer.experts.local_experts, layer.token_dispatcher.ids
    number = len(experts)

    def exact(x: torch.Tensor, weights: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        w13, w2 = torch.stack(parameters[:number]), torch.stack(parameters[number:])
        return exact_ops.run_experts(x, w13, w2, ids, weights)

    def ordinary(x: torch.Tensor, weights: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(x)
        for expert in range(number):
            rows, columns = (ids == expert).nonzero(as_tuple=True)
            gate, up = linear(x[rows], parameters[expert]).chunk(2, dim=-1)
            output = linear(silu(gate) * up, parameters[number + expert])
            total = total.index_add(0, rows, output * weights[rows, columns, None])
        return total

    parameters = [expert.linear_fc1.weight for expert in experts] + [expert.linear_fc2.weight for expert in experts]
    return apply_exact(exact, ordinary, hidden, probs.gather(1, ids), *parameters), None


def _attend(
    layer: TorchAttention,
    upstream: Callable[..., torch.Tensor],
    architecture: Architecture,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    attn_mask_type: Any = None,
    attention_bias: torch.Tensor | None = None,
    packed_seq_params: Any = None,
) -> torch.Tensor:
    """Rotate queries and keys and compute their attention, as `TorchAttention.forward` does behind the rotation."""
    assert attention_mask is None and attention_bias is None
    packed = packed_seq_params is not None
    rows, batch = query.shape[0], 1 if packed else query.shape[1]
    lengths = packed_seq_params.cu_seqlens_q.diff().tolist() if packed else [rows] * batch
    positions = torch.cat([torch.arange(length) for length in lengths]) if packed else torch.arange(rows)
    angles = exact_ops.rotary_table(
        architecture.max_position_embeddings, query.shape[-1], float(architecture.rope_theta)
    )[positions].view(rows, *[1] * (query.dim() - 2), -1)
    query, key = exact_ops.rotate(query, angles), exact_ops.rotate(key, angles)
    scale = query.shape[-1] ** -0.5 if layer.scale is None else layer.scale
    table, sequences = _sequence_slots(lengths, packed)
    seen = (positions if packed else positions.repeat_interleave(batch)) + 1

    def exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        queries, keys, values = (tensor.reshape(-1, *tensor.shape[-2:]) for tensor in (query, key, value))
        return exact_ops.attend(queries, keys, values, table, sequences, seen, scale).view(*query.shape[:-2], -1)

    def ordinary(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return upstream(query, key, value, None, packed_seq_params=packed_seq_params)

    return apply_exact(exact, ordinary, query, key, value)


def _sequence_slots(lengths: list[int], packed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where each sequence's tokens stand in a flattened `[T, B]` or in a packed row, and whose each one is.

    Args:
        lengths: tokens of each sequence.
        packed: whether they stand one after another, else side by side.

    Returns:
        `[sequences, longest]` and `[tokens]`, int64.
    """
    count, longest = len(lengths), max(lengths)
    if not packed:
        slots = torch.arange(longest * count).view(longest, count).T
        return slots, torch.arange(count).repeat(longest)
    counts = torch.tensor(lengths)
    slots = (counts.cumsum(0) - counts)[:, None] + torch.arange(longest)
    return slots, torch.arange(count).repeat_interleave(counts)
