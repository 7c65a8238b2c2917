"""Replace the weights of forced experts by those of the inference engine, to see what their difference does.

A diagnosis, and no kind of replay: a gradient through weights that are not the router's own would teach it nothing. It
belongs around a forward pass without gradient in which `RoutingReplay.force` forces the same experts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from megatron_bai.routing.replay.replay_pass import MicroRoutes
from megatron_bai.routing.replay.routing_replay import RoutingReplay


@dataclass
class WeightGap:
    """Differences of the weights that replaced a router's own from these, over this rank's rows and layers.

    Attributes:
        total: Σ |difference|, `[]` float64.
        count: of weights replaced.
        largest: |difference|, `[]` float64.
    """

    total: torch.Tensor
    count: int
    largest: torch.Tensor


@contextmanager
def force_weights(
    replay: RoutingReplay, routes: Sequence[MicroRoutes], weights: Sequence[torch.Tensor]
) -> Iterator[WeightGap]:
    """Replace routers' weights of given experts while a schedule runs forward, without gradient.

    Rows that are padding or routed live keep the router's weights.

    Args:
        replay: of the model; it forces `routes` in the same run of the schedule.
        routes: of each micro-batch.
        weights: of their experts, `[rows, layers, topk]` of a float dtype each, in the order of `MicroRoutes.ids`: what
            the router would multiply the experts' outputs by, its scaling factor included.

    Yields:
        What the weights differ by from those that the routers computed, of what the layers before made with replaced
        weights. Complete when the block has ended.

    Raises:
        ValueError: weights that are not those of the routes, before anything runs.
        RuntimeError: a pass with gradient, or a router that did not run once for each micro-batch.
    """
    for index, (micro, own) in enumerate(zip(routes, weights, strict=True)):
        if own.shape != micro.ids.shape or not own.is_floating_point():
            needed = f"[{', '.join(map(str, micro.ids.shape))}]"
            raise ValueError(
                f"micro-batch {index}: weights are {own.dtype} {tuple(own.shape)}, its routes need {needed}"
            )
    zero = torch.zeros((), dtype=torch.float64)
    gap, hooks, ran = WeightGap(zero, 0, zero), [], [0] * len(replay.routers)

    def replace(router: Any, inputs: Any, output: tuple[torch.Tensor, torch.Tensor], layer: int) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("weights are replaced in passes without gradient alone")
        if ran[layer] == len(routes):
            raise RuntimeError(f"a router ran more often than the {len(routes)} micro-batches with weights")
        micro, wanted = routes[ran[layer]], weights[ran[layer]][:, layer]
        ran[layer] += 1
        probs, chosen = output
        ids = micro.ids[:, layer].to(probs.device, torch.int64)
        own, wanted = probs.gather(1, ids), wanted.to(probs)
        rows = _forced_rows(micro).to(probs.device)
        differences = (wanted - own)[rows].double().abs()
        gap.total, gap.count = gap.total.to(probs.device) + differences.sum(), gap.count + differences.numel()
        if differences.numel():
            gap.largest = torch.maximum(gap.largest.to(probs.device), differences.max())
        return probs.scatter(1, ids, torch.where(rows[:, None], wanted, own)), chosen

    try:
        for layer, router in enumerate(replay.routers.values()):
            hooks.append(router.register_forward_hook(partial(replace, layer=layer)))
        yield gap
    finally:
        for hook in hooks:
            hook.remove()
    if set(ran) - {len(routes)}:
        raise RuntimeError(f"routers ran for {ran} of {len(routes)} micro-batches with weights")


def _forced_rows(micro: MicroRoutes) -> torch.Tensor:
    """Return the rows of a micro-batch whose experts are the inference engine's, `[rows]` bool."""
    rows = torch.ones_like(micro.ids[:, 0, 0], dtype=torch.bool) if micro.checked is None else micro.checked
    return rows if micro.live is None else rows & ~micro.live
