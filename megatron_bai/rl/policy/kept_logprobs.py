"""Log-probabilities and entropy over the ids that a truncated draw kept, from logits split over the vocabulary."""

from typing import Any

import torch
import torch.distributed as dist


def kept_logprobs_and_entropy(
    logits: torch.Tensor, targets: torch.Tensor, kept_ids: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log π of each target and the entropy of the distribution it was drawn from, over its kept ids.

    With z the logits over the temperature and S the kept ids: log π(v) = z_v − log Σ_{u ∈ S} exp(z_u), and
    H = −Σ_{u ∈ S} π(u) log π(u), in nats. Differentiable; logits of other ids have no gradient. *Collective* over
    tensor ranks, once in the forward pass, not in the backward pass. No buffer beside the logits' gradient is larger
    than `kept_ids`.

    Args:
        logits: `[…, V/tp]`, this rank's part of the vocabulary, of any float dtype; unchanged.
        targets: `[…]` int64 global ids, each among its kept ids; where one is negative both results are 0.
        kept_ids: `[…, K]` integer global ids, negative where a token has fewer; both results are 0 where it has none.
        temperature: of sampling, above 0.

    Returns:
        Twice `[…]` float32 (float64 for logits in it), the same on every tensor rank.
    """
    from megatron.core import parallel_state as state

    rank, group = state.get_tensor_model_parallel_rank(), state.get_tensor_model_parallel_group()
    width, ids = logits.shape[-1], kept_ids.to(logits.device, torch.int64)
    local = (ids - rank * width).masked_fill(ids < 0, -1)
    apply: Any = _GatheredLogits.apply  # torch gives it no type
    z: torch.Tensor = apply(logits, local, (local >= 0) & (local < width), group) / temperature
    is_kept = ids >= 0
    has_draw = is_kept.any(-1) & (targets >= 0)
    z = z.masked_fill(~is_kept & has_draw[..., None], -torch.inf)  # rows without a draw stay 0: −∞ alone gives NaN
    logprobs = z.log_softmax(-1)
    is_target = (ids == targets[..., None]) & has_draw[..., None]
    finite = logprobs.masked_fill(~is_kept, 0.0)
    entropy = -(finite.exp() * finite).sum(-1)
    return finite.masked_fill(~is_target, 0.0).sum(-1), entropy.masked_fill(~has_draw, 0.0)


class _GatheredLogits(torch.autograd.Function):
    """The logits of some ids of each token, on every tensor rank: each rank has those of its part of the vocabulary.

    What follows is computed on every rank alike, so that a rank's gradient of the result is the whole one.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, local: torch.Tensor, is_local: torch.Tensor, group: dist.ProcessGroup
    ) -> torch.Tensor:
        columns = local.where(is_local, 0)
        gathered = logits.gather(-1, columns).to(torch.promote_types(logits.dtype, torch.float32)) * is_local
        dist.all_reduce(gathered, group=group)
        ctx.save_for_backward(columns, is_local)
        ctx.shape, ctx.dtype = logits.shape, logits.dtype
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        columns, is_local = ctx.saved_tensors
        grad_logits = grad.new_zeros(ctx.shape, dtype=ctx.dtype)
        return grad_logits.scatter_add_(-1, columns, (grad * is_local).to(ctx.dtype)), None, None, None
