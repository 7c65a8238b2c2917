"""How often the detectors are wrong, and how late they are right: published curves with noise of several kinds.

    python benchmarks/detectors.py [--draws 200] [--runs RUN …] [--out docs/monitoring.md]

A curve is the points of `data/curves.json`, which names its sources, joined by straight lines. Noise multiplies the
value (a reward is added to it, as the mean of `RESPONSES` answers that are right or wrong): independent from step to
step, or with a correlation of 0.5 between neighbours, or independent with one value in fifty three times off. On a
curve that does not collapse every alarm is false. On one that does, an alarm before its onset is false; the delay is
counted from the onset to the first alarm after it. A curve with `evaluations` has held-out scores, too: every so many
steps, of as many samples to as many prompts. The tables replace what lies between the marks in the document.
"""

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from megatron_bai import config
from megatron_bai.monitor.detectors.alarm import Alarm
from megatron_bai.monitor.detectors.run_monitor import Monitor
from megatron_bai.monitor.report.run_data import load_run
from megatron_bai.rl.experience.evaluation import confidence_interval

CURVES = Path(__file__).parent / "data" / "curves.json"
MARKS = "<!-- calibration: written by benchmarks/detectors.py -->", "<!-- end of calibration -->"
RESPONSES = 200  # in a length bucket, each step: the paper's 4096 over about twenty buckets
KINDS = {  # spread, correlation of neighbours, share of outliers
    "5 %": (0.05, 0.0, 0.0),
    "10 %": (0.10, 0.0, 0.0),
    "20 %": (0.20, 0.0, 0.0),
    "10 %, correlated": (0.10, 0.5, 0.0),
    "10 %, outliers": (0.10, 0.0, 0.02),
}


def noise(steps: int, kind: str, random: np.random.Generator) -> np.ndarray:
    """Logarithms of what multiplies the values; mean 0, the spread as named, stationary."""
    spread, correlation, outliers = KINDS[kind]
    fresh = random.normal(0, spread * (1 - correlation**2) ** 0.5, steps)
    found = np.empty(steps)
    found[0] = random.normal(0, spread)
    for t in range(1, steps):
        found[t] = correlation * found[t - 1] + fresh[t]
    thrown = random.random(steps) < outliers
    noise: np.ndarray = found + thrown * random.choice([-1, 1], steps) * np.log(3)
    return noise


