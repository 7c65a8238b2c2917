"""Which checkpoint directories are complete, and whether they still are what was written.

A checkpoint is written into a staging directory, described by `manifest.json`, which is written last, and committed
(`atomic_dir.py`). So a directory with a manifest is complete, and one without was never finished. The manifest lists
every file with its size in bytes and its CRC-32 (`crc32.py` says why that), and has a CRC-32 of its own.

    read_info        compares every file's size, and the content of all but the weights: cheap, done wherever a
                     checkpoint is opened
    verify_weights   compares the content of the weights too: done wherever all of them are about to be used
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_bai.checkpoint import atomic_dir, crc32, iterations
from megatron_bai.checkpoint.not_checkpoints import require_directory
from megatron_bai.errors import UserError
from megatron_bai.utils.atomic_file import fsync_path
from megatron_bai.utils.strict_json import parse, read_bounded

_START = b'{\n "version": '  # of the file, as it is written
NAME = "manifest.json"
VERSION = 2  # 1 had sizes alone
WEIGHT_SUFFIXES = (".distcp", ".safetensors", ".npz")
_KEYS = {"version", "files", "info", "crc32"}  # of a manifest; the first version had no CRC-32
_MAX_BYTES = 64 << 20  # of a manifest: some 100 for each file
_THREADS = 4  # zlib-ng releases the GIL, so that files are read in parallel


def make_staging_dir(target: str | Path) -> Path:
    """Create an empty directory beside `target` to write into until `finalize` commits it.

    Raises:
        OSError: it cannot be created.
    """
    target = Path(target)
    atomic_dir.recover(target)
    stage = atomic_dir.staging_path(target)
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    return stage


def finalize(
    stage: Path, target: str | Path, info: dict[str, Any], crcs: Mapping[str, int] | None = None, scratch_dir: str = ""
) -> Path:
    """Write the manifest of `stage` and commit it, replacing the target. Called by one process, after all wrote.

    Args:
        stage: the complete staging directory.
        target: the checkpoint.
        info: kept in the manifest.
        crcs: the CRC-32 of files where it is known, by their path in `stage`; the others are read.
        scratch_dir: a directory in `stage` that is no part of the checkpoint, deleted once the manifest is written.

    Returns:
        `target`.

    Raises:
        UserError: a file cannot be read.
        OSError: a file cannot be written.
    """
    target = Path(target)
    paths = (path.relative_to(stage) for path in stage.rglob("*") if path.is_file())
    names = sorted(path.as_posix() for path in paths if path.as_posix() != NAME and path.parts[0] != scratch_dir)
    for name in names:
        fsync_path(stage / name)
    all_crcs = dict(crcs or {})
    all_crcs |= compute_crcs(stage, [name for name in names if name not in all_crcs])
    files = {name: {"bytes": (stage / name).stat().st_size, "crc32": f"{all_crcs[name]:08x}"} for name in names}
    body = json.loads(json.dumps({"version": VERSION, "files": files, "info": info}))  # as it will be read
    (stage / NAME).write_text(json.dumps(body | {"crc32": _content_crc(body)}, indent=1) + "\n", encoding="utf-8")
    fsync_path(stage / NAME)
    fsync_path(stage)
    if scratch_dir:
        shutil.rmtree(stage / scratch_dir, ignore_errors=True)
    atomic_dir.commit(target)
    if any(name.endswith(".distcp") for name in files):
        iterations.write_tracker(target)
    return target


def has_manifest(directory: Path) -> bool:
    """Return whether a directory has a manifest of ours, damaged or not: other tools have files of this name, too."""
    try:
        text = read_bounded(directory / NAME, _MAX_BYTES)
    except OSError:
        return (directory / NAME).is_file()  # which nobody can read: `_read_manifest` says so
    except ValueError:
        return False
    try:
        content = parse(text)
    except ValueError:  # one of ours that is damaged, if anything of it is left or its bytes were zeroed
        if not text.strip() or b"\0" in text or _START.startswith(text[: len(_START)]):
            return True
        return any(word in text for word in (b'"files"', b'"crc32"', b'"bytes"'))
    if not isinstance(content, dict) or len(_KEYS & content.keys()) < len(_KEYS) - 1:
        return False
    files, version = content.get("files", {}), content.get("version", VERSION)
    if type(version) is not int or not isinstance(files, dict):
        return False
    return not files or any(  # one that is not as we write it is damaged
        type(entry) in (int, str) or (isinstance(entry, dict) and bool({"bytes", "crc32"} & entry.keys()))
        for entry in files.values()
    )


def compute_crcs(directory: Path, names: Iterable[str]) -> dict[str, int]:
    """Compute the CRC-32 of files.

    Args:
        directory: of the files.
        names: of the files, relative to it.

    Raises:
        UserError: one cannot be read.
    """

    def read(name: str) -> tuple[str, int]:
        try:
            return name, crc32.compute_file(directory / name)
        except OSError as error:
            raise UserError(f"{directory / name} cannot be read: {error.strerror}") from None

    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(pool.map(read, names))


def read_info(directory: str | Path) -> dict[str, Any] | None:
    """Read the `info` of a complete checkpoint, or None where there is no complete one.

    Raises:
        UserError: the manifest cannot be read, a file it lists is missing or has another size, or one that holds no
            weights has another content.
    """
    directory = Path(directory)
    atomic_dir.recover(directory)
    if not has_manifest(directory):
        return None
    files, info = _read_manifest(directory)
    for name, entry in files.items():
        file = directory / name
        size = file.stat().st_size if file.is_file() else None
        if size != entry["bytes"]:
            state = "is missing" if size is None else f"has {size} bytes instead of {entry['bytes']}"
            raise UserError(f"{file} {state}: the checkpoint is damaged, restore it from a copy")
    _verify_files(directory, {name: entry for name, entry in files.items() if not name.endswith(WEIGHT_SUFFIXES)})
    return info


def verify_weights(directory: str | Path, rank: int = 0, num_ranks: int = 1) -> int:
    """Compare the weights with the CRC-32 in the manifest; ranks share the files.

    Args:
        directory: of the checkpoint.
        rank: which files are compared here.
        num_ranks: that call this.

    Returns:
        How many files were compared here; 0 where the checkpoint has no manifest, or one of version 1.

    Raises:
        UserError: a file is not what was written.
    """
    directory = Path(directory)
    if not has_manifest(directory):
        return 0
    files, _ = _read_manifest(directory)
    weights = sorted(name for name in files if name.endswith(WEIGHT_SUFFIXES))
    return _verify_files(directory, {name: files[name] for name in weights[rank::num_ranks]})


def recorded_crcs(directory: str | Path) -> dict[str, int]:
    """Read the CRC-32 of every file of a checkpoint from its manifest; empty where it has none.

    Raises:
        UserError: the manifest cannot be read.
    """
    if not has_manifest(Path(directory)):
        return {}
    files, _ = _read_manifest(Path(directory))
    return {name: int(entry["crc32"], 16) for name, entry in files.items() if entry["crc32"] is not None}


def _verify_files(directory: Path, files: dict[str, dict[str, Any]]) -> int:
    """Compare files with their entries in the manifest; return how many have a CRC-32."""
    noted = {name: int(note["crc32"], 16) for name, note in files.items() if note["crc32"] is not None}
    for name, found in compute_crcs(directory, noted).items():
        require_crc(directory / name, found, noted[name])
    return len(noted)


def require_crc(file: Path, crc: int, recorded: int) -> None:
    """Raise unless a file's CRC-32 is the one that was recorded.

    Args:
        file: for the message.
        crc: of the file.
        recorded: the CRC-32 it had when it was written.

    Raises:
        UserError: they differ.
    """
    if crc != recorded:
        raise UserError(
            f"{file} is not what was written (CRC-32 {crc:08x}, written {recorded:08x}): the checkpoint is damaged,"
            " restore it from a copy"
        )


def _content_crc(body: dict[str, Any]) -> str:
    """Return the CRC-32 of a manifest's content, however it is formatted, as hexadecimal digits."""
    return f"{crc32.compute(json.dumps(body, sort_keys=True).encode()):08x}"


