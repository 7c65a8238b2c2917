"""What SGLang serves is accepted; what it does not is refused by name, before a server starts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model.families import published
from moe import MODEL

from megatron_bai import config
from megatron_bai.compat import sglang_dense_layers
from megatron_bai.errors import UserError
from megatron_bai.model import hf_checkpoint
from megatron_bai.model.architecture import Architecture, differences, read_architecture, require_served
from megatron_bai.model.families.qwen3_moe import Qwen3Moe
from megatron_bai.model.hf_config_file import hf_config, write_config
from megatron_bai.rl.validate_settings import validate_settings


def architecture(directory: Path, **changes: object) -> Architecture:
    content = hf_checkpoint.hf_config(MODEL, torch.float32) | changes
    (directory / "config.json").write_text(json.dumps(content))
    return read_architecture(directory)


@pytest.mark.parametrize(
    "changes", [{"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}, {"tie_word_embeddings": True}]
)
def test_dense_layers_and_tied_embeddings_are_served(changes: dict, tmp_path: Path) -> None:
    model = architecture(tmp_path, **changes)
    require_served(model)
    validate_settings(config.Config(model=replace(model, max_position_embeddings=2048)))


def test_a_family_that_sglang_lacks_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = architecture(tmp_path)
    monkeypatch.setattr(Qwen3Moe, "served_by", "")
    with pytest.raises(UserError, match="SGLang does not serve this qwen3_moe model: it has no such model"):
        validate_settings(config.Config(model=replace(model, max_position_embeddings=2048)))


@pytest.mark.parametrize("name", [name for name in published.NAMES if name.startswith(("qwen2_moe", "qwen3_moe"))])
def test_the_server_is_told_the_same_layers_with_experts(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    (tmp_path / "config.json").write_text(json.dumps(published.read(name)))
    theirs, model = AutoConfig.from_pretrained(tmp_path), read_architecture(tmp_path)
    layers = [layer for layer in range(model.num_layers) if sglang_dense_layers.is_sparse(theirs, layer)]
    assert layers == list(model.moe_layers)


# What transformers, or Ling's own code, takes for granted, and SGLang asks the file for.
LEFT_OUT = {
    "deepseek_v3": ("moe_layer_freq", "scoring_func", "topk_method"),
    "kimi_k2": ("moe_layer_freq", "scoring_func", "topk_method"),
    "gpt_oss": ("swiglu_limit",),
    "minimax_m2": ("use_qk_norm", "scoring_func", "use_routing_bias"),
    "bailing_moe_v2": (
        "use_qk_norm",
        "score_function",
        "moe_router_enable_expert_bias",
        "num_shared_experts",
        "use_bias",
    ),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_a_file_leaves_out_is_written_for_the_server(name: str, tmp_path: Path) -> None:
    described = published.read(name)
    short = {key: value for key, value in described.items() if key not in LEFT_OUT[name]}
    (tmp_path / "config.json").write_text(json.dumps(short))
    model = read_architecture(tmp_path)
    write_config(model, torch.float32, tmp_path, tmp_path / "written")
    written = json.loads((tmp_path / "written" / "config.json").read_text())
    for found in (written, hf_config(model, torch.float32)):
        assert {key: found.get(key) for key in LEFT_OUT[name]} == {key: described[key] for key in LEFT_OUT[name]}
    assert not differences(model, read_architecture(tmp_path / "written"))


def test_the_rotated_part_of_a_head_has_the_name_that_sglang_reads(tmp_path: Path) -> None:
    described = {key: value for key, value in published.read("minimax_m2").items() if key != "rotary_dim"}
    described |= {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.25}}
    (tmp_path / "config.json").write_text(json.dumps(described))
    model = read_architecture(tmp_path)
    assert hf_config(model, torch.float32)["rotary_dim"] == model.head_dim // 4


@pytest.mark.parametrize("name", published.NAMES)
def test_a_published_file_is_written_as_it_stands(name: str, tmp_path: Path) -> None:
    described = published.read(name) | ({"num_nextn_predict_layers": 0} if published.predicting_layer(name) else {})
    (tmp_path / "config.json").write_text(json.dumps(described))
    write_config(read_architecture(tmp_path), torch.float32, tmp_path, tmp_path / "written")
    written = (tmp_path / "written" / "config.json").read_bytes()
    assert written == (tmp_path / "config.json").read_bytes() or "torch_dtype" not in described
    assert json.loads(written) == described | {"torch_dtype": "float32"}
