"""The verb `merge`: merge checkpoints into the one that RL starts from."""

from megatron_bai import config
from megatron_bai.utils.terminal_text import escape_controls


def run(settings: config.Config) -> None:
    """Merge as `settings.merge` says, under torchrun or alone, and print one line about it, or the plan.

    Raises:
        UserError: a setting, a source or a target does not allow the merge; the target is unchanged.
    """
    from megatron_bai.distributed.rank_group import merge_ranks
    from megatron_bai.merge.pipeline import run_merge

    with merge_ranks() as ranks:
        text = run_merge(settings.merge, ranks)
        if ranks.rank == 0:
            print(escape_controls(text))
