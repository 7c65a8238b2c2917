"""Batches of samples, and of given text, as padded tensors."""

import numpy as np
import torch

from megatron_bai.rl.batches.stages import (
    RolloutBatch,
    TrainingBatch,
    make_rollout_batch,
    make_scored_batch,
    make_training_batch,
)
from megatron_bai.rollout.kept_ids import NO_ID
from megatron_bai.rollout.sample import Sample
from megatron_bai.routing.layout import assemble
from megatron_bai.routing.routes import RouteSignature

Batch = TrainingBatch  # what an objective gets, by its documented name


def from_samples(
    samples: list[Sample],
    advantages: np.ndarray | None,
    length: int,
    pad_id: int,
    signature: RouteSignature,
    in_loss: np.ndarray | None = None,
    weighted: bool = False,
    version: int | None = None,
) -> RolloutBatch:
    """Build a batch from rollouts. All their tokens are usable.

    Args:
        samples: B of this replica, at least one, all with the routes of the same layers.
        advantages: `[B]`, one a sample; None: 0, for a critic to give each token one.
        length: T, at least the longest sample.
        pad_id: token id of padding.
        signature: of the whole model's routes.
        in_loss: `[B]` bool; None counts every sample.
        weighted: whether the samples have `route_weights`; lost ones need none.
        version: of the step's weights, where samples may be of earlier ones; None: every token is of age 0.
    """
    b = len(samples)
    tokens = np.full((b, length), pad_id, dtype=np.int64)
    response_mask = np.zeros((b, length), dtype=bool)
    logprobs = np.zeros((b, length), dtype=np.float32)
    for i, sample in enumerate(samples):
        total = len(sample.tokens)
        tokens[i, :total] = sample.tokens
        predicted = slice(sample.prompt_length - 1, total - 1)
        response_mask[i, predicted] = sample.full_sampled_mask  # what an environment said is no action
        logprobs[i, predicted] = sample.logprobs
    columns = samples[0].columns
    assert all(sample.columns == columns for sample in samples), "samples with the routes of different layers"
    recorded = [sample.route_mask for sample in samples]
    routes, routed, missing = assemble([sample.routes for sample in samples], length, signature, recorded, columns)
    usable = torch.from_numpy(response_mask)
    return RolloutBatch(
        tokens=torch.from_numpy(tokens),
        lengths=torch.tensor([len(sample.tokens) for sample in samples]),
        response_mask=usable,
        usable_mask=usable,
        infer_logprobs=torch.from_numpy(logprobs),
        version_age=torch.from_numpy(_stack_version_ages(samples, length, version)),
        routes=torch.from_numpy(routes),
        routed=torch.from_numpy(routed),
        missing=torch.from_numpy(missing),
        route_weights=torch.from_numpy(_stack_weights(samples, routes.shape)) if weighted else None,
        kept_ids=_stack_kept_ids(samples, tokens),
        columns=tuple(range(signature.moe_layers)) if columns is None else columns,
        rewards=torch.tensor([sample.reward or 0.0 for sample in samples], dtype=torch.float32),
        turn_rewards=_stack_turn_rewards(samples, length),
        sample_advantages=torch.from_numpy((np.zeros(b) if advantages is None else advantages).astype(np.float32)),
        in_loss=torch.ones(b, dtype=torch.bool) if in_loss is None else torch.from_numpy(in_loss),
        prompt_index=torch.tensor([sample.prompt_index for sample in samples]),
        sample_index=torch.arange(b),
    )


def _stack_version_ages(samples: list[Sample], length: int, version: int | None) -> np.ndarray:
    """Return how many versions before `version` each response token was sampled, `[B, T]` int64; None: 0."""
    ages = np.zeros((len(samples), length), dtype=np.int64)
    if version is None:
        return ages
    for row, sample in enumerate(samples):
        shift = sample.prompt_length - 1
        for span in sample.spans:
            age = version - int(span.version)
            assert age >= 0, f"a token of version {span.version} in the step of version {version}"
            ages[row, span.start + shift : span.end + shift] = age
        ages[row, shift : len(sample.tokens) - 1] *= sample.full_sampled_mask
    return ages


def _stack_turn_rewards(samples: list[Sample], length: int) -> torch.Tensor | None:
    """Stack the environment's rewards of turns before the last, by their share in the samples' rewards.

    Returns:
        `[B, T]` float32, position t of token t + 1; None where there are none.
    """
    rewards = torch.zeros(len(samples), length)
    for row, sample in enumerate(samples):
        for turn in sample.turns[:-1]:
            if turn.reward and sample.reward is not None:
                rewards[row, sample.prompt_length + turn.end - 2] = sample.turn_weight * turn.reward
    return rewards if rewards.any() else None


def _stack_weights(samples: list[Sample], shape: tuple[int, ...]) -> np.ndarray:
    """Stack route weights as `[B, T, layers, topk]` float32, 0 where a sample has no row."""
    weights = np.zeros(shape, dtype=np.float32)
    for i, sample in enumerate(samples):
        assert sample.lost or sample.route_weights is not None, "a sample without the weights of its routes"
        if sample.route_weights is not None:
            weights[i, : len(sample.route_weights)] = sample.route_weights
    return weights


def _stack_kept_ids(samples: list[Sample], tokens: np.ndarray) -> torch.Tensor | None:
    """Stack the ids that tokens were drawn from as `[B, T, K]` int32 in front of the tokens, or return None.

    Args:
        samples: of which all that have a response have them, or none.
        tokens: `[B, T]` of the batch.
    """
    widths = [sample.kept_ids.shape[1] for sample in samples if sample.kept_ids is not None]
    if not widths:
        return None
    kept = np.full((*tokens.shape, max(widths)), NO_ID, dtype=np.int32)
    for row, sample in enumerate(samples):
        if sample.kept_ids is None:
            assert not len(sample.response), "a sample whose draws were not truncated beside others"
            continue
        first, end = sample.prompt_length - 1, len(sample.tokens) - 1
        kept[row, first:end, : sample.kept_ids.shape[1]] = sample.kept_ids
        drawn = (kept[row, first:end] == tokens[row, first + 1 : end + 1, None]).any(axis=1)
        assert (drawn == sample.full_sampled_mask).all(), "a token is none of those it was drawn from"
    return torch.from_numpy(kept)


def from_sft(tokens: np.ndarray, target_mask: np.ndarray) -> TrainingBatch:
    """Build a batch for supervised training.

    Args:
        tokens: `[B, T]` int64.
        target_mask: `[B, T]` bool, true where token t is to be learned. A row's last one is the end of its text: what
            follows is padding.
    """
    targets = torch.from_numpy(target_mask)
    predicted = torch.zeros_like(targets)
    predicted[:, :-1] = targets[:, 1:]
    lengths = (targets * torch.arange(1, targets.shape[1] + 1)).amax(dim=1)
    rollouts = make_rollout_batch(torch.from_numpy(tokens), lengths, predicted, torch.zeros(targets.shape))
    return make_training_batch(make_scored_batch(rollouts))
