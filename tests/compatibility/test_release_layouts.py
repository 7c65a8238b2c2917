"""Checkpoints of each layout that Megatron-Core's releases write (`data/releases`) are read, mixed, converted, trained.

All of it on the installed release, by the command line; and what a hostile one names is never run.
"""

import argparse
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from processes import TESTS, launch

from megatron_bai.checkpoint import safe_unpickle
from megatron_bai.checkpoint.common_state import COMMON, COMMON_OBJECT, find_common_state, read_arguments
from megatron_bai.checkpoint.formats import open_checkpoint
from megatron_bai.checkpoint.torch_dist import TorchDistReader
from megatron_bai.cli import inspect_verb
from megatron_bai.cli import merge as merge_verb
from megatron_bai.config import Config, Inspect, Merge
from megatron_bai.errors import UserError
from megatron_bai.merge.tensor_names.vocabulary import read_vocab_info
from megatron_bai.model.architecture import read_architecture

SAVED = sorted((TESTS / "data" / "releases").glob("megatron-core-*"))
BY_OBJECT = TESTS / "data" / "releases" / "megatron-core-0.19.2"
TOKENIZER = TESTS / "data" / "head-2fa74aa" / "pretrained"
ITERATION = "iter_0000003"
WEIGHTS = [0.25, 0.75]
each_release = pytest.mark.parametrize("saved", SAVED, ids=lambda path: path.name)


