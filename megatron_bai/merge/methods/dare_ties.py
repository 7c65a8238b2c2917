"""DARE with the sign election of TIES (arXiv 2311.03099 with 2306.01708), as mergekit's `dare_ties` combines them.

    drop    τ̃_i = m_i ⊙ τ_i / (1 − p) with m_i ~ Bernoulli(1 − p), the elements that `dare` chooses
    elect   γ = sgn(Σ_i w_i · τ̃_i)
    merge   M = M_pretrained + λ · Σ_{i: sgn(w_i · τ̃_i) = γ} w_i · τ̃_i

With `normalize` the sum is divided by that of the weights that are in it. Where the values cancel, γ = 0 and the
pretrained value stays; mergekit takes γ = 1 there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from megatron_bai.merge.methods.dare import keep_mask, require_drops
from megatron_bai.merge.methods.task_arithmetic import TaskVectorMethod
from megatron_bai.merge.methods.ties import ordered_sum
from megatron_bai.merge.recipe.recipe import SliceStats, require_no_negative
from megatron_bai.merge.recipe.slices import SliceBox


@dataclass(frozen=True, kw_only=True)
class DareTies(TaskVectorMethod):
    """Task vectors with random elements dropped, summed where they agree with the elected sign.

    Args:
        drop_rate: p, in [0, 1).
        seed: of the choice of elements, as for `dare`.
        normalize: divide each element's sum by the weights that are in it; none may be negative then.
    """

    method: ClassVar[str] = "dare_ties"
    title: ClassVar[str] = "DARE with TIES' election of signs (arXiv 2311.03099, 2306.01708)"
    elementwise: ClassVar[bool] = True

    drop_rate: float
    seed: int = 0
    normalize: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_drops(self)
        if self.normalize:
            require_no_negative(self, "merge.normalize averages")

    def fingerprint_fields(self) -> dict[str, object]:
        """Return the method and its settings."""
        names = ("method", "scale", "drop_rate", "seed", "normalize")
        return {name: getattr(self, name) for name in names}

    def combine(
        self, values: torch.Tensor, weights: Sequence[float], slice_box: SliceBox, stats: SliceStats | None
    ) -> torch.Tensor:
        """Compute M_pretrained + λ · the sum of the values that agree with the elected sign.

        Args:
            values: float64 `[sources, elements]`, the pretrained checkpoint first; not changed.
            weights: one for each source: the pretrained checkpoint's, which is not used, then w_i, of any sign.
            slice_box: box of the elements; which are dropped depends on their slice's name and their indices in it.
            stats: not used: nothing is measured.

        Returns:
            float64 `[elements]`; where the sum is 0, the pretrained checkpoint's bits.
        """
        base = values[0]
        weighted = (values[1:] - base).mul_(self._masks(len(values), slice_box)).div_(1 - self.drop_rate)
        column = torch.tensor(weights[1:], dtype=torch.float64).unsqueeze(1)
        weighted.mul_(column)
        sign = ordered_sum(weighted).sign_()
        agreeing = weighted.mul_(sign).clamp_(min=0)
        delta = ordered_sum(agreeing).mul_(sign)
        if self.normalize:
            delta.div_(ordered_sum((agreeing > 0) * column).clamp_(min=torch.finfo(torch.float64).tiny))
        delta.mul_(self.scale)
        return torch.where(delta == 0, base, base + delta)

    def reference_values(
        self, values: torch.Tensor, weights: Sequence[float], slice_box: SliceBox, stats: SliceStats | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the sums of the positive values and of the negative ones, and take the larger.

        Args:
            values: float64 `[sources, elements]`, the pretrained checkpoint first; sources of weight 0 may be zero.
            weights: one for each source: the pretrained checkpoint's, which is not used, then w_i, of any sign.
            slice_box: box of the elements, from which the masks are computed again.
            stats: not used: nothing is measured.

        Returns:
            float64 `[elements]` each: the values, and the sum of the magnitudes of their summands, infinite where the
            two sums are so close that rounding decides the sign.
        """
        base, tiny = values[0], torch.finfo(torch.float64).tiny
        column = torch.tensor(weights[1:], dtype=torch.float64).unsqueeze(1)
        summands = column * self._masks(len(values), slice_box) * (values[1:] - base) / (1 - self.drop_rate)
        up, down = summands.clamp(min=0).sum(0), -summands.clamp(max=0).sum(0)
        near = (up - down).abs() <= 4 * len(column) * torch.finfo(torch.float64).eps * (up + down)
        if self.normalize:
            weight_up, weight_down = ((column * (sign * summands > 0)).sum(0).clamp(min=tiny) for sign in (1, -1))
        else:
            weight_up = weight_down = torch.ones_like(up)
        delta = self.scale * torch.where(up > down, up / weight_up, torch.where(up < down, -down / weight_down, 0))
        magnitude = base.abs() + abs(self.scale) * ((up + values.abs().sum(0)) / weight_up + down / weight_down)
        return base + delta, magnitude.masked_fill(near & (up > 0), math.inf)

    def _masks(self, num_sources: int, slice_box: SliceBox) -> torch.Tensor:
        """Choose the elements of every member that are kept: bool `[members, elements]`."""
        indices, name = slice_box.element_indices(), slice_box.slice_name
        members = range(1, num_sources)
        return torch.stack([keep_mask(self.seed, member, name, indices, self.drop_rate) for member in members])
