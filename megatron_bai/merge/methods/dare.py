"""DARE (arXiv 2311.03099): drop a random share p of each task vector and rescale the rest, then add them up.

    m_i ~ Bernoulli(1 − p), element by element
    τ̃_i = m_i ⊙ τ_i / (1 − p),  so that E[τ̃_i] = τ_i = M_i − M_pretrained
    M = M_pretrained + λ · Σ_i w_i · τ̃_i

Nothing is drawn in turn: whether an element is dropped is a hash of the seed, the member's number, the parameter's
name, layer and expert, and the element's number in it. So it is the same whatever order elements are read in, however
the checkpoints are sharded and however their tensors are stacked.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from megatron_bai.errors import UserError
from megatron_bai.merge.methods.task_arithmetic import SummedTaskVectors
from megatron_bai.merge.recipe.recipe import SliceStats, require_distinct
from megatron_bai.merge.recipe.slices import SliceBox

# SplitMix64 (Steele, Lea, Flood 2014): its increment, and the multipliers and shifts of its finaliser
GOLDEN = 0x9E3779B97F4A7C15
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
LAST = 31
BITS = 53  # of a hash that are compared with p


@dataclass(frozen=True, kw_only=True)
class Dare(SummedTaskVectors):
    """Task vectors thinned out at random and summed.

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
        require_distinct(self)
        if not 0 <= self.drop_rate < 1:
            raise UserError(f"merge.drop_rate is {self.drop_rate:g}: it lies between 0 and 1, and is not 1")

    def fingerprint_fields(self) -> dict[str, object]:
        return {"method": self.method, "scale": self.scale, "drop_rate": self.drop_rate, "seed": self.seed}

    def combine(
        self, values: torch.Tensor, weights: Sequence[float], part: SliceBox, stats: SliceStats | None
    ) -> torch.Tensor:
        base = values[0]
        step = torch.zeros_like(base)
        elements = part.element_indices()
        for number, weight in enumerate(weights[1:], 1):
            if weight != 0:
                factor = self.scale * weight / (1 - self.drop_rate)
                kept = keep_mask(self.seed, number, part.slice_name, elements, self.drop_rate)
                step += (values[number] - base).mul_(kept).mul_(factor)
        return torch.where(step == 0, base, base + step)

    def reference_values(
        self, values: torch.Tensor, weights: Sequence[float], part: SliceBox, stats: SliceStats | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum over all checkpoints that the definition comes to, with the mask as a factor 0 or 1."""
        elements = part.element_indices()
        masks = [keep_mask(self.seed, n, part.slice_name, elements, self.drop_rate) for n in range(1, len(weights))]
        factors = torch.tensor(weights[1:], dtype=torch.float64).unsqueeze(1) * torch.stack(masks) * self.scale
        factors /= 1 - self.drop_rate
        exact = values[0] * (1 - factors.sum(0)) + (factors * values[1:]).sum(0)
        return exact, values[0].abs() * (1 + factors.abs().sum(0)) + (factors * values[1:]).abs().sum(0)


def keep_mask(seed: int, number: int, name: str, elements: torch.Tensor, drop_rate: float) -> torch.Tensor:
    """Which elements of a slice stay: bool, of the shape of `elements`.

    Args:
        number: the member's, from 1.
        name: the slice's.
        elements: int64, their numbers in the slice.
    """
    stream = hashlib.sha256(f"{seed} {number} {name}".encode()).digest()
    hashed = (elements * _to_int64(GOLDEN)).add_(_to_int64(int.from_bytes(stream[:8], "little")))
    for shift, multiplier in MIX:
        hashed.bitwise_xor_(_logical_shift_right(hashed, shift)).mul_(_to_int64(multiplier))
    hashed.bitwise_xor_(_logical_shift_right(hashed, LAST))
    return _logical_shift_right(hashed, 64 - BITS).ge(round(drop_rate * 2**BITS))


def _to_int64(number: int) -> int:
    """The int64 that has the bits of a 64-bit number; arithmetic modulo 2⁶⁴ is the same for both."""
    return number - (1 << 64) if number >> 63 else number


def _logical_shift_right(numbers: torch.Tensor, places: int) -> torch.Tensor:
    """Shifted right with zeros coming in, which int64 would replace by its sign."""
    return (numbers >> places).bitwise_and_((1 << 64 - places) - 1)
