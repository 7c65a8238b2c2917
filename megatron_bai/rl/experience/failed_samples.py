"""Samples and rewards that failed: counted, reported in one line, and left out of the loss."""

import logging

import torch.distributed as dist

from megatron_bai.errors import UserError
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl.session import Session

_log = logging.getLogger(__name__)


def count_lost(session: Session, failures: list[str], stats: Stats) -> None:
    """Add `rollout_failed_fraction`, the share of lost samples, and log a line if there are any. Collective.

    `rollout.max_failed_fraction` bounded their number before.

    Args:
        session: of the run.
        failures: of this replica's samples, why each is lost, "" for those that are not.
        stats: gets the metric.
    """
    failed, total, first = _count_over_replicas(session, failures, "rollout_failed_fraction", stats)
    if failed and session.is_rank_0:
        _log.warning("%d of %d samples are lost and left out; first: %s", failed, total, first)


def count_failures(session: Session, failures: list[str], metric: str, stats: Stats) -> None:
    """Add `metric`, the share of samples without a reward, and log a line if there are any. Collective.

    Args:
        session: of the run.
        failures: of this replica's samples, why each has no reward, "" for those that have one.
        metric: name of the metric.
        stats: gets the metric.

    Raises:
        UserError: no sample of any replica has one.
    """
    failed, total, first = _count_over_replicas(session, failures, metric, stats)
    if not failed:
        return
    if failed == total:
        raise UserError(f"all {total} rewards of a step failed (reward={session.settings.reward.name}), first: {first}")
    if session.is_rank_0:
        name = session.settings.reward.name
        _log.warning(
            "%d of %d rewards failed (reward=%s), their samples are left out; first: %s", failed, total, name, first
        )


def _count_over_replicas(session: Session, failures: list[str], metric: str, stats: Stats) -> tuple[int, int, str]:
    """Return the number of failures and of samples in all replicas, and one reason. Collective."""
    reasons = list(filter(None, failures))
    stats.ratio(metric, len(reasons), len(failures))
    counts = (len(reasons), len(failures), reasons[0] if reasons else "") if session.is_replica_leader else (0, 0, "")
    gathered: list[tuple[int, int, str]] = [counts] * dist.get_world_size()
    dist.all_gather_object(gathered, counts)
    first = next((reason for _, _, reason in gathered if reason), "")
    return sum(failed for failed, _, _ in gathered), sum(total for _, total, _ in gathered), first
