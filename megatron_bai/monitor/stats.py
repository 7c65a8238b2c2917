"""Statistics that add up over micro-batches and ranks: means as (sum, count), and maxima."""

from collections import defaultdict

import torch
import torch.distributed as dist


class Stats:
    """Named running means and maxima."""

    def __init__(self) -> None:
        self._means: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._maxima: dict[str, float] = {}

    def mean(self, name: str, values: torch.Tensor) -> None:
        """Add the elements of `values`, of any shape, to a mean."""
        self.ratio(name, float(values.double().sum()), values.numel())

    def ratio(self, name: str, numerator: float, denominator: float) -> None:
        """Add to a mean's sum and count."""
        entry = self._means[name]
        entry[0] += numerator
        entry[1] += denominator

    def max(self, name: str, values: torch.Tensor) -> None:
        """Take the maximum over `values`; an empty one changes nothing."""
        if values.numel():
            self._maxima[name] = max(self._maxima.get(name, float("-inf")), float(values.max()))

    def add(self, other: "Stats") -> "Stats":
        for name, (numerator, denominator) in other._means.items():
            self.ratio(name, numerator, denominator)
        for name, value in other._maxima.items():
            self._maxima[name] = max(self._maxima.get(name, float("-inf")), value)
        return self

    def gathered(self, contributes: bool) -> "Stats":
        """The sum over the ranks that contribute, on every rank. Collective over the world."""
        mine = (dict(self._means), self._maxima) if contributes else ({}, {})
        everyone: list[tuple] = [()] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        total = Stats()
        for means, maxima in everyone:
            part = Stats()
            part._means.update(means)
            part._maxima = maxima
            total.add(part)
        return total

    def values(self) -> dict[str, float]:
        """Means and maxima by name; a mean over nothing is left out."""
        means = {name: total / count for name, (total, count) in self._means.items() if count}
        return means | self._maxima
