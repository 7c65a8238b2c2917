"""Where servers are: every GPU has one server at most, within its machine, in order; or the settings are named."""

from itertools import product
from typing import Any

import pytest

from megatron_bai.config import Rollout
from megatron_bai.errors import UserError
from megatron_bai.rollout.servers.placement import Machine, ServerPlacement, describe_placements, place_servers

OUTSIDE = {"host": "0.0.0.0", "api_key_file": "key"}
BUSY, HALF = Machine(8, 8), Machine(4, 8)  # all GPUs train, or half of them do


def place(machines: list[Machine], **settings: Any) -> list[ServerPlacement]:
    return place_servers(Rollout(**(OUTSIDE | settings)), machines)


def test_servers_fill_one_machine_after_another() -> None:
    assert place([BUSY, BUSY], servers=3, tensor=4) == [
        ServerPlacement(0, 0, True),
        ServerPlacement(0, 4, True),
        ServerPlacement(1, 0, True),
    ]
    assert place([BUSY, BUSY], servers=2, tensor=4, servers_per_machine=1) == [
        ServerPlacement(0, 0, True),
        ServerPlacement(1, 0, True),
    ]
    assert place([HALF, HALF], servers=4, tensor=2, base_gpu_id=4, sync="group", sync_host="10.0.0.1") == [
        ServerPlacement(0, 4),
        ServerPlacement(0, 6),
        ServerPlacement(1, 4),
        ServerPlacement(1, 6),
    ]
    assert place([HALF], servers=2, tensor=4) == [ServerPlacement(0, 0, True), ServerPlacement(0, 4)]
    assert place([HALF, Machine(8, 12)], tensor=4, base_gpu_id=8) == [ServerPlacement(1, 8)]


def test_a_cpu_has_room_for_all() -> None:
    cpus = [Machine(2), Machine(2)]
    assert place_servers(Rollout(servers=3, tensor=2), cpus) == [ServerPlacement(0)] * 3
    assert place(cpus, servers=2, servers_per_machine=1) == [ServerPlacement(0), ServerPlacement(1)]
    assert describe_placements(place(cpus, servers=3, servers_per_machine=2), Rollout(), cpus) == (
        "3, on CPUs: machine 0: 2; machine 1: 1"
    )


def test_no_gpu_has_two_servers_or_is_outside_its_machine() -> None:
    """Over all small clusters and settings: what is placed is right, and what is not placed does not fit."""
    placed = refused = 0
    for ranks, gpus, count, servers, tensor, base, most in product(
        (1, 2, 4), (4, 8), (1, 2), (1, 2, 3), (1, 2, 4), (0, 2, 4), (0, 1)
    ):
        machines = [Machine(ranks, gpus)] * count
        room = min((gpus - base) // tensor, most or servers)
        try:
            found = place(machines, servers=servers, tensor=tensor, base_gpu_id=base, servers_per_machine=most)
        except UserError as error:
            refused += 1
            straddles = any(base + i * tensor < ranks < base + (i + 1) * tensor for i in range(room))
            assert room * count < servers or straddles, error
            continue
        placed += 1
        used = [(each.machine, each.base_gpu_id + i) for each in found for i in range(tensor)]
        assert len(set(used)) == servers * tensor and used == sorted(used)
        assert all(base <= gpu < gpus and machine < count for machine, gpu in used)
        for each in found:
            shared = {each.base_gpu_id + i < ranks for i in range(tensor)}
            assert shared == {each.with_trainer}
    assert placed > 100 and refused > 100


@pytest.mark.parametrize(
    ("machines", "settings", "named"),
    [
        ([BUSY], {"tensor": 16}, r"rollout.tensor \(16\) is more than the GPUs of a machine \(8\)"),
        ([BUSY], {"tensor": 4, "base_gpu_id": 6}, r"a machine from rollout.base_gpu_id=6 on \(2\)"),
        ([BUSY], {"base_gpu_id": 9}, r"from rollout.base_gpu_id=9 on \(0\)"),
        ([BUSY, BUSY], {"tensor": 4, "servers": 5}, "rollout.servers is 5: 2 machines have room for 4 of 4 GPUs each"),
        ([BUSY], {"tensor": 2, "servers": 2, "servers_per_machine": 1}, "one machine has .*, rollout.servers_per_m"),
        ([Machine(1)], {"servers": 2, "servers_per_machine": 1}, "is 2: one machine has room for 1, rollout.servers_p"),
        ([HALF], {"tensor": 4, "base_gpu_id": 2}, "give a server GPUs 2-5 of a machine, of which training has 0 to 3"),
        ([HALF], {"tensor": 4, "sync": "group"}, "rollout.sync=group needs servers on GPUs of their own"),
        ([Machine(1)] * 2, {"servers": 2, "servers_per_machine": 1, "sync": "group"}, "rollout.sync_host=127.0.0.1 is"),
        ([BUSY, BUSY], {"servers": 2, "tensor": 8, "host": "10.0.0.1"}, "rollout.host=10.0.0.1 is an address of one"),
    ],
)
def test_what_does_not_fit_is_named(machines: list[Machine], settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        place(machines, **settings)
