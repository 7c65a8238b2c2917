"""Megatron-Core's `torch_dist` checkpoints, read and written without a model, a GPU or a process group.

On disk (Megatron-Core 0.16 to 0.19, a `torch.distributed.checkpoint` directory):

    .metadata       a pickle: the tensors with their chunks, and for each chunk or object its file, start and length
    *.distcp        items one after another, each the archive `torch.save` makes of one chunk or object
    common.pt       the state that is not sharded: iteration, arguments; from 0.19 an object (`common_state`)
    metadata.json   the format's name, written last: a directory without it is unfinished

The archives are uncompressed, so a chunk's elements are plain bytes of the file and are read in place.
"""

import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from megatron_bai.checkpoint import crc32, manifest, positional_io, torch_zip
from megatron_bai.checkpoint.common_state import COMMON, COMMON_OBJECT, find_common_state
from megatron_bai.checkpoint.not_checkpoints import TRACKER, require_directory
from megatron_bai.checkpoint.opened_files import OpenedFiles
from megatron_bai.checkpoint.reader import CheckpointReader, ScratchBuffers
from megatron_bai.checkpoint.safe_unpickle import read_metadata
from megatron_bai.checkpoint.tensor_index import Chunk, ObjectInfo, Record, TensorInfo
from megatron_bai.checkpoint.writer import CheckpointWriter, ItemWriter, TensorSpec, UnitWriter, WrittenItem
from megatron_bai.errors import UserError
from megatron_bai.utils.strict_json import parse, read_bounded

INDEX = ".metadata"
FORMAT = "metadata.json"
SUFFIX = ".distcp"
_MAX_FORMAT_BYTES = 1 << 20


class TorchDistReader(CheckpointReader):
    """A `torch_dist` checkpoint, opened for reading.

    Raises:
        UserError: there is no complete checkpoint at `path`, or its index and its files do not agree.
    """

    def __init__(self, path: str | Path, scratch: ScratchBuffers | None = None):
        path = Path(path)
        _require_complete(path)
        stats = OpenedFiles(path, [INDEX]).stats
        metadata = read_metadata(path / INDEX)
        try:
            tensors, objects = _parse_index(metadata)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path / INDEX} is damaged ({error!r}): restore the checkpoint from a copy") from None
        if COMMON_OBJECT not in objects:
            _require_file(path, COMMON)
        self._records: dict[tuple[str, int], Record] = {}
        self._frames: dict[int, list[torch_zip.ArchiveFrame]] = {}  # by the length of the item
        super().__init__(path, tensors, scratch, objects, stats)

    def own_files(self) -> set[str]:
        """Return the names of the files that hold tensors, their index, or the format's other state."""
        chunks = {chunk.file for info in self.tensors.values() for chunk in info.chunks}
        return {INDEX, FORMAT, COMMON} | chunks | {info.file for info in self.objects.values()}

    def make_writer(self, tensors: Sequence[TensorSpec], file_bytes: int) -> CheckpointWriter:
        """Return a writer, whose files are those of the units: neither `tensors` nor `file_bytes` matters.

        Args:
            tensors: not used.
            file_bytes: not used.
        """
        return TorchDistWriter()  # a file for each unit, which has its size

    def locate_record(self, info: TensorInfo, chunk: Chunk) -> Record:
        """Return the position of a chunk's elements, which its archive says.

        Args:
            info: of the tensor.
            chunk: one of its chunks.

        Returns:
            The record, parsed once and remembered; its CRC-32 is None where torch was told not to compute one.

        Raises:
            UserError: the item cannot be read, is damaged, or has another dtype or shape than the index says.
        """
        key = chunk.file, chunk.start
        if key not in self._records:
            try:
                self._records[key] = self._parse_item(info, chunk)
            except UserError:
                raise
            except Exception as error:  # a damaged archive raises nearly anything
                raise UserError(
                    f"{self.path / chunk.file}: the item of {info.key} at byte {chunk.start} is damaged ({error}):"
                    " restore the file from a copy"
                ) from None
        return self._records[key]

    def read_object(self, key: str) -> bytes:
        """Return the bytes of an object's archive, verified and not unpickled."""
        data, info = super().read_object(key), self.objects[key]
        try:
            torch_zip.verify_archive(data)
        except Exception as error:  # likewise
            raise UserError(
                f"{self.path / info.file}: the object {key} at byte {info.start} is damaged ({error}): restore the file"
                " from a copy"
            ) from None
        return data

    def _parse_item(self, info: TensorInfo, chunk: Chunk) -> Record:
        """Read an item's head and compare it with the index."""
        frame, crc = self._match_frame(chunk)
        saved = frame.saved
        if saved.dtype != info.dtype or saved.shape != chunk.sizes:
            raise ValueError(f"it holds {saved.dtype} {saved.shape}, the index says {info.dtype} {chunk.sizes}")
        start = chunk.start + len(frame.head)
        return Record(start, frame.length, saved.offset * info.dtype.itemsize, saved.strides, crc)

    def _match_frame(self, chunk: Chunk) -> tuple[torch_zip.ArchiveFrame, int | None]:
        """Return an item's frame and CRC-32: a known frame of this length and head, or else one that is parsed."""
        frames = self._frames.setdefault(chunk.length, [])
        for frame in frames:
            if self.files.read_bytes(chunk.file, chunk.start, len(frame.head)) == frame.head:
                position = chunk.start + len(frame.head) + frame.length + frame.crc_positions[0]
                return frame, frame.read_crc(self.files.read_bytes(chunk.file, position, torch_zip.CRC32.size))
        frame = torch_zip.parse_frame(cast(BinaryIO, _ItemFile(self, chunk)))  # it has what `zipfile` asks of one
        frames.append(frame)
        return frame, frame.crc32


