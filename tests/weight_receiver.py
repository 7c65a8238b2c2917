"""A server that keeps the digests of all weights that it is sent, by any way, as each of its ranks gets them."""

import base64
import hashlib
import pickle
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from aiohttp import web
from safetensors.torch import load_file

from megatron_bai.compat.releases import SGLANG

RANKS = 2
Digest = tuple[str, str, tuple[int, ...], str]  # name, dtype, shape, SHA-256 of the bytes
Named = Iterable[tuple[str, torch.Tensor]]
LIMIT = timedelta(seconds=120)
SERVER_INFO = {
    "version": SGLANG,
    "tp_size": RANKS,
    "enable_return_routed_experts": True,
    "enable_deterministic_inference": True,
}


def digests(named: Named) -> list[Digest]:
    """Return what two tensors must have in common to be the same bit for bit."""
    found = []
    for name, tensor in named:
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        found.append((name, str(tensor.dtype), tuple(tensor.shape), hashlib.sha256(data).hexdigest()))
    return found


def unflatten(flattened_tensor: torch.Tensor, metadata: list[Any]) -> Named:
    """Split what came in a request as SGLang does."""
    for each in metadata:
        assert each.numel == each.end_idx - each.start_idx
        yield each.name, flattened_tensor[each.start_idx : each.end_idx].view(each.dtype).reshape(each.shape)


class WeightReceiver:
    """A handler for `fake_sglang.serve`. Tensors outside a session are refused, as is what no weight sync says.

    Attributes:
        requests: the tensors of each request since the last `take`, on each rank.
    """

    def __init__(self) -> None:
        self.requests: list[list[list[Digest]]] = []
        self.version, self.in_session = "", False
        self.groups: dict[str, list[Any]] = {}

    def take(self) -> list[list[list[Digest]]]:
        """Return the requests and forget them."""
        found, self.requests = self.requests, []
        return found

    def __call__(self, request: web.Request, body: dict[str, Any]) -> Any:
        if (handle := getattr(self, request.path.strip("/"), None)) is None:
            return web.Response(status=404)
        return handle(body) or {"success": True}

    def server_info(self, body: dict[str, Any]) -> dict[str, Any]:
        return SERVER_INFO

    def model_info(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"weight_version": self.version}

    def pause_generation(self, body: dict[str, Any]) -> None:
        assert not self.in_session

    def flush_cache(self, body: dict[str, Any]) -> None:
        """Nothing is cached here."""

    continue_generation = pause_generation

    def begin_weight_update(self, body: dict[str, Any]) -> None:
        assert not self.in_session
        self.in_session = True

    def end_weight_update(self, body: dict[str, Any]) -> None:
        assert self.in_session
        self.in_session = False

    def update_weight_version(self, body: dict[str, Any]) -> None:
        self.version = body["new_version"]

    def update_weights_from_disk(self, body: dict[str, Any]) -> None:
        files = sorted(Path(body["model_path"]).glob("*.safetensors"))
        self.requests.append([digests(item for file in files for item in load_file(file).items())] * RANKS)
        self.version = body["weight_version"]

    def update_weights_from_tensor(self, body: dict[str, Any]) -> None:
        assert self.in_session
        assert body["load_format"] == "flattened_bucket"
        ranks = [pickle.loads(base64.b64decode(each)) for each in body["serialized_named_tensors"]]
        self.requests.append([digests(unflatten(**each)) for each in ranks])

    def init_weights_update_group(self, body: dict[str, Any]) -> None:
        """Join as torch and SGLang 0.5.21 do, every rank at once."""
        host, port, world, name = (body[key] for key in ("master_address", "master_port", "world_size", "group_name"))
        assert body["backend"] == "gloo" and world == body["rank_offset"] + RANKS

        def join(rank: int) -> Any:
            store: dist.Store = dist.TCPStore(host, port, world, is_master=False, timeout=LIMIT)
            for prefix in (name, f"{name}/", "cpu/"):
                store = dist.PrefixStore(prefix, store)
            return dist.ProcessGroupGloo(store, body["rank_offset"] + rank, world, LIMIT)

        with ThreadPoolExecutor(RANKS) as pool:
            self.groups[name] = list(pool.map(join, range(RANKS)))

    def update_weights_from_distributed(self, body: dict[str, Any]) -> None:
        """Split the bytes as SGLang's `FlattenedTensorBucket` does, which cannot read a number at any offset."""
        assert self.in_session and body["load_format"] == "flattened_bucket"
        kinds = [
            (name, getattr(torch, dtype), torch.Size(shape))
            for name, dtype, shape in zip(body["names"], body["dtypes"], body["shapes"], strict=True)
        ]
        sizes = [dtype.itemsize * shape.numel() for _, dtype, shape in kinds]

        def receive(group: Any) -> list[Digest]:
            flat = torch.empty(sum(sizes), dtype=torch.uint8)
            group.broadcast(flat, 0).wait()
            pieces = zip(kinds, flat.split(sizes), strict=True)
            return digests((name, piece.view(dtype).reshape(shape)) for (name, dtype, shape), piece in pieces)

        with ThreadPoolExecutor(RANKS) as pool:
            self.requests.append(list(pool.map(receive, self.groups[body["group_name"]])))

    def destroy_weights_update_group(self, body: dict[str, Any]) -> None:
        del self.groups[body["group_name"]]
