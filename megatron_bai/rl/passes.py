"""Forward and backward passes of a model over micro-batches, through Megatron's pipeline schedules."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_bai.errors import UserError
from megatron_bai.model.build import Actor
from megatron_bai.rl.batch import Batch

Found = TypeVar("Found")


class Passes:
    """A model with what its passes need.

    Attributes:
        stages: of the pipeline.
    """

    def __init__(self, model: Actor, device: torch.device):
        from megatron.core import parallel_state

        self.model, self.device = model, device
        self.stages = parallel_state.get_pipeline_model_parallel_world_size()
        self._data_size = parallel_state.get_data_parallel_world_size()
        self._data_group = parallel_state.get_data_parallel_group()

    def forward(self, micros: list[Batch], collect: Callable[[torch.Tensor, Batch], Found]) -> list[Found]:
        """What `collect(output, micro)` makes of the model's output, `[B, T, …]`, for each micro-batch. Collective.

        Returns:
            One entry a micro-batch on ranks of the last stage, nothing elsewhere.
        """

        def found(output: torch.Tensor, non_loss_data: bool = True, *, micro: Batch) -> Found:
            return collect(output, micro)

        return self._run(micros, found, forward_only=True)

    def update(
        self,
        micros: list[Batch],
        loss: Callable[[torch.Tensor, Batch], torch.Tensor],
        mine: int,
        around: AbstractContextManager = nullcontext(),
    ) -> float:
        """One optimizer step on Σ loss(output, micro) over all micro-batches and ranks, divided by Σ `mine`. Collective.

        Args:
            loss: a scalar sum, called on ranks of the last stage.
            mine: this data-parallel rank's part of the denominator.
            around: entered for the passes; what it finds wrong at its end, it finds before the weights change.

        Returns:
            The gradient's norm before clipping.

        Raises:
            UserError: the gradient is not finite; the weights are of no use any more, checkpoints are intact.
        """
        count = self._global(mine)

        def scaled(output: torch.Tensor, *, micro: Batch) -> tuple[torch.Tensor, dict]:
            # The schedule divides by the micro-batches and DDP averages over data-parallel ranks: undo both, so
            # that the gradient is that of the sum over the whole mini-batch divided by its count.
            return loss(output, micro) * (len(micros) * self._data_size / count), {}

        for chunk in self.model.chunks:
            chunk.zero_grad_buffer()
        self.model.optimizer.zero_grad()
        with around:
            self._run(micros, scaled, forward_only=False)
        success, norm, _ = self.model.optimizer.step()
        if not success or norm != norm or norm == float("inf"):
            raise UserError(f"the gradient's norm is {norm}: the run stops; continue from its last checkpoint")
        return float(norm)

    def _global(self, mine: int) -> int:
        """The mini-batch's denominator: this rank's summed over all data-parallel ranks, at least 1."""
        count = torch.tensor([mine], dtype=torch.int64, device=self.device)  # exact
        dist.all_reduce(count, group=self._data_group)
        return max(int(count), 1)

    def _run(self, micros: list[Batch], collect: Callable[..., Any], forward_only: bool) -> list[Any]:
        """Run Megatron's schedule over the micro-batches."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        queues = [iter(micros) for _ in self.model.chunks]

        def forward_step(queue: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
            micro = next(queue).to(self.device)
            positions = torch.arange(micro.tokens.shape[1], device=self.device).expand_as(micro.tokens)
            return model(micro.tokens, positions, None), partial(collect, micro=micro)

        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=queues,
            model=self.model.chunks,
            num_microbatches=len(micros),
            seq_length=micros[0].tokens.shape[1],
            micro_batch_size=len(micros[0]),
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
        assert not any(list(queue) for queue in queues), "the schedule did not run every micro-batch"
        return outputs
