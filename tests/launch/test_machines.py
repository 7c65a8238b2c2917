"""What a process knows of the machines of its run, on a node whose own name means loopback."""

import json
import os
import sys

import pytest
from netnodes import Node
from processes import TESTS

from megatron_bai import config
from megatron_bai.distributed import hosts
from megatron_bai.errors import UserError
from megatron_bai.rl.validate_settings import validate_settings


@pytest.fixture(scope="module")
def found(nodes: tuple[Node, Node], tmp_path_factory: pytest.TempPathFactory) -> dict:
    directory = tmp_path_factory.mktemp("machines")
    nodes[1].run(sys.executable, TESTS / "launch" / "machines_worker.py", directory)
    return json.loads((directory / "found.json").read_text())


@pytest.mark.distributed
@pytest.mark.long
def test_its_address_is_the_one_it_reaches_the_others_by(found: dict) -> None:
    assert (found["alone"], found["address"], found["name"]) == ("127.0.0.1", "10.77.0.2", "10.77.0.2")
    assert found["interfaces"] == ["eth0", "=eth0"]  # NCCL takes a name without "=" for the beginning of one


@pytest.mark.distributed
@pytest.mark.long
def test_a_meeting_place_that_others_cannot_reach_is_refused(found: dict) -> None:
    assert found["own name"].startswith("error: node2 knows node2, where the run meets, as 127.0.1.1, which other")
    assert found["nowhere"].startswith("error: no way from node2 to 192.0.2.1, where the run meets")


@pytest.mark.distributed
@pytest.mark.long
def test_a_run_directory_that_is_not_shared_is_refused_on_all_ranks(found: dict) -> None:
    both, own = found["shared"]
    assert both is None and own.startswith("error: node2 does not see what rank 0 writes to run.dir=")
    assert found["own files"] == []


def test_a_named_interface_is_that_of_gloo_and_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a site names for one of them holds for the other, unless it names both; one machine needs neither."""
    monkeypatch.setattr(hosts, "host_address", lambda: pytest.fail("the interface is named"))
    for given, gloo, nccl in (
        ({"GLOO_SOCKET_IFNAME": "bond0,bond1"}, "bond0,bond1", "=bond0,bond1"),
        ({"GLOO_SOCKET_IFNAME": "bond0", "NCCL_SOCKET_IFNAME": "ib"}, "bond0", "ib"),
    ):
        monkeypatch.setattr(os, "environ", {"GROUP_WORLD_SIZE": "2"} | given)
        hosts.set_network_interface()
        assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == (gloo, nccl)
    monkeypatch.setattr(os, "environ", {})
    hosts.set_network_interface()
    assert os.environ == {}


def test_a_server_on_loopback_is_refused_on_several_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config.Config(model=config.Model(1, 8, 2, 2, 4, 4, 2, 8, 16, max_position_embeddings=256))
    validate_settings(settings)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="rollout.host=127.0.0.1 is reached from the server's machine alone"):
        validate_settings(settings)
    settings.rollout.host = "0.0.0.0"
    with pytest.raises(UserError, match="rollout.host=0.0.0.0 is reached from other machines: name a file"):
        validate_settings(settings)
    settings.rollout.api_key_file = "key"
    validate_settings(settings)
