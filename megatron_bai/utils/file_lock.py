"""Exclusive locks on files, between processes. A file system without locks refuses no one.

There are two kinds, since Linux's have two owners:

    lock_file        belongs to the process: a forked child neither has it nor keeps it alive. The file holds nothing
                     else, since closing any descriptor of it would release the lock
    lock_open_file   belongs to an open file: reading the file elsewhere in the process leaves it alone
"""

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_EXCLUSIVE = fcntl.LOCK_EX | fcntl.LOCK_NB


@contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, which is created and deleted, until the block or the process ends.

    Raises:
        BlockingIOError: another process holds it.
        OSError: the file cannot be created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            _acquire(fcntl.lockf, fd)
        except OSError:
            os.close(fd)
            raise
        with suppress(FileNotFoundError):
            if os.fstat(fd).st_ino == os.stat(path).st_ino:
                break
        os.close(fd)  # its last holder deleted it after we opened it
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


def lock_open_file(fd: int) -> None:
    """Lock an open file until all copies of its descriptor are closed.

    Raises:
        BlockingIOError: the file is locked through another descriptor, here or in another process.
        OSError: the descriptor is not one of a file.
    """
    _acquire(fcntl.flock, fd)


def _acquire(lock: Callable[[int, int], object], fd: int) -> None:
    try:
        lock(fd, _EXCLUSIVE)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # POSIX leaves the choice of the two to the system
            raise BlockingIOError(error.errno, error.strerror) from None
        if error.errno not in _NO_LOCKS:
            raise
