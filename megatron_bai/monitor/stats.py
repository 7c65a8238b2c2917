"""Statistics that add up over micro-batches and ranks, so that none depends on how a batch was split.

A mean is (sum, count), an effective sample size (count, Σ w, Σ w²), a tally the number of times each integer was seen,
exact: quantiles and entropies are computed from the whole tally, never averaged over micro-batches.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

LARGEST_WEIGHT = 1e140  # its square, times as many tokens as a step can have, is a float64


class Stats:
    """Named running statistics.

    Attributes:
        tallies: for each name, how often each integer was seen.
    """

    def __init__(self) -> None:
        self._means: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._weights: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        self._maxima: dict[str, float] = {}
        self.tallies: dict[str, Counter[int]] = defaultdict(Counter)

    def mean(self, name: str, values: torch.Tensor) -> None:
        """Add the elements of `values`, of any shape, to a mean.

        Args:
            name: of the metric.
            values: of any shape and dtype, summed as float64; each element counts 1.
        """
        self.ratio(name, float(values.double().sum()), values.numel())

    def ratio(self, name: str, numerator: float, denominator: float) -> None:
        """Add to a mean's sum and count.

        Args:
            name: of the metric, whose value is Σ numerator / Σ denominator.
            numerator: added to the sum.
            denominator: added to the count; may be 0, for a sum whose count is added by another call.
        """
        entry = self._means[name]
        entry[0] += numerator
        entry[1] += denominator

    def max(self, name: str, values: torch.Tensor) -> None:
        """Take the maximum over `values`; an empty one changes nothing.

        Args:
            name: of the metric.
            values: of any shape and dtype.
        """
        if values.numel():
            self._maxima[name] = max(self._maxima.get(name, float("-inf")), float(values.max()))

    def sample_size(self, name: str, weights: torch.Tensor) -> None:
        """Add importance weights to an effective sample size.

        The value is Kish's, as a share of the number of weights, (Σ w)² / (n · Σ w²): 1 when all are equal, 1/n when
        all but one are 0. Weights above `LARGEST_WEIGHT` count as that much, so that the sum of squares is finite: a
        weight beyond float64 leaves the share 1/n, as it should.

        Args:
            name: of the metric.
            weights: of any shape, ≥ 0, not logarithms.
        """
        weights = weights.double().clamp(max=LARGEST_WEIGHT)
        self._add_weights(name, (weights.numel(), float(weights.sum()), float(weights.square().sum())))

    def tally(self, name: str, values: torch.Tensor) -> None:
        """Count the elements of an integer tensor of any shape.

        Args:
            name: key in `tallies`.
            values: integers of any shape.
        """
        seen, counts = values.unique(return_counts=True)
        self.tallies[name].update(dict(zip(seen.tolist(), counts.tolist(), strict=True)))

    def add(self, other: "Stats") -> "Stats":
        """Add the statistics of another in place, and return this one."""
        for name, (numerator, denominator) in other._means.items():
            self.ratio(name, numerator, denominator)
        for name, sums in other._weights.items():
            self._add_weights(name, sums)
        for name, value in other._maxima.items():
            self._maxima[name] = max(self._maxima.get(name, float("-inf")), value)
        for name, counts in other.tallies.items():
            self.tallies[name].update(counts)
        return self

    def gather_sum(self, include: bool) -> "Stats":
        """Sum the statistics of the ranks that `include` theirs, on every rank. *Collective* over the world."""
        local = (dict(self._means), dict(self._weights), self._maxima, dict(self.tallies)) if include else None
        gathered: list[tuple[Any, ...] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, local)
        total = Stats()
        for fields in gathered:
            if fields is not None:
                stats = Stats()
                stats._means, stats._weights, stats._maxima, stats.tallies = fields
                total.add(stats)
        return total

    def values(self) -> dict[str, float]:
        """Return all but the tallies by name; a mean over nothing and a sample size of weights 0 are left out."""
        means = {name: total / count for name, (total, count) in self._means.items() if count}
        sizes = {name: s * s / (n * squares) for name, (n, s, squares) in self._weights.items() if squares}
        return means | sizes | self._maxima

    def _add_weights(self, name: str, sums: Sequence[float]) -> None:
        self._weights[name] = [a + b for a, b in zip(self._weights[name], sums, strict=True)]


def quantile(counts: Counter[int], share: float) -> int:
    """Return the smallest value with at least `share` of all counts at or below it.

    That is the inverse of the empirical distribution function.

    Args:
        counts: how often each value was seen.
        share: from 0 to 1.

    Raises:
        ValueError: nothing was counted.
    """
    if not counts.total():
        raise ValueError("a quantile of nothing")
    needed, seen = math.ceil(share * counts.total()), 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= max(needed, 1):
            return value
    raise AssertionError("counts do not reach their own total")


def entropy(counts: Counter[int]) -> float:
    """Compute −Σ p log p in nats, p the share of each value."""
    total = counts.total()
    return -sum(n / total * math.log(n / total) for n in counts.values() if n)
