"""Find out which of the two formats a checkpoint has, and whether it can be used."""

from pathlib import Path
from typing import Any

from megatron_bai.checkpoint import hf_files, manifest, not_checkpoints, torch_dist
from megatron_bai.checkpoint.iterations import has_tracker, resolve_iteration
from megatron_bai.checkpoint.reader import CheckpointReader, ScratchBuffers
from megatron_bai.checkpoint.weight_checks import is_state, require_output_layer, require_plain_weights
from megatron_bai.errors import UserError


def open_checkpoint(path: str | Path, scratch: ScratchBuffers | None = None) -> CheckpointReader:
    """Open the checkpoint at `path`, whichever format it has.

    Args:
        path: directory of the checkpoint, or a save directory of Megatron-LM.
        scratch: memory to share with other readers; None: the reader's own.

    Returns:
        A reader, to be closed by the caller.

    Raises:
        UserError: there is no complete checkpoint, or there are two.
    """
    path = resolve_iteration(path)
    if checkpoint_format(path) == "hf":
        return hf_files.SafetensorsReader(path, scratch)
    return torch_dist.TorchDistReader(path, scratch)


def checkpoint_format(directory: str | Path) -> str:
    """Return `megatron` or `hf`, the format of a checkpoint directory, by what its files hold.

    Raises:
        UserError: neither, or both; what there is instead is named (`not_checkpoints`).
    """
    directory = resolve_iteration(directory)
    not_checkpoints.require_directory(directory)
    if (kind := _find_format(directory)) is None:
        raise UserError(not_checkpoints.describe(directory))
    return kind


def require_complete(directory: str | Path) -> dict[str, Any]:
    """Return the `info` of a complete checkpoint; an empty one where another tool completed it.

    Such are Hugging Face's, whose index names all files, and iterations of Megatron-LM, whose tracker it writes last.

    Args:
        directory: of the checkpoint.

    Raises:
        UserError: as `manifest.require_info`; of a checkpoint without a manifest that is none of these, too.
    """
    directory = resolve_iteration(directory)
    not_checkpoints.require_directory(directory)
    if not manifest.has_manifest(directory) and (checkpoint_format(directory) == "hf" or has_tracker(directory)):
        return {}
    return manifest.require_info(directory)


def require_model(directory: str | Path, output_layer: bool = True) -> str:
    """Return the format of a checkpoint that a language model can be filled from, as far as its index tells.

    Args:
        directory: of the checkpoint.
        output_layer: whether it must have one, or be tied.

    Raises:
        UserError: there is no complete checkpoint, its tensors are no plain numbers, or its output layer is lost.
    """
    with open_checkpoint(directory) as reader:
        tensors = {key: entry for key, entry in reader.tensors.items() if not is_state(key)}
        require_plain_weights(reader.path, tensors)
        if output_layer:
            require_output_layer(reader.path, tensors)
        return "hf" if isinstance(reader, hf_files.SafetensorsReader) else "megatron"


def _find_format(path: Path) -> str | None:
    """Return the format; None where neither shows.

    Raises:
        UserError: there are checkpoints of both formats, or files of one contradict each other.
    """
    is_megatron = torch_dist.is_torch_dist(path)
    hf_names = [name for name in (hf_files.SINGLE, hf_files.INDEX) if (path / name).is_file()]
    is_hf = bool(hf_names) or any(path.glob("model-*-of-*.safetensors"))
    if is_megatron or is_hf:
        not_checkpoints.require_downloaded(path)
    if is_megatron and hf_names:
        raise UserError(
            f"{path} holds two checkpoints, Megatron's ({torch_dist.INDEX}) and Hugging Face's ({hf_names[0]}): move"
            " one of them into a directory of its own"
        )
    if is_megatron:
        return "megatron"
    if is_hf:
        hf_files.read_weight_map(path)
        return "hf"
    return None
