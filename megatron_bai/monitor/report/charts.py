"""The charts of a report, as the table of metrics has them: one line per run and metric, alarms on the curves."""

import math
from html import escape
from itertools import cycle
from textwrap import wrap
from typing import Any

from megatron_bai.monitor.metrics.table.metric import Metric, MetricChart, MetricSection
from megatron_bai.monitor.metrics.table.sections import PHASES, find_metric
from megatron_bai.monitor.metrics.table.speed import PHASE_PREFIX
from megatron_bai.monitor.report.html_page import DASHES, Chart
from megatron_bai.monitor.report.run_data import RunData
from megatron_bai.utils.json_numbers import is_number

COLOURS = ("#4269d0", "#e0862b", "#3ca951", "#d9534f", "#a463f2", "#2a9d9d", "#c94f8f", "#8c6d4f")
_PHASE_COLOURS = (*COLOURS, "#b8a038", "#6b7fb8")
_REST_COLOUR = "#9aa0a8"
_ALARM = "#d9304f"


def section_charts(section: MetricSection, runs: list[RunData]) -> list[Chart]:
    """Return the charts of a section that have data.

    Args:
        section: of the table of metrics.
        runs: share each chart of lines; phase bars, length buckets and heat maps are a chart for each run.
    """
    charts: list[Chart | None] = []
    for chart, metrics in section.charts.items():
        drawn = [metric for metric in metrics if metric.label]
        if chart.kind == "lines":
            charts.append(_lines(runs, chart, _line_labels(runs, drawn)))
        elif chart.kind == "phases":
            charts += [_phase_bars(run, chart.title) for run in runs]
        else:
            draw_family = _length_buckets if chart.kind == "buckets" else _layer_heatmap
            charts += [draw_family(run, metric.family, chart.title) for metric in drawn for run in runs]
    return [chart for chart in charts if chart]


def _line_labels(runs: list[RunData], drawn: list[Metric]) -> dict[str, str]:
    """Return the label of each metric of a chart of lines; of a family, of each member that the runs have."""
    labels: dict[str, str] = {}
    for metric in drawn:
        if metric.family:
            names = sorted({key for run in runs for record in run.records for key in record if metric.matches(key)})
            labels |= {name: name.rpartition("/")[2] for name in names}
        else:
            labels[metric.name] = metric.label
    return labels


def own_charts(runs: list[RunData]) -> list[Chart]:
    """Return a chart for every metric that is the runs' own: it has no row in the table of metrics."""
    drawn = [_lines(runs, MetricChart(name), {name: name}) for name in _own_names(runs)]
    return [chart for chart in drawn if chart]


def _lines(runs: list[RunData], of: MetricChart, keys: dict[str, str]) -> Chart | None:
    """Return a chart with one line per run and metric: colours distinguish runs, dashes metrics.

    Args:
        runs: to draw.
        of: gives title and axis.
        keys: the label of each metric.
    """
    traces, marks, bands = [], [], []
    keys = {key: label for key, label in keys.items() if any(v is not None for run in runs for v in run.series(key)[1])}
    for run in runs:
        for dash, (key, label) in zip(DASHES, keys.items(), strict=False):
            steps, values = run.series(key)
            if not any(v is not None for v in values):
                continue
            parts = ([run.name] if len(runs) > 1 else []) + ([label] if len(keys) > 1 or len(runs) == 1 else [])
            traces.append(_line(steps, values, " · ".join(parts), run.colour, dash))
            marks += _alarms(run, key)
            bands += _band(run, key)
    if not traces:
        return None
    legend = len(runs) > 1 or len(traces) > 1 or bool(marks) or bool(bands)
    chart = {"title": of.title, "traces": bands + traces + marks, "log": of.log, "legend": legend}
    if of.log:
        _lift_zeros(chart)
    return chart


def _lift_zeros(chart: Chart) -> None:
    """Draw what is not above 0 at a floor a decade or more below the smallest value: a log axis has no place for it."""
    values = [y for trace in chart["traces"] for y in trace["y"] if y is not None]
    positive = [y for y in values if y > 0]
    if not positive:
        chart["log"] = False
    if len(positive) in (0, len(values)):
        return
    chart["floor"] = floor = 10.0 ** (math.floor(math.log10(min(positive))) - 1)
    for trace in chart["traces"]:
        trace.setdefault("hovertemplate", "%{customdata:.4~g}")
        trace["customdata"] = trace["y"]
        trace["y"] = [floor if y is not None and y <= 0 else y for y in trace["y"]]


def _band(run: RunData, key: str) -> list[dict[str, Any]]:
    """Return the two edges of the interval KEY_low to KEY_high, the area between filled; nothing where there is none.

    An interval of a mean that cannot leave [0, 1] ends there, whatever the formula says.
    """
    lows, highs = ({s: v for s, v in zip(*run.series(key + end), strict=True)} for end in ("_low", "_high"))
    steps = [s for s in lows if lows[s] is not None and highs.get(s) is not None]
    if not steps:
        return []
    bounded = _has_rewards_up_to_1(run)
    edges = []
    for values in (lows, highs):
        clipped = [min(max(values[s] or 0.0, 0.0), 1.0) if bounded else values[s] for s in steps]
        edges.append(
            {"x": steps, "y": clipped, "mode": "lines", "line": {"width": 0, "color": run.colour, "dash": "solid"}}
        )
    low = edges[0] | {"name": escape(f"{run.name} · low end"), "unnamed": True}
    high = edges[1] | {"name": escape(f"{run.name} · 95 % interval"), "fill": "tonexty", "fillcolor": run.colour + "33"}
    return [low, high]


