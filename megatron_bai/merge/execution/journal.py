"""Which units of an unfinished merge are on disk, so that a merge that was killed goes on where it stopped.

An unfinished output holds, in `.journal/`, the mark of its merge and a file for each finished unit, written after the
unit's data were flushed to disk. A merge with the same mark takes up what is noted; any other begins anew. A note holds
the CRC-32 of every item, computed when it was written: what no longer agrees is written again.
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
    """One unit of one output: its items, and for each merged tensor the sum of its squares before rounding."""

    written: list[WrittenItem] = field(default_factory=list)
    squares: dict[str, float] = field(default_factory=dict)


def open_staging_dir(target: Path, mark: str) -> Path:
    """The directory to write `target` into: the one a merge with this mark left behind, or an empty one."""
    path = atomic_dir.staging_path(target)
    try:
        if (path / DIRECTORY / MARK).read_text() == mark:
            return path
    except OSError:
        pass
    path = manifest.make_staging_dir(target)
    (path / DIRECTORY).mkdir()
    atomic_file.write_text(path / DIRECTORY / MARK, mark, durable=True)
    return path


def read_finished(directory: Path, rank: int = 0, size: int = 1) -> dict[str, UnitResult]:
    """The units that are on disk, by name; `size` processes share the reading."""
    notes = sorted(_read_records(directory), key=lambda note: note[0])[rank::size]
    return {name: unit for name, unit in notes if all(_is_there(directory, item) for item in unit.written)}


def finished_names(directory: Path) -> set[str]:
    """The units that were noted; that they are on disk is not looked at."""
    return {name for name, _ in _read_records(directory)}


def file_crcs(directory: Path) -> dict[str, int]:
    """The CRC-32 of every file that units were written into, put together from their items'.

    What lies between the items, such as a header, is read.
    """
    items: dict[str, list[WrittenItem]] = defaultdict(list)
    for _, unit in _read_records(directory):
        for item in unit.written:
            items[item.file].append(item)
    return {name: _checksum(directory / name, found) for name, found in items.items()}


def _checksum(file: Path, items: list[WrittenItem]) -> int:
    crc = at = 0

    def skip_to(start: int) -> None:
        nonlocal crc, at
        assert start >= at, f"{file}: two items overlap"
        if start > at:
            crc, at = crc32.combine(crc, crc32.compute_file(file, at, start - at), start - at), start

    for item in sorted(items, key=lambda item: (item.start, item.length)):
        skip_to(item.start)
        crc, at = crc32.combine(crc, item.crc32, item.length), item.start + item.length
    skip_to(file.stat().st_size)
    return crc


def _is_there(directory: Path, item: WrittenItem) -> bool:
    try:
        return crc32.compute_file(directory / item.file, item.start, item.length) == item.crc32
    except FileNotFoundError:
        return False


def _read_records(directory: Path) -> Iterator[tuple[str, UnitResult]]:
    """Every readable note, with the unit's name."""
    for file in (directory / DIRECTORY).glob("*.json"):
        text, _, crc = file.read_text().rpartition("\n")
        if crc != f"{crc32.compute(text.encode()):08x}":
            continue  # damaged: the unit is written again
        noted = json.loads(text)
        written = [
            WrittenItem(key, _tuple(offsets), _tuple(sizes), *place) for key, offsets, sizes, *place in noted["written"]
        ]
        yield file.stem, UnitResult(written, noted["squares"])


def record_unit(directory: Path, unit: str, result: UnitResult) -> None:
    """Remember a unit, after its data; both survive a power cut."""
    for name in {item.file for item in result.written}:
        atomic_file.fsync_path(directory / name)
    written = [[getattr(item, name) for name in _FIELDS] for item in result.written]  # `astuple` would copy deeply
    text = json.dumps({"written": written, "squares": result.squares})
    crc = crc32.compute(text.encode())
    atomic_file.write_text(directory / DIRECTORY / f"{unit}.json", f"{text}\n{crc:08x}", durable=True)


def _tuple(value: list[int] | None) -> tuple[int, ...] | None:
    return None if value is None else tuple(value)
