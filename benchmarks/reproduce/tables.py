"""The cells of the tables (`document`): of a variant's runs the mean over seeds with a 95 % interval.

The interval is Student's over seeds (`rl.experience.evaluation.confidence_interval`): none for one seed, wide for two.
"""

from collections.abc import Callable
from statistics import fmean, median

import numpy as np

from megatron_bai.monitor.report.run_data import RunData
from megatron_bai.rl.experience.evaluation import confidence_interval

Runs = list[RunData]
Cell = Callable[[Runs], str]
_SHARE = 0.1  # of a run's steps is its start, and its end
_COLLAPSED = 0.6  # of the best reward


def mean(value: Callable[[RunData], float | None]) -> Cell:
    """Mean over seeds ± half the interval; of runs that have the value."""

    def cell(runs: Runs) -> str:
        found = [v for v in map(value, runs) if v is not None]
        if not found:
            return "–"
        middle, half = confidence_interval(np.array(found))
        return number(middle) + (f" ± {number(half)}" if half is not None else "")

    return cell


def number(value: float) -> str:
    """Two decimals, or three figures where they would say less; small numbers with a power of ten."""
    if value == 0:
        return "0"
    if abs(value) >= 1:
        return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
    if abs(value) >= 0.01:
        return f"{value:.3f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def path(*cells: Cell) -> Cell:
    """Several on the way of a run."""
    return lambda runs: " → ".join(cell(runs) for cell in cells)


def known(run: RunData, key: str) -> list[float]:
    return [value for value in run.series(key)[1] if value is not None]


def first(key: str, share: float = _SHARE) -> Callable[[RunData], float | None]:
    """The mean over the first steps that have the metric."""

    def value(run: RunData) -> float | None:
        found = known(run, key)
        return fmean(found[: max(1, round(share * len(found)))]) if found else None

    return value


def last(key: str, share: float = _SHARE) -> Callable[[RunData], float | None]:
    """The mean over the last steps that have the metric."""

    def value(run: RunData) -> float | None:
        found = known(run, key)
        return fmean(found[-max(1, round(share * len(found))) :]) if found else None

    return value


def whole(key: str) -> Callable[[RunData], float | None]:
    return first(key, 1.0)


def best(key: str) -> Callable[[RunData], float | None]:
    return lambda run: max(known(run, key), default=None)


def alarms(*detectors: str) -> Cell:
    """Each detector's first alarm of a run: the median step over the runs that had one, and how many had."""

    def cell(runs: Runs) -> str:
        words = []
        for name in detectors:
            steps = [min(own) for run in runs if (own := [a.step for a in run.alarms() if a.detector == name])]
            if steps:
                words.append(f"{name.replace('_', ' ')} at {median(steps):g} ({len(steps)} of {len(runs)})")
        return "; ".join(words) or "none"

    return cell


def length_collapse(runs: Runs) -> str:
    """What the detector says at its first alarm of a run: medians over the runs that had one."""
    found = [own[0] for run in runs if (own := [a for a in run.alarms() if a.detector == "length_collapse"])]
    if not found:
        return "none"
    depth = median(1 - alarm.facts["level"] / alarm.facts["baseline"] for alarm in found)
    begin, end = median(alarm.since for alarm in found), median(alarm.step for alarm in found)
    return f"by {depth:.0%} from {begin:g} to {end:g} ({len(found)} of {len(runs)})"


def collapse(runs: Runs) -> str:
    """The step at which the reward, the mean over a quarter of the run, was below 60 % of its best so far.

    The median over the runs in which it was. A quarter has equal numbers of responses, however many updates a step has.
    """
    found = [step for run in runs if (step := _collapsed(known(run, "reward_mean"))) is not None]
    return f"at {median(found):g} ({len(found)} of {len(runs)})" if found else "none"


