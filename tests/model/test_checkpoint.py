"""Loading a Megatron checkpoint runs nothing that its files name."""

import pickle
from pathlib import Path

import pytest
import torch
from moe import MODEL

from megatron_bai.errors import UserError
from megatron_bai.model import checkpoint, hf, manifest
from megatron_bai.model.build import Actor


class Hostile:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_hostile_index_is_refused_and_not_run(tmp_path: Path) -> None:
    ran, target = tmp_path / "ran", tmp_path / "checkpoint"
    stage = manifest.staging(target)
    hf.write_config(MODEL, torch.float32, tmp_path, stage)
    (stage / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    (stage / ".metadata").write_bytes(pickle.dumps(Hostile(ran)))
    manifest.seal(stage, target, {})
    with pytest.raises(UserError, match="nothing in it was run"):
        checkpoint.load(Actor([], None, MODEL), target)
    assert not ran.exists()
