"""Rows of a step's phases and their time, and of what names the step."""

from megatron_bai.monitor.metrics.table.metric import Metric, MetricChart, MetricSection

_TIMER = ("monitor/step_timer.py",)
_TRAINER = ("rl/trainer.py",)

PHASE_CHART = MetricChart("Seconds per step", "phases")
PHASE_PREFIX = "seconds_"


def _phase(name: str, about: str) -> Metric:
    """Return the row of a phase of a step, by the name that the trainer gives it."""
    return Metric(
        PHASE_PREFIX + name, "seconds", "wall-clock time of the phase", _TIMER, about, PHASE_CHART,
        name.replace("_", " "), place="first screen",
    )  # fmt: skip


SPEED = MetricSection(
    "Speed",
    "Where a step's seconds go.",
    (
        _phase("rollout", "Sampling the responses and computing their rewards, or taking them from the buffer."),
        _phase("old_logprob", "Scoring the responses with the step's weights, with replay and without."),
        _phase("values", "The critic's values of the responses, and advantages from them."),
        _phase("update_critic", "The critic's optimizer steps."),
        _phase("store", "Writing the step's routes (`replay.store`)."),
        _phase("update", "The actor's optimizer steps."),
        _phase("sync", "Sending the new weights to the servers, and checking that they use them."),
        _phase("eval", "Sampling the responses to held-out prompts, in steps that evaluate."),
        _phase("ahead", "Waiting, after the updates, for the next step's overlapping rollout (docs/rollout.md)."),
        _phase("samples", "Choosing the samples that are kept, and gathering them."),
        Metric("seconds_step", "seconds", "wall-clock time of the whole step", (*_TIMER, "rl/sft_trainer.py"),
            "How long the step took; what its phases leave of it is drawn as `rest`.",
            PHASE_CHART, place="first screen"),
        Metric("tokens_per_second", "tokens/s", "tokens fed with a route, prompts' too, over `seconds_step`", _TIMER,
            "How fast the whole step is.", MetricChart("Tokens per second"), "tokens/s"),
        Metric("padding_fraction", "fraction", "of the tokens that the model is fed", ("rl/batches/micro_batches.py",),
            "What of the forward passes is padding.",
            MetricChart("Padding, fraction of what the model is fed"), "fraction"),
        Metric("step", "steps", "from 1", (*_TRAINER, "rl/sft_trainer.py"),
            "The global step of the record.", place="axis of every chart"),
        Metric("weight_version", "syncs", "number of weight syncs when the step began", _TRAINER,
            "The weights that the step trains from.", place="first screen"),
        Metric("alarms", "", "a list; left out of a step without one", _TRAINER,
            "The alarms of the step, with their evidence.", place="first screen, alarms, marks on the curves"),
    ),
)  # fmt: skip
