"""Collecting and evaluating do not depend on the number of replicas: same prompts, same samples, same numbers."""

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
from processes import TESTS, launch

from megatron_bai import config
from megatron_bai.data.arithmetic_task import ArithmeticTask
from megatron_bai.data.tokenizer import build_tokenizer
from megatron_bai.rl.experience.evaluation import confidence_interval
from megatron_bai.rollout.client import sampling_seed

pytestmark = pytest.mark.distributed
WORLDS = (1, 2, 4)
PROMPTS, SIZE, STEPS = 8, 4, 3
GO, LONGEST, LATER, FAILING = 3, 12, 6, (2, 4)
AHEAD = ("partial", "overlap", "both")


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
def test_lost_samples_are_counted_apart_and_in_no_statistic_of_samples(found: Any, replicas: int) -> None:
    """The rewards are those of the case before, in which the same samples have none."""
    lost = 0.0
    for step, plain in zip(steps(found[replicas], "lost"), steps(found[replicas], "plain")):
        values, others = step[0]["values"], plain[0]["values"]
        lost += values["rollout_failed_fraction"]
        assert values["rollout_failed_fraction"] == others["reward_failed_fraction"]
        assert values["reward_failed_fraction"] == others["rollout_failed_fraction"] == 0
        for name in ("reward_mean", "group_variance", "response_length_mean", "truncated_fraction"):
            assert values[name] == others[name], name
    assert lost > 0
    for rank in found[replicas]:
        values, others = rank["evaluated without"]["values"], rank["evaluated"]["values"]
        assert values == others and values["eval_failed"] > 0


@pytest.mark.parametrize("replicas", WORLDS)
def test_groups_that_lost_a_sample_are_asked_anew_where_they_are_dropped(found: Any, replicas: int) -> None:
    for step in steps(found[replicas], "whole"):
        groups = [group for rank in step for group in rank["groups"]]
        assert len(groups) == PROMPTS and all(counts(group) and group % 4 and group % 15 for group in groups)


@pytest.mark.parametrize("replicas", WORLDS)
def test_evaluation_is_the_mean_over_problems_with_its_interval(found: Any, replicas: int) -> None:
    cycle = {0: [1.0, 0.0], 3: [1, 0, 0], 6: [1, 0, 0], 9: [1, 0, 0]}  # of three samples those with a reward
    rewards = [cycle.get(n, [float(n % 2)] * 3) for n in range(10)]
    mean, half = confidence_interval(np.array([np.mean(each) for each in rewards]))
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


@cache
def stream() -> dict[str, int]:
    """Where a prompt is in it."""
    settings = config.Arithmetic(eval_prompts=10)
    prompts = ArithmeticTask(settings, build_tokenizer(settings, 64)).prompts("train", 0, 0, 100)
    return {prompt.text: number for number, prompt in enumerate(prompts)}


