"""Weights to SGLang servers through a process group that the trainer's rank 0 shares with them (gloo or NCCL)."""

import socket
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_bai.errors import UserError
from megatron_bai.rollout.servers import control
from megatron_bai.rollout.servers.weight_sync import Bucket, on_all_servers

GROUP_NAME = "megatron_bai_weights"


class BroadcastTransport:
    """A weight transport (`weight_sync.WeightTransport`) whose buckets are broadcasts from the trainer.

    Args:
        urls: of the servers.
        sizes: tensor-parallel ranks of each, which are ranks of the group, after the trainer's.
        host: an address of this machine that the servers reach.
        device: the trainer's; the group's backend is gloo on a CPU and NCCL on a GPU.

    Raises:
        UserError: a server does not join.
    """

    def __init__(
        self, urls: Sequence[str], sizes: Sequence[int], host: str, device: torch.device, timeout_s: float = 600.0
    ):
        self._urls, self._device, self._timeout_s = list(urls), device, timeout_s
        self._thread = ThreadPoolExecutor(1)  # for requests that the servers answer once the trainer has done its part
        limit, world = timedelta(seconds=timeout_s), 1 + sum(sizes)
        backend = "gloo" if device.type == "cpu" else "nccl"
        try:
            listener = socket.create_server((host, 0))  # by itself the store would listen on all networks
        except OSError as error:
            raise UserError(f"rollout.sync_host={host} is no address of this machine: {error.strerror}") from None
        port = listener.getsockname()[1]
        self._store = dist.TCPStore(
            host, port, world, is_master=True, timeout=limit, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        offsets = {url: 1 + sum(sizes[:i]) for i, url in enumerate(self._urls)}

        def join(url: str) -> None:
            address = {"master_address": host, "master_port": self._store.port, "backend": backend}
            body = {"rank_offset": offsets[url], "world_size": world, "group_name": GROUP_NAME, **address}
            control.post(url, "/init_weights_update_group", body, timeout_s)

        joining = self._thread.submit(on_all_servers, self._urls, join)
        try:
            self._group = _make_process_group(backend, self._store, world, limit)
        except RuntimeError as error:
            if joining.done():
                joining.result()
            servers = ", ".join(self._urls)
            raise UserError(f"the servers {servers} do not join a process group at {host}: {error}") from None
        joining.result()

    def send(self, bucket: Bucket) -> None:
        """Send a bucket, and wait until every server has loaded it."""
        # SGLang views parts of one tensor of bytes as numbers, which must lie at multiples of their size: of two dtypes
        # the wider comes first, whatever number of elements the other has.
        bucket = sorted(bucket, key=lambda named: -named[1].element_size())
        body = {
            "names": [name for name, _ in bucket],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
            "shapes": [list(tensor.shape) for _, tensor in bucket],
            "group_name": GROUP_NAME,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }

        def post(url: str) -> None:
            control.post(url, "/update_weights_from_distributed", body, self._timeout_s)

        loading = self._thread.submit(on_all_servers, self._urls, post)
        flat = torch.cat([tensor.detach().flatten().view(torch.uint8) for _, tensor in bucket]).to(self._device)
        self._wait(self._group.broadcast(flat, 0), loading)
        loading.result()

    def _wait(self, sending: Any, loading: Future[Any]) -> None:
        """Wait until the broadcast has ended, or a server has answered why it takes no part in it."""
        while not sending.is_completed():
            if loading.done() and loading.exception():
                loading.result()
            time.sleep(0.001)
        sending.wait()

    def close(self) -> None:
        """Make the servers leave the group, as far as they still answer."""

        def leave(url: str) -> None:
            control.post(url, "/destroy_weights_update_group", {"group_name": GROUP_NAME})

        try:
            on_all_servers(self._urls, leave)
        except UserError:
            pass  # they ended before the trainer did
        self._thread.shutdown(wait=False, cancel_futures=True)


def _make_process_group(backend: str, store: dist.Store, world: int, limit: timedelta) -> Any:
    """Make the process group as its rank 0, the trainer.

    A group beside the default one has no public constructor, but its backend has. The store gets the prefixes that
    torch 2.13 and SGLang 0.5.21 give it (`init_custom_process_group`).
    """
    device = "cpu" if backend == "gloo" else "cuda"
    for prefix in (GROUP_NAME, f"{GROUP_NAME}/", f"{device}/"):
        store = dist.PrefixStore(prefix, store)
    if backend == "gloo":
        return dist.ProcessGroupGloo(store, 0, world, limit)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = limit
    return dist.ProcessGroupNCCL(store, 0, world, options)
