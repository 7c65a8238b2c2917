"""Policies for tokens whose route is not known (`replay.missing`).

Aborted and resumed samples have such tokens, turns that were not generated, and samples whose weights changed midway. A
missing route is counted and treated as the setting says, never ignored.
"""

from dataclasses import dataclass

import numpy as np
import torch

from megatron_bai.config import Replay
from megatron_bai.config.limits import validate_group
from megatron_bai.errors import UserError


@dataclass(frozen=True)
class MissingCounts:
    """Counts of tokens of one rank's batch.

    Attributes:
        num_missing: tokens that were fed to the rollout model and have no route.
        num_fed: tokens that were fed to it.
        num_masked: loss tokens that the policy drops.
        num_loss_tokens: loss tokens before the policy is applied.
    """

    num_missing: int
    num_fed: int
    num_masked: int
    num_loss_tokens: int


def apply_missing_policy(
    policy: str, mask: torch.Tensor, routed: torch.Tensor, missing: torch.Tensor
) -> tuple[torch.Tensor, MissingCounts]:
    """Apply `replay.missing` to a batch. In every policy the router chooses for rows without a route.

    Args:
        policy: `strict` stops; `mask` drops the tokens that these rows predict from the loss; `live` keeps them.
        mask: `[B, T]` bool, position t true where the loss counts the token predicted there.
        routed: `[B, T]` bool, rows that hold a route (`layout.assemble`).
        missing: `[B, T]` bool, rows that were fed to the rollout model and have no route.

    Returns:
        The loss mask to use, `[B, T]` bool, and the counts.

    Raises:
        UserError: `strict`, and a row is missing; or no such policy.
    """
    validate_group("replay", Replay(missing=policy))
    num_missing = int(missing.sum())
    num_fed = num_missing + int(routed.sum())
    if policy == "strict" and num_missing:
        raise UserError(
            f"{num_missing} of {num_fed} tokens of the rollouts have no route: set replay.missing=mask to drop them "
            "from the loss, or replay.missing=live to let the router choose"
        )
    loss_mask = mask & ~missing if policy == "mask" else mask
    num_loss_tokens = int(mask.sum())
    return loss_mask, MissingCounts(num_missing, num_fed, num_loss_tokens - int(loss_mask.sum()), num_loss_tokens)


def last_version_rows(rows: int, prompt_length: int, starts: list[int]) -> np.ndarray:
    """Find the rows of a sample that belong to the weights it ended with.

    After a weight update in mid-sample SGLang computes what came before again, and returns the *new* weights' routes
    beside the old weights' log-probabilities. Only rows that predicted tokens of the last span are those of the weights
    that sampled these tokens.

    Args:
        rows: number of rows of the sample's routes; row t predicts token t + 1.
        prompt_length: tokens of the prompt.
        starts: first response token of each weight version's span, counted from 0, in order.

    Returns:
        `[rows]` bool; all true where the version never changed.
    """
    first = prompt_length + starts[-1] - 1 if len(starts) > 1 else 0
    return np.arange(rows) >= first


settle, of_last_version = apply_missing_policy, last_version_rows  # the names that earlier releases documented
