"""The verb `train`: supervised or reinforcement learning, as the objective says."""

from megatron_bai import config


def run(settings: config.Config) -> None:
    """Train as configured.

    Raises:
        UserError: anything that stops the run, in one line.
    """
    from megatron_bai.rl import objectives, sft_trainer, trainer

    if objectives.check(settings.objective).rollouts:
        trainer.train(settings)
    else:
        sft_trainer.train_sft(settings)
