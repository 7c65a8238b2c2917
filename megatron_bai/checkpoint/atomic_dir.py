"""Replace a directory in one step: it is written beside its target and then committed.

Where the file system can exchange two names (ext4, XFS, Btrfs, tmpfs, overlayfs), the target is at every moment the
old directory or the new one. Where it cannot (NFS, Lustre), a writer that is killed between its two renames leaves the
new one, complete, under its staging name: `recover`, which every reader calls, then does the second rename.
"""

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from megatron_bai.errors import UserError
from megatron_bai.utils import file_lock
from megatron_bai.utils.atomic_file import fsync_path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def staging_path(target: Path) -> Path:
    """Return the path at which `target` is written until it is complete."""
    return _sibling_path(target, "unfinished")


def _replaced_path(target: Path) -> Path:
    """Return the path of the old directory between two renames, on a file system that cannot exchange names."""
    return _sibling_path(target, "replaced")


def _sibling_path(target: Path, ending: str) -> Path:
    """Return the hidden path beside `target` with an ending."""
    target = Path(os.path.realpath(target))  # "." has no name of its own, and a link stays
    return target.parent / f".{target.name}.{ending}"


@contextmanager
def lock(target: Path) -> Iterator[None]:
    """Hold the right to write `target` until the block, or the process, ends.

    On a file system without locks every process gets the right.

    Raises:
        UserError: another process holds it.
        OSError: the lock's file cannot be created.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(file_lock.lock_file(_sibling_path(target, "lock")))
        except BlockingIOError:
            raise UserError(f"{target} is being written by another process: let it end first") from None
        yield


def commit(target: Path) -> None:
    """Replace the target by the complete directory at `staging_path(target)`, and delete the old one.

    Raises:
        OSError: a rename failed.
    """
    target = Path(os.path.realpath(target))
    stage, replaced = staging_path(target), _replaced_path(target)
    if not target.exists():
        stage.rename(target)
    elif not _exchange_dirs(stage, target):
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
        recover(target)
    fsync_path(target.parent)
    remove_leftovers(target)


def recover(target: Path) -> None:
    """Complete the commit of a writer that was killed between its two renames, if there was one."""
    target = Path(os.path.realpath(target))
    if not target.exists() and _replaced_path(target).is_dir():
        with suppress(FileNotFoundError):  # another reader was first
            staging_path(target).rename(target)


def has_leftovers(target: Path) -> bool:
    """Return whether a writer that did not end well left a directory beside `target`."""
    return staging_path(target).exists() or _replaced_path(target).exists()


def remove_leftovers(target: Path) -> None:
    """Delete what a writer left beside `target`."""
    for path in (staging_path(target), _replaced_path(target)):
        shutil.rmtree(path, ignore_errors=True)


def _exchange_dirs(a: Path, b: Path) -> bool:
    """Exchange the names of two directories in one step; return False where the file system cannot.

    Raises:
        OSError: it can, but the exchange failed.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), os.fspath(b))