def _has_rewards_up_to_1(run: RunData) -> bool:
    """Return whether rewards lie between 0 and 1: by the reward's kind, otherwise by all means that there are."""
    reward = run.config.get("reward")
    if isinstance(reward, dict) and reward.get("name") in ("exact", "math_verify"):
        return True
    means = [v for key in ("reward_mean", "eval_accuracy", "eval_best") for v in run.series(key)[1] if v is not None]
    return all(0 <= mean <= 1 for mean in means)


def _line(steps: list[int], values: list[float | None], name: str, colour: str, dash: str = "solid") -> dict[str, Any]:
    return {
        "x": steps,
        "y": values,
        "name": escape(name),  # plotly reads names as HTML
        "mode": "lines+markers" if len(steps) <= 40 else "lines",
        "line": {"color": colour, "dash": dash, "width": 2},
        "marker": {"size": 5},
    }


def _alarms(run: RunData, key: str) -> list[dict[str, Any]]:
    """Return a trace that marks the alarms of a metric on its curve; none where there are no alarms."""
    values = dict(zip(*run.series(key), strict=True))
    alarms = [alarm for alarm in run.alarms() if alarm.metric == key and values.get(alarm.step) is not None]
    if not alarms:
        return []
    return [
        {
            "x": [alarm.step for alarm in alarms],
            "y": [values[alarm.step] for alarm in alarms],
            "name": escape(f"alarm · {run.name}"),
            "text": [
                "<br>".join(map(escape, wrap(f"{a.detector.replace('_', ' ')}: {a.evidence}", 44))) for a in alarms
            ],
            "hovertemplate": "%{text}<extra></extra>",
            "mode": "markers",
            "marker": {"symbol": "triangle-down", "size": 13, "color": _ALARM},
        }
    ]


def _length_buckets(run: RunData, prefix: str, title: str) -> Chart | None:
    """Return a chart with a line for each length bucket of one run, from blue (short) to red (long)."""
    keys = run.numbered_metrics(prefix)
    traces, marks = [], []
    for i, key in enumerate(keys):
        hue = 215 - 215 * i / max(len(keys) - 1, 1)
        traces.append(_line(*run.series(key), f"from {key.split('/')[1]} tokens", f"hsl({hue:.0f}, 60%, 52%)"))
        marks += _alarms(run, key)
    for mark in marks[1:]:
        mark["unnamed"] = True  # one entry in the legend explains the mark
    return {"title": f"{title}: {run.name}", "traces": traces + marks, "log": False, "legend": True} if traces else None


def _layer_heatmap(run: RunData, prefix: str, title: str) -> Chart | None:
    """Return a heat map over layers and steps of one run; None for one layer, which the mean shows."""
    keys = run.numbered_metrics(prefix)
    if len(keys) < 2:
        return None
    series = {key: dict(zip(*run.series(key), strict=True)) for key in keys}
    steps = sorted({step for layer_values in series.values() for step in layer_values})
    trace = {
        "type": "heatmap",
        "x": steps,
        "y": [key.split("/")[1] for key in keys],
        "z": [[layer_values.get(step) for step in steps] for layer_values in series.values()],
        "colorscale": "Viridis",
        "colorbar": {"thickness": 10, "outlinewidth": 0},
        "hovertemplate": "step %{x}, layer %{y}: %{z:.4g}<extra></extra>",
    }
    return {"title": f"{title}: {run.name}", "traces": [trace], "log": False, "legend": False, "map": True}


def _phase_bars(run: RunData, title: str) -> Chart | None:
    """Return the stacked seconds of one run's steps by phase; `rest` is what the named phases leave of a step."""
    spent = {phase: dict(zip(*run.series(PHASE_PREFIX + phase), strict=True)) for phase in PHASES}
    rest = {
        step: max(0.0, (seconds or 0.0) - sum(phase_seconds.get(step) or 0.0 for phase_seconds in spent.values()))
        for step, seconds in zip(*run.series(f"{PHASE_PREFIX}step"), strict=True)
    }
    colours = dict(zip(PHASES, cycle(_PHASE_COLOURS), strict=False)) | {"rest": _REST_COLOUR}
    bars = [
        {
            "x": list(seconds),
            "y": list(seconds.values()),
            "name": phase.replace("_", " "),
            "type": "bar",
            "marker": {"color": colours[phase]},
        }
        for phase, seconds in (spent | {"rest": rest}).items()
        if seconds
    ]
    return {"title": f"{title}: {run.name}", "traces": bars, "log": False, "legend": True} if bars else None


def _own_names(runs: list[RunData]) -> list[str]:
    """Return the names of numeric metrics that have no row in the table, in alphabetical order."""
    names = {key for run in runs for record in run.records for key, value in record.items() if is_number(value)}
    return sorted(name for name in names if find_metric(name) is None)