def read(path: Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(path) as source:
        shapes = {key: info.shape for key, info in source.tensors.items()}
        return {key: source.read(key, (0,) * len(shape), shape).clone() for key, shape in shapes.items()}


def merge(base: Path, members: list[Path], output: Path) -> None:
    """Of two members into the layout of the base."""
    names, common = [str(path) for path in members], {"method": "linear", "weights": WEIGHTS, "verify": "all"}
    merge_verb.run(Config(merge=Merge(pretrained=str(base), members=names, output=str(output), **common)))


def others(saved: Path) -> list[Path]:
    return [path for path in SAVED if path != saved]


def without_object(tmp_path: Path, change: bytes | None) -> Path:
    """A copy whose common state is other bytes, or is gone."""
    path = shutil.copytree(BY_OBJECT / ITERATION, tmp_path / "changed" / ITERATION)
    shutil.copy2(BY_OBJECT / "latest_checkpointed_iteration.txt", path.parent)
    metadata = safe_unpickle.read_metadata(path / ".metadata")
    (at,) = (at for at in metadata.storage_data if at.fqn == COMMON_OBJECT)
    if change is None:
        del metadata.storage_data[at], metadata.state_dict_metadata[COMMON_OBJECT]
    else:
        info = metadata.storage_data[at]
        info.relative_path, info.offset, info.length = "other.distcp", 0, len(change)
        (path / "other.distcp").write_bytes(change)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    return path


def archive(path: Path, content: object) -> bytes:
    torch.save(content, path)
    return path.read_bytes()


class Attack:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_both_layouts_are_here() -> None:
    assert [find_common_state(path / ITERATION) for path in SAVED] == [COMMON, COMMON, COMMON_OBJECT]


@each_release
def test_the_arguments_say_the_same_of_the_model(saved: Path) -> None:
    directory = saved / ITERATION
    assert read_arguments(directory) == read_arguments(SAVED[0] / ITERATION) != {}
    assert read_architecture(saved).num_experts == 2
    info = read_vocab_info(directory)
    assert (info.vocab_size, info.tied, Path(info.origin).name) == (64, False, find_common_state(directory)[-9:])


@each_release
def test_it_is_a_merges_base_and_member(saved: Path, tmp_path: Path) -> None:
    merge(saved, others(saved), tmp_path / "out")
    tensors, (one, other) = read(tmp_path / "out"), map(read, others(saved))
    for key, value in tensors.items():
        exact = WEIGHTS[0] * one[key].double() + WEIGHTS[1] * other[key].double()
        assert torch.equal(value, exact.to(value.dtype)), key
        assert not torch.equal(one[key], other[key]) or "norm" in key, "the releases' weights differ"
    assert find_common_state(tmp_path / "out") == find_common_state(saved / ITERATION)
    assert read_arguments(tmp_path / "out") == read_arguments(saved / ITERATION)
    written = [json.loads((path / "metadata.json").read_text()) for path in (tmp_path / "out", saved / ITERATION)]
    assert written[0] == written[1]


def test_inspect_reads_both_layouts(capsys: pytest.CaptureFixture[str]) -> None:
    inspect_verb.run(Config(inspect=Inspect(path=str(BY_OBJECT), other=str(SAVED[0]))))
    assert "differ" in capsys.readouterr().out


def test_one_that_lost_its_state_is_named(tmp_path: Path) -> None:
    path = without_object(tmp_path, None)
    with pytest.raises(UserError, match=r"has no common\.pt: it was never finished"):
        TorchDistReader(path)
    assert read_arguments(path) == {}
    (path / "metadata.json").unlink()
    with pytest.raises(UserError, match="is a checkpoint of torch.distributed.checkpoint"):
        TorchDistReader(path)


def test_an_unfinished_one_is_not_another_tools(tmp_path: Path) -> None:
    path = Path(shutil.copytree(BY_OBJECT / ITERATION, tmp_path / "copy"))
    (path / "metadata.json").unlink()
    with pytest.raises(UserError, match=r"has no metadata\.json: it was never finished"):
        TorchDistReader(path)


def test_reading_a_hostile_state_runs_nothing(tmp_path: Path) -> None:
    """In this process: the arguments, and a merge, which carries the object as it is."""
    ran = tmp_path / "ran"
    state = {"args": argparse.Namespace(num_layers=2, attack=Attack(ran))}
    path = without_object(tmp_path, archive(tmp_path / "attack", [state]))
    assert read_arguments(path) == {"num_layers": 2}
    merge(path, [path, SAVED[0]], tmp_path / "out")
    assert find_common_state(tmp_path / "out") == COMMON_OBJECT and not ran.exists()


@pytest.mark.distributed
def test_the_installed_release_loads_all_of_them(tmp_path: Path) -> None:
    """As they are, as results of a merge, as the start of a training; and none that is hostile."""
    ran, convert = tmp_path / "ran", ["convert", "backend.kind=cpu"]
    arguments = argparse.Namespace(**read_arguments(BY_OBJECT / ITERATION))
    hostile = without_object(tmp_path, archive(tmp_path / "attack", [{"args": arguments, "attack": Attack(ran)}]))
    with_tokenizer = Path(shutil.copytree(BY_OBJECT, tmp_path / "with-tokenizer"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy2(TOKENIZER / name, with_tokenizer / ITERATION)
    sources = {path.name: path for path in SAVED} | {"hostile": hostile}
    for path in SAVED:
        sources[f"merged-{path.name}"] = tmp_path / f"out-{path.name}"
        merge(path, others(path), sources[f"merged-{path.name}"])
    cases = {
        name: [*convert, f"convert.source={path}", f"convert.target={tmp_path}/hf-{name}"]
        for name, path in sources.items()
    }
    supervised = ["objective=sft", "supervised.rows=4", "supervised.length=48", "trainer.micro_batch_size=4"]
    start = ["init=checkpoint", f"init.checkpoint={with_tokenizer}", f"run.dir={tmp_path}/run", "trainer.steps=1"]
    cases["train"] = ["train", "backend.kind=cpu", *supervised, *start, f"trainer.save={tmp_path}/trained"]
    cases["plan"] = ["plan", "experiment=demo", *start[:3], "rollout.max_new_tokens=32"]
    cases["plan"] += ["parallel.tensor=1", "parallel.expert=1", "parallel.sequence=false"]
    launch(TESTS / "e2e" / "forks.py", tmp_path, json.dumps(cases))
    codes = json.loads((tmp_path / "codes.json").read_text())
    said = {name: (tmp_path / f"{name}.err").read_text()[-2000:] for name in cases}
    assert codes.pop("hostile") == 2 and "holds more than plain values" in said["hostile"] and not ran.exists()
    assert not {name: said[name] for name, code in codes.items() if code}
    for name, path in sources.items():
        if name == "hostile":
            continue
        before, after = read(path), read(tmp_path / f"hf-{name}")
        key = "embedding.word_embeddings.weight", "model.embed_tokens.weight"
        assert torch.equal(before[key[0]], after[key[1]])
        fc2 = before["decoder.layers.mlp.experts.experts.linear_fc2.weight"]
        for layer in range(2):
            for expert in range(2):
                assert torch.equal(
                    fc2[layer, expert], after[f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"]
                )
    assert read(tmp_path / "trained").keys() == read(BY_OBJECT).keys()
