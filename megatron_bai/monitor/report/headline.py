"""How a run went, in a sentence, and what R3 did to the discrepancy between its engines, in another."""

from datetime import UTC, datetime
from typing import Any

from megatron_bai.monitor.metrics.metric_names import TOKENS_METRIC
from megatron_bai.monitor.metrics.table.metric import Metric
from megatron_bai.monitor.metrics.table.sections import METRICS
from megatron_bai.monitor.report.run_data import RunData
from megatron_bai.utils.json_numbers import is_finite_number, is_number

_MEASURES = [metric for metric in METRICS.values() if metric.short]
_MAX_ALARMS = 4  # named in the sentence


def describe_run(run: RunData) -> str:
    """Return one sentence: finished, stopped or in progress; the main metrics, first → last; alarms."""
    state = f"{run.name} {_describe_state(run)}"
    if not run.records:
        return f"{state}."
    has_rewards = any(key in record for record in run.records for key in ("reward_mean", "eval_accuracy"))
    told = [metric for metric in _MEASURES if not (has_rewards and metric.name == "loss")]  # a policy's says nothing
    measures = [text for metric in told if (text := _describe_change(run, metric))]
    return f"{state}{': ' if measures else ''}{', '.join(measures)}; {_describe_alarms(run)}."


def describe_discrepancy(run: RunData) -> str:
    """Return what R3 leaves of the discrepancy between the engines, and whether the servers are quantised on purpose.

    The text is empty where R3 and the live routers were not both measured and no server is quantised.
    """
    return " ".join(text for text in (_describe_replay(run), _describe_quantization(run)) if text)


def _describe_replay(run: RunData) -> str:
    """Return KL (k3) with R3 and with live routers: means over the response tokens of the steps that have both."""
    if _read_setting(run, "replay", "mode") != "r3":
        return ""
    measured = [
        (record[TOKENS_METRIC], record["kl_k3"], record["kl_k3_live"])
        for record in run.records
        if all(is_finite_number(record.get(key)) for key in (TOKENS_METRIC, "kl_k3", "kl_k3_live"))
        and not record.get("stale_fraction")  # else the two are of different tokens
    ]
    num_tokens = sum(count for count, _, _ in measured)
    if not num_tokens:
        return ""
    replayed = sum(count * value for count, value, _ in measured) / num_tokens
    live = sum(count * value for count, _, value in measured) / num_tokens
    steps = f"{len(measured)} step{'s' if len(measured) > 1 else ''}"
    if replayed == live == 0:
        return f"No discrepancy between the engines (KL k3 is 0), with R3 and without, in all of {steps}."
    lower = sum(with_r3 < without for _, with_r3, without in measured)
    ratio = f"ratio {replayed / live:.2f}, " if live > 0 else ""
    return (
        f"Discrepancy between the engines (KL k3) with R3 {replayed:.1e} against {live:.1e} without, on the same "
        f"tokens: {ratio}lower with R3 in {lower} of {steps}."
    )


def _describe_quantization(run: RunData) -> str:
    """Return that the servers are quantised, and to what; an empty text where they serve what was trained."""
    quantize = _read_setting(run, "rollout", "quantize")
    if not quantize:
        return ""
    return (
        f"The server's weights are rounded to {quantize} values on purpose (rollout.quantize={quantize}), so this "
        "discrepancy is larger than the engines' own."
    )


def _read_setting(run: RunData, group: str, name: str) -> Any:
    """Return a setting of a run; None where its settings are not known."""
    settings = run.config.get(group)
    return settings.get(name) if isinstance(settings, dict) else None


def _describe_state(run: RunData) -> str:
    """Return a verb and how far the run is."""
    trainer = run.config.get("trainer")
    total = trainer.get("steps") if isinstance(trainer, dict) else None
    number = len(run.records)
    of_all = f"{number} of {total} steps" if is_number(total) else f"{number} step{'s' if number != 1 else ''}"
    if run.summary.get("complete") is True:
        return f"finished after {number} step{'s' if number != 1 else ''}"
    work = _describe_work(run)
    if not run.records:
        return f"has no finished step yet{work or ': its first may be in work'}"
    last = run.records[-1]
    if not work and any(a.action == "stop" for a in run.alarms() if a.step == last["step"]):
        return f"was stopped by an alarm after {of_all}"
    if run.summary.get("complete") is False or work:
        return f"is not finished, after {of_all}{work}"
    return f"has {of_all}"


def _describe_work(run: RunData) -> str:
    """Return the step and phase that the run was in when it was read; an empty text where it is in none."""
    step, phase, since = (run.progress.get(key) for key in ("step", "phase", "since"))
    done = run.records[-1]["step"] if run.records else 0
    if not isinstance(step, int) or step <= done or not isinstance(phase, str):
        return ""
    return f" (step {step} is in work: {phase.replace('_', ' ')}{_format_time(since)})"


def _format_time(since: Any) -> str:
    try:
        return f" since {datetime.fromtimestamp(since, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (TypeError, ValueError, OverflowError, OSError):
        return ""


def _describe_change(run: RunData, metric: Metric) -> str:
    """Return a metric's first and last number; an empty text without any."""
    values = [v for v in run.series(metric.name)[1] if v is not None]
    if not values:
        return ""
    return f"{metric.short} {format_change(values, metric.form)}"


def format_change(values: list[float], form: str = ".3f") -> str:
    """Return the first and the last of some numbers; one of which three decimals show nothing has an exponent.

    Args:
        values: at least one.
        form: of the numbers.
    """
    ends = values[:1] + values[-1:] if len(values) > 1 else values
    hidden = [form == ".3f" and value != 0 and not 1e-3 <= abs(value) < 1e6 for value in ends]
    return " → ".join(format(value, ".3g" if hide else form) for value, hide in zip(ends, hidden, strict=True))


def _describe_alarms(run: RunData) -> str:
    """Return the number of alarms, and the first few."""
    alarms = run.alarms()
    if not alarms:
        return "no alarm"
    named = [f"{a.detector.replace('_', ' ')} at step {a.step}" for a in alarms[:_MAX_ALARMS]]
    more = [f"and {len(alarms) - _MAX_ALARMS} more"] if len(alarms) > _MAX_ALARMS else []
    return f"{len(alarms)} alarm{'s' if len(alarms) > 1 else ''}: {', '.join(named + more)}"
