"""DARE (arXiv 2311.03099): drop a random fraction p of each task vector, rescale the rest and add them up.

    m_i ~ Bernoulli(1 − p), element by element
    τ̃_i = m_i ⊙ τ_i / (1 − p),  so that E[τ̃_i] = τ_i = M_i − M_pretrained
    M = M_pretrained + λ · Σ_i w_i · τ̃_i

No random-number generator is used: whether an element is dropped is a hash of the seed, the member's index, the
parameter's name, layer and expert, and the element's index in it. So it depends neither on the order in which elements
are read, nor on how the checkpoints are sharded and their tensors are stacked.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from megatron_bai.errors import UserError
from megatron_bai.merge.methods.task_arithmetic import SummedTaskVectors
from megatron_bai.merge.recipe.recipe import SliceStats, require_distinct
from megatron_bai.merge.recipe.slices import SliceBox

if TYPE_CHECKING:
    from megatron_bai.merge.methods.dare_ties import DareTies

# SplitMix64 (Steele, Lea, Flood 2014): its increment, and the multipliers and shifts of its finaliser
GOLDEN = 0x9E3779B97F4A7C15
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
LAST = 31
BITS = 53  # of a hash that are compared with p


@dataclass(frozen=True, kw_only=True)
class Dare(SummedTaskVectors):
    """Task vectors with random elements dropped, rescaled and summed.

    Args:
        drop_rate: p, in [0, 1).
        seed: of the choice of elements.
    """

    method: ClassVar[str] = "dare"
    title: ClassVar[str] = "DARE (arXiv 2311.03099)"
    elementwise: ClassVar[bool] = True

    drop_rate: float
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_drops(self)

    def fingerprint_fields(self) -> dict[str, object]:
        """Return the method, λ, p and the seed."""
        return {"method": self.method, "scale": self.scale, "drop_rate": self.drop_rate, "seed": self.seed}

    def combine(
        self, values: torch.Tensor, weights: Sequence[float], slice_box: SliceBox, stats: SliceStats | None
    ) -> torch.Tensor:
        """Compute M_pretrained + λ · Σ_i w_i · τ̃_i.

        Args:
            values: float64 `[sources, elements]`, the pretrained checkpoint first; not changed.
            weights: one for each source: the pretrained checkpoint's, which is not used, then w_i, of any sign.
            slice_box: box of the elements; which are dropped depends on their slice's name and their indices in it.
            stats: not used: DARE measures nothing.

        Returns:
            float64 `[elements]`; where the sum is 0, the pretrained checkpoint's bits.
        """
        base = values[0]
        delta = torch.zeros_like(base)
        element_indices = slice_box.element_indices()
        for member_index, weight in enumerate(weights[1:], 1):
            if weight != 0:
                factor = self.scale * weight / (1 - self.drop_rate)
                mask = keep_mask(self.seed, member_index, slice_box.slice_name, element_indices, self.drop_rate)
                delta += (values[member_index] - base).mul_(mask).mul_(factor)
        return torch.where(delta == 0, base, base + delta)

    def reference_values(
        self, values: torch.Tensor, weights: Sequence[float], slice_box: SliceBox, stats: SliceStats | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the definition as one sum over all checkpoints, with the mask as a factor 0 or 1.

        Args:
            values: float64 `[sources, elements]`, the pretrained checkpoint first; sources of weight 0 may be zero.
            weights: one for each source: the pretrained checkpoint's, which is not used, then w_i, of any sign.
            slice_box: box of the elements, from which the mask is computed again.
            stats: not used: DARE measures nothing.

        Returns:
            float64 `[elements]` each: the values, and the sum of the magnitudes of their summands.
        """
        indices = slice_box.element_indices()
        masks = [keep_mask(self.seed, n, slice_box.slice_name, indices, self.drop_rate) for n in range(1, len(weights))]
        factors = torch.tensor(weights[1:], dtype=torch.float64).unsqueeze(1) * torch.stack(masks) * self.scale
        factors /= 1 - self.drop_rate
        exact = values[0] * (1 - factors.sum(0)) + (factors * values[1:]).sum(0)
        return exact, values[0].abs() * (1 + factors.abs().sum(0)) + (factors * values[1:]).abs().sum(0)


def require_drops(method: "Dare | DareTies") -> None:
    """Raise a UserError unless a method's sources are distinct and its drop rate leaves elements.

    Args:
        method: one that drops elements.
    """
    require_distinct(method)
    if not 0 <= method.drop_rate < 1:
        raise UserError(f"merge.drop_rate is {method.drop_rate:g}: it lies between 0 and 1, and is not 1")


def keep_mask(seed: int, member_index: int, name: str, element_indices: torch.Tensor, drop_rate: float) -> torch.Tensor:
    """Choose the elements of a slice that are kept.

    Args:
        seed: of the choice.
        member_index: of the member, from 1.
        name: of the slice.
        element_indices: int64 `[N]`, of the elements in their slice, in row-major order.
        drop_rate: p, the expected fraction that is dropped.

    Returns:
        bool `[N]`.
    """
    stream = hashlib.sha256(f"{seed} {member_index} {name}".encode()).digest()
    hashed = (element_indices * _to_int64(GOLDEN)).add_(_to_int64(int.from_bytes(stream[:8], "little")))
    for shift, multiplier in MIX:
        hashed.bitwise_xor_(_logical_shift_right(hashed, shift)).mul_(_to_int64(multiplier))
    hashed.bitwise_xor_(_logical_shift_right(hashed, LAST))
    return _logical_shift_right(hashed, 64 - BITS).ge(round(drop_rate * 2**BITS))


def _to_int64(number: int) -> int:
    """Return the int64 that has the bits of a 64-bit number; arithmetic modulo 2⁶⁴ is the same for both."""
    return number - (1 << 64) if number >> 63 else number


def _logical_shift_right(numbers: torch.Tensor, places: int) -> torch.Tensor:
    """Shift right and fill with zeros, where int64's own shift fills with the sign."""
    return (numbers >> places).bitwise_and_((1 << 64 - places) - 1)
