"""Detectors on series that collapse and series that do not, and their state."""

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from megatron_bai import config
from megatron_bai.errors import UserError
from megatron_bai.monitor.detectors.alarm import Alarm
from megatron_bai.monitor.detectors.metric_track import MetricTrack
from megatron_bai.monitor.detectors.run_monitor import DETECTORS, Monitor, validate

Record = dict[str, Any]


def watched(records: Iterable[Record], **settings: Any) -> list[Alarm]:
    monitor = Monitor(config.Monitor(**settings))
    return [alarm for record in records for alarm in monitor.step(record)]


def series(metric: str, values: Iterable[float], **others: Any) -> list[Record]:
    return [{"step": step, metric: float(value), **others} for step, value in enumerate(values, start=1)]


def noisy(values: np.ndarray, spread: float = 0.05, seed: int = 0) -> np.ndarray:
    return values * np.exp(np.random.default_rng(seed).normal(0, spread, len(values)))


STEPS = np.arange(1, 401)
# The paper's collapse (arXiv 2509.00309): steps and tokens.
LENGTH = np.interp(STEPS, [50, 80, 100, 200], [933, 600, 285, 239])


def test_the_length_collapse_of_the_paper_is_seen_while_it_happens() -> None:
    alarm, *later = watched(series("response_length_mean", noisy(LENGTH)))
    assert (alarm.detector, alarm.metric, alarm.action) == ("length_collapse", "response_length_mean", "warn")
    assert 60 <= alarm.step <= 90 and alarm.since <= alarm.step - 5 and alarm.deviations >= 5
    assert alarm.facts["baseline"] == pytest.approx(933, rel=0.15)
    assert alarm.facts["level"] <= 0.7 * alarm.facts["baseline"]
    assert "2509.00309" in alarm.advice and f"(step {alarm.since})" in alarm.evidence
    assert not [each for each in later if each.step > 210], "a level that stays where it fell is no new fall"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("trend", [0.9, 1.0, 1.6])
def test_a_series_that_does_not_collapse_raises_none(trend: float, seed: int) -> None:
    line = np.linspace(1, trend, len(STEPS))
    record = {
        "response_length_mean": noisy(933 * line, 0.1, seed), "entropy": noisy(0.3 * line, 0.1, seed),
        "kl_k3": noisy(3.4e-3 * line, 0.2, seed), "f_2": noisy(2e-3 * line, 0.2, seed),
        "route_mismatch": noisy(0.1 * line, 0.1, seed), "experts_effective": noisy(100 * line, 0.05, seed),
        "reward_by_length/100": np.random.default_rng(seed).binomial(100, 0.4 * np.maximum(line, 1), 400) / 100,
    }  # fmt: skip
    records = [
        {"step": i + 1, "responses_by_length/100": 100} | {name: float(v[i]) for name, v in record.items()}
        for i in range(len(STEPS))
    ]
    assert watched(records) == []


@pytest.mark.parametrize(
    ("metric", "before", "after", "detector"),
    [
        ("response_length_mean", 900, 400, "length_collapse"),
        ("entropy", 0.31, 0.1, "entropy_collapse"),
        ("kl_k3", 3.4e-3, 2.1e-2, "discrepancy_divergence"),
        ("f_2", 1e-3, 0.1, "discrepancy_divergence"),
        ("route_mismatch", 0.1, 0.3, "router_drift"),
        ("experts_effective", 100, 50, "router_drift"),
    ],
)
def test_each_detector_sees_its_metric_leave_the_baseline_and_no_other(
    metric: str, before: float, after: float, detector: str
) -> None:
    values = np.exp(np.interp(STEPS, [100, 150], np.log([before, after])))
    found = watched(series(metric, noisy(values)))
    assert {(alarm.detector, alarm.metric) for alarm in found} == {(detector, metric)}
    assert 100 < found[0].step <= 150
    assert watched(series(metric, noisy(values[::-1]))) == []  # the other way is none


def test_a_rise_from_next_to_nothing_is_none() -> None:
    tiny = np.exp(np.interp(STEPS, [100, 150], np.log([1e-9, 3e-5])))
    assert watched(series("kl_k3", noisy(tiny))) == [] == watched(series("f_2", noisy(tiny)))


def test_a_few_tokens_of_a_small_step_are_counting_noise() -> None:
    """F(2) of benchmarks/reproduce's run minirl/n1, seed 1: one to three of 600 tokens, four steps of five in a row."""
    values = [0, 0, 0, 0, 0, 0.0041, *[0.0] * 10, 0.0024, 0.002, 0.0012, 0, 0.0022, *[0.0] * 20]
    assert watched(series("f_2", values, response_tokens=600)) == []
    (alarm,) = watched(series("f_2", values, response_tokens=600_000))
    assert alarm.evidence == "f_2 rose, from 0 (step 3) to 0.0012"


def test_single_outliers_and_gaps_change_nothing() -> None:
    values = noisy(np.full(400, 900.0))
    values[37::40] = 90
    records = series("response_length_mean", values)
    records[50]["response_length_mean"], records[51]["response_length_mean"] = float("nan"), None
    del records[52]["response_length_mean"]
    assert watched(records) == []


