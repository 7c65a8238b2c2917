"""The verb `plan`: what a training run will do and need, from its settings and what they name."""

from rich.table import Table

from megatron_bai.config import Config
from megatron_bai.errors import UserError
from megatron_bai.memory_plan.run_inputs import read_inputs, read_task
from megatron_bai.memory_plan.run_plan import GB, describe_batches, gpu_bytes, require_rollouts, validate_plan
from megatron_bai.rl.init_weights import validate_init
from megatron_bai.rl.run_architecture import resolve_architecture
from megatron_bai.rl.validate_settings import validate_settings
from megatron_bai.utils.terminal_text import make_console


def run(settings: Config) -> None:
    """Print the batches and the memory of the fullest GPU.

    Raises:
        UserError: settings that contradict each other, something to read that does not exist, or more memory than
            `cluster.memory_gb`.
    """
    require_rollouts(settings)
    validate_init(settings)
    notes = read_inputs(settings)
    settings = resolve_architecture(settings)
    validate_settings(settings)
    processes = validate_plan(settings)
    notes |= read_task(settings)
    held = gpu_bytes(settings, processes)
    console = make_console(highlight=False)
    for title, rows in (("", describe_batches(settings, processes) | notes), ("GPU memory", _format_sizes(held))):
        table = Table(title=title or None, box=None, pad_edge=False, show_header=False, title_justify="left")
        for name, value in rows.items():
            table.add_row(name, value)
        console.print(table)
        console.print()
    total, limit = sum(held.values()) / GB, settings.cluster.memory_gb
    if total > limit:
        raise UserError(
            f"{total:.1f} GB are needed of a GPU, and cluster.memory_gb is {limit:g}: more processes, more of "
            "parallel.expert or parallel.pipeline, parallel.recompute=full, fewer trainer.tokens_per_micro_batch or "
            "rollout.max_total_tokens, or servers elsewhere (rollout.urls) make it less"
        )


def _format_sizes(held: dict[str, float]) -> dict[str, str]:
    return {name: f"{size / GB:7.2f} GB" for name, size in (held | {"total": sum(held.values())}).items()}
