"""Read any box of any tensor, from every format and whatever layout saved it.

A checkpoint's tensor is the union of chunks that do not overlap. The reader of a format says which chunks there are and
where their records lie; `CheckpointReader.read` then gives any region of any tensor, so checkpoints saved at different
tensor, expert or pipeline parallel sizes read alike.

What was read is verified by `CheckpointReader.verify_records`, once all ranks have read their shares.

Shapes, offsets, sizes and strides are in elements; starts and lengths are in bytes.
"""

import hashlib
import math
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import ClassVar, Self

import torch

from megatron_bai.checkpoint import crc32
from megatron_bai.checkpoint.boxes import box_slices, is_row_major, split_box, strided_extent
from megatron_bai.checkpoint.carried_files import list_carried_files
from megatron_bai.checkpoint.opened_files import OpenedFiles
from megatron_bai.checkpoint.positional_io import FileHandles
from megatron_bai.checkpoint.record_crcs import ByteRange, ItemKey, RecordCrcs
from megatron_bai.checkpoint.tensor_index import Chunk, ObjectInfo, Record, TensorInfo
from megatron_bai.checkpoint.writer import CheckpointWriter, TensorSpec
from megatron_bai.distributed.rank_group import RankGroup
from megatron_bai.errors import PermanentError, UserError

READ_BYTES = 16 << 20  # most that one read takes in; larger regions are read in parts


class ScratchBuffers(threading.local):
    """Memory that reads reuse. Readers used in turn can share one; every thread has its own."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def get(self, name: str, num_bytes: int) -> torch.Tensor:
        """Return a buffer.

        Args:
            name: of the buffer: each use of this memory has its own.
            num_bytes: of the buffer.

        Returns:
            `[num_bytes]` uint8, valid until this thread's next call with the same name.
        """
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < num_bytes:
            buffer = self._buffers[name] = torch.empty(num_bytes, dtype=torch.uint8)
        return buffer[:num_bytes]


class ChunkStream:
    """A box with contiguous elements in one record, read from its begin to its end and verified on the way.

    One thread reads it, and may read others in turn.

    Attributes:
        offset: of the next byte in the file.
        remaining: bytes yet to be read.
        crc: of the bytes before.
    """

    def __init__(
        self, reader: "CheckpointReader", info: TensorInfo, chunk: Chunk, record: Record, begin: int, length: int
    ):
        self._reader, self._info, self._chunk, self._record = reader, info, chunk, record
        self._begin, self._length = begin, length
        self.offset, self.remaining, self.crc = record.start + begin, length, 0

    @property
    def fd(self) -> int:
        """This thread's descriptor of the file, valid until the thread opens `OPEN_FILES` others of the checkpoint."""
        return self._reader.files.get_fd(self._chunk.file)

    def read_into(self, buffer: memoryview) -> None:
        """Fill `buffer` with the next bytes.

        Raises:
            UserError: they cannot be read, or those of the record, now complete, are not those that were saved.
        """
        self._reader.files.read_into(self._chunk.file, self.offset, buffer)
        self.advance(len(buffer), crc32.compute(buffer, self.crc))

    def advance(self, count: int, crc: int) -> None:
        """Count bytes that the caller read itself.

        Args:
            count: the next bytes, which were read.
            crc: of all bytes so far.

        Raises:
            UserError: as `read_into`.
        """
        self.offset += count
        self.remaining -= count
        self.crc = crc
        if self.remaining == 0:
            self._reader.add_range(self._info, self._chunk, self._record, (self._begin, self._length, crc))


