"""A Qwen3-MoE in plain torch, written from its definition: every expert computes every token, a mask chooses.

Knows nothing of Megatron-Core. Weights are Hugging Face's, by name.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import silu

from megatron_bai.config import Model

Weights = dict[str, Tensor]


def load(directory: Path) -> Weights:
    """The tensors of an exported checkpoint, in float64 with gradients."""
    return {name: t.double().requires_grad_() for name, t in load_file(directory / "model.safetensors").items()}


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + epsilon).sqrt() * weight


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary embedding of `[B, heads, T, d]`: dimension i turns with i + d/2."""
    d, length = x.shape[-1], x.shape[-2]
    frequency = theta ** (-torch.arange(0, d, 2, dtype=x.dtype) / d)
    angle = torch.arange(length, dtype=x.dtype)[:, None] * frequency
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


def attention(w: Weights, at: str, model: Model, x: Tensor) -> Tensor:
    def heads(name: str) -> Tensor:
        return (x @ w[f"{at}{name}_proj.weight"].T).unflatten(-1, (-1, model.head_dim)).transpose(1, 2)

    q = rotate(norm(heads("q"), w[f"{at}q_norm.weight"], model.norm_epsilon), model.rope_theta)
    k = rotate(norm(heads("k"), w[f"{at}k_norm.weight"], model.norm_epsilon), model.rope_theta)
    each = model.num_attention_heads // model.num_query_groups
    k, v = k.repeat_interleave(each, dim=1), heads("v").repeat_interleave(each, dim=1)
    scores = q @ k.transpose(-1, -2) / model.head_dim**0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
    return mixed.transpose(1, 2).flatten(-2) @ w[f"{at}o_proj.weight"].T


def experts(
    w: Weights,
    at: str,
    model: Model,
    x: Tensor,
    chosen: Tensor | None,
    router_logits: list[Tensor] | None = None,
    given: Tensor | None = None,
) -> Tensor:
    """The mixture. `chosen`: `[B, T, topk]` experts to use; None takes the router's best. `given`: their weights."""
    scores = x @ w[f"{at}gate.weight"].T
    if router_logits is not None:
        router_logits.append(scores)
    if chosen is None:
        chosen = scores.topk(model.moe_topk, dim=-1).indices
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    if given is not None:
        weights = torch.zeros_like(scores).scatter(-1, chosen, given.to(scores.dtype))
    total = torch.zeros_like(x)
    for e in range(model.num_experts):
        gate, up, down = (w[f"{at}experts.{e}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        total = total + weights[..., e, None] * ((silu(x @ gate.T) * (x @ up.T)) @ down.T)
    return total


def hidden(
    w: Weights,
    model: Model,
    tokens: Tensor,
    routes: Tensor | None = None,
    router_logits: list[Tensor] | None = None,
    route_weights: Tensor | None = None,
) -> Tensor:
    """`[B, T]` token ids → `[B, T, H]`, of the last layer after its norm.

    `routes`, `router_logits`: as in `logits`. `route_weights`: of `routes`; None: the router's.
    """
    x = w["model.embed_tokens.weight"][tokens]
    for layer in range(model.num_layers):
        at = f"model.layers.{layer}."
        x = x + attention(w, at + "self_attn.", model, norm(x, w[at + "input_layernorm.weight"], model.norm_epsilon))
        normed = norm(x, w[at + "post_attention_layernorm.weight"], model.norm_epsilon)
        chosen = None if routes is None else routes[:, :, layer].long()
        given = None if route_weights is None else route_weights[:, :, layer]
        x = x + experts(w, at + "mlp.", model, normed, chosen, router_logits, given)
    return norm(x, w["model.norm.weight"], model.norm_epsilon)


def logits(
    w: Weights,
    model: Model,
    tokens: Tensor,
    routes: Tensor | None = None,
    router_logits: list[Tensor] | None = None,
) -> Tensor:
    """`[B, T]` token ids → `[B, T, V]`. `routes`: `[B, T, layers, topk]` experts to force; None lets routers choose.

    `router_logits` gets each layer's, `[B, T, E]`.
    """
    return hidden(w, model, tokens, routes, router_logits) @ w["lm_head.weight"].T


def values(w: Weights, model: Model, tokens: Tensor) -> Tensor:
    """`[B, T]` token ids → `[B, T]`, of a critic, whose head has Hugging Face's name of a classifier's."""
    return (hidden(w, model, tokens) @ w["score.weight"].T)[..., 0]


def next_logprobs(scores: Tensor, tokens: Tensor) -> Tensor:
    """`[B, T − 1]`: log-probability of token t + 1 at position t."""
    return scores.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
