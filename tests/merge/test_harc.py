"""The calibrated router is the solution of dense least squares, on any number of ranks."""

import numpy as np
import pytest
import torch

from megatron_bai.merge.harc import calibrate_router

EXPERTS, HIDDEN = 5, 7


def drawn(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TARGETS = [drawn(EXPERTS, HIDDEN, seed=i, scale=0.5) for i in range(2)]
INPUTS = [drawn(count, HIDDEN, seed=10 + i) for i, count in enumerate((40, 90))]
START = drawn(EXPERTS, HIDDEN, seed=20)


def least_squares(gamma: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Rows and right-hand sides of ‖R vec(W) − r‖², one input after another; vec(W) is W row by row.

    H = F Fᵀ with F = diag(√p) − p √pᵀ, whose product is diag(p) − 2 p pᵀ + p (Σ p) pᵀ.
    """
    rows, sides = [], []
    for inputs, target in zip(INPUTS, TARGETS, strict=True):
        weights, sums = target.numpy(), np.zeros((EXPERTS, HIDDEN))
        for x in inputs.numpy():
            p = np.exp(weights @ x) / np.exp(weights @ x).sum()
            factor = np.diag(np.sqrt(p)) - np.outer(p, np.sqrt(p))
            row = np.kron(factor.T, x) * np.sqrt(gamma / len(inputs))
            rows.append(row)
            sides.append(row @ weights.ravel())
            sums += np.outer(p * (1 - p), x**2) / len(inputs)
        diagonal = np.sqrt((1 - gamma) * sums.ravel())
        rows.append(np.diag(diagonal))
        sides.append(diagonal * weights.ravel())
    return np.concatenate(rows), np.concatenate(sides)


def test_it_is_the_solution_of_dense_least_squares() -> None:
    rows, sides = least_squares(0.9)
    wanted = np.linalg.lstsq(rows, sides, rcond=None)[0].reshape(EXPERTS, HIDDEN)
    found = calibrate_router(START, TARGETS, INPUTS, tolerance=1e-13)
    np.testing.assert_allclose(found.weight.numpy(), wanted, atol=1e-9)
    assert found.residual <= 1e-12 and found.after < found.before


def test_without_damping_it_is_best_and_leaves_what_moves_all_logits_alike_as_it_was() -> None:
    rows, sides = least_squares()
    wanted = np.linalg.lstsq(rows, sides, rcond=None)[0].reshape(EXPERTS, HIDDEN)
    found = calibrate_router(START, TARGETS, INPUTS, gamma=1.0, tolerance=1e-13)
    np.testing.assert_allclose((found.weight - found.weight.mean(0)).numpy(), wanted - wanted.mean(0), atol=1e-9)
    np.testing.assert_allclose(found.weight.mean(0), START.mean(0), atol=1e-9)
    assert found.after == pytest.approx(0.5 * np.square(rows @ wanted.ravel() - sides).sum())


@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_parents_of_one_router_get_it_back(gamma: float) -> None:
    found = calibrate_router(START, [TARGETS[0]] * 2, INPUTS, gamma=gamma, tolerance=1e-13)
    torch.testing.assert_close(found.weight, TARGETS[0])
    assert found.after == pytest.approx(0, abs=1e-12)


def test_to_second_order_what_is_minimised_is_the_divergence_of_the_routers() -> None:
    near = TARGETS[0] + 1e-3 * START
    one, other = ((INPUTS[0] @ weight.T).log_softmax(1) for weight in (TARGETS[0], near))
    divergence = (one.exp() * (one - other)).sum(1).mean()
    found = calibrate_router(near, TARGETS[:1], INPUTS[:1], max_iterations=0)
    assert found.before == pytest.approx(float(divergence), rel=1e-2)


def test_inputs_may_be_spread_over_ranks_and_some_have_none() -> None:
    """A rank's contributions depend on earlier sums alone: it is given those of the whole, and must get its router."""
    sums: list[torch.Tensor] = []
    whole = calibrate_router(START, TARGETS, INPUTS, max_iterations=3, sum_over_ranks=lambda x: sums.append(x) or x)
    added: list[list[torch.Tensor]] = []
    for inputs in ([INPUTS[0][:11], INPUTS[1][:0]], [INPUTS[0][11:], INPUTS[1]]):
        own: list[torch.Tensor] = []
        found = calibrate_router(
            START, TARGETS, inputs, max_iterations=3,
            sum_over_ranks=lambda x, own=own: own.append(x) or sums[len(own) - 1],
        )  # fmt: skip
        torch.testing.assert_close(found.weight, whole.weight)
        added.append(own)
    for one, other, both in zip(*added, sums, strict=True):
        torch.testing.assert_close(one + other, both)
