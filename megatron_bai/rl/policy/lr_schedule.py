"""The learning rate and the weight decay of each update, as Megatron-Core's scheduler sets them."""

from typing import Any

from megatron_bai import config
from megatron_bai.config.limits import validate_group
from megatron_bai.errors import UserError


def validate(settings: config.Config) -> None:
    """Refuse a schedule that Megatron-Core's scheduler would refuse, or read as another.

    Raises:
        UserError: names the setting.
    """
    trainer = settings.trainer
    validate_group("trainer", trainer)
    if trainer.min_learning_rate and trainer.decay == "constant":
        raise UserError("trainer.min_learning_rate needs a trainer.decay that ends there: constant never falls")
    if trainer.min_learning_rate > trainer.learning_rate:
        raise UserError(
            f"trainer.min_learning_rate ({trainer.min_learning_rate}) is above trainer.learning_rate "
            f"({trainer.learning_rate})"
        )


def set_learning_rate(optimizer: Any, trainer: config.Trainer, update: int, updates: int) -> float:
    """Set learning rate and weight decay, which the update's index alone decides: no checkpoint has them.

    Weights of one dimension (norms) and biases do not decay: Megatron-Core marks their groups, and its scheduler acts
    on the mark.

    Args:
        optimizer: Megatron-Core's.
        trainer: settings of the schedule.
        update: index in the run, from 0.
        updates: number of updates of the whole run; the decay ends at the last.

    Returns:
        The learning rate.
    """
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=trainer.learning_rate,
        min_lr=trainer.min_learning_rate,
        lr_warmup_steps=trainer.warmup_updates,
        lr_decay_steps=max(updates, trainer.warmup_updates + 1),
        lr_decay_style=trainer.decay,
        start_wd=trainer.weight_decay,
        end_wd=trainer.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    scheduler.step(update + 1)
    rate: float = scheduler.get_lr({})
    return rate
