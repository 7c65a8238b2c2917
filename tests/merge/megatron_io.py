"""Started by torchrun: Megatron-Core itself saves the sources, and reads what the merge made of them.

Argument: a directory. Saves `checkpoints.model(SEED)` as `0`, `1` and `2`, every rank holding its part along the first
axis that divides evenly or along the last, merges them into `together`, and loads that in both layouts.
"""

import sys
from pathlib import Path

import checkpoints
import torch
import torch.distributed as dist

from megatron_bai.cli import merge as merge_verb
from megatron_bai.config import Backend, Config, Merge
from megatron_bai.distributed import backend


def sharded(tensors: dict[str, torch.Tensor], which: str) -> dict:
    from megatron.core.dist_checkpointing import ShardedTensor

    rank, size = dist.get_rank(), dist.get_world_size()
    state = {}
    for key, tensor in tensors.items():
        axes = [i for i, n in enumerate(tensor.shape) if n % size == 0]
        if axes:
            axis = axes[0 if which == "first" else -1]
            part = tensor.chunk(size, axis)[rank].clone()
            state[key] = ShardedTensor.from_rank_offsets(key, part, (axis, rank, size))
        else:
            state[key] = ShardedTensor.from_rank_offsets(key, tensor.clone(), replica_id=rank)
    return state


def save(path: Path, seed: int, which: str) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedObject

    rank, size = dist.get_rank(), dist.get_world_size()
    state = sharded(checkpoints.model(seed), which)
    state["extra"] = ShardedObject("decoder.layers.mlp._extra_state", f"{seed}-{rank}", (size,), (rank,))
    if rank == 0:
        path.mkdir()
    dist.barrier()
    dist_checkpointing.save({"model": state, "iteration": seed}, str(path))


def check(path: Path, expected: dict[str, torch.Tensor], which: str) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedObject

    rank, size = dist.get_rank(), dist.get_world_size()
    state = sharded({key: torch.zeros_like(value) for key, value in expected.items()}, which)
    state["extra"] = ShardedObject("decoder.layers.mlp._extra_state", None, (size,), (rank,))
    loaded = dist_checkpointing.load({"model": state}, str(path), strict="raise_all")
    assert loaded["iteration"] == 0 and loaded["model"]["extra"] == f"0-{rank}"
    for key, piece in sharded(expected, which).items():
        assert torch.equal(loaded["model"][key], piece.data), key


def main() -> None:
    directory = Path(sys.argv[1])
    backend.init_backend(Backend(kind="cpu"))
    for seed, which in enumerate(("first", "last", "first")):
        save(directory / str(seed), seed, which)
    merge_verb.run(Config(merge=settings(directory, "together")))
    for which in ("first", "last"):
        check(directory / "together", checkpoints.read(directory / "together"), which)
    backend.shutdown_backend()


def settings(directory: Path, output: str) -> Merge:
    return Merge(
        pretrained=str(directory / "0"),
        members=[str(directory / "1"), str(directory / "2")],
        weights=[0.5, 0.5],
        alpha=0.5,
        output=str(directory / output),
        verify="all",
    )


if __name__ == "__main__":  # Megatron-Core's save spawns a process that imports this file
    main()
