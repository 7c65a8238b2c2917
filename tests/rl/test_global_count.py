"""The denominator of an update is the sum over all data-parallel ranks, and the gradient's scale undoes Megatron's."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_bai.rl.policy import forward_backward
from megatron_bai.rl.policy.forward_backward import ForwardBackward

OTHERS = [5, 0, 11]  # what the other ranks count


def reduced(count: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: object = None) -> None:
    """What four ranks make of their counts."""
    assert group == "data-parallel ranks"
    counts = [int(count), *OTHERS]
    count.fill_({dist.ReduceOp.SUM: sum, dist.ReduceOp.MAX: max, dist.ReduceOp.MIN: min}[op](counts))


@pytest.mark.parametrize(("local", "wanted"), [(8, 24), (0, 16)])
def test_a_loss_is_divided_by_what_all_ranks_count(local: int, wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_backward.dist, "all_reduce", reduced)
    passes: Any = ForwardBackward.__new__(ForwardBackward)
    chunk, optimizer = SimpleNamespace(zero_grad_buffer=lambda: None), SimpleNamespace(zero_grad=lambda: None)
    optimizer.step = lambda: (True, 1.0, None)
    passes.model, passes.device = SimpleNamespace(chunks=[chunk], optimizer=optimizer), torch.device("cpu")
    passes._dp_size, passes._data_group = 4, "data-parallel ranks"
    scaled: list[float] = []

    def schedule(micro_batches: list[Any], collect: Any, forward_only: bool, mask_padding: bool) -> None:
        scaled.extend(float(collect(torch.tensor(3.0), micro_batch=each)[0]) for each in micro_batches)

    passes._run_schedule = schedule
    assert passes.update(["a", "b"], lambda output, micro_batch: output, local) == 1.0
    # Megatron's schedule divides by 2 micro-batches and its gradients are means over 4 ranks.
    assert scaled == pytest.approx([3.0 * 2 * 4 / wanted] * 2)
