"""Whether a checkpoint has a model's tensors, found out from its index and headers before anything is built."""

import re
from pathlib import Path

from megatron_bai.checkpoint import formats
from megatron_bai.checkpoint.iterations import resolve_iteration
from megatron_bai.checkpoint.reader import CheckpointReader
from megatron_bai.checkpoint.torch_dist import TorchDistReader
from megatron_bai.checkpoint.weight_checks import is_state
from megatron_bai.errors import UserError
from megatron_bai.model.families.architecture import Architecture
from megatron_bai.model.families.param_mapping import EMBEDDING, OUTPUT_LAYER
from megatron_bai.model.hf_mapping import megatron_shapes
from megatron_bai.model.hf_reader import HFReader

_WEIGHT = re.compile(r"(weight|bias|softmax_offset)\d*$")
# Beginnings of keys of what may lie beside a model: a run's critic, and layers for multi-token prediction.
_CRITIC, _PREDICTION = "critic.", "mtp."


def require_tensors(directory: str | Path, model: Architecture, critic: bool = False) -> None:
    """Refuse a checkpoint, of either format, that a model could not be filled from; no weight is read.

    So whether the output layer that a tied model stores a second time is its embedding is left to the import.

    Args:
        directory: of the checkpoint.
        model: the architecture.
        critic: whether it is to be a critic's, which are in Megatron's format.

    Raises:
        UserError: names the first tensor that is missing, that a model of this architecture has not, or that has
            another shape.
    """
    directory = resolve_iteration(directory)
    if formats.checkpoint_format(directory) == "megatron":
        with TorchDistReader(directory) as reader:
            require_megatron_tensors(reader, model, critic)
    elif critic:
        raise UserError(f"{directory} is no torch_dist checkpoint: a critic's is what objective.critic_save names")
    else:
        HFReader(directory).require_tensors_of(model, compare_tied=False)


def require_megatron_tensors(reader: CheckpointReader, model: Architecture, critic: bool = False) -> None:
    """Refuse a checkpoint in Megatron's format that a model could not be filled from, as `require_tensors` does.

    Megatron-Core itself leaves out without an error what the model has not, and pads a vocabulary with too few rows.

    Args:
        reader: of the checkpoint.
        model: the architecture.
        critic: whether it is to be a critic's.

    Raises:
        UserError: likewise.
    """
    needed, kind = megatron_shapes(model, critic), "it is the checkpoint of another kind of model"
    missing = sorted(needed.keys() - reader.tensors.keys())
    if objects := [key for key in missing if any(other.startswith(key) for other in reader.objects)]:
        raise UserError(f"{reader.path}: {objects[0]} is no tensor there: the checkpoint cannot be used")
    if missing:
        raise UserError(f"{reader.path} has no {missing[0]}: {kind}")
    if unknown := sorted(key for key in reader.tensors.keys() - needed.keys() if _is_weight(key, model)):
        raise UserError(f"{reader.path} has {unknown[0]}, which no model of its config.json has: {kind}")
    for key, shape in needed.items():
        found = reader.tensors[key].shape
        if key in (EMBEDDING, OUTPUT_LAYER):  # which have rows of padding below those of the tokens
            found = (min(found[0], shape[0]), *found[1:]) if found else found
        if found != shape:
            raise UserError(f"{reader.path}: {key} has shape {reader.tensors[key].shape}, the model needs {shape}")


def _is_weight(key: str, model: Architecture) -> bool:
    """Return whether a model that has a tensor computes with it."""
    others = (_CRITIC, _PREDICTION) if model.values.get("num_nextn_predict_layers") else (_CRITIC,)
    return bool(_WEIGHT.search(key)) and not is_state(key) and not key.startswith(others)
