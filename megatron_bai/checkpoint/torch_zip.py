"""The archive that `torch.save` makes of one tensor, as a frame around the tensor's bytes.

An archive is an uncompressed zip: a pickle that describes the tensor, the record of its elements, and a directory with
the record's CRC-32. Two tensors of one dtype, shape and strides have the same archive but for the elements and their
CRC-32. So a frame is parsed once, recognised by its head afterwards, and reused to write: thousands of experts cost
one `zipfile` and one pickle.
"""

import functools
import io
import struct
import zipfile
from dataclasses import dataclass
from typing import BinaryIO

import torch

from megatron_bai.checkpoint import crc32
from megatron_bai.checkpoint.boxes import strided_extent
from megatron_bai.checkpoint.safe_unpickle import SavedTensor, read_saved_tensor

_LOCAL_HEADER = struct.Struct("<26xHH")  # of a member: lengths of its name and its extra field
_CRC_IN_DIRECTORY = 46 - 16  # bytes from a directory entry's CRC-32 to its name
CRC32 = struct.Struct("<I")

_MAX_FRAME_BYTES = 1 << 20  # bytes; real ones have some hundred


@dataclass(frozen=True)
class ArchiveFrame:
    """What surrounds the elements.

    Attributes:
        head: the bytes before them.
        tail: the bytes after them; `crc_positions` are the positions in it of their CRC-32.
        length: of the record of elements, in bytes.
        saved: how the tensor lies in that record.
    """

    head: bytes
    tail: bytes
    crc_positions: tuple[int, ...]
    length: int
    saved: SavedTensor

    @property
    def crc32(self) -> int | None:
        """The elements' CRC-32 in the archive this was parsed from; None where torch was told not to compute one."""
        return self.read_crc(self.tail[self.crc_positions[0] :])

    @staticmethod
    def read_crc(data: bytes) -> int | None:
        """Return the CRC-32 that `data` begins with; None where torch was told not to compute one."""
        return CRC32.unpack_from(data)[0] or None

    def make_tail(self, crc32: int) -> bytes:
        """Return the tail for elements with another CRC-32."""
        tail = bytearray(self.tail)
        for position in self.crc_positions:
            CRC32.pack_into(tail, position, crc32)
        return bytes(tail)


def parse_frame(file: BinaryIO) -> ArchiveFrame:
    """Parse the archive in `file`, whose elements are not read.

    Raises:
        Exception: it is not the archive of one plain tensor; no code of the file was run.
    """
    with zipfile.ZipFile(file) as archive:
        members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    if _read_member(file, members.get("byteorder"), b"little") != b"little":
        raise ValueError("it is from a machine of another byte order")
    saved = read_saved_tensor(_read_member(file, members["data.pkl"]))
    info = members[f"data/{saved.storage}"]
    start, length = _locate_member(file, info)
    extent = saved.offset + strided_extent(saved.shape, saved.strides)
    if min(saved.strides, default=0) < 0 or extent * saved.dtype.itemsize > length:
        raise ValueError("its elements do not fit its storage")
    if file.seek(0, io.SEEK_END) - length > _MAX_FRAME_BYTES:
        raise ValueError("it holds more than one tensor")
    file.seek(0)
    head = file.read(start)
    file.seek(start + length)
    tail = file.read()
    directory_crc = tail.rindex(info.filename.encode()) - _CRC_IN_DIRECTORY  # the directory comes last
    crcs = (
        (4, directory_crc) if tail.startswith(b"PK\7\x08") else (directory_crc,)
    )  # a descriptor may follow the elements
    if any(CRC32.unpack_from(tail, at)[0] != info.CRC for at in crcs):
        raise ValueError("its directory contradicts itself")
    return ArchiveFrame(head, tail, crcs, length, saved)


def _locate_member(file: BinaryIO, info: zipfile.ZipInfo) -> tuple[int, int]:
    """Return start and length of an uncompressed member, in bytes."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} is compressed")
    file.seek(info.header_offset)
    name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    return info.header_offset + _LOCAL_HEADER.size + name + extra, info.file_size


def _read_member(file: BinaryIO, info: zipfile.ZipInfo | None, default: bytes = b"") -> bytes:
    """Return the bytes of a member, verified by its CRC-32; `default` where there is no member."""
    if info is None:
        return default
    start, length = _locate_member(file, info)
    file.seek(start)
    data = file.read(length)
    if len(data) != length or info.CRC not in (0, crc32.compute(data)):  # 0 where torch was told not to compute it
        raise ValueError(f"{info.filename} is not what was saved")
    return data


def verify_archive(data: bytes) -> None:
    """Verify that `data` is an archive that `torch.save` made of any object, by the CRC-32 of its members.

    Raises:
        Exception: it is not; nothing of it was unpickled.
    """
    file = io.BytesIO(data)
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            _read_member(file, info)


@functools.lru_cache(maxsize=4096)
def make_frame(dtype: torch.dtype, shape: tuple[int, ...]) -> ArchiveFrame:
    """Make the frame that `torch.save` puts around a contiguous tensor.

    Args:
        dtype: of the tensor.
        shape: of the tensor.

    Returns:
        The frame; its CRC-32 is that of uninitialised elements, which `make_tail` replaces.
    """
    file = io.BytesIO()
    torch.save(torch.empty(shape, dtype=dtype), file)
    return parse_frame(file)