class _ItemFile(io.RawIOBase):
    """One item of a file as a file of its own, for `zipfile`."""

    def __init__(self, reader: CheckpointReader, chunk: Chunk):
        self._reader, self._chunk, self._position = reader, chunk, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._chunk.length}[whence]
        if base + offset < 0:
            raise OSError("seek before the item")  # as a file would: zipfile probes a short one this way
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        remaining = max(self._chunk.length - self._position, 0)
        size = remaining if size < 0 else min(size, remaining)
        data = self._reader.files.read_bytes(self._chunk.file, self._chunk.start + self._position, size)
        self._position += size
        return data


def is_torch_dist(path: Path) -> bool:
    """Return whether a directory is Megatron-Core's by the content of `metadata.json`, a name other tools use, too."""
    try:
        content = parse(read_bounded(path / FORMAT, _MAX_FORMAT_BYTES))
    except (OSError, ValueError):
        return (path / INDEX).is_file() and any(path.glob(f"*{SUFFIX}"))
    return isinstance(content, dict) and "sharded_backend" in content


def _require_complete(path: Path) -> None:
    """Raise unless a checkpoint is complete: the sizes in its manifest hold, if it has one, and no file is missing."""
    require_directory(path)
    manifest.read_info(path)
    try:
        backend = parse(read_bounded(path / FORMAT, _MAX_FORMAT_BYTES))["sharded_backend"]
    except FileNotFoundError:
        if (path / TRACKER).is_file():
            raise UserError(f"{path} has no {FORMAT}: it holds iterations, give the directory of one") from None
        if (path / INDEX).is_file() and not find_common_state(path):
            raise UserError(
                f"{path} is a checkpoint of torch.distributed.checkpoint ({INDEX}), and not Megatron-Core's, which has"
                f" {COMMON} and {FORMAT}, too: export it as safetensors with the trainer that wrote it"
            ) from None
        raise UserError(
            f"{path} has no {FORMAT}: it was never finished, or it is no torch_dist checkpoint; give the directory of"
            " an earlier iteration"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / FORMAT} is damaged ({error!r}): restore the checkpoint from a copy") from None
    if backend != "torch_dist":
        raise UserError(f"{path} is in the format {backend}: only torch_dist can be read")
    _require_file(path, INDEX)


def _require_file(path: Path, name: str) -> None:
    if not (path / name).is_file():
        raise UserError(
            f"{path} has no {name}: it was never finished, or the file is lost; give the directory of an earlier"
            " iteration, or restore it from a copy"
        )


def _parse_index(metadata: Any) -> tuple[dict[str, TensorInfo], dict[str, ObjectInfo]]:
    """Return the tensors and objects of an index, as plain data: the index itself holds a copy of every rank's plan."""
    items = {
        (at.fqn, None if at.offset is None else tuple(at.offset)): info for at, info in metadata.storage_data.items()
    }
    tensors, objects = {}, {}
    for key, stored in metadata.state_dict_metadata.items():
        if isinstance(stored, TensorStorageMetadata):
            chunks = []
            for box in stored.chunks:
                item = items[key, tuple(box.offsets)]
                if getattr(item, "transform_descriptors", None):
                    raise TypeError(f"{key} was saved through {item.transform_descriptors}")
                chunks.append(Chunk(tuple(box.offsets), tuple(box.sizes), item.relative_path, item.offset, item.length))
            tensors[key] = TensorInfo(key, stored.properties.dtype, tuple(stored.size), tuple(chunks))
        else:
            item = items[key, None]
            objects[key] = ObjectInfo(item.relative_path, item.offset, item.length)
    return tensors, objects