def test_a_fall_is_told_again_only_after_a_recovery_or_once_it_is_the_baseline() -> None:
    down_up_down = np.interp(STEPS, [60, 80, 120, 140, 200, 220], [900, 400, 400, 900, 900, 400])
    steps = [alarm.step for alarm in watched(series("response_length_mean", noisy(down_up_down, 0.03)))]
    assert len(steps) == 2 and 60 < steps[0] <= 85 and 200 < steps[1] <= 225
    stairs = np.select([STEPS < 100, STEPS < 300], [900, 400], 150)
    steps = [alarm.step for alarm in watched(series("response_length_mean", noisy(stairs, 0.03)))]
    assert len(steps) == 2 and 100 <= steps[0] < 106 and 300 <= steps[1] < 306


def evaluated(steps: list[int], accuracy: list[float], best: list[float], every: int = 5) -> list[Record]:
    """Entropy falls to a third between steps 100 and 135; evaluations have the accuracy and the pass@n of the lines."""
    records = series("entropy", noisy(np.interp(STEPS[:200], [100, 135], [0.31, 0.1])))
    for record in records[every - 1 :: every]:
        score, best_score = np.interp(record["step"], steps, accuracy), np.interp(record["step"], steps, best)
        record |= {"eval_accuracy": score, "eval_accuracy_low": score - 0.08, "eval_accuracy_high": score + 0.08}
        record["eval_best"] = best_score
    return records


def test_entropy_that_falls_while_the_run_learns_is_no_collapse() -> None:
    assert watched(evaluated([100, 135], [0.2, 0.6], [0.5, 0.8])) == []
    assert watched(evaluated([100, 135], [0.5, 0.9], [1.0, 1.0])) == []  # pass@n can rise no more


@pytest.mark.parametrize(
    ("accuracy", "best"),
    [
        ([0.4, 0.6, 0.2, 0.1], [0.6, 0.8, 0.4, 0.3]),  # it learned before, and forgets
        ([0.4, 0.4, 0.4, 0.4], [0.6, 0.6, 0.6, 0.6]),
        ([0.4, 0.4, 0.45, 0.45], [0.6, 0.6, 0.7, 0.7]),  # within the interval
        ([0.4, 0.4, 0.6, 0.7], [0.8, 0.8, 0.8, 0.75]),  # surer of what it could do already
        ([0.4, 0.4, 0.8, 0.5], [0.5, 0.5, 0.8, 0.6]),  # most of what it learned meanwhile is gone
    ],
    ids=["falls", "stays", "rises too little", "pass@n stays", "rises and falls"],
)
def test_entropy_that_falls_without_learning_is_a_collapse(accuracy: list[float], best: list[float]) -> None:
    records = evaluated([1, 100, 135, 150], accuracy, best)
    (alarm,) = watched(records)
    without = watched([{"step": record["step"], "entropy": record["entropy"]} for record in records])
    assert alarm.detector == "entropy_collapse"
    assert [alarm] == without or accuracy[2] == 0.8 and alarm.step > without[0].step, "an evaluation delays no alarm"


def test_without_an_interval_or_a_later_evaluation_nothing_says_that_the_run_learns() -> None:
    learning = evaluated([100, 135], [0.2, 0.6], [0.5, 0.8])
    (plain,) = watched([{"step": record["step"], "entropy": record["entropy"]} for record in learning])
    assert watched([record for record in evaluated([100, 135], [0.2, 0.6], [0.5, 0.8], every=110)]) == [plain]
    for record in learning:
        record.pop("eval_accuracy_low", None)
    assert watched(learning) == [plain]


def stick(low: int, at: list[int], reward: list[float], steps: int, seed: int = 0, count: int = 200) -> list[Record]:
    """Rewards of answers that are right or wrong."""
    clean = np.interp(np.arange(1, steps + 1), at, reward)
    drawn = np.random.default_rng(seed).binomial(count, clean) / count
    return series(f"reward_by_length/{low}", drawn, **{f"responses_by_length/{low}": count})


def test_the_hockey_stick_of_the_paper_is_told_with_depth_trough_and_recovery() -> None:
    records = stick(1800, [1, 250, 700], [0.68, 0.2, 0.6], 900)  # arXiv 2509.00309, bucket 1800 to 1900
    drop, recovery = watched(records)
    assert drop.detector == recovery.detector == "reward_hockey_stick"
    assert drop.metric == recovery.metric == "reward_by_length/1800"
    assert 30 < drop.step < 150 and drop.facts["depth"] >= 0.1 and "dropped" in drop.evidence
    # 80 % of .48 above .2 is .584, at step 682 of the line.
    assert recovery.facts["depth"] == pytest.approx(0.48, abs=0.08)
    assert recovery.facts["trough_step"] == pytest.approx(250, abs=25)
    assert recovery.facts["recovery_step"] == pytest.approx(682, abs=70)
    assert "trough" in recovery.evidence and "2509.00309" in recovery.advice


