"""One real SGLang server on this machine's CPU for all live tests, serving a tiny random Qwen3-MoE."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_bai.config import Rollout
from megatron_bai.rollout.client import RolloutClient
from megatron_bai.rollout.server import SGLangServer
from megatron_bai.rollout.sync import sync_from_disk
from megatron_bai.routing.routes import RouteSignature

VOCAB, LENGTH, STOP = 64, 128, 1
SIGNATURE = RouteSignature(moe_layers=3, num_experts=8, topk=2)
ROLLOUT = Rollout(max_new_tokens=32, max_total_tokens=8192, request_timeout_s=60.0)


def save_tiny(path: Path, seed: int, **changes: int) -> Path:
    """Save a random Qwen3-MoE whose logits are spread enough to be worth comparing (2 nats)."""
    settings = dict(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=SIGNATURE.moe_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=SIGNATURE.num_experts,
        num_experts_per_tok=SIGNATURE.topk,
        norm_topk_prob=True,
        max_position_embeddings=LENGTH,
        initializer_range=0.2,
        eos_token_id=STOP,
        bos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**(settings | changes))).save_pretrained(path)
    return path


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
        return RolloutClient(server.url, replace(ROLLOUT, **changes), SIGNATURE, VOCAB, LENGTH)

    return make


@pytest.fixture
def serving(server: SGLangServer, checkpoints: dict[str, Path]) -> Callable[[str], None]:
    """Brings a version's weights to the server; tests that depend on the weights ask for theirs first."""
    return lambda version: sync_from_disk(server.url, checkpoints[version], version, server.tensors)
