"""Hugging Face ↔ Megatron, in every layout: the same function, the same bits."""

import json
import shutil
from pathlib import Path

import pytest
import reference
import torch
from distributed.worker import CASES, QUICK
from moe import MODEL
from processes import TESTS, Layouts, launch
from safetensors.torch import load_file, save_file
from tiers import tiered

from megatron_bai.checkpoint import manifest
from megatron_bai.checkpoint.formats import open_checkpoint
from megatron_bai.model import hf_mapping

pytestmark = pytest.mark.distributed
LOADING = [name for name, case in CASES.items() if case.loads]


def same(found: Path, wanted: Path) -> None:
    """Both directories hold the same files with the same bytes, their manifests' `info` apart."""
    names = {path.name for path in wanted.iterdir()}
    assert {path.name for path in found.iterdir()} == names and "model.safetensors" in names
    manifest.require_info(found)
    for name in names - {manifest.NAME}:
        assert (found / name).read_bytes() == (wanted / name).read_bytes(), name


@pytest.mark.parametrize("length", ["full", "half"])
def test_logits_are_those_of_transformers(length: str, layouts: Layouts) -> None:
    from transformers import Qwen3MoeForCausalLM

    theirs = Qwen3MoeForCausalLM.from_pretrained(layouts.directory / "one" / "hf", dtype=torch.float32)
    found = layouts["one"]["logits"]
    tokens = found["tokens"][:, : found[length].shape[1]]
    with torch.no_grad():
        wanted = theirs(tokens).logits
    assert wanted.abs().max() > 1
    torch.testing.assert_close(found[length], wanted, rtol=0, atol=1e-4)
    dense = reference.logits(reference.load(layouts.directory / "one" / "hf"), MODEL, tokens)
    torch.testing.assert_close(dense.float(), wanted, rtol=0, atol=1e-4)


def test_fresh_weights_are_drawn_as_the_configuration_says(layouts: Layouts) -> None:
    tensors = load_file(layouts.directory / "one" / "hf" / "model.safetensors")
    assert set(tensors) == set(hf_mapping.hf_names(MODEL))
    matrices = {name: tensor for name, tensor in tensors.items() if tensor.dim() > 1}
    for name, tensor in matrices.items():
        assert tensor.std() == pytest.approx(MODEL.init_std, rel=0.15) and abs(tensor.mean()) < 0.02, name
    assert len({tensor.numpy().tobytes() for tensor in matrices.values()}) == len(matrices)
    assert all((tensor == 1).all() for name, tensor in tensors.items() if tensor.dim() == 1)


@pytest.mark.parametrize("case", tiered(CASES, QUICK))
def test_fresh_weights_and_their_export_are_the_same_in_every_layout(case: str, layouts: Layouts) -> None:
    same(layouts.directory / case / "hf", layouts.directory / "one" / "hf")


@pytest.mark.parametrize("case", tiered(["one", *LOADING], QUICK))
def test_what_is_imported_is_exported_bit_for_bit(case: str, layouts: Layouts) -> None:
    same(layouts.directory / case / "imported", layouts.directory / "one" / "hf")


@pytest.mark.parametrize("case", tiered(LOADING, QUICK))
def test_a_megatron_checkpoint_loads_in_another_layout_bit_for_bit(case: str, layouts: Layouts) -> None:
    same(layouts.directory / case / "loaded", layouts.directory / "one" / "hf")
    assert layouts[case]["info"] == {"by": CASES[case].loads}


@pytest.mark.parametrize("case", tiered(LOADING, QUICK))
def test_the_optimizers_own_copy_follows_what_was_loaded(case: str, layouts: Layouts) -> None:
    assert layouts[case]["optimizer_follows"]


