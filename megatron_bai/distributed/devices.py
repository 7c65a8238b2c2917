"""The GPU of a rank among those that its process sees."""

from collections.abc import Mapping

from megatron_bai.errors import UserError


def device_index(num_visible: int, environment: Mapping[str, str]) -> int:
    """Return the index of this rank's GPU.

    torchrun shows all GPUs of a machine to each of its ranks, which take those of their LOCAL_RANK. Slurm may show each
    task its own GPU alone (`--gpus-per-task=1`): that has index 0 in every task.

    Args:
        num_visible: GPUs that this process sees, at least one.
        environment: of the process.

    Raises:
        UserError: ranks of one machine would share a GPU.
    """
    local_rank = int(environment.get("LOCAL_RANK", 0))
    if local_rank < num_visible:
        return local_rank
    started_by_torchrun = "TORCHELASTIC_RUN_ID" in environment  # then all ranks of a machine see the same GPUs
    if num_visible == 1 and not started_by_torchrun:
        return 0
    gpus, named = "GPU" if num_visible == 1 else "GPUs", environment.get("CUDA_VISIBLE_DEVICES", "")
    raise UserError(
        f"this is rank {local_rank} of its machine (LOCAL_RANK), counted from 0, and sees {num_visible} {gpus} "
        f"(CUDA_VISIBLE_DEVICES={named}): "
        "start no more processes on a machine than it has GPUs, or have Slurm give the one task of a node all of them "
        "(--gres=gpu:N)"
    )
