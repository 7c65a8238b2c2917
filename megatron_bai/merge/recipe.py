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
import re
from dataclasses import dataclass
from typing import Any

from megatron_bai.errors import UserError
from megatron_bai.merge.groups import fits, layers_of

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
        alpha_for, weights_for: (pattern, value) pairs that replace `alpha` or `weights` for the tensors that fit the
            pattern, a parameter group's name or a regular expression; the first that fits decides.

    Raises:
        UserError: a checkpoint is missing, a number is outside its range, or a pattern is no regular expression.
    """

    pretrained: str
    members: tuple[str, ...]
    weights: tuple[float, ...]
    alpha: float
    alpha_for: tuple[tuple[str, float], ...] = ()
    weights_for: tuple[tuple[str, tuple[float, ...]], ...] = ()

    def __post_init__(self) -> None:
        if not self.pretrained:
            raise UserError("merge.pretrained is empty: give the base checkpoint's directory")
        if not self.members or not all(self.members):
            raise UserError("merge.members is empty or holds an empty path: give the checkpoints of stage 1")
        _check_alpha("merge.alpha", self.alpha)
        _check_weights("merge.weights", self.weights, len(self.members))
        for pattern, alpha in self.alpha_for:
            _check_alpha(f"merge.alpha_for[{pattern}]", alpha)
        for pattern, weights in self.weights_for:
            _check_weights(f"merge.weights_for[{pattern}]", weights, len(self.members))
        for pattern in self.patterns:
            if (layers := layers_of(pattern)) is not None and not layers:
                raise UserError(f"{pattern!r} names no layer: write the first before the last, as in layers.0-11")
            try:
                fits(pattern, "")
            except re.error as error:
                raise UserError(f"{pattern!r} is neither a parameter group nor a regular expression: {error}") from None

    @property
    def patterns(self) -> tuple[str, ...]:
        return tuple(pattern for pattern, _ in (*self.alpha_for, *self.weights_for))

    def terms(self, key: str | None = None, layer: int | None = None) -> tuple[Term, ...]:
        """The merge as one weighted sum, the pretrained first; a checkpoint named twice appears once.

        Coefficients are float64 and sum to 1 within its rounding: what the weights' sum lacks to 1 is divided out.

        Args:
            key: the tensor to merge; None gives the terms of tensors that no pattern fits.
            layer: the decoder layer of it that is merged, if it has any.
        """
        alpha, weights = self.alpha, self.weights
        if key is not None:
            alpha = next((value for pattern, value in self.alpha_for if fits(pattern, key, layer)), alpha)
            weights = next((value for pattern, value in self.weights_for if fits(pattern, key, layer)), weights)
        total = math.fsum(weights)
        coefficients = {self.pretrained: alpha}
        for member, weight in zip(self.members, weights):
            coefficients[member] = coefficients.get(member, 0.0) + (1 - alpha) * weight / total
        return tuple(Term(source, coefficient) for source, coefficient in coefficients.items())

    def describe(self) -> dict[str, Any]:
        """The recipe and its terms, as `provenance.json` keeps them."""
        return {
            "method": "bai",
            "pretrained": self.pretrained,
            "members": list(self.members),
            "weights": list(self.weights),
            "alpha": self.alpha,
            "alpha_for": dict(self.alpha_for),
            "weights_for": {pattern: list(weights) for pattern, weights in self.weights_for},
            "terms": [{"source": t.source, "coefficient": t.coefficient} for t in self.terms()],
        }


def _check_alpha(name: str, alpha: float) -> None:
    if not 0 <= alpha <= 1:  # also catches NaN
        raise UserError(f"{name} is {alpha:g}: the pretrained checkpoint's weight lies between 0 and 1")


def _check_weights(name: str, weights: tuple[float, ...], members: int) -> None:
    if len(weights) != members:
        raise UserError(f"{name} has {len(weights)} entries for {members} members: give one a member")
    listed = ", ".join(f"{w:g}" for w in weights)
    if not all(math.isfinite(w) for w in weights):
        raise UserError(f"{name} [{listed}] holds a number that is not finite")
    total = math.fsum(weights)
    if abs(total - 1) > TOLERANCE:
        raise UserError(f"{name} [{listed}] sum to {total:.8g}: they must sum to 1")
