"""The actor's weights out of the ranks' memory to the servers (`rollout.sync=tensors` and `group`)."""

from collections.abc import Iterator, Sequence

import torch

from megatron_bai.distributed.hosts import is_loopback, is_multi_host
from megatron_bai.distributed.rank_group import current_ranks
from megatron_bai.model.gather import drained
from megatron_bai.model.hf_gather import HFBucket, HFGather
from megatron_bai.rl.session import Session
from megatron_bai.rollout.servers import weight_sync
from megatron_bai.rollout.servers.fleet import FleetInfo
from megatron_bai.rollout.servers.group_sync import GroupSync
from megatron_bai.rollout.servers.quantize import fake_quantize
from megatron_bai.rollout.servers.weight_buckets import Bucket, Shapes


class MemorySync:
    """Sends the actor's weights as tensors. `send` is *collective*.

    Args:
        session: of the run.
        servers: addresses and layouts.
        shapes: names and shapes of the model that they serve.
    """

    def __init__(self, session: Session, servers: FleetInfo, shapes: Shapes):
        self._session, self._servers, self._shapes = session, servers, shapes
        self._gather: HFGather | None = None
        self._group: GroupSync | None = None
        self._http: weight_sync.HttpTransport | None = None

    def send(self, version: str, have_previous: bool) -> None:
        """Send the weights, and wait until all servers use them. *Collective*.

        Args:
            version: a name for the weights.
            have_previous: all servers have what was sent last, so that what has not changed since is left out.

        Raises:
            UserError: a server refused, broke, or does not report `version`.
        """
        actor, rollout = self._session.actor, self._session.settings.rollout
        if self._gather is None:
            num_senders = choose_senders(rollout.sync, rollout.sync_host, rollout.sync_senders)
            self._gather = HFGather(actor.modules, actor.architecture, self._bucket_bytes(), num_senders)
        unchanged = self._gather.find_unchanged()
        everything, plan = self._gather.plan(), self._gather.plan(unchanged if have_previous else ())
        left_out = _names(everything) - _names(plan)
        if rollout.sync == "group":
            self._send_through_groups(self._gather, everything, plan, version, left_out)
        else:
            self._send_over_http(self._gather, plan, version, left_out)

    def _bucket_bytes(self) -> int:
        return self._session.settings.rollout.sync_bucket_mib << 20

    def _send_through_groups(
        self, gather: HFGather, everything: list[HFBucket], plan: list[HFBucket], version: str, left_out: set[str]
    ) -> None:
        """Send each bucket from the rank that gathers it. Collective."""
        if self._group is None:
            servers, device = self._servers, self._session.device.device
            senders = sorted({bucket.gather.collector for bucket in everything})
            host = self._session.settings.rollout.sync_host
            self._group = GroupSync(servers.urls, servers.tp_sizes, host, device, senders)
        buckets = self._iter_buckets(gather, plan)
        planned = [(bucket.gather.collector, bucket.tensors) for bucket in plan]
        self._group.send(planned, buckets, version, self._shapes, left_out)

    def _send_over_http(self, gather: HFGather, plan: list[HFBucket], version: str, left_out: set[str]) -> None:
        """Send all of them from rank 0. Collective."""
        buckets = self._iter_buckets(gather, plan)

        def take_part() -> None:
            with drained(buckets):
                if self._session.is_rank_0:
                    servers, family = self._servers, self._session.actor.architecture.family
                    self._http = self._http or weight_sync.HttpTransport(servers.urls, servers.tp_sizes)
                    weight_sync.sync_from_tensors(
                        servers.urls, _join(buckets), version, self._shapes, self._http, self._bucket_bytes(),
                        family.loaded_together, left_out,
                    )  # fmt: skip

        current_ranks().run_on_all(take_part)

    def _iter_buckets(self, gather: HFGather, plan: list[HFBucket]) -> Iterator[Bucket | None]:
        """Yield the tensors of each bucket as servers get them, where this rank has it. Collective."""
        with drained(gather.iter_buckets(plan)) as buckets:
            for _ in plan:  # no variable holds the last bucket while the next one is gathered
                yield self._quantize(next(buckets)[1])
            assert next(buckets, None) is None, "more buckets than planned"

    def _quantize(self, bucket: Bucket | None) -> Bucket | None:
        """Round weights as the settings have it; None stays."""
        fmt = self._session.settings.rollout.quantize
        return bucket and [(name, fake_quantize(name, tensor, fmt)) for name, tensor in bucket]

    def close(self) -> None:
        """Leave the process groups shared with the servers, where there are any: the next sync begins anew."""
        if self._group is not None:
            self._group.close()
        self._group, self._gather, self._http = None, None, None


def choose_senders(sync: str, sync_host: str, sync_senders: int) -> int:
    """Return how many ranks may send weights.

    Over HTTP rank 0 alone does; and where the others are on machines that cannot reach `rollout.sync_host`.

    Args:
        sync: `rollout.sync`.
        sync_host: `rollout.sync_host`.
        sync_senders: `rollout.sync_senders`.
    """
    return sync_senders if sync == "group" and not (is_multi_host() and is_loopback(sync_host)) else 1


def _names(plan: Sequence[HFBucket]) -> set[str]:
    """Return the names of all tensors of a plan."""
    return {info.name for bucket in plan for info in bucket.tensors}


def _join(buckets: Iterator[Bucket | None]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of all buckets."""
    for bucket in buckets:
        yield from bucket or ()
