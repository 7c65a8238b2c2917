"""The verb `samples`: responses that a run kept, as text or JSON."""

from pathlib import Path

from megatron_bai.config import Config
from megatron_bai.config.limits import validate_group
from megatron_bai.errors import UserError
from megatron_bai.monitor.samples import store
from megatron_bai.monitor.samples.show import format_sample, select


def run(config: Config) -> None:
    """Print samples of `samples.step` of `samples.run` (or this run).

    Raises:
        UserError: the run or the step has none; names what there is.
    """
    settings = config.samples
    validate_group("samples", settings)
    run_dir = Path(settings.run or config.run.dir)
    samples = store.read_step(run_dir, _find_step(run_dir, settings.step))
    chosen = select(samples, settings.sort, settings.count, settings.split, settings.prompt)
    print("\n".join(sample.to_json() if settings.format == "json" else format_sample(sample) for sample in chosen))


def _find_step(run_dir: Path, step: int) -> int:
    """Return the step to show; refuse a run and a step without samples, by name."""
    if not run_dir.is_dir():
        raise UserError(f"samples.run={run_dir} does not exist: name the directory of a run")
    steps = store.list_steps(run_dir)
    if not steps:
        raise UserError(
            f"{run_dir} holds no samples: the run was made with monitor.samples=0, by an earlier release, or has no "
            "step yet"
        )
    if step and step not in steps:
        raise UserError(f"{run_dir} keeps no samples of step {step}: choose one of {_format_steps(steps)}")
    return step or steps[-1]


def _format_steps(steps: list[int]) -> str:
    """Return the steps as ranges, of which at most 20 are named."""
    ranges: list[list[int]] = []
    for step in steps:
        if ranges and step == ranges[-1][1] + 1:
            ranges[-1][1] = step
        else:
            ranges.append([step, step])
    texts = [str(first) if first == last else f"{first} to {last}" for first, last in ranges]
    return ", ".join(texts if len(texts) <= 20 else [*texts[:10], "…", *texts[-10:]])
