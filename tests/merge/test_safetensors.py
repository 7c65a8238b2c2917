"""Hugging Face checkpoints: the same engine, another format."""

import dataclasses
import json
import multiprocessing
import os
import signal
from pathlib import Path

import checkpoints
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_command import content, in_child, merge_in_small_units, peer

from megatron_bai.checkpoint.hf_files import SafetensorsReader
from megatron_bai.cli import merge as merge_verb
from megatron_bai.config import Config, Inspect, Merge
from megatron_bai.errors import UserError
from megatron_bai.merge.compare import inspect_checkpoint


def model(seed: int) -> checkpoints.Tensors:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "model.embed_tokens.weight": torch.randn(37, 16, generator=generator).bfloat16(),
        "model.norm.weight": torch.randn(16, generator=generator).bfloat16(),
        "lm_head.weight": torch.randn(37, 16, generator=generator).bfloat16(),
    }
    for layer in range(2):
        at = f"model.layers.{layer}"
        tensors[f"{at}.mlp.gate.weight"] = torch.randn(4, 16, generator=generator)
        for expert in range(4):
            tensors[f"{at}.mlp.experts.{expert}.up_proj.weight"] = torch.randn(12, 16, generator=generator).bfloat16()
    return tensors


def write(path: Path, tensors: checkpoints.Tensors, files: int = 2) -> Path:
    """As `save_pretrained` leaves a model: files, index, config, card."""
    path.mkdir()
    names = [f"model-{i + 1:05}-of-{files:05}.safetensors" for i in range(files)]
    names = names if files > 1 else ["model.safetensors"]
    where = {key: names[i % files] for i, key in enumerate(tensors)}
    for name in names:
        save_file({k: t for k, t in tensors.items() if where[k] == name}, path / name, metadata={"format": "pt"})
    if files > 1:
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    (path / "README.md").write_text("the base's card")
    return path


@pytest.fixture
def hf(tmp_path):
    """Three Hugging Face checkpoints of one model, split over files in three ways, and the settings of a merge."""
    paths = [write(tmp_path / name, model(i), files) for i, (name, files) in enumerate((("b", 2), ("m", 1), ("n", 3)))]
    return Merge(
        pretrained=str(paths[0]),
        members=[str(paths[1]), str(paths[2])],
        weights=[0.25, 0.75],
        alpha=0.6,
        output=str(tmp_path / "out"),
        verify="all",
    )


def test_hf_merges_by_the_formula_into_the_files_of_the_pretrained(hf):
    merge_verb.run(Config(merge=hf))
    out = Path(hf.output)
    found = {key: value for file in out.glob("*.safetensors") for key, value in load_file(file).items()}
    terms = [(model(0), 0.6), (model(1), 0.1), (model(2), 0.3)]
    assert found.keys() == model(0).keys()
    for key, value in found.items():
        exact = checkpoints.exact(terms, key)
        half_ulp = torch.finfo(value.dtype).eps / 2
        assert value.dtype == model(0)[key].dtype
        assert (value.double() - exact).abs().le(exact.abs() * half_ulp * 1.0001 + 1e-8).all(), key
    base = Path(hf.pretrained)
    assert (out / "config.json").read_text() == (base / "config.json").read_text()
    index, theirs = (json.loads((path / "model.safetensors.index.json").read_text()) for path in (out, base))
    assert index["weight_map"] == theirs["weight_map"]
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())
    card = (out / "README.md").read_text()
    assert "alpha 0.6" in card and "| n | 0.3 |" in card and "the base's" not in card


def test_hf_any_number_of_ranks_writes_the_same_bytes(hf, tmp_path):
    merge_verb.run(Config(merge=hf))
    together = dataclasses.replace(hf, output=str(tmp_path / "together"))
    context = multiprocessing.get_context("fork")
    group = [context.Process(target=peer, args=(r, 2, str(tmp_path / "store"), together)) for r in range(2)]
    for process in group:
        process.start()
    for process in group:
        process.join(60)
    assert [process.exitcode for process in group] == [0, 0]
    files = sorted(p.name for p in Path(hf.output).glob("*.safetensors"))
    assert len(files) == 2
    for name in files:
        assert Path(hf.output, name).read_bytes() == Path(together.output, name).read_bytes()


