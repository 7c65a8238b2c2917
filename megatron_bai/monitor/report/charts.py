"""The charts of a report: its sections and their metrics, one line per run and metric, alarms on the curves.

What each metric means is defined where it is computed (docs/monitoring.md).
"""

import math
from html import escape
from textwrap import wrap
from typing import Any

from megatron_bai.monitor.metrics.metric_names import COUNT_PREFIX, MERGE_ROUTING, REWARD_PREFIX
from megatron_bai.monitor.report.html_page import DASHES, Chart
from megatron_bai.monitor.report.run_data import RunData
from megatron_bai.utils.json_numbers import is_number

COLOURS = ("#4269d0", "#e0862b", "#3ca951", "#d9534f", "#a463f2", "#2a9d9d", "#c94f8f", "#8c6d4f")
PHASES = (
    "rollout", "old_logprob", "values", "update_critic", "store", "update", "sync", "eval", "ahead", "samples",
)  # fmt: skip
_ALARM = "#d9304f"
_BY_LENGTH = (REWARD_PREFIX.rstrip("/"), COUNT_PREFIX.rstrip("/"))
_LAYERS = {  # metrics PREFIX/LAYER → title
    "route_mismatch": "Routes that differ, by MoE layer",
    "expert_entropy": "Entropy of the expert load, nats, by MoE layer",
}


def _factors(of: str) -> dict[str, str]:
    return {f"discrepancy_{of}": "discrepancy", f"staleness_{of}": "staleness"}


def _ways(of: str) -> dict[str, str]:
    """Return a metric of the discrepancy in each of the ways that it is measured on a batch."""
    ways = {"": "with replay", "_live": "without, same batch", "_weights": "with replay and the server's weights"}
    return {of + suffix: label for suffix, label in ways.items()}


def _thresholds(suffix: str) -> dict[str, str]:
    return {f"f_{tau}{suffix}": f"τ = {tau}" for tau in ("1.5", "2", "5")}


def _perplexity(suffix: str) -> dict[str, str]:
    return {f"perplexity_ratio{suffix}": "mean", f"perplexity_ratio_max{suffix}": "largest"}


def _quantiles(of: str) -> dict[str, str]:
    return {f"{of}_p{q}": f"{q} %" for q in (10, 50, 90)}


def _signs(of: str) -> dict[str, str]:
    return {of: "all", f"{of}_positive": "A > 0", f"{of}_negative": "A < 0"}


_SAMPLE_SIZES = {
    "ess": "π_θ/μ_old",
    "ess_discrepancy": "π_old/μ_old",
    "ess_discrepancy_live": "π_old/μ_old, live",
    "ess_discrepancy_weights": "π_old/μ_old, the server's weights",
}