class DistcpFileWriter(UnitWriter):
    """Writes items one after another into one `.distcp` file."""

    def __init__(self, directory: Path, name: str):
        super().__init__()
        self.name = name + SUFFIX
        self._file = os.open(directory / self.name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._end = 0

    def _allocate(self, key: str, offsets: tuple[int, ...], dtype: torch.dtype, sizes: tuple[int, ...]) -> ItemWriter:
        """Append a chunk, byte for byte as `torch.save` would write it but for an identifier."""
        frame, start = torch_zip.make_frame(dtype, sizes), self._end
        self._end += len(frame.head) + frame.length + len(frame.tail)
        return ItemWriter(key, offsets, sizes, self.name, self._file, start, frame.length, frame.head, frame.make_tail)

    def write_tensor(self, key: str, offsets: tuple[int, ...], tensor: torch.Tensor) -> None:
        """Write a contiguous tensor as a chunk.

        Args:
            key: of the global tensor.
            offsets: of the chunk.
            tensor: the chunk, of any shape and dtype, on the CPU.
        """
        item = self.add_item(key, offsets, tensor.dtype, tuple(tensor.shape))
        item.write(tensor.reshape(-1).view(torch.uint8).numpy().data)

    def write_object(self, key: str, data: bytes) -> None:
        """Write an object, the archive that `torch.save` made of it.

        Args:
            key: of the object.
            data: the archive, which is not unpickled.

        Raises:
            OSError: the system refuses.
        """
        positional_io.pwrite_all(self._file, [data], self._end)
        self._items.append(WrittenItem(key, None, None, self.name, self._end, len(data), crc32.compute(data)))
        self._end += len(data)

    def __enter__(self) -> "DistcpFileWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._file)


def write_index(directory: Path, tensors: Iterable[TensorSpec], written: Iterable[WrittenItem]) -> None:
    """Write `.metadata` and then `metadata.json`, which make `directory` a checkpoint that Megatron-Core loads.

    Args:
        directory: of the checkpoint.
        tensors: every tensor.
        written: every chunk of every tensor, and every object.
    """
    stored: dict[str, Any] = {
        key: TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), [])
        for key, dtype, shape in tensors
    }
    results = []
    for item in written:
        if item.offsets is None or item.sizes is None:
            stored[item.key] = BytesStorageMetadata()
            index = MetadataIndex(item.key)
        else:
            chunks = stored[item.key].chunks
            index = MetadataIndex(item.key, item.offsets, len(chunks))
            chunks.append(ChunkStorageMetadata(torch.Size(item.offsets), torch.Size(item.sizes)))
        results.append(WriteResult(index, item.length, _StorageInfo(item.file, item.start, item.length)))
    FileSystemWriter(directory).finish(Metadata(stored), [results])
    # Megatron-Core's CheckpointingConfig, written out: importing megatron.core for it would take seconds
    config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    if COMMON_OBJECT not in stored:
        config |= {"common_backend": "torch", "common_backend_version": 1}
    (directory / FORMAT).write_text(json.dumps(config), encoding="utf-8")


class TorchDistWriter(CheckpointWriter):
    """Writes a file for each unit, then the index."""

    def prepare(self, directory: Path) -> None:
        """Do nothing: a unit creates its own file."""
        pass

    def open_unit(self, directory: Path, name: str) -> DistcpFileWriter:
        """Create the file of a unit.

        Args:
            directory: of the checkpoint.
            name: of the unit; its file is `{name}.distcp`, emptied if it exists.

        Raises:
            OSError: the file cannot be created.
        """
        return DistcpFileWriter(directory, name)

    def finalize(self, directory: Path, tensors: Iterable[TensorSpec], written: Iterable[WrittenItem]) -> None:
        """Write the index.

        Args:
            directory: of the checkpoint.
            tensors: every tensor.
            written: every chunk and object, of all units.
        """
        write_index(directory, tensors, written)
