"""Task arithmetic (arXiv 2212.04089): the pretrained checkpoint plus what each member learned beyond it.

    τ_i = M_i − M_pretrained
    M = M_pretrained + λ · Σ_i w_i · τ_i = (1 − λ · Σ_i w_i) · M_pretrained + Σ_i λ · w_i · M_i

Negative weights take away what a member learned. With Σ w_i = 1 it is BAI with α = 1 − λ.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from megatron_bai.merge.recipe.recipe import (
    Term,
    WeightedMethod,
    require_finite,
    require_positive_sum,
    require_pretrained,
)


@dataclass(frozen=True, kw_only=True)
class TaskVectorMethod(WeightedMethod):
    """A method that adds weighted task vectors to the pretrained checkpoint.

    Args:
        pretrained: the checkpoint that the members were trained from; it also gives the layout and non-tensor state.
        members: the trained checkpoints.
        weights: none stands for 1 each.
        scale: λ.
    """

    sweep_setting: ClassVar[str] = "scale"

    scale: float = 1.0

    def __post_init__(self) -> None:
        require_pretrained(self)
        if not self.weights:
            object.__setattr__(self, "weights", (1.0,) * len(self.members))
        super().__post_init__()
        require_finite("merge.scale", self.scale)

    def terms(self, key: str | None = None, layer: int | None = None) -> tuple[Term, ...]:
        """Return 1 for the pretrained checkpoint and the weights of the task vectors.

        Args:
            key: name of the tensor, which patterns of `weights_for` match; None: `weights` apply.
            layer: decoder layer of the tensor, from 0; None, where it belongs to none, matches no pattern with layers.

        Returns:
            The pretrained checkpoint, then the members in their order; λ is not in the coefficients.
        """
        return (Term(self.pretrained, 1.0), *map(Term, self.members, self.weights_for_tensor(key, layer)))


@dataclass(frozen=True, kw_only=True)
class SummedTaskVectors(TaskVectorMethod):
    """A method that adds up the weighted task vectors.

    Args:
        normalize: divide the weights by their sum.
    """

    normalize: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, weights in self.all_weight_settings() if self.normalize else ():
            require_positive_sum(name, weights)

    def weights_for_tensor(self, key: str | None, layer: int | None) -> tuple[float, ...]:
        """Return the weights of one tensor, or layer of it, normalised where that is asked for.

        Args:
            key: name of the tensor, which patterns of `weights_for` match; None: `weights` apply.
            layer: decoder layer of the tensor, from 0; None, where it belongs to none, matches no pattern with layers.

        Returns:
            w_i of each member; with `normalize` they sum to 1 within float64's rounding.
        """
        weights = super().weights_for_tensor(key, layer)
        total = math.fsum(weights)
        return tuple(w / total for w in weights) if self.normalize else weights


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(SummedTaskVectors):
    """The sum of the pretrained checkpoint and the weighted task vectors."""

    method: ClassVar[str] = "task_arithmetic"
    title: ClassVar[str] = "task arithmetic (arXiv 2212.04089)"

    def terms(self, key: str | None = None, layer: int | None = None) -> tuple[Term, ...]:
        """Return the merge as one weighted sum; a checkpoint named twice appears once.

        Args:
            key: name of the tensor, which patterns of `weights_for` match; None: `weights` apply.
            layer: decoder layer of the tensor, from 0; None, where it belongs to none, matches no pattern with layers.

        Returns:
            1 − λ · Σ_i w_i for the pretrained checkpoint, then λ · w_i of each member.
        """
        weights = self.weights_for_tensor(key, layer)
        coefficients = {self.pretrained: 1 - self.scale * math.fsum(weights)}
        for member, weight in zip(self.members, weights, strict=True):
            coefficients[member] = coefficients.get(member, 0.0) + self.scale * weight
        return tuple(Term(source, coefficient) for source, coefficient in coefficients.items())
