"""A family's published checkpoint is the same function in SGLang, also after weights were sent in small pieces."""

import base64
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model.families import published
from safetensors.torch import load_file, save_file

from megatron_bai.config import Rollout
from megatron_bai.model.architecture import read_architecture
from megatron_bai.rollout.servers import control, weight_sync
from megatron_bai.rollout.servers.sglang_server import SGLangServer

pytestmark = [pytest.mark.live, pytest.mark.long, pytest.mark.usefixtures("forked_servers")]
SERVED = ("deepseek_v3", "glm4_moe", "gpt_oss", "kimi_k2", "moonlight")
ROLLOUT = Rollout(dtype="float32", deterministic=True, max_total_tokens=2048, max_running_requests=8)
TOLERANCE = 5e-6  # nats, of float32
NEW = 12
BUCKET_BYTES = 1 << 12


def other_weights(directory: Path, target: Path) -> Path:
    """Copy a checkpoint with other values, as training would leave them."""
    target.mkdir()
    (target / "config.json").write_bytes((directory / "config.json").read_bytes())
    generator = torch.Generator().manual_seed(9)
    tensors = load_file(directory / "model.safetensors")
    moved = {key: each + 0.05 * torch.randn(each.shape, generator=generator) for key, each in tensors.items()}
    save_file(moved, target / "model.safetensors", {"format": "pt"})
    return target


def require_same(server: SGLangServer, name: str, directory: Path) -> None:
    """Compare the log-probabilities and routes of some responses with the reference's."""
    model, prompts = read_architecture(directory), published.tokens_of(name)[:, :9]
    body: dict[str, Any] = {
        "sampling_params": {"max_new_tokens": NEW, "temperature": 1.0, "ignore_eos": True},
        "return_logprob": True,
        "return_routed_experts": True,
    }
    replies = [control.post(server.url, "/generate", body | {"input_ids": prompt}) for prompt in prompts.tolist()]
    tokens = torch.cat([prompts, torch.tensor([reply["output_ids"] for reply in replies])], 1)
    wanted, routes = published.logprobs(name, directory, tokens=tokens)
    columns, moe = model.family.route_columns(model)
    for i, reply in enumerate(replies):
        found = np.array([each[0] for each in reply["meta_info"]["output_token_logprobs"]])
        assert np.abs(found - wanted[i, prompts.shape[1] - 1 : -1].numpy()).max() <= TOLERANCE
        served = np.frombuffer(base64.b64decode(reply["meta_info"]["routed_experts"]), "<i4")
        served = served.reshape(tokens.shape[1] - 1, columns, model.moe_topk)[:, list(moe)]
        assert np.array_equal(np.sort(served, -1), routes[i, :-1].sort(-1).values.numpy())


@pytest.mark.parametrize("name", SERVED)
def test_a_server_computes_what_the_reference_does_before_and_after_a_sync(name: str, tmp_path: Path) -> None:
    first = published.make(name, tmp_path / "first")
    second = other_weights(first, tmp_path / "second")
    model = read_architecture(first)

    def kept(each: str) -> bool:
        return not model.family.is_dropped(each, model)

    shapes = {key: shape for key, shape in weight_sync.tensor_shapes(first).items() if kept(key)}
    weights = {key: tensor for key, tensor in load_file(second / "model.safetensors").items() if kept(key)}
    rollout = replace(ROLLOUT, sync="tensors")
    with SGLangServer(first, rollout, tmp_path / "server.log") as server:
        require_same(server, name, first)
        transport = weight_sync.HttpTransport([server.url], [1])
        weight_sync.sync_from_tensors(
            [server.url], sorted(weights.items()), "v1", shapes, transport, BUCKET_BYTES, model.family.loaded_together
        )
        require_same(server, name, second)
