"""Write a small file in one step: readers see the old content or the new."""

import errno
import json
import os
from pathlib import Path
from typing import Any


def fsync_path(path: Path) -> None:
    """Flush a file or a directory entry to disk, so that a power cut cannot reorder what is written after it."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_text(path: Path, text: str, durable: bool = False) -> None:
    """Replace a file's content, in UTF-8.

    Args:
        path: of the file, which need not exist; its directory must.
        text: the new content.
        durable: return once the file would survive a power cut.

    Raises:
        OSError: it cannot be written; the file is unchanged.
    """
    write_bytes(path, text.encode("utf-8"), durable)


def write_bytes(path: Path, content: bytes, durable: bool = False) -> None:
    """Replace a file's content.

    A link stays, and what it points to is replaced. A device or a pipe, such as `/dev/stdout`, is written to.

    Args:
        path: as in `write_text`.
        content: the new one.
        durable: as in `write_text`.

    Raises:
        OSError: as `write_text`.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}")  # two processes do not write into each other's
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        fsync_path(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Replace a file's content by an object as JSON.

    Args:
        path: as in `write_text`.
        content: whatever `json` can write.

    Raises:
        OSError: it cannot be written; the file is unchanged.
    """
    write_text(path, json.dumps(content, indent=1) + "\n")
