"""Checks, before training, for what would bypass or break replay in Megatron-Core.

Each entry is a setting of its `TransformerConfig`, read where the router's code reads it
(`transformer/moe/{router,moe_utils,router_replay}.py`, `pipeline_parallel/schedules.py`).
"""

from typing import Any

from megatron_bai.compat import releases
from megatron_bai.errors import UserError

BALANCING = {"none", "aux_loss", "seq_aux_loss", "global_aux_loss"}  # load balancing that leaves the selection to top-k


def check_version() -> None:
    """Refuse a Megatron-Core that was not run, whose routers might ignore replay without an error.

    Raises:
        UserError: names the release found and those that were run.
    """
    installed = releases.installed_megatron()
    if not releases.is_admitted(installed):
        raise UserError(
            f"routing replay was run with megatron-core {releases.list_megatron()}, but {installed or 'none'} is "
            f"installed: install megatron-core=={releases.MEGATRON_CORE}"
        )


def preflight(config: Any) -> list[str]:
    """Refuse a model whose routers cannot be replayed.

    Args:
        config: Megatron's `TransformerConfig`.

    Returns:
        Warnings about settings that work, but may not do what was meant.

    Raises:
        UserError: names every setting in the way, and why.
    """
    if faults := _find_faults(config):
        raise UserError("routing replay cannot work with " + "; ".join(faults))
    return _find_warnings(config)


def _balancing_types(config: Any) -> list[str]:
    """Return `moe_router_load_balancing_type` as a list."""
    types = config.moe_router_load_balancing_type
    return types if isinstance(types, list) else [types]


def _find_faults(config: Any) -> list[str]:
    """List the settings under which routers cannot be replayed, with the reasons."""
    release = releases.megatron_release()
    faults = [
        (not config.num_moe_experts, "num_moe_experts unset: the model has no routers"),
        (not config.moe_enable_routing_replay, "moe_enable_routing_replay=False: routers have no replay handle"),
        (config.moe_router_fusion, "moe_router_fusion: the fused kernel returns before the replay hook"),
        (
            config.moe_expert_capacity_factor is not None or config.moe_pad_expert_input_to_capacity,
            "moe_expert_capacity_factor: tokens are dropped after replay chose their experts",
        ),
        (
            config.moe_router_force_load_balancing,
            "moe_router_force_load_balancing: the weights would come from random scores",
        ),
        (
            _cuda_graph_has_router(config),
            f"{release.graph_setting} with the router in it: a graph repeats the routes it captured",
        ),
        (
            config.overlap_moe_expert_parallel_comm,
            "overlap_moe_expert_parallel_comm: it reorders forward and backward passes of micro-batches",
        ),
    ]
    messages = [message for is_fault, message in faults if is_fault]
    messages += [
        f"{name}={value}: {reason}"
        for name, reason in release.refused_settings.items()
        if (value := getattr(config, name, None)) is not None
    ]
    messages += [
        f"moe_router_load_balancing_type={balancing}: its selection bypasses the replay hook"
        for balancing in _balancing_types(config)
        if balancing not in BALANCING
    ]
    return messages


def _cuda_graph_has_router(config: Any) -> bool:
    """Return whether a CUDA graph contains a router: a layer (an empty scope), `moe`, `moe_router` or an iteration."""
    if getattr(config, "cuda_graph_impl", "none") == "none":
        return bool(config.enable_cuda_graph or config.external_cuda_graph)
    graphed = getattr(config, releases.megatron_release().graph_setting)
    scopes = {getattr(scope, "name", scope) for scope in graphed}
    return not scopes or bool(scopes & {"full", "full_iteration", "moe", "moe_router", "moe_preprocess"})


def _find_warnings(config: Any) -> list[str]:
    """List settings of load balancing that act on the experts replayed or on those not used."""
    coefficients = config.moe_aux_loss_coeff
    coefficients = coefficients if isinstance(coefficients, list) else [coefficients]
    messages = []
    pairs = zip(_balancing_types(config), coefficients, strict=False)
    if any(balancing != "none" and coefficient for balancing, coefficient in pairs):
        messages.append(
            "moe_aux_loss_coeff > 0: the auxiliary loss balances the experts that the live router would choose, not "
            "those replayed"
        )
    return messages
