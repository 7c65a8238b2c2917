"""The algebra of Balanced Actor Initialization, resolved before any file is opened.

BAI (arXiv 2509.00309) builds the model that RL starts from in two stages:

    stage 1   M_sft = Σ_i w_i · M_i,  Σ_i w_i = 1
    stage 2   M_BAI = α · M_pretrained + (1 − α) · M_sft

Both are linear, so the two stages are one weighted sum over all checkpoints:

    M_BAI = α · M_pretrained + Σ_i (1 − α) · w_i · M_i

Computing it in one pass reads every input once, writes once and rounds once; writing M_sft in between would round
twice. `Recipe.terms` gives that sum.
"""

import math
from dataclasses import dataclass
from typing import Any

from megatron_bai.errors import UserError

TOLERANCE = 1e-6  # how far the stage-1 weights may be from 1: the error of weights written with seven decimals


@dataclass(frozen=True)
class Term:
    """One summand: `coefficient` (float64) times the checkpoint at `source`."""

    source: str
    coefficient: float


@dataclass(frozen=True)
class Recipe:
    """A two-stage merge, as the user writes it.

    Args:
        pretrained: the base checkpoint; it also gives the output its layout and its non-tensor state.
        members: the checkpoints of stage 1.
        weights: one for each member, finite, summing to 1.
        alpha: the weight of `pretrained` in stage 2, in [0, 1].

    Raises:
        UserError: a checkpoint is missing, or a number is outside its range.
    """

    pretrained: str
    members: tuple[str, ...]
    weights: tuple[float, ...]
    alpha: float

    def __post_init__(self) -> None:
        if not self.pretrained:
            raise UserError("merge.pretrained is empty: give the base checkpoint's directory")
        if not self.members or not all(self.members):
            raise UserError("merge.members is empty or holds an empty path: give the checkpoints of stage 1")
        if len(self.weights) != len(self.members):
            raise UserError(
                f"merge.weights has {len(self.weights)} entries for {len(self.members)} members: give one a member"
            )
        weights = ", ".join(f"{w:g}" for w in self.weights)
        if not all(math.isfinite(w) for w in self.weights):
            raise UserError(f"merge.weights [{weights}] holds a number that is not finite")
        total = math.fsum(self.weights)
        if abs(total - 1) > TOLERANCE:
            raise UserError(f"merge.weights [{weights}] sum to {total:.8g}: they must sum to 1")
        if not 0 <= self.alpha <= 1:  # also catches NaN
            raise UserError(f"merge.alpha is {self.alpha:g}: the pretrained checkpoint's weight lies between 0 and 1")

    def terms(self) -> tuple[Term, ...]:
        """The merge as one weighted sum, the pretrained first; a checkpoint named twice appears once.

        Coefficients are float64 and sum to 1 within its rounding: what the weights' sum lacks to 1 is divided out.
        """
        total = math.fsum(self.weights)
        coefficients = {self.pretrained: self.alpha}
        for member, weight in zip(self.members, self.weights):
            coefficients[member] = coefficients.get(member, 0.0) + (1 - self.alpha) * weight / total
        return tuple(Term(source, coefficient) for source, coefficient in coefficients.items())

    def describe(self) -> dict[str, Any]:
        """The recipe and its terms, as `provenance.json` keeps them."""
        return {
            "method": "bai",
            "pretrained": self.pretrained,
            "members": list(self.members),
            "weights": list(self.weights),
            "alpha": self.alpha,
            "terms": [{"source": t.source, "coefficient": t.coefficient} for t in self.terms()],
        }
