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

from megatron_bai.checkpoint import atomic_dir, formats, hf_files, manifest
from megatron_bai.checkpoint.formats import open_checkpoint
from megatron_bai.config import Model
from megatron_bai.errors import UserError
from megatron_bai.model import hf_checkpoint, hf_mapping
from megatron_bai.model.architecture import architecture_of
from megatron_bai.model.families.family import HF_FIELDS


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
    assert hf_checkpoint.read_config(directory).settings() == MODEL


def test_transformers_reads_the_configuration_as_it_is_meant(directory: Path) -> None:
    from transformers import AutoConfig

    found = AutoConfig.from_pretrained(directory)
    for ours, theirs in HF_FIELDS.items():
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
        ({"model_type": "qwen3"}, "model_type is 'qwen3', supported are .*qwen3_moe"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"hidden_act": "gelu", "tie_word_embeddings": True}, "hidden_act is 'gelu', only 'silu' is supported"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ({"mlp_only_layers": [0, 1, 2, 3]}, "no layer has experts"),
        ({"mlp_only_layers": [0], "intermediate_size": 0}, "intermediate_size is 0, which is no size"),
        ({"use_sliding_window": True, "sliding_window": 32}, r"sliding_window \(32\) is shorter than max_position"),
        ({"is_causal": False}, "is_causal is false"),
        ({"model_type": "gemma3"}, "model_type is 'gemma3', supported are .*docs/families.md"),
        ({"layer_types": ["sliding_attention"] * MODEL.num_layers}, "layer_types has 'sliding_attention', only full"),
        ({"num_experts_per_tok": 1}, r"num_experts_per_tok \(1\) is not supported: .* is always 1"),
        ({"num_experts_per_tok": 9}, r"num_experts_per_tok \(9\) is more than num_experts \(8\)"),
        ({"num_experts": None, "num_local_experts": 1}, r"num_experts_per_tok \(2\) is more than num_experts \(1\)"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) is not a multiple of num_key_value_heads \(3\)"),
        ({"num_key_value_heads": None, "num_attention_heads": 6}, r"\(6\) is not a multiple of .*_heads \(4\)"),
        ({"head_dim": 15}, r"(head_dim \(15\) is odd|even rotary dimension)"),
        ({"head_dim": None, "hidden_size": 44}, r"head_dim \(11\) is odd"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 0.5}}, "factor is 0.5, a number above 1 is needed"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4}}, "scaled rotary"),
        ({"rope_parameters": None, "rope_scaling": {"rope_type": "linear", "factor": 4}}, "scaled rotary"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "scaled rotary .*'dynamic'"),  # beside plain parameters
        ({"rope_parameters": {"type": "linear", "factor": 4.0}}, "scaled rotary .*'linear'"),
    ],
)
def test_another_architecture_is_refused_by_name(changes: dict[str, Any], named: str, directory: Path) -> None:
    rewrite(directory, **changes)
    with pytest.raises(UserError, match=f"config.json: .*{named}"):
        hf_checkpoint.read_config(directory)


def test_what_has_no_effect_is_read(directory: Path) -> None:
    rewrite(directory, use_sliding_window=True, sliding_window=MODEL.max_position_embeddings)
    assert hf_checkpoint.read_config(directory).settings() == MODEL


def test_what_transformers_writes_is_read(directory: Path) -> None:
    from transformers import AutoConfig

    AutoConfig.from_pretrained(directory).save_pretrained(directory)
    assert "num_experts" not in json.loads((directory / "config.json").read_text())
    assert hf_checkpoint.read_config(directory).settings() == MODEL