# section → (intro, charts as (title, {metric: label}, log scale)); a chart without data is left out
SECTIONS: dict[str, tuple[str, list[tuple[str, dict[str, str], bool]]]] = {
    "Learning": (
        "Is the policy getting better, and does it keep its length?",
        [
            ("Reward, mean over the batch", {"reward_mean": "mean"}, False),
            ("Mean reward on held-out problems, and its 95 % interval", {"eval_accuracy": "mean"}, False),
            ("Held-out responses that the data's own check finds right, fraction", {"eval_exact": "fraction"}, False),
            ("Best reward of n on held-out problems, mean", {"eval_best": "mean"}, False),
            ("Response length on held-out problems, tokens", {"eval_length": "mean"}, False),
            ("Held-out responses, fraction", {"eval_truncated": "cut off", "eval_failed": "without a reward"}, False),
            ("Response length, tokens", {"response_length_mean": "mean", "response_length_max": "longest"}, False),
            ("Response tokens of the step", {"response_tokens": "tokens"}, False),
            ("Response length, quantiles", _quantiles("response_length"), False),
            ("Responses cut off at the limit, fraction", {"truncated_fraction": "fraction"}, False),
            ("Reward, mean standard deviation within a group", {"reward_std": "std"}, False),
            ("Reward, mean variance within a group", {"group_variance": "variance"}, False),
            ("Groups whose rewards are all equal, fraction", {"uniform_groups": "fraction"}, False),
            ("Prompts asked until every group counts", {"prompts_tried": "prompts", "refill_rounds": "rounds"}, False),
            (
                "Samples that failed, fraction",
                {"rollout_failed_fraction": "not sampled", "reward_failed_fraction": "without a reward"},
                False,
            ),
            ("Loss", {"loss": "loss"}, False),
            ("Learning rate", {"learning_rate": "rate"}, False),
        ],
    ),
    "Stability": (
        "How far the training engine is from the inference engine that sampled the batch, and how big the updates are.",
        [
            ("Training–inference KL (k3)", _ways("kl_k3"), True),
            ("Training–inference KL (k1)", _ways("kl_k1"), False),
            ("Training–inference mean |log r|, nats", _ways("logprob_gap"), False),
            ("F(τ): tokens with max(r, 1/r) > τ, fraction", _thresholds(""), False),
            ("F(τ) without replay, same batch, fraction", _thresholds("_live"), False),
            ("F(τ) with the server's weights of experts, fraction", _thresholds("_weights"), False),
            ("Perplexity ratio π/μ of a response", _perplexity(""), False),
            ("Perplexity ratio without replay, same batch", _perplexity("_live"), False),
            ("Perplexity ratio with the server's weights of experts", _perplexity("_weights"), False),
            ("Effective sample size, fraction", _SAMPLE_SIZES, False),
            ("Weight sync: log-probability of the probe, nats off", {"sync_gap": "gap"}, False),
            ("Entropy, nats per token", {"entropy": "entropy"}, False),
            ("Tokens dropped by the clip mask, fraction", _signs("clip_fraction"), False),
            ("Importance weight π_θ/μ_old", {"is_weight_mean": "mean", "is_weight_max": "largest"}, False),
            ("Its mean's factors: π_old/μ_old and π_θ/π_old", _factors("ratio_mean"), False),
            ("Its largest factors: π_old/μ_old and π_θ/π_old", _factors("ratio_max"), False),
            ("Logarithms of its factors, mean, nats", {"discrepancy": "discrepancy", "staleness": "staleness"}, False),
            ("Tokens whose correction is limited, fraction", {"corrected_fraction": "fraction"}, False),
            ("Binary divergence of π_θ from its anchor, mean", {"divergence_mean": "divergence"}, False),
            ("Gate: weight of a token's gradient, mean", {"gate_mean": "gate"}, False),
            ("Tokens pulled back into the trust region, fraction", {"corrective_fraction": "fraction"}, False),
            ("KL to the initial weights, nats per token", {"kl_reference": "KL"}, False),
            ("Samples left out of the loss, fraction", {"left_out_fraction": "fraction"}, False),
            ("Gradient norm", {"grad_norm": "norm"}, True),
        ],
    ),
    "Routing": (
        "What the routers choose: against the inference engine, and how evenly experts are used.",
        [
            ("Routes the live router would have chosen differently, fraction", {"route_mismatch": "fraction"}, False),
            ("Tokens with such a route in any layer, fraction", {"tokens_route_mismatch": "fraction"}, False),
            (
                "Weights of the server's experts less the trainer's of them, absolute",
                {"route_weight_gap": "mean", "route_weight_gap_max": "largest"},
                True,
            ),
            ("Route coverage: rows replayed of rows that should be", {"route_coverage": "fraction"}, False),
            ("Effective number of experts, mean over layers", {"experts_effective": "experts"}, False),
            ("Entropy of the expert load, nats, mean over layers", {"expert_entropy": "entropy"}, False),
            ("Largest load of an expert, 1 if all are alike", {"expert_load_max": "load"}, False),
            ("Load-balancing loss of the routers, 1 if even, mean over layers", {"load_balancing_loss": "loss"}, False),
            ("z loss of the routers, mean over layers", {"z_loss": "loss"}, False),
            ("Experts without a token, fraction of (layer, expert)", {"experts_unused": "fraction"}, False),
            ("γ of the routers: exp(−shift since the first update), mean", {"router_shift_mean": "mean"}, False),
            ("Tokens with γ below its floor, fraction", {"router_shift_floor_fraction": "fraction"}, False),
            ("KL of the routers from their prediction, nats", {"predict_loss": "KL"}, False),
            ("Routes that the prediction changed, fraction", {"predict_changed_fraction": "fraction"}, False),
            (
                "Routes that are the live router's in later updates, fraction",
                {"predict_correct_fraction": "predicted", "predict_correct_fraction_r2": "R2's"},
                False,
            ),
            ("Tokens without a route, fraction", {"route_missing": "missing", "route_masked": "left out"}, False),
        ],
    ),
    "Critic": (
        "What the critic makes of each token, and of what it is worth in the end.",
        [
            ("Values and returns, mean", {"value_mean": "values", "return_mean": "returns"}, False),
            ("Variance of the returns that the values explain", {"explained_variance": "share"}, False),
            ("Squared error of the values", {"value_error": "error"}, False),
            ("Values that the limit holds, fraction", {"value_clip_fraction": "fraction"}, False),
            ("Gradient norm of the critic", {"critic_grad_norm": "norm"}, True),
            ("Learning rate of the critic", {"critic_learning_rate": "rate"}, False),
        ],
    ),
    "Speed": (
        "Where a step's seconds go.",
        [
            ("Tokens per second", {"tokens_per_second": "tokens/s"}, False),
            ("Padding, fraction of what the model is fed", {"padding_fraction": "fraction"}, False),
        ],
    ),
}


