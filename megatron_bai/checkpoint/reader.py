"""Tensors as boxes on disk, the same for every format and every way a model was sharded.

A checkpoint's tensor is the union of chunks that do not overlap. A chunk is a box of the global tensor; its elements
lie in one record, a contiguous range of a file. A reader of a format says which chunks there are and where their
records lie; `CheckpointReader.read` then gives any region of any tensor, so checkpoints saved at different tensor, expert or
pipeline parallel sizes read alike.

What a reader returns is proven by `CheckpointReader.verify_records`, once all ranks have read their shares.

Glossary: shapes, offsets, sizes and strides are in elements; starts and lengths are in bytes.
"""

import hashlib
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Self

import torch

from megatron_bai.checkpoint import crc32, manifest
from megatron_bai.checkpoint.boxes import box_slices, is_row_major, split_box, strided_extent
from megatron_bai.checkpoint.positional_io import FileHandles
from megatron_bai.checkpoint.record_crcs import ByteRange, ItemKey, RecordCrcs
from megatron_bai.checkpoint.tensor_index import Chunk, ObjectInfo, Record, TensorInfo
from megatron_bai.checkpoint.writer import CheckpointWriter, TensorSpec
from megatron_bai.distributed.rank_group import RankGroup
from megatron_bai.errors import PermanentError, UserError

READ_BYTES = 16 << 20  # most that one read takes in; larger regions are read in parts


class ScratchBuffers(threading.local):
    """Memory that reads reuse; sources read in turn can share one. Every thread has its own."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def get(self, name: str, num_bytes: int) -> torch.Tensor:
        """`length` bytes, valid until this thread's next call with the same name."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < num_bytes:
            buffer = self._buffers[name] = torch.empty(num_bytes, dtype=torch.uint8)
        return buffer[:num_bytes]


class ChunkStream:
    """A box whose elements lie one after another in one record, read from its begin to its end and checked on the way.

    One thread reads it, and meanwhile nothing else of the same source; others may have other streams.

    Attributes:
        descriptor: of the file.
        at: the byte of it that is next.
        left: bytes yet to be read.
        crc: of those before.
    """

    def __init__(self, source: "CheckpointReader", entry: TensorInfo, chunk: Chunk, record: Record, begin: int, length: int):
        self._source, self._entry, self._chunk, self._record = source, entry, chunk, record
        self._begin, self._length = begin, length
        self.fd = source.files.get_fd(chunk.file)
        self.offset, self.remaining, self.crc = record.start + begin, length, 0

    def read_into(self, buffer: memoryview) -> None:
        """The next bytes, as many as `buffer` has.

        Raises:
            UserError: they cannot be read, or those of the record, now complete, are not those that were saved.
        """
        self._source.files.read_into(self._chunk.file, self.offset, buffer, self.fd)
        self.advance(len(buffer), crc32.compute(buffer, self.crc))

    def advance(self, count: int, crc: int) -> None:
        """The next `count` bytes were read; `crc` is of all so far.

        Raises:
            UserError: as `readinto`.
        """
        self.offset += count
        self.remaining -= count
        self.crc = crc
        if self.remaining == 0:
            self._source.add_range(self._entry, self._chunk, self._record, (self._begin, self._length, crc))


