"""Servers on several machines: the first rank of each starts and restarts its own, all ranks know them or the error."""

import json
from typing import Any

import pytest
from processes import TESTS, launch

pytestmark = pytest.mark.distributed
FIRST, SECOND = ["server.log", "server-1.log"], ["server-2.log"]  # of rank 0, of rank 2, which leads the other machine
ENDED = ["launch v0", "wait", "stop"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By rank."""
    directory = tmp_path_factory.mktemp("machines")
    launch(TESTS / "rollout" / "machine_servers_worker.py", directory)
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(3)]


def servers(found: list[dict[str, Any]], case: str) -> list[list[str]]:
    return [[name for name, _, _ in rank[case]["servers"]] for rank in found]


def test_each_machine_starts_its_own_and_all_ranks_know_all(found: list[dict[str, Any]]) -> None:
    assert servers(found, "whole") == [FIRST, [], SECOND]
    urls = found[0]["whole"]["urls"]
    assert len(set(urls)) == 3 and all(rank["whole"]["urls"] == urls for rank in found)
    assert all(rank["whole"]["sizes"] == [1, 1, 1] for rank in found)
    assert [rank["whole"]["supervises"] for rank in found] == [urls, None, urls[2:]]


def test_one_that_ends_is_restarted_by_its_machine_and_no_other_is(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert (rank["whole"]["nothing"], rank["whole"]["lost"]) == (False, True)
    assert [done for _, _, done in found[0]["whole"]["servers"]] == [ENDED, ENDED]
    (lost,) = found[2]["whole"]["servers"]
    assert lost[2] == ["launch v0", "wait", "kill", "launch v1", "wait", "stop"]


def test_gpus_are_those_of_each_machine(found: list[dict[str, Any]]) -> None:
    """Of four, of which the servers' begin at the third."""
    assert [[gpu for _, gpu, _ in rank["gpus"]["servers"]] for rank in found] == [[2, 3], [], [2]]


def test_an_error_on_one_machine_is_one_on_all_and_stops_the_servers_of_all(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["broken"]["error"] == "server-2.log does not start"
        assert "the server failed more than rollout.restarts=0 times" in rank["spent"]["error"]
        assert all(done[-1] == "stop" for case in ("broken", "spent") for _, _, done in rank[case]["servers"])
    assert servers(found, "broken") == [FIRST, [], SECOND]