def numbers(step: dict[str, Any]) -> list[int]:
    """Of the prompts that a replica trained in a step."""
    assert [sample[0] for sample in step["samples"]] == list(np.repeat(range(len(step["samples"]) // SIZE), SIZE))
    return [stream()[sample[1]] for sample in step["samples"][::SIZE]]


def length_of(number: int, member: int) -> int:
    return 1 + sampling_seed("train/0", number, member) % LONGEST


def simulated(replicas: int, rank: int) -> list[tuple[list[int], list[int]]]:
    """By step, the groups that partial rollouts train and what each round asks for, from the lengths alone."""
    steps, pool, taken = [], {}, 0
    for _ in range(LATER):
        fresh = PROMPTS // replicas * (1 if taken else 2)
        for number in range(taken + rank * fresh, taken + (rank + 1) * fresh):
            pool[number] = [length_of(number, member) for member in range(SIZE)]
        taken += replicas * fresh
        rounds = []
        while not rounds or sum(max(left) == 0 for left in pool.values()) < PROMPTS // replicas:
            rounds.append(sum(each > 0 for left in pool.values() for each in left))
            pool = {number: [max(each - GO, 0) for each in left] for number, left in pool.items()}
        done = [number for number, left in pool.items() if max(left) == 0][: PROMPTS // replicas]
        pool = {number: left for number, left in pool.items() if number not in done}
        steps.append((done, rounds))
    return steps


@pytest.mark.parametrize("replicas", WORLDS)
def test_partial_rollouts_train_whole_groups_the_oldest_first(found: Any, replicas: int) -> None:
    for rank, of_rank in enumerate(found[replicas]):
        steps, expected = of_rank["partial"]["steps"], simulated(replicas, rank)
        assert [(numbers(step), step["rounds"]) for step in steps] == expected
        assert [step["taken"] for step in steps] == [(2 + n) * PROMPTS for n in range(LATER)]
        assert of_rank["partial"]["threads"] == ["MainThread"]
    trained = [n for step in range(LATER) for rank in found[replicas] for n in numbers(rank["partial"]["steps"][step])]
    held = [number for rank in found[replicas] for number in rank["partial"]["steps"][-1]["held"]]
    assert sorted(trained + held) == list(range((1 + LATER) * PROMPTS)), "none is lost and none trained twice"


@pytest.mark.parametrize("case", AHEAD)
def test_parts_of_a_sample_keep_what_they_were_sampled_with(case: str, found: Any) -> None:
    """Tokens as if sampled in one go; log-probabilities and routes of the version of each go."""
    several = 0
    for rank in found[2]:
        for number, step in enumerate(rank[case]["steps"]):
            groups = np.repeat(numbers(step), SIZE)
            for place, (_, _, response, finish, _, spans, logprobs, routes) in enumerate(step["samples"]):
                seed = sampling_seed("train/0", int(groups[place]), place % SIZE)
                assert response == [2 + (seed + place) % 50 for place in range(1 + seed % LONGEST)]
                assert finish == "stop" and [span[1] for span in spans] == [0, *(span[2] for span in spans[:-1])]
                versions = [int(version) for version, start, end in spans for _ in range(start, end)]
                assert logprobs == [-1.0 - version for version in versions] and len(versions) == len(response)
                assert routes[-len(response) :] == [version % 4 for version in versions]
                assert set(routes[: -len(response)]) <= {versions[0] % 4}
                assert versions == sorted(versions) and versions[-1] <= number - ("overlap" == case and number > 0)
                several += len(spans) > 1
    assert bool(several) == (case != "overlap")


@pytest.mark.parametrize("replicas", WORLDS)
def test_a_step_ahead_has_the_groups_of_a_step_one_version_older(found: Any, replicas: int) -> None:
    for number in range(LATER):
        ranks = [rank["overlap"]["steps"][number] for rank in found[replicas]]
        assert [n for rank in ranks for n in numbers(rank)] == list(range(number * PROMPTS, (number + 1) * PROMPTS))
        versions = {span[0] for rank in ranks for sample in rank["samples"] for span in sample[5]}
        assert versions == {str(max(number - 1, 0))}
        assert {len(rank["held"]) for rank in ranks} == {PROMPTS // replicas if number < LATER - 1 else 0}
    for rank in found[replicas]:
        assert rank["overlap"]["threads"] == ["rollout"]
        assert sum(len(step["rounds"]) for step in rank["overlap"]["steps"]) == LATER


@pytest.mark.parametrize("case", AHEAD)
@pytest.mark.parametrize("replicas", WORLDS)
def test_a_run_goes_on_with_the_samples_it_had(found: Any, replicas: int, case: str) -> None:
    for rank in found[replicas]:
        assert rank[case]["repeated"] == rank[case]["steps"][LATER // 2 :]


@pytest.mark.parametrize("replicas", WORLDS)
def test_what_failed_is_sampled_once_servers_are_back(found: Any, replicas: int) -> None:
    """In its own round where the step samples; after the next sync, with its weights, where it runs ahead."""
    for rank in found[replicas]:
        back, whole = ([step["samples"] for step in rank[case]["steps"]] for case in ("partial, back", "partial"))
        assert back == whole
        assert {thread for _, thread in rank["partial, back"]["recovered"]} == {"MainThread"}
        assert {version for version, _ in rank["partial, back"]["recovered"]} == set(FAILING)
        late = 0
        for number, (step, whole) in enumerate(zip(rank["overlap, back"]["steps"], rank["overlap"]["steps"])):
            for sample, other in zip(step["samples"], whole["samples"]):
                assert sample[:5] == other[:5], "the sample is the same"
                ((version, *_),) = sample[5]
                late += version != other[5][0][0]
                assert version == other[5][0][0] or (version == str(number) and number - 1 in FAILING)
        assert late > 0 and rank["overlap, back"]["recovered"] == [], "a sync had brought the servers back"


@pytest.mark.parametrize("case", ["partial", "overlap"])
@pytest.mark.parametrize("replicas", WORLDS)
def test_what_no_server_samples_is_lost_and_its_group_goes_on(found: Any, replicas: int, case: str) -> None:
    lost = 0
    for number in range(LATER):
        ranks = [rank[f"{case}, lost"]["steps"][number] for rank in found[replicas]]
        samples = [sample for rank in ranks for sample in rank["samples"]]
        gone = [sample for sample in samples if sample[3] == "lost"]
        assert len(samples) == PROMPTS * SIZE and all(each[2] == each[5] == [] and each[4] is None for each in gone)
        assert ranks[0]["values"]["rollout_failed_fraction"] == len(gone) / len(samples)
        lost += len(gone)
    assert lost > 0
    for rank in found[replicas]:
        recovered = rank[f"{case}, lost"]["recovered"]
        assert {thread for _, thread in recovered} == {"MainThread"}
        # Where it runs ahead only with the weights of the next sync, and not with those it began with.
        assert {version for version, _ in recovered} == {"partial": {2, 4}, "overlap": {3, 4}}[case]
        assert rank[f"{case}, lost"]["repeated"] == rank[f"{case}, lost"]["steps"][LATER // 2 :]


@pytest.mark.parametrize("replicas", WORLDS)
def test_another_number_of_replicas_shares_the_samples_anew(found: Any, replicas: int) -> None:
    before = [n for step in found[1][0]["both"]["steps"][: LATER // 2] for n in numbers(step)]
    after = [n for rank in found[replicas] for step in rank["moved"]["steps"] for n in numbers(step)]
    held = [number for rank in found[replicas] for number in rank["moved"]["steps"][-1]["held"]]
    last = found[replicas][0]["moved"]["steps"][-1]["taken"]
    assert sorted(before + after + held) == list(range(last)) and len(after) == LATER // 2 * PROMPTS
    if replicas == 1:
        assert found[1][0]["moved"]["steps"] == found[1][0]["both"]["repeated"]


@pytest.mark.parametrize("replicas", WORLDS)
def test_where_another_reward_is_paid_the_share_that_is_right_is_known_too(found: Any, replicas: int) -> None:
    for rank in found[replicas]:
        plain, other = (rank[case]["values"] for case in ("evaluated", "evaluated with another reward"))
        assert other["eval_exact"] == 0.5 and "eval_exact" not in plain  # the stream's odd prompts
        assert other["eval_accuracy"] == plain["eval_accuracy"]


@pytest.mark.parametrize("replicas", WORLDS)
def test_the_samples_that_are_kept_are_the_same(found: Any, replicas: int) -> None:
    """And what is written of them; they are on rank 0 alone, and a lost one is not among them."""
    assert [rank["recorded"] for rank in found[replicas][1:]] == [[[]] * STEPS] * (replicas - 1)
    steps = found[replicas][0]["recorded"]
    assert steps == found[1][0]["recorded"]
    task = ArithmeticTask(config.Arithmetic(eval_prompts=10), build_tokenizer(config.Arithmetic(), 64))
    for number, step in enumerate(steps):
        train, held_out = ([s for s in step if s["split"] == split] for split in ("train", "eval"))
        assert len(train) == len(held_out) == 8
        assert all(number * PROMPTS <= s["prompt_index"] < (number + 1) * PROMPTS for s in train)
        for sample in step:
            (prompt,) = task.prompts(sample["split"], 0, sample["prompt_index"], 1)
            assert sample["prompt"] == prompt.text and sample["finish"] == "stop"
        for sample in train:
            n = sample["prompt_index"] * SIZE + sample["member"]
            assert sample["logprobs_training"] == pytest.approx([-(n * 7 % 11) / 10] * sample["length"], abs=1e-6)
            assert sample["discrepancy"] == pytest.approx(n * 7 % 11 / 10, abs=1e-6)
            odd = [[t, 1] for t in range(len(sample["tokens"])) if (t + n) % 2]
            assert sample["routes_differ"] == odd
