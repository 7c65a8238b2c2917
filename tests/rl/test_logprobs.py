"""Log-probabilities and entropy at a temperature are those of plain torch, with their gradients, whatever the parts."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_bai.rl.policy import logprobs


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_group", lambda: None)
    alone: Any = SimpleNamespace(all_reduce=lambda *args, **options: None, ReduceOp=dist.ReduceOp)
    monkeypatch.setattr(logprobs, "dist", alone)


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 3.0])
@pytest.mark.parametrize("scale", [1.0, 300.0])
@pytest.mark.parametrize("work_elements", [1, 40, 1 << 24])
def test_they_are_of_the_logits_over_the_temperature(temperature: float, scale: float, work_elements: int) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(3, 5, 16, generator=generator, dtype=torch.float64) * scale).requires_grad_()
    targets = torch.randint(16, (3, 5), generator=generator)
    targets[0, 2] = targets[2] = -1
    weights = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    ours = logprobs.logprobs_and_entropy(logits, targets, temperature, work_elements)
    (gradient,) = torch.autograd.grad(sum((w * x).sum() for w, x in zip(weights, ours)), logits)
    plain = (logits / temperature).log_softmax(-1)
    there = targets >= 0
    wanted = plain.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * there
    entropy = -(plain.exp() * plain).sum(-1) * there
    (correct,) = torch.autograd.grad((weights[0] * wanted + weights[1] * entropy).sum(), logits)
    for found, right in zip((*ours, gradient), (wanted, entropy, correct)):
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-12)
