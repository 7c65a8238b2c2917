"""A parameter is in one group, whether a checkpoint has the family's published names or Megatron-Core's."""

import shutil
from pathlib import Path

import pytest
from model.families import published

from megatron_bai.merge.tensor_names.param_groups import GROUPS, param_group
from megatron_bai.model.architecture import read_architecture


@pytest.mark.parametrize("name", published.NAMES)
def test_published_names_are_in_the_group_of_megatrons(name: str, tmp_path: Path) -> None:
    shutil.copy(published.HERE / "configs" / f"{name}.json", tmp_path / "config.json")
    for key, kind in read_architecture(tmp_path).mappings.items():
        names = [*kind.hf, *kind.other, *([kind.fused] if kind.fused else ())]
        assert param_group(key) in GROUPS, key
        assert {param_group(each) for each in names} == {param_group(key)}, (key, names)
