"""Routes on disk: a directory of append-only files `NAME.routes`, each written by one process.

    file      record, record, …
    record    header: magic, envelope's length, step, sample, source, CRC-32 of the header    32 bytes
              envelope (see `codec`), which carries a checksum of its own

There is no index to lose: opening reads the headers. A record that a killed writer did not finish is at the end of its
file; readers report and skip it, and the next writer of that file cuts it off. Damage further up costs the records in
it: reading resumes at the next intact header.

A record has reached the operating system when `append` returns, so a killed process loses at most the one it was
writing; it is on the disk after `sync`, so a power cut loses what was appended later.
"""

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_bai.errors import UserError
from megatron_bai.routing.store import codec
from megatron_bai.routing.store.codec import SampleRoutes
from megatron_bai.utils.atomic_file import fsync_path
from megatron_bai.utils.file_lock import lock_open_file

SUFFIX = ".routes"
MAGIC = b"MBR\x01"  # the last byte is the version
SOURCES = ("r2", "r3")
_HEADER = struct.Struct("<4sIQQB3x")
_CHECKSUM = struct.Struct("<I")
_HEADER_BYTES = _HEADER.size + _CHECKSUM.size
_BLOCK = 1 << 20


@dataclass(frozen=True, order=True)
class RecordEntry:
    """The key and the position of a record.

    Attributes:
        step: global step, from 0.
        sample: index of the sample in the step's batch, over all data-parallel replicas.
        source: `r3`, the inference engine's routes, or `r2`, the training engine's.
        file: that holds it.
        offset: of its envelope in `file`, in bytes.
        length: of its envelope, in bytes.
    """

    step: int
    sample: int
    source: str
    file: Path
    offset: int
    length: int

    def __str__(self) -> str:
        return f"step {self.step} sample {self.sample} ({self.file} at byte {self.offset - _HEADER_BYTES})"


@dataclass(frozen=True)
class DamagedRange:
    """Bytes `[start, end)` of a file that are no records; `tail` where no record follows them."""

    file: Path
    start: int
    end: int
    tail: bool

    def __str__(self) -> str:
        label = "an unfinished record at the end" if self.tail else "damage"
        return f"{self.file}: {label}, bytes {self.start:,} to {self.end:,}"


def is_store(directory: str | Path) -> bool:
    """Return whether a directory holds files of routes."""
    return any(Path(directory).glob(f"*{SUFFIX}"))


def truncate_store(directory: str | Path, step: int) -> None:
    """Remove the records of `step` and later steps from a store that has no writer.

    Args:
        directory: of the store.
        step: first global step to remove, from 0.

    Raises:
        UserError: the store has a writer, or a file does not hold its records by step.
    """
    for path in sorted(Path(directory).glob(f"*{SUFFIX}")):
        with StoreWriter(directory, path.name.removesuffix(SUFFIX)) as writer:
            writer.truncate(step)


class StoreWriter:
    """A writer that appends to one file of a store. Only one writer may have a file open.

    Attributes:
        path: the file.
        entries: its records, earlier ones included.
        num_bytes_cut: bytes of an unfinished record that were cut off on opening.
    """

    def __init__(self, directory: str | Path, name: str):
        """Open `NAME.routes`; the file and the directory are made where they are missing.

        Args:
            directory: of the store.
            name: of the file, without its suffix.

        Raises:
            UserError: another process writes to it, it is something else, or the directory cannot be written.
        """
        self.path = Path(directory) / f"{name}{SUFFIX}"
        self.entries: list[RecordEntry] = []
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            fsync_path(self.path.parent)
        except OSError as error:
            raise UserError(f"cannot write routes to {self.path}: {error.strerror}") from None
        try:
            lock_open_file(self._fd)
            self._cut_unfinished()
        except BaseException as error:
            os.close(self._fd)
            if isinstance(error, BlockingIOError):
                raise UserError(f"another process writes to {self.path}: give each run its own directory") from None
            raise

    def append(self, step: int, sample: int, source: str, envelope: bytes) -> RecordEntry:
        """Append a record.

        Args:
            step: global step, from 0.
            sample: index of the sample in the step's batch, over all data-parallel replicas.
            source: of `SOURCES`.
            envelope: from `codec.encode`.

        Raises:
            UserError: the file system took only part of it; the file is unchanged.
        """
        header = _HEADER.pack(MAGIC, len(envelope), step, sample, SOURCES.index(source))
        data = memoryview(header + _CHECKSUM.pack(zlib.crc32(header)) + envelope)
        try:
            written = 0
            while written < len(data):
                written += os.write(self._fd, data[written:])
        except OSError as error:
            os.ftruncate(self._fd, self._end)
            raise UserError(f"cannot write routes to {self.path}: {error.strerror}") from None
        entry = RecordEntry(step, sample, source, self.path, self._end + _HEADER_BYTES, len(envelope))
        self._end += len(data)
        self.entries.append(entry)
        return entry

    def truncate(self, step: int) -> None:
        """Remove the records of `step` and later steps.

        Raises:
            UserError: records of earlier steps follow them.
        """
        retained = [entry for entry in self.entries if entry.step < step]
        if retained != self.entries[: len(retained)]:
            raise UserError(f"{self.path} does not hold its records by step: it cannot be cut to those before {step}")
        self._end = retained[-1].offset + retained[-1].length if retained else 0
        self.entries = retained
        os.ftruncate(self._fd, self._end)

    def sync(self) -> None:
        """Wait until everything appended is on the disk."""
        os.fsync(self._fd)

    def close(self) -> None:
        """Sync, and release the file's lock."""
        self.sync()
        os.close(self._fd)

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _cut_unfinished(self) -> None:
        """Cut off what follows the last intact record, whose data a power cut may have left unwritten, too."""
        num_bytes = os.fstat(self._fd).st_size
        self.entries, _ = _scan_headers(self._fd, self.path)
        while self.entries:
            last = self.entries[-1]
            if codec.is_intact(os.pread(self._fd, last.length, last.offset)):
                break
            self.entries.pop()
        if not self.entries and not MAGIC.startswith(os.pread(self._fd, len(MAGIC), 0)):
            raise UserError(f"{self.path} holds no routes that this release knows: move it away")
        self._end = self.entries[-1].offset + self.entries[-1].length if self.entries else 0
        self.num_bytes_cut = num_bytes - self._end
        if self.num_bytes_cut:
            os.ftruncate(self._fd, self._end)
            self.sync()


