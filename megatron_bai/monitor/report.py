"""A run, or several side by side, as one self-contained HTML file.

A run directory holds `metrics.jsonl` (one flat JSON object per global step; needed), `config.yaml` and `summary.json`
(both optional: a run in progress has no summary). `summary["provenance"]` may name a merge's `provenance.json`. What
each metric means is defined where it is computed.
"""

import json
import math
import os
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import yaml

from megatron_bai.config import Config
from megatron_bai.errors import UserError
from megatron_bai.monitor import page

_COLOURS = ("#4269d0", "#e0862b", "#3ca951", "#d9534f", "#a463f2", "#2a9d9d", "#c94f8f", "#8c6d4f")
_DASHES = ("solid", "dot")  # of a chart's first and second metric
_PHASES = ("rollout", "old_logprob", "values", "update_critic", "update", "sync")


def _factors(of: str) -> dict[str, str]:
    return {f"discrepancy_ratio_{of}": "discrepancy", f"staleness_ratio_{of}": "staleness"}


# section → (intro, charts as (title, {metric: label}, log scale)); a chart without data is left out
_SECTIONS: dict[str, tuple[str, list[tuple[str, dict[str, str], bool]]]] = {
    "Learning": (
        "Is the policy getting better, and does it keep its length?",
        [
            ("Reward, mean over the batch", {"reward_mean": "mean"}, False),
            ("Accuracy on held-out problems", {"eval_accuracy": "accuracy"}, False),
            ("Response length, tokens", {"response_length_mean": "mean", "response_length_max": "longest"}, False),
            ("Responses cut off at the limit, fraction", {"truncated_fraction": "fraction"}, False),
            ("Reward, mean standard deviation within a group", {"reward_std": "std"}, False),
            ("Loss", {"loss": "loss"}, False),
            ("Learning rate", {"learning_rate": "rate"}, False),
        ],
    ),
    "Stability": (
        "How far the training engine is from the inference engine that sampled the batch, and how big the updates are.",
        [
            ("Training–inference KL (k3)", {"kl_k3": "with replay", "kl_k3_live": "without, same batch"}, True),
            ("Training–inference KL (k1)", {"kl_k1": "with replay", "kl_k1_live": "without, same batch"}, False),
            ("Routes the live router would have chosen differently, fraction", {"route_mismatch": "fraction"}, False),
            ("Route coverage: rows replayed of rows that should be", {"route_coverage": "fraction"}, False),
            ("Entropy, nats per token", {"entropy": "entropy"}, False),
            ("Tokens dropped by the clip mask, fraction", {"clip_fraction": "fraction"}, False),
            ("Importance weight π_θ/μ_old", {"is_weight_mean": "mean", "is_weight_max": "largest"}, False),
            ("Its mean's factors: π_old/μ_old and π_θ/π_old", _factors("mean"), False),
            ("Its largest factors: π_old/μ_old and π_θ/π_old", _factors("max"), False),
            ("KL to the initial weights, nats per token", {"kl_reference": "KL"}, False),
            ("Samples left out of the loss, fraction", {"left_out_fraction": "fraction"}, False),
            ("Gradient norm", {"grad_norm": "norm"}, True),
        ],
    ),
    "Speed": ("Where a step's seconds go.", [("Tokens per second", {"tokens_per_second": "tokens/s"}, False)]),
}


@dataclass(frozen=True)
class RunData:
    """What was found in one run directory. `records` are in the order of their steps, one a step."""

    name: str
    colour: str
    records: list[dict[str, Any]]
    config: dict[str, Any]
    summary: dict[str, Any]
    provenance: dict[str, Any]

    def series(self, key: str) -> tuple[list[int], list[float | None]]:
        """Steps that have a number under `key`, and the numbers; null and what is not finite are gaps (None)."""
        found = [(int(r["step"]), r[key]) for r in self.records if key in r and (r[key] is None or _is_number(r[key]))]
        return [step for step, _ in found], [float(v) if v is not None and math.isfinite(v) else None for _, v in found]


def run(config: Config) -> None:
    """The verb `report`: `report.runs` (or this run) into `report.output` (or `report.html` in the first run)."""
    run_dirs = [Path(name) for name in config.report.runs or [config.run.dir]]
    output = Path(config.report.output) if config.report.output else run_dirs[0] / "report.html"
    write_report(run_dirs, output)
    print(f"wrote {output}")


