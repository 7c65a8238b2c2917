"""Four ranks gather what they hold bit for bit, and send it; a rank or a server that fails makes no other wait."""

from pathlib import Path
from typing import Any

import pytest
import torch
from model.gather_grid import make_model
from processes import TESTS, launch
from weight_receiver import digests

pytestmark = pytest.mark.distributed
MODEL = make_model()
SENT = {f"{key}{index}": tensor for (key, index), tensor in MODEL.items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory: Path = tmp_path_factory.mktemp("gather")
    launch(TESTS / "model" / "gather_worker.py", directory)
    result: dict[str, Any] = torch.load(directory / "found.pt", weights_only=False)
    return result


def test_every_slice_arrives_once_bit_for_bit_by_the_messages_that_are_planned(found: dict[str, Any]) -> None:
    cases = {name: each for name, each in found.items() if "bytes" in name}
    assert len(cases) == 16
    for name, case in cases.items():
        assert sorted(case["slices"]) == sorted(MODEL) and all(case["right"]), name
        assert case["sent"] == case["planned"], name
    assert not any(cases["ep4, 1048576 bytes, 4"]["sent"]), "whole experts and replicas stay where they are"
    assert [len(sent) for sent in cases["ep4, 1048576 bytes, 1"]["sent"]] == [0, 1, 1, 1]


def test_servers_get_every_tensor_once_from_the_ranks_that_have_it(found: dict[str, Any]) -> None:
    case = found["synced"]
    assert case["errors"] == [""] * 4
    everything, changed = case["received"]
    for requests, wanted in ((everything, SENT), (changed, {n: t for n, t in SENT.items() if "router" not in n})):
        for rank in range(2):
            received = [each for ranks in requests for each in ranks[rank]]
            assert sorted(received) == sorted(digests(wanted.items()))
        assert len(requests) > 8


def test_a_server_that_refuses_a_bucket_ends_the_sync_on_every_rank(found: dict[str, Any]) -> None:
    errors = found["refused"]["errors"]
    assert len(set(errors)) == 1 and "refused /update_weights_from_distributed with 400: out of memory" in errors[0]


def test_a_rank_that_fails_ends_the_others_wait_for_servers(found: dict[str, Any]) -> None:
    """The server still waits for the bucket that will not come."""
    assert found["failed"]["waited"] is True
    assert all("no memory on rank 2" in error for error in found["failed"]["errors"])


def test_a_collector_that_fails_lets_the_others_finish(found: dict[str, Any]) -> None:
    assert found["stopped"] == ["the disk is full"] * 4
