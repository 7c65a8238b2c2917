"""Hugging Face checkpoints that are damaged, hostile or of another architecture are refused by name; the mapping."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from moe import MODEL
from safetensors.torch import save_file

from megatron_bai.checkpoint import atomic_dir, manifest
from megatron_bai.config import Model
from megatron_bai.errors import UserError
from megatron_bai.model import hf_checkpoint, hf_mapping, megatron_checkpoint


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """`config.json` and one safetensors file with every tensor's name."""
    (tmp_path / "config.json").write_text(json.dumps(hf_checkpoint.hf_config(MODEL, torch.float32)))
    save_file({name: torch.zeros(1) for name in hf_mapping.hf_names(MODEL)}, tmp_path / "model.safetensors")
    return tmp_path


def rewrite(directory: Path, **changes: Any) -> None:
    """Change keys of `config.json`; None removes one."""
    path = directory / "config.json"
    found = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def test_the_configuration_survives_its_file(directory: Path) -> None:
    assert hf_checkpoint.read_config(directory) == MODEL


def test_transformers_reads_the_configuration_as_it_is_meant(directory: Path) -> None:
    from transformers import AutoConfig

    found = AutoConfig.from_pretrained(directory)
    for ours, theirs in hf_checkpoint._HF_FIELDS.items():
        assert getattr(found, theirs) == getattr(MODEL, ours), theirs
    assert found.rope_parameters["rope_theta"] == MODEL.rope_theta and found.norm_topk_prob is True


@pytest.mark.parametrize("where", ["rope_parameters", "rope_theta"])
def test_the_rotary_base_is_read_from_either_place(where: str, directory: Path) -> None:
    rewrite(directory, rope_parameters=None, rope_theta=None)
    rewrite(directory, **{where: {"rope_theta": 5e5} if where == "rope_parameters" else 5e5})
    assert hf_checkpoint.read_config(directory).rope_theta == 5e5


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "qwen3"}, "model_type is 'qwen3', only 'qwen3_moe' is supported"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"norm_topk_prob": False}, "norm_topk_prob is False"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"num_experts": None, "head_dim": None}, "head_dim, num_experts missing"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "scaled rotary"),
        ({"rope_parameters": None, "rope_scaling": {"rope_type": "yarn", "factor": 4}}, "scaled rotary"),
    ],
)
def test_another_architecture_is_refused_by_name(changes: dict[str, Any], named: str, directory: Path) -> None:
    rewrite(directory, **changes)
    with pytest.raises(UserError, match=f"config.json: .*{named}"):
        hf_checkpoint.read_config(directory)


@pytest.mark.parametrize("text", [None, "{"])
def test_a_missing_or_cut_configuration_is_named(text: str | None, directory: Path) -> None:
    (directory / "config.json").unlink()
    if text is not None:
        (directory / "config.json").write_text(text)
    with pytest.raises(UserError, match="cannot read .*config.json"):
        hf_checkpoint.read_config(directory)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "deep/model.safetensors"])
def test_an_index_that_points_outside_its_directory_is_refused_before_anything_is_opened(
    file: str, directory: Path, tmp_path: Path
) -> None:
    names = hf_mapping.hf_names(MODEL)
    weight_map = dict.fromkeys(names, "model.safetensors") | {names[3]: file}
    (directory / hf_checkpoint.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=f"{hf_checkpoint.INDEX} names the file .*{file}.*outside its directory"):
        hf_checkpoint.load_hf([], MODEL, directory)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": 3}'])
def test_an_index_that_cannot_be_understood_is_named(text: str, directory: Path) -> None:
    (directory / hf_checkpoint.INDEX).write_text(text)
    with pytest.raises(UserError, match=f"no readable safetensors checkpoint at {directory}"):
        hf_checkpoint.HFReader(directory)


