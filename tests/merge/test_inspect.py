import dataclasses
import json
import math
from pathlib import Path

import checkpoints
import pytest
import torch

from megatron_bai.checkpoint.reader import ScratchBuffers
from megatron_bai.checkpoint.torch_dist import TorchDistReader
from megatron_bai.cli import merge as merge_verb
from megatron_bai.cli.inspect_routing import list_parents
from megatron_bai.config import Config, Inspect
from megatron_bai.errors import UserError
from megatron_bai.merge.compare import Distance, compare_checkpoints, inspect_checkpoint
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


def test_equal_means_the_same_elements(tmp_path):
    """Integers that float64 rounds alike differ; a NaN in the same place does not; tiny squares divide by nothing."""
    tensors = {"count": torch.tensor([2**53 + 1]), "nan": torch.tensor([math.nan, 1.0]), "same": torch.tensor([True])}
    tensors["tiny"] = torch.tensor([1e-100], dtype=torch.float64)
    other = tensors | {"count": torch.tensor([2**53])}
    paths = [checkpoints.write(tmp_path / "a", tensors), checkpoints.write(tmp_path / "b", other)]
    with TorchDistReader(paths[0]) as a, TorchDistReader(paths[1]) as b:
        (found,) = compare_checkpoints(a, b).values()
    assert found.differing == ["count"]
    assert math.isclose(Distance(aa=1e-200, bb=1e-200, ab=1e-200).cosine, 1)


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
    lines = text[text.index("8 of 9 tensors differ between") :].splitlines()
    assert all(line.startswith("  ") and "decoder.table" not in line for line in lines[1:9]), lines
    inspect_checkpoint(Config(inspect=Inspect(path=three.output, other=three.output)))
    assert "0 of 9 tensors differ" in capsys.readouterr().out
    inspect_checkpoint(Config(inspect=Inspect(path=three.pretrained)))
    assert "not the output of a merge" in capsys.readouterr().out


def test_inspect_names_what_only_one_has(three, tmp_path, capsys):
    other = checkpoints.write(tmp_path / "other", {"mtp.w": torch.ones(2), "decoder.scale": torch.ones(3)})
    inspect_checkpoint(Config(inspect=dataclasses.replace(Inspect(), path=three.pretrained, other=str(other))))
    text = capsys.readouterr().out.replace("\n", " ")
    assert "1 tensors, mtp.w" in text and "decoder.scale: different shapes () and (3,)" in text


def test_of_many_tensors_that_differ_twenty_are_named(tmp_path, capsys):
    paths = []
    for value in (0, 1):
        tensors = {f"w{i:02}": torch.full((1,), value) for i in range(29)} | {"w30": torch.zeros(2 + value)}
        paths.append(str(checkpoints.write(tmp_path / str(value), tensors)))
    inspect_checkpoint(Config(inspect=Inspect(path=paths[0], other=paths[1])))
    lines = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if "30 of 30 tensors differ" in line)
    assert [line.strip() for line in lines[first + 1 : first + 22]] == [f"w{i:02}" for i in range(20)] + ["and 10 more"]


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
    for damaged in ("{", '{"recipe": 3, "sources": []}', text[:200]):
        Path(three.pretrained, "provenance.json").write_text(damaged)
        with pytest.raises(UserError, match="provenance.json is damaged"):
            inspect_checkpoint(Config(inspect=Inspect(path=three.pretrained)))


def test_the_parents_of_a_merge_are_those_given_or_its_sources(tmp_path):
    (tmp_path / "a").mkdir()
    named = {"fingerprint": "0", "recipe": {}, "tensors": {}, "sources": [{"path": str(tmp_path / "a")}]}
    (tmp_path / "provenance.json").write_text(json.dumps(named))
    settings = Inspect(path=str(tmp_path))
    assert list_parents(settings) == [str(tmp_path / "a")]
    assert list_parents(dataclasses.replace(settings, parents=["b"])) == ["b"]
    assert list_parents(Inspect(path=str(tmp_path / "a"))) == []
    (tmp_path / "a").rmdir()
    with pytest.raises(UserError, match=r"a, a source of .*, is not there: give inspect.parents"):
        list_parents(settings)
