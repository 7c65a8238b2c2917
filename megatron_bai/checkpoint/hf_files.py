"""Hugging Face checkpoints: safetensors files, with `model.safetensors.index.json` where there are several.

A file is an 8-byte length, a JSON header with each tensor's dtype, shape and position, and the tensors' bytes. The
format has no checksum and no mark of completeness; what can be checked is that index, headers and sizes agree.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_bai.checkpoint import crc32, manifest
from megatron_bai.checkpoint.boxes import row_major_strides, strided_extent
from megatron_bai.checkpoint.carried_files import CONFIG, read_json_object
from megatron_bai.checkpoint.reader import CheckpointReader, ScratchBuffers
from megatron_bai.checkpoint.record_crcs import ItemKey
from megatron_bai.checkpoint.tensor_index import Chunk, Record, TensorInfo
from megatron_bai.checkpoint.writer import CheckpointWriter, ItemWriter, TensorSpec, UnitWriter, WrittenItem
from megatron_bai.errors import PermanentError, UserError
from megatron_bai.utils.strict_json import parse, read_bounded

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SUFFIX = ".safetensors"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MAX_INDEX_BYTES = 256 << 20  # some 100 a tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "BOOL": torch.bool,
}
_PACKED_DTYPES = frozenset({"F4", "F6_E2M3", "F6_E3M2"})  # less than a byte an element: torch has none of them
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsReader(CheckpointReader):
    """A Hugging Face checkpoint, opened for reading.

    Raises:
        UserError: files, headers and index do not agree, or a tensor has a dtype this format's reader does not know.
    """

    stores_whole_tensors = True

    def __init__(self, path: str | Path, scratch: ScratchBuffers | None = None):
        path = Path(path)
        manifest.read_info(path)
        expected = read_weight_map(path)
        self.is_indexed = bool(expected)
        tensors = {}
        self.headers: dict[str, int] = {}  # bytes before the tensors, by file
        self.metadata: dict[str, dict[str, str]] = {}  # likewise
        stats: dict[str, os.stat_result] = {}
        for file in sorted(set(expected.values())) if expected else [SINGLE]:
            self.headers[file], self.metadata[file], in_file, stats[file] = _read_header(path / file)
            tensors.update(in_file)
        files = {key: entry.chunks[0].file for key, entry in tensors.items()}
        inconsistent = sorted(key for key in expected.keys() ^ files.keys() if expected) or sorted(
            key for key, file in expected.items() if files[key] != file
        )
        if inconsistent:
            raise UserError(f"{path / INDEX} and the files disagree about {inconsistent[0]}: restore them from a copy")
        super().__init__(path, tensors, scratch, stats=stats)

    def locate_record(self, info: TensorInfo, chunk: Chunk) -> Record:
        """Return the position of a tensor's elements, which is that of its one chunk.

        Args:
            info: of the tensor.
            chunk: its only one.

        Returns:
            A record in row-major order without a CRC-32: the format has none.
        """
        return Record(chunk.start, chunk.length, 0, row_major_strides(info.shape), None)

    def _verify_files(self, crcs: dict[ItemKey, int]) -> None:
        recorded = manifest.recorded_crcs(self.path)
        for file in self.headers.keys() & recorded.keys():
            crc = crc32.compute_file(self.path / file, 0, self.headers[file])
            in_file = [entry for entry in self.tensors.values() if entry.chunks[0].file == file]
            for entry in sorted(in_file, key=lambda entry: entry.chunks[0].start):
                record = self.locate_record(entry, entry.chunks[0])
                record_crc = crcs.get((file, record.start))
                crc = crc32.combine(
                    crc, self._compute_crc(file, record) if record_crc is None else record_crc, record.length
                )
            try:
                manifest.require_crc(self.path / file, crc, recorded[file])
            except UserError as error:
                raise PermanentError(str(error)) from None

    def own_files(self) -> set[str]:
        """Return the names of the files that hold tensors or their index."""
        return {*self.headers, *((INDEX,) if self.is_indexed else ())}

    def make_writer(self, tensors: Sequence[TensorSpec], file_bytes: int) -> CheckpointWriter:
        """Return a writer, as `SafetensorsWriter` describes it.

        Args:
            tensors: to write.
            file_bytes: that files are filled to; 0: each tensor stays in the file that it has in this checkpoint.
        """
        return SafetensorsWriter(self, tensors, file_bytes)


def read_weight_map(path: Path) -> dict[str, str]:
    """Return the file of each tensor, as transformers and SGLang choose the files; empty where it is `SINGLE` alone.

    Args:
        path: directory of the checkpoint.

    Raises:
        UserError: files contradict each other about where the tensors are, or the index is damaged.
    """
    single, files = path / SINGLE, _parse_index(path)
    named = read_json_object(path / CONFIG).get("transformers_weights")
    if named not in (None, SINGLE if single.is_file() else INDEX):
        raise UserError(
            f"{path / CONFIG}: transformers_weights names {named!r}, which transformers takes instead of other files:"
            " remove it, or give the model's file its usual name"
        )
    shards = sorted(file.name for file in path.glob("model-*.safetensors") if _SHARD.fullmatch(file.name))
    if files is None:
        if single.is_file() and not shards:
            return {}
        if single.is_file():
            raise UserError(
                f"{path} holds {SINGLE} and {shards[0]}, and no {INDEX}: readers take different ones, move the files"
                " that are not the model's away"
            )
        if shards:
            raise UserError(f"{path} holds {shards[0]} and no {INDEX}: restore the index from a copy")
        raise UserError(f"{path} holds no {SINGLE} and no {INDEX}: give the directory of a safetensors checkpoint")
    if single.is_file() and set(files.values()) != {SINGLE}:
        raise UserError(
            f"{path} holds {SINGLE} and {INDEX}, which names other files: transformers takes the former, other readers"
            " the latter; move away the one that is not the model's"
        )
    if missing := sorted(file for file in set(files.values()) if not (path / file).is_file()):
        raise UserError(f"{path / missing[0]} is missing, {INDEX} names it: restore the checkpoint from a copy")
    return files


def _parse_index(path: Path) -> dict[str, str] | None:
    """Return the file of each tensor by the index; None without one, or for another shape beside `SINGLE`."""
    index = path / INDEX
    if not index.is_file():
        return None
    try:
        files = parse(read_bounded(index, _MAX_INDEX_BYTES))["weight_map"]
        for file in dict.fromkeys(files.values()):  # an index is untrusted: it names files beside it, nothing else
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(SUFFIX):
                raise UserError(f"{index} names the file {file!r}, which is damaged or outside its directory")
        return dict(files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if (path / SINGLE).is_file():
            return None  # another tool's file, which no reader of such a checkpoint looks at
        raise UserError(f"{index} is damaged ({error!r}): restore the checkpoint from a copy") from None


def _read_header(file: Path) -> tuple[int, dict[str, str], dict[str, TensorInfo], os.stat_result]:
    """Return the bytes before the tensors, the metadata and the tensors of one file, and its state."""
    try:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= MAX_HEADER_BYTES:
                raise ValueError(f"its header claims {length} bytes")
            header = parse(stream.read(length))
            stat = os.fstat(stream.fileno())
            size = stat.st_size
        metadata = dict(header.pop("__metadata__", None) or {})
        tensors, end = {}, 8 + length
        for key, note in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            info = _parse_tensor(key, note, file, 8 + length)
            if info.chunks[0].start != end:
                raise ValueError(f"{key} does not begin where the tensor before it ends")
            tensors[key], end = info, end + info.nbytes
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error}): restore the file from a copy") from None
    if size != end:
        raise UserError(f"{file} has {size} bytes instead of {end}: restore the file from a copy")
    return 8 + length, metadata, tensors, stat


def _parse_tensor(key: str, entry: dict[str, Any], file: Path, base: int) -> TensorInfo:
    """Return the tensor that an entry of a header describes; `base` is the first byte behind the header."""
    shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
    if {*map(type, shape), type(start), type(end)} != {int}:
        raise ValueError(f"{key} has a shape or a place that is no number")
    if entry["dtype"] in _PACKED_DTYPES:
        raise UserError(
            f"{file} holds quantised tensors ({key} has the dtype {entry['dtype']}): dequantise the checkpoint first,"
            " to 16 bits or more"
        )
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{key} has the dtype {entry['dtype']}, which is not known here")
    dtype = DTYPES[entry["dtype"]]
    if end - start != math.prod(shape) * dtype.itemsize or min((start, *shape)) < 0:
        raise ValueError(f"{key} has {end - start} bytes for {dtype} {shape}")
    return TensorInfo(key, dtype, shape, (Chunk((0,) * len(shape), shape, file.name, base + start, end - start),))


@dataclass(frozen=True)
class _OutputFile:
    """A file to write: its header, its length with the tensors, and the start of each of them."""

    header: bytes
    length: int
    starts: dict[str, int]


class SafetensorsWriter(CheckpointWriter):
    """Writes files in which every tensor has its position beforehand, so that ranks write into the same ones."""

    def __init__(self, base: SafetensorsReader | None, tensors: Sequence[TensorSpec], file_bytes: int):
        """Assign every tensor to a file.

        Args:
            base: gives the metadata and, unless `file_bytes` is set, the files; None: nothing, and that is set.
            tensors: to write.
            file_bytes: that files are filled to; a larger tensor has a file of its own. 0: the base's files.
        """
        self._shapes = {key: (dtype, shape) for key, dtype, shape in tensors}
        if base is None or file_bytes:
            keys_by_file = _assign_to_files(tensors, file_bytes)
            names = [f"model-{i + 1:05}-of-{len(keys_by_file):05}{SUFFIX}" for i in range(len(keys_by_file))]
            files = dict(zip(names if len(keys_by_file) > 1 else [SINGLE], keys_by_file, strict=False))
            self._has_index = len(files) > 1
        else:
            files = {name: [] for name in base.metadata}
            for key, _, _ in tensors:
                files[base.tensors[key].chunks[0].file].append(key)
            self._has_index = (base.path / INDEX).is_file() and base.is_indexed
        metadata = base.metadata if base is not None else {}
        default_metadata = next(iter(metadata.values()), None) or {"format": "pt"}
        self._files = {
            name: _make_header(keys, self._shapes, metadata.get(name) or default_metadata)
            for name, keys in files.items()
        }
        self._positions = {
            key: (name, start) for name, file in self._files.items() for key, start in file.starts.items()
        }
        self._index_metadata = _read_index_metadata(base.path) if base is not None and base.is_indexed else {}

    def prepare(self, directory: Path) -> None:
        """Create the files in their full length, with their headers."""
        for name, file in self._files.items():
            (directory / name).touch()  # a merge that goes on has written into it
            with open(directory / name, "r+b") as new:
                new.write(file.header)
                new.truncate(file.length)

    @contextmanager
    def open_unit(self, directory: Path, name: str) -> Iterator[UnitWriter]:
        """Open the files that a unit writes into.

        Args:
            directory: of the checkpoint, which `prepare` has filled with files.
            name: not used: units share the files.

        Yields:
            A writer that puts each item at its final position; it opens a file with the first item in it.
        """
        writer = _InPlaceUnitWriter(self._positions, self._shapes, directory)
        try:
            yield writer
        finally:
            writer.close()

    def finalize(self, directory: Path, tensors: Iterable[TensorSpec], written: Iterable[WrittenItem]) -> None:
        """Write the index, where there are several files.

        Args:
            directory: of the checkpoint.
            tensors: not used: every tensor's file was assigned when this writer was made.
            written: not used, for the same reason.

        Raises:
            OSError: the index cannot be written.
        """
        if self._has_index:
            total = sum(math.prod(shape) * dtype.itemsize for dtype, shape in self._shapes.values())
            weight_map = {key: name for key, (name, _) in sorted(self._positions.items())}
            index = {"metadata": {**self._index_metadata, "total_size": total}, "weight_map": weight_map}
            (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _assign_to_files(tensors: Sequence[TensorSpec], file_bytes: int) -> list[list[str]]:
    """Return the keys of each file, in order."""
    keys_by_file: list[list[str]] = [[]]
    free_bytes = file_bytes
    for key, dtype, shape in tensors:
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes > free_bytes and keys_by_file[-1]:
            keys_by_file.append([])
            free_bytes = file_bytes
        keys_by_file[-1].append(key)
        free_bytes -= nbytes
    return keys_by_file


def _make_header(
    keys: list[str], shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str]
) -> _OutputFile:
    """Lay out a file: the wider dtypes come first, so that every tensor is aligned to its own."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end, starts = 0, {}
    for key in sorted(keys, key=lambda key: -shapes[key][0].itemsize):
        dtype, shape = shapes[key]
        starts[key], end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [starts[key], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header_bytes = 8 + len(text)
    prefix = len(text).to_bytes(8, "little") + text
    return _OutputFile(prefix, header_bytes + end, {key: header_bytes + start for key, start in starts.items()})


def _read_index_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a checkpoint's index, which is all it says besides the files."""
    metadata = parse((path / INDEX).read_bytes()).get("metadata")
    return metadata if isinstance(metadata, dict) else {}


class _InPlaceUnitWriter(UnitWriter):
    """Writes contiguous boxes of tensors at their positions."""

    def __init__(
        self,
        positions: dict[str, tuple[str, int]],
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]],
        directory: Path,
    ):
        super().__init__()
        self._positions, self._shapes, self._directory = positions, shapes, directory
        self._fds: dict[str, int] = {}

    def _allocate(self, key: str, offsets: tuple[int, ...], dtype: torch.dtype, sizes: tuple[int, ...]) -> ItemWriter:
        (expected, shape), (file, start) = self._shapes[key], self._positions[key]
        strides = row_major_strides(shape)
        assert dtype == expected and strided_extent(sizes, strides) == math.prod(sizes)
        start += sum(o * s for o, s in zip(offsets, strides, strict=True)) * dtype.itemsize
        if file not in self._fds:
            self._fds[file] = os.open(self._directory / file, os.O_WRONLY)
        return ItemWriter(key, offsets, sizes, file, self._fds[file], start, math.prod(sizes) * dtype.itemsize)

    def write_object(self, key: str, data: bytes) -> None:
        """Refuse an object."""
        raise AssertionError("safetensors files hold tensors only")

    def close(self) -> None:
        """Close the files."""
        for fd in self._fds.values():
            os.close(fd)
