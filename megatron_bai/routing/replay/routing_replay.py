"""Record the experts a Megatron-Core model chooses, and force chosen ones, on its native `RouterReplay`.

R2 (arXiv 2512.01374) records in the training engine's old-policy forward and replays in each update. R3 (arXiv
2510.11370) replays the inference engine's experts in both. Only the selection is forced: the weights are computed
from the live scores, so the router keeps its gradient.

A context manager spans one run of a schedule over its micro-batches. For each layer it holds a queue with one entry a
micro-batch, and two cursors: one for forward passes, one for those that activation recomputation repeats inside the
backward pass. Megatron's own queues hold something only while a router runs.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from megatron_bai.routing.replay import preflight
from megatron_bai.routing.replay.replay_pass import MicroRoutes, ReplayPass
from megatron_bai.routing.replay.router_binding import bind_routers, moe_layer_indices
from megatron_bai.routing.replay.shifted_topk import LogitShift, record_shifted_topk
from megatron_bai.routing.routes import RouteSignature


class RoutingReplay:
    """The routers of one rank's model.

    Attributes:
        signature: of the whole model's routes.
        routers: Megatron's, by the MoE layers on this rank, counted from 0 among all decoder layers.
        layers: those layers.
        columns: the same, counted among MoE layers only: indices into routes of the whole model.
        routers: of these layers, by layer.
        rows: (token, layer) rows forced in forward passes so far, checked against what the router did. Padding and live
            rows are not counted.
        recomputed: the same of passes repeated in the backward.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], pipeline_group: Any = None):
        """Bind to every MoE layer of a model built with `moe_enable_routing_replay=True`. Collective over its pipeline.

        Args:
            chunks: this rank's model chunks, wrapped or not; several with virtual pipeline parallelism.
            pipeline_group: of the pipeline's ranks; None takes Megatron's.

        Raises:
            UserError: another megatron-core, or a setting that replay does not work with.
            RuntimeError: the layers bound over the pipeline are not exactly the model's MoE layers.
        """
        from megatron.core import parallel_state
        from megatron.core.utils import get_model_config

        preflight.check_version()
        config = get_model_config(chunks[0])
        for message in preflight.preflight(config):
            warnings.warn(message, stacklevel=2)
        if pipeline_group is None and parallel_state.model_parallel_is_initialized():
            pipeline_group = parallel_state.get_pipeline_model_parallel_group()
        expected = moe_layer_indices(config)
        self.signature = RouteSignature(len(expected), config.num_moe_experts, config.moe_router_topk)
        self.routers = bind_routers(chunks, expected, pipeline_group)
        self.layers = list(self.routers)
        self.columns = [expected.index(layer) for layer in self.layers]
        # Whether a bias moves by the load: then it is that of the experts which the router itself would choose
        self.moves_bias = bool(config.moe_router_enable_expert_bias and config.moe_router_bias_update_rate)
        self.rows = self.recomputed = 0
        self._pass: ReplayPass | None = None
        self._shift: LogitShift | None = None

    @contextmanager
    def record(self, shift: LogitShift | None = None) -> Iterator[list[MicroRoutes]]:
        """Record what the routers choose while a schedule runs.

        Args:
            shift: added to the logits for the selection alone: weights still come from the live scores. For routers
                with softmax scores. None adds nothing.

        Yields:
            A list that holds one entry a micro-batch once the block has ended without an exception.

        Raises:
            RuntimeError: a router did not run as often as the others, or does not run.
        """
        recorded: list[MicroRoutes] = []
        with self._hooked(ReplayPass(self.layers, self.signature, forces=False), shift) as run:
            yield recorded
        recorded.extend(run.recorded_routes())

    @contextmanager
    def force(self, routes: Sequence[MicroRoutes] | None) -> Iterator[None]:
        """Force experts while a schedule runs: `routes[i]` in the i-th forward pass, and where it is recomputed.

        Megatron's schedules (1F1B, interleaved) work, and any loop that steps back through micro-batches in the order
        of their forward passes.

        Args:
            routes: of each micro-batch; None: the routers choose.

        Raises:
            ValueError: routes that do not fit this model, before anything runs.
            RuntimeError: a router that did not run once for each micro-batch, or did not choose what it was given.
        """
        if routes is None:
            yield
            return
        with self.force_added() as add:
            for micro in routes:
                add(micro)
            yield

    @contextmanager
    def force_added(self) -> Iterator[Callable[[MicroRoutes], None]]:
        """Force experts as `force` does, where routes are known only when their micro-batch is read.

        Yields:
            A function that adds the routes of the next micro-batch, before its forward pass. It raises a ValueError for
            routes that do not fit this model.

        Raises:
            RuntimeError: as `force`.
        """
        with self._hooked(ReplayPass(self.layers, self.signature, forces=True)) as run:
            yield run.add
        self.rows += run.num_checked(backward=False)
        self.recomputed += run.num_checked(backward=True)

    @contextmanager
    def _hooked(self, run: ReplayPass, shift: LogitShift | None = None) -> Iterator[ReplayPass]:
        """Register hooks on the routers for the length of a block, and check afterwards that every queue ended."""
        if self._pass is not None:
            raise RuntimeError("routing replay is already recording or forcing: its blocks do not nest")
        self._pass, self._shift, hooks = run, shift, []
        try:
            for router in self.routers.values():
                hooks.append(router.register_forward_pre_hook(self._pre_hook))
                hooks.append(router.register_forward_hook(self._post_hook))
            yield run
        finally:  # after an error too the next pass is a live one
            self._pass = self._shift = None
            for hook in hooks:
                hook.remove()
            for router in self.routers.values():
                _clear_handle(router.router_replay)
        run.check_complete()

    def _pre_hook(self, router: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        """Set one router's replay handle for one call."""
        from megatron.core.transformer.moe.router_replay import RouterReplayAction

        assert self._pass is not None, "the hooks are there for the length of a block"
        run, layer, handle = self._pass, router.layer_number - 1, router.router_replay
        if in_backward():
            index = run.next_index(layer, backward=True)
            run.check_input(layer, index, inputs[0])
            action = RouterReplayAction.REPLAY_BACKWARD
        else:
            index = run.next_index(layer, backward=False)
            run.remember_input(layer, inputs[0])
            action = RouterReplayAction.RECORD if run.routes is None else RouterReplayAction.REPLAY_FORWARD
        if action is not RouterReplayAction.RECORD:
            ids, rows = run.layer_queues[layer][index], inputs[0].shape[:-1].numel()
            if len(ids) != rows:
                raise RuntimeError(f"the router of layer {layer} sees {rows} tokens, its routes are for {len(ids)}")
            handle.set_target_indices(ids.to(inputs[0].device, torch.int64))
            live = None
            if run.routes is not None and action is RouterReplayAction.REPLAY_FORWARD:
                live = run.routes[index].live  # recomputation repeats what they were
            if live is not None or self.moves_bias:
                handle.get_replay_topk = functools.partial(_replay_topk, handle, live)
        elif self._shift is not None:
            assert router.score_function == "softmax", "the shift is one of a softmax's logits"
            shift = self._shift(self.layers.index(layer), inputs[0])
            handle.get_replay_topk = functools.partial(
                record_shifted_topk, handle, shift, router.config.moe_router_pre_softmax
            )
        handle.set_router_replay_action(action)

    def _post_hook(self, router: Any, inputs: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Record what the router chose, or check that it chose what it was given; clear its replay handle."""
        assert self._pass is not None
        run, layer, handle, chosen = self._pass, router.layer_number - 1, router.router_replay, output[1]
        backward, target = in_backward(), handle.target_topk_idx
        if run.routes is None and not backward:
            run.layer_queues[layer].append(handle.get_recorded_indices().to(_dtype(self.signature)))
        else:
            index = run.cursor(layer, backward) - 1
            micro = None if run.routes is None else run.routes[index]
            same = (chosen.sum(dim=1) == self.signature.topk) & chosen.gather(1, target).all(dim=1)
            run.check_choice(layer, backward, same, micro)
            if micro is not None and micro.live is not None and not backward:
                # recomputation repeats the live choice
                run.layer_queues[layer][index] = target.to(_dtype(self.signature))
            if micro is not None and self.moves_bias and torch.is_grad_enabled():
                _count_own_choice(router, chosen, micro)
        _clear_handle(handle)


def _dtype(signature: RouteSignature) -> torch.dtype:
    """Return torch's dtype of expert ids."""
    dtype: torch.dtype = getattr(torch, signature.dtype.__name__)
    return dtype


def in_backward() -> bool:
    """Return whether autograd is running a backward pass in this thread.

    A forward then is activation recomputation, of any implementation (Megatron's, Transformer Engine's or torch's).
    """
    return torch._C._current_graph_task_id() != -1


def _replay_topk(
    handle: Any,
    live: torch.Tensor | None,
    scores: torch.Tensor,
    topk: int,
    num_groups: int | None = None,
    group_topk: int | None = None,
    default_compute_topk: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replay as `RouterReplay.get_replay_topk` does, but keep the router's own choice: in rows of `live`, and aside."""
    handle.own_choice = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)[1]
    if live is not None:
        handle.target_topk_idx = torch.where(
            live.to(handle.own_choice.device)[:, None], handle.own_choice, handle.target_topk_idx
        )
    chosen: tuple[torch.Tensor, torch.Tensor] = type(handle).get_replay_topk(
        handle, scores, topk, num_groups, group_topk, default_compute_topk
    )
    return chosen


def _count_own_choice(router: Any, chosen: torch.Tensor, micro: MicroRoutes) -> None:
    """Count in the load that moves the expert bias what the router would have chosen, without padding.

    Megatron-Core has added the experts that were forced. They say nothing of what the bias does: with several updates
    on one batch it would go on in one direction.
    """
    own_choice: torch.Tensor = router.router_replay.own_choice
    rows = micro.checked if micro.live is None or micro.checked is None else micro.checked | micro.live
    if rows is not None:
        own_choice = own_choice[rows.to(own_choice.device)]
    counts = torch.bincount(own_choice.flatten(), minlength=chosen.shape[1])
    router.local_tokens_per_expert += counts - chosen.sum(dim=0)


def _clear_handle(handle: Any) -> None:
    """Clear one router's replay handle: its action and its routes."""
    handle.clear_router_replay_action()
    handle.clear_indices()
    handle.__dict__.pop("get_replay_topk", None)
    handle.__dict__.pop("own_choice", None)
