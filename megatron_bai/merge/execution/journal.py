"""The journal of an unfinished merge: the units that are on disk, so that a merge that was killed can be resumed.

An unfinished output holds, in `.journal/`, the mark of its merge (the fingerprint of its inputs and how the work is
split) and a record for each finished unit, written after the unit's data were flushed to disk. A merge with the same
mark uses what is recorded; any other starts from nothing. A record holds the CRC-32 of every item, computed when it was
written: an item that has another is written again.
"""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_bai.checkpoint import atomic_dir, crc32, manifest
from megatron_bai.checkpoint.writer import WrittenItem
from megatron_bai.utils import atomic_file

DIRECTORY = ".journal"
MARK = "mark"
_FIELDS = [field.name for field in dataclasses.fields(WrittenItem)]


@dataclass
class UnitResult:
    """One unit of one result: its items, and for each merged tensor the sum of its squares before rounding."""

    written: list[WrittenItem] = field(default_factory=list)
    squares: dict[str, float] = field(default_factory=dict)


def open_staging_dir(target: Path, mark: str) -> Path:
    """Return the directory in which to write `target`: that of an unfinished merge with this mark, or an empty one.

    Args:
        target: directory of the result, which the caller has locked.
        mark: of the merge. Whatever a merge with another mark left there is deleted.

    Raises:
        OSError: the directory cannot be created.
    """
    path = atomic_dir.staging_path(target)
    try:
        if (path / DIRECTORY / MARK).read_text(encoding="utf-8") == mark:
            return path
    except OSError:
        pass
    path = manifest.make_staging_dir(target)
    (path / DIRECTORY).mkdir()
    atomic_file.write_text(path / DIRECTORY / MARK, mark, durable=True)
    return path


def read_finished(directory: Path, rank: int = 0, num_ranks: int = 1) -> dict[str, UnitResult]:
    """Read the units that are on disk, by name; `num_ranks` processes share the reading.

    Args:
        directory: staging directory of the result.
        rank: which of the records are read here.
        num_ranks: that call this, each with its own rank.

    Returns:
        The units among this rank's records whose items all have the CRC-32 with which they were written.
    """
    records = sorted(_read_records(directory), key=lambda record: record[0])[rank::num_ranks]
    return {name: unit for name, unit in records if all(_is_on_disk(directory, item) for item in unit.written)}


def finished_names(directory: Path) -> set[str]:
    """Return the units that are recorded, without reading their data."""
    return {name for name, _ in _read_records(directory)}


def file_crcs(directory: Path) -> dict[str, int]:
    """Combine the CRC-32 of every file of units from those of its items.

    Bytes between the items, such as a header, are read.
    """
    items: dict[str, list[WrittenItem]] = defaultdict(list)
    for _, unit in _read_records(directory):
        for item in unit.written:
            items[item.file].append(item)
    return {name: _file_crc(directory / name, file_items) for name, file_items in items.items()}


def _file_crc(file: Path, items: list[WrittenItem]) -> int:
    """Combine the CRC-32 of a file from its items' and what lies between them."""
    crc = offset = 0

    def skip_to(start: int) -> None:
        nonlocal crc, offset
        assert start >= offset, f"{file}: two items overlap"
        if start > offset:
            length = start - offset
            crc, offset = crc32.combine(crc, crc32.compute_file(file, offset, length), length), start

    for item in sorted(items, key=lambda item: (item.start, item.length)):
        skip_to(item.start)
        crc, offset = crc32.combine(crc, item.crc32, item.length), item.start + item.length
    skip_to(file.stat().st_size)
    return crc


def _is_on_disk(directory: Path, item: WrittenItem) -> bool:
    """Return whether an item has the CRC-32 with which it was written."""
    try:
        return crc32.compute_file(directory / item.file, item.start, item.length) == item.crc32
    except FileNotFoundError:
        return False


def _read_records(directory: Path) -> Iterator[tuple[str, UnitResult]]:
    """Yield every readable record, with the unit's name."""
    for file in (directory / DIRECTORY).glob("*.json"):
        text, _, crc = file.read_text(encoding="utf-8").rpartition("\n")
        if crc != f"{crc32.compute(text.encode()):08x}":
            continue  # damaged: the unit is written again
        record = json.loads(text)
        written = [
            WrittenItem(key, _tuple(offsets), _tuple(sizes), *location)
            for key, offsets, sizes, *location in record["written"]
        ]
        yield file.stem, UnitResult(written, record["squares"])


def record_unit(directory: Path, unit: str, result: UnitResult) -> None:
    """Flush a unit's data to disk, then write its record; both survive a power cut.

    Args:
        directory: staging directory of the result.
        unit: name of the unit.
        result: its items, which are complete, and sums of squares.

    Raises:
        OSError: the system refuses.
    """
    for name in {item.file for item in result.written}:
        atomic_file.fsync_path(directory / name)
    written = [[getattr(item, name) for name in _FIELDS] for item in result.written]  # `astuple` would copy deeply
    text = json.dumps({"written": written, "squares": result.squares})
    crc = crc32.compute(text.encode())
    atomic_file.write_text(directory / DIRECTORY / f"{unit}.json", f"{text}\n{crc:08x}", durable=True)


def _tuple(value: list[int] | None) -> tuple[int, ...] | None:
    """Convert what JSON has as a list."""
    return None if value is None else tuple(value)
