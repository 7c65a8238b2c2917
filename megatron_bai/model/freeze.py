"""Parts of a model that training leaves as they are (`trainer.freeze`)."""

import torch

from megatron_bai.config import Trainer
from megatron_bai.errors import UserError
from megatron_bai.model.families.architecture import Architecture

_PARTS = {"router": ".router.", "shared_experts": ".shared_experts."}  # setting → what is in its parameters' names


def validate_freeze(trainer: Trainer, architecture: Architecture) -> None:
    """Refuse to freeze what the model lacks, or what another setting moves.

    Args:
        trainer: `freeze` and `expert_bias_update_rate` are read.
        architecture: of the model.

    Raises:
        UserError: names the settings.
    """
    for part in trainer.freeze:
        if not any(_PARTS[part] in key for key in architecture.mappings):
            raise UserError(f"trainer.freeze names {part}, and the model has none: leave it out")
    if "router" in trainer.freeze and trainer.expert_bias_update_rate:
        raise UserError(
            f"trainer.freeze=[router] with trainer.expert_bias_update_rate={trainer.expert_bias_update_rate:g} would "
            "freeze a router whose bias moves: leave one of the two out"
        )


def freeze_parts(module: torch.nn.Module, parts: list[str]) -> None:
    """Exclude parts of a model from training, before Megatron wraps it.

    Their parameters get no gradient, so they have no place in the gradient's buffer and its norm, nor in the optimizer:
    no weight decay, no moments, no master weights. What lies before them still gets its gradient through them.

    Args:
        module: a GPTModel.
        parts: `trainer.freeze`.
    """
    for name, parameter in module.named_parameters():
        if any(_PARTS[part] in name for part in parts):
            parameter.requires_grad_(False)
