"""Balanced Actor Initialization (arXiv 2509.00309), which builds the model that RL starts from in two stages.

    stage 1   M_sft = Σ_i w_i · M_i,  Σ_i w_i = 1
    stage 2   M_BAI = α · M_pretrained + (1 − α) · M_sft

Both are linear, so the two stages are one weighted sum over all checkpoints:

    M_BAI = α · M_pretrained + Σ_i (1 − α) · w_i · M_i

Computing it in one pass reads every input once, writes once and rounds once; writing M_sft in between would round
twice.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from megatron_bai.merge.methods.linear import AveragingMethod
from megatron_bai.merge.recipe.recipe import Term, first_match, require_fraction, require_pretrained


@dataclass(frozen=True, kw_only=True)
class Bai(AveragingMethod):
    """A two-stage merge.

    Args:
        pretrained: the base checkpoint; it also gives the output its layout and its non-tensor state.
        members: the checkpoints of stage 1.
        weights, weights_for, normalize: as in `AveragingMethod`.
        alpha: the weight of `pretrained` in stage 2, in [0, 1].
        alpha_for: (pattern, alpha) pairs, as `weights_for`.
    """

    method: ClassVar[str] = "bai"
    title: ClassVar[str] = "Balanced Actor Initialization (arXiv 2509.00309)"
    sweep_setting: ClassVar[str] = "alpha"

    alpha: float = 0.5
    alpha_for: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        require_pretrained(self)
        super().__post_init__()
        require_fraction("merge.alpha", self.alpha)
        for pattern, alpha in self.alpha_for:
            require_fraction(f"merge.alpha_for[{pattern}]", alpha)

    def terms(self, key: str | None = None, layer: int | None = None) -> tuple[Term, ...]:
        """Return the merge as one weighted sum; a checkpoint named twice appears once.

        Coefficients are float64 and sum to 1 within its rounding: the weights are divided by their sum.

        Args:
            key: name of the tensor, which patterns of `alpha_for` and `weights_for` match; None: no pattern does.
            layer: decoder layer of the tensor, from 0; None, where it belongs to none, matches no pattern with layers.

        Returns:
            α for the pretrained checkpoint, then (1 − α) · w_i of each member.
        """
        alpha = first_match("alpha", self.alpha_for, key, layer, self.alpha)
        weights = self.weights_for_tensor(key, layer)
        total = math.fsum(weights)
        coefficients = {self.pretrained: alpha}
        for member, weight in zip(self.members, weights, strict=True):
            coefficients[member] = coefficients.get(member, 0.0) + (1 - alpha) * weight / total
        return tuple(Term(source, coefficient) for source, coefficient in coefficients.items())
