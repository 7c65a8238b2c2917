"""The loss of a mini-batch from those of its tokens, exact however the mini-batch is split.

With ℓ the loss of token t of response i, y its length, over all micro-batches and data-parallel ranks:

    sample_sum    (1/samples) Σ_i Σ_t ℓ            MiniRL
    sample_mean   (1/samples) Σ_i (1/|y_i|) Σ_t ℓ  GRPO
    token_mean    (1/tokens)  Σ_i Σ_t ℓ            DAPO over the mini-batch
    prompt_mean   (1/prompts) Σ_i Σ_t ℓ / (tokens of all responses to i's prompt)     DAPO as in its paper

A micro-batch gives its part of the sum (`loss_numerator`); the engine divides by `loss_denominator`, summed over
data-parallel ranks. Samples that are not `in_loss` are in neither; an empty response is a sample without tokens.
"""

import torch

from megatron_bai.rl.batches.stages import TrainingBatch
from megatron_bai.rl.objectives.objective import Mean, PerToken, Scalar
from megatron_bai.rl.objectives.terms import response_lengths


def loss_numerator(losses: PerToken, batch: TrainingBatch, mean: Mean) -> Scalar:
    """Sum the losses of a micro-batch: its part of the numerator.

    Args:
        losses: `[B, T]`, 0 outside the mask.
        batch: of the micro-batch.
        mean: how tokens are averaged.
    """
    if mean == "sample_mean":
        losses = losses / response_lengths(batch.loss_mask)
    elif mean == "prompt_mean":
        losses = losses / batch.prompt_tokens[:, None].clamp(min=1)
    return losses.sum()


def loss_denominator(micro_batches: list[TrainingBatch], mean: Mean) -> int:
    """Count the denominator of a rank's part of the mini-batch.

    Args:
        micro_batches: of this rank, with complete groups.
        mean: how tokens are averaged.
    """
    if mean == "token_mean":
        return sum(int(micro_batch.loss_mask.sum()) for micro_batch in micro_batches)
    if mean == "prompt_mean":
        return len(torch.cat([micro_batch.prompt_index[micro_batch.in_loss] for micro_batch in micro_batches]).unique())
    return sum(int(micro_batch.in_loss.sum()) for micro_batch in micro_batches)
