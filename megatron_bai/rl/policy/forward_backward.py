"""Forward and backward passes of a model over micro-batches, through Megatron's pipeline schedules."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_bai.errors import UserError
from megatron_bai.model.build import MegatronModel
from megatron_bai.rl.batches.stages import TrainingBatch
from megatron_bai.rl.batches.token_batch import AnyBatch, TokenBatch
from megatron_bai.routing.layout import Packing, Place

Result = TypeVar("Result")

_LARGEST_ADVANTAGE = 1e15  # beyond, the squares in a gradient's norm are near the end of float32


class ForwardBackward:
    """Forward and backward passes of one model.

    Attributes:
        stages: of the pipeline.
    """

    def __init__(self, model: MegatronModel, device: torch.device):
        from megatron.core import parallel_state

        self.model, self.device = model, device
        self.stages = parallel_state.get_pipeline_model_parallel_world_size()
        self._dp_size = parallel_state.get_data_parallel_world_size()
        self._data_group = parallel_state.get_data_parallel_group()

    def forward(
        self, micro_batches: list[AnyBatch], collect: Callable[[torch.Tensor, AnyBatch], Result]
    ) -> list[Result]:
        """Run the model and return `collect(output, micro_batch)` of each micro-batch. Collective.

        Args:
            micro_batches: padded to one shape, or packed into rows of one length.
            collect: its `output` is `[B, T, …]`, of a packed micro-batch `[1, row, …]`; see `TokenBatch.pack` and
                `unpack`.

        Returns:
            One entry a micro-batch on ranks of the last stage, none elsewhere.
        """

        def call(output: torch.Tensor, non_loss_data: bool = True, *, micro_batch: AnyBatch) -> Result:
            return collect(output, micro_batch)

        return self._run_schedule(micro_batches, call, forward_only=True)

    def update(
        self,
        micro_batches: list[TrainingBatch],
        loss: Callable[[torch.Tensor, TrainingBatch], torch.Tensor],
        local_count: int,
        context: AbstractContextManager[object] | None = None,
        mask_padding: bool = False,
    ) -> float:
        """Make one optimizer step on Σ loss(output, micro_batch) / Σ local_count, over all ranks. Collective.

        Args:
            micro_batches: as in `forward`.
            loss: a scalar sum, called on ranks of the last stage with the arguments of `collect` in `forward`.
            local_count: this data-parallel rank's part of the denominator.
            context: entered for the passes, if given. An error at its end comes before the weights change.
            mask_padding: tell the routers what is padding, which their losses leave out; they must be mended
                (`model/router_losses.py`).

        Returns:
            The gradient's norm before clipping.

        Raises:
            UserError: the gradient is not finite; the weights are of no use any more, checkpoints are intact.
        """
        count = self._global_count(local_count)

        def scaled(output: torch.Tensor, *, micro_batch: TrainingBatch) -> tuple[torch.Tensor, dict[str, Any]]:
            # The schedule divides by the micro-batches and DDP averages over data-parallel ranks: undo both, so
            # that the gradient is that of the sum over the whole mini-batch divided by its count.
            return loss(output, micro_batch) * (len(micro_batches) * self._dp_size / count), {}

        for chunk in self.model.chunks:
            chunk.zero_grad_buffer()
        self.model.optimizer.zero_grad()
        with context or nullcontext():
            self._run_schedule(micro_batches, scaled, forward_only=False, mask_padding=mask_padding)
        success, norm, _ = self.model.optimizer.step()
        if not success or norm != norm or norm == float("inf"):
            raise UserError(f"the gradient's norm is {norm}{self._explain_overflow(micro_batches)}")
        return float(norm)

    def _explain_overflow(self, micro_batches: list[TrainingBatch]) -> str:
        """Return why a gradient may not be finite, and what to do, the same on all ranks. Collective."""
        # a packed row may have no sample, and a rank none but such rows
        advantages = torch.cat([micro_batch.advantages.flatten() for micro_batch in micro_batches])
        largest = torch.cat([advantages.abs(), advantages.new_zeros(1)]).max().to(self.device, torch.float64)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        if not largest <= _LARGEST_ADVANTAGE:  # NaN included
            return f", with advantages up to {float(largest):.2g}: rewards this large overflow float32; scale them down"
        return ": the run stops; continue from its last checkpoint"

    def _global_count(self, local_count: int) -> int:
        """Return the mini-batch's denominator: the sum over data-parallel ranks, at least 1."""
        count = torch.tensor([local_count], dtype=torch.int64, device=self.device)  # exact
        dist.all_reduce(count, group=self._data_group)
        return max(int(count), 1)

    def _run_schedule(
        self, micro_batches: list[AnyBatch], collect: Callable[..., Any], forward_only: bool, mask_padding: bool = False
    ) -> list[Any]:
        """Run Megatron's schedule over the micro-batches."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        queues = [iter(micro_batches) for _ in self.model.chunks]

        def forward_step(queue: Iterator[AnyBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
            micro_batch = next(queue).to(self.device)
            padding = self._padding(model, micro_batch) if mask_padding else None
            return self._forward_chunk(model, micro_batch, padding), partial(collect, micro_batch=micro_batch)

        rows, length = micro_batches[0].pack(micro_batches[0].tokens).shape
        outputs: list[Any] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=queues,
            model=self.model.chunks,
            num_microbatches=len(micro_batches),
            seq_length=length,
            micro_batch_size=rows,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
        assert not any(list(queue) for queue in queues), "the schedule did not run every micro-batch"
        return outputs

    def _padding(self, model: Any, micro_batch: TokenBatch) -> torch.Tensor:
        """Return the padding mask that a model chunk takes: Megatron-Core splits it on the pipeline's first alone."""
        if model.module.pre_process:
            return micro_batch.padding
        rank, ranks = Place.here(self.model.transformer_config).tensor
        return micro_batch.padding.chunk(ranks, dim=1)[rank]

    def _forward_chunk(self, model: Any, micro_batch: TokenBatch, padding: torch.Tensor | None) -> torch.Tensor:
        """Run a model chunk on a micro-batch. Packed samples attend to themselves alone, at positions of their own."""
        tokens, packing = micro_batch.pack(micro_batch.tokens), micro_batch.packing
        if packing is None:
            output: torch.Tensor = model(
                tokens, torch.arange(tokens.shape[1], device=self.device).expand_as(tokens), None, padding_mask=padding
            )
            return output
        positions = packing.positions.to(self.device)  # Megatron restarts the rotary ones with each sequence by itself
        assert padding is None, "no caller masks the padding of packed rows"
        output = model(tokens, positions[None], None, packed_seq_params=_packed_seq_params(packing, self.device))
        return output


def _packed_seq_params(packing: Packing, device: torch.device) -> Any:
    """Make Megatron's description of a packed row."""
    from megatron.core.packed_seq_params import PackedSeqParams

    starts = torch.tensor([0, *packing.parts], device=device).cumsum(0).int()
    longest = max(packing.parts)
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts, max_seqlen_q=longest, max_seqlen_kv=longest
    )
