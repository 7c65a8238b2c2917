"""Record the experts a Megatron-Core model chooses, and force chosen ones, on its native `RouterReplay`.

R2 (arXiv 2512.01374) records in the training engine's old-policy forward and replays in each update. R3 (arXiv
2510.11370) replays the inference engine's experts in both. Only the selection is forced: the weights are computed
from the live scores, so the router keeps its gradient.

Handles are found by walking the live model and keyed by the layer's global number. Megatron's own list of handles
keeps those of models built earlier, and replaying into them would silently do nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_bai.routing.routes import RouteSignature

MicroRoutes = dict[int, torch.Tensor]
"""Routes of one micro-batch on one rank: MoE layer → `[tokens here, topk]` int64 expert ids."""


@dataclass
class _Micro:
    """What is being replayed in the current forward pass."""

    routes: MicroRoutes
    counted: torch.Tensor  # [tokens here] bool: rows that came from a recording


class RoutingReplay:
    """The routers of one rank's model.

    Attributes:
        layers: MoE layers on this rank, counted from 0 over the whole model.
        rows: (token, layer) rows forced so far, checked against what the router really did; padding not counted.
    """

    def __init__(self, modules: list[torch.nn.Module], signature: RouteSignature, pipeline_group: Any = None):
        """Bind to every MoE layer of `modules`. Collective over `pipeline_group` when given.

        Raises:
            RuntimeError: the layers bound over the pipeline are not exactly the model's MoE layers.
        """
        from megatron.core.transformer.moe.router import TopKRouter

        self.signature = signature
        self._routers: dict[int, Any] = {}
        for module in modules:
            for child in module.modules():
                if isinstance(child, TopKRouter) and child.router_replay is not None:
                    self._routers[child.layer_number - 1] = child
        self.layers = sorted(self._routers)
        found = [self.layers]
        if pipeline_group is not None:
            found = [[] for _ in range(dist.get_world_size(pipeline_group))]
            dist.all_gather_object(found, self.layers, group=pipeline_group)
        bound = sorted(layer for part in found for layer in part)
        if bound != list(range(signature.moe_layers)):
            raise RuntimeError(f"routing replay bound MoE layers {bound}, the model has {signature.moe_layers}")
        self._recording: MicroRoutes | None = None
        self._micro: _Micro | None = None
        self._done: set[int] = set()
        self.rows = 0
        for router in self._routers.values():
            router.register_forward_hook(self._after)

    @contextmanager
    def record(self, into: list[MicroRoutes]) -> Iterator[None]:
        """Append the experts the routers choose in one micro-batch's forward pass to `into`.

        Raises:
            RuntimeError: a bound router did not run, or ran twice.
        """
        recording = self._recording = {}
        with self._action("RECORD"):
            yield
        into.append(recording)

    @contextmanager
    def replay(self, routes: MicroRoutes, counted: torch.Tensor) -> Iterator[None]:
        """Force the experts of one micro-batch's forward pass.

        Args:
            routes: for every MoE layer on this rank.
            counted: `[tokens here]` bool, rows to count in `rows`.

        Raises:
            RuntimeError: a bound router did not run, ran twice, or did not choose what it was given.
        """
        self._micro = _Micro(routes, counted)
        with self._action("REPLAY_FORWARD"):
            yield

    @contextmanager
    def _action(self, name: str) -> Iterator[None]:
        from megatron.core.transformer.moe.router_replay import RouterReplayAction

        self._done = set()
        try:
            for layer, router in self._routers.items():
                if self._micro is not None:
                    router.router_replay.set_target_indices(self._micro.routes[layer])
                router.router_replay.set_router_replay_action(RouterReplayAction[name])
            yield
        finally:  # whatever happened, the next pass is a live one
            self._recording = self._micro = None
            for router in self._routers.values():
                router.router_replay.clear_router_replay_action()
                router.router_replay.clear_indices()
        if missing := set(self._routers) - self._done:
            raise RuntimeError(f"routers of MoE layers {sorted(missing)} did not run: their routing was not replayed")

    def _after(self, router: Any, inputs: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        """After a router ran: keep what it chose, or prove that it chose what it was given."""
        if self._recording is None and self._micro is None:
            return
        layer = router.layer_number - 1
        if layer in self._done:
            raise RuntimeError(f"the router of MoE layer {layer} ran twice in one micro-batch")
        self._done.add(layer)
        if self._recording is not None:
            self._recording[layer] = router.router_replay.get_recorded_indices()
            return
        chosen, wanted = output[1], self._micro.routes[layer]
        same = (chosen.sum(dim=1) == self.signature.topk) & chosen.gather(1, wanted).all(dim=1)
        if not bool(same.all()):
            raise RuntimeError(f"the router of MoE layer {layer} bypassed replay in {int((~same).sum())} rows")
        self.rows += int((same & self._micro.counted).sum())


def differing(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Rows whose expert *sets* differ.

    Args:
        ours, theirs: `[rows, topk]` expert ids, distinct within a row, in any order.

    Returns:
        `[rows]` bool.
    """
    return (ours.sort(dim=-1).values != theirs.sort(dim=-1).values).any(dim=-1)
