"""How a run went, in a sentence."""

from datetime import UTC, datetime
from typing import Any

from megatron_bai.monitor.report.run_data import RunData
from megatron_bai.utils.json_numbers import is_number

# metric → what it is called, and the format of its numbers
_MEASURES = (
    ("reward_mean", "reward", ".3f"),
    ("eval_accuracy", "held-out reward", ".3f"),
    ("response_length_mean", "response length in tokens", ".1f"),
    ("kl_k3", "KL between the engines (k3)", ".1e"),
    ("loss", "loss", ".4g"),
)
_MAX_ALARMS = 4  # named in the sentence


def describe_run(run: RunData) -> str:
    """Return one sentence: finished, stopped or in progress; the main metrics, first → last; alarms."""
    state = f"{run.name} {_describe_state(run)}"
    if not run.records:
        return f"{state}."
    measures = [text for measure in _MEASURES if (text := _describe_change(run, *measure))]
    if any(key in record for record in run.records for key in ("reward_mean", "eval_accuracy")):
        measures = [text for text in measures if not text.startswith("loss")]  # a policy's says nothing by itself
    return f"{state}{': ' if measures else ''}{', '.join(measures)}; {_describe_alarms(run)}."


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


def _describe_change(run: RunData, key: str, name: str, form: str) -> str:
    """Return a metric's first and last number; an empty text without any."""
    values = [v for v in run.series(key)[1] if v is not None]
    if not values:
        return ""
    return f"{name} {format_change(values, form)}"


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
