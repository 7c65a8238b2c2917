"""The restricted reader of `.metadata`."""

import argparse
import collections
import enum
import io
import os
import pickle
import signal

import pytest
import torch
from torch.distributed.checkpoint import metadata as dcp

from megatron_bai.checkpoint.safe_unpickle import read_arguments, read_metadata
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


class Run:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_plain_arguments_are_read_beside_objects_which_are_not_made(tmp_path):
    file, target = tmp_path / "common.pt", tmp_path / "made"
    objects = {
        "exit_signal": signal.SIGTERM, "params_dtype": torch.bfloat16, "tensor": torch.zeros(2), "set": {1},
        "mapping": collections.OrderedDict(a=1), "run": Run(target), "device": torch.device("cpu"),
    }  # fmt: skip
    plain = {"rotary_base": 10000, "norm_epsilon": 1e-6, "swiglu": True, "moe_layer_freq": [1, 1], "rope_type": "rope"}
    torch.save({"args": argparse.Namespace(**objects, **plain, none=None), "iteration": 3}, file)
    assert read_arguments(file) == plain and not target.exists()
    for content in ({"args": Run(target)}, {"iteration": 3}, [1]):
        torch.save(content, file)
        assert read_arguments(file) == {} and not target.exists()
    for data in (b"", b"PK\x03\x04damaged", pickle.dumps({"args": argparse.Namespace(a=1)})):
        file.write_bytes(data)
        assert read_arguments(file) == {}
    assert read_arguments(tmp_path / "none") == {}
