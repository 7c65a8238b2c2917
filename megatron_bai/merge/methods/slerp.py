"""Spherical linear interpolation (Shoemake 1985) between two checkpoints, each parameter a vector.

    θ = the angle between a and b,  cos θ = ⟨a, b⟩ / (|a| |b|)
    M = sin((1 − t)·θ) / sin θ · a + sin(t·θ) / sin θ · b

The vectors are not scaled to unit length. One pass measures ⟨a, a⟩, ⟨b, b⟩ and ⟨a, b⟩ of every slice;
then the merge is a weighted sum. Where sin θ is below `MIN_SIN_ANGLE`, or a vector is zero, there is no arc
and the coefficients are those of the straight line, 1 − t and t; for small angles the two are the same to θ².
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from megatron_bai.errors import PermanentError, UserError
from megatron_bai.merge.recipe.recipe import (
    ReadBlocks,
    Recipe,
    SliceStats,
    Term,
    first_match,
    require_distinct,
    require_fraction,
)
from megatron_bai.merge.recipe.slices import SliceBox

MIN_SIN_ANGLE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Slerp(Recipe):
    """Spherical interpolation from the first member to the second.

    Args:
        pretrained: gives the layout and the non-tensor state, and no values; empty: the first member gives them.
        members: a and b.
        t: 0 gives a, 1 gives b; None where `t_for` fits every tensor.
        t_for: (pattern, t) pairs that replace `t` for the tensors that match the pattern, a parameter group's name or a
            regular expression; the first match decides.
    """

    method: ClassVar[str] = "slerp"
    title: ClassVar[str] = "spherical linear interpolation"
    sweep_setting: ClassVar[str] = "t"
    stats_passes: ClassVar[int] = 1

    t: float | None = None
    t_for: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.members) != 2:
            raise UserError(f"merge.members has {len(self.members)} entries: merge.method=slerp is between two")
        require_distinct(self)
        if self.t is not None:
            require_fraction("merge.t", self.t)
        elif not self.t_for:
            raise UserError("merge.t is not given: merge.method=slerp needs it, or merge.t_for for every tensor")
        for pattern, t in self.t_for:
            require_fraction(f"merge.t_for[{pattern}]", t)

    def terms(self, key: str | None = None, layer: int | None = None) -> tuple[Term, ...]:
        """Return 1 − t and t, the coefficients of vectors at no angle.

        Args:
            key: name of the tensor, which patterns of `t_for` match; None: `t` applies.
            layer: decoder layer of the tensor, from 0; None, where it belongs to none, matches no pattern with layers.

        Returns:
            Terms of a and b; before them that of the pretrained checkpoint, where one is given, with coefficient 0.
        """
        t = first_match("t", self.t_for, key, layer, self.t)
        layout = (Term(self.pretrained, 0.0),) if self.pretrained else ()
        return (*layout, Term(self.members[0], 1 - t), Term(self.members[1], t))

    def needs_stats(self, weights: Sequence[float]) -> bool:
        """Return whether both members have a weight."""
        return len(weights) > 1 and 0 not in weights[-2:]  # the pretrained checkpoint may be before them, with weight 0

    def measure_slice(self, read_blocks: ReadBlocks, name: str, num_elements: int) -> SliceStats:
        """Compute ⟨a, a⟩, ⟨b, b⟩ and ⟨a, b⟩: each row's sum in float64, and those added without rounding in between.

        Args:
            read_blocks: yields the slice's values, float64 `[sources, …, columns]`, a and b last; called once.
            name: of the slice, for the error.
            num_elements: not used.

        Raises:
            PermanentError: one of the three is not finite in float64.
        """
        rows: tuple[list[float], ...] = ([], [], [])
        for *_, a, b in read_blocks():
            for row, product in zip(rows, (a * a, b * b, a * b), strict=True):
                row += product.sum(-1).view(-1).tolist()
        aa, bb, ab = map(math.fsum, rows)
        if not all(map(math.isfinite, (aa, bb, ab))):
            raise PermanentError(f"{name}: the squares of its values are beyond float64: they must not be merged")
        return aa, bb, ab

    def coefficients(self, weights: tuple[float, ...], stats: SliceStats | None) -> tuple[float, ...]:
        """Return sin((1 − t)·θ) / sin θ and sin(t·θ) / sin θ.

        Args:
            weights: 1 − t and t; before them the pretrained checkpoint's 0, where it is read. A member is left out
                where its weight is 0 in every tensor.
            stats: ⟨a, a⟩, ⟨b, b⟩ and ⟨a, b⟩ of the slice; None where it was not measured.

        Returns:
            One for each weight; `weights` themselves where there are no statistics, a member has weight 0, or there is
            no arc.
        """
        if stats is None or not self.needs_stats(weights):
            return weights
        angle = _angle(stats)
        if math.sin(angle) < MIN_SIN_ANGLE:
            return weights
        return tuple(math.sin(weight * angle) / math.sin(angle) for weight in weights)  # of weight 0 stays 0

    def reference_values(
        self, values: torch.Tensor, weights: Sequence[float], slice_box: SliceBox, stats: SliceStats | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the rotation of a towards b: M = cos(t·θ)·a + sin(t·θ)·(b − cos θ · a) / sin θ.

        Where `coefficients` are those of the straight line, so is this.

        Args:
            values: float64 `[sources, elements]`, a and b last.
            weights: one for each source, as for `coefficients`.
            slice_box: box of the elements; not used.
            stats: ⟨a, a⟩, ⟨b, b⟩ and ⟨a, b⟩ of the slice; None where it was not measured.

        Returns:
            float64 `[elements]` each: the values, and the sum of the magnitudes of their summands.
        """
        if stats is None or not self.needs_stats(weights) or math.sin(_angle(stats)) < MIN_SIN_ANGLE:
            return super().reference_values(values, weights, slice_box, None)
        (*_, a, b), angle, t = values, _angle(stats), weights[-1]
        cos_part, sin_part = math.cos(t * angle), math.sin(t * angle) / math.sin(angle)
        magnitude = (abs(cos_part) + abs(sin_part * math.cos(angle))) * a.abs() + abs(sin_part) * b.abs()
        return cos_part * a + sin_part * (b - math.cos(angle) * a), magnitude


def _angle(stats: SliceStats) -> float:
    """Compute θ in [0, π]; 0 where a vector is zero."""
    aa, bb, ab = stats
    length = math.sqrt(aa) * math.sqrt(bb)
    return math.acos(max(-1.0, min(1.0, ab / length))) if length else 0.0