def section_charts(section: str, runs: list[RunData]) -> list[Chart]:
    """Return the charts of a section that have data.

    Args:
        section: a key of `SECTIONS`.
        runs: share each chart of `SECTIONS`; phase bars, length buckets and heat maps are a chart for each run.
    """
    drawn = [_lines(runs, *chart) for chart in SECTIONS[section][1]]
    if section == "Speed":
        drawn = [_phase_bars(run) for run in runs] + drawn
    if section == "Learning":
        drawn += [_length_buckets(run, _BY_LENGTH[0], "Reward by response length") for run in runs]
    if section == "Routing":
        drawn += [_layer_heatmap(run, key, title) for key, title in _LAYERS.items() for run in runs]
    return [chart for chart in drawn if chart]


def other_charts(runs: list[RunData]) -> list[Chart]:
    """Return a chart for every metric that no section shows."""
    return [chart for chart in (_lines(runs, key, {key: key}, False) for key in _other_keys(runs)) if chart]


def _lines(runs: list[RunData], title: str, keys: dict[str, str], log: bool) -> Chart | None:
    """Return a chart with one line per run and metric: colours distinguish runs, dashes metrics."""
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
    legend = len(runs) > 1 or len(traces) > 1 or bool(marks) or bool(bands)
    chart = {"title": title, "traces": bands + traces + marks, "log": log, "legend": legend}
    return (_with_zeros(chart) if log else chart) if traces else None


def _with_zeros(chart: Chart) -> Chart:
    """Draw what is not above 0 at a floor a decade or more below the smallest value: a log axis has no place for it."""
    values = [y for trace in chart["traces"] for y in trace["y"] if y is not None]
    positive = [y for y in values if y > 0]
    if not positive:
        return chart | {"log": False}
    if len(positive) == len(values):
        return chart
    floor = 10.0 ** (math.floor(math.log10(min(positive))) - 1)
    for trace in chart["traces"]:
        trace.setdefault("hovertemplate", "%{customdata:.4~g}")
        trace["customdata"] = trace["y"]
        trace["y"] = [floor if y is not None and y <= 0 else y for y in trace["y"]]
    return chart | {"floor": floor}


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


def is_all_zero(chart: Chart) -> bool:
    """Return whether a chart has numbers, and each is 0."""
    rows = [row for trace in chart["traces"] for row in (trace["z"] if "z" in trace else [trace["y"]])]
    values = [value for row in rows for value in row if value is not None]
    return bool(values) and not any(values)


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


def _phase_bars(run: RunData) -> Chart | None:
    """Return the stacked seconds of one run's steps by phase; `rest` is what the named phases leave of a step."""
    spent = {phase: dict(zip(*run.series(f"seconds_{phase}"), strict=True)) for phase in PHASES}
    spent["rest"] = {
        step: max(0.0, (seconds or 0.0) - sum(phase_seconds.get(step) or 0.0 for phase_seconds in spent.values()))
        for step, seconds in zip(*run.series("seconds_step"), strict=True)
    }
    bars = [
        {
            "x": list(seconds),
            "y": list(seconds.values()),
            "name": phase.replace("_", " "),
            "type": "bar",
            "marker": {"color": colour},
        }
        for (phase, seconds), colour in zip(spent.items(), (*COLOURS, "#b8a038", "#6b7fb8", "#9aa0a8"), strict=False)
        if seconds
    ]
    title = f"Seconds per step: {run.name}"
    return {"title": title, "traces": bars, "log": False, "legend": True} if bars else None


def _other_keys(runs: list[RunData]) -> list[str]:
    """Return the names of numeric metrics that no section shows, in alphabetical order."""
    shown = {key for _, charts in SECTIONS.values() for _, keys, _ in charts for key in keys}
    shown |= {f"{key}_{end}" for key in shown for end in ("low", "high")}  # of its interval
    shown |= {key for run in runs for prefix in (*_LAYERS, *_BY_LENGTH) for key in run.numbered_metrics(prefix)}
    shown |= {f"seconds_{phase}" for phase in PHASES} | {"seconds_step", "step", "weight_version"}
    shown |= {f"merge_{name}" for name in ("experts_effective", "route_margin")}  # in the table of the merge, as are …
    shown |= {key for run in runs for prefix in MERGE_ROUTING for key in run.numbered_metrics(prefix)}
    names = {key for run in runs for record in run.records for key, value in record.items() if is_number(value)}
    return sorted(names - shown)
