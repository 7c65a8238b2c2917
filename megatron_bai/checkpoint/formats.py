"""Find out which of the two formats a checkpoint has."""

from pathlib import Path

from megatron_bai.checkpoint import hf_files, torch_dist
from megatron_bai.checkpoint.reader import CheckpointReader, ScratchBuffers
from megatron_bai.errors import UserError


def open_checkpoint(path: str | Path, scratch: ScratchBuffers | None = None) -> CheckpointReader:
    """Open the checkpoint at `path`, whichever format it has.

    Args:
        path: directory of the checkpoint.
        scratch: memory to share with other readers; None: the reader's own.

    Returns:
        A reader, to be closed by the caller.

    Raises:
        UserError: there is no complete checkpoint.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"no checkpoint at {path}: give the directory of one")
    if any((path / name).is_file() for name in (hf_files.INDEX, hf_files.SINGLE)):
        return hf_files.SafetensorsReader(path, scratch)
    return torch_dist.TorchDistReader(path, scratch)
