"""Log-probabilities and entropy from logits split over the vocabulary, without gathering it."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

# Elements of the vocabulary's rows that are computed with at a time: 64 MiB a buffer, of which there are three.
WORK_ELEMENTS = 1 << 24


def logprobs_and_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    work_elements: int = WORK_ELEMENTS,
    exact: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log π of each target and the entropy of the distribution it was drawn from, at the sampling temperature.

    With z the logits over the temperature and p = exp(z) / Z: log π(v) = z_v − log Z and H = log Z − Σ_v p_v z_v, in
    nats. Differentiable. *Collective* over tensor ranks, twice in the forward pass, not in the backward pass. Beside
    the logits and their gradient it needs memory for three buffers of `work_elements`, however many tokens there are.

    Args:
        logits: `[…, V/tp]`, this rank's part of the vocabulary, of any float dtype; unchanged.
        targets: `[…]` int64 global ids; where one is negative both results are 0.
        temperature: of sampling, above 0.
        work_elements: elements computed with at a time, at least a token's.
        exact: give log π the value that a server gives with `rollout.exact`; this rank has the whole vocabulary, in
            float32 on a CPU. Its gradient is the same.

    Returns:
        Twice `[…]` float32 (float64 for logits in it), the same on every tensor rank.
    """
    from megatron.core import parallel_state as state

    rank, group = state.get_tensor_model_parallel_rank(), state.get_tensor_model_parallel_group()
    apply: Any = _LogprobsAndEntropy.apply  # torch gives it no type
    scores: tuple[torch.Tensor, torch.Tensor] = apply(
        logits, targets - rank * logits.shape[-1], targets < 0, temperature, work_elements, group
    )
    if not exact:
        return scores
    from megatron_bai.model.exact_layers import apply_exact, exact_logprobs

    logprobs, entropy = scores
    value = exact_logprobs(logits, targets, temperature)
    return apply_exact(lambda _: value, lambda logprobs: logprobs, logprobs), entropy


class _LogprobsAndEntropy(torch.autograd.Function):
    """The function with its gradient: ∂ log π(v)/∂z_u = [u = v] − p_u and ∂H/∂z_u = −p_u (log p_u + H).

    So the backward pass needs log Z and H of each token, and no other rank. log Z is saved as the largest z and the
    difference, whose sum would round.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        local: torch.Tensor,
        no_target: torch.Tensor,
        temperature: float,
        work_elements: int,
        group: dist.ProcessGroup,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        flat, local = logits.flatten(0, -2), local.flatten()
        max_logits = flat.amax(-1).to(_work_dtype(logits)).div_(temperature)  # division keeps the order: the largest z
        dist.all_reduce(max_logits, op=dist.ReduceOp.MAX, group=group)
        exp_sums = max_logits.new_empty(3, len(max_logits))  # of the weights exp(z), of weight · z, and the target's z
        for part in _token_slices(flat, work_elements):
            z = _scaled(flat[part], temperature, max_logits[part])
            column, is_local = _local_column(local[part], flat.shape[1])
            exp_sums[2, part] = z.gather(1, column)[:, 0] * is_local
            weights = z.exp()
            exp_sums[0, part] = weights.sum(-1)
            exp_sums[1, part] = weights.mul_(z).sum(-1)
        dist.all_reduce(exp_sums, group=group)
        log_sum = exp_sums[0].log()
        entropy = log_sum - exp_sums[1] / exp_sums[0]
        ctx.temperature, ctx.work_elements = temperature, work_elements
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, local, no_target, max_logits, log_sum, entropy)
        logprobs, shape = exp_sums[2] - log_sum, logits.shape[:-1]
        return logprobs.view(shape).masked_fill(no_target, 0), entropy.view(shape).masked_fill(no_target, 0)

    @staticmethod
    def backward(ctx: Any, grad_logprobs: torch.Tensor | None, grad_entropy: torch.Tensor | None) -> tuple[Any, ...]:
        logits, local, no_target, max_logits, log_sum, entropy = ctx.saved_tensors
        grad_logits, flat = torch.empty_like(logits), logits.flatten(0, -2)
        rows = grad_logits.view(flat.shape)
        outer, inner = (
            torch.zeros_like(max_logits)
            if grad is None
            else (grad.masked_fill(no_target, 0) / ctx.temperature).flatten()
            for grad in (grad_logprobs, grad_entropy)
        )
        for part in _token_slices(flat, ctx.work_elements):
            z = _scaled(flat[part], ctx.temperature, max_logits[part]).sub_(log_sum[part, None])  # log p
            p = z.exp()
            if grad_entropy is None:
                p.mul_(-outer[part, None])
            else:
                p.mul_(z.add_(entropy[part, None]).mul_(inner[part, None]).add_(outer[part, None]).neg_())
            column, is_local = _local_column(local[part], flat.shape[1])
            p.scatter_add_(1, column, (outer[part] * is_local)[:, None])
            rows[part] = p
        return grad_logits, None, None, None, None, None


def _token_slices(flat: torch.Tensor, work_elements: int) -> Iterator[slice]:
    """Yield slices of consecutive tokens, as many at a time as `work_elements` allows."""
    step = max(1, work_elements // flat.shape[1])
    return (slice(start, start + step) for start in range(0, len(flat), step))


def _local_column(local: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `[tokens, 1]` columns of this rank, one a token, and `[tokens]` bool, whether it is the target's."""
    is_local = (local >= 0) & (local < width)
    return local.where(is_local, 0)[:, None], is_local


def _work_dtype(logits: torch.Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _scaled(logits: torch.Tensor, temperature: float, max_logits: torch.Tensor) -> torch.Tensor:
    """Return a copy over the temperature, less the largest of each token, in float32 or better."""
    return logits.to(_work_dtype(logits), copy=True).div_(temperature).sub_(max_logits[:, None])
