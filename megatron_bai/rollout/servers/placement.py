"""Which machine, and which of its GPUs, each server of a run has: `plan` shows what `train` starts."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from megatron_bai.config import Rollout
from megatron_bai.distributed.hosts import is_loopback
from megatron_bai.distributed.rank_group import current_ranks
from megatron_bai.errors import UserError


@dataclass(frozen=True)
class Machine:
    """A machine of a run.

    Attributes:
        num_ranks: processes of the training there; on GPUs, they have those from 0 on.
        num_gpus: that these processes see; None: it computes on its CPU, which has room for any number of servers.
    """

    num_ranks: int
    num_gpus: int | None = None


@dataclass(frozen=True)
class ServerPlacement:
    """Where one server is.

    Attributes:
        machine: index of its machine; 0 is that of rank 0.
        base_gpu_id: index of its first GPU there; on a CPU 0.
        with_trainer: whether ranks of the training have the same GPUs.
    """

    machine: int
    base_gpu_id: int = 0
    with_trainer: bool = False


def place_servers(rollout: Rollout, machines: Sequence[Machine]) -> list[ServerPlacement]:
    """Place `rollout.servers` servers of `rollout.tensor` GPUs each, in the order of machines and of their GPUs.

    A machine takes as many as its GPUs have room for from `rollout.base_gpu_id` on, `rollout.servers_per_machine` at
    most. A server has either no GPU of the training, or none beside them.

    Args:
        rollout: settings of the servers.
        machines: of the run, in the order of their ranks.

    Returns:
        A placement for each server.

    Raises:
        UserError: they do not fit, or contradict the training's GPUs, or how they are reached; names the settings.
    """
    placements: list[ServerPlacement] = []
    for index, machine in enumerate(machines):
        count = min(_count_room(rollout, machine), rollout.servers - len(placements))
        for i in range(count):
            first = rollout.base_gpu_id + i * rollout.tensor if machine.num_gpus is not None else 0
            shared = machine.num_gpus is not None and first < machine.num_ranks
            placements.append(ServerPlacement(index, first, shared))
            if shared and first + rollout.tensor > machine.num_ranks:
                raise UserError(
                    f"rollout.base_gpu_id={rollout.base_gpu_id} and rollout.tensor={rollout.tensor} give a server GPUs "
                    f"{_format_gpus(first, rollout.tensor)} of a machine, of which training has 0 to "
                    f"{machine.num_ranks - 1}: let it have none of those, or no others"
                )
    _require_room(rollout, machines, len(placements))
    _require_reachable(rollout, placements)
    return placements


def _count_room(rollout: Rollout, machine: Machine) -> int:
    """Count the servers that a machine has room for."""
    most = rollout.servers_per_machine or rollout.servers
    if machine.num_gpus is None:
        return most
    return min(max(machine.num_gpus - rollout.base_gpu_id, 0) // rollout.tensor, most)


def _require_room(rollout: Rollout, machines: Sequence[Machine], num_placed: int) -> None:
    """Raise a UserError unless all servers have been placed."""
    if num_placed == rollout.servers:
        return
    largest = max(machine.num_gpus or 0 for machine in machines)
    first = f" from rollout.base_gpu_id={rollout.base_gpu_id} on" if rollout.base_gpu_id else ""
    if machines[0].num_gpus is not None and largest - rollout.base_gpu_id < rollout.tensor:
        raise UserError(
            f"rollout.tensor ({rollout.tensor}) is more than the GPUs of a machine{first} "
            f"({max(largest - rollout.base_gpu_id, 0)}), where a run's own servers are"
        )
    limit = f", rollout.servers_per_machine={rollout.servers_per_machine}" if rollout.servers_per_machine else ""
    holders = "one machine has" if len(machines) == 1 else f"{len(machines)} machines have"
    size = "" if machines[0].num_gpus is None else f" of {rollout.tensor} GPUs each"
    raise UserError(f"rollout.servers is {rollout.servers}: {holders} room for {num_placed}{size}{first}{limit}")


def _require_reachable(rollout: Rollout, placements: Sequence[ServerPlacement]) -> None:
    """Refuse ways to servers that do not lead to where they are."""
    if rollout.sync == "group" and any(placement.with_trainer for placement in placements):
        raise UserError(
            "rollout.sync=group needs servers on GPUs of their own (rollout.base_gpu_id, or rollout.urls): NCCL takes "
            "no two ranks on one GPU"
        )
    if not any(placement.machine for placement in placements):
        return
    if rollout.host != "0.0.0.0":
        raise UserError(
            f"rollout.host={rollout.host} is an address of one machine, and servers are on several: set "
            "rollout.host=0.0.0.0 and rollout.api_key_file"
        )
    if rollout.sync == "group" and is_loopback(rollout.sync_host):
        raise UserError(
            f"rollout.sync_host={rollout.sync_host} is reached from rank 0's machine alone, and servers are on others: "
            "name an address of rank 0's machine"
        )


def describe_placements(placements: Sequence[ServerPlacement], rollout: Rollout, machines: Sequence[Machine]) -> str:
    """Describe in a line where servers are, such as `2 × 4 GPUs: machine 0: 0-3, 4-7 (beside the trainer)`.

    Args:
        placements: by machine.
        rollout: its settings.
        machines: of the run.
    """
    size = f"{len(placements)} × {rollout.tensor} {'GPU' if rollout.tensor == 1 else 'GPUs'}"
    if machines[0].num_gpus is None:
        size = f"{len(placements)}, on CPUs"
    parts = []
    for machine, group in groupby(placements, key=lambda placement: placement.machine):
        servers = list(group)
        if machines[machine].num_gpus is None:
            parts.append(f"machine {machine}: {len(servers)}")
            continue
        gpus = ", ".join(_format_gpus(server.base_gpu_id, rollout.tensor) for server in servers)
        beside = " (beside the trainer)" if any(server.with_trainer for server in servers) else ""
        parts.append(f"machine {machine}: {gpus}{beside}")
    return f"{size}: {'; '.join(parts)}"


def _format_gpus(first: int, count: int) -> str:
    return str(first) if count == 1 else f"{first}-{first + count - 1}"


@dataclass(frozen=True)
class OwnMachine:
    """The machines of a run as one rank sees them.

    Attributes:
        machines: of the run, in the order of their first ranks.
        index: of this rank's.
        is_leader: whether this rank is the first of its machine, which starts the servers there.
    """

    machines: list[Machine]
    index: int
    is_leader: bool


def find_machines(kind: str) -> OwnMachine:
    """Find the machines of the run. *Collective*. Those of ranks that torchrun did not start count as one.

    Args:
        kind: of the device, `cpu` or `cuda`.
    """
    group = current_ranks()
    own = (int(os.environ.get("GROUP_RANK", 0)), torch.cuda.device_count() if kind == "cuda" else None)
    found = group.run_on_all(lambda: own)
    names = list(dict.fromkeys(name for name, _ in found))
    ranks = [[rank for rank, (each, _) in enumerate(found) if each == name] for name in names]
    machines = [Machine(len(members), found[members[0]][1]) for members in ranks]
    index = names.index(own[0])
    return OwnMachine(machines, index, group.rank == ranks[index][0])
