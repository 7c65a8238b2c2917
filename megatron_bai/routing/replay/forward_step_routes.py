"""R3 in a loop that reads each micro-batch, with its routes, in a forward step of its own (docs/replay.md).

So do Megatron-LM's `pretrain_gpt.py`, verl and slime: `train_step` calls Megatron's schedule, and the schedule calls
the forward step once for each micro-batch and model chunk.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from megatron_bai.routing.layout import Place, filler_routes
from megatron_bai.routing.replay.replay_pass import MicroRoutes
from megatron_bai.routing.replay.routing_replay import RoutingReplay


class ForwardStepRoutes:
    """Forces the routes that a forward step finds in its micro-batch.

    `wrap` goes around the schedule, `install` into the forward step, on every pipeline stage.

    Attributes:
        replay: of this rank's model; counts what was forced.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], pipeline_group: Any = None):
        """Bind to every MoE layer, as `RoutingReplay` does. Collective over the pipeline.

        Args:
            chunks: this rank's model chunks, wrapped or not; several with virtual pipeline parallelism.
            pipeline_group: of the pipeline's ranks; None takes Megatron's.

        Raises:
            UserError: another megatron-core, or a setting that replay does not work with.
        """
        from megatron.core.utils import get_model_config

        self.replay = RoutingReplay(chunks, pipeline_group)
        self._config = get_model_config(chunks[0])
        self._add: Callable[[MicroRoutes], None] | None = None
        self._added: list[MicroRoutes] = []
        self._num_steps: dict[int, int] = {}  # forward steps of each model chunk, by its id

    def wrap(self, forward_backward_func: Callable[..., Any]) -> Callable[..., Any]:
        """Return a schedule that forces what its forward steps install, and checks at its end that it was used.

        Args:
            forward_backward_func: of Megatron's `get_forward_backward_func`, or another that takes the same arguments.

        Returns:
            A function of the same arguments. It raises a RuntimeError where a micro-batch had no routes installed, or a
            router did not choose what it was given.
        """

        @functools.wraps(forward_backward_func)
        def run_schedule(*args: Any, **named: Any) -> Any:
            with self.replay.force_added() as add:
                self._add, self._added, self._num_steps = add, [], {}
                try:
                    return forward_backward_func(*args, **named)
                finally:
                    self._add, self._added = None, []

        return run_schedule

    def install(
        self,
        model: torch.nn.Module,
        ids: torch.Tensor | np.ndarray,
        routed: torch.Tensor | np.ndarray | None = None,
        missing: torch.Tensor | np.ndarray | None = None,
        lengths: Sequence[int] | None = None,
    ) -> None:
        """Install the routes of one micro-batch; a forward step calls it before the model.

        Args:
            model: the model chunk that the forward step was given.
            ids: `[B, T, layers, topk]` expert ids of any integer dtype, before context and sequence parallelism split
                T; layers are the whole model's MoE layers or this rank's. Row t holds the experts of input token t.
            routed: `[B, T]` bool, rows that hold a route; what others hold is not read. None: all that are not missing.
            missing: `[B, T]` bool, rows without a known route, which the router routes itself. None: no row. What is in
                neither is padding.
            lengths: padded lengths of packed sequences (thd), which sum to T; None for a padded batch.

        Raises:
            RuntimeError: outside a wrapped schedule; or another model chunk had other routes in this micro-batch.
            ValueError: ids or masks that do not fit the model.
        """
        if self._add is None:
            raise RuntimeError("routes are installed outside a schedule: call the one that `wrap` returned")
        micro = self._make_routes(_to_tensor(ids), _to_tensor(routed), _to_tensor(missing), lengths)
        index = self._num_steps.get(id(model), 0)
        self._num_steps[id(model)] = index + 1
        if index == len(self._added):
            self._add(micro)
            self._added.append(micro)
        elif not torch.equal(self._added[index].ids, micro.ids):  # of another chunk, in virtual pipeline parallelism
            raise RuntimeError(f"the model chunks of this rank were given different routes in micro-batch {index}")

    def _make_routes(
        self,
        ids: torch.Tensor | None,
        routed: torch.Tensor | None,
        missing: torch.Tensor | None,
        lengths: Sequence[int] | None,
    ) -> MicroRoutes:
        """Select this rank's layers and rows, with `filler_routes` in rows that hold no route."""
        signature, columns = self.replay.signature, self.replay.columns
        assert ids is not None
        layers = (signature.moe_layers, len(columns))
        if ids.dim() != 4 or ids.shape[2] not in layers or ids.shape[3] != signature.topk or ids.is_floating_point():
            needed = f"[B, T, {signature.moe_layers}, {signature.topk}]"
            raise ValueError(f"routes are {ids.dtype} {tuple(ids.shape)}, the model needs {needed}")
        for name, mask in (("routed", routed), ("missing", missing)):
            if mask is not None and (mask.shape != ids.shape[:2] or mask.dtype != torch.bool):
                raise ValueError(f"`{name}` is {mask.dtype} {tuple(mask.shape)}, not bool {tuple(ids.shape[:2])}")
        if ids.shape[2] != len(columns):
            ids = ids[:, :, columns]
        if missing is None:
            missing = ids.new_zeros(ids.shape[:2], dtype=torch.bool)
        if routed is None:
            routed = ~missing
        filler = torch.from_numpy(filler_routes(routed.numel(), signature, columns)).view(ids.shape)
        ids = torch.where(routed[:, :, None, None], ids, filler.to(ids.device, ids.dtype))
        rows = Place.here(self._config).rows
        return MicroRoutes(rows(ids, lengths), rows(routed, lengths), rows(missing, lengths))


def _to_tensor(values: torch.Tensor | np.ndarray | None) -> torch.Tensor | None:
    """Return an array as a tensor; uint16, for which torch lacks kernels, as int32."""
    if isinstance(values, np.ndarray):
        values = torch.from_numpy(values.astype(np.int32) if values.dtype == np.uint16 else values)
    return values
