"""Read and write at positions of files, completely or with an error."""

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from megatron_bai.errors import UserError

OPEN_FILES = 32  # kept open per source and thread: a checkpoint may have more files than a process may open


class FileHandles:
    """The open files of one checkpoint; every thread has its own, so that none closes what another reads."""

    def __init__(self, path: Path):
        self._path = path
        self._mine = threading.local()
        self._all: list[OrderedDict[str, int]] = []

    def get_fd(self, name: str) -> int:
        """Return this thread's descriptor of a file, opening it if necessary and then closing the least recently used.

        Raises:
            UserError: it cannot be opened.
        """
        mine: OrderedDict[str, int]
        try:
            mine = self._mine.open
        except AttributeError:
            mine = self._mine.open = OrderedDict()
            self._all.append(mine)
        if name in mine:
            mine.move_to_end(name)
            return mine[name]
        while len(mine) >= OPEN_FILES:
            os.close(mine.popitem(last=False)[1])
        try:
            return mine.setdefault(name, os.open(self._path / name, os.O_RDONLY))
        except OSError as error:
            raise self._unreadable(name, error) from None

    def read_into(self, name: str, start: int, buffer: memoryview, fd: int | None = None) -> None:
        """Fill `buffer` with the bytes from `start` of a file.

        Args:
            name: of the file, relative to the checkpoint.
            start: first byte.
            buffer: to fill, bytes.
            fd: of the file, where the caller has it.

        Raises:
            UserError: they cannot be read, or the file ends before.
        """
        fd = self.get_fd(name) if fd is None else fd
        try:
            done = os.preadv(fd, [buffer], start)
            while done < len(buffer):
                count = os.preadv(fd, [buffer[done:]], start + done)
                if count == 0:
                    raise UserError(f"{self._path / name} ends before byte {start + len(buffer)}: it was cut off")
                done += count
        except OSError as error:
            raise self._unreadable(name, error) from None

    def read_bytes(self, name: str, start: int, length: int) -> bytes:
        """Return `length` bytes from `start` of a file.

        Args:
            name: of the file, relative to the checkpoint.
            start: first byte.
            length: in bytes.

        Raises:
            UserError: as `read_into`.
        """
        descriptor = self.get_fd(name)
        try:
            data = os.pread(descriptor, length, start)
        except OSError as error:
            raise self._unreadable(name, error) from None
        if len(data) < length:  # there is more than one call takes, or the file ends
            whole = bytearray(length)
            self.read_into(name, start, memoryview(whole), descriptor)
            data = bytes(whole)
        return data

    def _unreadable(self, name: str, error: OSError) -> UserError:
        return UserError(f"{self._path / name} cannot be read: {error.strerror}")

    def close(self) -> None:
        """Close the files of all threads, none of which may be reading."""
        for files in self._all:
            while files:
                os.close(files.popitem()[1])


def pwrite_all(fd: int, buffers: Sequence[bytes | memoryview], start: int) -> None:
    """Write `buffers`, one after another, from byte `start` of a file.

    Args:
        fd: of the file, open to write.
        buffers: bytes to write.
        start: first byte in the file.

    Raises:
        OSError: the system refuses.
    """
    size = sum(map(len, buffers))
    done = os.pwritev(fd, buffers, start)
    if done < size:  # the disk is nearly full, or there is more than one call takes
        rest = memoryview(b"".join(buffers))
        while done < size:
            done += os.pwrite(fd, rest[done:], start + done)
