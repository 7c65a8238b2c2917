"""TIES (arXiv 2306.01708): trim, elect the sign, merge what agrees.

For the task vectors τ_i = M_i − M_pretrained of each parameter, element by element:

    trim    τ̂_i = τ_i where |τ_i| is among the parameter's largest, else 0
    elect   γ = sgn(Σ_i w_i · τ̂_i)
    merge   M = M_pretrained + λ · (Σ_{i: sgn τ̂_i = γ} w_i · τ̂_i) / (Σ_{i: sgn τ̂_i = γ} w_i)

The paper has w_i = 1. Where the trimmed values cancel, γ = 0 and the pretrained value stays.

Of n elements the largest k = max(⌊density · n⌋, 1) are kept, and with them all that are as large as the k-th, so that
the choice does not depend on the order in which elements are read. Magnitudes are compared in float32, whose bits, as
integers, are in the order of the numbers; so the k-th largest is found exactly by histograms: one pass counts the upper
16 bits, a second the lower 15 of the elements in the bin that holds the k-th. That needs two tables a member, whatever
the parameter's size.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch

from megatron_bai.errors import UserError
from megatron_bai.merge.methods.task_arithmetic import TaskVectorMethod
from megatron_bai.merge.recipe.recipe import ReadBlocks, SliceStats, require_distinct, require_no_negative
from megatron_bai.merge.recipe.slices import SliceBox

LOW = 15  # bits that the second pass counts; the sign is 0


@dataclass(frozen=True, kw_only=True)
class Ties(TaskVectorMethod):
    """Task vectors trimmed, and averaged where they agree with the elected sign.

    Args:
        weights: none negative; only their ratios matter.
        density: the fraction of each parameter's elements that is kept, in (0, 1].
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
        require_no_negative(self, "TIES averages")

    def fingerprint_fields(self) -> dict[str, object]:
        """Return the method, λ and the density."""
        return {"method": self.method, "scale": self.scale, "density": self.density}

    def needs_stats(self, weights: Sequence[float]) -> bool:
        """Return whether anything is trimmed."""
        return self.density < 1

    def measure_slice(self, read_blocks: ReadBlocks, name: str, num_elements: int) -> SliceStats:
        """Compute each member's threshold: the k-th largest |τ|.

        Args:
            read_blocks: yields the slice's values, float64 `[sources, …, columns]`, the pretrained checkpoint first;
                called twice.
            name: of the slice; not used.
            num_elements: n, of which the largest k = max(⌊density · n⌋, 1) are kept.

        Returns:
            One threshold for each member, in their order: a float32 number, at least 0.
        """
        # the density as it is written: 0.29 · 100 in float64 is less than 29
        rank = max(math.floor(Fraction(repr(self.density)) * num_elements), 1)
        high = _histogram(read_blocks, 31 - LOW, lambda bits: bits >> LOW)
        upper_bins = [_kth_largest(counts, rank) for counts in high]
        uppers = torch.tensor([upper for upper, _ in upper_bins], dtype=torch.int32).unsqueeze(1)
        mask = (1 << LOW) - 1
        low = _histogram(read_blocks, LOW, lambda bits: torch.where(bits >> LOW == uppers, bits & mask, 1 << LOW))
        lowers = [_kth_largest(counts, left)[0] for counts, (_, left) in zip(low, upper_bins, strict=True)]
        bits = [upper << LOW | lower for (upper, _), lower in zip(upper_bins, lowers, strict=True)]
        return tuple(torch.tensor(bits, dtype=torch.int32).view(torch.float32).tolist())

    def combine(
        self, values: torch.Tensor, weights: Sequence[float], slice_box: SliceBox, stats: SliceStats | None
    ) -> torch.Tensor:
        """Compute M_pretrained + λ · the mean of the trimmed values that agree with the elected sign.

        Args:
            values: float64 `[sources, elements]`, the pretrained checkpoint first; not changed.
            weights: one for each source: the pretrained checkpoint's, which is not used, then w_i, at least 0.
            slice_box: box of the elements; not used.
            stats: the members' thresholds in the slice; None where the density is 1, and nothing is trimmed.

        Returns:
            float64 `[elements]`; where no member moves an element, the pretrained checkpoint's bits.
        """
        base = values[0]
        weight_column = torch.tensor(weights[1:], dtype=torch.float64).unsqueeze(1)
        weighted = self._trim(values, stats).mul_(weight_column)
        sign = ordered_sum(weighted).sign_()
        agreeing = weighted.mul_(sign).clamp_(min=0)  # |w · τ̂| of those that agree
        delta = ordered_sum(agreeing).mul_(sign)
        agreeing_weight = ordered_sum((agreeing > 0) * weight_column)
        delta.div_(agreeing_weight.clamp_(min=torch.finfo(torch.float64).tiny)).mul_(self.scale)
        return torch.where(delta == 0, base, base + delta)

    def reference_values(
        self, values: torch.Tensor, weights: Sequence[float], slice_box: SliceBox, stats: SliceStats | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute sum and mean of the positive values and of the negative ones, and take the mean of the larger sum.

        Args:
            values: float64 `[sources, elements]`, the pretrained checkpoint first; sources of weight 0 may be zero.
            weights: one for each source: the pretrained checkpoint's, which is not used, then w_i, at least 0.
            slice_box: box of the elements; not used.
            stats: the members' thresholds in the slice; None where the density is 1, and nothing is trimmed.

        Returns:
            float64 `[elements]` each: the values, and |M_pretrained| + |λ · mean|, infinite where the two sums are so
            close that rounding decides the sign.
        """
        base, trimmed = values[0], self._trim(values, stats)
        column = torch.tensor(weights[1:], dtype=torch.float64)
        up, down = column @ trimmed.clamp(min=0), column @ -trimmed.clamp(max=0)
        mean_up = up / (column @ (trimmed > 0).double()).clamp(min=torch.finfo(torch.float64).tiny)
        mean_down = down / (column @ (trimmed < 0).double()).clamp(min=torch.finfo(torch.float64).tiny)
        delta = self.scale * torch.where(up > down, mean_up, torch.where(up < down, -mean_down, 0))
        near = (up - down).abs() <= 4 * len(column) * torch.finfo(torch.float64).eps * (up + down)
        magnitude = base.abs() + delta.abs()
        return base + delta, magnitude.masked_fill(near & (up > 0), math.inf)

    def _trim(self, values: torch.Tensor, stats: SliceStats | None) -> torch.Tensor:
        """Compute τ̂ of every member, float64 `[members, elements]`."""
        vectors = values[1:] - values[0]
        for vector, threshold in zip(vectors, stats or (), strict=False):
            vector.mul_(vector.float().abs_() >= threshold)
        return vectors


def ordered_sum(rows: torch.Tensor) -> torch.Tensor:
    """Add the rows in their order: `sum` may choose another order for another number of columns.

    Args:
        rows: float64 `[rows, columns]`, at least one row.

    Returns:
        float64 `[columns]`.
    """
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total


def _histogram(read_blocks: ReadBlocks, num_bits: int, bucket: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Count the buckets in the bits of each member's |τ|: int64 `[members, 2**num_bits]`; larger ones do not count."""
    counts: torch.Tensor | None = None
    for values in read_blocks():
        magnitudes = (values[1:] - values[0]).float().abs_().view(len(values) - 1, -1)
        buckets = bucket(magnitudes.view(torch.int32))
        if counts is None:
            counts = torch.zeros(len(buckets), 1 << num_bits, dtype=torch.int64)
        for row, member in zip(counts, buckets, strict=True):
            row += torch.bincount(member, minlength=row.numel())[: 1 << num_bits]
    assert counts is not None, "a slice has elements"
    return counts


def _kth_largest(counts: torch.Tensor, rank: int) -> tuple[int, int]:
    """Find the bucket that holds the `rank`-th largest, and its rank in there."""
    above = counts.flip(0).cumsum(0)  # number of elements in a bucket and those over it, the uppermost first
    position = int(torch.searchsorted(above, rank))
    assert position < len(counts), "there are fewer elements than are to be kept"
    before = int(above[position - 1]) if position else 0
    return len(counts) - 1 - position, rank - before