def test_buckets_are_watched_apart() -> None:
    falling, steady = stick(100, [1, 100, 200], [0.8, 0.2, 0.8], 250), stick(200, [1], [0.5], 250)
    found = watched([one | other for one, other in zip(falling, steady)], bucket=50)
    assert [alarm.metric for alarm in found] == ["reward_by_length/100"] * 2
    assert "100 to 149 tokens" in found[0].evidence


def test_few_responses_are_pooled_until_they_say_something() -> None:
    """One answer a step, right or wrong, would fall from 1 to 0 all the time."""
    assert watched(stick(100, [1], [0.7], 2000, count=1)) == []
    found = watched(stick(100, [1, 2000], [0.95, 0.05], 2000, count=4))
    assert [alarm.step for alarm in found] != [] and found[0].facts["depth"] > 0.1


def everything(steps: int = 300) -> list[Record]:
    random = np.random.default_rng(1)
    records = stick(100, [1, 60, 200], [0.8, 0.3, 0.8], steps, seed=3, count=30)
    for i, record in enumerate(records):
        record |= {"response_length_mean": float(LENGTH[i] * random.lognormal(0, 0.05)), "entropy": 0.3}
        record["kl_k3"] = float(1e-3 * (1 + max(0, i - 120) / 10))
        record["entropy"] *= 0.1 if i >= 75 else 1  # no alarm before the accuracy is back, at step 200
        score = 0.7 if 75 <= i < 199 else 0.2
        if i % 5 == 0:
            record |= {f"eval_accuracy{end}": score + width for end, width in (("", 0), ("_low", -0.1), ("_high", 0.1))}
            record["eval_best"] = score + 0.2
    return records


@pytest.mark.parametrize("cut", [1, 7, 70, 80, 150])
def test_a_restored_monitor_goes_on_as_if_never_stopped(cut: int) -> None:
    records = everything()
    whole, first, second = (Monitor(config.Monitor()) for _ in range(3))
    told = [[alarm.json() for alarm in whole.step(record)] for record in records]
    assert sum(map(bool, told)) >= 4
    before = [[alarm.json() for alarm in first.step(record)] for record in records[:cut]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    after = [[alarm.json() for alarm in second.step(record)] for record in records[cut:]]
    assert before + after == told
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), float("-inf"), None])
def test_a_metric_that_is_no_number_for_a_step_is_as_if_it_were_missing(garbage: float | None) -> None:
    """Of every detector: one overflow must not end the watch."""
    records, missing = everything(), everything()
    for step in (20, 90, 91):
        for name in set(records[step]) - {"step", "responses_by_length/100"}:
            records[step][name] = garbage
            del missing[step][name]
    found = watched(records)
    assert {alarm.detector for alarm in found} >= {"reward_hockey_stick", "length_collapse", "discrepancy_divergence"}
    assert found == watched(missing)


def test_the_noise_is_that_of_the_series_whatever_its_trend() -> None:
    """The standard error of a difference of two medians of n normal values is σ √(π/2) √(2/n)."""
    random = np.random.default_rng(0)
    wanted = 0.3 * np.sqrt(np.pi / 2) * np.sqrt(2 / 9)
    for slope in (0.0, 0.05):
        found = []
        for _ in range(30):
            track = MetricTrack(window=9, horizon=100)
            for step in range(150):
                track.add(step, slope * step + random.normal(0, 0.3))
            found.append(track.standard_error(floor=0.0))
        assert np.median(found) == pytest.approx(wanted, rel=0.2)


def test_actions_are_those_of_the_settings_and_the_most_drastic_comes_first() -> None:
    actions = {"length_collapse": "stop", "entropy_collapse": "checkpoint"}
    fall = np.interp(STEPS, [100, 101], [1.0, 0.2])
    whole = {"entropy": 1, "response_length_mean": 900, "experts_effective": 90}
    records = [{"step": int(s)} | {name: of * v for name, of in whole.items()} for s, v in zip(STEPS, fall)]
    found = watched(records, actions=actions)
    assert [(a.detector, a.action) for a in found] == [
        ("length_collapse", "stop"), ("entropy_collapse", "checkpoint"), ("router_drift", "warn"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"bucket": 0}, "monitor.bucket is 0"),
        ({"smooth": 200}, "monitor.horizon is 100"),
        ({"length_fall": 1.0}, "monitor.length_fall is 1"),
        ({"entropy_fall": 0.0}, "monitor.entropy_fall"),
        ({"discrepancy_rise": 1.0}, "monitor.discrepancy_rise"),
        ({"reward_recovery": 0.0}, "monitor.reward_recovery"),
        ({"deviations": 0.0}, "monitor.deviations"),
        ({"actions": {"lenght_collapse": "stop"}}, "'lenght_collapse': choose length_collapse"),
        ({"actions": {"length_collapse": "halt"}}, "monitor.actions.length_collapse is 'halt'"),
    ],
    ids=str,
)
def test_settings_that_no_detector_can_use_are_refused(settings: Record, named: str) -> None:
    with pytest.raises(UserError) as error:
        validate(config.Monitor(**settings))
    assert named in str(error.value)


def test_the_defaults_are_valid_and_every_detector_has_a_name() -> None:
    validate(config.Monitor(actions=dict.fromkeys(DETECTORS, "stop")))
