import checkpoints
import pytest

from megatron_bai.config import Merge


@pytest.fixture
def three(tmp_path):
    """Three checkpoints of one model, sharded in three ways, and the settings that merge them."""
    objects = {
        "decoder.layers.0._extra_state/shard_0_1": checkpoints.saved("base"),
        "rng_state/shard_0_1": checkpoints.saved("dice"),
    }
    checkpoints.write(tmp_path / "base", checkpoints.model(0), checkpoints.experts, objects)
    checkpoints.write(tmp_path / "instruct", checkpoints.model(1), checkpoints.columns)
    checkpoints.write(tmp_path / "reasoning", checkpoints.model(2), checkpoints.rows)
    return Merge(
        pretrained=str(tmp_path / "base"),
        members=[str(tmp_path / "instruct"), str(tmp_path / "reasoning")],
        weights=[0.25, 0.75],
        alpha=0.6,
        output=str(tmp_path / "out"),
        verify="all",
    )
