"""Selection of experts by shifted logits while routes are recorded: only the selection is shifted, not the weights."""

from collections.abc import Callable
from typing import Any

import torch

LogitShift = Callable[[int, torch.Tensor], torch.Tensor]
"""Index of a layer among the rank's MoE layers, its router's input `[…, H]` → `[rows, experts]` float32."""


def record_shifted_topk(
    handle: Any,
    shift: torch.Tensor,
    is_softmax: bool,
    scores: torch.Tensor,
    topk: int,
    num_groups: int | None = None,
    group_topk: int | None = None,
    default_compute_topk: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Record the top-k of shifted logits, and return it with the scores that are not shifted.

    It stands for `RouterReplay.get_replay_topk` of the handle, whose other arguments it takes. A shifted softmax is
    proportional to score · e^shift, which keeps the order of all scores where the shift is 0.

    Args:
        handle: the router's `RouterReplay`.
        shift: `[rows, experts]` float32.
        is_softmax: whether `scores` are the logits' softmax (`moe_router_pre_softmax`), not the logits.
        scores: `[rows, experts]`.
        topk: number of experts.
        num_groups: of experts, if they are chosen within groups.
        group_topk: number of groups.
        default_compute_topk: Megatron's selection.

    Returns:
        Scores and ids, `[rows, topk]` each.
    """
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    shifted = wide * (shift - shift.amax(dim=-1, keepdim=True)).exp() if is_softmax else wide + shift
    ids: torch.Tensor = default_compute_topk(shifted, topk, num_groups=num_groups, group_topk=group_topk)[1]
    handle.record_indices(ids)
    return scores.gather(1, ids), ids
