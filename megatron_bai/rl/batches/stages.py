"""The stages of a step's batch: rollouts, scored, training. Each is made of the former by one function.

    rollouts   what was sampled, and what of it may be learned from            `batch.from_samples`
    scored     with the log-probabilities of the policies that do not move     `make_scored_batch`
    training   with what an objective learns from                              `make_training_batch`

Position t of the `[B, T]` fields below `tokens` belongs to the token *predicted* at t, which is token t + 1; that of
routes and of what is said of them to input token t. Of tokens there are three sets, each a part of the one before:

    response_mask   tokens of responses that were sampled; those of an environment are in no set
    usable_mask     those that may be learned from: fresh enough (`staleness.find_fresh_tokens`), and with a route
                    where one is needed (`missing.apply_missing_policy`); what is measured of the engines is over these
    loss_mask       those that the loss counts: of samples that are `in_loss`
"""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch

from megatron_bai.rl.batches.token_batch import TokenBatch, tensor_field


@dataclass(frozen=True, kw_only=True, eq=False)
class RolloutBatch(TokenBatch):
    """What was sampled, and what of it may be learned from.

    Attributes:
        response_mask: `[B, T]` bool, tokens of responses that the model sampled, in all turns.
        usable_mask: `[B, T]` bool, those that may be learned from.
        infer_logprobs: `[B, T]` float32, of the inference engine; 0 outside responses.
        version_age: `[B, T]` int64, weight versions between the one that sampled the token and the step's; 0 outside
            responses.
        routes: `[B, T, layers, topk]` experts of input token t in the MoE layers of `columns`, filled where there is
            none.
        routed: `[B, T]` bool, rows of `routes` that the inference engine recorded.
        missing: `[B, T]` bool, tokens it was fed whose route is not known. In neither: padding.
        route_weights: `[B, T, layers, topk]` float32, the inference engine's weights of `routes`; None: it was not
            asked for them.
        kept_ids: `[B, T, kept]` integer, the ids that the token at t + 1 was drawn from (`rollout.kept_ids`), which all
            log-probabilities are over, −1 where it has fewer; None: no draw was truncated.
        columns: MoE layers of the model, counted from 0, that `routes` has, in this order.
        rewards: `[B]` float32.
        turn_rewards: `[B, T]` float32, what of `rewards` is an environment's for turns before the last, at their last
            tokens; None: nothing.
        sample_advantages: `[B]` float32, of each sample in its group; 0 where a critic is to give each token one.
        in_loss: `[B]` bool, false for samples that the loss leaves out.
        prompt_index: `[B]` int64, the sample's prompt among this replica's.
        sample_index: `[B]` int64, the sample's index among this replica's, whatever their order here.
    """

    response_mask: torch.Tensor = tensor_field("B T", "bool")
    usable_mask: torch.Tensor = tensor_field("B T", "bool")
    infer_logprobs: torch.Tensor = tensor_field("B T", "float")
    version_age: torch.Tensor = tensor_field("B T", "int64")
    routes: torch.Tensor = tensor_field("B T layers topk", "integer")
    routed: torch.Tensor = tensor_field("B T", "bool")
    missing: torch.Tensor = tensor_field("B T", "bool")
    route_weights: torch.Tensor | None = tensor_field("B T layers topk", "float", optional=True)
    kept_ids: torch.Tensor | None = tensor_field("B T kept", "integer", optional=True)
    columns: tuple[int, ...]
    rewards: torch.Tensor = tensor_field("B", "float")
    turn_rewards: torch.Tensor | None = tensor_field("B T", "float", optional=True)
    sample_advantages: torch.Tensor = tensor_field("B", "float")
    in_loss: torch.Tensor = tensor_field("B", "bool")
    prompt_index: torch.Tensor = tensor_field("B", "int64")
    sample_index: torch.Tensor = tensor_field("B", "int64")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.routes.shape[2] != len(self.columns):
            raise ValueError(f"routes of {self.routes.shape[2]} layers, and the batch names {self.columns}")

    @cached_property  # one tensor: what an objective writes into it is noticed (`objectives.batch_loss`)
    def loss_mask(self) -> torch.Tensor:
        """`[B, T]` bool, tokens that the loss counts."""
        return self.usable_mask & self.in_loss[:, None]


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredBatch(RolloutBatch):
    """Rollouts with log-probabilities of the training engine; 0 on ranks without the last stage, which has them.

    Attributes:
        old_logprobs: `[B, T]` float32, before the step's first update.
        sampled_logprobs: `[B, T]` float32, with the weights that sampled the token (`staleness.py`); `old_logprobs`
            where they are the step's, NaN where the engine has them no longer.
        reference_logprobs: `[B, T]` float32, of the reference policy; 0 where the objective has no use for it.
    """

    old_logprobs: torch.Tensor = tensor_field("B T", "float")
    sampled_logprobs: torch.Tensor = tensor_field("B T", "float")
    reference_logprobs: torch.Tensor = tensor_field("B T", "float")


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingBatch(ScoredBatch):
    """What objectives learn from: of a micro-batch, a mini-batch or a step.

    Attributes:
        advantages: `[B, T]` float32, of each token: the sample's at all of them, or a critic's.
        values: `[B, T]` float32, the critic's before the step's first update; 0 without a critic.
        returns: `[B, T]` float32, the critic's targets; likewise.
        router_shift: `[B, T]` float32, Δ of the routers at input token t (`rl/policy/router_shift.py`); 0 where it was
            not measured.
        prompt_tokens: `[B]` int64, tokens in the loss of all samples of the sample's prompt.
    """

    advantages: torch.Tensor = tensor_field("B T", "float")
    values: torch.Tensor = tensor_field("B T", "float")
    returns: torch.Tensor = tensor_field("B T", "float")
    router_shift: torch.Tensor = tensor_field("B T", "float")
    prompt_tokens: torch.Tensor = tensor_field("B", "int64")

    @property
    def mask(self) -> torch.Tensor:
        """`loss_mask` under its documented name."""
        return self.loss_mask


