"""What a training checkpoint holds, whatever release of Megatron-Core wrote it."""

import io
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from megatron_bai.checkpoint.common_state import COMMON, COMMON_OBJECT
from megatron_bai.checkpoint.torch_dist import TorchDistReader


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Everything that is a tensor: weights, moments, master weights, generators."""
    state: dict[str, Any] = {}
    _load_state_dict(state, FileSystemReader(checkpoint), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


def common_state(checkpoint: Path) -> dict[str, Any]:
    """What is not sharded, such as an optimizer's settings, from either layout."""
    with TorchDistReader(checkpoint) as reader:
        if COMMON_OBJECT in reader.objects:
            (state,) = torch.load(io.BytesIO(reader.read_object(COMMON_OBJECT)))
            return state
    return torch.load(checkpoint / COMMON)


def same(one: Path, other: Path) -> bool:
    """Whether two checkpoints have the same bits."""
    ours, theirs = tensors(one), tensors(other)
    moments = [f"optimizer.state.{name}." for name in ("param", "exp_avg", "exp_avg_sq")]
    kinds = ("embedding.", "rng_state.", *moments)
    assert all(any(key.startswith(kind) for key in ours) for kind in kinds) and ours.keys() == theirs.keys()
    return all(torch.equal(ours[key], theirs[key]) for key in ours) and common_state(one) == common_state(other)