class CheckpointReader(ABC):
    """A checkpoint to read. A format's reader fills `tensors` and says where records lie.

    Attributes:
        path: the checkpoint's directory.
        tensors: every tensor by key.
        objects: every entry that is no tensor, by key.
        whole: whether the format holds every tensor in one piece.
    """

    stores_whole_tensors: ClassVar[bool] = False

    def __init__(
        self,
        path: Path,
        tensors: dict[str, TensorInfo],
        scratch: ScratchBuffers | None = None,
        objects: dict[str, ObjectInfo] | None = None,
    ):
        self.path = path
        self.tensors = tensors
        self.objects = objects or {}
        self._scratch = scratch or ScratchBuffers()
        self.files = FileHandles(path)
        self._record_crcs = RecordCrcs()
        self._require_files()

    @abstractmethod
    def locate_record(self, entry: TensorInfo, chunk: Chunk) -> Record:
        """Where the elements of `chunk` lie."""

    @abstractmethod
    def is_own_file(self, file: Path) -> bool:
        """Whether a file, relative to the checkpoint, holds its tensors or their index."""

    @abstractmethod
    def make_writer(self, tensors: Sequence[TensorSpec], file_bytes: int) -> CheckpointWriter:
        """Writes a checkpoint of this format.

        Args:
            tensors: to write.
            file_bytes: that files are filled to where the format decides that beforehand; 0: as in this checkpoint.
        """

    def other_files(self) -> list[Path]:
        """Files beside the tensors, relative to the checkpoint: config, tokenizer, `common.pt`."""
        files = sorted(p.relative_to(self.path) for p in self.path.rglob("*") if p.is_file())
        return [p for p in files if p.as_posix() != manifest.NAME and not self.is_own_file(p)]

    def _require_files(self) -> None:
        """Every tensor is whole as far as names and sizes tell: before anything is read."""
        ends: dict[str, int] = {}
        for entry in self.tensors.values():
            for chunk in entry.chunks:
                ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.start + chunk.length)
            if not entry.is_covered():
                raise UserError(f"{self.path}: the chunks of {entry.key} overlap or leave holes: it cannot be used")
        for blob in self.objects.values():
            ends[blob.file] = max(ends.get(blob.file, 0), blob.start + blob.length)
        for name, end in ends.items():
            file = self.path / name
            size = file.stat().st_size if file.is_file() else None
            if size is None:
                raise UserError(f"{file} is missing: restore the checkpoint from a copy")
            if size < end:
                raise UserError(f"{file} has {size} bytes of at least {end}: it was cut off, restore it from a copy")

    def read(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        """A region of a tensor, in the checkpoint's dtype.

        Any number of threads may read. A record that is now read completely is checked; others are by `prove`.

        Returns:
            a tensor of shape `sizes`, valid until this thread's next `read` with the same scratch memory.

        Raises:
            UserError: a record cannot be read, or its bytes are not those that were saved.
        """
        entry = self.tensors[key]
        whole = entry.chunk_at(offsets, sizes)
        parts = [(whole, (offsets, sizes))] if whole else list(entry.overlapping(offsets, sizes))
        if len(parts) == 1 and parts[0][1] == (offsets, sizes):
            chunk = parts[0][0]
            record = self.locate_record(entry, chunk)
            if strided_extent(sizes, record.strides) * entry.dtype.itemsize <= READ_BYTES:
                return self._read_from_chunk(entry, chunk, record, offsets, sizes)
        out = self._scratch.get("region", math.prod(sizes) * entry.dtype.itemsize).view(entry.dtype).view(sizes)
        for chunk, box in parts:
            record = self.locate_record(entry, chunk)
            ratio = max(strided_extent(box[1], record.strides) // max(math.prod(box[1]), 1), 1)
            for low, size in split_box(*box, max(READ_BYTES // entry.dtype.itemsize // ratio, 1)):
                out[box_slices((low, size), offsets)].copy_(self._read_from_chunk(entry, chunk, record, low, size))
        return out

    def stream(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> ChunkStream | None:
        """A region of a tensor to read in parts, or None where its elements do not lie one after another."""
        entry = self.tensors[key]
        chunk = entry.chunk_at(offsets, sizes)
        if chunk is None:
            chunk, box = next(entry.overlapping(offsets, sizes), (None, None))
            if chunk is None or box != (offsets, sizes):
                return None
        record = self.locate_record(entry, chunk)
        if not is_row_major(sizes, record.strides):
            return None
        item = entry.dtype.itemsize
        return ChunkStream(self, entry, chunk, record, _first_byte(chunk, record, offsets, item), math.prod(sizes) * item)

    def read_object(self, key: str) -> bytes:
        """The bytes of an object, not unpickled."""
        blob = self.objects[key]
        return self.files.read_bytes(blob.file, blob.start, blob.length)

    def verify_all(self) -> int:
        """Compare every tensor and object with the CRC-32 the format keeps of it.

        Returns:
            how many bytes were compared; 0 for a format without checksums.

        Raises:
            UserError: something is not what was saved.
        """
        compared = 0
        for entry in self.tensors.values():
            for chunk in entry.chunks:
                record = self.locate_record(entry, chunk)
                if record.crc32 is not None:
                    self._require_crc(entry.key, chunk.file, record, self._compute_crc(chunk.file, record))
                    compared += record.length
        return compared + sum(len(self.read_object(key)) for key in self.objects)

    def stat_fingerprint(self) -> str:
        """A hash of the tensors' names, types, shapes and places, and of the files' sizes and times of change.

        It is had without reading. The same contents in files of another time have another identity.
        """
        entries = sorted(self.tensors.items())
        places = [(key, [(c.offsets, c.sizes, c.file, c.start) for c in entry.chunks]) for key, entry in entries]
        what = [(key, str(entry.dtype), entry.shape) for key, entry in entries], places
        names = {c.file for _, e in entries for c in e.chunks} | {blob.file for blob in self.objects.values()}
        stats = [(name, (self.path / name).stat()) for name in sorted(names)]
        files = [(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats]
        return hashlib.sha256(repr((what, files)).encode()).hexdigest()

    def verify_records(self, keys: Iterable[str], ranks: RankGroup) -> str:
        """Prove that the bytes read were those that were saved; every rank calls it, after reading its share.

        Args:
            keys: tensors that were read. What no rank has read of them, since a merge was taken up again, is read now.

        Returns:
            a hash of these tensors' names, types, shapes, chunks and contents, the latter by their records' CRC-32.

        Raises:
            PermanentError: the bytes of a record are not those that were saved.
        """
        tensors = sorted((key, self.tensors[key]) for key in keys)
        chunks = {(c.file, c.start): (entry, c) for _, entry in tensors for c in entry.chunks}

        def resolve(place: ItemKey, found: int | None, touched: bool) -> int:
            entry, chunk = chunks[place]
            record = self.locate_record(entry, chunk)
            if found is None:  # of units that an earlier process finished, or with gaps
                found = self._compute_crc(chunk.file, record)
            self._require_crc(entry.key, chunk.file, record, found)
            return found

        crcs = self._record_crcs.resolve_all(chunks, ranks, resolve)
        ranks.run_on_first(lambda: self._verify_files(crcs))
        digest = hashlib.sha256()
        for key, entry in tensors:
            digest.update(f"{key} {entry.dtype} {entry.shape}\n".encode())
            for c in sorted(entry.chunks, key=lambda c: c.offsets):
                digest.update(f"{c.offsets} {c.sizes} {crcs[c.file, c.start]:08x}\n".encode())
        return digest.hexdigest()

    def _verify_files(self, crcs: dict[ItemKey, int]) -> None:  # noqa: B027, not every format has something to compare
        """Compare what the records make up with the manifest, for a format that has no checksums of its own."""

    def close(self) -> None:
        self.files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _read_from_chunk(
        self, entry: TensorInfo, chunk: Chunk, record: Record, offsets: tuple[int, ...], sizes: tuple[int, ...]
    ) -> torch.Tensor:
        """A region inside one chunk, as a view of the bytes between its first and its last element."""
        item = entry.dtype.itemsize
        begin = _first_byte(chunk, record, offsets, item)
        length = strided_extent(sizes, record.strides) * item
        buffer = self._scratch.get("span", length)
        self.files.read_into(chunk.file, record.start + begin, buffer.numpy().data)
        self.add_range(entry, chunk, record, (begin, length, crc32.compute(buffer.numpy())))
        return buffer.view(entry.dtype).as_strided(sizes, record.strides)

    def add_range(self, entry: TensorInfo, chunk: Chunk, record: Record, part: ByteRange) -> None:
        """Remember a part of a record that was read, and check the record if that completes it."""
        if (crc := self._record_crcs.add_range((chunk.file, chunk.start), part, record.length)) is not None:
            self._require_crc(entry.key, chunk.file, record, crc)

    def _require_crc(self, key: str, file: str, record: Record, crc: int) -> None:
        if record.crc32 is not None and crc != record.crc32:
            # Units that were finished may hold such bytes, since a record is verified when it is read whole.
            raise PermanentError(
                f"{self.path / file}: the bytes of {key} are not those that were saved (CRC-32 {crc:08x}, saved"
                f" {record.crc32:08x}): restore the file from a copy"
            )

    def _compute_crc(self, file: str, record: Record) -> int:
        crc = 0
        for start in range(0, record.length, READ_BYTES):
            buffer = self._scratch.get("span", min(READ_BYTES, record.length - start))
            self.files.read_into(file, record.start + start, buffer.numpy().data)
            crc = crc32.compute(buffer.numpy(), crc)
        return crc


def _first_byte(chunk: Chunk, record: Record, offsets: tuple[int, ...], item: int) -> int:
    """Of a record, where the element at `offsets` begins."""
    if offsets == chunk.offsets:
        return record.first_byte
    return record.first_byte + sum((o - c) * s for o, c, s in zip(offsets, chunk.offsets, record.strides, strict=True)) * item
