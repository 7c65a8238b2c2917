"""Weights to SGLang servers through process groups that the trainer's sending ranks share with them (gloo or NCCL).

Each rank that sends has a group of its own, in which it is rank 0 and all ranks of all servers follow: SGLang receives
from rank 0 of a group alone. The trainer's rank 0 asks the servers to join the groups and to receive from them, one
bucket after another, so all servers wait for the same group at the same time.
"""

import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_bai.errors import UserError
from megatron_bai.model.hf_gather import TensorInfo
from megatron_bai.rollout.servers import control
from megatron_bai.rollout.servers.weight_buckets import Bucket, flatten_bucket
from megatron_bai.rollout.servers.weight_sync import on_all_servers

GROUP_NAME = "megatron_bai_weights"
_FAILED = "failed"  # key of the store: why a rank does not go on
_POLL_S, _POLL_FAILED_S = 0.001, 0.5
_ANSWER_S = 10.0  # for a server's answer to a request whose broadcast broke off


class GroupAddress(NamedTuple):
    """Where the groups' members find each other: the store's address, and what the groups have in common."""

    host: str
    port: int
    world: int
    backend: str
    servers: str  # names them in errors


class Sending(NamedTuple):
    """A broadcast under way, and its bytes, which must stay until it has ended."""

    work: Any
    flat: torch.Tensor


class SenderGroup:
    """A sending rank's process group with the servers. It is made when they join it.

    Args:
        address: from `ServerGroups`.
        sender: number of the sender, from 0.
        device: where what is sent lies.
        timeout_s: of a wait for the servers.

    Raises:
        UserError: a server does not join.
    """

    def __init__(self, address: GroupAddress, sender: int, device: torch.device, timeout_s: float):
        limit = timedelta(seconds=timeout_s)
        self._device, self._servers = device, address.servers
        try:
            self._store = dist.TCPStore(address.host, address.port, None, False, limit, wait_for_workers=False)
            self._group = _make_process_group(address.backend, _name(sender), self._store, address.world, limit)
        except RuntimeError as error:
            raise UserError(
                f"the servers {address.servers} do not join a process group at {address.host}: {error}"
            ) from None

    def broadcast(self, flat: torch.Tensor) -> Sending:
        """Start to send bytes to all servers.

        Args:
            flat: `[bytes]` uint8, which must stay as they are until it has ended.
        """
        flat = flat.to(self._device)
        return Sending(self._group.broadcast(flat, 0), flat)

    def finish(self, sending: Sending, loading: Future[Any] | None = None) -> None:
        """Wait until a broadcast has ended.

        Args:
            sending: of `broadcast`.
            loading: as in `wait_until`.

        Raises:
            UserError: as `wait_until`, or a server has gone.
        """
        self.wait_until(sending.work.is_completed, loading)
        try:
            sending.work.wait()
        except RuntimeError as error:  # a server has gone: what it, or its neighbour, answers says more
            if loading is not None:
                with suppress(TimeoutError):
                    loading.result(_ANSWER_S)
            raise UserError(f"a broadcast of weights to the servers {self._servers} broke off: {error}") from None

    def wait_until(self, is_done: Callable[[], bool], loading: Future[Any] | None = None) -> None:
        """Wait until something is done, unless a server refuses to take part in it, or another rank has failed.

        Args:
            is_done: asked again and again.
            loading: requests to the servers; their failure ends the waiting.

        Raises:
            UserError: why it will not be done.
        """
        next_look = time.monotonic() + _POLL_FAILED_S
        while not is_done():
            if loading is not None and loading.done() and loading.exception():
                loading.result()
            if time.monotonic() > next_look:
                if self._store.check([_FAILED]):
                    raise UserError(self._store.get(_FAILED).decode())
                next_look = time.monotonic() + _POLL_FAILED_S
            time.sleep(_POLL_S)

    def report_failure(self, reason: str) -> None:
        """Make the other senders stop waiting."""
        self._store.set(_FAILED, reason)