@pytest.mark.long
def test_megatron_checkpoints_hold_the_same_tensors_whatever_layout_saved_them(layouts: Layouts) -> None:
    wanted = tensors_of(layouts.directory / "one" / "megatron")
    assert {name.rpartition(".")[2] for name in wanted} == {"weight", "layer_norm_weight"}
    for case in LOADING:
        found = tensors_of(layouts.directory / case / "megatron")
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted), case


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a `torch_dist` checkpoint, read without Megatron-Core."""
    with open_checkpoint(path) as source:
        return {k: source.read(k, (0,) * len(e.shape), e.shape).clone() for k, e in source.tensors.items()}


def test_the_verb_converts_there_and_back_bit_for_bit(layouts: Layouts, tmp_path: Path) -> None:
    saved = layouts.directory / "tp2_ep2" / "megatron"
    cases = {
        target: ["convert", f"convert.source={source}", f"convert.target={tmp_path / target}", f"convert.to={kind}"]
        for source, target, kind in ((saved, "hf", "hf"), (tmp_path / "hf", "back", "megatron"))
    }
    launch(TESTS / "e2e" / "forks.py", tmp_path, json.dumps(cases))
    for target in cases:
        assert f"wrote {tmp_path / target}" in (tmp_path / f"{target}.out").read_text()
    same(tmp_path / "hf", layouts.directory / "one" / "hf")
    back, wanted = tensors_of(tmp_path / "back"), tensors_of(saved)
    assert back.keys() == wanted.keys() and all(torch.equal(back[key], wanted[key]) for key in wanted)
    assert manifest.require_info(tmp_path / "hf") == {"converted_from": str(saved)}


def test_what_config_json_and_the_files_beside_it_say_comes_back(layouts: Layouts, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(layouts.directory / "one" / "hf", source)
    (source / manifest.NAME).unlink()
    config = json.loads((source / "config.json").read_text())
    said = {"eos_token_id": [5, 7], "pad_token_id": 5, "bos_token_id": None, "max_window_layers": 2, "use_cache": True,
            "own_key": {"deep": [1]}, "router_aux_loss_coef": 0.01}  # fmt: skip
    (source / "config.json").write_text(json.dumps(config | said))
    files = {
        "generation_config.json": '{"eos_token_id": [5, 7], "temperature": 0.6}', "vocab.json": "{}",
        "merges.txt": "a b",
        "tokenizer.model": "model", "chat_template.json": "{}", "chat_template.jinja": "{{ x }}",
        "additional_chat_templates/tools.jinja": "{{ y }}", "added_tokens.json": "{}", "preprocessor_config.json": "{}",
        "LICENSE": "free",
    }  # fmt: skip
    for name, text in (files | {"optimizer.pt": "state"}).items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    weights = load_file(source / "model.safetensors")
    router = next(name for name in weights if name.endswith("mlp.gate.weight"))
    save_file({k: v if k == router else v.bfloat16() for k, v in weights.items()}, source / "model.safetensors")
    cases = {
        "back": ["convert", f"convert.source={tmp_path / 'there'}", f"convert.target={tmp_path / 'back'}"],
        "there": ["convert", f"convert.source={source}", f"convert.target={tmp_path / 'there'}"],
        "same": ["convert", f"convert.source={source}", f"convert.target={tmp_path / 'same'}", "convert.to=hf"],
        "linked": ["convert", f"convert.source={source}", f"convert.target={tmp_path / 'link' / 'in'}"],
    }  # fmt: skip
    (tmp_path / "link").symlink_to(source)
    for names in (["there", "same", "linked"], ["back"]):
        chosen = {name: [*cases[name], "backend.dtype=bfloat16"] for name in names}
        launch(TESTS / "e2e" / "forks.py", tmp_path, json.dumps(chosen))
    found = json.loads((tmp_path / "back" / "config.json").read_text())
    assert found == config | said | {"torch_dtype": "bfloat16"}
    assert all((tmp_path / "back" / name).read_text() == text for name, text in files.items())
    assert not (tmp_path / "there" / "optimizer.pt").exists()
    output = {name: (tmp_path / f"{name}.err").read_text() + (tmp_path / f"{name}.out").read_text() for name in cases}
    assert "rounded from float32 to bfloat16 (backend.dtype): 1 tensor of" in output["there"]
    assert f"{source}, {router}" in output["there"]
    assert "not carried of" in output["there"] and "optimizer.pt" in output["there"]
    assert "in Megatron's torch_dist format, from Hugging Face's" in output["there"]
    assert "is in Hugging Face's safetensors format already" in output["same"]
    assert "is convert.source or lies inside it" in output["linked"]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("mlp.gate", "model.layers.1.mlp.gate.weight has shape (8, 47), the model needs (8, 48)"),
        ("mlp.experts.5.up_proj", "mlp.experts.5.up_proj.weight has shape (39, 48), the model needs (40, 48)"),
        ("self_attn.k_proj", "self_attn.k_proj.weight has shape (33, 48), the model needs (32, 48)"),
        ("cut", ".distcp has "),
        ("cut", "the checkpoint is damaged"),
        ("unfinished", "has no manifest.json: it was never finished"),
        ("other", "has num_experts 4, the configured model.num_experts is 8"),
        ("hf", "is not a Megatron torch_dist checkpoint: `megatron-bai convert` makes one"),
        ("nowhere", "no checkpoint at"),
        ("good", "nothing"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_named(fault: str, said: str, layouts: Layouts) -> None:
    assert said in layouts["one"]["faults"][fault]