def values(curve: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Steps from 1 on, and the curve without noise."""
    at, known = np.array(curve["points"], dtype=float).T
    steps = np.arange(1, int(at[-1]) + 1)
    if curve["log"]:
        return steps, np.exp(np.interp(steps, at, np.log(known)))
    return steps, np.interp(steps, at, known)


def alarms(curve: dict[str, Any], kind: str, random: np.random.Generator, settings: config.Monitor) -> list[Alarm]:
    """Those of one draw of the noise."""
    steps, clean = values(curve)
    factors = noise(len(steps), kind, random)
    monitor, metric = Monitor(settings), curve["metric"]
    reward = metric.startswith("reward_by_length/")
    noisy = np.clip(clean * np.exp(factors), 0, 1) if reward else clean * np.exp(factors)
    if reward:  # of answers that are right or wrong
        noisy = random.binomial(RESPONSES, noisy) / RESPONSES
    found = []
    for step, value in zip(steps.tolist(), noisy.tolist()):
        record = {"step": step, metric: value}
        if reward:
            record[metric.replace("reward", "responses")] = RESPONSES
        if "evaluations" in curve:
            record |= evaluation(curve["evaluations"], step, random)
        found += monitor.step(record)
    return found


def evaluation(curve: dict[str, Any], step: int, random: np.random.Generator) -> dict[str, float | None]:
    """Held-out scores of a step, or none: of prompts whose chances are drawn anew around the curve's accuracy."""
    if step % curve["every"] and step > 1:
        return {}
    chance = np.interp(step, *np.array(curve["points"], dtype=float).T)
    chances = random.beta(2 * chance, 2 * (1 - chance), curve["prompts"])
    right = random.binomial(curve["samples"], chances)
    accuracy, half = confidence_interval(right / curve["samples"])
    ends = {f"eval_accuracy_{name}": accuracy + sign * (half or 0) for name, sign in (("low", -1), ("high", 1))}
    return {"eval_accuracy": accuracy, "eval_best": float((right > 0).mean()), **ends}


def measure(curve: dict[str, Any], kind: str, draws: int, settings: config.Monitor) -> dict[str, Any]:
    """Over draws: false alarms, steps in which they could have been, and of each draw the delay or None."""
    false = stable = 0
    delays: list[int | None] = []
    facts: list[dict[str, float]] = []
    length = curve["points"][-1][0]
    onset = curve["onset"] if curve["collapses"] else length
    for seed in range(draws):
        random = np.random.default_rng([seed, list(KINDS).index(kind), len(curve["name"])])
        found = alarms(curve, kind, random, settings)
        false += sum(alarm.step < onset for alarm in found)
        stable += onset
        after = [alarm for alarm in found if alarm.step >= onset]
        delays.append(after[0].step - onset if curve["collapses"] and after else None)
        facts += [alarm.facts for alarm in after if "recovery_step" in alarm.facts][:1]
    return {"false": false, "stable": stable, "delays": delays, "facts": facts}


def tables(draws: int, runs: list[Path], settings: config.Monitor) -> str:
    curves = json.loads(CURVES.read_text())["curves"]
    calm, falling, sticks = [], [], []
    for curve in curves:
        found = {kind: measure(curve, kind, draws, settings) for kind in KINDS}
        name = f"{curve['detector']}: {curve['name']}"
        if not curve["collapses"]:
            calm.append([name, *(f"{1000 * each['false'] / each['stable']:.2g}" for each in found.values())])
            continue
        falling.append([name, *(_delay(each) for each in found.values())])
        if curve["detector"] == "reward_hockey_stick":
            sticks += [_stick(curve, kind, each) for kind, each in found.items()]
    kinds = list(KINDS)
    parts = [
        f"{draws} draws of each noise, the default settings. "
        "False alarms per 1000 steps of a series that does not collapse:",
        _table(["detector: curve", *kinds], calm),
        "On series that collapse, the median delay in steps from the onset (5th to 95th percentile of draws), with "
        "the draws that raised no alarm and the false alarms before the onset, where there were any:",
        _table(["detector: curve", *kinds], falling),
        "What the hockey stick's second alarm says, medians over draws:",
        _table(["curve", "noise", "depth", "trough at step", "recovered at step", "with a recovery"], sticks),
    ]
    if runs:
        own = _table(["run", "steps", "alarms"], [_own(run, settings) for run in runs])
        parts += ["Runs of ours that are not known to collapse:", own]
    return "\n\n".join(parts)


def _delay(found: dict[str, Any]) -> str:
    seen = [delay for delay in found["delays"] if delay is not None]
    if not seen:
        return "never"
    low, high = np.percentile(seen, [5, 95])
    missed, early = len(found["delays"]) - len(seen), found["false"]
    rest = "".join([f"; {missed} missed" if missed else "", f"; {early} false" if early else ""])
    return f"{median(seen):.0f} ({low:.0f}–{high:.0f}){rest}"


def _stick(curve: dict[str, Any], kind: str, found: dict[str, Any]) -> list[str]:
    at, known = np.array(curve["points"], dtype=float).T
    steps, clean = values(curve)
    trough = int(at[known.argmin()])
    recovery = int(steps[(steps > trough) & (clean >= curve["recovery_to"])][0])
    facts = found["facts"]
    keys = ("depth", "trough_step", "recovery_step")
    cells = [f"{median(fact[key] for fact in facts):.3g}" if facts else "–" for key in keys]
    true = [f"{known[0] - known.min():.3g}", str(trough), str(recovery)]
    share = f"{len(facts) / len(found['delays']):.0%}"
    return [curve["name"], kind, *(f"{cell} (curve: {fact})" for cell, fact in zip(cells, true)), share]


def _own(run: Path, settings: config.Monitor) -> list[str]:
    records = load_run(run, run.name, "").records
    monitor = Monitor(settings)
    found = [alarm for record in records for alarm in monitor.step(record)]
    return [run.name, str(len(records)), "; ".join(f"{a.detector} at {a.step}" for a in found) or "none"]


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--runs", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path, help="a document with the marks; printed otherwise")
    options = parser.parse_args()
    text = tables(options.draws, options.runs, config.Monitor())
    if options.out is None:
        print(text)
        return
    document = options.out.read_text()
    head, rest = document.split(MARKS[0])
    options.out.write_text(f"{head}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}")


if __name__ == "__main__":
    main()
