"""Proving that the bytes that were read are those that were saved, in the same pass.

A record is read in parts, by several threads and ranks. The CRC-32 of two adjacent parts follows from theirs alone,
so each part's is computed once, when its bytes are in the cache anyway, and nothing is read twice.
"""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from megatron_bai.checkpoint import crc32
from megatron_bai.distributed.rank_group import Ranks

Place = tuple[str, int]  # an item of a checkpoint: its file, and where it starts there
Part = tuple[int, int, int]  # of a record: first byte, length, CRC-32


@dataclass
class _Parts:
    length: int  # of the record
    parts: set[Part] = field(default_factory=set)
    total: int = 0  # bytes of the parts


class Checks:
    """What one process knows of a checkpoint's records."""

    def __init__(self) -> None:
        self._whole: dict[Place, int] = {}  # CRC-32s
        self._parts: dict[Place, _Parts] = {}
        self._lock = threading.Lock()

    def add(self, place: Place, part: Part, length: int) -> int | None:
        """Note a part of a record of `length` bytes; returns the record's CRC-32 if that completes it."""
        with self._lock:
            if place in self._whole:
                return None
            if part[1] == length:
                self._whole[place] = part[2]
                self._parts.pop(place, None)
                return part[2]
            found = self._parts.setdefault(place, _Parts(length))
            if part not in found.parts:
                found.parts.add(part)
                found.total += part[1]
            crc = _join(found.parts, length) if found.total == length else None
            if crc is not None:
                self._whole[place] = crc
                del self._parts[place]
            return crc

    def settle(
        self, places: Iterable[Place], ranks: Ranks, resolve: Callable[[Place, int | None, bool], int]
    ) -> dict[Place, int]:
        """The CRC-32 of every one of `places`, from what all ranks have read; every rank calls it.

        Args:
            resolve: called on one rank with each place that no rank read whole: the place, its CRC-32 if the parts of
                all ranks make it up, and whether there are parts at all. Returns the CRC-32.
        """
        shares = ranks.together(lambda: (self._whole, self._parts))
        known = {place: crc for whole, _ in shares for place, crc in whole.items()}
        parts: dict[Place, _Parts] = {}
        for place, share in ((place, share) for _, found in shares for place, share in found.items()):
            parts.setdefault(place, _Parts(share.length)).parts.update(share.parts)
        rest = sorted((set(places) | parts.keys()) - known.keys())

        def work() -> dict[Place, int]:
            mine = rest[ranks.rank :: ranks.size]
            joined = {place: _join(parts[place].parts, parts[place].length) for place in mine if place in parts}
            return {place: resolve(place, joined.get(place), place in parts) for place in mine}

        for resolved in ranks.together(work):
            known |= resolved
        return known


def _join(parts: set[Part], length: int) -> int | None:
    """The CRC-32 of a record, or None if the parts overlap or leave gaps."""
    crc, end = 0, 0
    for begin, size, part in sorted(parts):
        if begin != end:
            return None
        crc, end = crc32.combine(crc, part, size), begin + size
    return crc if end == length else None
