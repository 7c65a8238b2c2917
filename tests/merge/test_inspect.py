import dataclasses
import json
from pathlib import Path

import checkpoints
import pytest
import torch

from megatron_bai.checkpoint.reader import ScratchBuffers
from megatron_bai.checkpoint.torch_dist import TorchDistReader
from megatron_bai.cli import merge as merge_verb
from megatron_bai.config import Config, Inspect
from megatron_bai.errors import UserError
from megatron_bai.merge.compare import compare_checkpoints, inspect_checkpoint
from megatron_bai.merge.tensor_names.param_groups import param_group


def test_distance_and_cosine_of_each_group(tmp_path):
    a, b = checkpoints.model(0, torch.float32), checkpoints.model(1, torch.float32)
    router = "decoder.layers.mlp.router.weight"
    b[router] = a[router].clone()
    paths = (
        checkpoints.write(tmp_path / "a", a, checkpoints.experts),
        checkpoints.write(tmp_path / "b", b, checkpoints.columns),
    )
    with TorchDistReader(paths[0]) as first, TorchDistReader(paths[1]) as second:
        groups = compare_checkpoints(first, second)
    experts = [key for key in a if "experts.experts" in key]
    x, y = (torch.cat([t[key].double().flatten() for key in experts]) for t in (a, b))
    found = groups["experts"]
    assert found.tensors == 2 and found.elements == x.numel() and sorted(found.differing) == sorted(experts)
    assert found.distance == pytest.approx(float((x - y).norm()))
    assert found.relative == pytest.approx(float((x - y).norm() / x.norm()))
    assert found.cosine == pytest.approx(float(torch.nn.functional.cosine_similarity(x, y, dim=0)))
    assert groups["router"].differing == ["decoder.layers.mlp.router.expert_bias"]
    assert sum(group.tensors for group in groups.values()) == len(a)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_two_checkpoints_that_share_scratch_memory_are_told_apart(tmp_path, dtype):
    """In every dtype: one that needs no conversion is copied as well before the other is read into the same memory."""
    a, b = checkpoints.model(0, dtype), checkpoints.model(1, dtype)
    scratch = ScratchBuffers()
    paths = [checkpoints.write(tmp_path / name, tensors, checkpoints.columns) for name, tensors in (("a", a), ("b", b))]
    with TorchDistReader(paths[0], scratch) as first, TorchDistReader(paths[1], scratch) as second:
        groups = compare_checkpoints(first, second)
    for name, group in groups.items():
        keys = [key for key in a if param_group(key) == name]
        exact = sum(float((a[key].double() - b[key].double()).square().sum()) for key in keys) ** 0.5
        assert group.distance == pytest.approx(exact) and exact > 0


@pytest.mark.parametrize(
    "key, group",
    [
        ("embedding.word_embeddings.weight", "embeddings"),
        ("output_layer.weight", "embeddings"),
        ("decoder.layers.mlp.router.weight", "router"),
        ("decoder.layers.mlp.router.expert_bias", "router"),
        ("decoder.layers.mlp.experts.experts.linear_fc1.weight", "experts"),
        ("decoder.layers.mlp.shared_experts.linear_fc1.weight", "shared experts"),
        ("decoder.layers.mlp.linear_fc1.weight", "dense MLP"),
        ("decoder.layers.mlp.linear_fc1.layer_norm_weight", "norms"),
        ("decoder.layers.self_attention.linear_qkv.layer_norm_weight", "norms"),
        ("decoder.layers.self_attention.q_layernorm.weight", "norms"),
        ("decoder.layers.self_attention.linear_proj.weight", "attention"),
        ("decoder.final_layernorm.weight", "norms"),
        ("model.layers.0.mlp.gate.weight", "router"),
        ("model.layers.0.mlp.experts.7.gate_proj.weight", "experts"),
        ("model.layers.0.mlp.gate_proj.weight", "dense MLP"),
        ("model.layers.0.self_attn.q_norm.weight", "norms"),
        ("model.embed_tokens.weight", "embeddings"),
        ("lm_head.weight", "embeddings"),
        ("something.new", "other"),
    ],
)
def test_groups(key, group):
    assert param_group(key) == group


def test_inspect_prints_content_provenance_and_differences(three, capsys):
    merge_verb.run(Config(merge=three))
    inspect_checkpoint(Config(inspect=Inspect(path=three.output, other=three.pretrained)))
    text = capsys.readouterr().out
    assert "bai: weights 0.25 0.75, alpha 0.6;" in text and f"0.6 × {three.pretrained}" in text
    assert "1 entries not used: optimizer or random-number state" in text
    assert "8 of 9 tensors differ" in text and "decoder.table" not in text.split("tensors differ")[1]
    inspect_checkpoint(Config(inspect=Inspect(path=three.output, other=three.output)))
    assert "0 of 9 tensors differ" in capsys.readouterr().out
    inspect_checkpoint(Config(inspect=Inspect(path=three.pretrained)))
    assert "not the output of a merge" in capsys.readouterr().out


def test_inspect_names_what_only_one_has(three, tmp_path, capsys):
    other = checkpoints.write(tmp_path / "other", {"mtp.w": torch.ones(2), "decoder.scale": torch.ones(3)})
    inspect_checkpoint(Config(inspect=dataclasses.replace(Inspect(), path=three.pretrained, other=str(other))))
    text = capsys.readouterr().out.replace("\n", " ")
    assert "1 tensors, mtp.w" in text and "different shapes: decoder.scale () and (3,)" in text


def test_damage_is_named(three):
    with pytest.raises(UserError, match="inspect.path is empty"):
        inspect_checkpoint(Config())
    merge_verb.run(Config(merge=three))
    manifest = json.loads(Path(three.output, "manifest.json").read_text())
    text = Path(three.output, "provenance.json").read_text()
    Path(three.output, "provenance.json").write_text("{" * len(text))
    assert manifest["files"]["provenance.json"]["bytes"] == len(text.encode())
    with pytest.raises(UserError, match="provenance.json is not what was written"):
        inspect_checkpoint(Config(inspect=Inspect(path=three.output)))
    for text in ("{", "[]", "{}", '{"recipe": 3}', "[" * 100_000):
        Path(three.pretrained, "provenance.json").write_text(text)
        with pytest.raises(UserError, match="provenance.json is damaged"):
            inspect_checkpoint(Config(inspect=Inspect(path=three.pretrained)))
