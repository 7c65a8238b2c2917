"""Which samples of a step are kept: a function of the samples alone, not of the ranks that have them."""

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import NamedTuple

ORDERS = ("best", "worst", "longest", "discrepancy", "random")
Key = tuple[int, int]  # prompt's index in its split, and member of the group


class Candidate(NamedTuple):
    """What the choice looks at.

    Attributes:
        prompt_index: of the prompt in its split.
        member: of the prompt's group.
        reward: None where it failed.
        length: tokens of the response.
        discrepancy: between the engines, nats; None where it is not known.
    """

    prompt_index: int
    member: int
    reward: float | None
    length: int
    discrepancy: float | None

    @property
    def key(self) -> Key:
        """What names the sample within its step and split."""
        return self.prompt_index, self.member


def choose(candidates: Sequence[Candidate], count: int, salt: str) -> dict[Key, list[str]]:
    """Choose samples in turn: the best, the worst, the longest, that of the highest discrepancy, one at random, again.

    Ties are broken, and `random` is chosen, by a hash of salt and key: the same on every rank and in a run that is
    resumed. Rewards that are 0 and 1 so give every prompt its turn.

    Args:
        candidates: all of the step, in any order.
        count: to choose; all are chosen if they are fewer.
        salt: of the hash: seed, split and step.

    Returns:
        The chosen keys in the order of their choice, each with the orders that it came first in or was taken from.
    """
    orders = _make_orders(candidates, salt)
    chosen: dict[Key, list[str]] = {}
    remaining = {name: iter(order) for name, order in orders.items()}
    while remaining and len(chosen) < count:
        for name in list(remaining):
            if len(chosen) == count:
                break
            candidate = next((c for c in remaining[name] if c.key not in chosen), None)
            if candidate is None:
                del remaining[name]
            else:
                chosen[candidate.key] = [name]
    for name, order in orders.items():
        if order and name not in chosen.get(order[0].key, [name]):
            chosen[order[0].key].append(name)
    return chosen


def _make_orders(candidates: Sequence[Candidate], salt: str) -> dict[str, list[Candidate]]:
    """Sort the candidates by each of `ORDERS`; those without a reward or discrepancy are left out of its orders."""
    ordered = [candidate for _, candidate in sorted(_hashed(candidates, salt))]
    rewarded = [c for c in ordered if c.reward is not None]
    compared = [c for c in ordered if c.discrepancy is not None]
    return {  # sorting is stable: ties stay in the order of the hash
        "best": sorted(rewarded, key=lambda c: -(c.reward or 0.0)),
        "worst": sorted(rewarded, key=lambda c: c.reward or 0.0),
        "longest": sorted(ordered, key=lambda c: -c.length),
        "discrepancy": sorted(compared, key=lambda c: -(c.discrepancy or 0.0)),
        "random": ordered,
    }


def _hashed(candidates: Sequence[Candidate], salt: str) -> Iterator[tuple[bytes, Candidate]]:
    for candidate in candidates:
        text = f"{salt}/{candidate.prompt_index}/{candidate.member}"
        yield blake2b(text.encode(), digest_size=8).digest(), candidate
