"""TIES (arXiv 2306.01708): trim, elect sign, merge what agrees.

For the task vectors τ_i = M_i − M_pretrained of each parameter, element by element:

    trim    τ̂_i = τ_i where |τ_i| is among the parameter's largest, else 0
    elect   γ = sgn(Σ_i w_i · τ̂_i)
    merge   M = M_pretrained + λ · (Σ_{i: sgn τ̂_i = γ} w_i · τ̂_i) / (Σ_{i: sgn τ̂_i = γ} w_i)

The paper has w_i = 1. Where the trimmed values cancel, γ = 0 and the pretrained value stays.

Of n elements the largest k = max(⌊density · n⌋, 1) are kept, and with them all that are as large as the k-th, so that
the choice does not depend on the order in which elements are read. Magnitudes are compared in float32, whose bits, as
integers, are in the order of the numbers; so the k-th largest is found exactly by counting: one pass counts the upper
16 bits, a second the lower 15 of those elements that have the upper bits found. That needs two tables a member,
whatever the parameter's size.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch

from megatron_bai.errors import UserError
from megatron_bai.merge.methods.task_arithmetic import TaskVectorMethod
from megatron_bai.merge.recipe.recipe import ReadBlocks, SliceStats, format_numbers, require_distinct
from megatron_bai.merge.recipe.slices import SliceBox

LOW = 15  # bits that the second pass counts; the sign is 0


@dataclass(frozen=True, kw_only=True)
class Ties(TaskVectorMethod):
    """Task vectors trimmed, and averaged where they agree with the elected sign.

    Args:
        weights: none negative; only their ratios matter.
        density: the share of each parameter's elements that is kept, in (0, 1].
    """

    method: ClassVar[str] = "ties"
    title: ClassVar[str] = "TIES (arXiv 2306.01708)"
    stats_passes: ClassVar[int] = 2
    elementwise: ClassVar[bool] = True

    density: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_distinct(self)
        if not 0 < self.density <= 1:
            raise UserError(f"merge.density is {self.density:g}: it lies between 0 and 1, and is not 0")
        for name, weights in self.all_weight_settings():
            if min(weights) < 0:
                raise UserError(f"{name} [{format_numbers(weights)}] holds a negative weight: TIES averages")

    def fingerprint_fields(self) -> dict[str, object]:
        return {"method": self.method, "scale": self.scale, "density": self.density}

    def needs_stats(self, weights: Sequence[float]) -> bool:
        return self.density < 1

    def measure_slice(self, blocks: ReadBlocks, name: str, count: int) -> SliceStats:
        """Each member's threshold: the k-th largest |τ|."""
        # the density as it was written: 0.29 · 100 in float64 is less than 29
        rank = max(math.floor(Fraction(repr(self.density)) * count), 1)
        high = _histogram(blocks, 31 - LOW, lambda bits: bits >> LOW)
        found = [_kth_largest(counts, rank) for counts in high]
        uppers = torch.tensor([upper for upper, _ in found], dtype=torch.int32).unsqueeze(1)
        low = _histogram(blocks, LOW, lambda bits: torch.where(bits >> LOW == uppers, bits & (1 << LOW) - 1, 1 << LOW))
        lowers = [_kth_largest(counts, left)[0] for counts, (_, left) in zip(low, found, strict=True)]
        bits = [upper << LOW | lower for (upper, _), lower in zip(found, lowers, strict=True)]
        return tuple(torch.tensor(bits, dtype=torch.int32).view(torch.float32).tolist())

    def combine(
        self, values: torch.Tensor, weights: Sequence[float], part: SliceBox, stats: SliceStats | None
    ) -> torch.Tensor:
        base = values[0]
        shares = torch.tensor(weights[1:], dtype=torch.float64).unsqueeze(1)
        weighted = self._trim(values, stats).mul_(shares)
        sign = _ordered_sum(weighted).sign_()
        agreeing = weighted.mul_(sign).clamp_(min=0)  # |w · τ̂| of those that agree
        step = _ordered_sum(agreeing).mul_(sign)
        step.div_(_ordered_sum((agreeing > 0) * shares).clamp_(min=torch.finfo(torch.float64).tiny)).mul_(self.scale)
        return torch.where(step == 0, base, base + step)

    def reference_values(
        self, values: torch.Tensor, weights: Sequence[float], part: SliceBox, stats: SliceStats | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """From the two camps: the mass and the mean of the positive values, and those of the negative ones."""
        base, trimmed = values[0], self._trim(values, stats)
        shares = torch.tensor(weights[1:], dtype=torch.float64)
        up, down = shares @ trimmed.clamp(min=0), shares @ -trimmed.clamp(max=0)
        mean_up = up / (shares @ (trimmed > 0).double()).clamp(min=torch.finfo(torch.float64).tiny)
        mean_down = down / (shares @ (trimmed < 0).double()).clamp(min=torch.finfo(torch.float64).tiny)
        step = self.scale * torch.where(up > down, mean_up, torch.where(up < down, -mean_down, 0))
        near = (up - down).abs() <= 4 * len(shares) * torch.finfo(torch.float64).eps * (up + down)
        size = base.abs() + step.abs()
        return base + step, size.masked_fill(near & (up > 0), math.inf)

    def _trim(self, values: torch.Tensor, stats: SliceStats | None) -> torch.Tensor:
        """τ̂ of every member, float64 [members, elements]."""
        vectors = values[1:] - values[0]
        for vector, threshold in zip(vectors, stats or (), strict=False):
            vector.mul_(vector.float().abs_() >= threshold)
        return vectors


def _ordered_sum(rows: torch.Tensor) -> torch.Tensor:
    """Their sum, one after another: `sum` is free to choose another order for another number of columns."""
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total


def _histogram(blocks: ReadBlocks, bits: int, bucket: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """How often each bucket is met in the bits of each member's |τ|: int64 [members, 2**bits]; others do not count."""
    counts: torch.Tensor | None = None
    for values in blocks():
        magnitudes = (values[1:] - values[0]).float().abs_().view(len(values) - 1, -1)
        numbers = bucket(magnitudes.view(torch.int32))
        if counts is None:
            counts = torch.zeros(len(numbers), 1 << bits, dtype=torch.int64)
        for row, member in zip(counts, numbers, strict=True):
            row += torch.bincount(member, minlength=row.numel())[: 1 << bits]
    assert counts is not None, "a slice has elements"
    return counts


def _kth_largest(counts: torch.Tensor, rank: int) -> tuple[int, int]:
    """The bucket that holds the `rank`-th largest, and its rank in there."""
    above = counts.flip(0).cumsum(0)  # how many lie in a bucket and those over it, the uppermost first
    place = int(torch.searchsorted(above, rank))
    assert place < len(counts), "there are fewer elements than are to be kept"
    before = int(above[place - 1]) if place else 0
    return len(counts) - 1 - place, rank - before