def _read_manifest(directory: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Return the bytes and CRC-32 (None in version 1) of every file, and the info."""
    path = directory / NAME
    try:
        manifest = parse(path.read_bytes())
        version, files, info = (manifest[name] for name in ("version", "files", "info"))
        if version not in (1, VERSION):
            raise UserError(f"{path} has version {version}, this release reads versions 1 and {VERSION}")
        if version == 1:
            files = {name: {"bytes": size, "crc32": None} for name, size in files.items()}
        elif manifest["crc32"] != _content_crc({"version": version, "files": files, "info": info}):
            raise ValueError("it is not what was written")
        if not all(type(noted["bytes"]) is int and int(noted["crc32"] or "0", 16) >= 0 for noted in files.values()):
            raise ValueError("it lists something that is no size")
        if any(name.startswith("/") or ".." in name.split("/") for name in files):
            raise ValueError("it lists a file outside the checkpoint")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): restore the checkpoint from a copy") from None
    return files, info


def require_info(directory: str | Path) -> dict[str, Any]:
    """Read the `info` of a complete checkpoint.

    Raises:
        UserError: there is no such directory, or it was never finished, or it is damaged.
    """
    directory = Path(directory)
    require_directory(directory)
    info = read_info(directory)
    if info is None:
        raise UserError(
            f"{directory} has no {NAME}: it was never finished, or another tool wrote it: `megatron-bai convert` makes"
            " a checkpoint with one"
        )
    return info
