"""Files of other tools under the names of ours, in a healthy checkpoint: no verb takes them for its own."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_limit import extra_memory
from moe import MODEL
from whole_models import hf_tensors, write_hf

from megatron_bai import config
from megatron_bai.checkpoint import formats, hf_files, manifest
from megatron_bai.checkpoint.carried_files import list_carried_files, read_end_tokens
from megatron_bai.checkpoint.formats import open_checkpoint
from megatron_bai.checkpoint.torch_dist import DistcpFileWriter, write_index
from megatron_bai.cli import inspect_verb, serve
from megatron_bai.cli import merge as merge_verb
from megatron_bai.errors import UserError
from megatron_bai.memory_plan.run_inputs import read_inputs
from megatron_bai.model import convert, hf_mapping
from megatron_bai.model.architecture import read_architecture
from megatron_bai.monitor.summary import Summary
from megatron_bai.rl.run_architecture import resolve_architecture

NAMES = ("manifest.json", "metadata.json", "provenance.json")


def a_directory(path: Path) -> None:
    path.mkdir()
    (path / "metadata.json").write_text("{}")


def write(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


def huge(path: Path) -> None:
    with open(path, "wb") as file:
        file.write(b'{"fingerprint": "a", "sharded_backend": "torch_dist", "version": 2, "files": {"')
        file.truncate(3 << 30)  # sparse


CONTENTS: dict[str, Callable[[Path], object]] = {
    "wandb": write('{"os": "Linux", "python": "3.11", "startedAt": "2025-11-29", "args": ["--lr", "1e-6"]}'),
    "dataset": write('{"name": "gsm8k", "version": "1.0", "features": {}, "splits": []}'),
    "list": write('[{"version": 2}]'),
    "broken": write('{"name": "gsm8k", '),
    "text": write("made on Tuesday"),
    "deep": write("[" * 100_000),
    "a directory": a_directory,
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "huge": huge,
}


def hf(path: Path) -> Path:
    write_hf(path, hf_tensors())
    (path / "tokenizer.json").write_text("{}")
    return path


def torch_dist(path: Path) -> Path:
    path.mkdir()
    with DistcpFileWriter(path, "__0_0") as file:
        file.write_tensor("decoder.weight", (0,), torch.ones(4))
    write_index(path, [("decoder.weight", torch.float32, (4,))], file.written_items)
    torch.save({}, path / "common.pt")
    return path


def made_by_us(path: Path) -> Path:
    """With a manifest, as `train` and `plan` want it."""
    staging = manifest.make_staging_dir(path)
    shutil.copytree(hf(path.with_name("plain")), staging, dirs_exist_ok=True)
    return manifest.finalize(staging, path, {"by": "us"})


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize(
    ("make", "name"),
    [*((hf, name) for name in NAMES), *((torch_dist, name) for name in NAMES if name != "metadata.json")],
)
def test_no_verb_takes_another_tools_file_for_ours(make, name: str, content: str, tmp_path: Path, capsys) -> None:
    path, kind = make(tmp_path / "model"), "hf" if make is hf else "megatron"
    CONTENTS[content](path / name)
    with extra_memory(1 << 30):
        assert formats.checkpoint_format(path) == kind
        assert manifest.read_info(path) is None and manifest.verify_weights(path) == 0
        inspect_verb.run(config.Config(inspect=config.Inspect(path=str(path), verify=True)))
        assert "not the output of a merge" in capsys.readouterr().out
        with open_checkpoint(path) as reader:
            notes = convert.describe_losses(reader, "float32")
            left_out = list_carried_files(path, reader.own_files()).left_out
        assert [entry.strip("/") for entry in left_out] == [name] and name in notes[-1]
        out = tmp_path / "out"
        job = config.Merge(method="linear", members=[str(path)], weights=[1.0], output=str(out))
        merge_verb.run(config.Config(merge=job))
    for written in ("manifest.json", "provenance.json"):
        assert "fingerprint" in (out / written).read_text()
    assert (out / "metadata.json").exists() == (kind == "megatron")


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", ["metadata.json", "provenance.json"])
def test_a_run_starts_from_a_checkpoint_with_another_tools_file(name: str, content: str, tmp_path: Path) -> None:
    path = made_by_us(tmp_path / "model")
    CONTENTS[content](path / name)
    init, run = config.CheckpointInit(checkpoint=str(path)), config.Run(dir=str(tmp_path / "run"))
    settings = config.Config(init=init, model=MODEL, run=run)
    with extra_memory(1 << 30):
        assert read_inputs(settings) == {"model of": str(path)}
        assert resolve_architecture(settings).model == read_architecture(path)
        assert manifest.require_info(path) == {"by": "us"} and manifest.verify_weights(path) == 1
        assert formats.checkpoint_format(path) == "hf"
        assert "provenance" not in Summary(settings, 1, {}, [])._content


class StartedError(Exception):
    """The server would start."""


def start_nothing(*_: Any, **__: Any) -> None:
    raise StartedError


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_server_starts_with_another_tools_file(name: str, content: str, tmp_path: Path, monkeypatch) -> None:
    path = hf(tmp_path / "model")
    CONTENTS[content](path / name)
    monkeypatch.setattr(serve, "SGLangServer", start_nothing)
    settings = config.Config(serve=config.Serve(checkpoint=str(path)), run=config.Run(dir=str(tmp_path)))
    with extra_memory(1 << 30), pytest.raises(StartedError):
        serve.run(settings)


@pytest.mark.parametrize(
    ("others", "index", "said"),
    [
        (["old.safetensors"], None, "holds old.safetensors beside model.safetensors, and no .*SGLang would read both"),
        (["adapter_model.safetensors"], None, "holds adapter_model.safetensors beside"),
        ([], "{}", "model.safetensors.index.json is damaged, and SGLang would take it"),
        (["old.safetensors"], "model.safetensors", ""),
        ([], None, ""),
    ],
)
def test_a_server_reads_the_files_of_the_model_alone(others, index, said, tmp_path: Path, monkeypatch) -> None:
    path = hf(tmp_path / "model")
    for name in others:
        shutil.copy(path / hf_files.SINGLE, path / name)
    if index:
        weight_map = {"weight_map": dict.fromkeys(hf_mapping.hf_names(MODEL), index)}
        (path / hf_files.INDEX).write_text("{}" if index == "{}" else json.dumps(weight_map))
    monkeypatch.setattr(serve, "SGLangServer", start_nothing)
    settings = config.Config(serve=config.Serve(checkpoint=str(path)), run=config.Run(dir=str(tmp_path)))
    with pytest.raises(UserError if said else StartedError, match=said or None):
        serve.run(settings)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [each for each in CONTENTS if each not in ("wandb", "dataset")])
def test_end_tokens_are_read_from_what_can_be_read(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": [3, "x", 5]}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / name).unlink()
    CONTENTS[content](tmp_path / name)
    with extra_memory(1 << 30):
        assert read_end_tokens(tmp_path) == ([7] if name == "config.json" else [3, 5])


def test_a_snapshot_in_hugging_faces_cache_is_a_checkpoint(tmp_path: Path, capsys) -> None:
    """Its files are links into `blobs`; results may lie beside it, not in their place."""
    made, repository = hf(tmp_path / "made"), tmp_path / "models--o--n"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(made.iterdir())):
        file.rename(blobs / f"{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (snapshot / "vocab.json").symlink_to("../../blobs/not-downloaded")
    inspect_verb.run(config.Config(inspect=config.Inspect(path=str(snapshot))))
    job = config.Merge(method="linear", members=[str(snapshot)], weights=[1.0])
    for beside in (snapshot.with_name("merged"), repository / "merged", tmp_path / "merged"):
        merge_verb.run(config.Config(merge=dataclasses.replace(job, output=str(beside))))
        assert not [file for file in beside.iterdir() if file.is_symlink()]
        assert json.loads((beside / "provenance.json").read_text())["files_left_out"] == ["vocab.json"]
    for over in (blobs, repository, snapshot, snapshot / "merged"):
        with pytest.raises(UserError, match="merge.output .*(holds|one of the sources|is no merge's output)"):
            merge_verb.run(config.Config(merge=dataclasses.replace(job, output=str(over))))
    assert len(list(blobs.iterdir())) == 3 and all(
        file.exists() for file in snapshot.iterdir() if "vocab" not in file.name
    )