class ServerGroups:
    """The servers' side of the groups, as rank 0 of the trainer directs it.

    Args:
        urls: of the servers.
        sizes: tensor-parallel ranks of each, which are ranks of the groups, after the sender's.
        host: an address of this machine that the servers and the senders reach.
        device: the trainer's; the groups' backend is gloo on a CPU and NCCL on a GPU.
        num_senders: how many groups there are.

    Attributes:
        address: for the senders.

    Raises:
        UserError: `host` is no address of this machine.
    """

    def __init__(
        self,
        urls: Sequence[str],
        sizes: Sequence[int],
        host: str,
        device: torch.device,
        num_senders: int,
        timeout_s: float,
    ):
        self._urls, self._timeout_s, self._num_senders = list(urls), timeout_s, num_senders
        self._thread = ThreadPoolExecutor(1)  # for requests that the servers answer once the trainer has done its part
        limit, world = timedelta(seconds=timeout_s), 1 + sum(sizes)
        try:
            listener = socket.create_server((host, 0))  # by itself the store would listen on all networks
        except OSError as error:
            raise UserError(f"rollout.sync_host={host} is no address of this machine: {error.strerror}") from None
        port = listener.getsockname()[1]
        self._store = dist.TCPStore(
            host, port, world, is_master=True, timeout=limit, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        backend = "gloo" if device.type == "cpu" else "nccl"
        self.address = GroupAddress(host, self._store.port, world, backend, ", ".join(self._urls))
        self._offsets = {url: 1 + sum(sizes[:i]) for i, url in enumerate(self._urls)}

    def start_joining(self) -> Future[None]:
        """Start to make the servers join every group, one after another."""
        host, port, world, backend, _ = self.address

        def join(sender: int, url: str) -> None:
            address = {"master_address": host, "master_port": port, "backend": backend}
            body = {"rank_offset": self._offsets[url], "world_size": world, "group_name": _name(sender), **address}
            control.post(url, "/init_weights_update_group", body, self._timeout_s)

        def join_all() -> None:
            for sender in range(self._num_senders):
                on_all_servers(self._urls, partial(join, sender))

        return self._thread.submit(join_all)

    def start_loading(self, buckets: Sequence[tuple[int, Sequence[TensorInfo]]]) -> Future[None]:
        """Start to make the servers receive and load buckets, one after another.

        Args:
            buckets: the number of the sender of each, and what lies in its bytes, in order (`flatten_bucket`).
        """

        def load(sender: int, infos: Sequence[TensorInfo], url: str) -> None:
            body = {
                "names": [info.name for info in infos],
                "dtypes": [str(info.dtype).removeprefix("torch.") for info in infos],
                "shapes": [list(info.shape) for info in infos],
                "group_name": _name(sender),
                "load_format": "flattened_bucket",
                "flush_cache": False,
            }
            control.post(url, "/update_weights_from_distributed", body, self._timeout_s)

        def load_all() -> None:
            for sender, infos in buckets:
                on_all_servers(self._urls, partial(load, sender, infos))

        return self._thread.submit(load_all)

    def close(self) -> None:
        """Make the servers leave the groups, as far as they still answer."""

        def leave(url: str) -> None:
            for sender in range(self._num_senders):
                control.post(url, "/destroy_weights_update_group", {"group_name": _name(sender)})

        try:
            on_all_servers(self._urls, leave)
        except UserError:
            pass  # they ended before the trainer did
        self._thread.shutdown(wait=False, cancel_futures=True)


class BroadcastTransport:
    """A weight transport (`weight_sync.WeightTransport`) whose buckets are broadcasts from this process alone.

    Args:
        urls: of the servers.
        sizes: tensor-parallel ranks of each.
        host: an address of this machine that the servers reach.
        device: the trainer's.

    Raises:
        UserError: a server does not join.
    """

    def __init__(
        self, urls: Sequence[str], sizes: Sequence[int], host: str, device: torch.device, timeout_s: float = 600.0
    ):
        self._groups = ServerGroups(urls, sizes, host, device, 1, timeout_s)
        own = join_groups(self._groups, self._groups.address, 0, device, timeout_s)
        assert own is not None, "a sender has a group"
        self._own = own

    def start(self, bucket: Bucket) -> Callable[[], object]:
        """Start to send a bucket; it is copied before this returns."""
        flat, infos = flatten_bucket(bucket)
        loading = self._groups.start_loading([(0, infos)])
        sending = self._own.broadcast(flat)

        def wait() -> None:
            self._own.finish(sending, loading)
            loading.result()

        return wait

    def close(self) -> None:
        """Make the servers leave the group, as far as they still answer."""
        self._groups.close()


def join_groups(
    groups: ServerGroups | None, address: GroupAddress, sender: int | None, device: torch.device, timeout_s: float
) -> SenderGroup | None:
    """Make this rank's process group, while rank 0 makes the servers join those of all senders.

    Args:
        groups: on rank 0, which has asked nobody to join yet.
        address: of the groups.
        sender: this rank's number among the senders, or None.
        device: where what is sent lies.
        timeout_s: of the wait for the servers.

    Raises:
        UserError: a server does not join.
    """
    joining = groups.start_joining() if groups else None
    own = None
    try:
        own = None if sender is None else SenderGroup(address, sender, device, timeout_s)
    except UserError:
        if joining is not None and joining.done():
            joining.result()
        raise
    if joining is not None:
        joining.result()
    return own


def _name(sender: int) -> str:
    """Return the name of a sender's group."""
    return GROUP_NAME if sender == 0 else f"{GROUP_NAME}-{sender}"


def _make_process_group(backend: str, name: str, store: dist.Store, world: int, limit: timedelta) -> Any:
    """Make the process group as its rank 0, the trainer's sender.

    A group beside the default one has no public constructor, but its backend has. The store gets the prefixes that
    torch 2.13 and SGLang 0.5.21 give it (`init_custom_process_group`).
    """
    device = "cpu" if backend == "gloo" else "cuda"
    for prefix in (name, f"{name}/", f"{device}/"):
        store = dist.PrefixStore(prefix, store)
    if backend == "gloo":
        return dist.ProcessGroupGloo(store, 0, world, limit)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = limit
    return dist.ProcessGroupNCCL(store, 0, world, options)
