"""Which units of an unfinished merge are on disk, so that a merge that was killed goes on where it stopped.

An unfinished output holds, in `.journal/`, the mark of its merge and a file for each finished unit, written after the
unit's data were flushed to disk. A merge with the same mark takes up what is noted; any other begins anew.
"""

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from megatron_bai.merge.targets import Written
from megatron_bai.model import manifest

DIRECTORY = ".journal"
MARK = "mark"


@dataclass
class UnitResult:
    """One unit of one output: its items, and for each merged tensor the sum of its squares before rounding."""

    written: list[Written] = field(default_factory=list)
    squares: dict[str, float] = field(default_factory=dict)


def stage(target: Path, mark: str) -> Path:
    """The directory to write `target` into: the one a merge with this mark left behind, or an empty one."""
    path = target.with_name(f".{target.name}.unfinished")  # as `manifest.staging` calls it
    try:
        if (path / DIRECTORY / MARK).read_text() == mark:
            return path
    except OSError:
        pass
    path = manifest.staging(target)
    (path / DIRECTORY).mkdir()
    _write(path / DIRECTORY / MARK, mark)
    return path


def finished(directory: Path) -> dict[str, UnitResult]:
    """The units that are on disk, by name."""
    found = {}
    for file in (directory / DIRECTORY).glob("*.json"):
        noted = json.loads(file.read_text())
        written = [
            Written(key, _tuple(offsets), _tuple(sizes), name, start, length)
            for key, offsets, sizes, name, start, length in noted["written"]
        ]
        found[file.stem] = UnitResult(written, noted["squares"])
    return found


def note(directory: Path, unit: str, result: UnitResult) -> None:
    """Remember a unit, after its data; both survive a power cut."""
    for name in {item.file for item in result.written}:
        manifest.sync(directory / name)
    written = [dataclasses.astuple(item) for item in result.written]
    _write(directory / DIRECTORY / f"{unit}.json", json.dumps({"written": written, "squares": result.squares}))


def close(directory: Path) -> None:
    """All units are on disk and indexed."""
    shutil.rmtree(directory / DIRECTORY)


def _tuple(value: list[int] | None) -> tuple[int, ...] | None:
    return None if value is None else tuple(value)


def _write(path: Path, text: str) -> None:
    """A file that is there whole or not at all."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text)
    manifest.sync(new)
    os.replace(new, path)
    manifest.sync(path.parent)