def make_rollout_batch(
    tokens: torch.Tensor, lengths: torch.Tensor, response_mask: torch.Tensor, infer_logprobs: torch.Tensor
) -> RolloutBatch:
    """Make the first stage of given text: no routes, no rewards, and each sample of a prompt of its own.

    Every token of `response_mask` is usable and in the loss.

    Args:
        tokens: as in `RolloutBatch`.
        lengths: likewise.
        response_mask: likewise.
        infer_logprobs: likewise.
    """
    (b, length), none, nothing = tokens.shape, torch.zeros_like(response_mask), torch.zeros_like(infer_logprobs[:, 0])
    return RolloutBatch(
        tokens=tokens,
        lengths=lengths,
        response_mask=response_mask,
        usable_mask=response_mask,
        infer_logprobs=infer_logprobs,
        version_age=torch.zeros_like(tokens),
        routes=tokens.new_zeros(b, length, 0, 0),
        routed=none,
        missing=none,
        route_weights=None,
        kept_ids=None,
        columns=(),
        rewards=nothing,
        sample_advantages=nothing,
        in_loss=torch.ones(b, dtype=torch.bool),
        prompt_index=torch.arange(b),
        sample_index=torch.arange(b),
    )


def make_scored_batch(
    rollouts: RolloutBatch,
    old_logprobs: torch.Tensor | None = None,
    previous_logprobs: torch.Tensor | None = None,
    reference_logprobs: torch.Tensor | None = None,
) -> ScoredBatch:
    """Make the second stage. All log-probabilities may be on any device.

    Args:
        rollouts: the first.
        old_logprobs: as in `ScoredBatch`; None: 0, and so are `sampled_logprobs`.
        previous_logprobs: `[B, T]` float32, with the weights of the step before; None: the engine has them no longer.
        reference_logprobs: as in `ScoredBatch`; None: 0.
    """
    device, age = rollouts.tokens.device, rollouts.version_age
    old = sampled = nothing = torch.zeros_like(rollouts.infer_logprobs)
    if old_logprobs is not None:
        old = old_logprobs.to(device)
        unknown = torch.full_like(old, float("nan"))
        previous = unknown if previous_logprobs is None else previous_logprobs.to(device)
        sampled = torch.where(age == 0, old, torch.where(age == 1, previous, unknown))
    return ScoredBatch(
        **_fields(RolloutBatch, rollouts),
        old_logprobs=old,
        sampled_logprobs=sampled,
        reference_logprobs=nothing if reference_logprobs is None else reference_logprobs.to(device),
    )


def make_training_batch(
    scored: ScoredBatch,
    advantages: torch.Tensor | None = None,
    values: torch.Tensor | None = None,
    returns: torch.Tensor | None = None,
) -> TrainingBatch:
    """Make the last stage of a whole batch: its parts are split from it.

    Args:
        scored: the second, with all samples of each prompt.
        advantages: as in `TrainingBatch`; None: the samples'.
        values: likewise; None: 0.
        returns: likewise; None: 0.
    """
    nothing = torch.zeros_like(scored.infer_logprobs)
    if advantages is None:
        advantages = scored.sample_advantages[:, None].repeat(1, scored.tokens.shape[1])
    return TrainingBatch(
        **_fields(ScoredBatch, scored),
        advantages=advantages,
        values=nothing if values is None else values,
        returns=nothing if returns is None else returns,
        router_shift=nothing,
        prompt_tokens=torch.bincount(scored.prompt_index, scored.loss_mask.sum(1)).long()[scored.prompt_index],
    )


def _fields(stage: type[TokenBatch], batch: TokenBatch) -> dict[str, Any]:
    """Return what a stage has of a batch that is of this stage or a later one."""
    return {field.name: getattr(batch, field.name) for field in fields(stage)}