def _collapsed(rewards: list[float]) -> int | None:
    quarter = max(1, len(rewards) // 4)
    levels = [fmean(rewards[end - quarter : end]) for end in range(quarter, len(rewards) + 1)]
    return next((quarter + i for i, level in enumerate(levels) if level < _COLLAPSED * max(levels[: i + 1])), None)


def sticks(runs: Runs) -> str:
    """The deepest hockey stick that recovered in a run, else its deepest drop: medians over the runs that had one."""
    found = [[a.facts for a in run.alarms() if a.detector == "reward_hockey_stick"] for run in runs]
    deepest = [max(own, key=lambda f: ("recovery_step" in f, f["depth"])) for own in found if own]
    if not deepest:
        return "none"
    words = f"depth {median(f['depth'] for f in deepest):.2f}"
    whole_ones = [f for f in deepest if "recovery_step" in f]
    if whole_ones:
        trough, recovery = (median(f[key] for f in whole_ones) for key in ("trough_step", "recovery_step"))
        words += f", trough at {trough:g}, recovered at {recovery:g}"
    else:
        words += ", not recovered"
    return f"{words} ({len(deepest)} of {len(runs)})"


def buckets(runs: Runs) -> str:
    """Mean reward of the responses of each length bucket, in the first and the last quarter of the steps."""
    words = []
    for low in sorted({int(key.split("/")[1]) for run in runs for key in run.numbered_metrics("reward_by_length")}):
        parts = [(_pooled(runs, low, 0, 0.25)), _pooled(runs, low, 0.75, 1)]
        if any(parts):
            words.append(f"{low}+: " + " → ".join("–" if part is None else f"{part:.2f}" for part in parts))
    return "; ".join(words)


def _pooled(runs: Runs, low: int, begin: float, end: float) -> float | None:
    """Over responses of all runs; None for fewer than 32."""
    total = count = 0.0
    for run in runs:
        for record in run.records[round(begin * len(run.records)) : round(end * len(run.records))]:
            own = record.get(f"responses_by_length/{low}", 0)
            total += own * (record.get(f"reward_by_length/{low}") or 0.0)
            count += own
    return total / count if count >= 32 else None


def routes_kept(runs: Runs) -> str:
    """The share of each source's routes that a merge keeps, sources in the recipe's order, before RL begins."""
    keys = {key for run in runs for key in run.numbered_metrics("merge_routes_kept")}
    return " / ".join(mean(first(key))(runs) for key in sorted(keys)) or "–"


def _start_and_end(key: str) -> Cell:
    return path(mean(first(key)), mean(last(key)))


TABLES = {
    "bai": {
        "sources' routes kept": routes_kept,
        "length, tokens": _start_and_end("response_length_mean"),
        "right, held out": path(mean(first("eval_exact", 0)), mean(last("eval_exact", 0))),
        "reward": _start_and_end("reward_mean"),
        "length collapse": length_collapse,
        "hockey stick": sticks,
        "other alarms": alarms("entropy_collapse"),
        "reward by length": buckets,
    },
    "minirl": {
        "held out: start → best → end": path(
            mean(first("eval_accuracy", 0)), mean(best("eval_accuracy")), mean(last("eval_accuracy", 0))
        ),
        "reward": path(mean(first("reward_mean")), mean(last("reward_mean"))),
        "reward collapses": collapse,
        "KL (k1)": _start_and_end("kl_k1"),
        "KL (k3)": _start_and_end("kl_k3"),
        "entropy": _start_and_end("entropy"),
        "alarms": alarms("discrepancy_divergence", "entropy_collapse", "router_drift", "length_collapse"),
    },
    "discrepancy": {
        "KL (k3): live → R3": path(mean(whole("kl_k3_live")), mean(whole("kl_k3"))),
        "F(2): live → R3": path(mean(whole("f_2_live")), mean(whole("f_2"))),
        "F(1.5): live → R3": path(mean(whole("f_1.5_live")), mean(whole("f_1.5"))),
        "routes that differ": mean(whole("route_mismatch")),
        "tokens with one": mean(whole("tokens_route_mismatch")),
    },
}
_WAYS = ("_live", "", "_weights")  # routers choose; R3; R3 with the server's weights of the experts
TABLES["gap"] = TABLES["discrepancy"] | {
    "mean abs(log r): live → R3 → weights": path(*(mean(whole(f"logprob_gap{way}")) for way in _WAYS)),
    "KL (k3), weights": mean(whole("kl_k3_weights")),
    "F(2), weights": mean(whole("f_2_weights")),
}
TABLES["gap_rl"] = TABLES["minirl"] | {
    "routes that differ": _start_and_end("route_mismatch"),
    "gradient norm": _start_and_end("grad_norm"),
}