def test_hf_killed_it_goes_on_and_ends_the_same(hf, tmp_path):
    unbroken = dataclasses.replace(hf, output=str(tmp_path / "unbroken"))
    assert in_child(merge_in_small_units, unbroken, None, tmp_path / "all") == 0
    assert in_child(merge_in_small_units, hf, 3) == -signal.SIGKILL
    assert in_child(merge_in_small_units, hf, None, tmp_path / "rest") == 0
    units = [json.loads((tmp_path / name).read_text()) for name in ("all", "rest")]
    assert len(units[0]) > 5 and units[1] in (units[0][3:], units[0][2:]), "the last was flushed or not"
    assert content(Path(hf.output)) == content(Path(unbroken.output)) != {}


def test_hf_again_is_nothing_to_do_and_a_changed_source_is_seen(hf, capsys):
    merge_verb.run(Config(merge=hf))
    merge_verb.run(Config(merge=hf))
    assert "nothing to do" in capsys.readouterr().out.splitlines()[-1]
    file = Path(hf.members[0], "model.safetensors")
    changed = load_file(file)
    changed["lm_head.weight"][3, 4] += 1
    stamp = file.stat()
    save_file(changed, file, metadata={"format": "pt"})
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # content decides, not the time
    merge_verb.run(Config(merge=hf))
    assert capsys.readouterr().out.splitlines()[-1].startswith("merged")


def test_hf_and_megatron_are_not_mixed_without_a_configuration(hf, tmp_path):
    other = checkpoints.write(tmp_path / "megatron", checkpoints.model(0))
    with pytest.raises(UserError, match=r"cannot read .*megatron/config\.json"):
        merge_verb.run(Config(merge=dataclasses.replace(hf, members=[hf.members[0], str(other)])))


def test_hf_inspect(hf, capsys):
    merge_verb.run(Config(merge=hf))
    inspect_checkpoint(Config(inspect=Inspect(path=hf.output, other=hf.pretrained)))
    text = capsys.readouterr().out
    assert "13 of 13 tensors differ" in text and "experts" in text


def damage(path: Path, how: str) -> None:
    file, index = path / "model-00001-of-00002.safetensors", path / "model.safetensors.index.json"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    key = next(k for k in header if k != "__metadata__")
    start, end = header[key]["data_offsets"]
    if how == "cut off":
        file.write_bytes(data[:-1])
    elif how == "gone":
        file.unlink()
    elif how == "header length":
        file.write_bytes((1 << 60).to_bytes(8, "little") + data[8:])
    elif how == "not json":
        file.write_bytes(data[:8] + b"{" * length + data[8 + length :])
    elif how in ("index", "path"):
        name = file.name if how == "index" else "../x.safetensors"
        weight_map = json.loads(index.read_text())["weight_map"] | {"model.norm.weight": name}
        index.write_text(json.dumps({"weight_map": weight_map}))
    else:
        wrong = {"overlap": {"data_offsets": [start + 2, end + 2]}, "dtype": {"dtype": "F4"}, "shape": {"shape": [9]}}
        header[key] |= wrong[how]
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    "how, message",
    [
        ("cut off", r"00001-of-00002\.safetensors has \d+ bytes instead of \d+"),
        ("gone", r"00001-of-00002\.safetensors is missing"),
        ("header length", "is damaged .its header claims"),
        ("not json", "is damaged"),
        ("index", "index.json and the files disagree about model.norm.weight"),
        ("path", "which is damaged or outside its directory"),
        ("overlap", "does not begin where the tensor before it ends"),
        ("dtype", "has the dtype F4"),
        ("shape", r"bytes for torch\.\w+ \(9,\)"),
    ],
)
def test_hf_damage_is_named(tmp_path, how, message):
    path = write(tmp_path / "c", model(0))
    damage(path, how)
    with pytest.raises(UserError, match=message):
        SafetensorsReader(path)


def test_hf_a_real_model(tmp_path):
    """A Qwen3-MoE that transformers made, merged, loaded by transformers again."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(Qwen3MoeForCausalLM(config).eval())
        models[-1].save_pretrained(tmp_path / str(seed))
    merge = Merge(
        pretrained=str(tmp_path / "0"), members=[str(tmp_path / "1")], weights=[1.0], output=str(tmp_path / "out")
    )
    merge_verb.run(Config(merge=merge))
    merged = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        for a, b in zip(models[0].parameters(), models[1].parameters()):
            a.copy_((a.double() + b.double()) / 2)
        ids = torch.arange(20)[None]
        assert torch.equal(merged(ids).logits, models[0](ids).logits)
