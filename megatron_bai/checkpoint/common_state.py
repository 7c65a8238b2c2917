"""The state of a `torch_dist` checkpoint that is not sharded: iteration, arguments, an optimizer's settings.

Megatron-Core has two layouts of it, whatever release reads it:

    common.pt                       to 0.18: a file beside the index
    common_state/shard_0_1          from 0.19: an object of the index, the archive of a list with the state in it

Neither is unpickled but by `safe_unpickle`, which runs nothing that it names.
"""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_bai.checkpoint import safe_unpickle
from megatron_bai.errors import UserError

if TYPE_CHECKING:
    from megatron_bai.checkpoint.reader import CheckpointReader

COMMON = "common.pt"
COMMON_OBJECT = "common_state/shard_0_1"  # a ShardedObject's key, offset and global shape
_INDEX = ".metadata"


def find_common_state(directory: Path) -> str | None:
    """Return which of the two layouts a checkpoint has, `COMMON` or `COMMON_OBJECT`; None where it has neither.

    Args:
        directory: of the checkpoint. Where it has both, Megatron-Core reads the file.

    Raises:
        UserError: its index cannot be read.
    """
    if (directory / COMMON).is_file():
        return COMMON
    return COMMON_OBJECT if _find_object(directory) else None


def read_arguments(directory: Path) -> dict[str, Any]:
    """Read Megatron-LM's arguments, as far as they are plain values, from either layout.

    Args:
        directory: of a checkpoint of either format.

    Returns:
        By name; empty where there are none, or they are damaged.
    """
    if (directory / COMMON).is_file():
        return safe_unpickle.read_arguments(directory / COMMON)
    try:
        item = _find_object(directory) if (directory / _INDEX).is_file() else None
        data = _read_item(directory, item) if item else b""
    except (OSError, UserError):  # whoever opens the checkpoint says what is wrong with it
        return {}
    return safe_unpickle.read_arguments(io.BytesIO(data))


def verify_common_state(reader: "CheckpointReader") -> None:
    """Verify that the state of an opened checkpoint is an uncompressed archive of plain values. Nothing is run.

    Megatron-Core 0.19 unpickles the object without limits, and every release may do so with the other objects.

    Raises:
        UserError: it is missing, damaged, or names what `torch.load(weights_only=True)` does not know.
    """
    if COMMON_OBJECT in reader.objects:
        name = f"{reader.path / reader.objects[COMMON_OBJECT].file} ({COMMON_OBJECT})"
        content = safe_unpickle.load_plain_archive(io.BytesIO(reader.read_object(COMMON_OBJECT)), name)
        if not (isinstance(content, list) and len(content) == 1 and isinstance(content[0], dict)):
            raise UserError(f"{name} is damaged (it holds no state): restore the checkpoint from a copy")
    if COMMON_OBJECT not in reader.objects or (reader.path / COMMON).is_file():
        safe_unpickle.load_plain_archive(reader.path / COMMON, str(reader.path / COMMON))


def write_common_file(reader: "CheckpointReader", target: Path) -> None:
    """Write the state that an opened checkpoint has as an object into a file, as releases before 0.19 read it.

    Args:
        reader: of a checkpoint that `verify_common_state` accepted.
        target: directory of the file.

    Raises:
        UserError: as `verify_common_state`.
    """
    data = io.BytesIO(reader.read_object(COMMON_OBJECT))
    (state,) = safe_unpickle.load_plain_archive(data, f"{reader.path} ({COMMON_OBJECT})")
    torch.save(state, target / COMMON)


def _find_object(directory: Path) -> Any:
    """Return the index's entry of the state: file, offset and length; None where it has none."""
    stored = safe_unpickle.read_metadata(directory / _INDEX).storage_data
    return next((item for at, item in stored.items() if at.fqn == COMMON_OBJECT and at.offset is None), None)


def _read_item(directory: Path, item: Any) -> bytes:
    """Return the bytes of an item of the index."""
    with open(directory / item.relative_path, "rb") as file:
        file.seek(item.offset)
        return file.read(item.length)
