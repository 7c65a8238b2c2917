"""Save and load Megatron `torch_dist` checkpoints, readable in any parallel layout.

A directory holds Megatron's own files, `config.json` (the architecture, as Hugging Face writes it), the tokenizer,
and the manifest that marks it complete.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from megatron_bai.checkpoint import manifest, safe_unpickle
from megatron_bai.checkpoint.torch_dist import TorchDistReader
from megatron_bai.config import Model
from megatron_bai.distributed.rank_group import RankGroup, current_ranks
from megatron_bai.errors import UserError
from megatron_bai.model import hf_checkpoint
from megatron_bai.model.async_save import CheckpointSave, first_cause
from megatron_bai.model.build import MegatronModel


def sharded_state(model: MegatronModel) -> dict[str, Any]:
    """Return Megatron's sharded state dict of the weights."""
    return {f"model{i}": module.sharded_state_dict() for i, module in enumerate(model.modules)}


def save(model: MegatronModel, target: str | Path, tokenizer: str | Path, info: dict[str, Any]) -> None:
    """Write a model's weights. *Collective*; the directory must be one that all ranks see.

    Args:
        model: whose weights are written.
        target: directory of the checkpoint.
        tokenizer: directory to copy the tokenizer's files from.
        info: kept in the manifest.

    Raises:
        UserError: the directory cannot be written, or another process writes it; the target is unchanged.
    """
    CheckpointSave(sharded_state(model), Path(target), metadata_writer(model, tokenizer), info).finalize()


def metadata_writer(model: MegatronModel, tokenizer: str | Path) -> Callable[[Path], None]:
    """Return a function that adds the architecture and the tokenizer's files to a directory.

    Args:
        model: whose architecture is written.
        tokenizer: directory to copy the tokenizer's files from.
    """
    return lambda stage: hf_checkpoint.write_config(
        model.architecture, model.transformer_config.params_dtype, tokenizer, stage
    )


def load(model: MegatronModel, directory: str | Path) -> dict[str, Any]:
    """Fill a model from a complete checkpoint, whatever layout wrote it. *Collective*.

    Args:
        model: whose weights are set.
        directory: of the checkpoint.

    Returns:
        The `info` it was saved with.

    Raises:
        UserError: no complete checkpoint there, or one that is not what was written, or one of another architecture.
    """
    info, loaded = load_sharded(model, sharded_state(model), directory)
    for i, module in enumerate(model.modules):
        module.load_state_dict(loaded[f"model{i}"])
    reload_master_weights(model)
    return info


def load_sharded(
    model: MegatronModel, state: dict[str, Any], directory: str | Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load what a sharded state dict describes from a complete checkpoint of a model's architecture. *Collective*.

    Args:
        model: whose architecture the checkpoint must have.
        state: Megatron's sharded state dict.
        directory: of the checkpoint.

    Returns:
        The `info` it was saved with, and the state, which may lie in the tensors that `state` had.

    Raises:
        UserError: as `load`.
    """
    directory, ranks = Path(directory), current_ranks()
    info = manifest.require_info(directory)
    if not (directory / "metadata.json").is_file():
        raise UserError(f"{directory} is not a Megatron torch_dist checkpoint: `megatron-bai convert` makes one")
    require_architecture(directory, model.architecture)
    ranks.run_on_all(lambda: _verify_before_load(directory, state, ranks))
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException

    try:
        return info, dist_checkpointing.load(state, str(directory))
    except CheckpointingException as error:
        raise UserError(f"Megatron cannot load {directory}: {error}") from None
    except CheckpointException as error:
        raise UserError(f"Megatron cannot load {directory}: {first_cause(error)}") from None


def require_architecture(directory: str | Path, model: Model) -> None:
    """Refuse a checkpoint, of either format, whose `config.json` describes another architecture.

    Args:
        directory: of the checkpoint.
        model: the architecture that is configured.

    Raises:
        UserError: it names what differs; or there is no such file.
    """
    architecture = hf_checkpoint.read_config(directory)
    for name in vars(architecture):
        if name != "init_std" and getattr(architecture, name) != getattr(model, name):
            raise UserError(
                f"{directory} has {name} {getattr(architecture, name)}, the configured model.{name} is "
                f"{getattr(model, name)}"
            )


def _verify_before_load(directory: Path, state: dict[str, Any], ranks: RankGroup) -> None:
    """Verify a checkpoint before Megatron-Core's reader, which would run what a hostile file names, opens it.

    The ranks share the files and the tensors' archives.
    """
    manifest.verify_weights(directory, ranks.rank, ranks.num_ranks)
    with TorchDistReader(directory) as reader:
        for key in sorted(reader.tensors)[ranks.rank :: ranks.num_ranks]:
            for chunk in reader.tensors[key].chunks:
                reader.locate_record(reader.tensors[key], chunk)
        _require_tensors(reader, state)
    if ranks.rank == 0:
        safe_unpickle.verify_common_pt(directory / "common.pt")


def _require_tensors(reader: TorchDistReader, state: dict[str, Any]) -> None:
    """Raise unless the checkpoint has the model's tensors as tensors: an object in place of one would be unpickled."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    for entry in nested_values(state):
        if isinstance(
            entry, (ShardedTensor, ShardedTensorFactory)
        ):  # whose tensors have its key, or that and an ending
            for key in reader.objects:
                if key.startswith(entry.key):
                    raise UserError(f"{reader.path}: {key} is no tensor there: the checkpoint cannot be used")
        if isinstance(entry, ShardedTensor) and entry.key not in reader.tensors:
            raise UserError(f"{reader.path} has no {entry.key}: it is the checkpoint of another kind of model")


def reload_master_weights(model: MegatronModel) -> None:
    """Set the optimizer's master weights to the model's, after the model was filled."""
    if model.optimizer is not None:
        model.optimizer.reload_model_params()


def checkpoint_format(directory: str | Path) -> str:
    """Return `megatron` or `hf`, the format of a checkpoint directory.

    Raises:
        UserError: neither.
    """
    directory = Path(directory)
    if (directory / "metadata.json").is_file():
        return "megatron"
    if (directory / hf_checkpoint.INDEX).is_file() or (directory / "model.safetensors").is_file():
        return "hf"
    raise UserError(f"{directory} holds neither a Megatron torch_dist nor a Hugging Face safetensors checkpoint")
