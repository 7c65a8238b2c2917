"""Hessian-aware router calibration (HARC, arXiv 2606.03391): the router that routes best as each parent's does.

Let z = W x be the logits of the merged router for an input x, z_i = W_i x those of parent i, and p_i = softmax(z_i). To
second order in z − z_i

    KL(p_i ‖ softmax(z)) = ½ (z − z_i)ᵀ H_i(x) (z − z_i),    H_i(x) = diag(p_i) − p_i p_iᵀ

so that the best W for all parents' inputs X_i, each parent with the same weight,

    min_W  Σ_i 1/|X_i| Σ_{x ∈ X_i} ½ (W x − W_i x)ᵀ H_i(x) (W x − W_i x)

solves linear equations: Σ_i A_i W = Σ_i A_i W_i with A_i V = 1/|X_i| Σ_x H_i(x) V x xᵀ. They have experts × hidden
unknowns, and are solved by conjugate gradients from the merged router, which needs products A_i V alone. Off-diagonal
elements of every A_i are scaled by γ on both sides, γ A_i + (1 − γ) diag A_i, as the authors do with γ = 0.9: what few
inputs say of how elements depend on each other is uncertain, and with γ = 1 the equations leave open what moves all
logits alike. The equations are those of the authors' own implementation (github.com/huangcb01/HARC).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Calibration:
    """A calibrated router.

    Attributes:
        weight: `[E, H]` float64.
        iterations: of the conjugate gradients.
        residual: norm of the equations' residual over that of their right-hand side.
        before: value that is minimised (γ = 1), of the router that it started from.
        after: of `weight`.
    """

    weight: torch.Tensor
    iterations: int
    residual: float
    before: float
    after: float


class _Parent:
    """One parent's part of the equations, over this rank's inputs."""

    def __init__(self, inputs: torch.Tensor, target: torch.Tensor, count: int):
        self.inputs, self.target = inputs.double(), target.double()
        self.shares = (self.inputs @ self.target.T).softmax(1)
        self.count = count

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """Return A_i W."""
        return self._curve(self.inputs @ weight.T).T @ self.inputs / self.count

    def diagonal(self) -> torch.Tensor:
        """Return diag A_i, `[E, H]`."""
        return (self.shares * (1 - self.shares)).T @ self.inputs.square() / self.count

    def loss(self, weight: torch.Tensor) -> torch.Tensor:
        """Return this parent's part of what is minimised."""
        difference = self.inputs @ (weight - self.target).T
        return (difference * self._curve(difference)).sum() / (2 * self.count)

    def _curve(self, logits: torch.Tensor) -> torch.Tensor:
        """Return H_i(x) z of every input, `[inputs, E]`."""
        weighted = self.shares * logits
        return weighted - self.shares * weighted.sum(1, keepdim=True)


def calibrate_router(
    start: torch.Tensor,
    targets: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    gamma: float = 0.9,
    max_iterations: int = 1000,
    tolerance: float = 1e-6,
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
) -> Calibration:
    """Solve for the router of one layer, in float64. Collective where `sum_over_ranks` is.

    Args:
        start: `[E, H]`, the merged router.
        targets: `[E, H]` of each parent, W_i.
        inputs: `[inputs, H]` of each parent's texts that this rank has, as the merged model computes them; may be empty
            on a rank.
        gamma: γ, above 0 and at most 1.
        max_iterations: of the conjugate gradients.
        tolerance: of the residual, relative to the right-hand side.
        sum_over_ranks: returns the sum of a tensor over all ranks, on every rank.
    """
    counts = sum_over_ranks(torch.tensor([float(len(x)) for x in inputs], dtype=torch.float64, device=start.device))
    parents = [
        _Parent(x, target, max(int(count), 1))
        for x, target, count in zip(inputs, targets, counts.tolist(), strict=True)
    ]
    diagonals = [sum_over_ranks(parent.diagonal()) for parent in parents]
    diagonal = torch.stack(diagonals).sum(0)

    def apply(weight: torch.Tensor) -> torch.Tensor:
        full = sum_over_ranks(torch.stack([parent.apply(weight) for parent in parents]).sum(0))
        return gamma * full + (1 - gamma) * diagonal * weight

    def loss(weight: torch.Tensor) -> float:
        return float(sum_over_ranks(torch.stack([parent.loss(weight) for parent in parents]).sum()))

    whole = sum_over_ranks(torch.stack([parent.apply(parent.target) for parent in parents]).sum(0))
    scaled = torch.stack([own * parent.target for own, parent in zip(diagonals, parents, strict=True)]).sum(0)
    right = gamma * whole + (1 - gamma) * scaled
    weight, iterations, residual = _solve(apply, right, start.double(), max_iterations, tolerance)
    return Calibration(weight, iterations, residual, loss(start.double()), loss(weight))


def _solve(
    apply: Callable[[torch.Tensor], torch.Tensor],
    right: torch.Tensor,
    start: torch.Tensor,
    max_iterations: int,
    tolerance: float,
) -> tuple[torch.Tensor, int, float]:
    """Solve apply(x) = right by conjugate gradients (Hestenes and Stiefel, 1952); returns x, iterations, residual."""
    x, wanted = start.clone(), float(right.norm())
    residual = right - apply(x)
    direction, square = residual.clone(), float(residual.square().sum())
    iterations = 0
    while iterations < max_iterations and math.sqrt(square) > tolerance * wanted:
        product = apply(direction)
        curvature = float((direction * product).sum())
        if curvature <= 0:  # nothing is left but what the equations do not determine
            break
        step = square / curvature
        x += step * direction
        residual -= step * product
        previous, square = square, float(residual.square().sum())
        direction = residual + square / previous * direction
        iterations += 1
    return x, iterations, math.sqrt(square) / wanted if wanted else 0.0
