"""A weight update is checked before it is sent, ordered, proven, and always lets the server go on."""

import asyncio
import io
import pickle
import pickletools
import shutil
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from aiohttp import web
from fake_sglang import serve
from model.families import published
from safetensors.numpy import save_file
from weight_receiver import RANKS, WeightReceiver, digests, unflatten

from megatron_bai.errors import UserError
from megatron_bai.model.architecture import Architecture, read_architecture
from megatron_bai.model.hf_mapping import slice_indices
from megatron_bai.rollout.servers.broadcast_transport import BroadcastTransport
from megatron_bai.rollout.servers.weight_buckets import pickle_bucket
from megatron_bai.rollout.servers.weight_sync import (
    HttpTransport,
    check_shapes,
    sync_from_disk,
    sync_from_tensors,
    tensor_shapes,
)


class Server:
    """Answers the control endpoints; `failing` names one that does not work."""

    def __init__(self, failing: str = "", version: str = "v1"):
        self.failing, self.version = failing, version
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, request: web.Request, body: dict[str, Any]) -> Any:
        self.calls.append((request.path, body))
        if request.path == self.failing:
            return web.Response(status=400, text="did not work")
        if request.path == "/flush_cache":
            return web.Response(text="Cache flushed.")
        return {"weight_version": self.version}

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.calls]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_file({"a": np.zeros((2, 3), np.float32)}, tmp_path / "model-1.safetensors")
    save_file({"b": np.zeros(4, np.float32)}, tmp_path / "model-2.safetensors")
    return tmp_path


def test_reads_shapes_of_every_shard(checkpoint: Path) -> None:
    assert tensor_shapes(checkpoint) == {"a": (2, 3), "b": (4,)}


def test_order_of_an_update(checkpoint: Path) -> None:
    server = Server()
    with serve(server) as url:
        sync_from_disk([url], checkpoint, "v1", tensor_shapes(checkpoint))
    assert server.paths == [
        "/pause_generation",
        "/flush_cache",
        "/update_weights_from_disk",
        "/flush_cache",
        "/continue_generation",
        "/model_info",
    ]
    assert server.calls[0][1] == {"mode": "abort"}
    assert server.calls[2][1] == {"model_path": str(checkpoint), "weight_version": "v1", "flush_cache": False}


@pytest.mark.parametrize("failing", ["/pause_generation", "/flush_cache", "/update_weights_from_disk"])
def test_the_server_goes_on_after_a_failure(checkpoint: Path, failing: str) -> None:
    server = Server(failing)
    with serve(server) as url, pytest.raises(UserError, match=rf"{url} refused {failing}.* 400: did not work"):
        sync_from_disk([url], checkpoint, "v1", tensor_shapes(checkpoint))
    assert server.paths[-2:] == [failing, "/continue_generation"]


def test_a_server_that_stays_paused_is_an_error(checkpoint: Path) -> None:
    with serve(Server("/continue_generation")) as url, pytest.raises(UserError, match="refused /continue_generation"):
        sync_from_disk([url], checkpoint, "v1", tensor_shapes(checkpoint))


def test_the_version_must_arrive(checkpoint: Path) -> None:
    with serve(Server(version="v0")) as url, pytest.raises(UserError, match="reports weights 'v0' after .* to 'v1'"):
        sync_from_disk([url], checkpoint, "v1", tensor_shapes(checkpoint))


def test_another_models_checkpoint_is_not_sent(checkpoint: Path) -> None:
    server = Server()
    with serve(server) as url, pytest.raises(UserError, match=r"b has shape \(4,\) for \(5,\) \(1 such"):
        sync_from_disk([url], checkpoint, "v1", {"a": (2, 3), "b": (5,)})
    assert server.paths == []


def test_names_what_is_missing_or_unknown() -> None:
    with pytest.raises(UserError, match="here is not the served model: a is missing"):
        check_shapes({"b": (1,)}, {"a": (1,), "b": (1,)}, "here")
    with pytest.raises(UserError, match="b is unknown"):
        check_shapes({"a": (1,), "b": (1,)}, {"a": (1,)}, "here")


