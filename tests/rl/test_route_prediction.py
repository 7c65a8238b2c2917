"""The loss and the gradient of a route predictor, and what it predicts of routers that drift by themselves."""

from typing import Any

import pytest
import torch

from megatron_bai.rl.policy.route_prediction import compute_kl
from megatron_bai.routing.replay.shifted_topk import record_shifted_topk

ROWS, EXPERTS, WIDTH, TOPK = 50, 8, 6, 2


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_loss_and_gradient_are_those_of_the_distributions_written_out() -> None:
    """Σ_e ρ_e log(ρ_e / ρ̂_e) of softmaxes as quotients, and its gradient element by element, by autograd."""
    weight, hidden = drawn(EXPERTS, WIDTH, seed=1).requires_grad_(), drawn(4, WIDTH, seed=2)
    before, now = drawn(4, EXPERTS, seed=3), drawn(4, EXPERTS, seed=4)
    kl, gradient = compute_kl(weight.detach(), hidden, before, now)
    total = torch.zeros((), dtype=torch.float64)
    for row in range(len(hidden)):
        shifted = [before[row, e] + sum(weight[e, i] * hidden[row, i] for i in range(WIDTH)) for e in range(EXPERTS)]
        predicted = [value.exp() / sum(other.exp() for other in shifted) for value in shifted]
        current = [value.exp() / sum(other.exp() for other in now[row]) for value in now[row]]
        expected = sum(p * (p / q).log() for p, q in zip(current, predicted))
        assert abs(float((kl[row] - expected).detach())) < 1e-10
        total = total + expected
    total.backward()
    assert (gradient - weight.grad).abs().max() < 1e-10
    assert kl.min() > 0 and gradient.abs().min() > 1e-4


def test_nothing_is_learned_where_nothing_moved() -> None:
    hidden, logits = drawn(ROWS, WIDTH, seed=2), drawn(ROWS, EXPERTS, seed=3)
    kl, gradient = compute_kl(torch.zeros(EXPERTS, WIDTH, dtype=torch.float64), hidden, logits, logits)
    assert not kl.any() and not gradient.any()


def top(scores: torch.Tensor, k: int, num_groups: Any = None, group_topk: Any = None) -> tuple:
    return torch.topk(scores, k, dim=1)


class Handle:
    recorded: torch.Tensor

    def record_indices(self, ids: torch.Tensor) -> None:
        self.recorded = ids


@pytest.mark.parametrize("is_softmax", [False, True])
def test_the_shift_chooses_and_does_not_weigh(is_softmax: bool) -> None:
    logits, shift, handle = drawn(ROWS, EXPERTS, seed=3).float(), drawn(ROWS, EXPERTS, seed=5).float(), Handle()
    scores = logits.softmax(dim=-1) if is_softmax else logits
    values, ids = record_shifted_topk(handle, shift, is_softmax, scores, TOPK, default_compute_topk=top)
    expected = (logits + shift).topk(TOPK, dim=-1).indices
    assert torch.equal(ids.sort().values, expected.sort().values) and torch.equal(handle.recorded, ids)
    assert torch.equal(values, scores.gather(1, ids))
    assert not torch.equal(ids.sort().values, logits.topk(TOPK, dim=-1).indices.sort().values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_softmax", [False, True])
def test_a_shift_of_zero_changes_no_bit_also_among_equal_scores(is_softmax: bool, dtype: torch.dtype) -> None:
    logits = (drawn(ROWS, EXPERTS, seed=3) * 2).round().to(dtype)  # many are equal
    scores = logits.softmax(dim=-1) if is_softmax else logits
    found = record_shifted_topk(
        Handle(), torch.zeros(ROWS, EXPERTS), is_softmax, scores, TOPK, default_compute_topk=top
    )
    assert all(map(torch.equal, found, top(scores, TOPK)))
