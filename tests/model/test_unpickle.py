"""The restricted reader of `.metadata`."""

import enum
import io
import pickle

import pytest
import torch
from torch.distributed.checkpoint import metadata as dcp

from megatron_bai.checkpoint.safe_unpickle import read_metadata
from megatron_bai.errors import UserError


class ByAttribute(pickle.Pickler):
    """Pickles members of enumerations as Python 3.11.0 to 3.11.3 do."""

    def reducer_override(self, value):
        return (getattr, (type(value), value.name)) if isinstance(value, enum.Enum) else NotImplemented


class Attribute:
    def __init__(self, owner, name):
        self.arguments = owner, name

    def __reduce__(self):
        return getattr, self.arguments


def write(path, planner_data=None):
    tensor = dcp.TensorStorageMetadata(dcp.TensorProperties(dtype=torch.float32), torch.Size([2]), [])
    file = io.BytesIO()
    ByAttribute(file).dump(dcp.Metadata({"w": tensor}, planner_data, {}))
    path.write_bytes(file.getvalue())
    return path


def test_an_index_of_an_early_python_3_11_is_read(tmp_path):
    path = write(tmp_path / ".metadata")
    assert b"getattr" in path.read_bytes()
    assert read_metadata(path).state_dict_metadata["w"].size == torch.Size([2])


@pytest.mark.parametrize(
    "asked", [(torch.Size, "count"), (dcp.Metadata, "__init__"), (dcp._MEM_FORMAT_ENCODING, "mro")]
)
def test_no_other_attribute_is_given_out(tmp_path, asked):
    with pytest.raises(UserError, match="asks for an attribute, which no checkpoint index needs"):
        read_metadata(write(tmp_path / ".metadata", Attribute(*asked)))
