"""Hugging Face checkpoints: safetensors files, with `model.safetensors.index.json` where there are several.

A file is an 8-byte length, a JSON header that names each tensor's dtype, shape and place, and the tensors' bytes. The
format has no checksum and no mark of completeness; what can be checked is that index, headers and sizes agree.
"""

import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_bai.errors import Unfit, UserError
from megatron_bai.merge.boxes import row_major, span
from megatron_bai.merge.checks import Place
from megatron_bai.merge.sources import Chunk, Entry, Record, Scratch, Source
from megatron_bai.merge.targets import Target, Writer, Written
from megatron_bai.model import crc32, manifest
from megatron_bai.model.strict_json import parse

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SUFFIX = ".safetensors"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit

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
    "BOOL": torch.bool,
}


class SafeTensors(Source):
    """A Hugging Face checkpoint, opened for reading.

    Raises:
        UserError: files, headers and index do not agree, or a tensor has a dtype this format's reader does not know.
    """

    def __init__(self, path: str | Path, scratch: Scratch | None = None):
        path = Path(path)
        manifest.read(path)
        expected = _weight_map(path)
        tensors = {}
        self.headers: dict[str, int] = {}  # bytes before the tensors, by file
        for file in sorted(set(expected.values())) if expected else [SINGLE]:
            self.headers[file], entries = _read_header(path / file)
            tensors.update(entries)
        places = {key: entry.chunks[0].file for key, entry in tensors.items()}
        wrong = sorted(key for key in expected.keys() ^ places.keys() if expected) or sorted(
            key for key, file in expected.items() if places[key] != file
        )
        if wrong:
            raise UserError(f"{path / INDEX} and the files disagree about {wrong[0]}: restore them from a copy")
        super().__init__(path, tensors, scratch)

    def record(self, entry: Entry, chunk: Chunk) -> Record:
        return Record(chunk.start, chunk.length, 0, row_major(entry.shape), None)

    def _prove_files(self, crcs: dict[Place, int]) -> None:
        noted = manifest.noted_sums(self.path)
        for file in self.headers.keys() & noted.keys():
            crc = crc32.of_file(self.path / file, 0, self.headers[file])
            entries = [entry for entry in self.tensors.values() if entry.chunks[0].file == file]
            for entry in sorted(entries, key=lambda entry: entry.chunks[0].start):
                record = self.record(entry, entry.chunks[0])
                known = crcs.get((file, record.start))
                crc = crc32.combine(crc, self._crc32(file, record) if known is None else known, record.length)
            try:
                manifest.compare(self.path / file, crc, noted[file])
            except UserError as error:
                raise Unfit(str(error)) from None

    def is_own_file(self, file: Path) -> bool:
        return file.suffix == SUFFIX or file.as_posix() == INDEX

    def target(self) -> Target:
        return SafeTensorsTarget(self)


def _weight_map(path: Path) -> dict[str, str]:
    """Which file each tensor is in; empty where there is one file and no index."""
    if not (path / INDEX).is_file():
        return {}
    try:
        files = parse((path / INDEX).read_bytes())["weight_map"]
        if not all(isinstance(f, str) and Path(f).name == f and f.endswith(SUFFIX) for f in files.values()):
            raise ValueError("it names a file outside the checkpoint")
        return dict(files)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path / INDEX} is damaged ({error!r}): restore the checkpoint from a copy") from None


def _read_header(file: Path) -> tuple[int, dict[str, Entry]]:
    """Bytes before the tensors, and the tensors of one file."""
    try:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= MAX_HEADER_BYTES:
                raise ValueError(f"its header claims {length} bytes")
            header = parse(stream.read(length))
            size = os.fstat(stream.fileno()).st_size
        header.pop("__metadata__", None)
        entries, end = {}, 8 + length
        for key, note in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            entry = _entry(key, note, file.name, 8 + length)
            if entry.chunks[0].start != end:
                raise ValueError(f"{key} does not begin where the tensor before it ends")
            entries[key], end = entry, end + entry.nbytes
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error}): restore the file from a copy") from None
    if size != end:
        raise UserError(f"{file} has {size} bytes instead of {end}: restore the file from a copy")
    return 8 + length, entries


def _entry(key: str, note: dict[str, Any], file: str, base: int) -> Entry:
    shape, (start, end) = tuple(note["shape"]), note["data_offsets"]
    if not all(type(number) is int for number in (*shape, start, end)):
        raise ValueError(f"{key} has a shape or a place that is no number")
    if note["dtype"] not in DTYPES:
        raise ValueError(f"{key} has the dtype {note['dtype']}, which is not known here")
    dtype = DTYPES[note["dtype"]]
    if end - start != math.prod(shape) * dtype.itemsize or min((start, *shape)) < 0:
        raise ValueError(f"{key} has {end - start} bytes for {dtype} {shape}")
    return Entry(key, dtype, shape, (Chunk((0,) * len(shape), shape, file, base + start, end - start),))


class SafeTensorsTarget(Target):
    """Files like those of a checkpoint, with other values: every tensor has its place before it is written.

    So ranks write into the same files, and the index of that checkpoint stays valid.
    """

    def __init__(self, base: SafeTensors):
        self._base = base

    def begin(self, directory: Path) -> None:
        for name, length in self._base.headers.items():
            (directory / name).touch()  # a merge that goes on has written into it
            with open(self._base.path / name, "rb") as old, open(directory / name, "r+b") as new:
                new.write(old.read(length))
                new.truncate(os.fstat(old.fileno()).st_size)

    @contextmanager
    def unit(self, directory: Path, name: str) -> Iterator[Writer]:
        writer = _InPlaceWriter(self._base, directory)
        try:
            yield writer
        finally:
            writer.close()

    def finish(
        self, directory: Path, tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], written: Iterable[Written]
    ) -> None:
        if (self._base.path / INDEX).is_file():
            shutil.copyfile(self._base.path / INDEX, directory / INDEX)


class _InPlaceWriter(Writer):
    """Writes contiguous boxes of tensors where the base has them."""

    def __init__(self, base: SafeTensors, directory: Path):
        self.written: list[Written] = []
        self._base, self._directory = base, directory
        self._files: dict[str, int] = {}

    def tensor(self, key: str, offsets: tuple[int, ...], tensor: torch.Tensor) -> None:
        entry = self._base.tensors[key]
        chunk, strides = entry.chunks[0], row_major(entry.shape)
        assert tensor.dtype == entry.dtype and span(tuple(tensor.shape), strides) == tensor.numel()
        start = chunk.start + sum(o * s for o, s in zip(offsets, strides)) * entry.dtype.itemsize
        if chunk.file not in self._files:
            self._files[chunk.file] = os.open(self._directory / chunk.file, os.O_WRONLY)
        data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
        done = 0
        while done < len(data):
            done += os.pwrite(self._files[chunk.file], data[done:], start + done)
        crc = crc32.of(data)
        self.written.append(Written(key, offsets, tuple(tensor.shape), chunk.file, start, len(data), crc))

    def blob(self, key: str, data: memoryview) -> None:
        raise AssertionError("safetensors files hold tensors only")

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
