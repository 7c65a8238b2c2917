"""How a directory comes into place whole: written beside its target, then put there in one step.

Where the file system can exchange two names (ext4, XFS, Btrfs, tmpfs, overlayfs), the target is at every moment the
old directory or the new one. Where it cannot (NFS, Lustre), a writer that is killed between its two renames leaves the
new one, complete, under its working name: `recover`, which every reader calls, then does the second rename.
"""

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_bai.errors import UserError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def staging_path(target: Path) -> Path:
    """Where `target` is written until it is complete."""
    return _sibling_path(target, "unfinished")


def _replaced_path(target: Path) -> Path:
    """Where the old directory goes for a moment, on a file system that cannot exchange."""
    return _sibling_path(target, "replaced")


def _sibling_path(target: Path, ending: str) -> Path:
    target = Path(os.path.abspath(target))  # "." has no name of its own
    return target.parent / f".{target.name}.{ending}"


def fsync_path(path: Path) -> None:
    """Flush a file or a directory entry to disk, so that a power cut cannot reorder what is written after it."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def lock(target: Path) -> Iterator[None]:
    """The right to write `target`, which this process has until the block, or the process, ends.

    A file system without locks gives everyone the right.

    Raises:
        UserError: another process has it.
        OSError: the lock's file cannot be made.
    """
    path = _sibling_path(target, "lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not `flock`, which a forked child would keep alive
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(fd)
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                raise UserError(f"{target} is being written by another process: let it end first") from None
        with suppress(FileNotFoundError):
            if os.fstat(fd).st_ino == os.stat(path).st_ino:
                break
        os.close(fd)  # whoever had it deleted it after we opened it
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


def commit(target: Path) -> None:
    """Make the complete directory at `unfinished(target)` the target, and delete the one that was there."""
    stage, old = staging_path(target), _replaced_path(target)
    if not target.exists():
        stage.rename(target)
    elif not _exchange_dirs(stage, target):
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        recover(target)
    fsync_path(target.parent)
    remove_leftovers(target)


def recover(target: Path) -> None:
    """Do the second rename of a writer that was killed before it; does nothing where there is nothing to do."""
    if not target.exists() and _replaced_path(target).is_dir():
        with suppress(FileNotFoundError):  # another reader was first
            staging_path(target).rename(target)


def has_leftovers(target: Path) -> bool:
    return staging_path(target).exists() or _replaced_path(target).exists()


def remove_leftovers(target: Path) -> None:
    """Delete what a writer left beside `target`."""
    for path in (staging_path(target), _replaced_path(target)):
        shutil.rmtree(path, ignore_errors=True)


def _exchange_dirs(a: Path, b: Path) -> bool:
    """Swap two directories in one step; False where the file system cannot.

    Raises:
        OSError: it can, but something else is wrong.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), os.fspath(b))
