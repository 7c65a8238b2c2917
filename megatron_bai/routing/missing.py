"""What becomes of tokens whose route is not known: aborted and resumed samples, turns that were not generated, weights
that changed in mid-sample. A missing route is counted and treated as `replay.missing` says, never passed over.
"""

from dataclasses import dataclass

import numpy as np
import torch

from megatron_bai.errors import UserError

POLICIES = ("strict", "mask", "live")


@dataclass(frozen=True)
class MissingCounts:
    """Counts over one rank's batch.

    Attributes:
        num_missing: tokens that were fed to the rollout model and have no route.
        num_fed: tokens that were fed to it.
        num_masked: loss tokens dropped for it.
        num_loss_tokens: loss tokens before that.
    """

    num_missing: int
    num_fed: int
    num_masked: int
    num_loss_tokens: int


def apply_missing_policy(
    policy: str, mask: torch.Tensor, routed: torch.Tensor, missing: torch.Tensor
) -> tuple[torch.Tensor, MissingCounts]:
    """Apply a policy to a batch. In every policy the router chooses for the rows that are left without a route.

    Args:
        policy: `strict` stops; `mask` drops the tokens that these rows predict from the loss; `live` keeps them.
        mask: `[B, T]` bool, position t true where the loss counts the token predicted there.
        routed, missing: `[B, T]` bool, rows with a route and rows without one (`layout.assemble`).

    Returns:
        The loss mask to use, and what was found.

    Raises:
        UserError: `strict`, and a row is missing.
    """
    validate_missing_policy(policy)
    rows = int(missing.sum())
    if policy == "strict" and rows:
        raise UserError(
            f"{rows} of {rows + int(routed.sum())} tokens of the rollouts have no route: set replay.missing=mask to "
            "drop them from the loss, or replay.missing=live to let the router choose"
        )
    kept = mask & ~missing if policy == "mask" else mask
    tokens = int(mask.sum())
    return kept, MissingCounts(rows, rows + int(routed.sum()), tokens - int(kept.sum()), tokens)


def validate_missing_policy(policy: str) -> None:
    """Refuse an unknown policy.

    Raises:
        UserError: names the setting.
    """
    if policy not in POLICIES:
        raise UserError(f"replay.missing is {policy!r}: choose {', '.join(POLICIES[:-1])} or {POLICIES[-1]}")


def last_version_rows(rows: int, prompt_length: int, starts: list[int]) -> np.ndarray:
    """Rows of a sample that belong to the weights it ended with.

    After a weight update in mid-sample SGLang computes what came before again, and returns the *new* weights' routes
    beside the old weights' log-probabilities. Only rows that predicted tokens of the last span are what they seem.

    Args:
        rows: of the sample's routes; row t predicts token t + 1.
        starts: first response token of each weight version's span, counted from 0, in order.

    Returns:
        `[rows]` bool; all true where the version never changed.
    """
    first = prompt_length + starts[-1] - 1 if len(starts) > 1 else 0
    return np.arange(rows) >= first


settle, of_last_version = apply_missing_policy, last_version_rows  # the names that earlier releases documented
