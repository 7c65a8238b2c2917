"""The order of a parameter's rows in Megatron-Core, and as it is published."""

from collections.abc import Sequence

import torch

from megatron_bai.model.families.architecture import Architecture

Tensors = Sequence[torch.Tensor]


def merge_qkv(tensors: Tensors, model: Architecture) -> torch.Tensor:
    """Merge q, k and v to Megatron's order of rows: those of each group's queries, key and value.

    Args:
        tensors: q `[heads·d, …]`, k and v `[groups·d, …]`: weights or biases.
        model: the architecture.

    Returns:
        `[groups·(heads/groups + 2)·d, …]`.
    """
    rest = tensors[0].shape[1:]
    blocks = [t.reshape(model.num_query_groups, -1, *rest) for t in tensors]
    return torch.cat(blocks, dim=1).reshape(-1, *rest)


def split_qkv(tensor: torch.Tensor, model: Architecture) -> Tensors:
    """Split what `merge_qkv` merged.

    Args:
        tensor: `[groups·(heads/groups + 2)·d, …]`.
        model: the architecture.

    Returns:
        q `[heads·d, …]`, k and v `[groups·d, …]`.
    """
    d, groups, rest = model.head_dim, model.num_query_groups, tensor.shape[1:]
    sizes = [model.num_attention_heads // groups * d, d, d]
    blocks = tensor.reshape(groups, sum(sizes), *rest).split(sizes, dim=1)
    return [block.reshape(-1, *rest) for block in blocks]


def merge_halves(tensors: Tensors, model: Architecture) -> torch.Tensor:
    """Merge gate and up projection.

    Args:
        tensors: `[I, H]` each.
        model: not used.

    Returns:
        `[2·I, H]`.
    """
    return torch.cat(list(tensors))


def split_halves(tensor: torch.Tensor, model: Architecture) -> Tensors:
    """Split what `merge_halves` merged.

    Args:
        tensor: `[2·I, H]`.
        model: not used.
    """
    return tensor.chunk(2)
