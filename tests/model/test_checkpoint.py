"""Loading a Megatron checkpoint runs nothing that its files name, and no damage goes unseen; saving can be killed."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from moe import ARCHITECTURE, MODEL
from processes import TESTS, launch

from megatron_bai.checkpoint import manifest
from megatron_bai.compat.releases import megatron_release
from megatron_bai.errors import UserError
from megatron_bai.model import hf_checkpoint, megatron_checkpoint
from megatron_bai.model.build import MegatronModel

pytestmark = pytest.mark.distributed


class Hostile:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_hostile_index_is_refused_and_not_run(tmp_path: Path) -> None:
    ran, target = tmp_path / "ran", tmp_path / "checkpoint"
    stage = manifest.make_staging_dir(target)
    hf_checkpoint.write_config(MODEL, torch.float32, tmp_path, stage)
    (stage / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    (stage / ".metadata").write_bytes(pickle.dumps(Hostile(ran)))
    manifest.finalize(stage, target, {})
    with pytest.raises(UserError, match="nothing in it was run"):
        megatron_checkpoint.load(MegatronModel([], None, ARCHITECTURE), target)
    assert not ran.exists()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `loading.py` left."""
    directory = tmp_path_factory.mktemp("loading")
    launch(TESTS / "model" / "loading.py", directory)
    return torch.load(directory / "found.pt")


def test_no_damage_goes_unseen(found: dict[str, Any]) -> None:
    said = {name: text for name, text in found["said"].items() if not name.startswith(("hostile", "full"))}
    assert said.pop("good") == "loaded True"
    assert said.pop("manifest.json cut") == "loaded True", "its last byte is a line's end"
    files = {name.split()[0] for name in said}
    assert {".metadata", "__0_0.distcp", "config.json", "manifest.json", "metadata.json"} <= files
    assert ("common.pt" in files) != megatron_release().common_is_object and len(said) == len(files) * 8 - 1
    for name, text in said.items():
        file, how = name.split(" ", 1)
        assert file in text and "\n" not in text and ("damaged" in text or how == "gone"), (name, text)


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        ("common", " holds more than plain values (it names posix.mkdir)"),
        ("object", "embedding.word_embeddings.weight is no tensor there"),
        (
            "item",
            "other.distcp: the item of embedding.word_embeddings.weight at byte 0 is damaged (it names posix.mkdir)",
        ),
        ("index", ".metadata is not a checkpoint's index (it names posix.mkdir"),
        ("compressed", "is compressed"),
        ("compressed common", "is compressed"),
        ("outside", "it points to the file '../good/__0_0.distcp'"),
        ("negative", "(-1, "),
        ("huge", "__0_0.distcp has "),
        ("config", "config.json: it is nested too deeply"),
    ],
)
def test_malice_is_one_line_and_runs_nothing(attack: str, said: str, found: dict[str, Any]) -> None:
    assert said in found["said"][f"hostile {attack}"] and not found["ran"]
    assert found["premise"] == {"object"}, "Megatron-Core's reader by itself would run the object"


def test_a_save_that_cannot_be_written_is_one_line(found: dict[str, Any]) -> None:
    said = [text for name, text in found["said"].items() if name.startswith("full")]
    assert len(said) == 3 and all("full.unfinished cannot be written: " in text and "\n" not in text for text in said)
    assert found["said"]["full 3000"].endswith("File too large"), "the cause"


def test_a_save_killed_in_its_middle_leaves_the_old_checkpoint_and_no_process(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(TESTS / "model" / "loading.py"), str(tmp_path), "save"]
    saving = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    writers = 0 if megatron_release().save_arguments else 2  # processes to 0.16, later one thread after another
    assert [saving.stdout.readline() for _ in range(writers or 1)] == ["in the middle\n"] * (writers or 1)
    children = psutil.Process(saving.pid).children(recursive=True)
    assert len(children) == writers, "Megatron-Core's writers, and no server for its queue"
    saving.kill()
    saving.wait()
    saving.stdout.close()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    stage = tmp_path / ".target.unfinished"
    assert any(path.stat().st_size for path in stage.glob("*.distcp")), "it was in the middle"
    assert manifest.read_info(stage) is None and manifest.require_info(tmp_path / "target") == {"step": 1}
    assert manifest.verify_weights(tmp_path / "target") == (writers or 1), "files"
