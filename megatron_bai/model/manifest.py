"""Which checkpoint directories are whole.

A checkpoint is written into a sibling directory, described by `manifest.json`, which is written last, and
renamed into place. So a directory with a manifest is complete, and one without was never finished. The manifest
lists every file with its size in bytes, which finds a truncated shard before anything is loaded.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from megatron_bai.errors import UserError

NAME = "manifest.json"
VERSION = 1


def sync(path: Path) -> None:
    """Flush a file or a directory entry to disk, so that a power cut cannot reorder what is written after it."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def staging(target: str | Path) -> Path:
    """An empty directory beside `target` to write into until `seal` moves it into place."""
    target = Path(target)
    stage = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    return stage


def seal(stage: Path, target: str | Path, info: dict[str, Any]) -> Path:
    """Describe `stage` and move it to `target`, replacing what was there. Called by one process, after all wrote."""
    target = Path(target)
    files = sorted(p for p in stage.rglob("*") if p.is_file())
    for path in files:
        sync(path)
    listing = {p.relative_to(stage).as_posix(): p.stat().st_size for p in files}
    text = json.dumps({"version": VERSION, "files": listing, "info": info}, indent=1)
    (stage / NAME).write_text(text + "\n")
    sync(stage / NAME)
    sync(stage)
    old = target.with_name(f".{target.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    stage.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)
    return target


def read(directory: str | Path) -> dict[str, Any] | None:
    """The `info` of a complete checkpoint, or None where there is no finished one.

    Raises:
        UserError: the manifest cannot be read, or a file it lists is missing or has another size.
    """
    directory = Path(directory)
    path = directory / NAME
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
        version, files, info = manifest["version"], manifest["files"], manifest["info"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): restore the checkpoint from a copy") from None
    if version != VERSION:
        raise UserError(f"{path} has version {version}, this release reads version {VERSION}")
    for name, size in files.items():
        file = directory / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise UserError(f"{file} {state}: the checkpoint is damaged, restore it from a copy")
    return info


def require(directory: str | Path) -> dict[str, Any]:
    """`read`, where anything but a complete checkpoint is an error.

    Raises:
        UserError: there is no such directory, or it was never finished, or it is damaged.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"no checkpoint at {directory}: give the path of a directory that `train` or `merge` wrote")
    info = read(directory)
    if info is None:
        raise UserError(f"{directory} has no {NAME}: it was never finished, or is not a megatron_bai checkpoint")
    return info
