"""Collecting and evaluating do not depend on the number of replicas: same prompts, same samples, same numbers."""

import json
from typing import Any

import numpy as np
import pytest
from processes import TESTS, launch

from megatron_bai.rl.evaluate import interval

pytestmark = pytest.mark.distributed
WORLDS = (1, 2, 4)
PROMPTS, STEPS = 8, 3


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each rank found, by the number of replicas."""
    directory = tmp_path_factory.mktemp("replicas")
    launch(TESTS / "rl" / "replicas_worker.py", directory)
    return {n: [json.loads((directory / f"{n}-{rank}.json").read_text()) for rank in range(n)] for n in WORLDS}


def steps(ranks: list[dict[str, Any]], case: str) -> list[list[dict[str, Any]]]:
    """By step, then rank."""
    return [[rank[case]["steps"][step] for rank in ranks] for step in range(STEPS)]


def counts(number: int) -> bool:
    """Whether a group has two different rewards (`replicas_worker.rewards_of`)."""
    return number % 3 == 0 and not (number % 5 == 0 and number % 4)


@pytest.mark.parametrize("replicas", WORLDS)
def test_a_step_takes_the_next_prompts_of_the_stream_with_the_same_seeds(found: Any, replicas: int) -> None:
    for number, (step, alone) in enumerate(zip(steps(found[replicas], "plain"), steps(found[1], "plain"))):
        asked = [each for rank in step for each in rank["asked"]]
        assert asked == alone[0]["asked"]
        assert [each[0] for each in asked] == list(range(number * PROMPTS, (number + 1) * PROMPTS))
        assert [rank["taken"] for rank in step] == [(number + 1) * PROMPTS] * replicas
        assert not {"refill_rounds", "prompts_tried"} & step[0]["values"].keys()
        assert step[0]["values"] == pytest.approx(alone[0]["values"])


@pytest.mark.parametrize("replicas", WORLDS)
def test_refill_goes_on_until_every_group_counts(found: Any, replicas: int) -> None:
    position = 0
    for step, alone in zip(steps(found[replicas], "refilled"), steps(found[1], "refilled")):
        groups = sorted(group for rank in step for group in rank["groups"])
        assert len(groups) == PROMPTS and all(map(counts, groups))
        end = step[0]["taken"]
        # No prompt is skipped, none is tried twice, and none that counts is thrown away: the first eight that do.
        assert sorted(each[0] for rank in step for each in rank["asked"]) == list(range(position, end))
        assert groups == [number for number in range(position, end) if counts(number)] == sorted(alone[0]["groups"])
        for rank in step:
            assert rank["taken"] == end == alone[0]["taken"] and len(rank["groups"]) == PROMPTS // replicas
            assert rank["values"]["prompts_tried"] == end - position > PROMPTS
            assert rank["values"]["refill_rounds"] == alone[0]["values"]["refill_rounds"] > 1
        position = end


@pytest.mark.parametrize("replicas", WORLDS)
def test_refill_ends_at_its_bound_with_groups_that_do_not_count(found: Any, replicas: int) -> None:
    for case, rounds in (("bounded", 1), ("uniform", 2)):
        for step in steps(found[replicas], case):
            groups = [group for rank in step for group in rank["groups"]]
            assert len(set(groups)) == PROMPTS and not (case == "bounded" and all(map(counts, groups)))
            assert {rank["values"]["refill_rounds"] for rank in step} == {rounds}
    tried = [step[0]["values"]["prompts_tried"] for step in steps(found[replicas], "uniform")]
    assert tried == [3 * PROMPTS] * STEPS


@pytest.mark.parametrize("replicas", WORLDS)
def test_failed_rewards_are_counted_and_only_all_of_them_stop_the_run(found: Any, replicas: int) -> None:
    for step in steps(found[replicas], "plain"):
        expected = {0: 2 / 4, 15: 3 / 4}
        numbers = [each[0] for rank in step for each in rank["asked"]]
        failed = sum(2 if n % 3 == 0 and n % 4 == 0 else 3 if n % 15 == 0 else 0 for n in numbers)
        assert step[0]["values"]["reward_failed_fraction"] == pytest.approx(failed / (4 * PROMPTS)), expected
    for rank in found[replicas]:
        assert rank["failed"]["error"] == "all 32 rewards of a step failed (reward=exact), first: broken"


@pytest.mark.parametrize("replicas", WORLDS)
def test_evaluation_is_the_mean_over_problems_with_its_interval(found: Any, replicas: int) -> None:
    cycle = {0: [1.0, 0.0], 3: [1, 0, 0], 6: [1, 0, 0], 9: [1, 0, 0]}  # of three samples those with a reward
    rewards = [cycle.get(n, [float(n % 2)] * 3) for n in range(10)]
    mean, half = interval(np.array([np.mean(each) for each in rewards]))
    for rank in found[replicas]:
        values = rank["evaluated"]["values"]
        assert values["eval_accuracy"] == pytest.approx(mean, abs=1e-12)
        assert values["eval_accuracy_low"] == pytest.approx(mean - half, abs=1e-12)
        assert values["eval_accuracy_high"] == pytest.approx(mean + half, abs=1e-12)
        assert values["eval_best"] == pytest.approx(np.mean([max(each) for each in rewards]), abs=1e-12)
        assert values["eval_failed"] == pytest.approx(1 / 30) and values["eval_truncated"] == 0
        assert values["eval_length"] == 2
    asked = [each for rank in found[replicas] for each in rank["evaluated"]["asked"]]
    assert asked == found[1][0]["evaluated"]["asked"] and [each[0] for each in asked] == list(range(10))
    assert {each[3] for each in asked} == {0.5}
