"""One real SGLang server on this machine's CPU for all live tests, serving a tiny random Qwen3-MoE."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import LENGTH, ROLLOUT, SIGNATURE, VOCAB, save_tiny

from megatron_bai.rollout.client import RolloutClient
from megatron_bai.rollout.route_format import RouteFormat
from megatron_bai.rollout.servers.sglang_server import SGLangServer
from megatron_bai.rollout.servers.weight_sync import sync_from_disk, tensor_shapes


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two sets of weights of one model, by version."""
    root = tmp_path_factory.mktemp("models")
    return {version: save_tiny(root / version, seed) for seed, version in enumerate(("v0", "v1"))}


@pytest.fixture(scope="session")
def server(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangServer]:
    with SGLangServer(checkpoints["v0"], ROLLOUT, tmp_path_factory.mktemp("server") / "sglang.log") as running:
        yield running


@pytest.fixture
def client(server: SGLangServer) -> Callable[..., RolloutClient]:
    """Makes a client with the given `Rollout` settings changed."""

    def make(**changes: object) -> RolloutClient:
        return RolloutClient([server.url], replace(ROLLOUT, **changes), RouteFormat(SIGNATURE), VOCAB, LENGTH)

    return make


@pytest.fixture
def serving(server: SGLangServer, checkpoints: dict[str, Path]) -> Callable[[str], None]:
    """Brings a version's weights to the server; tests that depend on the weights ask for theirs first."""
    return lambda version: sync_from_disk(
        [server.url], checkpoints[version], version, tensor_shapes(checkpoints[version])
    )
