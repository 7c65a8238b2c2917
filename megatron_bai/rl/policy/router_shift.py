"""How far the actor's routers have moved since the step's first update, by token (RSPO, arXiv 2510.23027).

Δ of a token is the mean, over the MoE layers and over the experts that π_old used for it, of |log p_θ − log p_old|,
p the router's scores of all experts. It is measured in a forward pass of its own before each update but a step's first,
where nothing has moved: a pipeline's last stage computes the loss of a micro-batch and needs all other stages' layers
by then.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_bai import config
from megatron_bai.rl.batches.stages import TrainingBatch
from megatron_bai.rl.policy.training_engine import TrainingEngine
from megatron_bai.routing.replay.replay_pass import MicroRoutes
from megatron_bai.routing.replay.router_scores import RouterScores, compare_scores, record_scores


class RouterShift:
    """The scores of π_old's routers in a step, and the measurement of Δ against them.

    Attributes:
        is_enabled: whether the objective needs Δ; if not, nothing is recorded or measured.
    """

    def __init__(self, engine: TrainingEngine, objective: config.Objective):
        self.is_enabled = isinstance(objective, config.RouterShifted) and objective.router_shift
        self._engine = engine
        self._old: list[RouterScores] = []

    @contextmanager
    def record(self, count: int) -> Iterator[None]:
        """Record the routers' scores in the first pass of a block, which scores π_old, in place of those before.

        Args:
            count: micro-batches of a pass.
        """
        if not self.is_enabled:
            yield
            return
        with record_scores(self._engine.replay, count) as scores:
            yield
        self._old = scores

    def measure(
        self, micro_batches: list[TrainingBatch], routes: list[MicroRoutes] | None, first: int
    ) -> list[TrainingBatch]:
        """Return micro-batches with Δ under the current weights as `router_shift`, if it is enabled. Collective.

        Args:
            micro_batches: of the mini-batch of the next update.
            routes: that the update replays, one entry a micro-batch; None lets the routers choose.
            first: index of the first micro-batch among those of the step.
        """
        from megatron.core import parallel_state

        if not self.is_enabled:
            return micro_batches
        engine, count = self._engine, len(micro_batches)
        batch, length = micro_batches[0].pack(micro_batches[0].tokens).shape
        ranks = engine.place.tensor[1]
        assert engine.place.context[1] == 1, "the trainer's layouts have no context parallelism"
        total = torch.zeros(count, length // ranks * batch, device=engine.device)
        with torch.no_grad(), engine.replay.force(routes):
            with compare_scores(engine.replay, self._old[first : first + count], total):
                engine.forward_backward.forward(micro_batches, lambda output, micro_batch: None)
        dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
        parts = [torch.empty_like(total) for _ in range(ranks)]
        if ranks > 1:
            dist.all_gather(parts, total, group=parallel_state.get_tensor_model_parallel_group())
        else:
            parts = [total]
        shifts = torch.cat([part.view(count, -1, batch) for part in parts], dim=1) / engine.replay.signature.moe_layers
        return [
            replace(micro_batch, router_shift=micro_batch.unpack(shift.T).to(micro_batch.tokens.device))
            for micro_batch, shift in zip(micro_batches, shifts, strict=True)
        ]