def test_missing_and_unknown_tensors_are_named(directory: Path) -> None:
    tensors = {name: torch.zeros(1) for name in hf_mapping.hf_names(MODEL)}
    lost = "model.layers.1.mlp.experts.5.up_proj.weight"
    save_file({name: value for name, value in tensors.items() if name != lost}, directory / "model.safetensors")
    with pytest.raises(UserError, match=rf"1 tensors missing or unknown, first {lost} \(missing\)"):
        hf_checkpoint.load_hf([], MODEL, directory)
    save_file(tensors | {"model.layers.9.x": torch.zeros(1)}, directory / "model.safetensors")
    with pytest.raises(UserError, match=r"first model.layers.9.x \(unknown\)"):
        hf_checkpoint.load_hf([], MODEL, directory)


def test_a_truncated_file_is_named(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=f"no readable safetensors checkpoint at {directory}"):
        hf_checkpoint.HFReader(directory)
    weight_map = dict.fromkeys(hf_mapping.hf_names(MODEL), "model.safetensors")
    (directory / hf_checkpoint.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match="cannot read tensor lm_head.weight from"):
        hf_checkpoint.HFReader(directory).read_tensor("lm_head.weight")
    path.unlink()
    with pytest.raises(UserError, match="cannot read tensor lm_head.weight from"):
        hf_checkpoint.HFReader(directory).read_tensor("lm_head.weight")


def test_a_flipped_bit_is_named_before_anything_is_read(directory: Path) -> None:
    sealed = manifest.finalize(directory.rename(atomic_dir.staging_path(directory)), directory, {})
    path = sealed / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="model.safetensors is not what was written"):
        hf_checkpoint.load_hf([], MODEL, directory)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": "64"}, "hidden_size is '64', which is no size"),
        ({"num_experts": -8}, "num_experts is -8"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'"),
        ({"rope_parameters": None, "rope_theta": [1]}, r"rope_theta is \[1\]"),
        ({"rope_parameters": [1]}, r"rotary embeddings are \[1\]"),
    ],
)
def test_a_number_that_is_none_is_named(changes: dict[str, Any], named: str, directory: Path) -> None:
    rewrite(directory, **changes)
    with pytest.raises(UserError, match=f"config.json: .*{named}"):
        hf_checkpoint.read_config(directory)


def test_the_formats_are_told_apart(directory: Path) -> None:
    assert megatron_checkpoint.checkpoint_format(directory) == "hf"
    (directory / "metadata.json").write_text("{}")
    assert megatron_checkpoint.checkpoint_format(directory) == "megatron"
    (directory / "empty").mkdir()
    with pytest.raises(UserError, match="holds neither"):
        megatron_checkpoint.checkpoint_format(directory / "empty")


sizes = st.builds(
    lambda groups, each, d, hidden: Model(
        num_layers=2, hidden_size=hidden, num_attention_heads=groups * each, num_query_groups=groups, head_dim=d,
        num_experts=3, moe_topk=1, moe_ffn_hidden_size=2 * hidden, vocab_size=8, max_position_embeddings=8,
    ),  # fmt: skip
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.integers(1, 5),
)  # fmt: skip


@given(sizes, st.integers(0, 2**31))
def test_split_is_the_exact_inverse_of_merge_for_every_kind(model: Model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    d, hidden, ffn = model.head_dim, model.hidden_size, model.moe_ffn_hidden_size
    q, kv = (model.num_attention_heads * d, hidden), (model.num_query_groups * d, hidden)
    for kind in hf_mapping.PARAM_MAPPINGS:
        shapes = {3: [q, kv, kv], 2: [(ffn, hidden)] * 2, 1: [(4, hidden)]}[len(kind.hf)]
        tensors = [torch.randn(shape, generator=generator) for shape in shapes]
        back = kind.split(kind.merge(tensors, model), model)
        assert len(back) == len(tensors) and all(map(torch.equal, back, tensors)), kind.megatron


def test_every_name_of_transformers_model_is_mapped_once() -> None:
    names = hf_mapping.hf_names(MODEL)
    per_layer = 8 + 1 + 3 * MODEL.num_experts
    assert len(names) == len(set(names)) == 3 + per_layer * MODEL.num_layers


def test_a_key_without_an_entry_is_named() -> None:
    with pytest.raises(UserError, match="'decoder.layers.mlp.shared_experts.weight' has no Hugging Face name"):
        hf_mapping.mapping_of("decoder.layers.mlp.shared_experts.weight")
