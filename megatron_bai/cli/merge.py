"""The verb `merge`: merge checkpoints into the one that RL starts from."""

from megatron_bai import config


def run(settings: config.Config) -> None:
    """Merge as `settings.merge` says, under torchrun or alone.

    Raises:
        UserError: a setting, a source or a target does not allow the merge; the target is as it was.
    """
    from megatron_bai.merge import pipeline

    pipeline.run(settings)
