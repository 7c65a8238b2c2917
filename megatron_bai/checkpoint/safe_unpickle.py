"""Read the kinds of pickle in a `torch_dist` checkpoint without running what they name.

A pickle may name any function and have it called. `.metadata` (the index of the checkpoint) and the `data.pkl` of a
saved tensor need a dozen classes of torch, so these unpicklers know that dozen and refuse the rest.
"""

import collections
import enum
import pathlib
import pickle
import re
import zipfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed.checkpoint.filesystem as dcp_filesystem
import torch.distributed.checkpoint.metadata as dcp_metadata
import torch.distributed.checkpoint.planner as dcp_planner
import torch.serialization

from megatron_bai.errors import UserError

_MAX_ARGUMENTS_BYTES = 64 << 20  # of the pickle of the state that is not sharded

_METADATA_CLASSES: dict[tuple[str, str], Any] = {
    **{
        ("torch.distributed.checkpoint.metadata", name): getattr(dcp_metadata, name)
        for name in (
            "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta TensorProperties "
            "TensorStorageMetadata _MEM_FORMAT_ENCODING"
        ).split()
    },
    # `all_local_plans`, which Megatron-Core adds for its own saves
    **{
        ("torch.distributed.checkpoint.planner", name): getattr(dcp_planner, name)
        for name in "SavePlan TensorWriteData WriteItem WriteItemType".split()
    },
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): dcp_filesystem._StorageInfo,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("torch", "Size"): torch.Size,
    # A checkpoint written by an older Megatron-Core has these in place of DCP's own; only their fields are used.
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): SimpleNamespace,
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"): SimpleNamespace,
    # the path it was saved to
    ("pathlib", "PosixPath"): pathlib.PurePosixPath,
    ("pathlib._local", "PosixPath"): pathlib.PurePosixPath,
}


class _ForbiddenPickleError(pickle.UnpicklingError):
    """A pickle names something, or asks for something, that no checkpoint needs."""

    pass


def _enum_member(owner: Any, name: str) -> enum.Enum:
    """Stand in for `getattr`, by which Python 3.11.0 to 3.11.3 pickle the members of enumerations."""
    if not (isinstance(owner, type) and issubclass(owner, enum.Enum) and name in owner.__members__):
        raise _ForbiddenPickleError("it asks for an attribute, which no checkpoint index needs")
    return owner[name]


def _dtype(module: str, name: str) -> torch.dtype | None:
    """Return the dtype that a global name means, or None."""
    value = getattr(torch, name, None) if module == "torch" else None
    return value if isinstance(value, torch.dtype) else None


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        cls = _METADATA_CLASSES.get((module, name)) or _dtype(module, name)
        if cls is None:
            raise _ForbiddenPickleError(f"it names {module}.{name}, which no checkpoint index needs")
        return cls


def read_metadata(path: Path) -> Any:
    """Read the index in a checkpoint's `.metadata`.

    Returns:
        An object with `state_dict_metadata` and `storage_data`.

    Raises:
        UserError: it is missing, damaged, names anything but the classes of an index, or files in other directories;
            nothing was run.
    """
    try:
        with open(path, "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata.state_dict_metadata, dict) or not isinstance(metadata.storage_data, dict):
            raise _ForbiddenPickleError("it holds no index")
        _check_index(metadata)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: there is no torch_dist checkpoint, or an unfinished one") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except _ForbiddenPickleError as error:
        raise UserError(f"{path} is not a checkpoint's index ({error}): nothing in it was run; do not use it") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(f"{path} is damaged ({error!r}): restore the checkpoint from a copy") from None
    return metadata


def _check_index(metadata: Any) -> None:
    """Raise unless every item is in a file beside the index, and every number is a size or an offset."""
    for file in dict.fromkeys(info.relative_path for info in metadata.storage_data.values()):
        if Path(file).name != file:
            raise _ForbiddenPickleError(f"it points to the file {file!r}")
    for info in metadata.storage_data.values():
        _require_counts(info.offset, info.length)
    for key, stored in metadata.state_dict_metadata.items():
        if not isinstance(key, str):
            raise TypeError(f"{key!r} is no name")
        if isinstance(stored, dcp_metadata.TensorStorageMetadata):
            if not isinstance(stored.properties.dtype, torch.dtype):
                raise TypeError(f"{key} has no dtype")
            _require_counts(*stored.size)
            for chunk in stored.chunks:
                _require_counts(*chunk.offsets, *chunk.sizes)
                if not len(chunk.offsets) == len(chunk.sizes) == len(stored.size):
                    raise ValueError(f"a chunk of {key} has other dimensions")


def _require_counts(*numbers: Any) -> None:
    """Raise unless all are integers of at least 0."""
    for number in numbers:
        if type(number) is not int or number < 0:
            raise ValueError(f"{numbers} are no sizes")


@dataclass(frozen=True)
class SavedTensor:
    """How a tensor lies in the storage it was saved with; offset and strides in elements."""

    dtype: torch.dtype
    storage: str  # the record of the archive that holds the elements, `data/<storage>`
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_v2(
    storage: tuple[Any, ...], offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
) -> SavedTensor:
    """Stand in for torch's function, by the arguments it is pickled with."""
    dtype, key = storage
    return SavedTensor(dtype, key, offset, tuple(shape), tuple(strides))


def _rebuild_v3(
    storage: tuple[Any, ...],
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    grad: bool,
    hooks: Any,
    dtype: Any,
    *_: Any,
) -> SavedTensor:
    """Stand in for torch's function for newer dtypes."""
    return SavedTensor(dtype, storage[1], offset, tuple(shape), tuple(strides))


# The typed storages of torch's pickles; newer dtypes are named beside an untyped storage.
_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}

