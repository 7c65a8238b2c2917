"""Ling and Ring: what their configuration leaves out, and what of it is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from model.families import published

from megatron_bai.errors import UserError
from megatron_bai.model.architecture import read_architecture

# What the configuration class of 2.0 has another default of than that of 1.x; and what both have.
OF_2 = ("use_qk_norm", "score_function", "moe_router_enable_expert_bias", "num_shared_experts", "use_bias")
OF_BOTH = ("norm_topk_prob", "use_qkv_bias", "tie_word_embeddings", "embedding_dropout", "rope_scaling")


def read(directory: Path, name: str, without: tuple[str, ...] = (), **changes: Any) -> Any:
    described = {key: value for key, value in (published.read(name) | changes).items() if key not in without}
    (directory / "config.json").write_text(json.dumps(described))
    return read_architecture(directory)


def arguments(model: Any) -> dict[str, Any]:
    rope = model.family.rope_arguments(model)
    return {**model.family.transformer_arguments(model), **rope.gpt, **rope.config}


@pytest.mark.parametrize("model_type", ["bailing_moe", "bailing_moe_v2"])
def test_keys_that_are_left_out_are_those_of_their_generation(model_type: str, tmp_path: Path) -> None:
    full = read(tmp_path, "bailing_moe_v2")
    assert arguments(full)["moe_router_num_groups"] == 4 and arguments(full)["rotary_percent"] == 0.5
    names = ["BailingMoeV2ForCausalLM"] if model_type == "bailing_moe" else ["BailingMoeForCausalLM"]
    described = {"model_type": model_type, "architectures": names}
    assert arguments(read(tmp_path, "bailing_moe_v2", (*OF_2, *OF_BOTH), **described)) == arguments(full)
    less = read(tmp_path, "bailing_moe_v2", ("rope_theta", "rms_norm_eps", "head_dim"), rotary_dim=64, **described)
    assert (less.rope_theta, less.norm_epsilon, less.head_dim) == (600000.0, 1e-6, 128)
    whole = read(tmp_path, "bailing_moe_v2", ("partial_rotary_factor", "rotary_dim"), **described)
    assert "rotary_percent" not in arguments(whole), "the model's own code rotates whole heads then"


def test_keys_that_are_left_out_are_those_of_the_first_generation(tmp_path: Path) -> None:
    first = read(tmp_path, "bailing_moe", ("norm_head", *OF_BOTH, "rope_theta", "rms_norm_eps"))
    assert arguments(first) == arguments(read(tmp_path, "bailing_moe")) | {"rotary_base": 10000}
    assert (first.head_dim, first.rope_theta, first.norm_epsilon) == (16, 10000.0, 1e-5)
    assert "rotary_percent" not in arguments(first)
    with pytest.raises(UserError, match="use_bias is True, its model type's default where it is missing"):
        read(tmp_path, "bailing_moe", ("use_bias",))


def test_positions_may_be_described_as_transformers_5_does(tmp_path: Path) -> None:
    without = ("rope_theta", "partial_rotary_factor", "rope_scaling", "rotary_dim")
    rope_parameters = {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.25}
    found = read(tmp_path, "bailing_moe_v2", without, rope_parameters=rope_parameters)
    assert found.rope_theta == 5e5 and arguments(found)["rotary_percent"] == 0.25
    assert found.family.stated(found)["partial_rotary_factor"] == 0.25, "which SGLang reads nowhere else"


def test_the_models_code_is_not_asked_for(tmp_path: Path) -> None:
    (tmp_path / "configuration_bailing_moe_v2.py").write_text("raise SystemExit('it ran')\n")
    assert read(tmp_path, "bailing_moe_v2").family.name == "bailing_moe"


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("bailing_moe", {"norm_head": True}, "norm_head is True"),
        ("bailing_moe", {"use_bias": True}, "use_bias is True"),
        ("bailing_moe", {"score_function": "sigmoid"}, "score_function is 'sigmoid' and moe_router_enable_expert_bias"),
        ("bailing_moe_v2", {"score_function": "softmax"}, "score_function is 'softmax'"),
        ("bailing_moe_v2", {"moe_shared_expert_intermediate_size": 24}, "moe_shared_expert_intermediate_size is 24"),
        ("bailing_moe_v2", {"num_shared_experts": -1}, "num_shared_experts is -1"),
        ("bailing_moe_v2", {"first_k_dense_replace": 1.5}, "first_k_dense_replace is 1.5"),
        ("bailing_moe_v2", {"first_k_dense_replace": 9}, "no layer has experts"),
        ("bailing_moe_v2", {"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
        ("bailing_moe_v2", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ("bailing_moe_v2", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "partial_rotary_factor"),
        ("bailing_moe_v2", {"head_dim": None, "hidden_size": "48"}, "hidden_size"),
        ("bailing_moe_v2", {"partial_rotary_factor": "half"}, "partial_rotary_factor is 'half'"),
        ("bailing_moe_v2", {"rope_theta": None}, "rope_theta is None"),
        ("bailing_moe_v2", {"rotary_dim": 16}, "rotary_dim is 16 of 16, and partial_rotary_factor is 0.5"),
        ("bailing_moe_v2", {"rope_parameters": {"rope_theta": 5e5}}, "rope_theta is 600000, and in rope_parameters"),
        ("bailing_moe_v2", {"rope_parameters": "default"}, "rope_parameters is 'default', which is no object"),
    ],
)
def test_what_is_not_built_is_refused_by_name(name: str, changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=named):
        read(tmp_path, name, **changes)
