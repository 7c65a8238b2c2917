"""Every parameter of a live model has a name in checkpoints and a kind in the family's table, or it is not built.

Else a layer of another release of Megatron-Core or Transformer Engine with one more parameter, or one under another
name, would be found out when the first checkpoint is written, or never, where a parameter is in no checkpoint.
"""

import torch

from megatron_bai.config import Model
from megatron_bai.errors import UserError
from megatron_bai.model.architecture import architecture_of
from megatron_bai.model.hf_mapping import mapping_of
from megatron_bai.model.param_shards import local_shards


def require_known_parameters(module: torch.nn.Module, model: Model) -> None:
    """Refuse a chunk of a model with a parameter that could not be saved or exported.

    Args:
        module: a GPTModel, not wrapped.
        model: the architecture.

    Raises:
        UserError: a parameter that no checkpoint would hold, one whose key is not in the family's table, or one of
            another shape than the table's.
    """
    architecture = architecture_of(model)
    shards = local_shards([module])
    for shard in shards:
        shape = mapping_of(shard.key, architecture).shape(architecture)
        if shard.shape != tuple(shape):
            raise UserError(
                f"Megatron tensor {shard.key!r} has the shape {shard.shape}, and {tuple(shape)} in"
                f" model/families/{architecture.family.name}.py"
            )
    saved = {shard.data.untyped_storage().data_ptr() for shard in shards}
    for name, parameter in module.named_parameters():
        if parameter.untyped_storage().data_ptr() not in saved:
            raise UserError(
                f"parameter {name!r} is in no checkpoint that Megatron-Core writes of this model: it cannot be trained"
            )