class RouteStore:
    """A reader of all files of a store, as they are when it opens them. Any number may read while others write.

    Attributes:
        entries: records by step and sample.
        damage: ranges found so far: in headers when opening, in envelopes when they are read.
    """

    def __init__(self, directory: str | Path):
        """Read the headers.

        Raises:
            UserError: there is no store, or two records claim to be the same sample.
        """
        self.directory = Path(directory)
        if not is_store(self.directory):
            raise UserError(f"no routes in {self.directory}: give a directory that replay.store named in a run")
        self.entries: list[RecordEntry] = []
        self.damage: list[DamagedRange] = []
        self._fds: dict[Path, int] = {}
        try:
            for path in sorted(self.directory.glob(f"*{SUFFIX}")):
                self._fds[path] = os.open(path, os.O_RDONLY)
                entries, damage = _scan_headers(self._fds[path], path)
                self.entries += entries
                self.damage += damage
            self.entries.sort()
            for a, b in pairwise(self.entries):
                if (a.step, a.sample) == (b.step, b.sample):
                    raise UserError(f"two recordings of one sample: {a} and {b}. Several runs wrote to this directory")
        except OSError as error:
            self.close()
            raise UserError(f"cannot read {error.filename}: {error.strerror}") from None
        except BaseException:
            self.close()
            raise

    def envelope(self, entry: RecordEntry) -> bytes:
        """Read the bytes of a record, without checking them."""
        return os.pread(self._fds[entry.file], entry.length, entry.offset)

    def read_record(self, entry: RecordEntry) -> SampleRoutes:
        """Read a record.

        Raises:
            ValueError: it is damaged; the message says where it is.
        """
        try:
            return codec.decode(self.envelope(entry))
        except ValueError as error:
            raise ValueError(f"{entry}: {error}") from None

    def read_or_none(self, entry: RecordEntry) -> SampleRoutes | None:
        """Read a record; where it is damaged, return None and add the range to `damage`."""
        try:
            return self.read_record(entry)
        except ValueError:
            damaged = DamagedRange(entry.file, entry.offset, entry.offset + entry.length, tail=False)
            if damaged not in self.damage:
                self.damage.append(damaged)
            return None

    def iter_records(self, skip_damaged: bool = False) -> Iterator[tuple[RecordEntry, SampleRoutes]]:
        """Yield every record by step and sample.

        Args:
            skip_damaged: skip damage and add it to `damage`, instead of stopping.

        Yields:
            Each record's entry and its routes.

        Raises:
            UserError: damage other than an unfinished last record, unless it is to be skipped.
        """
        if not skip_damaged and (broken := [damage for damage in self.damage if not damage.tail]):
            raise UserError(f"{broken[0]}: restore the file from a copy")
        for entry in self.entries:
            recording = self.read_or_none(entry)
            if recording is not None:
                yield entry, recording
            elif not skip_damaged:
                raise UserError(f"the recording of {entry} is damaged: restore the file from a copy")

    def close(self) -> None:
        """Close the files."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds = {}

    def __enter__(self) -> "RouteStore":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


def _scan_headers(fd: int, path: Path) -> tuple[list[RecordEntry], list[DamagedRange]]:
    """Find the records of a file, and the ranges between them that are none, by the headers alone."""
    entries, damage = [], []
    offset, num_bytes = 0, os.fstat(fd).st_size
    while offset < num_bytes:
        entry = _read_header(fd, path, offset)
        if entry is not None and entry.offset + entry.length <= num_bytes:
            entries.append(entry)
            offset = entry.offset + entry.length
            continue
        following = _next_header(fd, path, offset + 1, num_bytes)
        end = num_bytes if following is None else following
        damage.append(DamagedRange(path, offset, end, tail=following is None))
        offset = end
    return entries, damage


def _read_header(fd: int, path: Path, offset: int) -> RecordEntry | None:
    """Read the header at an offset; return its record's entry, or None where there is no header."""
    header = os.pread(fd, _HEADER_BYTES, offset)
    if len(header) < _HEADER_BYTES or not header.startswith(MAGIC):
        return None
    fields, checksum = header[: _HEADER.size], header[_HEADER.size :]
    _, length, step, sample, source = _HEADER.unpack(fields)
    if zlib.crc32(fields) != _CHECKSUM.unpack(checksum)[0] or source >= len(SOURCES):
        return None
    return RecordEntry(step, sample, SOURCES[source], path, offset + _HEADER_BYTES, length)


def _next_header(fd: int, path: Path, offset: int, num_bytes: int) -> int | None:
    """Find the offset of the first complete record from `offset` on."""
    while offset < num_bytes:
        block = os.pread(fd, _BLOCK + len(MAGIC) - 1, offset)  # a magic number may lie across two blocks
        start = block.find(MAGIC)
        while start >= 0:
            entry = _read_header(fd, path, offset + start)
            if entry is not None and entry.offset + entry.length <= num_bytes:
                return offset + start
            start = block.find(MAGIC, start + 1)
        offset += _BLOCK
    return None
