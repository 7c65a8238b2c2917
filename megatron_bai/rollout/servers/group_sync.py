"""Weights of a trainer of many ranks to its servers, each bucket from the rank that has gathered it."""

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist

from megatron_bai.distributed.rank_group import current_ranks
from megatron_bai.model.gather import drained
from megatron_bai.model.hf_gather import TensorInfo
from megatron_bai.rollout.servers.broadcast_transport import SenderGroup, Sending, ServerGroups, join_groups
from megatron_bai.rollout.servers.weight_buckets import Bucket, Coverage, Shapes, flatten_bucket, order_infos
from megatron_bai.rollout.servers.weight_sync import tensor_update


class GroupSync:
    """The process groups of all ranks that send weights. Its constructor and `send` are *collective*.

    Args:
        urls: of the servers.
        sizes: tensor-parallel ranks of each.
        host: an address of rank 0's machine that the servers and the other senders reach.
        device: this rank's.
        senders: the ranks that send, rank 0 among them or not, in order.
        timeout_s: of the longest wait for a server.

    Raises:
        UserError: a server does not join.
    """

    def __init__(
        self,
        urls: Sequence[str],
        sizes: Sequence[int],
        host: str,
        device: torch.device,
        senders: Sequence[int],
        timeout_s: float = 600.0,
    ):
        ranks = current_ranks()
        self._urls, self._number = list(urls), {rank: number for number, rank in enumerate(senders)}
        self._groups: ServerGroups | None = None
        self._own: SenderGroup | None = None

        def open_store() -> Any:
            self._groups = ServerGroups(urls, sizes, host, device, len(senders), timeout_s)
            return self._groups.address

        address = ranks.run_on_first(open_store)

        def join() -> None:
            self._own = join_groups(self._groups, address, self._number.get(ranks.rank), device, timeout_s)

        ranks.run_on_all(join)

    def send(
        self,
        plan: Sequence[tuple[int, Sequence[TensorInfo]]],
        buckets: Iterator[Bucket | None],
        version: str,
        expected: Shapes,
        unchanged: Collection[str] = (),
    ) -> None:
        """Send the servers weights; from then on their samples carry `version`. *Collective*.

        Each sender gathers its next bucket while its last one is sent. A failure on the way leaves servers with some of
        the new weights: they stay paused, and sample nothing.

        Args:
            plan: the sender of each bucket and its tensors, equal on every rank.
            buckets: the tensors of each on its sender, None elsewhere. Its other ranks wait for this one: it is
                consumed to its end whatever happens.
            version: a name for the weights.
            expected: names and shapes of the model served.
            unchanged: names that are in no bucket, since the servers have those tensors.

        Raises:
            UserError: as `weight_sync.sync_from_tensors`, on every rank.
        """

        def take_part() -> None:
            with drained(buckets):
                try:
                    if self._groups is not None:
                        self._direct(plan, buckets, version, Coverage(version, expected, unchanged))
                    else:
                        self._send_own(plan, buckets, None)
                except BaseException as error:
                    if self._own is not None:
                        self._own.report_failure(f"weight sync {version}: rank {dist.get_rank()} failed: {error}")
                    raise

        current_ranks().run_on_all(take_part)

    def _direct(
        self,
        plan: Sequence[tuple[int, Sequence[TensorInfo]]],
        buckets: Iterator[Bucket | None],
        version: str,
        coverage: Coverage,
    ) -> None:
        """Do rank 0's part: have the servers receive the buckets in turn, and send those that are its own."""
        assert self._groups is not None
        for _, infos in plan:
            for info in infos:
                coverage.add(info.name, info.shape)
        coverage.require_complete()
        with tensor_update(self._urls, version):
            loading = self._groups.start_loading([(self._number[rank], order_infos(infos)) for rank, infos in plan])
            self._send_own(plan, buckets, loading)
            if self._own is not None:
                self._own.wait_until(loading.done, loading)
            loading.result()

    def _send_own(
        self,
        plan: Sequence[tuple[int, Sequence[TensorInfo]]],
        buckets: Iterator[Bucket | None],
        loading: Future[Any] | None,
    ) -> None:
        """Broadcast the buckets that this rank has, each while the next one is gathered."""
        sending: Sending | None = None
        spare: torch.Tensor | None = None  # what was sent before that; one is filled while the other is sent
        for rank, infos in plan:
            # No variable holds the tensors while the next are gathered
            flat = _flatten_planned(next(buckets), infos, spare)
            if flat is None:
                continue
            assert self._own is not None and rank == dist.get_rank(), "a bucket is with its sender"
            if sending is not None:
                self._own.finish(sending, loading)
                spare = sending.flat
            sending = self._own.broadcast(flat)
            del flat
        if sending is not None and self._own is not None:
            self._own.finish(sending, loading)

    def close(self) -> None:
        """Make the servers leave the groups, as far as they still answer. Not collective."""
        if self._groups is not None:
            self._groups.close()


def _flatten_planned(
    bucket: Bucket | None, infos: Sequence[TensorInfo], buffer: torch.Tensor | None
) -> torch.Tensor | None:
    """Return a bucket's bytes, where this rank has it; in `buffer`, if that is large enough.

    Raises:
        RuntimeError: it does not have the planned tensors, which the servers were told of.
    """
    if bucket is None:
        return None
    flat, found = flatten_bucket(bucket, buffer)
    if found != order_infos(infos):
        raise RuntimeError(f"a bucket of {len(found)} tensors, first {found[0].name}, is not as it was planned")
    return flat
