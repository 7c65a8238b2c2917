"""Checkpoints with the names that transformers 5 has in memory; and what families refuse, by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model.families import published
from safetensors.torch import load_file, save_file

from megatron_bai.errors import UserError
from megatron_bai.model import hf_mapping
from megatron_bai.model.architecture import read_architecture, require_served
from megatron_bai.model.hf_reader import HFReader

REFUSED = [
    ("qwen2_moe", {"model_type": "qwen3_next"}, "'qwen3_next', which is not built: it has gated delta-net layers"),
    ("gpt_oss", {"swiglu_limit": 6.0}, "swiglu_limit is 6.0, only 7.0 is supported"),
    ("gpt_oss", {"hidden_act_alpha": 1.5}, "hidden_act_alpha is 1.5, only 1.702 is supported"),
    ("gpt_oss", {"layer_types": ["full_attention"] * 3 + ["chunked_attention"]}, "layer_types has 'chunked_attention'"),
    ("gpt_oss", {"layer_types": ["full_attention"] * 3}, "layer_types"),
    ("gpt_oss", {"sliding_window": 0}, "sliding_window is 0, which is no size"),
    ("gpt_oss", {"sliding_window": None}, "sliding_window is None, which is no size"),
    ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}}, r"quantised \(.*, mxfp4\): .* to bfloat16 first"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0, only None is supported"),
    ("mixtral", {"sliding_window": 32}, r"sliding_window \(32\) is shorter"),
    ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size is 0, which is no size"),
    ("qwen2_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
    ("minimax_m2", {"attn_type_list": [1, 0, 1, 1]}, "attn_type_list has 0, only 1"),
    ("minimax_m2", {"scoring_func": "softmax"}, "scoring_func is 'softmax', only 'sigmoid'"),
    ("minimax_m2", {"shared_intermediate_size": 8}, "shared_intermediate_size is 8, only 0"),
    ("minimax_m2", {"rotary_dim": 7}, "rotates no even number"),
    ("minimax_m2", {"rotary_dim": "8"}, "rotary_dim is '8', which is no size|transformers cannot read it"),
    ("minimax_m2", {"partial_rotary_factor": 0.25}, "rotary_dim is 8 of 16, and partial_rotary_factor is 0.25"),
    ("minimax_m2", {"quantization_config": {"quant_method": "fp8"}}, r"quantised \(quantization_config, fp8\)"),
    # dequantised it would be refused all the same
    ("qwen2_moe", {"model_type": "qwen3_next", "quantization_config": {"quant_method": "mxfp4"}}, "which is not built"),
    ("kimi_k2", {"model_type": "kimi_k25", "quantization_config": {"quant_method": "int4"}}, "'kimi_k25', supported"),
]
UNSERVED = [
    ("mixtral", {"rope_theta": 10000.5}, r"it cuts rope_theta \(10000.5\) to a whole number"),
    ("mixtral", {"head_dim": 16}, "its heads have hidden_size / num_attention_heads elements"),
    ("olmoe", {"head_dim": 16}, "its heads have hidden_size / num_attention_heads elements"),
    ("qwen3_moe", {"dual_chunk_attention_config": {"chunk_size": 8}}, "it computes dual_chunk_attention_config"),
    ("qwen2_moe", {"dual_chunk_attention_config": {"chunk_size": 8}}, "it computes dual_chunk_attention_config"),
    ("gpt_oss", {"sliding_window": None, "layer_types": ["full_attention"] * 4}, "sliding_window is null"),
    ("olmoe", {"num_key_value_heads": 2}, "it norms as many keys as queries"),
    ("olmoe", {"norm_topk_prob": True}, "it normalises no router's weights"),
    ("olmoe", {"rms_norm_eps": 1e-6}, "its norms have an epsilon of 1e-05"),
    (
        "mixtral",
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}},
        "it scales no positions",
    ),
]


@pytest.mark.parametrize(("name", "changes", "said"), UNSERVED)
def test_what_sglang_would_serve_as_another_model_is_refused(
    name: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(published.read(name)))
    require_served(read_architecture(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(published.read(name) | changes))
    with pytest.raises(UserError, match=f"SGLang does not serve this {name} model: {said}"):
        require_served(read_architecture(tmp_path))


def test_a_model_whose_norms_sglang_does_not_divide_is_served_on_one_rank(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(published.read("olmoe")))
    with pytest.raises(UserError, match="rollout.tensor is 2: SGLang divides no olmoe model"):
        require_served(read_architecture(tmp_path), 2)


@pytest.mark.parametrize(("name", "changes", "said"), REFUSED)
def test_what_is_not_built_is_refused_by_name(name: str, changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(published.read(name) | changes))
    with pytest.raises(UserError, match=said):
        read_architecture(tmp_path)


def in_memory(tensors: dict[str, torch.Tensor], experts: int) -> dict[str, torch.Tensor]:
    """The tensors of Mixtral or MiniMax-M2 under the names that transformers 5 gives them."""
    renamed = {name.replace(".block_sparse_moe.", ".mlp."): tensor for name, tensor in tensors.items()}
    layers = {name.split(".experts.")[0] for name in renamed if ".experts." in name}
    for layer in layers:
        gate, down, up = (
            torch.stack([renamed.pop(f"{layer}.experts.{e}.w{n}.weight") for e in range(experts)]) for n in (1, 2, 3)
        )
        renamed[f"{layer}.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        renamed[f"{layer}.experts.down_proj"] = down
    return renamed


@pytest.mark.parametrize("name", ["mixtral", "minimax_m2"])
def test_names_of_transformers_in_memory_are_read_as_the_published_ones(name: str, tmp_path: Path) -> None:
    one = published.make(name, tmp_path / "published")
    other = tmp_path / "memory"
    other.mkdir()
    (other / "config.json").write_bytes((one / "config.json").read_bytes())
    model = read_architecture(one)
    tensors = in_memory(load_file(one / "model.safetensors"), model.num_experts)
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    readers = [HFReader(one), HFReader(other)]
    for reader in readers:
        reader.require_tensors_of(model)
    for kind in model.mappings.values():
        for index in hf_mapping.slice_indices(kind, model):
            found, wanted = (reader.read_slice(kind, index, model) for reader in reversed(readers))
            assert torch.equal(found, wanted), (kind.megatron, index)
    del tensors["model.layers.1.mlp.gate.weight"]
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="block_sparse_moe.gate.weight"):
        HFReader(other).require_tensors_of(model)
