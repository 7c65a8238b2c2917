"""Rewards that failed: counted, told in one line, and fatal only when there is no other."""

import sys

import torch.distributed as dist

from megatron_bai.errors import UserError
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl.session import Session


def count_failures(session: Session, failures: list[str], metric: str, stats: Stats) -> None:
    """Add `metric`, the share of samples without a reward, and print a line if there are any. Collective.

    Args:
        failures: of this replica's samples, why each has no reward, "" for those that have one.

    Raises:
        UserError: no sample of any replica has one.
    """
    reasons = list(filter(None, failures))
    stats.ratio(metric, len(reasons), len(failures))
    mine = (len(reasons), len(failures), reasons[0] if reasons else "") if session.leader else (0, 0, "")
    everyone: list[tuple[int, int, str]] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    failed, total = sum(each[0] for each in everyone), sum(each[1] for each in everyone)
    if not failed:
        return
    first = next(reason for _, _, reason in everyone if reason)
    if failed == total:
        raise UserError(f"all {total} rewards of a step failed (reward={session.settings.reward.name}), first: {first}")
    if session.lead:
        print(f"{failed} of {total} rewards failed, their samples are left out; first: {first}", file=sys.stderr)
