"""Sources without an output layer are tied or refused, tied ones may store a copy, and none is quantised."""

import json
from pathlib import Path

import checkpoints
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_bai.checkpoint.formats import open_checkpoint
from megatron_bai.checkpoint.hf_files import SINGLE
from megatron_bai.checkpoint.weight_checks import require_output_layer
from megatron_bai.cli import merge as merge_verb
from megatron_bai.config import Config, Merge
from megatron_bai.errors import UserError

NAMES = {True: ("embedding.word_embeddings.weight", "output_layer.weight"),
         False: ("model.embed_tokens.weight", "lm_head.weight")}  # fmt: skip


def write(path: Path, seed: int, head: str, tied: bool | None, megatron: bool = False, **more: torch.Tensor) -> Path:
    """Write a checkpoint whose output layer is `own`, a `copy` of the embedding or `none`."""
    embedding, output = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(seed))
    tensors = {NAMES[megatron][0]: embedding} | more
    if head != "none":
        tensors[NAMES[megatron][1]] = output if head == "own" else embedding.clone()
    if megatron:
        checkpoints.write(path, tensors)
    else:
        path.mkdir()
        save_file(tensors, path / SINGLE, metadata={"format": "pt"})
    config = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 9}
    (path / "config.json").write_text(json.dumps(config | ({} if tied is None else {"tie_word_embeddings": tied})))
    return path


def merge(base: Path, member: Path, **more: str) -> dict[str, torch.Tensor]:
    out = base.parent / "out"
    settings = Merge(pretrained=str(base), members=[str(member)], weights=[1.0], output=str(out), alpha=0.5, **more)
    settings.allow_different = ["tie_word_embeddings"]
    merge_verb.run(Config(merge=settings))
    with open_checkpoint(out) as result:
        return {key: result.read(key, (0, 0), entry.shape).clone() for key, entry in result.tensors.items()}


@pytest.mark.parametrize("megatron", [False, True])
@pytest.mark.parametrize("lacking", ["base", "member", "both"])
@pytest.mark.parametrize("tied", [None, False])
def test_an_untied_source_that_lost_it_is_refused(
    lacking: str, tied: bool | None, megatron: bool, tmp_path: Path
) -> None:
    heads = {name: "none" if lacking in (name, "both") else "own" for name in ("base", "member")}
    paths = [write(tmp_path / name, i, heads[name], tied, megatron) for i, name in enumerate(heads)]
    key = NAMES[megatron][1]
    with pytest.raises(UserError, match=f"{'member' if lacking == 'member' else 'base'} has no {key} and is not tied"):
        merge(*paths)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("megatron", [False, True])
@pytest.mark.parametrize("base", ["none", "copy"])
@pytest.mark.parametrize("member", ["none", "copy"])
def test_a_tied_source_may_store_its_copy(base: str, member: str, megatron: bool, tmp_path: Path) -> None:
    paths = write(tmp_path / "base", 1, base, True, megatron), write(tmp_path / "member", 2, member, True, megatron)
    result = merge(*paths)
    assert list(result) == [NAMES[megatron][0]]


@pytest.mark.parametrize("megatron", [False, True])
@pytest.mark.parametrize("member", ["none", "copy"])
def test_a_tied_members_embedding_is_merged_into_an_untied_bases_output_layer(
    member: str, megatron: bool, tmp_path: Path
) -> None:
    embedding, output = NAMES[megatron]
    paths = write(tmp_path / "base", 1, "own", False, megatron), write(tmp_path / "member", 2, member, True, megatron)
    sources = []
    for path in paths:
        with open_checkpoint(path) as source:
            sources.append({k: source.read(k, (0, 0), e.shape).clone() for k, e in source.tensors.items()})
    result = merge(*paths)
    torch.testing.assert_close(result[output], (sources[0][output] + sources[1][embedding]) / 2)
    torch.testing.assert_close(result[embedding], (sources[0][embedding] + sources[1][embedding]) / 2)


@pytest.mark.parametrize("megatron", [False, True])
@pytest.mark.parametrize("which", ["base", "member"])
def test_a_tied_source_with_another_output_layer_is_refused(which: str, megatron: bool, tmp_path: Path) -> None:
    paths = [
        write(tmp_path / name, i, "own" if name == which else "copy", True, megatron)
        for i, name in enumerate(("base", "member"))
    ]
    with pytest.raises(UserError, match=f"{which} is tied .*, and its {NAMES[megatron][1]} is not its"):
        merge(*paths)


def test_a_model_that_has_no_output_layer_by_nature_is_no_damaged_one(tmp_path: Path) -> None:
    path = write(tmp_path / "model", 1, "none", False)
    with pytest.raises(UserError, match="restore its file"):
        require_output_layer(path, load_file(path / SINGLE))
    require_output_layer(path, [NAMES[False][0], "score.weight"])
    config = json.loads((path / "config.json").read_text()) | {"architectures": ["Qwen3MoeModel"]}
    (path / "config.json").write_text(json.dumps(config))
    require_output_layer(path, load_file(path / SINGLE))


@pytest.mark.parametrize("which", ["base", "member"])
@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.layers.0.self_attn.q_proj.weight", torch.ones(4, 4).to(torch.float8_e4m3fn)),
        ("model.layers.0.self_attn.q_proj.weight_scale_inv", torch.ones(1, 1)),
        ("model.layers.0.self_attn.q_proj.qweight", torch.ones(4, 4, dtype=torch.int32)),
    ],
)
def test_quantised_tensors_are_named_in_any_source(name: str, tensor: torch.Tensor, which: str, tmp_path: Path) -> None:
    paths = [
        write(tmp_path / source, i, "own", False, **({name: tensor} if source == which else {}))
        for i, source in enumerate(("base", "member"))
    ]
    with pytest.raises(UserError, match=f"{which} holds quantised tensors .{name}.*: dequantise it first"):
        merge(*paths, dtype="bfloat16")
