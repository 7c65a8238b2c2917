"""Save and load Megatron `torch_dist` checkpoints, readable in any parallel layout.

A directory holds Megatron's own files, `config.json` (the architecture, as Hugging Face writes it), the tokenizer,
and the manifest that marks it complete.
"""

from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_bai.errors import UserError
from megatron_bai.model import hf, manifest, unpickle
from megatron_bai.model.build import Actor


def _sharded(actor: Actor) -> dict[str, Any]:
    return {f"model{i}": module.sharded_state_dict() for i, module in enumerate(actor.modules)}


def save(actor: Actor, target: str | Path, tokenizer: str | Path, info: dict[str, Any]) -> None:
    """Write the actor's weights. Collective.

    Args:
        tokenizer: directory to copy the tokenizer's files from.
        info: kept in the manifest.
    """
    from megatron.core import dist_checkpointing

    target = Path(target)
    lead = dist.get_rank() == 0
    if lead:
        stage = manifest.staging(target)
    dist.barrier()
    stage = target.with_name(f".{target.name}.unfinished")
    dist_checkpointing.save(_sharded(actor), str(stage))
    dist.barrier()
    if lead:
        dtype = actor.transformer_config.params_dtype
        hf.write_config(actor.settings, dtype, tokenizer, stage)
        manifest.seal(stage, target, info)
    dist.barrier()


def load(actor: Actor, directory: str | Path) -> dict[str, Any]:
    """Fill the actor from a complete checkpoint, whatever layout wrote it. Collective.

    Returns:
        The `info` it was saved with.

    Raises:
        UserError: no complete checkpoint there, or one of another architecture.
    """
    info = manifest.require(directory)
    if not (Path(directory) / "metadata.json").is_file():
        raise UserError(f"{directory} is not a Megatron torch_dist checkpoint: `megatron-bai convert` makes one")
    found = hf.read_config(directory)
    for name in vars(found):
        if name != "init_std" and getattr(found, name) != getattr(actor.settings, name):
            raise UserError(
                f"{directory} has {name} {getattr(found, name)}, the configured model.{name} is "
                f"{getattr(actor.settings, name)}"
            )
    unpickle.read_metadata(Path(directory) / ".metadata")  # Megatron-Core's reader would run what a hostile one names
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException

    try:
        loaded = dist_checkpointing.load(_sharded(actor), str(directory))
    except CheckpointingException as error:
        raise UserError(f"Megatron cannot load {directory}: {error}") from None
    for i, module in enumerate(actor.modules):
        module.load_state_dict(loaded[f"model{i}"])
    finish_loading(actor)
    return info


def finish_loading(actor: Actor) -> None:
    """Make the optimizer's master weights those of the model, after the model was filled."""
    if actor.optimizer is not None:
        actor.optimizer.reload_model_params()


def kind_of(directory: str | Path) -> str:
    """`megatron` or `hf`: the format of a checkpoint directory.

    Raises:
        UserError: neither.
    """
    directory = Path(directory)
    if (directory / "metadata.json").is_file():
        return "megatron"
    if (directory / hf.INDEX).is_file() or (directory / "model.safetensors").is_file():
        return "hf"
    raise UserError(f"{directory} holds neither a Megatron torch_dist nor a Hugging Face safetensors checkpoint")
