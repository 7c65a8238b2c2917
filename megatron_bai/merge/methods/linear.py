"""Weighted average M = Σ_i w_i · M_i, Σ_i w_i = 1 (with equal weights a "model soup", arXiv 2203.05482)."""

import math
from dataclasses import dataclass
from typing import ClassVar

from megatron_bai.errors import UserError
from megatron_bai.merge.recipe.recipe import (
    WEIGHT_SUM_TOLERANCE,
    Term,
    WeightedMethod,
    format_numbers,
    require_positive_sum,
)


@dataclass(frozen=True, kw_only=True)
class AveragingMethod(WeightedMethod):
    """A method with the weights of an average, which sum to 1.

    Args:
        weights: of one member, none stands for 1.
        normalize: divide the weights by their sum, whatever it is, rather than require it to be 1.
    """

    normalize: bool = False

    def __post_init__(self) -> None:
        if not self.weights and len(self.members) == 1:
            object.__setattr__(self, "weights", (1.0,))
        super().__post_init__()
        for name, weights in self.all_weight_settings():
            if self.normalize:
                require_positive_sum(name, weights)
            elif abs(math.fsum(weights) - 1) > WEIGHT_SUM_TOLERANCE:
                raise UserError(
                    f"{name} [{format_numbers(weights)}] sum to {math.fsum(weights):.8g}: they must sum to 1, or"
                    " merge.normalize=true divides by their sum"
                )


@dataclass(frozen=True, kw_only=True)
class Linear(AveragingMethod):
    """A weighted average of the members.

    Args:
        pretrained: gives the layout and the non-tensor state, and is not averaged; empty: the first member gives them.
        members: the checkpoints to average.
    """

    method: ClassVar[str] = "linear"
    title: ClassVar[str] = "a weighted average (arXiv 2203.05482)"

    def terms(self, key: str | None = None, layer: int | None = None) -> tuple[Term, ...]:
        """Return the members' weights, divided by their sum; a checkpoint named twice appears once.

        Args:
            key: name of the tensor, which patterns of `weights_for` match; None: `weights` apply.
            layer: decoder layer of the tensor, from 0; None, where it belongs to none, matches no pattern with layers.

        Returns:
            The members in their order; before them the pretrained checkpoint, where one is given, with coefficient 0
            unless it is also a member.
        """
        weights = self.weights_for_tensor(key, layer)
        total = math.fsum(weights)
        coefficients = {self.pretrained: 0.0} if self.pretrained else {}
        for member, weight in zip(self.members, weights, strict=True):
            coefficients[member] = coefficients.get(member, 0.0) + weight / total
        return tuple(Term(source, coefficient) for source, coefficient in coefficients.items())
