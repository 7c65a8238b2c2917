"""Read and write at positions of files, completely or with an error."""

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from megatron_bai.checkpoint.opened_files import OpenedFiles
from megatron_bai.errors import UserError

OPEN_FILES = 32  # kept open per source and thread: a checkpoint may have more files than a process may open


class FileHandles:
    """The open files of one checkpoint; every thread has its own, so that none closes what another reads."""

    def __init__(self, path: Path, opened: OpenedFiles | None = None):
        """Open nothing yet.

        Args:
            path: of the checkpoint.
            opened: what its files must still be when they are opened.
        """
        self._path, self._opened = path, opened
        self._of_thread = threading.local()
        self._of_all_threads: list[OrderedDict[str, int]] = []

    def get_fd(self, name: str) -> int:
        """Return this thread's descriptor of a file, opening it if necessary and then closing the least recently used.

        Raises:
            UserError: it cannot be opened.
        """
        fds: OrderedDict[str, int]
        try:
            fds = self._of_thread.open
        except AttributeError:
            fds = self._of_thread.open = OrderedDict()
            self._of_all_threads.append(fds)
        if name in fds:
            fds.move_to_end(name)
            return fds[name]
        while len(fds) >= OPEN_FILES:
            os.close(fds.popitem(last=False)[1])
        try:
            fd = fds.setdefault(name, os.open(self._path / name, os.O_RDONLY))
            if self._opened:
                self._opened.require_same(name, os.fstat(fd))
            return fd
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
        fd = self.get_fd(name)
        try:
            data = os.pread(fd, length, start)
        except OSError as error:
            raise self._unreadable(name, error) from None
        if len(data) < length:  # there is more than one call takes, or the file ends
            buffer = bytearray(length)
            self.read_into(name, start, memoryview(buffer), fd)
            data = bytes(buffer)
        return data

    def _unreadable(self, name: str, error: OSError) -> UserError:
        return UserError(f"{self._path / name} cannot be read: {error.strerror}")

    def close(self) -> None:
        """Close the files of all threads, none of which may be reading."""
        for fds in self._of_all_threads:
            while fds:
                os.close(fds.popitem()[1])


def pwrite_all(fd: int, buffers: Sequence[bytes | memoryview], start: int) -> None:
    """Write `buffers`, one after another, from byte `start` of a file.

    Args:
        fd: of the file, open to write.
        buffers: bytes to write.
        start: first byte in the file.

    Raises:
        OSError: the system refuses.
    """
    num_bytes = sum(map(len, buffers))
    done = os.pwritev(fd, buffers, start)
    if done < num_bytes:  # the disk is nearly full, or there is more than one call takes
        data = memoryview(b"".join(buffers))
        while done < num_bytes:
            done += os.pwrite(fd, data[done:], start + done)
