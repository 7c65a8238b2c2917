"""Verify that the bytes that were read are those that were saved, in the same pass.

A record is read in byte ranges, by several threads and ranks. The CRC-32 of two adjacent ranges follows from theirs
alone, so each range's is computed once, when its bytes are in the cache anyway, and nothing is read twice.
"""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from megatron_bai.checkpoint import crc32
from megatron_bai.distributed.rank_group import RankGroup

ItemKey = tuple[str, int]  # an item of a checkpoint: its file, and where it starts there
ByteRange = tuple[int, int, int]  # of a record: first byte, length, CRC-32


@dataclass
class _PartialRecord:
    """The ranges of a record that were read; `num_bytes` is their sum."""

    length: int  # of the record
    ranges: set[ByteRange] = field(default_factory=set)
    num_bytes: int = 0  # bytes of the parts


class RecordCrcs:
    """The CRC-32s of a checkpoint's records, as far as this process has read them."""

    def __init__(self) -> None:
        self._complete: dict[ItemKey, int] = {}  # CRC-32s
        self._partial: dict[ItemKey, _PartialRecord] = {}
        self._lock = threading.Lock()

    def add_range(self, key: ItemKey, byte_range: ByteRange, length: int) -> int | None:
        """Add a range that was read; return the record's CRC-32 if that completes it.

        Args:
            key: of the record's item.
            byte_range: of the record.
            length: of the record, in bytes.
        """
        with self._lock:
            if key in self._complete:
                return None
            if byte_range[1] == length:
                self._complete[key] = byte_range[2]
                self._partial.pop(key, None)
                return byte_range[2]
            record = self._partial.setdefault(key, _PartialRecord(length))
            if byte_range not in record.ranges:
                record.ranges.add(byte_range)
                record.num_bytes += byte_range[1]
            crc = _combine_ranges(record.ranges, length) if record.num_bytes == length else None
            if crc is not None:
                self._complete[key] = crc
                del self._partial[key]
            return crc

    def resolve_all(
        self, keys: Iterable[ItemKey], ranks: RankGroup, compute: Callable[[ItemKey, int | None, bool], int]
    ) -> dict[ItemKey, int]:
        """Return the CRC-32 of every record, from what all ranks have read. *Collective* over `ranks`.

        Args:
            keys: the records' items.
            ranks: which have read.
            compute: called on one rank for each record that no rank read completely, with its key, its CRC-32 if the
                ranges of all ranks make it up, and whether any range was read. Returns the CRC-32.
        """
        gathered = ranks.run_on_all(lambda: (self._complete, self._partial))
        crcs = {key: crc for complete, _ in gathered for key, crc in complete.items()}
        partial: dict[ItemKey, _PartialRecord] = {}
        for key, record in ((key, record) for _, records in gathered for key, record in records.items()):
            partial.setdefault(key, _PartialRecord(record.length)).ranges.update(record.ranges)
        missing = sorted((set(keys) | partial.keys()) - crcs.keys())

        def compute_share() -> dict[ItemKey, int]:
            share = missing[ranks.rank :: ranks.num_ranks]
            combined = {
                key: _combine_ranges(partial[key].ranges, partial[key].length) for key in share if key in partial
            }
            return {key: compute(key, combined.get(key), key in partial) for key in share}

        for computed in ranks.run_on_all(compute_share):
            crcs |= computed
        return crcs


def _combine_ranges(parts: set[ByteRange], length: int) -> int | None:
    """Return the CRC-32 of a record, or None if the ranges overlap or leave gaps."""
    crc, end = 0, 0
    for begin, size, part in sorted(parts):
        if begin != end:
            return None
        crc, end = crc32.combine(crc, part, size), begin + size
    return crc if end == length else None
