"""Log-probabilities and entropy from logits split over the vocabulary, without gathering it."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

WORK_ELEMENTS = (
    1 << 24
)  # elements of the vocabulary's rows in work at a time: 64 MiB a buffer, of which there are three


def logprobs_and_entropy(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float, work_elements: int = WORK_ELEMENTS
) -> tuple[torch.Tensor, torch.Tensor]:
    """log π of each target, and the entropy of the distribution it was drawn from, at the sampling temperature.

    With z the logits over the temperature and p = exp(z) / Z: log π(v) = z_v − log Z and H = log Z − Σ_v p_v z_v, in
    nats. Differentiable; two collectives over tensor ranks in the forward pass, none in the backward pass. Beside the
    logits, and their gradient, it needs memory for three buffers of `work_elements`, however many tokens there are.

    Args:
        logits: `[…, V/tp]`, this rank's part of the vocabulary, of any float dtype; kept as they are.
        targets: `[…]` int64 global ids; where one is negative both results are 0.
        work_elements: elements computed with at a time, at least a token's.

    Returns:
        Twice `[…]` float32 (float64 for logits in it), the same on every tensor rank.
    """
    from megatron.core import parallel_state as state

    rank, group = state.get_tensor_model_parallel_rank(), state.get_tensor_model_parallel_group()
    apply: Any = _LogprobsAndEntropy.apply  # torch gives it no type
    scores: tuple[torch.Tensor, torch.Tensor] = apply(
        logits, targets - rank * logits.shape[-1], targets < 0, temperature, work_elements, group
    )
    return scores


class _LogprobsAndEntropy(torch.autograd.Function):
    """∂ log π(v)/∂z_u = [u = v] − p_u and ∂H/∂z_u = −p_u (log p_u + H): the backward pass needs log Z and H of each
    token, and no other rank. log Z is kept as the largest z and the rest, whose sum would round."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        local: torch.Tensor,
        nothing: torch.Tensor,
        temperature: float,
        work_elements: int,
        group: dist.ProcessGroup,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        flat, local = logits.flatten(0, -2), local.flatten()
        top = flat.amax(-1).to(_precise(logits)).div_(temperature)  # dividing keeps the order: these are the largest z
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
        sums = top.new_empty(3, len(top))  # of the weights exp(z), of weight · z, and the target's z
        for part in _parts(flat, work_elements):
            z = _scaled(flat[part], temperature, top[part])
            column, own = _own(local[part], flat.shape[1])
            sums[2, part] = z.gather(1, column)[:, 0] * own
            weights = z.exp()
            sums[0, part] = weights.sum(-1)
            sums[1, part] = weights.mul_(z).sum(-1)
        dist.all_reduce(sums, group=group)
        rest = sums[0].log()
        entropy = rest - sums[1] / sums[0]
        ctx.temperature, ctx.work_elements = temperature, work_elements
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, local, nothing, top, rest, entropy)
        logprobs, shape = sums[2] - rest, logits.shape[:-1]
        return logprobs.view(shape).masked_fill(nothing, 0), entropy.view(shape).masked_fill(nothing, 0)

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor | None, nats_slope: torch.Tensor | None) -> tuple[Any, ...]:
        logits, local, nothing, top, rest, entropy = ctx.saved_tensors
        gradient, flat = torch.empty_like(logits), logits.flatten(0, -2)
        rows = gradient.view(flat.shape)
        outer, inner = (
            torch.zeros_like(top) if given is None else (given.masked_fill(nothing, 0) / ctx.temperature).flatten()
            for given in (slope, nats_slope)
        )
        for part in _parts(flat, ctx.work_elements):
            z = _scaled(flat[part], ctx.temperature, top[part]).sub_(rest[part, None])  # log p
            p = z.exp()
            if nats_slope is None:
                p.mul_(-outer[part, None])
            else:
                p.mul_(z.add_(entropy[part, None]).mul_(inner[part, None]).add_(outer[part, None]).neg_())
            column, own = _own(local[part], flat.shape[1])
            p.scatter_add_(1, column, (outer[part] * own)[:, None])
            rows[part] = p
        return gradient, None, None, None, None, None


def _parts(flat: torch.Tensor, work_elements: int) -> Iterator[slice]:
    """Consecutive tokens, as many at a time as `work_elements` allows."""
    step = max(1, work_elements // flat.shape[1])
    return (slice(start, start + step) for start in range(0, len(flat), step))


def _own(local: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`[tokens, 1]`, a column of this rank for each token, and `[tokens]` bool, whether it is the target's."""
    own = (local >= 0) & (local < width)
    return local.where(own, 0)[:, None], own


def _precise(logits: torch.Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _scaled(logits: torch.Tensor, temperature: float, top: torch.Tensor) -> torch.Tensor:
    """A copy over the temperature, less the largest of each token, in float32 or better."""
    return logits.to(_precise(logits), copy=True).div_(temperature).sub_(top[:, None])
