"""Log-probabilities and entropy from logits split over the vocabulary, without gathering it."""

from typing import Any

import torch
import torch.distributed as dist


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
    """log π(token t+1 | tokens ≤ t) at the sampling temperature. Differentiable; collective over tensor ranks.

    Args:
        logits: `[B, T, V/tp]`, this rank's part of the vocabulary. Consumed: Megatron's kernel works in place.
        tokens: `[B, T]` int64 global ids.

    Returns:
        `[B, T]` float32 natural logarithms; position t scores token t + 1, and the last position is 0.
    """
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    target = tokens.roll(-1, dims=1)
    logprobs = -vocab_parallel_cross_entropy(logits.float() / temperature, target)
    return torch.cat([logprobs[:, :-1], torch.zeros_like(logprobs[:, -1:])], dim=1)


def entropy(logits: torch.Tensor, temperature: float, chunk: int = 1024) -> torch.Tensor:
    """Entropy of the next-token distribution in nats, H = log Z − Σ_v p_v z_v with z the logits over the temperature.

    Differentiable; collective over tensor ranks in the forward pass, local in the backward pass. Beside the logits, and
    their gradient, it needs memory for `chunk` tokens' rows of the vocabulary, whatever B and T.

    Args:
        logits: `[B, T, V/tp]`, this rank's part of the vocabulary; kept as they are.
        chunk: tokens at a time.

    Returns:
        `[B, T]` float32 (float64 for logits in it), the same on every tensor rank.
    """
    from megatron.core import parallel_state

    return _Entropy.apply(logits, temperature, chunk, parallel_state.get_tensor_model_parallel_group())


class _Entropy(torch.autograd.Function):
    """∂H/∂z_v = −p_v (log p_v + H): the backward pass needs log Z and H of each token, and no other rank."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, temperature: float, chunk: int, group: dist.ProcessGroup
    ) -> torch.Tensor:
        normalisers, entropies = [], []
        for part in logits.flatten(0, -2).split(chunk):
            z = _scaled(part, temperature)
            top = z.max(dim=-1).values
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
            z -= top[:, None]
            weights = z.exp()
            sums = torch.stack([weights.sum(-1), weights.mul_(z).sum(-1)])
            dist.all_reduce(sums, group=group)
            normalisers.append(sums[0].log() + top)
            entropies.append(sums[0].log() - sums[1] / sums[0])
        ctx.temperature, ctx.chunk = temperature, chunk
        found = torch.cat(entropies)
        ctx.save_for_backward(logits, torch.cat(normalisers), found)
        return found.view(logits.shape[:-1])

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        logits, normalisers, entropies = ctx.saved_tensors
        gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        columns = (logits, gradient, normalisers, entropies, slope.reshape(-1))
        flat = (each.flatten(0, -2) if each.dim() > 2 else each for each in columns)
        for part, out, normaliser, nats, outer in zip(*(each.split(ctx.chunk) for each in flat)):
            logp = _scaled(part, ctx.temperature) - normaliser[:, None]
            p = logp.exp()
            out.copy_((logp + nats[:, None]).mul_(p).mul_(-outer[:, None] / ctx.temperature))
        return gradient, None, None, None


def _scaled(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """A copy over the temperature, in float32 or better."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