class CheckpointReader(ABC):
    """A checkpoint that is open for reading. A format's reader fills `tensors` and locates records.

    Attributes:
        path: the checkpoint's directory.
        tensors: every tensor by key.
        objects: every object, which is no tensor, by key.
        stores_whole_tensors: whether every tensor of the format is one chunk.
    """

    stores_whole_tensors: ClassVar[bool] = False

    def __init__(
        self,
        path: Path,
        tensors: dict[str, TensorInfo],
        scratch: ScratchBuffers | None = None,
        objects: dict[str, ObjectInfo] | None = None,
        stats: dict[str, os.stat_result] | None = None,
    ):
        self.path = path
        self.tensors = tensors
        self.objects = objects or {}
        self._scratch = scratch or ScratchBuffers()
        names = chain(self.own_files(), (name.as_posix() for name in list_carried_files(path).names))
        self._opened = OpenedFiles(path, names, stats)  # `stats`: of the files whose headers were read
        self.files = FileHandles(path, self._opened)
        self._record_crcs = RecordCrcs()
        self._require_files()

    @abstractmethod
    def locate_record(self, info: TensorInfo, chunk: Chunk) -> Record:
        """Return the position of a chunk's elements.

        Args:
            info: of the tensor.
            chunk: one of its chunks.

        Raises:
            UserError: its item is damaged.
        """

    @abstractmethod
    def own_files(self) -> set[str]:
        """Return the names of the files that hold tensors or their index."""

    @abstractmethod
    def make_writer(self, tensors: Sequence[TensorSpec], file_bytes: int) -> CheckpointWriter:
        """Return a writer for a checkpoint of this format.

        Args:
            tensors: to write.
            file_bytes: that files are filled to where the format decides that beforehand; 0: as in this checkpoint.
        """

    def _require_files(self) -> None:
        """Raise unless every tensor is complete as far as names and sizes tell, before anything is read."""
        ends: dict[str, int] = {}
        for info in self.tensors.values():
            for chunk in info.chunks:
                ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.start + chunk.length)
            if not info.is_covered():
                raise UserError(f"{self.path}: the chunks of {info.key} overlap or leave holes: it cannot be used")
        for object_info in self.objects.values():
            ends[object_info.file] = max(ends.get(object_info.file, 0), object_info.start + object_info.length)
        for name, end in ends.items():
            file = self.path / name
            size = file.stat().st_size if file.is_file() else None
            if size is None:
                raise UserError(f"{file} is missing: restore the checkpoint from a copy")
            if size < end:
                raise UserError(f"{file} has {size} bytes of at least {end}: it was cut off, restore it from a copy")

    def read(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        """Read a region of a tensor, in the checkpoint's dtype.

        Any number of threads may read. A record that is now complete is verified; others are by `verify_records`.

        Args:
            key: of the tensor.
            offsets: of the region.
            sizes: of the region.

        Returns:
            A tensor of shape `sizes`, valid until this thread's next `read` with the same scratch memory.

        Raises:
            UserError: a record cannot be read, or its bytes are not those that were saved.
        """
        info = self.tensors[key]
        chunk = info.chunk_at(offsets, sizes)
        boxes = [(chunk, (offsets, sizes))] if chunk else list(info.overlapping(offsets, sizes))
        if len(boxes) == 1 and boxes[0][1] == (offsets, sizes):
            chunk = boxes[0][0]
            record = self.locate_record(info, chunk)
            if strided_extent(sizes, record.strides) * info.dtype.itemsize <= READ_BYTES:
                return self._read_from_chunk(info, chunk, record, offsets, sizes)
        out = self._scratch.get("region", math.prod(sizes) * info.dtype.itemsize).view(info.dtype).view(sizes)
        for chunk, box in boxes:
            record = self.locate_record(info, chunk)
            ratio = max(strided_extent(box[1], record.strides) // max(math.prod(box[1]), 1), 1)
            for low, size in split_box(*box, max(READ_BYTES // info.dtype.itemsize // ratio, 1)):
                out[box_slices((low, size), offsets)].copy_(self._read_from_chunk(info, chunk, record, low, size))
        return out

    def stream(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> ChunkStream | None:
        """Open a region of a tensor to be read from begin to end.

        Args:
            key: of the tensor.
            offsets: of the region.
            sizes: of the region.

        Returns:
            The stream, or None where the region's elements are not contiguous in one record.
        """
        info = self.tensors[key]
        chunk = info.chunk_at(offsets, sizes)
        if chunk is None:
            chunk, box = next(info.overlapping(offsets, sizes), (None, None))
            if chunk is None or box != (offsets, sizes):
                return None
        record = self.locate_record(info, chunk)
        if not is_row_major(sizes, record.strides):
            return None
        item = info.dtype.itemsize
        return ChunkStream(
            self, info, chunk, record, _first_byte(chunk, record, offsets, item), math.prod(sizes) * item
        )

    def read_object(self, key: str) -> bytes:
        """Return the bytes of an object, not unpickled.

        Raises:
            UserError: they cannot be read, or are damaged.
        """
        info = self.objects[key]
        return self.files.read_bytes(info.file, info.start, info.length)

    def verify_all(self) -> int:
        """Compare every tensor and object with the CRC-32 that the format has of it.

        Returns:
            How many bytes were compared; 0 for a format without checksums.

        Raises:
            UserError: something is not what was saved.
        """
        return sum(map(self.verify_tensor, self.tensors)) + sum(len(self.read_object(key)) for key in self.objects)

    def verify_tensor(self, key: str) -> int:
        """Compare one tensor as `verify_all` does.

        Args:
            key: of the tensor.

        Returns:
            As `verify_all`.

        Raises:
            UserError: it is not what was saved.
        """
        info, num_bytes = self.tensors[key], 0
        for chunk in info.chunks:
            record = self.locate_record(info, chunk)
            if record.crc32 is not None:
                self._require_crc(key, chunk.file, record, self._compute_crc(chunk.file, record))
                num_bytes += record.length
        return num_bytes

    def stat_fingerprint(self) -> str:
        """Return a hash of the tensors' names, dtypes, shapes and positions, and of the files' sizes and times.

        No content is read. The same contents in files with other times have another fingerprint.
        """
        entries = sorted(self.tensors.items())
        positions = [(key, [(c.offsets, c.sizes, c.file, c.start) for c in entry.chunks]) for key, entry in entries]
        layout = [(key, str(entry.dtype), entry.shape) for key, entry in entries], positions
        names = {c.file for _, e in entries for c in e.chunks} | {blob.file for blob in self.objects.values()}
        stats = [(name, self._opened.stats[name]) for name in sorted(names)]
        files = [(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats]
        return hashlib.sha256(repr((layout, files)).encode()).hexdigest()

    def verify_records(self, keys: Iterable[str], ranks: RankGroup) -> str:
        """Verify that the bytes read were those that were saved. *Collective* over `ranks`, which have read.

        Args:
            keys: tensors that were read. What no rank has read of them, since an unfinished merge was resumed, is read.
            ranks: which have read.

        Returns:
            A hash of these tensors' names, dtypes, shapes, chunks and contents, the latter by their records' CRC-32.

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
        for key, info in tensors:
            digest.update(f"{key} {info.dtype} {info.shape}\n".encode())
            for c in sorted(info.chunks, key=lambda c: c.offsets):
                digest.update(f"{c.offsets} {c.sizes} {crcs[c.file, c.start]:08x}\n".encode())
        return digest.hexdigest()

    def _verify_files(self, crcs: dict[ItemKey, int]) -> None:  # noqa: B027, not every format has something to compare
        """Compare what the records make up with the manifest, for a format that has no checksums of its own."""

    def require_unchanged(self) -> None:
        """Raise unless tensors, index and carried files are still those that were opened.

        Raises:
            PermanentError: a file was replaced or changed.
        """
        self._opened.require_unchanged()

    def close(self) -> None:
        """Close the files."""
        self.files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _read_from_chunk(
        self, info: TensorInfo, chunk: Chunk, record: Record, offsets: tuple[int, ...], sizes: tuple[int, ...]
    ) -> torch.Tensor:
        """Read a region inside one chunk, as a view of the bytes between its first and its last element."""
        item = info.dtype.itemsize
        begin = _first_byte(chunk, record, offsets, item)
        length = strided_extent(sizes, record.strides) * item
        buffer = self._scratch.get("span", length)
        self.files.read_into(chunk.file, record.start + begin, buffer.numpy().data)
        self.add_range(info, chunk, record, (begin, length, crc32.compute(buffer.numpy())))
        return buffer.view(info.dtype).as_strided(sizes, record.strides)

    def add_range(self, info: TensorInfo, chunk: Chunk, record: Record, byte_range: ByteRange) -> None:
        """Record that a range of a record was read, and verify the record if that completes it.

        Args:
            info: of the tensor.
            chunk: one of its chunks.
            record: the chunk's.
            byte_range: which was read.

        Raises:
            PermanentError: the bytes of the record are not those that were saved.
        """
        if (crc := self._record_crcs.add_range((chunk.file, chunk.start), byte_range, record.length)) is not None:
            self._require_crc(info.key, chunk.file, record, crc)

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
    """Return where in a record the element at `offsets` begins."""
    if offsets == chunk.offsets:
        return record.first_byte
    return (
        record.first_byte
        + sum((o - c) * s for o, c, s in zip(offsets, chunk.offsets, record.strides, strict=True)) * item
    )