@pytest.mark.parametrize(
    "tokens", [[{"id": 7, "content": "<e>"}], [3, {"id": 8}, {"id": 7, "content": "<e>"}], 5, None]
)
@pytest.mark.parametrize("config", [{"eos_token": "<e>"}, {"eos_token": {"content": "<e>"}}, {"eos_token": 3}, []])
@pytest.mark.parametrize("for_rollouts", [False, True])
def test_what_config_json_does_not_say_is_not_added(for_rollouts, config: Any, tokens: Any, directory: Path) -> None:
    """Only for rollouts is each end token said here, since `generation_config.json` is left out."""
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    (directory / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    copy, before = directory / "copy", (directory / "config.json").read_bytes()
    copy.mkdir()
    hf_checkpoint.write_config(MODEL, torch.float32, directory, copy, for_rollouts)
    if for_rollouts:
        assert json.loads((copy / "config.json").read_text()) == {**json.loads(before), "eos_token_id": [7, 8]}
    else:
        assert (copy / "config.json").read_bytes() == before
    assert (copy / "generation_config.json").exists() == (not for_rollouts)


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
    (directory / hf_files.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=f"{hf_files.INDEX} names the file .*{file}.*outside its directory"):
        hf_checkpoint.load_hf([], MODEL, directory)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": 3}'])
def test_an_index_that_cannot_be_understood_is_named(text: str, directory: Path) -> None:
    (directory / hf_files.INDEX).write_text(text)
    assert hf_checkpoint.HFReader(directory).tensor_names(), "no reader looks at such a file beside model.safetensors"
    (directory / "model.safetensors").unlink()
    with pytest.raises(UserError, match=f"{hf_files.INDEX} is damaged"):
        hf_checkpoint.HFReader(directory)


@pytest.mark.parametrize("reader", [hf_checkpoint.HFReader, open_checkpoint, formats.checkpoint_format])
@pytest.mark.parametrize(
    ("index", "files", "named"),
    [
        (["a"], ["a", "model"], "holds model.safetensors and model.safetensors.index.json, which names other files"),
        (["a", "model"], ["a", "model"], "holds model.safetensors and model.safetensors.index.json, which names other"),
        (["a", "model-00002-of-00002"], ["a"], "model-00002-of-00002.safetensors is missing"),
        (None, ["model", "model-00001-of-00002"], "holds model.safetensors and model-00001-of-00002.safetensors, and"),
        (None, ["model-00001-of-00002"], "holds model-00001-of-00002.safetensors and no model.safetensors.index.json"),
    ],
)
def test_files_that_contradict_each_other_are_named(reader, index, files, named, directory: Path) -> None:
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").unlink()
    for file in files:
        (directory / f"{file}.safetensors").write_bytes(content)
    if index:
        weight_map = {f"{i}": f"{file}.safetensors" for i, file in enumerate(index)}
        (directory / hf_files.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=named):
        reader(directory)


@pytest.mark.parametrize("reader", [hf_checkpoint.HFReader, open_checkpoint, formats.checkpoint_format])
def test_files_that_config_json_names_for_transformers_alone_are_refused(reader, directory: Path) -> None:
    rewrite(directory, transformers_weights="model.safetensors")
    reader(directory)
    rewrite(directory, transformers_weights="other.safetensors")
    with pytest.raises(UserError, match="config.json: transformers_weights names 'other.safetensors', which"):
        reader(directory)


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
    (directory / hf_files.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match="cannot read tensor lm_head.weight from"):
        hf_checkpoint.HFReader(directory).read_tensor("lm_head.weight")
    path.unlink()
    with pytest.raises(UserError, match="model.safetensors is missing"):
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
        ({"hidden_size": "64"}, "'hidden_size' expected int"),
        ({"num_experts": -8}, "num_experts is -8"),
        ({"vocab_size": True}, "'vocab_size' expected int"),
        ({"rms_norm_eps": "1e-6"}, "'rms_norm_eps' expected float"),
        ({"rope_parameters": None, "rope_theta": [1]}, r"rope_theta is \[1\]"),
        ({"rope_parameters": [1]}, r"'rope_parameters' with value \[1\]"),
        ({"rope_parameters": None, "rope_theta": 0}, "rope_theta is 0"),
    ],
)
def test_a_number_that_is_none_is_named(changes: dict[str, Any], named: str, directory: Path) -> None:
    rewrite(directory, **changes)
    with pytest.raises(UserError, match=f"config.json: .*{named}"):
        hf_checkpoint.read_config(directory)


def test_the_formats_are_told_apart(directory: Path) -> None:
    assert formats.checkpoint_format(directory) == "hf"
    (directory / "metadata.json").write_text('{"title": "of another tool"}')
    assert formats.checkpoint_format(directory) == "hf"
    (directory / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    with pytest.raises(UserError, match="holds two checkpoints, Megatron's .* and Hugging Face's .*model.safetensors"):
        formats.checkpoint_format(directory)
    (directory / "model.safetensors").unlink()
    assert formats.checkpoint_format(directory) == "megatron"
    (directory / "empty").mkdir()
    with pytest.raises(UserError, match="holds neither"):
        formats.checkpoint_format(directory / "empty")


sizes = st.builds(
    lambda groups, each, d, hidden: Model(
        num_layers=2, hidden_size=hidden, num_attention_heads=groups * each, num_query_groups=groups, head_dim=d,
        num_experts=3, moe_topk=2, moe_ffn_hidden_size=2 * hidden, vocab_size=8, max_position_embeddings=8,
    ),  # fmt: skip
    st.integers(1, 4), st.integers(1, 4), st.sampled_from([2, 4, 6]), st.integers(1, 5),
)  # fmt: skip


@given(sizes, st.integers(0, 2**31))
def test_split_is_the_exact_inverse_of_merge_for_every_kind(model: Model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    d, hidden, ffn = model.head_dim, model.hidden_size, model.moe_ffn_hidden_size
    q, kv = (model.num_attention_heads * d, hidden), (model.num_query_groups * d, hidden)
    architecture = architecture_of(model)
    for kind in architecture.mappings.values():
        of_kind: dict[int, list[tuple[int, ...]]] = {3: [q, kv, kv], 2: [(ffn, hidden)] * 2}
        shapes = of_kind.get(len(kind.hf), [kind.shape(architecture)])
        tensors = [torch.randn(shape, generator=generator) for shape in shapes]
        merged = kind.merge(tensors, architecture)
        back = kind.split(merged, architecture)
        assert merged.shape == kind.shape(architecture), kind.megatron
        assert len(back) == len(tensors) and all(map(torch.equal, back, tensors)), kind.megatron


def test_every_name_of_transformers_model_is_mapped_once() -> None:
    names = hf_mapping.hf_names(MODEL)
    per_layer = 8 + 1 + 3 * MODEL.num_experts
    assert len(names) == len(set(names)) == 3 + per_layer * MODEL.num_layers


def test_a_key_without_an_entry_is_named() -> None:
    with pytest.raises(UserError, match="'decoder.layers.mlp.shared_experts.weight' has no Hugging Face name"):
        hf_mapping.mapping_of("decoder.layers.mlp.shared_experts.weight", MODEL)
