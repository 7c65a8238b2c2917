"""Samples that fail: servers come back and only what failed is asked again; what is lost keeps its place; two replicas
agree on all of it."""

import json
from typing import Any

import pytest
from processes import TESTS, launch

pytestmark = pytest.mark.distributed
SIZE = 4
PLACES = [[prompt, 2 + prompt] for prompt in range(3) for _ in range(SIZE)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By rank."""
    directory = tmp_path_factory.mktemp("recovery")
    launch(TESTS / "rl" / "recovery_worker.py", directory)
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(2)]


def test_nothing_is_asked_twice_where_nothing_fails(found: list[dict[str, Any]]) -> None:
    for rank, own in enumerate(found):
        assert own["whole"]["prompts"] == [[place, 10 * rank + first] for place, first in PLACES]
        assert own["whole"]["rewards"] == [1.0] * 12 and own["whole"]["lost"] == [""] * 12
    assert sorted(found[0]["whole"]["asked"]) == sorted([first for _, first in PLACES] + [10 + f for _, f in PLACES])


def test_samples_of_old_weights_are_asked_again_of_the_new_and_no_others(found: list[dict[str, Any]]) -> None:
    """Rank 1, whose samples all fail, has no server; rank 0 brings it back for both."""
    for rank, own in enumerate(found):
        assert own["stale"]["prompts"] == [[place, 10 * rank + first] for place, first in PLACES]
        assert own["stale"]["versions"] == ["7"] and own["stale"]["rewards"] == [1.0] * 12
    asked = found[0]["stale"]["asked"]
    assert 24 < len(asked) < 48 and len([first for first in asked if first < 10]) < 24


def test_no_rank_goes_on_when_a_server_failed_too_often(found: list[dict[str, Any]]) -> None:
    (error,) = {own["spent"]["error"] for own in found}
    assert "serves weights '0' and not '7': the server failed more than rollout.restarts=0 times" in error


def test_lost_samples_keep_their_place_and_have_no_reward(found: list[dict[str, Any]]) -> None:
    first, second = (own["lost"] for own in found)
    assert first["lost"] == [""] * 12 and first["rewards"] == [1.0] * 12
    assert second["prompts"] == [[place, 10 + first] for place, first in PLACES]
    assert second["rewards"] == [1.0] * 4 + [None] * 4 + [1.0] * 4
    assert all("failed 1 times at /generate: status 500: out of memory" in why for why in second["lost"][4:8])


def test_too_many_in_one_replica_stop_both(found: list[dict[str, Any]]) -> None:
    (error,) = {own["too many"]["error"] for own in found}
    assert "samples of a replica failed, more than rollout.max_failed_fraction=0.2 allows; first: SGLang at" in error
