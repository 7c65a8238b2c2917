"""What the routers of one rank do in an update with live routing: their losses and the experts' load."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from megatron_bai.model import router_losses
from megatron_bai.monitor.metrics.router_metrics import add_expert_counts
from megatron_bai.monitor.stats import Stats


@contextmanager
def measure_routers(routers: Mapping[int, Any], columns: Sequence[int]) -> Iterator[Stats]:
    """Measure the passes within the block that have a gradient: those of one update.

    Args:
        routers: this rank's `TopKRouter`s, by decoder layer.
        columns: the same layers, counted among MoE layers alone.

    Yields:
        Statistics that are complete when the block has ended, to be summed over all ranks: the load of each expert
        without padding, and `load_balancing_loss` and `z_loss`, if they are set, without their coefficients: means over
        micro-batches and layers.
    """
    stats, calls = Stats(), dict.fromkeys(routers, 0)
    loads: dict[int, torch.Tensor] = {}

    def count(router: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Count a router's choices: `[S · B, E]` of the tokens that its `[S, B]` mask does not call padding."""
        if not torch.is_grad_enabled():
            return  # repeated in the backward pass
        layer, padding = router.layer_number - 1, inputs[1]
        counts = (output[1] & ~padding.reshape(-1, 1)).sum(dim=0)
        loads[layer] = loads[layer] + counts if layer in loads else counts
        calls[layer] += 1

    for _, values in router_losses.recorded_losses():
        values.zero_()
    hooks = [router.register_forward_hook(count) for router in routers.values()]
    try:
        yield stats
    finally:
        for hook in hooks:
            hook.remove()
    for column, (layer, router) in zip(columns, routers.items(), strict=True):
        add_expert_counts(stats, loads[layer], column)
        share = calls[layer] / router.tp_cp_group.size()  # whose ranks have parts of a micro-batch's loss
        names = {router_losses.Z_LOSS: router_losses.Z_LOSS} if router.config.moe_z_loss_coeff else {}
        if recorded := router_losses.BALANCING.get(router.routing_type):
            names[recorded] = "load_balancing_loss"
        for name, values in router_losses.recorded_losses():
            if name in names:
                stats.ratio(names[name], float(values[layer]), share)