def test_refuses_a_directory_without_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no safetensors"):
        tensor_shapes(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        tensor_shapes(tmp_path)


def test_nobody_there(checkpoint: Path) -> None:
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9 does not answer /pause_generation"):
        sync_from_disk(["http://127.0.0.1:9"], checkpoint, "v1", tensor_shapes(checkpoint))


class Recorder:
    """A weight transport that notes the names of each bucket."""

    def __init__(self) -> None:
        self.buckets: list[list[str]] = []

    def start(self, bucket: list[tuple[str, torch.Tensor]]) -> Any:
        self.buckets.append([name for name, _ in bucket])
        return lambda: None


def names_as_gathered(model: Architecture) -> list[str]:
    """A model's names in the order in which `gather.gather_slices` comes to them."""
    kinds = sorted(model.mappings.values(), key=lambda kind: kind.megatron)
    return [name for kind in kinds for index in slice_indices(kind, model) for name in kind.names(index)]


@pytest.mark.parametrize("bucket_bytes", [1, 64, 1 << 10, 1 << 30])
@pytest.mark.parametrize("name", ["deepseek_v3", "kimi_k2", "moonlight"])
def test_tensors_that_a_server_merges_as_they_come_are_never_in_two_requests(
    name: str, bucket_bytes: int, tmp_path: Path
) -> None:
    """SGLang forgets DeepSeek-V3's projections into latents where they come apart, with success."""
    shutil.copy(published.config_file(name), tmp_path / "config.json")
    model, recorder = read_architecture(tmp_path), Recorder()
    names, together = names_as_gathered(model), model.family.loaded_together
    tensors = {each: torch.zeros(4) for each in names}
    shapes = {each: (4,) for each in names}
    release = {"version": "0.5.20", "weight_version": "v1"}
    with serve(lambda request, body: release) as url:
        sync_from_tensors([url], tensors.items(), "v1", shapes, recorder, bucket_bytes, together)
    assert sorted(each for bucket in recorder.buckets for each in bucket) == sorted(names)
    for layer in range(model.num_layers):
        group = {f"model.layers.{layer}.self_attn.{each}" for each in together} & set(names)
        assert len(group) == (1 if model.values["q_lora_rank"] is None else len(together))
        assert any(group <= set(bucket) for bucket in recorder.buckets)


# Odd numbers of elements, two dtypes, a view across the rows of its storage, no axis
ODD = {
    "a": torch.arange(3, dtype=torch.bfloat16),
    "b": torch.arange(15, dtype=torch.float32).reshape(3, 5).t(),
    "c": torch.tensor(7, dtype=torch.bfloat16),
    "d": torch.arange(5, dtype=torch.float32),
    "e": torch.full((1, 1), 2, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("bucket_bytes", [1, 24, 1 << 20])
@pytest.mark.parametrize("way", ["tensors", "group"])
def test_every_rank_gets_every_bit_once_whatever_dtypes_share_a_bucket(way: str, bucket_bytes: int) -> None:
    """A float32 expert bias is among weights in bfloat16, and numbers of four bytes must lie at multiples of four."""
    server, shapes = WeightReceiver(), {name: tuple(tensor.shape) for name, tensor in ODD.items()}
    with serve(server) as url, ExitStack() as stack:
        if way == "tensors":
            transport = HttpTransport([url], [RANKS])
        else:
            transport = BroadcastTransport([url], [RANKS], "127.0.0.1", torch.device("cpu"), 60)
            stack.enter_context(closing(transport))
        sync_from_tensors([url], ODD.items(), "v1", shapes, transport, bucket_bytes)
    for rank in range(RANKS):
        received = [each for ranks in server.requests for each in ranks[rank]]
        assert sorted(received) == sorted(digests(ODD.items()))
    assert len(server.requests) == {1: len(ODD), 24: 3, 1 << 20: 1}[bucket_bytes]


class Leaving(WeightReceiver):
    """Its ranks end while they receive, and what is left of it answers some time after."""

    def update_weights_from_distributed(self, body: dict[str, Any]) -> Any:
        self.groups.clear()

        async def answer() -> web.Response:
            await asyncio.sleep(0.2)
            return web.Response(status=400, text="the scheduler has ended")

        return answer()


def test_a_server_that_ends_in_a_broadcast_is_named_in_one_line() -> None:
    large = {"a": torch.zeros(8 << 20)}  # more than the sockets hold
    with serve(Leaving()) as url:
        transport = BroadcastTransport([url], [RANKS], "127.0.0.1", torch.device("cpu"), 60)
        with closing(transport), pytest.raises(UserError, match="the scheduler has ended"):
            sync_from_tensors([url], large.items(), "v1", {"a": (8 << 20,)}, transport, 1 << 30)


def load_storage(data: bytes) -> Any:
    """What Megatron-Core puts in the place of torch's."""
    return torch.load(io.BytesIO(data), weights_only=True)


def test_a_pickle_names_torch_alone_whatever_loads_storages_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang unpickles no function that it does not know."""
    monkeypatch.setattr(torch.storage, "_load_from_bytes", load_storage)
    assert __name__.encode() in pickle.dumps(ODD)
    data = pickle_bucket(list(ODD.items()))
    words = [word for _, word, _ in pickletools.genops(data) if isinstance(word, str)]
    assert "_load_from_bytes" in words and __name__ not in words and "load_storage" not in words
    assert sorted(digests(unflatten(**pickle.loads(data)))) == sorted(digests(ODD.items()))