_TENSOR_CLASSES: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_v3,
    ("torch.storage", "UntypedStorage"): None,
    ("collections", "OrderedDict"): collections.OrderedDict,
}


def load_plain_archive(file: Path | BytesIO, name: str) -> Any:
    """Load an uncompressed archive of plain values, as `torch.save` makes one of the state that is not sharded.

    Args:
        file: its path or its bytes.
        name: of it, in errors.

    Raises:
        UserError: it is missing, damaged, or names what `torch.load(weights_only=True)` does not know; nothing was run.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise ValueError("it is compressed")
        if isinstance(file, BytesIO):
            file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{name} is missing: restore the checkpoint from a copy") from None
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from None
    except pickle.UnpicklingError as error:
        names = re.findall(r"GLOBAL (\S+)", str(error))
        reason = f"it names {names[0]}" if names else str(error).partition("\n")[0]
        raise UserError(
            f"{name} holds more than plain values ({reason}): nothing in it was run; do not use it"
        ) from None
    except Exception as error:  # a damaged archive raises nearly anything
        raise UserError(f"{name} is damaged ({error!r}): restore the checkpoint from a copy") from None


class _Ignored:
    """Stand in for any object that is no plain value: it takes what a pickle does with one, and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> "_Ignored":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> "_Ignored":
        return self

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        """Take a list's item."""

    def extend(self, _: Any) -> None:
        """Take a list's items."""

    def add(self, _: Any) -> None:
        """Take a set's item."""


class _ArgumentsUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return SimpleNamespace if (module, name) == ("argparse", "Namespace") else _Ignored

    def persistent_load(self, pid: Any) -> Any:
        return _Ignored()


def read_arguments(file: Path | BytesIO) -> dict[str, Any]:
    """Read those of Megatron-LM's arguments that are plain values from a state that is not sharded.

    Megatron-LM saves enumerations, dtypes and signals among them: whatever a pickle names is left out, and not run.

    Args:
        file: path or bytes of the archive of the state, or of a list with it.

    Returns:
        By name; empty where the file is missing, damaged or holds no arguments.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            (record,) = (info for info in archive.infolist() if info.filename.endswith("/data.pkl"))
            if record.file_size > _MAX_ARGUMENTS_BYTES:
                return {}
            content = _ArgumentsUnpickler(BytesIO(archive.read(record))).load()
        (state,) = content if isinstance(content, list) else [content]
        values = vars(state["args"])
    except Exception:  # a damaged pickle raises nearly anything; the checkpoint may be good nevertheless
        return {}
    return {name: value for name, value in values.items() if isinstance(value, bool | int | float | str | list)}


class _TensorUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _TENSOR_CLASSES:
            return _TENSOR_CLASSES[module, name]
        dtype = _STORAGES.get(name) if module == "torch" else None
        dtype = dtype or _dtype(module, name)
        if dtype is None:
            raise _ForbiddenPickleError(f"it names {module}.{name}")
        return dtype

    def persistent_load(self, pid: Any) -> tuple[torch.dtype | None, str]:
        label, dtype, key = pid[:3]
        if label != "storage" or not str(key).isdigit():
            raise _ForbiddenPickleError("it refers to something other than a storage")
        return dtype, str(key)


def read_saved_tensor(pickled: bytes) -> SavedTensor:
    """Read how `torch.save` stored a tensor from `data.pkl`; no storage is read and no tensor is made.

    Raises:
        pickle.UnpicklingError: it is not the record of one plain tensor.
    """
    tensor = _TensorUnpickler(BytesIO(pickled)).load()
    if not isinstance(tensor, SavedTensor) or not isinstance(tensor.dtype, torch.dtype):
        raise _ForbiddenPickleError("it holds something other than one tensor")
    return tensor
