"""Where results may be written: looked at before any work, with every link on the way followed."""

import os
from collections.abc import Iterable
from pathlib import Path

from megatron_bai.errors import UserError


def resolve_output(path: str | Path, setting: str) -> Path:
    """Return the directory that a result replaces or becomes, without links.

    Args:
        path: as the setting names it; it need not exist.
        setting: for the message.

    Raises:
        UserError: it is a link to nothing, a file, a mount point or the working directory, or cannot be created there.
    """
    path = Path(os.path.abspath(path))
    _require_no_dangling_link(path, setting)
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise UserError(f"{setting} {path} is a file: choose a directory")
    if target.is_dir() and is_inside(Path.cwd(), target):
        raise UserError(f"{setting} {path} is the working directory or holds it, and would be replaced: choose another")
    if os.path.ismount(target):
        raise UserError(f"{setting} {path} is where a file system is mounted: choose a directory inside it")
    _require_writable(target.parent, f"{setting} {path}")
    return target


def validate_directory(path: str | Path, setting: str) -> None:
    """Refuse a directory in which nothing can be written; it need not exist, and may be a link to one that does.

    Args:
        path: as the setting names it.
        setting: for the message.

    Raises:
        UserError: it is a link to nothing or a file, or cannot be created or written.
    """
    path = Path(os.path.abspath(path))
    _require_no_dangling_link(path, setting)
    _require_writable(Path(os.path.realpath(path)), f"{setting} {path}")


def validate_file(path: str | Path, setting: str) -> None:
    """Refuse a file that cannot be written.

    Args:
        path: as the setting names it; it need not exist, but its directory must.
        setting: for the message.

    Raises:
        UserError: it is a directory, or a link to nothing, or there is no directory for it that can be written.
    """
    path = Path(os.path.abspath(path))
    _require_no_dangling_link(path, setting)
    if path.is_dir():
        raise UserError(f"{setting} {path} is a directory: name a file")
    if not path.parent.is_dir():
        raise UserError(f"{setting} {path}: there is no directory {path.parent}: create it, or choose another")
    _require_writable(path.parent, f"{setting} {path}")


def is_inside(path: Path, directory: Path) -> bool:
    """Return whether `path` is `directory` or lies in it, by what the file system says: through links and mounts, too.

    Args:
        path: which need not exist.
        directory: which need not exist; then names are compared.
    """
    path, directory = Path(os.path.realpath(path)), Path(os.path.realpath(directory))
    if directory in (path, *path.parents):
        return True
    try:
        own = os.stat(directory)
    except OSError:
        return False
    for place in (path, *path.parents):
        try:
            stat = os.stat(place)
        except OSError:
            continue
        if (stat.st_dev, stat.st_ino) == (own.st_dev, own.st_ino):
            return True
    return False


def require_apart(target: str | Path, setting: str, sources: Iterable[tuple[str, str | Path]]) -> None:
    """Refuse an output that would write over a checkpoint that is read, or that lies in one.

    Args:
        target: the output.
        setting: that names it.
        sources: what each is called in the message, and its directory.

    Raises:
        UserError: the two are one directory, one lies in the other, or files of the source are links into the output.
    """
    target = Path(target)
    for name, path in sources:
        source = Path(path)
        if is_inside(target, source):
            raise UserError(f"{setting} {target} is {name} or lies inside it: choose another directory")
        if is_inside(source, target):
            raise UserError(f"{setting} {target} holds {name}, {source}: choose another directory")
        entries = source.iterdir() if source.is_dir() else ()
        if linked := next((file for file in entries if file.is_symlink() and is_inside(file, target)), None):
            raise UserError(f"{setting} {target} holds what {linked} is a link to: choose another directory")


def _require_no_dangling_link(path: Path, setting: str) -> None:
    """Refuse a link that leads to nothing."""
    if path.is_symlink() and not path.exists():
        raise UserError(f"{setting} {path} is a link to {os.readlink(path)}, which does not exist: remove the link")


def _require_writable(directory: Path, name: str) -> None:
    """Refuse a directory that cannot be written, or created where it does not exist."""
    existing = next(place for place in (directory, *directory.parents) if place.exists() or place.is_symlink())
    if not existing.is_dir():
        raise UserError(f"{name}: {existing} is no directory: choose another")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{name}: {existing} cannot be written: choose another")
