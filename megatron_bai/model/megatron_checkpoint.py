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
    """Megatron's sharded state dict of the weights."""
    return {f"model{i}": module.sharded_state_dict() for i, module in enumerate(model.modules)}


def save(model: MegatronModel, target: str | Path, tokenizer: str | Path, info: dict[str, Any]) -> None:
    """Write the actor's weights. Collective; the directory must be one that all ranks see.

    Args:
        tokenizer: directory to copy the tokenizer's files from.
        info: kept in the manifest.

    Raises:
        UserError: the directory cannot be written, or another process writes it; the target is as it was.
    """
    CheckpointSave(sharded_state(model), Path(target), metadata_writer(model, tokenizer), info).finalize()


def metadata_writer(model: MegatronModel, tokenizer: str | Path) -> Callable[[Path], None]:
    """What adds the architecture and the tokenizer's files to a directory."""
    return lambda stage: hf_checkpoint.write_config(model.architecture, model.transformer_config.params_dtype, tokenizer, stage)


def load(model: MegatronModel, directory: str | Path) -> dict[str, Any]:
    """Fill the actor from a complete checkpoint, whatever layout wrote it. Collective.

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


def load_sharded(model: MegatronModel, state: dict[str, Any], directory: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a sharded state dict asks for, from a complete checkpoint of the actor's architecture. Collective.

    Returns:
        The `info` it was saved with, and the state, which also may lie in the tensors that `state` had.

    Raises:
        UserError: as `load`.
    """
    directory, group = Path(directory), current_ranks()
    info = manifest.require_info(directory)
    if not (directory / "metadata.json").is_file():
        raise UserError(f"{directory} is not a Megatron torch_dist checkpoint: `megatron-bai convert` makes one")
    require_architecture(directory, model.architecture)
    group.run_on_all(lambda: _verify_before_load(directory, state, group))
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

    Raises:
        UserError: it names what differs; or there is no such file.
    """
    found = hf_checkpoint.read_config(directory)
    for name in vars(found):
        if name != "init_std" and getattr(found, name) != getattr(model, name):
            raise UserError(
                f"{directory} has {name} {getattr(found, name)}, the configured model.{name} is {getattr(model, name)}"
            )


def _verify_before_load(directory: Path, state: dict[str, Any], group: RankGroup) -> None:
    """Before Megatron-Core's reader, which would run what a hostile file names: all is what was written, and harmless.

    The ranks share the files and the tensors' archives.
    """
    manifest.verify_weights(directory, group.rank, group.num_ranks)
    with TorchDistReader(directory) as source:
        for key in sorted(source.tensors)[group.rank :: group.num_ranks]:
            for chunk in source.tensors[key].chunks:
                source.locate_record(source.tensors[key], chunk)
        _require_tensors(source, state)
    if group.rank == 0:
        safe_unpickle.verify_common_pt(directory / "common.pt")


def _require_tensors(source: TorchDistReader, state: dict[str, Any]) -> None:
    """All that the model has, as tensors: an object in their place would be unpickled, and could run anything."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    for item in nested_values(state):
        if isinstance(item, (ShardedTensor, ShardedTensorFactory)):  # whose tensors have its key, or that and an ending
            for key in source.objects:
                if key.startswith(item.key):
                    raise UserError(f"{source.path}: {key} is no tensor there: the checkpoint cannot be used")
        if isinstance(item, ShardedTensor) and item.key not in source.tensors:
            raise UserError(f"{source.path} has no {item.key}: it is the checkpoint of another kind of model")


def reload_master_weights(model: MegatronModel) -> None:
    """Make the optimizer's master weights those of the model, after the model was filled."""
    if model.optimizer is not None:
        model.optimizer.reload_model_params()


def checkpoint_format(directory: str | Path) -> str:
    """`megatron` or `hf`: the format of a checkpoint directory.

    Raises:
        UserError: neither.
    """
    directory = Path(directory)
    if (directory / "metadata.json").is_file():
        return "megatron"
    if (directory / hf_checkpoint.INDEX).is_file() or (directory / "model.safetensors").is_file():
        return "hf"
    raise UserError(f"{directory} holds neither a Megatron torch_dist nor a Hugging Face safetensors checkpoint")
