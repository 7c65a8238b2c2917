"""Averages over the checkpoints of one run: uniform, or an exponential moving average with the newest last.

    average   M = Σ_i M_i / n                                     a uniform soup (arXiv 2203.05482)
    ema       M = e_n,  e_1 = M_1,  e_i = d · e_{i−1} + (1 − d) · M_i
              = d^{n−1} · M_1 + Σ_{i>1} (1 − d) · d^{n−i} · M_i

Both are one weighted sum in one pass; the coefficients follow from the number of members and the decay d.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from megatron_bai.merge.recipe.recipe import Recipe, Term, require_distinct


@dataclass(frozen=True, kw_only=True)
class RunAverage(Recipe):
    """A method whose coefficients follow from the order of the members.

    Args:
        pretrained: gives the layout and the non-tensor state, and is not averaged; empty: the first member gives them.
        members: the checkpoints to average, the oldest first.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.members)) < len(self.members):
            require_distinct(self)

    @abstractmethod
    def member_coefficients(self) -> tuple[float, ...]:
        """Return the members' coefficients, in their order; they sum to 1."""

    def terms(self, key: str | None = None, layer: int | None = None) -> tuple[Term, ...]:
        """Return the members' coefficients, which are the same in every tensor.

        Args:
            key: not used.
            layer: not used.

        Returns:
            The members in their order; before them the pretrained checkpoint, where one is given, with coefficient 0
            unless it is also a member.
        """
        coefficients = {self.pretrained: 0.0} if self.pretrained else {}
        coefficients |= dict(zip(self.members, self.member_coefficients(), strict=True))
        return tuple(Term(source, coefficient) for source, coefficient in coefficients.items())


@dataclass(frozen=True, kw_only=True)
class Average(RunAverage):
    """The mean of the members."""

    method: ClassVar[str] = "average"
    title: ClassVar[str] = "a uniform average (arXiv 2203.05482)"

    def member_coefficients(self) -> tuple[float, ...]:
        """Return 1/n for each member."""
        return (1 / len(self.members),) * len(self.members)


@dataclass(frozen=True, kw_only=True)
class Ema(RunAverage):
    """An exponential moving average of the members, of which the last counts most.

    Args:
        decay: d, from 0, the last member, to 1, the first.
    """

    method: ClassVar[str] = "ema"
    title: ClassVar[str] = "an exponential moving average"
    sweep_setting: ClassVar[str] = "decay"

    decay: float

    def member_coefficients(self) -> tuple[float, ...]:
        """Return d^{n−1}, then (1 − d) · d^{n−i}."""
        n = len(self.members)
        first = self.decay ** (n - 1)
        return (first, *((1 - self.decay) * self.decay ** (n - i) for i in range(2, n + 1)))
