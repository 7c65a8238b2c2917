"""A server's own directory for Unix sockets, and what else it would leave behind on this machine.

SGLang's processes talk through sockets in the directory of temporary files. Linux allows a socket's path 107 bytes, so
a longer TMPDIR would end the server. The directory is the server's own, closed to other users, and removed with it.

Its file `owner` is locked while the process that made it lives. Whoever makes the next directory removes those of
owners that were killed, and the shared memory of their servers, which no one else would. SGLang names some of that by
the process that made it: each process of a server leaves its id in the directory, as the name of a file.
"""

import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_bai.errors import UserError
from megatron_bai.utils.file_lock import lock_open_file

_MAX_PARENT_BYTES = 64  # 107, without the directory's name of 22 bytes, the longest of a socket's, and slashes
_SHORT_DIRS = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108, each gets a directory with a random name
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108, SGLang's own place
_PREFIX = "megatron-bai-"
_OWNER = "owner"  # holds the server's name
_PROCESS = "process-"  # followed by the id of one of the server's processes
_INSTANCE = re.compile(rb"[0-9a-f]{32}")
INSTANCE_ID_LENGTH = 12  # of SGLang's `PortArgs.instance_id`


@dataclass(frozen=True)
class SocketDir:
    """The directory of one server.

    Attributes:
        path: of the directory.
        instance: the server's name; SGLang's shared memory has the beginning of it in its own.
        owner_fd: of the file that is locked until this process ends or `remove` is called.
    """

    path: Path
    instance: str
    owner_fd: int

    def remove(self, pids: Iterable[int] = ()) -> None:
        """Remove the sockets and the shared memory of the server, whose processes have ended; once.

        Args:
            pids: of the processes, by which SGLang names more of its shared memory.
        """
        _remove(self.path, self.instance, {*pids, *_recorded_pids(self.path)})
        os.close(self.owner_fd)


def record_process(directory: Path) -> None:
    """Leave this process's id in its server's directory; do nothing where `directory` is no such directory."""
    if (directory / _OWNER).is_file():
        (directory / f"{_PROCESS}{os.getpid()}").touch()


def make_socket_dir(instance: str) -> SocketDir:
    """Make the directory: below that of temporary files (TMPDIR) if its path is short enough, else below `/tmp`.

    Args:
        instance: the server's name, 32 hexadecimal digits.

    Raises:
        UserError: no directory can be written.
    """
    parents = list(_SHORT_DIRS)
    try:
        given = tempfile.gettempdir()  # what TMPDIR names, unless nothing can be written there
        if len(os.fsencode(given)) <= _MAX_PARENT_BYTES:
            parents.insert(0, given)
    except FileNotFoundError:
        pass
    for parent in dict.fromkeys(parents):
        _remove_leftovers(Path(parent))
    failure = ""
    for parent in parents:
        try:
            path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
            return SocketDir(path, instance, _lock_owner(path, instance))
        except OSError as error:
            failure = failure or f"{parent}: {error.strerror}"
    raise UserError(
        f"there is no directory for the server's sockets ({failure}): set TMPDIR to one that can be written, with a "
        f"path of at most {_MAX_PARENT_BYTES} bytes"
    )


def _lock_owner(directory: Path, instance: str) -> int:
    """Make the file `owner`, which nobody sees before it is locked and complete; return its descriptor."""
    hidden = directory / ".owner"
    fd = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    lock_open_file(fd)
    os.write(fd, instance.encode())
    try:
        again = os.open(hidden, os.O_RDONLY)
        try:
            lock_open_file(again)
        finally:
            os.close(again)
    except BlockingIOError:  # as it must be; a file system without locks would call every owner dead
        hidden.rename(directory / _OWNER)
    return fd


def _remove_leftovers(parent: Path) -> None:
    """Remove this user's directories below `parent` whose owners were killed, and their servers' shared memory.

    One whose server has not ended yet stays for the next time.
    """
    for path in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # locked, another user's, of another program, or removed just now
            status = path.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                continue
            fd = os.open(path / _OWNER, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                lock_open_file(fd)
                instance = os.read(fd, 64)
                pids = _recorded_pids(path)
                if _INSTANCE.fullmatch(instance) and not any(map(_is_running, pids)):
                    _remove(path, instance.decode(), pids)
            finally:
                os.close(fd)


def _recorded_pids(directory: Path) -> set[int]:
    """Return the ids that `record_process` left."""
    names = [path.name.removeprefix(_PROCESS) for path in directory.glob(f"{_PROCESS}*")]
    return {int(name) for name in names if name.isdecimal()}


def _is_running(pid: int) -> bool:
    """Return whether a process has this id and is no zombie: one that took the id since counts, too."""
    try:
        stat_line = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return False
    return stat_line.rpartition(")")[2].split()[0] not in "ZX"


def _remove(directory: Path, instance: str, pids: Iterable[int]) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    patterns = [f"sglang_loads_{instance[:INSTANCE_ID_LENGTH]}_*.shm", *(f"sgl_shm_*_{pid}_*" for pid in pids)]
    for path in (path for pattern in patterns for path in _SHARED_MEMORY.glob(pattern)):
        with suppress(OSError):  # another user's: an id may have been theirs
            path.unlink(missing_ok=True)
