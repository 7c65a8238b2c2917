"""A server's own directory for Unix sockets, and what else it would leave behind on this machine.

SGLang's processes talk through sockets in the directory of temporary files. Linux allows a socket's path 107 bytes, so
a longer TMPDIR would end the server. The directory is the server's own, closed to other users, and removed with it.

Its file `owner` is locked while the process that made it lives. Whoever makes the next directory removes those of
owners that were killed, and the shared memory of their servers, which no one else would. Some of that has the id of a
process in its name, and in containers that share `/dev/shm` processes share ids: so what is removed is what a server's
processes were seen to hold, by its name, and never what an id says.
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
_HELD = "holds-"  # followed by the name of shared memory that a process of the server holds
_HELD_NAME = re.compile(r"sgl_shm_\w+")
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

    def record_shared_memory(self, pids: Iterable[int]) -> None:
        """Note which shared memory of SGLang's the server holds, to remove it when the server has ended.

        Args:
            pids: of the server's processes; of one that has ended or is another user's nothing is noted.
        """
        for pid in pids:
            with suppress(OSError):
                for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
                    path = Path(line.split(maxsplit=5)[-1])
                    if path.parent == _SHARED_MEMORY and _HELD_NAME.fullmatch(path.name):
                        (self.path / f"{_HELD}{path.name}").touch()

    def remove(self) -> None:
        """Remove the sockets and the shared memory of the server, whose processes have ended; once."""
        _remove(self.path, self.instance)
        os.close(self.owner_fd)


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
    """Remove this user's directories below `parent` whose owners were killed, and their servers' shared memory."""
    for path in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # locked, another user's, of another program, or removed just now
            status = path.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                continue
            fd = os.open(path / _OWNER, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                lock_open_file(fd)
                instance = os.read(fd, 64)
                if _INSTANCE.fullmatch(instance):
                    _remove(path, instance.decode())
            finally:
                os.close(fd)


def _remove(directory: Path, instance: str) -> None:
    names = [path.name.removeprefix(_HELD) for path in directory.glob(f"{_HELD}*")]
    held = [_SHARED_MEMORY / name for name in names if _HELD_NAME.fullmatch(name)]
    shutil.rmtree(directory, ignore_errors=True)
    for path in (*held, *_SHARED_MEMORY.glob(f"sglang_loads_{instance[:INSTANCE_ID_LENGTH]}_*.shm")):
        with suppress(OSError):  # removed by the server itself
            if path.lstat().st_uid == os.geteuid():
                path.unlink()
