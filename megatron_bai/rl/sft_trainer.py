"""Supervised training of the checkpoints that a merge starts from."""

import time
from dataclasses import asdict
from pathlib import Path

from megatron_bai import config
from megatron_bai.checkpoint import manifest
from megatron_bai.errors import UserError
from megatron_bai.model import megatron_checkpoint
from megatron_bai.model.router_losses import mend_router
from megatron_bai.monitor.metrics.router_metrics import compute_load_metrics
from megatron_bai.monitor.run_log import RunLog
from megatron_bai.rl import init_weights, objectives
from megatron_bai.rl.batches.batch import from_sft
from megatron_bai.rl.batches.stages import TrainingBatch
from megatron_bai.rl.policy.lr_schedule import set_learning_rate
from megatron_bai.rl.policy.router_measurement import measure_routers
from megatron_bai.rl.run_architecture import plain_settings, resolve_architecture
from megatron_bai.rl.session import Session, open_session
from megatron_bai.rl.sft_fingerprint import describe_sft, list_differences, sft_fingerprint


def train_sft(settings: config.Config) -> None:
    """Train on the data's text and save to `trainer.save`.

    A complete checkpoint made with the same settings is left unchanged; one made with others is not overwritten.

    Raises:
        UserError: nowhere to save, settings that contradict each other, or a checkpoint in the way.
    """
    target = settings.trainer.save
    if not target:
        raise UserError("trainer.save is empty: say where the checkpoint goes")
    init_weights.validate_init(settings)
    init_weights.require_sources(settings)
    resolved = resolve_architecture(settings)
    settings = plain_settings(resolved)
    info = manifest.read_info(target)
    if info is not None:
        if differences := list_differences(info, settings):
            raise UserError(
                f"{target} was made with other settings: remove it or choose another run.name "
                f"({'; '.join(differences)})"
            )
        print(f"{target} is complete: nothing to do")  # noqa: T201, the verb's result
        return
    made = {"made_by": sft_fingerprint(settings), "made_with": describe_sft(settings)}
    with open_session(resolved) as session:
        _run_steps(session)
        info = {**made, "data": asdict(settings.data), "steps": settings.trainer.steps}
        megatron_checkpoint.save(session.actor, target, session.tokenizer_dir, info)
        if session.is_rank_0:
            print(f"saved {target}")  # noqa: T201, the verb's result


def _run_steps(session: Session) -> None:
    """Make `trainer.steps` updates, and log their metrics. Collective."""
    settings = session.settings
    objective, replay = objectives.get(settings.objective.name), session.engine.replay
    for router in replay.routers.values():
        mend_router(router)
    directory = Path(settings.run.dir) / f"{Path(settings.trainer.save).name}-log"
    with RunLog(directory, settings, settings.trainer.steps, active=session.is_rank_0) as progress:
        for step in range(settings.trainer.steps):
            start = time.monotonic()
            rate = set_learning_rate(session.actor.optimizer, settings.trainer, step, settings.trainer.steps)
            micro_batches = _sft_batch(session, step).split(settings.trainer.micro_batch_size)
            with measure_routers(replay.routers, replay.columns) as router_stats:
                stats, norm = session.engine.update(
                    micro_batches, None, objective, settings.objective, mask_padding=True
                )
            values = stats.gather_sum(session.reports_stats).values()
            router_stats = router_stats.gather_sum(True)
            values |= router_stats.values() | compute_load_metrics(router_stats, session.signature.num_experts)
            seconds = time.monotonic() - start
            progress.log_step(
                {"step": step + 1, **values, "grad_norm": norm, "learning_rate": rate, "seconds_step": seconds},
                ("loss", "grad_norm"),
            )


def _sft_batch(session: Session, step: int) -> TrainingBatch:
    """Build this data-parallel rank's rows of a step's batch."""
    supervised = session.settings.supervised
    rows, size = supervised.rows, session.dp_size
    tokens, target = session.task.supervised_batch(session.settings.run.seed, step, rows, supervised.length)
    local_rows = slice(session.dp_rank * rows // size, (session.dp_rank + 1) * rows // size)
    return from_sft(tokens[local_rows], target[local_rows].astype(bool))
