"""The learning rate."""

from typing import Any

from megatron_bai import config


def set_learning_rate(optimizer: Any, trainer: config.Trainer, update: int) -> float:
    """Set and return the rate of an update, counted from 0: a linear rise over `warmup_updates`, then constant."""
    warmup = trainer.warmup_updates
    rate = trainer.learning_rate * (min(1.0, (update + 1) / warmup) if warmup else 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate
