"""A model of a few tensors, split over a grid of ranks as Megatron splits one, for tests of gathering."""

import itertools
from dataclasses import dataclass

import torch

from megatron_bai.model.gather_plan import ShardInfo
from megatron_bai.model.param_shards import Shard

LAYERS, EXPERTS = 4, 8
# By key: shape, the axis that tensor ranks split, dtype
DENSE = {
    "embedding": ((24, 6), 0, torch.bfloat16),
    "layers.proj": ((6, 8), 1, torch.bfloat16),  # split across its rows
    "layers.norm": ((7,), None, torch.bfloat16),
    "layers.router": ((EXPERTS, 6), None, torch.float32),
    "layers.bias": ((5,), None, torch.float32),  # float32 among bfloat16
}
EXPERT = ((3, 6), torch.bfloat16)


@dataclass(frozen=True)
class Grid:
    """A layout: tensor ranks are neighbours, then come data ranks, over which experts are spread, then stages."""

    tensor: int = 1
    data: int = 1
    pipeline: int = 1

    @property
    def world(self) -> int:
        return self.tensor * self.data * self.pipeline


def make_model(seed: int = 0) -> dict[tuple[str, tuple[int, ...]], torch.Tensor]:
    """Return every slice by its key and index."""
    torch.manual_seed(seed)
    model = {}
    for key, (shape, _, dtype) in DENSE.items():
        for index in [(layer,) for layer in range(LAYERS)] if key.startswith("layers") else [()]:
            model[key, index] = torch.randn(shape).to(dtype)
    for index in itertools.product(range(LAYERS), range(EXPERTS)):
        model["layers.experts", index] = torch.randn(EXPERT[0]).to(EXPERT[1])
    return model


def shards_of(grid: Grid, rank: int, model: dict[tuple[str, tuple[int, ...]], torch.Tensor]) -> list[Shard]:
    """Return the shards that a rank holds and saves."""
    tp_rank, dp_rank = rank % grid.tensor, rank // grid.tensor % grid.data
    stage, in_stage = rank // (grid.tensor * grid.data), rank % (grid.tensor * grid.data)
    shards = []
    for (key, index), whole in model.items():
        if (index[0] if index else 0) * grid.pipeline // LAYERS != stage:
            continue
        if key == "layers.experts":
            if index[1] * grid.tensor * grid.data // EXPERTS == in_stage:
                shards.append(Shard(key, whole, index, (0, 0), tuple(whole.shape), True))
            continue
        axis = DENSE[key][1]
        if dp_rank or (axis is None and tp_rank):
            continue  # a replica
        data, offset = whole, [0] * whole.dim()
        if axis is not None:
            size = whole.shape[axis] // grid.tensor
            offset[axis] = tp_rank * size
            data = whole.narrow(axis, tp_rank * size, size)
        shards.append(Shard(key, data, index, tuple(offset), tuple(whole.shape), True))
    return shards


def infos_of(grid: Grid, model: dict[tuple[str, tuple[int, ...]], torch.Tensor]) -> list[list[ShardInfo]]:
    """Return what every rank tells the others."""
    from megatron_bai.model.gather import describe

    return [describe(shards_of(grid, rank, model)) for rank in range(grid.world)]