def write_report(run_dirs: list[Path], output: Path) -> None:
    """Read the runs and write the report, replacing an earlier one in a single move.

    Raises:
        UserError: a directory has no usable metrics, or a file in it cannot be read.
    """
    if not run_dirs:
        raise UserError("there is no run to report: name run directories in report.runs")
    names = _names(run_dirs)
    runs = [load_run(d, name, _COLOURS[i % len(_COLOURS)]) for i, (d, name) in enumerate(zip(run_dirs, names))]
    charts: list[page.Chart] = []
    parts = [_headlines(runs)]
    for title, (intro, wanted) in _SECTIONS.items():
        drawn = [c for c in (_lines(runs, *chart) for chart in wanted) if c]
        if title == "Speed":
            drawn = [c for c in (_phases(run) for run in runs) if c] + drawn
        parts.append(_chart_section(title, intro, drawn, charts))
    others = [_lines(runs, key, {key: key}, False) for key in _other_keys(runs)]
    parts.append(_chart_section("Other", "Metrics this report has no place for.", [c for c in others if c], charts))
    parts += [_merge_section(runs), _config_section(runs)]
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    partial.write_text(page.page("megatron-bai · " + ", ".join(names), "".join(parts), charts), encoding="utf-8")
    os.replace(partial, output)


def load_run(directory: Path, name: str, colour: str) -> RunData:
    """Everything in a run directory that a report shows.

    Raises:
        UserError: see `write_report`.
    """
    summary = _read(directory / "summary.json", json.loads)
    named = str(summary.get("provenance") or "")  # relative to the run, or to where the command is run
    provenance = next((p for p in (directory / named, Path(named)) if p.is_file()), directory / "provenance.json")
    return RunData(
        name=name,
        colour=colour,
        records=_read_metrics(directory / "metrics.jsonl"),
        config=_read(directory / "config.yaml", yaml.safe_load),
        summary=summary,
        provenance=_read(provenance, json.loads),
    )


def _read(path: Path, parse: Any) -> dict[str, Any]:
    """The mapping in a file, empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {error}; repair or remove it") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no mapping: repair or remove it")
    return found


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records by step. A step written twice (a resumed run) counts once, the last time it was written."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: name a directory that a training run wrote")
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    records: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines):
        try:
            record = json.loads(line)
            records[int(record["step"])] = record
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines) - 1:
                break  # the run is writing this line
            raise UserError(f"{path}, record {number + 1}, is not a JSON object with a step: repair it") from error
    if not records:
        raise UserError(f"{path} holds no step yet: wait for the run's first")
    return [records[step] for step in sorted(records)]


def _names(run_dirs: list[Path]) -> list[str]:
    """The directories' own names, or their whole paths where names collide."""
    names = [d.resolve().name for d in run_dirs]
    return names if len(set(names)) == len(names) else [str(d) for d in run_dirs]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _lines(runs: list[RunData], title: str, keys: dict[str, str], log: bool) -> page.Chart | None:
    """One line per run and metric: a run keeps its colour, a chart's second metric is dotted."""
    traces = []
    for run in runs:
        for dash, (key, label) in zip(_DASHES, keys.items()):
            steps, values = run.series(key)
            if not any(v is not None for v in values):
                continue
            parts = ([run.name] if len(runs) > 1 else []) + ([label] if len(keys) > 1 or len(runs) == 1 else [])
            traces.append(
                {
                    "x": steps,
                    "y": values,
                    "name": escape(" · ".join(parts)),  # plotly reads names as HTML
                    "mode": "lines+markers" if len(steps) <= 40 else "lines",
                    "line": {"color": run.colour, "dash": dash, "width": 2},
                    "marker": {"size": 5},
                }
            )
    legend = len(runs) > 1 or len(traces) > 1
    return {"title": title, "traces": traces, "log": log, "legend": legend} if traces else None


def _phases(run: RunData) -> page.Chart | None:
    """Stacked seconds of one run's steps; what the named phases leave of a step is `rest`."""
    spent = {phase: dict(zip(*run.series(f"seconds_{phase}"))) for phase in _PHASES}
    spent["rest"] = {
        step: max(0.0, (seconds or 0.0) - sum(of_phase.get(step) or 0.0 for of_phase in spent.values()))
        for step, seconds in zip(*run.series("seconds_step"))
    }
    bars = [
        {
            "x": list(seconds),
            "y": list(seconds.values()),
            "name": phase.replace("_", " "),
            "type": "bar",
            "marker": {"color": colour},
        }
        for (phase, seconds), colour in zip(spent.items(), (*_COLOURS[: len(_PHASES)], "#9aa0a8"))
        if seconds
    ]
    title = f"Seconds per step: {run.name}"
    return {"title": title, "traces": bars, "log": False, "legend": True} if bars else None


