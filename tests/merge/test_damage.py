"""Random damage to a checkpoint is named, or leaves what is read as it was."""

from pathlib import Path

import checkpoints
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_safetensors import model
from test_safetensors import write as write_hf

from megatron_bai.checkpoint import atomic_dir, manifest
from megatron_bai.checkpoint.formats import open_checkpoint
from megatron_bai.cli import merge as merge_verb
from megatron_bai.config import Config, Inspect, Merge
from megatron_bai.errors import UserError
from megatron_bai.merge.compare import inspect_checkpoint


@pytest.fixture(scope="module", params=["torch_dist", "safetensors"])
def checkpoint(request, tmp_path_factory) -> Path:
    """A checkpoint with a manifest, and the files of one beside it."""
    target = tmp_path_factory.mktemp("damage") / "checkpoint"
    stage = atomic_dir.staging_path(target)
    if request.param == "torch_dist":
        objects = {"decoder.layers.0._extra_state/shard_0_1": checkpoints.saved("base")}
        checkpoints.write(stage, checkpoints.model(0), checkpoints.experts, objects)
        (stage / "config.json").write_text("{}")
    else:
        write_hf(stage, model(0))
    return manifest.finalize(stage, target, {"step": 12})


@st.composite
def damages(draw) -> tuple:
    """Which file, where in it (of 1), and what happens there."""
    how = draw(st.sampled_from(["flip", "zeros", "cut", "longer"]))
    return (
        draw(st.floats(0, 1, exclude_max=True)),
        draw(st.floats(0, 1, exclude_max=True)),
        how,
        draw(st.integers(1, 255)),
    )


def damaged(data: bytes, at: float, how: str, value: int) -> bytes:
    place = int(at * len(data))
    if how == "flip":
        return data[:place] + bytes([data[place] ^ value]) + data[place + 1 :]
    if how == "zeros":
        return data[:place] + bytes(min(4096, len(data) - place)) + data[place + 4096 :]
    return data[:place] if how == "cut" else data + data[place:]


def contents(path: Path) -> dict[str, bytes]:
    return {
        key: tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for key, tensor in checkpoints.read(path).items()
    }


@settings(max_examples=150)
@given(damages())
def test_with_a_manifest_all_damage_is_named(checkpoint: Path, damage: tuple) -> None:
    which, *rest = damage
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    file = files[int(which * len(files))]
    good = file.read_bytes()
    bad = damaged(good, *rest)
    file.write_bytes(bad)
    try:
        if bad.rstrip() == good.rstrip():
            return  # nothing changed but the manifest's last line end
        with pytest.raises(UserError) as caught:
            inspect_checkpoint(Config(inspect=Inspect(path=str(checkpoint))))
        assert "\n" not in str(caught.value)
    finally:
        file.write_bytes(good)


@settings(max_examples=150)
@given(damages())
def test_without_a_manifest_weights_that_are_damaged_are_named_or_harmless(checkpoint: Path, damage: tuple) -> None:
    """Of Megatron-Core's own checkpoints: the format's CRC-32. (safetensors files have nothing of the kind.)"""
    which, *rest = damage
    if not (files := sorted(checkpoint.glob("*.distcp"))):
        files = sorted(checkpoint.glob("*.safetensors"))
    file, note = files[int(which * len(files))], checkpoint / manifest.NAME
    good, listed = file.read_bytes(), note.read_bytes()
    wanted = contents(checkpoint)
    note.unlink()
    file.write_bytes(damaged(good, *rest))
    try:
        found = contents(checkpoint)
        with open_checkpoint(checkpoint) as source:
            for key in source.objects:
                source.read_object(key)
        assert found == wanted or file.suffix == ".safetensors"
    except UserError as error:
        assert "\n" not in str(error)
    finally:
        file.write_bytes(good)
        note.write_bytes(listed)


def test_a_merge_compares_safetensors_with_their_manifest_before_it_writes(tmp_path: Path) -> None:
    for name, seed in (("b", 0), ("m", 1)):
        manifest.finalize(write_hf(atomic_dir.staging_path(tmp_path / name), model(seed)), tmp_path / name, {})
    merge = Merge(pretrained=f"{tmp_path}/b", members=[f"{tmp_path}/m"], weights=[1.0], output=f"{tmp_path}/out")
    file = tmp_path / "m" / "model-00001-of-00002.safetensors"
    good = file.read_bytes()
    file.write_bytes(damaged(good, 0.9, "flip", 1))
    with pytest.raises(UserError, match="m/model-00001-of-00002.safetensors is not what was written"):
        merge_verb.run(Config(merge=merge))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "m"]
    file.write_bytes(good)
    merge_verb.run(Config(merge=merge))
    assert manifest.require_info(merge.output) and manifest.verify_weights(merge.output)


def test_an_object_that_is_damaged_is_named_before_anything_is_written(three: Merge) -> None:
    file = Path(three.pretrained, "__0_0.distcp")  # begins with the object
    file.write_bytes(damaged(file.read_bytes(), 0, "zeros", 0))
    with pytest.raises(UserError, match="__0_0.distcp: the (object|item) .* is damaged"):
        merge_verb.run(Config(merge=three))
    assert not list(file.parent.parent.glob(".*")) and not Path(three.output).exists()


@pytest.mark.parametrize(
    ("header", "named"),
    [
        (b'{"w":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}', "no number"),
        (b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}', "has 4 bytes"),
        (b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
         b'"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "is damaged"),
        (b'{"w":3}', "is damaged"),
    ],
)  # fmt: skip
def test_a_hostile_header_is_named(tmp_path: Path, header: bytes, named: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(UserError, match=f"model.safetensors .*{named}"):
        open_checkpoint(tmp_path)
