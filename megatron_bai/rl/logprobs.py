"""Log-probabilities and entropy from logits split over the vocabulary, without gathering it."""

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


@torch.no_grad()
def entropy(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Entropy of the next-token distribution in nats. Collective over tensor ranks.

    Args:
        logits: `[B, T, V/tp]`.

    Returns:
        `[B, T]` float32.
    """
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    logits = logits.float() / temperature
    top = logits.max(dim=-1, keepdim=True).values
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    logits = logits - top
    weights = logits.exp()
    sums = torch.stack([weights.sum(-1), (weights * logits).sum(-1)])
    dist.all_reduce(sums, group=group)
    return sums[0].log() - sums[1] / sums[0]