def _chart_section(title: str, intro: str, drawn: list[page.Chart], charts: list[page.Chart]) -> str:
    """Append the charts to the page's list and give the HTML that places them; nothing for no chart."""
    if not drawn:
        return ""
    figures = "".join(page.figure(len(charts) + i, chart) for i, chart in enumerate(drawn))
    charts.extend(drawn)
    return f'<h2>{title}</h2><p>{intro}</p><div class="charts">{figures}</div>'


def _other_keys(runs: list[RunData]) -> list[str]:
    """Numeric metrics no section shows, in alphabetical order."""
    shown = {key for _, charts in _SECTIONS.values() for _, keys, _ in charts for key in keys}
    shown |= {f"seconds_{phase}" for phase in _PHASES} | {"seconds_step", "step", "weight_version"}
    found = {key for run in runs for record in run.records for key, value in record.items() if _is_number(value)}
    return sorted(found - shown)


def _headlines(runs: list[RunData]) -> str:
    cards = (
        f'<div class="card"><h3><i style="background:{run.colour}"></i>{escape(run.name)}</h3>{_headline(run)}</div>'
        for run in runs
    )
    return "<p>Every chart has the global step on its x axis.</p>" + "".join(cards)


def _headline(run: RunData) -> str:
    """First and last reward and accuracy, time, the slowest phase, layout and versions, as far as known."""
    items = []
    for key, label in (("reward_mean", "Reward, first → last"), ("eval_accuracy", "Eval accuracy, first → last")):
        values = [v for v in run.series(key)[1] if v is not None]
        if values:
            items.append((label, f"{values[0]:.3f} → {values[-1]:.3f}"))
    items.append(("Steps", str(len(run.records))))
    seconds = {phase: sum(v or 0.0 for v in run.series(f"seconds_{phase}")[1]) for phase in (*_PHASES, "step")}
    total = seconds.pop("step")
    if total > 0:
        slowest = max(seconds, key=seconds.__getitem__)
        items.append(("Seconds in all", f"{total:.0f}"))
        items.append(("Slowest phase", f"{slowest.replace('_', ' ')}, {seconds[slowest] / total:.0%}"))
    if "weight_version" in run.records[-1]:
        items.append(("Weight version", str(run.records[-1]["weight_version"])))
    big = len(items)
    if resumed := run.summary.get("resumed"):
        items.append(("Resumed after step", ", ".join(map(str, resumed))))
    if run.summary.get("complete") is False:
        items.append(("State", "not finished"))
    layout = run.summary.get("layout") or run.config.get("parallel")
    for label, group in (("Layout", layout), ("Versions", run.summary.get("versions"))):
        if isinstance(group, dict):
            items.append((label, " · ".join(f"{key} {value}" for key, value in flatten(group).items() if value)))
    return page.facts(items, big)


def _merge_section(runs: list[RunData]) -> str:
    """What the actor was merged from, and with which coefficients."""
    cards = []
    for run in (run for run in runs if run.provenance):
        sources = [s for s in run.provenance.get("sources", []) if isinstance(s, dict)]
        rows = [[str(s.get("path")), str(s.get("coefficient")), str(s.get("digest", ""))[:12]] for s in sources]
        recipe = flatten({key: run.provenance.get(key) for key in ("recipe", "created")})
        recipe.pop("recipe.terms", None)  # the table below
        cards.append(f'<div class="card"><h3>{escape(run.name)}</h3>{page.facts(list(recipe.items()))}<br>')
        cards.append(page.table(["checkpoint", "coefficient", "digest"], rows, compare=False) + "</div>")
    return "<h2>Merge</h2><p>The weights that training started from.</p>" + "".join(cards) if cards else ""


def _config_section(runs: list[RunData]) -> str:
    """Every setting of every run; where runs differ the row is marked."""
    settings = [flatten(run.config) for run in runs]
    keys = list(dict.fromkeys(key for one in settings for key in one))
    if not keys:
        return ""
    rows = [[key, *(one.get(key, "–") for one in settings)] for key in keys]
    shown = page.table(["setting", *(run.name for run in runs)], rows)
    card = f"<details><summary>{len(keys)} settings</summary><div class=card>{shown}</div></details>"
    return f"<h2>Configuration</h2>{card}"


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Leaves of nested mappings by dotted key, as text."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = "" if value is None else str(value)
    return flat
