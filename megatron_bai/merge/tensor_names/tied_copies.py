"""Sources that are tied and store their output layer nevertheless, a copy of the embedding."""

import torch

from megatron_bai.checkpoint.boxes import split_box
from megatron_bai.checkpoint.reader import CheckpointReader
from megatron_bai.checkpoint.tensor_index import TensorInfo
from megatron_bai.checkpoint.weight_checks import EMBEDDING, OUTPUT
from megatron_bai.errors import UserError
from megatron_bai.merge.tensor_names.vocabulary import is_vocab_tensor, read_vocab_info

_TILE = 1 << 22  # elements that are compared at a time


def find_tied_copies(source: CheckpointReader, tensors: dict[str, TensorInfo]) -> set[str]:
    """Return the output layer of a tied source that stores it, which is merged as the embedding that it is.

    Args:
        source: opened.
        tensors: of the model, by key.

    Returns:
        No key where the source stores no output layer or is not tied.

    Raises:
        UserError: the source calls itself tied, and the two have different values.
    """
    outputs = [key for key in tensors if OUTPUT.search(key) and key.endswith("weight") and is_vocab_tensor(key)]
    embedding = next((key for key in tensors if EMBEDDING.search(key) and is_vocab_tensor(key)), None)
    if not outputs or embedding is None or read_vocab_info(source.path).tied is not True:
        return set()
    for key in outputs:
        if not _are_equal(source, tensors[key], tensors[embedding]):
            raise UserError(
                f"{source.path} is tied (tie_word_embeddings is true, or is so by default), and its {key} is not its"
                f" {embedding}: remove the one that is not used, or say tie_word_embeddings=false if both are"
            )
    return set(outputs)


def _are_equal(source: CheckpointReader, one: TensorInfo, other: TensorInfo) -> bool:
    """Return whether two tensors have the same values."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    for box in split_box((0,) * len(one.shape), one.shape, _TILE):
        values = source.read(one.key, *box).clone()  # the next read reuses its memory
        if not torch.equal(values, source.read(other.key, *box)):
            return False
    return True
