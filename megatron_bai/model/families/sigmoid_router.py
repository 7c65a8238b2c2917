"""Routers that score with a sigmoid and choose with a bias, some groups first (DeepSeek-V3, arXiv 2412.19437).

Several families have them, under the same keys of `config.json` but for that of the bias.
"""

from typing import Any

from megatron_bai.errors import UserError
from megatron_bai.model.families.architecture import Architecture
from megatron_bai.model.families.requirements import require_size

_SCORED = 2  # experts of a group by which it is chosen, in transformers, SGLang and the published models


def sigmoid_router_arguments(model: Architecture, expert_bias: bool = True) -> dict[str, Any]:
    """Return Megatron-Core's arguments for `norm_topk_prob`, `routed_scaling_factor`, `n_group` and `topk_group`.

    Args:
        model: the architecture.
        expert_bias: whether the router chooses with a bias.

    Raises:
        UserError: a router that Megatron-Core computes otherwise, which would be another model without a word.
    """
    values, topk = model.values, model.moe_topk
    normalised = values.get("norm_topk_prob", True)
    if bool(normalised) != (topk > 1):  # Megatron-Core normalises where there is more than one
        raise UserError(f"norm_topk_prob is {normalised!r}, only {topk > 1} is supported with {topk} experts a token")
    scale = values.get("routed_scaling_factor")
    scale = 1.0 if scale is None else scale
    require_size("routed_scaling_factor", scale, may_be_float=True)
    return {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": expert_bias,
        "moe_router_topk_scaling_factor": float(scale),
        **router_group_arguments(model),
    }


def router_group_arguments(model: Architecture) -> dict[str, int]:
    """Return Megatron-Core's arguments for `n_group` and `topk_group`; none where all experts may be chosen.

    A group's score is the sum of its two best experts' in the published models, and of its topk/topk_group best in
    Megatron-Core: the same only where topk = 2 · topk_group.

    Args:
        model: the architecture; a key that is missing or null means one group.

    Raises:
        UserError: groups that Megatron-Core scores otherwise, or that are none.
    """
    groups, chosen = (_require_count(name, model.values.get(name)) for name in ("n_group", "topk_group"))
    experts, topk = model.num_experts, model.moe_topk
    if experts % groups:
        raise UserError(f"n_group is {groups}, which does not divide the {experts} experts")
    if chosen > groups:
        raise UserError(f"topk_group is {chosen}, more than the {groups} groups (n_group)")
    if topk > chosen * experts // groups:
        raise UserError(f"topk_group is {chosen}: so many groups have fewer than the {topk} experts of a token")
    if chosen == groups:
        return {}
    if topk != _SCORED * chosen:
        raise UserError(
            f"topk_group is {chosen} of {groups} groups (n_group) and num_experts_per_tok {topk}: Megatron-Core scores"
            f" a group by its {topk // chosen} best experts, the published model by its {_SCORED}; supported is"
            f" num_experts_per_tok = {_SCORED} · topk_group"
        )
    return {"moe_router_num_groups": groups, "moe_router_group_topk": chosen}


def _require_count(name: str, value: Any) -> int:
    """Return a number of groups, 1 where it is not said."""
    if value is None:
        return 1
    if type(value) is not int or value < 1:
        raise UserError(f"{name} is {value!r}, which is no number of groups")
    return value
