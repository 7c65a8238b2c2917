"""A weight update is checked before it is sent, ordered, proven, and always lets the server go on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from fake_sglang import serve
from safetensors.numpy import save_file

from megatron_bai.errors import UserError
from megatron_bai.rollout.servers.weight_sync import check_shapes, sync_from_disk, tensor_shapes


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
