"""The format as Megatron-Core writes and reads it, over two ranks that torchrun started."""

import subprocess
import sys
from pathlib import Path

import checkpoints
import megatron_io
import pytest
import torch

from megatron_bai.cli import merge as merge_verb
from megatron_bai.config import Config


@pytest.mark.distributed
def test_megatrons_checkpoints_merge_and_the_result_loads_in_other_layouts(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = Path(__file__).with_name("megatron_io.py")
    done = subprocess.run([*launch, str(script), str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]

    for seed in range(3):
        found = checkpoints.read(tmp_path / str(seed))
        assert all(torch.equal(found[key], value) for key, value in checkpoints.model(seed).items())
    merge_verb.run(Config(merge=megatron_io.settings(tmp_path, "alone")))
    alone, together = checkpoints.read(tmp_path / "alone"), checkpoints.read(tmp_path / "together")
    assert alone.keys() == together.keys() and all(torch.equal(together[key], value) for key, value in alone.items())
    terms = [(checkpoints.model(seed), weight) for seed, weight in ((0, 0.5), (1, 0.25), (2, 0.25))]
    assert torch.equal(alone["decoder.scale"], checkpoints.exact(terms, "decoder.scale").bfloat16())


@pytest.mark.distributed
@pytest.mark.long
def test_megatrons_own_spellings_merge_and_the_result_loads(tmp_path):
    """Stacked, by layer and singleton keys, both names of the norm, padded vocabularies, dense layers first."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = Path(__file__).with_name("megatron_spellings.py")
    done = subprocess.run([*launch, str(script), str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("merged ") == 3

    keys = {path.name: set(checkpoints.read(path)) for path in (tmp_path / "homogeneous").iterdir()}
    assert keys["out"] == keys["0"] and not keys["0"] & {key for key in keys["1"] if "layers" in key}
    assert "decoder.layers.2.mlp.experts.experts.3.linear_fc1.weight_v" in keys["1"], "the test's premise"
